"""Class labels and numbers of steps of every kind of integer, in the pipelines."""

import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from diffusion import DEQDDIMPipeline  # noqa: E402

LABELS = torch.tensor([1, 2, 3])
HOW = {"output_type": "latent", "method": "sequential"}


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4, num_class_embeds=11,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    made = DEQDDIMPipeline(unet.eval().requires_grad_(False), diffusers.DDIMScheduler(clip_sample=False))
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def latents():
    return torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16])
def test_labels_of_every_kind_make_the_same_images(pipe, latents, kind):
    def images(of):
        null = torch.tensor([10]).to(of)
        given = {"class_labels": LABELS.to(of), "negative_class_labels": null, "guidance_scale": np.float32(3)}
        return pipe(latents=latents, num_inference_steps=4, **given, **HOW).images

    assert torch.equal(images(kind), images(torch.int64))


@pytest.mark.parametrize("made", [np.int64, np.uint8, np.array, torch.tensor])
def test_numbers_of_steps_of_every_kind_make_the_same_images(pipe, latents, made):
    images = [pipe(latents=latents, class_labels=LABELS, num_inference_steps=n, **HOW).images for n in (4, made(4))]
    assert torch.equal(*images)


@pytest.mark.parametrize("wrong", [True, 4.0, np.float64(4), np.bool_(True), torch.tensor(4.0), "4"])
def test_a_number_of_steps_that_is_no_integer_is_refused_by_name(pipe, latents, wrong):
    with pytest.raises(TypeError, match="num_inference_steps: an integer is required"):
        pipe(latents=latents, class_labels=LABELS, num_inference_steps=wrong, **HOW)


def test_labels_that_are_bools_or_floats_are_refused_by_name(pipe, latents):
    for wrong in (LABELS > 1, LABELS.float()):
        with pytest.raises(TypeError, match="class_labels: integers are required"):
            pipe(latents=latents, class_labels=wrong, **HOW)


def test_a_dit_is_sampled_by_class_as_by_a_plain_loop():
    torch.manual_seed(0)
    dit = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=1, sample_size=8,
        patch_size=2, num_embeds_ada_norm=300,
    ).eval()  # fmt: skip
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    pipe = DEQDDIMPipeline(dit, scheduler)
    pipe.set_progress_bar_config(disable=True)
    start, labels = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 299])
    scheduler.set_timesteps(6)
    x = start
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(dit(x, timestep=t.expand(2), class_labels=labels).sample, t, x).prev_sample
    images = pipe(latents=start, class_labels=labels, num_inference_steps=6, output_type="latent").images
    torch.testing.assert_close(images, x, rtol=0, atol=2e-3)
    with pytest.raises(ValueError, match=r"class_labels: labels 0 … 300 of the network's classes"):
        pipe(latents=start, class_labels=labels + 2)
