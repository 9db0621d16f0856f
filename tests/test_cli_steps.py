"""Chains of one's own time steps, and partial ones, on the command line: sampled, inverted, handed on."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from program import run, write_pictures
from safetensors.torch import load_file

from diffusion import load_checkpoint, sample
from diffusion.program.latents import read_latents

OWN = "950,700,420,180,60,10,0"
PLAIN = ["--method", "sequential", "--no-pictures"]


@pytest.fixture(scope="module")
def digits():
    found = load_checkpoint("digits")
    found.model.requires_grad_(False)
    return found


def images_of(folder):
    return load_file(folder / "samples.safetensors")["x_0"]


def test_samples_are_those_of_the_chain_of_these_time_steps(digits, tmp_path, capsys):
    code, out, _ = run("sample", "--timesteps", OWN, "--count", 2, *PLAIN, "--json", "-o", tmp_path, capsys=capsys)
    summary = json.loads(out)
    assert (code, summary["steps"]) == (0, 7)
    assert summary["chain"]["timesteps"] == [950, 700, 420, 180, 60, 10, 0]
    chain = digits.schedule.chain(timesteps=[950, 700, 420, 180, 60, 10, 0])
    x_T = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(images_of(tmp_path), sample(digits.model, x_T, chain, "sequential").x_0)


def test_samples_are_sampled_again_on_their_own_time_steps(tmp_path, capsys):
    first, again = tmp_path / "first", tmp_path / "again"
    assert run("sample", "--timesteps", OWN, "--count", 2, *PLAIN, "-o", first, capsys=capsys)[0] == 0
    code, _, err = run("sample", "--latents", first, *PLAIN, "-o", again, capsys=capsys)
    assert (code, err) == (0, [])
    assert torch.equal(images_of(first), images_of(again))


@pytest.mark.parametrize("method", ["exact", "ddpm"])
def test_a_partial_inversion_on_own_time_steps_gives_the_pictures_back(method, tmp_path, capsys):
    pictures = write_pictures(tmp_path / "pictures", 2)
    argv = ["invert", "--images", pictures, "--timesteps", OWN, "--strength", 0.6, "--method", method, "--json"]
    code, out, _ = run(*argv, "--no-pictures", "-o", tmp_path / "found", capsys=capsys)
    settings = json.loads(out)["settings"]
    assert (code, settings["steps"], settings["taken"], settings["strength"]) == (0, 7, 4, 0.6)
    argv = ["sample", "--latents", tmp_path / "found", "--method", "sequential", "-o", tmp_path / "again"]
    code, _, err = run(*argv, capsys=capsys)
    assert (code, err) == (0, [])
    for name in ("0", "1"):
        one, other = (Image.open(tmp_path / part / f"{name}.png") for part in ("pictures", "again/images"))
        assert np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max() <= 1


def test_an_inversion_with_own_time_steps_is_done_when_seen_again(tmp_path, capsys, monkeypatch):
    argv = ["invert", "--timesteps", OWN, "--strength", 0.6, "--count", 1, "--method", "ddpm", "--no-pictures"]
    assert run(*argv, "-o", tmp_path, capsys=capsys)[0] == 0
    monkeypatch.setattr("diffusion.program.inversion.invert", None)
    assert run(*argv, "-o", tmp_path, capsys=capsys)[0] == 0
    code, _, err = run(*argv[:4], 0.8, *argv[5:], "-o", tmp_path, capsys=capsys)
    assert code == 2
    assert "strength = 0.6 there, 0.8 here" in err[0]


def test_noise_is_added_to_pictures_and_the_last_steps_make_images_of_them(digits, tmp_path, capsys):
    pictures = write_pictures(tmp_path / "pictures", 2)
    argv = ["sample", "--images", pictures, "--steps", 10, "--strength", 0.5, *PLAIN, "-o", tmp_path / "out"]
    assert run(*argv, capsys=capsys)[0] == 0
    given = torch.stack([torch.from_numpy(np.array(Image.open(pictures / f"{i}.png"))).float() for i in range(2)])
    chain = digits.schedule.chain(10, "quadratic").partial(0.5)
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    start = chain.add_noise(given[:, None] * (2 / 255) - 1, noise)
    torch.testing.assert_close(images_of(tmp_path / "out"), sample(digits.model, start, chain, "sequential").x_0)
    assert read_latents(str(tmp_path / "out")).names == ["0", "1"]
    argv = ["sample", "--latents", tmp_path / "out", *PLAIN, "-o", tmp_path / "again"]
    assert run(*argv, capsys=capsys)[0] == 0
    assert torch.equal(*(images_of(tmp_path / name) for name in ("out", "again")))


def test_a_walk_keeps_the_strength_and_neighbours_of_states_that_show_their_picture_are_refused(tmp_path, capsys):
    argv = ["invert", "--count", 2, "--steps", 6, "--strength", 0.5, "--method", "ddim", "--no-pictures"]
    assert run(*argv, "-o", tmp_path / "found", capsys=capsys)[0] == 0
    argv = ["edit", "--latents", tmp_path / "found"]
    assert run(*argv, "--between", 1, 2, "-o", tmp_path / "walk", capsys=capsys)[0] == 0
    assert read_latents(str(tmp_path / "walk")).chain["strength"] == 0.5
    code, _, err = run(*argv, "--vary", 0.2, "-o", tmp_path / "v", capsys=capsys)
    assert (code, len(err)) == (2, 1)
    assert "--vary: of latents that are noise alone" in err[0]


@pytest.mark.parametrize(("options", "words"), [
    (["--steps", 7], "the latents are of timesteps 950,700,420,180,60,10,0: with steps 7 they make other images"),
    (["--timesteps", "900,0"], "of timesteps 950,700,420,180,60,10,0: with 900,0 they make other images"),
    (["--strength", 0.5], "of strength 1.0: with 0.5 they make other images"),
])  # fmt: skip
def test_another_chain_than_that_of_the_latents_is_warned_of(options, words, tmp_path, capsys):
    first = tmp_path / "first"
    assert run("sample", "--timesteps", OWN, "--count", 1, *PLAIN, "-o", first, capsys=capsys)[0] == 0
    code, _, err = run("sample", "--latents", first, *options, *PLAIN, "-o", tmp_path / "out", capsys=capsys)
    assert (code, len(err)) == (0, 1)
    assert words in err[0]


@pytest.mark.parametrize(("options", "words"), [
    (["--timesteps", "a,b"], "--timesteps: numbers with commas between them are required, got 'a,b'"),
    (["--timesteps", ""], "--timesteps: numbers with commas between them are required, got ''"),
    (["--timesteps", "0,999"], "timesteps: integers that fall, of 999 … 0, are required, got [0, 999]"),
    (["--timesteps", "1000,0"], "timesteps: integers that fall, of 999 … 0, are required"),
    (["--timesteps", "9.5,0"], "timesteps: a list of integers is required"),
    (["--timesteps", "900,0", "--steps", 3], "steps: 2, as many as timesteps, or None is required"),
    (["--timesteps", "900,0", "--spacing", "linspace"], "spacing: not taken beside timesteps"),
    (["--sigmas", "1,.5"], "--sigmas: of models without a table of time steps, such as flows; --timesteps"),
    (["--strength", 1.5], "--strength: a number above 0, to 1, is required, got 1.5"),
    (["--strength", "nan"], "--strength: a number above 0, to 1, is required, got nan"),
    (["--strength", 1e-3, "--images", "PICTURES"], "strength: 1/100, which leaves one step, to 1 is required"),
    (["--strength", 0.5], "--strength: of pictures that noise is added to, --images, or of --latents; none came"),
    (["--resize"], "--resize: of --images, none came"),
    (["--images", "PICTURES", "--latents", "x"], "x: no such file"),
])  # fmt: skip
def test_steps_that_are_none_are_one_line(options, words, tmp_path, capsys):
    pictures = write_pictures(tmp_path / "pictures", 1)
    options = [pictures if option == "PICTURES" else option for option in options]
    code, _, err = run("sample", *options, "-o", tmp_path / "out", capsys=capsys)
    assert (code, len(err)) == (2, 1)
    assert words in err[0]
    assert not (tmp_path / "out").exists()


def test_a_flow_of_diffusers_is_sampled_at_the_noise_asked_for_and_again_from_its_latents(tmp_path, capsys):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    network = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    ).eval()  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)
    diffusers.DDPMPipeline(network, scheduler).save_pretrained(tmp_path / "model")
    first, again = tmp_path / "first", tmp_path / "again"
    argv = ["sample", "--model", tmp_path / "model", "--count", 1, *PLAIN]
    assert run(*argv, "--sigmas", "1,.6,.25", "-o", first, capsys=capsys)[0] == 0
    assert read_latents(str(first)).chain["sigmas"] == [1.0, 0.6, 0.25]
    state = load_file(first / "samples.safetensors")["x_T"]
    scheduler.set_timesteps(sigmas=[1.0, 0.6, 0.25])
    with torch.no_grad():
        for t in scheduler.timesteps:
            state = scheduler.step(network(state, t).sample, t, state).prev_sample
    torch.testing.assert_close(images_of(first), state, rtol=1e-4, atol=1e-4)
    assert run(*argv, "--latents", first, "-o", again, capsys=capsys)[0] == 0
    assert torch.equal(images_of(first), images_of(again))
    code, _, err = run(*argv, "--timesteps", "a", "--sigmas", "1", "-o", tmp_path / "x", capsys=capsys)
    assert (code, len(err)) == (2, 1)


@pytest.mark.parametrize("argv", [["sample", "--count", 10**15], ["sample", "--count", 2**62]])
def test_a_count_that_no_memory_holds_is_one_line_that_says_what_helps(argv, tmp_path, capsys):
    code, _, err = run(*argv, "--steps", 2, "--no-pictures", "-o", tmp_path / "out", capsys=capsys)
    assert (code, len(err)) == (1, 1)
    assert err[0] == (
        "deq-ddim: error: the memory is full: fewer images (--count), or fewer at a time (--batch), need less"
    )
