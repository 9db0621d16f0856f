"""Checkpoints that lie: refused by name with ValueError or FileNotFoundError, before memory is taken for them."""

import json
import os
import random
import struct

import pytest
import torch
from safetensors.torch import load_file

from diffusion.models.checkpoint import load_checkpoint, save_checkpoint, save_images
from diffusion.models.files import read_json, read_tensors, write_tensors
from diffusion.models.statistics import Statistics
from diffusion.models.unet import UNet
from diffusion.schedule import Schedule

SHAPE = (1, 4, 4)
ARGUMENTS = {"shape": SHAPE, "channels": 8, "multipliers": (1,), "blocks": (1,), "groups": 4, "embedding": 8}


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    images = torch.rand(9, *SHAPE) * 2 - 1
    model, folder = UNet(**ARGUMENTS, timesteps=10), tmp_path / "model"
    save_checkpoint(folder, model, Schedule.cosine(10), shape=SHAPE, statistics=Statistics.of(images))
    save_images(folder, images)
    return folder


def rewrite(folder, change=lambda tensors: None, **changes):
    """Change tensors, and the configuration in both places, so that only its content is wrong."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    write_tensors(folder / "model.safetensors", tensors, {"config": json.dumps(config)})


def architecture(**changes):
    return {"name": "UNet", "arguments": {**ARGUMENTS, "timesteps": 10, **changes}}


SIZES = {
    "a width of terabytes": ({"architecture": architecture(channels=2**20)}, r"model\.descent.* is required, got"),
    "a width beyond all numbers": ({"architecture": architecture(channels=10**30)}, "arguments of UNet"),
    "a billion blocks": ({"architecture": architecture(blocks=[10**9])}, "blocks: no more than the 2[0-9] tensors"),
    "many levels": (
        {"architecture": architecture(blocks=[1] * 500, multipliers=[1] * 500)},
        "blocks: no more",
    ),
    "a table of time steps": ({"architecture": architecture(timesteps=10**12)}, "timesteps: at most 100,000"),
    "an embedding": ({"architecture": architecture(embedding=2**20)}, r"model\.embed.* is required"),
    "a schedule": ({"schedule": {"name": "cosine", "n": 10**12}}, "n: at most 100,000"),
    "a schedule past the model": ({"schedule": {"name": "cosine", "n": 11}}, "11 timesteps are required, got 10"),
    "a picture": (
        {"architecture": architecture(shape=[1, 2**40, 2**40]), "shape": [1, 2**40, 2**40]},
        r"data\..* of shape",
    ),
}


@pytest.mark.parametrize(("changes", "words"), SIZES.values(), ids=SIZES)
def test_a_network_larger_than_its_file_is_refused_before_memory_is_taken(folder, changes, words, monkeypatch):
    rewrite(folder, **changes)
    devices, build = [], UNet.__init__

    def spied(self, *args, **options):
        devices.append(torch.empty(0).device.type)
        build(self, *args, **options)

    monkeypatch.setattr(UNet, "__init__", spied)
    monkeypatch.setattr("diffusion.models.checkpoint.read_tensors", None)
    with pytest.raises(ValueError, match=words):
        load_checkpoint(folder)
    assert devices in ([], ["meta"])


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, torch.int64])
@pytest.mark.parametrize("name", ["model.enter.bias", "data.mean", "data.eigenvectors"])
def test_whole_numbers_in_place_of_real_ones_are_refused(folder, name, dtype):
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    with pytest.raises(ValueError, match=rf"model\.safetensors: {name} of float.* is required, got"):
        load_checkpoint(folder)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "name",
    ["model.exit.weight", *(f"data.{n}" for n in ("mean", "variance", "frequencies", "eigenvalues", "eigenvectors"))],
)
def test_values_that_are_not_finite_are_refused(folder, name, value):
    rewrite(folder, lambda tensors: tensors[name].view(-1)[-1:].fill_(value))
    with pytest.raises(ValueError, match=rf"model\.safetensors: {name} is not finite"):
        load_checkpoint(folder)


@pytest.mark.parametrize("name", ["variance", "frequencies", "eigenvalues"])
def test_variances_below_zero_are_refused(folder, name):
    rewrite(folder, lambda tensors: tensors[f"data.{name}"].view(-1)[-1:].fill_(-1.0))
    with pytest.raises(ValueError, match=rf"data\.{name} of no less than 0 is required, got -1"):
        load_checkpoint(folder)


def test_weights_that_overflow_the_asked_precision_are_refused(folder):
    rewrite(folder, lambda tensors: tensors["model.exit.bias"].fill_(1e6))
    assert load_checkpoint(folder).model.exit.bias[0] == 1e6
    with pytest.raises(ValueError, match=r"model\.exit\.bias is not finite in torch\.float16"):
        load_checkpoint(folder, dtype=torch.float16)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("data.variance"), r"data\.mean and variance: both or none"),
        (lambda t: t.pop("data.mean"), r"data\.mean is missing"),
        (lambda t: t.update({"data.median": torch.zeros(SHAPE)}), r"tensor data\.median is not known"),
        (lambda t: t.update({"optimizer": torch.zeros(1)}), "tensor optimizer is not known"),
        (lambda t: t["data.eigenvectors"].mul_(3), r"data\.eigenvectors of length 1 are required, got 3"),
        (lambda t: t.update({"model.enter.bias": torch.zeros(8, dtype=torch.complex64)}), "a dtype of F64"),
    ],
)
def test_tensors_that_do_not_belong_are_named(folder, change, words):
    rewrite(folder, change)
    with pytest.raises(ValueError, match=rf"model\.safetensors: .*{words}"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training": 5}, "training: an object is required, got 5"),
        ({"architecture": {"name": ["UNet"], "arguments": {}}}, "architecture must be one of UNet"),
        ({"architecture": architecture(channels=-8)}, "channels: positive integers"),
        ({"architecture": architecture(channels=0)}, "channels: positive integers"),
        ({"architecture": architecture(attention="no")}, "attention: true or false is required"),
        ({"architecture": {"name": "UNet", "arguments": []}}, r"arguments of UNet are required, got \[\]"),
        ({"shape": [-1, 4, 4]}, "three positive integers"),
        ({"schedule": {"name": "alphas_cumprod", "values": [0.5, 0.6]}}, "must decrease, but rises at t=1"),
        ({"schedule": {"name": "alphas_cumprod", "values": [0.5, None]}}, r"config\.json"),
        ({"schedule": {"name": "alphas_cumprod", "values": [10**400]}}, r"config\.json"),
        (
            {"schedule": {"name": "alphas_cumprod", "values": [0.5, float("nan")]}},
            r"values in \(0, 1\], or 0 at the last, are required",
        ),
        ({"schedule": {"name": "linear", "n": 10, "start": "x", "end": 0.1}}, "start: a number is required"),
    ],
)
def test_each_entry_of_the_configuration_is_checked(folder, changes, words):
    rewrite(folder, **changes)
    with pytest.raises(ValueError, match=rf"config\.json: .*{words}|{words}"):
        load_checkpoint(folder)


def header(folder, change):
    """Change the header of the weights as a dict, keeping the data."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    made = change(json.loads(content[8 : 8 + length]))
    made = made if isinstance(made, bytes) else json.dumps(made).encode()
    path.write_bytes(struct.pack("<Q", len(made)) + made + content[8 + length :])


