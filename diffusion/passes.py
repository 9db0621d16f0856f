"""Long chains: the nonlinear work on a few time steps, every step evaluated once.

The remainders N vary slowly over time, so their large errors can be removed on n ≪ T nodes: N is solved for there and
runs between them as a cubic spline, while the sums of the chain still run over all T steps. What is left is small and
rough (a network's ε wiggles from step to step), so no spline can give it: one pass evaluates every step at the
trajectory found, N ← N'(x). What that does to later states is smooth again: it is foretold by the Jacobians that the
rounds on the nodes have taught (`secants`), and corrected on the nodes, for N + spline(change). A pass leaves a small
share of the change of x_0 that its correction made: an image is done when that change is small against the error asked
for; what two passes do not settle is solved for all steps together.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pydeqsolve import Front, Picard, Solution, Status, Stop, solve

from .arguments import Silent
from .nodes import MOST_NODES, Nodes
from .sampler import MARGIN, UNITS_PER_RTOL, Sampler, block_stop, scale_of
from .secants import Secants, rows_of

PASSES = 2
FIRST, CORRECTION = 100.0, 3.0  # tolerances on the nodes, in units of rtol
LOOSEST = 0.2  # the largest tolerance on the nodes: with 16 bits a hundred times rtol would be none at all
# The tightest tolerance on the nodes, in units of the network's machine epsilon, is that of a front over all steps.
ROUNDING = MARGIN * UNITS_PER_RTOL / 2
# Change of x_0 by the correction, relative, in units of rtol, with MOST_NODES nodes: three times the error asked for.
# With fewer a spline misses more, and a larger share of the change is left.
SETTLED = 30.0


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
        scale = scale_of(m.chain)
        grid = Nodes.of(self.run, scale)
        self.at, self.spread, self.map, self.scale = grid.at, grid.spread, grid.map, scale[grid.at]
        self.chain, self.secants = grid.chain, Secants(grid, B, x_T.shape[1])
        self.base = self.run.base()
        self.N = x_T.new_zeros(B, T, x_T.shape[1])
        self.x = self.base.clone()
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
        settled, share = torch.zeros_like(good), SETTLED * (len(self.at) / MOST_NODES) ** 2
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
            settled[images] = good[images] & (moved <= share * _of(self.stop.rtol, images) * end.norm(dim=1))
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
        start = self.N[images[:, None], self.at]
        base = self.x[images[:, None], self.at] - self.chain.response(start)
        chosen = _selected(self.stop, images)
        least = ROUNDING * torch.finfo(self.run.map.network.dtype).eps
        stop = block_stop(replace(chosen, rtol=between(units * chosen.rtol, least, LOOSEST)), self.scale, 1.0)
        cap = min(stop.max_steps, 2 * len(self.at))

        def report(step: int, y: Tensor, residual: Tensor) -> bool:
            self.bar.update()
            return False

        solution = solve(
            self.secants, start * self.scale, (images, base, *[c[images] for c in self.run.conditioning]),
            solver=Picard(), stop=replace(stop, max_steps=cap), gradient=None,
            front=Front(None, MARGIN, latest=True), callback=None if isinstance(self.bar, Silent) else report,
        )  # fmt: skip
        self._change(images, rows_of(self.N, images) + self.spread @ (solution.z / self.scale - start))
        self.steps[images] += solution.evaluations
        self.status[images], self.residual[images] = solution.status, solution.residual
        return solution.converged

    def _every_step(self, images: Tensor) -> None:
        """One evaluation of all T steps of some images."""
        m, (n, T) = self.run.map, (len(images), self.N.shape[1])
        k = torch.arange(T, device=images.device)
        x = rows_of(self.x, images)[:, :T]
        inputs = [c[images].repeat_interleave(T, 0) for c in self.run.conditioning]
        N = m.remainder(x.reshape(n * T, -1), k.repeat(n), inputs).view(n, T, -1)
        self.residual[images] = ((N - rows_of(self.N, images)) * scale_of(m.chain)).square().mean((1, 2)).sqrt()
        self.map.evaluations[images] += T
        self.steps[images] += 1
        before = x[:, self.at]
        self.secants.note(images, before, N[:, self.at])
        moved = m.linear.trajectory(rows_of(self.base, images), N)[:, self.at] - before
        self._change(images, N + self.spread @ self.secants.change(images, moved))
        self.bar.update()
        if self.callback is not None:
            seen = self.x.unflatten(2, m.network.shape)
            self.stopped = bool(self.callback(int(self.steps.max()), seen, self.residual.clone()))

    def _change(self, images: Tensor, N: Tensor) -> None:
        x = self.run.map.linear.trajectory(rows_of(self.base, images), N)
        if len(images) == len(self.x):
            self.N, self.x = N, x
        else:
            self.N[images], self.x[images] = N, x

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


def between(tolerance: float | Tensor, least: float, most: float) -> float | Tensor:
    """The tolerance, raised to `least` or lowered to `most`."""
    return tolerance.clamp(least, most) if isinstance(tolerance, Tensor) else min(max(tolerance, least), most)


def _selected(stop: Stop, images: Tensor) -> Stop:
    return replace(stop, rtol=_of(stop.rtol, images), atol=_of(stop.atol, images))
