"""How a sample ended, and how that is told: the likely cause, and what to change.

One status may have several causes. Which is likely is read from numbers of the sample: its residual, ‖f‖, and how both
went over the last half of the evaluations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor


class Status(IntEnum):
    """How one sample ended. `Status(k).message` says what may be the cause; `Solution.check` says which it was."""

    CONVERGED = 0
    MAX_STEPS = 1
    STALLED = 2
    DIVERGED = 3
    NONFINITE = 4

    @property
    def message(self) -> str:
        return _MESSAGES[self]


_MESSAGES = {
    Status.CONVERGED: "the residual is within the tolerance",
    Status.MAX_STEPS: "the budget ran out before the tolerance was met: while the residual falls, raise Stop.max_steps "
    "or the solver's memory, or loosen Stop.rtol; where it has ceased to fall, lower the damping, or look for noise in "
    "fn; where the fixed point is zero, set Stop.atol",
    Status.STALLED: "the residual no longer changes: it is rounding (loosen Stop.rtol or Stop.atol, or use a wider "
    "dtype), or the iterates go round in a cycle or drift (lower the damping, or use Anderson instead of Picard)",
    Status.DIVERGED: "the residual grew a millionfold or more: fn expands here: lower the damping, use Anderson "
    "instead of Picard, or start nearer",
    Status.NONFINITE: "fn returned NaN or infinity, or values whose squares overflow, at a plain step: check fn and "
    "its inputs for this sample, start nearer, or lower the damping",
}

FALLING = 0.5  # a residual that falls by less over half of the evaluations has ceased to
TOGETHER = 30.0  # growth of ‖f‖ over the residual with which they still fall together
HOPELESS = 1e6  # evaluations that nobody is advised to wait for


@dataclass(frozen=True, eq=False)
class Course:
    """How each of B samples of a solve went, read from the table (B, len(columns)) float64 that it leaves behind.

    Columns as in `step.records.Records`; each is (B,).
    """

    table: Tensor
    columns: tuple[str, ...]
    dtype: torch.dtype
    stopped: bool = False  # by the callback

    def __getitem__(self, name: str) -> Tensor:
        return self.table[:, self.columns.index(name)]

    @property
    def goal(self) -> Tensor:
        """(B,) residual that was asked for."""
        return self["atol"] + self["rtol"] * self["size"]

    @property
    def falling(self) -> Tensor:
        """(B,) bool: the residual fell until the end."""
        return (self["best"] <= FALLING * self["earlier"]) | (self["residual"] <= self["best"])

    @property
    def to_zero(self) -> Tensor:
        """(B,) bool: ‖f‖ fell with the residual, so that a relative tolerance comes no nearer."""
        fell = self["best"] <= FALLING * self["earlier"]
        together = self["size"] * self["earlier"] <= TOGETHER * self["best"] * self["earlier_size"]
        return fell & (self["size"] <= FALLING * self["earlier_size"]) & together & (self["atol"] == 0)


def describe(status: Tensor, course: Course | None) -> str:
    """Counts of samples (B,) per status other than CONVERGED, with what to change; empty when all converged.

    Waits for the device.
    """
    parts: list[str] = []
    for s in Status:
        at = status == int(s)
        if s is Status.CONVERGED or not bool(at.any()):
            continue
        causes = [_else(s, at)] if course is None else _causes(s, at, course)
        for where, text in causes:
            n = int(where.sum())
            if n:
                parts.append(f"{n} of {status.numel()} {s.name} ({text(where)})")
    return "; ".join(parts)


Cause = tuple[Tensor, Callable[[Tensor], str]]


def _causes(status: Status, at: Tensor, c: Course) -> list[Cause]:
    """The samples `at` (B,) bool, which ended with `status`, by cause, each with the function that says it."""
    known = at & c["best"].isfinite() & (c["size"] > 0)
    if status is Status.MAX_STEPS and c.stopped:
        return [(at, lambda at: "the callback ended the solve before the tolerance was met")]
    if status is Status.MAX_STEPS:
        zero = known & c.to_zero
        falls = known & ~zero & c.falling
        return [(zero, _zero(c)), (falls, _slow(c)), (known & ~zero & ~falls, _plateau(c)), _else(status, at & ~known)]
    if status is Status.STALLED:
        rounding = known & (c["best"] <= c["floor"] * c["size"])
        return [(rounding, _rounding(c)), (known & ~rounding, _cycle(c)), _else(status, at & ~known)]
    if status is Status.NONFINITE:
        first = at & (c["evaluations"] <= 1)
        return [(first, lambda at: "fn returned NaN or infinity at z0: check z0, fn and its inputs for this sample"),
                _else(status, at & ~first)]  # fmt: skip
    return [_else(status, at)]


def _else(status: Status, at: Tensor) -> Cause:
    return at, lambda at: status.message


def _share(c: Course, at: Tensor) -> str:
    """The largest residual of the samples `at`, as a number and as a share of ‖f‖."""
    best, size = c["best"][at], c["size"][at]
    return f"{float(best.max()):.1e}, {float((best / size).max()):.1e} of ‖f‖"


def _zero(c: Course) -> Callable[[Tensor], str]:
    def text(at: Tensor) -> str:
        size = float(c["size"][at].max())
        return (
            f"‖f‖ falls with the residual, to {size:.1e}: the fixed point seems to be zero, where a relative tolerance "
            "cannot be met: set Stop.atol to the error that you can bear"
        )

    return text


def _slow(c: Course) -> Callable[[Tensor], str]:
    def text(at: Tensor) -> str:
        n, best, goal = c["evaluations"][at], c["best"][at], c.goal[at]
        passed = n - 2.0 ** (n.log2().floor() - 1)  # evaluations since `earlier`
        rate = (c["earlier"][at] / best).log() / passed.clamp_min(1)
        more = float((n + (best / goal).log() / rate).max())
        told = float(n.max()) < more < HOPELESS
        to = f" (to some {_round(more)} at the rate of the last steps)" if told else ""
        return (
            f"the residual fell until the budget ran out: raise Stop.max_steps{to} or the solver's memory, or loosen "
            "Stop.rtol"
        )

    return text


def _round(x: float) -> int:
    """x rounded up to two digits."""
    unit = 10 ** max(0, math.floor(math.log10(x)) - 1)
    return math.ceil(x / unit) * unit


def _plateau(c: Course) -> Callable[[Tensor], str]:
    return lambda at: (
        f"the residual ceased to fall at {_share(c, at)}, so more steps will hardly help: fn is noisy (dropout, "
        "sampling, reduced precision): make it deterministic, or ask for no more than its noise; or fn expands or "
        "oscillates here: lower the damping, use Anderson instead of Picard, or more memory; or it has no fixed point "
        "nearby (a parameter beyond a fold): start nearer"
    )


def _rounding(c: Course) -> Callable[[Tensor], str]:
    name = str(c.dtype).removeprefix("torch.")

    def text(at: Tensor) -> str:
        coarse = bool((c["floor"][at] > 8 * torch.finfo(c.dtype).eps).any())
        what = "the autocast dtype that fn computes in" if coarse else name
        wider = "compute fn in a wider one" if coarse else "use a wider dtype"
        return f"the residual, {_share(c, at)}, is the rounding of {what}: loosen Stop.rtol or Stop.atol, or {wider}"

    return text


def _cycle(c: Course) -> Callable[[Tensor], str]:
    return lambda at: (
        f"the residual no longer changes at {_share(c, at)}, which is not rounding: the iterates go round in a cycle "
        "or drift: lower the damping, or use Anderson instead of Picard; or fn has no fixed point nearby"
    )


def describe_adjoint(status: Tensor, solver: Any) -> str:
    """`describe` for the adjoint u = g + Jᵀu, as `solver` of `Implicit` solved it: what helps there."""
    name = type(solver).__name__
    krylov, terms = hasattr(solver, "restart"), hasattr(solver, "terms")
    longer = "the restart of GMRES, Implicit(solver=GMRES(restart=…))"
    told = {
        Status.MAX_STEPS: f"the budget ran out: raise Implicit(stop=Stop(max_steps=…)) or {longer}, which its "
        "convergence depends on, or loosen the rtol"
        if krylov
        else "the terms do not suffice: raise Implicit(solver=Neumann(terms=…), stop=Stop(max_steps=…)) where J "
        "contracts; use GMRES where it expands (spectral radius above 1), for more terms are then worse"
        if terms
        else f"the budget ran out: raise Implicit(stop=Stop(max_steps=…)), or use GMRES instead of {name}",
        Status.STALLED: "the residual no longer falls: I − J is singular at z*, or nearly so, and the gradient then "
        "not defined; or the tolerance is below what the precision that fn computes in resolves: loosen "
        "Implicit(stop=…), use a wider dtype" + (f"; or raise {longer}" if krylov else "; or use GMRES"),
        Status.DIVERGED: f"J expands here (spectral radius above 1): use GMRES instead of {name}",
        Status.NONFINITE: "the gradient that came in, a slope of fn, or the adjoint itself is NaN, infinite or beyond "
        "its dtype: so is the gradient that goes out",
    }
    counts = [(s, int((status == int(s)).sum())) for s in told]
    return "; ".join(f"{n} of {status.numel()} {s.name} ({told[s]})" for s, n in counts if n)
