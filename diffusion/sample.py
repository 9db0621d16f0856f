"""Sampling: the DDIM chain step by step, or all of it at once as a fixed point."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pydeqsolve import Implicit, Phantom, Solution, Stop

from .adjoint import check_gradient, through_chain
from .answers import draw
from .arguments import check_arguments, model_dtype, progress_bar
from .basis import Rotated, rotate, rotate_states, rotated_callback, rotated_edit
from .chain import Chain, Splitting
from .cost import cheapest, timed
from .edit import Edit
from .nodes import nodes, possible
from .passes import Passes
from .phantom import through_phantom
from .ranks import agree
from .remainder import Model, reachable
from .sampler import SOLVER, Sampler

STOP = Stop(rtol=1e-4)
METHODS = ("sequential", "parallel", "auto")
# Steps. On digits at T = 300: 9 T rows in 39 rounds, 18 T in 39 without a window, which hardly ends at T = 1000.
CLIPPED_WINDOW = 100
LONG = 250  # steps from which nodes are the default: there they save most of the rows and cost few rounds more


@dataclass(eq=False)
class Sample:
    """What `sample` returns.

    Attributes:
        x_0: (B, …) the images, dtype of x_T.
        trajectory: (B, steps + 1, …), x_T first.
        solution: of the finest level's fixed point, in the chain's remainders; None for sequential sampling.
        rounds: model calls one after the other, coarser levels included.
        evaluations: (B,) model rows per image.
    """

    x_0: Tensor
    trajectory: Tensor
    solution: Solution | None
    rounds: int
    evaluations: Tensor


def sample(
    model: Model,
    x_T: Tensor,
    chain: Chain,
    prediction: str = "epsilon",
    method: str = "parallel",
    splitting: str | Tensor | Splitting = "v",
    solver: Any = None,
    stop: Stop | None = None,
    window: int | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    group: Any = None,
    progress: bool = False,
    *,
    inputs: Sequence[Tensor] = (),
    gradient: Implicit | Phantom | None = None,
    levels: Sequence[int] | str | None = None,
    mean: Tensor | None = None,
    variance: Tensor | None = None,
    rows_per_call: int | None = None,
    callback: Callable[[int, Tensor, Tensor], Any] | None = None,
    edit: Edit | None = None,
    noises: Tensor | None = None,
) -> Sample:
    """The images x_0 that the chain makes of the latents x_T.

    x_{k+1} = a_k x_k + c_k ε(x_k, t_k) + σ_k n_k (Song et al. 2021, Eq. 12), either one step after the other
    ("sequential") or as the fixed point of all steps together ("parallel"; Pokle et al. 2022, Eq. 10, split linearly).
    Both give the same images, to the tolerance of `stop`. "auto" takes whichever should be faster here: it times a few
    model calls, once per model, batch size and device, and counts rounds and rows (`diffusion.cost`). So what it does
    depends on the machine; fix `method` and `levels` for the same computation everywhere.

    Args:
        model: model(x, t, *inputs), x (N, …), t (N,) int64 → same shape as x; `prediction` says of what.
        x_T: (B, …) latents, usually standard normal.
        chain: from `Schedule.chain`.
        prediction: "epsilon", "v" or "sample".
        splitting: "v", "epsilon", "gaussian" (with `mean` and `variance`, the data's, of the shape of an image), κ (T,)
            or (T, D), or a `Splitting`: `Splitting.fitted` makes one of images, per pixel, frequency or covariance.
        solver: of all steps together; Anderson(2, coupling="causal"). Nodes have their own, `diffusion.secants`.
        stop: rtol is a tenth of the relative error of x_0 that is asked for (default 1e-4: within 1e-3 of sequential
            sampling, met by all but a few in a thousand images), taken no smaller than half the machine epsilon of
            the model's dtype unless 0, which asks for every step to be exact. atol, if given, is added, in units of ε,
            root mean square per step. max_steps caps the rounds of a level, besides those that it may start with on the
            nodes (by default the number of steps, which always suffices).
        window: time steps evaluated at once, at most; None is all, or 100 for a chain that clips, whose clipped pixels
            are stiff: far ahead of the front their remainders are of no use yet.
        generator: of the noises n_k when chain.eta > 0, or a list with one for each image, which then has the noises
            that it has alone; they are drawn once, ahead. noises: the noises (B, steps, …).
        group: torch.distributed process group whose ranks share the model rows of every round; every rank passes the
            same arguments, generators from one seed, and gets the result; progress and callback may differ, and a
            callback that stops one rank stops all. See `diffusion.ranks`.
        inputs: per-image conditioning (B, …), gathered for the rows that are evaluated.
        gradient: None; Implicit() for the exact gradient with respect to x_T, inputs and parameters, by one
            sweep back over the steps; Implicit(solver=Anderson(2, coupling="causal")) for the same with all steps at
            once, to its `stop`; Phantom(steps, damping) for the approximate one. See `diffusion.adjoint`.
        levels: step counts of coarser chains solved first, coarsest first; () is none: every step in every round, but
            for the first two, which evaluate a few time steps (`diffusion.nodes`) where "nodes" could be had.
            "nodes": the nonlinear work on a few time steps and every step evaluated once, which saves most of the rows
            (`diffusion.passes`; it needs eta = 0, no edit and no window). None is "nodes" for chains of 250 steps and
            more that allow it, else ().
        rows_per_call: rows per model call; None is 256 on a CPU, all on a GPU. Calls of one round count once.
        callback: callback(round, trajectory, residual) after each round of a parallel solve's finest level; a true
            return stops it. Of sequential sampling, `edit` sees every state.
        edit: edit(x, k, image) → x, what becomes of the states x (n, …), float64, that k of the T steps leave,
            k = 1 … T, of the images numbered `image` (n,): `Inpaint`, or a function of your own. It must treat images
            alone and answer alike when asked again: every round applies it to all T states in turn, so what calls a
            network belongs in the model, where it is evaluated for all steps at once.

    Returns:
        Sample.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, by name.
        ValueError on every rank: those of `group` were given different arguments, by name.
        RuntimeError: a rank of `group` failed, died or did not answer within the group's time limit.

    The states are float64 whatever the model's dtype: in float32 a frozen step leaves an error which the rest inherits.
    """
    if group is not None:
        callback = agree(group, locals())  # which are the arguments alone, here
    if isinstance(splitting, Splitting) and splitting.basis is not None:
        return _in_basis(
            model, x_T, chain, prediction, splitting, edit, callback, noises, method=method, solver=solver, stop=stop,
            window=window, generator=generator, group=group, progress=progress, inputs=inputs, gradient=gradient,
            levels=levels, rows_per_call=rows_per_call,
        )  # fmt: skip
    run = Sampler.of(
        model, x_T, chain, prediction, splitting, generator, group, inputs, mean, variance, rows_per_call, edit, noises
    )
    if gradient is not None and not isinstance(gradient, (Implicit, Phantom)):
        raise TypeError(f"gradient: None, Implicit() or Phantom() is required, got {type(gradient).__name__}")
    check_gradient(gradient, edit)
    if callback is not None and method != "parallel":
        raise ValueError('callback: of the rounds of method="parallel"; with "sequential" edit= sees every state')
    window = CLIPPED_WINDOW if window is None and chain.clip is not None else window
    goal = stop or replace(STOP, max_steps=len(chain))
    goal = replace(goal, rtol=reachable(goal.rtol, run.map.network.dtype))
    bar = progress_bar(progress, "sampling", "round")
    try:
        with torch.no_grad():
            way, counts = _way(run, method, goal, window, levels)
            if way == "sequential":
                solve: Callable[[], Any] = partial(run.sequential, bar)
            elif way == "nodes":
                solve = Passes(run, solver or SOLVER, goal, bar, callback).solve
            else:
                solve = partial(run.parallel, solver or SOLVER, goal, window, counts, bar, callback)
            if method == "auto" and levels is None and group is None and len(x_T):
                solve = partial(timed, run, way, len(nodes(len(chain))), solve)
            trajectory, solution, rounds, evaluations = solve()
    finally:
        bar.close()
    if isinstance(gradient, Implicit):
        trajectory = through_chain(run.map, trajectory, x_T, list(inputs), run.noise, gradient, solution)
    elif isinstance(gradient, Phantom):
        trajectory = through_phantom(run.map, trajectory, x_T, list(inputs), run.drift, gradient)
    images = trajectory.to(x_T.dtype).unflatten(2, x_T.shape[1:]) if len(x_T) else trajectory.to(x_T.dtype)
    return Sample(images[:, -1], images, solution, rounds, evaluations)


def _in_basis(
    model: Model, x_T: Tensor, chain: Chain, prediction: str, splitting: Splitting, edit: Edit | None, callback: Any,
    noises: Tensor | None, *, generator: Any, inputs: Sequence[Tensor], **options: Any,
) -> Sample:  # fmt: skip
    """`sample` in the splitting's basis, its result rotated back."""
    check_arguments(model, x_T, "x_T", chain, prediction, inputs)
    Q, D = splitting.basis, x_T.shape[1:].numel()
    if Q is None or Q.shape != (D, D):
        raise ValueError(f"splitting: a basis ({D}, {D}) is required, got {None if Q is None else tuple(Q.shape)}")
    if chain.clip is not None:
        raise ValueError("splitting: a basis and a chain that clips go ill together: clipping is per pixel")
    if noises is None and chain.eta > 0:
        noises = draw((len(x_T), len(chain), *x_T.shape[1:]), generator, x_T.device)
    out = sample(
        Rotated(model, Q, model_dtype(model, x_T.dtype)), rotate(x_T, Q), chain, prediction,
        splitting=replace(splitting, basis=None), inputs=inputs, edit=rotated_edit(edit, Q),
        callback=rotated_callback(callback, Q), noises=None if noises is None else rotate_states(noises, Q), **options,
    )  # fmt: skip
    trajectory = rotate_states(out.trajectory, Q.T)
    return replace(out, x_0=trajectory[:, -1], trajectory=trajectory)


def _way(
    run: Sampler, method: str, stop: Stop, window: int | None, levels: Sequence[int] | str | None
) -> tuple[str, Sequence[int]]:
    """How to sample: "sequential", "together" or on "nodes"; and the step counts of coarser chains."""
    if method not in METHODS:
        raise ValueError(f"method: one of {', '.join(METHODS)} is required, got {method!r}")
    if isinstance(levels, str) and levels != "nodes":
        raise ValueError(f'levels: step counts, "nodes" or None is required, got {levels!r}')
    able = possible(run, stop, window)
    if levels == "nodes" and not able:
        raise ValueError('levels: "nodes" needs eta = 0, no edit, no window, rtol > 0 and a chain of at least 60 steps')
    if method == "sequential":
        return method, ()
    if isinstance(levels, str):
        return levels, ()
    if levels is not None:
        return "together", run.levels(levels)
    if method == "auto" and run.map.chain.clip is not None:
        return "sequential", ()  # what clipping costs is not in the counts that the choice rests on
    if method == "auto" and run.map.network.group is None and len(run.x_T):
        return cheapest(run, len(nodes(len(run.map.chain))) if able else None), ()
    return ("nodes" if able and len(run.map.chain) >= LONG else "together"), ()
