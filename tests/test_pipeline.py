"""The diffusers pipeline, with diffusers' own pipelines and scheduler as the oracle."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from diffusion import Inpaint, Schedule, load_checkpoint, sample
from pydeqsolve import Stop

diffusers = pytest.importorskip("diffusers")

from diffusion import DEQDDIMPipeline  # noqa: E402

TIGHT = Stop(rtol=1e-7, max_steps=100)


def small_unet(**more):
    """A UNet2DModel with random weights, of ε-like size."""
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(16, 32),
        norm_num_groups=8, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=8, **more,
    ).eval()  # fmt: skip


def small_conditional_unet(**more):
    """A UNet2DConditionModel with random weights."""
    torch.manual_seed(1)
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32),
        norm_num_groups=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=12, attention_head_dim=8, **more,
    ).eval()  # fmt: skip


def pipeline(unet=None, vae=None, **settings):
    pipe = DEQDDIMPipeline(unet or small_unet(), diffusers.DDIMScheduler(**settings), vae)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def relative(x, y):
    return float(np.linalg.norm(x - y) / np.linalg.norm(y))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What diffusers' own pipeline saves: clip_sample is on, its default."""
    path = tmp_path_factory.mktemp("saved")
    diffusers.DDIMPipeline(
        small_unet(), diffusers.DDIMScheduler(timestep_spacing="trailing", prediction_type="v_prediction")
    ).save_pretrained(path)
    return path


@pytest.mark.parametrize("eta", [0.0, 0.8])
@pytest.mark.parametrize("method", ["parallel", "sequential"])
def test_a_saved_ddim_pipeline_makes_the_images_of_diffusers_from_the_same_seed(folder, eta, method):
    theirs = diffusers.DDIMPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    ours = DEQDDIMPipeline.from_pretrained(folder)
    ours.set_progress_bar_config(disable=True)
    options = {"batch_size": 2, "num_inference_steps": 20, "eta": eta, "output_type": "np"}
    expected = theirs(generator=seeded(), **options).images
    assert 0.05 < ((expected > 0) & (expected < 1)).mean() < 0.95  # clipping matters
    got = ours(generator=seeded(), method=method, stop=TIGHT, **options)
    assert relative(got.images, expected) < 1e-4
    assert got.converged.all()
    assert got.images.std() > 0.05


def test_a_list_of_generators_seeds_image_by_image(folder):
    pipe = DEQDDIMPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 8, "output_type": "np", "stop": TIGHT}
    both = pipe(batch_size=2, generator=[seeded(3), seeded(4)], **options).images
    assert relative(both[1:], pipe(generator=seeded(4), **options).images) < 1e-5


def test_saved_and_loaded_it_samples_and_inverts_alike(folder, tmp_path):
    pipe = DEQDDIMPipeline.from_pretrained(folder)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "DEQDDIMPipeline"
    again = DEQDDIMPipeline.from_pretrained(tmp_path)
    for p in (pipe, again):
        p.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 10, "output_type": "pt"}
    one, other = (p(generator=seeded(), **options).images for p in (pipe, again))
    assert torch.equal(one, other)
    with pytest.warns(UserWarning, match="clip_sample=False") as seen:
        assert torch.equal(*(p.invert(one, 10, "ddim").x_T for p in (pipe, again)))
    assert [w.filename for w in seen] == [__file__] * 2


def test_pixels_out_of_range_warn_where_latents_of_a_vae_do_not():
    vae = diffusers.AutoencoderKL(
        in_channels=1, out_channels=1, down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=1,
        up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(4, 8), norm_num_groups=4, scaling_factor=40.0,
    ).eval()  # fmt: skip
    pipe = DEQDDIMPipeline(small_unet(), diffusers.DDIMScheduler(clip_sample=False), vae)
    image = torch.rand(1, 1, 16, 16, generator=seeded(3))
    assert pipe.invert(image, 2, "ddim").loss.isfinite().all()
    with pytest.warns(UserWarning, match="scale them"):
        pipe.invert(255 * image, 2, "ddim")


def test_what_is_sampled_is_inverted_back_to_its_latents():
    pipe = pipeline(clip_sample=False, prediction_type="v_prediction")
    with torch.no_grad():
        pipe.unet.conv_out.weight.mul_(0.1)
    x_T = 0.2 * torch.randn(2, 1, 8, 8, generator=seeded(5))  # so that the images stay within [-1, 1]
    images = pipe(latents=x_T, num_inference_steps=50, output_type="pt", stop=TIGHT).images
    found = pipe.invert(images, 50)
    assert 0 < images.min() < images.max() < 1
    assert found.loss.max() < 1e-6
    assert relative(found.x_T.numpy(), x_T.numpy()) < 1e-3


