"""The error of x_0: asked for, measured on what `sample` returns, reached, and said truly by status and `converged`."""

import dataclasses

import pytest
import torch
from mixture import Mixture, latents, means

from diffusion import Clip, CoarseToFine, Parallel, Schedule, load_checkpoint, sample
from diffusion.methods.defects import SAFETY, carried, filled, finite
from diffusion.methods.parallel import weight_of
from diffusion.methods.visits import Visits
from diffusion.trajectory import LinearChain, summed
from pydeqsolve import ConvergenceError, Status

SCHEDULE = Schedule.linear(1000, 1e-4, 0.02)
ERRORS = [1e-2, 1e-3, 1e-4, 1e-5, 1e-7, 1e-9]


def true_errors(got, expected):
    """(B,) relative errors of x_0."""
    found, right = (x.x_0.double().flatten(1) for x in (got, expected))
    return (found - right).norm(dim=1) / right.norm(dim=1)


def rough(seed=1):
    return torch.randn(1000, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


MATRIX = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) / 3
NETWORKS = {
    "a tenth of x": lambda x, t: 0.1 * x,
    "x": lambda x, t: x,
    "against x": lambda x, t: -0.3 * x,
    "a matrix": lambda x, t: 0.5 * x + x @ MATRIX.T,
    "a wave over time": lambda x, t: 0.5 * torch.sin(t.double())[:, None] * x,
    "another at even steps": lambda x, t: 0.4 * x * (1 + (t % 2 == 0).double())[:, None],
    "a kink": lambda x, t: torch.where(t[:, None] > 500, 0.3 * x, 0.6 * x),
    "a short bump": lambda x, t: 0.5 * x + 2 * torch.exp(-(((t.double() - 333) / 3) ** 2))[:, None] * torch.sin(3 * x),
    "waves in x": lambda x, t: 0.5 * x + 0.5 * torch.sin(4 * x),
    "a mixture": Mixture(SCHEDULE, means()),
    "narrow modes": Mixture(SCHEDULE, means(5), spread=0.05),
    "a rough mixture": lambda x, t: Mixture(SCHEDULE, means())(x, t) + 0.05 * rough()[t],
}


@torch.no_grad()
@pytest.mark.parametrize("spacing", ["linspace", "trailing", "quadratic"])
@pytest.mark.parametrize("name", list(NETWORKS))
def test_the_error_asked_for_is_reached_and_what_is_said_of_it_is_true(name, spacing):
    network, x = NETWORKS[name], latents(3, 6)
    for T in (7, 40, 300):
        chain = SCHEDULE.chain(T, spacing)
        expected = sample(network, x, chain, "sequential")
        for error in (1e-2, 1e-3, 1e-5, 1e-8):
            got = sample(network, x, chain, error=error)
            assert got.converged.all(), (T, error)
            assert (true_errors(got, expected) <= error).all(), (T, error)
            assert (got.error <= error).all()


@torch.no_grad()
@pytest.mark.parametrize(("T", "spacing"), [(300, "trailing"), (700, "linspace")])
def test_a_network_as_easy_as_a_tenth_of_x_is_not_said_to_have_converged_before_it_has(T, spacing):
    chain, x = SCHEDULE.chain(T, spacing), torch.ones(1, 2, dtype=torch.float64)
    expected = sample(NETWORKS["a tenth of x"], x, chain, "sequential")
    for error in ERRORS:
        got = sample(NETWORKS["a tenth of x"], x, chain, error=error)
        true = true_errors(got, expected)
        assert got.converged.all()
        assert (true <= error).all()
        assert (true <= 3 * got.error).all()


@torch.no_grad()
@pytest.mark.parametrize(("T", "options"), [(100, {}), (1000, {}), (100, {"method": CoarseToFine()})])
def test_the_shipped_digits_meet_what_they_are_said_to(T, options):
    checkpoint = load_checkpoint("digits")
    chain, x = checkpoint.schedule.chain(T), latents(6, *checkpoint.shape, seed=9).float()
    expected = sample(checkpoint.model, x, chain, "sequential")
    for error in (1e-2, 1e-3, 1e-5):
        got = sample(checkpoint.model, x, chain, error=error, **options)
        assert got.converged.all()
        assert (true_errors(got, expected) <= error).all()


