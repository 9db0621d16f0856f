"""Noise maps: a chain of eta > 0 makes the image again from them, exactly."""

import pytest
import torch
from mixture import Mixture, latents, means

from diffusion import Clip, Guided, NoiseMaps, Schedule, invert, load_checkpoint, sample
from pydeqsolve import Status

SCHEDULE = Schedule.linear(1000, 1e-4, 0.02)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def again(model, found, chain, method="sequential", **options):
    return sample(model, found.x_T, chain, method=method, noises=found.noises, **options).x_0


@pytest.mark.parametrize("eta", [1e-3, 0.4, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 20, 150])
def test_the_image_comes_back_from_the_latent_and_its_noise(eta, steps):
    model, chain, x_0 = Mixture(SCHEDULE, means()), SCHEDULE.chain(steps, eta=eta), latents(3, 6, seed=5)
    found = invert(model, x_0, chain, "ddpm", generator=seeded())
    assert found.converged.all()
    assert found.loss.max() < 1e-25
    torch.testing.assert_close(again(model, found, chain), x_0, rtol=0, atol=1e-12)


CHAINS = {
    "a flow from pure noise": (Schedule.flow(shift=3.0).chain(9, eta=0.7), "flow"),
    "EDM": (Schedule.edm().chain(9, eta=1.0), "epsilon"),
    "a chain that clips": (Schedule(SCHEDULE.alphas_cumprod, clip=Clip(0.5)).chain(8, eta=1.0), "epsilon"),
    "the large variance": (Schedule(SCHEDULE.alphas_cumprod, variance="large").chain(8, eta=1.0), "epsilon"),
    "leading steps": (SCHEDULE.chain(8, "leading", eta=1.0), "sample"),
    "its last steps": (SCHEDULE.chain(8, eta=1.0).partial(0.5), "v"),
}


