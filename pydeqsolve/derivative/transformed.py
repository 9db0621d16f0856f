"""A solve inside transforms of torch.func."""

from __future__ import annotations

import copy
import functools
from typing import Any

from torch import Tensor

from ..layout import leaves_of, rebuild
from ..loop.iterate import Outcome
from ..problem import Problem, Solver
from ..solution import Recorder, Solution
from ..stop import Stop
from .adjoint import AdjointSolve, following
from .functional import How, solved
from .gradient import Gradient, Implicit, Phantom, stepped
from .lifted import Lifted, carries, unwrapped

OF_TENSORS = ("z", "residual", "evaluations", "status", "rejections", "rank_losses")


def transformed(
    problem: Problem, start: Tensor, solver: Solver, stop: Stop, gradient: Gradient | None, recorder: Recorder
) -> Outcome:
    """The outcome from z0 (B, T, D), whose z has the derivatives of `gradient`; in a vmap those of each.

    Raises NotImplementedError for a gradient that has no such form.
    """
    if gradient is not None and type(gradient) not in (Implicit, Phantom):
        raise NotImplementedError(
            f"gradient={type(gradient).__name__}() inside a torch.func transform is not supported: use Implicit() or "
            "Phantom()"
        )
    for name, stopped in (("stop", stop), ("gradient.stop", getattr(gradient, "stop", None))):
        tolerances = () if stopped is None else (stopped.rtol, stopped.atol)
        if any(isinstance(t, Tensor) and carries(t) for t in tolerances):
            raise NotImplementedError(f"{name}: tolerances must not be transformed by torch.func")
    how = How(solver, stop, None, None)
    if isinstance(gradient, Implicit):
        chosen = following(stop) if gradient.stop is None else gradient.stop
        how.adjoint = AdjointSolve(
            gradient.solver, chosen, gradient.stop is None, gradient.on_failure, recorder, eps=0.0
        )
    elif isinstance(gradient, Phantom):
        how.steps = functools.partial(stepped, gradient)
    lifted = Lifted.of(problem, start.detach())
    z, *counts = solved(how, lifted, start)
    lifted.check(z.detach())
    outcome = how.outcome
    assert outcome is not None
    if gradient is None:
        z = z.detach()
    residual, evaluations, status, rejections, rank_losses = counts
    course = outcome.course if unwrapped(residual) is not None else None
    return Outcome(
        z, residual, evaluations, status, outcome.steps, rejections, rank_losses, None, [], None, course, solver, stop
    )


def outside(solution: Solution) -> Solution | None:
    """A solution, detached and in memory of its own, that may leave the transforms; None inside a vmap."""
    kept = copy.copy(vars(solution))
    for name, value in kept.items():
        if name in OF_TENSORS and value is not None:
            leaves = [unwrapped(x) for x in leaves_of(value, name)]
            if any(x is None for x in leaves):
                return None
            own = [x.detach().clone() for x in leaves if x is not None]
            kept[name] = rebuild(value, iter(own).__next__)
    return Solution(**kept)


def refuse_options(**options: Any) -> None:
    """Raises NotImplementedError for options of `solve` that are not there inside a transform."""
    for name, given in options.items():
        if given:
            raise NotImplementedError(
                f"{name} inside a torch.func transform is not supported: leave it out there, or solve outside"
            )
