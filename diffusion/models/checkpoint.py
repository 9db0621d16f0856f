"""Checkpoints: a folder of model.safetensors and config.json, and a few real images. Nothing is unpickled.

The weights file carries the whole configuration in its header and is replaced in one move; config.json is the same
text for people and other tools. A write that is cut off between the two leaves at worst an older training record in
config.json. Any other difference means that the files do not belong together, and is refused.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..chain import Chain, Splitting
from ..schedule import AnySchedule, Schedule
from .configuration import (
    ARCHITECTURES,
    CONFIG,
    FORMAT,
    WEIGHTS,
    agreed,
    check_timesteps,
    checked_prediction,
    checked_shape,
    described,
)
from .files import read_header, read_json, read_tensors, write_json, write_tensors
from .statistics import Statistics, check_stored, read_statistics
from .weights import build
from .wrappers import INDEX, read_diffusers, read_pipeline

SHIPPED = Path(__file__).parents[1] / "checkpoints"
IMAGES = "images.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A trained denoiser and what is needed to sample from it.

    Attributes:
        model: model(x, t) → prediction, in evaluation mode.
        schedule: the noise it was trained with.
        prediction: what the model returns: "epsilon", "v" or "sample".
        shape: (C, H, W) of an image.
        mean: per-pixel mean of the training images, of `shape`, or None.
        variance: per-pixel variance of the training images, of `shape`, or None.
        images: (n, C, H, W) real images in [−1, 1] which were not trained on, or None.
        name: name of the folder.
        training: record of the training run (steps, seed, final loss, …); empty if unknown.
        statistics: of the training images, as stored (on the CPU), mean and variance among them, or None.
    """

    model: nn.Module
    schedule: AnySchedule
    prediction: str
    shape: tuple[int, int, int]
    mean: Tensor | None
    variance: Tensor | None
    images: Tensor | None
    name: str
    training: dict[str, Any] = field(default_factory=dict)
    statistics: Statistics | None = None

    def __repr__(self) -> str:
        size, model = "x".join(map(str, self.shape)), type(self.model).__name__
        images = 0 if self.images is None else len(self.images)
        steps = f"{len(self.schedule)} steps, " if isinstance(self.schedule, Schedule) else ""
        rest = f"{self.prediction}, {steps}{images} images"
        return f"Checkpoint({self.name!r}: {model}, {size}, {rest})"

    def splitting(self, chain: Chain, basis: str = "pixels") -> Splitting:
        """The splitting that would be exact were the training images Gaussian; no images are needed.

        κ_t = σ_t / (ᾱ_t Λ + σ_t²), b_t = −κ_t √ᾱ_t Qᵀμ, σ_t² = 1 − ᾱ_t, for y = Qᵀ x, with the images' mean μ and
        variances Λ (D,) along the columns of Q; Λ is raised to a hundredth of its mean where it is less.

        Args:
            chain: of the schedule, of any number of steps.
            basis: what Q is: "pixels", the identity; "frequencies", the cosine transform of every channel; or
                "covariance", the eigenvectors of the images' covariance.

        Raises:
            ValueError: an unknown basis, or one whose variances this checkpoint does not carry.
        """
        if self.statistics is None:
            raise ValueError(
                "basis: this checkpoint carries no statistics; diffusion.checkpoint.add_statistics(folder, images) "
                "adds them, Splitting.fitted(chain, images, basis) does without"
            )
        return self.statistics.splitting(chain, basis)


