"""The one loop: every solver, forward and adjoint, runs through `iterate`, and only `call` touches the user's map."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from . import ops, precision
from .history import History
from .ring import Method
from .run import Run
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
    by_front: bool = False  # fn takes the keyword `wanted`


def call(problem: Problem, z: Any, inputs: Sequence[Tensor], wanted: Tensor | None = None) -> Any:
    """fn(z, *inputs): the only place of the library that calls the user's function. wanted (n, T) goes with `Front`."""
    return problem.fn(z, *inputs, **({} if wanted is None else {"wanted": wanted}))


def _evaluate(problem: Problem, run: Run, wanted: Tensor | None, steps: int) -> Any:
    """The value of fn at the current iterate, with a look at the precision that it is computed in."""
    arguments = run.arguments(wanted)
    if precision.is_due(steps, run.given.device):
        with precision.Watch(run.given) as watch:
            value = call(problem, *arguments)
        run.computes_in(watch.eps)
        return value
    value = call(problem, *arguments)
    if not steps:
        run.computes_in(precision.of_value(value, problem.layout.dtype))
    return value


def iterate(problem: Problem, z0: Tensor, **options: Any) -> Solution:
    """`loop`, kept out of torch.compile's sight: how often it runs depends on the data.

    Telling the compiler so imports it, which takes as long as importing torch; where nothing is compiled, nothing is
    told.
    """
    if torch.compiler.is_compiling() or "torch._dynamo" in sys.modules:
        return _out_of_sight()(problem, z0, **options)
    return loop(problem, z0, **options)


@functools.cache
def _out_of_sight() -> Callable[..., Solution]:
    return torch.compiler.disable(loop)


@torch.no_grad()
def loop(
    problem: Problem,
    z0: Tensor,
    *,
    solver: Solver,
    stop: Stop,
    front: Front | None = None,
    trace: bool = False,
    callback: Callback | None = None,
    history: History | None = None,
    keep_history: bool = False,
    snapshots: Sequence[int] = (),
) -> Solution:
    """Solves z = fn(z) from z0 (B, T, D) for every sample by itself; `Solution.z` is flat, (B, T, D).

    One step: fn at the unfinished samples, `ops.measure`, the monitor's judgement, `ops.advance`. Finished samples
    leave the batch at the next reading of the flags (`Stop.check_every`); until then they are frozen.
    """
    run = Run(problem, z0, solver, stop, front, history, keep_history)
    interval = stop.interval(z0.device)
    residuals: list[Tensor] = []
    seen: dict[int, Tensor] = {}
    mode = torch.full(z0.shape[:2], ops.KEEP, dtype=torch.uint8, device=z0.device)
    steps = 0
    while steps < stop.max_steps and run.rows.numel():
        wanted = run.wanted()
        value = _evaluate(problem, run, wanted, steps)
        steps += 1
        last = steps == stop.max_steps
        mode = run.measure(run.take(value), wanted, last)
        if trace:
            residuals.append(run.residual())
        if steps in snapshots:
            seen[steps] = run.snapshot()
        if callback is not None and callback(steps, problem.layout.unpack(run.current()), run.residual()):
            break
        if last or steps % interval == 0:
            mode = run.retire(mode)
        if not last and run.rows.numel():
            run.advance(mode)
    run.finish(mode)
    solution = run.solution(steps)
    if trace:
        none = torch.empty(0, z0.shape[0], dtype=torch.float64, device=z0.device)
        solution.trace = torch.stack(residuals) if residuals else none
    solution.snapshots = [seen.get(k, solution.z) for k in snapshots]
    return solution
