"""Which method a name stands for, and what each will cost on this device with this model: two measured times, and
counts that were measured.

A call on B rows, the sequential step, is timed, and a call on many; between them time is taken as linear in the rows.
Choosing costs a few calls once per model, batch size, image shape, dtype, device and number of threads. What the first
runs of a method then took corrects what is foretold of it, by the median, each beside calls timed after it: where
another program slows the machine down it slows both. After those nothing is timed. On a CPU time is the processor's, of
this thread. A choice stays until another method promises clearly less.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..chain import Chain, Splitting
from ..models.calls import FixedRows
from ..problem import ChainProblem, Found
from ..remainder import Model
from ..trajectory import Edit
from .coarse import CoarseToFine
from .goal import ERROR, Goal, Watch
from .grid import nodes
from .parallel import START, Parallel, smooth
from .sequential import Sequential

Method = Sequential | Parallel | CoarseToFine
NAMES = ("sequential", "parallel", "auto")
LONG = 250  # steps from which a coarse grid is the default: there it saves most of the rows and costs few rounds more
# Rows of each round, as shares of T, of the shipped models with all steps at once, without a start on the nodes and
# after one, the last to measure the error; and on the nodes, as shares of n, besides the evaluation of all steps, of
# which one image in twenty has a second: the last two measure at the nodes and between them, not always twice.
TOGETHER = (1.0, 1.0, 0.97, 0.7, 0.42, 0.3, 0.2, 0.12, 0.05, 1.0)
STARTED = (1.0, 0.95, 0.6, 0.35, 0.15, 0.05, 1.0)
ON_NODES = (1.0, 0.95, 0.7, 0.5, 0.35, 0.6, 0.7, 0.5, 2.0, 0.6)
SWEEPS = 1.05
PER_ROUND, PER_ENTRY = 1.5e-3, 2.5e-8  # seconds of the solver itself on a CPU: per round, and per entry of the state
MARGIN = 0.85  # a parallel way must promise to take at most so much of the sequential time
STAY = 0.9  # another method replaces the one in use if it promises at most so much of its time
LEARNT = 3  # runs of a method that correct what is foretold of it
MANY = 64  # rows of the larger call
TURNS = 3  # of calls timed, small and large ones in turn
# A call in which the processor is busy for less of the time waits for another machine: then all of it counts.
WAITS = 0.1


@dataclass(frozen=True)
class Run:
    """What the time of a run depends on: T steps of D = width entries an image, n steps of the coarse grid, None
    without one, the form of the chain and the power of ten of the error asked for."""

    T: int
    n: int | None
    width: int
    form: str = "LinearChain"
    error: int = -3

    @staticmethod
    def of(problem: ChainProblem, error: float = ERROR) -> Run:
        T, linear = len(problem.map.chain), problem.map.linear
        n = len(nodes(T)) if smooth(problem) else None
        return Run(T, n, problem.latent.shape[1], type(linear).__name__, round(math.log10(error)))


@dataclass
class Timing:
    """Seconds of a call on `few` rows and on `many`; how much longer than foretold runs took; and what was chosen."""

    few: int
    seconds_few: float
    many: int
    seconds_many: float
    seen: dict[tuple[Method, Run], list[float]] = field(default_factory=dict)
    chosen: dict[Run, Method] = field(default_factory=dict)

    def call(self, rows: float) -> float:
        """Seconds of one round with so many rows."""
        if self.many <= self.few or rows <= self.few:
            return self.seconds_few * max(1.0, rows / self.few)
        slope = max(0.0, self.seconds_many - self.seconds_few) / (self.many - self.few)
        return self.seconds_few + slope * (rows - self.few)

    def rounds(self, shares: tuple[float, ...], steps: int, width: int) -> float:
        """Seconds of rounds on those shares of `steps` time steps, D = width."""
        rows = self.few * steps
        return sum(self.call(max(self.few, share * rows)) + PER_ROUND + PER_ENTRY * rows * width for share in shares)

    def foretell(self, method: Method, run: Run) -> float:
        """Seconds of a run on B = few images."""
        T, n, width = run.T, run.n, run.width
        if isinstance(method, CoarseToFine) and n is None:
            return math.inf
        if isinstance(method, Sequential):
            seconds = T * self.seconds_few
        elif isinstance(method, CoarseToFine):
            seconds = SWEEPS * self.rounds((1.0,), T, width) + self.rounds(ON_NODES, n or 0, width)
        elif n is None:
            seconds = self.rounds(TOGETHER, T, width)
        else:
            seconds = self.rounds((1.0,) * START, n, width) + self.rounds(STARTED, T, width)
        return seconds * median(self.seen.get((method, run), [1.0]))

    def settled(self, method: Method, run: Run) -> bool:
        """Whether runs enough have been noted."""
        return len(self.seen.get((method, run), [])) >= LEARNT

    def note(self, method: Method, run: Run, seconds: float, pace: float = 1.0) -> None:
        """Takes in what a run took, beside calls that took `pace` times as long as those timed first."""
        foretold = self.foretell(method, run) / median(self.seen.get((method, run), [1.0]))
        self.seen.setdefault((method, run), []).append(seconds / pace / foretold)

    def choose(self, run: Run) -> Method:
        """The method of least foretold time, or the one in use where that is hardly more."""
        ways: tuple[Method, ...] = (Sequential(), Parallel(), CoarseToFine())
        costs = {method: self.foretell(method, run) for method in ways}
        best = min(ways[1:], key=lambda method: costs[method])
        best = best if costs[best] <= MARGIN * costs[ways[0]] else ways[0]
        used = self.chosen.get(run, best)
        self.chosen[run] = best if costs[best] <= STAY * costs[used] else used
        return self.chosen[run]


_kept: weakref.WeakKeyDictionary[Any, dict[Any, Timing]] = weakref.WeakKeyDictionary()


def method_of(method: str | Method, problem: ChainProblem, goal: Goal) -> Method | Timed:
    """The method that a name stands for here, or the one given."""
    if not isinstance(method, str):
        return method
    if method == "sequential":
        return Sequential()
    if method == "parallel" or goal.max_rounds is not None:
        return parallel(problem)
    if problem.map.network.group is not None or not len(problem.latent) or problem.map.chain.clip is not None:
        return Sequential() if problem.map.chain.clip is not None else parallel(problem)
    known, run = timing(problem), Run.of(problem, float(goal.error.min()))
    return Timed(known.choose(run), run, known)


def check_method(method: Any) -> None:
    """Raises for what is neither a method nor the name of one."""
    if isinstance(method, str) and method not in NAMES:
        raise ValueError(f"method: one of {', '.join(NAMES)} is required, got {method!r}")
    if not isinstance(method, (str, Sequential, Parallel, CoarseToFine)):
        raise TypeError(f"method: a name, Sequential(), Parallel() or CoarseToFine() is required, got {method!r}")


def parallel(problem: ChainProblem) -> Parallel | CoarseToFine:
    """The better of the two, by the length of the chain and where a coarse grid serves."""
    return CoarseToFine() if len(problem.map.chain) >= LONG and smooth(problem) else Parallel()


def fastest(
    model: Model, latent: Tensor, chain: Chain, *, prediction: str = "epsilon",
    splitting: str | Tensor | Splitting = "v", inputs: Sequence[Tensor] = (), edit: Edit | None = None,
    rows_per_call: int | FixedRows | None = None,
) -> Method:  # fmt: skip
    """The method that should take the least time on this device; the arguments are those of `sample`.

    Times a few calls of the model, once per model, batch size, shape, dtype, device and number of threads. The answer
    depends on the machine; the images do not.
    """
    with torch.no_grad():
        return quickest(
            ChainProblem.of(
                model, latent, chain, prediction=prediction, splitting=splitting, inputs=inputs, edit=edit,
                rows=rows_per_call,
            )
        )  # fmt: skip


def quickest(problem: ChainProblem) -> Method:
    """The method of least foretold time; of a chain that clips, whose counts are not known, the sequential one."""
    if problem.map.chain.clip is not None or not len(problem.latent):
        return Sequential()
    return timing(problem).choose(Run.of(problem))


@dataclass(frozen=True, eq=False)
class Timed:
    """A method whose first runs' times are noted for the next choice."""

    method: Method
    run: Run
    known: Timing

    def find(self, problem: ChainProblem, goal: Goal, watch: Watch, guess: Tensor | None = None) -> Found:
        known = self.known
        if guess is not None or known.settled(self.method, self.run):
            return self.method.find(problem, goal, watch, guess)
        start = clock()
        found = self.method.find(problem, goal, watch, guess)
        seconds, B = since(start, problem.latent.device), len(problem.latent)
        pace = median(_seconds(problem, B) for _ in range(TURNS)) / known.seconds_few
        known.note(self.method, self.run, seconds, pace)
        return found


