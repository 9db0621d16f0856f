"""Inversion: which latent x_T does the chain turn into this image?"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pydeqsolve import Status

from .arguments import check_settings, progress_bar
from .chain import Chain, Splitting
from .checks import integer
from .gradients import check_gradient
from .inversion.algebra import read
from .inversion.descent import Descent, Epoch
from .inversion.exact import Exact
from .inversion.loss import Best, Call, default_error
from .inversion.noise_maps import NoiseMaps
from .inversion.one_pass import OnePass
from .methods.parallel import Parallel
from .methods.sequential import Sequential
from .models.answers import check_generator
from .models.calls import FixedRows, check_rows
from .problem import ChainProblem
from .remainder import Model

Method = OnePass | Exact | Descent | NoiseMaps
NAMED: dict[str, Method] = {
    "ddim": OnePass(), "naive": Descent(through=Sequential()), "deq": Descent(through=Parallel()), "exact": Exact(),
    "ddpm": NoiseMaps(),
}  # fmt: skip
METHODS = tuple(name for name, method in NAMED.items() if not isinstance(method, NoiseMaps))  # of chains of eta = 0
PIXELS = (1, 3)  # channels of pictures; latents of an autoencoder have four and more, as a rule
RANGE = 1.5  # no pixel of a picture scaled to [−1, 1], or sampled from a model of such, is further out


@dataclass(eq=False, repr=False)
class Inversion:
    """What `invert` returns, per image.

    Attributes:
        x_T: (B, …) the latent of least loss that was found, dtype of x_0; of a chain with rule="belm" its first state,
            float64.
        second: (B, …) float64, the second state of a chain with rule="belm"; None of others.
        noises: (B, T, …) float64 of NoiseMaps(), with which `sample(model, x_T, chain, noises=noises)` gives x_0 back,
            noisiest first; None of the other methods.
        loss: (B,) float64, ‖x̂_0 − x_0‖²_F of the image x̂_0 sampled from exactly that x_T; over more than 100 steps all
            at once, to a tenth of the error asked for.
        history: (epochs, B) float64, the loss of every epoch; for Exact() the residual of every round of its solves, as
            a root mean square error per entry of the image, NaN where an image took no part.
        status: (B,) int64 of `pydeqsolve.Status`: CONVERGED where √(loss/D), and what sampling may be off by
            besides, is within the error asked for, NONFINITE where the loss is not finite, STALLED where Exact() gave
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
    second: Tensor | None = None
    noises: Tensor | None = None

    @property
    def latent(self) -> Tensor | tuple[Tensor, Tensor]:
        """What `sample` makes the images of: x_T, or the pair of states that a chain with rule="belm" starts from."""
        return self.x_T if self.second is None else (self.x_T, self.second)

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
    method: str | Method = "exact",
    *,
    prediction: str = "epsilon",
    splitting: str | Tensor | Splitting | None = None,
    inputs: Sequence[Tensor] = (),
    error: float | None = None,
    max_rounds: int | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    state: Mapping[str, Tensor] | None = None,
    callback: Callable[[Epoch], Any] | None = None,
    progress: bool = False,
    rows_per_call: int | FixedRows | None = None,
) -> Inversion:
    """The latents x_T from which the chain samples the images x_0.

    Args:
        model, chain, prediction, inputs, rows_per_call: as in `sample`.
        x_0: (B, …) images.
        method: an object or its name.
            OnePass(), "ddim": the chain read backwards with ε taken one state too early; T evaluations, approximate.
            Exact(solver, nearest), "exact": x_k = (x_{k+1} − c_k (b_k + N(x_k))) / A_k, as fixed points: each stiff
                step next to the image by itself, then every other k at once, on a coarse time grid first; where the
                image sampled from that is not yet as near as asked, every step by itself (`diffusion.inversion.exact`).
            Descent(through, epochs, lr, optimizer, gradient): Adam on x_T; "naive" is Descent(through=Sequential()),
                "deq" Descent(through=Parallel()), a parallel solve per epoch (`diffusion.inversion.descent`).
            A chain with rule="belm" is read by algebra, exactly: by OnePass() one state after the other, by Exact() all
            together, to the network's precision. `Inversion.latent` is then a pair of states.
            NoiseMaps(), "ddpm": of a chain of eta > 0, whose states are drawn around x_0; the noise between them makes
                the image again, and edits of it at any guidance (`diffusion.inversion.noise_maps`). All others are of
                eta = 0.
        splitting: as in `sample`, without a basis; None is "v", and for Exact() what removes most of the noise,
            κ = 0.85 σ/(σ² + 0.01).
        error: √(loss/D), the root mean square difference per entry between x_0 and the image sampled from x_T, in the
            unit of x_0, that makes an image CONVERGED. None is 1e-6 where model and x_0 are in float64, 5e-6 in
            float32, half the machine epsilon in 16 bits. Exact() goes on until it is measured, or no longer comes
            nearer; the other methods do what they do, and are judged by it.
        max_rounds: the most model calls one after the other until x_T is found (`rounds`); the sampling that measures
            its loss comes on top (`check`). None is no bound: Exact() then allows each image 1500 + 20·T evaluations
            one after the other, which few need. A descent begins no epoch that might exceed max_rounds.
        generator: of the first x_T of a descent, and of the states of NoiseMaps(); one, or a list with one for each
            image.
        state: `Inversion.state` or an epoch's snapshot; a descent goes on from there, bit for bit.
        callback: of a descent, called with an `Epoch` after each epoch; a true return ends the run.

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
        rows_per_call=rows_per_call,
    )  # fmt: skip


def find_latents(
    model: Model, x_0: Tensor, chain: Chain, method: str | Method = "exact", *, prediction: str = "epsilon",
    splitting: str | Tensor | Splitting | None = None, inputs: Sequence[Tensor] = (), error: float | None = None,
    max_rounds: int | None = None, generator: torch.Generator | Sequence[torch.Generator] | None = None,
    state: Mapping[str, Tensor] | None = None, callback: Callable[[Epoch], Any] | None = None, progress: bool = False,
    rows_per_call: int | FixedRows | None = None,
) -> Inversion:  # fmt: skip
    """`invert` of states of any range, such as an autoencoder's latents."""
    check_rows(rows_per_call)
    check_settings(tensors={}, functions={"callback": callback})
    chosen = _method(method)
    problem = ChainProblem.of(
        model, x_0, chain, name="x_0", prediction=prediction, splitting="v" if splitting is None else splitting,
        inputs=inputs, rows=rows_per_call, fresh=False,
    )  # fmt: skip
    check_generator(generator, len(x_0), x_0.device)
    if problem.map.network.basis is not None:
        raise ValueError("splitting: one with a basis is for sample alone")
    if isinstance(chosen, NoiseMaps) and chain.eta == 0:
        raise ValueError(f"chain: eta > 0 is required by {chosen}, whose maps are the noise that it adds, got 0")
    if chain.eta != 0 and not isinstance(chosen, NoiseMaps):
        raise ValueError(f'chain: eta = 0 is required to invert but by "ddpm" (NoiseMaps()), got {chain.eta}')
    check_rule(chosen, chain)
    max_rounds = _check_budget(error, max_rounds, chosen, chain)
    if chain.clip is not None and chain.eta == 0:
        warnings.warn(CLIPS, stacklevel=3)
    asked = default_error(problem.map.network.dtype, x_0.dtype) if error is None else float(error)
    best = Best(problem, torch.float64 if chain.rule == "belm" else x_0.dtype, asked)
    bar = progress_bar(progress, "inverting", "epoch" if isinstance(chosen, Descent) else "round")
    try:
        own = None if splitting is None else problem.map.splitting
        call = Call(bar, max_rounds, generator, state, callback)
        found = chosen.find(problem, best, call, own) if chain.rule != "belm" else read(problem, best, call, chosen)
    finally:
        bar.close()
    status = torch.where(best.error <= asked, int(Status.CONVERGED), found.status)
    status = torch.where(best.loss.isfinite(), status, int(Status.NONFINITE))
    assert found.history is not None
    return Inversion(
        best.x_T.to(best.dtype).reshape(x_0.shape), best.loss, found.history, status,
        (best.x_T / problem.map.chain.size[0]).square().mean(1),
        found.rounds, found.evaluations + best.rows, found.state, best.check,
        None if best.second is None else best.second.reshape(x_0.shape),
        None if best.noises is None else problem.shaped(best.noises),
    )  # fmt: skip


