"""How adjoint solves of compiled graphs are told of: two operators of a graph, which knows tensors alone.

`torch.ops.pydeqsolve.ticket` draws a number in the forward pass; `torch.ops.pydeqsolve.report` leaves the outcome under
it in the backward pass, and warns or raises as `Implicit` says.
"""

from __future__ import annotations

import itertools
import warnings

import torch
from torch import Tensor

from ..solution import Adjoint, ConvergenceError, note_numbered
from ..status import describe_adjoint
from .gmres import GMRES

_numbers = itertools.count(1)
_library = torch.library.Library("pydeqsolve", "FRAGMENT")
# A compiler that took two tickets for one would mix up two solves.
_library.define("ticket(Tensor z) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))
_library.define(
    "report(Tensor u, Tensor good, Tensor status, Tensor residual, Tensor evaluations, Tensor ticket, int restart, "
    "str on_failure) -> Tensor",
    tags=(torch.Tag.nondeterministic_seeded,),
)


def drawn(z: Tensor) -> Tensor:
    """The ticket, () int64, of a solve whose solution is z."""
    number: Tensor = torch.ops.pydeqsolve.ticket(z)
    return number


def told(u: Tensor, good: Tensor, outcome: Adjoint, ticket: Tensor, restart: int, on_failure: str) -> Tensor:
    """u (B, T, D), after the outcome for the samples that are `good` (B,) has been told of as `Implicit` says."""
    how = (outcome.status, outcome.residual, outcome.evaluations, ticket, restart, on_failure)
    copy: Tensor = torch.ops.pydeqsolve.report(u, good, *how)
    return copy


def _ticket(z: Tensor) -> Tensor:
    """A number that was never given before, () int64 on the host."""
    return torch.tensor(next(_numbers))


def _report(
    u: Tensor, good: Tensor, status: Tensor, residual: Tensor, evaluations: Tensor, ticket: Tensor, restart: int,
    on_failure: str,
) -> Tensor:  # fmt: skip
    """A copy of u (B, T, D), whose samples `good` (B,) were solved for with the outcome of (B,) each.

    Raises ConvergenceError where one has failed and on_failure is "raise".
    """
    note_numbered(ticket, Adjoint(status.clone(), residual.clone(), evaluations.clone()))
    if on_failure != "phantom" and bool((good & (status != 0)).any()):
        told = describe_adjoint(status[good], GMRES(restart))
        message = f"the adjoint of solve did not converge: {told}"
        if on_failure == "raise":
            raise ConvergenceError(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    return u.clone()


_library.impl("ticket", _ticket, "CompositeExplicitAutograd")
_library.impl("report", _report, "CompositeExplicitAutograd")


@torch.library.register_fake("pydeqsolve::ticket", lib=_library)
def _(z: Tensor) -> Tensor:
    return torch.empty((), dtype=torch.int64, device="cpu")


@torch.library.register_fake("pydeqsolve::report", lib=_library)
def _(u: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(u)