def timing(problem: ChainProblem) -> Timing:
    """The times of this model on this batch, measured if they are not known."""
    network, x = problem.map.network, problem.latent
    most = network.portions.most(x.device)
    most = most if x.device.type == "cpu" or network.rows is not None else min(most, MANY * len(x))
    key = (tuple(x.shape), network.dtype, str(x.device), torch.get_num_threads(), most)
    try:
        kept = _kept.setdefault(network.model, {})
    except TypeError:  # a callable that cannot be referred to weakly, or has no hash
        kept = {}
    if key not in kept:
        kept[key] = _measure(problem, most)
    return kept[key]


def _measure(problem: ChainProblem, most: int) -> Timing:
    B = len(problem.latent)
    many = max(B, min(most, max(MANY, B)))
    turns: list[tuple[float, ...]] = []
    for _ in range(TURNS + 1):
        turns.append(tuple(_seconds(problem, rows) for rows in (B, B, many)[: 2 if many == B else 3]))
    few = median(seconds for turn in turns[1:] for seconds in turn[:2])  # the first turn warms up
    return Timing(B, few, many, few if many == B else median(turn[2] for turn in turns[1:]))


def _seconds(problem: ChainProblem, rows: int) -> float:
    """Seconds of one call on so many rows, spread over the images and the time steps."""
    x, T = problem.latent, len(problem.map.chain)
    i = torch.arange(rows, device=x.device) % len(x)
    k = torch.linspace(0, T - 1, rows, device=x.device).long()
    states, inputs = x[i], [c[i] for c in problem.conditioning]
    start = clock()
    problem.map.remainder(states, k, inputs)
    return since(start, x.device)


def clock() -> tuple[float, float]:
    """Seconds that this thread has had of the processor, and those of the clock."""
    return time.thread_time(), time.perf_counter()


def since(start: tuple[float, float], device: torch.device) -> float:
    """Seconds since `start`: of the processor on a CPU, which other programs do not add to, elsewhere of the clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    busy, passed = (now - then for now, then in zip(clock(), start, strict=True))
    return busy if device.type == "cpu" and busy >= WAITS * passed else passed
