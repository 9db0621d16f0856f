"""From pictures to latents, to edited latents, to images again; and what a folder says when all is there already."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from program import run, write_pictures
from safetensors.torch import load_file, save_file

from diffusion import load_checkpoint, sample
from diffusion.program.editing import spherical
from diffusion.program.images import image_files
from diffusion.program.latents import names_of, read_latents

CHAIN = ["--steps", 6, "--spacing", "quadratic"]


@pytest.fixture
def inverted(tmp_path, capsys):
    """Two pictures inverted by one pass: the folder."""
    pictures = write_pictures(tmp_path / "pictures", 2)
    argv = ["invert", "--images", pictures, *CHAIN, "--method", "ddim", "--output", tmp_path / "inverted"]
    assert run(*argv, capsys=capsys)[0] == 0
    return tmp_path / "inverted"


def test_latents_that_were_found_are_sampled_on_their_own_chain_under_their_names(inverted, tmp_path, capsys):
    argv = ["sample", "--latents", inverted, "--method", "sequential", "--output", tmp_path / "out", "--json"]
    code, out, _ = run(*argv, capsys=capsys)
    summary = json.loads(out)
    assert (code, summary["steps"], summary["names"]) == (0, 6, ["0", "1"])
    for name in ("0", "1"):
        again = np.asarray(Image.open(tmp_path / "out" / "images" / f"{name}.png"))
        assert (again == np.asarray(Image.open(inverted / "images" / f"{name}.png"))).all()


def test_latents_of_another_model_and_eta_are_sampled_with_these(tmp_path, capsys):
    first, again, other = (tmp_path / name for name in ("first", "again", "other"))
    argv = ["sample", "--steps", 4, "--method", "sequential", "--no-pictures"]
    assert run(*argv, "--model", "fashion", "--count", 1, "--eta", 1, "-o", first, capsys=capsys)[0] == 0
    argv = ["sample", "--method", "sequential", "--no-pictures", "--latents", first]
    assert run(*argv, "-o", again, capsys=capsys)[0] == 0
    images = [load_file(folder / "samples.safetensors")["x_0"] for folder in (first, again)]
    assert torch.equal(*images)
    code, _, err = run(*argv, "--eta", 0, "-o", other, capsys=capsys)
    assert code == 0
    assert any("the latents are of eta 1.0: with 0.0" in line for line in err)


def test_a_walk_between_two_latents_has_them_at_its_ends(inverted, tmp_path, capsys):
    argv = ["edit", "--latents", inverted, "--between", "0", "1", "--count", 3, "-o", tmp_path / "walk"]
    assert run(*argv, capsys=capsys)[0] == 0
    walk, found = read_latents(str(tmp_path / "walk")), read_latents(str(inverted))
    torch.testing.assert_close(walk.x_T[[0, -1]], found.x_T[[0, 1]], rtol=0, atol=1e-6)
    assert walk.names == ["0-1-01", "0-1-02", "0-1-03"]
    assert walk.chain == found.chain == {"model": "digits", "steps": 6, "spacing": "quadratic", "eta": 0.0}
    assert run("sample", "--latents", tmp_path / "walk", "-o", tmp_path / "s", capsys=capsys)[0] == 0
    assert (tmp_path / "s" / "images" / "0-1-02.png").is_file()


def test_a_variant_is_turned_by_its_share_of_the_way_to_a_fresh_latent(inverted, tmp_path, capsys):
    argv = ["edit", "--latents", inverted / "inversion.safetensors", "--vary", 0.25, "--count", 2, "-o", tmp_path / "v"]
    assert run(*argv, capsys=capsys)[0] == 0
    varied, found = read_latents(str(tmp_path / "v")), read_latents(str(inverted))
    assert varied.names == ["0-01", "0-02", "1-01", "1-02"]
    fresh = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    def angle(a, b):
        return float(((a * b).sum() / (a.norm() * b.norm())).acos())

    assert angle(varied.x_T[0], found.x_T[0]) == pytest.approx(angle(found.x_T[0], fresh[0]) / 4, rel=1e-3)


def test_the_sphere_between_two_latents_keeps_their_length():
    a, b = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])
    half = spherical(a, b, torch.tensor([0.5]))
    torch.testing.assert_close(half, torch.full((1, 2), math.sqrt(2)))


def test_another_chain_than_that_of_the_latents_is_warned_of(inverted, tmp_path, capsys):
    argv = ["sample", "--latents", inverted, "--steps", 5, "--no-pictures", "-o", tmp_path / "out"]
    code, _, err = run(*argv, capsys=capsys)
    assert (code, len(err)) == (0, 1)
    assert "the latents are of steps 6: with 5" in err[0]


def test_latents_of_another_shape_are_refused(tmp_path, capsys):
    save_file({"x_T": torch.zeros(1, 3, 8, 8)}, tmp_path / "x.safetensors")
    code, _, err = run("sample", "--latents", tmp_path / "x.safetensors", "-o", tmp_path / "out", capsys=capsys)
    assert (code, len(err)) == (2, 1)
    assert "(1, 8, 8), are required, got (3, 8, 8)" in err[0]


@pytest.mark.parametrize(
    "value", [torch.zeros(2, 8), torch.full((1, 1, 8, 8), torch.nan), torch.ones(1, 1, 8, 8).int()]
)
def test_a_file_without_latents_is_refused(value, tmp_path, capsys):
    save_file({"x_T": value}, tmp_path / "x.safetensors")
    code, _, err = run("edit", "--latents", tmp_path / "x.safetensors", "--vary", 0.1, capsys=capsys)
    assert (code, len(err)) == (2, 1)
    assert "x_T (n, C, H, W)" in err[0]


def test_a_name_that_no_latent_has_is_refused(inverted, capsys):
    code, _, err = run("edit", "--latents", inverted, "--between", "0", "cat", capsys=capsys)
    assert code == 2
    assert "--between cat: a number from 1 to 2 is required, or one of 0, 1" in err[0]


def test_an_inversion_that_is_done_says_so_and_computes_nothing(tmp_path, capsys, monkeypatch):
    argv = ["invert", "--steps", 4, "--count", 1, "--method", "ddim", "--no-pictures", "--output", tmp_path]
    assert run(*argv, capsys=capsys)[0] == 0
    monkeypatch.setattr("diffusion.program.inversion.invert", None)
    code, out, err = run(*argv, capsys=capsys)
    assert (code, len(err)) == (0, 1)
    assert err[0] == f"deq-ddim: already done, nothing to compute: {tmp_path} holds 1 latent"
    assert out.startswith("1 image, digits, T = 4, ddim\n")


def test_the_error_and_the_rounds_of_an_inversion_can_be_set(tmp_path, capsys):
    argv = ["invert", "--steps", 20, "--count", 1, "--no-pictures", "--json"]
    code, out, _ = run(*argv, "--error", 1e-2, "-o", tmp_path / "rough", capsys=capsys)
    rough = json.loads(out)
    assert (code, rough["status"]) == (0, ["CONVERGED"])
    code, out, err = run(*argv, "--max-rounds", 3, "-o", tmp_path / "few", capsys=capsys)
    few = json.loads(out)
    assert (code, few["rounds"], few["status"]) == (0, 3, ["MAX_STEPS"])
    assert "1 of 1 image missed the error asked for" in err[0]
    assert rough["loss"][0] < few["loss"][0]


def test_what_is_overwritten_leaves_no_image_of_the_earlier_run(tmp_path, capsys):
    argv = ["sample", "--steps", 3, "--method", "sequential", "-o", tmp_path]
    assert run(*argv, "--count", 3, capsys=capsys)[0] == 0
    (tmp_path / "images" / "mine.png").touch()
    code, _, err = run(*argv, "--count", 2, capsys=capsys)
    assert code == 2
    assert "--overwrite replaces it" in err[0]
    assert run(*argv, "--count", 2, "--overwrite", capsys=capsys)[0] == 0
    assert {file.name for file in (tmp_path / "images").iterdir()} == {"01.png", "02.png", "mine.png"}


def test_an_inversion_seen_again_without_pictures_keeps_those_it_drew(inverted, tmp_path, capsys):
    argv = ["invert", "--images", tmp_path / "pictures", *CHAIN, "--method", "ddim", "--output", inverted]
    assert run(*argv, "--no-pictures", capsys=capsys)[0] == 0
    assert {file.name for file in (inverted / "images").iterdir()} == {"0.png", "1.png"}


def test_a_file_in_the_place_of_the_images_is_found_out_before_the_work(tmp_path, capsys, monkeypatch):
    (tmp_path / "images").write_text("mine")
    monkeypatch.setattr("diffusion.program.commands.sample", None)
    code, _, err = run("sample", "--output", tmp_path, capsys=capsys)
    assert (code, len(err)) == (2, 1)
    assert "images is the name of a folder to write" in err[0]


def test_a_chain_that_is_no_chain_is_left_out(tmp_path):
    header = {"settings": json.dumps({"model": 3, "steps": "ten", "spacing": "quadratic"}), "names": "[1]"}
    save_file({"x_T": torch.ones(1, 1, 8, 8)}, tmp_path / "x.safetensors", header)
    latents = read_latents(str(tmp_path / "x.safetensors"))
    assert (latents.chain, latents.names) == ({"spacing": "quadratic"}, ["01"])


def test_pictures_that_differ_in_their_suffix_alone_keep_it_in_their_names(tmp_path):
    files = [tmp_path / name for name in ("a.png", "a.jpg", "b.png")]
    assert names_of(files) == ["a-png", "a-jpg", "b"]


def test_every_image_has_a_file_of_its_own_whatever_its_name():
    files = image_files(["a b", "a/b", "../x", "", "é", "n" * 300])
    assert files == ["images/a-b.png", "images/a-b-2.png", "images/-x.png", "images/image.png", "images/é.png",
                     f"images/{'n' * 60}.png"]  # fmt: skip


def test_a_latent_without_a_direction_is_not_edited(tmp_path, capsys):
    save_file({"x_T": torch.zeros(1, 1, 8, 8)}, tmp_path / "x.safetensors")
    code, _, err = run("edit", "--latents", tmp_path / "x.safetensors", "--vary", 0.1, capsys=capsys)
    assert (code, len(err)) == (2, 1)
    assert "length 0" in err[0]


def test_called_bare_it_helps(capsys):
    code, out, err = run(capsys=capsys)
    assert (code, err) == (0, [])
    assert "examples:" in out


def test_a_shell_completes_commands_and_options(capsys):
    pytest.importorskip("shtab")
    code, out, _ = run("--completion", "bash", capsys=capsys)
    assert code == 0
    assert "_shtab_deq_ddim" in out
    assert "--max-rounds" in out


def test_completion_without_its_package_is_one_line(capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "shtab", None)
    code, _, err = run("--completion", "bash", capsys=capsys)
    assert (code, len(err)) == (2, 1)
    assert "pip install 'pydeqsolve[completion]'" in err[0]


def test_sampled_images_are_written_at_their_own_size(tmp_path, capsys):
    assert run("sample", "--steps", 3, "--count", 1, "--method", "sequential", "-o", tmp_path, capsys=capsys)[0] == 0
    x_0 = load_file(tmp_path / "samples.safetensors")["x_0"][0, 0]
    pixels = np.asarray(Image.open(tmp_path / "images" / "01.png"))
    assert pixels.shape == load_checkpoint("digits").shape[1:]
    assert np.abs(pixels - (x_0.clamp(-1, 1).numpy() + 1) * 127.5).max() <= 0.5


@pytest.fixture
def mapped(tmp_path, capsys):
    """Two pictures inverted by noise maps: the folder, and the pictures'."""
    pictures = write_pictures(tmp_path / "pictures", 2)
    argv = ["invert", "--images", pictures, "--steps", 6, "--method", "ddpm", "--output", tmp_path / "maps"]
    assert run(*argv, capsys=capsys)[0] == 0
    return tmp_path / "maps", pictures


