"""The one loop: every solver, forward and adjoint, runs through `iterate`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..memory import address
from ..problem import Problem, Solver
from ..status import Course
from ..step.backend import NativeCPU, choose
from ..step.few import is_few
from ..step.records import KEEP, SAMPLE
from ..step.ring import Ring
from ..step.rules import Rule
from ..stop import Front, Stop
from . import reuse
from .backtracking import Backtracking
from .batch import Batch
from .blocks import BlockJudge
from .few import assemble_few
from .gate import Gate, Question
from .judge import SampleJudge, Verdict
from .kept import History
from .step import FusedStep, KeepingStep, Step
from .watches import Callback, Snapshots, Trace, Watch, calling


class Outcome(NamedTuple):
    """What the loop returns, all of it flat; the meanings are those of `Solution`."""

    z: Tensor  # (B, T, D)
    residual: Tensor  # (B,) float64
    evaluations: Tensor  # (B,) int64
    status: Tensor  # (B,) int64
    steps: int
    rejections: Tensor  # (B,) int64
    rank_losses: Tensor  # (B,) int64
    trace: Tensor | None  # (steps, B) float64
    snapshots: list[Tensor]  # (B, T, D) each
    history: History | None
    course: Course | None  # how it went: what `Solution.check` reads the likely causes from
    solver: Solver  # that found it
    stop: Stop  # that was asked for

    @property
    def finite(self) -> Tensor:
        """(B,) bool: the residual is finite, so that a gradient may pass."""
        return self.residual < torch.inf


def iterate(problem: Problem, z0: Tensor, **options: Any) -> Outcome:
    """`loop`, kept out of torch.compile's sight: how often it runs depends on the data.

    Telling the compiler so imports it, which takes as long as importing torch; where nothing is compiled, nothing is
    told.
    """
    if torch.is_inference_mode_enabled():
        return _counting_versions(problem, z0, **options)
    if torch.compiler.is_compiling() or "torch._dynamo" in sys.modules:
        return _out_of_sight()(problem, z0, **options)
    if not torch.is_grad_enabled():
        return loop(problem, z0, **options)
    torch._C._set_grad_enabled(False)  # `torch.no_grad` takes eight calls
    try:
        return loop(problem, z0, **options)
    finally:
        torch._C._set_grad_enabled(True)


def _counting_versions(problem: Problem, z0: Tensor, **options: Any) -> Outcome:
    """`iterate` outside of inference mode, in which no change in place is counted; the user's functions stay in it."""

    def within(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*given: Any, **keywords: Any) -> Any:
            with torch.inference_mode():
                return function(*given, **keywords)

        return called

    with torch.inference_mode(False):
        for name in ("callback", "admissible", "merit"):
            if options.get(name) is not None:
                options[name] = within(options[name])
        return iterate(replace(problem, fn=within(problem.fn)), z0, **options)


_hidden: list[Callable[..., Outcome]] = []  # made once; the compiler warns of functools.cache


def _out_of_sight() -> Callable[..., Outcome]:
    if not _hidden:
        _hidden.append(torch.compiler.disable(torch.no_grad()(loop)))
    return _hidden[0]


def loop(
    problem: Problem, z0: Tensor, *, solver: Solver, stop: Stop, front: Front | None = None, trace: bool = False,
    callback: Callback | None = None, history: History | None = None, keep_history: bool = False,
    snapshots: Sequence[int] = (), admissible: Question | None = None, merit: Question | None = None,
    of: Callable[..., Batch] = Batch,
) -> Outcome:  # fmt: skip
    """Solves z = fn(z) from z0 (B, T, D) for every sample by itself.

    One step: fn at the unfinished samples, a measurement and its judgement, the next iterate. Finished samples leave
    the batch at the next reading of the flags (`Stop.check_every`); until then they are frozen.
    """
    watching, seen = Trace() if trace else None, Snapshots(snapshots) if snapshots else None
    watches: list[Watch] = list(filter(None, (watching, seen, callback and calling(callback))))
    batch, step = assemble(
        problem, z0, solver, stop, front, history, keep_history, admissible, merit, of, bool(watches)
    )
    verdict: Verdict | None = None
    interval, steps, eps, stopped = stop.interval(z0.device), 0, batch.eps, False
    shards = problem.shards
    while steps < stop.max_steps and batch.size:
        wanted = step.judge.wanted(z0.shape[1])
        f = batch.evaluate(wanted) if not shards.many else _attempted(batch, wanted)
        if batch.eps > eps:
            eps = batch.eps
            step.judge.computes_in(eps)
        if history is not None and steps == 0:
            history.shift(step.backend.ring, f.view_as(z0))
        steps += 1
        last = steps == stop.max_steps
        verdict = step.measure(batch, f, wanted, last)
        stopped = bool(watches) and any(watch(steps, batch, step.judge) for watch in watches)
        if stopped:
            break
        if last or steps % interval == 0:
            verdict = step.retire(batch, verdict)
        if not last and batch.size:
            step.advance(batch, verdict)
    step.finish(batch, verdict or Verdict(torch.full(z0.shape[:2], KEEP, dtype=torch.uint8, device=z0.device)))
    step.judge.settle(batch.eps)
    kept = None
    if isinstance(step, KeepingStep):  # a solve without steps has learnt nothing beyond what it was given
        kept = step.history.seal() if steps or history is None else history
    (residual, evaluations, status, rejections, rank_losses), failed = step.tell()
    if failed == 0 and isinstance(step, FusedStep):
        reuse.give(step)
    return Outcome(
        batch.full, residual, evaluations, status, steps, rejections, rank_losses,
        None if watching is None else watching.stacked(z0),
        [] if seen is None else [seen.at(k, batch.full) for k in snapshots], kept,
        # It explains failures; a device is not waited for to save some memory.
        None if failed == 0 else Course(step.judge.left.table, SAMPLE, z0.dtype, stopped),
        solver, stop,
    )  # fmt: skip


