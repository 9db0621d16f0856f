"""The chain that a command line asks for, beside what a file of latents says of its own."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..chain import Chain
from ..models.checkpoint import Checkpoint
from ..models.wrappers import DiffusersModel
from ..schedule import Schedule
from .output import say

LISTS = ("timesteps", "sigmas")
GRID = ("steps", "spacing", *LISTS)
FIELDS = (*GRID, "eta", "rule", "strength", "guidance")
USUAL_SPACING = "quadratic"
LONGEST = 40  # letters of a list in a message


@dataclass(frozen=True)
class Asked:
    """A chain: what `schedule.chain` and `Chain.partial` are given, None what the schedule decides.

    timesteps, sigmas: before each step, instead of steps and spacing. strength: of the partial chain, 1 is all of it.
    """

    steps: int | None = None
    spacing: str | None = None
    timesteps: list[float] | None = None
    sigmas: list[float] | None = None
    eta: float | None = None
    rule: str | None = None
    strength: float | None = None

    @staticmethod
    def of(args: Namespace, checkpoint: Checkpoint, usual: int, found: Mapping[str, Any] | None = None) -> Asked:
        """What the options say, else the latents found, else the usual: `usual` steps, spaced as `spacing_of` says.

        Time steps of one's own replace those of the latents, and the other way round.
        """
        recorded = found or {}
        own = {name: getattr(args, name, None) for name in Asked.__dataclass_fields__}
        given = [name for name in GRID if own[name] is not None]
        kept = GRID if not given else () if set(LISTS) & set(given) else ("steps", "spacing")
        asked = {
            name: own[name] if own[name] is not None else recorded.get(name) for name in ("eta", "rule", "strength")
        }
        asked |= {name: recorded.get(name) if name in kept and own[name] is None else own[name] for name in GRID}
        if asked["timesteps"] is None and asked["sigmas"] is None:
            steps = usual if asked["steps"] is None else asked["steps"]
            asked |= {"steps": steps, "spacing": spacing_of(checkpoint, asked["spacing"])}
        elif not given:  # the latents name the number of their own time steps too
            asked |= {"steps": None, "spacing": None}
        return Asked(**asked)

    def whole(self, checkpoint: Checkpoint) -> Chain:
        """The chain before its strength.

        Raises:
            ValueError: what the model's schedule does not take, by name.
        """
        own: dict[str, Any] = {"timesteps": self.timesteps}
        if self.sigmas is not None:
            if isinstance(checkpoint.schedule, Schedule):
                raise ValueError("--sigmas: of models without a table of time steps, such as flows; --timesteps is "
                                 f"what {checkpoint.name} takes")  # fmt: skip
            own["sigmas"] = self.sigmas
        return checkpoint.schedule.chain(self.steps, self.spacing, self.eta, self.rule, **own)

    def chain(self, checkpoint: Checkpoint) -> Chain:
        """The chain, as above; of a strength below 1 its last steps."""
        whole = self.whole(checkpoint)
        return whole if self.strength is None else whole.partial(self.strength)

    def record(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """What a file says of it, from which `of` makes it again."""
        whole, listed = self.whole(checkpoint), (self.timesteps, self.sigmas) != (None, None)
        spacing = self.spacing or (None if listed else getattr(checkpoint.schedule, "spacing", None))
        return {
            "steps": len(whole), "spacing": spacing, "eta": float(whole.eta), "rule": recorded_rule(whole),
            "timesteps": self.timesteps, "sigmas": self.sigmas, "strength": self.strength,
        }  # fmt: skip


def warn_of_another(args: Namespace, checkpoint: Checkpoint, found: Mapping[str, Any]) -> None:
    """Says which options ask for another chain than that of the latents, of which `found` says what is known."""
    known = {"rule": "ddim", "strength": 1.0, **found} if "steps" in found else dict(found)
    listed = next((name for name in LISTS if name in found), None)
    for name, given in {"model": checkpoint.name, **{name: getattr(args, name) for name in FIELDS}}.items():
        other = name  # what the latents have in its place
        if name in LISTS and name not in found and "steps" in found:
            other = listed or "steps"
        elif name in ("steps", "spacing") and listed is not None:
            other = listed
        theirs = known.get(other)
        if given is not None and theirs is not None and (other, theirs) != (name, given):
            own = _short(given) if other == name else f"{name} {_short(given)}"
            line = f"{other} {_short(theirs)}: with {own} they make other images"
            say(f"deq-ddim: warning: the latents are of {line}")


def _short(value: Any) -> str:
    text = ",".join(f"{x:g}" for x in value) if isinstance(value, list) else str(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def spacing_of(checkpoint: Checkpoint, asked: str | None) -> str | None:
    """Return the spacing asked for, else the usual: "quadratic", and None, the scheduler's, of a model of diffusers.

    Quadratic time steps are denser next to the image, where inversion is hard, and sample no worse.
    """
    return asked or (None if isinstance(checkpoint.model, DiffusersModel) else USUAL_SPACING)


def recorded_rule(chain: Chain) -> str | None:
    """Return the rule of a chain as files have it: None is "ddim"."""
    return None if chain.rule == "ddim" else chain.rule
