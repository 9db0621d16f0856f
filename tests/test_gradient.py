"""Implicit gradients against linear algebra and finite differences; what passes through, and what is told."""

import dataclasses
import warnings
import weakref

import problems
import pytest
import torch
from torch import Tensor, nn

from pydeqsolve import (
    GMRES,
    Anderson,
    Broyden,
    ConvergenceError,
    Implicit,
    Phantom,
    Picard,
    Status,
    Stop,
    Unrolled,
    solve,
)
from pydeqsolve.layout import Layout
from pydeqsolve.loop.iterate import iterate
from pydeqsolve.problem import Problem
from pydeqsolve.solution import Recorder

f64 = torch.float64
TIGHT = Stop(rtol=1e-13, max_steps=2000)
ADJOINTS = [GMRES(), GMRES(restart=5), Anderson(), Anderson(kind="I"), Broyden(), Broyden(kind="bad"), Picard()]


@pytest.mark.parametrize("loss_scale", [1.0, 1e-8, 1e8])
def test_the_weight_gradient_of_a_tanh_layer_is_right_to_1e_6_at_the_default_settings(loss_scale):
    problem, W = problems.tanh_layer()
    solution = solve(problem.fn, problem.start, problem.inputs, stop=TIGHT).check()
    z = solution.z
    (loss_scale * z.square().mean()).backward()
    expected = problems.exact_weight_gradient(
        z.detach(), W.detach(), problem.inputs[0], loss_scale * 2 * z.detach() / z.numel()
    )
    assert problems.relative(W.grad, expected) <= 1e-6
    assert (solution.adjoint.status == Status.CONVERGED).all()


@pytest.mark.parametrize("solver", ADJOINTS, ids=str)
@pytest.mark.parametrize("loss_scale", [1.0, 1e-8, 1e8])
def test_every_adjoint_solver_gives_the_same_gradient_at_every_scale_of_the_loss(solver, loss_scale):
    problem, W = problems.tanh_layer(24, 0.9, 3)
    gradient = Implicit(solver=solver, stop=Stop(rtol=1e-9, max_steps=500))
    z = solve(problem.fn, problem.start, problem.inputs, stop=TIGHT, gradient=gradient).z
    (loss_scale * z.square().mean()).backward()
    expected = problems.exact_weight_gradient(
        z.detach(), W.detach(), problem.inputs[0], loss_scale * 2 * z.detach() / z.numel()
    )
    assert problems.relative(W.grad, expected) <= 1e-6


def test_a_solution_changes_in_nothing_but_how_its_last_adjoint_went():
    problem, _ = problems.tanh_layer(24, 0.8, 3)
    solution = solve(problem.fn, problem.start, problem.inputs)
    with pytest.raises(dataclasses.FrozenInstanceError):
        solution.z = solution.z.detach()
    with pytest.raises(AttributeError):
        solution.adjoint = None
    before = vars(solution).copy()
    assert solution.adjoint is None
    solution.z.square().sum().backward()
    assert solution.adjoint.status.tolist() == [Status.CONVERGED] * 3
    assert all(vars(solution)[name] is value for name, value in before.items())


def test_the_graph_of_a_solution_does_not_keep_the_solution_alive():
    problem, _ = problems.tanh_layer(24, 0.8, 3)
    solution = solve(problem.fn, problem.start, problem.inputs)
    z, seen = solution.z, weakref.ref(solution)
    del solution
    assert seen() is None
    z.sum().backward()


@pytest.mark.parametrize("gradient", [Implicit(), Phantom(), Unrolled()], ids=str)
def test_every_gradient_attaches_itself_to_what_the_loop_returns(gradient):
    problem, W = problems.tanh_layer(24, 0.8, 3)
    inner = Problem(problem.fn, problem.inputs, Layout.of(problem.start, by_blocks=False), compact=False)
    start = problem.start[:, None]
    outcome = iterate(inner, start, solver=Anderson(), stop=Stop())
    z = gradient.attach(inner, start, outcome, Recorder())
    assert torch.equal(z, outcome.z)
    assert torch.autograd.grad(z.sum(), W)[0].isfinite().all()
    with pytest.raises(AttributeError):
        outcome.z = z


