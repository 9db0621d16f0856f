"""Inversion and training that are interrupted: what is kept, and that the same command ends with the same result."""

import json
import signal

import pytest
import torch
from program import SMALL, program, run, signal_when, write_pictures
from safetensors.torch import load_file

from diffusion import Descent, Schedule, Sequential, invert
from diffusion.models.files import read_tensors, write_tensors
from diffusion.models.unet import UNet
from diffusion.program.record import Record

RATE = ("--lr", "0.1")
DESCENT = ["invert", "--method", "deq", "--steps", "8", "--count", "3", "--batch", "2", "--lr", "0.1", "--no-pictures"]

# A shell that runs the tests in the background has them, and their children, ignore Ctrl-C.
INTERRUPTIBLE = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from diffusion.program.cli import main; sys.exit(main(sys.argv[1:]))"
)


def assert_same_tensors(first, second):
    first, second = load_file(first), load_file(second)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value.nan_to_num(-1.0), second[name].nan_to_num(-1.0)), name


def test_an_interrupted_inversion_goes_on_to_the_same_result(tmp_path, capsys):
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    argv = [*DESCENT, "--epochs", "150", "--threads", "1"]
    process = program("-c", INTERRUPTIBLE, *argv, "--output", cut)
    err = signal_when(process, (cut / "inversion.safetensors").exists, signal.SIGINT)
    assert process.returncode == 130
    assert len(err) == 1
    assert err[0].startswith("deq-ddim: interrupted after 0 of 3 images and ")
    assert "the same command goes on" in err[0]
    assert json.loads((cut / "inversion.json").read_text())["complete"] is False
    assert 0 < len(load_file(cut / "inversion.safetensors")["state.history"]) < 150

    code, _, err = run(*argv, "--output", cut, capsys=capsys)
    assert code == 0
    assert "goes on after 0 of 3 images" in err[0]
    assert run(*argv, "--output", whole, capsys=capsys)[0] == 0
    assert_same_tensors(cut / "inversion.safetensors", whole / "inversion.safetensors")
    first, second = (json.loads((folder / "inversion.json").read_text()) for folder in (cut, whole))
    assert {**first, "seconds": 0, "output": ""} == {**second, "seconds": 0, "output": ""}


