"""The pipeline from images and back: diffusers' img2img, rescaled guidance, noise maps, partial inversion, spacing."""

import pytest
import torch
from networks import of_sdxl

from diffusion import Schedule

diffusers = pytest.importorskip("diffusers")

from diffusers.utils.torch_utils import randn_tensor  # noqa: E402

from diffusion import DEQDDIMPipeline  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "set_alpha_to_one": False,
      "steps_offset": 1, "clip_sample": False}  # fmt: skip


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def parts():
    """A small UNet2DConditionModel and an AutoencoderKL with random weights."""
    torch.manual_seed(1)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12, attention_head_dim=4,
    ).eval()  # fmt: skip
    vae = diffusers.AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, scaling_factor=0.5,
    ).eval()  # fmt: skip
    return unet, vae


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"), num_class_embeds=3,
    ).eval()  # fmt: skip
    with torch.no_grad():
        unet.conv_out.weight.mul_(0.1)
    return unet


def made(unet, scheduler, vae=None):
    pipe = DEQDDIMPipeline(unet, scheduler, vae)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def near(x, y, share=1e-4):
    return (x - y).norm() < share * y.norm()


LABELS = {"class_labels": torch.tensor([1, 2])}
IMAGES = torch.rand(2, 1, 8, 8, generator=seeded(7)) * 0.4 + 0.3


def split(steps, strength, scheduler):
    """The time steps of diffusers' img2img pipelines of UNets: the last of so many."""
    scheduler.set_timesteps(steps)
    at = max(steps - min(int(steps * strength), steps), 0)
    scheduler.set_begin_index(at) if hasattr(scheduler, "set_begin_index") else None
    return scheduler.timesteps[at:]


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize(
    ("scheduler", "eta"),
    [
        (diffusers.DDIMScheduler(**SD), 0.0),
        (diffusers.DDIMScheduler(**SD), 0.6),
        (diffusers.EulerDiscreteScheduler(), 0.0),
    ],
    ids=["ddim", "eta", "euler"],
)
@torch.no_grad()
def test_from_an_image_the_pipeline_makes_the_latents_of_diffusers_img2img(scheduler, eta, several, parts):
    unet, vae = parts
    prompt, nothing = (torch.randn(2, 5, 12, generator=seeded(s)) for s in (1, 2))
    image, own = torch.rand(2, 3, 16, 16, generator=seeded(3)), {"eta": eta} if eta else {}
    g = [seeded(4), seeded(5)] if several else seeded(4)
    each = zip(image, g, strict=True) if several else [(image, g)]
    coded = [vae.encode(2 * x.view(-1, 3, 16, 16) - 1).latent_dist.sample(one) for x, one in each]
    timesteps = split(20, 0.45, scheduler)
    noise = randn_tensor((2, 4, 8, 8), generator=g)
    state = scheduler.add_noise(0.5 * torch.cat(coded), noise, timesteps[:1])
    for t in timesteps:
        both = scheduler.scale_model_input(torch.cat([state] * 2), t)
        without, with_prompt = unet(both, t, torch.cat([nothing, prompt])).sample.chunk(2)
        drawn = {"variance_noise": randn_tensor(state.shape, generator=g)} if eta else {}
        state = scheduler.step(without + 3.0 * (with_prompt - without), t, state, **own, **drawn).prev_sample
    for method in ("parallel", "sequential"):
        got = made(unet, scheduler, vae)(
            image=image, strength=0.45, num_inference_steps=20, prompt_embeds=prompt, negative_prompt_embeds=nothing,
            guidance_scale=3.0, output_type="latent", generator=[seeded(4), seeded(5)] if several else seeded(4),
            method=method, error=1e-6, **own,
        ).images  # fmt: skip
        assert near(got, state), method


def test_one_image_starts_every_image_of_the_batch(network):
    pipe = made(network, diffusers.DDIMScheduler(clip_sample=False))
    given = {"num_inference_steps": 10, "output_type": "pt", "error": 1e-6, **LABELS}
    two = pipe(image=IMAGES[:1], generator=[seeded(1), seeded(2)], **given).images
    both = pipe(image=IMAGES[:1].expand(2, -1, -1, -1), generator=[seeded(1), seeded(2)], **given).images
    assert torch.equal(two, both)
    with pytest.raises(ValueError, match="image: one, or one for each of the 2 images, is required, got 3"):
        pipe(image=IMAGES[:1].expand(3, -1, -1, -1), **given)


