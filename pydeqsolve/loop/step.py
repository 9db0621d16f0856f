"""One step of the samples still running: measure, judge, advance; finished samples leave in between."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..shards import Shards
from ..status import Status
from ..step.backend import Backend, NativeCPU
from ..step.records import KEEP, REJECT
from ..stop import Stop
from .batch import Batch
from .gate import Gate
from .judge import SampleJudge, Verdict
from .kept import History

NOBODY = Stop()  # asks for a step that waits for a solve


class Step:
    """The passes one after the other."""

    def __init__(self, backend: Backend, judge: SampleJudge, gate: Gate | None = None) -> None:
        self.backend, self.judge, self.gate = backend, judge, gate
        self._dropped: Tensor | None = None  # (n, T) differences that the last `advance` left out

    def measure(self, batch: Batch, f: Tensor, wanted: Tensor | None, last: bool) -> Verdict:
        """Takes in f (n, …), the value at batch.z, of the blocks `wanted` (n, T). last: no step will follow."""
        f = f.view_as(batch.z)
        norms = self.backend.measure(f, batch.z, batch.rows, wanted)
        if batch.problem.shards.many:
            norms = self._over_shards(batch, norms)
        dropped, self._dropped = self._dropped, None
        return self.judge.judge(batch, f, norms, dropped, wanted)

    def _over_shards(self, batch: Batch, norms: Tensor) -> Tensor:
        """Adds up what was measured over the shards, in one exchange; norms (n, T, 2) of all features."""
        shards, backend, rows = batch.problem.shards, self.backend, batch.rows
        assert isinstance(shards, Shards)
        sums = backend.sums(rows)
        maxima = shards.placed(norms) if backend.rule.norm == "max" else norms.new_empty(0)
        found, eps = shards.reduced(torch.cat([sums.flatten(), maxima.flatten()]), batch.eps)
        sums, maxima = found[: sums.numel()].view_as(sums), found[sums.numel() :].view_as(maxima)
        backend.put_sums(rows, sums)
        if eps > batch.eps:
            batch.eps = eps
            self.judge.computes_in(eps)
        return maxima.amax(0) if len(maxima) else sums[..., :2].contiguous()

    def advance(self, batch: Batch, verdict: Verdict) -> None:
        """Moves every sample to its next iterate."""
        z_next = verdict.z_next
        if z_next is None:
            z_next, self._dropped = self.backend.advance(batch.z, verdict.mode, batch.rows, batch.spare())
            if self.gate is not None:
                z_next = self.gate.passed(batch, self.judge, verdict, z_next)
        batch.move(self.judge.redirect(batch.z, z_next))

    def retire(self, batch: Batch, verdict: Verdict) -> Verdict:
        """Lets finished samples leave the batch; the verdict on those that stay."""
        if verdict.finished == 0:
            return verdict
        running = self.judge.samples.running
        if bool(running.all()):
            return verdict._replace(finished=None)
        self._leave(batch, ~running, verdict.mode, ended=False)
        stay = running.nonzero()[:, 0]
        batch.select(stay)
        self.judge.select(stay)
        if self.gate is not None:
            self.gate.select(stay)
        z_next = None if verdict.z_next is None else verdict.z_next[stay]
        return Verdict(verdict.mode[stay].contiguous(), None, z_next)

    def finish(self, batch: Batch, verdict: Verdict) -> None:
        """Ends what is still running, its budget spent or the solve stopped, the verdict not yet carried out."""
        if batch.size:
            self.judge.expire()
            self._leave(batch, torch.ones_like(batch.rows, dtype=torch.bool), verdict.mode, ended=True)

    def tell(self) -> tuple[list[Tensor], int | None]:
        """`Backend.tell` of all samples, which have finished."""
        return self.backend.tell(self.judge.left)

    def _leave(self, batch: Batch, leaving: Tensor, mode: Tensor, ended: bool) -> None:
        """Stores iterates and records of the samples `leaving` (n,) bool."""
        moves, z = self.judge.final(batch, leaving, mode, ended)
        batch.store(moves, z)
        self.judge.leave(batch, leaving, z)


class FusedStep(Step):
    """All passes in one native call, where nobody looks at a sample between its measurement and its move."""

    def __init__(self, backend: NativeCPU, judge: SampleJudge, key: Any = None) -> None:
        super().__init__(backend, judge)
        self.native = backend
        self._mode: Tensor | None = None  # (n, T), written anew at each step
        self.key = key  # under which it is kept for later solves (`reuse`); None: it is not
        self._table = None if key is None else judge.samples.table  # (B, …), of all samples

    def restart(self, stop: Stop) -> None:
        """Makes itself the step of another solve of as many samples, about to begin."""
        assert self._table is not None
        self.backend.ring.clear()
        self.judge.restart(stop, self._table)

    def forget(self) -> None:
        """Lets go of what it knows of a solve that has ended."""
        self._dropped, self.judge.stop = None, NOBODY

    def measure(self, batch: Batch, f: Tensor, wanted: Tensor | None, last: bool) -> Verdict:
        if last:
            self._mode = None
            return super().measure(batch, f, wanted, last)
        z_next, mode, z = batch.spare(), self._mode, batch.z
        if mode is None or mode.shape[0] != batch.size:
            mode = self._mode = torch.empty(z.shape[:2], dtype=torch.uint8, device=z.device)
        finished, _ = self.native.step(
            f, z, batch.mapped, wanted, self.judge.samples, batch.before, batch.full, mode, z_next
        )
        return Verdict(mode, finished, z_next)

    def advance(self, batch: Batch, verdict: Verdict) -> None:
        assert verdict.z_next is not None  # by `measure`, but for the last step
        batch.before, batch.z = batch.z, verdict.z_next

    def retire(self, batch: Batch, verdict: Verdict) -> Verdict:
        if not verdict.finished or verdict.z_next is None:  # those of the last step leave with the others
            return verdict
        samples, together = self.judge.samples, verdict.finished == batch.size
        left = self.judge.leave_together() if together else self.judge.left
        self.native.leave(batch.mapped, batch.z, samples, batch.full, left, ended=False)
        if together:
            batch.size = 0
            return verdict
        return Verdict(verdict.mode, 0, batch.close_up(batch.size - verdict.finished, samples, verdict.z_next))

    def finish(self, batch: Batch, verdict: Verdict) -> None:
        if batch.size:
            left = self.judge.leave_together()
            self.native.leave(batch.mapped, batch.z, self.judge.samples, batch.full, left, ended=True)


class KeepingStep(Step):
    """The passes, with the rows of every sample noted for a later solve."""

    def __init__(self, backend: Backend, judge: SampleJudge, history: History, gate: Gate | None = None) -> None:
        super().__init__(backend, judge, gate)
        self.history = history

    def measure(self, batch: Batch, f: Tensor, wanted: Tensor | None, last: bool) -> Verdict:
        verdict = super().measure(batch, f, wanted, last)
        self.history.note(batch.rows, self.judge.samples.running)
        return verdict

    def _leave(self, batch: Batch, leaving: Tensor, mode: Tensor, ended: bool) -> None:
        super()._leave(batch, leaving, mode, ended)
        self._remember(batch, leaving, mode)

    def _remember(self, batch: Batch, leaving: Tensor, mode: Tensor) -> None:
        """Puts samples into the history: where they are, or where a refused step takes them back to."""
        refused = (mode == REJECT) & leaving[:, None]
        back = torch.where(refused, REJECT, KEEP).to(mode.dtype)
        z = self.backend.advance(batch.z, back, batch.rows)[0]
        status, steps = self.judge.samples["status"], self.judge.samples["steps"]
        lost = (status == int(Status.NONFINITE)) | (status == int(Status.DIVERGED))
        z = torch.where(lost[:, None, None], batch.full[batch.rows], z)
        self.history.take(batch.rows[leaving], z[leaving], steps[leaving], (lost | refused.any(1))[leaving])
