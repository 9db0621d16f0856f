"""Chains of any signal and noise: the same problem in other coordinates has the same images, counts and latents."""

import dataclasses

import pytest
import torch
from mixture import Mixture, latents, means

from diffusion import Chain, Inpaint, Schedule, Splitting, invert, sample
from diffusion.models.clip import Clip
from diffusion.recurrence import Preconditioning
from pydeqsolve import Implicit

SCHEDULE = Schedule.linear()
SIZES = {  # √(α² + σ²) of a state, of its σ/α: variance preserved, noise added to the image, a flow
    "vp": torch.ones_like,
    "ve": lambda ratio: (1 + ratio.square()).sqrt(),
    "flow": lambda ratio: (1 + ratio.square()).sqrt() / (1 + ratio),
}


class Scaled(torch.nn.Module):
    """A model of states of unit variance, given states of another size."""

    def __init__(self, model, chain):
        super().__init__()
        self.model, self.size = model, dict(zip(chain.timesteps.tolist(), chain.size.tolist(), strict=False))
        self.eval()

    def forward(self, x, t):
        size = torch.tensor([self.size[k] for k in t.tolist()], dtype=x.dtype).view(-1, *[1] * (x.dim() - 1))
        return self.model(x / size, t)


def in_coordinates(chain, name):
    """The same chain, its states of another size; and the size of the first."""
    size = SIZES[name](chain.noise / chain.signal)
    made = Chain(chain.timesteps, chain.signal * size, chain.noise * size, eta=chain.eta, clip=chain.clip)
    return made, float(size[0])


def relative(x, y):
    return ((x - y).norm() / y.norm()).item()


@torch.no_grad()
@pytest.mark.parametrize("coordinates", ["ve", "flow"])
@pytest.mark.parametrize("splitting", ["v", "epsilon", "gaussian"])
@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_other_coordinates_give_the_same_images_in_as_many_rounds(coordinates, splitting, eta):
    plain, model, x = SCHEDULE.chain(30, eta=eta), Mixture(SCHEDULE, means()), latents(3, 6)
    chain, size = in_coordinates(plain, coordinates)
    expected = sample(model, x, plain, "sequential", generator=torch.Generator().manual_seed(1))
    near = sample(model, x, plain, splitting=splitting, generator=torch.Generator().manual_seed(1))
    for method in ("sequential", "parallel"):
        given = {"splitting": splitting, "generator": torch.Generator().manual_seed(1)}
        out = sample(Scaled(model, chain), size * x, chain, method, **given)
        assert relative(out.x_0, expected.x_0) < (1e-12 if method == "sequential" else 1e-3)
        assert out.converged.all()
    assert out.rounds == near.rounds
    assert out.evaluations.tolist() == near.evaluations.tolist()


@torch.no_grad()
@pytest.mark.parametrize("coordinates", ["ve", "flow"])
def test_long_chains_in_other_coordinates_are_sampled_on_as_few_evaluations(coordinates):
    plain, model, x = SCHEDULE.chain(300), Mixture(SCHEDULE, means()), latents(2, 6)
    chain, size = in_coordinates(plain, coordinates)
    expected, out = sample(model, x, plain), sample(Scaled(model, chain), size * x, chain)
    assert out.evaluations.tolist() == expected.evaluations.tolist()
    assert relative(out.x_0, sample(model, x, plain, "sequential").x_0) < 1e-3


@pytest.mark.parametrize("coordinates", ["ve", "flow"])
@pytest.mark.parametrize("method", ["exact", "ddim"])
def test_inversion_in_other_coordinates_finds_the_same_latents(coordinates, method):
    plain, model = SCHEDULE.chain(25, "quadratic"), Mixture(SCHEDULE, means())
    image = sample(model, latents(3, 6), plain, "sequential").x_0
    chain, size = in_coordinates(plain, coordinates)
    expected = invert(model, image, plain, method)
    found = invert(Scaled(model, chain), image, chain, method)
    assert relative(found.x_T / size, expected.x_T) < 1e-6
    torch.testing.assert_close(found.typicality, expected.typicality, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-4, atol=1e-20)
    assert abs(found.rounds - expected.rounds) <= 2


@pytest.mark.parametrize("coordinates", ["ve", "flow"])
def test_gradients_in_other_coordinates_are_those_of_the_chain_rule(coordinates):
    plain, model = SCHEDULE.chain(12), Mixture(SCHEDULE, means())
    chain, size = in_coordinates(plain, coordinates)
    x = latents(2, 6).requires_grad_()
    y = (size * x.detach()).requires_grad_()
    sample(model, x, plain, gradient=Implicit(), error=1e-9).x_0.square().sum().backward()
    sample(Scaled(model, chain), y, chain, gradient=Implicit(), error=1e-9).x_0.square().sum().backward()
    assert relative(size * y.grad, x.grad) < 1e-7


