"""A chain as arrays of coefficients, and the linear part of what its network says.

Notation: step k = 0 … T−1 goes from state s_k, the noisier, to s_{k+1}; s_0 is the latent, s_T the image:
s_{k+1} = a_k s_k + c_k ε(s_k, t_k) + σ_k n_k. With a splitting ε = κ_k s + b_k + N(s) it is
s_{k+1} = A_k s_k + c_k (b_k + N_k) + σ_k n_k, A_k = a_k + c_k κ_k (`diffusion.trajectory`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from .checks import integer, real, signal, time_steps
from .recurrence import Recurrence

VARIANCE_FLOOR = 1e-2  # of the mean variance


def one_line(value: Any) -> str:
    """The `repr` of a dataclass: its tensors by their shapes, and no field that is as it is by default."""
    shown = []
    for part in fields(value):
        here = getattr(value, part.name)
        if isinstance(here, Tensor):
            shown.append(f"{part.name} {tuple(here.shape)}")
        elif part.repr and here is not part.default and here != part.default:
            shown.append(f"{part.name}={here!r}")
    return f"{type(value).__name__}({', '.join(shown)})"


@dataclass(frozen=True, eq=False)
class Chain(Recurrence):
    """T steps down from noise to image, s_{k+1} = a_k s_k + c_k ε(s_k, t_k) + σ_k n_k, over states α x_0 + σ ε.

    On any α and σ this is DDIM (Song, Meng & Ermon 2021, Eq. 12): on a flow Euler's step, and Euler's σ-step where α is
    1. The fields are those of `Recurrence`; `Schedule.chain` makes one.
    """

    @classmethod
    def vp(cls, timesteps: Tensor, alphas: Tensor, alphas_next: Tensor, **fields: Any) -> Chain:
        """The chain of states √ᾱ x_0 + √(1−ᾱ) ε.

        alphas (T,): ᾱ before each step, in (0, 1], or 0 at the first. alphas_next (T,): after it.
        """
        t = time_steps("timesteps", timesteps)
        if bool((t.diff() == 0).any()):
            raise ValueError(f"timesteps: must decrease, got {t[int((t.diff() == 0).nonzero()[0])]:g} twice")
        alphas = signal("alphas", alphas, len(t))
        after = signal("alphas_next", alphas_next, len(t), alphas)
        states = torch.cat([alphas, after[-1:]])
        ends = None if torch.equal(alphas[1:], after[:-1]) else torch.stack([after.sqrt(), (1 - after).sqrt()])
        return cls(t, states.sqrt(), (1 - states).sqrt(), ends=ends, **fields)

    def partial(self, strength: float) -> Chain:
        """The last ⌊strength · T⌋ steps, as diffusers' `strength` has it; 1 is all.

        They start from a noised image, `add_noise`, instead of noise alone (SDEdit, Meng et al. 2022); inverted, they
        give an image's state there.
        """
        T = len(self)
        if not 0 < real("strength", strength) <= 1 or int(strength * T) < 1:
            raise ValueError(f"strength: 1/{T}, which leaves one step, to 1 is required, got {strength}")
        return self.tail(T - int(strength * T))

    def tail(self, k: int) -> Chain:
        """The steps k … T−1, which start from state k."""
        if not 0 <= (k := integer("k", k)) < len(self):
            raise ValueError(f"k: 0 to {len(self) - 1}, a step, is required, got {k!r}")
        if k == 0:
            return self
        ends = None if self.ends is None else self.ends[:, k:]
        return replace(
            self, timesteps=self.timesteps[k:], signal=self.signal[k:], noise=self.noise[k:], ends=ends,
            init_noise_sigma=float(self.size[k]), skipped=self.skipped + k,
        )  # fmt: skip

    def add_noise(self, x_0: Tensor, noise: Tensor) -> Tensor:
        """The state α x_0 + σ ε (B, …) that the chain starts from, of images x_0 and noise ε (B, …), in x_0's dtype."""
        if noise.shape != x_0.shape:
            raise ValueError(f"noise: the shape of x_0, {tuple(x_0.shape)}, is required, got {tuple(noise.shape)}")
        return (float(self.signal[0]) * x_0.double() + float(self.noise[0]) * noise.double()).to(x_0.dtype)

    @property
    def alphas(self) -> Tensor:
        """(T,) ᾱ = α² before each step, of a chain whose states have α² + σ² = 1.

        Raises:
            ValueError: another chain, which has `signal` and `noise`.
        """
        self._preserving("alphas")
        return self.before[0].square()

    @property
    def alphas_next(self) -> Tensor:
        """(T,) ᾱ after each step, likewise."""
        self._preserving("alphas_next")
        return self.after[0].square()

    def _preserving(self, name: str) -> None:
        if bool((self.size != 1).any()):
            raise ValueError(f"{name}: only states with α² + σ² = 1 have an ᾱ; signal and noise are α and σ of any")

    def __repr__(self) -> str:
        """One line: steps, time, signal and noise at both ends, what is special."""
        t, (first, last) = self.timesteps, ((f"{self.signal[k]:.3g}, {self.noise[k]:.3g}") for k in (0, -1))
        rule = None if self.rule == "ddim" else self.rule
        special = {"rule": rule, "eta": self.eta or None, "clip": self.clip, "prediction": self.prediction}
        more = "".join(f", {name}={value}" for name, value in special.items() if value is not None)
        return f"Chain({len(self)} steps, t = {t[0]:g} … {t[-1]:g}, α and σ {first} … {last}{more})"


@dataclass(frozen=True, eq=False)
class Splitting:
    """The linear part of ε that is solved exactly: ε(x, t_k) ≈ κ_k x + b_k.

    kappa: (T, 1) or (T, D) float64. offset b: the same, or None for 0. basis Q (D, D), orthonormal columns: κ and b are
    for y = Qᵀ x; None is x itself. The fixed point is the same for every splitting; the number of rounds is not.
    """

    kappa: Tensor
    offset: Tensor | None = None
    basis: Tensor | None = None
    __repr__ = one_line

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
        """The splitting called "epsilon" (κ = 0, the paper's form), "v" (κ = σ/(α² + σ²), a rotation) or "gaussian".

        "gaussian" is exact for Gaussian data: κ = σ/(α² Λ + σ²), b = −κ α μ, with the data's mean μ and variance Λ per
        pixel, (D,) each; without them μ = 0 and Λ = 0.25, about that of images in [−1, 1].
        """
        alpha, sigma = (part[:, None] for part in chain.before)
        odd = (chain.blind | chain.still)[:, None]  # steps whose c stands before something else than ε
        if name == "epsilon":
            return Splitting(torch.zeros_like(alpha))
        if name == "v":
            return Splitting(torch.where(odd, 0.0, sigma / chain.size[:-1, None].square()))
        if name == "gaussian":
            spread = alpha.new_tensor([0.25]) if variance is None else variance.double().cpu()
            # A pixel that never varies would make A_k vanish at the image: its step could not be read backwards.
            spread = spread.clamp_min(VARIANCE_FLOOR * spread.mean().clamp_min(VARIANCE_FLOOR))
            kappa = torch.where(odd, 0.0, sigma / (alpha.square() * spread + sigma.square()))
            if mean is None:
                return Splitting(kappa)
            mu = mean.double().cpu()  # without signal nothing but the mean is known: e = −x̂_0 = −μ
            return Splitting(kappa, torch.where(chain.blind[:, None], -mu, -kappa * alpha * mu))
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
