"""The loss of an inversion: how far the image sampled from a latent is from the one that was inverted."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pydeqsolve import Stop

from ..sampler import Sampler

LOSS_STOP = Stop(rtol=1e-7, max_steps=1000)  # of the sampling that measures it
LONG = 100  # steps up to which that is done one by one
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
        rows: (B,) evaluations of the sampling.
        check: model calls of the last sampling.
    """

    sampler: Sampler
    target: Tensor  # (B, D)
    dtype: torch.dtype
    check: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.x_T = torch.zeros_like(self.target)
        self.loss = torch.full_like(self.target[:, 0], torch.inf)
        self.rows = torch.zeros_like(self.loss, dtype=torch.int64)

    def offer(self, x_T: Tensor, N: Tensor | None, images: Tensor) -> None:
        """Samples from latents x_T (n, D) of the images (n,), and keeps each that is better than what there was.

        N: (n, T, D) remainders along the way, a guess; of use in long chains, which are sampled in parallel.
        """
        x_T = x_T.to(self.dtype).double()
        guess = N if len(self.sampler.map.chain) > LONG else None
        sampled, self.check, rows = self.sampler.pick(images).at(x_T).check(guess, LOSS_STOP)
        loss = (sampled - self.target[images]).square().sum(1)
        self.rows[images] += rows.to(self.rows.device)
        better = ~(loss >= self.loss[images])
        self.x_T[images] = torch.where(better[:, None], x_T, self.x_T[images])
        self.loss[images] = torch.where(better, loss, self.loss[images])

    @property
    def error(self) -> Tensor:
        """(B,) the loss as a root mean square per entry of the image."""
        return (self.loss / self.target.shape[1]).sqrt()