@torch.no_grad()
def test_known_pixels_are_kept_on_a_chain_of_any_coordinates():
    plain, model, x = SCHEDULE.chain(20), Mixture(SCHEDULE, means()), latents(2, 6)
    chain, size = in_coordinates(plain, "ve")
    images, mask = 0.3 * latents(2, 6, seed=5), torch.tensor([1.0, 1, 1, 0, 0, 0], dtype=torch.float64)
    expected = sample(model, x, plain, "sequential", edit=Inpaint(plain, images, mask, x)).x_0
    for method, most in (("sequential", 1e-12), ("parallel", 1e-3)):
        out = sample(Scaled(model, chain), size * x, chain, method, edit=Inpaint(chain, images, mask, x)).x_0
        assert relative(out, expected) < most


@torch.no_grad()
def test_clipped_images_are_the_same_in_other_coordinates():
    plain, model, x = SCHEDULE.chain(15), Mixture(SCHEDULE, means()), latents(2, 6)
    for clip in (Clip(0.5), Clip(0.5, consistent=True)):
        held = dataclasses.replace(plain, clip=clip)
        chain, size = in_coordinates(held, "flow")
        expected = sample(model, x, held, "sequential").x_0
        assert relative(sample(Scaled(model, chain), size * x, chain, "sequential").x_0, expected) < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("coordinates", ["vp", "ve", "flow"])
def test_every_prediction_says_the_same_of_states_of_any_size(coordinates):
    plain, x = SCHEDULE.chain(20), latents(2, 6)
    chain, size = in_coordinates(plain, coordinates)
    eps = Scaled(Mixture(SCHEDULE, means()), chain)
    levels = {int(t): (a, s) for t, a, s in zip(chain.timesteps, *chain.before, strict=True)}

    def flow(y, t):
        alpha, sigma = levels[int(t[0])]
        return eps(y, t) - (y - sigma * eps(y, t)) / alpha

    def clean(y, t):
        alpha, sigma = levels[int(t[0])]
        return (y - sigma * eps(y, t)) / alpha

    def velocity(y, t):  # of the state of unit variance
        alpha, sigma = levels[int(t[0])]
        unit = (alpha**2 + sigma**2).sqrt()
        return (alpha * eps(y, t) - sigma * clean(y, t)) / unit

    expected = sample(eps, size * x, chain, "sequential").x_0
    for prediction, model in {"flow": flow, "sample": clean, "v": velocity}.items():
        out = sample(model, size * x, chain, "sequential", prediction=prediction).x_0
        assert relative(out, expected) < 1e-12, prediction


@torch.no_grad()
def test_a_preconditioned_network_is_given_and_read_as_edm_has_it():
    t, sigma, d = torch.tensor([0.9, 0.2, -0.6]), torch.tensor([20.0, 4.0, 0.5, 0.0]).double(), 0.5
    chain = Chain(t, torch.ones_like(sigma), sigma, preconditioning=Preconditioning(d, output=True))
    seen = []

    def network(x, t):
        seen.append((x, t))
        return torch.tanh(x + t[:, None])

    x = 20 * latents(2, 6)
    state = x
    for k in range(3):  # Karras et al. 2022, Eq. 7 and Algorithm 1 without its correction
        total = (sigma[k] ** 2 + d**2).sqrt()
        denoised = d**2 / total**2 * state + sigma[k] * d / total * torch.tanh(state / total + t[k])
        state = state + (sigma[k + 1] - sigma[k]) * (state - denoised) / sigma[k]
    assert relative(sample(network, x, chain, "sequential").x_0, state) < 1e-6  # t is float32
    assert seen[0][1].dtype == torch.float32


def test_a_chain_that_starts_without_signal_needs_a_prediction_that_says_something_there():
    s = torch.linspace(1, 0, 6, dtype=torch.float64)
    chain = Chain(1000 * s[:-1], 1 - s, s)
    with pytest.raises(ValueError, match="ε says nothing of x_0"):
        sample(lambda x, t: x, latents(1, 6), chain)


@torch.no_grad()
def test_a_flow_from_pure_noise_takes_eulers_steps():
    s, x = torch.linspace(1, 0, 9, dtype=torch.float64), latents(2, 6)
    chain = Chain(1000 * s[:-1], 1 - s, s)

    def model(y, t):
        return torch.tanh(2 * y) - 0.3 * t[:, None] / 1000

    state = x
    for k in range(8):
        state = state + (s[k + 1] - s[k]) * model(state, 1000 * s[k : k + 1].float())
    for method, most in (("sequential", 1e-7), ("parallel", 1e-3)):
        assert relative(sample(model, x, chain, method, prediction="flow").x_0, state) < most


