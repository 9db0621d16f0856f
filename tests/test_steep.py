"""Networks much steeper than trained denoisers: what is said of the error of x_0 holds for them too."""

from dataclasses import replace

import pytest
import torch
from mixture import latents

from diffusion import CoarseToFine, Parallel, Schedule, sample
from diffusion.methods.defects import ALIGNED, STEEP, aligned, bound, running, turning
from diffusion.trajectory import LinearChain, TwoStepChain

RULES = ["ddim", "dpmsolver++2m", "belm"]
KINDS = {
    "image": (Schedule.linear(1000, 1e-4, 0.02), "sample"),
    "v": (Schedule.linear(1000, 1e-4, 0.02), "v"),
    "flow": (Schedule.flow(3.0), "flow"),
    "edm": (Schedule.edm(0.002, 80.0, 7.0), "epsilon"),
}


def perceptron(size, steep, seed, layers):
    """A random network of one or two layers of 32 units, float64, whose weights grow with `steep`."""
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    first, last = normal(32, size) * steep / size**0.5, normal(size, 32) / 32**0.5
    inner, bias, wave = normal(32, 32) * steep / 32**0.5, normal(32) / 2, normal(32)

    def network(x, t):
        h = torch.tanh(x @ first.T + bias + wave * (t.double() / 300)[:, None])
        return (torch.tanh(h @ inner.T) if layers == 2 else steep * h) @ last.T

    return network


def chain_of(kind, rule, T):
    schedule, prediction = KINDS[kind]
    if kind == "flow" and rule == "belm":  # which has no step without signal
        return replace(schedule.chain(T + 1).tail(1), rule="belm"), prediction
    return schedule.chain(T, rule=rule), prediction


@torch.no_grad()
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", list(KINDS))
def test_what_is_said_of_a_steep_networks_error_is_true(kind, rule, layers):
    for T, steep, seed in ((20, 2, 0), (50, 2, 1), (50, 4, 0), (20, 4, 1)):
        chain, prediction = chain_of(kind, rule, T)
        x = latents(3, 6 if layers == 1 else 4, seed=seed + 50) * chain.init_noise_sigma
        network = perceptron(x.shape[1], steep, seed, layers)
        expected = sample(network, x, chain, "sequential", prediction=prediction).x_0
        for error in (1e-3, 1e-5):
            got = sample(network, x, chain, prediction=prediction, error=error)
            true = (got.x_0 - expected).norm(dim=1) / expected.norm(dim=1)
            assert got.converged.all(), (T, steep, seed, error)
            assert (true <= error).all(), (T, steep, seed, error)
            assert (true <= 3 * got.error + 1e-9).all(), (T, steep, seed, error)


@torch.no_grad()
@pytest.mark.parametrize("most", [4, 8, 16])
@pytest.mark.parametrize("method", [Parallel(), CoarseToFine()], ids=["parallel", "coarse"])
def test_what_is_said_when_rounds_run_out_is_true_of_a_steep_network(method, most):
    chain, prediction = chain_of("image", "ddim", 100)
    for steep, seed in ((2, 0), (4, 1)):
        network, x = perceptron(6, steep, seed, 1), latents(3, 6, seed=seed)
        expected = sample(network, x, chain, "sequential", prediction=prediction).x_0
        got = sample(network, x, chain, method, prediction=prediction, max_rounds=most)
        true = (got.x_0 - expected).norm(dim=1) / expected.norm(dim=1)
        assert (true <= 3 * got.error + 1e-9)[got.error < 1].all()  # larger ones say no more
        assert (true[got.converged] <= 1e-3).all()