@torch.no_grad()
def test_one_image_is_drawn_once_from_one_generator_as_diffusers_img2img_does(parts):
    unet, vae = parts
    scheduler, image, prompt = diffusers.DDIMScheduler(**SD), torch.rand(1, 3, 16, 16, generator=seeded(3)), seeded(1)
    prompt, g, timesteps = torch.randn(2, 5, 12, generator=prompt), seeded(4), split(10, 0.5, scheduler)
    coded = 0.5 * vae.encode(2 * image - 1).latent_dist.sample(g)
    state = scheduler.add_noise(torch.cat([coded] * 2), randn_tensor((2, 4, 8, 8), generator=g), timesteps[:1])
    for t in timesteps:
        state = scheduler.step(unet(state, t, prompt).sample, t, state).prev_sample
    got = made(unet, scheduler, vae)(
        image=image, strength=0.5, num_inference_steps=10, prompt_embeds=prompt, output_type="latent",
        generator=seeded(4), error=1e-6,
    ).images  # fmt: skip
    assert near(got, state)


@torch.no_grad()
def test_the_last_steps_of_a_long_two_step_chain_are_those_of_diffusers(network):
    scheduler = diffusers.DPMSolverMultistepScheduler(final_sigmas_type="sigma_min")
    timesteps, noise = split(20, 0.45, scheduler), torch.randn(2, 1, 8, 8, generator=seeded(2))
    state = scheduler.add_noise(2 * IMAGES - 1, noise, timesteps[:1])
    for t in timesteps:  # nine of twenty: the last is of second order
        state = scheduler.step(network(state, t, **LABELS).sample, t, state).prev_sample
    got = made(network, scheduler)(image=IMAGES, strength=0.45, num_inference_steps=20, latents=noise,
                                   output_type="latent", error=1e-6, **LABELS).images  # fmt: skip
    assert near(got, state, 1e-5)


def test_an_image_of_another_size_than_the_networks_is_sampled_at_its_own(network):
    pipe = made(network, diffusers.DDIMScheduler(clip_sample=False))
    given = {"num_inference_steps": 10, "output_type": "latent", "method": "sequential", **LABELS}
    image, noise = torch.rand(2, 1, 12, 8, generator=seeded(1)), torch.randn(2, 1, 12, 8, generator=seeded(2))
    got = pipe(image=image, generator=seeded(2), **given).images
    assert torch.equal(got, pipe(image=image, latents=noise, **given).images)
    assert got.shape == image.shape


@pytest.mark.parametrize("strength", [0.0, 1.5, 0.01, "half"])
def test_a_strength_that_takes_no_step_or_too_many_is_refused(strength, network):
    pipe = made(network, diffusers.DDIMScheduler())
    for call in (lambda: pipe(image=IMAGES, strength=strength, num_inference_steps=20, **LABELS),
                 lambda: pipe.invert(IMAGES, 20, strength=strength, **LABELS)):  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=r"^strength: "):
            call()


def test_a_tuple_of_pictures_is_a_list_of_them(network):
    pipe = made(network, diffusers.DDIMScheduler())
    options = {"output_type": "latent", "num_inference_steps": 4, **LABELS}
    got, expected = (pipe(image=kind(IMAGES), generator=seeded(1), **options).images for kind in (tuple, list))
    assert torch.equal(got, expected)


def test_strength_without_anything_to_start_from_is_refused(network):
    with pytest.raises(ValueError, match=r"strength: of images or latents to start from, image=… or latents=…"):
        made(network, diffusers.DDIMScheduler())(strength=0.5, **LABELS)


@pytest.mark.parametrize("scheduler", [diffusers.DDIMScheduler(clip_sample=False), diffusers.EulerDiscreteScheduler()])
def test_the_state_that_partial_inversion_finds_is_sampled_back(scheduler, network):
    pipe = made(network, scheduler)
    given = {"num_inference_steps": 20, "strength": 0.5, **LABELS}
    found = pipe.invert(IMAGES, **given)
    again = pipe(latents=found.x_T, output_type="pt", method="sequential", **given).images
    assert found.loss.max() < 1e-6
    assert near(again, IMAGES, 1e-3)


@pytest.mark.parametrize("rescale", [0.3, 1.0])
def test_rescaled_guidance_is_that_of_diffusers(rescale, parts):
    unet, _ = parts
    scheduler = diffusers.DDIMScheduler(**SD)
    prompt, nothing = (torch.randn(2, 5, 12, generator=seeded(s)) for s in (1, 2))
    state = x = torch.randn(2, 4, 8, 8, generator=seeded())
    scheduler.set_timesteps(12)
    with torch.no_grad():
        for t in scheduler.timesteps:
            without, with_prompt = unet(torch.cat([state] * 2), t, torch.cat([nothing, prompt])).sample.chunk(2)
            guided = without + 5.0 * (with_prompt - without)
            # Lin et al. 2024, Eq. 15 and 16
            sizes = [part.std(dim=(1, 2, 3), keepdim=True) for part in (with_prompt, guided)]
            guided = rescale * guided * sizes[0] / sizes[1] + (1 - rescale) * guided
            state = scheduler.step(guided, t, state).prev_sample
    got = made(unet, scheduler)(
        latents=x, prompt_embeds=prompt, negative_prompt_embeds=nothing, guidance_scale=5.0, num_inference_steps=12,
        guidance_rescale=rescale, output_type="latent", error=1e-6,
    ).images  # fmt: skip
    assert near(got, state)
    with pytest.raises(ValueError, match="guidance_rescale: of guidance by a scale other than 1"):
        made(unet, scheduler)(prompt_embeds=prompt, guidance_rescale=rescale)


