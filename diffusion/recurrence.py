"""The steps of a chain as a recurrence that is linear in the states and in what the network says of them."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from .checks import PREDICTIONS, VARIANCES, one_of, share_of_noise, signal, time_steps
from .clip import Clip

R = TypeVar("R", bound="Recurrence")


@dataclass(frozen=True, eq=False)
class Recurrence:
    """T steps x_{k+1} = a_k x_k + c_k e_k + σ_k n_k, noisiest first; tensors are (T,), float64 but for the first.

    e_k is ε(x_k, t_k), but for two kinds of step that have no use for it, see `c`; n_k is fresh standard normal noise.

    timesteps: the model's t, int64, decreasing. alphas: ᾱ before each step, in (0, 1], or 0 at the first: no signal.
    alphas_next: ᾱ after it. eta: share of fresh noise, 0 is DDIM and 1 DDPM's ancestral sampling. clip: keeps the image
    that each step predicts in range. variance: of the fresh noise, "small" or "large" (see `sigma`). prediction: what
    the network returns, by the scheduler that the chain is of; None, not known.

    Raises:
        TypeError, ValueError: a field of the wrong kind, length or order, by name.
    """

    timesteps: Tensor
    alphas: Tensor
    alphas_next: Tensor
    eta: float = 0.0
    clip: Clip | None = None
    variance: str = "small"
    prediction: str | None = None

    def __post_init__(self) -> None:
        share_of_noise(self.eta)
        one_of("variance", self.variance, VARIANCES)
        if self.clip is not None and not isinstance(self.clip, Clip):
            raise TypeError(f"clip: a Clip or None is required, got {type(self.clip).__name__}")
        t = time_steps("timesteps", self.timesteps)
        alphas = signal("alphas", self.alphas, len(t))
        after = signal("alphas_next", self.alphas_next, len(t), alphas)
        for name, tensor in (("timesteps", t), ("alphas", alphas), ("alphas_next", after)):
            object.__setattr__(self, name, tensor)
        if self.prediction is not None:
            self.check_prediction(self.prediction)

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def steps(self) -> int:
        """T, the number of steps."""
        return len(self)

    def check_prediction(self, prediction: str) -> None:
        """Raises for a prediction that is not the scheduler's, or from which the chain's first state says nothing."""
        one_of("prediction", prediction, PREDICTIONS)
        if self.prediction not in (None, prediction):
            raise ValueError(f"prediction: {self.prediction!r}, the scheduler's, is required, got {prediction!r}")
        if prediction == "epsilon" and bool(self.blind[0]):
            raise ValueError(
                'prediction: "v" or "sample" is required by a chain that starts at ᾱ = 0 (rescale_betas_zero_snr), '
                "where ε says nothing of x_0"
            )

    @property
    def blind(self) -> Tensor:
        """(T,) bool, true where the state before the step has no signal, ᾱ = 0; the first alone can be."""
        return self.alphas == 0

    @property
    def still(self) -> Tensor:
        """(T,) bool, true where a step that removes no noise, ᾱ' = ᾱ, changes the state by what it clips alone."""
        held = self.clip is not None and not self.clip.consistent
        return (self.alphas_next == self.alphas) & held

    @property
    def posterior(self) -> Tensor:
        """η² (1−ᾱ')/(1−ᾱ) (1 − ᾱ/ᾱ'), ᾱ' = alphas_next: the variance that a step's mean leaves room for."""
        left = (1 - self.alphas_next) / (1 - self.alphas).clamp_min(torch.finfo(torch.float64).tiny)
        return self.eta**2 * (left * (1 - self.alphas / self.alphas_next)).clamp_min(0)

    @property
    def sigma(self) -> Tensor:
        """σ_k, the standard deviation of the fresh noise (Song et al. 2021, Eq. 16).

        "small": σ² = η² (1−ᾱ')/(1−ᾱ) (1 − ᾱ/ᾱ'). "large": σ² = η² (1 − ᾱ/ᾱ') with the mean of "small", and none from
        t = 0 (Ho et al. 2020, Sec. 3.2; DDPMScheduler's fixed_large).
        """
        if self.variance == "small":
            return self.posterior.sqrt()
        return self.eta * ((1 - self.alphas / self.alphas_next).clamp_min(0) * (self.timesteps > 0)).sqrt()

    @property
    def a(self) -> Tensor:
        """a_k = √(ᾱ'/ᾱ); where ᾱ = 0, √(1 − ᾱ' − σ²), the state being ε itself."""
        return torch.where(self.blind, self._direction, (self.alphas_next / self.alphas).sqrt())

    @property
    def c(self) -> Tensor:
        """c_k = √(1 − ᾱ' − σ²) − a √(1 − ᾱ), σ² that of "small", before ε.

        It is −√ᾱ' before v = −x̂_0 where ᾱ = 0, and before what clipping takes off x̂_0 where a step does nothing else.
        """
        before_noise = self._direction - (self.alphas_next / self.alphas).sqrt() * (1 - self.alphas).sqrt()
        return torch.where(self.blind | self.still, -self.alphas_next.sqrt(), before_noise)

    @property
    def _direction(self) -> Tensor:
        """√(1 − ᾱ' − σ²), what is left of the noise."""
        return (1 - self.alphas_next - self.posterior).clamp_min(0).sqrt()

    def held(self, x: Tensor, e: Tensor, k: Tensor) -> Tensor:
        """What e (n, D) of the states x (n, D) of steps k (n,) becomes, so that a x + c e is the step that clips x̂_0.

        √ᾱ' clip(x̂_0) + √(1 − ᾱ' − σ²) ε = a x + c (ε + √ᾱ' (clip(x̂_0) − x̂_0)/c), x̂_0 = (x − √(1−ᾱ) ε)/√ᾱ; a
        consistent clip takes ε = (x − √ᾱ clip(x̂_0))/√(1−ᾱ).
        """
        if self.clip is None:
            return e
        alpha, after, c = (part[k][:, None] for part in (self.alphas, self.alphas_next, self.c))
        blind, still = self.blind[k][:, None], self.still[k][:, None]
        predicted = torch.where(blind, -e, (x - (1 - alpha).sqrt() * e) / torch.where(blind, 1.0, alpha).sqrt())
        clipped = self.clip(predicted)
        if self.clip.consistent:
            own = (x - alpha.sqrt() * clipped) / (1 - alpha).sqrt().clamp_min(torch.finfo(torch.float64).tiny ** 0.5)
        else:
            own = torch.where(still, predicted - clipped, e + after.sqrt() / c * (clipped - predicted))
        return torch.where(blind, -clipped, own)

    def at(self: R, positions: Tensor, device: torch.device | None = None) -> R:
        """The steps at these positions, in their order, each as it is here; `device` moves them."""
        chain = copy(self)
        for name in ("timesteps", "alphas", "alphas_next"):
            object.__setattr__(chain, name, getattr(self, name)[positions].to(device))
        return chain
