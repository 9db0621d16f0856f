"""Gradients under no_grad, autocast, functional_call, compile and checkpointing; what stays in memory."""

import gc
import warnings
import weakref

import problems
import pytest
import torch
from torch import Tensor, nn

from pydeqsolve import DEQ, Implicit, Phantom, Picard, Stop, Unrolled, solve

f64 = torch.float64
TIGHT = Stop(rtol=1e-13, max_steps=2000)


def test_no_graph_is_built_without_a_gradient_under_no_grad_or_in_inference_mode():
    problem, _ = problems.tanh_layer(24, 0.8, 3)
    calls = []

    def fn(z, x):
        calls.append(torch.is_grad_enabled())
        return problem.fn(z, x)

    assert not solve(fn, problem.start, problem.inputs, gradient=None).z.requires_grad
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            for gradient in (Implicit(), Phantom(), Unrolled()):
                assert not solve(fn, problem.start, problem.inputs, gradient=gradient).z.requires_grad
    assert not any(calls)


def test_a_solve_under_autocast_keeps_its_dtype_and_has_gradients():
    problem, W = problems.tanh_layer(16, 0.5, 2, torch.float32)
    exact = solve(problem.fn, problem.start, problem.inputs, gradient=None).z
    with torch.autocast("cpu", dtype=torch.bfloat16):
        # A product in bfloat16 rounds at 4e-3: neither residual can be smaller.
        gradient = Implicit(stop=Stop(rtol=5e-2))
        z = solve(problem.fn, problem.start, problem.inputs, stop=Stop(rtol=2e-2), gradient=gradient).z
    assert z.dtype == torch.float32
    assert problems.relative(z.detach(), exact) < 0.1
    z.square().sum().backward()
    expected = problems.exact_weight_gradient(exact, W.detach(), problem.inputs[0], 2 * exact)
    assert problems.relative(W.grad.double(), expected) < 0.2


def test_functional_call_differentiates_the_parameters_it_was_given():
    model = DEQ(Cell(4).double(), stop=TIGHT, gradient=Implicit(stop=Stop(rtol=1e-11)))
    x = torch.randn(2, 4, dtype=f64, generator=problems.generator(1))
    given = {name: (1.1 * p).detach().requires_grad_() for name, p in model.named_parameters()}
    found = torch.autograd.grad(torch.func.functional_call(model, given, (x,)).square().sum(), list(given.values()))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(given[name])
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert all(p.grad is None for p in model.parameters())


class Cell(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(width, width)
        with torch.no_grad():
            self.linear.weight.mul_(0.5)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(z) + x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.deq = DEQ(Cell(6))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.deq(2 * x))


@pytest.mark.filterwarnings("ignore")  # the compiler's own, on every graph break
def test_a_compiled_model_that_contains_a_solve_gives_the_same_values_and_gradients():
    model = Model()
    x = torch.randn(3, 6, generator=problems.generator(2))
    expected = model(x)
    grads = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    compiled = torch.compile(model, backend="aot_eager")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = compiled(x)
    assert not any("lru_cache" in str(w.message) for w in told)
    torch.testing.assert_close(found, expected)
    for a, b in zip(torch.autograd.grad(found.square().sum(), list(model.parameters())), grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_checkpointed_map_has_the_same_gradient():
    problem, W = problems.tanh_layer(24, 0.8, 3)

    def checkpointed(z, x):
        return torch.utils.checkpoint.checkpoint(problem.fn, z, x, use_reentrant=False)

    found, expected = (
        torch.autograd.grad(solve(fn, problem.start, problem.inputs, stop=TIGHT).z.sum(), W)[0]
        for fn in (checkpointed, problem.fn)
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


# Memory


@pytest.mark.parametrize("gradient", [Implicit(), Phantom(), Unrolled()], ids=["implicit", "phantom", "unrolled"])
@pytest.mark.parametrize("backward", [True, False])
def test_a_forgotten_solution_frees_its_tensors(gradient, backward):
    problem, _ = problems.tanh_layer(24, 0.8, 3)
    solution = solve(problem.fn, problem.start, problem.inputs, gradient=gradient)
    if backward:
        solution.z.sum().backward()
    dead = weakref.ref(solution), weakref.ref(solution.z)
    del solution
    gc.collect()
    assert [d() for d in dead] == [None, None]


def test_the_backward_graph_does_not_grow_with_the_steps_of_the_solver():
    def saved_bytes(max_steps):
        problem, _ = problems.tanh_layer(24, 0.99, 3)
        total = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: total.append(t.nbytes) or t, lambda t: t):
            solve(problem.fn, problem.start, problem.inputs, solver=Picard(), stop=Stop(rtol=0.0, max_steps=max_steps))
        return sum(total)

    assert saved_bytes(40) == saved_bytes(4) > 0
