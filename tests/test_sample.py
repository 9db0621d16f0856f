"""`sample`: parallel equals sequential, and both are the chain that the formulas and diffusers say."""

import pytest
import torch
from mixture import Mixture, latents, means

from diffusion import CoarseToFine, Parallel, Schedule, Sequential, Splitting, invert, load_checkpoint, sample
from diffusion.chain import cosines
from pydeqsolve import Anderson, Implicit, Picard

SCHEDULE = Schedule.linear(1000, 1e-4, 0.02)
TIGHT = 1e-8


def relative(x, y):
    return ((x - y).flatten(1).norm(dim=1) / y.flatten(1).norm(dim=1)).max().item()


def by_hand(model, x, chain, noise=None):
    """Song et al. 2021, Eq. 12, written out."""
    for k in range(len(chain)):
        alpha, after = chain.alphas[k], chain.alphas_next[k]
        sigma = chain.eta * ((1 - after) / (1 - alpha)).sqrt() * (1 - alpha / after).sqrt()
        eps = model(x, chain.timesteps[k].expand(len(x)))
        clean = (x - (1 - alpha).sqrt() * eps) / alpha.sqrt()
        x = after.sqrt() * clean + (1 - after - sigma**2).clamp_min(0).sqrt() * eps
        if noise is not None:
            x = x + sigma * noise[:, k]
    return x


@torch.no_grad()
def test_sequential_sampling_is_the_ddim_formula():
    model, chain, x = Mixture(SCHEDULE, means()), SCHEDULE.chain(20), latents(3, 6)
    torch.testing.assert_close(sample(model, x, chain, method="sequential").x_0, by_hand(model, x, chain))


