"""The error of the images that is asked for, the model calls allowed, and who is told of the rounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from pydeqsolve import ConvergenceError, Solution, Status

from ..arguments import Silent
from ..checks import integer
from ..problem import ChainProblem, Found

ERROR, ENOUGH = 1e-3, 10.0  # asked for by default: ERROR, or ENOUGH machine epsilons where that is more
FLOOR = 5.0  # a network that computes with machine epsilon u is asked for no less than FLOOR·u
ROUNDING = 2.0  # nor for less than so many times what rounding is estimated to leave in x_0
# An estimate within so many floors that no longer falls has come to the network's rounding; within the second where
# less than the floor is asked for, so that no sampling reaches it, and what rounding may leave at most is as much.
NEAR_FLOOR, NEAR_MOST = 5.0, 100.0


def precision(dtype: torch.dtype, device: torch.device) -> float:
    """Machine epsilon of what a network of this dtype computes in on `device`, under autocast that of autocast."""
    if torch.is_autocast_enabled(device.type):
        dtype = max(dtype, torch.get_autocast_dtype(device.type), key=lambda kind: torch.finfo(kind).eps)
    return torch.finfo(dtype).eps


@dataclass(eq=False)
class Goal:
    """What one call of `sample` is to reach, and with how many rounds.

    Attributes:
        asked: (B,) float64, the relative error of x_0 asked for.
        enough: (B,) what has converged: `asked`, and ENOUGH machine epsilons where nothing was asked for.
        floor: (B,) the least that the network's precision allows: FLOOR roundings, or what they grow to over the chain.
        near: (B,) an estimate of no more than this that no longer falls has come to the network's rounding: the most
            that rounding is seen to leave, from NEAR_FLOOR floors to NEAR_MOST.
        max_rounds: of all model calls together; None is no limit.
    """

    asked: Tensor
    enough: Tensor
    floor: Tensor
    near: Tensor
    precision: float  # machine epsilon of the network
    max_rounds: int | None
    problem: ChainProblem
    before: int  # calls of the network when the call of `sample` began
    unseen: Tensor  # (B,) the error that rounding leaves under a steep network, as measured last

    @staticmethod
    def of(problem: ChainProblem, error: float | Tensor | None, max_rounds: int | None) -> Goal:
        """The goal of a problem, its arguments checked."""
        B, device, network = len(problem.latent), problem.latent.device, problem.map.network
        if isinstance(error, bool) or not isinstance(error, (int, float, Tensor, NoneType)):
            raise TypeError(f"error: a number, a tensor ({B},) or None is required, got {type(error).__name__}")
        if max_rounds is not None:
            max_rounds = integer("max_rounds", max_rounds, "an integer or None")
        if max_rounds is not None and max_rounds < 1:
            raise ValueError(f"max_rounds: at least 1 is required, got {max_rounds}")
        unit = precision(network.dtype, device)
        asked = torch.as_tensor(ERROR if error is None else error, device=device)
        if asked.is_complex() or asked.shape not in ((), (B,)):
            raise ValueError(f"error: a number or a tensor ({B},) is required, got shape {tuple(asked.shape)}")
        asked = asked.detach().double().expand(B)
        if bool((~(asked > 0) | asked.isinf()).any()):
            raise ValueError(f"error: positive and finite is required, got {error}")
        enough = asked.clamp_min(ENOUGH * unit) if error is None else asked
        floor, unseen = torch.full_like(asked, FLOOR * unit), torch.zeros_like(asked)
        return Goal(asked, enough, floor, NEAR_FLOOR * floor, unit, max_rounds, problem, network.calls, unseen)

    def raised(
        self, images: Tensor, rounding: Tensor, most: Callable[[], Tensor] | None = None, turned: Tensor | None = None
    ) -> None:
        """What rounding leaves (n,) in some images is no less than their floor, and `most()` (n,) at most.

        turned: what it is expected to leave under a steep network, which is pursued no less but said (`judged`).
        """
        if turned is not None:
            self.unseen[images] = ROUNDING * turned
        self.floor[images] = torch.maximum(self.floor[images], ROUNDING * rounding)
        floor = self.floor[images]
        near, beyond = NEAR_FLOOR * floor, self.asked[images] < floor
        if most is not None and bool(beyond.any()):
            near = torch.where(beyond, torch.maximum(near, ROUNDING * most()), near)
        self.near[images] = torch.minimum(near, NEAR_MOST * floor)

    @property
    def error(self) -> Tensor:
        """(B,) the error pursued: the one asked for, or the floor where that is more."""
        return torch.maximum(self.asked, self.floor)

    @property
    def left(self) -> int:
        """Rounds that may still be made."""
        spent = self.problem.map.network.calls - self.before
        return 2**31 if self.max_rounds is None else max(0, self.max_rounds - spent)

    def judged(self, found: Found) -> Found:
        """The same, with status, error and solution that say what was measured."""
        sums = found.states.flatten(1).sum(1) + found.N.flatten(1).sum(1)  # not finite where an entry is not
        finite = sums.isfinite() & ~found.error.isnan()
        found.error, self.floor = (torch.maximum(part, self.unseen) for part in (found.error, self.floor))
        measured = found.error <= torch.maximum(self.enough, self.floor)
        found.status[measured] = int(Status.CONVERGED)
        found.status[measured & (self.enough < self.floor)] = int(Status.STALLED)
        found.status[~finite] = int(Status.NONFINITE)
        found.error[~finite] = torch.nan
        found.rounds, none = self.problem.map.network.calls - self.before, torch.zeros_like(found.steps)
        found.solution = ChainSolution(
            found.N, found.residual, found.steps, found.status, found.rounds, none, none.clone(), error=found.error,
            asked=self.enough,
        )  # fmt: skip
        return found


@dataclass(frozen=True, eq=False, repr=False)
class ChainSolution(Solution):
    """The solution of a chain; `error` and `asked` (B,) are of its images, as in `Sample`."""

    error: Tensor | None = None
    asked: Tensor | None = None

    def check(self) -> ChainSolution:
        """Returns self, or raises ConvergenceError that counts the images of each status, and says what to change."""
        told = []
        for status, text in SAID.items():
            at, total = self.status == int(status), len(self.status)
            if bool(at.any()) and self.error is not None and self.asked is not None:
                worst = int(torch.where(at, (self.error / self.asked).nan_to_num(torch.inf), -1.0).argmax())
                values = {"error": f"{float(self.error[worst]):.1e}", "asked": f"{float(self.asked[worst]):.1e}"}
                told.append(f"{int(at.sum())} of {total} {status.name} ({text.format(**values)})")
        if told:
            raise ConvergenceError(f"sample did not converge: {'; '.join(told)}")
        return self


SAID = {
    Status.MAX_STEPS: "max_rounds, or the callback, ended it before the error of x_0 was measured to be the {asked} "
    "asked for; it is {error} at most: raise max_rounds, or loosen error",
    Status.STALLED: "the network's precision leaves an error of x_0 of {error} where {asked} was asked for: loosen "
    "error, or compute the network in a wider dtype",
    Status.DIVERGED: "the states grew beyond measure",
    Status.NONFINITE: "the model returned NaN or infinity, or latent or inputs are not finite: check them",
}


@dataclass(eq=False)
class Watch:
    """The bar that every round moves, and the user's callback, told of the rounds that evaluate every step."""

    bar: Any = field(default_factory=Silent)
    callback: Callable[[int, Tensor, Tensor], Any] | None = None
    told: int = 0  # rounds so far
    stopped: bool = False  # by the callback

    def tell(self, problem: ChainProblem, found: Found, states: Tensor, images: Tensor | None = None) -> None:
        """Shows all images, `states` (n, T+1, D) those of some (n,) or None for all, and the residuals as they are."""
        self.told += 1
        if self.callback is None:
            return
        if images is not None:
            whole = found.states.clone()
            whole[images] = states
            states = whole
        self.stopped = bool(self.callback(self.told, problem.shaped(states), found.residual.clone()))

    @property
    def quiet(self) -> bool:
        """Whether nobody looks."""
        return self.callback is None and isinstance(self.bar, Silent)