def entry(name, **changes):
    return lambda h: {**h, name: {**h[name], **changes}}


HEADERS = {
    "too deep": lambda h: b'{"a":' * 10**5,
    "not JSON": lambda h: b"{]",
    "no object": lambda h: b"[1, 2]",
    "twice": lambda h: json.dumps(h)[:-1].encode() + b', "data.mean": ' + json.dumps(h["data.mean"]).encode() + b"}",
    "metadata": lambda h: {**h, "__metadata__": {"config": 5}},
    "no dtype": lambda h: {**h, "data.mean": {"shape": [1], "data_offsets": [0, 4]}},
    "unknown dtype": entry("data.mean", dtype="F6"),
    "shape": entry("data.mean", shape=[-1, 4, 4]),
    "bool": entry("data.mean", shape=[True, 4, 4]),
    "a shape of a terabyte": entry("data.mean", shape=[2**20, 2**20]),
    "a shape beyond all numbers": entry("data.mean", shape=[2**63, 0]),
    "an offset behind the end": entry("data.mean", data_offsets=[2**40, 2**40 + 64]),
    "offsets backwards": entry("data.mean", data_offsets=[64, 0]),
    "places shared": lambda h: entry("data.mean", data_offsets=h["data.variance"]["data_offsets"])(h),
    "fractions": entry("data.mean", data_offsets=[0.0, 64.0]),
    "a tensor left out": lambda h: {k: v for k, v in h.items() if k != "data.mean"},
}


@pytest.mark.parametrize("change", HEADERS.values(), ids=HEADERS)
def test_a_header_that_lies_is_refused_by_file(folder, change):
    header(folder, change)
    with pytest.raises(ValueError, match=r"model\.safetensors: not a whole safetensors file \("):
        load_checkpoint(folder)


