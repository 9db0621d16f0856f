"""Inversion: which latent x_T does the chain turn into this image?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pydeqsolve import Implicit, Phantom, Status, Stop

from . import exact as exactly
from .arguments import check_arguments, progress_bar
from .chain import Chain, Splitting
from .descent import EPOCHS, LEARNING_RATES, Descent, Epoch
from .exact import Outcome, exact, one_pass
from .remainder import Model
from .sampler import Sampler

METHODS = ("ddim", "naive", "deq", "exact")
LOSS_STOP = Stop(rtol=1e-7, max_steps=1000)  # of the sampling that measures the loss
LONG = 100  # steps up to which that is done one by one
EPOCH_STOP = Stop(rtol=1e-3, max_steps=1000)  # of the solve in each epoch of "deq"
VISIBLE = 0.03  # root mean square error of a pixel, of a range of 2, from which an exact inversion is doubted


@dataclass(eq=False)
class Inversion:
    """What `invert` returns, per image.

    Attributes:
        x_T: (B, …) the latent of least loss that was found.
        loss: (B,) float64, ‖x̂_0 − x_0‖²_F of the image sampled from x_T.
        history: (epochs, B) float64, the loss of every epoch; for "exact" the residual of every round.
        status: (B,) int64 of `pydeqsolve.Status`: of the fixed point for "exact", else MAX_STEPS (epochs have no
            tolerance to meet).
        typicality: (B,) |x_T|²/D, near 1 for a latent that the model would draw; an image that is not like the data has
            its preimage far out, above 1. A coarse chain makes the same image of many latents: which one is found is
            not always the one it was sampled from, however small the loss.
        rounds: model calls one after the other until x_T was found.
        check: calls of the sampling from x_T that then measures the loss.
        evaluations: (B,) model rows per image, the check included.
        state: what `invert(..., state=...)` continues from, as tensors by name.
    """

    x_T: Tensor
    loss: Tensor
    history: Tensor
    status: Tensor
    typicality: Tensor
    rounds: int
    evaluations: Tensor
    state: dict[str, Tensor] = field(default_factory=dict)
    check: int = 0


def invert(
    model: Model,
    x_0: Tensor,
    chain: Chain,
    method: str = "exact",
    *,
    prediction: str = "epsilon",
    epochs: int | None = None,
    lr: float | None = None,
    gradient: Phantom | Implicit | None = None,
    stop: Stop | None = None,
    splitting: str | Tensor | Splitting | None = None,
    solver: Any = None,
    generator: torch.Generator | None = None,
    inputs: Sequence[Tensor] = (),
    mean: Tensor | None = None,
    variance: Tensor | None = None,
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None,
    state: Mapping[str, Tensor] | None = None,
    callback: Callable[[Epoch], Any] | None = None,
    progress: bool = False,
    rows_per_call: int | None = None,
) -> Inversion:
    """The latents x_T from which the chain (eta = 0) samples the images x_0.

    Args:
        model, chain, prediction, inputs, mean, variance, rows_per_call: as in `sample`.
        splitting: as there; None is "v", and for "exact" what removes most of the noise, κ = 0.85 σ/(σ² + 0.01).
        x_0: (B, …) images.
        method:
            "ddim": the chain read backwards with ε taken one state too early; T rows, approximate.
            "exact": x_k = (x_{k+1} − c_k (b_k + N(x_k))) / A_k, as fixed points: each stiff step next to the image by
                itself, then every other k at once, on a few nodes first (`diffusion.exact`). An image that misses its
                tolerance (see status) by a visible error gets the better of this and "ddim".
            "naive": Adam on x_T through the sequential chain (Pokle et al. 2022, Algorithm 1).
            "deq": Adam on x_T, a parallel solve per epoch, warm-started from the last (Algorithms 2 and 3).
        epochs, lr: of "naive" and "deq": 400 epochs; rates 0.3 and 0.1, the best for each. optimizer: makes another
            one than Adam (the papers' choice) from [x_T]; lr is its own affair then.
        gradient: of "deq": Phantom(steps, damping), default Phantom(1, 0.1), or Implicit().
        stop: of "exact": atol bounds the error of a stiff step in its image and the change of ε in the others, which go
            no lower than a tenth of the error that the stiff steps have left, and neither than half the machine
            epsilon of the model's dtype; default 2e-6, or 5e-6 for a model in float32 and less. max_steps, default 36,
            is for the rounds of all together. Of "deq": of every epoch's solve, as in `sample`.
        solver: of the fixed point, Anderson(10) for the steps of "exact" that are not stiff,
            Anderson(2, coupling="causal") for "deq".
        generator: of the first x_T of "naive" and "deq".
        state: `Inversion.state` or an epoch's snapshot; the run goes on from there, bit for bit.
        callback: called with an `Epoch` after each epoch; a true return ends the run.

    Returns:
        Inversion. A NaN image ends with loss NaN and status NONFINITE and changes no other.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, by name.
    """
    check_arguments(model, x_0, "x_0", chain, prediction, inputs)
    if method not in METHODS:
        raise ValueError(f"method: one of {', '.join(METHODS)} is required, got {method!r}")
    if chain.eta != 0:
        raise ValueError(f"chain: eta = 0 is required to invert, got {chain.eta}")
    if gradient is not None and not isinstance(gradient, (Implicit, Phantom)):
        raise TypeError(f"gradient: Phantom(...) or Implicit() is required, got {type(gradient).__name__}")
    target = x_0.detach().double().flatten(1)
    sampler = Sampler.of(
        model, x_0, chain, prediction, "v" if splitting is None else splitting, None, None, inputs, mean, variance,
        rows_per_call,
    )  # fmt: skip
    bar = progress_bar(progress, "inverting", "epoch" if method in EPOCHS else "round")
    try:
        if method in EPOCHS:
            count = EPOCHS[method] if epochs is None else epochs
            if isinstance(count, bool) or not isinstance(count, int) or count < 0:
                raise ValueError(f"epochs: a non-negative integer is required, got {count!r}")
            rate = LEARNING_RATES[method] if lr is None else lr
            descent = Descent.start(sampler, target, method, rate, optimizer, generator, state)
            outcome = descent.run(count, gradient or Phantom(1, 0.1), stop or EPOCH_STOP, solver, callback, bar)
        else:
            with torch.no_grad():
                if method == "ddim":
                    outcome = one_pass(sampler, target)
                else:
                    chosen = None if splitting is None else sampler.map.splitting
                    goal = stop or exactly.default_stop(sampler.map.network.dtype)
                    outcome = exact(sampler, target, chosen, solver or exactly.SOLVER, goal, bar)
        with torch.no_grad():
            return _finish(sampler, target, outcome, x_0)
    finally:
        bar.close()


def _finish(sampler: Sampler, target: Tensor, outcome: Outcome, x_0: Tensor) -> Inversion:
    """Samples from the latents found, which is what the loss is about."""
    B, D = target.shape
    x_T, status = outcome.x_T, outcome.status
    # Short chains are sampled step by step: T rows, and exact; long ones in parallel from what is known of them.
    guess = outcome.N if len(sampler.map.chain) > LONG else None
    sampled, check, rows = sampler.at(x_T).check(guess, LOSS_STOP)
    loss, rounds = (sampled - target).square().sum(1), outcome.rounds
    if status is None:
        status = torch.full((B,), int(Status.MAX_STEPS), device=target.device)
    else:
        doubted = (status != Status.CONVERGED) & ~(loss <= VISIBLE**2 * D) & target.isfinite().all(1)
        x_T, loss, more, extra = _or_one_pass(sampler, target, doubted, x_T, loss)
        rounds, rows = rounds + more, rows + extra
    status = torch.where(loss.isfinite(), status, int(Status.NONFINITE))
    return Inversion(
        x_T.to(x_0.dtype).reshape(x_0.shape), loss, outcome.history, status, x_T.square().sum(1) / D,
        rounds, outcome.evaluations + rows, outcome.state, check,
    )  # fmt: skip


def _or_one_pass(
    sampler: Sampler, target: Tensor, doubted: Tensor, x_T: Tensor, loss: Tensor
) -> tuple[Tensor, Tensor, int, Tensor]:
    """x_T and loss, from one-pass inversion where that is better, of the images doubted (B,); rounds and rows."""
    rows = torch.zeros_like(doubted, dtype=torch.int64)
    at = doubted.nonzero()[:, 0]
    if not len(at):
        return x_T, loss, 0, rows
    part = sampler.pick(at)
    rough = one_pass(part, target[at])
    sampled, rounds, spent = part.at(rough.x_T).check(None, LOSS_STOP)
    rows[at] = rough.evaluations + spent
    rough_loss = (sampled - target[at]).square().sum(1)
    better = ~(loss[at] <= rough_loss)
    x_T, loss = x_T.clone(), loss.clone()
    x_T[at] = torch.where(better[:, None], rough.x_T, x_T[at])
    loss[at] = torch.where(better, rough_loss, loss[at])
    return x_T, loss, rough.rounds + rounds, rows
