"""Long chains on a few nodes: the images of sequential sampling, every step evaluated, about as many rows as steps."""

import pytest
import torch
from mixture import Mixture, latents, means

from diffusion import CoarseToFine, Parallel, Schedule, load_checkpoint, sample
from diffusion.methods.grid import NodeChain, interpolation, nodes
from diffusion.methods.parallel import START
from diffusion.trajectory import LinearChain

SCHEDULE = Schedule.linear(1000, 1e-4, 0.02)


def relative(x, y):
    return ((x - y).flatten(1).norm(dim=1) / y.flatten(1).norm(dim=1)).max().item()


class Watched(Mixture):
    """A mixture that notes at which time steps it was asked, and can be made rough over time."""

    def __init__(self, roughness=0.0):
        super().__init__(SCHEDULE, means())
        g = torch.Generator().manual_seed(5)
        self.rough = roughness * torch.randn(1000, 6, dtype=torch.float64, generator=g)
        self.asked = []

    def forward(self, x, t):
        self.asked.append(t)
        return super().forward(x, t) + self.rough[t]


def both(model, x, T=200, **options):
    chain = SCHEDULE.chain(T)
    expected = sample(model, x, chain, method="sequential")
    model.asked = []
    return sample(model, x, chain, CoarseToFine(), **options), expected


@torch.no_grad()
@pytest.mark.parametrize("T", [60, 200, 1000])
@pytest.mark.parametrize("splitting", ["epsilon", "v", "gaussian"])
def test_nodes_give_the_images_and_states_of_sequential_sampling_to_the_error_asked_for(T, splitting):
    got, expected = both(Watched(), latents(4, 6), T, splitting=splitting)
    assert relative(got.x_0, expected.x_0) <= 1e-3
    assert relative(got.trajectory, expected.trajectory) <= 1e-3
    assert got.solution.converged.all()


@torch.no_grad()
@pytest.mark.parametrize("rtol", [1e-3, 1e-5, 1e-8])
def test_the_error_follows_the_tolerance(rtol):
    got, expected = both(Watched(), latents(4, 6), error=10 * rtol)
    assert relative(got.x_0, expected.x_0) <= 10 * rtol


@torch.no_grad()
def test_every_step_of_every_image_is_evaluated_and_few_more_than_once():
    model = Watched()
    got, _ = both(model, latents(1, 6), 1000, rows_per_call=1000)
    assert len(torch.cat(model.asked).unique()) == 1000
    assert sum(map(len, model.asked)) == int(got.evaluations.sum())
    assert 1000 <= int(got.evaluations) <= 1300
    assert got.rounds == len(model.asked)


@torch.no_grad()
def test_the_first_rounds_of_all_steps_are_made_on_the_nodes():
    model, chain, x = Watched(), SCHEDULE.chain(200), latents(2, 6)
    expected = sample(model, x, chain, method="sequential")
    model.asked = []
    got = sample(model, x, chain, Parallel(), rows_per_call=1000)
    assert [len(t) for t in model.asked[: START + 1]] == [2 * len(nodes(200))] * START + [2 * 200]
    assert sum(map(len, model.asked)) == int(got.evaluations.sum())
    assert got.rounds == len(model.asked)
    assert relative(got.x_0, expected.x_0) <= 1e-3


@torch.no_grad()
def test_first_rounds_that_end_in_nan_leave_no_trace():
    class NotAtFirst(Watched):
        def forward(self, x, t):
            out = super().forward(x, t)
            return out * torch.nan if len(self.asked) <= START else out

    model, chain, x = NotAtFirst(), SCHEDULE.chain(100), latents(2, 6)
    got = sample(model, x, chain, Parallel())
    assert got.solution.converged.all()
    assert relative(got.x_0, sample(Mixture(SCHEDULE, means()), x, chain, method="sequential").x_0) <= 1e-3


@torch.no_grad()
@pytest.mark.parametrize("options", [{"method": Parallel(window=50)}, {"edit": lambda x, k, image: x}])
def test_windows_and_edits_have_no_start_on_the_nodes(options):
    model = Watched()
    sample(model, latents(1, 6), SCHEDULE.chain(100), **options)
    assert len(model.asked[0]) == (100 if "edit" in options else 50)


@torch.no_grad()
def test_an_exact_solve_takes_no_more_rounds_than_steps():
    model, chain, x = Watched(), SCHEDULE.chain(60), latents(1, 6)
    expected = sample(model, x, chain, method="sequential")
    got = sample(model, x, chain, Parallel(), error=1e-15)
    assert got.rounds <= 60
    assert relative(got.x_0, expected.x_0) <= 1e-12


@torch.no_grad()
def test_a_model_that_no_spline_can_follow_is_solved_for_all_steps_together():
    got, expected = both(Watched(roughness=0.3), latents(3, 6), 300)
    assert relative(got.x_0, expected.x_0) <= 1e-3
    assert got.solution.converged.all()


