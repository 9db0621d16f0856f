"""All time steps in every round, and the error of x_0 measured at every step of the chain that is returned.

The front of finished steps stops by a tolerance per step. What the steps that it froze lack is then measured, by one
round at the states returned: images that miss the error asked for go on from there. What ten attempts do not settle is
sampled step by step, which is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pydeqsolve import Anderson, Front, Solution, Status, Stop, solve

from ..arguments import check_solver
from ..chain import Chain
from ..checks import count
from ..problem import ChainProblem, Found, in_steps
from ..remainder import reachable, scale_of
from ..trajectory import EditedChain
from .defects import carried, defects, lowest, rounding
from .goal import ROUNDING, Goal, Watch
from .grid import TimeGrid
from .visits import Visits

SOLVER = Anderson(memory=2, coupling="causal", safeguard=10.0)
CLIPPED_WINDOW = 100  # steps; without a window a chain of 1000 that clips hardly ends
FEWEST_STEPS = 60  # with fewer the nodes are too few to tell what they miss
FEWEST_KNOWN = 50  # of a chain near one that is known: what changes is smoother
START = 2  # first rounds that are made on the nodes
# A step within this many times rtol, in units of σ ε, leaves an error of a few rtol in x_0.
UNITS_PER_RTOL = 5.0
MARGIN = 0.5
ATTEMPTS = 10
EXACT = 0.5  # machine epsilons that a step of a chain that clips may lack: what clipping hides no slope tells
# What rounding grows to in such a chain, at least: the cube root of the machine epsilon, no more than this.
UNSEEN = 5e-4
RTOL = 0.1  # rtol of the front for an error asked for of 1
POWER = 4  # of σ: the tolerance is halved where it is 1
GAIN = 0.7  # a solve that missed is followed by one for so much of the error asked for
SLOW = 0.8  # a round that leaves more of the error than this is followed by a solve


@dataclass(frozen=True)
class Parallel:
    """All time steps in every round.

    window: time steps evaluated at once, at most, so a round holds at most window·B states; None is all. Without a
    window the first two rounds of a chain of 60 steps and more evaluate a few time steps. A chain that clips is sampled
    one step after the other unless a window or a callback is given, or `max_rounds` allows fewer rounds: then every
    step is solved for to the network's rounding, 100 at once where no window says otherwise, because clipped pixels are
    stiff and far ahead of the converged prefix their remainders are of no use yet.
    solver: Anderson(2, coupling="causal", safeguard=10) or any other forward solver of `pydeqsolve`.
    """

    window: int | None = None
    solver: Any = SOLVER

    def __post_init__(self) -> None:
        if self.window is not None:
            object.__setattr__(self, "window", count("window", self.window, least=1))
        check_solver(self.solver)

    def find(self, problem: ChainProblem, goal: Goal, watch: Watch, guess: Tensor | None = None) -> Found:
        """States, their error and status, from a guess of N (B, T, D)."""
        base = problem.base()
        found = Found.of(base.clone(), torch.zeros_like(base[:, 1:]))
        together = Together(problem, goal, self.solver, width(problem, self.window), watch, found)
        # All steps together to rounding took 291 rounds and 83 T evaluations of digits at T = 300: one by one is less.
        if together.exact and self.window is None and watch.callback is None and goal.left >= len(problem.map.chain):
            together.in_sequence(problem.image)
        else:
            together.solve(together.start(guess), problem.image)
        return goal.judged(found)


def width(problem: ChainProblem, window: int | None) -> int | None:
    """Time steps evaluated at once, at most, where `window` was asked for."""
    return CLIPPED_WINDOW if window is None and problem.map.chain.clip is not None else window


def smooth(problem: ChainProblem, window: int | None = None, fewest: int = FEWEST_STEPS) -> bool:
    """Whether a coarse grid serves: the chain long, in closed form, all of it at hand, its states smooth."""
    linear, chain, window = problem.map.linear, problem.map.chain, width(problem, window)
    if chain.clip is not None or len(chain) < fewest or chain.eta != 0 or not (window is None or window >= len(chain)):
        return False
    alike = not bool((chain.blind | chain.still).any())  # else N is another quantity at that step
    return alike and linear.safe and not isinstance(linear, EditedChain)


def block_stop(stop: Stop, scale: Tensor, units: float = UNITS_PER_RTOL) -> Stop:
    """The tolerance per step, of σ ε, that belongs to the user's: units·rtol + σ atol. scale (T, 1) is σ."""
    atol = units * stop.rtol
    if isinstance(stop.atol, Tensor) or stop.atol:
        own = torch.as_tensor(stop.atol, dtype=torch.float64, device=scale.device)
        common = torch.as_tensor(atol, dtype=torch.float64, device=scale.device)
        atol = common.reshape(-1, 1) + own.reshape(-1, 1) * scale[:, 0]
    return replace(stop, rtol=0.0, atol=atol)