def _method(method: Any) -> Method:
    """The method of a name, or the one given."""
    if isinstance(method, str):
        if method not in NAMED:
            raise ValueError(f"method: one of {', '.join(NAMED)} is required, got {method!r}")
        return NAMED[method]
    if not isinstance(method, (OnePass, Exact, Descent, NoiseMaps)):
        raise TypeError(f"method: a name, OnePass(), Exact(), Descent() or NoiseMaps() is required, got {method!r}")
    return method


def check_rule(method: Method, chain: Chain) -> None:
    """Raises ValueError where a method cannot read this chain."""
    rule = chain.rule
    if not isinstance(method, (Descent, NoiseMaps)) and bool((chain.a == 0).any()):
        raise ValueError(
            "chain: its one step makes the image of noise that has no signal, and forgets the noise: no latent can be "
            "read off an image; more steps can be inverted"
        )
    if rule == "belm" and isinstance(method, Descent):
        raise ValueError(f'method: chains with rule="belm" are inverted by Exact() or OnePass(), exactly; got {method}')
    if rule == "dpmsolver++2m" and not isinstance(method, Descent):
        raise ValueError(
            f'method: {method} does not read chains with rule="dpmsolver++2m", which do not determine a state from the '
            'next; invert a chain with rule="belm" or "ddim", or descend: Descent(through=Sequential())'
        )
    if isinstance(method, Descent) and isinstance(method.through, Parallel):
        check_gradient(method.gradient, None, rule)


def _check_budget(error: Any, max_rounds: Any, method: Method, chain: Chain) -> int | None:
    """Raises for an error or a number of rounds that cannot be asked for; returns the rounds."""
    if error is not None:
        if isinstance(error, bool) or not isinstance(error, (int, float)):
            raise TypeError(f"error: a number or None is required, got {type(error).__name__}")
        if not 0 < error < math.inf:
            raise ValueError(f"error: a positive, finite number is required, got {error}")
    if max_rounds is not None:
        max_rounds = integer("max_rounds", max_rounds, "an integer or None")
        least = len(chain) if isinstance(method, OnePass) else 1
        if max_rounds < least:
            raise ValueError(f"max_rounds: at least {least} is required by {method}, got {max_rounds}")
    return None if max_rounds is None else int(max_rounds)


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
