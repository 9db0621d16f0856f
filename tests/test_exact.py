"""Exact inversion: roots of every step, to the error asked for, measured on the latent that is returned."""

import pytest
import torch
from mixture import Mixture, latents, means

from diffusion import Clip, Exact, Schedule, invert, load_checkpoint, sample
from diffusion.inversion.backwards import Patient, reversed_map, stiff_steps
from diffusion.inversion.exact import SOLVER, STIFFNESS
from diffusion.methods.grid import OnGrid, TimeGrid
from diffusion.problem import ChainProblem
from pydeqsolve import Status, Stop, solve

SCHEDULE = Schedule.linear(1000, 1e-4, 0.02)


def images(model, chain, count=4):
    with torch.no_grad():
        return sample(model, latents(count, 6), chain, method="sequential").x_0


@pytest.mark.parametrize("steps", [10, 50, 100])
@pytest.mark.parametrize("splitting", ["v", "gaussian"])
def test_exact_inversion_of_a_mixture_reproduces_its_images(steps, splitting):
    model, chain = Mixture(SCHEDULE, means()), SCHEDULE.chain(steps)
    x_0 = images(model, chain)
    found = invert(model, x_0, chain, "exact", splitting=splitting)
    assert found.loss.max() <= 1e-10
    again = sample(model, found.x_T, chain, method="sequential").x_0
    assert (again - x_0).square().sum(1).max() <= 1e-10
    assert found.status.tolist() == [Status.CONVERGED] * 4


@torch.no_grad()
@pytest.mark.parametrize("seed", [1, 3])
def test_in_long_chains_too_an_image_converged_is_one_that_sequential_sampling_makes(seed):
    generator = torch.Generator().manual_seed(seed)
    matrix = 0.3 * torch.randn(6, 6, dtype=torch.float32, generator=generator).double()
    x_0 = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 9))

    def network(x, t):
        return 0.8 * torch.tanh(x @ matrix.T) + 0.2 * x

    chain = SCHEDULE.chain(101)
    found = invert(network, x_0, chain, error=1e-8)
    again = sample(network, found.x_T, chain, method="sequential").x_0
    assert found.converged.all()
    assert ((again - x_0).square().mean(1).sqrt() <= 1e-8).all()


@torch.no_grad()
@pytest.mark.parametrize("steps", [4, 101])
def test_a_network_that_answers_nan_inverts_nothing(steps):
    found = invert(lambda x, t: x * torch.nan, latents(2, 6), SCHEDULE.chain(steps))
    assert found.status.tolist() == [Status.NONFINITE] * 2


def test_exact_inversion_recovers_the_latent():
    model, chain, x_T = Mixture(SCHEDULE, means()), SCHEDULE.chain(50), latents(4, 6)
    x_0 = sample(model, x_T, chain, method="sequential").x_0
    found = invert(model, x_0, chain)
    assert (found.x_T - x_T).square().mean().sqrt() <= 1e-3


def test_exact_inversion_recovers_the_latents_of_digits_where_steps_are_dense_next_to_the_image():
    checkpoint = load_checkpoint("digits")
    chain = checkpoint.schedule.chain(50, "quadratic")
    x_T = latents(8, *checkpoint.shape).float()
    with torch.no_grad():
        x_0 = sample(checkpoint.model, x_T, chain, method="sequential").x_0
    found = invert(checkpoint.model, x_0, chain)
    assert (found.x_T - x_T).square().flatten(1).mean(1).sqrt().max() <= 1e-3
    assert found.status.tolist() == [Status.CONVERGED] * 8


@torch.no_grad()
def steep_digits(steps=50, kept=47, count=2):
    """The digits' network in float64, the last steps of a chain, the states that they start from, and the images."""
    checkpoint = load_checkpoint("digits")
    model, chain = checkpoint.model.double().requires_grad_(False), checkpoint.schedule.chain(steps)
    x_T = torch.randn(16, *checkpoint.shape, generator=torch.Generator().manual_seed(1)).double()[1 : 1 + count]
    states = sample(model, x_T, chain, method="sequential").trajectory
    return model, chain.tail(kept), states[:, kept], states[:, -1]


