"""The problem of one call as data, and what a method finds of it.

States are s_0, the latent, to s_T, the image; the unknown of the fixed point is N, see `diffusion.remainder`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pydeqsolve import Solution, Status

from .arguments import check_arguments, model_dtype
from .chain import Chain, Splitting
from .models.answers import draw
from .models.calls import FixedRows
from .remainder import Model, Network, Remainders, forward_map, move, rotate
from .trajectory import Edit, EditedChain


@dataclass(frozen=True, eq=False)
class ChainProblem:
    """A chain of T steps with B latents, the arguments checked and moved to float64; D entries an image.

    Attributes:
        map: N ↦ N' of the chain.
        latent: (B, D) float64, detached; of an inversion, the images instead.
        conditioning: (B, …) each.
        drift: (B or 1, T, D), c_k b_k + σ_k n_k; None is 0.
        numbers: (B,) int64, which images of the whole batch these are; None is all.
        second: (B, D), the state after the latent where a two-step chain starts from both; None elsewhere.
    """

    map: Remainders
    latent: Tensor
    conditioning: list[Tensor]
    drift: Tensor | None
    numbers: Tensor | None = None
    second: Tensor | None = None

    @staticmethod
    def of(
        model: Model, latent: Tensor | tuple[Tensor, Tensor], chain: Chain, *, name: str = "latent",
        prediction: str = "epsilon", splitting: str | Tensor | Splitting = "v", inputs: Sequence[Tensor] = (),
        edit: Edit | None = None, noises: Tensor | None = None, generator: Any = None, group: Any = None,
        rows: int | FixedRows | None = None, fresh: bool = True,
    ) -> ChainProblem:  # fmt: skip
        """The problem that arguments of `sample` state; `name` is what the caller calls its latent.

        fresh: whether the noise that a chain of eta > 0 adds is part of it, drawn where none is given.

        Raises:
            TypeError, ValueError: an argument of the wrong kind, by name.
        """
        latent, second = pair_of(latent, name, chain)
        check_arguments(model, latent, name, chain, prediction, inputs)
        if edit is not None and chain.past is not None:
            raise ValueError(f'edit: of chains with rule="ddim" alone, got {chain.rule!r}')
        split = checked_splitting(Splitting.of(splitting, chain), chain, latent.shape[1:].numel())
        wide = torch.promote_types(latent.dtype, torch.float32)
        Q = None if split.basis is None else split.basis.to(latent.device, wide)
        network = Network(model, prediction, latent.shape[1:], model_dtype(model, latent.dtype), rows, group, Q)
        chain, split = move(chain, split, latent.device)
        given = int(second is not None)
        forward, drift = forward_map(network, chain, split, edit if Q is None else rotated(edit, Q), given)
        noise = _scaled_noise(chain, latent, noises, generator, Q) if fresh else None
        drift = drift if noise is None else noise if drift is None else drift + noise
        flat = [x.detach() if Q is None else rotate(x.detach(), Q) for x in (latent, second) if x is not None]
        states = [x.double().flatten(1) for x in flat]
        return ChainProblem(
            forward, states[0], [c.detach() for c in inputs], drift, second=states[-1] if given else None
        )

    @property
    def noise(self) -> Tensor | None:
        """σ_k n_k (B, T, D), None for eta = 0."""
        chain, split = self.map.chain, self.map.splitting
        if chain.eta == 0 or self.drift is None:
            return None  # as of every two-step chain
        return self.drift if split.offset is None else self.drift - chain.c[:, None] * split.offset

    @property
    def image(self) -> Tensor:
        """(B,) int64, the number of each image in the whole batch."""
        return torch.arange(len(self.latent), device=self.latent.device) if self.numbers is None else self.numbers

    def base(self) -> Tensor:
        """What the chain's states are made of besides N (B, T+1, D)."""
        return self.map.linear.base(self.latent, self.drift, self.second).expand(len(self.latent), -1, -1)

    def at(self, latent: Tensor) -> ChainProblem:
        """The same problem for other latents (B, D)."""
        return replace(self, latent=latent)

    def pick(self, images: Tensor) -> ChainProblem:
        """The same problem for some of the images, by position (k,)."""
        drift = self.drift if self.drift is None or len(self.drift) == 1 else self.drift[images]
        conditioning = [c[images] for c in self.conditioning]
        second = None if self.second is None else self.second[images]
        return ChainProblem(self.map, self.latent[images], conditioning, drift, self.image[images], second)

    def shaped(self, states: Tensor) -> Tensor:
        """States (B, n, D) as the caller knows them, (B, n, …)."""
        states = states.unflatten(2, self.map.network.shape)
        Q = self.map.network.basis
        return states if Q is None else rotate(states.flatten(0, 1), Q.T).reshape(states.shape)

    def guess(self, trajectory: Tensor) -> Tensor:
        """N (B, T, D) of which `trajectory` (B, T+1, …) would be made; 0 where a step reads no N."""
        m, Q = self.map, self.map.network.basis
        flat = trajectory.detach().to(self.latent.device)
        flat = flat if Q is None else rotate(flat.flatten(0, 1), Q).reshape(flat.shape)
        s, a, c = flat.flatten(2).double(), m.chain.a[:, None], m.chain.c[:, None]
        step = s[:, 1:] - a * s[:, :-1]
        step = step if self.noise is None else step - self.noise
        if m.chain.past is not None:
            step = without_past(step, s, m.chain)
        N = torch.where(c == 0, 0.0, step / torch.where(c == 0, 1.0, c) - m.splitting.kappa * s[:, :-1])
        N = N if m.splitting.offset is None else N - m.splitting.offset
        return torch.where(N.isfinite().flatten(1).all(1)[:, None, None], N, 0.0)