@pytest.mark.parametrize("method", ["sequential", "parallel"])
def test_noise_maps_that_were_found_are_added_again(mapped, method, tmp_path, capsys):
    folder, pictures = mapped
    assert read_latents(str(folder)).chain == {"model": "digits", "steps": 6, "spacing": "quadratic", "eta": 1.0}
    argv = ["sample", "--latents", folder, "--method", method, "--error", 1e-6, "--output", tmp_path / "out"]
    argv = argv[:5] + argv[7:] if method == "sequential" else argv
    assert run(*argv, capsys=capsys)[0] == 0
    for name in ("0", "1"):
        again, given = (np.asarray(Image.open(p).convert("L"), int) for p in
                        (tmp_path / "out" / "images" / f"{name}.png", pictures / f"{name}.png"))  # fmt: skip
        assert np.abs(again - given).max() <= 1
    again = load_file(tmp_path / "out" / "samples.safetensors")
    assert torch.equal(again["noises"], load_file(folder / "inversion.safetensors")["done.noises"])


def test_noise_maps_are_walked_and_varied_with_their_latents(mapped, tmp_path, capsys):
    folder, _ = mapped
    found = read_latents(str(folder))
    argv = ["edit", "--latents", folder, "--between", "0", "1", "--count", 3, "--output", tmp_path / "walk"]
    assert run(*argv, capsys=capsys)[0] == 0
    walk = read_latents(str(tmp_path / "walk"))
    torch.testing.assert_close(walk.noises[[0, -1]], found.noises, rtol=0, atol=1e-6)
    assert run("edit", "--latents", folder, "--vary", 0.1, "-o", tmp_path / "v", capsys=capsys)[0] == 0
    varied = read_latents(str(tmp_path / "v"))
    assert varied.noises.shape == (8, 6, 1, 8, 8)
    assert run("sample", "--latents", tmp_path / "v", "-o", tmp_path / "s", "--no-pictures", capsys=capsys)[0] == 0


