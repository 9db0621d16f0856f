"""Mean and variances of images: per pixel, per frequency, and along the eigenvectors of their covariance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..chain import VARIANCE_FLOOR, Chain, Splitting, cosine_basis, cosines, one_line
from .files import Stored

PREFIX = "data."

NORM_ERROR = 1e-2  # of an eigenvector, at most; float32 leaves 1e-6
ROUNDING = 1e-4  # of the largest eigenvalue: what a computed one may lie below 0
LARGEST = 4096  # entries of an image, above which its covariance takes minutes and gigabytes: it is left out
MOST_ENTRIES = 2**20  # of the eigenvectors that are kept: 4 MiB in a checkpoint


@dataclass(frozen=True, eq=False)
class Statistics:
    """What a splitting needs to know of the data. D = C·H·W; float32 on the CPU; variances divide by the count.

    Of the covariance's eigenvectors, only those with more than a hundredth of the mean variance are kept: a splitting
    raises all other variances to that floor, and so does not tell their eigenvectors apart. Where there are more than
    are asked for, the first r are, and the other D − r eigenvalues are replaced by their mean: of all covariances
    V diag(λ_1 … λ_r) Vᵀ + λ̄ (1 − V Vᵀ) that is the likeliest, λ̄ = (tr Σ − λ_1 − … − λ_r)/(D − r) (Tipping & Bishop
    1999, Eq. 8).

    Attributes:
        mean: (C, H, W).
        variance: (C, H, W), per pixel.
        frequencies: (C, H, W), variance per frequency of each channel's cosine transform, orthonormal, of type II.
        eigenvalues: (D,), of the covariance, largest first; None where D > 4096.
        eigenvectors: (D, r), of the first r; known together with the eigenvalues.

    What is None is not known.

    Raises:
        TypeError: something else than tensors.
        ValueError: shapes that do not fit each other, values that are not floating-point or not finite, variances below
            0, or eigenvectors that are not of length 1.
    """

    mean: Tensor
    variance: Tensor
    frequencies: Tensor | None = None
    eigenvalues: Tensor | None = None
    eigenvectors: Tensor | None = None
    __repr__ = one_line

    def __post_init__(self) -> None:
        for name, value in self.tensors().items():
            if not isinstance(value, Tensor):
                raise TypeError(f"{name}: a tensor is required, got {type(value).__name__}")
        check_shapes(self.tensors(), tuple(self.mean.shape))
        for name, value in self.tensors().items():
            if not bool(value.isfinite().all()):
                raise ValueError(f"{name} is not finite")
            least = -ROUNDING * value.max().clamp_min(0) if name == "eigenvalues" and value.numel() else 0.0
            if name in ("variance", "frequencies", "eigenvalues") and bool((value < least).any()):
                raise ValueError(f"{name} of no less than 0 is required, got {value.min().item():g}")
        if self.eigenvectors is not None:
            norms = self.eigenvectors.double().norm(dim=0)
            if bool(((norms - 1).abs() > NORM_ERROR).any()):
                raise ValueError(f"eigenvectors of length 1 are required, got {norms.min():g} … {norms.max():g}")

    @staticmethod
    def of(images: Tensor, eigenvectors: int | None = None) -> Statistics:
        """The statistics of images (n, C, H, W); sums in float64, a few thousand images at a time; D² min(D, n) work.

        Args:
            images: (n, C, H, W), n at least 1.
            eigenvectors: r at most, which take 4 r D bytes; 0 leaves the covariance out. None: as many as 4 MiB hold,
                which are all up to D = 1024.

        Raises:
            ValueError: images of another shape, or none; a number below 0.
        """
        check_eigenvectors(eigenvectors)
        if not isinstance(images, Tensor) or images.dim() != 4 or len(images) == 0:
            got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"images: a tensor (n, C, H, W) is required, got {got}")
        images, shape, count = images.detach().cpu(), images.shape[1:], len(images)
        rows, columns = cosines(shape[1]), cosines(shape[2])
        mean = images.mean(0, dtype=torch.float64)
        variance, frequencies = torch.zeros_like(mean), torch.zeros_like(mean)
        size = shape.numel()
        most = MOST_ENTRIES // size if eigenvectors is None else eigenvectors
        wanted, few = size <= LARGEST and most > 0, count < size
        covariance = torch.zeros(size, size, dtype=torch.float64) if wanted and not few else None
        for part in images.split(4096):
            centred = part.double() - mean
            variance += centred.square().sum(0) / count
            frequencies += (rows.T @ centred @ columns).square().sum(0) / count
            if covariance is not None:
                covariance.addmm_(centred.flatten(1).T, centred.flatten(1), alpha=1 / count)
        leading: tuple[Tensor, ...] = ()
        if wanted:  # few images are one part
            leading = _leading(_of_few(centred.flatten(1)) if covariance is None else _spectrum(covariance), most)
        known = (mean, variance, frequencies, *leading)
        return Statistics(*[part.float() for part in known])

    def splitting(self, chain: Chain, basis: str) -> Splitting:
        """As `Checkpoint.splitting`."""
        mean, spread = self.mean.double().cpu().flatten(), self.variance.flatten()
        if basis == "pixels":
            return Splitting.named("gaussian", chain, mean, spread)
        if basis not in ("frequencies", "covariance"):
            raise ValueError(f'basis: "pixels", "frequencies" or "covariance" is required, got {basis!r}')
        if basis == "frequencies" and self.frequencies is not None:
            Q, spread = cosine_basis(self.mean.shape), self.frequencies.flatten()
        elif basis == "covariance" and self.eigenvalues is not None and self.eigenvectors is not None:
            # completed by any orthonormal vectors: the splitting is the same along all of them
            Q, spread = torch.linalg.qr(self.eigenvectors.double(), mode="complete").Q, self.eigenvalues
        else:
            raise ValueError(
                f"basis: {basis!r} is not carried by this checkpoint; "
                "diffusion.checkpoint.add_statistics(folder, images) adds it "
                f"(a covariance up to D = {LARGEST}), Splitting.fitted(chain, images, basis) does without"
            )
        return replace(Splitting.named("gaussian", chain, mean @ Q, spread), basis=Q)

    def tensors(self) -> dict[str, Tensor]:
        """What is known, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


