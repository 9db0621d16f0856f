"""The chain read from the image to the latent: in one rough pass, or exactly.

Backwards, step k is an equation for x_k: F_k(x_k) = x_{k+1} with F_k(x) = a_k x + c_k ε(x, t_k). In the data's own
directions F_k is nearly the identity, in all others it shrinks by σ̄_{k+1}/σ̄_k, σ̄ = √((1−ᾱ)/ᾱ), because a denoiser
forgets what is not like the data. For most of the chain that ratio is near 1, every step is a contraction, and all are
solved at once. For the one to three steps next to the image it is near 0: these `stiff` steps are solved one by one.

On them ‖F_k(x) − x_{k+1}‖ has minima that are no roots (F_k folds space), where methods that make the residual as small
as they can, Anderson's of kind II or Gauss-Newton, come to rest at losses from 1e-5 (T = 50) to 1e-3 (T = 10). Roots
exist nevertheless when ε is bounded, as behind a group normalisation (F_k(x) ≈ a_k x far out, so its degree is 1).
Broyden's method looks for a root of its model instead, may let the residual grow, and steps over the folds.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pydeqsolve import Anderson, Broyden, Solution, Status, Stop, solve

from .chain import Chain, LinearChain, Splitting
from .remainder import Remainders
from .sampler import Sampler

STIFFNESS = 0.7  # 1 − σ̄_{k+1}/σ̄_k from which a step is solved by itself
# The linear part of a stiff step: κ = SHARE·σ/(σ² + RESOLUTION²) removes SHARE of the noise (0.6 to 0.85 need as many
# rounds), but little of noise so faint that a network cannot tell it from the image's own grain.
SHARE, RESOLUTION = 0.75, 0.03
STIFF_SOLVER = Broyden(memory=24)
SOLVER = Anderson(memory=10, coupling="joint")
STOP = Stop(rtol=0.0, atol=2e-6, max_steps=36)
RESERVE = 0.25  # of the rounds of the budget, which the stiff steps leave to the others


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
        eps = sampler.map.network.epsilon(x, t, chain.alphas[at].expand(len(x)), sampler.conditioning)
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
    parts = {name: getattr(chain, name)[cut].flip(0) for name in ("timesteps", "alphas", "alphas_next")}
    flipped = replace(chain, **parts)
    offset = None if splitting.offset is None else splitting.offset[cut].flip(0)
    kappa = splitting.kappa[cut].flip(0)
    a, c = flipped.a[:, None], flipped.c[:, None]
    A = a + c * kappa
    return Remainders(forward.network, flipped, Splitting(kappa, offset), LinearChain(1 / A, -c / A), 1)


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

    def solve(self, first: int, last: int, splitting: Splitting, solver: Any, stop: Stop, scale: float) -> None:
        """Moves x from x_last to x_first, all steps between at once; atol of `stop` is for scale·N."""
        backward = reversed_map(self.sampler.map, first, last, splitting)
        split = backward.splitting
        backward.evaluations = self.evaluations
        drift = None if split.offset is None else (backward.linear.c * split.offset)[None]
        base = backward.linear.base(self.x, drift)
        guess = self._guess(backward)
        inside = replace(stop, atol=stop.atol / scale)
        image = torch.arange(len(base), device=base.device)
        solution = solve(
            backward, guess, (image, base, *self.sampler.conditioning), solver=solver, stop=inside, gradient=None,
            trace=True, callback=self._tick,
        )  # fmt: skip
        states = backward.linear.trajectory(base, solution.z)
        self._take(first, last, split, states[:, 1:], solution)

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
        assert solution.trace is not None
        self.traces.append(solution.trace)
        self.rounds += solution.steps
        self.status = torch.where(self.status == Status.CONVERGED, solution.status, self.status)

    def _tick(self, step: int, N: Tensor, residual: Tensor) -> bool:
        self.bar.update()
        return False


def exact(sampler: Sampler, target: Tensor, solver: Any, stop: Stop, bar: Any) -> Outcome:
    """The stiff steps one by one, each until its image is off by atol, then all the others as one fixed point."""
    chain = sampler.map.chain
    way = _Backwards(sampler, target, bar)
    k = len(chain)
    variance = 1 - chain.alphas[:, None]
    own = Splitting(SHARE * variance.sqrt() / (variance + RESOLUTION**2))
    stiff = stiff_steps(chain)
    for j in range(stiff):
        budget = stop.max_steps - way.rounds - (int(RESERVE * stop.max_steps) if k > 1 else 0)
        if j + 1 < stiff:  # the one next to the image is the easiest: the model hardly denoises so near to it
            budget //= 5
        if budget <= 0:
            break
        k -= 1
        way.solve(k, k + 1, own, STIFF_SOLVER, replace(stop, max_steps=budget), float(chain.c[k].abs()))
    if k > 0:
        rest = replace(stop, max_steps=max(0, stop.max_steps - way.rounds))
        way.solve(0, k, sampler.map.splitting, solver, rest, 1.0)
    return Outcome(way.x, torch.cat(way.traces), way.rounds, way.evaluations, way.status, way.N)
