"""Checkpoints: round trips, crashes between two writes, and one clear error for each way a folder can be wrong."""

import json
import os
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from diffusion.models import checkpoint as module
from diffusion.models.checkpoint import load_checkpoint, save_checkpoint, save_images
from diffusion.models.files import write_tensors
from diffusion.models.unet import UNet
from diffusion.schedule import Schedule

SHAPE = (1, 4, 4)


def network(seed=0, channels=8):
    torch.manual_seed(seed)
    model = UNet(SHAPE, channels=channels, multipliers=(1,), blocks=(1,), groups=4, embedding=8, timesteps=10)
    with torch.no_grad():
        model.exit.weight.normal_()
    return model


def save(folder, model=None, **options):
    model = network() if model is None else model
    save_checkpoint(folder, model, Schedule.cosine(10), **{"shape": SHAPE, **options})
    return model


def test_a_model_predicts_the_same_after_a_round_trip(tmp_path):
    model = save(tmp_path / "a" / "b", prediction="v", extra={"steps": 7})
    loaded = load_checkpoint(tmp_path / "a" / "b")
    x, t = torch.randn(3, *SHAPE), torch.tensor([0, 4, 9])
    assert torch.equal(loaded.model(x, t), model(x, t))
    assert (loaded.schedule, loaded.prediction, loaded.shape) == (Schedule.cosine(10), "v", SHAPE)
    assert loaded.training == {"steps": 7, "parameters": sum(p.numel() for p in model.parameters())}
    assert (loaded.name, loaded.mean, loaded.variance, loaded.images) == ("b", None, None, None)


def test_half_precision_on_disk_rounds_each_weight_to_half_precision_and_no_more(tmp_path):
    model = save(tmp_path, dtype=torch.float16)
    loaded = load_checkpoint(tmp_path).model.state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded[name], weight.half().float()), name


def test_statistics_and_images_come_back(tmp_path):
    mean, variance = torch.rand(2, *SHAPE)
    images = torch.randint(0, 17, (5, *SHAPE)) / 8 - 1
    save(tmp_path, statistics=(mean, variance))
    save_images(tmp_path, images, levels=16)
    loaded = load_checkpoint(tmp_path)
    assert torch.equal(loaded.mean, mean)
    assert torch.equal(loaded.variance, variance)
    assert torch.equal(loaded.images, images)


def test_the_asked_precision_applies_to_everything_loaded(tmp_path):
    save(tmp_path, statistics=(torch.zeros(SHAPE), torch.ones(SHAPE)))
    save_images(tmp_path, torch.zeros(1, *SHAPE))
    loaded = load_checkpoint(tmp_path, dtype=torch.float64)
    tensors = [loaded.mean, loaded.variance, loaded.images, *loaded.model.parameters()]
    assert {tensor.dtype for tensor in tensors} == {torch.float64}
    assert not loaded.model.training


def test_a_reader_between_the_two_writes_of_a_later_save_sees_the_new_weights(tmp_path, monkeypatch):
    save(tmp_path, network(seed=0), extra={"steps": 1})
    monkeypatch.setattr(module, "write_json", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    newer = network(seed=1)
    with pytest.raises(OSError, match="disk full"):
        save(tmp_path, newer, extra={"steps": 2})
    loaded = load_checkpoint(tmp_path)
    assert loaded.training["steps"] == 2
    assert torch.equal(loaded.model.exit.weight, newer.exit.weight)


def test_weights_and_configuration_of_different_runs_are_refused(tmp_path):
    save(tmp_path / "a", prediction="v")
    save(tmp_path / "b", prediction="epsilon")
    os.replace(tmp_path / "a" / "config.json", tmp_path / "b" / "config.json")
    with pytest.raises(ValueError, match=r"belongs to other weights.*prediction differ"):
        load_checkpoint(tmp_path / "b")


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    old = save(tmp_path)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        save(tmp_path, network(seed=5))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert torch.equal(load_checkpoint(tmp_path).model.exit.weight, old.exit.weight)


def test_files_are_readable_by_whomever_the_umask_lets(tmp_path):
    save(tmp_path)
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("config.json", "model.safetensors")}
    assert len(modes) == 1


