"""Mean and variances of images: per pixel, per frequency, and along the eigenvectors of their covariance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from .chain import VARIANCE_FLOOR, Chain, Splitting, cosine_basis, cosines

LARGEST = 4096  # entries of an image, above which its covariance takes minutes and gigabytes: it is left out


@dataclass(frozen=True, eq=False)
class Statistics:
    """What a splitting needs to know of the data. D = C·H·W; float32 on the CPU; variances divide by the count.

    Of the covariance's eigenvectors, only those with more than a hundredth of the mean variance are kept: a splitting
    raises all other variances to that floor, and so does not tell their eigenvectors apart.

    Attributes:
        mean: (C, H, W).
        variance: (C, H, W), per pixel.
        frequencies: (C, H, W), variance per frequency of each channel's cosine transform, orthonormal, of type II.
        eigenvalues: (D,), of the covariance, largest first; None where D > 4096.
        eigenvectors: (D, r), of the first r; known together with the eigenvalues.

    What is None is not known.

    Raises:
        ValueError: shapes that do not fit each other, or values that are not finite.
    """

    mean: Tensor
    variance: Tensor
    frequencies: Tensor | None = None
    eigenvalues: Tensor | None = None
    eigenvectors: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.eigenvalues is None) != (self.eigenvectors is None):
            raise ValueError("eigenvalues and eigenvectors: both or none are required")
        shape, size = tuple(self.mean.shape), self.mean.numel()
        r = 0 if self.eigenvectors is None else min(self.eigenvectors.shape[-1:].numel(), size)
        required = {"eigenvalues": (size,), "eigenvectors": (size, r)}
        for name, value in self.tensors().items():
            if tuple(value.shape) != required.get(name, shape):
                raise ValueError(f"{name} of shape {required.get(name, shape)} is required, got {tuple(value.shape)}")
            if not bool(value.isfinite().all()):
                raise ValueError(f"{name} is not finite")

    @staticmethod
    def of(images: Tensor) -> Statistics:
        """The statistics of images (n, C, H, W); sums in float64, a few thousand images at a time, and D³ operations.

        Raises:
            ValueError: images of another shape, or none.
        """
        if not isinstance(images, Tensor) or images.dim() != 4 or len(images) == 0:
            got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"images: a tensor (n, C, H, W) is required, got {got}")
        images, shape, count = images.detach().cpu(), images.shape[1:], len(images)
        rows, columns = cosines(shape[1]), cosines(shape[2])
        mean = images.mean(0, dtype=torch.float64)
        variance, frequencies = torch.zeros_like(mean), torch.zeros_like(mean)
        size = shape.numel()
        covariance = torch.zeros(size, size, dtype=torch.float64) if size <= LARGEST else None
        for part in images.split(4096):
            centred = part.double() - mean
            variance += centred.square().sum(0) / count
            frequencies += (rows.T @ centred @ columns).square().sum(0) / count
            if covariance is not None:
                covariance.addmm_(centred.flatten(1).T, centred.flatten(1), alpha=1 / count)
        known = (mean, variance, frequencies, *(() if covariance is None else _leading(covariance)))
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


def read_statistics(tensors: Mapping[str, Tensor], shape: tuple[int, ...], path: Path) -> Statistics | None:
    """What the tensors "data.…" of a file hold of images of `shape`; None where they have no mean and variance."""
    names = [part.name for part in fields(Statistics) if f"data.{part.name}" in tensors]
    if not {"mean", "variance"} <= set(names):
        return None
    known = {name: tensors[f"data.{name}"] for name in names}
    try:
        if tuple(known["mean"].shape) != shape:
            raise ValueError(f"mean of shape {shape} is required, got {tuple(known['mean'].shape)}")
        return Statistics(**known)
    except ValueError as error:
        raise ValueError(f"{path}: data.{error}") from error


def _leading(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """eigenvalues and eigenvectors, as in `Statistics`, of a covariance (D, D)."""
    values, vectors = (part.flip(-1) for part in torch.linalg.eigh(covariance))
    return values, vectors[:, values > VARIANCE_FLOOR * values.mean()]