def test_noise_maps_need_as_many_steps_as_they_have(mapped, tmp_path, capsys):
    code, _, err = run("sample", "--latents", mapped[0], "--steps", 7, "-o", tmp_path / "out", capsys=capsys)
    assert (code, len(err)) == (2, 1 + any("warning" in line for line in err))
    assert "--steps: 6, as many as the latents have noise maps, is required, got 7" in err[-1]


def test_an_inversion_by_noise_maps_goes_on_where_it_stopped(tmp_path, capsys):
    argv = ["invert", "--steps", 4, "--count", 3, "--batch", 2, "--method", "ddpm", "--no-pictures", "-o"]
    assert run(*argv, tmp_path / "whole", capsys=capsys)[0] == 0
    assert run(*argv, tmp_path / "whole", "--seed", 1, capsys=capsys)[0] == 2  # another result
    code, _, err = run(*argv, tmp_path / "whole", capsys=capsys)
    assert code == 0
    assert "already done" in err[0]
    tensors = load_file(tmp_path / "whole" / "inversion.safetensors")
    assert tensors["done.noises"].shape == (3, 4, 1, 8, 8)
    assert tensors["done.loss"].max() < 1e-12


@pytest.mark.parametrize("method", ["ddim", "exact"])
def test_a_pair_of_states_that_was_found_is_sampled_and_walked(method, tmp_path, capsys):
    pictures = write_pictures(tmp_path / "pictures", 2)
    argv = ["invert", "--images", pictures, "--steps", 12, "--rule", "belm", "--method", method]
    code, out, _ = run(*argv, "-o", tmp_path / "inverted", "--json", capsys=capsys)
    assert (code, json.loads(out)["settings"]["rule"]) == (0, "belm")
    found = read_latents(str(tmp_path / "inverted"))
    assert found.chain["rule"] == "belm"
    assert found.second.shape == (2, 1, 8, 8)
    argv = ["edit", "--latents", tmp_path / "inverted", "--between", "0", "1", "--count", 3, "-o", tmp_path / "walk"]
    assert run(*argv, capsys=capsys)[0] == 0
    argv = ["sample", "--latents", tmp_path / "walk", "--method", "sequential", "-o", tmp_path / "out"]
    assert run(*argv, capsys=capsys)[0] == 0
    for name, own in (("0-1-01", "0"), ("0-1-03", "1")):
        again, given = (np.asarray(Image.open(p).convert("L"), int) for p in
                        (tmp_path / "out" / "images" / f"{name}.png", pictures / f"{own}.png"))  # fmt: skip
        assert np.abs(again - given).max() <= 1
    assert run("edit", "--latents", tmp_path / "inverted", "--vary", 0.1, "-o", tmp_path / "v", capsys=capsys)[0] == 0
    assert read_latents(str(tmp_path / "v")).second is None