def test_of_several_states_that_a_step_takes_to_one_image_the_nearest_can_be_asked_for():
    model, chain, known, x_0 = steep_digits()
    found = invert(model, x_0, chain, Exact(nearest=True))
    assert found.converged.all()
    assert (found.x_T - known).square().mean((1, 2, 3)).sqrt().max() <= 1e-3


def test_the_nearest_state_of_an_image_does_not_depend_on_its_neighbours():
    model, chain, _, x_0 = steep_digits(kept=48)
    batch = torch.cat([x_0[:1] * torch.nan, x_0])
    alone, found = (invert(model, x, chain, Exact(nearest=True)) for x in (x_0[:1], batch))
    torch.testing.assert_close(found.x_T[1], alone.x_T[0], rtol=1e-6, atol=1e-7)
    assert found.status.tolist()[:2] == [Status.NONFINITE, Status.CONVERGED]


def test_rounds_allowed_bound_the_search_for_the_nearest_state_too():
    model, chain, _, x_0 = steep_digits(kept=48, count=1)
    for most in (12, 560):
        assert invert(model, x_0, chain, Exact(nearest=True), max_rounds=most).rounds <= most


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_nearest_state_makes_images_of_few_entries_as_well_as_any(dtype):
    model, chain = Mixture(SCHEDULE, means()), SCHEDULE.chain(20)
    x_0 = images(model, chain).to(dtype)
    found, any_root = (invert(model, x_0, chain, Exact(nearest=near)) for near in (True, False))
    assert found.converged.all() or not any_root.converged.all()
    assert found.loss.max() <= 10 * any_root.loss.max()


def test_nearest_is_true_or_false():
    with pytest.raises(TypeError, match="nearest: true or false is required, got 'yes'"):
        Exact(nearest="yes")


@pytest.mark.parametrize(("steps", "rows"), [(10, 25), (20, 14), (50, 13)])
def test_real_digits_come_back_from_their_latents(steps, rows):
    checkpoint = load_checkpoint("digits")
    x_0, chain = checkpoint.images[:8], checkpoint.schedule.chain(steps)
    found = invert(checkpoint.model, x_0, chain)
    assert found.loss.median() <= 64 * 5e-6**2
    assert found.evaluations.double().median() <= rows * steps
    assert found.x_T.dtype == torch.float32
    with torch.no_grad():
        again = sample(checkpoint.model, found.x_T, chain, method="sequential").x_0
    loss = (again - x_0).double().square().flatten(1).sum(1)
    assert loss[found.converged].max() <= 64 * 5.1e-6**2  # a float32 network rounds by how many rows it sees


@pytest.mark.parametrize("steps", [1, 4, 8])
def test_a_chain_of_few_steps_is_inverted_as_well_as_its_precision_allows(steps):
    checkpoint = load_checkpoint("digits")
    found = invert(checkpoint.model, checkpoint.images[:6], checkpoint.schedule.chain(steps))
    assert found.loss.median() <= {1: 1e-5, 4: 2.1e-9, 8: 2.9e-9}[steps]  # of 200 rounds; a blank image leaves 45
    assert found.loss.max() <= 1e-2


def test_fashion_images_meet_the_default_error_on_a_coarse_quadratic_chain():
    checkpoint = load_checkpoint("fashion")
    found = invert(checkpoint.model, checkpoint.images[:2], checkpoint.schedule.chain(20, "quadratic"))
    assert found.loss.max() <= 784 * 5e-6**2
    assert found.converged.tolist() == [True] * 2


def test_a_steep_network_is_inverted_step_by_step_where_all_steps_at_once_fail():
    model, chain = Mixture(SCHEDULE, means()), SCHEDULE.chain(20, "quadratic")
    x_0 = images(model, chain)

    def guided(x, t):  # away from the mean of all, as guidance goes
        eps = Mixture(SCHEDULE, means()[:1], spread=1.5)(x, t)
        return eps + 4.0 * (model(x, t) - eps)

    found = invert(guided, x_0, chain)
    again = sample(guided, found.x_T, chain, method="sequential").x_0
    assert (again - x_0).square().mean(1).sqrt()[found.converged].le(1e-6).all()
    assert found.converged.sum() >= 3


