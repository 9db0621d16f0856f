"""Second derivatives and forward mode through a solution, against finite differences and closed forms."""

import gc
import math
import weakref

import problems
import pytest
import torch
from torch.autograd import forward_ad

from pydeqsolve import DEQ, GMRES, Anderson, Implicit, Neumann, Phantom, Picard, Stop, Unrolled, solve

f64 = torch.float64
TIGHT = Stop(rtol=1e-14, max_steps=400)
EXACT = Implicit(stop=Stop(rtol=1e-13, max_steps=400))


def data(B=2, D=3):
    g = problems.generator(5)
    W = (0.5 * problems.orthogonal(D, 1)).requires_grad_()
    return W, torch.randn(B, D, dtype=f64, generator=g).requires_grad_()


def solution(W, x, gradient=EXACT, **keywords):
    fn = lambda z, x: torch.tanh((W @ z[..., None])[..., 0] + x)  # noqa: E731
    return solve(fn, torch.zeros_like(x), (x,), stop=TIGHT, gradient=gradient, **keywords).z


# Second derivatives


def test_second_derivatives_in_inputs_and_closed_over_parameters_equal_finite_differences():
    W, x = data()
    assert torch.autograd.gradgradcheck(lambda W, x: solution(W, x).sin(), (W, x), atol=1e-6, rtol=1e-5)


def test_without_inputs_they_reach_what_the_map_closes_over():
    W, x = data()
    fn = lambda W, x: solve(lambda z: torch.tanh(z @ W.T + x), x.detach() * 0, stop=TIGHT, gradient=EXACT).z  # noqa: E731
    assert torch.autograd.gradgradcheck(fn, (W, x), atol=1e-6, rtol=1e-5)


def test_a_parameter_shared_by_the_map_and_what_makes_its_input_is_counted_once_each_way():
    W, x = data()
    assert torch.autograd.gradgradcheck(lambda W, x: solution(W, 2 * torch.sin(x @ W)), (W, x), atol=1e-6, rtol=1e-5)


def test_a_nested_state_has_them_too():
    _, x = data()

    def fn(x):
        z = solve(lambda z, x: (0.4 * torch.cos(z[1]) + x, 0.3 * z[0] * z[1] + 0.5), (x.detach() * 0, x.detach() * 0),
                  (x,), stop=TIGHT, gradient=EXACT).z  # fmt: skip
        return z[0] * z[1]

    assert torch.autograd.gradgradcheck(fn, (x,), atol=1e-6, rtol=1e-5)


def test_a_gradient_that_depends_on_an_input_that_is_no_leaf_can_be_asked_for():
    W, x = data()
    y = 2 * x
    (first,) = torch.autograd.grad(solution(W, y).sum(), y, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    assert second.abs().sum() > 0
    h, v = 1e-6, torch.randn(x.shape, dtype=f64, generator=problems.generator(1))

    def value(x):
        y = (2 * x).detach().requires_grad_()
        return float(torch.autograd.grad(solution(W, y).sum(), y)[0].square().sum())

    expected = (value(x.detach() + h * v) - value(x.detach() - h * v)) / (2 * h)
    assert float((second * v).sum()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("gradient", "solver"),
    [
        (EXACT, Picard()),
        (Implicit(solver=Anderson(), stop=Stop(rtol=1e-13, max_steps=400)), Anderson()),
        (Implicit(solver=Neumann(300), stop=Stop(rtol=1e-13, max_steps=400)), Anderson()),
        (Unrolled(), Picard()),  # the derivatives of Anderson's last iterate lag behind the iterate itself
        (Phantom(steps=100), Anderson()),
    ],
    ids=["gmres", "anderson", "neumann", "unrolled", "phantom"],
)
def test_the_second_derivative_of_a_scalar_fixed_point_is_that_of_its_closed_slope(gradient, solver):
    w = torch.tensor(0.5, dtype=f64, requires_grad=True)
    z = solve(lambda z: torch.tanh(w * z + 0.7), torch.zeros(1, 1, dtype=f64), solver=solver, stop=TIGHT,
              gradient=gradient).z  # fmt: skip
    (first,) = torch.autograd.grad(z.sum(), w, create_graph=True)
    (second,) = torch.autograd.grad(first, w)

    def slope(w):  # dz/dw = s z / (1 − s w), s = 1 − z²
        z = 0.0
        for _ in range(400):
            z = math.tanh(w * z + 0.7)
        return (1 - z * z) * z / (1 - (1 - z * z) * w)

    assert first.item() == pytest.approx(slope(0.5), rel=1e-9)
    assert second.item() == pytest.approx((slope(0.5 + 1e-5) - slope(0.5 - 1e-5)) / 2e-5, rel=1e-6)


def test_a_gradient_penalty_can_be_trained_with_backward():
    W, x = data()
    z = solution(W, x)
    (first,) = torch.autograd.grad(z.square().sum(), x, create_graph=True)
    (first.square().sum() + z.sum()).backward()
    h, v = 1e-6, torch.randn(W.shape, dtype=f64, generator=problems.generator(2))

    def value(W):
        x_ = x.detach().requires_grad_()
        z = solution(W, x_)
        return float(torch.autograd.grad(z.square().sum(), x_)[0].square().sum() + z.detach().sum())

    expected = (value(W.detach() + h * v) - value(W.detach() - h * v)) / (2 * h)
    assert float((W.grad * v).sum()) == pytest.approx(expected, rel=1e-6)


def test_a_nan_sample_poisons_no_second_derivative():
    W, x = data(B=3)
    alone = x.detach()[[0, 2]].requires_grad_()
    x = x.detach()
    x[1] = torch.nan
    x.requires_grad_()
    found = []
    for y, rows in ((x, [0, 2]), (alone, [0, 1])):
        (first,) = torch.autograd.grad(solution(W, y)[rows].square().sum(), W, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), W)[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)


