"""What the adjoint says of itself, against residuals computed here; overflow and NaN."""

import problems
import pytest
import torch
from torch import nn

from pydeqsolve import DEQ, GMRES, Anderson, Broyden, Implicit, Neumann, Picard, Status, Stop, solve

f64, f32 = torch.float64, torch.float32
SOLVERS = [GMRES(), GMRES(restart=5), Neumann(80), Anderson(), Broyden(), Picard()]


def true_residual(J, u, g):
    """‖g + Jᵀu − u‖ / ‖g‖ per row, in float64."""
    J, u, g = J.double(), u.double(), g.double()
    return (g + u @ J - u).norm(dim=1) / g.norm(dim=1)


def affine(J, B, solver=None, gradient=None, rtol=1e-6, seed=3):
    """The solution of z = J z + b, b (its cotangent is u itself), and a cotangent of unit scale."""
    b = torch.randn(B, len(J), dtype=f64, generator=problems.generator(seed)).to(J.dtype) * 0
    b.requires_grad_()
    g = torch.randn(B, len(J), dtype=f64, generator=problems.generator(seed + 1)).to(J.dtype)
    gradient = gradient or Implicit(solver=solver, stop=Stop(rtol=rtol, max_steps=200))
    return solve(lambda z, b: z @ J.T + b, torch.zeros_like(b), (b,), gradient=gradient), b, g


def descent(m, n, dtype, seed):
    """J of z − ½ Aᵀ(A z − b) with more unknowns than equations: I − J = ½ AᵀA is singular."""
    A = torch.randn(m, n, dtype=f64, generator=problems.generator(seed)).to(dtype) / n**0.5
    return torch.eye(n, dtype=dtype) - 0.5 * A.T @ A


# Singular systems


@pytest.mark.filterwarnings("ignore:the adjoint of solve:RuntimeWarning")
@pytest.mark.parametrize("solver", [GMRES(), GMRES(restart=3), Anderson(), Broyden(), Broyden(kind="bad")], ids=str)
@pytest.mark.parametrize("dtype", [f64, f32])
@pytest.mark.parametrize(("m", "n"), [(1, 2), (2, 3), (3, 5), (8, 20)])
def test_a_singular_system_is_never_said_to_be_solved(m, n, dtype, solver):
    for seed in range(4):
        J = descent(m, n, dtype, seed)
        for gradient in (Implicit(solver), Implicit(solver, Stop(rtol=1e-6, max_steps=200))):
            solution, b, g = affine(J, 2, gradient=gradient, seed=10 * seed)
            (u,) = torch.autograd.grad(solution.z, b, g)
            assert (solution.adjoint.status != Status.CONVERGED).all()
            rounding = 4 * n * torch.finfo(dtype).eps * (u.double().norm(dim=1) / g.double().norm(dim=1))
            true = true_residual(J, u, g)
            assert (solution.adjoint.residual >= true - rounding).all()
            assert (true <= 1 + rounding).all()  # no worse than u = 0


@pytest.mark.parametrize("D", [1, 2, 5])
def test_a_map_that_is_the_identity_has_no_adjoint_and_its_neighbour_has(D):
    rate = torch.tensor([[1.0], [0.5]], dtype=f64).expand(2, D)
    b = torch.zeros(2, D, dtype=f64, requires_grad=True)
    solution = solve(lambda z, b, rate: rate * z + b, torch.zeros_like(b), (b, rate))
    with pytest.warns(RuntimeWarning, match="1 of 2 STALLED .*singular"):
        (u,) = torch.autograd.grad(solution.z.sum(), b)
    assert solution.adjoint.residual[0] == 1
    torch.testing.assert_close(u[1], torch.full((D,), 2.0, dtype=f64))


@pytest.mark.filterwarnings("ignore:the adjoint of solve:RuntimeWarning")
@pytest.mark.parametrize("dtype", [f64, f32])
@pytest.mark.parametrize(("m", "n"), [(1, 2), (2, 3), (3, 5), (8, 20)])
def test_the_gradient_of_a_singular_system_is_that_of_least_squares(m, n, dtype):
    # From z0 = 0 descent ends at A⁺b, whose derivative needs no more of u than the range of Aᵀ.
    A = torch.randn(m, n, dtype=f64, generator=problems.generator(m)).to(dtype) / n**0.5
    b = torch.randn(2, m, dtype=f64, generator=problems.generator(n)).to(dtype).requires_grad_()
    g = torch.randn(2, n, dtype=f64, generator=problems.generator(7)).to(dtype)
    stop = Stop(rtol=1e-6, max_steps=1000)
    solution = solve(lambda z, b: z - 0.5 * (z @ A.T - b) @ A, torch.zeros(2, n, dtype=dtype), (b,), stop=stop)
    (found,) = torch.autograd.grad(solution.z, b, g)
    assert solution.adjoint.status.tolist() == [Status.STALLED] * 2
    assert not solution.adjoint.converged.any()
    assert problems.relative(found, g.double() @ torch.linalg.pinv(A.double())) < 1e-4


