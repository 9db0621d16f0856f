"""The Fréchet distance between images in the features of a small classifier, which is trained here.

It is the quantity that FID is, in other features: figures of the two cannot be compared with each other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.files import Stored, parse_json, read_header, read_tensors, write_tensors
from ..models.weights import FLOATS, build, check_stored, skeleton
from .data import Dataset

FEATURES_FILE = "features.safetensors"
ROWS = 512  # per call of the classifier
RESAMPLES = 50
HELD_OUT_KEPT = 500
TASKS = ("classes", "rotations")
LARGEST_SIZE = 2**24  # of a side, a width or a number of classes in a file


class Classifier(nn.Module):
    """Scores (N, classes) of images (N, C, H, W): 3×3 convolutions down to 4×4 pixels, then two linear layers.

    The features are the output of the first, standardised.

    Args:
        shape: (C, H, W).
        classes: number of scores.
        channels: of the first convolution; each halving of the picture doubles them, up to 4 times as many.
        width: number of features.
    """

    def __init__(self, shape: tuple[int, int, int], classes: int, channels: int = 16, width: int = 32) -> None:
        super().__init__()
        self.config: dict[str, Any] = {"shape": list(shape), "classes": classes, "channels": channels, "width": width}
        layers: list[nn.Module] = [nn.Conv2d(shape[0], channels, 3, padding=1), nn.SiLU()]
        side, now = min(shape[1:]), channels
        while side > 4:
            following = min(2 * now, 4 * channels)
            layers += [nn.Conv2d(now, following, 3, stride=2, padding=1), nn.SiLU()]
            side, now = -(-side // 2), following
        self.convolutions = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten())
        # standardised, so that a distance says something by itself: independent features have a trace of `width`
        self.project = nn.Sequential(nn.Linear(16 * now, width), nn.BatchNorm1d(width, affine=False))
        self.score = nn.Linear(width, classes)

    def features(self, x: Tensor) -> Tensor:
        """Return (N, width) for images (N, C, H, W)."""
        projected: Tensor = self.project(self.convolutions(x))
        return projected

    def forward(self, x: Tensor) -> Tensor:
        """Return scores (N, classes) for images (N, C, H, W)."""
        scores: Tensor = self.score(F.silu(self.features(x)))
        return scores


@dataclass(frozen=True, eq=False)
class FeatureSpace:
    """A classifier, and the real images in its features.

    Attributes:
        model: in evaluation mode.
        mean, covariance: (F,), (F, F) float64, of the features of the training images.
        held_out: (n, F) features of real images that were not trained on.
        record: task, accuracy on held-out images, number of training images, steps.
    """

    model: Classifier
    mean: Tensor
    covariance: Tensor
    held_out: Tensor
    record: dict[str, Any]

    def of(self, images: Tensor) -> Tensor:
        """Return the features (n, F) float64, on the CPU, of images (n, C, H, W)."""
        device = next(self.model.parameters()).device
        with torch.no_grad():
            parts = [self.model.features(x.to(device, torch.float32)) for x in images.split(ROWS)]
        return torch.cat(parts).double().cpu()

    def distance(self, features: Tensor) -> float:
        """Return the Fréchet distance of images with these features (n, F) from the training images."""
        return frechet_distance(*gaussian(features), self.mean, self.covariance)

    def error(self, features: Tensor) -> float:
        """Return the standard error of that distance, by the bootstrap over the images."""
        generator = torch.Generator().manual_seed(0)
        n = len(features)
        drawn = [self.distance(features[torch.randint(n, (n,), generator=generator)]) for _ in range(RESAMPLES)]
        return torch.tensor(drawn, dtype=torch.float64).std().item()


def gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean (F,) and covariance (F, F), float64, of features (n, F), n ≥ 2."""
    x = features.double().cpu()
    return x.mean(0), torch.cov(x.T, correction=1).reshape(x.shape[1], x.shape[1])


def frechet_distance(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> float:
    """Return ‖μ₁ − μ₂‖² + tr(C₁ + C₂ − 2 (C₁^½ C₂ C₁^½)^½), between two Gaussians.

    Dowson and Landau 1982, Eq. 6; the square of the 2-Wasserstein distance, and what is reported as FID.

    Args:
        mean1, mean2: (F,).
        covariance1, covariance2: (F, F), symmetric and positive semidefinite, of any rank.
    """
    values, vectors = torch.linalg.eigh(covariance1)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariance2 @ root).clamp_min(0).sqrt().sum()
    total = (mean1 - mean2).square().sum() + covariance1.trace() + covariance2.trace() - 2 * cross
    return max(0.0, total.item())


