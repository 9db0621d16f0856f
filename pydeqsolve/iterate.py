"""The one loop: every solver, forward and adjoint, runs through `iterate`, and only `call` touches the user's map."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from . import ops
from .monitor import FrontMonitor, Monitor
from .ring import Method, Ring
from .solution import Solution
from .stop import Front, Stop
from .structure import Layout

Callback = Callable[[int, Any, Tensor], Any]


class Solver(Protocol):
    """What the loop needs of a solver: its method, and the growth of the residual at which a step is refused."""

    @property
    def safeguard(self) -> float: ...

    def method(self) -> Method:
        """The member of the family of ring methods that this solver is."""
        ...


@dataclass(frozen=True, eq=False)
class Problem:
    """z = fn(z, *inputs) for B samples; compact says whether fn may be given the unfinished samples alone."""

    fn: Callable[..., Any]
    inputs: Sequence[Tensor]
    layout: Layout
    compact: bool


def call(problem: Problem, z: Any, inputs: Sequence[Tensor], **keywords: Tensor) -> Any:
    """fn(z, *inputs): the only line of the library that calls the user's function."""
    return problem.fn(z, *inputs, **keywords)


@torch.compiler.disable
@torch.no_grad()
def iterate(
    problem: Problem,
    z0: Tensor,
    *,
    solver: Solver,
    stop: Stop,
    front: Front | None = None,
    trace: bool = False,
    callback: Callback | None = None,
) -> Solution:
    """Solves z = fn(z) from z0 (B, T, D) for every sample by itself; `Solution.z` is flat, (B, T, D).

    One step: fn at the unfinished samples, `ops.measure`, the monitor's judgement, `ops.advance`. Finished samples
    leave the batch at the next reading of the flags (`Stop.check_every`); until then they are frozen.
    """
    run = _Run(problem, z0, solver, stop, front)
    interval = stop.interval(z0.device)
    history: list[Tensor] = []
    steps = 0
    while steps < stop.max_steps and run.rows.numel():
        wanted = run.wanted()
        f = run.evaluate(wanted)
        steps += 1
        residual, mode = run.measure(f, wanted)
        if trace:
            history.append(run.spread(residual))
        if callback is not None and callback(steps, run.current(), run.spread(residual)):
            break
        last = steps == stop.max_steps
        if last or steps % interval == 0:
            mode = run.retire(mode)
        if not last and run.rows.numel():
            run.advance(mode)
    run.finish()
    return run.solution(steps, torch.stack(history) if history else residual_rows(trace, z0))


def residual_rows(trace: bool, z0: Tensor) -> Tensor | None:
    """The trace of a solve without steps: (0, B) when asked for."""
    return torch.empty(0, z0.shape[0], dtype=torch.float64, device=z0.device) if trace else None


