"""Inversion: which latent x_T does the chain turn into this image?"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pydeqsolve import Implicit, Phantom, Status

from .arguments import check_arguments, check_settings, progress_bar
from .chain import Chain, Splitting
from .checks import real
from .inversion import exact as exactly
from .inversion.descent import EPOCHS, LEARNING_RATES, Descent, Epoch
from .inversion.exact import Outcome, exact, one_pass
from .inversion.loss import Best, default_error
from .remainder import Model
from .sampler import Sampler

METHODS = ("ddim", "naive", "deq", "exact")
PIXELS = (1, 3)  # channels of pictures; latents of an autoencoder have four and more, as a rule
RANGE = 1.5  # no pixel of a picture scaled to [−1, 1], or sampled from a model of such, is further out


@dataclass(eq=False, repr=False)
class Inversion:
    """What `invert` returns, per image.

    Attributes:
        x_T: (B, …) the latent of least loss that was found, dtype of x_0.
        loss: (B,) float64, ‖x̂_0 − x_0‖²_F of the image x̂_0 sampled from exactly that x_T; over more than 100 steps all
            at once, to a tenth of the error asked for.
        history: (epochs, B) float64, the loss of every epoch; for "exact" the residual of every round of its solves, as
            a root mean square error per entry of the image, NaN where an image took no part.
        status: (B,) int64 of `pydeqsolve.Status`: CONVERGED where √(loss/D), and what sampling may be off by
            besides, is within the error asked for, NONFINITE where the loss is not finite, STALLED where "exact" gave
            up because the loss no longer fell, MAX_STEPS where the rounds, the epochs or the one pass were over.
        typicality: (B,) |x_T|²/D, over α² + σ² of the chain's first state; near 1 for a latent that the model would
            draw. A chain makes almost any image, of a latent further out: compare with real images that the same chain
            inverts, not with 1.
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

    @property
    def error(self) -> Tensor:
        """(B,) √(loss/D), the root mean square error of an entry of the image."""
        return (self.loss / self.x_T[:1].numel()).sqrt() if len(self.loss) else self.loss

    @property
    def converged(self) -> Tensor:
        """(B,) bool: the image sampled from x_T was measured to be within the error asked for."""
        return self.status == Status.CONVERGED

    def __repr__(self) -> str:
        loss = f"{self.loss.median():.1e} (most {self.loss.max():.1e})" if len(self.loss) else "none"
        rows = f"{self.evaluations.double().mean():.0f}" if len(self.loss) else "no"
        return (
            f"Inversion(x_T {tuple(self.x_T.shape)}, loss {loss}, {int(self.converged.sum())} of {len(self.loss)} "
            f"converged, {self.rounds} rounds + {self.check}, {rows} evaluations an image)"
        )