def test_the_adjoint_reports_a_residual_that_is_true():
    problem, W = problems.tanh_layer(24, 0.8, 3)
    solution = solve(problem.fn, problem.start, problem.inputs, stop=TIGHT, gradient=Implicit(stop=Stop(rtol=1e-3)))
    solution.z.square().sum().backward()
    adjoint = solution.adjoint
    assert (adjoint.residual <= 1e-3).all()
    assert (adjoint.residual > 0).all()
    assert (adjoint.evaluations > 1).all()
    exact = problems.exact_weight_gradient(solution.z.detach(), W.detach(), problem.inputs[0], 2 * solution.z.detach())
    # u is off by (I − Jᵀ)⁻¹ of the residual: at most 1e-3 ‖g‖/(1 − .8), while ‖u‖ ≥ ‖g‖/1.8.
    assert problems.relative(W.grad, exact) <= 9e-3


@pytest.mark.parametrize("solver", ADJOINTS, ids=str)
def test_the_adjoint_tolerance_is_relative_to_the_cotangent_for_every_solver(solver):
    # u is 1,000 times as large as g: a tolerance relative to u would leave half of it out.
    rate = torch.tensor([0.999, 0.5], dtype=f64)
    b = torch.ones(1, 2, dtype=f64, requires_grad=True)
    gradient = Implicit(solver=solver, stop=Stop(rtol=1e-3, max_steps=20_000))
    solution = solve(lambda z, b: rate * z + b, torch.zeros_like(b), (b,), gradient=gradient)
    (found,) = torch.autograd.grad(solution.z.sum(), b)
    assert solution.adjoint.status.item() == Status.CONVERGED
    assert solution.adjoint.residual.item() <= 1e-3
    torch.testing.assert_close(found, 1 / (1 - rate)[None], rtol=2e-3, atol=0)


def test_the_adjoint_may_have_a_tolerance_per_sample_though_a_sample_failed():
    w = torch.tensor(0.5, dtype=f64, requires_grad=True)
    x = torch.tensor([[1.0], [torch.nan], [0.5]], dtype=f64)
    gradient = Implicit(stop=Stop(rtol=torch.tensor([1e-9, 1e-6, 1e-9], dtype=f64)))
    z = solve(lambda z, x: w * torch.sin(z) + x, torch.zeros_like(x), (x,), stop=TIGHT, gradient=gradient).z
    (found,) = torch.autograd.grad(z[[0, 2]].sum(), w)
    s, c = torch.sin(z[[0, 2]]).detach(), torch.cos(z[[0, 2]]).detach()
    assert found.item() == pytest.approx((s / (1 - 0.5 * c)).sum().item(), rel=1e-7)


def test_closures_modules_and_inputs_all_receive_their_gradient():
    cell = nn.Linear(4, 4).double()
    with torch.no_grad():
        cell.weight.mul_(0.4)
    scale = torch.tensor(0.7, dtype=f64, requires_grad=True)
    x = torch.randn(3, 4, dtype=f64, generator=problems.generator(1)).requires_grad_()

    def fn(z, x):
        return scale * torch.tanh(cell(z)) + x

    leaves = [cell.weight, cell.bias, scale, x]
    z = solve(fn, torch.zeros_like(x), (x,), stop=TIGHT, gradient=Implicit(stop=Stop(rtol=1e-11))).z
    found = torch.autograd.grad(z.pow(3).sum(), leaves)
    w = torch.zeros_like(x)
    for _ in range(200):
        w = fn(w, x)
    expected = torch.autograd.grad(w.pow(3).sum(), leaves)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_the_first_guess_gets_no_gradient():
    problem, _ = problems.tanh_layer(24, 0.8, 3)
    z0 = problem.start.clone().requires_grad_()
    z = solve(problem.fn, z0, problem.inputs).z
    assert torch.autograd.grad(z.sum(), z0, allow_unused=True) == (None,)


@pytest.mark.parametrize("gradient", [Implicit(), Phantom()], ids=["implicit", "phantom"])
def test_attaching_a_gradient_changes_no_bit_of_the_solution(gradient):
    problem, _ = problems.tanh_layer(24, 0.8, 3)
    plain = solve(problem.fn, problem.start, problem.inputs, gradient=None)
    attached = solve(problem.fn, problem.start, problem.inputs, gradient=gradient)
    assert torch.equal(plain.z, attached.z.detach())
    assert attached.z.requires_grad
    assert not plain.z.requires_grad


def test_two_forwards_before_one_backward_give_the_sum_of_their_gradients():
    problem, W = problems.tanh_layer(24, 0.8, 3)
    (x,) = problem.inputs

    def loss(x):
        return (
            solve(problem.fn, problem.start, (x,), stop=TIGHT, gradient=Implicit(stop=Stop(rtol=1e-10)))
            .z.square()
            .sum()
        )

    (both,) = torch.autograd.grad(loss(x) + loss(-2 * x), W)
    one, other = torch.autograd.grad(loss(x), W)[0], torch.autograd.grad(loss(-2 * x), W)[0]
    torch.testing.assert_close(both, one + other, rtol=1e-9, atol=1e-12)


