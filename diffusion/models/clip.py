"""Predicted images held in range."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import flag

QUANTILE_ENTRIES = 2**24 - 1  # more, torch.quantile does not take at once


@dataclass(frozen=True)
class Clip:
    """Keeps the image that a step predicts, x̂_0 = (x_t − √(1−ᾱ) ε)/√ᾱ, in range; ε stays what the model said.

    bound: x̂_0 is clipped to ±bound (diffusers' `clip_sample`). quantile: if given, x̂_0 is divided by s after being
    clipped to ±s, s the quantile of its |entries|, no less than 1 and no more than `bound`: dynamic thresholding
    (Saharia et al. 2022), one s per image. consistent: ε is taken anew from the clipped image, (x_t − √ᾱ x̂_0)/√(1−ᾱ),
    as DDPM's posterior mean does and diffusers' `use_clipped_model_output`.
    """

    bound: float = 1.0
    quantile: float | None = None
    consistent: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.bound, bool) or not isinstance(self.bound, (int, float)) or not self.bound > 0:
            raise ValueError(f"bound: a positive number is required, got {self.bound!r}")
        if self.quantile is not None and not 0 < self.quantile <= 1:
            raise ValueError(f"quantile: a number in (0, 1] is required, got {self.quantile!r}")
        flag("consistent", self.consistent)
        if self.quantile is not None and self.bound < 1:
            raise ValueError(f"bound: at least 1 is required with a quantile, got {self.bound}")

    def __call__(self, x_0: Tensor) -> Tensor:
        """(n, D) → (n, D)."""
        if self.quantile is None:
            return x_0.clamp(-self.bound, self.bound)
        parts = x_0.abs().split(max(1, QUANTILE_ENTRIES // x_0.shape[1]))
        s = torch.cat([torch.quantile(part, self.quantile, dim=1) for part in parts]).clamp(1, self.bound)[:, None]
        return torch.minimum(torch.maximum(x_0, -s), s) / s

    @staticmethod
    def recorded(record: Any) -> Clip | None:
        """The clip that `Schedule.to_config` has recorded."""
        known = {"bound", "quantile", "consistent"}
        if record is None:
            return None
        if not isinstance(record, dict) or not {"bound", "quantile"} <= set(record) <= known:
            raise ValueError(f"clip: bound and quantile are required, got {record!r}")
        return Clip(**record)
