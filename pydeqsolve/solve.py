"""`solve`: the public entry of the solvers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .agreement import join, refuse, shards_of
from .anderson import Anderson
from .arguments import check_gradient, check_inputs, check_solver, check_stop, check_tolerances
from .checks import check_count, check_flag
from .derivative.auxiliary import auxiliary
from .derivative.compiled import attach_in_graph, is_compilable, solved_in_graph
from .derivative.gradient import Gradient, Implicit, Phantom, Unrolled
from .derivative.lifted import is_transformed
from .derivative.linearise import is_wanted
from .derivative.transformed import refuse_options, transformed
from .layout import Layout, detached, nested
from .loop.iterate import Outcome, check_together, iterate
from .loop.kept import History
from .loop.traced import is_traceable
from .loop.watches import Callback
from .problem import Problem, Solver
from .segments import SegmentLayout, Segments
from .solution import Recorder, Solution
from .stop import Front, Stop

ANDERSON, STOP, IMPLICIT = Anderson(), Stop(), Implicit()


def solve(
    fn: Callable[..., Any],
    z0: Any,
    inputs: Sequence[Any] = (),
    *,
    solver: Solver = ANDERSON,
    stop: Stop = STOP,
    gradient: Gradient | None = IMPLICIT,
    compact: bool | None = None,
    trace: bool = False,
    callback: Callback | None = None,
    front: Front | None = None,
    keep_history: bool = False,
    snapshots: Sequence[int] = (),
    admissible: Callable[..., Tensor] | None = None,
    merit: Callable[..., Tensor] | None = None,
    segments: Tensor | None = None,
    group: Any = None,
    has_aux: bool = False,
) -> Solution:
    """Solves z = fn(z, *inputs) for each of B samples by itself and returns a `Solution`.

    Args:
        fn: the map; takes the state of n samples and returns their new state, same structure and shapes. It must treat
            samples independently and must not change its arguments in place.
        z0: first guess: a tensor (B, …), or a nested tuple, list or dict of tensors that share B, dtype (float64,
            float32, bfloat16, float16, complex128, complex64) and device; complex numbers are solved for as pairs of
            reals, and norms are over both parts. Or an earlier `Solution`: its z, and its history if that was kept.
            Where all tensors are (n,), these are n problems of one unknown each, and a UserWarning says so: one problem
            of n unknowns is z0[None], of shape (1, n).
        inputs: tensors (B, …), the input injection, handed to fn after the state; None, and nested tuples, lists and
            dicts of tensors, are handed on as they are.
        solver: `Anderson`, `Broyden` or `Picard`.
        stop: tolerance, budget, norm.
        gradient: `Implicit`, `Phantom`, `Unrolled`, or None for no graph at all.
        compact: fn is called on the unfinished samples only, with `inputs` gathered alike. None: on when there are
            inputs; off otherwise, because fn might close over per-sample data.
        trace: keep the residual of every step in `Solution.trace`, (steps, B).
        callback: called as callback(step, z, residual) after each measured step, z in the structure of z0; a true
            return stops the solve.
        keep_history: keep what the solver has learnt in `Solution.history`, for a solve that starts from this Solution:
            of the same map it goes on as if it had never stopped, of a map that has changed a little it saves steps.
        snapshots: steps, from 1, whose iterates are kept in `Solution.snapshots`, for losses along the trajectory; a
            sample that has finished before has its final z there. Their gradient is that of `Phantom`, with the steps
            and damping of `gradient` if that is one: off the fixed point there is no implicit gradient.
        has_aux: fn returns a pair (z', aux). aux, a tensor (n, …) or a nested structure of such, takes no part in the
            solve; `Solution.aux` is that of the z returned, (B, …), differentiable like it. Costs one more evaluation
            of fn at the end, not counted in `Solution.evaluations`, and another where samples have failed.
        front: the map is causal over dimension 1 of the state, (B, T, …), and its blocks finish one by one (`Front`).
        admissible: admissible(z, *inputs) → (n,) bool, asked of accelerated iterates before fn sees them, in the
            structure of the state. Where it is false the sample takes the plain (damped) step instead, counts a
            rejection, and keeps what it has learnt, at no evaluation. The plain step is not asked about: fn must be
            able to leave from wherever it leads.
        merit: merit(z, *inputs) → (n,) floating point, lower is better, of the same samples as fn: an accelerated
            iterate that raises it above that of the current one, or makes it NaN, is refused likewise. A negative
            log-likelihood for EM, an energy, a norm.
        segments: (N,) int64, sorted: z0 holds N rows, and row i belongs to sample segments[i] of G, as `batch` does for
            graphs in PyTorch Geometric. Norms, weights, status, counts and tolerances are then per sample, (G,); fn,
            admissible and merit see all N rows, and inputs of any shape pass unchanged. Samples lie padded to the rows
            of the largest: 2 (m + 1) + 5 words per entry of G times that.
        group: a torch.distributed process group whose ranks hold shards of every sample's features: z0 (B, …) is this
            rank's, of any size but 0, and fn maps it to this rank's share of the new state and does the communication
            that this takes. Norms, weights and decisions are those of the whole state: one all-reduce per step, of
            2 m + 2 numbers per sample (`docs/distributed.md`). All other arguments but the values of `inputs` and
            `callback` must be the same on every rank. A state is admissible where every rank says so; its merit is the
            largest that a rank returns. Gradients are those of the sum of all ranks' losses, where fn communicates by
            functions that autograd knows; every rank must take them. Collectives of fn belong on another group.

    Returns:
        Solution: per sample the best measured iterate, its residual, status and evaluations. Its tensors share memory
            with nothing given, returned by fn, or kept of another solve.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, or fn returns another structure than z0's. Tensors
            without memory of their own (meta, fake, sparse, storage let go of) are a TypeError; a change of fn's
            arguments in place is a ValueError, one past autograd (z.data, z.numpy()) where the first two calls show it.
            Ranks of a group that were given different arguments all raise a ValueError.
        RuntimeError: another rank of the group has failed; its error is reported there.

    A sample that fails (NaN, divergence, budget) ends with a status; it raises for nobody and changes nobody else.
    Memory: 2 (m + 1) + 5 words per entry of z0; of small solves on the CPU it is kept for later ones, 4 MiB in all at
    most (`loop.reuse`). On a GPU the host waits once every `stop.check_every` steps. Under
    torch.compile and torch.export a solve by `Picard` or `Anderson`, without gradient or with `Phantom`, is one
    operator of the graph (`loop.captured`); `steps` is a tensor then. Inside transforms of torch.func all derivatives
    are right with `Implicit`, `Phantom` or None, and a vmap is one solve of all its samples; the rest raises
    NotImplementedError.
    """
    shards, history = shards_of(group), None
    try:
        if isinstance(z0, Solution):
            z0, history = detached(z0.z), z0.history
        where = None if segments is None else Segments.of(segments)
        problem, flat = _prepare(fn, z0, inputs, solver, stop, gradient, compact, front, where, has_aux)
        if where is not None:
            callback, stop = where.told(callback, stop.norm), where.tolerance(stop)
        elif not any(problem.layout.shapes):
            _warn_of_one_dimension(z0, flat.shape[0])
        if history is not None:
            if not history.is_of(segments):
                raise ValueError("segments must be those of the history that z0 holds: start from its z alone, z0=z0.z")
            history.check(solver.method(), flat, shards.size)
        _check_rest(trace, keep_history, snapshots, callback, admissible, merit)
        gated = admissible is not None or merit is not None
        refuse_pairs(solver, gradient, front, history, keep_history, snapshots, empty=not flat.shape[0], gated=gated)
        apart = is_transformed() and not torch.compiler.is_compiling()
        if apart:
            refuse_options(
                front=front, trace=trace, callback=callback, history=history, keep_history=keep_history,
                snapshots=snapshots, admissible=admissible, merit=merit, segments=where, has_aux=has_aux,
                group=shards.many,
            )  # fmt: skip
    except Exception:
        refuse(shards)
        raise
    if shards.many:
        settings = {
            "solver": solver, "stop": stop, "gradient": gradient if is_wanted() else None, "front": front,
            "trace": trace, "keep_history": keep_history, "snapshots": snapshots, "admissible": admissible is None,
            "merit": merit is None, "segments": segments, "has_aux": has_aux, "compact": problem.compact,
            "inputs": len(problem.inputs), "z0": (flat.shape[:2], flat.dtype, problem.layout.is_complex, not history),
        }  # fmt: skip
        shards, callback = join(shards, settings, flat.shape[2], callback)
        problem = replace(problem, split=shards)
    options = (front, trace, callback, history, keep_history, snapshots, gated, where, has_aux, shards.many)
    in_graph = torch.compiler.is_compiling() and _is_one_graph(solver, gradient, options)
    recorder = Recorder()
    if apart:
        found = transformed(problem, flat, solver, stop, gradient, recorder)
    elif in_graph:
        found = solved_in_graph(problem, flat.detach(), solver, stop)
    else:
        found = iterate(
            problem, flat.detach(), solver=solver, stop=stop, front=front, trace=trace, callback=callback,
            history=history, keep_history=keep_history, snapshots=snapshots, admissible=admissible, merit=merit,
        )  # fmt: skip
    seen = _with_phantom(problem, flat, found, gradient) if found.snapshots else []
    z = found.z
    if in_graph:
        z, recorder = attach_in_graph(gradient, problem, found)
    elif gradient is not None and flat.shape[0] and not apart:
        z = gradient.attach(problem, flat, found, recorder)
    aux = None
    if has_aux:
        aux = shards.stage(lambda: auxiliary(problem, found.finite, z, gradient is not None))
    if where is not None:
        found = where.measured(found)
        if found.history is not None:
            found.history.segments = where.segments.clone()
    if found.history is not None:
        found.history.ranks = shards.size
    return Solution(
        problem.layout.unpack(z), found.residual, found.evaluations, found.status, found.steps, found.rejections,
        found.rank_losses, found.trace, seen, found.history, found.course, recorder, aux,
    )  # fmt: skip


def _prepare(
    fn: Callable[..., Any], z0: Any, inputs: Sequence[Tensor], solver: Solver, stop: Stop,
    gradient: Gradient | None, compact: bool | None, front: Front | None, where: Segments | None,
    has_aux: bool,
) -> tuple[Problem, Tensor]:  # fmt: skip
    """The problem and the flat first guess, after checking every argument."""
    if not callable(fn):
        raise TypeError(f"fn must be callable, got {type(fn).__name__}")
    check_solver(solver)
    check_stop(stop)
    check_gradient(gradient)
    if front is not None and not isinstance(front, Front):
        raise TypeError(f"front must be a Front or None, got {type(front).__name__}")
    if compact is not None and not isinstance(compact, bool):
        raise TypeError(f"compact must be True, False or None, got {type(compact).__name__}")
    if has_aux is not False:
        check_flag("has_aux", has_aux)
    by_blocks = front is not None or solver.method().coupling != "joint"
    if where is not None and (by_blocks or compact or has_aux):
        raise ValueError('segments go with none of: front, coupling other than "joint", compact=True, has_aux=True')
    if where is None:
        layout, flat = Layout.begin(z0, by_blocks)
    else:
        layout = SegmentLayout.over(Layout.of(z0, by_blocks), where)
        flat = layout.pack(z0, "z0")
    B, T, D = flat.shape
    if B and not T * D:
        raise ValueError("z0 must have at least one entry per sample")
    check_tolerances("stop", stop, ((B,), (), (B, T), (1, T)) if front is not None else ((B,), ()))
    if isinstance(gradient, Implicit) and gradient.stop is not None:
        check_tolerances("gradient.stop", gradient.stop, [(B,), ()])
    given, names = check_inputs(inputs, B if where is None else None, layout.device)
    if names is not None:
        fn = nested(fn, inputs)
    compact = bool(given) and where is None if compact is None else compact
    return Problem(fn, given, layout, compact, front is not None, has_aux, names or ()), flat


def _warn_of_one_dimension(z0: Any, n: int) -> None:
    """Says how a z0 whose tensors (n,) are all of one dimension was read, to the caller of `solve`."""
    one = isinstance(z0, Tensor)
    many = f"{n} problem{'' if n == 1 else 's'}"
    warnings.warn(
        f"{'z0' if one else 'every tensor of z0'} has shape ({n},), which is {many} of "
        f"{'one unknown' if one else 'one unknown per tensor'} each: for one problem of {n} unknowns give z0[None], "
        f"shape (1, {n}), and for {many} z0[:, None], shape ({n}, 1){'' if one else ', of each tensor'}",
        UserWarning,
        stacklevel=3,
    )


def _check_rest(trace: Any, keep_history: Any, snapshots: Any, callback: Any, admissible: Any, merit: Any) -> None:
    """Raises for the arguments that `_prepare` does not look at."""
    if not isinstance(snapshots, (tuple, list)):
        raise TypeError(f"snapshots must be a tuple of steps, got {type(snapshots).__name__}")
    for k in snapshots:
        check_count("snapshots", k, least=1)
    for name, function in (("callback", callback), ("admissible", admissible), ("merit", merit)):
        if function is not None and not callable(function):
            raise TypeError(f"{name} must be callable, got {type(function).__name__}")
    for name, flag in (("trace", trace), ("keep_history", keep_history)):
        if flag is not False:
            check_flag(name, flag)


def refuse_pairs(
    solver: Solver, gradient: Gradient | None, front: Front | None, history: History | None, keep_history: bool,
    snapshots: Sequence[int], empty: bool, gated: bool = False,
) -> None:  # fmt: skip
    """Raises for options that are each right, but do not go together."""
    check_together(solver, front, keep_history or history is not None, gated)
    searches = bool(getattr(solver, "line_search", 0))
    if isinstance(gradient, Unrolled):
        if snapshots:
            raise NotImplementedError("snapshots are not unrolled: use gradient=Implicit() or Phantom()")
        if history is not None or searches or gated:
            raise NotImplementedError(
                "Unrolled replays neither a history, nor a line search, nor refusals by admissible or merit: use "
                "gradient=Implicit()"
            )
        if not empty and (front is not None or solver.method().coupling != "joint"):
            raise NotImplementedError('Unrolled needs a solver with coupling="joint" and no front')


def _is_one_graph(solver: Solver, gradient: Gradient | None, options: tuple[Any, ...]) -> bool:
    """Whether a solve under torch.compile or torch.export stays in their graph; else the graph breaks, if it may."""
    stays = is_compilable(gradient) and is_traceable(solver, options)
    if not stays and torch.compiler.is_exporting():
        raise NotImplementedError(
            "torch.export takes a solve without gradient (gradient=None, or under torch.no_grad()) or with Phantom, by "
            'Picard or Anderson of kind "II" with memory up to 16, and no option besides: an exported program has no '
            "backward pass that Implicit could be part of"
        )
    return stays


def _with_phantom(problem: Problem, start: Tensor, outcome: Outcome, gradient: Gradient | None) -> list[Any]:
    """The snapshots in the user's structure, with a phantom gradient when there is to be any."""
    phantom = gradient if isinstance(gradient, Phantom) else Phantom()
    found = []
    for z in outcome.snapshots:
        if gradient is not None:
            finite = problem.shards.everywhere(z.isfinite().flatten(1).all(1))
            residual = torch.where(finite, outcome.residual, torch.inf)
            z = phantom.attach(problem, start, outcome._replace(z=z, residual=residual), Recorder())
        found.append(problem.layout.unpack(z))
    return found