def fit_classifier(
    data: Dataset, *, steps: int = 1000, batch: int = 128, lr: float = 2e-3, seed: int = 0,
    device: str | torch.device = "cpu",
) -> FeatureSpace:  # fmt: skip
    """Return the features of a classifier trained on labelled images.

    Images of a single class are told apart by how many quarter turns they are rotated instead (Gidaris, Singh and
    Komodakis 2018), which needs no labels. AdamW, cosine rate; everything random comes from `seed`.

    Args:
        data: images in [−1, 1] and their labels.
        steps, batch, lr: of AdamW.
        seed: of weights and batches.
        device: where it is trained and stays.

    Raises:
        ValueError: fewer than two images, or images of a single class that are not square.
    """
    classes = int(data.train_labels.max()) + 1
    task = TASKS[0] if classes > 1 else TASKS[1]
    channels, height, width = data.train.shape[1:]
    if len(data.train) < 2:
        raise ValueError(f"data: at least 2 training images are required, got {len(data.train)}")
    if task == "rotations" and height != width:
        raise ValueError(f"data: square images, or images of several classes, are required, got {height}x{width}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier((channels, height, width), classes if task == "classes" else 4).to(device)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        pick = torch.randint(len(data.train), (batch,), generator=generator)
        images, labels = _turned(data.train[pick], data.train_labels[pick], task, generator)
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(images.to(device)), labels.to(device)).backward()
        optimizer.step()
        rate.step()
    # kept in half precision: rounded here, so that what is written is what was measured
    return _space(model.half().float().eval().requires_grad_(False), data, task, steps, generator)


def _space(model: Classifier, data: Dataset, task: str, steps: int, generator: torch.Generator) -> FeatureSpace:
    """Return the feature space of a trained classifier, its accuracy measured on the held-out images."""
    device = next(model.parameters()).device
    empty = torch.zeros(0)
    space = FeatureSpace(model, empty, empty, empty, {})
    images, labels = _turned(data.test, data.test_labels, task, generator)
    batches = zip(images.split(ROWS), labels.split(ROWS), strict=True)
    with torch.no_grad():
        right = [model(x.to(device)).argmax(1).cpu() == y for x, y in batches]
    record = {
        "task": task, "accuracy": torch.cat(right).double().mean().item(), "train": len(data.train), "steps": steps
    }  # fmt: skip
    return FeatureSpace(model, *gaussian(space.of(data.train)), space.of(data.test[:HELD_OUT_KEPT]), record)


def _turned(images: Tensor, labels: Tensor, task: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the images and labels as the task has them."""
    if task == "classes":
        return images, labels
    turns = torch.randint(4, (len(images),), generator=generator)
    rotated = torch.stack([image.rot90(int(k), (1, 2)) for image, k in zip(images, turns, strict=True)])
    return rotated, turns


def save_features(folder: str | Path, space: FeatureSpace) -> None:
    """Write a feature space into a folder, in one move."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    state = space.model.state_dict()
    tensors = {
        f"model.{key}": value.cpu().half() if value.is_floating_point() else value for key, value in state.items()
    }
    tensors |= {"real.mean": space.mean, "real.covariance": space.covariance, "real.held_out": space.held_out.float()}
    header = {"architecture": json.dumps(space.model.config), "record": json.dumps(space.record)}
    write_tensors(Path(folder) / FEATURES_FILE, tensors, header)


def load_features(folder: str | Path) -> FeatureSpace:
    """Return the feature space in a folder.

    Raises:
        FileNotFoundError, ValueError: there is none, or its file is malformed.
    """
    path = Path(folder) / FEATURES_FILE
    stored, header = read_header(path)
    try:
        make = partial(Classifier, **_architecture(header.get("architecture", "")))
        model, record = skeleton(make), parse_json(header.get("record", ""))
    except ValueError as error:
        raise ValueError(f"{path}: not a feature space ({error})") from error
    check_stored(model, stored, path)
    for name, shape in _real_shapes(stored, model.config["width"]).items():
        given = stored.get(f"real.{name}")
        if given is None or given.shape != shape or given.dtype not in FLOATS:
            raise ValueError(f"{path}: real.{name} of shape {shape}, floating-point, is required, got {given}")
    tensors, _ = read_tensors(path)
    mean, covariance, held_out = (tensors[f"real.{name}"].double() for name in ("mean", "covariance", "held_out"))
    for name, value in {"mean": mean, "covariance": covariance, "held_out": held_out}.items():
        if not bool(value.isfinite().all()):
            raise ValueError(f"{path}: real.{name} is not finite")
    values = torch.linalg.eigvalsh(covariance)
    if bool(values.min() < -1e-6 * values.abs().max()) or not torch.allclose(covariance, covariance.T):
        raise ValueError(f"{path}: real.covariance must be symmetric and have no negative eigenvalue")
    model = build(make, tensors, path, torch.float32)
    return FeatureSpace(model.eval().requires_grad_(False), mean, covariance, held_out, record)


def _architecture(text: str) -> dict[str, Any]:
    """The arguments of a `Classifier`, of sizes that a picture can have."""
    arguments = parse_json(text)
    shape = arguments.get("shape")
    sizes = [*(shape if isinstance(shape, list) and len(shape) == 3 else [None]), *arguments.values()]
    sizes = [n for n in sizes if n is not shape]
    if any(isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= LARGEST_SIZE for n in sizes):
        raise ValueError(f"architecture of integers 1 … {LARGEST_SIZE:,} is required, got {arguments!r:.80}")
    return arguments


def _real_shapes(stored: Mapping[str, Stored], width: int) -> dict[str, tuple[int, ...]]:
    held_out = stored.get("real.held_out")
    rows = held_out.shape[0] if held_out is not None and held_out.shape else 0
    return {"mean": (width,), "covariance": (width, width), "held_out": (rows, width)}
