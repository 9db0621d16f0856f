"""Training on a folder of pictures: what is read off them, what is refused, and what is measured in the end."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from program import SMALL, run, write_pictures

from diffusion import load_checkpoint
from diffusion.training.data import FASHION_FOLDER
from diffusion.training.emoji import EMOJI_FONT
from diffusion.training.fit import recipes
from diffusion.training.shape import shape_of_folder

FIT = ["--steps", 2, "--batch", 2, "--distance", 0]


def write(path, size, mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size).save(path)


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("LA", 1), ("1", 1), ("RGB", 3), ("RGBA", 3), ("P", 3)])
def test_size_and_channels_are_those_of_the_pictures(mode, channels, tmp_path):
    write(tmp_path / "class" / "a.png", (12, 8), mode)
    assert shape_of_folder(tmp_path) == (channels, 8, 12)


def test_a_picture_counts_as_its_camera_turned_it(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (12, 8)).save(tmp_path / "a.jpg", exif=exif)
    assert shape_of_folder(tmp_path) == (3, 12, 8)


def test_training_takes_the_shape_of_the_pictures_and_says_what_it_found(tmp_path, capsys):
    folder = write_pictures(tmp_path / "pictures", 12)
    code, _, err = run("fit", "--data", folder, *FIT, "--output", tmp_path / "m", capsys=capsys)
    assert (code, err) == (0, ["deq-ddim: 10 pictures to train on, 2 held out: 8x8 pixels, grey"])
    checkpoint = load_checkpoint(tmp_path / "m")
    assert (checkpoint.shape, len(checkpoint.images)) == ((1, 8, 8), 2)


@pytest.mark.parametrize(("size", "mode", "words"), [((9, 8), "L", "1 of 9x8 in grey"), ((8, 8), "RGB", "in colour")])
def test_a_mixture_is_refused_in_one_line_that_says_what_there_is(size, mode, words, tmp_path, capsys):
    folder = write_pictures(tmp_path / "pictures", 3)
    write(folder / "other.png", size, mode)
    code, _, err = run("fit", "--data", folder, *FIT, "--output", tmp_path / "m", capsys=capsys)
    assert (code, len(err)) == (2, 1)
    assert "3 of 8x8 in grey" in err[0]
    assert words in err[0]
    assert "--shape C H W" in err[0]
    assert not (tmp_path / "m").exists()


def test_a_file_that_is_no_picture_is_named(tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"a\.png: cannot be read as a picture"):
        shape_of_folder(tmp_path)


def test_a_training_that_is_done_says_so(tmp_path, capsys):
    argv = ["fit", "--data", write_pictures(tmp_path / "pictures"), *SMALL, "--steps", 2, "--output", tmp_path / "m"]
    assert run(*argv, capsys=capsys)[0] == 0
    code, _, err = run(*argv, capsys=capsys)
    assert (code, err[1]) == (0, f"deq-ddim: already done, nothing to train: {tmp_path / 'm'} has its 2 steps")


def test_the_distance_of_sampled_images_is_measured_in_the_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("diffusion.program.fitting._steps", lambda given, name: 2)
    monkeypatch.setattr("diffusion.program.fitting.SAMPLED_STEPS", 2)
    folder = write_pictures(tmp_path / "pictures", 40)
    argv = ["fit", "--data", folder, *SMALL[:-2], "--distance", 5, "--steps", 2, "--output", tmp_path / "m", "--json"]
    code, out, _ = run(*argv, capsys=capsys)
    distance = json.loads(out)["distance"]
    assert code == 0
    assert (distance["images"], distance["real_images"]) == (5, 4)
    assert distance["sampled"] > distance["real"] > 0
    again = json.loads(run(*argv, capsys=capsys)[1])["distance"]
    assert again == pytest.approx(distance, rel=1e-6)


@pytest.mark.parametrize("data", sorted(recipes.keys() - {"emoji"}))
def test_shipped_data_have_features_in_which_a_distance_is_measured(data, tmp_path, capsys, monkeypatch):
    if data.startswith("fashion") and not FASHION_FOLDER.is_dir():
        pytest.skip("Fashion-MNIST is not installed")
    monkeypatch.setattr("diffusion.program.fitting.SAMPLED_STEPS", 2)
    argv = ["fit", "--data", data, "--steps", 1, "--batch", 2, "--distance", 3, "--output", tmp_path / "m", "--json"]
    code, out, _ = run(*argv, capsys=capsys)
    assert (code, json.loads(out)["distance"]["images"]) == (0, 3)


@pytest.mark.skipif(not EMOJI_FONT.is_file(), reason="the Debian package fonts-noto-color-emoji is needed")
def test_data_without_shipped_features_get_a_classifier_of_their_own(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("diffusion.program.fitting._steps", lambda given, name: 2)
    monkeypatch.setattr("diffusion.program.fitting.SAMPLED_STEPS", 2)
    argv = ["fit", "--data", "emoji", "--steps", 1, "--batch", 2, "--distance", 3, "--output", tmp_path / "m", "--json"]
    code, out, _ = run(*argv, capsys=capsys)
    assert (code, json.loads(out)["distance"]["images"]) == (0, 3)
    assert (tmp_path / "m" / "features.safetensors").is_file()


def test_pictures_without_a_distance_still_train(tmp_path, capsys):
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 12), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    code, out, err = run("fit", "--data", tmp_path, *FIT[:4], "-o", tmp_path / "m", "--json", capsys=capsys)
    assert (code, json.loads(out)["distance"]) == (0, None)
    assert err[-1].startswith("deq-ddim: no distance: data: square images")


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_a_model_is_trained_where_it_is_asked_for(device, tmp_path):
    from diffusion import fit

    trained = fit(torch.zeros(4, 1, 8, 8), tmp_path, steps=1, batch=2, device=device)
    assert trained.training["steps_done"] == 1


def test_every_picture_that_is_named_is_inverted(tmp_path, capsys):
    first, second = write_pictures(tmp_path / "a", count=10), write_pictures(tmp_path / "b", count=2)
    argv = ["invert", "--steps", 3, "--method", "ddim", "--no-pictures", "--json"]
    code, out, _ = run(*argv, "--images", first, "--output", tmp_path / "folder", capsys=capsys)
    assert code == 0
    assert len(json.loads(out)["loss"]) == 10
    code, out, _ = run(*argv, "--images", first / "0.png", second, "--output", tmp_path / "several", capsys=capsys)
    assert json.loads(out)["names"] == ["0-png", "0-png-2", "1"]
    code, out, _ = run(*argv, "--images", first, "--count", 4, "--output", tmp_path / "four", capsys=capsys)
    assert len(json.loads(out)["loss"]) == 4
