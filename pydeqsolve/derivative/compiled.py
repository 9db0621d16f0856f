"""The derivative of a solution inside a graph of torch.compile, where nothing may depend on data.

A good sample stands in for every bad one: a cotangent of zero times a bad one's NaN would still be NaN in what the
samples share.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..loop.iterate import Outcome
from ..loop.traced import tolerance, traced
from ..problem import Problem, Solver
from ..solution import Recorder
from ..stop import Stop
from .adjoint import FINEST, LOOSEST
from .gmres import GMRES
from .gradient import Gradient, Implicit, Phantom, stepped
from .linearise import evaluate

# Whether torch's graphs are known to take `Implicit`; a number, for a function would have to be told to the compiler,
# which imports it, and that takes as long as importing torch.
RECENT = tuple(int(x) for x in torch.__version__.split(".")[:2]) >= (2, 13)


def is_compilable(gradient: Gradient | None) -> bool:
    """Whether a derivative stays in a graph: that of `Phantom`, and in training that of `Implicit` by GMRES.

    The latter where one graph is asked for alone: the eager solve, for which the graph breaks else, takes less time.
    """
    if gradient is None or isinstance(gradient, Phantom) or not torch.is_grad_enabled():
        return True
    by_gmres = isinstance(gradient, Implicit) and type(gradient.solver) is GMRES
    return by_gmres and RECENT and not torch.compiler.is_exporting() and _must_be_whole()


def _must_be_whole() -> bool:
    """Whether the compiler that is at work refuses to break its graph (fullgraph=True)."""
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        at_work: Any = InstructionTranslator.current_tx()
        return _has_operators() and bool(at_work.one_graph or at_work.error_on_graph_break)
    except (ImportError, AttributeError):
        return False


def _has_operators() -> bool:
    """Whether torch has what `captured` and `graph` are made of, none of which it promises to keep."""
    try:
        from . import graph  # noqa: F401
    except (ImportError, AttributeError):
        return False
    return RECENT


# As `torch.compiler.assume_constant_result`, which imports the compiler, would: the functions are called, not traced.
for _asked in (_must_be_whole, _has_operators):
    _asked._dynamo_marked_constant = True  # type: ignore[attr-defined]


def solved_in_graph(problem: Problem, z0: Tensor, solver: Solver, stop: Stop) -> Outcome:
    """What `loop` finds from z0 (B, T, D): by an operator, or in a graph to be exported by operators of torch."""
    if torch.compiler.is_exporting() or not _has_operators():
        return traced(problem, z0, solver=solver, stop=stop)
    from ..loop.captured import captured

    return captured(problem, z0, solver=solver, stop=stop)


def attach_in_graph(how: Gradient | None, problem: Problem, outcome: Outcome) -> tuple[Tensor, Recorder]:
    """z (B, T, D) of the outcome, with the derivative of a gradient that `is_compilable`, and who will know of that."""
    z = outcome.z.detach()
    if not z.shape[0] or not torch.is_grad_enabled():
        return z, Recorder()
    good = outcome.residual.isfinite()
    if isinstance(how, Phantom):
        return _with_phantom(how, problem, z, good), Recorder()
    if isinstance(how, Implicit):
        return _with_implicit(how, problem, z, good, outcome.stop)
    return z, Recorder()


def _with_phantom(how: Phantom, problem: Problem, z: Tensor, good: Tensor) -> Tensor:
    """Several steps are taken twice, first without graph: a sample that is not finite after them is a bad one."""
    if how.steps > 1:
        with torch.no_grad():
            good = good & _moved(how, problem, z, good).isfinite().flatten(1).all(1)
    moved = _moved(how, problem, z, good)
    return torch.where(good[:, None, None], z + (moved - moved.detach()), z)


def _moved(how: Phantom, problem: Problem, z: Tensor, good: Tensor) -> Tensor:
    """z (B, T, D) after the steps of a phantom gradient."""
    z, inputs = _stand_ins(problem, z, good)
    return stepped(how, lambda z: evaluate(problem, z, inputs), z)


def _with_implicit(how: Implicit, problem: Problem, z: Tensor, good: Tensor, stop: Stop) -> tuple[Tensor, Recorder]:
    from .graph import implicit
    from .numbered import drawn

    own = how.stop if how.stop is not None else stop
    rtol, atol = tolerance(own.rtol, z), tolerance(own.atol if how.stop is not None else 0.0, z)
    budget = own.max_steps
    if how.stop is None:  # as `adjoint.following`
        rtol = torch.where(rtol > 0, rtol, FINEST).clamp_max(LOOSEST)
        budget = max(Stop.max_steps, budget)
    bounds = torch.stack([good.double(), rtol, atol, torch.full_like(rtol, budget)], 1)
    ticket = drawn(z)

    def fn(z: Tensor, bounds: Tensor, ticket: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        return problem(z, inputs).clone(), z.clone(), bounds.clone(), ticket.clone()  # it may be an input itself

    start, inputs = _stand_ins(problem, z, good)
    settings: dict[str, Any] = {
        "restart": how.solver.restart, "follows": how.stop is None, "on_failure": how.on_failure
    }  # fmt: skip
    found = implicit(fn, start, bounds, ticket, *inputs, **settings)
    return torch.where(good[:, None, None], found[0], z), Recorder(ticket=ticket)


def _stand_ins(problem: Problem, z: Tensor, good: Tensor) -> tuple[Tensor, list[Tensor]]:
    """z (B, T, D) and the inputs, the first good sample (B,) in the place of every bad one; zeros without any."""
    first = good.to(torch.uint8).argmax(0, keepdim=True)

    def taken(x: Tensor) -> Tensor:
        stand_in = x.detach().index_select(0, first)
        stand_in = torch.where(good.any(), stand_in, torch.zeros_like(stand_in))
        return torch.where(good.reshape(-1, *[1] * (x.dim() - 1)), x, stand_in)

    inputs = [taken(x) for x in problem.inputs] if problem.compact else list(problem.inputs)
    return taken(z).nan_to_num(0.0, 0.0, 0.0), inputs