def test_images_are_sampled_by_the_multistep_rule(tmp_path, capsys):
    argv = ["sample", "--steps", 8, "--count", 1, "--rule", "dpmsolver++2m", "--method", "sequential", "--no-pictures"]
    assert run(*argv, "-o", tmp_path, capsys=capsys)[0] == 0
    digits, got = load_checkpoint("digits"), load_file(tmp_path / "samples.safetensors")
    chain = digits.schedule.chain(8, "quadratic", rule="dpmsolver++2m")
    with torch.no_grad():
        expected = sample(digits.model, got["x_T"], chain, "sequential", prediction=digits.prediction).x_0
    torch.testing.assert_close(got["x_0"], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["invert", "--rule", "dpmsolver++2m"], "--rule dpmsolver++2m: inverted by --method naive, got exact"),
        (["invert", "--rule", "belm", "--method", "deq"], "--rule belm: inverted by --method exact or ddim, got deq"),
        (["invert", "--eta", "0.5"], "--eta: of ddpm, got --method exact"),
        (["invert", "--method", "ddpm", "--eta", "0"], "a number above 0, to 1, is required, got 0"),
        (["invert", "--method", "ddpm", "--rule", "belm"], "--rule belm: inverted by --method exact or ddim, got ddpm"),
        (["sample", "--rule", "belm", "--eta", "1"], "'belm' has neither fresh noise nor clipping"),
        (["sample", "--rule", "beml"], "did you mean belm?"),
    ],
)  # fmt: skip
def test_a_rule_or_noise_that_does_not_go_together_is_one_line(argv, words, tmp_path, capsys):
    code, _, err = run(*argv, "-o", tmp_path, capsys=capsys)
    assert (code, len(err)) == (2, 1)
    assert words in err[0]


