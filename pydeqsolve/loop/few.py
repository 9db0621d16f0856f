"""The loop's parts for samples of a few unknowns, where what a step costs besides fn is how much memory it touches.

`Batch`, `SampleJudge` and `Step` as the loop knows them, over `step.few.Few`, which judges and keeps records itself.
"""

from __future__ import annotations

from torch import Tensor

from ..memory import is_let_go
from ..problem import Problem
from ..step.few import Few
from ..step.records import SAMPLE, Records
from ..step.ring import Method
from ..step.rules import Rule
from ..stop import RTOL, Stop, is_left_open
from .batch import Batch
from .judge import ROUNDING, SampleJudge, Verdict
from .step import Step


class FewBatch(Batch):
    """z (B, T, D) holds all samples where fn is given all, finished ones at their best; else (n, T, D) those at hand.

    Iterates take turns in `_whole`, (B, T, D) each; `_settled`: how many samples that have finished each holds.
    """

    def __init__(self, problem: Problem, z0: Tensor, backend: Few) -> None:
        super().__init__(problem, z0, z0, backend)
        self.few = backend.begin(self.full)
        self._whole, self._settled, self._at = [self.z], [0], 0

    @property
    def _partial(self) -> bool:
        """z is what fn is to see."""
        return False

    def step(self, f: Tensor, last: bool) -> None:
        """Measures f at z and goes to the next iterates, `last` to none; samples that have finished leave."""
        n, B = self.size, self.full.shape[0]
        at = self._at if last else self._free()
        z_next = None if last else self._whole[at]
        self.size = self.few.step(f, self.z, z_next, self._settled[at])
        if z_next is None or not self.size:
            return
        self._at, self._settled[at] = at, B - self.size
        self.z = self.before = z_next if self.few.wide else z_next[: self.size]
        if self.size < n and not self.few.wide and self.inputs:
            stay = (self.few.done[:n] == 0).nonzero()[:, 0]
            self.inputs = [x[stay] for x in self.inputs]

    def _free(self) -> int:
        """The place of a buffer that nobody looks at: neither the current one nor one that fn has kept."""
        for at, buffer in enumerate(self._whole):
            if at != self._at and is_let_go(buffer):
                return at
        buffer = self.backend.buffer_like(self.full)
        settled = 0
        if self.few.wide and self.size < self.full.shape[0]:
            settled = self.full.shape[0] - self.size
            buffer.copy_(self.full)
        if len(self._whole) > 2:
            old = next(at for at in range(len(self._whole)) if at != self._at)
            self._whole[old], self._settled[old] = buffer, settled
            return old
        self._whole.append(buffer)
        self._settled.append(settled)
        return len(self._whole) - 1


class FewJudge(SampleJudge):
    """What the loop asks of a judge; the judgement itself is part of the step."""

    def __init__(self, few: Few, stop: Stop) -> None:
        self.few, self.stop, self.rule, self.backend = few, stop, few.rule, few
        self._eps = few.rule.eps

    @property
    def left(self) -> Records:
        """Of all samples, read from what the step keeps of them."""
        return Records(SAMPLE, self.few.table())

    def wanted(self, T: int) -> Tensor | None:
        return None

    def computes_in(self, eps: float) -> None:
        least = eps if is_left_open(self.stop) and eps > RTOL else 0.0
        if least or eps != self._eps:
            self._eps = eps
            self.few.set_tolerance(least, ROUNDING * eps)

    def settle(self, eps: float) -> None:
        rtol = self.stop.rtol
        if not is_left_open(self.stop) and (isinstance(rtol, Tensor) or rtol < eps / 2):
            self.few.handle.doubt(eps)


class FewStep(Step):
    """One native call, in which finished samples leave too."""

    def __init__(self, few: Few, stop: Stop) -> None:
        super().__init__(few, FewJudge(few, stop))
        self.few = few

    def measure(self, batch: Batch, f: Tensor, wanted: Tensor | None, last: bool) -> Verdict:
        assert isinstance(batch, FewBatch)
        batch.step(f, last)
        return Verdict(self.few.done)

    def retire(self, batch: Batch, verdict: Verdict) -> Verdict:
        return verdict

    def advance(self, batch: Batch, verdict: Verdict) -> None:
        """The step has moved already."""

    def finish(self, batch: Batch, verdict: Verdict) -> None:
        """The last step has ended what still ran."""

    def tell(self) -> tuple[list[Tensor], int]:
        return self.few.outcome()


def assemble_few(problem: Problem, z0: Tensor, method: Method, rule: Rule, stop: Stop) -> tuple[Batch, Step]:
    """Batch and step of a solve that `is_few`."""
    few = Few(method, rule, stop, ROUNDING * rule.eps, wide=not problem.compact)
    batch, step = FewBatch(problem, z0, few), FewStep(few, stop)
    step.judge.computes_in(batch.eps)
    return batch, step
