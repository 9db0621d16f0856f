"""Jacobians from the rounds of a solve on the nodes: what they reproduce, foretell and save, and whom they touch."""

import pytest
import torch
from mixture import Mixture, latents, means

from diffusion import CoarseToFine, Schedule, load_checkpoint, sample
from diffusion.methods.grid import TimeGrid
from diffusion.methods.secants import MEMORY, Secants
from diffusion.problem import ChainProblem

SCHEDULE = Schedule.linear(1000, 1e-4, 0.02)


def grid_of(images=2, splitting="v", model=None, D=6):
    model = Mixture(SCHEDULE, means(size=D)) if model is None else model
    chain = SCHEDULE.chain(100)
    problem, grid = ChainProblem.of(model, latents(images, D), chain, splitting=splitting), TimeGrid.sampling(100)
    return problem, grid, grid.part(problem.map, images, scaled=True)


def product(secants, d):
    """J d (B, n, D)."""
    return (secants.U * (secants.V * d[:, None]).sum(3, keepdim=True)).sum(1)


def after(rounds, images=2, **options):
    """Secants that have seen so many values at random states, the states and the values."""
    _, grid, part = grid_of(images, **options)
    secants, everyone, n = Secants(part, images, 6), torch.arange(images), len(grid.at)
    states = [latents(images, n, 6, seed=10 + k) for k in range(rounds)]
    values = [0.1 * latents(images, n, 6, seed=50 + k) for k in range(rounds)]
    for x, value in zip(states, values, strict=True):
        secants.note(everyone, x, value)
    return secants, states, values


@pytest.mark.parametrize("rounds", [2, 3, MEMORY + 1])
def test_the_jacobian_maps_the_last_move_to_the_change_of_the_value(rounds):
    secants, states, values = after(rounds)
    torch.testing.assert_close(product(secants, states[-1] - states[-2]), values[-1] - values[-2])


def test_what_is_foretold_solves_the_linearised_chain():
    secants, _, _ = after(3)
    moved = latents(2, secants.chain.G.shape[1], 6, seed=3)
    change = secants.change(torch.arange(2), moved)
    d = moved + secants.chain.response(change)
    torch.testing.assert_close(change, product(secants, d), rtol=1e-9, atol=1e-9)


def test_steps_that_are_done_foresee_no_change_and_cause_none():
    secants, _, _ = after(3)
    n = secants.chain.G.shape[1]
    open_ = (torch.arange(n) >= 5).expand(2, -1)
    moved = latents(2, n, 6, seed=3)
    change = secants.change(torch.arange(2), moved, open_)
    assert not change[:, :5].any()
    d = moved + secants.chain.response(change)
    torch.testing.assert_close(change[:, 5:], product(secants, d)[:, 5:], rtol=1e-9, atol=1e-9)


class Linear(torch.nn.Module):
    """ε = s_t x + b, entry by entry."""

    def forward(self, x, t):
        return torch.cos(t.double())[:, None] * x + 0.3


@torch.no_grad()
def test_a_chain_affine_in_one_entry_is_right_after_two_rounds_where_plain_iteration_takes_many():
    problem, grid, part = grid_of(2, model=Linear().eval(), D=1)
    base, everyone = problem.base()[:, grid.at], torch.arange(2)
    secants = Secants(part, 2, 1)
    N = M = torch.zeros_like(base)
    for _ in range(2):
        N = secants(N, everyone, base, wanted=torch.ones(2, len(grid.at), dtype=torch.bool))
        M = part(M, everyone, base)
    residual = (part(N, everyone, base) - N).abs().max()
    assert residual <= 1e-9
    assert (part(M, everyone, base) - M).abs().max() >= 1e-2


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_not_learnt_from(bad):
    secants, states, values = after(2, images=3)
    clean, _, _ = after(2, images=3)
    n = secants.chain.G.shape[1]
    x, value, everyone = latents(3, n, 6, seed=20), latents(3, n, 6, seed=21), torch.arange(3)
    clean.note(everyone, x, value)
    value[1, 4] = bad
    secants.note(everyone, x, value)
    moved = latents(3, n, 6, seed=22)
    change = secants.change(everyone, moved)
    assert change.isfinite().all()
    torch.testing.assert_close(change[[0, 2]], clean.change(everyone, moved)[[0, 2]])
    x, value = latents(3, n, 6, seed=23), latents(3, n, 6, seed=24)
    secants.note(everyone, x, value)  # the last move is that since the last value that was finite
    torch.testing.assert_close(product(secants, x - states[-1])[1, 4], (value - values[-1])[1, 4])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_an_image_whose_move_is_not_finite_is_foretold_none_and_harms_no_other(bad):
    secants, _, _ = after(3, images=3)
    moved, everyone = latents(3, secants.chain.G.shape[1], 6, seed=3), torch.arange(3)
    expected = secants.change(everyone, moved)
    moved[1, 0] = bad
    change = secants.change(everyone, moved)
    assert not change[1].any()
    torch.testing.assert_close(change[[0, 2]], expected[[0, 2]])


