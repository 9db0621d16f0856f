"""Backtracking along the steps of a quasi-Newton solver, per sample."""

from __future__ import annotations

import torch
from torch import Tensor

from .monitor import Monitor


class LineSearch:
    """Halves a step as long as its residual is too large, for n samples at hand.

    A trial z + λ d is taken when ‖r(z + λ d)‖ ≤ (1 + 1/k²) ‖r(z)‖, k the steps taken so far: a summable allowance, so
    that steps may grow the residual only so often (Li & Fukushima 2000, Eq. 2.5 without its quadratic term, which
    would depend on the scale of z). Otherwise λ is halved, `most` times at most; the last trial is taken as it is. What
    was measured at a refused trial stays in the history: its secant equation is as true as any other.
    """

    def __init__(self, most: int, z: Tensor) -> None:
        n = z.shape[0]
        self.most = most
        self.base = z  # (n, T, D) the last iterate taken
        self.residual = torch.full((n,), torch.inf, dtype=torch.float64, device=z.device)  # (n,) of base
        self.halvings = torch.zeros(n, dtype=torch.int64, device=z.device)  # (n,) of the trial at hand
        self.taken = torch.zeros(n, dtype=torch.float64, device=z.device)  # (n,) k

    def judge(self, monitor: Monitor, z: Tensor) -> None:
        """Takes or refuses the trials z (n, T, D) that the monitor has just measured."""
        found = monitor["residual"]
        allowed = (1 + 1 / self.taken.clamp_min(1).square()) * self.residual
        refused = ~(found <= allowed) & (self.halvings < self.most) & (self.taken > 0)
        self.base = torch.where(refused[:, None, None], self.base, z)
        # Growth and stagnation are judged against the iterate taken, not against a trial beyond it.
        monitor["previous"] = torch.where(refused, self.residual, monitor["previous"])
        self.residual = torch.where(refused, self.residual, found)
        self.halvings = torch.where(refused, self.halvings + 1, 0)
        self.taken = self.taken + ~refused

    def redirect(self, z: Tensor, z_next: Tensor) -> Tensor:
        """z_next (n, T, D), but halfway back from the trial z where that was refused."""
        return torch.where((self.halvings > 0)[:, None, None], 0.5 * (self.base + z), z_next)

    def select(self, keep: Tensor) -> None:
        """Keeps the samples whose positions are in `keep` (k,)."""
        for name in ("base", "residual", "halvings", "taken"):
            setattr(self, name, getattr(self, name)[keep])
