"""The report: what it measures, that an interrupt loses no measurement, and what it writes."""

import json
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from program import kill_when, run

from diffusion import load_checkpoint, sample
from diffusion.models.checkpoint import SHIPPED
from diffusion.models.files import fingerprint, read_tensors, write_tensors
from diffusion.models.unet import UNet
from diffusion.program.cli import main
from diffusion.program.reproduction.figures import chain_residual, paper_states
from diffusion.program.reproduction.ledger import Ledger, Measurement
from diffusion.program.reproduction.page import power, short

SMALL = [
    "report", "--model", "digits", "--threads", 1, "--steps", 6, "--runs", 2, "--samples", 4, "--batch", 3,
    "--invert-steps", 4, "--images", 2, "--epochs", 2,
]  # fmt: skip


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A small report's folder and JSON."""
    folder = tmp_path_factory.mktemp("report")
    assert main([*map(str, SMALL), "--output", str(folder)]) == 0
    return folder, json.loads((folder / "report.json").read_text())


def test_the_residual_is_that_of_the_unsplit_chain():
    digits = load_checkpoint("digits")
    chain = digits.schedule.chain(5)
    x = torch.randn(2, 6, *digits.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    squares = torch.zeros(2, dtype=torch.float64)
    before = x[:, 0]
    with torch.no_grad():
        for k in range(5):  # Eq. 10, summed up step by step
            eps = digits.model(x[:, k].float(), chain.timesteps[k].expand(2)).double()
            before = chain.a[k] * before + chain.c[k] * eps
            squares += (before - x[:, k + 1]).square().flatten(1).sum(1)
    torch.testing.assert_close(chain_residual(digits, chain, x), squares.sqrt(), rtol=1e-5, atol=1e-5)


def test_the_residual_vanishes_at_the_sequential_chain():
    digits = load_checkpoint("digits")
    chain, x_T = digits.schedule.chain(8), torch.randn(2, *digits.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = sample(digits.model, x_T.double(), chain, method="sequential").trajectory
    assert chain_residual(digits, chain, exact).max() < 1e-4 * exact.flatten(1).norm(dim=1).min()


def test_states_shown_are_the_tenths_and_the_last_five():
    assert paper_states(50).tolist() == [*range(0, 50, 5), 46, 47, 48, 49, 50]
    assert paper_states(3).tolist() == [0, 1, 2, 3]


def test_the_tables_say_what_sampling_and_inverting_give(report):
    _, found = report
    (model,) = found["models"]
    rows = {row["method"]: row for row in model["table1"]["rows"]}
    assert [rows[way]["evaluations_per_image"] for way in ("DDPM", "DDIM")] == [6, 6]
    assert rows["parallel DDIM"]["error_max"] < 2e-3  # 1e-3 is asked for, and met by nearly all
    assert rows["parallel DDIM"]["distance"] == pytest.approx(rows["DDIM"]["distance"], rel=1e-2)
    assert {row["images"] for way, row in rows.items() if "D" in way} == {4}
    losses = {row["method"]: row["loss_median"] for row in model["table3"]}
    assert losses["exact"] < min(losses["naive"], losses["deq"])


def test_every_picture_is_written_and_lies_in_the_page(report):
    folder, found = report
    page = (folder / "report.html").read_text()
    assert sorted(found["files"]) == sorted(file.name for file in folder.iterdir() if file.is_file())
    pictures = [file for file in found["files"] if file.endswith(".png")]
    assert page.count("data:image/png;base64,") == len(pictures) == 3
    assert found["options"].startswith("deq-ddim report --threads 1 --model digits --steps 6")


def test_the_page_needs_no_other_file_and_is_well_formed(report):
    class Tags(HTMLParser):
        open_tags, links = [], []

        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "img", "br"):
                self.open_tags.append(tag)
            self.links += [value for key, value in attrs if key in ("src", "href")]

        def handle_endtag(self, tag):
            assert self.open_tags.pop() == tag

    parser = Tags()
    parser.feed((report[0] / "report.html").read_text())
    assert parser.open_tags == []
    assert all(link.startswith(("data:", "#")) for link in parser.links)


def test_a_finished_report_measures_nothing_again(report, capsys, monkeypatch):
    folder, found = report
    monkeypatch.setattr(UNet, "forward", None)
    code, out, err = run(*SMALL, "--output", folder, "--json", capsys=capsys)
    assert (code, err) == (0, [])
    again = json.loads(out)
    assert {**again, "seconds": 0} == {**found, "seconds": 0}


def test_other_settings_leave_what_was_measured_in_place(report, capsys):
    folder, _ = report
    before = {file for file in (folder / "measurements").rglob("*") if file.is_file()}
    _, _, err = run(*SMALL[:-1], 1, "--output", folder, capsys=capsys)
    assert err == [f"measuring digits-inversion-T4-{method}" for method in ("naive", "deq")]
    assert before < {file for file in (folder / "measurements").rglob("*") if file.is_file()}


def test_a_report_killed_on_the_way_goes_on_from_there(tmp_path, capsys):
    argv = [*SMALL[:-1], 40, "--output", tmp_path]
    kill_when(lambda: list(tmp_path.glob("measurements/*naive*/inversion.safetensors")), *argv)
    kept = {file: file.read_bytes() for file in (tmp_path / "measurements").glob("*.safetensors")}
    assert kept
    code, _, err = run(*argv[:-1], tmp_path, capsys=capsys)
    assert code == 0
    assert not [line for line in err if "figure" in line or "samples" in line]
    assert {file: file.read_bytes() for file in kept} == kept
    naive = json.loads((tmp_path / "report.json").read_text())["models"][0]["table3"][0]
    assert (naive["method"], naive["epochs"], naive["rounds"]) == ("naive", 40, 40 * 4)


def test_an_interrupt_is_one_line_that_says_where_the_measurements_are(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(UNet, "forward", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    code, _, err = run(*SMALL, "--output", tmp_path, capsys=capsys)
    assert code == 130
    assert f"kept in {tmp_path / 'measurements'}: the same command goes on" in err[-1]


def test_a_fingerprint_tells_apart_what_differs_in_one_bit_of_any_type():
    for dtype in (torch.float64, torch.bfloat16, torch.int64, torch.bool):
        x, y = torch.ones(3, dtype=dtype), torch.ones(3, dtype=dtype)
        assert fingerprint([x]) == fingerprint([y])
        y[2] = 0
        assert fingerprint([x]) != fingerprint([y])
    assert fingerprint([torch.tensor(1.0)]) == fingerprint([torch.tensor([1.0])])


def test_a_cut_measurement_is_made_again(tmp_path):
    ledger, calls = Ledger(tmp_path, {"version": 1}), []

    def measure():
        calls.append(1)
        return Measurement({"value": len(calls)}, {"x": torch.ones(2)})

    assert ledger.once("a", {"T": 1}, measure).facts == {"value": 1}
    assert ledger.once("a", {"T": 1}, measure).facts == {"value": 1}
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-3])
    assert ledger.once("a", {"T": 1}, measure).facts == {"value": 2}
    assert ledger.once("a", {"T": 2}, measure).facts == {"value": 3}
    assert Ledger(tmp_path, {"version": 2}).once("a", {"T": 1}, measure).facts == {"value": 4}


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, header: tensors.pop("x"),
        lambda tensors, header: tensors["x"].mul_(2),
        lambda tensors, header: tensors.update(y=torch.zeros(1)),
        lambda tensors, header: header.update(result='{"value": 7}'),
        lambda tensors, header: header.pop("result"),
        lambda tensors, header: header.pop("content"),
    ],
)
def test_a_measurement_that_was_changed_is_made_again(tmp_path, change, capsys):
    def measure():
        return Measurement({"value": 1}, {"x": torch.ones(2)})

    Ledger(tmp_path, {}).once("a", {}, measure)
    (path,) = tmp_path.iterdir()
    tensors, header = read_tensors(path)
    change(tensors, header)
    write_tensors(path, tensors, header)
    found = Ledger(tmp_path, {}).once("a", {}, measure)
    assert (found.facts, found.tensors["x"].tolist()) == ({"value": 1}, [1, 1])
    assert "warning" in capsys.readouterr().err