@torch.no_grad()
def test_a_hard_image_of_a_gentle_network_costs_no_second_evaluation_of_every_step():
    checkpoint, T = load_checkpoint("digits"), 1000
    chain = checkpoint.schedule.chain(T)
    x = torch.randn(8, *checkpoint.shape, generator=torch.Generator().manual_seed(0))[7:]
    got = sample(checkpoint.model, x, chain, CoarseToFine(), splitting=checkpoint.splitting(chain, "pixels"))
    assert got.converged.all()
    assert got.rounds <= 18
    assert got.evaluations.item() <= 1.35 * T


def chain_of(T=40):
    chain = SCHEDULE.chain(T)
    return LinearChain(chain.a[:, None] + 0 * chain.c[:, None], chain.c[:, None])


def test_defects_carried_by_a_linear_network_are_its_error():
    linear, J = chain_of(), -0.4
    x_T, N = latents(2, 3), 0.1 * latents(2, 40, 3, seed=4)
    base = linear.base(x_T, None).expand(2, -1, 3)
    x = linear.trajectory(base, N)
    right = [x_T]
    for k in range(40):
        right.append(linear.A[k] * right[-1] + linear.c[k] * J * right[-1])
    slope = torch.full((2, 40), J, dtype=torch.float64)
    error = carried(linear, base, x, N, J * x[:, :-1] - N, slope, slope, 0 * slope, torch.arange(2))
    true = (x[:, -1] - right[-1]).norm(dim=1) / x[:, -1].norm(dim=1)
    assert (error >= SAFETY * true * (1 - 1e-9)).all()  # J = 0 may say more
    slope = torch.full((2, 40), 0.0, dtype=torch.float64)
    assert (carried(linear, base, x, N, 0 * N, slope, slope, slope, torch.arange(2)) == 0).all()


def test_what_moves_have_told_sets_a_linear_chain_of_one_entry_right_at_once():
    linear, J = chain_of(), latents(1, 40, seed=6)[0]
    x_T, N = latents(2, 1), 0.1 * latents(2, 40, 1, seed=4)
    base = linear.base(x_T, None).expand(2, -1, 1)
    visits = Visits.none(N, 1e-16)
    i, k = torch.ones(2, 40).nonzero(as_tuple=True)
    for guess in (0 * N, N):  # two visits of every step tell J, but of the first, which never moves
        x = linear.trajectory(base, guess)
        visits.note(i, k, x[i, k], J[k, None] * x[i, k])
    delta = J[None, :, None] * x[:, :-1] - N
    found = linear.trajectory(base, N + visits.foretold(linear, delta, torch.arange(2)))
    right = [x_T]
    for step in range(40):
        right.append((linear.A[step] + linear.c[step] * J[step]) * right[-1])
    torch.testing.assert_close(found, torch.stack(right, 1), rtol=1e-9, atol=1e-9)
    plain = linear.trajectory(base, N + delta)
    assert (plain - torch.stack(right, 1)).norm() > 1e-3


def test_what_is_not_finite_is_corrected_by_its_defects_alone_and_harms_no_other_image():
    linear, N = chain_of(), latents(2, 40, 3)
    visits = Visits.none(N, 1e-16)
    visits.change[:], visits.direction[:] = 0.1 * N, N
    visits.change[0, 5] = torch.inf
    told = visits.foretold(linear, N, torch.arange(2))
    assert torch.equal(told[0], N[0])
    assert told[1].isfinite().all()
    assert not torch.equal(told[1], N[1])


def test_tolerances_are_tighter_where_there_is_no_signal_but_for_those_at_rounding():
    chain = SCHEDULE.chain(40)
    weight = weight_of(chain, torch.tensor([1e-4, 1e-7], dtype=torch.float64), 1e-7)
    assert weight[0, 0] == pytest.approx(0.5, rel=1e-3)
    assert weight[0, -1] == pytest.approx(1.0, rel=1e-3)
    assert (weight[0].diff() >= 0).all()
    assert (weight[1] * 1e-7 >= 0.5e-7).all()
    assert (weight_of(chain, torch.tensor([1e-9], dtype=torch.float64), 1e-7) == 1).all()


@pytest.mark.parametrize("T", [1, 2, 7, 64])
@pytest.mark.parametrize("width", [1, 3])
def test_errors_by_products_are_those_step_by_step(T, width):
    A, c, J, added = (
        latents(T, width, seed=2),
        latents(T, 1, seed=4),
        latents(4, 2, T, seed=5),
        latents(2, T, 3, seed=3),
    )
    e = torch.zeros(4, 2, 3, dtype=torch.float64)
    for k in range(T):
        e = (A[k] + c[k] * J[:, :, k, None]) * e + added[:, k]
    torch.testing.assert_close(LinearChain(A, c).errors(J, added), e)
    torch.testing.assert_close(summed(J[0], added[..., 0]), stepwise(J[0], added[..., 0]))


