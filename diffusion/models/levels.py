"""Where the states of a chain lie: time steps of a table of ᾱ, and signal and noise of schedules that have none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from ..checks import PREDICTIONS, SPACINGS, count, one_of, real
from ..recurrence import Preconditioning

STEPS = 50  # of a chain for which no number is asked
MOST_STEPS = 2**20  # whose tables alone take seconds

Given = Sequence[float] | Tensor | None


@dataclass(frozen=True, eq=False)
class Levels:
    """timesteps (T,), the model's t; signal and noise (T+1,) of the states; init_noise_sigma, see `Recurrence`."""

    timesteps: Tensor
    signal: Tensor
    noise: Tensor
    init_noise_sigma: float = 1.0


class Grid(Protocol):
    """What a `ContinuousSchedule` has its states from."""

    @property
    def prediction(self) -> str | None: ...

    @property
    def preconditioning(self) -> Preconditioning | None: ...

    def levels(self, steps: int, spacing: str | None, timesteps: Given, sigmas: Given) -> Levels: ...

    def to_config(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Flow:
    """Rectified flow, x = (1 − s) x_0 + s ε (Liu et al. 2023; Lipman et al. 2023), at t = 1000 s.

    s = shift·u/(1 + (shift − 1)·u), u evenly from 1 to 0 (Esser et al. 2024, Eq. 23).
    """

    shift: float = 1.0
    prediction: str | None = "flow"
    preconditioning: ClassVar[None] = None

    def __post_init__(self) -> None:
        if real("shift", self.shift) <= 0:
            raise ValueError(f"shift: a positive number is required, got {self.shift}")
        if self.prediction is not None:
            one_of("prediction", self.prediction, PREDICTIONS)

    def levels(self, steps: int, spacing: str | None, timesteps: Given, sigmas: Given) -> Levels:
        """spacing: of u, "linspace" or "quadratic", u². sigmas: u before each step, shifted as the others are."""
        refuse("timesteps", timesteps, "sigmas, s before each step, are what a flow takes")
        one_of("spacing", spacing or "linspace", ("linspace", "quadratic"))
        if sigmas is None:
            u = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
            u = u.square() if spacing == "quadratic" else u
        else:
            u = falling("sigmas", sigmas, most=1.0)
        s = self.shift * u / (1 + (self.shift - 1) * u)
        return Levels(1000 * s[:-1], 1 - s, s)

    def to_config(self) -> dict[str, Any]:
        return {"name": "flow", **asdict(self)}


@dataclass(frozen=True)
class EDM:
    """x = x_0 + σ ε, σ = (σ_max^{1/ρ} + u (σ_min^{1/ρ} − σ_max^{1/ρ}))^ρ, u evenly from 0 to 1, then σ = 0.

    Karras et al. 2022, Eq. 5; the network is preconditioned (Table 1) and has t = log(σ)/4.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    sigma_data: float = 0.5
    prediction: str | None = "epsilon"

    def __post_init__(self) -> None:
        for name in ("sigma_min", "rho", "sigma_data"):
            if real(name, getattr(self, name)) <= 0:
                raise ValueError(f"{name}: a positive number is required, got {getattr(self, name)}")
        if real("sigma_max", self.sigma_max) <= self.sigma_min:
            raise ValueError(f"sigma_max: above sigma_min = {self.sigma_min} is required, got {self.sigma_max}")
        one_of("prediction", self.prediction, ("epsilon", "v"))

    @property
    def preconditioning(self) -> Preconditioning:
        return Preconditioning(self.sigma_data, output=True)

    def levels(self, steps: int, spacing: str | None, timesteps: Given, sigmas: Given) -> Levels:
        """sigmas: σ before each step."""
        refuse("timesteps", timesteps, "sigmas, σ before each step, are what this schedule takes")
        refuse("spacing", spacing, "rho spaces the steps of this schedule")
        if sigmas is None:
            u, r = torch.linspace(0, 1, steps, dtype=torch.float64), 1 / self.rho
            sigma = (self.sigma_max**r + u * (self.sigma_min**r - self.sigma_max**r)) ** self.rho
            sigma = torch.cat([sigma, sigma.new_zeros(1)])
        else:
            sigma = falling("sigmas", sigmas)
        return Levels(sigma[:-1].log() / 4, torch.ones_like(sigma), sigma, (self.sigma_max**2 + 1) ** 0.5)

    def to_config(self) -> dict[str, Any]:
        return {"name": "edm", **asdict(self)}


GRIDS: dict[str, type[Flow] | type[EDM]] = {"flow": Flow, "edm": EDM}


def refuse(name: str, value: Any, reason: str) -> None:
    """Raises where an argument is given that a schedule has no use for."""
    if value is not None:
        raise ValueError(f"{name}: {reason}")


def listed(name: str, values: Any) -> Tensor:
    """The numbers (T,) of a list, an array or a tensor, on the CPU; floats of a list in float64.

    Raises:
        TypeError: something else, by name.
        ValueError: other things than numbers in it, nothing, or lists.
    """
    if not isinstance(values, (Sequence, Tensor, np.ndarray)) or isinstance(values, (str, bytes)):
        raise TypeError(f"{name}: a list of numbers is required, got {type(values).__name__}")
    try:
        given = values if isinstance(values, Tensor) else np.asarray(values)
        numbers = isinstance(given, Tensor) or given.dtype.kind in "iuf"
    except (TypeError, ValueError, RuntimeError):  # of lists of several lengths, and tensors in a list
        numbers = False
    found = torch.as_tensor(given) if numbers else torch.empty(0)
    if found.dim() != 1 or not len(found) or found.is_complex() or found.dtype == torch.bool or found.is_meta:
        raise ValueError(f"{name}: a list of numbers is required, got {values!r:.80}")
    return found.detach().cpu()


def steps_of(steps: int | None, spacing: str | None, **given: Given) -> int:
    """The number of steps asked for, 50 where none is; beside own steps, which it counts, no spacing and no other.

    Raises:
        ValueError: own steps given beside a spacing, or beside another number of steps.
    """
    if steps is not None:
        steps = count("steps", steps, least=1, most=MOST_STEPS)
    for name, values in given.items():
        if values is None:
            continue
        refuse("spacing", spacing, f"not taken beside {name}, which are the steps themselves, got {spacing!r}")
        if steps is None:
            continue
        numbers = listed(name, values)
        ends = name == "sigmas" and len(numbers) > 1 and bool(numbers[-1] == 0)  # the 0 after the last step
        own = len(numbers) - ends
        if own != steps:
            raise ValueError(f"steps: {own}, as many as {name}, or None is required beside them, got {steps}")
    return STEPS if steps is None else steps


def falling(name: str, values: Given, most: float | None = None) -> Tensor:
    """(T+1,) float64: the T positive numbers given, each below the last, and a 0, which may be given too."""
    given = listed(name, values).double()
    given = given[:-1] if len(given) > 1 and given[-1] == 0 else given
    if not bool(given.isfinite().all() and (given > 0).all() and (given.diff() < 0).all()):
        raise ValueError(f"{name}: positive numbers that fall are required, got {given.tolist()!r:.80}")
    if most is not None and given[0] > most:
        raise ValueError(f"{name}: at most {most:g} is required, got {given[0]:g}")
    return torch.cat([given, given.new_zeros(1)])


def time_steps_of(N: int, T: int, spacing: str, offset: int, like_diffusers: bool) -> Tensor:
    """(T,) int64, strictly decreasing. like_diffusers: one step of "linspace" starts at 0, not at N − 1."""
    one_of("spacing", spacing, SPACINGS)
    if spacing == "linspace":
        t = np.linspace(0, N - 1, T).round() if T > 1 or like_diffusers else np.array([N - 1.0])
    elif spacing == "leading":
        t = np.arange(T) * (N // T) + offset
    elif spacing == "trailing":
        t = np.round(np.arange(N, 0, -N / T))[:T][::-1] - 1
    else:
        t = np.round((N - 1) * (np.linspace(0, 1, T) if T > 1 else np.ones(1)) ** 2)
        steps = np.arange(T)
        t = np.maximum.accumulate(t - steps) + steps  # equal neighbours move up until all differ
        t = np.minimum(t, N - T + steps)
    t = t.astype(np.int64)[::-1].copy()
    if t[0] >= N or t[-1] < 0:
        raise ValueError(f"steps_offset: {offset} pushes time step {t[0]} out of 0 … {N - 1}")
    return torch.from_numpy(t)


def time_steps_given(N: int, timesteps: Given) -> Tensor:
    """(T,) int64 as given: integers of 0 … N − 1 that fall."""
    t = listed("timesteps", timesteps)
    if t.is_floating_point():
        raise ValueError(f"timesteps: a list of integers is required, got {timesteps!r:.80}")
    t = t.long()
    if int(t[0]) >= N or int(t[-1]) < 0 or bool((t.diff() >= 0).any()):
        raise ValueError(f"timesteps: integers that fall, of {N - 1} … 0, are required, got {t.tolist()!r:.80}")
    return t
