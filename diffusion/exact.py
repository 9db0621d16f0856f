"""The chain read from the image to the latent: in one rough pass, or exactly.

Backwards, step k is an equation for x_k: F_k(x_k) = x_{k+1} with F_k(x) = a_k x + c_k ε(x, t_k). In the data's own
directions F_k is nearly the identity, in all others it shrinks by σ̄_{k+1}/σ̄_k, σ̄ = √((1−ᾱ)/ᾱ), because a denoiser
forgets what is not like the data. For most of the chain that ratio is near 1, every step is a contraction, and all are
solved at once. For the one to three steps next to the image it is near 0: these `stiff` steps are solved one by one.

On them ‖F_k(x) − x_{k+1}‖ has minima that are no roots (F_k folds space), where methods that make the residual as small
as they can, Anderson's of kind II or Gauss-Newton, come to rest at losses from 1e-5 (T = 50) to 1e-3 (T = 10). Roots
exist nevertheless when ε is bounded, as behind a group normalisation (F_k(x) ≈ a_k x far out, so its degree is 1).
Broyden's method looks for a root of its model instead, may let the residual grow, and steps over the folds.

The other steps are one fixed point, whose remainders vary slowly over time. Its first rounds evaluate a few nodes and
take the change of all remainders from a spline through theirs; what Anderson acceleration learns there holds for all
steps, so those rounds cost few rows and are not lost.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pydeqsolve import Anderson, Broyden, Solution, Status, Stop, solve

from .chain import Chain, LinearChain, Splitting, interpolation
from .remainder import Remainders, reachable
from .sampler import Sampler

STIFFNESS = 0.7  # 1 − σ̄_{k+1}/σ̄_k from which a step is solved by itself
# κ = SHARE·σ/(σ² + RESOLUTION²) removes SHARE of the noise, but little of noise so faint that a network cannot tell it
# from the image's own grain. Stiff steps: 0.6 to 0.85 need as many rounds. The others: "v" needs a round more.
SHARE, RESOLUTION = 0.75, 0.03
JOINT_SHARE, JOINT_RESOLUTION = 0.85, 0.1
STIFF_SOLVER = Broyden(memory=24)
SOLVER = Anderson(memory=10, coupling="joint")
MAX_STEPS = 36
# Of the first rounds of the others at most NODE_ROUNDS are on nodes, after which what lies between the nodes shows, and
# ALL_ROUNDS at least are on all steps.
NODE_ROUNDS, ALL_ROUNDS = 4, 5
FORCING = 0.1  # the tolerance of the others, as part of the error which the stiff steps have left in the image


def default_stop(dtype: torch.dtype) -> Stop:
    """For a network computing in `dtype`: a pixel, of a range of 2, is off by 2e-6, or 5e-6 in float32 and less."""
    return Stop(rtol=0.0, atol=2e-6 if dtype == torch.float64 else 5e-6, max_steps=MAX_STEPS)


@dataclass(eq=False)
class Outcome:
    """Latents before they are checked by sampling."""

    x_T: Tensor  # (B, D)
    history: Tensor  # (epochs or rounds, B)
    rounds: int
    evaluations: Tensor  # (B,)
    status: Tensor | None = None  # (B,) of a fixed point
    N: Tensor | None = None  # (B, T, D) the chain's remainders along the way, a guess for the check
    state: dict[str, Tensor] = field(default_factory=dict)


def one_pass(sampler: Sampler, target: Tensor) -> Outcome:
    """x_k ≈ (x_{k+1} − c_k ε(x_{k+1}, t_{k+1})) / a_k; at the image itself, which has no t, that of the last step."""
    chain, x = sampler.map.chain, target
    T = len(chain)
    a, c = chain.a, chain.c
    for k in range(T - 1, -1, -1):
        at = min(k + 1, T - 1)
        t = chain.timesteps[at].expand(len(x))
        alpha = chain.alphas[at]
        eps = sampler.map.network.epsilon(x, t, alpha.expand(len(x)), sampler.conditioning)
        if at != k and chain.blind[k]:  # step k wants v = −x̂_0
            eps = ((1 - alpha).sqrt() * eps - x) / alpha.sqrt()
        x = (x - c[k] * eps) / a[k]
    return Outcome(x, x.new_empty(0, len(x)), T, torch.full((len(x),), T, device=x.device))


def stiff_steps(chain: Chain) -> int:
    """How many steps next to the image shrink what is not like the data to less than 1 − STIFFNESS of its size."""
    before, after = ((1 - alphas) / alphas for alphas in (chain.alphas, chain.alphas_next))
    stiff = 1 - (after / before).sqrt() > STIFFNESS
    return int(stiff.flip(0).cumprod(0).sum())


def reversed_map(forward: Remainders, first: int, last: int, splitting: Splitting) -> Remainders:
    """Steps first … last − 1 of the chain, read backwards: position j ends at x_k, k = last − 1 − j, where N_k is read.

    splitting: of all the chain's steps.
    """
    chain, cut = forward.chain, slice(first, last)
    flipped = chain.at(torch.arange(last - 1, first - 1, -1, device=chain.alphas.device))
    offset = None if splitting.offset is None else splitting.offset[cut].flip(0)
    kappa = splitting.kappa[cut].flip(0)
    a, c = flipped.a[:, None], flipped.c[:, None]
    A = a + c * kappa
    return Remainders(forward.network, flipped, Splitting(kappa, offset), LinearChain(1 / A, -c / A), 1)


@dataclass(eq=False)
class OnNodes:
    """The same map with only the nodes evaluated: all remainders change by a spline through the nodes' changes."""

    map: Remainders
    at: Tensor  # (n,) positions, both ends included
    spread: Tensor  # (steps, n), from nodes to all

    def __call__(self, N: Tensor, image: Tensor, base: Tensor, *conditioning: Tensor) -> Tensor:
        m, at = self.map, self.at
        x = m.linear.trajectory(base, N)[:, at + m.shift]  # (n, nodes, D)
        m.evaluations.index_add_(0, image, torch.full_like(image, len(at)))
        rows = [c.repeat_interleave(len(at), 0) for c in conditioning]
        value = m.remainder(x.flatten(0, 1), at.repeat(len(x)), rows).view_as(x)
        return N + self.spread @ (value - N[:, at])


