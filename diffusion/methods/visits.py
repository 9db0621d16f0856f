"""Where a chain was evaluated, and how steep the network was found to be there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TOLD = 100.0  # a move of fewer units of rounding of the state tells no slope


@dataclass(eq=False)
class Visits:
    """Where every step was evaluated last, its value there, and the slope of N along its last move."""

    x: Tensor  # (B, T, D), NaN where it was not
    value: Tensor  # (B, T, D)
    slope: Tensor  # (B, T), NaN where unknown
    least: Tensor  # (B, T), the least slope of all moves
    precision: float  # machine epsilon of the network

    @staticmethod
    def none(like: Tensor, precision: float) -> Visits:
        """Before the first round; like (B, T, D)."""
        unknown = torch.full_like(like, torch.nan)
        return Visits(unknown, torch.zeros_like(like), unknown[..., 0].clone(), unknown[..., 0].clone(), precision)

    def note(self, i: Tensor, k: Tensor, x: Tensor, value: Tensor) -> None:
        """N is `value` (n, D) at states x (n, D) of the images i and steps k (n,)."""
        slope, sound = slopes(x - self.x[i, k], value - self.value[i, k], x, self.precision)
        self.slope[i, k] = torch.where(sound, slope, self.slope[i, k])
        self.least[i, k] = torch.where(sound, torch.fmin(slope, self.least[i, k]), self.least[i, k])
        self.x[i, k], self.value[i, k] = x, value


def slopes(s: Tensor, y: Tensor, x: Tensor, precision: float) -> tuple[Tensor, Tensor]:
    """⟨y, s⟩/|s|² (…) of moves s and changes y (…, D) at x, and where the move is large enough to tell."""
    moved, size = s.square().sum(-1), x.square().sum(-1)
    slope = (y * s).sum(-1) / moved
    return slope, (moved > (TOLD * precision) ** 2 * size) & slope.isfinite()
