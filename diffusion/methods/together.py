"""All time steps in every round, and the error of x_0 measured at every step of the chain that is returned.

The front of finished steps stops by a tolerance per step. What the steps that it froze lack is then measured, by one
round at the states returned: images that miss the error asked for go on from there. What ten attempts do not settle is
sampled step by step, which is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pydeqsolve import Solution, Status, Stop

from ..arguments import Silent
from ..chain import Chain, interpolation
from ..sampler import Sampler, scale_of
from .defects import carried, defects, rounding
from .goal import Found, Goal
from .nodes import START, possible, start
from .visits import Visits

ATTEMPTS = 10
RTOL = 0.1  # rtol of the front for an error asked for of 1
POWER = 4  # of σ: the tolerance is halved where it is 1
GAIN = 0.7  # a solve that missed is followed by one for so much of the error asked for
SLOW = 0.8  # a round that leaves more of the error than this is followed by a solve
NEAR_FLOOR = 5.0  # an estimate within so many floors that no longer falls has come to the network's rounding


def weight_of(chain: Chain, rtol: Tensor, precision: float) -> Tensor:
    """1/(1 + σ^POWER) (n, T), by which a step's tolerance is multiplied, no less than leaves it at rounding; rtol (n,).

    What a step without signal lacks is amplified by all that follow, and a correction takes away least of it.
    """
    weight = 1 / (1 + scale_of(chain)[:, 0].pow(POWER))
    return torch.maximum(weight, (precision / 2 / rtol)[:, None]).clamp_max(1.0)


@dataclass(eq=False)
class Together:
    """One call of `sample` on its way, all steps in every round."""

    run: Sampler
    goal: Goal
    solver: Any
    window: int | None
    portion: int | None  # time steps evaluated at once, at most, when the error is measured
    bar: Any
    callback: Any
    found: Found

    def start(self, levels: Sequence[int]) -> Tensor:
        """A first guess of N (B, T, D): by coarser chains, by two rounds on the nodes, or 0."""
        run, found, T = self.run, self.found, len(self.run.map.chain)
        guess = torch.zeros_like(found.N)
        if not levels and possible(run, self.window) and self.goal.left > START:
            guess, rounds, rows = start(run)
            found.evaluations += rows
            found.steps += rounds
            self.bar.update(rounds)
        for count in levels:
            if self.goal.left < 2:
                break
            coarse, at = run.coarse(count)
            stop = Stop(RTOL * self.goal.error, max_steps=min(T, self.goal.left - 1))
            _, solution, _, rows = coarse.solve(guess[:, at], self.solver, stop, None, self.bar, None)
            guess = interpolation(at.cpu(), T).to(guess.device) @ solution.z
            found.evaluations += rows
        return guess

    def solve(self, guess: Tensor, images: Tensor) -> None:
        """Samples the images (n,) from a guess of their N (n, T, D).

        The first attempt is a solve. What it leaves is corrected by the defects that were measured and by what their
        steps' moves have told (`Visits.foretold`), and measured again, as long as the error falls. Where it does not,
        the front is solved for more tightly.
        """
        goal, share = self.goal, guess.new_ones(len(images))
        front, before = torch.ones_like(images, dtype=torch.bool), torch.full_like(share, torch.inf)
        visits = Visits.none(self.found.N, goal.precision)
        for _ in range(ATTEMPTS):
            if not len(images) or not goal.left:
                return
            error, guess = torch.full_like(share, torch.inf), guess.clone()
            for part, solving in ((front, True), (~front, False)):
                if bool(part.any()) and goal.left and not self.found.stopped:
                    guess[part], error[part] = self._attempt(images[part], guess[part], share[part], visits, solving)
            if self.found.stopped:
                return
            asked, slow = goal.error[images], error > SLOW * before
            stalled = slow & (error > asked) & (error <= NEAR_FLOOR * goal.floor[images])
            self.found.status[images[stalled]] = int(Status.STALLED)
            share = torch.where(front, share * (GAIN * asked / error).clamp(1e-3, 0.5), share)
            open_ = (error > asked) & ~stalled & error.isfinite()
            share, guess, before, front, images = (v[open_] for v in (share, guess, error, slow, images))
        self._in_sequence(images)

    def _attempt(
        self, images: Tensor, guess: Tensor, share: Tensor, visits: Visits, solving: bool
    ) -> tuple[Tensor, Tensor]:
        """A solve, if so, and the measurement of what it gave: N (n, T, D) corrected by it, and the estimate (n,)."""
        run, found, goal = self.run.pick(images), self.found, self.goal
        m, base, T = run.map, run.base(), guess.shape[1]
        x, N, settled = m.linear.trajectory(base, guess, images), guess, torch.full_like(images, not solving) > 0
        most = self.portion or T
        measuring = -(-T // most)  # rounds that it may take
        measured = goal.left >= measuring
        if not measured and bool(found.error[images].isfinite().all()):
            return guess, torch.full_like(share, torch.inf)  # what was measured before stays
        if solving and (goal.left > measuring or not measured):
            rounds = min(T, goal.left - measuring if measured else goal.left)
            x, solution, rows = self._front(
                run, guess, Stop(RTOL * share * goal.error[images], max_steps=rounds), visits
            )
            N, settled = solution.z, solution.converged
            found.note(images, solution.evaluations, rows, solution.residual)
        delta, error = torch.zeros_like(N), torch.full_like(share, torch.inf)
        if measured and not found.stopped:
            delta, rows = defects(m, images, x, N, visits, settled, run.conditioning, most)
            error = carried(m.linear, base, x, N, delta, visits.slope[images], visits.least[images], images)
            goal.raised(images, rounding(m, base, x, N, visits.slope[images], goal.precision))
            error = torch.maximum(error, goal.floor[images])
            found.note(images, (rows > 0).long(), rows, (delta * scale_of(m.chain)).square().mean((1, 2)).sqrt())
            self._tell(images, x)
        found.take(images, x, N, error)
        return (N + visits.foretold(m.linear, delta, images) if measured else N), error

    def _front(self, run: Sampler, guess: Tensor, stop: Stop, visits: Visits) -> tuple[Tensor, Solution, Tensor]:
        """The fixed point to a tolerance per step: states, solution and rows (n,); notes the visits."""
        images, before = run.image, self.found.told

        def watch(step: int, trajectory: Tensor, residual: Tensor) -> bool:
            self.found.residual[images] = residual
            self.found.told = before + step - 1
            self._tell(images, trajectory.flatten(2))
            return self.found.stopped

        run.map.visits = visits
        try:
            x, solution, _, rows = run.solve(
                guess, self.solver, stop, self.window, self.bar, None if self.callback is None else watch,
                weight=weight_of(run.map.chain, torch.as_tensor(stop.rtol), self.goal.precision),
            )  # fmt: skip
        finally:
            run.map.visits = None
        return x, solution, rows

    def _tell(self, images: Tensor, x: Tensor) -> None:
        """The user's callback, which sees all images while some are solved for; and the bar, of the measurement."""
        self.found.told += 1
        if self.callback is not None:
            states = self.found.x.clone()
            states[images] = x
            shape = self.run.map.network.shape
            told = self.callback(self.found.told, states.unflatten(2, shape), self.found.residual.clone())
            self.found.stopped = bool(told)

    def _in_sequence(self, images: Tensor) -> None:
        """Samples images step by step, where rounds enough are left."""
        T = self.found.N.shape[1]
        if not len(images) or self.goal.left < T:
            return
        part = self.run.pick(images)
        x, _, _, rows = part.sequential(Silent())
        self.found.x[images] = x
        self.found.note(images, torch.full_like(rows, T), rows, torch.zeros_like(self.found.residual[images]))
        self.found.error[images] = self.goal.floor[images]