def test_class_labels_reach_the_network():
    unet = small_unet(num_class_embeds=3)
    pipe = pipeline(unet, clip_sample=False)
    labels, x_T = torch.tensor([0, 2]), torch.randn(2, 1, 8, 8, generator=seeded())
    options = {"num_inference_steps": 15, "output_type": "latent", "stop": TIGHT}
    got = pipe(latents=x_T, class_labels=labels, **options).images
    state = x_T
    pipe.scheduler.set_timesteps(15)
    with torch.no_grad():
        for t in pipe.scheduler.timesteps:
            state = pipe.scheduler.step(unet(state, t, class_labels=labels).sample, t, state).prev_sample
    assert relative(got.numpy(), state.numpy()) < 1e-4
    swapped = pipe(latents=x_T, class_labels=labels.flip(0), **options).images
    assert relative(swapped.numpy(), state.numpy()) > 1e-3


@pytest.mark.parametrize("classes", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_guided_text_conditioning_is_the_loop_of_stable_diffusion(prediction, classes):
    unet = small_conditional_unet(**({"num_class_embeds": 4} if classes else {}))
    pipe = pipeline(
        unet, clip_sample=False, prediction_type=prediction, beta_schedule="scaled_linear", beta_start=0.00085,
        beta_end=0.012, set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    prompt, nothing = (torch.randn(2, 5, 12, generator=seeded(s)) for s in (1, 2))
    x_T = torch.randn(2, 4, 8, 8, generator=seeded())
    labels = {"class_labels": torch.tensor([1, 2]), "negative_class_labels": torch.tensor([0, 0])} if classes else {}
    got = pipe(
        latents=x_T, prompt_embeds=prompt, negative_prompt_embeds=nothing, guidance_scale=4.0, num_inference_steps=20,
        output_type="latent", stop=TIGHT, **labels,
    )  # fmt: skip
    state = x_T
    pipe.scheduler.set_timesteps(20)
    halves = {"class_labels": torch.tensor([0, 0, 1, 2])} if classes else {}
    with torch.no_grad():
        for t in pipe.scheduler.timesteps:
            both = unet(torch.cat([state, state]), t, torch.cat([nothing, prompt]), **halves).sample
            without, with_prompt = both.chunk(2)
            noise = without + 4.0 * (with_prompt - without)
            state = pipe.scheduler.step(noise, t, state).prev_sample
    assert relative(got.images.numpy(), state.numpy()) < 1e-4
    assert got.rounds <= 20


def test_a_guided_conditional_network_is_inverted():
    pipe = pipeline(small_conditional_unet(), clip_sample=False, prediction_type="v_prediction")
    prompt, nothing = (torch.randn(1, 5, 12, generator=seeded(s)) for s in (1, 2))
    given = {"prompt_embeds": prompt, "negative_prompt_embeds": nothing, "guidance_scale": 1.5}
    image = torch.rand(1, 4, 8, 8, generator=seeded(3)) * 0.2 + 0.4
    found = pipe.invert(image, 50, **given)
    again = pipe(latents=found.x_T, num_inference_steps=50, output_type="pt", stop=TIGHT, **given).images
    assert found.loss.item() < 1e-6
    assert relative(again.numpy(), image.numpy()) < 1e-3
    unguided = pipe(
        latents=found.x_T, num_inference_steps=50, output_type="pt", stop=TIGHT, prompt_embeds=prompt
    ).images
    assert relative(unguided.numpy(), image.numpy()) > 1e-3


def test_an_autoencoder_stands_between_latents_and_images(tmp_path):
    torch.manual_seed(2)
    vae = diffusers.AutoencoderKL(
        in_channels=1, out_channels=1, latent_channels=4, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, scaling_factor=0.5,
    ).eval()  # fmt: skip
    pipeline(small_conditional_unet(), vae, clip_sample=False).save_pretrained(tmp_path)
    pipe = DEQDDIMPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    given = {"prompt_embeds": torch.randn(1, 5, 12, generator=seeded(1)), "num_inference_steps": 10}
    latent = pipe(generator=seeded(), output_type="latent", **given).images
    image = pipe(generator=seeded(), output_type="pt", **given).images
    with torch.no_grad():
        expected = (vae.decode(latent / 0.5).sample / 2 + 0.5).clamp(0, 1)
        x_0 = vae.encode(2 * image - 1).latent_dist.mean * 0.5
    torch.testing.assert_close(image, expected)
    assert image.shape == (1, 1, 16, 16)
    found = pipe.invert(image, 10, "ddim", prompt_embeds=given["prompt_embeds"])
    assert found.x_T.shape == x_0.shape


def test_every_output_type_holds_the_same_images():
    pipe = pipeline()
    make = lambda kind: pipe(batch_size=2, generator=seeded(), num_inference_steps=5, output_type=kind).images  # noqa: E731
    pt, array, pil, latent = (make(kind) for kind in ("pt", "np", "pil", "latent"))
    np.testing.assert_allclose(array, pt.permute(0, 2, 3, 1).numpy())
    torch.testing.assert_close(pt, (latent / 2 + 0.5).clamp(0, 1))
    assert np.abs(np.asarray(pil[1]) / 255 - array[1, ..., 0]).max() <= 0.5 / 255 + 1e-6
    assert isinstance(pipe(num_inference_steps=2, return_dict=False), tuple)


def test_the_callback_sees_every_round_and_may_interrupt():
    pipe, seen = pipeline(), []

    def watch(pipe, step, timestep, kwargs):
        seen.append((step, tuple(kwargs["latents"].shape)))
        pipe._interrupt = step == 1
        return kwargs

    out = pipe(batch_size=2, num_inference_steps=30, callback_on_step_end=watch, generator=seeded())
    assert seen == [(0, (2, 1, 8, 8)), (1, (2, 1, 8, 8))]
    assert out.rounds == 2
    assert not out.converged.any()


def test_a_callback_that_changes_latents_acts_step_by_step_and_is_refused_in_parallel():
    pipe = pipeline(clip_sample=False)
    halve = lambda pipe, step, t, kwargs: {"latents": kwargs["latents"] * 0.9}  # noqa: E731
    x_T = torch.randn(1, 1, 8, 8, generator=seeded())
    options = {"latents": x_T, "num_inference_steps": 6, "output_type": "latent"}
    got = pipe(callback_on_step_end=halve, method="sequential", **options).images
    state = x_T
    pipe.scheduler.set_timesteps(6)
    with torch.no_grad():
        for t in pipe.scheduler.timesteps:
            state = 0.9 * pipe.scheduler.step(pipe.unet(state, t).sample, t, state).prev_sample
    assert relative(got.numpy(), state.numpy()) < 1e-5
    with pytest.raises(ValueError, match="edit"):
        pipe(callback_on_step_end=halve, **options)
    in_parallel = pipe(edit=lambda x, k, image: 0.9 * x, stop=TIGHT, **options).images
    assert relative(in_parallel.numpy(), state.numpy()) < 1e-4


def test_the_progress_bar_is_that_of_diffusers(capfd):
    pipe = pipeline()
    pipe.set_progress_bar_config(desc="rounds", ascii=True)
    pipe(num_inference_steps=4)
    assert "rounds" in capfd.readouterr().err
    pipe.set_progress_bar_config(disable=True)
    pipe(num_inference_steps=4)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"output_type": "jpeg"}, "output_type"),
        ({"batch_size": 3, "latents": torch.zeros(2, 1, 8, 8)}, "batch_size"),
        ({"guidance_scale": 2.0}, "negative_class_labels"),
        ({"prompt_embeds": torch.zeros(1, 2, 12)}, "prompt_embeds"),
        ({"num_inference_steps": 0}, "steps"),
        ({"method": "fast"}, "method"),
    ],
)
def test_a_wrong_argument_is_named(options, names):
    with pytest.raises(ValueError, match=names):
        pipeline()(**options)


