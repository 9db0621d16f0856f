"""Backtracking along the steps of a quasi-Newton solver, per sample."""

from __future__ import annotations

import torch
from torch import Tensor

from .monitor import RUNNING, Monitor
from .ops import MIX, REJECT
from .status import Status

ABOVE_LEAST = 3.0  # safeguards above the least residual so far: growth that repeats is growth without bound


class LineSearch:
    """Halves a step as long as its residual grows too much, for n samples at hand.

    A trial z + λ d is refused when ‖r(z + λ d)‖ > s ‖r(z)‖ or > 3 s times the least residual so far, s the solver's
    safeguard, or when f is not finite there. Then λ is halved, `most` times at most. When that is spent, the sample
    takes the plain step f(z) and forgets its history; a plain step is halved alike, and its last trial is taken as it
    is, or ends the sample where f is not finite. So a step costs 2 (most + 1) evaluations at most. Residuals that may
    not grow at all (Li & Fukushima 2000, Eq. 2.5) were tried and refuse the steps by which a limited memory learns.

    What was measured at a refused trial stays in the history: its secant equation is as true as any other. Only a row
    that is not finite must go, and the history with it. Takes two words per entry of the state.
    """

    def __init__(self, most: int, growth: float, z: Tensor) -> None:
        n = z.shape[0]
        self.most, self.growth = most, growth
        self.base = self.value = z  # (n, T, D) the last iterate taken, and f there
        self.residual = torch.full((n,), torch.inf, dtype=torch.float64, device=z.device)  # (n,) of base
        self.least = self.residual.clone()  # (n,) of all that were taken
        self.halvings = torch.zeros(n, dtype=torch.int64, device=z.device)  # (n,) of the trial at hand
        self.plain = torch.ones(n, dtype=torch.bool, device=z.device)  # (n,) whether it lies on the plain step
        self.back = torch.zeros_like(self.plain)  # (n,) whether the next one is to be the plain step

    def judge(self, monitor: Monitor, z: Tensor, f: Tensor, count: Tensor, mode: Tensor) -> Tensor:
        """Takes or refuses the trials z (n, T, D), of values f, just measured; returns the mode (n, T).

        count (n, T): rows of the history. A refused trial counts as a rejection, also one at which the monitor would
        have given the sample up.
        """
        found, ended = monitor["residual"], monitor["status"].clone()
        given_up = (ended == int(Status.NONFINITE)) | (ended == int(Status.DIVERGED)) | ~found.isfinite()
        allowed = torch.minimum(self.growth * self.residual, ABOVE_LEAST * self.growth * self.least)
        tried = (monitor["judged"] != 0) & (monitor.running | given_up) & (self.residual < torch.inf)
        fails = tried & ~(found.isfinite() & (found <= allowed))
        refused = fails & (self.halvings < self.most)
        self.back = fails & ~refused & ~self.plain
        held = refused | self.back
        lost = fails & ~held & monitor.running & ~found.isfinite()
        monitor["status"] = torch.where(held, float(RUNNING), torch.where(lost, float(Status.NONFINITE), ended))
        # Growth and stagnation are judged against the iterate taken, not against a trial beyond it.
        monitor["previous"] = torch.where(held, self.residual, monitor["previous"])
        monitor["rejections"] = monitor["rejections"] + (held & (mode != REJECT).all(1))
        self.base = torch.where(held[:, None, None], self.base, z)
        self.value = torch.where(held[:, None, None], self.value, f)
        self.residual = torch.where(held, self.residual, found)
        self.least = torch.where(held | ~(found < self.least), self.least, found)
        self.halvings = torch.where(refused, self.halvings + 1, 0)
        self.plain = torch.where(held, self.plain | self.back, (count <= 1).all(1))
        forgets = self.back | (refused & given_up)
        mode = torch.where((refused & ~forgets)[:, None], MIX, mode)
        return torch.where(forgets[:, None], REJECT, mode).to(torch.uint8)

    def redirect(self, z: Tensor, z_next: Tensor) -> Tensor:
        """z_next (n, T, D), but halfway back from the trial z where that was refused, or f(base) after the last one."""
        wide = torch.promote_types(z.dtype, torch.float32)
        middle = (0.5 * (self.base.to(wide) + z.to(wide))).to(z.dtype)
        z_next = torch.where((self.halvings > 0)[:, None, None], middle, z_next)
        return torch.where(self.back[:, None, None], self.value, z_next)

    def select(self, keep: Tensor) -> None:
        """Keeps the samples whose positions are in `keep` (k,)."""
        for name in ("base", "value", "residual", "least", "halvings", "plain", "back"):
            setattr(self, name, getattr(self, name)[keep])