@pytest.mark.filterwarnings("ignore:chain. it clips")
@pytest.mark.parametrize("scheduler", [diffusers.DDIMScheduler(clip_sample=False), diffusers.DDPMScheduler()])
@pytest.mark.parametrize("strength", [None, 0.4])
def test_noise_maps_of_the_pipeline_give_its_images_back_and_other_classes_others(scheduler, strength, network):
    pipe = made(network, scheduler)
    given = {"num_inference_steps": 20, "strength": strength, "guidance_scale": 3.0,
             "negative_class_labels": torch.tensor([0, 0])}  # fmt: skip
    found = pipe.invert(IMAGES, method="ddpm", generator=seeded(), **LABELS, **given)
    shown = {"latents": found.x_T, "noises": found.noises, "output_type": "pt", "method": "sequential"}
    assert found.loss.max() < 1e-10
    assert near(pipe(**shown, **LABELS, **given).images, IMAGES, 1e-5)
    others = pipe(**shown, class_labels=torch.tensor([2, 1]), **given).images
    assert not near(others, IMAGES, 1e-3)


def test_quadratic_spacing_is_that_of_the_same_time_steps_given_one_by_one(network):
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    pipe, x = made(network, scheduler), torch.randn(2, 1, 8, 8, generator=seeded(3))
    steps = Schedule.linear().chain(12, "quadratic").timesteps.tolist()
    given = {"latents": x, "output_type": "latent", "method": "sequential", **LABELS}
    got, expected = (pipe(**own, **given).images for own in
                     ({"num_inference_steps": 12, "spacing": "quadratic"}, {"timesteps": steps}))  # fmt: skip
    assert torch.equal(got, expected)
    assert not near(pipe(num_inference_steps=12, **given).images, expected, 1e-3)


def test_an_inversion_that_misses_says_what_quadratic_spacing_would_give(network):
    pipe = made(network, diffusers.DDIMScheduler(clip_sample=False))
    with pytest.warns(UserWarning, match=r'2 of 2 missed .* spacing="quadratic", here and where the latents') as seen:
        pipe.invert(IMAGES, 10, max_rounds=2, error=1e-12, **LABELS)
    assert [w.filename for w in seen] == [__file__]
    pipe.invert(IMAGES, 10, max_rounds=2, error=1e-12, spacing="quadratic", **LABELS)  # warns of nothing


@torch.no_grad()
def test_the_added_conditions_of_sdxl_reach_the_network():
    unet = of_sdxl()
    scheduler = diffusers.EulerDiscreteScheduler()
    text, nothing = torch.randn(2, 2, 3, 12, generator=seeded(1))
    pooled, blank = torch.randn(2, 2, 10, generator=seeded(2))
    ids = torch.tensor([[8.0, 8, 0, 0, 8, 8]] * 2)
    noise = torch.randn(2, 4, 8, 8, generator=seeded())
    scheduler.set_timesteps(8)
    state = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        both = unet(
            torch.cat([scheduler.scale_model_input(state, t)] * 2), t, torch.cat([nothing, text]),
            added_cond_kwargs={"text_embeds": torch.cat([blank, pooled]), "time_ids": torch.cat([ids, ids])},
        ).sample  # fmt: skip
        without, with_text = both.chunk(2)
        state = scheduler.step(without + 4.0 * (with_text - without), t, state).prev_sample
    given = {
        "latents": noise, "prompt_embeds": text, "negative_prompt_embeds": nothing, "pooled_prompt_embeds": pooled,
        "negative_pooled_prompt_embeds": blank, "guidance_scale": 4.0, "num_inference_steps": 8,
    }  # fmt: skip
    got = made(unet, scheduler)(add_time_ids=ids, output_type="latent", error=1e-6, **given).images
    assert near(got, state)
    with pytest.raises(ValueError, match="add_time_ids: required by a UNet2DConditionModel"):
        made(unet, scheduler)(**given)


def test_a_condition_that_a_network_does_not_take_is_refused_by_name(network):
    with pytest.raises(ValueError, match="add_time_ids: not taken by a UNet2DModel, which has class_labels"):
        made(network, diffusers.DDIMScheduler())(add_time_ids=torch.zeros(1, 6), **LABELS)