class _Run:
    """The state of one solve. Tensors marked (n, …) hold the samples at hand, which `rows` maps to the B of all."""

    def __init__(self, problem: Problem, z0: Tensor, solver: Solver, stop: Stop, front: Front | None) -> None:
        B, T, D = z0.shape
        self.problem, self.stop, self.front = problem, stop, front
        self.ring = Ring(solver.method(), B, T, D, z0.dtype, z0.device)
        ops.start(self.ring)
        safeguard = solver.safeguard if solver.method().memory else torch.inf
        self.monitor: Monitor | FrontMonitor
        if front is None:
            self.monitor = Monitor(B, stop, z0.dtype, z0.device, safeguard)
        else:
            self.monitor = FrontMonitor(B, T, front, stop, z0.dtype, z0.device, safeguard)
        self.result = Monitor(B, stop, z0.dtype, z0.device, safeguard)  # what finished samples leave behind
        self.rows = torch.arange(B, device=z0.device)  # (n,)
        self.inputs = list(problem.inputs)  # (n, …) each, when compact
        self.z = z0.to(self.ring.dtype).contiguous()  # (n, T, D)
        self.full = z0.clone()  # (B, T, D): finished samples, and the last iterate of the others
        self.best = z0.clone()  # (B, T, D): iterates of least residual that have been left behind
        self.before = self.z  # the previous iterate, at positions `origin` (n,)
        self.origin = self.rows
        self.fresh = torch.zeros(B, dtype=torch.bool, device=z0.device)  # (n,) best is the previous iterate
        self.entries = T * D

    def wanted(self) -> Tensor | None:
        """(n, T) bool: blocks to evaluate; None means all."""
        if isinstance(self.monitor, FrontMonitor):
            return self.monitor.wanted()
        if self.stop.interval(self.z.device) == 1:
            return None
        return (self.monitor.status < 0)[:, None].expand(-1, self.z.shape[1]).contiguous()

    def evaluate(self, wanted: Tensor | None) -> Tensor:
        """f at the samples at hand, (n, T, D) in the ring's dtype."""
        layout = self.problem.layout
        z = self.z.to(layout.dtype)
        keywords = {}
        everyone = self.rows.numel() == self.full.shape[0]
        if not self.problem.compact and not everyone:
            self.full[self.rows] = z
            z = self.full.clone()
        if self.front is not None and wanted is not None:
            keywords["wanted"] = wanted if self.problem.compact or everyone else self._scatter(wanted)
        version = None if z.is_inference() else z._version
        value = call(self.problem, layout.unpack(z), self.inputs, **keywords)
        if version is not None and z._version != version:
            raise ValueError("fn must not change its argument z in place")
        f = layout.pack(value, "the value of fn")
        if f.shape[0] != z.shape[0]:
            raise ValueError(f"the value of fn must have {z.shape[0]} samples like its argument, got {f.shape[0]}")
        if not self.problem.compact and not everyone:
            f = f[self.rows]
        return f.to(self.ring.dtype)

    def _scatter(self, wanted: Tensor) -> Tensor:
        full = torch.zeros(self.full.shape[:2], dtype=torch.bool, device=wanted.device)
        full[self.rows] = wanted
        return full

    def measure(self, f: Tensor, wanted: Tensor | None) -> tuple[Tensor, Tensor]:
        """Residual (n,) and mode (n, T) after taking f in; keeps the best iterate."""
        norms = ops.measure(self.ring, f, self.z, self.rows, wanted, self.stop.norm)
        totals = norms[:, 0] if norms.shape[1] == 1 else norms.amax(1) if self.stop.norm == "max" else norms.sum(1)
        residual, size = self._root(totals, self.entries).unbind(-1)
        if isinstance(self.monitor, FrontMonitor):
            assert wanted is not None
            blocks = self._root(norms, self.z.shape[2])
            mode = self.monitor.judge_blocks(blocks[..., 0], blocks[..., 1], wanted, residual)
            return residual, mode
        mode = self.monitor.judge(residual, size)[:, None]
        if mode.shape[1] != self.z.shape[1]:
            mode = mode.expand(-1, self.z.shape[1])
        self._keep_best()
        return residual, mode.contiguous()

    def _root(self, norms: Tensor, entries: int) -> Tensor:
        if self.stop.norm == "max":
            return norms
        return (norms / entries).sqrt() if self.stop.norm == "rms" else norms.sqrt()

    def _keep_best(self) -> None:
        """Copies an iterate only when its successor was worse: a monotone solve copies nothing."""
        improved = self.monitor.improved
        left_behind = self.fresh & ~improved & self.monitor.judged
        if self.z.device.type != "cpu" or bool(left_behind.any()):
            at = self.rows
            kept = torch.where(left_behind[:, None, None], self.before[self.origin].to(self.best.dtype), self.best[at])
            self.best[at] = kept
        self.fresh = torch.where(self.monitor.judged, improved, self.fresh)

    def retire(self, mode: Tensor) -> Tensor:
        """Lets finished samples leave; returns the mode (n', T) of those that stay."""
        finished = self.monitor.status >= 0
        if not bool(finished.any()):
            return mode
        self._leave(finished, mode)
        keep = (~finished).nonzero()[:, 0]
        self.rows, self.z, self.fresh = self.rows[keep], self.z[keep], self.fresh[keep]
        self.before, self.origin = self.z, torch.arange(keep.numel(), device=keep.device)
        self.monitor.select(keep)
        if self.problem.compact:
            self.inputs = [x[keep] for x in self.inputs]
        return mode[keep].contiguous()

    def _leave(self, leaving: Tensor, mode: Tensor | None) -> None:
        """Stores z, status and counts of the samples `leaving` (n,) bool."""
        at = self.rows[leaving]
        if self.front is None:
            z = torch.where(self.fresh[:, None, None], self.z.to(self.best.dtype), self.best[self.rows])[leaving]
        elif mode is not None:
            z = ops.advance(self.ring, self.z, mode, self.rows)[0][leaving].to(self.full.dtype)
        else:
            z = self.z[leaving].to(self.full.dtype)
        self.full[at] = z
        for name in ("status", "best", "evaluations", "rejections", "rank_losses"):
            getattr(self.result, name)[at] = getattr(self.monitor, name)[leaving]

    def advance(self, mode: Tensor) -> None:
        """The next iterate of the samples at hand."""
        self.before, self.origin = self.z, torch.arange(self.rows.numel(), device=self.z.device)
        z, dropped = ops.advance(self.ring, self.z, mode, self.rows)
        self.z = z.to(self.problem.layout.dtype).to(z.dtype)
        self.monitor.rank_losses = self.monitor.rank_losses + (dropped > 0).any(1)

    def finish(self) -> None:
        """Ends what is still running when the budget is spent or the callback said so."""
        if self.rows.numel():
            self.monitor.expire()
            self._leave(torch.ones_like(self.fresh), None)

    def spread(self, values: Tensor) -> Tensor:
        """(n,) → (B,), NaN for the samples that have finished."""
        out = torch.full((self.full.shape[0],), torch.nan, dtype=values.dtype, device=values.device)
        out[self.rows] = values
        return out

    def current(self) -> Any:
        """The current iterate of all samples, in the user's structure."""
        self.full[self.rows] = self.z.to(self.full.dtype)
        return self.problem.layout.unpack(self.full.clone())

    def solution(self, steps: int, trace: Tensor | None) -> Solution:
        r = self.result
        return Solution(self.full, r.best, r.evaluations, r.status, steps, r.rejections, r.rank_losses, trace)