@torch.no_grad()
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_fresh_noise_enters_as_the_ddim_formula_has_it(eta):
    model, chain, x = Mixture(SCHEDULE, means()), SCHEDULE.chain(12, eta=eta), latents(2, 6)
    noise = torch.randn(2, 12, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    got = sample(model, x, chain, method="sequential", generator=torch.Generator().manual_seed(7)).x_0
    torch.testing.assert_close(got, by_hand(model, x, chain, noise))


@torch.no_grad()
@pytest.mark.parametrize("splitting", ["epsilon", "v", "gaussian"])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing", "quadratic"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_parallel_sampling_equals_sequential(splitting, spacing, eta):
    model, chain, x = Mixture(SCHEDULE, means()), SCHEDULE.chain(30, spacing, eta), latents(4, 6)
    runs = [
        sample(model, x, chain, method=m, splitting=splitting, error=TIGHT, generator=torch.Generator().manual_seed(3))
        for m in ("sequential", "parallel")
    ]
    assert relative(runs[1].trajectory, runs[0].trajectory) < 1e-7
    assert runs[1].solution.converged.all()


@torch.no_grad()
@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
@pytest.mark.parametrize("schedule", [SCHEDULE, Schedule.cosine(200), Schedule.scaled_linear(500, 0.00085, 0.012)])
def test_every_prediction_type_samples_the_same_images(prediction, schedule):
    x, chain = latents(3, 6), schedule.chain(25)
    oracle = sample(Mixture(schedule, means()), x, chain, method="sequential")
    model = Mixture(schedule, means(), prediction=prediction)
    for method in ("sequential", "parallel"):
        got = sample(model, x, chain, prediction=prediction, method=method, error=TIGHT)
        assert relative(got.x_0, oracle.x_0) < 1e-6, method


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing", "quadratic"])
def test_at_the_default_tolerance_states_and_images_are_within_one_in_a_thousand(spacing, eta, window):
    x = latents(3, 6)
    for schedule in (SCHEDULE, Schedule.cosine(200), Schedule.scaled_linear(500, 0.00085, 0.012)):
        chain = schedule.chain(20, spacing, eta)
        for prediction in ("epsilon", "v", "sample"):
            model = Mixture(schedule, means(), prediction=prediction)
            got, expected = (
                sample(model, x, chain, m, prediction=prediction, generator=torch.Generator().manual_seed(3))
                for m in (Parallel(window), Sequential())
            )
            assert relative(got.x_0, expected.x_0) <= 1e-3
            assert relative(got.trajectory, expected.trajectory) <= 1e-3


@torch.no_grad()
@pytest.mark.parametrize("window", [1, 3, 10, 40])
def test_a_window_bounds_the_rows_of_a_round_and_changes_no_result(window):
    model, chain, x = Mixture(SCHEDULE, means()), SCHEDULE.chain(40), latents(2, 6)
    oracle = sample(model, x, chain, method="sequential")
    largest = []
    wrapped = lambda x, t: largest.append(len(x)) or model(x, t)  # noqa: E731
    got = sample(wrapped, x, chain, Parallel(window), error=TIGHT)
    assert relative(got.x_0, oracle.x_0) < 1e-7
    assert max(largest) <= 2 * window


@torch.no_grad()
def test_a_window_of_one_is_sequential_sampling_row_for_row():
    model, chain, x = Mixture(SCHEDULE, means()), SCHEDULE.chain(15), latents(2, 6)
    got = sample(model, x, chain, Parallel(window=1))
    assert got.rounds == 15
    assert got.evaluations.tolist() == [15, 15]
    assert relative(got.x_0, sample(model, x, chain, method="sequential").x_0) < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("solver", [Picard(), Anderson(2, coupling="causal"), Anderson(5, coupling="independent")])
def test_the_chain_is_exact_after_as_many_rounds_as_steps_whatever_the_solver(solver):
    model, chain, x = Mixture(SCHEDULE, means()), SCHEDULE.chain(12), latents(2, 6)
    got = sample(model, x, chain, Parallel(solver=solver), splitting="epsilon", error=1e-15)
    assert relative(got.x_0, sample(model, x, chain, method="sequential").x_0) < 1e-12


@torch.no_grad()
def test_evaluations_are_the_rows_the_model_saw():
    model, chain, x = Mixture(SCHEDULE, means()), SCHEDULE.chain(60), latents(3, 6)
    for method in (Parallel(), Parallel(window=9), CoarseToFine(), Sequential()):
        model.rows = 0
        got = sample(model, x, chain, method)
        assert int(got.evaluations.sum()) == model.rows


@torch.no_grad()
def test_rounds_count_model_calls_in_sequence_and_a_split_call_once():
    model, chain, x = Mixture(SCHEDULE, means()), SCHEDULE.chain(60), latents(1, 6)
    whole = sample(model, x, chain, Parallel())
    model.calls = 0
    split = sample(model, x, chain, Parallel(), rows_per_call=7)
    assert split.rounds == whole.rounds < model.calls
    torch.testing.assert_close(split.x_0, whole.x_0, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_images_of_a_batch_do_not_change_each_other():
    model, chain, x = Mixture(SCHEDULE, means()), SCHEDULE.chain(25), latents(4, 6)
    together = sample(model, x, chain)
    for i in range(4):
        alone = sample(model, x[i : i + 1], chain)
        torch.testing.assert_close(alone.x_0[0], together.x_0[i], rtol=1e-12, atol=1e-12)
        assert alone.evaluations[0] == together.evaluations[i]


@torch.no_grad()
def test_a_nan_latent_harms_no_other_image():
    model, chain, x = Mixture(SCHEDULE, means()), SCHEDULE.chain(25), latents(3, 6)
    clean = sample(model, x, chain)
    x[1] = torch.nan
    got = sample(model, x, chain)
    torch.testing.assert_close(got.x_0[[0, 2]], clean.x_0[[0, 2]])
    assert got.solution.converged.tolist() == [True, False, True]


@torch.no_grad()
def test_conditioning_follows_its_image():
    model, chain, x = Mixture(SCHEDULE, means()), SCHEDULE.chain(20), latents(3, 6)
    shift = latents(3, 6, seed=5)
    got = sample(model, x, chain, inputs=(shift,), error=TIGHT)
    for i in range(3):
        alone = sample(model, x[i : i + 1], chain, method="sequential", inputs=(shift[i : i + 1],))
        assert relative(got.x_0[i : i + 1], alone.x_0) < 1e-7


@torch.no_grad()
def test_any_linear_part_leads_to_the_same_images():
    model, chain, x = Mixture(SCHEDULE, means()), SCHEDULE.chain(20), latents(2, 6)
    oracle = sample(model, x, chain, method="sequential").x_0
    kappa = torch.linspace(0.2, 0.9, 20, dtype=torch.float64)
    per_pixel = Splitting(kappa[:, None].repeat(1, 6) * torch.linspace(0.5, 1, 6), offset=latents(20, 6, seed=2))
    for splitting in (kappa, per_pixel):
        assert relative(sample(model, x, chain, splitting=splitting, error=TIGHT).x_0, oracle) < 1e-7


def correlated(count, seed=3):
    """(count, 1, 4, 4) draws of a Gaussian of far from equal variances in no special basis."""
    g = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64, generator=g)).Q
    root = Q * torch.logspace(0, -1, 16, dtype=torch.float64)
    mean = torch.randn(16, dtype=torch.float64, generator=g)
    data = mean + torch.randn(count, 16, dtype=torch.float64, generator=g) @ root.T
    return data.reshape(count, 1, 4, 4)