@pytest.mark.parametrize("error", [1e-2, 1e-5, 1e-8])
def test_an_image_is_called_converged_exactly_where_its_latent_makes_it_to_the_error_asked_for(error):
    model, chain = Mixture(SCHEDULE, means()), SCHEDULE.chain(20)
    x_0 = torch.cat([images(model, chain), 3 * latents(4, 6, seed=9)])
    for dtype in (torch.float64, torch.float32):
        found = invert(model, x_0.to(dtype), chain, error=error)
        again = sample(model, found.x_T, chain, method="sequential").trajectory
        assert found.x_T.dtype == dtype
        off = (again[:, -1].double() - x_0.to(dtype).double()).square().mean(1).sqrt()
        near = (off - error).abs() <= 1e-2 * error + 1e-7 * (dtype == torch.float32)
        assert ((off <= error) == found.converged)[~near].all()
        torch.testing.assert_close(found.error, (found.loss / 6).sqrt())


def test_an_error_below_what_the_latent_can_be_rounded_to_is_not_called_converged():
    model, chain = Mixture(SCHEDULE, means()), SCHEDULE.chain(20)
    x_0 = images(model, chain).float()
    found = invert(model, x_0, chain, error=1e-12)
    assert not found.converged.any()
    assert found.status.tolist() == [Status.STALLED] * 4
    assert found.error.max() <= 1e-6  # and goes as near as it can


def test_a_finer_error_is_met_when_asked_for():
    model, chain = Mixture(SCHEDULE, means()), SCHEDULE.chain(10)
    found = invert(model, images(model, chain), chain, error=1e-11)
    assert found.converged.all()
    assert found.loss.max() <= 6e-22


def test_images_that_are_done_cost_nothing_more():
    model, chain = Mixture(SCHEDULE, means()), SCHEDULE.chain(20)
    x_0 = images(model, chain)
    alone = invert(model, x_0, chain)
    hard = torch.full((1, 6), 40.0, dtype=torch.float64)
    both = invert(model, torch.cat([x_0, hard]), chain)
    assert both.evaluations[:4].tolist() == alone.evaluations.tolist()
    assert torch.equal(both.x_T[:4], alone.x_T)


def test_the_last_steps_of_a_coarse_chain_are_solved_by_themselves():
    counts = [stiff_steps(SCHEDULE.chain(steps), STIFFNESS) for steps in (10, 20, 50, 100, 1000)]
    assert counts == [2, 2, 2, 2, 1]
    assert stiff_steps(Schedule.linear(1000, 1e-4, 0.02).chain(10, "trailing"), STIFFNESS) == 1


@pytest.mark.parametrize("rounds", [1, 3, 9, 17, 45])
def test_the_rounds_never_exceed_those_allowed(rounds):
    checkpoint = load_checkpoint("digits")
    chain, calls = checkpoint.schedule.chain(10), []

    def counted(x, t):
        calls.append(len(x))
        return checkpoint.model(x, t)

    found = invert(counted, checkpoint.images[:3], chain, max_rounds=rounds, error=1e-9)
    assert found.rounds <= rounds
    assert found.rounds + found.check == len(calls)
    assert int(found.evaluations.sum()) == sum(calls)
    assert found.status.tolist() == [Status.MAX_STEPS] * 3
    assert found.loss.isfinite().all()


def test_an_image_that_exact_inversion_misses_is_never_worse_than_one_pass():
    checkpoint = load_checkpoint("fashion")
    x_0, chain = checkpoint.images[8:9], checkpoint.schedule.chain(20)
    exact = invert(checkpoint.model, x_0, chain, max_rounds=60)
    rough = invert(checkpoint.model, x_0, chain, "ddim")
    assert exact.status.item() == Status.MAX_STEPS
    assert exact.loss.item() <= rough.loss.item() * (1 + 1e-6)


