"""Where the commands write: found out before the work, and nothing is overwritten unasked."""

import os
import signal

import pytest
import torch
from program import SMALL, run, write_pictures
from safetensors.torch import load_file

from diffusion.models.unet import UNet
from diffusion.training import run as training

SAMPLE = ["sample", "--steps", 2, "--count", 1]
WRITES = {
    "sample": (SAMPLE, ["samples.safetensors", "summary.json", "samples.png", "latents.png"]),
    "invert": (
        ["invert", "--steps", 2, "--count", 1],
        ["inversion.safetensors", "inversion.json", "reconstruction.png"],
    ),
    "fit": (["fit", "--data", "digits"], ["model.safetensors", "config.json", "images.safetensors"]),
    "demo": (["demo", "--model", "digits"], ["digits-samples.png", "digits-losses.png", "summary.json"]),
    "report": (["report", "--model", "digits"], ["report.html", "report.json"]),
    "classifier": (["classifier", "--data", "digits"], ["features.safetensors"]),
}


@pytest.fixture
def no_work(monkeypatch):
    """Nothing can be sampled or trained."""
    monkeypatch.setattr(UNet, "forward", None)
    monkeypatch.setattr(training.Run, "advance", None)
    monkeypatch.setattr("diffusion.program.fitting.fit_classifier", None)


@pytest.mark.parametrize(("command", "names"), WRITES.values(), ids=WRITES)
def test_a_folder_in_the_place_of_a_file_is_found_out_before_the_work(command, names, tmp_path, capsys, no_work):
    for name in names:
        folder = tmp_path / name.replace(".", "-")
        (folder / name).mkdir(parents=True)
        code, _, err = run(*command, "--output", folder, capsys=capsys)
        assert (code, len(err)) == (2, 1)
        assert f"{name} is the name of a file to write, but a folder is there" in err[0]


@pytest.mark.parametrize(("command", "names"), WRITES.values(), ids=WRITES)
def test_a_file_of_others_is_not_overwritten(command, names, tmp_path, capsys, no_work):
    for name in names:
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).write_text("mine")
        code, _, err = run(*command, "--output", folder, capsys=capsys)
        assert (code, len(err)) == (2, 1)
        assert str(folder) in err[0]
        assert (folder / name).read_text() == "mine"
        assert [file.name for file in folder.iterdir()] == [name]


@pytest.mark.parametrize("name", ["out.png", "model.safetensors", "summary.JSON", "a/b.pt"])
@pytest.mark.parametrize("command", [command for command, _ in WRITES.values()], ids=WRITES)
def test_the_name_of_a_file_is_not_taken_for_that_of_a_folder(command, name, tmp_path, capsys, no_work):
    code, _, err = run(*command, "--output", tmp_path / name, capsys=capsys)
    assert (code, len(err)) == (2, 1)
    assert "the name of a folder is required" in err[0]
    assert list(tmp_path.iterdir()) == []


def test_no_name_is_refused(capsys, no_work, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(*SAMPLE, "--output", "", capsys=capsys)
    assert (code, len(err), list(tmp_path.iterdir())) == (2, 1, [])
    assert "--output: the name of a folder is required" in err[0]


def test_a_folder_with_a_point_in_its_name_is_one(tmp_path, capsys):
    (tmp_path / "old.png").mkdir()
    for name in ("v1.0", "old.png"):
        assert run(*SAMPLE, "--no-pictures", "--output", tmp_path / name, capsys=capsys)[0] == 0


def test_samples_are_replaced_when_that_is_asked_for(tmp_path, capsys):
    argv = [*SAMPLE, "--no-pictures", "--output", tmp_path]
    assert run(*argv, capsys=capsys)[0] == 0
    first = load_file(tmp_path / "samples.safetensors")["x_T"]
    code, _, err = run(*argv, "--seed", 1, capsys=capsys)
    assert (code, len(err)) == (2, 1)
    assert err[0].endswith(f"{tmp_path}: holds samples.safetensors, summary.json already; --overwrite replaces it")
    assert torch.equal(load_file(tmp_path / "samples.safetensors")["x_T"], first)
    assert run(*argv, "--seed", 1, "--overwrite", capsys=capsys)[0] == 0
    assert not torch.equal(load_file(tmp_path / "samples.safetensors")["x_T"], first)


def test_other_files_in_the_folder_stay(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert run(*SAMPLE, "--no-pictures", "--output", tmp_path, capsys=capsys)[0] == 0
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_pictures_to_train_on_are_read_after_the_folder_is_known_to_be_writable(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr("diffusion.program.fitting.class_folder", None)
    code, _, err = run("fit", "--data", tmp_path, "--output", tmp_path / "file", capsys=capsys)
    assert (code, len(err)) == (2, 1)


@pytest.mark.parametrize("name", ["fifo.png", "folder.png"])
def test_pictures_that_are_no_files_are_refused_and_not_waited_for(name, tmp_path, capsys):
    path = tmp_path / name
    os.mkfifo(path) if name.startswith("fifo") else path.mkdir()
    code, _, err = run("invert", "--images", path, "--output", tmp_path / "out", capsys=capsys)
    assert (code, len(err)) == (2, 1)
    assert name in err[0]


def test_an_interrupt_while_a_checkpoint_is_written_keeps_the_last_one(tmp_path, capsys, monkeypatch):
    argv = ["fit", "--data", write_pictures(tmp_path / "pictures"), *SMALL, "--steps", 9]
    argv += ["--save-every", 2, "--output", tmp_path / "m"]
    sync, calls = os.fsync, []

    def interrupted(descriptor):
        calls.append(1)
        if len(calls) == 9:  # in the second save
            signal.raise_signal(signal.SIGINT)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", interrupted)
    with_default = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code, _, err = run(*argv, capsys=capsys)
    finally:
        signal.signal(signal.SIGINT, with_default)
    assert code == 130
    assert "after 4 steps, saved in" in err[-1]
    assert run(*argv, capsys=capsys)[0] == 0
