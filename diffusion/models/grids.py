"""The states of diffusers' schedulers whose chains are not over a table of ᾱ: what set_timesteps makes of them."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch

from ..checks import one_of
from ..recurrence import Preconditioning
from .levels import Given, Levels, listed, time_steps_of

NO_SIGNAL = 2**-22  # α below this is what float32 leaves of none
SPACED = ("linspace", "leading", "trailing", "quadratic")


@dataclass(frozen=True, eq=False, repr=False)
class SchedulerGrid:
    """The states of a diffusers scheduler's own loop.

    scheduler: a copy of its own. signal: "one", states x_0 + σ ε; "flow", (1 − s) x_0 + s ε; "vp", those of "one" over
    √(1 + σ²). mu: of dynamic shifting. rule: of the chains.
    """

    scheduler: Any
    signal: str
    prediction: str | None
    preconditioning: Preconditioning | None = None
    mu: float | None = None
    rule: str = "ddim"

    def __repr__(self) -> str:
        shift = "" if self.mu is None else f", mu={self.mu}"
        return f"SchedulerGrid({type(self.scheduler).__name__}{shift})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SchedulerGrid):
            return NotImplemented
        same = type(self.scheduler) is type(other.scheduler) and self.mu == other.mu
        return same and str(self.scheduler.config) == str(other.scheduler.config)

    def __hash__(self) -> int:
        return hash((type(self.scheduler), self.mu))

    def levels(self, steps: int, spacing: str | None, timesteps: Given, sigmas: Given) -> Levels:
        """What set_timesteps makes of these arguments."""
        own, arguments = copy.deepcopy(self.scheduler), self._arguments(steps, timesteps, sigmas)
        try:
            if spacing is not None:
                arguments = self._spaced(own, steps, spacing)
            own.set_timesteps(**arguments, **({} if self.mu is None else {"mu": self.mu}))
        except (ValueError, TypeError, AssertionError, IndexError) as error:
            raise ValueError(f"{', '.join(arguments)}: {type(own).__name__} says: {error}") from error
        t, sigma = own.timesteps.cpu(), own.sigmas.cpu().double()
        sigma = sigma[: len(t) + 1]
        signal = torch.ones_like(sigma)
        if self.signal == "flow":
            signal = 1 - sigma.clamp(max=1.0)
            signal = torch.where(signal < NO_SIGNAL, 0.0, signal)
        if self.signal == "vp":
            size = (1 + sigma.square()).sqrt()
            signal, sigma = 1 / size, sigma / size
        return Levels(t, signal, sigma, float(getattr(own, "init_noise_sigma", 1.0)))

    def _arguments(self, steps: int, timesteps: Given, sigmas: Given) -> dict[str, Any]:
        """Of set_timesteps: custom values if given, else the number of steps."""
        taken = inspect.signature(self.scheduler.set_timesteps).parameters
        if sigmas is not None and self.preconditioning and self.preconditioning.output:
            kind = type(self.scheduler).__name__
            raise ValueError(f"sigmas: not reproduced for {kind}, which takes them for places on its own curve")
        for name, given in (("timesteps", timesteps), ("sigmas", sigmas)):
            if given is not None:
                if name not in taken:
                    raise ValueError(f"{name}: not taken by {type(self.scheduler).__name__}")
                return {name: listed(name, given).tolist()}
        return {"num_inference_steps": steps}

    def _spaced(self, own: Any, steps: int, spacing: str) -> dict[str, Any]:
        """The same for a spacing of time steps other than the scheduler's."""
        if "timestep_spacing" not in own.config:
            raise ValueError(f"spacing: {spacing!r} is not one of this scheduler's options")
        one_of("spacing", spacing, SPACED)
        if spacing == "quadratic":
            return {"timesteps": time_steps_of(own.config["num_train_timesteps"], steps, spacing, 0, True).tolist()}
        own.register_to_config(timestep_spacing=spacing)
        return {"num_inference_steps": steps}

    def to_config(self) -> dict[str, Any]:
        raise ValueError(
            f"schedule: that of a {type(self.scheduler).__name__} is recorded by the scheduler's save_pretrained"
        )
