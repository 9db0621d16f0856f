"""Phantom and Unrolled against their definitions and the implicit gradient they tend to."""

import problems
import pytest
import torch

from pydeqsolve import Anderson, Broyden, Implicit, Phantom, Picard, Stop, Unrolled, solve

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


# Samples that go wrong


def exploding(z, w, x, bad):
    return torch.where(bad > 0, 10 * z * z + 10 * w, torch.tanh(w * z + x))


@pytest.mark.parametrize("gradient", [Phantom(8), Unrolled()], ids=str)
@pytest.mark.filterwarnings("ignore:Unrolled:RuntimeWarning")
def test_a_sample_that_explodes_beside_it_poisons_no_gradient(gradient):
    w = torch.tensor(0.5, dtype=f64, requires_grad=True)
    x = torch.ones(2, 1, dtype=f64)
    bad = torch.tensor([[0.0], [1.0]], dtype=f64)

    def grad(rows):
        z = solve(lambda z, x, bad: exploding(z, w, x, bad), x[rows] * 0, (x[rows], bad[rows]), stop=TIGHT,
                  gradient=gradient).z  # fmt: skip
        assert z.isfinite().all()
        return torch.autograd.grad(z[0].sum(), w)[0]

    torch.testing.assert_close(grad([0, 1]), grad([0]), rtol=1e-10, atol=0)


def test_a_sample_whose_closure_is_nan_warns_that_shared_gradients_are_lost():
    w = torch.tensor(0.5, dtype=f64, requires_grad=True)
    x = torch.tensor([[1.0], [torch.nan]], dtype=f64)
    for gradient in (Implicit(), Phantom()):
        with pytest.warns(RuntimeWarning, match="give per-sample data in inputs"):
            solve(lambda z: torch.tanh(w * z + x), torch.zeros(2, 1, dtype=f64), gradient=gradient)


def test_a_stand_in_for_a_failed_sample_has_a_finite_slope():
    # At zero, where nobody is, sqrt has none.
    w = torch.tensor(0.5, dtype=f64, requires_grad=True)
    z0 = torch.tensor([[1.0], [torch.nan]], dtype=f64)
    z = solve(lambda z: torch.sqrt(w * z) + 1, z0, gradient=Phantom(2)).z
    assert torch.autograd.grad(z[0].sum(), w)[0].isfinite()


def test_unrolled_keeps_the_measured_value_and_says_when_a_replay_ends_elsewhere():
    # The fourth value jumps, is refused, and the history with it: a replay without refusals goes on from there.
    calls = []
    w = torch.tensor(0.9, dtype=f64, requires_grad=True)

    def fn(z):
        calls.append(1)
        return w * torch.sin(3 * z) + 1 + (1000.0 if len(calls) == 4 else 0.0)

    stop = Stop(rtol=1e-10, max_steps=8)
    with pytest.warns(RuntimeWarning, match="does not end at their solution"):
        solution = solve(fn, torch.zeros(1, 3, dtype=f64), solver=Anderson(), stop=stop, gradient=Unrolled())
    r = 0.9 * torch.sin(3 * solution.z) + 1 - solution.z
    torch.testing.assert_close(r.square().mean(1).sqrt(), solution.residual, rtol=1e-9, atol=0)
    assert not solution.z.requires_grad


def test_unrolled_refuses_what_it_cannot_replay():
    z0 = torch.ones(1, 2, dtype=f64)
    kept = solve(torch.cos, z0, gradient=None, keep_history=True)
    for start, solver in ((z0, Broyden(line_search=4)), (kept, Anderson())):
        with pytest.raises(NotImplementedError, match="neither a history, nor a line search"):
            solve(torch.cos, start, solver=solver, gradient=Unrolled())