def test_a_singular_system_of_one_image_harms_no_other():
    secants, _, _ = after(3, images=2)
    everyone, moved = torch.arange(2), latents(2, secants.chain.G.shape[1], 6, seed=3)
    expected = secants.change(everyone, moved)
    secants.U[1], secants.V[1] = 0.0, 0.0
    secants.V[1, 0, 1], secants.U[1, 0, 1, 0] = 1.0, 1.0 / secants.chain.G[0, 1, 1]  # 1 − v·G u = 0
    change = secants.change(everyone, moved)
    assert change.isfinite().all()
    torch.testing.assert_close(change[0], expected[0])


def test_what_an_image_has_learnt_does_not_depend_on_rounds_that_it_sat_out():
    secants, _, _ = after(3)
    alone, _, _ = after(3)
    n = secants.chain.G.shape[1]
    for k in range(MEMORY + 1):
        secants.note(torch.tensor([1]), latents(1, n, 6, seed=60 + k), latents(1, n, 6, seed=70 + k))
    moved, first = latents(1, n, 6, seed=3), torch.tensor([0])
    for one in (secants, alone):
        one.note(first, latents(1, n, 6, seed=80), latents(1, n, 6, seed=81))
    torch.testing.assert_close(secants.change(first, moved), alone.change(first, moved))


def test_moves_within_the_rounding_of_the_network_are_not_learnt_from():
    secants, states, _ = after(2)
    before = secants.U.clone()
    secants.note(torch.arange(2), states[-1] * (1 + 4e-16), latents(2, before.shape[2], 6, seed=8))
    torch.testing.assert_close(secants.U[:, :2], before[:, :2])
    assert not secants.U[:, 2].any()


@torch.no_grad()
@pytest.mark.parametrize("splitting", ["v", "gaussian"])
@pytest.mark.parametrize("T", [100, 1000])
def test_the_shipped_digits_take_fewer_rounds_and_rows_than_without(monkeypatch, T, splitting):
    checkpoint = load_checkpoint("digits")
    chain, x = checkpoint.schedule.chain(T), latents(4, *checkpoint.shape, seed=3).float()
    split = checkpoint.splitting(chain) if splitting == "gaussian" else splitting

    def run():
        return sample(checkpoint.model, x, chain, CoarseToFine(), splitting=split)

    expected, got = sample(checkpoint.model, x, chain, method="sequential"), run()
    assert ((got.x_0 - expected.x_0).flatten(1).norm(dim=1) <= 1e-3 * expected.x_0.flatten(1).norm(dim=1)).all()
    monkeypatch.setattr(Secants, "change", lambda self, image, moved, wanted=None: torch.zeros_like(moved))
    plain = run()
    assert got.rounds < plain.rounds
    assert got.evaluations.sum() < plain.evaluations.sum()  # an image may need a second pass that it did not before


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_image_beside_others_that_finish_earlier_is_sampled_as_alone(dtype):
    checkpoint = load_checkpoint("digits")
    model, chain = checkpoint.model.to(dtype), checkpoint.schedule.chain(100)
    x = latents(3, *checkpoint.shape).to(dtype)
    rtol = torch.tensor([1e-5, 1e-3, 1e-2], dtype=torch.float64)
    beside = sample(model, x, chain, CoarseToFine(), error=10 * rtol)
    alone = sample(model, x[:1], chain, CoarseToFine(), error=1e-4)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-10}[dtype]
    torch.testing.assert_close(beside.x_0[:1], alone.x_0, rtol=tolerance, atol=tolerance)
    if dtype == torch.float64:
        assert beside.evaluations[0] == alone.evaluations[0]
    assert beside.evaluations[0] > beside.evaluations[2]


def test_what_the_network_did_across_an_earlier_move_counts_half_with_every_round_since():
    _, grid, part = grid_of(1, model=Linear().eval(), D=2)
    secants, image, shape = Secants(part, 1, 2), torch.arange(1), (1, len(grid.at), 2)
    x, value = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    for across in (4.0, 0.0, 0.0, 3.0):
        secants.note(image, x, value)
        x, value = x.clone(), value.clone()
        x[..., 0] += 1.0
        value[..., 1] += across
    torch.testing.assert_close(secants.across, torch.full_like(secants.across, 1.0), rtol=1e-5, atol=0)
    secants.note(image, x, value)
    torch.testing.assert_close(secants.across, torch.full_like(secants.across, 3.0), rtol=1e-5, atol=0)
