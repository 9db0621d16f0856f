"""Cotangents and tangents in batches: is_grads_batched, vectorize=True, torch.func.vmap over a backward pass."""

import problems
import pytest
import torch
from torch.autograd.functional import hessian, jacobian

from pydeqsolve import Anderson, Implicit, Neumann, Phantom, Picard, Status, Stop, Unrolled, solve

f64 = torch.float64
TIGHT = Stop(rtol=1e-12, max_steps=300)
EXACT = Implicit(stop=Stop(rtol=1e-12, max_steps=300))
GRADIENTS = [EXACT, Implicit(Neumann(60), Stop(rtol=1e-12)), Implicit(Anderson(), TIGHT), Phantom(3), Unrolled()]
IDS = ["implicit", "neumann", "anderson", "phantom", "unrolled"]

by_gradient = pytest.mark.parametrize("gradient", GRADIENTS, ids=IDS)
by_form = pytest.mark.parametrize("form", ["inputs", "closure", "tuple", "a failed neighbour"])


def data():
    W = 0.5 * problems.orthogonal(3, 1)
    return W, torch.randn(2, 3, dtype=f64, generator=problems.generator(5))


def root(W, x, gradient, form="inputs", solver=None):
    """Two samples of z = tanh(W z + x), or of a pair, whose x is an input or closed over."""
    keywords = {"stop": TIGHT, "gradient": gradient, "solver": solver or Picard()}
    if form == "tuple":
        start = torch.zeros_like(x), torch.zeros(len(x), 2, dtype=f64)
        fn = lambda z, x: (torch.tanh(z[0] @ W.T + x), 0.3 * z[0][:, :2] * z[1] + 0.5)  # noqa: E731
        z = solve(fn, start, (x,), **keywords).z
        return z[0].sin()[:, :2] * z[1]
    if form == "closure":
        return solve(lambda z: torch.tanh(z @ W.T + x), torch.zeros_like(x), **keywords).z.sin()
    if form == "a failed neighbour":
        x = torch.cat([x, torch.full((1, 3), torch.nan, dtype=f64)])
    fn = lambda z, x: torch.tanh((W @ z[..., None])[..., 0] + x)  # noqa: E731
    return solve(fn, torch.zeros_like(x), (x,), **keywords).z[:2].sin()


@by_gradient
@by_form
def test_a_vectorised_jacobian_in_parameters_and_inputs_is_that_of_one_row_at_a_time(gradient, form):
    fn = lambda W, x: root(W, x, gradient, form)  # noqa: E731
    for found, expected in zip(jacobian(fn, data(), vectorize=True), jacobian(fn, data()), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@by_gradient
@by_form
def test_a_vectorised_hessian_is_that_of_one_row_at_a_time(gradient, form):
    fn = lambda W, x: root(W, x, gradient, form).sum()  # noqa: E731
    for found, expected in zip(hessian(fn, data(), vectorize=True), hessian(fn, data()), strict=True):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@by_gradient
def test_a_jacobian_in_forward_mode_may_be_vectorised(gradient):
    W, x = data()
    for at, fn in ((x, lambda x: root(W, x, gradient)), (W, lambda W: root(W, x, gradient))):
        found = jacobian(fn, at, vectorize=True, strategy="forward-mode")
        torch.testing.assert_close(found, jacobian(fn, at), rtol=1e-9, atol=1e-11)


@by_gradient
@pytest.mark.parametrize("kind", ["is_grads_batched", "vmap"])
def test_batched_cotangents_give_the_gradients_of_each(gradient, kind):
    W, x = data()
    x.requires_grad_()
    z = root(W, x, gradient, solver=Anderson())
    g = torch.randn(4, 2, 3, dtype=f64, generator=problems.generator(6))
    if kind == "vmap":
        found = torch.func.vmap(lambda v: torch.autograd.grad(z, x, v, retain_graph=True)[0])(g)
    else:
        (found,) = torch.autograd.grad(z, x, g, retain_graph=True, is_grads_batched=True)
    expected = torch.stack([torch.autograd.grad(z, x, v, retain_graph=True)[0] for v in g])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_a_jacobian_of_a_jacobian_may_be_vectorised_twice():
    W, x = data()
    inner = lambda x: jacobian(lambda x: root(W, x, EXACT).sum(), x, vectorize=True, create_graph=True)  # noqa: E731
    found = jacobian(inner, x, vectorize=True)
    torch.testing.assert_close(found, hessian(lambda x: root(W, x, EXACT).sum(), x), rtol=1e-9, atol=1e-11)


def test_the_outcome_of_a_batch_of_cotangents_is_that_of_all():
    W, x = data()
    x.requires_grad_()
    solution = solve(lambda z, x: torch.tanh(z @ W.T + x), torch.zeros_like(x), (x,))
    g = torch.ones(3, 2, 3, dtype=f64)
    g[0, 1, 0] = torch.nan
    with pytest.warns(RuntimeWarning, match="1 of 2 NONFINITE"):
        (found,) = torch.autograd.grad(solution.z, x, g, is_grads_batched=True, retain_graph=True)
    assert solution.adjoint.status.tolist() == [Status.CONVERGED, Status.NONFINITE]
    assert not found[0, 1].isfinite().any()
    assert found[1:].isfinite().all()
    assert found[0, 0].isfinite().all()
    of_all = solution.adjoint.evaluations[0]
    torch.autograd.grad(solution.z, x, g[1])
    assert of_all == 3 * solution.adjoint.evaluations[0]
