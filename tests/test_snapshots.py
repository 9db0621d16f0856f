"""Iterates at chosen steps, for losses along the trajectory."""

import problems
import pytest
import torch

from pydeqsolve import Implicit, Phantom, Picard, Stop, Unrolled, solve

f64 = torch.float64


def iterate_of(z, w, x, k):
    """Picard's k-th measured iterate, z0 the first."""
    for _ in range(k - 1):
        z = torch.tanh(w * z + x)
    return z


def data():
    w = torch.tensor(0.6, dtype=f64, requires_grad=True)
    return w, torch.randn(3, 4, dtype=f64, generator=problems.generator(0))


@pytest.mark.parametrize("gradient", [None, Implicit(), Phantom()], ids=str)
def test_they_are_the_measured_iterates_in_the_order_asked_for(gradient):
    w, x = data()
    solution = solve(lambda z, x: torch.tanh(w * z + x), torch.zeros_like(x), (x,), solver=Picard(),
                     stop=Stop(rtol=1e-12), gradient=gradient, snapshots=(5, 1, 2))  # fmt: skip
    for z, k in zip(solution.snapshots, (5, 1, 2), strict=True):
        torch.testing.assert_close(z.detach(), iterate_of(x * 0, w, x, k).detach(), rtol=1e-14, atol=0)
        assert z.requires_grad == (gradient is not None)


def test_a_sample_that_has_finished_shows_its_solution():
    solution = solve(lambda z, b: 0.5 * z + b, torch.tensor([[2.0], [5.0]], dtype=f64),
                     (torch.ones(2, 1, dtype=f64),), solver=Picard(), gradient=None, snapshots=(3, 1000))  # fmt: skip
    assert solution.evaluations[0] == 1
    assert solution.snapshots[0][0].item() == 2.0
    assert torch.equal(solution.snapshots[1], solution.z)


@pytest.mark.parametrize("steps", [1, 3])
def test_their_gradient_is_that_of_the_phantom_steps_from_them(steps):
    w, x = data()
    solution = solve(lambda z, x: torch.tanh(w * z + x), torch.zeros_like(x), (x,), solver=Picard(),
                     gradient=Phantom(steps, 0.7), snapshots=(2,))  # fmt: skip
    (found,) = torch.autograd.grad(solution.snapshots[0].square().sum(), w)
    z = start = iterate_of(x * 0, w, x, 2).detach()
    for _ in range(steps):
        z = 0.7 * torch.tanh(w * z + x) + 0.3 * z
    (expected,) = torch.autograd.grad(z, w, 2 * start)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_a_nan_sample_poisons_no_gradient():
    w, x = data()
    x[1] = torch.nan
    solution = solve(lambda z, x: torch.tanh(w * z + x), torch.zeros_like(x), (x,), snapshots=(2,))
    (found,) = torch.autograd.grad(solution.snapshots[0][[0, 2]].sum() + solution.z[[0, 2]].sum(), w)
    assert found.isfinite()


@pytest.mark.parametrize("interval", [1, 8])
def test_a_failed_sample_shows_the_z_that_is_returned(interval):
    # sqrt(2 - z): 0, 1.41, .77, then NaN by force.
    calls = []

    def fn(z):
        calls.append(1)
        return torch.sqrt(2 - z) if len(calls) < 4 else torch.full_like(z, torch.nan)

    solution = solve(fn, torch.zeros(1, 1, dtype=f64), solver=Picard(), gradient=None, snapshots=(2, 4, 6),
                     stop=Stop(rtol=1e-12, check_every=interval))  # fmt: skip
    assert solution.snapshots[0].item() == pytest.approx(2**0.5)
    assert torch.equal(solution.snapshots[1], solution.z)
    assert torch.equal(solution.snapshots[2], solution.z)


def test_an_iterate_whose_value_is_nan_poisons_no_gradient():
    w = torch.tensor(1.0, dtype=f64, requires_grad=True)
    x = torch.tensor([[0.5], [3.0]], dtype=f64)
    solution = solve(lambda z, x: torch.sqrt(2 * w - x * z), torch.zeros(2, 1, dtype=f64), (x,), solver=Picard(),
                     snapshots=(1, 2, 3))  # fmt: skip
    for z in solution.snapshots:
        assert torch.autograd.grad(z[0].sum(), w, retain_graph=True)[0].isfinite()


def test_nested_states_keep_their_structure():
    solution = solve(lambda z: {"a": 0.5 * z["a"] + 1}, {"a": torch.zeros(2, 3)}, gradient=None, snapshots=(1, 2))
    assert torch.equal(solution.snapshots[1]["a"], torch.ones(2, 3))


def test_impossible_snapshots_are_refused():
    with pytest.raises(ValueError, match="snapshots must be at least 1"):
        solve(torch.cos, torch.ones(1, 1), snapshots=(0,))
    with pytest.raises(NotImplementedError, match="snapshots are not unrolled"):
        solve(torch.cos, torch.ones(1, 1), snapshots=(1,), gradient=Unrolled())
