"""What a way of sampling will cost on this device with this model: two measured times, and counts that were measured.

A call on B rows, the sequential step, is timed, and a call on many; between them time is taken as linear in the rows.
Choosing costs a few calls once per model, batch size, image shape, dtype, device and number of threads, and nothing
afterwards: the times are kept for as long as the model lives, and corrected by what every chosen run then took.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..basis import Rotated
from ..remainder import CPU_ROWS
from .nodes import START

if TYPE_CHECKING:
    from ..sampler import Sampler

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
    seen: dict[tuple[str, int], float]

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

    def foretell(self, way: str, T: int, n: int | None, width: int) -> float:
        """Seconds of T steps on B = few images of D = width: "sequential", "together" or on n "nodes"."""
        if way == "nodes" and n is None:
            return math.inf
        if way == "sequential":
            seconds = T * self.seconds_few
        elif way == "together" and n is None:
            seconds = self.rounds(TOGETHER, T, width)
        elif way == "together":
            seconds = self.rounds((1.0,) * START, n or 0, width) + self.rounds(STARTED, T, width)
        else:
            seconds = SWEEPS * self.rounds((1.0,), T, width) + self.rounds(ON_NODES, n or 0, width)
        return seconds * self.seen.get((way, T), 1.0)

    def note(self, way: str, T: int, n: int | None, width: int, seconds: float) -> None:
        """Takes in what a run took: half the weight to it, half to those before."""
        ratio = seconds / self.foretell(way, T, n, width)
        self.seen[way, T] = self.seen.get((way, T), 1.0) * (1 + ratio) / 2


_kept: weakref.WeakKeyDictionary[Any, dict[Any, Timing]] = weakref.WeakKeyDictionary()


def timing(run: Sampler) -> Timing:
    """The times of this model on this batch, measured if they are not known."""
    network, x = run.map.network, run.x_T
    most = network.rows or (CPU_ROWS if x.device.type == "cpu" else MANY * len(x))
    key = (tuple(x.shape), network.dtype, str(x.device), torch.get_num_threads(), most)
    model = network.model.model if isinstance(network.model, Rotated) else network.model
    try:
        kept = _kept.setdefault(model, {})
    except TypeError:  # a callable that cannot be referred to weakly, or has no hash
        kept = {}
    if key not in kept:
        kept[key] = _measure(run, most)
    return kept[key]


def _measure(run: Sampler, most: int) -> Timing:
    B = len(run.x_T)
    many = max(B, min(most, max(MANY, B)))
    few = min(_seconds(run, B) for _ in range(4))
    return Timing(B, few, many, few if many == B else min(_seconds(run, many) for _ in range(3)), {})


def _seconds(run: Sampler, rows: int) -> float:
    """Seconds of one call on so many rows, spread over the images and the time steps."""
    x, T = run.x_T, len(run.map.chain)
    i = torch.arange(rows, device=x.device) % len(x)
    k = torch.linspace(0, T - 1, rows, device=x.device).long()
    states, inputs = x[i], [c[i] for c in run.conditioning]

    def call() -> None:
        run.map.remainder(states, k, inputs)
        if x.device.type == "cuda":
            torch.cuda.synchronize(x.device)

    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def cheapest(run: Sampler, n: int | None) -> str:
    """ "sequential", "together" or "nodes", by the time foretold; n is the number of nodes, None without."""
    known, T, width = timing(run), len(run.map.chain), run.x_T.shape[1]
    costs = {way: known.foretell(way, T, n, width) for way in ("together", "nodes")}
    best = min(costs, key=lambda way: costs[way])
    return best if costs[best] <= MARGIN * known.foretell("sequential", T, n, width) else "sequential"


def timed(run: Sampler, way: str, n: int | None, solve: Callable[[], Any]) -> Any:
    """solve(), its time noted for the next choice."""
    start = time.perf_counter()
    out = solve()
    if run.x_T.device.type == "cuda":
        torch.cuda.synchronize(run.x_T.device)
    timing(run).note(way, len(run.map.chain), n, run.x_T.shape[1], time.perf_counter() - start)
    return out