def write_images(folder, split):
    """The shipped digits as PNG files: by class and split, or side by side."""
    for i, image in enumerate(load_checkpoint("digits").images):
        name = "even" if i % 2 else "odd"
        place = folder / ("test" if i < 8 else "train") / name if split else folder
        place.mkdir(parents=True, exist_ok=True)
        pixels = ((image[0] + 1) * 127.5).round().numpy().astype(np.uint8)
        Image.fromarray(pixels).save(place / f"{i:02}.png")
    return folder


def write_diffusers_model(folder):
    """An untrained network in the layout of diffusers."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.mark.parametrize("own", [True, False], ids=["checkpoint, classes", "diffusers, no classes"])
def test_a_folder_of_real_images_and_a_model_give_the_same_report(own, tmp_path, capsys):
    folder = write_images(tmp_path / "data", split=own)
    model = SHIPPED / "digits" if own else write_diffusers_model(tmp_path / "unet")
    argv = [*SMALL, "--quick", "--dataset-folder", folder, "--output", tmp_path / "out", "--json"]
    argv[2] = model
    code, out, _ = run(*argv, capsys=capsys)
    (found,) = json.loads(out)["models"]
    assert code == 0
    assert found["name"] == model.name
    assert found["classifier"]["task"] == ("classes" if own else "rotations")
    assert found["table1"]["rows"][2]["error_max"] < 2e-3  # 1e-3 is asked for, and met by nearly all
    assert [row["images"] for row in found["table3"]] == [2, 2, 2]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--dataset-folder", "nowhere", "--model", "digits"], "nowhere: no such folder"),
        (["--dataset-folder", "nowhere"], "exactly one --model"),
        (["--model", "nowhere"], "nowhere"),
        (["--model", "emoji"], "required for emoji, which comes without features in which distances are measured"),
        (["--steps", "1001"], "got 1001"),
        (["--samples", "1"], "got 1"),
        (["--runs", "0"], "got 0"),
    ],
)
def test_bad_options_are_one_line_before_any_work(options, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(UNet, "forward", None)
    code, out, err = run("report", *options, capsys=capsys)
    assert (code, out, len(err)) == (2, "", 1)
    assert words in err[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1.234, "1.23"), (0.01234, "0.0123"), (12345.6, "12,346"), (1.2e-7, "1.2×10⁻⁷"), (None, "–")],
)
def test_numbers_are_written_to_be_read(value, text):
    assert short(value) == text


def test_powers_are_raised():
    assert power(-3.4e12) == "-3.4×10¹²"