def test_a_second_adjoint_that_does_not_converge_is_told():
    W, x = data()
    with pytest.warns(RuntimeWarning, match="adjoint of solve did not converge"):
        (first,) = torch.autograd.grad(solution(W, x, Implicit(solver=Neumann(1))).sum(), x, create_graph=True)
    with pytest.warns(RuntimeWarning, match="adjoint of solve did not converge"):
        torch.autograd.grad(first.sum(), W)


def test_third_derivatives_are_refused():
    w = torch.tensor(0.5, dtype=f64, requires_grad=True)
    z = solve(lambda z: torch.tanh(w * z + 0.7), torch.zeros(1, 1, dtype=f64), stop=TIGHT, gradient=EXACT).z
    (first,) = torch.autograd.grad(z.sum(), w, create_graph=True)
    with pytest.raises(NotImplementedError, match="third derivatives"):
        torch.autograd.grad(first, w, create_graph=True)


def test_a_graph_of_second_derivatives_is_freed():
    W, x = data()
    z = solution(W, x)
    (first,) = torch.autograd.grad(z.sum(), x, create_graph=True)
    dead = weakref.ref(z), weakref.ref(first)
    del z, first
    gc.collect()
    assert [d() for d in dead] == [None, None]


def first_and_second_order(make):
    """The gradients of Σ z² of `make()` → (z, leaves), plain and with a graph of their own."""
    z, leaves = make()
    plain = torch.autograd.grad(z.square().sum(), leaves, retain_graph=True)
    return plain, torch.autograd.grad(z.square().sum(), leaves, create_graph=True)


def twice_the_same_input(W, x):
    return solve(lambda z, a, b: torch.tanh(z @ W.T + a * b), x.detach() * 0, (x, x), stop=TIGHT, gradient=EXACT).z


def an_input_that_is_closed_over_too(W, x):
    return solve(lambda z, a: torch.tanh(z @ W.T + a + x), x.detach() * 0, (x,), stop=TIGHT, gradient=EXACT,
                 compact=False).z  # fmt: skip


def an_input_and_its_multiple(W, x):
    return solve(lambda z, a, b: torch.tanh(z @ W.T + a + b), x.detach() * 0, (x, 2 * x), stop=TIGHT, gradient=EXACT).z


