"""The pipeline of flow transformers, tiny and random: diffusers' loops of SD3 and FLUX, and latents that come back."""

import json

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from diffusers.utils.torch_utils import randn_tensor  # noqa: E402

from diffusion import DEQFlowPipeline  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 4,
           "max_image_seq_len": 64}  # fmt: skip


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def sd3():
    torch.manual_seed(0)
    return diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10, out_channels=4,
        pos_embed_max_size=8,
    ).eval()  # fmt: skip


def flux(distilled=True):
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(2, 2, 4), guidance_embeds=distilled,
    ).eval()  # fmt: skip


def autoencoder():
    torch.manual_seed(1)
    return diffusers.AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, scaling_factor=0.5,
        shift_factor=0.3,
    ).eval()  # fmt: skip


def made(transformer, vae=None, **settings):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**({"shift": 3.0} | settings))
    pipe = DEQFlowPipeline(transformer, scheduler, vae)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def texts(seed=1, batch=2):
    return torch.randn(batch, 3, 12, generator=seeded(seed)), torch.randn(batch, 10, generator=seeded(seed + 1))


def embeds(negative=False):
    given = dict(zip(("prompt_embeds", "pooled_prompt_embeds"), texts(), strict=True))
    if negative:
        given |= dict(zip(("negative_prompt_embeds", "negative_pooled_prompt_embeds"), texts(5), strict=True))
    return given


def near(x, y, share=1e-4):
    return (x - y).norm() < share * y.norm()


