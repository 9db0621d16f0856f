"""The loss of an inversion: how far the image sampled from a latent is from the one that was inverted."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..arguments import Silent
from ..methods.goal import Found, Goal
from ..methods.together import Together
from ..sampler import SOLVER, Sampler

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
    """

    sampler: Sampler
    target: Tensor  # (B, D)
    dtype: torch.dtype
    asked: float
    check: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.x_T = torch.zeros_like(self.target)
        self.loss = torch.full_like(self.target[:, 0], torch.inf)
        self.doubt = torch.zeros_like(self.loss)
        self.rows = torch.zeros_like(self.loss, dtype=torch.int64)

    def offer(self, x_T: Tensor, N: Tensor | None, images: Tensor) -> None:
        """Samples from latents x_T (n, D) of the images (n,), and keeps each that is better than what there was.

        N: (n, T, D) remainders along the way, a guess; of use in long chains, which are sampled all steps at once, and
        step by step where what that may leave decides whether the error asked for is met.
        """
        calls, x_T, target = self.sampler.map.network.calls, x_T.to(self.dtype).double(), self.target[images]
        run = replace(self.sampler.pick(images).at(x_T), numbers=None)
        sampled, doubt = torch.full_like(target, torch.nan), torch.zeros_like(target[:, 0])
        if N is not None and N.shape[1] > LONG:
            sampled, doubt = self._at_once(run, N, images)
        least = (sampled - target).square().mean(1).sqrt()
        unsure = ~(least > self.asked) & ~(least + doubt <= self.asked)
        if bool(unsure.any()) or not len(images):
            states, _, _, rows = run.pick(unsure.nonzero()[:, 0]).sequential(Silent())
            sampled[unsure], doubt[unsure] = states[:, -1], 0.0
            self.rows[images[unsure]] += rows.to(self.rows.device)
        self.check = self.sampler.map.network.calls - calls
        loss = (sampled - target).square().sum(1)
        better = ~(loss >= self.loss[images])
        self.x_T[images] = torch.where(better[:, None], x_T, self.x_T[images])
        self.loss[images] = torch.where(better, loss, self.loss[images])
        self.doubt[images] = torch.where(better, doubt, self.doubt[images])

    def _at_once(self, run: Sampler, N: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """x_0 (n, D) of the run, sampled from a guess of N, and its estimated error (n,); adds the rows."""
        size = run.x_T.new_tensor(PART * self.asked) / self.target[images].square().mean(1).sqrt()
        goal = Goal.of(run, size.nan_to_num(1.0, 1.0, 1.0).clamp(torch.finfo(torch.float64).eps, 1.0), None)
        found = Found.nothing(run)
        Together(run, goal, SOLVER, None, None, Silent(), None, found).solve(N, run.image)
        self.rows[images] += found.evaluations
        return found.x[:, -1], found.error * found.x[:, -1].square().mean(1).sqrt()

    @property
    def error(self) -> Tensor:
        """(B,) the most that the image is off, as a root mean square per entry."""
        return (self.loss / self.target.shape[1]).sqrt() + self.doubt