def weight_of(chain: Chain, rtol: Tensor, precision: float) -> Tensor:
    """1/(1 + σ^POWER) (n, T), by which a step's tolerance is multiplied, no less than leaves it at rounding; rtol (n,).

    What a step without signal lacks is amplified by all that follow, and a correction takes away least of it.
    """
    weight = 1 / (1 + scale_of(chain)[:, 0].pow(POWER))
    return torch.maximum(weight, (precision / 2 / rtol)[:, None]).clamp_max(1.0)


def fixed_point(
    problem: ChainProblem, guess: Tensor, stop: Stop, solver: Any = SOLVER, window: int | None = None,
    callback: Callable[[int, Tensor, Tensor], Any] | None = None, precision: float | None = None,
) -> tuple[Tensor, Solution, Tensor]:  # fmt: skip
    """The fixed point of all steps together from a guess of N (B, T, D): states, solution in N, and rows (B,).

    callback(step, states, residual): after every round. precision: of the network, to weigh the steps' tolerances by
    `weight_of`; None weighs all alike.
    """
    m, base, image = problem.map, problem.base(), problem.image
    count = len(image) if problem.numbers is None or not len(image) else int(image.max()) + 1
    m.evaluations = torch.zeros(count, dtype=torch.int64, device=base.device)
    scale = scale_of(m.chain)
    weight = None if precision is None else weight_of(m.chain, torch.as_tensor(stop.rtol), precision)
    stop = block_stop(replace(stop, rtol=reachable(stop.rtol, m.network.dtype)), scale)
    if weight is not None:
        tolerance = torch.as_tensor(stop.atol, dtype=torch.float64, device=base.device)
        stop = replace(stop, atol=tolerance.reshape(-1, 1) * weight)

    def report(step: int, y: Tensor, residual: Tensor) -> Any:
        return callback is not None and callback(step, m.linear.trajectory(base, y / scale, image), residual)

    solution = solve(
        m, guess * scale, (image, base, *problem.conditioning), solver=solver, stop=stop, gradient=None,
        front=Front(window, MARGIN, latest=True), callback=None if callback is None else report,
    )  # fmt: skip
    solution = replace(solution, z=solution.z / scale)
    return m.linear.trajectory(base, solution.z, image), solution, m.evaluations[image]