def test_solutions_inside_solutions_are_differentiated():
    a = torch.tensor([[0.6]], dtype=f64, requires_grad=True)

    def inner(y):
        return solve(lambda z, y: 0.3 * torch.sin(z) + y, y * 0, (y,), stop=TIGHT, gradient=IMPLICIT).z

    IMPLICIT = Implicit(stop=Stop(rtol=1e-11))
    z = solve(lambda z, a: 0.5 * inner(torch.cos(z)) * a, a * 0, (a,), stop=TIGHT, gradient=IMPLICIT).z
    (found,) = torch.autograd.grad(z.sum(), a)
    h = 1e-5
    with torch.no_grad():
        above, below = (
            solve(lambda z, a: 0.5 * inner(torch.cos(z)) * a, a * 0, (a + d,), stop=TIGHT, gradient=None).z.item()
            for d in (h, -h)
        )
    assert found.item() == pytest.approx((above - below) / (2 * h), rel=1e-7)


# Isolation


def gradients_beside(bad: Tensor, gradient) -> tuple[Tensor, Tensor]:
    """Derivatives of the first three samples with respect to a parameter and the inputs."""
    w = torch.tensor(0.6, dtype=f64, requires_grad=True)
    x = torch.cat([torch.rand(3, 2, dtype=f64, generator=problems.generator(5)), bad]).requires_grad_()
    z = solve(lambda z, x: w * torch.sin(z) + x, torch.zeros_like(x), (x,), gradient=gradient).z
    return torch.autograd.grad(z[:3].square().sum(), [w, x])


@pytest.mark.parametrize(
    "gradient", [Implicit(), Phantom(steps=2), Unrolled()], ids=["implicit", "phantom", "unrolled"]
)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_sample_whose_input_is_nan_poisons_no_other_gradient(gradient, bad):
    clean_w, clean_x = gradients_beside(torch.empty(0, 2, dtype=f64), gradient)
    w, x = gradients_beside(torch.tensor([[bad, 1.0]], dtype=f64), gradient)
    torch.testing.assert_close(w, clean_w, rtol=1e-9, atol=0)
    torch.testing.assert_close(x[:3], clean_x, rtol=1e-9, atol=0)
    assert (x[3] == 0).all()


@pytest.mark.parametrize("gradient", [Implicit(), Phantom(steps=2)], ids=["implicit", "phantom"])
def test_a_sample_that_is_nan_where_it_starts_poisons_no_gradient_without_compaction(gradient):
    w = torch.tensor(0.6, dtype=f64, requires_grad=True)
    z0 = torch.tensor([[1.0], [2.0], [-1.0]], dtype=f64)

    def grad(z0):
        z = solve(lambda z: w * z.sqrt() + 1, z0, gradient=gradient, stop=TIGHT).z
        return torch.autograd.grad(z[:2].sum(), w)[0]

    torch.testing.assert_close(grad(z0), grad(z0[:2]), rtol=1e-9, atol=0)


@pytest.mark.parametrize("gradient", [Implicit(), Phantom(), Unrolled()], ids=["implicit", "phantom", "unrolled"])
def test_a_first_guess_that_is_nan_poisons_no_gradient_without_compaction(gradient):
    w = torch.tensor(0.6, dtype=f64, requires_grad=True)
    z0 = torch.tensor([[1.0], [2.0], [torch.nan]], dtype=f64)

    def grad(z0):
        z = solve(lambda z: w * torch.sin(z) + 1, z0, gradient=gradient, stop=TIGHT).z
        return torch.autograd.grad(z[:2].sum(), w)[0]

    torch.testing.assert_close(grad(z0), grad(z0[:2]), rtol=1e-9, atol=0)


@pytest.mark.parametrize("gradient", [Implicit(), Implicit(solver=Anderson()), Phantom()], ids=str)
def test_a_batch_of_bad_samples_alone_has_zero_gradients(gradient):
    x = torch.full((2, 3), torch.nan, dtype=f64, requires_grad=True)
    z = solve(lambda z, x: 0.5 * torch.sin(z) + x, torch.zeros(2, 3, dtype=f64), (x,), gradient=gradient).z
    (found,) = torch.autograd.grad(z.sum(), x)
    assert torch.equal(found, torch.zeros_like(x))


