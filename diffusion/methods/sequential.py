"""One step of the chain after the other: what every other method is measured against."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pydeqsolve import Status

from ..problem import ChainProblem, Found, in_steps
from .goal import Goal, Watch


@dataclass(frozen=True)
class Sequential:
    """T model calls, each on one state of every image; exact."""

    def find(self, problem: ChainProblem, goal: Goal, watch: Watch, guess: Tensor | None = None) -> Found:
        """States and status; a first guess is of no use."""
        T, before = len(problem.map.chain) - problem.map.linear.given, problem.map.network.calls
        if watch.callback is not None:
            raise ValueError('callback: of the rounds of method="parallel"; with "sequential" edit= sees every state')
        if goal.max_rounds is not None and goal.max_rounds < T:
            raise ValueError(f"max_rounds: at least {T}, the steps, is required of sequential, got {goal.max_rounds}")
        states = in_steps(problem, None if watch.quiet else watch.bar)
        found = Found.of(states, states[:, :0], T)
        found.rounds, finite = problem.map.network.calls - before, states.isfinite().flatten(1).all(1)
        found.error = torch.zeros_like(found.error).masked_fill_(~finite, torch.nan)
        found.status = torch.where(finite, int(Status.CONVERGED), int(Status.NONFINITE))
        return found