def test_a_conditional_network_asks_for_its_embeddings():
    with pytest.raises(ValueError, match="prompt_embeds"):
        pipeline(small_conditional_unet())()
    with pytest.raises(ValueError, match="negative_prompt_embeds"):
        pipeline(small_conditional_unet())(prompt_embeds=torch.zeros(1, 2, 12), guidance_scale=3.0)


def test_a_saved_unet_loads_as_a_checkpoint_that_samples_and_inpaints(folder):
    checkpoint = load_checkpoint(folder / "unet")
    chain = checkpoint.schedule.chain(20, "trailing")
    assert checkpoint.schedule.clip.bound == 1.0
    x_T = torch.randn(2, *checkpoint.shape, generator=seeded())
    edit = Inpaint(chain, torch.zeros(2, 1, 8, 8), torch.eye(8), x_T)
    with torch.no_grad():
        one, other = (
            sample(checkpoint.model, x_T, chain, method=m, edit=edit, stop=TIGHT).x_0
            for m in ("sequential", "parallel")
        )
    assert relative(other.numpy(), one.numpy()) < 1e-4


def test_importing_the_adapter_does_not_import_diffusers():
    program = "import sys, diffusion; print('diffusers' in sys.modules, hasattr(diffusion, 'nothing'))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_the_schedule_of_a_pipeline_is_that_of_its_scheduler():
    scheduler = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    pipe = DEQDDIMPipeline(small_unet(), scheduler)
    expected = Schedule.from_diffusers(diffusers.DDIMScheduler.from_config(scheduler.config))
    assert isinstance(pipe.scheduler, diffusers.DDIMScheduler)
    assert Schedule.from_diffusers(pipe.scheduler) == expected
