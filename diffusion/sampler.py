"""The problem of one call: arguments checked, chain and latents in float64, solved in sequence or all at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pydeqsolve import Anderson, Front, Implicit, Phantom, Solution, Stop, solve

from .arguments import Silent, check_arguments, model_dtype
from .chain import Chain, Edit, EditedChain, LinearChain, Splitting
from .gradients import through_chain, through_phantom
from .models.answers import draw
from .remainder import Model, Network, Remainders, move, reachable

SOLVER = Anderson(memory=2, coupling="causal")
# A step within this many times rtol, in units of σ ε, leaves an error of a few rtol in x_0.
UNITS_PER_RTOL = 5.0
MARGIN = 0.5
SMALLEST_SCALE = 1e-3


def block_stop(stop: Stop, scale: Tensor, units: float = UNITS_PER_RTOL) -> Stop:
    """The tolerance per step, of σ ε, that belongs to the user's: units·rtol + σ atol. scale (T, 1) is σ."""
    atol = units * stop.rtol
    if isinstance(stop.atol, Tensor) or stop.atol:
        own = torch.as_tensor(stop.atol, dtype=torch.float64, device=scale.device)
        common = torch.as_tensor(atol, dtype=torch.float64, device=scale.device)
        atol = common.reshape(-1, 1) + own.reshape(-1, 1) * scale[:, 0]
    return replace(stop, rtol=0.0, atol=atol)


def _forward(
    network: Network, chain: Chain, split: Splitting, edit: Edit | None, states: Sequence[int]
) -> tuple[Remainders, Tensor | None]:
    """The map of the chain read from noise to image, and its drift c_k b_k (1, T, D) or None."""
    a, c = chain.a[:, None], chain.c[:, None]
    drift = None if split.offset is None else (c * split.offset)[None]
    A = a + c * split.kappa
    linear = LinearChain(A, c) if edit is None else EditedChain(A, c, edit, network.shape, states)
    return Remainders(network, chain, split, linear, scale=scale_of(chain)), drift


def scale_of(chain: Chain) -> Tensor:
    """σ_k/√(α_k² + σ_k²) (T, 1), never quite 0: the unit of the remainders in a solve.

    An error δ of a state of unit variance changes ε there by about δ/σ, and x_0 by δ. So equal tolerances of σ ε, not
    of ε, ask for the same accuracy of x_0 at every step; of ε they would make the steps next to the image wait for
    digits nobody sees.
    """
    return (chain.before[1] / chain.size[:-1]).clamp_min(SMALLEST_SCALE)[:, None]


def _scaled_noise(chain: Chain, x_T: Tensor, noises: Tensor | None, generator: Any) -> Tensor | None:
    """σ_k n_k (B, T, D) float64, given or drawn; None for eta = 0."""
    shape = (len(x_T), len(chain), *x_T.shape[1:])
    if noises is not None and (chain.eta == 0 or noises.shape != shape):
        raise ValueError(f"noises: {shape} and eta > 0 are required, got {tuple(noises.shape)} and {chain.eta}")
    if chain.eta == 0:
        return None
    if noises is None:
        noises = draw(shape, generator, x_T.device)
    return chain.sigma[:, None] * noises.detach().to(x_T.device, torch.float64).flatten(2)