def test_alphas_are_refused_of_states_that_have_none():
    s = torch.linspace(1, 0, 6, dtype=torch.float64)
    chain = Chain(1000 * s[:-1], 1 - s, s)
    for name in ("alphas", "alphas_next"):
        with pytest.raises(ValueError, match=f"{name}: only states with α² . σ² = 1"):
            getattr(chain, name)
    plain = SCHEDULE.chain(10)
    torch.testing.assert_close(plain.alphas, SCHEDULE.alphas_cumprod[plain.timesteps], rtol=1e-14, atol=0)


def test_signal_and_noise_are_those_of_the_states():
    chain = SCHEDULE.chain(4)
    alphas = torch.cat([SCHEDULE.alphas_cumprod[chain.timesteps], torch.ones(1, dtype=torch.float64)])
    assert chain.signal.tolist() == pytest.approx(alphas.sqrt().tolist())
    assert chain.noise.tolist() == pytest.approx((1 - alphas).sqrt().tolist())
    assert (chain.signal.dtype, chain.noise.dtype, chain.init_noise_sigma) == (torch.float64, torch.float64, 1.0)


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"signal": [1.0, 1.0, 1.0]}, TypeError, "signal: a tensor"),
        ({"signal": torch.ones(2)}, ValueError, r"signal: shape \(3,\), T = 2 steps"),
        ({"signal": torch.tensor([0.5, 0.0, 1.0])}, ValueError, "signal: above 0 .* or 0 at the first"),
        ({"noise": torch.tensor([2.0, 0.0, 0.0])}, ValueError, "noise: above 0 .* or 0 at the last"),
        ({"noise": torch.tensor([1.0, 2.0, 0.0])}, ValueError, "noise: σ/α must not rise .* step 0"),
        ({"noise": torch.tensor([2.0, float("nan"), 0.0])}, ValueError, "noise: finite values"),
        ({"noise": torch.tensor([2, 1, 0])}, TypeError, "noise: a tensor .* floating-point"),
        ({"timesteps": torch.tensor([1.0, 2.0])}, ValueError, "timesteps: must decrease"),
        ({"timesteps": torch.tensor([True, False])}, TypeError, "timesteps: integers or real"),
        ({"timesteps": torch.tensor([1.0, float("inf")])}, ValueError, "timesteps: finite"),
        ({"ends": torch.ones(2, 3)}, ValueError, r"ends: shape \(2, 2\)"),
        ({"init_noise_sigma": 0.0}, ValueError, "init_noise_sigma: a positive"),
        ({"variance": "large"}, ValueError, 'variance: "large"'),
    ],
)
def test_a_chain_of_signal_and_noise_is_checked_field_by_field(fields, error, words):
    good = {"timesteps": torch.tensor([9, 5]), "signal": torch.ones(3), "noise": torch.tensor([2.0, 1.0, 0.0])}
    Chain(**good)
    with pytest.raises(error, match=words):
        Chain(**{**good, **fields})


@torch.no_grad()
def test_a_partial_chain_goes_on_from_a_noised_image():
    chain, model = SCHEDULE.chain(20), Mixture(SCHEDULE, means())
    part = chain.partial(0.35)
    assert (len(part), part.timesteps.tolist()) == (7, chain.timesteps[13:].tolist())
    image, noise = 0.2 * latents(2, 6), latents(2, 6, seed=3)
    start = part.add_noise(image, noise)
    torch.testing.assert_close(start, chain.signal[13] * image + chain.noise[13] * noise)
    states = sample(model, latents(2, 6), chain, "sequential").trajectory
    torch.testing.assert_close(sample(model, states[:, 13], part, "sequential").x_0, states[:, -1])
    assert sample(model, start, part).converged.all()


def test_a_strength_that_leaves_no_step_is_refused():
    for strength in (0, 0.04, 1.1, -1):
        with pytest.raises(ValueError, match="strength: 1/20"):
            SCHEDULE.chain(20).partial(strength)
    with pytest.raises(TypeError, match="strength: a number"):
        SCHEDULE.chain(20).partial("half")


def test_partial_inversion_finds_the_state_of_an_image_half_way():
    chain, model = SCHEDULE.chain(20, "quadratic"), Mixture(SCHEDULE, means())
    states = sample(model, latents(2, 6), chain, "sequential").trajectory
    found = invert(model, states[:, -1], chain.partial(0.5))
    assert relative(found.x_T, states[:, 10]) < 1e-5


def test_a_fitted_splitting_fits_the_chains_own_coordinates():
    plain = SCHEDULE.chain(10)
    chain, _ = in_coordinates(plain, "ve")
    images = torch.rand(20, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    one, other = Splitting.fitted(plain, images), Splitting.fitted(chain, images)
    torch.testing.assert_close(other.kappa * chain.size[:-1, None], one.kappa)  # of κ x, the same
    torch.testing.assert_close(other.offset, one.offset)