def normal(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("two_step", [False, True])
def test_no_error_is_larger_than_its_bound_where_all_of_the_network_is_met(two_step):
    T, D = 12, 3
    A, c = 1 + 0.1 * normal(T, 1, seed=1), -0.6 * normal(T, 1, seed=2).abs()
    past = (0.3 * normal(T, 1, seed=3), 0.2 * normal(T, 1, seed=4)) if two_step else ()
    past = tuple(torch.cat([torch.zeros(1, 1), part[1:]]).double() for part in past)
    linear = TwoStepChain(A, c, *past) if two_step else LinearChain(A, c)
    slope, across, delta = normal(1, T, seed=5), 3 * torch.ones(1, T, dtype=torch.float64), normal(1, T, D, seed=6)
    assert aligned(c[:, 0].abs() * across).item() == 1.0
    most = bound(linear, slope, across, linear.added(delta))
    for seed in range(20):
        turn = torch.linalg.qr(normal(T, D, D, seed=100 + seed)).Q  # |R e| = 3 |e|
        states, answers = [torch.zeros(D, dtype=torch.float64)], []
        for k in range(T):
            answers.append(slope[0, k] * states[k] + 3 * turn[k] @ states[k] + delta[0, k])
            after = A[k] * states[k] + c[k] * answers[k]
            if two_step and k:
                after = after + past[0][k] * states[k - 1] + past[1][k] * answers[k - 1]
            states.append(after)
        assert states[-1].norm() <= most * (1 + 1e-9)


@pytest.mark.parametrize("two_step", [False, True])
def test_errors_that_a_network_turns_at_random_grow_as_their_squares_add(two_step):
    T, D, draws = 12, 3, 4000
    A, c = 1 + 0.1 * normal(T, 1, seed=1), -0.3 * normal(T, 1, seed=2).abs()
    past = (0.3 * normal(T, 1, seed=3), torch.zeros(T, 1).double()) if two_step else ()
    linear = TwoStepChain(A, c, *past) if two_step else LinearChain(A, c)
    slope, squares = normal(1, T, seed=5), torch.rand(1, T, generator=torch.Generator().manual_seed(6)).double()
    across = 2 * torch.ones(1, T, dtype=torch.float64)
    directions = torch.nn.functional.normalize(normal(2, T, draws, D, seed=7), dim=-1)
    before, e = torch.zeros(2, draws, D, dtype=torch.float64)
    for k in range(T):
        said = slope[0, k] * e + 2 * directions[0, k] * e.norm(dim=1, keepdim=True)
        after = A[k] * e + c[k] * said + squares[0, k].sqrt() * directions[1, k]
        after = after + past[0][k] * before if two_step and k else after
        before, e = e, after
    expected = turning(linear, (slope, slope), across, squares)
    assert 0.8 < e.square().sum(1).mean() / expected < 1.25


@torch.no_grad()
@pytest.mark.parametrize(("T", "steep"), [(20, 8), (50, 6), (50, 12)])
def test_what_rounding_grows_to_under_a_steep_network_is_said(T, steep):
    chain, prediction = chain_of("image", "ddim", T)
    for seed in range(4):
        network, g = perceptron(6, steep, seed, 1), torch.Generator().manual_seed(seed)

        def rounded(x, t, network=network, g=g):  # as another batch shape would
            return (network(x.double(), t) * (1 + 1e-7 * torch.randn(x.shape, generator=g).double())).float()

        x = latents(3, 6, seed=seed).float()
        expected = sample(rounded, x, chain, "sequential", prediction=prediction).x_0.double()
        got = sample(rounded, x, chain, prediction=prediction, error=1e-4)
        true = (got.x_0.double() - expected).norm(dim=1) / expected.norm(dim=1)
        assert (true <= got.error).all()
        assert (got.error[got.converged] <= 1e-4).all()


def test_a_gentle_network_is_taken_to_meet_half_of_what_it_does_across_its_moves():
    parts = torch.tensor([[0.1] * 10, [0.6] * 10, [2.0] * 10])
    torch.testing.assert_close(aligned(parts)[:, 0], torch.tensor([ALIGNED, 6 / STEEP, 1.0]))


def test_defects_that_cancel_are_bounded_by_what_is_left_of_them():
    linear = LinearChain(torch.ones(10, 1).double(), 0.1 * torch.ones(10, 1).double())
    none, delta = torch.zeros(1, 10).double(), torch.ones(1, 10, 2).double()
    delta[:, 1::2] *= -1
    assert bound(linear, none, none, linear.added(delta)).item() < 1e-15
    across = torch.full_like(none, 0.1)  # of what one defect is, for one step in two
    assert bound(linear, none, across, linear.added(delta)) < 0.1 * linear.added(delta)[0, 0].norm()


def test_all_errors_on_the_way_are_those_of_the_recurrence():
    A, b, e, expected = normal(2, 13, 1, seed=1), normal(2, 13, 3, seed=2), 0.0, []
    for k in range(13):
        e = A[:, k] * e + b[:, k]
        expected.append(e)
    torch.testing.assert_close(running(A, b), torch.stack(expected, 1))


@pytest.mark.parametrize("window", [None, 4])
@torch.no_grad()
def test_a_network_that_turns_within_the_moves_made_is_looked_at_beside_the_states_returned(window):
    g = torch.Generator().manual_seed(1)
    first, last = torch.randn(64, 32, generator=g) / 8, torch.randn(32, 64, generator=g) / 32**0.5
    chain, x = Schedule.flow().chain(9), latents(4, 64, seed=1).float()

    def sines(x, t):
        return torch.sin(50 * x @ first) @ last

    expected = sample(sines, x, chain, "sequential", prediction="flow").x_0.double()
    # float32 leaves 1e-2 and more
    got = sample(sines, x, chain, Parallel(window=window), prediction="flow", error=1e-3)
    true = (got.x_0.double() - expected).norm(dim=1) / expected.norm(dim=1)
    assert (true <= 10 * got.error).all()
    assert not (got.converged & (true > 1e-3)).any()