@pytest.mark.parametrize("name", CHAINS)
def test_any_chain_with_fresh_noise_will_do(name):
    (chain, prediction), x_0 = CHAINS[name], latents(2, 1, 2, 3, seed=5).clamp(-1, 1)

    def model(x, t):
        return torch.sin(3 * x) + 0.1 * x

    found = invert(model, x_0, chain, NoiseMaps(), prediction=prediction, generator=seeded())
    assert found.noises.shape == (2, len(chain), 1, 2, 3)
    assert found.loss.max() < 1e-22
    torch.testing.assert_close(again(model, found, chain, prediction=prediction), x_0, rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_the_loss_is_that_of_sampling_with_a_network_in_single_precision(scale):
    digits = load_checkpoint("digits")
    chain, x_0 = digits.schedule.chain(30, eta=1.0), digits.images[:4]
    model = Guided(lambda x, t, shift: digits.model(x + shift, t), scale, torch.zeros(1, 1, 1))
    inputs = (torch.full((4, 1, 1, 1), 0.05),)
    found = invert(model, x_0, chain, "ddpm", inputs=inputs, generator=seeded())
    assert found.converged.all()
    assert found.loss.max() < 1e-12
    assert torch.equal(again(model, found, chain, inputs=inputs), x_0)


def test_an_image_and_a_latent_in_bfloat16_come_back_bit_for_bit():
    model, chain = Mixture(SCHEDULE, means()), SCHEDULE.chain(10, eta=1.0)
    x_0 = latents(3, 6, seed=5).bfloat16()
    found = invert(model, x_0, chain, "ddpm", generator=seeded())
    assert found.x_T.dtype == torch.bfloat16
    assert found.noises.dtype == torch.float64
    assert torch.equal(again(model, found, chain), x_0)


def test_all_steps_are_one_round_and_the_loss_is_measured_by_sampling():
    model, chain, x_0 = Mixture(SCHEDULE, means()), SCHEDULE.chain(12, eta=1.0), latents(3, 6)
    found = invert(model, x_0, chain, "ddpm", max_rounds=1)
    assert (model.calls, model.rows) == (13, 2 * 12 * 3)
    assert (found.rounds, found.check) == (1, 12)
    assert found.evaluations.tolist() == [24] * 3
    assert "3 of 3 converged" in repr(found)


def test_parallel_sampling_gives_the_image_back_to_the_error_asked_for():
    model, chain, x_0 = Mixture(SCHEDULE, means()), SCHEDULE.chain(50, eta=1.0), latents(3, 6, seed=5)
    found = invert(model, x_0, chain, "ddpm", generator=seeded())
    torch.testing.assert_close(again(model, found, chain, "parallel", error=1e-9), x_0, rtol=0, atol=1e-7)


def test_the_maps_are_larger_than_the_noise_of_the_chain_and_of_independent_states():
    """By Eq. 5 of a model that knows nothing, ε = 0: σ_k n_k = s_{k+1} − a_k s_k, a sum of independent noises."""
    chain, x_0 = SCHEDULE.chain(40, eta=1.0), torch.zeros(200, 6, dtype=torch.float64)
    found = invert(lambda x, t: torch.zeros_like(x), x_0, chain, "ddpm", generator=seeded())
    a, sigma, noise = chain.a[:-1], chain.sigma[:-1], chain.noise
    expected = (noise[1:-1].square() + (a * noise[:-2]).square()).sqrt() / sigma
    torch.testing.assert_close(found.noises[:, :-1].square().mean((0, 2)).sqrt(), expected, rtol=0.1, atol=0)


def test_the_generator_decides_and_one_for_each_image_makes_it_independent_of_its_neighbours():
    model, chain, x_0 = Mixture(SCHEDULE, means()), SCHEDULE.chain(7, eta=1.0), latents(3, 6)
    one, same = (invert(model, x_0, chain, "ddpm", generator=seeded(4)) for _ in range(2))
    assert torch.equal(one.noises, same.noises)
    assert not torch.equal(one.x_T, invert(model, x_0, chain, "ddpm", generator=seeded(5)).x_T)
    several = invert(model, x_0, chain, "ddpm", generator=[seeded(i) for i in range(3)])
    alone = invert(model, x_0[1:2], chain, "ddpm", generator=[seeded(1)])
    assert torch.equal(several.x_T[1:2], alone.x_T)
    torch.testing.assert_close(several.noises[1:2], alone.noises, rtol=0, atol=1e-9)


def test_no_noise_is_drawn_from_the_global_generator_when_one_is_given():
    before = torch.get_rng_state()
    invert(Mixture(SCHEDULE, means()), latents(1, 6), SCHEDULE.chain(3, eta=1.0), "ddpm", generator=seeded())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_nan_image_harms_no_other_and_is_not_finite():
    model, chain, x_0 = Mixture(SCHEDULE, means()), SCHEDULE.chain(8, eta=1.0), latents(4, 6)
    clean = invert(model, x_0, chain, "ddpm", generator=seeded())
    x_0[2] = torch.nan
    found = invert(model, x_0, chain, "ddpm", generator=seeded())
    others = [0, 1, 3]
    torch.testing.assert_close(found.noises[others], clean.noises[others], rtol=0, atol=1e-9)
    assert found.status.tolist() == [Status.CONVERGED, Status.CONVERGED, Status.NONFINITE, Status.CONVERGED]


def test_conditioning_and_a_splitting_with_an_offset_are_taken():
    model, chain, x_0 = Mixture(SCHEDULE, means()), SCHEDULE.chain(9, eta=1.0), latents(3, 6)
    shift, mean = latents(3, 6, seed=8), latents(1, 6, seed=9)[0]
    from diffusion import Splitting

    split = Splitting.named("gaussian", chain, mean, torch.ones(6))
    found = invert(model, x_0, chain, "ddpm", inputs=(shift,), splitting=split, rows_per_call=5, generator=seeded())
    assert found.loss.max() < 1e-24
    torch.testing.assert_close(again(model, found, chain, inputs=(shift,)), x_0, rtol=0, atol=1e-12)
    assert (again(model, found, chain, inputs=(-shift,)) - x_0).square().sum(1).min() > 1e-2


def test_a_batch_of_no_images_is_inverted():
    found = invert(Mixture(SCHEDULE, means()), torch.zeros(0, 6), SCHEDULE.chain(4, eta=1.0), "ddpm")
    assert found.noises.shape == (0, 4, 6)


def test_a_chain_that_clips_gives_no_warning(recwarn):
    chain = Schedule(SCHEDULE.alphas_cumprod, clip=Clip(1.0)).chain(5, eta=1.0)
    invert(Mixture(SCHEDULE, means()), latents(1, 6), chain, "ddpm")
    assert len(recwarn) == 0


def test_a_chain_without_fresh_noise_is_refused_by_name():
    with pytest.raises(ValueError, match=r"chain: eta > 0 .* NoiseMaps\(\)"):
        invert(Mixture(SCHEDULE, means()), latents(1, 6), SCHEDULE.chain(5), "ddpm")


@pytest.mark.parametrize("method", ["exact", "ddim", "naive", "deq"])
def test_of_fresh_noise_the_other_methods_name_the_one_that_takes_it(method):
    with pytest.raises(ValueError, match="ddpm"):
        invert(Mixture(SCHEDULE, means()), latents(1, 6), SCHEDULE.chain(5, eta=0.5), method)


def test_the_other_methods_have_no_maps():
    assert invert(Mixture(SCHEDULE, means()), latents(1, 6), SCHEDULE.chain(5), "ddim").noises is None


@pytest.mark.parametrize("generator", [3, [seeded()], "cpu"])
@pytest.mark.parametrize("method", ["ddpm", "deq"])
def test_a_generator_that_is_none_or_too_few_is_named(generator, method):
    chain = SCHEDULE.chain(3, eta=1.0 if method == "ddpm" else 0.0)
    with pytest.raises((TypeError, ValueError), match="generator"):
        invert(Mixture(SCHEDULE, means()), latents(2, 6), chain, method, generator=generator)
