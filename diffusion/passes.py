"""Long chains: the nonlinear work on a few time steps, every step evaluated once.

The remainders N vary slowly over time, so their large errors can be removed on n ≪ T nodes: N is solved for there and
runs between them as a cubic spline, while the sums of the chain still run over all T steps. What is left is small and
rough (a network's ε wiggles from step to step), so no spline can give it: one pass evaluates every step at the
trajectory found, N ← N'(x). What that does to later states is smooth again, and is corrected on the nodes, for
N + spline(change). A pass leaves about a tenth of the change of x_0 that its correction made (a third at the worst of
500 images): an image is done when that change is small against the error asked for; what two passes do not settle is
solved for all steps together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pydeqsolve import Front, Solution, Status, Stop, solve

from .chain import EditedChain, LinearChain, Splitting, interpolation
from .remainder import Remainders
from .sampler import MARGIN, Sampler, Silent, block_stop, scale_of

FEWEST_STEPS = 60  # with fewer the nodes are too few to tell what they miss
STEPS_PER_NODE, MOST_NODES = 5, 24
PASSES = 2
FIRST, CORRECTION = 20.0, 0.5  # tolerances on the nodes, in units of rtol
ROUNDING = 2.0  # the tightest tolerance on the nodes, in units of the network's machine epsilon
SETTLED = 30.0  # change of x_0 by the correction, relative, in units of rtol: three times the error asked for


class NodeChain(LinearChain):
    """The states at n nodes of a chain, from N at the nodes and a spline between: x = base + G N."""

    def __init__(self, linear: LinearChain, at: Tensor, spread: Tensor) -> None:
        """at (n,): the nodes, first and last step included. spread (T, n): from nodes to all steps."""
        super().__init__(linear.A, linear.c)
        segments = list(pairwise(at.tolist()))
        sums = torch.stack([self.w[a:b].T @ spread[a:b] for a, b in segments]).cumsum(0)  # (n − 1, 1 or D, n)
        G = torch.cat([torch.zeros_like(sums[:1]), sums * self.P[at[1:], :, None]])
        self.G = G.transpose(0, 1).contiguous()  # (1 or D, n, n)

    def trajectory(self, base: Tensor, N: Tensor, image: Tensor | None = None) -> Tensor:
        """(B, n, D): base plus the response to N (B, n, D)."""
        if len(self.G) == 1:
            return base + self.G[0] @ N
        return base + (self.G @ N.permute(2, 1, 0)).permute(2, 1, 0)


def possible(run: Sampler, stop: Stop, window: int | None) -> bool:
    """Whether a chain can be solved this way: long, smooth over time, and in closed form."""
    linear, T = run.map.linear, len(run.map.chain)
    closed = linear.safe and not isinstance(linear, EditedChain)
    tolerant = isinstance(stop.rtol, Tensor) or stop.rtol > 0
    return closed and tolerant and T >= FEWEST_STEPS and run.map.chain.eta == 0 and (window is None or window >= T)


def nodes(T: int) -> Tensor:
    """Positions (n,) int64 of the nodes among T steps, both ends included, denser towards the image.

    T − k falls as a square: where σ goes to 0, N changes over a range of steps that shrinks with their number left.
    """
    n = max(4, min(MOST_NODES, T // STEPS_PER_NODE))
    left = T * (1 - torch.linspace(0, 1, n, dtype=torch.float64)).square()
    at = (T - left).round().long().clamp(max=T - 1)
    return at.unique()


@dataclass(eq=False)
class Passes:
    """One call of `sample` on its way. All tensors are over the B images."""

    run: Sampler
    solver: Any
    stop: Stop
    bar: Any
    callback: Any

    def __post_init__(self) -> None:
        m, x_T = self.run.map, self.run.x_T
        B, T = len(x_T), len(m.chain)
        self.at = nodes(T).to(x_T.device)
        self.spread = interpolation(self.at.cpu(), T).to(x_T.device)
        fields = {name: getattr(m.chain, name)[self.at] for name in ("timesteps", "alphas", "alphas_next")}
        chain, offset = replace(m.chain, **fields), m.splitting.offset
        split = Splitting(m.splitting.kappa[self.at], None if offset is None else offset[self.at])
        self.scale = scale_of(chain)
        self.map = Remainders(m.network, chain, split, NodeChain(m.linear, self.at, self.spread), scale=self.scale)
        self.map.evaluations = torch.zeros(B, dtype=torch.int64, device=x_T.device)
        self.base = self.run.base()
        self.N = x_T.new_zeros(B, T, x_T.shape[1])
        self.x = m.linear.trajectory(self.base, self.N)
        self.steps = torch.zeros_like(self.map.evaluations)
        self.status = torch.full_like(self.steps, int(Status.MAX_STEPS))
        self.residual = x_T.new_full((B,), torch.inf)
        self.stopped = False

    def solve(self) -> tuple[Tensor, Solution, int, Tensor]:
        """Trajectory (B, T+1, D), solution, rounds and rows (B,)."""
        network = self.run.map.network
        before = network.calls
        everyone = torch.arange(len(self.x), device=self.x.device)
        good = self._on_nodes(everyone, FIRST)
        settled = torch.zeros_like(good)
        for _ in range(PASSES):
            images = everyone[good & ~settled]
            if not len(images):
                break
            self._every_step(images)
            if self.stopped:
                break
            start = self.x[images, -1]
            good[images] = self._on_nodes(images, CORRECTION)
            end = self.x[images, -1]
            moved = (end - start).norm(dim=1)
            settled[images] = good[images] & (moved <= SETTLED * _of(self.stop.rtol, images) * end.norm(dim=1))
        self.status[~settled] = int(Status.MAX_STEPS)
        rows = self.map.evaluations
        if not self.stopped and bool((~settled).any()):
            rows = rows + self._together(everyone[~settled])
        rounds, none = network.calls - before, torch.zeros_like(self.steps)
        return (
            self.x,
            Solution(self.N, self.residual, self.steps, self.status, rounds, none, none.clone()),
            rounds,
            rows,
        )

    def _on_nodes(self, images: Tensor, units: float) -> Tensor:
        """Solves for what N must change by, on the nodes; (n,) bool: solved."""
        start = self.N[images][:, self.at]
        base = self.x[images][:, self.at] - self.map.linear.trajectory(torch.zeros_like(start), start)
        chosen = _selected(self.stop, images)
        least = ROUNDING * torch.finfo(self.run.map.network.dtype).eps
        stop = block_stop(replace(chosen, rtol=at_least(units * chosen.rtol, least)), self.scale, 1.0)
        cap = min(stop.max_steps, 2 * len(self.at))

        def report(step: int, y: Tensor, residual: Tensor) -> bool:
            self.bar.update()
            return False

        solution = solve(
            self.map, start * self.scale, (images, base, *[c[images] for c in self.run.conditioning]),
            solver=self.solver, stop=replace(stop, max_steps=cap), gradient=None,
            front=Front(None, MARGIN, latest=True), callback=None if isinstance(self.bar, Silent) else report,
        )  # fmt: skip
        self._change(images, self.N[images] + self.spread @ (solution.z / self.scale - start))
        self.steps[images] += solution.evaluations
        self.status[images], self.residual[images] = solution.status, solution.residual
        return solution.converged

    def _every_step(self, images: Tensor) -> None:
        """One evaluation of all T steps of some images."""
        m, (n, T) = self.run.map, (len(images), self.N.shape[1])
        k = torch.arange(T, device=images.device)
        rows = self.x[images][:, :T].reshape(n * T, -1)
        value = m.remainder(rows, k.repeat(n), [c[images].repeat_interleave(T, 0) for c in self.run.conditioning])
        N = value.view(n, T, -1)
        self.residual[images] = ((N - self.N[images]) * scale_of(m.chain)).square().mean((1, 2)).sqrt()
        self.map.evaluations[images] += T
        self.steps[images] += 1
        self._change(images, N)
        self.bar.update()
        if self.callback is not None:
            seen = self.x.unflatten(2, m.network.shape)
            self.stopped = bool(self.callback(int(self.steps.max()), seen, self.residual.clone()))

    def _change(self, images: Tensor, N: Tensor) -> None:
        self.N[images] = N
        self.x[images] = self.run.map.linear.trajectory(self.base[images], N)

    def _together(self, images: Tensor) -> Tensor:
        """Solves all steps of some images at once, from what is known; rows (B,)."""
        part, stop = self.run.pick(images), _selected(self.stop, images)
        guess = self.N[images].nan_to_num(0.0, 0.0, 0.0)
        self.x[images], solution, _, rows = part.solve(guess, self.solver, stop, None, self.bar, self.callback)
        self.N[images], self.residual[images] = solution.z, solution.residual
        self.status[images] = solution.status
        self.steps[images] += solution.evaluations
        return torch.zeros_like(self.steps).index_put((images,), rows)


def _of(tolerance: float | Tensor, images: Tensor) -> float | Tensor:
    """The tolerance of some images, from one for all or (B,)."""
    return tolerance[images] if isinstance(tolerance, Tensor) and tolerance.dim() else tolerance


def at_least(tolerance: float | Tensor, least: float) -> float | Tensor:
    """The larger of the two."""
    return tolerance.clamp_min(least) if isinstance(tolerance, Tensor) else max(tolerance, least)


def _selected(stop: Stop, images: Tensor) -> Stop:
    return replace(stop, rtol=_of(stop.rtol, images), atol=_of(stop.atol, images))
