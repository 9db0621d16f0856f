"""The diffusers pipeline, with diffusers' own pipelines and scheduler as the oracle."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from diffusion import DiffusersModel, Inpaint, Schedule, load_checkpoint, sample

diffusers = pytest.importorskip("diffusers")

from diffusion import DEQDDIMPipeline  # noqa: E402

TIGHT = 1e-6


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
    got = ours(generator=seeded(), method=method, error=TIGHT, **options)
    assert relative(got.images, expected) < 1e-4
    assert ours(generator=seeded(), method=method, **options).converged.all()  # to 1e-3: no less is told where it clips
    assert got.images.std() > 0.05


def test_a_list_of_generators_seeds_image_by_image(folder):
    pipe = DEQDDIMPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 8, "output_type": "np", "error": TIGHT}
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
    images = pipe(latents=x_T, num_inference_steps=50, output_type="pt", error=TIGHT).images
    found = pipe.invert(images, 50)
    assert 0 < images.min() < images.max() < 1
    assert found.loss.max() < 1e-6
    assert relative(found.x_T.numpy(), x_T.numpy()) < 1e-3


def test_class_labels_reach_the_network():
    unet = small_unet(num_class_embeds=3)
    pipe = pipeline(unet, clip_sample=False)
    labels, x_T = torch.tensor([0, 2]), torch.randn(2, 1, 8, 8, generator=seeded())
    options = {"num_inference_steps": 15, "output_type": "latent", "error": TIGHT}
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
        output_type="latent", error=TIGHT, **labels,
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
    again = pipe(latents=found.x_T, num_inference_steps=50, output_type="pt", error=TIGHT, **given).images
    assert found.loss.item() < 1e-6
    assert relative(again.numpy(), image.numpy()) < 1e-3
    unguided = pipe(
        latents=found.x_T, num_inference_steps=50, output_type="pt", error=TIGHT, prompt_embeds=prompt
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
    in_parallel = pipe(edit=lambda x, k, image: 0.9 * x, error=TIGHT, **options).images
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
        ({"guidance_scale": 2.0}, "guidance_scale: of a network with conditions"),
        ({"prompt_embeds": torch.zeros(1, 2, 12)}, "prompt_embeds"),
        ({"num_inference_steps": 0}, "steps"),
        ({"method": "fast"}, "method"),
    ],
)
def test_a_wrong_argument_is_named(options, names):
    with pytest.raises(ValueError, match=names):
        pipeline()(**options)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"generator": 3}, "generator: a torch.Generator, or a list"),
        ({"generator": [None, None], "batch_size": 2}, "generator: a torch.Generator, or a list"),
        ({"batch_size": 2.0}, "batch_size: an integer"),
        ({"batch_size": "2"}, "batch_size: an integer"),
        ({"latents": [0.0]}, "latents: a tensor"),
        ({"class_labels": [1]}, "class_labels: a tensor"),
        ({"guidance_scale": None}, "guidance_scale: a number"),
        ({"callback_on_step_end": 3}, "callback_on_step_end: a function"),
    ],
)
def test_what_is_of_another_kind_is_named(options, names):
    with pytest.raises(TypeError, match=f"^{names}"):
        pipeline()(**options)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"batch_size": -1}, "batch_size: at least 0"),
        ({"image": []}, "image: at least one"),
        ({"image": torch.zeros(1, 1, 9, 8)}, "image: height and width of a multiple of 2 pixels are required, got 9x8"),
        ({"latents": torch.zeros(1, 1, 8, 9)}, "latents: height and width of a multiple of 2 are required"),
    ],
)
def test_what_is_out_of_range_is_named(options, names):
    with pytest.raises(ValueError, match=f"^{names}"):
        pipeline()(**options)


def test_negative_embeddings_of_another_length_are_refused():
    given = {"prompt_embeds": torch.zeros(2, 3, 12), "negative_prompt_embeds": torch.zeros(2, 2, 12)}
    with pytest.raises(ValueError, match=r"^negative_prompt_embeds: \(2, 3, 12\), as prompt_embeds, or one row"):
        pipeline(small_conditional_unet())(**given, guidance_scale=3.0)


def test_generators_may_come_as_a_tuple():
    pipe, given = pipeline(), {"batch_size": 2, "num_inference_steps": 4, "output_type": "latent"}
    lists, tuples = (pipe(generator=kind([seeded(1), seeded(2)]), **given) for kind in (list, tuple))
    assert torch.equal(lists.images, tuples.images)


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
            sample(checkpoint.model, x_T, chain, method=m, prediction=checkpoint.prediction, edit=edit, error=TIGHT).x_0
            for m in ("sequential", "parallel")
        )
    assert relative(other.numpy(), one.numpy()) < 1e-4


def test_importing_the_adapter_does_not_import_diffusers():
    program = "import sys, diffusion; print('diffusers' in sys.modules, hasattr(diffusion, 'nothing'))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.fixture(scope="module")
def network():
    return small_unet()


@pytest.mark.parametrize(
    "settings",
    [{}, {"variance_type": "fixed_large", "timestep_spacing": "trailing", "clip_sample": False}],
    ids=["default", "large, trailing"],
)
@pytest.mark.parametrize("several", [False, True], ids=["one generator", "one for each image"])
def test_a_saved_ddpm_pipeline_makes_the_images_of_diffusers_from_the_same_seed(settings, several, network, tmp_path):
    theirs = diffusers.DDPMPipeline(network, diffusers.DDPMScheduler(**settings))
    theirs.save_pretrained(tmp_path)
    ours = DEQDDIMPipeline.from_pretrained(tmp_path)
    assert isinstance(ours.scheduler, diffusers.DDPMScheduler)
    for pipe in (ours, theirs):
        pipe.set_progress_bar_config(disable=True)
    seeds = lambda: [seeded(1), seeded(2)] if several else seeded()  # noqa: E731
    options = {"batch_size": 2, "num_inference_steps": 12, "output_type": "np"}
    expected = theirs(generator=seeds(), **options).images
    for method, error in (("sequential", 1e-5), ("parallel", 1e-3)):
        generator = seeds()
        got = ours(generator=generator, method=method, **options).images
        assert relative(got, expected) < error


def test_a_pipeline_leaves_its_generator_where_that_of_diffusers_does(network):
    ours, theirs = (kind(network, diffusers.DDPMScheduler()) for kind in (DEQDDIMPipeline, diffusers.DDPMPipeline))
    generators = [seeded(), seeded()]
    for pipe, generator in zip((ours, theirs), generators, strict=True):
        pipe.set_progress_bar_config(disable=True)
        pipe(generator=generator, num_inference_steps=3, output_type="pt")
    assert torch.equal(generators[0].get_state(), generators[1].get_state())


@pytest.mark.parametrize("name", ["FlowMatchHeunDiscreteScheduler", "UniPCMultistepScheduler", "PNDMScheduler"])
def test_another_scheduler_is_refused_by_name_however_it_comes_in(name, network, tmp_path):
    other = getattr(diffusers, name)()
    with pytest.raises(TypeError, match=f"{name} is not reproduced; known are DDIMScheduler, DDPMScheduler"):
        DEQDDIMPipeline(network, other)
    pipe = DEQDDIMPipeline(network, diffusers.DDIMScheduler())
    with pytest.raises(TypeError, match=f"{name} is not reproduced"):
        pipe.scheduler = other
    assert isinstance(pipe.scheduler, diffusers.DDIMScheduler)
    diffusers.DDPMPipeline(network, other).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=f"{name} is not reproduced"):
        DEQDDIMPipeline.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match=f"{name} is not reproduced"):
        DEQDDIMPipeline.from_pipe(diffusers.DDPMPipeline(network, other))
    for folder in (tmp_path, tmp_path / "unet"):
        with pytest.raises(TypeError, match=f"{name} is not reproduced"):
            load_checkpoint(folder)


def test_an_option_that_is_not_reproduced_is_refused_however_it_comes_in(network, tmp_path):
    learned = diffusers.DDPMScheduler(variance_type="learned_range")
    with pytest.raises(TypeError, match="variance_type='learned_range'"):
        DEQDDIMPipeline(network, learned)
    diffusers.DDPMPipeline(network, learned).save_pretrained(tmp_path)
    for load in (DEQDDIMPipeline.from_pretrained, load_checkpoint):
        with pytest.raises(TypeError, match="variance_type='learned_range'"):
            load(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("way", ["object", "pipeline", "folder of a pipeline", "folder of a network"])
def test_a_scheduler_clips_alike_however_it_comes_in(way, network, tmp_path):
    scheduler = diffusers.DDIMScheduler(clip_sample_range=0.5, set_alpha_to_one=False, timestep_spacing="leading")
    scheduler.set_timesteps(8)
    state = x_T = torch.randn(2, 1, 8, 8, generator=seeded())
    for t in scheduler.timesteps:
        state = scheduler.step(network(state, t).sample, t, state).prev_sample
    pipe = DEQDDIMPipeline(network, scheduler)
    pipe.set_progress_bar_config(disable=True)
    if way == "pipeline":
        got = pipe(latents=x_T, num_inference_steps=8, output_type="latent", method="sequential").images
    else:
        model, schedule, prediction = DiffusersModel(network), Schedule.from_diffusers(scheduler), "epsilon"
        if way != "object":
            pipe.save_pretrained(tmp_path)
            read = load_checkpoint(tmp_path if way == "folder of a pipeline" else tmp_path / "unet")
            model, schedule, prediction = read.model, read.schedule, read.prediction
        got = sample(model, x_T, schedule.chain(8), prediction=prediction, method="sequential").x_0
    assert relative(got.numpy(), state.numpy()) < 1e-4


def test_clipping_can_be_left_out_of_a_call(network):
    pipe, free = (DEQDDIMPipeline(network, diffusers.DDIMScheduler(clip_sample=clip)) for clip in (True, False))
    for p in (pipe, free):
        p.set_progress_bar_config(disable=True)
    options = {"latents": torch.randn(1, 1, 8, 8, generator=seeded()), "num_inference_steps": 5}
    images = [p(output_type="latent", clip_sample=False, **options).images for p in (pipe, free)]
    assert torch.equal(*images)
    assert not torch.equal(pipe(output_type="latent", **options).images, images[0])


def test_clipped_model_output_is_that_of_the_ddim_pipeline(network):
    images = []
    for kind in (diffusers.DDIMPipeline, DEQDDIMPipeline):
        pipe = kind(network, diffusers.DDIMScheduler(clip_sample_range=0.5))
        pipe.set_progress_bar_config(disable=True)
        given = {"generator": seeded(), "num_inference_steps": 8, "eta": 0.5, "use_clipped_model_output": True}
        images.append(pipe(output_type="np", **given).images)
    assert relative(images[1], images[0]) < 1e-3


@pytest.mark.parametrize(
    "name", ["height", "callback_on_step_end_tensor_inputs", "num_images_per_prompt", "stpo", "chain"]
)
def test_an_argument_that_the_pipeline_does_not_have_is_named(name, network):
    pipe = DEQDDIMPipeline(network, diffusers.DDIMScheduler())
    with pytest.raises(TypeError, match=f"^{name}: not an argument of DEQDDIMPipeline"):
        pipe(**{name: 1})
    with pytest.raises(TypeError, match=f"^{name}: not an argument of DEQDDIMPipeline.invert"):
        pipe.invert(torch.zeros(1, 1, 8, 8), **{name: 1})


def test_a_list_of_generators_of_another_length_is_refused(network):
    with pytest.raises(ValueError, match="generator: one for each of the 3 images is required, got 1"):
        DEQDDIMPipeline(network, diffusers.DDIMScheduler())(batch_size=3, generator=[seeded()])


AUTOENCODER = {
    "in_channels": 1, "out_channels": 1, "latent_channels": 1, "block_out_channels": (8, 8), "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
}  # fmt: skip


def test_the_folder_of_an_ldm_pipeline_makes_its_images(network, tmp_path):
    torch.manual_seed(2)
    vqvae = diffusers.VQModel(num_vq_embeddings=16, scaling_factor=0.3, **AUTOENCODER).eval()
    theirs = diffusers.LDMPipeline(vqvae, network, diffusers.DDIMScheduler(clip_sample=False))
    theirs.save_pretrained(tmp_path)
    ours = DEQDDIMPipeline.from_pretrained(tmp_path)
    for pipe in (ours, theirs):
        pipe.set_progress_bar_config(disable=True)
    expected, got = (
        pipe(batch_size=1, num_inference_steps=5, generator=seeded(), output_type="np").images
        for pipe in (theirs, ours)
    )
    assert np.asarray(expected).shape == (1, 16, 16, 1)
    assert relative(got, np.asarray(expected)) < 1e-3
    with torch.no_grad():
        z = 0.3 * vqvae.encode(torch.full((1, 1, 16, 16), -1.0)).latents
    found = ours.invert(torch.zeros(1, 1, 16, 16), 5, "ddim")
    plain = DEQDDIMPipeline(network, theirs.scheduler)
    torch.testing.assert_close(found.x_T, plain.invert(z / 2 + 0.5, 5, "ddim").x_T)
    ours.save_pretrained(tmp_path / "again")
    assert DEQDDIMPipeline.from_pretrained(tmp_path / "again").vqvae.config.scaling_factor == 0.3


@torch.no_grad()
@pytest.mark.parametrize(
    ("settings", "scale", "shift"),
    [
        ({"scaling_factor": 0.5, "shift_factor": 0.7}, 0.5, 0.7),
        ({"scaling_factor": 0.5, "latents_mean": [0.2], "latents_std": [4.0]}, 0.125, 0.2),
        ({"scaling_factor": 0.5, "latents_std": [4.0]}, 0.125, 0.0),
    ],
    ids=["shift", "mean and deviation", "deviation"],
)
def test_the_factors_of_an_autoencoder_are_honoured(settings, scale, shift, network):
    torch.manual_seed(2)
    vae = diffusers.AutoencoderKL(**AUTOENCODER, **settings).eval()
    pipe = DEQDDIMPipeline(network, diffusers.DDIMScheduler(clip_sample=False), vae)
    pipe.set_progress_bar_config(disable=True)
    given = {"latents": torch.randn(1, 1, 8, 8, generator=seeded()), "num_inference_steps": 3}
    latent, image = (pipe(output_type=kind, **given).images for kind in ("latent", "pt"))
    torch.testing.assert_close(image, (vae.decode(latent / scale + shift).sample / 2 + 0.5).clamp(0, 1))
    z = (vae.encode(2 * image - 1).latent_dist.mean - shift) * scale
    torch.testing.assert_close(pipe._autoencoder.encode(2 * image - 1), z)


@pytest.mark.parametrize(
    ("vae", "error", "words"),
    [
        (lambda: diffusers.AutoencoderTiny(), TypeError, "vae: AutoencoderKL or VQModel .* got AutoencoderTiny"),
        (lambda: diffusers.AutoencoderKL(latent_channels=4), ValueError, "vae: latents of 1 channels"),
        (
            lambda: diffusers.AutoencoderKL(**AUTOENCODER, shift_factor=1.0, latents_mean=[0.0], latents_std=[1.0]),
            ValueError, "vae: shift_factor and latents_mean",
        ),
    ],
)  # fmt: skip
def test_an_autoencoder_that_is_not_read_is_refused_by_name(vae, error, words, network):
    with pytest.raises(error, match=words):
        DEQDDIMPipeline(network, diffusers.DDIMScheduler(), vae())


def test_a_part_of_a_folder_that_is_not_used_is_refused_unless_left_out_by_name(network, tmp_path):
    DEQDDIMPipeline(network, diffusers.DDIMScheduler()).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index |= {"text_encoder": ["transformers", "CLIPTextModel"], "safety_checker": [None, None]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"text_encoder \(CLIPTextModel\) is not used.* text_encoder=None leaves"):
        DEQDDIMPipeline.from_pretrained(tmp_path)
    DEQDDIMPipeline.from_pretrained(tmp_path, text_encoder=None)
    with pytest.raises(ValueError, match=r"text_encoder \(CLIPTextModel\) is not read"):
        load_checkpoint(tmp_path)


def test_a_scheduler_under_the_name_of_another_is_refused(network, tmp_path):
    DEQDDIMPipeline(network, diffusers.DDIMScheduler()).save_pretrained(tmp_path)
    diffusers.PNDMScheduler().save_pretrained(tmp_path / "scheduler")
    for load in (DEQDDIMPipeline.from_pretrained, load_checkpoint):
        with pytest.raises(TypeError, match="PNDMScheduler is not reproduced"):
            load(tmp_path)


def test_an_autoencoder_that_is_changed_later_is_the_one_that_decodes(network):
    first, later = (diffusers.AutoencoderKL(**AUTOENCODER, scaling_factor=s).eval() for s in (1.0, 0.5))
    pipe = DEQDDIMPipeline(network, diffusers.DDIMScheduler(), first)
    pipe.set_progress_bar_config(disable=True)
    pipe.vae = later
    given = {"latents": torch.zeros(1, 1, 8, 8), "num_inference_steps": 1}
    latent, image = (pipe(output_type=kind, **given).images for kind in ("latent", "pt"))
    with torch.no_grad():
        torch.testing.assert_close(image, (later.decode(latent / 0.5).sample / 2 + 0.5).clamp(0, 1))


@torch.no_grad()
@pytest.mark.parametrize("force_upcast", [True, False])
def test_a_half_precision_autoencoder_works_in_float32_where_its_configuration_says_so(force_upcast, network):
    vae = diffusers.AutoencoderKL(**AUTOENCODER, scaling_factor=0.5, force_upcast=force_upcast).eval().half()
    seen = []
    for part in (vae.encoder, vae.decoder):
        part.register_forward_hook(lambda module, given, made: seen.append(given[0].dtype))
    coder = DEQDDIMPipeline(network, diffusers.DDIMScheduler(clip_sample=False), vae)._autoencoder
    coder.decode(coder.encode(torch.rand(1, 1, 16, 16, generator=seeded())))
    assert seen == [torch.float32 if force_upcast else torch.float16] * 2
    assert vae.dtype == torch.float16


@torch.no_grad()
def test_variances_that_a_network_predicts_too_are_left_out():
    torch.manual_seed(0)
    learned = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=2, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    ).eval()  # fmt: skip
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    state = x = torch.randn(1, 1, 8, 8, generator=seeded(3))
    scheduler.set_timesteps(5)
    for t in scheduler.timesteps:
        state = scheduler.step(learned(state, t).sample[:, :1], t, state).prev_sample
    pipe = DEQDDIMPipeline(learned, scheduler)
    pipe.set_progress_bar_config(disable=True)
    out = pipe(latents=x, num_inference_steps=5, output_type="latent", error=1e-5).images
    assert relative(out.numpy(), state.numpy()) < 1e-4


def test_a_wrapped_network_is_refused_with_the_one_inside(network):
    with pytest.raises(TypeError, match=r"unet: the network inside DataParallel is required: unet\.module"):
        DEQDDIMPipeline(torch.nn.DataParallel(network), diffusers.DDIMScheduler())


@pytest.mark.filterwarnings("ignore:chain. it clips")
def test_a_ddpm_pipeline_is_inverted_without_its_noise_and_its_clipping():
    unet = small_unet()
    with torch.no_grad():
        unet.conv_out.weight.mul_(0.1)
    pipe = DEQDDIMPipeline(unet, diffusers.DDPMScheduler(prediction_type="v_prediction", clip_sample_range=0.1))
    pipe.set_progress_bar_config(disable=True)
    x_T = 0.2 * torch.randn(1, 1, 8, 8, generator=seeded(5))
    given = {"num_inference_steps": 20, "eta": 0.0, "method": "sequential", "output_type": "pt"}
    images = pipe(latents=x_T, clip_sample=False, **given).images
    clipped = pipe(latents=x_T, **given).images
    assert (clipped - images).abs().max() > 0.05
    found = pipe.invert(images, 20, clip_sample=False)
    assert relative(found.x_T.numpy(), x_T.numpy()) < 1e-2
    assert pipe.invert(images, 20, "ddim").loss.item() > 10 * found.loss.item()