@dataclass(eq=False)
class Found:
    """What a method has found of the B images, in the end or on the way.

    Attributes:
        states: (B, T+1, D), s_0 the latent to s_T the image; of an inversion (B, 1, D), the latents.
        N: (B, T, D), the remainders that made them; of an inversion (B, 0, D).
        status: (B,) int64 of `pydeqsolve.Status`.
        evaluations: (B,) of the network.
        rounds: calls of the network one after the other.
        steps: (B,) rounds that the image took part in.
        error: (B,) estimate for exactly these states; inf where none was measured.
        residual: (B,) root mean square of the defects, in units of σ ε.
        solution: the same as `pydeqsolve` says it; None for what is no fixed point.
        history: (epochs or rounds, B) of an inversion. state: what it goes on from, as tensors by name.
    """

    states: Tensor
    N: Tensor
    status: Tensor
    evaluations: Tensor
    rounds: int
    steps: Tensor
    error: Tensor
    residual: Tensor
    solution: Solution | None = None
    history: Tensor | None = None
    state: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def of(states: Tensor, N: Tensor, evaluations: Tensor | int = 0, rounds: int = 0) -> Found:
        """States whose error is not known."""
        unknown = states.new_full((len(states),), torch.inf)
        none = torch.zeros(len(states), dtype=torch.int64, device=states.device)
        status = torch.full_like(none, int(Status.MAX_STEPS))
        return Found(states, N, status, none + evaluations, rounds, none, unknown, unknown.clone())

    def note(self, images: Tensor, steps: Tensor, rows: Tensor, residual: Tensor) -> None:
        """Adds rounds and rows (n,) of some images, and puts down their residual."""
        self.steps[images] += steps
        self.evaluations[images] += rows
        self.residual[images] = residual

    def missed(self, images: Tensor, states: Tensor) -> Tensor:
        """By how many times, no less than 1, the images of states (n, T+1, D) are further from those kept than their
        estimate says."""
        kept, image = self.states[images, -1], states[:, -1]
        said = self.error[images] * image.norm(dim=1)
        return ((image - kept).norm(dim=1) / said).nan_to_num(1.0, torch.inf).clamp_min(1.0)

    def take(self, images: Tensor, states: Tensor, N: Tensor, error: Tensor) -> None:
        """Keeps states (n, T+1, D) of some images with their estimate (n,), unless those known are better."""
        better = (error < self.error[images]) | self.error[images].isinf() | error.isnan()
        chosen = images[better]
        self.states[chosen], self.N[chosen], self.error[chosen] = states[better], N[better], error[better]


def in_steps(problem: ChainProblem, bar: Any = None) -> Tensor:
    """The states (B, T+1, D), one step after the other: T model calls, each on B rows.

    Between the calls of a small network whatever is touched has left the processor's caches, and costs several times
    what it does alone: so the loop indexes no tensor and calls no function that it can do without.
    """
    m, noise, conditioning = problem.map, problem.noise, problem.conditioning
    chain, network, linear = m.chain, m.network, m.linear
    clips, two_step, given = chain.clip is not None, chain.rule != "ddim", linear.given
    x = problem.latent if problem.second is None else problem.second
    if network.basis is None and not clips:
        x = x.reshape(-1, *network.shape)  # nothing but the model asks for the shape
    states, before = [problem.latent.view_as(x), x][-1 - given :], x
    a, c, a_before, c_before = (part.tolist() for part in chain.coefficients)
    scale, share, output = (None if part is None else part.tolist() for part in m.reading.parts)
    rows = torch.arange(len(chain), device=x.device)[:, None].expand(-1, len(x))
    ask, edit = network.stepping(x), linear.after if isinstance(linear, EditedChain) else None
    for k, t in enumerate(chain.timesteps[:, None].expand_as(rows).unbind()):
        if k < given:
            continue
        if clips:
            eps = m.epsilon(x, rows[k], conditioning, t)
        else:
            eps = ask(x if scale is None else scale[k] * x, t, conditioning)
            eps = eps if share is None or output is None else share[k] * x + output[k] * eps
        x = a[k] * x + c[k] * eps
        if two_step:
            x = x + a_before[k] * states[-2] + c_before[k] * before if k else x
            before = eps
        if noise is not None:
            x = x + noise[:, k].view_as(x)
        if edit is not None:
            x = edit(x, k, problem.image)
        states.append(x)
        if bar is not None:
            bar.update()
    return torch.stack(states, 1).flatten(2)


