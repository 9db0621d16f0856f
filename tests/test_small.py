"""Adjoint systems of up to four unknowns: solved from their matrices, with little memory."""

import math

import pytest
import torch
from systems import adjoint, by, matrices, rhs, without_native

from pydeqsolve import GMRES, Implicit, Phantom, Status, Stop, build_info, solve

pytestmark = pytest.mark.skipif(not build_info()["native"], reason="no native module")
f32, f64 = torch.float32, torch.float64


@pytest.mark.parametrize("dtype", [f32, f64])
@pytest.mark.parametrize("N", [1, 2, 3, 4])
def test_few_unknowns_take_a_product_each_and_one_for_the_residual(N, dtype):
    A, g = matrices(7, N, dtype, 3.0), rhs(7, N, dtype)
    calls = []

    def counted(u):
        calls.append(1)
        return by(A)(u)

    u, how = GMRES().solve(counted, g, Stop(1e-4))
    _, known = without_native(GMRES().solve, by(A), g, Stop(1e-4))
    assert len(calls) == N + 1
    assert how.status.tolist() == known.status.tolist() == [Status.CONVERGED] * 7
    assert how.evaluations.tolist() == known.evaluations.tolist() == [N + 1] * 7
    exact = torch.linalg.solve(torch.eye(N, dtype=f64) - A.double(), g.double())
    torch.testing.assert_close(
        u.double(), exact, rtol=1e3 * torch.finfo(dtype).eps, atol=1e-5 if dtype == f32 else 1e-12
    )
    true = (g + by(A)(u) - u).double().norm(dim=1)
    floor = torch.finfo(dtype).eps * u.double().norm(dim=1)
    assert (how.residual * g.double().norm(dim=1) >= 0.99 * torch.maximum(true, floor) - floor).all()


def test_a_singular_sample_of_few_unknowns_is_solved_apart():
    rate = torch.tensor([[0.5, 0.2, 0.1], [1.0, 0.2, 0.1], [0.5, 0.3, -9.0], [math.nan, 0.1, 0.1]], dtype=f64)
    g = rhs(4, 3, f64)
    u, how = GMRES().solve(lambda u: rate * u, g, Stop(1e-6))
    _, known = without_native(GMRES().solve, lambda u: rate * u, g, Stop(1e-6))
    assert how.status.tolist() == known.status.tolist() == [0, Status.STALLED, 0, Status.NONFINITE]
    torch.testing.assert_close(how.residual, known.residual, rtol=1e-6, atol=1e-14)
    torch.testing.assert_close(u[[0, 2]], (g / (1 - rate))[[0, 2]], rtol=1e-12, atol=0)
    torch.testing.assert_close(u[1, 1:], (g / (1 - rate))[1, 1:], rtol=1e-6, atol=0)
    assert how.evaluations[0] == 4
    assert how.evaluations[1] > 4


@pytest.mark.filterwarnings("ignore:the adjoint of solve:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, f32, f64])
@pytest.mark.parametrize("exponent", [-24, 0, 12])
@pytest.mark.parametrize("rtol", [1e-2, 1e-5, 0.0])
def test_an_adjoint_of_few_unknowns_is_judged_as_in_pytorch(dtype, exponent, rtol):
    A = matrices(6, 3, f64, 0.8)
    A[4] = torch.diag(torch.tensor([0.5, 1.0, 0.2], dtype=f64))
    g = (rhs(6, 3, f64) * 2.0**exponent).to(dtype)[:, None]
    g[1], g[2, 0, 0] = 0, math.inf
    mask = torch.tensor([True, True, True, False, True, True])

    def products(u):
        return by(A)(u.double()).to(torch.promote_types(u.dtype, f32))

    for follows in (True, False):
        stop = Stop(rtol, max_steps=100)
        u, how = adjoint(products, g, mask, stop, follows, 0.0)
        expected, known = without_native(adjoint, products, g, mask, stop, follows, 0.0)
        assert u.dtype == dtype
        assert how.status.tolist() == known.status.tolist()
        assert torch.equal(u.isfinite(), expected.isfinite())
        assert not u[3].any()
        near = 4 * torch.finfo(dtype).eps
        assert ((how.residual - known.residual).abs() <= near + 0.01 * known.residual)[how.residual.isfinite()].all()
        sure = expected.isfinite() & (torch.arange(6) != 4)[:, None, None]
        torch.testing.assert_close(u[sure], expected[sure], rtol=near, atol=0)


def words(fn, entries):
    """The most memory that fn() has allocated at a time, in words of float32 per entry; by torch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        fn()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most / (4 * entries)


@pytest.mark.filterwarnings("ignore")  # the profiler's own
def test_many_small_states_take_a_few_words_per_entry_backward():
    B, N = 100_000, 3
    M = (matrices(1, N, f32, 0.7)[0]).requires_grad_()
    x, g = rhs(B, N, f32), rhs(B, N, f32, 3)

    def backward(gradient):
        z = solve(lambda z, x: torch.tanh(z @ M + x), torch.zeros_like(x), (x,), stop=Stop(1e-3), gradient=gradient).z
        return lambda: torch.autograd.grad(z, M, g)

    own = words(backward(Phantom()), B * N)  # what fn's products take
    assert words(backward(Implicit()), B * N) <= own + 4.2  # matrices, u, and a flag per sample
    assert own <= 2.1