def test_a_nan_cotangent_stays_in_its_sample():
    problem, _ = problems.tanh_layer(24, 0.8, 3)
    x = problem.inputs[0].clone().requires_grad_()
    z = solve(problem.fn, problem.start, (x,)).z
    g = torch.ones_like(z)
    g[1] = torch.nan
    with pytest.warns(RuntimeWarning, match="1 of 3 NONFINITE"):
        (found,) = torch.autograd.grad(z, x, g)
    (clean,) = torch.autograd.grad(solve(problem.fn, problem.start, (x,)).z.sum(), x)
    torch.testing.assert_close(found[[0, 2]], clean[[0, 2]], rtol=1e-6, atol=0)


# Failure is reported


def expanding(on_failure: str):
    """J = −3: Picard diverges on the adjoint; u = g/4."""
    b = torch.tensor([[1.0], [2.0]], dtype=f64, requires_grad=True)
    gradient = Implicit(solver=Picard(), stop=Stop(rtol=1e-6, max_steps=20), on_failure=on_failure)
    solution = solve(lambda z, b: -3 * z + b, torch.zeros_like(b), (b,), gradient=gradient)
    return solution.check(), b


def test_an_adjoint_that_does_not_converge_warns_and_reports():
    solution, _ = expanding("warn")
    with pytest.warns(RuntimeWarning, match="the adjoint of solve did not converge: 2 of 2"):
        solution.z.sum().backward()
    assert (solution.adjoint.status != Status.CONVERGED).all()
    assert (solution.adjoint.residual > 1e-6).all()


def test_an_adjoint_that_does_not_converge_raises_when_asked():
    solution, b = expanding("raise")
    with pytest.raises(ConvergenceError, match="the adjoint of solve did not converge"):
        solution.z.sum().backward()
    assert b.grad is None


def test_an_adjoint_that_does_not_converge_falls_back_to_the_one_step_gradient_when_asked():
    solution, b = expanding("phantom")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution.z.sum().backward()
    assert b.grad.tolist() == [[1.0], [1.0]]
    assert (solution.adjoint.status != Status.CONVERGED).all()


@pytest.mark.parametrize("solver", [GMRES(), Anderson(), Broyden()], ids=str)
def test_an_expanding_map_has_its_right_gradient_by_krylov_and_quasi_newton_adjoints(solver):
    b = torch.tensor([[1.0], [2.0]], dtype=f64, requires_grad=True)
    z = solve(lambda z, b: -3 * z + b, torch.zeros_like(b), (b,), gradient=Implicit(solver=solver)).z
    (found,) = torch.autograd.grad(z.sum(), b)
    torch.testing.assert_close(found, torch.full_like(b, 0.25), rtol=1e-9, atol=0)


# A Jacobian far from normal: GMRES stagnates until the last step, the residual of Picard grows first.


@pytest.mark.parametrize("solver", [GMRES(restart=30), Picard(), Anderson()], ids=str)
def test_the_adjoint_of_a_strictly_triangular_map_is_the_reverse_sweep(solver):
    problem = problems.triangular(12, B=1, D=1, gain=2.0)
    b = problem.inputs[0].clone().requires_grad_()
    gradient = Implicit(solver=solver, stop=Stop(rtol=1e-12, max_steps=200))
    z = solve(problem.fn, problem.start, (b,), solver=Picard(), stop=Stop(rtol=1e-14), gradient=gradient).z
    (found,) = torch.autograd.grad(z[:, -1].sum(), b)
    slope = 1 + torch.cos(problem.solution[0, :-1, 0])  # gain/2 · (1 + cos z)
    expected = torch.cat([slope.flip(0).cumprod(0).flip(0), torch.ones(1, dtype=f64)])
    torch.testing.assert_close(found[0, :, 0], expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: Implicit(on_failure="ignore"), ValueError, "on_failure must be"),
        (lambda: Implicit(solver="gmres"), TypeError, "solver must be GMRES"),
        (lambda: Implicit(solver=GMRES), TypeError, "solver must be GMRES"),
        (lambda: Implicit(stop=3), TypeError, "stop must be a Stop or None, got int"),
        (lambda: Phantom(damping="x"), TypeError, "damping must be a float, got str"),
        (lambda: Phantom(steps=0), ValueError, "steps must be at least 1"),
        (lambda: Phantom(damping=0.0), ValueError, "damping must be in"),
        (lambda: GMRES(restart=0), ValueError, "restart must be at least 1"),
    ],
)
def test_impossible_gradients_are_refused_by_name(make, kind, message):
    with pytest.raises(kind, match=message):
        make()