@pytest.mark.parametrize("method", ["naive", "deq", "ddim", "exact"])
def test_an_inversion_interrupted_anywhere_goes_on_to_the_same_result(method, tmp_path, capsys, monkeypatch):
    own = [*DESCENT, "--epochs", "4"] if method in ("naive", "deq") else [word for word in DESCENT if word not in RATE]
    argv = [*own, "--method", method]
    forward, calls = UNet.forward, []

    def counted(self, x, t):
        calls.append(1)
        if len(calls) in stops:
            raise KeyboardInterrupt
        return forward(self, x, t)

    monkeypatch.setattr(UNet, "forward", counted)
    stops = set()
    assert run(*argv, "--output", tmp_path / "whole", capsys=capsys)[0] == 0
    total = len(calls)
    calls.clear()
    stops = {total // 5, total // 2, total * 4 // 5}  # calls of the interrupted runs count as well
    codes = [run(*argv, "--output", tmp_path / "cut", capsys=capsys)[0] for _ in range(4)]
    assert codes == [130, 130, 130, 0]
    assert_same_tensors(tmp_path / "cut" / "inversion.safetensors", tmp_path / "whole" / "inversion.safetensors")


def test_a_later_batch_goes_on_from_its_own_epochs(tmp_path, capsys, monkeypatch):
    forward, calls = UNet.forward, []

    def single(self, x, t):  # the chain of 8 steps is called on one image in the second batch, on two in the first
        calls.append(len(x) == 1)
        if sum(calls) == 8 * 4 + 3:
            raise KeyboardInterrupt
        return forward(self, x, t)

    monkeypatch.setattr(UNet, "forward", single)
    argv = [*DESCENT, "--epochs", "6", "--method", "naive", "--output", tmp_path]
    _, _, err = run(*argv, capsys=capsys)
    assert "after 2 of 3 images and 4 epochs" in err[-1]
    calls.clear()
    calls.append(8 * 4 + 3)
    assert run(*argv, "--no-pictures", capsys=capsys)[0] == 0
    assert sum(calls[1:]) == 8 * 2 + 8  # two epochs, and the sampling that measures the loss


def test_a_finished_inversion_is_not_repeated(tmp_path, capsys, monkeypatch):
    argv = [*DESCENT, "--epochs", "2", "--output", tmp_path]
    assert run(*argv, capsys=capsys)[0] == 0
    before = (tmp_path / "inversion.safetensors").read_bytes()
    monkeypatch.setattr(UNet, "forward", None)
    assert run(*argv, capsys=capsys)[0] == 0
    assert (tmp_path / "inversion.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    "change", [("--steps", "9"), ("--seed", "1"), ("--lr", "0.2"), ("--method", "naive"), ("--count", "2")]
)
def test_other_settings_are_refused_unless_asked_to_restart(change, tmp_path, capsys):
    argv = [*DESCENT, "--epochs", "1", "--output", tmp_path]
    assert run(*argv, capsys=capsys)[0] == 0
    before = (tmp_path / "inversion.safetensors").read_bytes()
    code, _, err = run(*argv, *change, capsys=capsys)
    assert (code, len(err)) == (2, 1)
    assert f"{change[0][2:] if change[0] != '--count' else 'images'} = " in err[0]
    assert "--restart" in err[0]
    assert (tmp_path / "inversion.safetensors").read_bytes() == before
    assert run(*argv, *change, "--restart", capsys=capsys)[0] == 0


PIXELS = torch.zeros(3, 1, 2, 2)


def record_of(folder, change):
    """A record of two of three images and of the third one's state, its tensors and header changed; its bytes."""
    record = Record(folder, {"method": "naive"}, first=2, seconds=1.5)
    record.done = {
        "x_T": torch.zeros(2, 1, 2, 2), "loss": torch.ones(2).double(), "status": torch.tensor([1, 1]),
        "typicality": torch.ones(2).double(), "rounds": torch.tensor([9, 9]), "evaluations": torch.tensor([9, 9]),
        "history": torch.ones(2, 3).double(),
    }  # fmt: skip
    record.state = {"x_T": torch.zeros(1, 4).double(), "history": torch.ones(2, 1).double()}
    record.save()
    tensors, header = read_tensors(folder / "inversion.safetensors")
    change(tensors, header)
    write_tensors(folder / "inversion.safetensors", tensors, header)
    return (folder / "inversion.safetensors").read_bytes()


def test_a_record_comes_back_from_its_file(tmp_path):
    record_of(tmp_path, lambda t, h: None)
    record = Record.open(tmp_path, {"method": "naive"}, PIXELS)
    assert (len(record), record.epochs, record.first, record.seconds) == (2, 2, 2, 1.5)


DAMAGES = {
    "no settings": (lambda t, h: h.pop("settings"), "not a JSON file"),
    "settings nested": (lambda t, h: h.update(settings="[" * 10**5), "nested too deeply"),
    "a setting more": (lambda t, h: h.update(settings='{"method": "naive", "x": 1}'), "x = 1 there, None here"),
    "no first": (lambda t, h: h.pop("first"), "first: "),
    "first of later": (lambda t, h: h.update(first="3"), "first: at most 2"),
    "first that is none": (lambda t, h: h.update(first="²"), "first: "),
    "seconds": (lambda t, h: h.update(seconds="nan"), "seconds: "),
    "seconds of words": (lambda t, h: h.update(seconds="soon"), "seconds: "),
    "no status": (lambda t, h: t.pop("done.status"), r"no tensor done\.status"),
    "no losses": (lambda t, h: t.pop("done.loss"), r"done\.\w+ .*required"),
    "one part more": (lambda t, h: t.update({"done.more": torch.zeros(2)}), r"done\.more is not known"),
    "another kind of part": (lambda t, h: t.update({"more": torch.zeros(2)}), "more is not known"),
    "fewer results": (lambda t, h: t.update({"done.rounds": torch.zeros(1).long()}), r"done\.rounds of shape \(2,\)"),
    "more images": (lambda t, h: t.update({"done.loss": torch.zeros(4).double()}), r"done\.loss of at most 3 images"),
    "other images": (
        lambda t, h: t.update({"done.x_T": torch.zeros(2, 1, 3, 2)}),
        r"done\.x_T of shape \(2, 1, 2, 2\)",
    ),
    "another dtype": (lambda t, h: t.update({"done.loss": torch.zeros(2)}), r"done\.loss of .*float64"),
    "unknown status": (lambda t, h: t["done.status"].fill_(77), r"done\.status: numbers of a Status"),
    "negative counts": (lambda t, h: t["done.evaluations"].neg_(), r"done\.evaluations: no less than 0"),
    "no history": (lambda t, h: t.pop("state.history"), r"state\.history of shape"),
}


@pytest.mark.parametrize(("change", "words"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_record_is_refused_by_part_and_left_as_it_is(change, words, tmp_path):
    before = record_of(tmp_path, change)
    with pytest.raises(ValueError, match=rf"{words}.*; --restart replaces it$"):
        Record.open(tmp_path, {"method": "naive"}, PIXELS)
    assert (tmp_path / "inversion.safetensors").read_bytes() == before
    assert len(Record.open(tmp_path, {"method": "naive"}, PIXELS, restart=True)) == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("N"), "N is missing"),
        (lambda s: s.pop("adam.exp_avg"), r"adam\.exp_avg is missing"),
        (lambda s: s.update(more=torch.zeros(1)), "more is not known"),
        (lambda s: s.update({"adam.more": torch.zeros(1)}), r"adam\.more is not known"),
        (lambda s: s.update(best=s["best"][:, :3]), r"best of shape \(2, 4\) is required, got \(2, 3\)"),
        (lambda s: s.update(history=s["history"][:, :1]), r"history of shape \(1, 2\)"),
        (lambda s: s.update(x_T=s["x_T"].float()), "x_T of torch.float64 is required, got torch.float32"),
        (lambda s: s.update(rounds=4), "rounds: a tensor is required"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_by_part(change, words):
    chain, x_0 = Schedule.cosine(9).chain(3), torch.zeros(2, 1, 2, 2)
    one, two = (Descent(Sequential(), epochs=count) for count in (1, 2))
    state = invert(lambda x, t: 0.1 * x, x_0, chain, one).state
    assert invert(lambda x, t: 0.1 * x, x_0, chain, two, state=state).history.shape == (2, 2)
    change(state)
    with pytest.raises(ValueError, match=f"state: {words}"):
        invert(lambda x, t: 0.1 * x, x_0, chain, two, state=state)


def test_a_state_without_a_part_is_refused_in_one_line(tmp_path, capsys, monkeypatch):
    argv = [*DESCENT, "--epochs", "2", "--method", "naive", "--output", tmp_path]
    forward, calls = UNet.forward, []

    def counted(self, x, t):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return forward(self, x, t)

    monkeypatch.setattr(UNet, "forward", counted)
    assert run(*argv, capsys=capsys)[0] == 130
    file = tmp_path / "inversion.safetensors"
    tensors, header = read_tensors(file)
    tensors.pop("state.best")
    write_tensors(file, tensors, header)
    before = file.read_bytes()
    code, _, err = run(*argv, capsys=capsys)
    assert (code, err[-1]) == (2, f"deq-ddim: error: {file}: state: best is missing; --restart replaces it")
    assert file.read_bytes() == before


def test_a_damaged_state_of_training_is_refused_in_one_line(tmp_path, capsys):
    argv = ["fit", "--data", write_pictures(tmp_path / "pictures"), *SMALL, "--steps", 2]
    state = tmp_path / "m" / "training" / "state.safetensors"
    state.parent.mkdir(parents=True)
    state.write_bytes(b"mine")
    code, _, err = run(*argv, "--output", tmp_path / "m", capsys=capsys)
    assert (code, len(err)) == (2, 2)
    assert "state.safetensors: not a whole safetensors file" in err[1]
    assert "--restart replaces it" in err[1]
    assert state.read_bytes() == b"mine"


def test_a_damaged_record_is_refused(tmp_path, capsys):
    argv = [*DESCENT, "--epochs", "1", "--output", tmp_path]
    assert run(*argv, capsys=capsys)[0] == 0
    file = tmp_path / "inversion.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    code, _, err = run(*argv, capsys=capsys)
    assert (code, len(err)) == (2, 1)
    assert "--restart" in err[0]


def test_an_interrupted_training_goes_on_to_the_same_result(tmp_path, capsys):
    argv = [
        "fit", "--data", write_pictures(tmp_path / "pictures"), *SMALL, "--steps", 120, "--save-every", 3,
    ]  # fmt: skip
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    process = program("-c", INTERRUPTIBLE, *argv, "--threads", "1", "--output", cut)
    err = signal_when(process, (cut / "training" / "state.safetensors").exists, signal.SIGINT)
    assert process.returncode == 130
    assert len(err) == 2
    assert err[1].startswith("deq-ddim: interrupted after ")
    steps = json.loads((cut / "config.json").read_text())["training"]["steps_done"]
    assert f" {steps} steps" in err[1]
    assert 3 <= steps < 120

    for folder in (cut, whole):
        assert run(*argv, "--output", folder, capsys=capsys)[0] == 0
    assert_same_tensors(cut / "model.safetensors", whole / "model.safetensors")
    code, _, err = run(*argv[:-1], 4, "--output", cut, "--seed", 3, capsys=capsys)
    assert (code, len(err)) == (2, 2)
    assert "--restart" in err[1]