@torch.no_grad()
def test_the_covariance_of_gaussian_data_makes_every_step_linear():
    images = correlated(40)
    data = images.flatten(1)
    mean, covariance = data.mean(0), torch.cov(data.T, correction=0)

    def model(x, t):  # exact ε of that Gaussian
        alpha = SCHEDULE.alphas_cumprod[t][:, None, None]
        eye = torch.eye(16, dtype=torch.float64)
        offset = x.flatten(1) - alpha[:, :, 0].sqrt() * mean
        return (
            (1 - alpha).sqrt() * torch.linalg.solve(alpha * covariance + (1 - alpha) * eye, offset[..., None])
        ).view_as(x)

    chain, x = SCHEDULE.chain(40), latents(3, 1, 4, 4)
    expected = sample(model, x, chain, method="sequential")
    rounds = {}
    for basis in ("pixels", "frequencies", "covariance"):
        got = sample(model, x, chain, splitting=Splitting.fitted(chain, images, basis), error=TIGHT)
        assert relative(got.trajectory, expected.trajectory) < 1e-7
        rounds[basis] = got.rounds
    assert rounds["covariance"] <= 2 < rounds["pixels"]


@torch.no_grad()
@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_a_basis_changes_no_image_of_any_prediction_noise_edit_or_input(prediction, eta):
    model, chain, x = (
        Mixture(SCHEDULE, means(size=16), prediction=prediction),
        SCHEDULE.chain(15, eta=eta),
        latents(2, 1, 4, 4),
    )
    splitting, shift = Splitting.fitted(chain, correlated(40), "covariance"), latents(2, 16, seed=9)
    shared = {"inputs": (shift,), "edit": lambda x, k, image: x.clamp(-3, 3)}
    seen = []
    got, expected = (
        sample(model, x, chain, prediction=prediction, generator=torch.Generator().manual_seed(3), **shared, **options)
        for options in (
            {"splitting": splitting, "error": TIGHT, "callback": lambda step, states, residual: seen.append(states)},
            {"method": "sequential"},
        )
    )
    assert relative(got.trajectory, expected.trajectory) < 1e-6
    assert relative(seen[-1], expected.trajectory) < 1e-4


