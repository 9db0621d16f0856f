"""Backtracking along the steps of a quasi-Newton solver, per sample."""

from __future__ import annotations

import torch
from torch import Tensor

from ..solution import Status
from ..step.backend import Backend
from ..step.records import MIX, REJECT, RUNNING
from ..step.rules import Rule
from ..stop import Stop
from .batch import Batch
from .judge import SampleJudge, Verdict


class Backtracking(SampleJudge):
    """Halves a step as long as its residual is too large.

    A trial z + λ d is taken when ‖r(z + λ d)‖ ≤ (1 + 1/k²) ‖r(z)‖, k the steps taken so far: a summable allowance, so
    that steps may grow the residual only so often (Li & Fukushima 2000, Eq. 2.5 without its quadratic term, which
    would depend on the scale of z). Otherwise λ is halved, `most` times at most; the last trial is taken as it is. What
    was measured at a refused trial stays in the history: its secant equation is as true as any other.
    """

    def __init__(self, most: int, z: Tensor, stop: Stop, rule: Rule, backend: Backend) -> None:
        n = z.shape[0]
        super().__init__(n, stop, rule, backend)
        self.most = most
        self.base = z  # (n, T, D) the last iterate taken
        self.residual = torch.full((n,), torch.inf, dtype=torch.float64, device=z.device)  # (n,) of base
        self.halvings = torch.zeros(n, dtype=torch.int64, device=z.device)  # (n,) of the current trial
        self.taken = torch.zeros(n, dtype=torch.float64, device=z.device)  # (n,) k

    def judge(self, batch: Batch, norms: Tensor, dropped: Tensor | None, wanted: Tensor | None) -> Verdict:
        """Takes or refuses the trials z (n, T, D) that have just been measured.

        A refused trial counts as a rejection. One that is not finite, or so large that the sample would be given up,
        is refused like any other, but its row must go, and the history with it.
        """
        mode, samples = super().judge(batch, norms, dropped, wanted).mode, self.samples
        found = samples["residual"]
        allowed = (1 + 1 / self.taken.clamp_min(1).square()) * self.residual
        ended = samples["status"]
        given_up = (ended == int(Status.NONFINITE)) | (ended == int(Status.DIVERGED))
        open_ = (samples["judged"] != 0) & (samples.running | given_up) & (self.halvings < self.most) & (self.taken > 0)
        refused = open_ & ~(found <= allowed)
        forgets = refused & (given_up | ~found.isfinite())
        samples["status"] = torch.where(refused, float(RUNNING), ended)
        self.base = torch.where(refused[:, None, None], self.base, batch.z)
        # Growth and stagnation are judged against the iterate taken, not against a trial beyond it.
        samples["previous"] = torch.where(refused, self.residual, samples["previous"])
        samples["rejections"] = samples["rejections"] + (refused & (mode != REJECT).all(1))
        self.residual = torch.where(refused, self.residual, found)
        self.halvings = torch.where(refused, self.halvings + 1, 0)
        self.taken = self.taken + ~refused
        mode = torch.where(forgets[:, None], REJECT, torch.where((refused & ~forgets)[:, None], MIX, mode)).to(
            mode.dtype
        )
        return Verdict(mode, None)

    def redirect(self, z: Tensor, z_next: Tensor) -> Tensor:
        """z_next (n, T, D), but halfway back from the trial z where that was refused."""
        wide = torch.promote_types(z.dtype, torch.float32)
        middle = (0.5 * (self.base.to(wide) + z.to(wide))).to(z.dtype)
        return torch.where((self.halvings > 0)[:, None, None], middle, z_next)

    def select(self, keep: Tensor) -> None:
        super().select(keep)
        for name in ("base", "residual", "halvings", "taken"):
            setattr(self, name, getattr(self, name)[keep])
