"""What a measurement means for each sample: converged, stalled, diverged, non-finite, or a step to be refused.

Everything here is a tensor over the n samples still running; nothing is read back to the host, so that the loop can
look at the flags as late as it likes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..status import Status
from ..step import native
from ..step.backend import Backend
from ..step.records import RUNNING, SAMPLE, Records
from ..stop import RTOL, Stop, is_left_open
from .batch import Batch

UNSEEN = 1e-160  # root of a sum of squares that float64 rounds coarsely, or to zero
SMALL = 1e-140  # ‖f‖ of states of which less than `UNSEEN` is more than rounding
UNKNOWNS, FLOOR, AT_RTOL, AT_ATOL = map(SAMPLE.index, ("unknowns", "floor", "rtol", "atol"))
FIRST = [0.0] * len(SAMPLE)  # of a sample before its first step
for _name in ("best", "previous", "residual", "recent", "earlier"):
    FIRST[SAMPLE.index(_name)] = math.inf
FIRST[SAMPLE.index("status")] = float(RUNNING)
ROUNDING = 8.0  # residuals within so many units of rounding of ‖f‖ cannot be improved on


class Verdict(NamedTuple):
    """All that a measurement tells the rest of a step."""

    mode: Tensor  # (n, T) uint8, what becomes of each block
    finished: int | None = 0  # samples finished, None where counting would wait for the device
    z_next: Tensor | None = None  # (n, T, D), where it is known already


class SampleJudge:
    """The judgement of whole samples by `rules.judge_samples`.

    samples: the records of those still running.
    """

    def __init__(self, B: int, stop: Stop, backend: Backend) -> None:
        self.rule, self.backend = backend.rule, backend
        self._begin(stop, native.table_of(B, self._first(stop), backend.ring.R.device))

    def restart(self, stop: Stop, table: Tensor) -> None:
        """Makes itself the judge of another solve, the records in table (B, len(SAMPLE)), on the host."""
        self._begin(stop, native.table_of(len(table), self._first(stop), table.device, table))

    def _first(self, stop: Stop) -> list[float]:
        """The record of a sample before its first measurement."""
        first = FIRST.copy()
        first[UNKNOWNS], first[FLOOR] = float(self.rule.unknowns), ROUNDING * self.rule.eps
        first[AT_RTOL] = 0.0 if isinstance(stop.rtol, Tensor) else float(stop.rtol)
        first[AT_ATOL] = 0.0 if isinstance(stop.atol, Tensor) else float(stop.atol)
        return first

    def _begin(self, stop: Stop, table: Tensor) -> None:
        self.stop, self.samples = stop, Records(SAMPLE, table)
        for name, tolerance in (("rtol", stop.rtol), ("atol", stop.atol)):
            if isinstance(tolerance, Tensor) and tolerance.dim() < 2:
                self.samples[name] = tolerance.to(table.device, torch.float64)
        self._left: Records | None = None
        self._eps = self.rule.eps  # that fn computes with, as far as was seen
        self._at_once = stop.interval(table.device) == 1  # finished samples leave before the next step

    @property
    def left(self) -> Records:
        """Those of finished samples, where they had them, (B,)."""
        if self._left is None:
            self._left = Records(SAMPLE, native.buffer_like(self.samples.table))
        return self._left

    def leave_together(self) -> Records:
        """`left` for all samples that still run: their own records, as they lie, where nobody has left before."""
        if self._left is None:
            self._left = self.samples
        return self._left

    @property
    def tolerances(self) -> Records:
        """The records that hold rtol and atol."""
        return self.samples

    def computes_in(self, eps: float) -> None:
        """Takes note that fn computes with machine epsilon `eps`, of the state's dtype or coarser."""
        if is_left_open(self.stop) and eps > RTOL:
            self.tolerances["rtol"] = self.tolerances["rtol"].clamp_min(eps)
        if eps != self._eps:
            self._eps = eps
            self.samples["floor"] = ROUNDING * eps

    def wanted(self, T: int) -> Tensor | None:
        """(n, T) bool: blocks to evaluate; None means all."""
        if self._at_once:
            return None
        return self.samples.running[:, None].expand(-1, T).contiguous()

    def judge(self, batch: Batch, f: Tensor, norms: Tensor, dropped: Tensor | None, wanted: Tensor | None) -> Verdict:
        """Takes in the norms (n, T, 2) of f (n, T, D); keeps best iterates that are about to be left behind.

        dropped (n, T): differences that the step before dropped.
        """
        mode, finished, left_behind = self.backend.judge(self.samples, norms, dropped)
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

    def leave(self, batch: Batch, leaving: Tensor, z: Tensor) -> None:
        """Stores the records of the samples `leaving` (n,), whose final iterates are in z (n, T, D).

        STALLED, not CONVERGED, where z is so small that squares of the residual asked for vanish: it is not known.
        """
        samples = self.samples
        if z.dtype == torch.float64 and self.rule.norm != "max":
            unseen = leaving & is_unseen(samples)
            if bool((unseen & (samples["status"] == float(Status.CONVERGED.value))).any()):
                doubt(samples, unseen & batch.problem.shards.somewhere((z != 0).flatten(1).any(1)))
        self.left.table[batch.rows[leaving]] = samples.table[leaving]

    def settle(self, eps: float) -> None:
        """STALLED, not CONVERGED, where the tolerance met is one that no residual resolves when fn computes with `eps`.

        Which was by chance: both f and z are rounded to eps / 2. Equality, a tolerance of zero, can be met.
        """
        rtol = self.stop.rtol
        if is_left_open(self.stop) or (not isinstance(rtol, Tensor) and rtol >= eps / 2):
            return
        doubt(self.left, is_unresolved(self.left, eps))

    def expire(self) -> None:
        """Ends what is still running for want of budget: MAX_STEPS, or DIVERGED when the residual had grown a lot."""
        expire(self.samples)

    def select(self, keep: Tensor) -> None:
        """Keeps the samples whose positions are in `keep` (k,)."""
        self.samples.select(keep)


def expire(samples: Records) -> None:
    """`SampleJudge.expire` of records (n,)."""
    grown = (samples["previous"] > 1e6 * samples["best"]) & (samples["previous"] < torch.inf)
    ended = torch.where(grown, float(Status.DIVERGED.value), float(Status.MAX_STEPS.value))
    samples["status"] = torch.where(samples.running, ended, samples["status"])


def is_unseen(samples: Records) -> Tensor:
    """(n,) bool: the squares of the residual asked for vanish in float64."""
    goal = samples["atol"] + samples["rtol"] * samples["size"]
    return (samples["size"] < SMALL) & (goal < UNSEEN) & (samples["rtol"] < torch.inf)


def is_unresolved(samples: Records, eps: float | Tensor) -> Tensor:
    """(n,) bool: the tolerance is positive, and below the rounding of f and z in a precision of `eps`."""
    tolerance = samples["atol"] + samples["rtol"] * samples["size"]
    return (tolerance > 0) & (tolerance < eps / 2 * samples["size"])


def doubt(records: Records, which: Tensor) -> None:
    """STALLED, not CONVERGED, for the samples `which` (n,)."""
    status = records["status"]
    doubted = which & (status == float(Status.CONVERGED.value))
    records["status"] = torch.where(doubted, float(Status.STALLED.value), status)
