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

from .chain import Chain, Splitting
from .methods.visits import Visits
from .models.answers import checked, explained, warn_of_training
from .models.calls import Calls, FixedRows, filled
from .ranks import evaluate_shared
from .trajectory import Edit, EditedChain, LinearChain, TwoStepChain

SMALLEST_SCALE = 1e-3

Model = Callable[..., Tensor]


@dataclass(eq=False)
class Network:
    """The model's own prediction, in its dtype and in calls of at most `rows` rows (`diffusion.models.calls`).

    Attributes:
        basis: Q (D, D) or None: states are y = Qᵀ x, the model is asked at x and its answer turned to y. DDIM's steps
            commute with a rotation of all states, so nothing else of a chain knows.
        calls: rounds, in however many portions each.
    """

    model: Model
    prediction: str
    shape: torch.Size  # of one image
    dtype: torch.dtype
    rows: int | FixedRows | None = None
    group: Any = None
    basis: Tensor | None = None
    calls: int = field(default=0, init=False)
    portions: Calls = field(init=False)

    def __post_init__(self) -> None:
        self.portions = Calls(self.rows, self.shape.numel())
        warn_of_training(self.model)

    def __call__(self, x: Tensor, t: Tensor, conditioning: Sequence[Tensor] = (), alone: bool = False) -> Tensor:
        """What the model says, in the dtype of the states x (n, D), or (n, …) as images; t (n,), conditioning (n, …).

        alone: by this rank, whatever the group, and in the dtype that the model answers in.
        """
        self.calls += not alone
        if self.group is not None and not alone and not torch.is_grad_enabled():
            own = lambda x, t, *conditioning: self(x, t, conditioning, alone=True)  # noqa: E731
            return evaluate_shared(own, [x, t, *conditioning], self.group).to(x.dtype)
        rows, n = [x, t, *conditioning], x.shape[0]

        def one(part: slice) -> Tensor:  # indexing all rows would cost as much as an operation on them
            if part.stop - part.start == n:
                return self._portion(rows)
            return self._portion([row[part] for row in rows]).clone()  # the next call may answer into the same memory

        # a graph that is kept frees nothing between portions: whoever asked for it makes them smaller
        parts = self.portions.each(n, x.device, one, retry=not torch.is_grad_enabled())
        out = torch.cat(parts) if len(parts) > 1 else parts[0] if parts else x.new_empty(x.shape)
        return out if alone else out.to(x.dtype, copy=len(parts) == 1)

    def stepping(self, x: Tensor) -> Callable[..., Tensor]:
        """`__call__` for states like x (n, …); where that is the model's answer to all rows at once, nothing but that.

        All else that a call does takes a twentieth of the time of a small network.
        """
        n, calls = x.shape[0], self.portions
        alone = self.group is None and self.basis is None and calls.fixed is None and x.shape[1:] == self.shape
        if not alone or not 0 < n <= calls.most(x.device):
            return self

        def step(x: Tensor, t: Tensor, conditioning: Sequence[Tensor] = ()) -> Tensor:
            if calls.fitting is not None and calls.fitting < n:
                return self(x, t, conditioning)
            try:
                value = self._answer(x.to(self.dtype, copy=True), t, conditioning)
            except torch.OutOfMemoryError:
                return self(x, t, conditioning)
            self.calls += 1
            return value.to(x.dtype, copy=True)

        return step

    def _portion(self, rows: list[Tensor]) -> Tensor:
        """One call of the model, on states x (n, D) or (n, …), t and the conditioning."""
        fixed, n = self.portions.fixed, rows[0].shape[0]
        x, t, *inputs = rows if fixed is None else filled(rows, fixed)
        flat = x.dim() == 2
        if self.basis is not None:
            x = rotate(x.to(self.basis.dtype), self.basis.T)
        state = x.to(self.dtype, copy=True)  # the model may write into it
        value = self._answer(state.reshape(-1, *self.shape) if flat else state, t, inputs)
        value = value if fixed is None else value[:n]
        value = value.flatten(1) if flat else value
        return value if self.basis is None else rotate(value.to(self.basis.dtype), self.basis)

    def _answer(self, x: Tensor, t: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        """What the model says of images x (n, …), checked."""
        try:
            value = self.model(x, t, *inputs)
        except (TypeError, RuntimeError, ValueError, IndexError) as error:
            told = None if isinstance(error, torch.OutOfMemoryError) else explained(error, x, t, inputs)
            if told is None:
                raise
            raise told from error
        if type(value) is Tensor and value.shape == x.shape and value.dtype == x.dtype and value.device == x.device:
            return value
        return checked(value, x)


def rotate(x: Tensor, Q: Tensor) -> Tensor:
    """x (n, …), its entries as one row each times Q (D, D), in the dtype of x, or float32 where that is wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide).flatten(1) @ Q.to(x.device, wide)).reshape(x.shape).to(x.dtype)


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

    def __post_init__(self) -> None:
        self.evaluations = torch.zeros(0, dtype=torch.int64)
        self.reading = self.chain.reading(self.network.prediction)

    def __call__(
        self, N: Tensor, image: Tensor, base: Tensor, *conditioning: Tensor, wanted: Tensor | None = None
    ) -> Tensor:
        """N' (n, T, D) where `wanted` (n, T), N elsewhere. image (n,) numbers the images; base (n, T+1, D)."""
        N = N if self.scale is None else N / self.scale
        x, i, k = self.visited(N, image, base, wanted)
        states = x[i, k]
        value = self.without_linear(self.epsilon(states, k, [c[i] for c in conditioning]), states, k)
        if self.visits is not None:
            self.visits.note(image[i], k, states, value)
        out = N.clone()
        out[i, k] = value
        return out if self.scale is None else out * self.scale

    def visited(self, N: Tensor, image: Tensor, base: Tensor, wanted: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The states (n, T, D) that N makes, without `scale`; images i and steps k (m,) that are `wanted`, None is all.

        Counts the evaluations.
        """
        x = self.linear.trajectory(base, N, image)[:, self.shift : self.shift + N.shape[1]]
        if wanted is None:
            wanted = torch.ones(N.shape[:2], dtype=torch.bool, device=N.device)
        if self.linear.given:  # by the pair of states that the chain starts from
            wanted = wanted.clone()
            wanted[:, : self.linear.given] = False
        i, k = wanted.nonzero(as_tuple=True)
        self.evaluations.index_add_(0, image[i], torch.ones_like(i))
        return x, i, k

    @property
    def unit(self) -> Tensor:
        """`scale` (T, 1), or ones."""
        return torch.ones_like(self.chain.c)[:, None] if self.scale is None else self.scale

    def says(self, x: Tensor, k: Tensor, conditioning: Sequence[Tensor] = (), t: Tensor | None = None) -> Tensor:
        """ε (n, D) at states x (n, D) of steps k (n,), −x̂_0 where there is no signal; before any clipping.

        t: the time steps of k, where they are at hand.
        """
        t = self.chain.timesteps[k] if t is None else t
        return self.reading.read(x, k, self.network(self.reading.asked(x, k), t, conditioning))

    def epsilon(self, x: Tensor, k: Tensor, conditioning: Sequence[Tensor] = (), t: Tensor | None = None) -> Tensor:
        """e (n, D) at states x (n, D) of steps k (n,): the step is a x + c e, e = ε or what clipping makes of it."""
        return self.chain.held(x, self.says(x, k, conditioning, t), k)

    def without_linear(self, e: Tensor, x: Tensor, k: Tensor) -> Tensor:
        """N = e − κ x − b (n, D) at states x (n, D) of steps k (n,)."""
        split, N = self.splitting, e - self.splitting.kappa[k] * x
        return N if split.offset is None else N - split.offset[k]

    def remainder(self, x: Tensor, k: Tensor, conditioning: Sequence[Tensor] = ()) -> Tensor:
        """N (n, D) at states x (n, D) of steps k (n,), asked of the network."""
        return self.without_linear(self.epsilon(x, k, conditioning), x, k)


def forward_map(
    network: Network, chain: Chain, splitting: Splitting, edit: Edit | None, given: int = 0
) -> tuple[Remainders, Tensor | None]:
    """The map of the chain read from noise to image, and its drift c_k b_k + c'_k b_{k−1} (1, T, D) or None.

    given: 1 where a two-step chain's second state is given.
    """
    a, c, a_before, c_before = (part[:, None] for part in chain.coefficients)
    A = a + c * splitting.kappa
    linear = LinearChain(A, c) if edit is None else EditedChain(A, c, edit, network.shape)
    if chain.past is not None:
        linear = TwoStepChain(A, c, a_before + c_before * splitting.kappa.roll(1, 0), c_before, given)
    drift = None if splitting.offset is None else linear.added(splitting.offset[None])
    return Remainders(network, chain, splitting, linear, scale=scale_of(chain)), drift


def scale_of(chain: Chain) -> Tensor:
    """σ_k/√(α_k² + σ_k²) (T, 1), never quite 0: the unit of the remainders in a solve.

    An error δ of a state of unit variance changes ε there by about δ/σ, and x_0 by δ. So equal tolerances of σ ε, not
    of ε, ask for the same accuracy of x_0 at every step; of ε they would make the steps next to the image wait for
    digits nobody sees.
    """
    return (chain.before[1] / chain.size[:-1]).clamp_min(SMALLEST_SCALE)[:, None]


def move(chain: Chain, splitting: Splitting, device: torch.device) -> tuple[Chain, Splitting]:
    """Both on `device`."""
    if chain.signal.device != device:
        chain = chain.at(torch.arange(len(chain), device=chain.signal.device), device)
    offset = None if splitting.offset is None else splitting.offset.to(device)
    return chain, Splitting(splitting.kappa.to(device), offset)


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
