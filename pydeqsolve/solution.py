"""What a solve returns: one status, residual and count per sample."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .memory import is_stacked
from .status import Course, Status, describe

if TYPE_CHECKING:
    from .loop.kept import History

__all__ = ["Adjoint", "ConvergenceError", "Solution", "Status"]


def in_short(status: Tensor, counts: Tensor, counted: str, residual: Tensor) -> str:
    """Samples per status, counts from least to most, largest residual. Waits for the device."""
    ended = ", ".join(f"{n} {s.name}" for s in Status if (n := int((status == int(s)).sum()))) or "no samples"
    if not status.numel():
        return ended
    least, most = int(counts.min()), int(counts.max())
    numbers = f"{most}" if least == most else f"{least} to {most}"
    return f"{ended}; {numbers} {counted}; residual at most {float(residual.max()):.1e}"


class ConvergenceError(RuntimeError):
    """Raised by `Solution.check` (and by `Implicit(on_failure="raise")`) when samples did not converge."""


@dataclass(eq=False)
class Adjoint:
    """How the linear adjoint solve u = g + Jᵀu of the last backward pass went, per sample.

    residual is ‖g + Jᵀu − u‖ / ‖g‖ of the u that was used; evaluations counts vector-Jacobian products.
    """

    status: Tensor  # (B,) int64 of Status
    residual: Tensor  # (B,) float64
    evaluations: Tensor  # (B,) int64

    @property
    def converged(self) -> Tensor:
        """(B,) bool: the residual was measured to be within the tolerance asked for."""
        return self.status == Status.CONVERGED

    def __repr__(self) -> str:
        """One line. Waits for the device."""
        if is_stacked(self.status):
            return f"Adjoint({len(self.status)} samples inside a vmap)"
        return f"Adjoint({in_short(self.status, self.evaluations, 'products', self.residual)})"


# Outcomes of compiled backward passes that are kept, and their samples in all, but for the last outcome.
KEPT, SAMPLES = 64, 2**20
_numbered: OrderedDict[int, Adjoint] = OrderedDict()
_samples = [0]  # of these outcomes together


@dataclass(eq=False)
class Recorder:
    """Where backward passes leave their outcome: the graph behind a solution holds it, and so does the `Solution`.

    ticket: (), int64, the number under which a compiled backward pass does so, for it knows tensors alone; the last
    `KEPT` are kept, of `SAMPLES` samples at most.
    """

    last: Adjoint | None = None
    ticket: Tensor | None = None

    def note(self, adjoint: Adjoint) -> None:
        if self.ticket is None:
            self.last = adjoint
        else:
            note_numbered(self.ticket, adjoint)

    @property
    def found(self) -> Adjoint | None:
        return self.last if self.ticket is None else _numbered.get(int(self.ticket))


def note_numbered(ticket: Tensor, adjoint: Adjoint) -> None:
    """Leaves the outcome of a compiled backward pass under its number."""
    number = int(ticket)
    _forget(number)
    _numbered[number] = adjoint
    _samples[0] += adjoint.status.shape[0]
    while len(_numbered) > KEPT or (len(_numbered) > 1 and _samples[0] > SAMPLES):
        _forget(next(iter(_numbered)))


def _forget(number: int) -> None:
    known = _numbered.pop(number, None)
    _samples[0] -= 0 if known is None else known.status.shape[0]


@dataclass(frozen=True, eq=False, repr=False)
class Solution:
    """The result of `solve`, per sample.

    z has the structure of z0 and is, for each sample, the iterate of least residual among those measured; `residual`
    is ‖f(z) − z‖ of exactly that z, in the norm of `Stop`. `evaluations` counts the calls of fn in which the sample
    took part. `rejections` counts steps refused because they made the residual blow up or led where fn is NaN or
    infinite, `rank_losses` steps whose least-squares system was rank deficient. Nothing in it changes but `adjoint`.
    """

    z: Any  # structure of z0, leading dimension B
    residual: Tensor  # (B,) float64
    evaluations: Tensor  # (B,) int64
    status: Tensor  # (B,) int64 of Status
    steps: int  # calls of fn
    rejections: Tensor  # (B,) int64
    rank_losses: Tensor  # (B,) int64
    trace: Tensor | None = None  # (steps, B) residuals, NaN where a sample had finished
    snapshots: list[Any] = field(default_factory=list)  # z, in the structure of z0, at the steps asked for
    history: History | None = None  # when asked for: what a later solve may go on from
    course: Course | None = None  # how it went: what `check` reads the likely causes from
    recorder: Recorder = field(default_factory=Recorder)  # of backward passes through z
    aux: Any = None  # what fn returns beside the state at z, leading dimension B, when asked for

    @property
    def adjoint(self) -> Adjoint | None:
        """How the adjoint solve of the last backward pass through z went; None before the first.

        Of a compiled backward pass it is None too when 64 others have come after it, or others of a million samples.
        """
        return self.recorder.found

    @property
    def converged(self) -> Tensor:
        """(B,) bool: the sample met its tolerance."""
        return self.status == int(Status.CONVERGED)

    def __repr__(self) -> str:
        """One line: samples per status, evaluations, largest residual. Waits for the device."""
        if is_stacked(self.status):
            return f"Solution({len(self.status)} samples inside a vmap)"
        return f"Solution({in_short(self.status, self.evaluations, 'evaluations', self.residual)})"

    def check(self) -> Solution:
        """Returns self, or raises ConvergenceError that counts the samples of each status and cause, and says what to
        change. Waits for the device."""
        if is_stacked(self.status):
            raise NotImplementedError(
                "check inside torch.func.vmap is not supported: return solution.status and look at it outside"
            )
        failures = describe(self.status, self.course)
        if failures:
            raise ConvergenceError(f"solve did not converge: {failures}")
        return self


def holding(solution: Solution, z: Any, aux: Any) -> Solution:
    """The same outcome with another z and aux."""
    other = object.__new__(Solution)  # `dataclasses.replace` sets field after field
    vars(other).update(vars(solution), z=z, aux=aux)
    return other
