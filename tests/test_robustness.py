"""The program under bad weather: full disks, kills, and files that are not what they say they are."""

import json

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from program import SMALL, kill_when, program, run, write_pictures
from safetensors.torch import load_file, save_file

from diffusion import Schedule, load_checkpoint, save_checkpoint
from diffusion.models.unet import UNet

SHAPE = (1, 4, 4)
LIMITED = (
    "import resource, sys; from diffusion.program.cli import main; import diffusion.program.inversion, "
    "diffusion.program.commands, diffusion.program.reproduction.command; "
    "resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0})); sys.exit(main(sys.argv[1:]))"
)
REPORT = [
    "report", "--model", "digits", "--steps", 4, "--runs", 2, "--samples", 2, "--invert-steps", 3, "--images", 2,
    "--epochs", 1,
]  # fmt: skip


def small(folder):
    torch.manual_seed(0)
    model = UNet(SHAPE, channels=8, multipliers=(1,), blocks=(1,), groups=4, embedding=8, timesteps=50)
    save_checkpoint(folder, model, Schedule.linear(50, 1e-3, 0.2), shape=SHAPE)
    return folder


@pytest.mark.parametrize(
    ("argv", "limit"),
    [
        (["invert", "--method", "ddim", "--steps", 3, "--count", 2, "--no-pictures"], 200),
        (["fit", "--data", "PICTURES", *SMALL, "--steps", 2], 5_000),
        (["classifier", "--data", "PICTURES", "--shape", 1, 8, 8, "--steps", 1], 5_000),
        (["demo", "--model", "digits", "--steps", 3, "--invert-steps", 2, "--epochs", 1, "--count", 1], 3_000),
        (REPORT, 300),
    ],
    ids=["invert", "fit", "classifier", "demo", "report"],
)
def test_a_full_disk_is_one_line_and_leaves_no_half_file(argv, limit, tmp_path):
    pictures = write_pictures(tmp_path / "pictures")
    argv = [pictures if part == "PICTURES" else part for part in argv]
    process = program("-c", LIMITED.format(limit), *argv, "--threads", 1, "--output", tmp_path / "out")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    last = err.splitlines()[-1]
    assert last.startswith("deq-ddim: error: ")
    assert "File too large" in last
    assert "Traceback" not in err
    left = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert not [file for file in left if file.name.startswith(".")]
    for file in left:  # whatever was written is whole
        if file.suffix == ".safetensors":
            load_file(file)
        elif file.suffix == ".json":
            json.loads(file.read_text())


def test_a_training_that_is_killed_goes_on_to_the_same_result(tmp_path, capsys):
    argv = [
        "fit", "--data", write_pictures(tmp_path / "pictures"), *SMALL, "--steps", 60,
        "--save-every", 3, "--threads", 1,
    ]  # fmt: skip
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    kill_when((cut / "training" / "state.safetensors").exists, *argv, "--output", cut)
    for folder in (cut, whole):
        assert run(*argv, "--output", folder, capsys=capsys)[0] == 0
    one, other = load_file(cut / "model.safetensors"), load_file(whole / "model.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in other)
    assert not [file for file in cut.rglob("*") if file.is_dir() and file.name == "training"]


def test_an_inversion_that_is_killed_goes_on_to_the_same_result(tmp_path, capsys):
    argv = [
        "invert", "--method", "naive", "--steps", 6, "--count", 3, "--batch", 2, "--epochs", 40, "--threads", 1,
        "--no-pictures",
    ]  # fmt: skip
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    kill_when((cut / "inversion.safetensors").exists, *argv, "--output", cut)
    for folder in (cut, whole):
        assert run(*argv, "--output", folder, capsys=capsys)[0] == 0
    one, other = load_file(cut / "inversion.safetensors"), load_file(whole / "inversion.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in other)


def refusal_of(folder):
    """What loading a checkpoint says against it; its folder if nothing."""
    try:
        load_checkpoint(folder)
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    return str(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_checkpoint_with_random_damage_loads_or_is_refused_by_name(name, tmp_path):
    folder = small(tmp_path)
    sound = (folder / name).read_bytes()
    head = len(sound) if name == "config.json" else 8 + int.from_bytes(sound[:8], "little")

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(at=st.integers(0, head - 1), byte=st.integers(0, 255), cut=st.booleans())
    def damaged(at, byte, cut):
        (folder / name).write_bytes(sound[:at] if cut else sound[:at] + bytes([byte]) + sound[at + 1 :])
        assert str(folder) in refusal_of(folder)

    damaged()


@pytest.mark.parametrize(
    "arguments",
    [
        {"shape": [1, 4, 4], "channels": 10**12},
        {"shape": [1, 4, 4], "embedding": 10**13},
        {"shape": [1, 4, 4], "blocks": "many"},
        {"shape": [1, 4, 4], "channels": 8.5},
        {"shape": [[1], 4, 4]},
        {"shape": None},
        [1, 2],
        "arguments",
    ],
    ids=str,
)
def test_an_architecture_that_cannot_be_built_is_refused_by_name(arguments, tmp_path, capsys):
    folder = small(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["architecture"]["arguments"] = arguments
    (folder / "config.json").write_text(json.dumps(config))
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors")  # no header: config.json counts
    code, _, err = run("sample", "--model", folder, "--output", tmp_path / "out", capsys=capsys)
    assert (code, len(err)) == (2, 1)
    assert "config.json: arguments of UNet" in err[0]


@pytest.mark.parametrize("option", ["--steps", "--count", "--batch", "--seed", "--window"])
def test_numbers_beyond_all_bounds_are_refused(option, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run("sample", option, 10**30, capsys=capsys)
    assert (code, out, len(err)) == (2, "", 1)
    assert f"{10**30}" in err[0].replace(",", "")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_pictures_of_every_mode_can_be_inverted(mode, tmp_path, capsys):
    suffix = "jpg" if mode == "CMYK" else "png"
    if mode == "I;16":
        Image.fromarray(np.full((8, 8), 30_000, dtype=np.uint16)).save(tmp_path / f"a.{suffix}")
    else:
        Image.new(mode, (8, 8)).save(tmp_path / f"a.{suffix}")
    argv = ["invert", "--images", tmp_path / f"a.{suffix}", "--steps", 3, "--method", "ddim", "--no-pictures"]
    assert run(*argv, "--output", tmp_path / "out", capsys=capsys)[0] == 0
