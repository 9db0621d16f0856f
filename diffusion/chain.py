"""The DDIM chain as arrays of coefficients, and its linear part solved in closed form.

Notation: step k = 0 … T−1 goes from x_k (noisier; x_0 of this file is the latent x_T) to x_{k+1}:
x_{k+1} = a_k x_k + c_k ε(x_k, t_k) + σ_k n_k. With a splitting ε = κ_k x + b_k + N(x) it is
x_{k+1} = A_k x_k + c_k (b_k + N_k) + σ_k n_k, A_k = a_k + c_k κ_k, and given all N_k the whole trajectory is one
cumulative sum: x_k = P_k (x_0 + Σ_{j<k} (c_j (b_j + N_j) + σ_j n_j) / P_{j+1}), P_k = Π_{j<k} A_j.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .recurrence import Recurrence

Edit = Callable[[Tensor, int, Tensor], Tensor]  # edit(x, k, image): what becomes of the states that k steps leave

VARIANCE_FLOOR = 1e-2  # of the mean variance


@dataclass(frozen=True, eq=False)
class Chain(Recurrence):
    """T DDIM steps (Song, Meng & Ermon 2021, Eq. 12) of a noise schedule; the fields are those of `Recurrence`."""


@dataclass(frozen=True, eq=False)
class Splitting:
    """The linear part of ε that is solved exactly: ε(x, t_k) ≈ κ_k x + b_k.

    kappa: (T, 1) or (T, D) float64. offset b: the same, or None for 0. basis Q (D, D), orthonormal columns: κ and b are
    for y = Qᵀ x; None is x itself. The fixed point is the same for every splitting; the number of rounds is not.
    """

    kappa: Tensor
    offset: Tensor | None = None
    basis: Tensor | None = None

    @staticmethod
    def fitted(chain: Chain, images: Tensor, basis: str = "pixels") -> Splitting:
        """The "gaussian" splitting with mean and variances of images (n, C, H, W), per entry of a basis.

        basis: "pixels"; "frequencies", of the cosine transform of every channel; or "covariance", the eigenvectors of
        the images' own covariance, for which it is exact for Gaussian data of any kind (D³ operations). Variances
        divide by n. A checkpoint carries its data's: `Checkpoint.splitting` needs no images.
        """
        if not isinstance(images, Tensor) or images.dim() != 4 or len(images) < 2:
            got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"images: a tensor (n, C, H, W), n ≥ 2, is required, got {got}")
        data = images.detach().double().cpu().flatten(1)
        mean = data.mean(0)
        if basis == "pixels":
            return Splitting.named("gaussian", chain, mean, data.var(0, correction=0))
        if basis == "frequencies":
            Q = cosine_basis(images.shape[1:])
        elif basis == "covariance":
            Q = torch.linalg.eigh(torch.cov(data.T)).eigenvectors
        else:
            raise ValueError(f'basis: "pixels", "frequencies" or "covariance" is required, got {basis!r}')
        return replace(Splitting.named("gaussian", chain, mean @ Q, (data @ Q).var(0, correction=0)), basis=Q)

    @staticmethod
    def named(name: str, chain: Chain, mean: Tensor | None = None, variance: Tensor | None = None) -> Splitting:
        """The splitting called "epsilon" (κ = 0, the paper's form), "v" (κ = √(1−ᾱ), a rotation) or "gaussian".

        "gaussian" is exact for Gaussian data: κ = σ/(ᾱ Λ + σ²), b = −κ √ᾱ μ, σ² = 1 − ᾱ, with the data's mean μ and
        variance Λ per pixel, (D,) each; without them μ = 0 and Λ = 0.25, about that of images in [−1, 1].
        """
        alpha = chain.alphas[:, None]
        sigma = (1 - alpha).sqrt()
        odd = (chain.blind | chain.still)[:, None]  # steps whose c stands before something else than ε
        if name == "epsilon":
            return Splitting(torch.zeros_like(alpha))
        if name == "v":
            return Splitting(torch.where(odd, 0.0, sigma))
        if name == "gaussian":
            spread = alpha.new_tensor([0.25]) if variance is None else variance.double().cpu()
            # A pixel that never varies would make A_k vanish at the image: its step could not be read backwards.
            spread = spread.clamp_min(VARIANCE_FLOOR * spread.mean().clamp_min(VARIANCE_FLOOR))
            kappa = torch.where(odd, 0.0, sigma / (alpha * spread + sigma.square()))
            if mean is None:
                return Splitting(kappa)
            mu = mean.double().cpu()  # without signal nothing but the mean is known: v = −μ
            return Splitting(kappa, torch.where(chain.blind[:, None], -mu, -kappa * alpha.sqrt() * mu))
        raise ValueError(f'splitting: "epsilon", "v", "gaussian" or a tensor κ is required, got {name!r}')

    @staticmethod
    def of(
        splitting: str | Tensor | Splitting, chain: Chain, mean: Tensor | None = None, variance: Tensor | None = None
    ) -> Splitting:
        """A splitting from its name, from κ (T,) or (T, D), or as it is."""
        if isinstance(splitting, Splitting):
            return splitting
        if isinstance(splitting, str):
            return Splitting.named(splitting, chain, mean, variance)
        if not isinstance(splitting, Tensor):
            raise TypeError(f"splitting: a name, a tensor or a Splitting is required, got {type(splitting).__name__}")
        if splitting.dim() not in (1, 2) or splitting.shape[0] != len(chain):
            raise ValueError(f"splitting: κ must be ({len(chain)},) or ({len(chain)}, D), got {tuple(splitting.shape)}")
        kappa = splitting.double().cpu()
        return Splitting(kappa[:, None] if kappa.dim() == 1 else kappa)


def cosine_basis(shape: torch.Size) -> Tensor:
    """(D, D) float64, orthonormal columns: the cosine transform of every channel of images of `shape` (C, H, W)."""
    channels, height, width = shape
    return torch.kron(torch.eye(channels, dtype=torch.float64), torch.kron(cosines(height), cosines(width)))


def cosines(n: int) -> Tensor:
    """(n, n) float64, orthonormal: column j is cos(π j (i + ½)/n), the cosine transform of type II."""
    i, j = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
    columns = torch.cos(torch.pi / n * j.double() * (i.double() + 0.5))
    return columns / columns.norm(dim=0)


class LinearChain:
    """x_{k+1} = A_k x_k + c_k N_k + d_k from a given x_0, for every k at once. A (T, 1) or (T, D), c (T, 1).

    Works from the product form where that is safe; when some A_k is so small that dividing by the products loses
    digits (a chain that jumps from pure noise to the image), it goes step by step.
    """

    def __init__(self, A: Tensor, c: Tensor) -> None:
        self.A, self.c = A, c
        products = torch.cat([torch.ones_like(A[:1]), A.cumprod(0)])
        size = products.abs()
        self.safe = bool(size.isfinite().all()) and bool(size.min() > 1e-8 * size.max()) and bool(size.min() > 1e-100)
        self.P = products  # (T+1, 1 or D)
        self.w = c / products[1:] if self.safe else c

    def base(self, x: Tensor, d: Tensor | None) -> Tensor:
        """The trajectory (B, T+1, D) with N = 0, from x (B, D); d (B or 1, T, D) or None."""
        if not self.safe:
            return self._stepwise(x, d)
        drift = 0 if d is None else torch.nn.functional.pad((d / self.P[1:]).cumsum(1), (0, 0, 1, 0))
        return self.P * (x[:, None] + drift)

    def trajectory(self, base: Tensor, N: Tensor, image: Tensor | None = None) -> Tensor:
        """(B, T+1, D): base plus the response to N (B, T, D). image (B,): numbers, which `EditedChain` needs."""
        if not self.safe:
            return base + self._stepwise(torch.zeros_like(base[:, 0]), self.c * N)
        out = base.clone()
        out[:, 1:] += (self.w * N).cumsum_(1).mul_(self.P[1:])
        return out

    def _stepwise(self, x: Tensor, d: Tensor | None) -> Tensor:
        states = [x]
        for k in range(self.A.shape[0]):
            x = self.A[k] * x
            x = x if d is None else x + d[:, k]
            states.append(x)
        return torch.stack(states, 1)


class EditedChain(LinearChain):
    """The same with x_k ← edit(x_k, k, image) after every step.

    An edit need not be linear, so no closed form is left: the states are made one after the other, in every round. The
    map from N to the states is still lower triangular, and its fixed point is the chain sampled step by step.
    """

    def __init__(self, A: Tensor, c: Tensor, edit: Edit, shape: torch.Size) -> None:
        super().__init__(A, c)
        self.edit, self.shape = edit, shape

    def base(self, x: Tensor, d: Tensor | None) -> Tensor:
        """(B, T+1, D): x, then what every step adds."""
        drift = torch.zeros_like(self.c)[None] if d is None else d
        return torch.cat([x[:, None], drift.expand(len(x), -1, x.shape[1])], 1)

    def trajectory(self, base: Tensor, N: Tensor, image: Tensor | None = None) -> Tensor:
        x, added = base[:, 0], base[:, 1:] + self.c * N
        out = [x]
        for k in range(N.shape[1]):
            x = self.after(self.A[k] * x + added[:, k], k, image)
            out.append(x)
        return torch.stack(out, 1)

    def after(self, x: Tensor, k: int, image: Tensor | None) -> Tensor:
        """The state (B, D) that step k leaves."""
        images = x.reshape(-1, *self.shape)
        edited = self.edit(images, k + 1, image if image is not None else torch.arange(len(x), device=x.device))
        if not isinstance(edited, Tensor) or edited.shape != images.shape:
            got = tuple(edited.shape) if isinstance(edited, Tensor) else type(edited).__name__
            raise ValueError(f"edit: a tensor of the shape of x, {tuple(images.shape)}, is required, got {got}")
        return edited.to(x.dtype).reshape(x.shape)
