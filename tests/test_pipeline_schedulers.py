"""The pipeline with Euler, flow and EDM schedulers: diffusers' loops, and latents that come back."""

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from diffusion import DEQDDIMPipeline  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip


def made(network, scheduler):
    pipe = DEQDDIMPipeline(network, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def loop(network, scheduler, noise, **arguments):
    scheduler.set_timesteps(**arguments)
    state = noise * float(getattr(scheduler, "init_noise_sigma", 1.0))
    scaled = getattr(scheduler, "scale_model_input", lambda x, t: x)
    for t in scheduler.timesteps:
        state = scheduler.step(network(scaled(state, t), t).sample, t, state).prev_sample
    return state


SCHEDULERS = [
    diffusers.EulerDiscreteScheduler(use_karras_sigmas=True),
    diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    diffusers.EDMEulerScheduler(),
]


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("method", ["parallel", "sequential"])
def test_from_the_same_noise_the_pipeline_makes_the_images_of_the_schedulers_loop(scheduler, method, network):
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    drawn = {"batch_size": 2, "generator": torch.Generator().manual_seed(0)}
    expected = loop(network, scheduler, noise, num_inference_steps=12)
    for given in (drawn, {"latents": noise}):
        out = made(network, scheduler)(num_inference_steps=12, output_type="latent", method=method, error=1e-5, **given)
        assert (out.images - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize(
    ("scheduler", "given"),
    [(SCHEDULERS[1], {"sigmas": [1.0, 0.7, 0.2]}), (diffusers.EulerDiscreteScheduler(), {"timesteps": [900, 400, 30]})],
    ids=["sigmas", "timesteps"],
)
def test_own_steps_are_taken_as_diffusers_pipelines_take_them(scheduler, given, network):
    noise = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    out = made(network, scheduler)(latents=noise, output_type="latent", error=1e-5, **given)
    expected = loop(network, scheduler, noise, **given)
    assert (out.images - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("edit", [None, lambda x, k, image: x])
def test_a_two_step_chain_is_sampled_in_sequence_without_hooks(edit, network):
    scheduler, noise = diffusers.DPMSolverMultistepScheduler(), torch.randn(2, 1, 8, 8)
    pipe, given = made(network, scheduler), {"num_inference_steps": 9, "latents": noise, "method": "sequential"}
    if edit is not None:
        with pytest.raises(ValueError, match="edit: of chains with rule"):
            pipe(**given, edit=edit)
        return
    expected = loop(network, scheduler, noise, num_inference_steps=9)
    torch.testing.assert_close(pipe(**given, output_type="latent").images, expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="callback_on_step_end: of a chain of two-step rule"):
        pipe(**given, callback_on_step_end=lambda *_: {})


def test_sigmas_are_refused_by_a_scheduler_of_time_steps(network):
    with pytest.raises(ValueError, match="sigmas: not taken by DDIMScheduler"):
        made(network, diffusers.DDIMScheduler())(sigmas=[1.0, 0.5])


def test_clipping_is_refused_where_a_scheduler_has_none(network):
    with pytest.raises(ValueError, match="clip_sample: EulerDiscreteScheduler does not clip"):
        made(network, diffusers.EulerDiscreteScheduler())(clip_sample=True)


@pytest.mark.parametrize("scheduler", SCHEDULERS[:2], ids=lambda s: type(s).__name__)
def test_latents_found_by_the_pipeline_give_the_images_back(scheduler, network):
    pipe = made(network, scheduler)
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    image = (pipe(latents=noise, num_inference_steps=10, output_type="latent", error=1e-6).images / 8).clamp(-1, 1)
    found = pipe.invert((image + 1) / 2, num_inference_steps=10)
    again = pipe(latents=found.x_T, num_inference_steps=10, output_type="latent", method="sequential").images
    assert (again - image).square().mean().sqrt() < 1e-3


def test_a_folder_of_such_a_pipeline_is_loaded_with_its_scheduler(network, tmp_path):
    made(network, diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)).save_pretrained(tmp_path)
    assert type(DEQDDIMPipeline.from_pretrained(tmp_path).scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
