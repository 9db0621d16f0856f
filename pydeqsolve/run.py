"""The state of one solve, between the calls of fn: who is still running, where, and what is kept of the others."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import ops
from .front import FrontMonitor
from .history import History
from .monitor import COLUMNS, Monitor
from .ring import Ring
from .search import LineSearch
from .solution import Solution
from .status import Course, Status
from .stop import Front, Stop

if TYPE_CHECKING:
    from .iterate import Problem, Solver


def _holders(x: Tensor) -> int:
    """References to the memory of x; more than it can have when torch does not say."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    return int(count(x.untyped_storage()._cdata)) if count is not None else _ALONE + 1


_ALONE = 2  # the tensor's own reference and that of asking


class Run:
    """The state of one solve. Tensors marked (n, …) hold the samples at hand, which `rows` maps to the B of all."""

    def __init__(
        self, problem: Problem, z0: Tensor, solver: Solver, stop: Stop, front: Front | None, history: History | None,
        keep_history: bool,
    ) -> None:  # fmt: skip
        B, T, D = z0.shape
        self.problem, self.stop, self.front, self.method = problem, stop, front, solver.method()
        self.earlier = history  # until the first measurement has been compared with it
        self.ring = Ring(self.method, B, T, D, z0.dtype, z0.device) if history is None else history.fork()
        ops.start(self.ring)
        line_search = getattr(solver, "line_search", 0)
        # A line search goes back along a step at which the safeguard would throw the history away.
        safeguard = (torch.inf if line_search else solver.safeguard) if self.method.memory else 0.0
        self.monitor: Monitor | FrontMonitor
        if front is None:
            self.monitor = Monitor(B, stop, z0.dtype, z0.device, safeguard, T * D)
        else:
            self.monitor = FrontMonitor(B, T, front, stop, z0.dtype, z0.device, safeguard)
        self.result = copy.copy(self.monitor)  # what finished samples leave behind, every sample once
        self.result.table = torch.empty_like(self.monitor.table)
        self.history = History.begin(self.method, self.ring, z0.clone()) if keep_history else None
        self.rows = torch.arange(B, device=z0.device)  # (n,)
        self.inputs = list(problem.inputs)  # (n, …) each, when compact
        self.z = z0.to(self.ring.dtype).contiguous() if history is None else history.z.clone()  # (n, T, D)
        if history is not None:
            self.monitor["steps"] = (history.since - 1).clamp_min(0)
        self.search = LineSearch(line_search, solver.safeguard, self.z) if line_search else None
        # (B, T, D): finished samples; of the others the iterate of least residual that has been left behind, else z0.
        self.full = ops.buffer_like(z0).copy_(z0)
        self.before = self.z  # (n, T, D): the previous iterate
        self.dropped: Tensor | None = None  # (n, T) differences that the last step left out
        self.finished: int | None = None  # samples finished at the last measurement, where that is known
        self.buffers: list[Tensor] = []
        self.entries = T * D
        # Nothing then looks at a sample between its measurement and its move, which may follow each other natively.
        self.at_once = front is None and self.search is None and self.history is None and ops.can_step(self.ring)
        self.next: Tensor | None = None  # (n, T, D): where `advance` will go

    def wanted(self) -> Tensor | None:
        """(n, T) bool: blocks to evaluate; None means all."""
        if isinstance(self.monitor, FrontMonitor):
            return self.monitor.wanted()
        if self.stop.interval(self.z.device) == 1:
            return None
        return self.monitor.running[:, None].expand(-1, self.z.shape[1]).contiguous()

    def arguments(self, wanted: Tensor | None) -> tuple[Any, list[Tensor], Tensor | None]:
        """What fn is to be called with: the state, the inputs, and with `Front` the blocks that are wanted of it."""
        z = self.z.to(self.problem.layout.dtype)
        self.partial = not self.problem.compact and self.rows.numel() != self.full.shape[0]
        if self.partial:
            z = self.full.index_copy(0, self.rows, z)
        asked = None if self.front is None or wanted is None else self._scatter(wanted) if self.partial else wanted
        self.given, self.version = z, None if z.is_inference() else z._version
        return self.problem.layout.unpack(z), self.inputs, asked

    def take(self, value: Any) -> Tensor:
        """f at the samples at hand, (n, T, D) in the ring's dtype, from the value of fn."""
        given, self.given = self.given, self.full
        if self.version is not None and given._version != self.version:
            raise ValueError("fn must not change its argument z in place")
        f = self.problem.layout.pack(value, "the value of fn")
        if f.shape[0] != given.shape[0]:
            raise ValueError(f"the value of fn must have {given.shape[0]} samples like its argument, got {f.shape[0]}")
        return (f[self.rows] if self.partial else f).to(self.ring.dtype)

    def _scatter(self, wanted: Tensor) -> Tensor:
        full = torch.zeros(self.full.shape[:2], dtype=torch.bool, device=wanted.device)
        full[self.rows] = wanted
        return full

    def measure(self, f: Tensor, wanted: Tensor | None, last: bool) -> Tensor:
        """Mode (n, T) after taking f in; keeps the best iterate. Finds where to `advance` as well where that pays."""
        if self.earlier is not None:
            self.earlier.shift(self.ring, f)
            self.earlier = None
        if self.at_once and not last:
            self.next = self._spare()
            best = self.full if self.full.dtype == self.ring.dtype else None
            mode, self.finished, behind = self.monitor.step(
                self.ring, f, self.z, self.rows, wanted, self.entries, self.before, best, self.next
            )
            if behind > 0 and best is None:
                self._keep_best()
            return mode
        norms = ops.measure(self.ring, f, self.z, self.rows, wanted, self.stop.norm)
        if isinstance(self.monitor, FrontMonitor):
            assert wanted is not None
            mode, broken, self.finished = self.monitor.judge_blocks(norms, self.z.shape[2], wanted)
            if broken is not None:  # rows of broken blocks would spoil the sums of later ones
                self.ring.count[self.rows] = torch.where(broken, 0, self.ring.count[self.rows])
            return mode
        mode, self.finished, left_behind = self.monitor.judge(norms, self.dropped, self.entries)
        self.dropped = None
        if left_behind is None or left_behind > 0:
            self._keep_best()
        if self.search is not None:
            mode = self.search.judge(self.monitor, self.z, f, self.ring.count[self.rows], mode)
            self.finished = None
        if self.history is not None:
            self.history.note(self.rows, self.monitor.running)
        return mode

    def _keep_best(self) -> None:
        """Stores iterates whose successors were worse: a monotone solve copies nothing."""
        if ops.keep(self.full, self.rows, self.before, self.monitor.table):
            return
        left_behind = self.monitor["left_behind"] != 0
        if self.z.device.type == "cpu":
            at = left_behind.nonzero()[:, 0]
            self.full[self.rows[at]] = self.before[at].to(self.full.dtype)
            return
        before = self.before.to(self.full.dtype)  # choosing rows by number would wait for the device
        self.full[self.rows] = torch.where(left_behind[:, None, None], before, self.full[self.rows])

    def retire(self, mode: Tensor) -> Tensor:
        """Lets finished samples leave; returns the mode (n', T) of those that stay."""
        if self.finished == 0:
            return mode
        keep = self.monitor.running
        self.finished = None
        if bool(keep.all()):
            return mode
        self._leave(~keep, mode)
        stay = keep.nonzero()[:, 0]
        self.rows, self.z = self.rows[stay], self.z[stay]
        self.before = self.z
        self.monitor.select(stay)
        if self.next is not None:
            self.next = self.next[stay]
        if self.search is not None:
            self.search.select(stay)
        if self.problem.compact:
            self.inputs = [x[stay] for x in self.inputs]
        return mode[stay].contiguous()

    def _leave(self, leaving: Tensor, mode: Tensor, ended: bool = False) -> None:
        """Stores z and the records of the samples `leaving` (n,) bool; `ended`: as they are, their budget is spent."""
        if self.front is None:
            # Others keep what was left behind; a sample that never had a finite residual keeps z0.
            moves, z = leaving & (self.monitor["fresh"] != 0), self.z
        else:
            moves, z = leaving, self.z if ended else ops.advance(self.ring, self.z, mode, self.rows)[0]
        self.full[self.rows[moves]] = z[moves].to(self.full.dtype)
        self._doubt(leaving, z)
        at = self.rows[leaving]
        self.result.table[at] = self.monitor.table[leaving]
        if self.history is not None:
            self._remember(leaving, mode)

    def _doubt(self, leaving: Tensor, z: Tensor) -> None:
        """STALLED, not CONVERGED, where z (n, T, D) is so small that squares of z and f vanish: no norm is known."""
        if self.ring.dtype != torch.float64 or self.front is not None:
            return
        m = self.monitor
        unseen = leaving & (m["status"] == int(Status.CONVERGED)) & (m["size"] == 0) & (m["atol"] < 1e-150)
        if bool((unseen & (m["rtol"] < torch.inf)).any()):
            unseen &= (z != 0).flatten(1).any(1)
            m["status"] = torch.where(unseen & (m["rtol"] < torch.inf), float(Status.STALLED), m["status"])

    def _remember(self, leaving: Tensor, mode: Tensor) -> None:
        """Puts samples into the history: where they are, or where a refused step takes them back to."""
        assert self.history is not None
        refused = (mode == ops.REJECT) & leaving[:, None]
        z = ops.advance(self.ring, self.z, torch.where(refused, ops.REJECT, ops.KEEP).to(mode.dtype), self.rows)[0]
        status = self.monitor["status"]
        lost = (status == int(Status.NONFINITE)) | (status == int(Status.DIVERGED))
        at = self.rows[leaving]
        z = torch.where(lost[:, None, None], self.full[self.rows].to(z.dtype), z)
        self.history.take(at, z[leaving], self.monitor["steps"][leaving], (lost | refused.any(1))[leaving])

    def advance(self, mode: Tensor) -> None:
        """The next iterate of the samples at hand."""
        if self.next is not None:
            z, self.next = self.next, None
        else:
            z, self.dropped = ops.advance(self.ring, self.z, mode, self.rows, self._spare())
        if self.search is not None:
            z = self.search.redirect(self.z, z)
        self.before = self.z
        self.z = z if z.dtype == self.problem.layout.dtype else z.to(self.problem.layout.dtype).to(z.dtype)

    def _spare(self) -> Tensor:
        """A buffer for the next iterate that nobody looks at any more; fresh memory costs more than the step itself."""
        if self.z.device.type != "cpu":  # another stream may still read what Python has let go
            return torch.empty_like(self.z)
        for buffer in self.buffers:
            unused = buffer is not self.z and buffer is not self.before and _holders(buffer) <= _ALONE
            if unused and buffer.shape == self.z.shape:
                return buffer
        buffer = ops.buffer_like(self.z)
        self.buffers = [*self.buffers[-2:], buffer]
        return buffer

    def finish(self, mode: Tensor) -> None:
        """Ends what is still running when the budget is spent or the callback said so. mode (n, T) was still to do."""
        if self.rows.numel():
            self.monitor.expire()
            self._leave(torch.ones_like(self.rows, dtype=torch.bool), mode, ended=True)

    def residual(self) -> Tensor:
        """(B,) as last measured, NaN for the samples that have finished before."""
        out = torch.full((self.full.shape[0],), torch.nan, dtype=torch.float64, device=self.full.device)
        out[self.rows] = torch.where(self.monitor["judged"] != 0, self.monitor["residual"], torch.nan)
        return out

    def current(self) -> Tensor:
        """The current iterate of all samples, (B, T, D)."""
        return self.full.index_copy(0, self.rows, self.z.to(self.full.dtype))

    def snapshot(self) -> Tensor:
        """The same, but of the samples that have finished what the solution will hold."""
        there = self.monitor.running | (self.monitor["fresh"] != 0)
        z = torch.where(there[:, None, None], self.z.to(self.full.dtype), self.full[self.rows])
        return self.full.index_copy(0, self.rows, z)

    def solution(self, steps: int) -> Solution:
        r = self.result
        evaluations, status, rejections, rank_losses = (
            r[name].long() for name in ("evaluations", "status", "rejections", "rank_losses")
        )
        history = None if self.history is None else (self.earlier if self.earlier is not None else self.history.seal())
        if history is not None:
            ops.release(history.ring)
        solution = Solution(
            self.full, r["best"].clone(), evaluations, status, steps, rejections, rank_losses, history=history
        )
        if status.device.type != "cpu" or bool(status.any()):  # a device is not waited for to save some memory
            solution.course = Course(r.table, COLUMNS, self.full.dtype)
        return solution
