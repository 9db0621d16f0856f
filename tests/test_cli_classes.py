"""Class-conditional models in the shell: labels, guidance, and what is refused."""

import json

import pytest
import torch
from program import run
from safetensors import safe_open
from safetensors.torch import load_file

from diffusion import Guided, load_checkpoint, sample
from diffusion.models.unet import UNet
from diffusion.models.wrappers import DiffusersModel
from diffusion.program.latents import read_latents

STEPS = ["--steps", 4, "--method", "sequential", "--no-pictures"]


@pytest.fixture(scope="module")
def digits():
    return load_checkpoint("digit-classes")


@pytest.fixture
def maps(tmp_path, capsys):
    """Noise maps of two digits of the classes 6 and 9, at guidance 3: the folder."""
    argv = ["invert", "--model", "digit-classes", "--count", 2, "--label", 6, 9, "--guidance", 3, "--method", "ddpm"]
    assert run(*argv, "--steps", 4, "--no-pictures", "-o", tmp_path / "maps", capsys=capsys)[0] == 0
    return tmp_path / "maps"


def sampled(folder):
    return load_file(folder / "samples.safetensors")


@pytest.mark.parametrize("guidance", [1, 3])
def test_images_of_the_classes_asked_for_are_those_of_the_library(digits, guidance, tmp_path, capsys):
    argv = ["sample", "--model", "digit-classes", "--label", 3, 7, "none", "--guidance", guidance, "--seed", 5]
    code, out, _ = run(*argv, *STEPS, "-o", tmp_path, "--json", capsys=capsys)
    found, labels = sampled(tmp_path), torch.tensor([3, 7, 10])
    model = digits.model if guidance == 1 else Guided(digits.model, 3.0, digits.model.no_class)
    chain = digits.schedule.chain(4, "quadratic")
    with torch.no_grad():
        expected = sample(model, found["x_T"], chain, "sequential", inputs=(labels,)).x_0
    assert code == 0
    torch.testing.assert_close(found["x_0"], expected, rtol=0, atol=1e-4)
    assert json.loads(out)["labels"] == [3, 7, None]


def test_one_label_is_that_of_all_images_in_every_batch(digits, tmp_path, capsys):
    argv = ["sample", "--model", "digit-classes", "--label", 4, "--count", 3, "--batch", 2]
    assert run(*argv, *STEPS, "-o", tmp_path, capsys=capsys)[0] == 0
    found = sampled(tmp_path)
    with torch.no_grad():
        chain = digits.schedule.chain(4, "quadratic")
        expected = sample(digits.model, found["x_T"], chain, "sequential", inputs=(torch.full((3,), 4),)).x_0
    torch.testing.assert_close(found["x_0"], expected, rtol=0, atol=1e-4)


def test_guidance_leads_away_from_the_negative_label(digits, tmp_path, capsys):
    argv = ["sample", "--model", "digit-classes", "--label", 4, 4, "--guidance", 2, "--negative-label", 9]
    assert run(*argv, *STEPS, "-o", tmp_path, capsys=capsys)[0] == 0
    found = sampled(tmp_path)
    with torch.no_grad():
        model, chain = Guided(digits.model, 2.0, torch.tensor(9)), digits.schedule.chain(4, "quadratic")
        expected = sample(model, found["x_T"], chain, "sequential", inputs=(torch.tensor([4, 4]),)).x_0
    torch.testing.assert_close(found["x_0"], expected, rtol=0, atol=1e-4)


def test_noise_maps_give_the_pictures_back_by_the_classes_kept_with_them(digits, maps, tmp_path, capsys):
    assert run("sample", "--latents", maps, *STEPS[2:], "-o", tmp_path / "again", capsys=capsys)[0] == 0
    torch.testing.assert_close(sampled(tmp_path / "again")["x_0"], digits.images[:2], rtol=0, atol=1e-4)
    again = read_latents(str(tmp_path / "again"))
    assert (again.labels, again.chain["guidance"]) == ([6, 9], 3.0)