def save_checkpoint(
    folder: str | Path,
    model: nn.Module,
    schedule: Schedule,
    *,
    prediction: str = "epsilon",
    shape: tuple[int, int, int],
    statistics: Statistics | tuple[Tensor, Tensor] | None = None,
    extra: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write model, schedule and what goes with them into `folder`, which is created if need be.

    Args:
        folder: an earlier checkpoint in it is replaced; a reader sees the old or the new one, never a half.
        model: of an architecture in `ARCHITECTURES`, with its arguments as `model.config`.
        schedule: the noise the model was trained with.
        prediction: what the model returns: "epsilon", "v" or "sample".
        shape: (C, H, W) of an image.
        statistics: `Statistics.of` the training images, or their (mean, variance) per pixel alone, each of `shape`.
        extra: JSON-ready training record.
        dtype: type of the weights on disk; None: as they are. float16 halves the file and rounds at 5e-4.

    Raises:
        TypeError: the model is of an unknown architecture, or `extra` cannot be written as JSON.
        ValueError: an argument out of range, by name.
    """
    architecture = type(model).__name__
    if ARCHITECTURES.get(architecture) is not type(model):
        raise TypeError(f"model: one of {', '.join(ARCHITECTURES)} is required, got {architecture}")
    shape = checked_shape(shape, model)
    checked_prediction(prediction)
    check_timesteps(model, schedule)
    config = {
        "format": FORMAT,
        "architecture": {"name": architecture, "arguments": model.config},
        "schedule": schedule.to_config(),
        "prediction": prediction,
        "shape": list(shape),
        "training": dict(extra or {}, parameters=sum(p.numel() for p in model.parameters())),
    }
    tensors = {f"model.{key}": value.detach().to("cpu", dtype) for key, value in model.state_dict().items()}
    if statistics is not None:
        known = statistics if isinstance(statistics, Statistics) else Statistics(*statistics)
        if tuple(known.mean.shape) != shape:
            raise ValueError(f"statistics: a mean of shape {shape} is required, got {tuple(known.mean.shape)}")
        tensors |= {f"data.{key}": value.detach().to("cpu", torch.float32) for key, value in known.tensors().items()}
    header = {"config": json.dumps(config)}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, tensors, header)
    write_json(folder / CONFIG, config)


def save_images(folder: str | Path, images: Tensor, levels: int = 255) -> None:
    """Write real images (n, C, H, W) in [−1, 1] beside a checkpoint, rounded to 0 … `levels` ≤ 255, one byte each."""
    check_images(images, levels)
    values = ((images + 1) * (levels / 2)).round().to("cpu", torch.uint8)
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_tensors(Path(folder) / IMAGES, {"images": values}, {"levels": str(levels)})


def check_images(images: Tensor, levels: int) -> None:
    """Raises ValueError for what `save_images` cannot write."""
    if images.ndim != 4 or not bool((images.abs() <= 1).all()):
        raise ValueError(f"images: (n, C, H, W) in [-1, 1] is required, got {tuple(images.shape)}")
    if not 1 <= levels <= 255:
        raise ValueError(f"levels: 1 … 255 is required, got {levels}")


def add_statistics(folder: str | Path, images: Tensor, eigenvectors: int | None = None) -> None:
    """Add to an older checkpoint the statistics that it lacks, from the images (n, C, H, W) it was trained on.

    Weights, and statistics that are there, stay as they are. The file is replaced in one move. `eigenvectors` as in
    `Statistics.of`.

    Raises:
        FileNotFoundError: no weights in `folder`.
        ValueError: the file is malformed, or its mean differs from that of the images.
    """
    path, statistics = Path(folder) / WEIGHTS, Statistics.of(images, eigenvectors)
    check_stored(read_header(path)[0], tuple(images.shape[1:]), path)
    tensors, metadata = read_tensors(path)
    mean = tensors.get("data.mean", statistics.mean)
    if mean.shape != statistics.mean.shape or not torch.allclose(mean, statistics.mean, rtol=0, atol=1e-4):
        raise ValueError(f"images: those that {path} was trained on are required, got another mean")
    write_tensors(path, {f"data.{key}": value for key, value in statistics.tensors().items()} | tensors, metadata)


def load_checkpoint(
    name_or_folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Checkpoint:
    """Return the checkpoint in a folder, or a shipped one: "digits", "fashion", "emoji", "digit-classes" or
    "fashion-classes".

    A folder whose config.json was written by diffusers ("_class_name": "UNet2DModel") is read with diffusers, and so is
    one of a whole pipeline that has a unet and a scheduler alone.

    Args:
        name_or_folder: a shipped name, or a path; a path that looks like a shipped name is written "./digits".
        device: where model, statistics and images go.
        dtype: type of the weights, statistics and images in memory.

    Raises:
        FileNotFoundError: the folder, or a file in it, is missing.
        ValueError: a file is cut short, malformed, of an unknown version or architecture, or does not fit the others.
        ImportError: a diffusers model without diffusers installed.
    """
    shipped = sorted(path.name for path in SHIPPED.iterdir() if path.is_dir()) if SHIPPED.is_dir() else []
    folder = SHIPPED / name_or_folder if str(name_or_folder) in shipped else Path(name_or_folder)
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{folder}: no such folder, nor a shipped checkpoint ({', '.join(shipped) or 'none'})")
    if (folder / INDEX).is_file():
        found = read_pipeline(folder, dtype)
        return Checkpoint(found[0].to(device).eval(), *found[1:], None, None, None, folder.name)
    config = read_json(folder / CONFIG)
    if "_class_name" in config:
        network, schedule, prediction, shape = read_diffusers(folder, config["_class_name"], dtype)
        return Checkpoint(network.to(device).eval(), schedule, prediction, shape, None, None, None, folder.name)
    path = folder / WEIGHTS
    stored, metadata = read_header(path)
    config = agreed(folder, config, metadata)
    make, schedule, prediction, shape = described(folder, config, stored)
    tensors, _ = read_tensors(path)
    model = build(make, tensors, path, dtype)
    statistics = read_statistics(tensors, path)
    mean, variance = (None, None) if statistics is None else (statistics.mean, statistics.variance)
    images = _load_images(folder / IMAGES, shape)
    return Checkpoint(
        model=model.to(device).eval(),
        schedule=schedule,
        prediction=prediction,
        shape=shape,
        mean=None if mean is None else mean.to(device, dtype),
        variance=None if variance is None else variance.to(device, dtype),
        images=None if images is None else images.to(device, dtype),
        name=folder.name,
        training=config.get("training", {}),
        statistics=statistics,
    )


def _load_images(path: Path, shape: tuple[int, ...]) -> Tensor | None:
    if not os.path.lexists(path):
        return None
    stored, metadata = read_header(path)
    given, levels = stored.get("images"), metadata.get("levels", "255")
    if given is None or given.dtype != torch.uint8 or given.shape[1:] != shape or not given.shape[0] or len(stored) > 1:
        raise ValueError(f"{path}: bytes named images, of shape (n, {', '.join(map(str, shape))}), are required")
    if not levels.isascii() or not levels.isdecimal() or len(levels) > 3 or not 1 <= int(levels) <= 255:
        raise ValueError(f"{path}: levels 1 … 255 are required, got {levels!r:.80}")
    values = read_tensors(path)[0]["images"]
    if int(values.max()) > int(levels):
        raise ValueError(f"{path}: bytes up to levels = {levels} are required, got {int(values.max())}")
    return values.float() * (2 / int(levels)) - 1
