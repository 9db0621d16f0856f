"""Schedules without a table of ᾱ: flows, EDM, and diffusers' schedulers of such chains."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from ..chain import Chain
from ..checks import RULES, one_of
from .levels import GRIDS, Given, Grid, steps_of


@dataclass(frozen=True)
class ContinuousSchedule:
    """Signal and noise as functions of a continuous time; made by `Schedule.flow`, `.edm` and `.from_diffusers`.

    Attributes:
        grid: where the states lie (`diffusion.models.levels`).
        rule: of the chains, where none is asked for.
    """

    grid: Grid
    rule: str = "ddim"
    eta: ClassVar[float] = 0.0
    clip: ClassVar[None] = None

    def __post_init__(self) -> None:
        one_of("rule", self.rule, RULES)

    @property
    def prediction(self) -> str | None:
        """What the network returns."""
        return self.grid.prediction

    def chain(
        self, steps: int | None = None, spacing: str | None = None, eta: float | None = None, rule: str | None = None,
        *, timesteps: Given = None, sigmas: Given = None,
    ) -> Chain:  # fmt: skip
        """The chain of `steps` steps.

        Args:
            steps: T; None is 50.
            spacing: as the schedule has it (`diffusion.models.levels`); None is its own.
            eta: the share of fresh noise; None is 0.
            rule: "ddim", "dpmsolver++2m" or "belm"; None is the schedule's own.
            timesteps, sigmas: the model's t, or the noise, before each step, instead of `steps` and `spacing`; what a
                scheduler of diffusers takes is what its set_timesteps takes.

        Raises:
            TypeError, ValueError: an argument of the wrong kind, or that the schedule does not take, by name.
        """
        if timesteps is not None and sigmas is not None:
            raise ValueError("timesteps, sigmas: only one is taken")
        rule = self.rule if rule is None else rule
        one_of("rule", rule, RULES)
        steps = steps_of(steps, spacing, timesteps=timesteps, sigmas=sigmas)
        found = self.grid.levels(steps, spacing, timesteps, sigmas)
        return Chain(
            found.timesteps, found.signal, found.noise, eta=0.0 if eta is None else eta, prediction=self.prediction,
            preconditioning=self.grid.preconditioning, init_noise_sigma=found.init_noise_sigma, rule=rule,
        )  # fmt: skip

    def to_config(self) -> dict[str, Any]:
        """A JSON-ready record that `Schedule.from_config` turns into an equal schedule."""
        return self.grid.to_config()

    @staticmethod
    def of_config(config: dict[str, Any]) -> ContinuousSchedule:
        """The flow or EDM schedule of a record.

        Raises:
            TypeError, ValueError: keys that it does not have, or values out of range.
        """
        kind = GRIDS[config["name"]]
        names, arguments = {f.name for f in fields(kind)}, {key: v for key, v in config.items() if key != "name"}
        if set(arguments) != names:
            raise ValueError(f"config: {config['name']} takes {sorted(names)}, got {sorted(arguments)}")
        return ContinuousSchedule(kind(**arguments))
