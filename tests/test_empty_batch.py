"""No latents make no images, and no images have no latents: of the right shapes, with empty gradients."""

import pytest
import torch

from diffusion import Descent, Parallel, Schedule, Sequential, invert, sample
from pydeqsolve import Anderson, Implicit, Phantom

SCHEDULE = Schedule.linear(1000, 1e-4, 0.02)
GRADIENTS = [Implicit(), Implicit(solver=Anderson(2, coupling="causal")), Phantom(1, 0.5), Phantom(2, 0.5)]


def network(x, t):
    return 0.5 * x


@pytest.mark.parametrize("method", ["sequential", "parallel", "auto"])
@pytest.mark.parametrize("steps", [4, 300])
def test_no_latents_make_no_images_of_their_shape(method, steps):
    out = sample(network, torch.empty(0, 2, 4, 4), SCHEDULE.chain(steps), method)
    assert out.x_0.shape == (0, 2, 4, 4)
    assert out.trajectory.shape == (0, steps + 1, 2, 4, 4)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("steps", [4, 300])
def test_the_gradient_of_no_images_is_empty(gradient, steps):
    latent = torch.empty(0, 2, 4, 4, requires_grad=True)
    sample(network, latent, SCHEDULE.chain(steps), gradient=gradient).x_0.sum().backward()
    assert latent.grad.shape == latent.shape


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("through", [Sequential(), Parallel()])
def test_descending_for_no_images_finds_no_latents(through, gradient):
    method = Descent(through, epochs=2, gradient=gradient)
    found = invert(network, torch.empty(0, 6), SCHEDULE.chain(4), method)
    assert found.x_T.shape == (0, 6)
    assert found.status.shape == (0,)