def invert(
    model: Model,
    x_0: Tensor,
    chain: Chain,
    method: str = "exact",
    *,
    prediction: str = "epsilon",
    splitting: str | Tensor | Splitting | None = None,
    inputs: Sequence[Tensor] = (),
    error: float | None = None,
    max_rounds: int | None = None,
    generator: torch.Generator | None = None,
    state: Mapping[str, Tensor] | None = None,
    callback: Callable[[Epoch], Any] | None = None,
    progress: bool = False,
    rows_per_call: int | None = None,
    epochs: int | None = None,
    lr: float | None = None,
    gradient: Phantom | Implicit | None = None,
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None,
    solver: Any = None,
    mean: Tensor | None = None,
    variance: Tensor | None = None,
) -> Inversion:
    """The latents x_T from which the chain (eta = 0) samples the images x_0.

    Args:
        model, chain, prediction, inputs, mean, variance, rows_per_call: as in `sample`.
        x_0: (B, …) images.
        method:
            "ddim": the chain read backwards with ε taken one state too early; T rows, approximate.
            "exact": x_k = (x_{k+1} − c_k (b_k + N(x_k))) / A_k, as fixed points: each stiff step next to the image by
                itself, then every other k at once, on a few nodes first; where the image sampled from that is not yet
                as near as asked, every step by itself (`diffusion.inversion.exact`).
            "naive": Adam on x_T through the sequential chain (Pokle et al. 2022, Algorithm 1).
            "deq": Adam on x_T, a parallel solve per epoch, warm-started from the last (Algorithms 2 and 3).
        splitting: as in `sample`; None is "v", and for "exact" what removes most of the noise, κ = 0.85 σ/(σ² + 0.01).
        error: √(loss/D), the root mean square difference per entry between x_0 and the image sampled from x_T, in the
            unit of x_0, that makes an image CONVERGED. None is 1e-6 where model and x_0 are in float64, 5e-6 in
            float32, half the machine epsilon in 16 bits. "exact" goes on until it is measured, or no longer comes
            nearer; "ddim" and the descents do what they do, and are judged by it.
        max_rounds: the most model calls one after the other until x_T is found (`rounds`); the sampling that measures
            its loss comes on top (`check`). None is no bound: "exact" then allows each image 1500 + 20·T evaluations
            one after the other, which few need. A descent begins no epoch that might exceed max_rounds.
        generator: of the first x_T of "naive" and "deq".
        state: `Inversion.state` or an epoch's snapshot; the run goes on from there, bit for bit.
        callback: called with an `Epoch` after each epoch; a true return ends the run.
        epochs, lr: of "naive" and "deq": 400 epochs; rates 0.3 and 0.1, the best for each. optimizer: makes another
            one than Adam (the papers' choice) from [x_T]; lr is its own affair then.
        gradient: of "deq": Phantom(steps, damping), default Phantom(1, 0.1), or Implicit().
        solver: of the fixed point, Anderson(10) for the steps of "exact" that are not stiff,
            Anderson(2, coupling="causal") for "deq".

    Returns:
        Inversion. A NaN image ends with loss NaN and status NONFINITE and changes no other.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, by name.

    Warns:
        UserWarning: the chain clips, or pictures (1 or 3 channels) are not scaled to [−1, 1].
    """
    warn_of_range(x_0)
    return find_latents(
        model, x_0, chain, method, prediction=prediction, splitting=splitting, inputs=inputs, error=error,
        max_rounds=max_rounds, generator=generator, state=state, callback=callback, progress=progress,
        rows_per_call=rows_per_call, epochs=epochs, lr=lr, gradient=gradient, optimizer=optimizer, solver=solver,
        mean=mean, variance=variance,
    )  # fmt: skip


def find_latents(
    model: Model, x_0: Tensor, chain: Chain, method: str = "exact", *, prediction: str = "epsilon",
    splitting: str | Tensor | Splitting | None = None, inputs: Sequence[Tensor] = (), error: float | None = None,
    max_rounds: int | None = None, generator: torch.Generator | None = None, state: Mapping[str, Tensor] | None = None,
    callback: Callable[[Epoch], Any] | None = None, progress: bool = False, rows_per_call: int | None = None,
    epochs: int | None = None, lr: float | None = None, gradient: Phantom | Implicit | None = None,
    optimizer: Any = None, solver: Any = None, mean: Tensor | None = None, variance: Tensor | None = None,
) -> Inversion:  # fmt: skip
    """`invert` of states of any range, such as an autoencoder's latents."""
    check_arguments(model, x_0, "x_0", chain, prediction, inputs)
    check_settings(
        counts={"rows_per_call": rows_per_call}, tensors={"mean": mean, "variance": variance}, solver=solver,
        functions={"callback": callback, "optimizer": optimizer},
    )  # fmt: skip
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: a torch.Generator or None is required, got {type(generator).__name__}")
    if lr is not None and real("lr", lr) <= 0:
        raise ValueError(f"lr: a positive number is required, got {lr}")
    if method not in METHODS:
        raise ValueError(f"method: one of {', '.join(METHODS)} is required, got {method!r}")
    if chain.eta != 0:
        raise ValueError(f"chain: eta = 0 is required to invert, got {chain.eta}")
    if gradient is not None and not isinstance(gradient, (Implicit, Phantom)):
        raise TypeError(f"gradient: Phantom(...) or Implicit() is required, got {type(gradient).__name__}")
    _check_budget(error, max_rounds, method, chain)
    if chain.clip is not None:
        warnings.warn(CLIPS, stacklevel=3)
    sampler = Sampler.of(
        model, x_0, chain, prediction, "v" if splitting is None else splitting, None, None, inputs, mean, variance,
        rows_per_call,
    )  # fmt: skip
    target, network = sampler.x_T, sampler.map.network
    asked = default_error(network.dtype, x_0.dtype) if error is None else float(error)
    best = Best(sampler, target, x_0.dtype, asked)
    bar = progress_bar(progress, "inverting", "epoch" if method in EPOCHS else "round")
    try:
        if method in EPOCHS:
            count = EPOCHS[method] if epochs is None else epochs
            if isinstance(count, bool) or not isinstance(count, int) or count < 0:
                raise ValueError(f"epochs: a non-negative integer is required, got {count!r}")
            rate = LEARNING_RATES[method] * float(sampler.map.chain.size[0]) if lr is None else lr
            descent = Descent.start(sampler, target, method, rate, optimizer, generator, state)
            outcome = descent.run(count, max_rounds, gradient or Phantom(1, 0.1), solver, callback, bar)
        with torch.no_grad():
            if method == "exact":
                chosen = None if splitting is None else sampler.map.splitting
                limit = math.inf if max_rounds is None else max_rounds
                outcome = exact(sampler, target, chosen, solver or exactly.SOLVER, asked, limit, best, bar)
            else:
                outcome = one_pass(sampler, target) if method == "ddim" else outcome
                best.offer(outcome.x_T, None, torch.arange(len(target), device=target.device))
    finally:
        bar.close()
    return _report(best, outcome, asked, x_0)