@pytest.mark.filterwarnings("ignore:the adjoint of solve:RuntimeWarning")
@pytest.mark.parametrize("solver", [GMRES(), Neumann(80), Anderson()], ids=str)
@pytest.mark.parametrize("gap", [1e-3, 1e-9, 1e-12, 1e-14, 1e-17])
@pytest.mark.parametrize("D", [2, 6])
def test_a_residual_that_is_told_is_not_less_than_the_true_one(gap, D, solver):
    spectrum = torch.linspace(-0.5, 0.5, D, dtype=f64)
    spectrum[-1] = 1 - gap
    J = problems.with_spectrum(spectrum, 1)
    solution, b, g = affine(J, 3, solver, rtol=1e-4)
    (u,) = torch.autograd.grad(solution.z, b, g)
    told, true = solution.adjoint.residual, true_residual(J, u, g)
    rounding = 8 * D * torch.finfo(f64).eps * u.norm(dim=1) / g.norm(dim=1)
    assert (told >= true - rounding).all()
    huge = 2.3e-16 * u.norm(dim=1) > 1e-4 * g.norm(dim=1)
    assert ((solution.adjoint.status == Status.CONVERGED) <= (told <= 1e-4) & ~huge).all()
    assert (told > 0).all()


@pytest.mark.parametrize("D", [2, 6])
@pytest.mark.parametrize("gap", [1e-13, 1e-14])
def test_gmres_knows_the_residual_of_a_huge_u_to_no_less_than_its_rounding(gap, D):
    spectrum = torch.linspace(-0.5, 0.5, D, dtype=f64)
    spectrum[-1] = 1 - gap
    J = problems.with_spectrum(spectrum, 1)
    g = torch.ones(1, D, dtype=f64)
    u, outcome = GMRES().solve(lambda u: u @ J, g, Stop(rtol=1e-7))
    assert u.norm() > 1e12
    assert outcome.residual.item() >= torch.finfo(f64).eps * u.norm() / g.norm()
    assert outcome.status.item() == Status.STALLED


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_a_budget_of_no_products_gives_no_gradient_and_says_so(solver):
    J = problems.with_spectrum(torch.linspace(-0.5, 0.5, 6, dtype=f64), 1)
    solution, b, g = affine(J, 2, gradient=Implicit(solver, Stop(max_steps=0)))
    with pytest.warns(RuntimeWarning, match="2 of 2 MAX_STEPS .*raise Implicit"):
        (u,) = torch.autograd.grad(solution.z, b, g)
    assert (u == 0).all()
    assert solution.adjoint.residual.tolist() == [1.0, 1.0]


# Scale


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
@pytest.mark.parametrize(("dtype", "scales"), [(f64, (1e-300, 1e-160, 1e160, 1e300)), (f32, (1e-35, 1e35))])
@pytest.mark.parametrize("D", [3, 24])
def test_a_cotangent_of_any_scale_has_its_gradient_at_that_scale(D, dtype, scales, solver):
    J = problems.with_spectrum(torch.linspace(-0.5, 0.7, D, dtype=f64), 2).to(dtype)
    rtol = 1e-10 if dtype == f64 else 1e-5
    solution, b, g = affine(J, 2, solver, rtol=rtol)
    (plain,) = torch.autograd.grad(solution.z, b, g, retain_graph=True)
    for scale in scales:
        (found,) = torch.autograd.grad(solution.z, b, g * scale, retain_graph=True)
        assert solution.adjoint.status.tolist() == [Status.CONVERGED] * 2
        assert solution.adjoint.converged.all()
        torch.testing.assert_close(found / scale, plain, rtol=20 * rtol, atol=20 * rtol)


@pytest.mark.filterwarnings("ignore:the adjoint of solve:RuntimeWarning")
@pytest.mark.parametrize(("dtype", "scale"), [(torch.float16, 6e-8), (f32, 3e-45), (f64, 5e-324)])
@pytest.mark.parametrize("D", [3, 8])
def test_a_status_is_that_of_the_u_that_its_dtype_holds(D, dtype, scale):
    # Among the least numbers of a dtype u is rounded to a few levels, so that its residual is of the size of g.
    J = problems.with_spectrum(torch.linspace(-0.5, 0.7, D, dtype=f64), 2).to(dtype)
    solution, b, _ = affine(J, 2, GMRES(), rtol=1e-3)
    g = torch.full((2, D), scale, dtype=dtype)
    (u,) = torch.autograd.grad(solution.z, b, g)
    true = true_residual(J, u.double() / g.double(), torch.ones(2, D, dtype=f64))
    assert (true > 1e-2).all()
    torch.testing.assert_close(solution.adjoint.residual, true, rtol=2e-2, atol=0)
    assert solution.adjoint.status.tolist() == [Status.STALLED] * 2


