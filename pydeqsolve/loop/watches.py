"""What looks on after each measurement; a true answer stops the solve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .batch import Batch
from .judge import SampleJudge

Callback = Callable[[int, Any, Tensor], Any]
Watch = Callable[[int, Batch, SampleJudge], Any]


def residuals(batch: Batch, judge: SampleJudge) -> Tensor:
    """(B,) as last measured, NaN for the samples that have finished before."""
    samples = judge.samples
    out = torch.full((batch.full.shape[0],), torch.nan, dtype=torch.float64, device=batch.full.device)
    out[batch.rows] = torch.where(samples["judged"] != 0, samples["residual"], torch.nan)
    return out


class Trace:
    """Keeps the residual of every step."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def __call__(self, step: int, batch: Batch, judge: SampleJudge) -> None:
        self.steps.append(residuals(batch, judge))

    def stacked(self, z0: Tensor) -> Tensor:
        """(steps, B), of a solve from z0 (B, T, D)."""
        none = torch.empty(0, z0.shape[0], dtype=torch.float64, device=z0.device)
        return torch.stack(self.steps) if self.steps else none


class Snapshots:
    """Keeps the iterates of chosen steps; of samples that have finished before, what the solution will hold."""

    def __init__(self, steps: Sequence[int]) -> None:
        self._steps = steps
        self._seen: dict[int, Tensor] = {}

    def __call__(self, step: int, batch: Batch, judge: SampleJudge) -> None:
        if step in self._steps:
            samples = judge.samples
            self._seen[step] = batch.current(samples.running | (samples["fresh"] != 0))

    def at(self, step: int, z: Tensor) -> Tensor:
        """The iterate of `step`, z where the solve had ended by then; no two in one memory."""
        return self._seen.get(step, z).clone()


def calling(callback: Callback) -> Watch:
    """The user's callback(step, z, residual) as a watch, z in the user's structure."""

    def watch(step: int, batch: Batch, judge: SampleJudge) -> Any:
        return callback(step, batch.problem.layout.unpack(batch.current()), residuals(batch, judge))

    return watch
