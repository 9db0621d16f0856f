"""Sampling: the DDIM chain step by step, or all of it at once as a fixed point."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pydeqsolve import Implicit, Phantom, Solution, Status

from .arguments import check_arguments, check_settings, model_dtype, progress_bar
from .basis import Rotated, rotate, rotate_states, rotated_callback, rotated_edit
from .chain import Chain, Edit, Splitting
from .gradients import check_gradient, through_chain, through_phantom
from .methods.fastest import cheapest, timed
from .methods.goal import Found, Goal
from .methods.nodes import nodes, possible
from .methods.passes import Passes
from .methods.together import Together
from .models.answers import draw
from .ranks import agree
from .remainder import Model
from .sampler import SOLVER, Sampler

METHODS = ("sequential", "parallel", "auto")
# Steps. On digits at T = 300: 9 T rows in 39 rounds, 18 T in 39 without a window, which hardly ends at T = 1000.
CLIPPED_WINDOW = 100
LONG = 250  # steps from which nodes are the default: there they save most of the rows and cost few rounds more


@dataclass(eq=False)
class Sample:
    """What `sample` returns.

    Attributes:
        x_0: (B, …) the images, dtype of the latent.
        trajectory: (B, steps + 1, …), the latent first.
        solution: of the chain's fixed point, in its remainders; None for sequential sampling.
        rounds: model calls one after the other; first guesses, coarser levels and the measurement of the error too.
        evaluations: (B,) network evaluations per image.
        error: (B,) estimate of the relative error of x_0 against sequential sampling, measured on what is returned, no
            less than what the network's precision leaves; inf where rounds ran out before it was measured, 0 for
            sequential sampling, NaN where x_0, or what the network says on the way to it, is not finite.
        converged: (B,) bool, the error meets the one asked for; for sequential sampling, x_0 is finite.
    """

    x_0: Tensor
    trajectory: Tensor
    solution: Solution | None
    rounds: int
    evaluations: Tensor
    error: Tensor
    converged: Tensor

    def __repr__(self) -> str:
        """One line: shape, images converged, largest error, rounds, evaluations. Waits for the device."""
        shape = tuple(self.x_0.shape)
        if not len(self.x_0):
            return f"Sample({shape})"
        least, most = int(self.evaluations.min()), int(self.evaluations.max())
        return (
            f"Sample({shape}; {int(self.converged.sum())} of {len(self.x_0)} converged, error at most "
            f"{float(self.error.max()):.1e}; {self.rounds} rounds, {least} to {most} evaluations)"
        )


def sample(
    model: Model,
    latent: Tensor,
    chain: Chain,
    method: str = "parallel",
    *,
    prediction: str = "epsilon",
    error: float | Tensor | None = None,
    splitting: str | Tensor | Splitting = "v",
    inputs: Sequence[Tensor] = (),
    gradient: Implicit | Phantom | None = None,
    edit: Edit | None = None,
    noises: Tensor | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    group: Any = None,
    max_rounds: int | None = None,
    rows_per_call: int | None = None,
    callback: Callable[[int, Tensor, Tensor], Any] | None = None,
    progress: bool = False,
    solver: Any = None,
    window: int | None = None,
    levels: Sequence[int] | str | None = None,
    mean: Tensor | None = None,
    variance: Tensor | None = None,
) -> Sample:
    """The images x_0 that the chain makes of the latents x_T.

    x_{k+1} = a_k x_k + c_k ε(x_k, t_k) + σ_k n_k (Song et al. 2021, Eq. 12), either one step after the other
    ("sequential") or as the fixed point of all steps together ("parallel"; Pokle et al. 2022, Eq. 10, split linearly).
    Both give the same images, to the error asked for, which is measured on what is returned
    (`diffusion.methods.defects`). "auto" takes whichever should be faster here: it times a few model calls, once per
    model, batch size and device, and counts rounds and evaluations (`diffusion.methods.fastest`). So what it does
    depends on the machine; fix `method` and `levels` for the same computation everywhere.

    Args:
        model: model(x, t, *inputs), x (N, …), t (N,) int64 → same shape as x; `prediction` says of what.
        latent: (B, …) x_T, usually standard normal.
        chain: from `Schedule.chain`.
        prediction: "epsilon", "v" or "sample".
        error: the relative error of x_0 against sequential sampling that is asked for, a number or (B,), each image's
            own. None is 1e-3, or five times the machine epsilon of the network where that is more: no parallel
            sampling of a network in that precision is better, and what is asked for beyond ends STALLED there.
        splitting: "v", "epsilon", "gaussian" (with `mean` and `variance`, the data's, of the shape of an image), κ (T,)
            or (T, D), or a `Splitting`: `Splitting.fitted` makes one of images, per pixel, frequency or covariance.
        inputs: per-image conditioning (B, …), gathered for the rows that are evaluated.
        gradient: None; Implicit() for the exact gradient with respect to x_T, inputs and parameters, by one
            sweep back over the steps; Implicit(solver=Anderson(2, coupling="causal")) for the same with all steps at
            once, to its `stop`; Phantom(steps, damping) for the approximate one. See `diffusion.gradients`.
        edit: edit(x, k, image) → x, what becomes of the states x (n, …), float64, that k of the T steps leave,
            k = 1 … T, of the images numbered `image` (n,): `Inpaint`, or a function of your own. It must treat images
            alone and answer alike when asked again: every round applies it to all T states in turn, so what calls a
            network belongs in the model, where it is evaluated for all steps at once.
        generator: of the noises n_k when chain.eta > 0, or a list with one for each image, which then has the noises
            that it has alone; they are drawn once, ahead. noises: the noises (B, steps, …).
        group: torch.distributed process group whose ranks share the evaluations of every round; every rank passes the
            same arguments, generators from one seed, and gets the result; progress and callback may differ, and a
            callback that stops one rank stops all. See `diffusion.ranks`.
        max_rounds: model calls in all, first guesses and the measurement of the error included; None is no limit. What
            is not done by then ends MAX_STEPS. "auto" then takes no time to choose: it is "parallel".
        rows_per_call: evaluations per model call; None is 256 on a CPU, all on a GPU. Calls of one round count once.
        callback: callback(round, trajectory, residual) after each round that evaluates every step of the full chain; a
            true return stops there, before the error is measured. Of sequential sampling, `edit` sees every state.
        solver: of all steps together; Anderson(2, coupling="causal"). Nodes have `diffusion.methods.secants`.
        window: time steps evaluated at once, at most; None is all, or 100 for a chain that clips, whose
            clipped pixels are stiff: far ahead of the front their remainders are of no use yet.
        levels: step counts of coarser chains solved first, coarsest first; () is none: every step in every round, but
            for the first two, which evaluate a few time steps (`diffusion.methods.nodes`) where "nodes" could be had.
            "nodes": the nonlinear work on a few time steps and every step evaluated once, which saves most of the
            evaluations (`diffusion.methods.passes`; it needs eta = 0, no edit and no window). None is "nodes" for
            chains of 250 steps and more that allow it, else ().

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
    check_settings(
        counts={"rows_per_call": rows_per_call, "window": window}, solver=solver,
        tensors={"noises": noises, "mean": mean, "variance": variance}, functions={"edit": edit, "callback": callback},
    )  # fmt: skip
    if isinstance(splitting, Splitting) and splitting.basis is not None:
        return _in_basis(
            model, latent, chain, prediction, splitting, edit, callback, noises, method=method, error=error,
            solver=solver, max_rounds=max_rounds, window=window, generator=generator, group=group, progress=progress,
            inputs=inputs, gradient=gradient, levels=levels, rows_per_call=rows_per_call,
        )  # fmt: skip
    check_arguments(model, latent, "latent", chain, prediction, inputs)
    run = Sampler.of(
        model, latent, chain, prediction, splitting, generator, group, inputs, mean, variance, rows_per_call, edit,
        noises,
    )  # fmt: skip
    if gradient is not None and not isinstance(gradient, (Implicit, Phantom)):
        raise TypeError(f"gradient: None, Implicit() or Phantom() is required, got {type(gradient).__name__}")
    check_gradient(gradient, edit)
    if callback is not None and method != "parallel":
        raise ValueError('callback: of the rounds of method="parallel"; with "sequential" edit= sees every state')
    goal = Goal.of(run, error, max_rounds)
    bar = progress_bar(progress, "sampling", "round")
    try:
        with torch.no_grad():
            way, counts = _way(run, method, goal, window, levels)
            solve = partial(_solve, run, goal, way, counts, solver or SOLVER, window, bar, callback)
            if method == "auto" and levels is None and group is None and len(latent) and max_rounds is None:
                solve = partial(timed, run, way, len(nodes(len(chain))), solve)
            found, rounds = solve()
    finally:
        bar.close()
    return _finish(run, goal, found, rounds, way, latent, inputs, gradient)


def _solve(
    run: Sampler, goal: Goal, way: str, counts: Sequence[int], solver: Any, window: int | None, bar: Any, callback: Any
) -> tuple[Found, int]:
    """What a way of sampling finds, and its rounds."""
    before, found = run.map.network.calls, Found.nothing(run)
    if way == "sequential":
        found.x, _, _, found.evaluations = run.sequential(bar)
        found.error = torch.zeros_like(found.error)
    elif way == "nodes":
        Passes(run, goal, solver, bar, callback, found).solve()
    else:
        together = Together(run, goal, solver, _front(run, window), _front(run, window), bar, callback, found)
        together.solve(together.start(counts), run.image)
    found.judged(goal)
    return found, run.map.network.calls - before


def _finish(
    run: Sampler, goal: Goal, found: Found, rounds: int, way: str, latent: Tensor, inputs: Sequence[Tensor],
    gradient: Implicit | Phantom | None,
) -> Sample:  # fmt: skip
    """The result, with the gradient that was asked for."""
    solution, trajectory = None if way == "sequential" else found.solution(rounds), found.x
    if isinstance(gradient, Implicit):
        trajectory = through_chain(run.map, trajectory, latent, list(inputs), run.noise, gradient, solution)
    elif isinstance(gradient, Phantom):
        trajectory = through_phantom(run.map, trajectory, latent, list(inputs), run.drift, gradient)
    images = trajectory.to(latent.dtype).unflatten(2, latent.shape[1:])
    converged = found.status == int(Status.CONVERGED)
    return Sample(images[:, -1], images, solution, rounds, found.evaluations, found.error, converged)


def _in_basis(
    model: Model, latent: Tensor, chain: Chain, prediction: str, splitting: Splitting, edit: Edit | None, callback: Any,
    noises: Tensor | None, *, generator: Any, inputs: Sequence[Tensor], **options: Any,
) -> Sample:  # fmt: skip
    """`sample` in the splitting's basis, its result rotated back."""
    check_arguments(model, latent, "latent", chain, prediction, inputs)
    Q, D = splitting.basis, latent.shape[1:].numel()
    if Q is None or Q.shape != (D, D):
        raise ValueError(f"splitting: a basis ({D}, {D}) is required, got {None if Q is None else tuple(Q.shape)}")
    if chain.clip is not None:
        raise ValueError("splitting: a basis and a chain that clips go ill together: clipping is per pixel")
    if noises is None and chain.eta > 0:
        noises = draw((len(latent), len(chain), *latent.shape[1:]), generator, latent.device)
    out = sample(
        Rotated(model, Q, model_dtype(model, latent.dtype)), rotate(latent, Q), chain, prediction=prediction,
        splitting=replace(splitting, basis=None), inputs=inputs, edit=rotated_edit(edit, Q),
        callback=rotated_callback(callback, Q), noises=None if noises is None else rotate_states(noises, Q), **options,
    )  # fmt: skip
    trajectory = rotate_states(out.trajectory, Q.T)
    return replace(out, x_0=trajectory[:, -1], trajectory=trajectory)


def _front(run: Sampler, window: int | None) -> int | None:
    """Time steps that a solve evaluates at once."""
    return CLIPPED_WINDOW if window is None and run.map.chain.clip is not None else window


def _way(
    run: Sampler, method: str, goal: Goal, window: int | None, levels: Sequence[int] | str | None
) -> tuple[str, Sequence[int]]:
    """How to sample: "sequential", "together" or on "nodes"; and the step counts of coarser chains."""
    T = len(run.map.chain)
    if method not in METHODS:
        raise ValueError(f"method: one of {', '.join(METHODS)} is required, got {method!r}")
    if isinstance(levels, str) and levels != "nodes":
        raise ValueError(f'levels: step counts, "nodes" or None is required, got {levels!r}')
    if levels is not None and not isinstance(levels, (str, Sequence)):
        raise TypeError(f'levels: step counts, "nodes" or None is required, got {levels!r}')
    able = possible(run, _front(run, window))
    if levels == "nodes" and not able:
        raise ValueError('levels: "nodes" needs eta = 0, no edit, no window and a chain of at least 60 steps')
    if method == "sequential":
        if goal.max_rounds is not None and goal.max_rounds < T:
            raise ValueError(f"max_rounds: at least {T}, the steps, is required of sequential, got {goal.max_rounds}")
        return method, ()
    if isinstance(levels, str):
        return levels, ()
    if levels is not None:
        return "together", run.levels(levels)
    auto = method == "auto" and goal.max_rounds is None
    if auto and run.map.chain.clip is not None:
        return "sequential", ()  # what clipping costs is not in the counts that the choice rests on
    if auto and run.map.network.group is None and len(run.x_T):
        return cheapest(run, len(nodes(T)) if able else None), ()
    return ("nodes" if able and T >= LONG else "together"), ()