def packed(x):
    """diffusers' FluxPipeline._pack_latents."""
    B, C, h, w = x.shape
    x = x.view(B, C, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(B, (h // 2) * (w // 2), 4 * C)


def places(h, w):
    """diffusers' FluxPipeline._prepare_latent_image_ids."""
    ids = torch.zeros(h, w, 3)
    ids[..., 1] += torch.arange(h)[:, None]
    ids[..., 2] += torch.arange(w)[None, :]
    return ids.reshape(h * w, 3)


@torch.no_grad()
def loop(scheduler, ask, state, timesteps):
    for t in timesteps:
        state = scheduler.step(ask(state, t.expand(len(state))), t, state, return_dict=False)[0]
    return state


def ask_flux(network, prompt, pooled, told, h=4, w=6):
    guidance = None if told is None else torch.full((2,), told)
    return lambda x, t: network(
        hidden_states=x, timestep=t / 1000, guidance=guidance, pooled_projections=pooled, encoder_hidden_states=prompt,
        txt_ids=torch.zeros(3, 3), img_ids=places(h, w),
    ).sample  # fmt: skip


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("settings", [{}, DYNAMIC, {"shift_terminal": 0.1}], ids=["shift", "dynamic", "terminal"])
@torch.no_grad()
def test_from_the_same_generator_sd3_is_sampled_as_diffusers_does(scale, settings):
    network, pipe = sd3(), made(sd3(), **settings)
    (prompt, pooled), (nothing, blank) = texts(), texts(5)
    mu = {"mu": 0.5 + (1.15 - 0.5) / 60 * (16 - 4)} if settings is DYNAMIC else {}
    pipe.scheduler.set_timesteps(9, **mu)
    plain = lambda x, t, p, q: network(x, encoder_hidden_states=p, pooled_projections=q, timestep=t).sample  # noqa: E731

    def ask(x, t):
        without, with_text = plain(x, t, nothing, blank), plain(x, t, prompt, pooled)
        return without + scale * (with_text - without)

    expected = loop(pipe.scheduler, ask, randn_tensor((2, 4, 8, 8), generator=seeded()), pipe.scheduler.timesteps)
    for method in ("parallel", "sequential"):
        got = pipe(**embeds(negative=True), num_inference_steps=9, guidance_scale=scale, generator=seeded(),
                   output_type="latent", method=method, error=1e-6)  # fmt: skip
        assert near(got.images, expected), method


@pytest.mark.parametrize(("distilled", "true_scale"), [(True, 1.0), (True, 2.0), (False, 3.0)])
@torch.no_grad()
def test_from_the_same_generator_flux_is_sampled_as_diffusers_does(distilled, true_scale):
    network, pipe = flux(distilled), made(flux(distilled), autoencoder(), **DYNAMIC)
    told = 2.5 if distilled else None
    noise = packed(randn_tensor((2, 4, 8, 12), generator=seeded()))
    pipe.scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 9, 9).tolist(), mu=0.5 + (1.15 - 0.5) / 60 * (24 - 4))
    one, other = ask_flux(network, *texts(), told), ask_flux(network, *texts(5), told)
    ask = lambda x, t: other(x, t) + true_scale * (one(x, t) - other(x, t))  # noqa: E731
    expected = loop(pipe.scheduler, ask, noise, pipe.scheduler.timesteps)
    given = {
        **embeds(negative=true_scale != 1), "num_inference_steps": 9, "height": 16, "width": 24, "error": 1e-6,
        "true_cfg_scale": true_scale, "generator": seeded(),
    } | ({"guidance_scale": told} if distilled else {})  # fmt: skip
    assert near(pipe(**given, output_type="latent").images, expected)
    shown = pipe(**{**given, "latents": noise}, output_type="pt").images
    unpacked = expected.view(2, 4, 6, 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(2, 4, 8, 12)
    image = (autoencoder().decode(unpacked / 0.5 + 0.3).sample / 2 + 0.5).clamp(0, 1)
    assert shown.shape == (2, 3, 16, 24)
    assert near(shown, image)


@pytest.mark.parametrize("make", [sd3, flux])
@pytest.mark.parametrize("strength", [0.6, 0.33])
@torch.no_grad()
def test_from_an_image_it_goes_on_as_diffusers_img2img_does(make, strength):
    network, vae, image = make(), autoencoder(), torch.rand(2, 3, 16, 16, generator=seeded(3))
    pipe, g = made(network, vae), seeded(4)
    x_0 = (vae.encode(2 * image - 1).latent_dist.sample(g) - 0.3) * 0.5
    sigmas = {"sigmas": torch.linspace(1, 0.1, 10).tolist()} if make is flux else {"num_inference_steps": 10}
    pipe.scheduler.set_timesteps(**sigmas)
    at = int(10 - 10 * strength)
    timesteps = pipe.scheduler.timesteps[at:]
    pipe.scheduler.set_begin_index(at)
    state = pipe.scheduler.scale_noise(x_0, timesteps[:1].expand(2), randn_tensor(x_0.shape, generator=g))
    if make is flux:
        state, ask = packed(state), ask_flux(network, *texts(), 3.5, 4, 4)
    else:
        prompt, pooled = texts()
        ask = lambda x, t: network(x, encoder_hidden_states=prompt, pooled_projections=pooled, timestep=t).sample  # noqa: E731
    expected = loop(pipe.scheduler, ask, state, timesteps)
    given = {**embeds(), "num_inference_steps": 10, "output_type": "latent", "error": 1e-6}
    got = pipe(image=image, strength=strength, generator=seeded(4), **given).images
    assert near(got, expected)


@pytest.mark.parametrize("several", [False, True])
@torch.no_grad()
def test_one_image_is_drawn_once_for_all_as_diffusers_flux_does(several):
    vae, image = autoencoder(), torch.rand(1, 3, 16, 16, generator=seeded(3))
    given = {**embeds(), "num_inference_steps": 4, "output_type": "latent", "strength": 0.5}
    g = [seeded(4), seeded(5)] if several else seeded(4)
    coded = (vae.encode(2 * image - 1).latent_dist.sample(g[0] if several else g) - 0.3) * 0.5
    noise = packed(randn_tensor((2, 4, 8, 8), generator=g))
    got = made(flux(), vae)(image=image, generator=[seeded(4), seeded(5)] if several else seeded(4), **given).images
    pipe = made(flux(), vae)
    pipe._encoded = lambda *_: coded.expand(2, -1, -1, -1)
    assert near(got, pipe(image=image, latents=noise, **given).images)


@pytest.mark.parametrize("make", [sd3, flux])
@pytest.mark.parametrize("strength", [None, 0.5])
def test_what_is_inverted_is_sampled_back(make, strength):
    pipe, image = made(make(), autoencoder()), torch.rand(2, 3, 16, 16, generator=seeded(3))
    given = {**embeds(), "num_inference_steps": 10, "strength": strength}
    found = pipe.invert(image, **given)
    size = {} if make is sd3 else {"height": 16, "width": 16}
    again = pipe(latents=found.x_T, output_type="latent", method="sequential", **given, **size).images
    with torch.no_grad():
        x_0 = (autoencoder().encode(2 * image - 1).latent_dist.mean - 0.3) * 0.5
    x_0 = x_0 if make is sd3 else packed(x_0)
    assert found.loss.max() < 1e-6
    assert near(again, x_0, 1e-3)


@pytest.mark.parametrize("make", [sd3, flux])
@pytest.mark.parametrize("strength", [None, 0.5])
def test_noise_maps_of_a_flow_give_its_images_back_and_other_prompts_others(make, strength):
    pipe, image = made(make(), autoencoder()), torch.rand(2, 3, 16, 16, generator=seeded(3))
    scale = {"guidance_scale": 3.0} if make is sd3 else {"true_cfg_scale": 3.0}
    given = {"num_inference_steps": 10, "strength": strength, **scale}
    found = pipe.invert(image, method="ddpm", generator=seeded(), **embeds(negative=True), **given)
    shown = {"latents": found.x_T, "noises": found.noises, "output_type": "latent", "method": "sequential"}
    size = {} if make is sd3 else {"height": 16, "width": 16}
    with torch.no_grad():
        x_0 = (autoencoder().encode(2 * image - 1).latent_dist.mean - 0.3) * 0.5
    x_0 = x_0 if make is sd3 else packed(x_0)
    assert found.loss.max() < 1e-10
    assert near(pipe(**shown, **embeds(negative=True), **given, **size).images, x_0, 1e-5)
    other = embeds(negative=True) | {"prompt_embeds": texts(9)[0]}
    assert not near(pipe(**shown, **other, **given, **size).images, x_0, 1e-3)


@pytest.mark.parametrize("make", [sd3, flux])
def test_a_picture_whose_size_does_not_divide_is_refused(make):
    pipe, image = made(make(), autoencoder()), torch.rand(2, 3, 18, 16)
    for call in (lambda: pipe.invert(image, 4, **embeds()), lambda: pipe(image=image, **embeds())):
        with pytest.raises(ValueError, match="image: height and width of a multiple of 4 pixels"):
            call()


def test_own_sigmas_are_those_of_diffusers_and_a_two_step_flow_is_sampled_too():
    network, (prompt, pooled) = sd3(), texts()
    ask = lambda x, t: network(x, encoder_hidden_states=prompt, pooled_projections=pooled, timestep=t).sample  # noqa: E731
    noise = torch.randn(2, 4, 8, 8, generator=seeded())
    multistep = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    for scheduler, own in ((None, {"sigmas": [1.0, 0.7, 0.2]}), (multistep, {"num_inference_steps": 8})):
        pipe = made(network)
        pipe.scheduler = pipe.scheduler if scheduler is None else scheduler
        pipe.scheduler.set_timesteps(**own)
        expected = loop(pipe.scheduler, ask, noise, pipe.scheduler.timesteps)
        got = pipe(**embeds(), latents=noise, output_type="latent", error=1e-6, **own).images
        assert near(got, expected)


def test_a_whole_folder_is_loaded_but_for_what_is_left_out_by_name(tmp_path):
    pipe = made(flux(), autoencoder())
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index |= {"_class_name": "FluxPipeline", "text_encoder": ["transformers", "CLIPTextModel"],
              "tokenizer_2": ["transformers", "T5TokenizerFast"], "image_encoder": [None, None]}  # fmt: skip
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    match = (
        r"text_encoder \(CLIPTextModel\), tokenizer_2 \(T5TokenizerFast\) are not used by DEQFlowPipeline; "
        r"text_encoder=None, tokenizer_2=None leaves them out"
    )
    with pytest.raises(ValueError, match=match):
        DEQFlowPipeline.from_pretrained(tmp_path)
    again = DEQFlowPipeline.from_pretrained(tmp_path, text_encoder=None, tokenizer_2=None)
    again.set_progress_bar_config(disable=True)
    given = {**embeds(), "num_inference_steps": 4, "height": 16, "width": 16, "output_type": "pt"}
    assert torch.equal(*(p(generator=seeded(), **given).images for p in (pipe, again)))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"prompt_embeds": None}, "prompt_embeds: required by a SD3Transformer2DModel"),
        ({"pooled_prompt_embeds": None}, "pooled_prompt_embeds: required"),
        ({"guidance_scale": 4.0}, "negative_prompt_embeds: required with guidance by 4"),
        ({"true_cfg_scale": 4.0}, "true_cfg_scale: of FLUX"),
        ({"guidance_rescale": 0.5}, "guidance_rescale: of guidance by a scale other than 1"),
        ({"height": 7}, "height: a multiple of 2 is required, got 7"),
        ({"latents": torch.zeros(2, 16, 16)}, r"latents: "),
        ({"latents": torch.zeros(2, 3, 8, 8)}, r"latents: shape \(B, 4, h, w\) is required"),
        ({"latents": torch.zeros(2, 4, 8, 6), "width": 8}, r"latents: \('B', 4, 8, 8\) is required"),
        ({"mu": 1.0}, "mu: of use only to a scheduler with use_dynamic_shifting"),
        ({"batch_size": 3}, "batch_size: 3 latents or conditions"),
        ({"num_inference_steps": 0}, "num_inference_steps: at least 1"),
        ({"height": -2}, "height: at least 1"),
        ({"strength": 1e-20, "latents": torch.zeros(2, 4, 8, 8)}, "strength: above 0, to 1, is required"),
        ({"generator": (seeded(), seeded(), seeded())}, "generator: one for each of the 2 images is required, got 3"),
    ],
)
def test_a_wrong_argument_is_named(given, words):
    with pytest.raises(ValueError, match=f"^{words}"):
        made(sd3())(**(embeds() | given))


