"""Derivatives through a solve whose map holds another solve, against finite differences."""

import problems
import pytest
import torch

from pydeqsolve import Implicit, Phantom, Picard, Stop, Unrolled, solve
from pydeqsolve.derivative import closure

f64 = torch.float64
TIGHT = Stop(rtol=1e-12, max_steps=400)


def inner(fn, like, inputs, gradient=None):
    gradient = gradient or Implicit()
    return solve(fn, torch.zeros_like(like), inputs, solver=Picard(), stop=TIGHT, gradient=gradient, compact=False).z


def of_sum(a, z, x):
    return inner(lambda u, y: torch.tanh(0.3 * u + y), z, (z + x,))


def of_two(a, z, x):
    return inner(lambda u, z, x: torch.tanh(0.3 * a * u + z * x), z, (z, x))


def of_state_alone(a, z, x):
    return inner(lambda u, z: torch.tanh(0.3 * u + z), z, (z,))


def of_a_third(a, z, x):
    return inner(lambda u, y: 0.3 * of_sum(a, u, y) + 0.2 * u, z, (z + x,))


def phantom(a, z, x):
    return inner(lambda u, y: torch.tanh(0.3 * u + y), z, (z + x,), Phantom(25))


def unrolled(a, z, x):
    return inner(lambda u, y: torch.tanh(0.3 * u + y), z, (z + x,), Unrolled())


def closing_over_the_state(a, z, x):
    return inner(lambda u: torch.tanh(0.3 * u + z), z, ())


def closing_over_an_input(a, z, x):
    return inner(lambda u, z: torch.tanh(0.3 * u + z + x), z, (z,))


CLOSING = [closing_over_the_state, closing_over_an_input]
INNER = [of_sum, of_two, of_state_alone, of_a_third, phantom, unrolled, *CLOSING]


def outer(inside):
    fn = lambda a: lambda z, x: 0.4 * inside(a, z, x) + 0.1 * a * x  # noqa: E731
    return lambda a, x: solve(fn(a), torch.zeros_like(x), (x,), stop=TIGHT, compact=False).z


def data():
    a = torch.tensor(0.6, dtype=f64, requires_grad=True)
    return a, torch.randn(2, 1, dtype=f64, generator=problems.generator(5)).requires_grad_()


@pytest.mark.parametrize("inside", [of_sum, of_state_alone, *CLOSING])
def test_a_solve_inside_a_solve_is_differentiated(inside):
    assert torch.autograd.gradcheck(outer(inside), data(), atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("inside", INNER)
def test_second_derivatives_pass_a_solve_inside_a_solve(inside):
    a, x = data()
    plain = torch.autograd.grad(outer(inside)(a, x).sin().sum(), [a, x])
    graphed = torch.autograd.grad(outer(inside)(a, x).sin().sum(), [a, x], create_graph=True)
    for found, expected in zip(graphed, plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    v = torch.ones_like(x)
    along = torch.autograd.grad(graphed[0] + (graphed[1] * v).sum(), [a, x])

    def slope(h):  # of the sum of first derivatives, h along both
        at = [(a + h).detach().requires_grad_(), (x + h * v).detach().requires_grad_()]
        first = torch.autograd.grad(outer(inside)(*at).sin().sum(), at)
        return first[0] + (first[1] * v).sum()

    expected = (slope(1e-5) - slope(-1e-5)) / 2e-5
    torch.testing.assert_close(along[0] + (along[1] * v).sum(), expected, rtol=1e-7, atol=1e-9)


def test_second_derivatives_by_what_cannot_be_found_are_refused_with_the_reason(monkeypatch):
    unseen = lambda self, fn, types, args=(), kwargs=None: fn(*args, **kwargs or {})  # noqa: E731
    monkeypatch.setattr(closure._Reading, "__torch_function__", unseen)  # as if compiled code read it
    a, x = data()
    assert torch.autograd.gradcheck(outer(closing_over_the_state), (a, x), atol=1e-7, rtol=1e-5)
    with pytest.raises(NotImplementedError, match="closes over a tensor with a graph of its own"):
        torch.autograd.grad(outer(closing_over_the_state)(a, x).sum(), x, create_graph=True)


def test_a_hessian_by_a_parameter_that_the_map_closes_over_is_not_zero():
    # torch.autograd.functional hands on a view of the parameter, which is no leaf.
    a, x = data()
    fn = lambda a: solve(lambda z, x: torch.tanh(a * z + x), torch.zeros_like(x), (x,), stop=TIGHT).z.sum()  # noqa: E731
    found = torch.autograd.functional.hessian(fn, a.detach())
    h = 1e-4
    expected = (fn(a.detach() + h) - 2 * fn(a.detach()) + fn(a.detach() - h)) / h**2
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_tensor_that_is_read_directly_and_through_another_is_counted_once_each_way():
    a, x = data()
    twice = lambda a, x: _of_both(a, torch.sin(a), x)  # noqa: E731
    assert torch.autograd.gradcheck(twice, (a, x), atol=1e-7, rtol=1e-5)
    assert torch.autograd.gradgradcheck(twice, (a, x), atol=1e-6, rtol=1e-5)


def _of_both(a, sine, x):
    return solve(lambda z, x: torch.tanh(0.3 * a * z + sine * x), torch.zeros_like(x), (x,), stop=TIGHT).z


def test_a_solve_that_closes_over_the_solution_of_another_has_its_second_derivative():
    def both(a, x):
        first = inner(lambda u, x: torch.tanh(0.3 * a * u + x), x, (x,))
        return solve(lambda z: 0.5 * torch.cos(z) * first, torch.zeros(2, 1, dtype=f64), stop=TIGHT).z.sin()

    assert torch.autograd.gradgradcheck(both, data(), atol=1e-6, rtol=1e-5)
