"""What happens to a state between two steps: predicted images held in range, and hooks on x_t such as inpainting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .checks import flag

if TYPE_CHECKING:
    from .chain import Chain

QUANTILE_ENTRIES = 2**24 - 1  # more, torch.quantile does not take at once

Edit = Callable[[Tensor, int, Tensor], Tensor]


@dataclass(frozen=True)
class Clip:
    """Keeps the image that a step predicts, x̂_0 = (x_t − √(1−ᾱ) ε)/√ᾱ, in range; ε stays what the model said.

    bound: x̂_0 is clipped to ±bound (diffusers' `clip_sample`). quantile: if given, x̂_0 is divided by s after being
    clipped to ±s, s the quantile of its |entries|, no less than 1 and no more than `bound`: dynamic thresholding
    (Saharia et al. 2022), one s per image. consistent: ε is taken anew from the clipped image, (x_t − √ᾱ x̂_0)/√(1−ᾱ),
    as DDPM's posterior mean does and diffusers' `use_clipped_model_output`.
    """

    bound: float = 1.0
    quantile: float | None = None
    consistent: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.bound, bool) or not isinstance(self.bound, (int, float)) or not self.bound > 0:
            raise ValueError(f"bound: a positive number is required, got {self.bound!r}")
        if self.quantile is not None and not 0 < self.quantile <= 1:
            raise ValueError(f"quantile: a number in (0, 1] is required, got {self.quantile!r}")
        flag("consistent", self.consistent)
        if self.quantile is not None and self.bound < 1:
            raise ValueError(f"bound: at least 1 is required with a quantile, got {self.bound}")

    def __call__(self, x_0: Tensor) -> Tensor:
        """(n, D) → (n, D)."""
        if self.quantile is None:
            return x_0.clamp(-self.bound, self.bound)
        parts = x_0.abs().split(max(1, QUANTILE_ENTRIES // x_0.shape[1]))
        s = torch.cat([torch.quantile(part, self.quantile, dim=1) for part in parts]).clamp(1, self.bound)[:, None]
        return torch.minimum(torch.maximum(x_0, -s), s) / s


@dataclass(eq=False)
class Inpaint:
    """An `edit` that keeps known pixels: x_k ← m·(√ᾱ_k x_0 + √(1−ᾱ_k) ε) + (1−m)·x_k, ᾱ_k that of state k.

    chain: the one that is sampled. x_0 (B, …): the images whose pixels are known. mask m, broadcast to x_0: 1 where a
    pixel is known, 0 where it is made up. noise ε (B, …): the latents x_T, so that the known pixels start as they do.
    """

    chain: Chain
    x_0: Tensor
    mask: Tensor
    noise: Tensor
    alphas: list[float] = field(init=False)  # of the states 0 … T

    def __post_init__(self) -> None:
        if self.noise.shape != self.x_0.shape:
            raise ValueError(
                f"noise: the shape of x_0, {tuple(self.x_0.shape)}, is required, got {tuple(self.noise.shape)}"
            )
        self.mask = self.mask.expand_as(self.x_0)
        self.alphas = [*self.chain.alphas.tolist(), self.chain.alphas_next[-1].item()]

    def __call__(self, x: Tensor, k: int, image: Tensor) -> Tensor:
        """States x (n, …) of step k with the known pixels of the images numbered `image` (n,)."""
        alpha = self.alphas[k]
        x_0, noise, mask = (part[image.to(part.device)].to(x) for part in (self.x_0, self.noise, self.mask))
        return torch.lerp(x, alpha**0.5 * x_0 + (1 - alpha) ** 0.5 * noise, mask)
