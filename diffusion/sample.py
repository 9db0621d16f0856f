"""Sampling: the DDIM chain step by step, or all of it at once as a fixed point."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pydeqsolve import Implicit, Phantom, Solution, Status

from .arguments import check_settings, progress_bar
from .chain import Chain, Splitting
from .gradients import attach, check_gradient
from .methods.fastest import Method, check_method, method_of
from .methods.goal import Goal, Watch
from .models.calls import FixedRows, check_rows
from .problem import ChainProblem
from .ranks import agree
from .remainder import Model
from .trajectory import Edit


@dataclass(eq=False)
class Sample:
    """What `sample` returns.

    Attributes:
        x_0: (B, …) the images, dtype of the latent.
        trajectory: (B, T+1, …), the latent first, the image last.
        solution: of the chain's fixed point, in its remainders; None for sequential sampling.
        rounds: model calls one after the other; first guesses and the measurement of the error too.
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
        evaluations = f"{most}" if least == most else f"{least} to {most}"
        return (
            f"Sample({shape}; {int(self.converged.sum())} of {len(self.x_0)} converged, error at most "
            f"{float(self.error.max()):.1e}; {self.rounds} rounds, {evaluations} evaluations)"
        )


def sample(
    model: Model,
    latent: Tensor | tuple[Tensor, Tensor],
    chain: Chain,
    method: str | Method = "parallel",
    *,
    prediction: str = "epsilon",
    error: float | Tensor | None = None,
    splitting: str | Tensor | Splitting = "v",
    inputs: Sequence[Tensor] = (),
    gradient: Implicit | Phantom | None = None,
    start: Sample | None = None,
    edit: Edit | None = None,
    noises: Tensor | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    group: Any = None,
    max_rounds: int | None = None,
    rows_per_call: int | FixedRows | None = None,
    callback: Callable[[int, Tensor, Tensor], Any] | None = None,
    progress: bool = False,
) -> Sample:
    """The images x_0 that the chain makes of the latents.

    s_{k+1} = a_k s_k + c_k ε(s_k, t_k) + σ_k n_k (Song et al. 2021, Eq. 12) from s_0 = latent to s_T = x_0, one step
    after the other or as the fixed point of all steps together (Pokle et al. 2022, Eq. 10, split linearly). Both give
    the same images, to the error asked for, which is measured on what is returned (`diffusion.methods.defects`).

    Args:
        model: model(x, t, *inputs), x (N, …), t (N,) int64 or float32 as `chain.timesteps` → same shape as x;
            `prediction` says of what.
        latent: (B, …), standard normal noise times `chain.init_noise_sigma`; or, of a chain with rule="belm", the first
            two states, as `Inversion.latent` has them.
        chain: from `Schedule.chain`.
        method: `Sequential()`, `Parallel(…)`, all steps in every round, or `CoarseToFine()`, the nonlinear work on a
            coarse time grid and every step evaluated once, which saves most of the evaluations of a long chain. Or a
            name: "sequential"; "parallel", the better of the other two; "auto", `fastest(…)` of all three, which times
            the model once, so that what it does depends on the machine.
        prediction: "epsilon", "v", "sample" or "flow" (ε − x_0).
        error: the relative error of x_0 against sequential sampling that is asked for, a number or (B,), each image's
            own. None is 1e-3, or ten times the machine epsilon of the network where that is more. What the network's
            rounding leaves, at least five times its machine epsilon, no parallel sampling betters: an image of which
            less was asked ends STALLED there, by default too.
        splitting: the linear part of ε that is solved exactly: "v", "epsilon", κ (T,) or (T, D), or a `Splitting`:
            `checkpoint.splitting(chain, basis)`, or `Splitting.fitted` of images, per pixel, frequency or covariance.
        inputs: per-image conditioning (B, …), gathered for the rows that are evaluated.
        gradient: None; Implicit() for the exact gradient with respect to latent, inputs and parameters, by one
            sweep back over the steps; Implicit(solver=Anderson(2, coupling="causal")) for the same with all steps at
            once, to its `stop`; Phantom(steps, damping) for the approximate one. See `diffusion.gradients`.
        start: an earlier result of as many images and steps, of other latents, inputs or guidance, whose trajectory is
            the first guess of a parallel method. It changes the cost, not what is asked of the images.
        edit: edit(x, k, image) → x, what becomes of the states x (n, …), float64, that k of the T steps leave,
            k = 1 … T, of the images numbered `image` (n,): `Inpaint`, or a function of your own. It must treat images
            alone and answer alike when asked again: every round applies it to all T states in turn, so what calls a
            network belongs in the model, where it is evaluated for all steps at once.
        generator: of the noises n_k when chain.eta > 0, or a list with one for each image, which then has the noises
            that it has alone; they are drawn once, ahead. noises: the noises (B, T, …), those of
            the noisiest step first. Step k adds σ_k n_k, and n_k itself where σ_k = 0, as the last step has it that
            ends at the image (`Inversion.noises`); zeros there add nothing.
        group: torch.distributed process group whose ranks share the evaluations of every round; every rank passes the
            same arguments, generators from one seed, and gets the result; progress and callback may differ, and a
            callback that stops one rank stops all. See `diffusion.ranks`.
        max_rounds: model calls in all, first guesses and the measurement of the error included; None is no limit. What
            is not done by then ends MAX_STEPS. "auto" then takes no time to choose: it is "parallel".
        rows_per_call: evaluations per model call, at most; None is 256 on a CPU, elsewhere as many as have 4,194,304
            entries together. Halved, and tried again, where memory does not suffice. `FixedRows(n)`: exactly so many
            in every call, for compiled networks and CUDA graphs. Calls of one round count once.
        callback: callback(round, trajectory, residual) after each round that evaluates every step of the chain; a true
            return stops there, before the error is measured. Of sequential sampling, `edit` sees every state.

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
    check_rows(rows_per_call)
    check_settings(tensors={"noises": noises}, functions={"edit": edit, "callback": callback})
    check_method(method)
    problem = ChainProblem.of(
        model, latent, chain, prediction=prediction, splitting=splitting, inputs=inputs, edit=edit, noises=noises,
        generator=generator, group=group, rows=rows_per_call,
    )  # fmt: skip
    pair = isinstance(latent, tuple)
    check_gradient(gradient, edit, chain.rule, pair)
    latent = latent[0] if isinstance(latent, tuple) else latent
    goal, guess = Goal.of(problem, error, max_rounds), None if start is None else _guess(problem, start, latent)
    if callback is not None and method == "auto":
        raise ValueError('callback: of the rounds of method="parallel"; "auto" may choose to have none')
    watch = Watch(progress_bar(progress, "sampling", "round"), callback)
    try:
        with torch.no_grad():
            chosen = method_of(method, problem, goal)
            goal.before = problem.map.network.calls  # choosing may have called the model too
            found = chosen.find(problem, goal, watch, guess)
    finally:
        watch.bar.close()
    states = attach(problem, found.states, latent, list(inputs), gradient, found.solution)
    images = problem.shaped(states.to(latent.dtype))
    converged = found.status == int(Status.CONVERGED)
    return Sample(images[:, -1], images, found.solution, found.rounds, found.evaluations, found.error, converged)


def _guess(problem: ChainProblem, start: Any, latent: Tensor) -> Tensor:
    """N (B, T, D) of an earlier result."""
    if not isinstance(start, Sample):
        raise TypeError(f"start: a Sample or None is required, got {type(start).__name__}")
    shape = (len(latent), len(problem.map.chain) + 1, *latent.shape[1:])
    if tuple(start.trajectory.shape) != shape:
        raise ValueError(f"start: a trajectory {shape} is required, got {tuple(start.trajectory.shape)}")
    return problem.guess(start.trajectory)
