"""What a solve returns: one status, residual and count per sample."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from .loop.kept import History


class Status(IntEnum):
    """How one sample ended. `Status(k).message` says the likely cause and what to change."""

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
    Status.MAX_STEPS: "the budget ran out before the tolerance was met: raise Stop.max_steps, the solver's memory, "
    "or loosen Stop.rtol",
    Status.STALLED: "the residual no longer changes: the tolerance is below what this dtype can resolve, or fn has no "
    "fixed point nearby: loosen Stop.rtol/atol, use a wider dtype, or lower the damping",
    Status.DIVERGED: "the residual grew without bound: fn expands here; lower the damping, use Anderson instead of "
    "Picard, or start nearer",
    Status.NONFINITE: "fn returned NaN or infinity: check fn and its inputs for this sample",
}


class ConvergenceError(RuntimeError):
    """Raised by `Solution.check` (and by `Implicit(on_failure="raise")`) when samples did not converge."""


def describe_failures(status: Tensor) -> str:
    """Counts of samples per status other than CONVERGED, with their messages; empty when all converged."""
    counts = [(s, int((status == int(s)).sum())) for s in Status if s is not Status.CONVERGED]
    return "; ".join(f"{n} of {status.numel()} {s.name} ({s.message})" for s, n in counts if n)


@dataclass(eq=False)
class Adjoint:
    """How the linear adjoint solve u = g + Jᵀu of the last backward pass went, per sample.

    residual is ‖g + Jᵀu − u‖ / ‖g‖ of the u that was used; evaluations counts vector-Jacobian products.
    """

    status: Tensor  # (B,) int64 of Status
    residual: Tensor  # (B,) float64
    evaluations: Tensor  # (B,) int64


@dataclass(eq=False, repr=False)
class Solution:
    """The result of `solve`, per sample.

    z has the structure of z0 and is, for each sample, the iterate of least residual among those measured; `residual`
    is ‖f(z) − z‖ of exactly that z, in the norm of `Stop`. `evaluations` counts the calls of fn in which the sample
    took part. `rejections` counts steps refused because they made the residual blow up, `rank_losses` steps whose
    least-squares system was rank deficient.
    """

    z: Any  # structure of z0, leading dimension B
    residual: Tensor  # (B,) float64
    evaluations: Tensor  # (B,) int64
    status: Tensor  # (B,) int64 of Status
    steps: int  # calls of fn
    rejections: Tensor  # (B,) int64
    rank_losses: Tensor  # (B,) int64
    trace: Tensor | None = None  # (steps, B) residuals, NaN where a sample had finished
    adjoint: Adjoint | None = None  # set by a backward pass through z
    snapshots: list[Any] = field(default_factory=list)  # z, in the structure of z0, at the steps asked for
    history: History | None = None  # when asked for: what a later solve may go on from

    @property
    def converged(self) -> Tensor:
        """(B,) bool: the sample met its tolerance."""
        return self.status == int(Status.CONVERGED)

    def __repr__(self) -> str:
        """One line: samples per status, evaluations, largest residual. Waits for the device."""
        counts = {s.name: int((self.status == int(s)).sum()) for s in Status}
        ended = ", ".join(f"{n} {name}" for name, n in counts.items() if n) or "no samples"
        if not self.status.numel():
            return f"Solution({ended})"
        least, most = int(self.evaluations.min()), int(self.evaluations.max())
        return f"Solution({ended}; {least} to {most} evaluations; residual at most {float(self.residual.max()):.1e})"

    def check(self) -> Solution:
        """Returns self, or raises ConvergenceError that counts the samples of each status and says what to change."""
        failures = describe_failures(self.status)
        if failures:
            raise ConvergenceError(f"solve did not converge: {failures}")
        return self