# Overflow and NaN


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_cotangent_that_is_not_finite_comes_out_so_and_stays_in_its_sample(solver, bad):
    W = (0.5 * problems.orthogonal(4, 1)).requires_grad_()
    x = torch.randn(3, 4, dtype=f64, generator=problems.generator(2)).requires_grad_()

    def gradients(g):
        z = solve(lambda z, x: torch.tanh(z @ W.T + x), torch.zeros_like(x), (x,), gradient=Implicit(solver)).z
        return torch.autograd.grad(z, [W, x], g)

    g = torch.ones(3, 4, dtype=f64)
    _, clean = gradients(g)
    g[1, 2] = bad
    with pytest.warns(RuntimeWarning, match="1 of 3 NONFINITE .*the gradient that came in"):
        for_W, for_x = gradients(g)
    assert not for_W.isfinite().any()
    assert not for_x[1].isfinite().any()
    torch.testing.assert_close(for_x[[0, 2]], clean[[0, 2]], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("solver", [GMRES(), Anderson(), Neumann(200)], ids=str)
@pytest.mark.parametrize(("dtype", "scale"), [(torch.float16, 3e4), (f32, 3e38), (f64, 1e308)])
def test_an_adjoint_that_overflows_its_dtype_is_not_finite_and_told(dtype, scale, solver):
    # u = 10 g in the first sample, g in the second.
    rate = torch.tensor([[0.9], [0.0]], dtype=dtype).expand(2, 3)
    b = torch.zeros(2, 3, dtype=dtype, requires_grad=True)
    solution = solve(lambda z, b, rate: rate * z + b, torch.zeros_like(b), (b, rate), gradient=Implicit(solver))
    with pytest.warns(RuntimeWarning, match="1 of 2 NONFINITE"):
        (u,) = torch.autograd.grad(solution.z, b, torch.full((2, 3), scale, dtype=dtype))
    assert not u[0].isfinite().any()
    torch.testing.assert_close(u[1], torch.full((3,), scale, dtype=dtype))
    assert solution.adjoint.status.tolist() == [Status.NONFINITE, Status.CONVERGED]


def test_a_large_adjoint_that_its_dtype_holds_is_returned_as_it_is():
    rate = torch.full((1, 3), 0.9, dtype=torch.float16)
    b = torch.zeros(1, 3, dtype=torch.float16, requires_grad=True)
    z = solve(lambda z, b, rate: rate * z + b, torch.zeros_like(b), (b, rate)).z
    (u,) = torch.autograd.grad(z, b, torch.full((1, 3), 4000.0, dtype=torch.float16))
    torch.testing.assert_close(u.double(), 4000 / (1 - rate.double()), rtol=2e-3, atol=0)


@pytest.mark.parametrize("D", [2, 6])
def test_an_infinite_slope_is_told_and_not_taken_for_zero(D):
    b = torch.zeros(2, D, dtype=f64)
    b[1] = 0.5
    b.requires_grad_()
    solution = solve(lambda z, b: 0.5 * z.abs().sqrt() * b + b, torch.zeros(2, D, dtype=f64), (b,))
    with pytest.warns(RuntimeWarning, match="1 of 2 NONFINITE .*a slope of fn"):
        (found,) = torch.autograd.grad(solution.z.sum(), b)
    assert not found[0].isfinite().any()
    assert (found[1] > 0).all()


def test_a_loss_scaler_backs_off_when_the_adjoint_overflows():
    layer = DEQ(Scale(), stop=Stop(rtol=1e-3, max_steps=300))
    x = 0.01 * torch.ones(4, 8, dtype=torch.float16)
    optimiser = torch.optim.SGD(layer.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=16384.0)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = layer(x).float().sum()
    with pytest.warns(RuntimeWarning, match="NONFINITE"):
        scaler.scale(loss).backward()
    scaler.step(optimiser)
    scaler.update()
    assert (layer.cell.w == 0.9).all()
    assert scaler.get_scale() == 8192.0


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.full((8,), 0.9))

    def forward(self, z, x):
        return self.w.to(z.dtype) * z + x


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("D", [2, 6])
def test_a_sample_left_out_has_no_residual_that_could_be_met(D, compact):
    x = torch.ones(3, D, dtype=f64, requires_grad=True)
    z0 = torch.zeros(3, D, dtype=f64)
    z0[1] = torch.nan
    solution = solve(lambda z, x: 0.5 * z + x, z0, (x,), compact=compact)
    solution.z[solution.converged].sum().backward()
    assert solution.adjoint.status.tolist() == [0, int(Status.NONFINITE), 0]
    assert solution.adjoint.residual[1] == torch.inf
    assert solution.adjoint.residual[[0, 2]].max() < 1e-5