@pytest.mark.parametrize("command", [["sample", "--method", "sequential"], ["invert", "--method", "ddim"]])
def test_the_shipped_models_chains_are_quadratic_unless_told_otherwise_and_the_latents_say_so(
    command, tmp_path, capsys
):
    argv = [*command, "--count", 1, "--steps", 5, "--no-pictures", "--output"]
    assert run(*argv, tmp_path / "usual", capsys=capsys)[0] == 0
    assert run(*argv, tmp_path / "even", "--spacing", "linspace", capsys=capsys)[0] == 0
    usual, even = (read_latents(str(tmp_path / name)) for name in ("usual", "even"))
    assert (usual.chain["spacing"], even.chain["spacing"]) == ("quadratic", "linspace")
    images = []
    for name in ("usual", "even"):
        argv = ["sample", "--latents", tmp_path / name, "--method", "sequential", "--no-pictures", "-o"]
        assert run(*argv, tmp_path / f"{name}-again", capsys=capsys)[0] == 0
        got, digits = load_file(tmp_path / f"{name}-again" / "samples.safetensors"), load_checkpoint("digits")
        chain = digits.schedule.chain(5, "quadratic" if name == "usual" else "linspace")
        with torch.no_grad():
            expected = sample(digits.model, got["x_T"], chain, "sequential", prediction=digits.prediction).x_0
        images.append(got["x_0"])
        torch.testing.assert_close(got["x_0"], expected, rtol=0, atol=1e-6)
    assert not torch.equal(*images)