def test_gradients_pass_through_a_basis():
    model, chain = Mixture(SCHEDULE, means(size=16)), SCHEDULE.chain(8)
    splitting, gradients = Splitting.fitted(chain, correlated(40), "frequencies"), []
    for options in ({"splitting": splitting, "error": TIGHT}, {"method": "sequential"}):
        x = latents(2, 1, 4, 4).requires_grad_()
        out = sample(model, x, chain, gradient=Implicit(), **options)
        gradients.append(torch.autograd.grad(out.x_0.sin().sum(), [x, model.means]))
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


@torch.no_grad()
@pytest.mark.parametrize("n", [1, 5, 8])
def test_the_cosine_basis_is_orthonormal_and_that_of_scipy(n):
    from scipy.fft import dct

    Q = cosines(n)
    torch.testing.assert_close(Q.T @ Q, torch.eye(n, dtype=torch.float64))
    torch.testing.assert_close(Q.T, torch.from_numpy(dct(torch.eye(n).double().numpy(), norm="ortho", axis=0)))


def test_a_basis_that_does_not_fit_is_named():
    chain = SCHEDULE.chain(10)
    splitting = Splitting.fitted(chain, correlated(40), "covariance")
    with pytest.raises(ValueError, match="splitting: a basis"):
        sample(Mixture(SCHEDULE, means()), latents(2, 6), chain, splitting=splitting)
    with pytest.raises(ValueError, match="basis"):
        Splitting.fitted(chain, correlated(40), "wavelets")
    with pytest.raises(ValueError, match="images"):
        Splitting.fitted(chain, latents(3, 6))
    with pytest.raises(ValueError, match="basis"):
        invert(Mixture(SCHEDULE, means(size=16)), latents(2, 1, 4, 4).tanh(), chain, splitting=splitting)


@torch.no_grad()
def test_a_chain_that_jumps_from_pure_noise_to_the_image_in_one_step_is_solved():
    schedule = Schedule.from_alphas_cumprod(torch.tensor([0.5, 1e-12], dtype=torch.float64))
    model, x = Mixture(schedule, means()), latents(2, 6)
    for steps in (1, 2):
        chain = schedule.chain(steps)
        got = sample(model, x, chain, splitting="v", error=TIGHT)
        assert relative(got.x_0, sample(model, x, chain, method="sequential").x_0) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("name", ["digits", "fashion"])
def test_the_default_tolerance_reaches_one_in_a_thousand_on_the_shipped_models(name):
    checkpoint = load_checkpoint(name)
    chain = checkpoint.schedule.chain(100)
    x = latents(4, *checkpoint.shape).float()
    for splitting in ("v", checkpoint.splitting(chain)):
        got = sample(checkpoint.model, x, chain, splitting=splitting)
        oracle = sample(checkpoint.model, x, chain, method="sequential")
        assert relative(got.x_0, oracle.x_0) <= 1e-3
        assert got.rounds < 25


@torch.no_grad()
def test_a_callback_sees_every_round_and_may_stop():
    model, chain, x = Mixture(SCHEDULE, means()), SCHEDULE.chain(30), latents(2, 6)
    seen = []

    def watch(step, trajectory, residual):
        seen.append((step, tuple(trajectory.shape)))
        return step == 3

    sample(model, x, chain, callback=watch)
    assert seen == [(1, (2, 31, 6)), (2, (2, 31, 6)), (3, (2, 31, 6))]


