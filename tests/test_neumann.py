"""Neumann: the truncated series against its closed form, its residual, and its status as an adjoint solver."""

import math
import warnings

import problems
import pytest
import torch

from pydeqsolve import ConvergenceError, Implicit, Neumann, Phantom, Status, Stop, solve

f64 = torch.float64


def matrix(D: int = 6, radius: float = 0.6):
    return problems.with_spectrum(torch.linspace(-radius, radius, D, dtype=f64), 1)


@pytest.mark.parametrize("terms", [1, 2, 7])
def test_the_sum_is_that_of_the_powers_and_the_residual_the_next_one(terms):
    A = matrix()
    g = torch.randn(3, 6, dtype=f64, generator=problems.generator(2))
    u, outcome = Neumann(terms).solve(lambda v: v @ A.T, g, Stop(rtol=1e-6))
    powers = [torch.linalg.matrix_power(A, j) for j in range(terms + 1)]
    torch.testing.assert_close(u, g @ sum(powers[:-1]).T, rtol=1e-12, atol=1e-14)
    expected = (g @ powers[-1].T).norm(dim=1) / g.norm(dim=1)
    torch.testing.assert_close(outcome.residual, expected, rtol=1e-10, atol=0)
    assert outcome.evaluations.tolist() == [terms] * 3


def test_enough_terms_converge_and_too_few_do_not():
    A, g = matrix(), torch.ones(1, 6, dtype=f64)
    for terms, status in ((3, Status.MAX_STEPS), (60, Status.CONVERGED)):
        assert Neumann(terms).solve(lambda v: v @ A.T, g, Stop(rtol=1e-9))[1].status.item() == status


def test_a_nan_row_is_nonfinite_and_harms_no_other():
    A = matrix()
    g = torch.ones(2, 6, dtype=f64)
    expected, _ = Neumann(5).solve(lambda v: v @ A.T, g[1:], Stop())
    g[0, 0] = math.nan
    u, outcome = Neumann(5).solve(lambda v: (A @ v[..., None])[..., 0], g, Stop(rtol=1.0))
    assert outcome.status.tolist() == [Status.NONFINITE, Status.CONVERGED]
    torch.testing.assert_close(u[1:], expected, rtol=1e-14, atol=0)


def gradient_of(gradient):
    w = torch.tensor(0.5, dtype=f64, requires_grad=True)
    x = torch.linspace(-1, 1, 4, dtype=f64)[:, None]
    z = solve(lambda z, x: torch.tanh(w * z + x), x * 0, (x,), stop=Stop(rtol=1e-13), gradient=gradient).z
    return torch.autograd.grad(z.square().sum(), w)[0]


def test_a_series_of_k_terms_is_the_phantom_gradient_of_k_steps():
    # Phantom linearises along its own steps, which stay at z* to rounding here.
    found = gradient_of(Implicit(solver=Neumann(4), stop=Stop(rtol=math.inf)))
    torch.testing.assert_close(found, gradient_of(Phantom(steps=4)), rtol=1e-10, atol=0)


def test_a_truncation_that_misses_the_tolerance_is_told_unless_it_is_meant():
    with pytest.raises(ConvergenceError, match="4 of 4 MAX_STEPS"):
        gradient_of(Implicit(solver=Neumann(2), on_failure="raise"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradient_of(Implicit(solver=Neumann(2), stop=Stop(rtol=math.inf)))
        exact = gradient_of(Implicit(stop=Stop(rtol=1e-12)))
        torch.testing.assert_close(gradient_of(Implicit(solver=Neumann(80))), exact, rtol=1e-6, atol=0)


def test_impossible_counts_are_refused_by_name():
    with pytest.raises(ValueError, match="terms must be at least 1"):
        Neumann(0)


def test_where_the_map_expands_what_is_advised_is_gmres_and_not_more_terms():
    b = torch.ones(1, 3, dtype=torch.float64, requires_grad=True)
    z0 = torch.zeros(1, 3, dtype=torch.float64)
    solution = solve(lambda z, b: b - 1.5 * z, z0, (b,), gradient=Implicit(solver=Neumann(30)))
    with pytest.warns(RuntimeWarning, match="use GMRES where it expands"):
        solution.z.sum().backward()
    assert solution.adjoint.status.tolist() == [Status.MAX_STEPS]
    assert solution.adjoint.residual.item() > 1