@pytest.mark.parametrize(
    "fn", [solution, twice_the_same_input, an_input_that_is_closed_over_too, an_input_and_its_multiple]
)
def test_the_first_derivative_is_the_same_with_a_graph_of_its_own(fn):
    # gradgradcheck alone would not see it: it compares the differentiable first derivative with itself.
    W, x = data()
    plain, graphed = first_and_second_order(lambda: (fn(W, x), [W, x]))
    for a, b in zip(graphed, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert torch.autograd.gradgradcheck(fn, (W, x), atol=1e-6, rtol=1e-5)


def under_functional_call(x):
    layer = torch.nn.Linear(3, 3).double()
    fn = DEQ(Wrapped(layer), stop=TIGHT, gradient=EXACT)
    given = {name: (0.3 * p).detach().requires_grad_() for name, p in fn.named_parameters()}
    return torch.func.functional_call(fn, given, (x,))


class Wrapped(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, z, x):
        return torch.tanh(0.3 * self.layer(z) + x)


def of_a_loop_variable(x):
    scales = [0.2, 0.5]
    for k in range(2):
        z = solve(lambda z, x: torch.tanh(scales[k] * z + x), x.detach() * 0, (x,), stop=TIGHT, gradient=EXACT).z  # noqa: B023
        k = 0
    return z


def with_dropout(x):
    masks = iter(torch.rand(1000, *x.shape, generator=problems.generator(0)) > 0.5)
    first = next(masks)
    calls = []

    def fn(z, x):
        calls.append(1)
        mask = first if len(calls) < 40 and not torch.is_grad_enabled() else next(masks)
        return torch.tanh(0.5 * z + torch.where(mask, x, 0.0))

    return solve(fn, x.detach() * 0, (x,), stop=TIGHT, gradient=EXACT, compact=False).z


@pytest.mark.parametrize("make", [under_functional_call, of_a_loop_variable, with_dropout])
def test_a_map_that_is_another_in_the_backward_pass_is_told(make):
    _, x = data()
    z = make(x)
    with pytest.raises(RuntimeError, match="another map"):
        torch.autograd.grad(z.sum(), x, create_graph=True)


def test_a_map_of_the_same_fixed_points_that_is_another_in_the_backward_pass_is_told():
    W, x = data()
    damping = [0.9]
    fn = lambda z, x: (1 - damping[0]) * z + damping[0] * torch.tanh(z @ W + x)  # noqa: E731
    z = solve(fn, torch.zeros_like(x), (x,), stop=TIGHT, gradient=EXACT).z
    damping[0] = 0.5
    with pytest.raises(RuntimeError, match="another map"):
        torch.autograd.grad(z.sin().sum(), x, create_graph=True)


def test_autocast_of_the_forward_pass_is_that_of_the_second_derivative():
    W, x = (t.detach().float().requires_grad_() for t in data())

    def make():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = solve(lambda z, x: torch.tanh(z @ W.T + x), torch.zeros_like(x), (x,), stop=Stop(rtol=2e-2),
                      gradient=Implicit(stop=Stop(rtol=5e-2))).z  # fmt: skip
        return z, [W, x]

    for a, b in zip(*first_and_second_order(make), strict=True):
        torch.testing.assert_close(a, b, rtol=5e-2, atol=5e-2)


# Forward mode


@pytest.mark.parametrize("gradient", [EXACT, Implicit(solver=GMRES(restart=2), stop=Stop(rtol=1e-12)), Phantom(80)])
def test_dual_numbers_carry_the_tangent_of_inputs_and_of_what_the_map_closes_over(gradient):
    W, x = data()
    g = problems.generator(7)
    dW, dx = torch.randn(W.shape, dtype=f64, generator=g), torch.randn(x.shape, dtype=f64, generator=g)
    with forward_ad.dual_level():
        dual = solution(forward_ad.make_dual(W.detach(), dW), forward_ad.make_dual(x.detach(), dx), gradient)
        z, tangent = forward_ad.unpack_dual(dual)
    assert tangent is not None, "the derivative was lost without a word"
    with torch.no_grad():
        above, below = (solution(W + h * dW, x + h * dx, None) for h in (1e-6, -1e-6))
    torch.testing.assert_close(tangent, (above - below) / 2e-6, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(z, solution(W, x).detach(), rtol=1e-12, atol=0)


def test_forward_and_backward_derivatives_agree():
    W, x = data()
    assert torch.autograd.gradcheck(solution, (W, x), check_forward_ad=True, atol=1e-7, rtol=1e-6)


def test_a_nan_sample_poisons_no_tangent():
    W, x = data(B=3)
    x = x.detach()
    x[1] = torch.nan
    with forward_ad.dual_level():
        dual = solution(W.detach(), forward_ad.make_dual(x, torch.ones_like(x)))
        tangent = forward_ad.unpack_dual(dual).tangent
    assert tangent[[0, 2]].isfinite().all()
    assert (tangent[[0, 2]] != 0).all()


@pytest.mark.parametrize("gradient", [EXACT, Phantom(3)], ids=["implicit", "phantom"])
def test_tangents_survive_no_grad(gradient):
    W, x = data()
    with torch.no_grad(), forward_ad.dual_level():
        dual = solution(W, forward_ad.make_dual(x.detach(), torch.ones_like(x)), gradient)
        without = forward_ad.unpack_dual(dual).tangent
    with forward_ad.dual_level():
        dual = solution(W.detach(), forward_ad.make_dual(x.detach(), torch.ones_like(x)), gradient)
        torch.testing.assert_close(without, forward_ad.unpack_dual(dual).tangent, rtol=1e-10, atol=0)


def test_forward_over_reverse_is_refused():
    W, x = data()
    with forward_ad.dual_level():
        z = solution(W, forward_ad.make_dual(x.detach(), torch.ones_like(x)))
        with pytest.raises(NotImplementedError, match="forward mode over reverse"):
            torch.autograd.grad(z.sum(), W)


@pytest.mark.parametrize("solver", [GMRES(), Anderson(), Neumann(100)], ids=str)
def test_reverse_over_forward_is_refused(solver):
    W, x = data()
    with forward_ad.dual_level():
        z = solution(W, forward_ad.make_dual(x.detach(), torch.ones_like(x)), Implicit(solver, Stop(rtol=1e-10)))
        tangent = forward_ad.unpack_dual(z).tangent
    with pytest.raises(NotImplementedError, match="reverse mode over forward"):
        torch.autograd.grad(tangent.sum(), W)