@torch.no_grad()
def test_images_on_nodes_do_not_change_each_other():
    model, x = Watched(), latents(4, 6)
    together, _ = both(model, x)
    for i in range(4):
        alone, _ = both(model, x[i : i + 1])
        torch.testing.assert_close(alone.x_0[0], together.x_0[i], rtol=1e-9, atol=1e-9)
        assert alone.evaluations[0] == together.evaluations[i]


@torch.no_grad()
def test_a_nan_latent_on_nodes_harms_no_other_image():
    model, x = Watched(), latents(3, 6)
    clean, _ = both(model, x)
    x[1] = torch.nan
    got, _ = both(model, x)
    torch.testing.assert_close(got.x_0[[0, 2]], clean.x_0[[0, 2]])
    assert got.solution.converged.tolist() == [True, False, True]


@torch.no_grad()
def test_images_may_ask_for_errors_of_their_own():
    rtol = torch.tensor([1e-2, 1e-7], dtype=torch.float64)
    got, expected = both(Watched(), latents(1, 6).repeat(2, 1), error=10 * rtol)
    assert relative(got.x_0[1:], expected.x_0[1:]) <= 1e-6
    assert got.evaluations[0] < got.evaluations[1]


@torch.no_grad()
def test_conditioning_on_nodes_follows_its_image():
    model, chain, x, shift = Mixture(SCHEDULE, means()), SCHEDULE.chain(100), latents(3, 6), latents(3, 6, seed=5)
    got = sample(model, x, chain, CoarseToFine(), inputs=(shift,))
    for i in range(3):
        alone = sample(model, x[i : i + 1], chain, method="sequential", inputs=(shift[i : i + 1],))
        assert relative(got.x_0[i : i + 1], alone.x_0) <= 1e-3


@torch.no_grad()
def test_a_callback_sees_the_round_of_all_steps_and_may_stop_there():
    seen = []

    def watch(step, trajectory, residual):
        seen.append((tuple(trajectory.shape), bool(residual.isfinite().all())))
        return True

    got, _ = both(Watched(), latents(2, 6), callback=watch, error=1e-9)
    assert seen == [((2, 201, 6), True)]
    assert not got.solution.converged.any()


@pytest.mark.parametrize("small", [0, 2**19])
@pytest.mark.parametrize("width", [1, 5])
@pytest.mark.parametrize("T", [40, 150])
def test_states_at_the_nodes_are_those_of_the_whole_chain_with_a_spline_between(monkeypatch, T, width, small):
    monkeypatch.setattr("diffusion.methods.grid.SMALL", small)
    A = 0.9 + 0.2 * latents(T, width, seed=3).sigmoid()
    linear, at = LinearChain(A, latents(T, 1, seed=4)), nodes(T)
    spread = interpolation(at, T)
    N, x = latents(2, len(at), 5, seed=6), latents(2, 5, seed=7)
    base = linear.base(x, None)
    whole = linear.trajectory(base.expand(2, -1, 5), spread @ N)[:, at]
    torch.testing.assert_close(NodeChain(linear, at, spread).trajectory(base[:, at], N), whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("T", [60, 100, 1000])
def test_nodes_rise_from_the_first_step_to_the_last(T):
    at = nodes(T)
    assert (at[0], at[-1]) == (0, T - 1)
    assert (at.diff() > 0).all()
    assert 11 <= len(at) <= 24


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [{"eta": 0.5}, {"edit": lambda x, k, image: x}, {"T": 59}],
    ids=["fresh noise", "an edit", "a short chain"],
)
def test_what_nodes_cannot_do_is_refused_when_asked_for(change):
    chain = SCHEDULE.chain(change.pop("T", 100), eta=change.pop("eta", 0.0))
    with pytest.raises(ValueError, match="CoarseToFine"):
        sample(Watched(), latents(1, 6), chain, CoarseToFine(), **change)


@torch.no_grad()
def test_parallel_takes_a_long_chain_to_the_nodes_by_itself():
    model, x, chain = Watched(), latents(1, 6), SCHEDULE.chain(400)
    methods = ("parallel", CoarseToFine(), Parallel())
    chosen, nodes_, together = (sample(model, x, chain, method) for method in methods)
    assert torch.equal(chosen.evaluations, nodes_.evaluations)
    assert chosen.evaluations < together.evaluations
    assert torch.equal(chosen.x_0, nodes_.x_0)


@torch.no_grad()
def test_the_shipped_digits_need_little_more_than_one_row_a_step():
    checkpoint = load_checkpoint("digits")
    chain, x = checkpoint.schedule.chain(1000), latents(6, *checkpoint.shape).float()
    expected = sample(checkpoint.model, x, chain, method="sequential")
    got = sample(checkpoint.model, x, chain, splitting=checkpoint.splitting(chain))
    assert relative(got.x_0, expected.x_0) <= 1e-3
    assert got.evaluations.double().median() <= 1500