def joint_nodes(steps: int) -> Tensor:
    """Positions (n,) of steps^0.6 nodes, denser towards the image, where the remainders change most."""
    n = max(2, round(steps**0.6))
    return ((steps - 1) * torch.linspace(0, 1, n, dtype=torch.float64).square()).round().long().unique()


class _Backwards:
    """The way from the image to the latent, so far: x_k for the steps that are solved, and what it cost."""

    def __init__(self, sampler: Sampler, target: Tensor, bar: Any) -> None:
        self.sampler, self.bar, self.x = sampler, bar, target
        B, D = target.shape
        self.eps = torch.zeros_like(target)  # (B, D) of the last step solved
        self.N = target.new_zeros(B, len(sampler.map.chain), D)
        self.evaluations = torch.zeros(B, dtype=torch.int64, device=target.device)
        self.status = torch.full((B,), int(Status.CONVERGED), device=target.device)
        self.traces: list[Tensor] = []
        self.rounds = 0

    def solve(
        self, first: int, last: int, splitting: Splitting, solver: Any, stop: Stop, scale: float, node_rounds: int = 0
    ) -> Tensor:
        """Moves x from x_last to x_first, all steps between at once; atol of `stop` is for scale·N, as what it returns.

        node_rounds: of the rounds, those on nodes alone. Returns the residual (B,).
        """
        backward = reversed_map(self.sampler.map, first, last, splitting)
        split = backward.splitting
        backward.evaluations = self.evaluations
        drift = None if split.offset is None else (backward.linear.c * split.offset)[None]
        base = backward.linear.base(self.x, drift)
        image = torch.arange(len(base), device=base.device)
        inputs = (image, base, *self.sampler.conditioning)
        guess: Any = self._guess(backward)
        if node_rounds:
            at = joint_nodes(last - first).to(base.device)
            on_nodes = OnNodes(backward, at, interpolation(at.cpu(), last - first).to(base.device))
            guess = solve(
                on_nodes, guess, inputs, solver=solver, stop=Stop(0.0, 0.0, node_rounds), gradient=None, trace=True,
                callback=self._tick, keep_history=True,
            )  # fmt: skip
            self._count(guess)
        # A network rounds its answer at least; more of a floor than that loses digits of the image (docs/inversion.md).
        asked = torch.as_tensor(stop.atol, dtype=torch.float64, device=base.device) / scale
        atol = reachable(asked, self.sampler.map.network.dtype)
        inside = replace(stop, atol=atol, max_steps=stop.max_steps - node_rounds)
        solution = solve(
            backward, guess, inputs, solver=solver, stop=inside, gradient=None, trace=True, callback=self._tick,
        )  # fmt: skip
        self._count(solution)
        states = backward.linear.trajectory(base, solution.z)
        self._take(first, last, split, states[:, 1:], solution)
        return scale * solution.residual

    def _guess(self, backward: Remainders) -> Tensor:
        """N (B, steps, D) along the path of the last ε found, which changes slowly; of ε = 0 at the image."""
        chain, split = backward.chain, backward.splitting
        a, c = chain.a[:, None], chain.c[:, None]
        eps = self.eps[:, None].expand(-1, len(chain), -1)
        straight = LinearChain(1 / a, -c / a)
        states = straight.trajectory(straight.base(self.x, None), eps)[:, 1:]
        N = eps - split.kappa * states
        return N if split.offset is None else N - split.offset

    def _take(self, first: int, last: int, split: Splitting, states: Tensor, solution: Solution) -> None:
        own = self.sampler.map.splitting
        eps = solution.z + split.kappa * states
        eps = eps if split.offset is None else eps + split.offset
        self.eps = eps[:, -1]
        eps = eps.flip(1)
        self.N[:, first:last] = eps - own.kappa[first:last] * states.flip(1)
        if own.offset is not None:
            self.N[:, first:last] -= own.offset[first:last]
        self.x = states[:, -1]
        self.status = torch.where(self.status == Status.CONVERGED, solution.status, self.status)

    def _count(self, solution: Solution) -> None:
        assert solution.trace is not None
        self.traces.append(solution.trace)
        self.rounds += solution.steps

    def _tick(self, step: int, N: Tensor, residual: Tensor) -> bool:
        self.bar.update()
        return False


