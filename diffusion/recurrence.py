"""The steps of a chain as a recurrence that is linear in its last states and in what the network says of them.

Every state s_0 (the latent) … s_T (the image x_0) is x = α x_0 + σ ε, α the signal and σ the noise in it: α² + σ² = 1
where variance is preserved (DDPM, DDIM), α = 1 − s and σ = s on a flow, α = 1 where noise is added only (EDM, Euler's
σ-steps).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from .checks import PREDICTIONS, RULES, VARIANCES, levels, one_of, real, share_of_noise, time_steps
from .models.clip import Clip
from .rules import TWO_STEP, Coefficients

R = TypeVar("R", bound="Recurrence")
K = TypeVar("K")
ROUNDING, TINY = 4 * torch.finfo(torch.float64).eps, torch.finfo(torch.float64).tiny ** 0.5


def kept(function: Callable[[Any], K]) -> cached_property[K]:
    """A property computed once for each chain, as tensors that a gradient may keep, whatever the mode."""
    return cached_property(torch.inference_mode(False)(function))


@dataclass(frozen=True)
class Preconditioning:
    """What a network is given instead of x, and what its answer means (Karras et al. 2022, Eq. 7 and Table 1).

    It is given c_in x, c_in = 1/√(α² d² + σ²). With `output` the image is c_skip x + c_out F, c_skip = d²/(σ² + d²),
    c_out = ± σ d/√(σ² + d²), of its answer F: + where it is said to predict "epsilon", − for "v"; α = 1 then. Without,
    F is what `prediction` says.

    data: d, the standard deviation of the images.
    """

    data: float = 1.0
    output: bool = False


@dataclass(frozen=True)
class Reading:
    """How the network is asked at every step and its answer F read: e = state·x + output·F, F = model(input·x, t).

    All (T,). input None is 1; state and output None: e is F.
    """

    input: Tensor | None
    state: Tensor | None = None
    output: Tensor | None = None

    @property
    def parts(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """input, state and output."""
        return self.input, self.state, self.output

    def asked(self, x: Tensor, k: Tensor) -> Tensor:
        """What the network is given for states x (n, D) of steps k (n,)."""
        return x if self.input is None else self.input[k, None] * x

    def read(self, x: Tensor, k: Tensor, answer: Tensor) -> Tensor:
        """e (n, D) of what it says there."""
        if self.state is None or self.output is None:
            return answer
        return self.state[k, None].to(x) * x + self.output[k, None].to(x) * answer


@dataclass(frozen=True, eq=False)
class Recurrence:
    """T steps s_{k+1} = a_k s_k + c_k e_k + σ_k n_k, noisiest first; tensors are float64 but for the first.

    e_k is ε(s_k, t_k), but for two kinds of step that have no use for it, see `c`; n_k is fresh standard normal noise.

    Attributes:
        timesteps: (T,) the model's t, int64 or float32, never rising.
        signal: (T+1,) α of the states s_0 … s_T, above 0, or 0 at the first: no signal.
        noise: (T+1,) σ of the states, above 0 but for the last; σ/α never rises.
        eta: share of fresh noise, 0 is DDIM and 1 ancestral sampling.
        clip: keeps the image that each step predicts in range.
        variance: of the fresh noise, "small" or "large" (see `sigma`).
        prediction: what the network returns, by the scheduler that the chain is of; None, not known.
        ends: (2, T) α and σ that each step ends at, where the next step takes its state for another; None, the next's.
        preconditioning: of the network; None, it is given x as it is.
        init_noise_sigma: what standard normal noise is multiplied by to be a latent.
        rule: "ddim"; or "dpmsolver++2m" or "belm", s_{k+1} = a_k s_k + c_k e_k + a'_k s_{k−1} + c'_k e_{k−1}
            (`diffusion.rules`), without fresh noise and clipping.
        skipped: steps before the first, of the longer chain that these are the last of.

    Raises:
        TypeError, ValueError: a field of the wrong kind, length or order, by name.
    """

    timesteps: Tensor
    signal: Tensor
    noise: Tensor
    eta: float = 0.0
    clip: Clip | None = None
    variance: str = "small"
    prediction: str | None = None
    ends: Tensor | None = None
    preconditioning: Preconditioning | None = None
    init_noise_sigma: float = 1.0
    rule: str = "ddim"
    skipped: int = 0

    def __post_init__(self) -> None:
        share_of_noise(self.eta)
        one_of("variance", self.variance, VARIANCES)
        if self.clip is not None and not isinstance(self.clip, Clip):
            raise TypeError(f"clip: a Clip or None is required, got {type(self.clip).__name__}")
        t = time_steps("timesteps", self.timesteps)
        signal, noise, ends = levels(self.signal, self.noise, self.ends, len(t))
        fields = {"timesteps": t, "signal": signal, "noise": noise, "ends": ends}
        for name, tensor in fields.items():
            object.__setattr__(self, name, tensor)
        if not real("init_noise_sigma", self.init_noise_sigma) > 0:
            raise ValueError(f"init_noise_sigma: a positive number is required, got {self.init_noise_sigma}")
        if self.variance == "large" and bool((self.size != 1).any()):
            raise ValueError('variance: "large" is that of DDPM, whose states have α² + σ² = 1')
        one_of("rule", self.rule, RULES)
        if self.rule != "ddim":
            self._check_rule()
        if self.prediction is not None:
            self.check_prediction(self.prediction)

    def _check_rule(self) -> None:
        """Raises for what a rule over two steps does not go with."""
        if self.eta != 0 or self.clip is not None:
            raise ValueError(f'rule: {self.rule!r} has neither fresh noise nor clipping; "ddim" has')
        if self.ends is not None:
            raise ValueError(f"rule: {self.rule!r} needs steps that end where the next starts")
        if self.rule == "belm" and self.signal[0] == 0:
            raise ValueError(
                'rule: "belm" steps by σ/α, which has no value where a chain starts without signal (α = 0, as a flow '
                "at s = 1): start a step later, chain.tail(1), or from sigmas below 1"
            )

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
                'prediction: "v", "sample" or "flow" is required by a chain that starts without signal (α = 0, as with '
                "rescale_betas_zero_snr, or a flow at s = 1), where ε says nothing of x_0"
            )
        given = self.preconditioning
        if given is not None and given.output and prediction not in ("epsilon", "v"):
            raise ValueError(f'prediction: "epsilon" or "v" is required by a preconditioned chain, got {prediction!r}')

    @property
    def before(self) -> tuple[Tensor, Tensor]:
        """α and σ (T,) of the state that each step starts from."""
        return self.signal[:-1], self.noise[:-1]

    @property
    def after(self) -> tuple[Tensor, Tensor]:
        """α' and σ' (T,) of the state that each step ends at."""
        return (self.signal[1:], self.noise[1:]) if self.ends is None else (self.ends[0], self.ends[1])

    @kept
    def size(self) -> Tensor:
        """√(α² + σ²) (T+1,) of the states, by which x is divided where a unit variance is wanted."""
        size = (self.signal.square() + self.noise.square()).sqrt()
        return torch.where((size - 1).abs() <= ROUNDING, 1.0, size)

    @kept
    def blind(self) -> Tensor:
        """(T,) bool, true where the state before the step has no signal, α = 0; the first alone can be."""
        return self.before[0] == 0

    @kept
    def still(self) -> Tensor:
        """(T,) bool, true where a step that removes no noise changes the state by what it clips alone."""
        (alpha, sigma), (alpha_next, sigma_next) = self.before, self.after
        held = self.clip is not None and not self.clip.consistent
        return (alpha == alpha_next) & (sigma == sigma_next) & held

    @property
    def _added(self) -> Tensor:
        """σ² − (α/α')² σ'², the noise that a forward step adds."""
        (alpha, sigma), (alpha_next, sigma_next) = self.before, self.after
        kept = alpha / alpha_next * sigma_next
        return ((sigma - kept) * (sigma + kept)).clamp_min(0)

    @property
    def posterior(self) -> Tensor:
        """η² (σ'/σ)² (σ² − (α/α')² σ'²): the variance that a step's mean leaves room for."""
        return self.eta**2 * (self.after[1] / self.before[1].clamp_min(TINY)).square() * self._added

    @property
    def sigma(self) -> Tensor:
        """σ_k, the standard deviation of the fresh noise (Song et al. 2021, Eq. 16).

        "small": σ_k² = η² (σ'/σ)² (σ² − (α/α')² σ'²). "large": σ_k² = η² (1 − ᾱ/ᾱ') with the mean of "small", and none
        from t = 0 (Ho et al. 2020, Sec. 3.2; DDPMScheduler's fixed_large).
        """
        large = self.eta * (self._added * (self.timesteps > 0)).sqrt()
        return self.posterior.sqrt() if self.variance == "small" else large

    @property
    def a(self) -> Tensor:
        """a_k (T,); of "ddim" α'/α, where α = 0 √(σ'² − σ_k²)/σ, the state being σ ε."""
        return self.coefficients[0].clone()

    @property
    def c(self) -> Tensor:
        """c_k (T,); of "ddim" √(σ'² − σ_k²) − a σ, σ_k² that of "small", before ε.

        It is −α' before −x̂_0 where α = 0, and before what clipping takes off x̂_0 where a step does nothing else.
        """
        return self.coefficients[1].clone()

    @property
    def past(self) -> tuple[Tensor, Tensor] | None:
        """a'_k and c'_k (T,), of the state and the answer before; None of "ddim"."""
        return None if self.rule == "ddim" else (self.coefficients[2].clone(), self.coefficients[3].clone())

    @kept
    def coefficients(self) -> Coefficients:
        """a, c, a', c'."""
        (alpha, sigma), direction = self.before, self._direction
        a = torch.where(self.blind, direction / sigma, self.after[0] / alpha)
        before_noise = direction - self.after[0] / alpha * sigma
        c = torch.where(self.blind | self.still, -self.after[0], before_noise)
        if self.rule == "ddim":
            return a, c, torch.zeros_like(a), torch.zeros_like(c)
        return TWO_STEP[self.rule](self.before, self.after, (a, c), self.skipped)

    @property
    def _direction(self) -> Tensor:
        """√(σ'² − σ_k²), what is left of the noise."""
        return (self.after[1].square() - self.posterior).clamp_min(0).sqrt()

    def reading(self, prediction: str) -> Reading:
        """How a network of this prediction is asked and read at every step.

        With x̂_0 the image that it predicts, e is ε = (x − α x̂_0)/σ, and −x̂_0 where α = 0. "v" is α ε − σ x_0 of a state
        of unit variance (Salimans & Ho 2022), "flow" ε − x_0.
        """
        (alpha, sigma), given = self.before, self.preconditioning
        scale = None if given is None else 1 / ((alpha * given.data).square() + sigma.square()).sqrt()
        if given is not None and given.output:
            assert scale is not None
            out = given.data * scale * (1 if prediction == "epsilon" else -1)  # c_out/σ
            return Reading(scale, sigma * scale.square(), -out)
        if prediction == "epsilon":
            return Reading(scale)
        size, zero, one = self.size[:-1], torch.zeros_like(alpha), torch.ones_like(alpha)
        if prediction == "v":
            parts, blind = (sigma / size.square(), alpha / size), (zero, one)
        elif prediction == "sample":
            parts, blind = (1 / sigma, -alpha / sigma), (zero, -one)
        else:
            parts, blind = (1 / (alpha + sigma), alpha / (alpha + sigma)), (-1 / sigma, one)
        state, output = (torch.where(self.blind, special, part) for part, special in zip(parts, blind, strict=True))
        return Reading(scale, state, output)

    def held(self, x: Tensor, e: Tensor, k: Tensor) -> Tensor:
        """What e (n, D) of the states x (n, D) of steps k (n,) becomes, so that a x + c e is the step that clips x̂_0.

        α' clip(x̂_0) + √(σ'² − σ_k²) ε = a x + c (ε + α' (clip(x̂_0) − x̂_0)/c), x̂_0 = (x − σ ε)/α; a consistent clip
        takes ε = (x − α clip(x̂_0))/σ.
        """
        if self.clip is None:
            return e
        parts = (*self.before, self.after[0], self.c, self.blind, self.still)
        alpha, sigma, after, c, blind, still = (part[k][:, None] for part in parts)
        predicted = torch.where(blind, -e, (x - sigma * e) / torch.where(blind, 1.0, alpha))
        clipped = self.clip(predicted)
        if self.clip.consistent:
            own = (x - alpha * clipped) / sigma.clamp_min(TINY)
        else:
            own = torch.where(still, predicted - clipped, e + after / c * (clipped - predicted))
        return torch.where(blind, -clipped, own)

    def at(self: R, positions: Tensor, device: torch.device | None = None) -> R:
        """The steps at these positions, in their order, each as it is here; `device` moves them."""
        ends = torch.stack(self.after)[:, positions]
        signal, noise = (torch.cat([part[positions], end[-1:]]) for part, end in zip(self.before, ends, strict=True))
        parts = {"timesteps": self.timesteps[positions], "signal": signal, "noise": noise, "ends": ends}
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        chain = object.__new__(type(self))  # without what is kept of this one
        chain.__dict__.update(own | {name: part.to(device) for name, part in parts.items()})
        return chain
