"""What GMRES by passes does, wherever they run: each law takes `run`, which calls its first argument with the rest."""

import math

import torch
from systems import adjoint, by, diagonal, judged, matrices, rhs, without_native

from pydeqsolve import GMRES, Status, Stop

f32, f64 = torch.float32, torch.float64
# B, N, radius, normal
SHAPES = [(1, 5, 0.5, True), (3, 17, 0.9, True), (4, 64, 0.9, True), (2, 100, 1.3, True), (2, 24, 0.5, False)]


def takes_the_products_of_the_reference(run, B, N, radius, normal, dtype, restart):
    A, g = matrices(B, N, dtype, radius, normal=normal), rhs(B, N, dtype)
    stop = Stop(1e-5 if dtype == f32 else 1e-11, max_steps=400)
    u, how = run(GMRES(restart).solve, by(A), g, stop)
    expected, known = without_native(GMRES(restart).solve, by(A), g, stop)
    assert how.status.tolist() == known.status.tolist() == [Status.CONVERGED] * B
    assert (how.evaluations - known.evaluations).abs().max() <= (1 if known.evaluations.max() <= 31 else 3)
    exact = torch.linalg.solve(torch.eye(N, dtype=f64) - A.double(), g.double())
    allowed = stop.rtol * g.norm() * torch.linalg.inv(torch.eye(N, dtype=f64) - A.double()).norm(dim=(1, 2)).max()
    assert (u.double() - exact).norm() <= allowed
    assert (u - expected).norm() <= 2 * allowed


def solves_long_samples_as_the_reference_does(run, N, dtype, solver):
    A, g = diagonal(N, dtype), rhs(2, N, dtype)
    u, how = run(solver.solve, A, g, Stop(1e-5))
    expected, known = without_native(solver.solve, A, g, Stop(1e-5))
    assert how.evaluations.tolist() == known.evaluations.tolist()
    torch.testing.assert_close(how.residual, known.residual, rtol=0.05, atol=0)
    assert (u - expected).norm() <= 1e-4 * expected.norm()


def ends_short_cycles_where_long_ones_end(run, restart):
    A, g = matrices(3, 12, f64, 0.6), rhs(3, 12, f64)
    u, how = run(GMRES(restart).solve, by(A), g, Stop(1e-9, max_steps=500))
    _, known = without_native(GMRES(restart).solve, by(A), g, Stop(1e-9, max_steps=500))
    assert how.status.tolist() == [Status.CONVERGED] * 3
    assert how.evaluations.tolist() == known.evaluations.tolist()
    exact = torch.linalg.solve(torch.eye(12, dtype=f64) - A, g)
    assert (u - exact).norm() <= 1e-7 * exact.norm()


def counts_the_products_of_a_budget(run, budget):
    A, g = matrices(2, 30, f64, 0.97), rhs(2, 30, f64)
    calls = []

    def counted(u):
        calls.append(1)
        return by(A)(u)

    u, how = run(GMRES(5).solve, counted, g, Stop(1e-12, max_steps=budget))
    assert len(calls) <= budget
    expected, known = without_native(GMRES(5).solve, by(A), g, Stop(1e-12, max_steps=budget))
    assert how.status.tolist() == known.status.tolist() == [Status.MAX_STEPS] * 2
    assert how.evaluations.tolist() == known.evaluations.tolist()
    torch.testing.assert_close(u, expected, rtol=1e-9, atol=1e-9)


def solves_a_sample_beside_bad_ones_as_if_alone(run, N):
    rate = torch.linspace(-0.7, 0.9, N, dtype=f32)
    scale = torch.tensor([1.0, 0.3, 0.0, math.nan, 1e20])[:, None]
    g = rhs(5, N, f32)
    g[1] *= 1e-20
    g[2] = 0

    def of(rows):
        return run(GMRES().solve, lambda u: u * (rate * scale[rows]), g[rows], Stop(1e-5))

    together, how = of(slice(None))
    for i in range(5):
        alone, own = of(slice(i, i + 1))
        assert torch.equal(together[i], alone[0]) or bool(alone.isnan().any())
        assert how.status[i] == own.status[0]
        assert how.evaluations[i] == own.evaluations[0]
    assert how.status[:4].tolist() == [0, 0, 0, Status.NONFINITE]
    assert how.evaluations[2] == 0


def has_a_power_of_two_of_the_cotangent_in_the_answer(run, dtype, k):
    A, g = matrices(2, 40, dtype, 0.8), rhs(2, 40, dtype)
    u, how = run(GMRES().solve, by(A), g, Stop(1e-4))
    scaled, also = run(GMRES().solve, by(A), g * 2.0**k, Stop(1e-4))
    assert torch.equal(scaled, u * 2.0**k)
    assert torch.equal(also.residual, how.residual)


def ends_a_singular_system_at_least_squares(run):
    # No column of the triangle is small by itself; together they lose a direction.
    rate = torch.linspace(-0.5, 1, 50, dtype=f64)
    g = rhs(4, 50, f64, 8)
    u, how = run(GMRES(60).solve, lambda u: u * rate, g, Stop(1e-8, max_steps=400))
    assert how.status.tolist() == [Status.STALLED] * 4
    torch.testing.assert_close(how.residual, g[:, -1].abs() / g.norm(dim=1), rtol=1e-6, atol=0)
    torch.testing.assert_close(u[:, :-1], g[:, :-1] / (1 - rate[:-1]), rtol=1e-3, atol=1e-3)


def judges_an_adjoint_alike(run, reference, dtype, rtol, eps, solver=GMRES(), **case):
    """`run` and `reference` say the same of an adjoint, but for what rounding decides."""
    given = (*judged(dtype=dtype, rtol=rtol, eps=eps, **case), solver)
    (u, how), (expected, known) = run(adjoint, *given), reference(adjoint, *given)
    assert u.dtype == expected.dtype == dtype
    assert torch.equal(u.isfinite(), expected.isfinite())
    sure = known.residual.isinf() | ((known.residual - how.residual).abs() <= 0.5 * known.residual)
    # Rounding decides how such a residual comes out.
    near = max(4 * max(eps, torch.finfo(dtype).eps), 1e-12)
    assert (sure | (torch.maximum(known.residual, how.residual) <= near)).all()
    clear = (known.status == how.status) | ~((known.residual > 2 * max(rtol, near)) | (known.residual < rtol / 2))
    assert clear.all()
    mask = given[2]
    bad = torch.zeros(len(u), dtype=torch.bool) if mask is None else ~mask
    assert (how.status[bad] == int(Status.NONFINITE)).all()
    assert not u[bad].any()
