"""What a measurement means for each sample: converged, stalled, diverged, non-finite, or a step to be refused.

Everything here is a tensor over the n samples still running; nothing is read back to the host, so that the loop can
look at the flags as late as it likes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..status import Status
from ..step.backend import Backend
from ..step.records import RUNNING, SAMPLE, Records
from ..step.rules import Rule
from ..stop import Stop
from .batch import Batch

ROUNDING = 8.0  # residuals within so many units of rounding of ‖f‖ cannot be improved on


def precision(dtype: torch.dtype, device: torch.device) -> float:
    """The unit of rounding that fn computes in: that of the state, or of autocast where that is on and coarser."""
    eps = torch.finfo(dtype).eps
    if dtype == torch.float64 or not torch.is_autocast_enabled(device.type):
        return eps
    return max(eps, torch.finfo(torch.get_autocast_dtype(device.type)).eps)


@dataclass(frozen=True, eq=False)
class Verdict:
    """All that a measurement tells the rest of a step."""

    mode: Tensor  # (n, T) uint8, what becomes of each block
    finished: int | None = 0  # samples finished, None where counting would wait for the device
    z_next: Tensor | None = None  # (n, T, D), where it is known already


class SampleJudge:
    """The judgement of whole samples by `rules.judge_samples`.

    samples: the records of those still running. left: those of finished ones, where they had them, (B,).
    """

    def __init__(self, B: int, stop: Stop, rule: Rule, backend: Backend) -> None:
        self.stop, self.rule, self.backend = stop, rule, backend
        self.samples, self.left = self._begin(B), self._begin(B)
        self._at_once = stop.interval(self.samples.table.device) == 1  # finished samples leave before the next step

    def _begin(self, B: int) -> Records:
        device = self.backend.ring.R.device
        samples = Records(SAMPLE, B, device=device)
        for name in ("best", "previous", "residual", "recent", "earlier"):
            samples[name] = torch.inf
        samples["status"] = RUNNING
        samples["unknowns"] = self.rule.unknowns
        samples["floor"] = ROUNDING * precision(self.backend.ring.dtype, device)
        for name in ("rtol", "atol"):
            tolerance = getattr(self.stop, name)
            if not isinstance(tolerance, Tensor):
                samples[name] = tolerance
            elif tolerance.dim() < 2:
                samples[name] = tolerance.to(device, torch.float64)
        return samples

    def wanted(self, T: int) -> Tensor | None:
        """(n, T) bool: blocks to evaluate; None means all."""
        if self._at_once:
            return None
        return self.samples.running[:, None].expand(-1, T).contiguous()

    def judge(self, batch: Batch, f: Tensor, norms: Tensor, dropped: Tensor | None, wanted: Tensor | None) -> Verdict:
        """Takes in the norms (n, T, 2) of f (n, T, D); keeps best iterates that are about to be left behind.

        dropped (n, T): differences that the step before dropped.
        """
        mode, finished, left_behind = self.backend.judge(self.samples, norms, dropped, self.rule)
        if left_behind is None or left_behind > 0:
            self.backend.keep(batch.full, batch.rows, batch.before, self.samples)
        return Verdict(mode, finished)

    def redirect(self, z: Tensor, z_next: Tensor) -> Tensor:
        """Where the samples go from z (n, T, D) instead of z_next (n, T, D)."""
        return z_next

    def final(self, batch: Batch, leaving: Tensor, mode: Tensor, ended: bool) -> tuple[Tensor, Tensor]:
        """Which of the samples `leaving` (n,) take a new final iterate, and those iterates (n, T, D).

        ended: their budget is spent. Others keep what was left behind; a sample that never had a finite residual keeps
        its first guess.
        """
        return leaving & (self.samples["fresh"] != 0), batch.z

    def leave(self, batch: Batch, leaving: Tensor) -> None:
        """Stores the records of the samples `leaving` (n,)."""
        self.left.table[batch.rows[leaving]] = self.samples.table[leaving]

    def expire(self) -> None:
        """Ends what is still running for want of budget: MAX_STEPS, or DIVERGED when the residual had grown a lot."""
        samples = self.samples
        grown = (samples["previous"] > 1e6 * samples["best"]) & (samples["previous"] < torch.inf)
        ended = torch.where(grown, float(Status.DIVERGED), float(Status.MAX_STEPS))
        samples["status"] = torch.where(samples.running, ended, samples["status"])

    def select(self, keep: Tensor) -> None:
        """Keeps the samples whose positions are in `keep` (k,)."""
        self.samples.select(keep)