def _attempted(batch: Batch, wanted: Tensor | None) -> Tensor:
    """f (n, …), or what may be measured in its place until the other ranks know that fn has failed on this one."""
    return batch.problem.shards.attempt(lambda: batch.evaluate(wanted), lambda: batch.z)


def assemble(
    problem: Problem, z0: Tensor, solver: Solver, stop: Stop, front: Front | None, history: History | None,
    keep_history: bool, admissible: Question | None = None, merit: Question | None = None,
    of: Callable[..., Batch] = Batch, watched: bool = False,
) -> tuple[Batch, Step]:  # fmt: skip
    """The parts of one solve: the only place that knows which options exist, and which do not go together."""
    address(z0, "z0")
    gated = admissible is not None or merit is not None
    check_together(solver, front, keep_history or history is not None, gated)
    method = solver.method()
    B, T, D = z0.shape
    shards, searches = problem.shards, bool(getattr(solver, "line_search", 0))
    entries = shards.entries(D if front is not None else T * D)
    rule = _rule(solver, stop, z0, entries, by_blocks=front is not None, with_merit=merit is not None)
    fusable = front is None and not (keep_history or gated or searches or shards.many)
    alone = fusable and history is None
    if alone and of is Batch and not watched and stop.interval(z0.device) == 1 and is_few(method, stop, z0):
        return assemble_few(problem, z0, method, rule, stop)
    key = reuse.key_of(method, rule, z0) if alone else None
    step: Step | None = reuse.take(key, stop)
    if step is not None:
        batch = of(problem, z0, z0, step.backend)
        step.judge.computes_in(batch.eps)
        return batch, step
    ring = Ring(method, B, T, D, z0.dtype, z0.device) if history is None else history.fork()
    backend = choose(ring, rule, front)
    batch = of(problem, z0, z0 if history is None else history.z, backend)
    judge = _judge(batch, stop, front, solver)
    judge.computes_in(batch.eps)
    if history is not None:
        judge.samples["steps"] = (history.since - 1).clamp_min(0)
    gate = Gate(backend, admissible, merit, B) if gated else None
    if keep_history:
        return batch, KeepingStep(backend, judge, History.begin(method, ring, z0.clone()), gate)
    if isinstance(backend, NativeCPU) and fusable:
        return batch, FusedStep(backend, judge, key)
    return batch, Step(backend, judge, gate)


def check_together(solver: Solver, front: Front | None, with_history: bool, gated: bool = False) -> None:
    """Raises ValueError for options of the loop that are each right, but do not go together."""
    if front is None and not with_history and not gated:
        return
    searches = bool(getattr(solver, "line_search", 0))
    if gated and (front is not None or searches):
        raise ValueError("admissible and merit must be None with a front or a line_search")
    if front is not None and with_history:
        raise ValueError("front must be None with a history: its blocks finish at places of their own")
    if searches and (front is not None or with_history):
        raise ValueError("line_search must be 0 with a front or a history")


def _rule(solver: Solver, stop: Stop, z0: Tensor, entries: int, by_blocks: bool, with_merit: bool) -> Rule:
    """How samples, or blocks, of so many entries are judged; a line search goes back along a step at which the
    safeguard would throw history away, and a merit refuses it beforehand."""
    unguarded = with_merit or bool(getattr(solver, "line_search", 0))
    safeguard = torch.inf if unguarded else solver.safeguard
    return Rule(
        float(safeguard) if solver.method().memory else 0.0, torch.finfo(z0.dtype).eps, stop.norm, entries,
        0 if by_blocks else entries,
    )  # fmt: skip


def _judge(batch: Batch, stop: Stop, front: Front | None, solver: Solver) -> SampleJudge:
    """The judge of a batch."""
    B, T, _ = batch.z.shape
    line_search, backend = getattr(solver, "line_search", 0), batch.backend
    if front is not None:
        return BlockJudge(B, T, front, stop, backend)
    if line_search:
        return Backtracking(line_search, solver.safeguard, batch.z, stop, backend)
    return SampleJudge(B, stop, backend)