def stepwise(A, b):
    e = torch.zeros_like(b[:, 0])
    for k in range(b.shape[1]):
        e = A[:, k] * e + b[:, k]
    return e


@pytest.mark.parametrize("T", [2, 9])
def test_the_factor_of_a_step_is_its_largest_over_the_entries(T):
    A, c, J = latents(T, 5, seed=2), latents(T, 1, seed=4), latents(3, T, seed=5)
    every = A + c * J[..., None]
    expected = every.gather(-1, every.abs().argmax(-1, keepdim=True))[..., 0]
    torch.testing.assert_close(LinearChain(A, c).factor(J), expected, rtol=0, atol=0)


def test_states_that_are_not_finite_are_found_by_their_sum():
    x = latents(6, 5, seed=1)
    for k, bad in enumerate((torch.inf, -torch.inf, torch.nan)):
        x[k, k] = bad
    x[3, 0], x[3, 1] = torch.inf, -torch.inf
    assert finite(x).tolist() == x.isfinite().all(1).tolist()


def test_a_slope_that_is_unknown_is_taken_from_the_next_step_and_at_the_end_from_the_last():
    nan = torch.nan
    slope = torch.tensor([[nan, 1.0, nan, nan, 2.0, nan], [nan] * 6])
    assert filled(slope).tolist() == [[1.0, 1.0, 2.0, 2.0, 2.0, 2.0], [0.0] * 6]


@torch.no_grad()
@pytest.mark.parametrize("most", [1, 2, 3, 4, 6, 9])
@pytest.mark.parametrize(
    "options",
    [{}, {"method": Parallel()}, {"method": CoarseToFine()}, {"method": Parallel(window=30)},
     {"edit": lambda x, k, image: 0.9*x}, {"eta": 0.5}, {"method": "auto"}, {"error": 1e-9}],
    ids=["default", "parallel", "coarse", "window", "edit", "eta", "auto", "error"],
)  # fmt: skip
def test_a_cap_on_rounds_caps_every_model_call(options, most):
    model, options = Mixture(SCHEDULE, means()), dict(options)
    chain = SCHEDULE.chain(100, eta=options.pop("eta", 0.0))
    got = sample(model, latents(2, 6), chain, max_rounds=most, rows_per_call=10**6, **options)
    assert model.calls == got.rounds <= most
    assert (got.solution.status[~got.converged] == int(Status.MAX_STEPS)).all()
    if most >= 4 or options.get("method") != Parallel(
        window=30
    ):  # where all steps fit into them, the last rounds measure
        assert got.error.isfinite().all()


@torch.no_grad()
def test_rounds_that_run_out_leave_a_status_and_an_error_that_are_true():
    model, x, chain = Mixture(SCHEDULE, means()), latents(3, 6), SCHEDULE.chain(300)
    expected = sample(model, x, chain, "sequential")
    for method in (Parallel(), CoarseToFine()):
        for most in range(2, 14):
            got = sample(model, x, chain, method, max_rounds=most, error=1e-6)
            true = true_errors(got, expected)
            assert (got.converged == (got.error <= 1e-6)).all()
            assert (true[got.converged] <= 1e-6).all()
            assert (got.error >= 0.3 * true).all()


class Rounded(torch.nn.Module):
    """A network that answers in the precision of its weights, as one of them computes."""

    def __init__(self, network, dtype):
        super().__init__()
        self.network, self.weight = network, torch.nn.Parameter(torch.ones(1, dtype=dtype))
        self.eval()

    def forward(self, x, t):
        return self.network(x.double(), t).to(x.dtype) * self.weight


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["against x", "a matrix", "a wave over time", "waves in x"])
def test_an_image_is_not_said_to_have_converged_by_rounds_that_could_not_tell_how_errors_grow(name, dtype):
    model, x = Rounded(NETWORKS[name], dtype), latents(8, 6)
    for T, caps in ((70, (5, 6, 7, 10, 12, None)), (300, (8, None))):
        chain = SCHEDULE.chain(T)
        expected = sample(model, x, chain, "sequential")
        for most in caps:
            got = sample(model, x, chain, CoarseToFine(), max_rounds=most)
            true = true_errors(got, expected)
            assert (true <= got.error)[got.converged].all(), (T, most)
            assert (true <= got.error)[got.solution.status == int(Status.STALLED)].all(), (T, most)


