"""The chain as a fixed point in its remainders, and the one place that calls the model.

The unknown is N (B, T, D), the part of ε that the splitting leaves: N_k = ε(x_k, t_k) − κ_k x_k − b_k. Given N the
trajectory x is linear in it (`LinearChain`), so the map N ↦ x ↦ N' has the chain as its only fixed point, and N'_k
depends on the earlier N_j alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .basis import Rotated
from .chain import Chain, LinearChain, Splitting
from .methods.visits import Visits
from .models.answers import ask, warn_of_training
from .ranks import evaluate_shared

CPU_ROWS = 256  # rows per model call on a CPU: enough to use it fully, few enough to stay in its caches

Model = Callable[..., Tensor]


@dataclass(eq=False)
class Network:
    """A model of any prediction type, asked in its own dtype and in calls of at most `rows` rows."""

    model: Model
    prediction: str
    shape: torch.Size  # of one image
    dtype: torch.dtype
    rows: int | None = None
    group: Any = None
    calls: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        warn_of_training(self.model.model if isinstance(self.model, Rotated) else self.model)

    def answer(self, x: Tensor, t: Tensor, conditioning: Sequence[Tensor] = ()) -> Tensor:
        """What the model says (n, D) of x (n, D) at time steps t (n,), in the dtype of x; conditioning (n, …)."""
        self.calls += 1
        shared = self.group is not None and not torch.is_grad_enabled()
        out = (
            evaluate_shared(self._local, [x, t, *conditioning], self.group)
            if shared
            else self._local(x, t, *conditioning)
        )
        return out.to(x.dtype)

    def _local(self, x: Tensor, t: Tensor, *conditioning: Tensor) -> Tensor:
        """The model's own prediction (n, D), in the dtype it answers in."""
        most = self.rows or (CPU_ROWS if x.device.type == "cpu" else max(1, len(x)))
        parts = []
        for at in range(0, len(x), most):
            part = slice(at, at + most)
            image = x[part].to(self.dtype).reshape(-1, *self.shape)
            parts.append(ask(self.model, image, t[part], [c[part] for c in conditioning]).flatten(1))
        return torch.cat(parts) if parts else x.new_empty(x.shape)


@dataclass(eq=False)
class Remainders:
    """The map N ↦ N' of one chain; what `pydeqsolve.solve` is given.

    Attributes:
        evaluations: (B,) model rows spent on each image so far.
        linear: from N to x_0 … x_T.
        scale: (T, 1), the unit of N in what `solve` sees, which is scale·N; None is 1.
        visits: told of every evaluation, if given.
    """

    network: Network
    chain: Chain
    splitting: Splitting
    linear: LinearChain
    shift: int = 0  # N_k is read off state k + shift: 0 for sampling, 1 for inversion, where it is the step's own end
    scale: Tensor | None = None
    visits: Visits | None = None

    def __call__(
        self, N: Tensor, image: Tensor, base: Tensor, *conditioning: Tensor, wanted: Tensor | None = None
    ) -> Tensor:
        """N' (n, T, D) where `wanted` (n, T), N elsewhere. image (n,) numbers the images; base (n, T+1, D)."""
        if self.scale is None:
            return self.evaluate(N, image, base, conditioning, wanted)[1]
        return self.evaluate(N / self.scale, image, base, conditioning, wanted)[1] * self.scale

    def evaluate(
        self, N: Tensor, image: Tensor, base: Tensor, conditioning: Sequence[Tensor], wanted: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The states (n, T, D) that N makes, and N' there; N as it is, without `scale`."""
        x = self.linear.trajectory(base, N, image)[:, self.shift : self.shift + N.shape[1]]
        if wanted is None:
            wanted = torch.ones(N.shape[:2], dtype=torch.bool, device=N.device)
        i, k = wanted.nonzero(as_tuple=True)
        self.evaluations.index_add_(0, image[i], torch.ones_like(i))
        out, states = N.clone(), x[i, k]
        out[i, k] = value = self.remainder(states, k, [c[i] for c in conditioning])
        if self.visits is not None:
            self.visits.note(image[i], k, states, value)
        return x, out

    @property
    def unit(self) -> Tensor:
        """`scale` (T, 1), or ones."""
        return torch.ones_like(self.chain.c)[:, None] if self.scale is None else self.scale

    def __post_init__(self) -> None:
        self.evaluations = torch.zeros(0, dtype=torch.int64)
        self.reading = self.chain.reading(self.network.prediction)

    def says(self, x: Tensor, k: Tensor, conditioning: Sequence[Tensor] = ()) -> Tensor:
        """ε (n, D) at states x (n, D) of steps k (n,), −x̂_0 where there is no signal; before any clipping."""
        answer = self.network.answer(self.reading.asked(x, k), self.chain.timesteps[k], conditioning)
        return self.reading.read(x, k, answer)

    def epsilon(self, x: Tensor, k: Tensor, conditioning: Sequence[Tensor] = ()) -> Tensor:
        """e (n, D) at states x (n, D) of steps k (n,): the step is a x + c e, e = ε or what clipping makes of it."""
        return self.chain.held(x, self.says(x, k, conditioning), k)

    def remainder(self, x: Tensor, k: Tensor, conditioning: Sequence[Tensor] = ()) -> Tensor:
        """N (n, D) at states x (n, D) of steps k (n,)."""
        split, eps = self.splitting, self.epsilon(x, k, conditioning)
        eps = eps - split.kappa[k] * x
        return eps if split.offset is None else eps - split.offset[k]


def move(chain: Chain, splitting: Splitting, device: torch.device) -> tuple[Chain, Splitting]:
    """Both on `device`."""
    moved = chain.at(torch.arange(len(chain), device=chain.signal.device), device)
    offset = None if splitting.offset is None else splitting.offset.to(device)
    return moved, Splitting(splitting.kappa.to(device), offset)


def reachable(rtol: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """rtol, no smaller than what a network computing in `dtype` can meet; 0 stays 0.

    Below its rounding the network is a step function: no residual shrinks there, and every step would wait to be exact.
    """
    least = rounding(dtype)
    if isinstance(rtol, Tensor):
        return torch.where(rtol > 0, rtol.clamp_min(least), rtol)
    return max(rtol, least) if rtol > 0 else rtol


def rounding(dtype: torch.dtype) -> float:
    """Half the machine epsilon: what a network computing in `dtype` rounds its answer by, relative to it."""
    return torch.finfo(dtype).eps / 2
