"""Which method a name stands for, and what each will cost on this device with this model: two measured times, and
counts that were measured.

A call on B rows, the sequential step, is timed, and a call on many; between them time is taken as linear in the rows.
Choosing costs a few calls once per model, batch size, image shape, dtype, device and number of threads, and nothing
afterwards: the times are kept for as long as the model lives, and corrected by what every chosen run then took.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..chain import Chain, Splitting
from ..models.calls import FixedRows
from ..problem import ChainProblem, Found
from ..remainder import Model
from ..trajectory import Edit
from .coarse import CoarseToFine
from .goal import Goal, Watch
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
PER_ROUND, PER_ENTRY = 3e-4, 1.2e-8  # seconds of the solver itself on a CPU: per round, and per entry of the state
MARGIN = 0.85  # a parallel way must promise to take at most so much of the sequential time
MANY = 64  # rows of the larger call


@dataclass
class Timing:
    """Seconds of a call on `few` rows and on `many`; and by how much runs took longer than foretold, by way and T."""

    few: int
    seconds_few: float
    many: int
    seconds_many: float
    seen: dict[tuple[Method, int], float]

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

    def foretell(self, method: Method, T: int, n: int | None, width: int) -> float:
        """Seconds of T steps on B = few images of D = width; n: steps of the coarse grid, None without one."""
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
        return seconds * self.seen.get((method, T), 1.0)

    def note(self, method: Method, T: int, n: int | None, width: int, seconds: float) -> None:
        """Takes in what a run took: half the weight to it, half to those before."""
        ratio = seconds / self.foretell(method, T, n, width)
        self.seen[method, T] = self.seen.get((method, T), 1.0) * (1 + ratio) / 2


_kept: weakref.WeakKeyDictionary[Any, dict[Any, Timing]] = weakref.WeakKeyDictionary()


def method_of(method: str | Method, problem: ChainProblem, goal: Goal) -> Method | Timed:
    """The method that a name stands for here, or the one given."""
    if not isinstance(method, str):
        return method
    if method == "sequential":
        return Sequential()
    if method == "parallel" or goal.max_rounds is not None:
        return parallel(problem)
    if problem.map.network.group is not None or not len(problem.latent):
        return Sequential() if problem.map.chain.clip is not None else parallel(problem)
    return Timed(quickest(problem))


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
    T, width = len(problem.map.chain), problem.latent.shape[1]
    if problem.map.chain.clip is not None or not len(problem.latent):
        return Sequential()
    known, n = timing(problem), count_of(problem)
    costs: dict[Method, float] = {
        method: known.foretell(method, T, n, width) for method in (Parallel(), CoarseToFine())
    }  # fmt: skip
    best = min(costs, key=lambda method: costs[method])
    return best if costs[best] <= MARGIN * known.foretell(Sequential(), T, n, width) else Sequential()


def count_of(problem: ChainProblem) -> int | None:
    """Steps of the problem's coarse grid, None where it has none."""
    return len(nodes(len(problem.map.chain))) if smooth(problem) else None


@dataclass(frozen=True)
class Timed:
    """A method whose run's time is noted for the next choice."""

    method: Method

    def find(self, problem: ChainProblem, goal: Goal, watch: Watch, guess: Tensor | None = None) -> Found:
        start, latent = time.perf_counter(), problem.latent
        found = self.method.find(problem, goal, watch, guess)
        if latent.device.type == "cuda":
            torch.cuda.synchronize(latent.device)
        T, n = len(problem.map.chain), count_of(problem)
        if len(latent):
            timing(problem).note(self.method, T, n, latent.shape[1], time.perf_counter() - start)
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
    few = min(_seconds(problem, B) for _ in range(4))
    return Timing(B, few, many, few if many == B else min(_seconds(problem, many) for _ in range(3)), {})


def _seconds(problem: ChainProblem, rows: int) -> float:
    """Seconds of one call on so many rows, spread over the images and the time steps."""
    x, T = problem.latent, len(problem.map.chain)
    i = torch.arange(rows, device=x.device) % len(x)
    k = torch.linspace(0, T - 1, rows, device=x.device).long()
    states, inputs = x[i], [c[i] for c in problem.conditioning]

    def call() -> None:
        problem.map.remainder(states, k, inputs)
        if x.device.type == "cuda":
            torch.cuda.synchronize(x.device)

    start = time.perf_counter()
    call()
    return time.perf_counter() - start
