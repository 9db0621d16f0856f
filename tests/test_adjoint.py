"""Gradients through `sample`: implicit equals autograd through the sequential chain; phantom is what it says."""

import pytest
import torch
from mixture import Mixture, latents, means

from diffusion import Schedule, sample
from pydeqsolve import Implicit, Phantom, Stop

SCHEDULE = Schedule.linear(1000, 1e-4, 0.02)
CHAIN = SCHEDULE.chain(12)
TIGHT = Stop(rtol=1e-11, max_steps=1000)


def sequential_gradients(model, x, shift, loss):
    """Plain autograd through the steps, written out."""
    z = x
    for k in range(len(CHAIN)):
        eps = model(z, CHAIN.timesteps[k].expand(len(z)), shift)
        z = CHAIN.a[k] * z + CHAIN.c[k] * eps
    return torch.autograd.grad(loss(z), [x, shift, model.means])


def problem():
    model = Mixture(SCHEDULE, means())
    return model, latents(3, 6).requires_grad_(), latents(3, 6, seed=4).requires_grad_()


def loss(z):
    return (z * torch.arange(1, 7)).sin().sum()


@pytest.mark.parametrize("splitting", ["epsilon", "v"])
@pytest.mark.parametrize("method", ["sequential", "parallel"])
def test_the_implicit_gradient_is_that_of_the_sequential_chain(splitting, method):
    model, x, shift = problem()
    expected = sequential_gradients(model, x, shift, loss)
    out = sample(model, x, CHAIN, method=method, splitting=splitting, inputs=(shift,), stop=TIGHT, gradient=Implicit())
    got = torch.autograd.grad(loss(out.x_0), [x, shift, model.means])
    for a, b in zip(got, expected, strict=True):
        assert (a - b).norm() <= 1e-8 * b.norm()


def test_the_trajectory_is_differentiable_too():
    model, x, _ = problem()
    out = sample(model, x, CHAIN, stop=TIGHT, gradient=Implicit())
    (got,) = torch.autograd.grad(out.trajectory[:, 5].sin().sum(), x)
    z = x
    for k in range(5):
        z = CHAIN.a[k] * z + CHAIN.c[k] * model(z, CHAIN.timesteps[k].expand(3))
    (expected,) = torch.autograd.grad(z.sin().sum(), x)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-10)


def test_a_phantom_gradient_of_as_many_steps_as_the_chain_is_exact():
    model, x, shift = problem()
    expected = sequential_gradients(model, x, shift, loss)
    gradient = Phantom(steps=len(CHAIN), damping=1.0)
    out = sample(model, x, CHAIN, inputs=(shift,), stop=TIGHT, gradient=gradient)
    got = torch.autograd.grad(loss(out.x_0), [x, shift, model.means])
    for a, b in zip(got, expected, strict=True):
        assert (a - b).norm() <= 1e-8 * b.norm()


@pytest.mark.parametrize("damping", [1.0, 0.3])
def test_the_one_step_phantom_gradient_is_a_multiple_of_the_cotangent_and_calls_no_model(damping):
    model, x, _ = problem()
    out = sample(model, x, CHAIN, splitting="epsilon", gradient=Phantom(1, damping))
    rows = model.rows
    (got,) = torch.autograd.grad(loss(out.x_0), x)
    z = out.x_0.detach().requires_grad_()
    (cotangent,) = torch.autograd.grad(loss(z), z)
    multiple = damping * (CHAIN.alphas_next[-1] / CHAIN.alphas[0]).sqrt()
    torch.testing.assert_close(got, multiple * cotangent)
    assert model.rows == rows


@pytest.mark.parametrize("gradient", [Implicit(), Phantom(1), Phantom(3, 0.5)])
def test_asking_for_a_gradient_does_not_change_the_images(gradient):
    model, x, _ = problem()
    with torch.no_grad():
        plain = sample(model, x, CHAIN).x_0
    assert torch.equal(sample(model, x, CHAIN, gradient=gradient).x_0.detach(), plain)


def test_without_a_gradient_there_is_no_graph():
    model, x, _ = problem()
    assert not sample(model, x, CHAIN).x_0.requires_grad


def test_second_derivatives_are_refused():
    model, x, _ = problem()
    out = sample(model, x, CHAIN, gradient=Implicit())
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.autograd.grad(out.x_0.sum(), x, create_graph=True)


def test_a_closure_over_trainable_tensors_gets_their_gradient():
    scale = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    model, x, _ = problem()
    out = sample(lambda x, t: scale * model(x, t), x, CHAIN, stop=TIGHT, gradient=Implicit())
    (got,) = torch.autograd.grad(out.x_0.sum(), scale)
    z = x
    for k in range(len(CHAIN)):
        z = CHAIN.a[k] * z + CHAIN.c[k] * scale * model(z, CHAIN.timesteps[k].expand(3))
    (expected,) = torch.autograd.grad(z.sum(), scale)
    torch.testing.assert_close(got, expected)