def test_noise_maps_are_inverted_batch_by_batch_by_their_own_classes(maps, tmp_path, capsys):
    argv = ["invert", "--model", "digit-classes", "--count", 2, "--guidance", 3, "--method", "ddpm", "--batch", 1]
    argv = [*argv, "--steps", 4, "--no-pictures", "--seed", 3]
    for name, labels in (("both", (6, 9)), ("swapped", (9, 6)), ("first", (6, 6))):
        assert run(*argv, "--label", *labels, "-o", tmp_path / name, capsys=capsys)[0] == 0
    both, swapped, first = (read_latents(str(tmp_path / name)).noises for name in ("both", "swapped", "first"))
    assert torch.equal(both[0], first[0])
    assert not torch.equal(both[1], first[1])
    assert not torch.equal(both[0], swapped[0])


def test_an_edit_asks_for_other_classes_of_the_same_latents(maps, tmp_path, capsys):
    argv = ["edit", "--latents", maps, "--label", 3, "none", "--guidance", 2, "-o", tmp_path / "edited"]
    assert run(*argv, capsys=capsys)[0] == 0
    edited, found = read_latents(str(tmp_path / "edited")), read_latents(str(maps))
    assert edited.names == ["01-3", "01-none", "02-3", "02-none"]
    assert (edited.labels, edited.chain["guidance"]) == ([3, None, 3, None], 2.0)
    assert torch.equal(edited.x_T, found.x_T[[0, 0, 1, 1]])
    assert torch.equal(edited.noises, found.noises[[0, 0, 1, 1]])
    own = ["sample", "--latents", maps, "--label", 3, "--guidance", 2, *STEPS[2:], "-o", tmp_path / "own"]
    assert run("sample", "--latents", tmp_path / "edited", *STEPS[2:], "-o", tmp_path / "s", capsys=capsys)[0] == 0
    assert run(*own, capsys=capsys)[0] == 0
    torch.testing.assert_close(sampled(tmp_path / "s")["x_0"][::2], sampled(tmp_path / "own")["x_0"], rtol=0, atol=1e-4)


def test_variants_keep_the_class_of_their_latent(maps, tmp_path, capsys):
    argv = ["edit", "--latents", maps, "--vary", 0.1, "--count", 2, "-o", tmp_path / "varied"]
    assert run(*argv, capsys=capsys)[0] == 0
    assert read_latents(str(tmp_path / "varied")).labels == [6, 6, 9, 9]


def test_a_walk_between_two_classes_needs_to_be_told_which(maps, tmp_path, capsys):
    argv = ["edit", "--latents", maps, "--between", 1, 2, "--count", 2, "-o", tmp_path / "walk"]
    code, _, err = run(*argv, capsys=capsys)
    assert (code, len(err)) == (2, 1)
    assert "--label: required, these two are of classes 6 and 9" in err[0]
    assert run(*argv, "--label", 6, 9, capsys=capsys)[0] == 0
    assert read_latents(str(tmp_path / "walk")).labels == [6, 9]