def reserve(steps: int, budget: int) -> int:
    """Rounds which the stiff ones leave to `steps` others; of the default budget 8, 9, 10 to 8, 18, 48 and more."""
    return int((6.6 + 0.55 * math.log2(steps)) / MAX_STEPS * budget + 0.5) if steps else 0


def removing(chain: Chain, share: float, resolution: float) -> Splitting:
    """κ = share·σ/(σ² + resolution²), σ² = 1 − ᾱ."""
    variance = 1 - chain.alphas[:, None]
    return Splitting(share * variance.sqrt() / (variance + resolution**2))


def exact(sampler: Sampler, target: Tensor, splitting: Splitting | None, solver: Any, stop: Stop, bar: Any) -> Outcome:
    """The stiff steps one by one, each until its image is off by atol, then all the others as one fixed point.

    splitting: of the others, None for the one that removes most of the noise. They are solved no finer than needed
    beside what the stiff steps have left.
    """
    chain = sampler.map.chain
    way = _Backwards(sampler, target, bar)
    k = len(chain)
    own = removing(chain, SHARE, RESOLUTION)
    stiff, left = stiff_steps(chain), torch.zeros(len(target), dtype=torch.float64, device=target.device)
    kept = reserve(k - stiff, stop.max_steps)
    for j in range(stiff):
        budget = stop.max_steps - way.rounds - kept
        if j + 1 < stiff:  # the one next to the image is the easiest: the model hardly denoises so near to it
            budget //= 5
        if budget <= 0:
            break
        k -= 1
        residual = way.solve(k, k + 1, own, STIFF_SOLVER, replace(stop, max_steps=budget), float(chain.c[k].abs()))
        left = torch.maximum(left, residual.nan_to_num(0.0, 0.0, 0.0))
    if k > 0:
        asked = torch.as_tensor(stop.atol, dtype=torch.float64, device=target.device)
        rounds = max(0, stop.max_steps - way.rounds)
        rest = replace(stop, max_steps=rounds, atol=torch.maximum(asked, FORCING * left))
        split = removing(chain, JOINT_SHARE, JOINT_RESOLUTION) if splitting is None else splitting
        able = k > 2 and not getattr(solver, "line_search", 0)  # a line search keeps no history
        way.solve(0, k, split, solver, rest, 1.0, max(0, min(NODE_ROUNDS, rounds - ALL_ROUNDS)) if able else 0)
    return Outcome(way.x, torch.cat(way.traces), way.rounds, way.evaluations, way.status, way.N)
