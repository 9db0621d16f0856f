"""The program: its results, and one line and an exit code for each failure."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from program import SMALL, run, write_pictures
from safetensors.torch import load_file

import diffusion
import pydeqsolve
from diffusion import load_checkpoint, sample
from diffusion.models.unet import UNet
from diffusion.program import pictures
from diffusion.program.doctor import advice
from diffusion.training.frechet import load_features


def test_sampled_images_are_those_of_the_library(tmp_path, capsys):
    code, out, _ = run("sample", "--steps", 12, "--count", 3, "--seed", 7, "--batch", 2, "--output", tmp_path,
                       "--method", "sequential", "--no-pictures", "--json", capsys=capsys)  # fmt: skip
    digits = load_checkpoint("digits")
    x_T = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        expected = sample(digits.model, x_T, digits.schedule.chain(12, "quadratic"), method="sequential").x_0
    assert code == 0
    torch.testing.assert_close(load_file(tmp_path / "samples.safetensors")["x_0"], expected, rtol=0, atol=1e-5)
    summary = json.loads(out)
    assert (summary["rounds"], summary["evaluations_per_image"]) == (12, 12)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary


def test_parallel_and_sequential_commands_agree(tmp_path, capsys):
    images = []
    for method in ("parallel", "sequential"):
        argv = ["sample", "--steps", 30, "--count", 2, "--method", method, "--no-pictures"]
        assert run(*argv, "--output", tmp_path / method, capsys=capsys)[0] == 0
        images.append(load_file(tmp_path / method / "samples.safetensors")["x_0"].double())
    assert (images[0] - images[1]).norm() / images[1].norm() < 1e-3


@pytest.mark.parametrize(
    "options",
    [["--method", "auto"], ["--method", "coarse-to-fine"], ["--method", "all-steps", "--window", "20"]],
    ids=" ".join,
)
def test_every_way_of_sampling_can_be_asked_for(options, tmp_path, capsys):
    argv = ["sample", "--steps", 60, "--count", 1, "--no-pictures", "--threads", 1]
    for folder, more in (("expected", ["--method", "sequential"]), ("found", options)):
        assert run(*argv, *more, "--output", tmp_path / folder, capsys=capsys)[0] == 0
    found, expected = (load_file(tmp_path / f / "samples.safetensors")["x_0"] for f in ("found", "expected"))
    assert (found - expected).norm() < 1e-3 * expected.norm()


def test_inversion_reads_the_pictures_of_a_folder_and_reports_each(tmp_path, capsys):
    folder = write_pictures(tmp_path / "pictures")
    argv = ["invert", "--method", "ddim", "--images", folder, "--steps", 10, "--batch", 2, "--json"]
    code, out, _ = run(*argv, "--output", tmp_path / "out", capsys=capsys)
    summary = json.loads(out)
    assert code == 0
    assert len(summary["loss"]) == len(summary["status"]) == 5
    one = run(*argv[:4], folder / "3.png", *argv[5:], "--output", tmp_path / "one", capsys=capsys)
    assert json.loads(one[1])["loss"] == pytest.approx(summary["loss"][3:4], rel=1e-3)
    names = {"inversion.json", "inversion.safetensors", "reconstruction.png", "images"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names


def test_the_demonstration_writes_its_pictures_and_a_summary(tmp_path, capsys):
    argv = ["demo", "--model", "digits", "--steps", 20, "--invert-steps", 5, "--epochs", 2, "--count", 4]
    code, out, _ = run(*argv, "--threads", 1, "--output", tmp_path, capsys=capsys)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert code == 0
    assert sorted(summary["files"]) == sorted(file.name for file in tmp_path.iterdir())
    (model,) = summary["models"]
    assert max(model["single"]["error_max"], model["batch"]["error_max"]) < 1e-3
    assert model["single"]["sequential"]["evaluations_per_image"] == 20
    assert list(model["inversion"]["methods"]) == ["ddim", "naive", "deq", "exact"]
    for words in ("evals/image", "agrees with sequential", "exact"):
        assert words in out
    assert all(file.stat().st_size < 300_000 for file in tmp_path.glob("*.png"))


def test_the_picture_of_inversion_says_after_how_many_epochs_or_rounds(tmp_path, capsys, monkeypatch):
    drawn, draw = {}, pictures.draw_rows

    def draw_rows(path, title, rows, *args, **options):
        drawn[path.name] = list(rows)
        draw(path, title, rows, *args, **options)

    monkeypatch.setattr(pictures, "draw_rows", draw_rows)
    argv = ["demo", "--model", "digits", "--steps", 2, "--invert-steps", 2, "--epochs", 2, "--count", 1]
    assert run(*argv, "--threads", 1, "--output", tmp_path, "--json", capsys=capsys)[0] == 0
    exact = json.loads((tmp_path / "summary.json").read_text())["models"][0]["inversion"]["methods"]["exact"]
    assert drawn["digits-inversion.png"][2:] == ["naive\n2 epochs", "deq\n2 epochs", f"exact\n{exact['rounds']} rounds"]


def test_a_demonstration_that_disagrees_fails(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("diffusion.program.demo.AGREEMENT", 0.0)
    argv = ["demo", "--model", "digits", "--steps", 5, "--invert-steps", 2, "--epochs", 1, "--count", 1]
    code, _, err = run(*argv, "--threads", 1, "--output", tmp_path, capsys=capsys)
    assert code == 1
    assert "differ" in err[-1]


def test_a_trained_folder_can_be_sampled_from(tmp_path, capsys):
    folder = write_pictures(tmp_path / "pictures")
    argv = ["fit", "--data", folder, *SMALL, "--steps", 2, "--output", tmp_path / "m"]
    code, out, _ = run(*argv, "--json", capsys=capsys)
    assert (code, json.loads(out)["steps"]) == (0, 2)
    argv = ["sample", "--model", tmp_path / "m", "--steps", 3, "--count", 1, "--output", tmp_path / "s"]
    assert run(*argv, capsys=capsys)[0] == 0
    assert {str(file.relative_to(tmp_path / "s")) for file in (tmp_path / "s").rglob("*.png")} == {
        "samples.png", "latents.png", "images/01.png",
    }  # fmt: skip


def test_a_trained_classifier_is_written_with_its_accuracy(tmp_path, capsys):
    argv = ["classifier", "--data", "digits", "--steps", 150, "--threads", 1, "--output", tmp_path]
    code, out, _ = run(*argv, "--json", capsys=capsys)
    summary = json.loads(out)
    assert (code, summary["train"]) == (0, 1500)
    assert load_features(tmp_path).record["accuracy"] == summary["accuracy"] > 0.9


def test_the_doctor_says_what_is_installed_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run("doctor", "--json", capsys=capsys)
    facts = json.loads(out)
    assert (code, err, list(tmp_path.iterdir())) == (0, [], [])
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["native"] is pydeqsolve.build_info()["native"]
    assert facts["checkpoints"] == ["digit-classes", "digits", "emoji", "fashion", "fashion-classes"]
    assert "native module" in run("doctor", capsys=capsys)[1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"native": False, "native_error": "no such file"}, "no such file"),
        ({"devices": ["H100"], "cuda_architectures": ""}, "nvcc"),
        ({"devices": [], "cuda_architectures": "75"}, "no GPU"),
        ({"threads": 2, "wait_policy": None}, "OMP_WAIT_POLICY=PASSIVE"),
        ({"threads": 9, "wait_policy": "PASSIVE"}, "9 threads on 4 cores"),
        ({"checkpoints": []}, "checkpoints are missing"),
    ],
)
def test_the_doctor_advises_on_each_thing_that_can_be_wrong(change, words):
    sound = {
        "native": True, "native_error": "", "devices": [], "cuda_architectures": "", "threads": 1, "cores": 4,
        "wait_policy": None, "checkpoints": ["digits"],
    }  # fmt: skip
    assert advice(sound) == []
    (line,) = advice({**sound, **change})
    assert words in line


def test_an_image_is_drawn_as_squares_of_its_own_pixels(tmp_path):
    image = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)
    pictures.draw_samples(tmp_path / "one.png", "", {"": image})
    drawn = np.asarray(Image.open(tmp_path / "one.png").convert("L")).astype(int)
    top, left = pictures.MARGIN + pictures.TITLE, pictures.MARGIN
    expected = ((image[0, 0] + 1) / 2 * 255).repeat_interleave(8, 0).repeat_interleave(8, 1).numpy()
    assert np.abs(drawn[top : top + 64, left : left + 64] - expected).max() <= 1
    assert (drawn[:top] == 255).all()


def test_threads_are_restored(tmp_path, capsys, monkeypatch):
    seen, calls = [], torch.get_num_threads()
    monkeypatch.setattr("diffusion.program.machine.cores", lambda: 3)
    monkeypatch.setattr(
        "diffusion.program.commands.run_sample", lambda args: seen.append(torch.get_num_threads()) or 1 / 0
    )
    assert run("sample", "--threads", 2, "--output", tmp_path, capsys=capsys)[0] == 1
    assert (seen, torch.get_num_threads()) == ([2], calls)


def test_help_has_an_example_for_every_command(capsys):
    _, out, _ = run("--help", capsys=capsys)
    for command in ("demo", "sample", "invert", "edit", "fit", "report", "classifier", "doctor"):
        assert f"deq-ddim {command}" in out
        assert f"example: deq-ddim {command}" in run(command, "--help", capsys=capsys)[1]


WRONG = {
    "unknown command": (["smaple"], "did you mean sample?"),
    "unknown option": (["sample", "--stpes", "5"], "did you mean --steps?"),
    "an option like none": (["sample", "--bogus"], "unrecognized arguments: --bogus (see deq-ddim sample --help)"),
    "a mistyped model": (["sample", "--model", "digit"], "did you mean digits?"),
    "a mistyped method": (["invert", "--method", "exakt"], "did you mean exact?"),
    "no latents": (["sample", "--latents", "nowhere"], "nowhere"),
    "a folder without latents": (["edit", "--latents", ".", "--vary", "0.1"], "holds none of latents.safetensors"),
    "an edit of no kind": (["edit", "--latents", "."], "--between"),
    "more than a whole variation": (["edit", "--latents", ".", "--vary", "1"], "between 0 and 1"),
    "no rounds": (["sample", "--max-rounds", "0"], "got 0"),
    "no steps": (["sample", "--steps", "0"], "got 0"),
    "a demonstration of no steps": (["demo", "--steps", "0"], "got 0"),
    "a demonstration of too many steps": (["demo", "--invert-steps", "1001"], "got 1001"),
    "too many steps": (["invert", "--steps", "1001"], "got 1001"),
    "unknown sampler": (["sample", "--method", "fast"], "'fast'"),
    "unknown inversion": (["invert", "--method", "fast"], "'fast'"),
    "unknown spacing": (["sample", "--spacing", "odd"], "'odd'"),
    "unknown splitting": (["sample", "--splitting", "odd"], "'odd'"),
    "a window of one step after the other": (["sample", "--method", "sequential", "--window", "5"], "--window"),
    "an error of what is exact": (["sample", "--method", "sequential", "--error", "0.1"], "--error: of"),
    "an error of one pass": (["invert", "--method", "ddim", "--error", "0.1"], "--error: of exact"),
    "an error of a descent": (["invert", "--method", "deq", "--error", "0.1"], "--error: of exact"),
    "epochs of no descent": (["invert", "--method", "exact", "--epochs", "3"], "--epochs: of naive and deq"),
    "a rate of no descent": (["invert", "--method", "ddim", "--lr", "0.1"], "--lr: of naive and deq"),
    "a gradient of no solve": (["invert", "--method", "naive", "--gradient", "implicit"], "--gradient: of deq"),
    "no images": (["sample", "--count", "0"], "got 0"),
    "eta": (["sample", "--eta", "1.5"], "1.5"),
    "learning rate": (["invert", "--method", "deq", "--lr", "nan"], "nan"),
    "threads": (["sample", "--threads", "100000"], "100000"),
    "unknown device": (["sample", "--device", "abacus"], "'abacus'"),
    "absent device": (["sample", "--device", "cuda:99"], "cuda:99"),
    "no checkpoint": (["sample", "--model", "nowhere"], "nowhere"),
    "no pictures": (["invert", "--images", "nowhere"], "nowhere"),
    "no data": (["fit", "--data", "nowhere"], "nowhere"),
    "no classifier data": (["classifier", "--data", "nowhere"], "nowhere"),
    "the shape of shipped data": (["fit", "--data", "digits", "--shape", "1", "9", "9"], "digits has its own"),
    "no training": (["fit", "--data", "digits", "--steps", "0"], "got 0"),
}


@pytest.mark.parametrize(("argv", "words"), WRONG.values(), ids=WRONG)
def test_bad_options_give_one_line_and_leave_nothing(argv, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*argv, capsys=capsys)
    assert (code, out, len(err)) == (2, "", 1)
    assert err[0].startswith("deq-ddim: error: ")
    assert words in err[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_damaged_checkpoint_is_refused(name, damage, tmp_path, capsys):
    source, model = Path(diffusion.__file__).parent / "checkpoints" / "digits", tmp_path / "model"
    model.mkdir()
    for file in source.glob("*.*"):
        (model / file.name).write_bytes(file.read_bytes())
    if damage == "missing":
        (model / name).unlink()
    else:
        (model / name).write_bytes((source / name).read_bytes()[:-100])
    code, _, err = run("sample", "--model", model, "--output", tmp_path / "out", capsys=capsys)
    assert (code, len(err)) == (2, 1)
    assert name in err[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [["sample"], ["invert"], ["fit", "--data", "digits"], ["demo"], ["report"]])
def test_a_file_in_place_of_the_folder_is_found_out_before_the_work(command, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(UNet, "forward", None)
    unwritable = [Path("/proc")] if Path("/proc/self").exists() else []  # there, not even root may write
    for place in (tmp_path / "file", tmp_path / "file" / "below", *unwritable):
        code, _, err = run(*command, "--output", place, capsys=capsys)
        assert (code, len(err)) == (2, 1)
        assert str(place) in err[0]
    assert (tmp_path / "file").read_text() == "mine"


def test_a_picture_of_another_size_is_refused_unless_it_may_be_resized(tmp_path, capsys):
    Image.new("L", (9, 8)).save(tmp_path / "wide.png")
    argv = ["invert", "--images", tmp_path / "wide.png", "--steps", 4, "--method", "ddim", "--output", tmp_path / "out"]
    code, _, err = run(*argv, capsys=capsys)
    assert (code, len(err)) == (2, 1)
    assert "8x8 pixels are required, got 9x8" in err[0]
    assert not (tmp_path / "out").exists()
    assert run(*argv, "--resize", "--no-pictures", capsys=capsys)[0] == 0


def test_a_file_that_is_no_picture_is_refused(tmp_path, capsys):
    (tmp_path / "text.png").write_text("no picture")
    code, _, err = run("invert", "--images", tmp_path, "--output", tmp_path / "out", capsys=capsys)
    assert (code, len(err)) == (2, 1)
    assert "text.png" in err[0]


def test_a_missing_matplotlib_is_named_before_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(UNet, "forward", None)
    code, _, err = run("sample", "--output", tmp_path / "out", capsys=capsys)
    assert (code, len(err)) == (1, 1)
    assert "pip install 'pydeqsolve[viz]'" in err[0]
    assert not (tmp_path / "out").exists()


def test_an_error_beyond_the_precision_of_the_network_is_warned_of_in_one_line(tmp_path, capsys):
    argv = ["sample", "--steps", 5, "--count", 2, "--error", 1e-9, "--output", tmp_path / "out", "--no-pictures"]
    code, _, err = run(*argv, capsys=capsys)
    assert (code, len(err)) == (0, 1)
    assert "2 of 2 images miss the error asked for" in err[0]
    assert "the network's precision" in err[0]
    assert "Stop" not in err[0]


@pytest.mark.parametrize("method", ["sequential", "parallel"])
def test_a_model_that_returns_nan_fails_without_writing_images(method, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(UNet, "forward", lambda self, x, t: torch.full_like(x, torch.nan))
    argv = ["sample", "--steps", 3, "--count", 2, "--method", method, "--output", tmp_path / "out"]
    code, _, err = run(*argv, capsys=capsys)
    assert (code, len(err)) == (1, 1)
    assert "2 of 2 images are not finite" in err[0]
    assert not (tmp_path / "out").exists()