def test_an_inversion_under_another_class_is_another_inversion(maps, capsys):
    argv = ["invert", "--model", "digit-classes", "--count", 2, "--guidance", 3, "--method", "ddpm", "--steps", 4]
    code, _, err = run(*argv, "--label", 6, 8, "--no-pictures", "-o", maps, capsys=capsys)
    assert code == 2
    assert "labels = [6, 9] there, [6, 8] here" in err[0]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            ["sample", "--label", 3],
            "--label: a model with classes, such as digit-classes, is required",
        ),
        (["invert", "--label", 3], "--label: a model with classes"),
        (["sample", "--model", "digit-classes", "--label", 10], "--label: classes 0 … 9 of digit-classes are required"),
        (["sample", "--model", "digit-classes", "--label", 1, 2, "--count", 3], "--label: 1 or 3, one for each image"),
        (["sample", "--model", "digit-classes", "--label", "cat"], "a class by its number, from 0 on, or none"),
        (["sample", "--model", "digit-classes", "--guidance", 3], "--guidance: of a model by class, together with"),
        (["sample", "--model", "digit-classes", "--label", 1, "--guidance", "inf"], "a finite number is required"),
        (["sample", "--model", "digit-classes", "--label", 1, "--negative-label", 2], "--guidance other than 1"),
        (["sample", "--model", "digit-classes", "--label", 1, "--guidance", 2, "--negative-label", 11], "got 11"),
    ],
)
def test_wrong_classes_give_one_line_and_leave_nothing(argv, words, tmp_path, capsys):
    code, _, err = run(*argv, "-o", tmp_path / "out", capsys=capsys)
    assert (code, len(err)) == (2, 1)
    assert words in err[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "one of --between, --vary, --label and --guidance is required"),
        (["--vary", 0.1, "--count", 1, "--label", 1, 2, 3], "--label: 1 or 2, one for each latent"),
        (["--label", 1, "--count", 3], "--count: of --between and --vary"),
    ],
)
def test_an_edit_by_class_refuses_what_it_has_no_use_for(options, words, maps, tmp_path, capsys):
    code, _, err = run("edit", "--latents", maps, *options, "-o", tmp_path / "out", capsys=capsys)
    assert (code, len(err)) == (2, 1)
    assert words in err[0]


def test_latents_of_classes_are_refused_by_a_model_without(maps, tmp_path, capsys):
    argv = ["sample", "--latents", maps, "--model", "digits", "--no-pictures", "-o", tmp_path / "out"]
    code, _, err = run(*argv, capsys=capsys)
    assert code == 2
    assert "--latents, which are of classes: a model with classes" in err[-1]


def test_labels_that_do_not_fit_the_latents_are_refused(maps):
    with safe_open(maps / "inversion.safetensors", "pt") as file:
        metadata = file.metadata()
    from safetensors.torch import save_file

    settings = json.loads(metadata["settings"])
    for labels in ([6], ["six", "nine"], [True, False], 6):
        metadata["settings"] = json.dumps({**settings, "labels": labels})
        save_file(load_file(maps / "inversion.safetensors"), maps / "latents.safetensors", metadata)
        with pytest.raises(ValueError, match="labels, one for each latent, are required"):
            read_latents(str(maps))


def test_a_folder_of_diffusers_with_classes_takes_labels_and_says_when_they_are_missing(tmp_path, capsys):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    down, up = ("DownBlock2D", "DownBlock2D"), ("UpBlock2D", "UpBlock2D")
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=down, up_block_types=up, num_class_embeds=4,
    )  # fmt: skip
    unet.save_pretrained(tmp_path / "unet")
    diffusers.DDIMScheduler(clip_sample=False).save_pretrained(tmp_path / "unet")
    argv = ["sample", "--model", tmp_path / "unet", *STEPS, "-o", tmp_path / "out"]
    for options, words in [
        ([], "--label: required by unet, classes 0 … 3"),
        (["--label", "none"], "--label none: unet does not say which of classes 0 … 3 stands for no class"),
        (["--label", 2, "--guidance", 2], "--negative-label: required for guidance"),
    ]:
        code, _, err = run(*argv, *options, capsys=capsys)
        assert code == 2
        assert words in err[-1]
    options = ["--label", 2, 0, "--guidance", 2, "--negative-label", 3]
    assert run(*argv, *options, capsys=capsys)[0] == 0
    checkpoint, found = load_checkpoint(tmp_path / "unet"), sampled(tmp_path / "out")
    assert isinstance(checkpoint.model, DiffusersModel)
    assert not isinstance(checkpoint.model, UNet)
    with torch.no_grad():
        model, chain = Guided(checkpoint.model, 2.0, torch.tensor(3)), checkpoint.schedule.chain(4)
        expected = sample(model, found["x_T"], chain, "sequential", inputs=(torch.tensor([2, 0]),)).x_0
    torch.testing.assert_close(found["x_0"], expected, rtol=0, atol=1e-4)