@torch.no_grad()
@pytest.mark.parametrize("method", ["sequential", "parallel"])
def test_every_hook_and_limit_at_once_changes_no_image(method, capfd):
    model, chain, x, shift = Mixture(SCHEDULE, means()), SCHEDULE.chain(60), latents(3, 6), latents(3, 6, seed=5)
    plain = sample(model, x, chain, method=method, inputs=(shift,), error=TIGHT)
    largest, states, rounds = [], [], []
    watched = lambda x, t, c: largest.append(len(x)) or model(x, t, c)  # noqa: E731
    parallel = method == "parallel"
    got = sample(
        watched, x, chain, Parallel(window=9) if parallel else method, inputs=(shift,), error=TIGHT, progress=True,
        rows_per_call=5,
        gradient=Implicit(), edit=lambda x, k, image: states.append(k) or x,
        **({"callback": lambda r, *_: rounds.append(r)} if parallel else {}),
    )  # fmt: skip
    assert relative(got.trajectory, plain.trajectory) < 1e-7
    assert max(largest) <= 5
    assert sum(largest) == int(got.evaluations.sum())
    assert set(states) == set(range(1, 61))
    assert rounds == list(range(1, len(rounds) + 1))
    assert capfd.readouterr().err == ""  # no bar where there is no terminal


def test_a_callback_of_rounds_is_refused_where_there_are_none():
    with pytest.raises(ValueError, match="callback"):
        sample(
            Mixture(SCHEDULE, means()), latents(1, 6), SCHEDULE.chain(3), method="sequential", callback=lambda *_: None
        )


def test_an_empty_batch_gives_an_empty_result():
    model, chain = Mixture(SCHEDULE, means()), SCHEDULE.chain(5)
    for method in ("sequential", "parallel"):
        got = sample(model, torch.empty(0, 6, dtype=torch.float64), chain, method=method)
        assert got.x_0.shape == (0, 6)
        assert got.trajectory.shape == (0, 6, 6)


@pytest.mark.parametrize(
    ("change", "error", "names"),
    [
        ({"method": "fast"}, ValueError, "method"),
        ({"prediction": "x"}, ValueError, "prediction"),
        ({"splitting": "u"}, ValueError, "splitting"),
        ({"splitting": torch.ones(3)}, ValueError, "splitting"),
        ({"latent": torch.ones(2)}, ValueError, "latent"),
        ({"latent": torch.ones(2, 6, dtype=torch.int64)}, TypeError, "latent"),
        ({"latent": [1.0]}, TypeError, "latent"),
        ({"chain": 10}, TypeError, "chain"),
        ({"model": None}, TypeError, "model"),
        ({"method": 3}, TypeError, "method"),
        ({"method": Sequential}, TypeError, "method"),
        ({"start": latents(2, 6)}, TypeError, "start"),
        ({"error": 0.0}, ValueError, "error"),
        ({"error": -1e-3}, ValueError, "error"),
        ({"error": float("nan")}, ValueError, "error"),
        ({"error": float("inf")}, ValueError, "error"),
        ({"error": "small"}, TypeError, "error"),
        ({"error": True}, TypeError, "error"),
        ({"error": torch.ones(3)}, ValueError, "error"),
        ({"max_rounds": 0}, ValueError, "max_rounds"),
        ({"max_rounds": 3.0}, TypeError, "max_rounds"),
        ({"max_rounds": 9, "method": "sequential"}, ValueError, "max_rounds"),
        ({"inputs": torch.ones(2, 6)}, TypeError, "inputs"),
        ({"inputs": (torch.ones(3, 6),)}, ValueError, "inputs"),
        ({"gradient": "implicit"}, TypeError, "gradient"),
        ({"model": lambda x, t: x[:, :2]}, ValueError, "model"),
    ],
)
def test_a_wrong_argument_is_named(change, error, names):
    arguments = {"model": Mixture(SCHEDULE, means()), "latent": latents(2, 6), "chain": SCHEDULE.chain(10), **change}
    with pytest.raises(error, match=names):
        sample(**arguments)


@pytest.mark.parametrize(
    ("make", "error", "names"),
    [
        (lambda: Parallel(window=0), ValueError, "window"),
        (lambda: Parallel(window=2.0), TypeError, "window"),
        (lambda: Parallel(solver="anderson"), TypeError, "solver"),
    ],
)
def test_a_wrong_option_of_a_method_is_named(make, error, names):
    with pytest.raises(error, match=names):
        make()
