"""A denoiser in closed form: the exact ε of a mixture of Gaussians."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffusion.schedule import Schedule


class Mixture(nn.Module):
    """ε(x, t) = −√(1−ᾱ) ∇ log p_t(x) for p_0 = Σ_j π_j N(μ_j, s² I), with means √ᾱ μ_j and variance ᾱs² + 1 − ᾱ.

    The means are parameters, so that gradients through a chain can be checked.
    """

    def __init__(self, schedule: Schedule, means: Tensor, spread: float = 0.5, prediction: str = "epsilon") -> None:
        super().__init__()
        self.alphas, self.spread, self.prediction = schedule.alphas_cumprod, spread, prediction
        self.means = nn.Parameter(means.double())  # (J, D)
        self.rows = 0
        self.calls = 0
        self.eval()

    def forward(self, x: Tensor, t: Tensor, shift: Tensor | None = None) -> Tensor:
        """Prediction (N, …) for x (N, …) at t (N,); shift (N, D), if given, moves the means per row."""
        self.rows += len(x)
        self.calls += 1
        alpha = self.alphas[t][:, None]
        flat = x.double().flatten(1)
        means = self.means if shift is None else self.means + shift[:, None]
        variance = alpha * self.spread**2 + 1 - alpha
        offset = flat[:, None] - alpha[:, None].sqrt() * means  # (N, J, D)
        logits = -offset.square().sum(-1) / (2 * variance)
        responsibility = logits.softmax(1)[..., None]
        eps = (1 - alpha).sqrt() * (responsibility * offset).sum(1) / variance
        clean = (flat - (1 - alpha).sqrt() * eps) / alpha.sqrt()
        out = {"epsilon": eps, "sample": clean, "v": alpha.sqrt() * eps - (1 - alpha).sqrt() * clean}
        return out[self.prediction].reshape(x.shape).to(x.dtype)


def means(count: int = 3, size: int = 6, seed: int = 0) -> Tensor:
    """(count, size) well-separated component means."""
    return 1.5 * torch.randn(count, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def latents(count: int, *shape: int, seed: int = 1) -> Tensor:
    """(count, *shape) standard normal float64."""
    return torch.randn(count, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
