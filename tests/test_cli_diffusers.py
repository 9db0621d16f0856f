"""The program on folders that diffusers wrote: the scheduler's own images, or one line."""

import json

import pytest
import torch
from program import run
from safetensors.torch import load_file

diffusers = pytest.importorskip("diffusers")


def small_unet(side=8, channels=1, **more):
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=side, in_channels=channels, out_channels=more.pop("out", channels), layers_per_block=1,
        block_out_channels=(8,), norm_num_groups=4, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        **more,
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def network():
    return small_unet()


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("place", [".", "unet"])
@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="leading", steps_offset=1),
        diffusers.DDIMScheduler(clip_sample_range=0.7, timestep_spacing="trailing", prediction_type="v_prediction"),
        diffusers.DDIMScheduler(
            rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction", clip_sample=False
        ),
        diffusers.EulerDiscreteScheduler(timestep_spacing="leading"),
        diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0),
    ],
    ids=["leading", "trailing, clipped", "zero signal", "euler", "flow"],
)
def test_a_folder_is_sampled_by_its_own_scheduler(scheduler, place, network, tmp_path, capsys):
    diffusers.DDPMPipeline(network, scheduler).save_pretrained(tmp_path / "model")
    argv = ["sample", "--model", tmp_path / "model" / place, "--steps", 10, "--count", 2, "--no-pictures"]
    code, _, err = run(*argv, "--output", tmp_path / "out", capsys=capsys)
    assert (code, err) == (0, [])
    made = load_file(tmp_path / "out" / "samples.safetensors")
    state = made["x_T"]
    scheduler.set_timesteps(10)
    scaled = getattr(scheduler, "scale_model_input", lambda x, t: x)
    for t in scheduler.timesteps:
        state = scheduler.step(network(scaled(state, t), t).sample, t, state).prev_sample
    assert (made["x_0"] - state).norm() < 2e-3 * state.norm()


def test_a_folder_with_a_ddpm_scheduler_is_sampled_with_fresh_noise_unless_told_otherwise(network, tmp_path, capsys):
    diffusers.DDPMPipeline(network, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "model")
    images = []
    for name, more in (("own", []), ("asked", ["--eta", 1]), ("none", ["--eta", 0])):
        argv = ["sample", "--model", tmp_path / "model", "--steps", 5, "--count", 1, "--no-pictures", *more]
        assert run(*argv, "--output", tmp_path / name, capsys=capsys)[0] == 0
        images.append(load_file(tmp_path / name / "samples.safetensors")["x_0"])
    assert torch.equal(images[0], images[1])
    assert not torch.allclose(images[0], images[2], atol=1e-2)


def test_the_spacing_of_an_inversion_is_the_schedulers_and_is_recorded(network, tmp_path, capsys):
    scheduler = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    diffusers.DDPMPipeline(network, scheduler).save_pretrained(tmp_path / "model")
    (tmp_path / "pictures").mkdir()
    from PIL import Image

    Image.new("L", (8, 8), 128).save(tmp_path / "pictures" / "grey.png")
    argv = [
        "invert",
        "--model",
        tmp_path / "model",
        "--images",
        tmp_path / "pictures",
        "--steps",
        3,
        "--method",
        "ddim",
    ]
    code, out, _ = run(*argv, "--no-pictures", "--json", "--output", tmp_path / "out", capsys=capsys)
    assert (code, json.loads(out)["settings"]["spacing"]) == (0, "trailing")


WRONG = {
    "another scheduler": (
        lambda: (small_unet(), diffusers.FlowMatchHeunDiscreteScheduler()),
        "FlowMatchHeunDiscrete",
    ),
    "flow prediction": (
        lambda: (small_unet(), diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction")),
        "without use_flow_sigmas",
    ),
    "an option": (lambda: (small_unet(), diffusers.DDPMScheduler(variance_type="learned")), "variance_type='learned'"),
    "no size": (lambda: (small_unet(side=None), diffusers.DDIMScheduler()), "sample_size"),
    "channels": (lambda: (small_unet(out=3), diffusers.DDIMScheduler()), "got 3 for 1"),
    "classes": (lambda: (small_unet(num_class_embeds=3), diffusers.DDIMScheduler()), "--label: required by"),
    "no signal": (
        lambda: (small_unet(), diffusers.DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")),
        "where ε says nothing of x_0",
    ),
}


@pytest.mark.parametrize(("make", "words"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("place", [".", "unet"])
def test_a_folder_that_cannot_be_sampled_is_refused_in_one_line(make, words, place, tmp_path, capsys):
    diffusers.DDPMPipeline(*make()).save_pretrained(tmp_path / "model")
    argv = ["sample", "--model", tmp_path / "model" / place, "--steps", 3, "--count", 1, "--no-pictures"]
    code, _, err = run(*argv, "--output", tmp_path / "out", capsys=capsys)
    assert (code, len(err)) == (2, 1)
    assert words in err[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("scheduler/scheduler_config.json", "{", "not a JSON file"),
        ("scheduler/scheduler_config.json", "{}", "None is not reproduced"),
        ("scheduler/scheduler_config.json", '{"_class_name": ["DDIMScheduler"]}', "is not reproduced"),
        ("scheduler/scheduler_config.json", '{"_class_name": "DDIMScheduler", "beta_schedule": "odd"}', "odd"),
        ("scheduler/scheduler_config.json", '{"_class_name": "DDIMScheduler", "beta_end": "odd"}', "scheduler_config"),
        ("unet/config.json", '{"_class_name": "UNet2DModel", "block_out_channels": 3}', "diffusers cannot read it"),
        ("model_index.json", "[]", "a JSON object is required"),
        ("model_index.json", '{"scheduler": ["diffusers", "DDIMScheduler"]}', "a unet is required"),
        ("model_index.json", '{"unet": ["diffusers", "UNet2DConditionModel"]}', "UNet2DModel is read"),
        (
            "model_index.json",
            '{"unet": ["diffusers", "UNet2DModel"], "vqvae": ["diffusers", "VQModel"]}',
            "vqvae (VQMo",
        ),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(name, text, words, network, tmp_path, capsys):
    diffusers.DDPMPipeline(network, diffusers.DDIMScheduler()).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / name).write_text(text)
    argv = ["sample", "--model", tmp_path / "model", "--steps", 3, "--count", 1, "--no-pictures"]
    code, _, err = run(*argv, "--output", tmp_path / "out", capsys=capsys)
    assert (code, len(err)) == (2, 1)
    assert words in err[0]


def test_a_fault_of_the_programs_own_is_one_line_too(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("diffusion.program.commands.run_sample", lambda args: {}["missing"])
    code, _, err = run("sample", "--output", tmp_path / "out", capsys=capsys)
    assert (code, err) == (1, ["deq-ddim: error: KeyError: 'missing' (--debug shows where)"])
    with pytest.raises(KeyError):
        run("sample", "--debug", "--output", tmp_path / "out", capsys=capsys)