def pair_of(latent: Any, name: str, chain: Any) -> tuple[Tensor, Tensor | None]:
    """The first state and, of the pair that a "belm" chain may start from, the second.

    Raises:
        TypeError, ValueError: a pair for another chain, or of two shapes.
    """
    if not isinstance(latent, tuple) or name != "latent":
        return latent, None
    if len(latent) != 2 or not all(isinstance(x, Tensor) for x in latent):
        raise TypeError(f"{name}: a tensor, or a pair of them, is required, got a tuple of {len(latent)}")
    if not isinstance(chain, Chain) or chain.rule != "belm":
        raise ValueError(f'{name}: one tensor is required; a pair of states starts a chain with rule="belm" alone')
    if latent[0].shape != latent[1].shape or latent[0].dtype != latent[1].dtype:
        raise ValueError(f"{name}: two states of one shape and dtype are required, got {tuple(latent[0].shape)}, "
                         f"{latent[0].dtype} and {tuple(latent[1].shape)}, {latent[1].dtype}")  # fmt: skip
    return latent


def without_past(step: Tensor, s: Tensor, chain: Chain) -> Tensor:
    """c_k e_k (B, T, D) of the steps s_{k+1} − a_k s_k (B, T, D) of a two-step chain's states (B, T+1, D)."""
    _, c, a_before, c_before = chain.coefficients
    out, e = [], torch.zeros_like(s[:, 0])
    for k in range(step.shape[1]):
        out.append(step[:, k] - a_before[k] * s[:, k - 1] - c_before[k] * e if k else step[:, 0])
        e = out[-1] / c[k]
    return torch.stack(out, 1)


def checked_splitting(split: Splitting, chain: Chain, D: int) -> Splitting:
    """The splitting; raises ValueError unless it fits chain and images."""
    T, Q = len(chain), split.basis
    if Q is not None and Q.shape != (D, D):
        raise ValueError(f"splitting: a basis ({D}, {D}) is required, got {tuple(Q.shape)}")
    for part, values in (("κ", split.kappa), ("b", split.offset)):
        if values is not None and tuple(values.shape) not in ((T, 1), (T, D)):
            raise ValueError(f"splitting: {part} must be ({T}, 1) or ({T}, {D}), got {tuple(values.shape)}")
    if Q is not None and chain.clip is not None:
        raise ValueError("splitting: a basis and a chain that clips go ill together: clipping is per pixel")
    return split


def rotated(edit: Edit | None, Q: Tensor) -> Edit | None:
    """An edit of x, for y = Qᵀ x."""
    if edit is None:
        return None
    return lambda y, k, image: rotate(edit(rotate(y, Q.T), k, image), Q)


def noise_scale(chain: Chain) -> Tensor:
    """(T, 1) by which given noises are multiplied: σ_k, and 1 where that is 0 and they are added as they are."""
    sigma = chain.sigma[:, None]
    return torch.where(sigma > 0, sigma, 1.0)


def _scaled_noise(
    chain: Chain, latent: Tensor, noises: Tensor | None, generator: Any, Q: Tensor | None
) -> Tensor | None:
    """σ_k n_k (B, T, D) float64, given or drawn; None for eta = 0."""
    shape = (len(latent), len(chain), *latent.shape[1:])
    if noises is not None and (chain.eta == 0 or noises.shape != shape):
        raise ValueError(f"noises: {shape} and eta > 0 are required, got {tuple(noises.shape)} and {chain.eta}")
    if chain.eta == 0:
        return None
    scale = chain.sigma[:, None] if noises is None else noise_scale(chain)
    noises = draw(shape, generator, latent.device) if noises is None else noises
    noises = noises.detach().to(latent.device, torch.float64)
    noises = noises if Q is None else rotate(noises.flatten(0, 1), Q).reshape(shape)
    return scale * noises.flatten(2)
