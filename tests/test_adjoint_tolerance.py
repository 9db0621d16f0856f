"""The adjoint's tolerance, that of the forward solve and of the precision of fn; the memory of small systems."""

import re
import warnings

import problems
import pytest
import torch
from torch import nn

from pydeqsolve import GMRES, Anderson, Implicit, Neumann, Status, Stop, solve

f64, f32 = torch.float64, torch.float32


def test_the_default_tolerance_is_that_of_the_forward_solve_sample_by_sample():
    problem, _ = problems.tanh_layer(24, 0.9, 3)
    rtol = torch.tensor([1e-2, 1e-5, 0.0], dtype=f64)
    stop = Stop(rtol=rtol, max_steps=400)
    solution = solve(problem.fn, problem.start, problem.inputs, stop=stop)
    solution.z.square().sum().backward()
    goal = torch.tensor([1e-2, 1e-5, 1e-6], dtype=f64)
    assert (solution.adjoint.residual <= goal).all()
    assert (solution.adjoint.residual > 0.01 * goal).all()
    assert solution.adjoint.evaluations[0] < solution.adjoint.evaluations[1]


@pytest.mark.parametrize("rtol", [0.5, 1.0, torch.inf])
def test_a_forward_solve_of_one_step_still_has_a_gradient(rtol):
    problem, _ = problems.tanh_layer(24, 0.9, 3)
    x = problem.inputs[0].clone().requires_grad_()
    solution = solve(problem.fn, problem.start, (x,), stop=Stop(rtol=rtol))
    (found,) = torch.autograd.grad(solution.z.sum(), x)
    assert (found.norm(dim=1) > 0).all()
    assert (solution.adjoint.residual <= 0.1).all()


def cell(D, rho, dtype=f32):
    layer = nn.Linear(D, D, bias=False, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(rho * problems.orthogonal(D, 4))
    return layer


def of_low_precision(kind, dtype, rho, gradient, stop=None, D=32, B=16):
    """A solve that computes in 16 bits: under autocast, all of it, or between two casts."""
    x = torch.randn(B, D, dtype=f64, generator=problems.generator(6)).to(dtype if kind == "pure" else f32)
    layer = cell(D, rho, f32 if kind == "autocast" else dtype)
    fn = lambda z, x: torch.tanh(layer(z) + x)  # noqa: E731
    if kind == "casts":
        fn = lambda z, x: torch.tanh(layer(z.to(dtype)).float() + x)  # noqa: E731
    with torch.autocast("cpu", dtype=dtype, enabled=kind == "autocast"):
        solution = solve(fn, torch.zeros_like(x), (x,), stop=stop or Stop(rtol=5e-2), gradient=gradient)
    g = torch.randn(B, D, dtype=f64, generator=problems.generator(8)).to(x.dtype)
    return solution, layer.weight, g


@pytest.mark.parametrize("kind", ["autocast", "pure", "casts"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rho", [0.5, 0.9])
@pytest.mark.parametrize("rtol", [1e-2, 0.0])
def test_the_default_adjoint_of_a_map_in_16_bits_converges_quietly_in_few_products(kind, dtype, rho, rtol):
    stop = Stop(rtol=rtol, max_steps=12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution, W, g = of_low_precision(kind, dtype, rho, Implicit(), stop)
        (found,) = torch.autograd.grad(solution.z, W, g)
    assert (solution.adjoint.status == Status.CONVERGED).all()
    assert (solution.adjoint.evaluations <= (10 if rho == 0.5 else 20)).all()
    assert found.isfinite().all()


@pytest.mark.parametrize("kind", ["autocast", "pure", "casts"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("solver", [GMRES(), Anderson(), Neumann(20)], ids=str)
def test_a_tolerance_below_the_precision_of_fn_ends_stalled_at_its_floor(kind, dtype, solver):
    gradient = Implicit(solver, Stop(rtol=1e-6))
    solution, W, g = of_low_precision(kind, dtype, 0.5, gradient)
    with pytest.warns(RuntimeWarning, match="16 of 16 STALLED .*precision that fn computes in"):
        torch.autograd.grad(solution.z, W, g)
    assert (solution.adjoint.residual <= 4 * torch.finfo(dtype).eps).all()
    assert (solution.adjoint.evaluations <= 21).all()


def test_a_map_that_turns_autocast_off_is_held_to_its_own_precision():
    layer, x = cell(32, 0.5), torch.randn(4, 32, generator=problems.generator(6))

    def fn(z, x):
        with torch.autocast("cpu", enabled=False):
            return torch.tanh(layer(z) + x)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        solution = solve(fn, torch.zeros_like(x), (x,), gradient=Implicit(stop=Stop(rtol=1e-6)))
    solution.z.sum().backward()
    assert solution.adjoint.status.tolist() == [Status.CONVERGED] * 4
    assert (solution.adjoint.residual <= 1e-6).all()


# Memory


@pytest.mark.parametrize(("D", "words"), [(1, 2), (3, 4), (12, 30)])
def test_small_states_take_a_few_words_per_entry(D, words):
    B, sizes = 20_000, []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, fn, types, arguments=(), keywords=None):
            out = fn(*arguments, **keywords or {})
            if isinstance(out, torch.Tensor):
                sizes.append(out.untyped_storage().nbytes() / (4 * B * D))
            return out

    g = torch.randn(B, D, generator=problems.generator(1))
    with Watch():
        _, outcome = GMRES().solve(lambda u: 0.5 * u.roll(1, 1), g, Stop(rtol=1e-5))
    assert (outcome.status == Status.CONVERGED).all()
    assert max(sizes) <= words


@pytest.mark.parametrize("shape", [(2,), (5, 3)])
def test_a_tolerance_of_the_adjoint_that_fits_no_sample_is_refused_before_the_solve(shape):
    gradient = Implicit(stop=Stop(rtol=torch.full(shape, 1e-5)))
    with pytest.raises(ValueError, match=re.escape(f"gradient.stop.rtol must have shape (5,), got {shape}")):
        solve(lambda z: 0.5 * z + 1, torch.zeros(5, 3), gradient=gradient)


class Halved(torch.autograd.Function):
    """x / 2, and where x is positive."""

    @staticmethod
    def forward(ctx, x):
        ctx.mark_non_differentiable(positive := x > 0)
        return x / 2, positive

    @staticmethod
    def backward(ctx, grad, _):
        return grad / 2


def test_an_output_without_derivative_says_nothing_of_the_precision_of_the_map():
    x = torch.randn(3, 4, dtype=f64, generator=problems.generator(2)).requires_grad_()
    solution = solve(lambda z, x: torch.cos(Halved.apply(z)[0] + x), torch.zeros_like(x), (x,), stop=Stop(1e-13))
    torch.autograd.grad(solution.z.sum(), x)
    assert bool((solution.adjoint.residual < 1e-12).all())
