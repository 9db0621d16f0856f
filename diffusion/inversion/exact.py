"""Exact inversion: a few parallel rounds, then step by step where the image sampled is not near enough.

In the data's own directions a step F_k (`diffusion.backwards`) is nearly the identity, in all others it shrinks by
σ̄_{k+1}/σ̄_k, σ̄ = √((1−ᾱ)/ᾱ), because a denoiser forgets what is not like the data. For most of the chain that ratio is
near 1, every step is a contraction, and all are solved at once. For the one to three steps next to the image it is near
0: these `stiff` steps are solved one by one.

On them ‖F_k(x) − x_{k+1}‖ has minima that are no roots (F_k folds space), where methods that make the residual as small
as they can, Anderson's of kind II or Gauss-Newton, come to rest at losses from 1e-5 (T = 50) to 1e-3 (T = 10). Roots
exist nevertheless when ε is bounded, as behind a group normalisation (F_k(x) ≈ a_k x far out, so its degree is 1).
Broyden's method looks for a root of its model instead, may let the residual grow, and steps over the folds.

The other steps are solved in sections, one after the other, each a fixed point: a section starts from a state that is
right, so it needs fewer rounds than all steps together, whose late ones wait for the early ones. In a section a step
that has settled, as all before it have, is evaluated no more. Where few rounds are allowed there is one section, whose
first rounds evaluate a few nodes and take the change of all remainders from a spline through theirs.

Then the image is sampled from the latent, as it will be returned. Where it is off by more than was asked, all steps are
solved one after the other, from what is known of them: the deepest way, and the surest, also where guidance makes many
steps stiff. That is done again while it halves the error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pydeqsolve import Anderson, Broyden, Picard, Status

from ..arguments import check_solver
from ..chain import Splitting
from ..checks import flag
from ..problem import ChainProblem, Found
from .backwards import SPARE, Backwards, Steps, removing, stiff_steps
from .loss import Best, Call, latents
from .nearest import ROUNDS, nearest
from .one_pass import one_pass

STIFFNESS = 0.7  # 1 − σ̄_{k+1}/σ̄_k from which a step is solved by itself
# κ = SHARE·σ/(σ² + RESOLUTION²) removes SHARE of the noise, but little of noise so faint that a network cannot tell it
# from the image's own grain. Stiff steps: 0.6 to 0.85 need as many rounds. The others: "v" needs a round more.
SHARE, RESOLUTION = 0.75, 0.03
JOINT_SHARE, JOINT_RESOLUTION = 0.85, 0.1
STIFF_SOLVER = Broyden(memory=24)
SOLVER = Anderson(memory=4, coupling="causal", safeguard=10.0)
SECTIONS, SECTION_ROUNDS = (
    (0.2, 0.36, 0.44),
    10,
)  # shares of the steps, from the image; rounds that must be left for each
# Of the error asked for: what a stiff step may use, all others together, and all that are solved one by one.
STIFF_PART, JOINT_PART, STEP_PART = 0.3, 0.3, 0.5
STIFF_ROUNDS, JOINT_ROUNDS, STEP_ROUNDS = 400, 24, 400  # the most of each
NODE_ROUNDS, ALL_ROUNDS = 4, 5  # of the joint ones: at most so many on nodes, and at least so many on all steps
# Evaluations in which the residual must halve, while it is as small as the network's rounding, and before.
STEP_PATIENCE, JOINT_PATIENCE = (10, 200), (3, 8)
CLIPPED_PATIENCE = (10, 30)  # of a chain that clips: what is cut off has no root to be found by waiting
ALLOWED, ALLOWED_PER_STEP = 1500, 20  # evaluations one after the other of an image
FORCING = 0.1  # the tolerance of the others, as part of the error which the stiff steps have left in the image
# What is tried on a step left unsolved: with more of the noise removed, then plain iteration.
RESCUES = (
    (lambda chain: removing(chain, 0.9, RESOLUTION), STIFF_SOLVER),
    (lambda chain: Splitting.named("epsilon", chain), Picard()),
)
VISIBLE = 0.03  # root mean square error of a pixel, of a range of 2, from which one-pass inversion may be better
FELL = 0.5  # another pass is made where the last has brought the error down to this part of what it was


@dataclass(frozen=True)
class Exact:
    """Every step read backwards as an equation for the state before it: a fixed point each, or most of them together.

    solver: of the steps that are not stiff, Anderson(4, coupling="causal", safeguard=10) or another forward solver.
    nearest: whether, of several states that a stiff step takes to the same image, the one of least |ε|² is looked for
        (`diffusion.inversion.nearest`): it brings back more of the latents that images were sampled from, at up to 265
        evaluations more for each such step.
    """

    solver: Any = SOLVER
    nearest: bool = False

    def __post_init__(self) -> None:
        check_solver(self.solver)
        flag("nearest", self.nearest)

    @torch.no_grad()
    def find(self, problem: ChainProblem, best: Best, call: Call, splitting: Splitting | None = None) -> Found:
        """Latents whose images are off by what `best` asks, as far as the rounds go; `best` has them.

        splitting: of the steps that are solved together; None is one that removes most of the noise.
        """
        network, (B, T), target = problem.map.network, (len(problem.latent), len(problem.map.chain)), problem.latent
        limit, error = math.inf if call.max_rounds is None else call.max_rounds, best.asked
        spared = limit - 2 * T if limit >= 3 * T else limit  # what is left is for one-pass inversion, if it comes to it
        allowance = torch.full((B,), ALLOWED + ALLOWED_PER_STEP * T, device=target.device)
        way = Backwards(problem, spared, allowance, call.bar)
        together(way, splitting, self.solver, error, self.nearest)
        images = torch.arange(B, device=target.device)
        best.offer(way.x, way.remainders(), images)
        again_and_again(way, best, spared)
        exhausted = (way.allowance <= SPARE * T) | (network.calls >= spared)
        doubted = ((best.error > VISIBLE) & target.isfinite().all(1)).nonzero()[:, 0]
        if len(doubted) and network.calls + T <= limit:
            way.evaluations[doubted] += T
            best.offer(one_pass(problem.pick(doubted)), None, doubted)
        found = latents(best.x_T, way.evaluations, network.calls - best.check, torch.cat(way.traces))
        found.status[~exhausted] = int(Status.STALLED)
        return found


def again_and_again(way: Backwards, best: Best, limit: float) -> None:
    """All steps one after the other, for the images that miss the error, while that halves it."""
    problem, target, error = way.problem, way.problem.latent, best.asked
    T, left, before = len(problem.map.chain), way.left, best.error.clone()
    images = ((before > error) & target.isfinite().all(1)).nonzero()[:, 0]
    while len(images) and problem.map.network.calls < limit:
        # Guidance makes what is left on the way larger in the image: less may be left by as much.
        asked = STEP_PART * error * (left[images] / before[images]).nan_to_num(1.0).clamp(1e-3, 1.0)
        again = Backwards(problem.pick(images), limit, way.allowance[images], way.bar)
        through = one_by_one(again, way.eps[images], asked / T**0.5, torch.minimum(left[images], before[images]))
        way.join(again, images)
        if bool(through.any()):
            best.offer(again.x[through], again.remainders()[through], images[through])
        now, reached = best.error[images], (again.left <= asked) | (again.left <= FELL * left[images])
        left[images] = again.left
        going = through & (now > error) & (now <= FELL * before[images]) & reached & (again.allowance > SPARE * T)
        images, before = images[going], best.error.clone()


def together(way: Backwards, splitting: Splitting | None, solver: Any, error: float, near: bool) -> None:
    """The stiff steps one by one, then all the others as one fixed point, no finer than what those have left allows.

    A step without signal comes by itself and last: its answer is −x̂_0, of pure noise, which may be steep.
    """
    chain, asked = way.problem.map.chain, torch.full_like(way.left, error)
    k, own = len(chain), removing(chain, SHARE, RESOLUTION)
    stiff = stiff_steps(chain, STIFFNESS)
    if stiff == 1 and k > 1 and chain.noise[-2] <= RESOLUTION * chain.size[-2]:
        stiff = 0  # its noise is so faint that the network does not tell it from the image's own grain
    kept = min(JOINT_ROUNDS, way.rounds_left // 4) if k > stiff else 0
    for _ in range(stiff):
        k -= 1
        way.take(k, k + 1, stiff_step(way, k, own, STIFF_PART * asked, max(0, way.rounds_left - kept), near))
    first = int(bool(chain.blind[0]) and k > 1)
    if k > 0:
        split = removing(chain, JOINT_SHARE, JOINT_RESOLUTION) if splitting is None else splitting
        in_sections(way, first, k, split, solver, asked)
    if first:
        rounds = int(min(STIFF_ROUNDS, way.rounds_left))
        guess = ((chain.noise[1] * way.last - way.x) / chain.signal[1])[:, None]
        found = way.solve(0, 1, own, STIFF_SOLVER, STIFF_PART * asked, rounds, patience=STEP_PATIENCE, guess=guess)
        way.take(0, 1, found)


def stiff_step(way: Backwards, k: int, own: Splitting, atol: Tensor, rounds: float, near: bool) -> Steps:
    """Step k by itself, to atol (B,): a root, or first, if `near`, the one nearest to the state after it.

    One is found at once where the noise is too faint for the network to tell, and a step that clips has none.
    """
    chain, most = way.problem.map.chain, int(min(STIFF_ROUNDS, rounds))
    if not near or chain.clip is not None or chain.noise[k] <= RESOLUTION * chain.size[k] or rounds < 2 * ROUNDS:
        return way.solve(k, k + 1, own, STIFF_SOLVER, atol, most, patience=STEP_PATIENCE)
    found = nearest(way, k, atol)
    missed = (~found.settled).nonzero()[:, 0]
    if len(missed):
        any_root = way.solve(
            k, k + 1, own, STIFF_SOLVER, atol[missed], most, patience=STEP_PATIENCE, images=missed
        )  # fmt: skip
        found.put(missed, any_root)
    return found


def in_sections(way: Backwards, first: int, last: int, splitting: Splitting, solver: Any, asked: Tensor) -> None:
    """The steps first … last − 1, the last ones first, in sections where the rounds left allow; else all as one."""
    steps = last - first
    several = steps >= len(SECTIONS) and way.rounds_left >= SECTION_ROUNDS * len(SECTIONS)
    sizes = [max(1, round(share * steps)) for share in SECTIONS[:-1]] if several else []
    sizes.append(steps - sum(sizes))
    able = not several and steps > 2 and not getattr(solver, "line_search", 0)  # a line search keeps no history
    for number, size in enumerate(sizes):
        rounds = int(min(JOINT_ROUNDS, way.rounds_left // (len(sizes) - number)))
        nodes = max(0, min(NODE_ROUNDS, rounds - ALL_ROUNDS)) if able else 0
        left = way.left.nan_to_num(0.0, 0.0, 0.0)
        atol = torch.maximum(JOINT_PART * asked, FORCING * left) * (size / steps) ** 0.5
        own = STIFF_SOLVER if several and last == len(way.problem.map.chain) else solver  # next to the image
        found = way.solve(
            last - size, last, splitting, own, atol, rounds, patience=JOINT_PATIENCE, node_rounds=nodes
        )  # fmt: skip
        way.take(last - size, last, found)
        last -= size


def one_by_one(way: Backwards, eps: Tensor, atol: Tensor, most: Tensor) -> Tensor:
    """Every step by itself to atol (B,), from what is known of ε (B, T, D); (B,) bool, the images that it came through.

    An image that has more left than `most` (B,) is given up: what a step leaves is not made good by those before it.
    """
    chain, through = way.problem.map.chain, torch.ones_like(atol, dtype=torch.bool)
    own, clips = removing(chain, SHARE, RESOLUTION), chain.clip is not None
    patience, rescues = (CLIPPED_PATIENCE, ()) if clips else (STEP_PATIENCE, RESCUES)
    for k in range(len(chain) - 1, -1, -1):
        through &= ~(way.left > most)
        if not bool(through.any()):
            break
        found = Steps(eps[:, k : k + 1].clone(), torch.zeros_like(atol), torch.ones_like(through))
        going = through.nonzero()[:, 0]
        found.put(going, way.solve(
            k, k + 1, own, STIFF_SOLVER, atol[going], STEP_ROUNDS, patience=patience, guess=found.eps[going],
            images=going,
        ))  # fmt: skip
        for splitting, solver in rescues:
            missed = (~found.settled).nonzero()[:, 0]
            if not len(missed) or not way.rounds_left:
                break
            other = way.solve(
                k, k + 1, splitting(chain), solver, atol[missed], STEP_ROUNDS, patience=STEP_PATIENCE, images=missed
            )
            better = other.residual < found.residual[missed]
            found.eps[missed] = torch.where(better[:, None, None], other.eps, found.eps[missed])
            found.residual[missed] = torch.where(better, other.residual, found.residual[missed])
            found.settled[missed] |= other.settled
        way.take(k, k + 1, found)
    return through