@torch.no_grad()
def test_more_rounds_than_are_needed_change_nothing():
    model, x, chain = Mixture(SCHEDULE, means()), latents(3, 6), SCHEDULE.chain(100)
    free = sample(model, x, chain)
    capped = sample(model, x, chain, max_rounds=free.rounds)
    assert torch.equal(free.x_0, capped.x_0)
    assert capped.converged.all()


@torch.no_grad()
@pytest.mark.parametrize("method", [Parallel(), CoarseToFine(), Parallel(window=10)], ids=str)
def test_a_callback_that_stops_early_leaves_no_claim(method):
    model, chain = Mixture(SCHEDULE, means()), SCHEDULE.chain(100)
    got = sample(model, latents(2, 6), chain, method, error=1e-8, callback=lambda *_: True)
    assert not got.converged.any()
    assert (got.solution.status == int(Status.MAX_STEPS)).all()
    assert (got.error > 1e-8).all()


@torch.no_grad()
def test_a_callback_sees_all_images_while_some_are_gone_on_with():
    model, chain, seen = Mixture(SCHEDULE, means()), SCHEDULE.chain(80), []
    error = torch.tensor([1e-2, 1e-9, 1e-2], dtype=torch.float64)
    got = sample(
        model, latents(3, 6), chain, CoarseToFine(), error=error,
        callback=lambda step, states, residual: seen.append((step, tuple(states.shape), tuple(residual.shape))),
    )  # fmt: skip
    assert seen == [(k + 1, (3, 81, 6), (3,)) for k in range(len(seen))]
    assert got.converged.all()


@torch.no_grad()
def test_an_edit_sees_its_own_image_while_others_are_done():
    model, chain, x, shift = Mixture(SCHEDULE, means()), SCHEDULE.chain(30), latents(3, 6), latents(3, 6, seed=8)
    edit = lambda x, k, image: x + 0.1 * shift[image]  # noqa: E731
    error = torch.tensor([0.5, 0.5, 1e-10], dtype=torch.float64)
    got = sample(model, x, chain, edit=edit, error=error)
    expected = sample(model, x, chain, "sequential", edit=edit)
    assert got.converged.all()
    assert (true_errors(got, expected) <= error).all()


@torch.no_grad()
def test_every_image_is_pursued_to_its_own_error():
    error = torch.tensor([1e-2, 1e-5, 1e-8], dtype=torch.float64)
    model, x = Mixture(SCHEDULE, means()), latents(1, 6).repeat(3, 1)
    for T in (40, 300):
        chain = SCHEDULE.chain(T)
        got, expected = sample(model, x, chain, error=error), sample(model, x, chain, "sequential")
        assert (true_errors(got, expected) <= error).all()
        assert (got.evaluations.diff() > 0).all()


@torch.no_grad()
@pytest.mark.parametrize("T", [40, 300])
def test_more_than_the_precision_of_the_network_allows_ends_stalled_at_its_floor(T):
    checkpoint = load_checkpoint("digits")
    chain, x = checkpoint.schedule.chain(T), latents(2, *checkpoint.shape).float()
    got = sample(checkpoint.model, x, chain, error=1e-9)
    assert (got.solution.status == int(Status.STALLED)).all()
    assert not got.converged.any()
    assert (got.error >= 2 * torch.finfo(torch.float32).eps).all()
    assert (true_errors(got, sample(checkpoint.model, x, chain, "sequential")) <= got.error).all()


@torch.no_grad()
def test_rounding_that_a_chain_amplifies_is_part_of_the_error():
    chain, x = SCHEDULE.chain(10), latents(4, 6)
    network = lambda x, t: 2 * x  # noqa: E731
    got, expected = sample(network, x, chain, error=1e-12), sample(network, x, chain, "sequential")
    true = true_errors(got, expected)
    assert (true > 1e-12).all()  # of two ways to sum the same chain
    assert (got.error >= true).all()
    assert (got.solution.status == int(Status.STALLED)).all()


@torch.no_grad()
def test_where_rounding_leaves_more_than_the_default_allows_no_image_has_converged():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(8, 8, generator=generator) / 8**0.5
    x = torch.randn(6, 8, generator=generator)
    got = sample(lambda x, t: torch.sin(10 * x @ mixing), x, SCHEDULE.chain(20))  # float32
    above = got.error > 1e-3
    assert 0 < above.sum() < 6
    assert torch.equal(got.converged, ~above)
    assert (got.solution.status[above] == int(Status.STALLED)).all()