@dataclass(eq=False)
class Sampler:
    """The problem of one call of `sample` or `invert`, its arguments checked and moved to float64."""

    map: Remainders
    x_T: Tensor  # (B, D) float64, detached
    conditioning: list[Tensor]
    drift: Tensor | None  # (B or 1, T, D): c_k b_k + σ_k n_k
    numbers: Tensor | None = None  # (B,) int64, which images of the whole batch these are; None is all

    @staticmethod
    def of(
        model: Model, x_T: Tensor, chain: Chain, prediction: str, splitting: Any, generator: Any, group: Any,
        inputs: Sequence[Tensor], mean: Tensor | None, variance: Tensor | None, rows: int | None,
        edit: Edit | None = None, noises: Tensor | None = None,
    ) -> Sampler:  # fmt: skip
        check_arguments(model, x_T, "x_T", chain, prediction, inputs)
        split = Splitting.of(splitting, chain, *(None if s is None else s.flatten() for s in (mean, variance)))
        if split.basis is not None:
            raise ValueError("splitting: one with a basis is for sample alone")
        D = x_T[0].numel() if len(x_T) else x_T.shape[1:].numel()
        T = len(chain)
        for part, values in (("κ", split.kappa), ("b", split.offset)):
            if values is not None and tuple(values.shape) not in ((T, 1), (T, D)):
                raise ValueError(f"splitting: {part} must be ({T}, 1) or ({T}, {D}), got {tuple(values.shape)}")
        chain, split = move(chain, split, x_T.device)
        flat = x_T.detach().double().flatten(1)
        network = Network(model, prediction, x_T.shape[1:], model_dtype(model, x_T.dtype), rows, group)
        forward, drift = _forward(network, chain, split, edit, range(1, len(chain) + 1))
        noise = _scaled_noise(chain, x_T, noises, generator)
        drift = drift if noise is None else noise if drift is None else drift + noise
        conditioning = [c.detach() for c in inputs]
        return Sampler(forward, flat, conditioning, drift)

    @property
    def noise(self) -> Tensor | None:
        """σ_k n_k (B, T, D), None for eta = 0."""
        chain, split = self.map.chain, self.map.splitting
        if chain.eta == 0 or self.drift is None:
            return None
        return self.drift if split.offset is None else self.drift - chain.c[:, None] * split.offset

    def sequential(self, bar: Any) -> tuple[Tensor, None, int, Tensor]:
        """The reference: T model calls, each on B rows."""
        m, x = self.map, self.x_T
        chain = m.chain
        a, c, noise = chain.a, chain.c, self.noise
        states, image = [x], self.image
        for k in range(len(chain)):
            eps = m.epsilon(x, torch.full((len(x),), k, device=x.device), self.conditioning)
            x = a[k] * x + c[k] * eps
            if noise is not None:
                x = x + noise[:, k]
            if isinstance(m.linear, EditedChain):
                x = m.linear.after(x, k, image)
            states.append(x)
            bar.update()
        return torch.stack(states, 1), None, len(chain), torch.full((len(x),), len(chain))

    def coarse(self, steps: int) -> tuple[Sampler, Tensor]:
        """This problem on `steps` of the time steps, and their positions."""
        m = self.map
        chain, at = m.chain.coarsen(steps)
        offset = None if m.splitting.offset is None else m.splitting.offset[at]
        edit = m.linear.edit if isinstance(m.linear, EditedChain) else None
        states = [*at[1:].tolist(), len(m.chain)]
        forward, drift = _forward(m.network, chain, Splitting(m.splitting.kappa[at], offset), edit, states)
        return Sampler(forward, self.x_T, self.conditioning, drift), at

    def solve(
        self,
        guess: Tensor,
        solver: Any,
        stop: Stop,
        window: int | None,
        bar: Any,
        callback: Any,
        margin: float = MARGIN,
        weight: Tensor | None = None,
    ) -> tuple[Tensor, Solution, int, Tensor]:
        """The fixed point of all steps together, from a guess of N (B, T, D): trajectory, solution, rounds, rows.

        weight (B, T): by which a step's tolerance is multiplied.
        """
        m, base, image = self.map, self.base(), self.image
        count = len(image) if self.numbers is None or not len(image) else int(image.max()) + 1
        m.evaluations = torch.zeros(count, dtype=torch.int64, device=base.device)
        before, scale = m.network.calls, scale_of(m.chain)
        stop = block_stop(replace(stop, rtol=reachable(stop.rtol, m.network.dtype)), scale)
        if weight is not None:
            tolerance = torch.as_tensor(stop.atol, dtype=torch.float64, device=base.device)
            stop = replace(stop, atol=tolerance.reshape(-1, 1) * weight)

        def report(step: int, y: Tensor, residual: Tensor) -> Any:
            bar.update()
            if callback is None:
                return False
            return callback(step, m.linear.trajectory(base, y / scale, image).unflatten(2, m.network.shape), residual)

        quiet = callback is None and isinstance(bar, Silent)
        solution = solve(
            m, guess * scale, (image, base, *self.conditioning), solver=solver, stop=stop,
            gradient=None, front=Front(window, margin, latest=True), callback=None if quiet else report,
        )  # fmt: skip
        solution.z = solution.z / scale
        return m.linear.trajectory(base, solution.z, image), solution, m.network.calls - before, m.evaluations[image]

    @property
    def image(self) -> Tensor:
        """(B,) int64, the number of each image in the whole batch."""
        return torch.arange(len(self.x_T), device=self.x_T.device) if self.numbers is None else self.numbers

    def base(self) -> Tensor:
        """What the chain's states are made of besides N (B, T+1, D)."""
        return self.map.linear.base(self.x_T, self.drift).expand(len(self.x_T), -1, -1)

    def at(self, x_T: Tensor) -> Sampler:
        """The same problem for other latents (B, D)."""
        return Sampler(self.map, x_T, self.conditioning, self.drift, self.numbers)

    def pick(self, images: Tensor) -> Sampler:
        """The same problem for some of the images, by position (k,)."""
        drift = self.drift if self.drift is None or len(self.drift) == 1 else self.drift[images]
        return Sampler(self.map, self.x_T[images], [c[images] for c in self.conditioning], drift, self.image[images])

    def differentiable_sequential(self, x_T: Tensor) -> tuple[Tensor, Tensor]:
        """x_0 (B, D) with the graph of the whole chain, and rows (B,)."""
        trajectory, _, _, rows = self.at(x_T).sequential(Silent())
        return trajectory[:, -1], rows

    def differentiable_parallel(
        self, x_T: Tensor, N: Tensor, gradient: Implicit | Phantom, stop: Stop, solver: Any
    ) -> tuple[Tensor, Solution, Tensor]:
        """x_0 (B, D) of the fixed point from the guess N, with an implicit or phantom gradient; its solution, and rows.

        rows (B,): of the solve and of a phantom's applications. An implicit gradient leaves those of its backward pass
        in `solution.adjoint`.
        """
        with torch.no_grad():
            trajectory, solution, _, rows = self.solve(N, solver or SOLVER, stop, None, Silent(), None)
        if isinstance(gradient, Implicit):
            trajectory = through_chain(
                self.map, trajectory, x_T, self.conditioning, self.noise, gradient, solution, latent_alone=True
            )
        else:
            trajectory = through_phantom(self.map, trajectory, x_T, self.conditioning, self.drift, gradient)
            rows = rows + (gradient.steps if gradient.steps > 1 else 0) * len(self.map.chain)  # one step reads no model
        return trajectory[:, -1], solution, rows

    def levels(self, levels: Sequence[int]) -> Sequence[int]:
        """The coarser step counts, checked; fresh noise belongs to its own chain, so eta > 0 has none."""
        T = len(self.map.chain)
        counts = tuple(levels)
        if any(isinstance(n, bool) or not isinstance(n, int) for n in counts):
            raise TypeError(f"levels: integers are required, got {levels!r}")
        if any(not 2 <= n < T for n in counts) or list(counts) != sorted(set(counts)):
            raise ValueError(f"levels: increasing step counts from 2 to {T - 1} are required, got {counts}")
        if counts and self.map.chain.eta > 0:
            raise ValueError("levels: only for eta = 0, because a coarser chain has noises of its own")
        return counts
