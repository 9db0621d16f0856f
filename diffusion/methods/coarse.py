"""Long chains: the nonlinear work on a few time steps, every step evaluated once.

The remainders N vary slowly over time, so their large errors can be removed on n ≪ T nodes: N is solved for there and
runs between them as a cubic spline, while the sums of the chain still run over all T steps. What is left is small and
rough (a network's ε wiggles from step to step), so no spline can give it: one pass evaluates every step at the
trajectory found, N ← N'(x). What that does to later states is smooth again: it is foretold by the Jacobians that the
rounds on the nodes have taught (`secants`), and corrected on the nodes, for N + spline(change).

The error of what that leaves is measured (`defects`): by the next pass, which evaluates every step of it; or, where the
error asked for is not small, at the nodes and at one step between each two, through which a spline runs. What a few
passes do not settle is solved for all steps together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pydeqsolve import Front, Picard, Status, Stop, solve

from ..problem import ChainProblem, Found
from ..remainder import scale_of
from .defects import carried, filled, lowest, rounding, scatter, spread_of
from .goal import Goal, Watch
from .grid import TimeGrid, between, interpolation
from .parallel import MARGIN, SOLVER, UNITS_PER_RTOL, Together, block_stop, smooth
from .secants import Secants, rows_of
from .visits import slopes

PASSES = 6
SHARE = 0.004  # of the error that a pass measured: to less the nodes need not be solved, which leave more
SLOW = 0.3  # a pass that leaves more of the error than this is the last: all steps together do better
FIRST, CORRECTION = 10.0, 0.3  # tolerances on the nodes, in units of the error asked for
LOOSEST = 0.2  # the largest tolerance on the nodes: with 16 bits a hundred times rtol would be none at all
# The tightest tolerance on the nodes, in units of the network's machine epsilon, is that of a front over all steps.
ROUNDING = MARGIN * UNITS_PER_RTOL / 2
SAMPLED = 3e-4  # the least error asked for that is measured at a sample of the steps
DOUBT = 2.0  # standard deviations of what the steps that are not sampled may differ by
TRIALS = 3  # samples after a pass, each at other steps: what one shows is corrected before the next


@dataclass(frozen=True)
class CoarseToFine:
    """The nonlinear work on a coarse time grid, every step evaluated and the error measured.

    Needs a chain of at least 60 steps that begins with signal, with eta = 0, no clipping and no edit.
    """

    def find(self, problem: ChainProblem, goal: Goal, watch: Watch, guess: Tensor | None = None) -> Found:
        """States, their error and status, from a guess of N (B, T, D)."""
        if not smooth(problem):
            raise ValueError(
                "method: CoarseToFine() needs eta = 0, no clipping, no edit and a chain of at least 60 steps that "
                "begins with signal"
            )
        base = problem.base()
        N = torch.zeros_like(base[:, 1:]) if guess is None else guess.clone()
        states = base.clone() if guess is None else problem.map.linear.trajectory(base, N)
        passes = Passes(problem, goal, watch, Found.of(states, N))
        passes.solve()
        return goal.judged(passes.found)


@dataclass(eq=False)
class Passes:
    """One call of `sample` on its way. All tensors are over the B images."""

    problem: ChainProblem
    goal: Goal
    watch: Watch
    found: Found

    def __post_init__(self) -> None:
        m, latent = self.problem.map, self.problem.latent
        grid = TimeGrid.sampling(len(m.chain), latent.device)
        self.map = grid.part(m, len(latent), scaled=True)
        self.at, self.spread, self.scale = grid.at, grid.spread, self.map.unit
        self.secants = Secants(self.map, len(latent), latent.shape[1])
        self.chain, self.base = self.secants.chain, self.problem.base()
        self.before = torch.full_like(self.found.error, torch.inf)  # what the pass before measured
        self.slow = torch.zeros_like(self.before, dtype=torch.bool)
        self.seen_x = torch.full_like(self.found.N, torch.nan)  # states of the pass before, and the values there
        self.seen_N = torch.zeros_like(self.found.N)
        self.image = torch.full_like(latent, torch.nan)  # the x_0 measured before, and the error expected of it
        self.expected = torch.full_like(self.before, torch.nan)
        self.linear = interpolation(self.at.cpu(), len(m.chain), 1).to(latent.device)

    def solve(self) -> None:
        """Samples all images."""
        found, goal = self.found, self.goal
        everyone = torch.arange(len(found.states), device=found.states.device)
        good = (
            self._on_nodes(everyone, FIRST * goal.error)
            if goal.left > 1
            else torch.ones_like(everyone, dtype=torch.bool)
        )
        for _ in range(PASSES):
            images = everyone[good & (found.error > goal.error) & ~self.slow]
            if not len(images) or not goal.left:
                break
            images = self._every_step(images)
            if self.watch.stopped or not len(images):
                break
            enough = torch.maximum(CORRECTION * goal.error[images], SHARE * self.before[images])
            good[images] = self._on_nodes(images, enough)
            images = images[good[images] & (goal.error[images] >= SAMPLED)]
            for trial in range(TRIALS):
                if len(images) and goal.left:
                    images = self._sampled(images, trial)
        left = everyone[~(found.error <= goal.error) & (found.status != int(Status.STALLED))]
        if len(left) and goal.left and not self.watch.stopped:
            guess = found.N[left].nan_to_num(0.0, 0.0, 0.0)
            told = [self._everywhere(part) for part in (self.secants.slope, self.secants.steepest, self.secants.across)]
            Together(self.problem, goal, SOLVER, None, self.watch, found).solve(guess, left, told)

    def _on_nodes(self, images: Tensor, tolerance: Tensor) -> Tensor:
        """Solves for what N must change by, on the nodes, to a tolerance (n,) of σ ε; (n,) bool: solved."""
        found = self.found
        start = found.N[images[:, None], self.at]
        base = found.states[images[:, None], self.at] - self.chain.response(start)
        least = ROUNDING * self.goal.precision
        tolerance = tolerance.clamp(least, LOOSEST)
        stop = block_stop(Stop(tolerance, max_steps=min(2 * len(self.at), self.goal.left - 1)), self.scale, 1.0)

        def report(step: int, y: Tensor, residual: Tensor) -> bool:
            self.watch.bar.update()
            return False

        before = self.map.evaluations.clone()
        solution = solve(
            self.secants, start * self.scale, (images, base, *[c[images] for c in self.problem.conditioning]),
            solver=Picard(), stop=stop, gradient=None,
            front=Front(None, MARGIN, latest=True), callback=None if self.watch.quiet else report,
        )  # fmt: skip
        self._change(images, rows_of(found.N, images) + self.spread @ (solution.z / self.scale - start))
        found.note(images, solution.evaluations, (self.map.evaluations - before)[images], solution.residual)
        return solution.converged

    def _every_step(self, images: Tensor) -> Tensor:
        """One evaluation of all T steps of some images, which measures their error; those that miss it, changed."""
        found, T = self.found, self.found.N.shape[1]
        x, old = rows_of(found.states, images), rows_of(found.N, images)
        N = self._evaluate(images, x, torch.arange(T, device=images.device))
        found.note(images, torch.ones_like(images), torch.full_like(images, T), self._size(N - old, slice(None)))
        self.secants.note(images, x[:, self.at], N[:, self.at])
        moved, changed = x[:, :T] - self.seen_x[images], N - self.seen_N[images]
        slope, across, told = slopes(moved, changed, x[:, :T], self.goal.precision)
        own = filled(self.secants.slope[images]) @ self.linear.T
        across = across.masked_fill(~told, torch.nan)
        self._measure(images, x, old, N - old, torch.where(told, slope, own), across)
        self.seen_x[images], self.seen_N[images] = x[:, :T], N
        self.watch.tell(self.problem, found, found.states)
        error, before = found.error[images], self.before[images]
        missed, self.before[images] = ~(error <= self.goal.error[images]), error
        self.slow[images] = missed & ~(error <= SLOW * before)
        stalled = self.slow[images] & (error <= self.goal.near[images])
        found.status[images[stalled]] = int(Status.STALLED)
        if self.watch.stopped or self.goal.left < 2:
            return images[:0]
        missed &= ~stalled
        self._correct(images[missed], N[missed])
        return images[missed & ~self.slow[images]]

    def _sampled(self, images: Tensor, trial: int) -> Tensor:
        """Measures the error at the nodes and between them; those that miss it, changed by what was seen."""
        found, device = self.found, images.device
        at = torch.cat([self.at, between(self.at.cpu(), trial).to(device)]).unique()
        x, N, T = rows_of(found.states, images), rows_of(found.N, images), found.N.shape[1]
        value = self._evaluate(images, x, at)
        delta = value - N[:, at]
        found.note(images, torch.ones_like(images), torch.full_like(images, len(at)), self._size(delta, at))
        seen_x, seen_N = rows_of(self.seen_x, images), rows_of(self.seen_N, images)
        moved = x[:, :T] - seen_x
        slope, across, told = slopes(moved[:, at], value - seen_N[:, at], x[:, at], self.goal.precision)
        slope = filled(torch.where(told, slope, torch.nan))
        across_steps = interpolation(at.cpu(), T, 1).to(device)
        doubt = scatter(at, slope) @ across_steps.T
        slope = slope @ across_steps.T
        expected = seen_N + slope[..., None] * moved - N
        delta = expected + interpolation(at.cpu(), T).to(device) @ (delta - expected[:, at])
        across = filled(across.masked_fill(~told, torch.nan)) @ across_steps.T
        self._measure(images, x, N, delta, slope, across, doubt[..., None] * moved)
        missed = ~(found.error[images] <= self.goal.error[images])
        if trial + 1 == TRIALS or not self.goal.left:
            return images[:0]
        self._correct(images[missed], (N + delta)[missed])
        return images[missed]

    def _correct(self, images: Tensor, N: Tensor) -> None:
        """N (n, T, D) instead of what it is, and on top what it changes later by the Jacobians at the nodes."""
        if len(images):
            x = self.problem.map.linear.trajectory(rows_of(self.base, images), N)
            moved = (x - rows_of(self.found.states, images))[:, self.at]
            self._change(images, N + self.spread @ self.secants.change(images, moved))

    def _evaluate(self, images: Tensor, x: Tensor, at: Tensor) -> Tensor:
        """N' (n, len(at), D) at steps `at` of the states x (n, T+1, D)."""
        n, count = len(images), len(at)
        inputs = [c[images].repeat_interleave(count, 0) for c in self.problem.conditioning]
        self.watch.bar.update()
        return self.problem.map.remainder(x[:, at].flatten(0, 1), at.repeat(n), inputs).view(n, count, -1)

    def _size(self, delta: Tensor, at: Tensor | slice) -> Tensor:
        return (delta * scale_of(self.problem.map.chain)[at]).square().mean((1, 2)).sqrt()

    def _measure(
        self, images: Tensor, x: Tensor, N: Tensor, delta: Tensor, slope: Tensor, across: Tensor,
        doubt: Tensor | None = None,
    ) -> None:  # fmt: skip
        """The error of states x that N made, from their defects (n, T, D).

        What the states found since moved x_0 by is, but for what is left now, the error of the states measured before:
        where it was underestimated, this estimate is raised by as much.
        """
        base, image, size = rows_of(self.base, images), x[:, -1], x[:, -1].norm(dim=1)
        m, steepest = self.problem.map, self.secants.steepest[images]
        least = lowest(m, steepest, filled(steepest) @ self.linear.T)
        across = torch.fmax(across, filled(self.secants.across[images]) @ self.linear.T)
        error = carried(m.linear, base, x, N, delta, slope, least, across, images)
        if doubt is not None:
            error = error + DOUBT * spread_of(self.problem.map.linear, x, slope, doubt)
        missed = (image - self.image[images]).norm(dim=1) / (self.expected[images] * size)
        error = error * missed.nan_to_num(1.0, 1.0).clamp_min(1.0)
        self.image[images], self.expected[images] = image, error
        self.goal.raised(images, *rounding(m, base, x, N, slope, across, self.goal.precision))
        self.found.error[images] = torch.maximum(error, self.goal.floor[images])

    def _everywhere(self, slope: Tensor) -> Tensor:
        """Slopes (B, T) from those at the nodes (B, n), NaN of an image of which none is known."""
        unknown = slope.isnan().all(1, keepdim=True)
        return (filled(slope) @ self.linear.T).masked_fill(unknown, torch.nan)

    def _change(self, images: Tensor, N: Tensor) -> None:
        found = self.found
        x = self.problem.map.linear.trajectory(rows_of(self.base, images), N)
        if len(images) == len(found.states):
            found.N, found.states = N, x
        else:
            found.N[images], found.states[images] = N, x
        found.error[images] = torch.inf
