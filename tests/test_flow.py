"""Flows on the shipped digits: few rounds, and inversion from pure noise on."""

import pytest
import torch

from diffusion import Schedule, invert, load_checkpoint, sample


@pytest.fixture(scope="module")
def digits():
    checkpoint = load_checkpoint("digits")
    checkpoint.model.requires_grad_(False)
    return checkpoint


@pytest.fixture(scope="module")
def model(digits):
    """v = ε − x_0 of a flow: the checkpoint's ε at the time step of the same σ/α, of x scaled to unit variance."""
    alphas = digits.schedule.alphas_cumprod
    angles, most = torch.atan2((1 - alphas).sqrt(), alphas.sqrt()), 1 / (1 + (alphas[-1] / (1 - alphas[-1])).sqrt())

    def velocity(x, t):
        s = (t.double() / 1000).clamp(max=float(most))
        step = (torch.atan2(s, 1 - s)[:, None] - angles).abs().argmin(1)
        s = s.view(-1, 1, 1, 1).to(x)
        eps = digits.model(x.float() / ((1 - s) ** 2 + s**2).sqrt(), step)
        return eps - (x - s * eps) / (1 - s)

    return velocity


@torch.no_grad()
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flow_of_28_steps_takes_a_dozen_rounds_and_says_its_error(shift, digits, model):
    chain = Schedule.flow(shift).chain(28)
    x = torch.randn(2, *digits.shape, generator=torch.Generator().manual_seed(0))
    expected = sample(model, x, chain, "sequential", prediction="flow").x_0
    for i in range(2):
        out = sample(model, x[i : i + 1], chain, prediction="flow")
        error = (out.x_0 - expected[i : i + 1]).norm() / expected[i].norm()
        assert error <= out.error.item() <= 1e-3
        assert out.rounds <= 12


def test_one_step_from_pure_noise_to_the_image_is_not_inverted():
    with pytest.raises(ValueError, match="chain: its one step makes the image of noise that has no signal"):
        invert(lambda x, t: torch.tanh(x), torch.zeros(1, 4), Schedule.flow().chain(1), prediction="flow")


@torch.no_grad()
def test_real_digits_are_inverted_on_a_flow_that_starts_from_pure_noise(digits, model):
    """The first step, where the answer is −x̂_0 of pure noise, is solved by itself: with the others it spoils them."""
    found = invert(model, digits.images[:2], Schedule.flow().chain(28), prediction="flow")
    assert found.converged.all()
    assert found.loss.max() < 1e-8
    assert found.evaluations.max() < 600