def test_a_round_on_nodes_leaves_the_solution_where_it_is_and_costs_their_rows_alone():
    model, chain = Mixture(SCHEDULE, means()), SCHEDULE.chain(50)
    x_0 = images(model, chain)
    forward = ChainProblem.of(model, x_0, chain).map
    backward, image = reversed_map(forward, 0, 40, forward.splitting), torch.arange(4)
    backward.evaluations = torch.zeros(4, dtype=torch.int64)
    base = backward.linear.base(x_0, None)
    with torch.no_grad():
        start, stop = torch.zeros(4, 40, 6, dtype=torch.float64), Stop(1e-12, max_steps=200)
        N = solve(backward, start, (image, base), solver=SOLVER, stop=stop, gradient=None).z
        grid = TimeGrid.inversion(40)
        backward.evaluations.zero_()
        on_nodes = OnGrid(backward, grid)
        moved = on_nodes(N, image, base)
        smooth = on_nodes(N + 1e-3, image, base) - N
    assert (moved - N).abs().max() <= 1e-9
    assert smooth.abs().max() <= 0.9e-3  # the other steps follow the nodes
    assert backward.evaluations.tolist() == [2 * len(grid.at)] * 4
    assert len(grid.at) < 12


def test_an_image_that_a_chain_clips_away_is_given_up_when_the_steps_no_longer_come_nearer():
    checkpoint = load_checkpoint("digits")
    clipped = Schedule(checkpoint.schedule.alphas_cumprod, clip=Clip(1.0)).chain(20)
    with pytest.warns(UserWarning, match="clips"):
        found = invert(checkpoint.model, checkpoint.images[:4], clipped)
    assert found.status.tolist() == [Status.STALLED] * 4
    free = invert(checkpoint.model, checkpoint.images[:4], checkpoint.schedule.chain(20))
    assert found.evaluations.double().mean() <= 3 * free.evaluations.double().mean()  # ten times as many without


def by_plain_iteration(model, x_0, chain, each):
    """Every step backwards by `each` plain iterations from the ε found last: latents, and evaluations an image."""
    x, eps = x_0.double(), torch.zeros_like(x_0, dtype=torch.float64)
    for k in range(len(chain) - 1, -1, -1):
        for _ in range(each):
            state = (x - chain.c[k] * eps) / chain.a[k]
            eps = model(state.float(), chain.timesteps[k].expand(len(x))).double()
        x = (x - chain.c[k] * eps) / chain.a[k]
    return x, each * len(chain)


@torch.no_grad()
def test_with_dense_steps_next_to_the_image_it_needs_less_than_plain_iteration_and_thirty_rounds():
    digits = load_checkpoint("digits")
    x_0, chain = digits.images[:8], digits.schedule.chain(50, "quadratic")
    found = invert(digits.model, x_0, chain)
    assert found.converged.all()
    assert found.rounds <= 30
    x_T, evaluations = by_plain_iteration(digits.model, x_0, chain, 7)
    plain = (sample(digits.model, x_T, chain, method="sequential").x_0 - x_0).square().flatten(1).sum(1)
    assert (found.evaluations - found.check).double().mean() <= 1.03 * evaluations
    assert found.loss.median() < 0.5 * plain.median()  # one iteration a step more gains a factor of ten


@torch.no_grad()
def test_a_step_that_has_settled_after_all_before_it_is_evaluated_no_more_and_keeps_its_value():
    asked, target = [], torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)[None, :, None]

    def halfway(z, image, wanted):
        asked.append(wanted.tolist())
        return torch.where(wanted[:, :, None], (z + target) / 2, z)

    allowance, tolerance = torch.tensor([100]), torch.tensor([0.1], dtype=torch.float64)
    patient = Patient(halfway, 0.0, (50, 50), allowance, 0, tolerance)
    image = torch.tensor([0])
    z = target + torch.tensor([0.1, 4.0, 0.1, 0.1], dtype=torch.float64)[None, :, None]
    first = patient(z, image)
    patient(first, image)
    moved = patient(z + 1, image)
    assert asked == [[[True] * 4], [[False, True, True, True]], [[False, True, True, True]]]
    assert torch.equal(moved[0, 0], first[0, 0])


@torch.no_grad()
def test_few_rounds_allowed_are_spent_on_all_steps_together():
    digits = load_checkpoint("digits")
    x_0, chain = digits.images[:4], digits.schedule.chain(50, "quadratic")
    found = invert(digits.model, x_0, chain, max_rounds=12)
    assert found.rounds <= 12
    assert found.loss.max() < 1e-5
