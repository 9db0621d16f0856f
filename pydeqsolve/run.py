"""The state of one solve, between the calls of fn: who is still running, where, and what is kept of the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import ops
from .front import FrontMonitor
from .history import History
from .memory import address, is_let_go
from .monitor import Monitor
from .ring import Ring
from .search import LineSearch
from .solution import Solution, Status
from .stop import Front, Stop

if TYPE_CHECKING:
    from .iterate import Problem, Solver


WRITES_SOUGHT = 2  # calls of fn after which its argument is compared with a copy
WRITES_SEEN = 4096  # entries of it, the leading ones


def _leading(x: Tensor) -> Tensor:
    """Of contiguous x, the entries in which writes are seen."""
    return x if x.numel() <= WRITES_SEEN else x.view(-1)[:WRITES_SEEN]


class Run:
    """The state of one solve. Tensors marked (n, …) hold the samples at hand, which `rows` maps to the B of all."""

    def __init__(
        self, problem: Problem, z0: Tensor, solver: Solver, stop: Stop, front: Front | None, history: History | None,
        keep_history: bool,
    ) -> None:  # fmt: skip
        address(z0, "z0")
        B, T, D = z0.shape
        self.problem, self.stop, self.front, self.method = problem, stop, front, solver.method()
        self.earlier = history  # until the first measurement has been compared with it
        self.ring = Ring(self.method, B, T, D, z0.dtype, z0.device) if history is None else history.fork()
        ops.start(self.ring)
        line_search = getattr(solver, "line_search", 0)
        # A line search goes back along the step, where the safeguard would throw the history away.
        safeguard = (torch.inf if line_search else solver.safeguard) if self.method.memory else 0.0
        self.monitor: Monitor | FrontMonitor
        if front is None:
            self.monitor = Monitor(B, stop, z0.dtype, z0.device, safeguard)
        else:
            self.monitor = FrontMonitor(B, T, front, stop, z0.dtype, z0.device, safeguard)
        self.result = Monitor(B, stop, z0.dtype, z0.device, safeguard)  # what finished samples leave behind
        self.history = History.begin(self.method, self.ring, z0.clone()) if keep_history else None
        self.rows = torch.arange(B, device=z0.device)  # (n,)
        self.inputs = list(problem.inputs)  # (n, …) each, when compact
        # (n, T, D), in memory of its own, so that fn cannot reach what it comes from.
        first = (z0 if history is None else history.z).to(self.ring.dtype)
        self.z = ops.buffer_like(first).copy_(first)
        if history is not None:
            self.monitor["steps"] = (history.since - 1).clamp_min(0)
        self.search = LineSearch(line_search, self.z) if line_search else None
        # (B, T, D): finished samples; of the others the iterate of least residual that has been left behind, else z0.
        self.full = ops.buffer_like(z0).copy_(z0)
        self.before = self.z  # (n, T, D): the previous iterate
        self.dropped: Tensor | None = None  # (n, T) differences that the last step left out
        self.finished: int | None = None  # samples finished at the last measurement, where that is known
        self.buffers = [self.z]
        self.calls = 0  # of fn
        self.copy: Tensor | None = None  # of the leading entries that fn was given, for a while
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
        asked = None if self.front is None or wanted is None else wanted.clone()  # a copy: fn may write into it
        if asked is not None and self.partial:
            asked = self._scatter(asked)
        self._watch(z)
        return self.problem.layout.unpack(z), self.inputs, asked

    def take(self, value: Any) -> Tensor:
        """f at the samples at hand, (n, T, D) in the ring's dtype, from the value of fn."""
        n = self._unchanged()
        f = self.problem.layout.pack(value, "the value of fn")
        if f.shape[0] != n:
            raise ValueError(f"the value of fn must have {n} samples like its argument, got {f.shape[0]}")
        address(f, "the value of fn")
        return (f[self.rows] if self.partial else f).to(self.ring.dtype)

    def _watch(self, z: Tensor) -> None:
        """Notes what z (n, T, D), about to be given to fn, and the inputs are like."""
        self.calls += 1
        self.given, self.version = z, z._version
        if self.inputs:  # those made in inference mode have no versions
            self.versions = [None if x.is_inference() else x._version for x in self.inputs]
        # What is written past autograd, by z.data or z.numpy(), changes no version.
        if self.calls <= WRITES_SOUGHT and z.is_cpu:
            is_first_guess = self.calls == 1 and self.earlier is None
            self.copy = _leading(self.full) if is_first_guess else _leading(z).clone()

    def _unchanged(self) -> int:
        """How many samples fn was given. Raises ValueError when it has changed its arguments."""
        given, copy, self.given, self.copy = self.given, self.copy, self.full, None
        if given._version != self.version:
            raise ValueError("fn must not change its argument z in place")
        for i, x in enumerate(self.inputs):
            if self.versions[i] is not None and x._version != self.versions[i]:
                raise ValueError(f"fn must not change its argument inputs[{i}] in place")
        if copy is not None:
            found = _leading(given)
            if not torch.equal(found, copy) and not torch.allclose(found, copy, 0, 0, equal_nan=True):
                raise ValueError("fn must not change its argument z in place, through z.data or z.numpy() either")
        return given.shape[0]

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
            mode = self.search.judge(self.monitor, self.z, mode)
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
        at = self.rows[leaving]
        self.result.table[at] = self.monitor.table[leaving]
        if self.history is not None:
            self._remember(leaving, mode)

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
            unused = buffer is not self.z and buffer is not self.before and buffer.shape == self.z.shape
            if unused and is_let_go(buffer):
                return buffer
        buffer = ops.buffer_like(self.z)
        self.buffers.append(buffer)
        del self.buffers[:-3]
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
        return Solution(
            self.full, r["best"].clone(), evaluations, status, steps, rejections, rank_losses, history=history
        )