def _report(best: Best, outcome: Outcome, asked: float, x_0: Tensor) -> Inversion:
    """What was measured, in the shape and dtype of the images."""
    status = torch.full_like(outcome.evaluations, int(Status.MAX_STEPS))
    if outcome.exhausted is not None:
        status = torch.where(outcome.exhausted, status, int(Status.STALLED))
    status = torch.where(best.error <= asked, int(Status.CONVERGED), status)
    status = torch.where(best.loss.isfinite(), status, int(Status.NONFINITE))
    return Inversion(
        best.x_T.to(x_0.dtype).reshape(x_0.shape), best.loss, outcome.history, status,
        (best.x_T / best.sampler.map.chain.size[0]).square().mean(1),
        outcome.rounds, outcome.evaluations + best.rows, outcome.state, best.check,
    )  # fmt: skip


def _check_budget(error: Any, max_rounds: Any, method: str, chain: Chain) -> None:
    """Raises for an error or a number of rounds that cannot be asked for."""
    if error is not None:
        if isinstance(error, bool) or not isinstance(error, (int, float)):
            raise TypeError(f"error: a number or None is required, got {type(error).__name__}")
        if not 0 < error < math.inf:
            raise ValueError(f"error: a positive, finite number is required, got {error}")
    if max_rounds is not None:
        if isinstance(max_rounds, bool) or not isinstance(max_rounds, int):
            raise TypeError(f"max_rounds: an integer or None is required, got {type(max_rounds).__name__}")
        least = len(chain) if method == "ddim" else 1
        if max_rounds < least:
            raise ValueError(f'max_rounds: at least {least} is required by method="{method}", got {max_rounds}')


CLIPS = (
    "chain: it clips the images it predicts, which forgets what is cut off: few images have a latent, and the loss "
    "stays visible; invert, and sample from the latent, with a chain that does not clip: a Schedule with clip=None, of "
    "diffusers a scheduler with clip_sample=False and thresholding=False"
)


def warn_of_range(x_0: Any) -> None:
    """Warns of pictures (B, 1 or 3, H, W) that are not scaled to [−1, 1]."""
    if not isinstance(x_0, Tensor) or x_0.dim() != 4 or x_0.shape[1] not in PIXELS or not x_0.numel():
        return
    most = float(x_0.detach().abs().nan_to_num(0.0, 0.0, 0.0).amax())
    if most > RANGE:
        warnings.warn(
            f"x_0: pixels reach {most:.3g}, where a model of images in [-1, 1] knows none beyond 1: scale them, "
            "such as x / 127.5 - 1 of bytes or 2 * x - 1 of [0, 1]",
            stacklevel=3,
        )