@pytest.mark.parametrize("make", [sd3, flux])
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"num_inference_steps": "4"}, "num_inference_steps: an integer"),
        ({"num_inference_steps": None}, "num_inference_steps: an integer"),
        ({"height": 16.0}, "height: an integer"),
        ({"guidance_scale": "4"}, "guidance_scale: a number"),
        ({"true_cfg_scale": None}, "true_cfg_scale: a number"),
        ({"prompt_embeds": [[0.0]]}, "prompt_embeds: a tensor"),
        ({"latents": [[0.0]]}, "latents: a tensor"),
        ({"generator": 3}, "generator: a torch.Generator, or a list"),
        ({"callback_on_step_end": 3}, "callback_on_step_end: a function"),
    ],
)
def test_what_is_of_another_kind_is_named(make, given, words):
    with pytest.raises(TypeError, match=f"^{words}"):
        made(make())(**({"height": 16, "width": 16} | embeds() | given))


def test_a_shift_that_the_scheduler_cannot_tell_is_asked_for():
    scheduler = diffusers.DPMSolverMultistepScheduler(
        use_dynamic_shifting=True, time_shift_type="exponential", use_flow_sigmas=True,
        prediction_type="flow_prediction",
    )  # fmt: skip
    pipe = DEQFlowPipeline(sd3(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="mu: required by a DPMSolverMultistepScheduler"):
        pipe(**embeds(), num_inference_steps=4)
    assert pipe(**embeds(), num_inference_steps=4, mu=1.0, output_type="latent").converged.all()


def test_negative_embeddings_of_another_length_are_refused():
    given = embeds(negative=True) | {"negative_prompt_embeds": torch.zeros(2, 5, 12), "guidance_scale": 2.0}
    with pytest.raises(ValueError, match=r"negative_prompt_embeds: \(2, 3, 12\), as prompt_embeds, or one row"):
        made(sd3())(**given)


def test_flux_without_embedded_guidance_is_not_told_of_it():
    with pytest.raises(ValueError, match="guidance_scale: this network is not told of it; true_cfg_scale guides"):
        made(flux(distilled=False))(**embeds(), guidance_scale=3.0, height=8, width=8)


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (diffusers.DDIMScheduler(), "one of a flow is required"),
        (diffusers.FlowMatchHeunDiscreteScheduler(), "FlowMatchHeunDiscreteScheduler is not reproduced"),
    ],
)
def test_a_scheduler_that_is_no_flow_or_not_reproduced_is_refused(scheduler, words):
    with pytest.raises(TypeError, match=words):
        DEQFlowPipeline(sd3(), scheduler)
    pipe = made(sd3())
    with pytest.raises(TypeError, match=words):
        pipe.scheduler = scheduler


def test_another_transformer_is_refused_by_name():
    with pytest.raises(TypeError, match="SD3Transformer2DModel or FluxTransformer2DModel is required, got Linear"):
        DEQFlowPipeline(torch.nn.Linear(2, 2), diffusers.FlowMatchEulerDiscreteScheduler())