def check_shapes(parts: Mapping[str, Any], shape: tuple[int, ...]) -> None:
    """Raises ValueError unless the parts, with their `shape` and `dtype`, are those of images of `shape`."""
    for names in (("mean", "variance"), ("eigenvalues", "eigenvectors")):
        if len([name for name in names if name in parts]) == 1:
            raise ValueError(f"{' and '.join(names)}: both or none are required")
    size = math.prod(shape)
    given = tuple(parts["eigenvectors"].shape) if "eigenvectors" in parts else ()
    required = {"eigenvalues": (size,), "eigenvectors": (size, min(given[-1], size) if given else 0)}
    for name, value in parts.items():
        if tuple(value.shape) != required.get(name, shape):
            raise ValueError(f"{name} of shape {required.get(name, shape)} is required, got {tuple(value.shape)}")
        if not value.dtype.is_floating_point:
            raise ValueError(f"{name} of floating point is required, got {value.dtype}")


def check_stored(stored: Mapping[str, Stored], shape: tuple[int, ...], path: Path) -> None:
    """Raises ValueError unless the tensors "data.…" of a file are statistics of images of `shape`, and all known."""
    parts = {name.removeprefix(PREFIX): value for name, value in stored.items() if name.startswith(PREFIX)}
    unknown = parts.keys() - {part.name for part in fields(Statistics)}
    if unknown:
        raise ValueError(f"{path}: tensor {PREFIX}{min(unknown)} is not known")
    try:
        if parts and "mean" not in parts:
            raise ValueError("mean is missing")
        check_shapes(parts, shape)
    except ValueError as error:
        raise ValueError(f"{path}: {PREFIX}{error}") from error


def read_statistics(tensors: Mapping[str, Tensor], path: Path) -> Statistics | None:
    """What the tensors "data.…" of a file, which `check_stored` accepted, hold; None where there are none."""
    known = {name.removeprefix(PREFIX): value for name, value in tensors.items() if name.startswith(PREFIX)}
    try:
        return Statistics(**known) if known else None
    except ValueError as error:
        raise ValueError(f"{path}: {PREFIX}{error}") from error


def check_eigenvectors(number: int | None) -> None:
    """Raises ValueError for what is no number of eigenvectors to keep."""
    if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 0):
        raise ValueError(f"eigenvectors: None or an integer of at least 0 is required, got {number!r}")


def _spectrum(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (D,), largest first, and eigenvectors (D, D) of a covariance (D, D)."""
    values, vectors = torch.linalg.eigh(covariance)
    return values.flip(-1), vectors.flip(-1)


def _of_few(centred: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (D,) of the covariance XᵀX/n of n < D centred images X (n, D), and eigenvectors (D, n).

    XXᵀ/n, n × n, has the same λ but for zeros, and of its eigenvectors u those are Xᵀu/√(n λ).
    """
    count, size = centred.shape
    values, vectors = _spectrum(centred @ centred.T / count)
    directions = centred.T @ vectors / (count * values).clamp_min(torch.finfo(values.dtype).tiny).sqrt()
    return torch.cat([values.clamp_min(0), values.new_zeros(size - count)]), directions


def _leading(spectrum: tuple[Tensor, Tensor], most: int) -> tuple[Tensor, Tensor]:
    """eigenvalues and eigenvectors, as in `Statistics`, of all of them."""
    values, vectors = spectrum
    kept = int((values > VARIANCE_FLOOR * values.mean()).sum())
    if kept > most:
        kept = most
        values = torch.cat([values[:kept], values[kept:].mean().expand(len(values) - kept)])
    return values, vectors[:, :kept]
