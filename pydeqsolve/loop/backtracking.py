"""Backtracking along the steps of a quasi-Newton solver, per sample."""

from __future__ import annotations

import torch
from torch import Tensor

from ..status import Status
from ..step.backend import Backend
from ..step.records import MIX, REJECT, RUNNING
from ..stop import Stop
from .batch import Batch
from .judge import SampleJudge, Verdict

ABOVE_LEAST = 3.0  # safeguards above the least residual so far: growth that repeats is growth without bound


class Backtracking(SampleJudge):
    """Halves a step as long as its residual grows too much.

    A trial z + λ d is refused when ‖r(z + λ d)‖ > s ‖r(z)‖ or > 3 s times the least residual so far, s the solver's
    safeguard, or when f is not finite there. Then λ is halved, `most` times at most. When that is spent, the sample
    takes the plain step f(z) and forgets its history; a plain step is halved alike, and its last trial is taken as it
    is, or ends the sample where f is not finite. So a step costs 2 (most + 1) evaluations at most. Residuals that may
    not grow at all (Li & Fukushima 2000, Eq. 2.5) were tried and refuse the steps by which a limited memory learns.

    What was measured at a refused trial stays in the history: its secant equation is as true as any other. Only a row
    that is not finite must go, and the history with it. Takes two words per entry of the state.
    """

    def __init__(self, most: int, growth: float, z: Tensor, stop: Stop, backend: Backend) -> None:
        n = z.shape[0]
        super().__init__(n, stop, backend)
        self.most, self.growth = most, growth
        self.base = self.value = z  # (n, T, D) the last iterate taken, and f there
        self.residual = torch.full((n,), torch.inf, dtype=torch.float64, device=z.device)  # (n,) of base
        self.least = self.residual.clone()  # (n,) of all that were taken
        self.halvings = torch.zeros(n, dtype=torch.int64, device=z.device)  # (n,) of the current trial
        self.plain = torch.ones(n, dtype=torch.bool, device=z.device)  # (n,) whether it lies on the plain step
        self.back = torch.zeros_like(self.plain)  # (n,) whether the next one is to be the plain step

    def judge(self, batch: Batch, f: Tensor, norms: Tensor, dropped: Tensor | None, wanted: Tensor | None) -> Verdict:
        """Takes or refuses the trials that have just been measured.

        A refused trial counts as a rejection, also one at which the rules for samples would have given the sample up.
        """
        mode, samples = super().judge(batch, f, norms, dropped, wanted).mode, self.samples
        count = self.backend.ring.count[batch.rows]
        found, ended = samples["residual"], samples["status"].clone()
        given_up = (ended == int(Status.NONFINITE)) | (ended == int(Status.DIVERGED)) | ~found.isfinite()
        allowed = torch.minimum(self.growth * self.residual, ABOVE_LEAST * self.growth * self.least)
        tried = (samples["judged"] != 0) & (samples.running | given_up) & (self.residual < torch.inf)
        fails = tried & ~(found.isfinite() & (found <= allowed))
        refused = fails & (self.halvings < self.most)
        self.back = fails & ~refused & ~self.plain
        held = refused | self.back
        lost = fails & ~held & samples.running & ~found.isfinite()
        samples["status"] = torch.where(held, float(RUNNING), torch.where(lost, float(Status.NONFINITE), ended))
        # Growth and stagnation are judged against the iterate taken, not against a trial beyond it.
        samples["previous"] = torch.where(held, self.residual, samples["previous"])
        samples["rejections"] = samples["rejections"] + (held & (mode != REJECT).all(1))
        self.base = torch.where(held[:, None, None], self.base, batch.z)
        self.value = torch.where(held[:, None, None], self.value, f)
        self.residual = torch.where(held, self.residual, found)
        self.least = torch.where(held | ~(found < self.least), self.least, found)
        self.halvings = torch.where(refused, self.halvings + 1, 0)
        self.plain = torch.where(held, self.plain | self.back, (count <= 1).all(1))
        forgets = self.back | (refused & given_up)
        mode = torch.where((refused & ~forgets)[:, None], MIX, mode)
        return Verdict(torch.where(forgets[:, None], REJECT, mode).to(torch.uint8), None)

    def redirect(self, z: Tensor, z_next: Tensor) -> Tensor:
        """z_next (n, T, D), but halfway back from the trial z where that was refused, or f(base) after the last one."""
        wide = torch.promote_types(z.dtype, torch.float32)
        middle = (0.5 * (self.base.to(wide) + z.to(wide))).to(z.dtype)
        z_next = torch.where((self.halvings > 0)[:, None, None], middle, z_next)
        return torch.where(self.back[:, None, None], self.value, z_next)

    def select(self, keep: Tensor) -> None:
        super().select(keep)
        for name in ("base", "value", "residual", "least", "halvings", "plain", "back"):
            setattr(self, name, getattr(self, name)[keep])
