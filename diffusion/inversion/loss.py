"""The loss of an inversion: how far the image sampled from a latent is from the one that was inverted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..arguments import Silent
from ..methods.goal import Goal, Watch
from ..methods.parallel import SOLVER, Together
from ..problem import ChainProblem, Found, in_steps

LONG = 100  # steps up to which the image is sampled one by one
PART = 0.1  # of the error asked for, what sampling all steps at once may leave
ERRORS = {torch.float64: 1e-6, torch.float32: 5e-6}


def default_error(*dtypes: torch.dtype) -> float:
    """Root mean square per pixel: 1e-6 in float64, 5e-6 in float32, half the machine epsilon in 16 bits."""
    return max(ERRORS.get(dtype, torch.finfo(dtype).eps / 2) for dtype in dtypes)


@dataclass(eq=False)
class Best:
    """The latent of least loss that was offered for every image, rounded to the dtype in which it will be returned.

    Attributes:
        x_T: (B, D) float64, of values that `dtype` has.
        loss: (B,) ‖x̂_0 − x_0‖² of the image sampled from exactly that latent.
        doubt: (B,) by how much the image may be off that was sampled, as a root mean square per entry.
        rows: (B,) evaluations of the sampling.
        check: model calls of the last sampling.
        second: (B, D) the state after x_T, of a chain that starts from a pair; None elsewhere.
        noises: (B, T, D) with which a chain of eta > 0 samples the images; None at eta = 0.
    """

    problem: ChainProblem  # whose latents are the images
    dtype: torch.dtype
    asked: float
    check: int = field(default=0, init=False)
    noises: Tensor | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.target = self.problem.latent
        self.x_T = torch.zeros_like(self.target)
        self.loss = torch.full_like(self.target[:, 0], torch.inf)
        self.doubt = torch.zeros_like(self.loss)
        self.rows = torch.zeros_like(self.loss, dtype=torch.int64)
        self.second: Tensor | None = None

    def offer(self, x_T: Tensor, N: Tensor | None, images: Tensor) -> None:
        """Samples from latents x_T (n, D) of the images (n,), and keeps each that is better than what there was.

        N: (n, T, D) remainders along the way, a guess; of use in long chains, which are sampled all steps at once, and
        step by step where what that may leave decides whether the error asked for is met.
        """
        network, x_T, target = self.problem.map.network, x_T.to(self.dtype).double(), self.target[images]
        calls, run = network.calls, replace(self.problem.pick(images).at(x_T), numbers=None)
        sampled, doubt = torch.full_like(target, torch.nan), torch.zeros_like(target[:, 0])
        if N is not None and N.shape[1] > LONG:
            sampled, doubt = self._at_once(run, N, images)
        least = (sampled - target).square().mean(1).sqrt()
        unsure = ~(least > self.asked) & ~(least + doubt <= self.asked)
        if bool(unsure.any()) or not len(images):
            sampled[unsure] = in_steps(run.pick(unsure.nonzero()[:, 0]))[:, -1]
            doubt[unsure] = 0.0
            self.rows[images[unsure]] += len(run.map.chain)
        self.check = network.calls - calls
        loss = (sampled - target).square().sum(1)
        better = ~(loss >= self.loss[images])
        self.x_T[images] = torch.where(better[:, None], x_T, self.x_T[images])
        self.loss[images] = torch.where(better, loss, self.loss[images])
        self.doubt[images] = torch.where(better, doubt, self.doubt[images])

    def _at_once(self, run: ChainProblem, N: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """x_0 (n, D) of the run, sampled from a guess of N, and its estimated error (n,); adds the rows."""
        size = run.latent.new_tensor(PART * self.asked) / self.target[images].square().mean(1).sqrt()
        goal = Goal.of(run, size.nan_to_num(1.0, 1.0, 1.0).clamp(torch.finfo(torch.float64).eps, 1.0), None)
        found = Found.of(run.base().clone(), torch.zeros_like(N))
        level = torch.zeros_like(N[..., 0])  # by what so small defects grow, the moves that they make tell
        Together(run, goal, SOLVER, None, Watch(), found).solve(N, run.image, (level, level.clone(), level.clone()))
        self.rows[images] += found.evaluations
        return found.states[:, -1], found.error * found.states[:, -1].square().mean(1).sqrt()

    @property
    def error(self) -> Tensor:
        """(B,) the most that the image is off, as a root mean square per entry."""
        return (self.loss / self.target.shape[1]).sqrt() + self.doubt


@dataclass(eq=False)
class Call:
    """What a call of `invert` asks of a method besides the problem: `invert` says what each is."""

    bar: Any = field(default_factory=Silent)
    max_rounds: int | None = None
    generator: torch.Generator | Sequence[torch.Generator] | None = None
    state: Mapping[str, Tensor] | None = None
    callback: Callable[[Any], Any] | None = None


def latents(x_T: Tensor, evaluations: Tensor | int, rounds: int, history: Tensor | None = None) -> Found:
    """Latents x_T (B, D) as a method finds them, their loss not known."""
    found = Found.of(x_T[:, None], x_T.new_zeros(len(x_T), 0, x_T.shape[1]), evaluations, rounds)
    found.history = x_T.new_empty(0, len(x_T)) if history is None else history
    return found
