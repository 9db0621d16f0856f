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
from typing import Any

import torch
from torch import Tensor

from pydeqsolve import Front, Solution, Status, Stop, solve

from .arguments import Silent
from .nodes import Nodes
from .sampler import MARGIN, UNITS_PER_RTOL, Sampler, block_stop, scale_of

PASSES = 2
FIRST, CORRECTION = 50.0, 1.0  # tolerances on the nodes, in units of rtol
# The tightest tolerance on the nodes, in units of the network's machine epsilon, is that of a front over all steps.
ROUNDING = MARGIN * UNITS_PER_RTOL / 2
SETTLED = 30.0  # change of x_0 by the correction, relative, in units of rtol: three times the error asked for


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