@dataclass(eq=False)
class Together:
    """One solve on its way, all steps in every round."""

    problem: ChainProblem
    goal: Goal
    solver: Any
    window: int | None
    watch: Watch
    found: Found

    @property
    def exact(self) -> bool:
        """Whether every step is evaluated at its own end, to rounding: of a chain that clips no slope bounds the error.

        Along a move that clipping cuts off the map is flat, however steep it is beside it.
        """
        return self.problem.map.chain.clip is not None

    def start(self, guess: Tensor | None) -> Tensor:
        """A better guess of N (B, T, D), where a coarse grid serves: changed by what two rounds there change.

        As long as the errors are tenths, or vary slowly over time, N at n ≪ T steps says as much as N at all of them.
        """
        problem, found = self.problem, self.found
        N = torch.zeros_like(found.N) if guess is None else guess
        if not smooth(problem, self.window, FEWEST_STEPS if guess is None else FEWEST_KNOWN) or self.goal.left <= START:
            return N
        grid = TimeGrid.sampling(N.shape[1], N.device)
        part, image, before = grid.part(problem.map, len(N), scaled=False), problem.image, N[:, grid.at]
        base = problem.map.linear.trajectory(problem.base(), N)[:, grid.at]
        base, at_nodes = base - part.linear.trajectory(torch.zeros_like(base), before), before
        for _ in range(START):
            at_nodes = part(at_nodes, image, base, *problem.conditioning)
        found.evaluations += part.evaluations
        found.steps += START
        self.watch.bar.update(START)
        sound = at_nodes.isfinite().flatten(1).all(1)[:, None, None]
        return N + grid.spread @ torch.where(sound, at_nodes - before, 0.0)

    def solve(self, guess: Tensor, images: Tensor, told: Sequence[Tensor] | None = None) -> None:
        """Samples the images (n,) from a guess of their N (n, T, D), and of slope, least and across of `Visits` (B, T).

        The first attempt is a solve. What it leaves is corrected by the defects that were measured and by what their
        steps' moves have told (`Visits.foretold`), and measured again, as long as the error falls. Where it does not,
        the front is solved for more tightly.
        """
        goal, share = self.goal, guess.new_ones(len(images))
        front, before = torch.ones_like(images, dtype=torch.bool), torch.full_like(share, torch.inf)
        visits = Visits.none(self.found.N, goal.precision)
        if told is not None:
            visits.slope, visits.least, visits.across = told
        for _ in range(ATTEMPTS):
            if not len(images) or not goal.left:
                return
            error, guess, delta = torch.full_like(share, torch.inf), guess.clone(), torch.zeros_like(guess)
            for part, solving in ((front, True), (~front, False)):
                if bool(part.any()) and goal.left and not self.watch.stopped:
                    found = self._attempt(images[part], guess[part], share[part], visits, solving)
                    guess[part], delta[part], error[part] = found
            if self.watch.stopped:
                return
            asked, slow = goal.error[images], error > SLOW * before
            stalled = slow & (error > asked) & (error <= goal.near[images])
            self.found.status[images[stalled]] = int(Status.STALLED)
            share = torch.where(front, share * (GAIN * asked / error).clamp(1e-3, 0.5), share)
            open_ = (error > asked) & ~stalled & error.isfinite()
            if self.exact:
                images = images[error > asked]
                break
            share, guess, delta, before, front, images = (
                v[open_] for v in (share, guess, delta, error, slow, images)
            )  # fmt: skip
            if len(images):
                guess = guess + visits.foretold(self.problem.map.linear, delta, images)
        self.in_sequence(images)

    def _attempt(
        self, images: Tensor, guess: Tensor, share: Tensor, visits: Visits, solving: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A solve, if so, and the measurement of what it gave: N and its defects (n, T, D), and the estimate (n,)."""
        problem, found, goal = self.problem.pick(images), self.found, self.goal
        m, base, T = problem.map, problem.base(), guess.shape[1]
        x, N, settled = m.linear.trajectory(base, guess, images), guess, torch.full_like(images, not solving) > 0
        most = self.window or T
        windows = -(-T // most)
        looking = windows == 1 or (most > 1 and goal.left > windows + 1)  # beside the states, in a round of its own
        measuring = windows + (looking and windows > 1)  # rounds that it may take
        measured = goal.left >= measuring
        if not measured and bool(found.error[images].isfinite().all()):
            return guess, torch.zeros_like(guess), torch.full_like(share, torch.inf)  # what was measured before stays
        if solving and (goal.left > measuring or not measured):
            rounds = min(T, goal.left - measuring if measured else goal.left)
            m.visits = visits
            rtol = RTOL * share * goal.error[images]
            rtol = torch.full_like(rtol, EXACT * goal.precision) if self.exact else rtol
            x, solution, rows = fixed_point(
                problem, guess, Stop(rtol, max_steps=rounds), self.solver, self.window,
                self._telling(images), goal.precision,
            )  # fmt: skip
            m.visits = None
            N, settled = solution.z, solution.converged
            found.note(images, solution.evaluations, rows, solution.residual)
        delta, error = torch.zeros_like(N), torch.full_like(share, torch.inf)
        if measured and not self.watch.stopped:
            delta, rows = defects(m, images, x, N, visits, settled, problem.conditioning, most, looking)
            slope = visits.slope[images]
            least = lowest(m, slope, visits.least[images])
            error = carried(m.linear, base, x, N, delta, slope, least, visits.across[images], images)
            seen = visits.across[images], goal.precision, visits.near[images], visits.large(images, x[:, :T])
            goal.raised(images, *rounding(m, base, x, N, slope, *seen))
            if self.exact:
                goal.raised(images, torch.full_like(error, min(UNSEEN, goal.precision ** (1 / 3)) / ROUNDING))
                error = error.masked_fill(~settled, torch.inf)
            error = torch.maximum(error * found.missed(images, x), goal.floor[images])
            found.note(images, (rows > 0).long(), rows, (delta * scale_of(m.chain)).square().mean((1, 2)).sqrt())
            self.watch.tell(self.problem, found, x, images)
        found.take(images, x, N, error)
        return N, delta, error

    def _telling(self, images: Tensor) -> Callable[[int, Tensor, Tensor], bool] | None:
        """What a solve of some images calls after every round; None where nobody listens."""
        watch, before = self.watch, self.watch.told
        if watch.quiet:
            return None

        def told(step: int, states: Tensor, residual: Tensor) -> bool:
            watch.bar.update()
            self.found.residual[images] = residual
            watch.told = before + step - 1
            watch.tell(self.problem, self.found, states, images)
            return watch.stopped

        return told

    def in_sequence(self, images: Tensor) -> None:
        """Samples images step by step, where rounds enough are left."""
        T = self.found.N.shape[1]
        if not len(images) or self.goal.left < T:
            return
        self.found.states[images] = in_steps(self.problem.pick(images))
        rows = torch.full_like(images, T)
        self.found.note(images, rows, rows, torch.zeros_like(self.found.residual[images]))
        self.found.error[images] = self.goal.floor[images]
