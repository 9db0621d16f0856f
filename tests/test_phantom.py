"""Phantom and Unrolled against their definitions and the implicit gradient they tend to."""

import problems
import pytest
import torch

from pydeqsolve import (
    Anderson,
    Broyden,
    Implicit,
    Phantom,
    Picard,
    Stop,
    Unrolled,
    solve,
)

f64 = torch.float64
TIGHT = Stop(rtol=1e-13, max_steps=2000)


def test_the_one_step_phantom_gradient_passes_the_cotangent_straight_to_f():
    problem, W = problems.tanh_layer(24, 0.8, 3)
    z = solve(problem.fn, problem.start, problem.inputs, stop=TIGHT, gradient=Phantom()).z
    (found,) = torch.autograd.grad(z.square().sum(), W)
    again = torch.tanh(z.detach() @ W.T + problem.inputs[0])
    (expected,) = torch.autograd.grad((2 * z.detach() * again).sum(), W)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("damping", [1.0, 0.6])
def test_phantom_gradients_are_damped_neumann_sums_and_tend_to_the_implicit_one(damping):
    A = problems.with_spectrum(torch.linspace(-0.5, 0.8, 5, dtype=f64), 2)
    b = torch.randn(1, 5, dtype=f64, generator=problems.generator(3)).requires_grad_()
    g = torch.randn(5, dtype=f64, generator=problems.generator(4))
    identity = torch.eye(5, dtype=f64)
    for steps in (1, 3, 200):
        z = solve(lambda z, b: z @ A.T + b, b.detach() * 0, (b,), stop=TIGHT, gradient=Phantom(steps, damping)).z
        (found,) = torch.autograd.grad((z * g).sum(), b)
        M = damping * A + (1 - damping) * identity  # one damped step; Geng et al. 2021, Eq. 9
        expected = sum(damping * torch.linalg.matrix_power(M, k) @ g for k in range(steps))
        torch.testing.assert_close(found[0], expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[0], torch.linalg.solve(identity - A, g), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "solver",
    [Picard(), Picard(0.7), Anderson(), Anderson(kind="I"), Anderson(ridge=1e-2), Broyden(), Broyden(kind="bad")],
    ids=str,
)
def test_unrolled_follows_the_solver_step_by_step(solver):
    problem, _ = problems.tanh_layer(24, 0.8, 3)
    for steps in (1, 2, 4, 7):
        stop = Stop(rtol=0.0, max_steps=steps)
        seen = []
        solve(problem.fn, problem.start, problem.inputs, solver=solver, stop=stop, gradient=None,
              callback=lambda k, z, r, seen=seen: seen.append(z))  # fmt: skip
        z = solve(problem.fn, problem.start, problem.inputs, solver=solver, stop=stop, gradient=Unrolled()).z
        torch.testing.assert_close(z.detach(), seen[-1], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden()], ids=str)
def test_unrolled_gradients_tend_to_the_implicit_ones(solver):
    problem, W = problems.tanh_layer(24, 0.6, 3)
    grads = []
    for gradient in (Unrolled(), Implicit(stop=Stop(rtol=1e-11))):
        z = solve(problem.fn, problem.start, problem.inputs, solver=solver, stop=Stop(rtol=1e-11), gradient=gradient).z
        grads.append(torch.autograd.grad(z.square().sum(), W)[0])
    assert problems.relative(grads[0], grads[1]) < 1e-6


def test_unrolled_gradients_reach_the_first_guess():
    z0 = torch.tensor([[0.3]], dtype=f64, requires_grad=True)
    z = solve(torch.cos, z0, solver=Picard(), stop=Stop(rtol=0.0, max_steps=3), gradient=Unrolled()).z
    (found,) = torch.autograd.grad(z.sum(), z0)
    z1 = torch.cos(z0.detach())
    assert found.item() == pytest.approx((torch.sin(z1) * torch.sin(z0.detach())).item(), rel=1e-14)


def test_an_exact_start_beside_it_does_not_poison_an_unrolled_gradient():
    w = torch.tensor(0.5, dtype=f64, requires_grad=True)
    x = torch.tensor([[1.0, 2.0], [0.0, 0.0]], dtype=f64)
    z = solve(lambda z, x: w * torch.sin(z) + x, x * 0, (x,), gradient=Unrolled()).z
    (found,) = torch.autograd.grad(z.sum(), w)
    alone = solve(lambda z, x: w * torch.sin(z) + x, x[:1] * 0, (x[:1],), gradient=Unrolled()).z
    assert found.item() == pytest.approx(torch.autograd.grad(alone.sum(), w)[0].item(), rel=1e-9)


def test_unrolled_carries_a_causal_coupling_or_says_that_it_cannot():
    problem = problems.triangular(6, gain=0.9)
    stop = Stop(rtol=0.0, max_steps=4)
    seen = []
    solver = Anderson(coupling="causal")
    solve(problem.fn, problem.start, problem.inputs, solver=solver, stop=stop, gradient=None,
          callback=lambda k, z, r: seen.append(z))  # fmt: skip
    try:
        z = solve(problem.fn, problem.start, problem.inputs, solver=solver, stop=stop, gradient=Unrolled()).z
    except (NotImplementedError, ValueError):
        return
    torch.testing.assert_close(z.detach(), seen[-1], rtol=1e-6, atol=1e-9)
