"""Picard: the damped iteration itself, and where damping decides."""

import pytest
import torch

from pydeqsolve import Anderson, Picard, Status, Stop, solve

f64 = torch.float64


@pytest.mark.parametrize("damping", [0.3, 1.0, 1.7])
def test_iterates_follow_the_damped_recurrence(damping):
    z = torch.tensor([[0.2, -1.0]], dtype=f64)
    seen = []
    solve(torch.cos, z, solver=Picard(damping), stop=Stop(rtol=0.0, max_steps=6), gradient=None,
          callback=lambda step, z, residual: seen.append(z))  # fmt: skip
    for found in seen:
        torch.testing.assert_close(found, z, rtol=1e-15, atol=1e-15)
        z = z + damping * (torch.cos(z) - z)


def test_a_rotation_needs_damping():
    R = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=f64)
    z0 = torch.ones(1, 2, dtype=f64)
    stop = Stop(rtol=0.0, atol=1e-9, max_steps=200)
    plain = solve(lambda z: z @ R.T, z0, solver=Picard(), stop=stop, gradient=None)
    damped = solve(lambda z: z @ R.T, z0, solver=Picard(0.5), stop=stop, gradient=None)
    assert plain.status.item() == Status.STALLED
    assert damped.status.item() == Status.CONVERGED


def test_anderson_without_memory_is_picard():
    z0 = torch.linspace(-1, 1, 6, dtype=f64).reshape(2, 3)
    for damping in (1.0, 0.6):
        one, other = (
            solve(torch.cos, z0, solver=solver, stop=Stop(rtol=1e-8), gradient=None)
            for solver in (Picard(damping), Anderson(memory=0, damping=damping))
        )
        assert torch.equal(one.z, other.z)
        assert torch.equal(one.evaluations, other.evaluations)


@pytest.mark.parametrize(
    ("damping", "kind"), [(0.0, ValueError), (2.1, ValueError), (float("nan"), ValueError), ("1", TypeError)]
)
def test_impossible_damping_is_refused(damping, kind):
    with pytest.raises(kind, match="damping must be"):
        Picard(damping)