@torch.no_grad()
def test_autocast_lowers_what_is_asked_for_by_default():
    checkpoint = load_checkpoint("digits")
    chain, x = checkpoint.schedule.chain(30), latents(2, *checkpoint.shape).float()
    with torch.autocast("cpu", torch.bfloat16):
        got = sample(checkpoint.model, x, chain)
    assert got.converged.all()
    assert (got.error >= 5 * torch.finfo(torch.bfloat16).eps).all()


@torch.no_grad()
def test_sequential_sampling_is_exact_or_not_finite():
    model, chain, x = Mixture(SCHEDULE, means()), SCHEDULE.chain(10), latents(3, 6)
    x[1] = torch.nan
    got = sample(model, x, chain, "sequential")
    assert got.solution is None
    assert got.converged.tolist() == [True, False, True]
    assert got.error[[0, 2]].tolist() == [0.0, 0.0]
    assert got.error[1].isnan()


@torch.no_grad()
@pytest.mark.parametrize("T", [20, 300])
def test_an_image_that_is_not_finite_says_so(T):
    model, chain, x = Mixture(SCHEDULE, means()), SCHEDULE.chain(T), latents(3, 6)
    x[1] = torch.nan
    got = sample(model, x, chain)
    assert got.solution.status.tolist() == [0, int(Status.NONFINITE), 0]
    assert got.converged.tolist() == [True, False, True]
    assert got.error[1].isnan()


@torch.no_grad()
def test_a_network_that_is_zero_is_exact_at_once():
    got = sample(lambda x, t: 0 * x, latents(2, 6), SCHEDULE.chain(40), splitting="epsilon")
    assert got.converged.all()
    assert got.rounds <= 2


@torch.no_grad()
def test_a_result_says_on_one_line_what_was_found():
    got = sample(Mixture(SCHEDULE, means()), latents(2, 6), SCHEDULE.chain(10))
    assert "2 of 2 converged" in repr(got)
    assert "\n" not in repr(got)


@torch.no_grad()
@pytest.mark.parametrize("T", [1, 10, 300])
def test_a_network_that_answers_nan_is_said_to_have(T):
    got = sample(lambda x, t: x * torch.nan, latents(2, 6), SCHEDULE.chain(T))
    assert got.error.isnan().all()
    assert got.solution.status.tolist() == [Status.NONFINITE] * 2


@torch.no_grad()
def test_a_check_speaks_of_what_the_caller_of_sample_can_change():
    model, chain, x = Mixture(SCHEDULE, means()), SCHEDULE.chain(40), latents(3, 6)
    assert sample(model, x, chain).solution.check().converged.all()
    with pytest.raises(ConvergenceError, match=r"3 of 3 MAX_STEPS .*1.0e-06.*max_rounds, or loosen error"):
        sample(model, x, chain, error=1e-6, max_rounds=4).solution.check()
    with pytest.raises(ConvergenceError, match=r"3 of 3 STALLED .*precision.*loosen error"):
        sample(model.float(), x.float(), chain, error=1e-15).solution.check()
    x[1] = torch.nan
    with pytest.raises(ConvergenceError, match=r"1 of 3 NONFINITE .*latent") as seen:
        sample(model, x, chain).solution.check()
    assert "Stop" not in str(seen.value)


@pytest.mark.parametrize(("seed", "method"), [(1, Parallel()), (4, Parallel(20))], ids=["all", "window"])
def test_a_chain_that_clips_in_places_is_no_further_from_sequential_sampling_than_it_says(seed, method):
    generator = torch.Generator().manual_seed(seed)
    mu = torch.randn(6, 24, dtype=torch.float64, generator=generator)
    chain = dataclasses.replace(SCHEDULE, clip=Clip()).chain(100)

    def mixture(x, t):
        k = (chain.timesteps[None] - t[:, None]).abs().argmin(1)
        a, n = chain.signal[k][:, None], chain.noise[k][:, None]
        width = n.square() + 0.05 * a.square()
        mean = (-((x[:, None] - a[:, None] * mu).square().sum(2)) / (2 * width)).softmax(1) @ mu
        return (x - a * (mean + 0.05 * a / width * (x - a * mean))) / n

    x = torch.randn(4, 24, dtype=torch.float64, generator=generator)
    got = sample(mixture, x, chain, method)
    # Of one image rounding, another on other processors, decides whether the last round is under or over it.
    assert torch.equal(got.converged, got.error <= 1e-3)
    assert got.converged.sum() >= 3
    assert (true_errors(got, sample(mixture, x, chain, "sequential")) <= got.error).all()