@pytest.mark.parametrize("length", [0, 1, 2**30, 2**62, 2**64 - 1])
def test_a_header_longer_than_its_file_is_refused(folder, length):
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a whole safetensors file"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[" * 10**6, "nested too deeply"),
        ('{"a": 1, "a": 2}', "key 'a' twice"),
        ('{"format": ' + "9" * 5000 + "}", "not a JSON file"),
    ],
)
def test_a_configuration_that_cannot_be_taken_at_its_word_is_refused(folder, content, words):
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=rf"config\.json: .*{words}"):
        load_checkpoint(folder)


def test_a_configuration_of_gigabytes_is_refused_unread(folder):
    os.truncate(folder / "config.json", 2**40)  # a sparse file
    with pytest.raises(ValueError, match=r"config\.json: at most 67,108,864 bytes of JSON are read, got 1,099,511"):
        read_json(folder / "config.json")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "images.safetensors"])
@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "loop"])
def test_what_is_no_file_is_refused_and_not_waited_for(folder, name, kind):
    path = folder / name
    path.unlink()
    {
        "fifo": os.mkfifo, "folder": os.mkdir, "device": lambda p: os.symlink("/dev/zero", p),
        "loop": lambda p: os.symlink(p, p),
    }[kind](path)  # fmt: skip
    with pytest.raises(FileNotFoundError if kind == "loop" else ValueError, match=name):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"images": torch.zeros(0, *SHAPE, dtype=torch.uint8)}, {}),
        ({"images": torch.full((1, *SHAPE), 17, dtype=torch.uint8)}, {"levels": "16"}),
        ({"images": torch.zeros(1, *SHAPE, dtype=torch.uint8)}, {"levels": "²"}),
        ({"images": torch.zeros(1, *SHAPE, dtype=torch.uint8)}, {"levels": "9" * 5000}),
        ({"images": torch.zeros(1, *SHAPE, dtype=torch.uint8), "more": torch.zeros(1)}, {}),
    ],
)
def test_images_that_do_not_fit_are_refused(folder, tensors, metadata):
    write_tensors(folder / "images.safetensors", tensors, metadata)
    with pytest.raises(ValueError, match=r"images\.safetensors: "):
        load_checkpoint(folder)


def test_tensors_beyond_all_memory_are_refused(tmp_path):
    made = json.dumps({"a": {"dtype": "F64", "shape": [2**39], "data_offsets": [0, 2**42]}}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(made)) + made)
    os.truncate(path, 8 + len(made) + 2**42)  # a sparse file whose header tells the truth
    with pytest.raises(ValueError, match=r"a\.safetensors: "):
        read_tensors(path)


VALUES = [
    None, True, False, 0, 1, -1, 2.5, 1e308, float("nan"), float("inf"), 10**9, 2**63, 10**30, "", "x", "UNet", [], {},
    [0.5], [1, 4, 4], [[]], {"name": "linear"}, [[[[[[0.1]]]]]],
]  # fmt: skip


def places(value, path=()):
    """Paths to every value within a JSON value."""
    yield path
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield from places(part, (*path, key))


def replaced(value, path, new):
    if not path:
        return new
    made = dict(value) if isinstance(value, dict) else list(value)
    made[path[0]] = replaced(value[path[0]], path[1:], new)
    return made


def damage(folder, draw):
    """One random damage to one file of a checkpoint."""
    way = draw.choice(["cut", "flip", "flip", "insert", "JSON", "JSON", "JSON", "header"])
    if way == "JSON":
        config = json.loads((folder / "config.json").read_text())
        path = draw.choice(list(places(config))[1:])
        return rewrite(folder, **replaced(config, path, draw.choice(VALUES)))
    if way == "header":
        return header(folder, lambda h: replaced(h, draw.choice(list(places(h))), draw.choice(VALUES)))
    path = folder / draw.choice(["config.json", "model.safetensors", "images.safetensors"])
    content, at = bytearray(path.read_bytes()), 0
    at = draw.randrange(min(len(content), draw.choice([9, 300, 10**9])))
    if way == "cut":
        del content[at:]
    elif way == "insert":
        content[at:at] = draw.randbytes(draw.randrange(1, 9))
    else:
        content[at] ^= 1 << draw.randrange(8)
    return path.write_bytes(content)


@pytest.mark.parametrize("seed", range(3))
def test_random_damage_is_refused_or_does_no_harm(folder, seed):
    draw = random.Random(seed)
    whole = {path: path.read_bytes() for path in folder.iterdir()}
    refused = 0
    for _ in range(80):
        damage(folder, draw)
        try:
            loaded = load_checkpoint(folder)
        except (ValueError, FileNotFoundError):
            refused += 1
        else:
            assert loaded.shape == SHAPE
            assert all(p.isfinite().all() for p in loaded.model.parameters())
            assert (loaded.variance >= 0).all()
            assert loaded.images.abs().max() <= 1
        for path, content in whole.items():
            path.write_bytes(content)
    assert 20 < refused < 80
