"""Hooks on the states between two steps, such as inpainting."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .chain import Chain, one_line


@dataclass(eq=False)
class Inpaint:
    """An `edit` that keeps known pixels: x_k ← m·(α_k x_0 + σ_k ε) + (1−m)·x_k, α_k and σ_k those of state k.

    chain: the one that is sampled. x_0 (B, …): the images whose pixels are known. mask m, broadcast to x_0: 1 where a
    pixel is known, 0 where it is made up. noise ε (B, …): the latents over
    `chain.init_noise_sigma`, so that the known pixels start as they do.
    """

    chain: Chain
    x_0: Tensor
    mask: Tensor
    noise: Tensor
    levels: list[tuple[float, float]] = field(init=False, repr=False)  # α and σ of the states 0 … T
    __repr__ = one_line

    def __post_init__(self) -> None:
        if self.noise.shape != self.x_0.shape:
            raise ValueError(
                f"noise: the shape of x_0, {tuple(self.x_0.shape)}, is required, got {tuple(self.noise.shape)}"
            )
        self.mask = self.mask.expand_as(self.x_0)
        self.levels = list(zip(self.chain.signal.tolist(), self.chain.noise.tolist(), strict=True))

    def __call__(self, x: Tensor, k: int, image: Tensor) -> Tensor:
        """States x (n, …) of step k with the known pixels of the images numbered `image` (n,)."""
        alpha, sigma = self.levels[k]
        x_0, noise, mask = (part[image.to(part.device)].to(x) for part in (self.x_0, self.noise, self.mask))
        return torch.lerp(x, alpha * x_0 + sigma * noise, mask)
