"""The error of x_0 that is asked for, the model calls allowed, and what a way of sampling hands back."""

from __future__ import annotations

from dataclasses import dataclass
from types import NoneType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pydeqsolve import Solution, Status

if TYPE_CHECKING:
    from ..sampler import Sampler

ERROR = 1e-3  # asked for by default
FLOOR = 5.0  # a network that computes with machine epsilon u is asked for no less than FLOOR·u
ROUNDING = 2.0  # nor for less than so many times what rounding is estimated to leave in x_0


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
        floor: (B,) the least that the network's precision allows: FLOOR roundings, or what they grow to over the chain.
        max_rounds: of all model calls together; None is no limit.
    """

    asked: Tensor
    floor: Tensor
    precision: float  # machine epsilon of the network
    max_rounds: int | None
    run: Sampler
    before: int  # calls of the network when the call of `sample` began
    loose: bool  # nothing was asked for: what precision allows will do

    @staticmethod
    def of(run: Sampler, error: float | Tensor | None, max_rounds: int | None) -> Goal:
        """The goal of a run, its arguments checked."""
        B, device, network = len(run.x_T), run.x_T.device, run.map.network
        if isinstance(error, bool) or not isinstance(error, (int, float, Tensor, NoneType)):
            raise TypeError(f"error: a number, a tensor ({B},) or None is required, got {type(error).__name__}")
        if max_rounds is not None and (isinstance(max_rounds, bool) or not isinstance(max_rounds, int)):
            raise TypeError(f"max_rounds: an integer or None is required, got {type(max_rounds).__name__}")
        if max_rounds is not None and max_rounds < 1:
            raise ValueError(f"max_rounds: at least 1 is required, got {max_rounds}")
        unit = precision(network.dtype, device)
        asked = torch.as_tensor(ERROR if error is None else error, device=device)
        if asked.is_complex() or asked.shape not in ((), (B,)):
            raise ValueError(f"error: a number or a tensor ({B},) is required, got shape {tuple(asked.shape)}")
        asked = asked.detach().double().expand(B)
        if bool((~(asked > 0) | asked.isinf()).any()):
            raise ValueError(f"error: positive and finite is required, got {error}")
        floor = torch.full_like(asked, FLOOR * unit)
        return Goal(asked, floor, unit, max_rounds, run, network.calls, error is None)

    def raised(self, images: Tensor, rounding: Tensor) -> None:
        """What rounding leaves (n,) in some images is no less than their floor."""
        self.floor[images] = torch.maximum(self.floor[images], ROUNDING * rounding)

    @property
    def error(self) -> Tensor:
        """(B,) the error pursued: the one asked for, or the floor where that is more."""
        return torch.maximum(self.asked, self.floor)

    @property
    def left(self) -> int:
        """Rounds that may still be made."""
        spent = self.run.map.network.calls - self.before
        return 2**31 if self.max_rounds is None else max(0, self.max_rounds - spent)


@dataclass(eq=False)
class Found:
    """What is known of the B images while they are sampled, and in the end.

    Attributes:
        x: (B, T+1, D) states; N (B, T, D), the remainders that made them.
        error: (B,) estimate for exactly these states; inf where none was measured.
        residual: (B,) root mean square of the defects, in units of σ ε.
        steps: (B,) rounds that the image took part in; evaluations (B,) of the network.
    """

    x: Tensor
    N: Tensor
    error: Tensor
    residual: Tensor
    status: Tensor
    steps: Tensor
    evaluations: Tensor
    stopped: bool = False  # by the callback
    told: int = 0  # rounds that the callback was told of

    @staticmethod
    def nothing(run: Sampler) -> Found:
        """Before the first round: the states of N = 0."""
        (B, D), T = run.x_T.shape, len(run.map.chain)
        unknown, none = run.x_T.new_full((B,), torch.inf), torch.zeros(B, dtype=torch.int64, device=run.x_T.device)
        status = torch.full_like(none, int(Status.MAX_STEPS))
        N = run.x_T.new_zeros(B, T, D)
        return Found(run.base().clone(), N, unknown, unknown.clone(), status, none, none.clone())

    def note(self, images: Tensor, steps: Tensor, rows: Tensor, residual: Tensor) -> None:
        """Adds rounds and rows (n,) of some images, and puts down their residual."""
        self.steps[images] += steps
        self.evaluations[images] += rows
        self.residual[images] = residual

    def take(self, images: Tensor, x: Tensor, N: Tensor, error: Tensor) -> None:
        """Keeps states (n, T+1, D) of some images with their estimate (n,), unless those known are better."""
        better = (error < self.error[images]) | self.error[images].isinf() | error.isnan()
        chosen = images[better]
        self.x[chosen], self.N[chosen], self.error[chosen] = x[better], N[better], error[better]

    def judged(self, goal: Goal) -> None:
        """Says by `status` and `error` what was measured."""
        finite = self.x.isfinite().flatten(1).all(1) & self.N.isfinite().flatten(1).all(1) & ~self.error.isnan()
        measured = self.error <= goal.error
        self.status[measured] = int(Status.CONVERGED)
        if not goal.loose:
            self.status[measured & (goal.asked < goal.floor)] = int(Status.STALLED)
        self.status[~finite] = int(Status.NONFINITE)
        self.error[~finite] = torch.nan

    def solution(self, rounds: int) -> Solution:
        """The same as `pydeqsolve` says it."""
        none = torch.zeros_like(self.steps)
        return Solution(self.N, self.residual, self.steps, self.status, rounds, none, none.clone())