def test_weights_of_another_tool_need_only_config_json(tmp_path):
    model = save(tmp_path)
    tensors = {f"model.{key}": value.contiguous() for key, value in model.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    assert torch.equal(load_checkpoint(tmp_path).model.exit.weight, model.exit.weight)


@pytest.mark.parametrize("name", ["digits", "fashion"])
def test_shipped_checkpoints_denoise_real_images_they_were_not_trained_on(name):
    loaded = load_checkpoint(name)
    assert (loaded.name, loaded.images.shape) == (name, (32, *loaded.shape))
    generator = torch.Generator().manual_seed(0)
    for step in (100, 200):
        t = torch.full((32,), step)
        noise = torch.randn(loaded.images.shape, generator=generator)
        x_t = loaded.schedule.add_noise(loaded.images, noise, t)
        alpha = loaded.schedule.alphas_cumprod[step].float()
        # the best affine denoiser per pixel, from the data's mean and variance alone, is what a network must beat
        gain = (1 - alpha).sqrt() / (alpha * loaded.variance + 1 - alpha)
        affine = gain * (x_t - alpha.sqrt() * loaded.mean)
        with torch.no_grad():
            learnt = loaded.model(x_t, t)
        assert (learnt - noise).square().mean() < 0.6 * (affine - noise).square().mean()


@pytest.fixture
def folder(tmp_path):
    save(tmp_path, statistics=(torch.zeros(SHAPE), torch.ones(SHAPE)))
    return tmp_path


def edit_config(folder, **changes):
    """Change the configuration in both places, so that only its content is wrong."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names = list(file.keys())
        tensors = {name: file.get_tensor(name) for name in names}
    write_tensors(folder / "model.safetensors", tensors, {"config": json.dumps(config)})


def edit_tensors(folder, change):
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names = list(file.keys())
        tensors, metadata = {name: file.get_tensor(name) for name in names}, file.metadata()
    change(tensors)
    write_tensors(folder / "model.safetensors", tensors, metadata)


def test_a_missing_folder_names_itself_and_the_shipped_checkpoints(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.*digits"):
        load_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["", "a" * 5000, "a\0b", "/dev/null"])
def test_what_names_no_folder_is_not_found(name):
    with pytest.raises(FileNotFoundError):
        load_checkpoint(name)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load_checkpoint(folder)


@pytest.mark.parametrize("kept", [0, 4, 40, 2000])
def test_cut_weights_are_refused_by_name(folder, kept):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a whole safetensors file"):
        load_checkpoint(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1]", b"null"])
def test_malformed_configuration_is_refused_by_name(folder, content):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json: (not a JSON file|a JSON object is required)"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": 2}, "format 1 is required, got 2"),
        ({"architecture": {"name": "Transformer", "arguments": {}}}, "architecture must be one of UNet"),
        ({"architecture": None}, "architecture must be one of UNet"),
        ({"architecture": {"name": "UNet"}}, "arguments of UNet"),
        ({"architecture": {"name": "UNet", "arguments": {"depth": 3}}}, "arguments of UNet.*depth"),
        ({"architecture": {"name": "UNet", "arguments": {"shape": [1, 4, 4], "channels": 9}}}, "no multiple of groups"),
        ({"schedule": {"name": "sigmoid"}}, "name must be one of linear"),
        ({"schedule": None}, "a dict is required"),
        ({"schedule": {"name": "cosine", "n": "ten"}}, "n: an integer is required"),
        ({"prediction": "noise"}, "prediction: one of epsilon"),
        ({"shape": [4, 4]}, "three positive integers"),
        ({"shape": "big"}, "three positive integers"),
        ({"shape": [1, 5, 4]}, r"the model's \(1, 4, 4\) is required"),
    ],
)
def test_each_wrong_entry_of_the_configuration_is_named(folder, changes, words):
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=rf"config\.json: .*{words}"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop("model.enter.bias"), r"no tensor model\.enter\.bias"),
        (lambda tensors: tensors.update({"model.extra": torch.zeros(1)}), r"model\.extra is not of this architecture"),
        (lambda tensors: tensors.update({"model.enter.bias": torch.zeros(3)}), r"shape \(8,\) is required, got \(3,\)"),
        (lambda tensors: tensors["model.enter.bias"].fill_(torch.nan), r"enter\.bias is not finite"),
        (lambda tensors: tensors.update({"data.mean": torch.zeros(2)}), r"data\.mean of shape \(1, 4, 4\)"),
        (lambda tensors: tensors["data.variance"].fill_(torch.nan), r"data\.variance is not finite"),
        (
            lambda tensors: tensors.update({"data.frequencies": torch.zeros(16)}),
            r"data\.frequencies of shape \(1, 4, 4\)",
        ),
        (lambda tensors: tensors.update({"data.eigenvalues": torch.zeros(16)}), r"eigenvectors: both or none"),
        (
            lambda tensors: tensors.update(
                {"data.eigenvalues": torch.zeros(16), "data.eigenvectors": torch.zeros(9, 2)}
            ),
            r"data\.eigenvectors of shape \(16, 2\) is required, got \(9, 2\)",
        ),
    ],
)
def test_each_wrong_tensor_is_named(folder, change, words):
    edit_tensors(folder, change)
    with pytest.raises(ValueError, match=rf"model\.safetensors: .*{words}"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"images": torch.zeros(2, 1, 4, 4)}, {}),
        ({"pictures": torch.zeros(2, 1, 4, 4, dtype=torch.uint8)}, {}),
        ({"images": torch.zeros(2, 1, 5, 5, dtype=torch.uint8)}, {}),
        ({"images": torch.zeros(2, 1, 4, 4, dtype=torch.uint8)}, {"levels": "0"}),
    ],
)
def test_malformed_images_are_refused_by_name(folder, tensors, metadata):
    save_file(tensors, folder / "images.safetensors", metadata)
    with pytest.raises(ValueError, match=r"images\.safetensors: "):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"model": torch.nn.Linear(2, 2)}, TypeError, "model: one of UNet"),
        ({"prediction": "noise"}, ValueError, "prediction"),
        ({"shape": (4, 4)}, ValueError, "shape"),
        ({"shape": (1, 4, 5)}, ValueError, "the model's"),
        ({"statistics": (torch.zeros(2), torch.ones(2))}, ValueError, "statistics: a mean"),
        ({"extra": {"model": object()}}, TypeError, "JSON"),
    ],
)
def test_what_cannot_be_saved_is_refused_and_nothing_is_written(tmp_path, options, error, words):
    with pytest.raises(error, match=words):
        save(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_images_out_of_range_are_not_saved(tmp_path):
    with pytest.raises(ValueError, match="images"):
        save_images(tmp_path, torch.full((1, *SHAPE), 1.5))
    with pytest.raises(ValueError, match="levels"):
        save_images(tmp_path, torch.zeros(1, *SHAPE), levels=256)


def test_a_checkpoint_shows_itself_in_one_line():
    assert repr(load_checkpoint("digits")) == "Checkpoint('digits': UNet, 1x8x8, epsilon, 1000 steps, 32 images)"
