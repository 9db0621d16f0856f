"""O-BELM chains read backwards: every step solved for the state before the last, with the same ε.

s_{k−1} = (s_{k+1} − a_k s_k − c_k ε(s_k, t_k))/a'_k from s_T, the image, and s_{T−1}, one DDIM step read backwards with
ε at the image. Any s_{T−1} gives the image back. It is linear in states and answers, as the chain itself is: so it is
made one state after the other, or as the fixed point of all answers together (`diffusion.inversion.together`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pydeqsolve import Status, Stop

from ..chain import Splitting
from ..methods.parallel import fixed_point
from ..problem import ChainProblem, Found, in_steps
from ..remainder import Remainders, forward_map, scale_of
from ..trajectory import TwoStepChain
from .loss import Best, Call, latents
from .together import Together

# Below what a network rounds by nothing is to be had: `fixed_point` raises this to half its machine epsilon.
PRECISE = 1e-300
VISIBLE = 0.03  # root mean square error of a pixel, of a range of 2, from which DDIM's first states may be better


@torch.no_grad()
def read(problem: ChainProblem, best: Best, call: Call, method: Any) -> Found:
    """The first two states of the chain that ends in the problem's images, which `best` gets with their loss.

    method: OnePass(), one state after the other; Exact(solver), all answers together, to the network's precision, and
    one after the other what rounding keeps from that or what is not as near as asked, where the rounds suffice.
    """
    way = Way(problem, best, call)
    parallel = hasattr(method, "solver") and len(problem.map.chain) > 1
    if parallel:
        way.together(None if method.solver == type(method)().solver else method.solver)
    way.go_on(way.short.nonzero()[:, 0])
    rounds = way.calls
    way.offer(problem.image)
    missed = (~(best.error <= best.asked) & ~way.exact & way.sound).nonzero()[:, 0]
    poor = missed[best.error[missed] > VISIBLE]
    if way.go_on(missed):
        rounds, best.check = way.calls, 0  # the sampling that told has become one of those that find
        way.offer(missed)
    elif way.smooth is not None and len(poor):
        way.states[poor, -2:] = way.smooth[poor]
        way.offer(poor)
    found = latents(best.x_T, way.evaluations, rounds)
    found.status[way.exact & parallel] = int(Status.STALLED)  # where the error is not met: no more is to be had
    return found


@dataclass(eq=False)
class Way:
    """The states (B, T+1, D) from the images, s_T, to the latents, s_0, as far as they are known."""

    problem: ChainProblem
    best: Best
    call: Call

    def __post_init__(self) -> None:
        self.before, (B, D), T = self.problem.map.network.calls, self.problem.latent.shape, len(self.problem.map.chain)
        self.states = torch.full((B, T + 1, D), torch.nan, dtype=torch.float64, device=self.problem.latent.device)
        self.states[:, 0], self.states[:, 1] = self.problem.latent, _before_last(self.problem)
        self.known = torch.ones(B, dtype=torch.int64, device=self.states.device)  # the last state that is right
        self.evaluations = self.known.clone()
        self.sound = self.problem.latent.isfinite().all(1)
        self.short, self.exact = torch.ones_like(self.sound), torch.zeros_like(self.sound)
        self.smooth: Tensor | None = None  # (B, 2, D), the last two states that DDIM makes of a few rounds
        self.best.second = self.states[:, 1].clone()

    @property
    def calls(self) -> int:
        """Model calls so far."""
        return self.problem.map.network.calls - self.before

    @property
    def left(self) -> float:
        """Rounds that may still be made."""
        return math.inf if self.call.max_rounds is None else self.call.max_rounds - self.calls

    def together(self, solver: Any) -> None:
        """All states from one fixed point; None is the solver of `Together`."""
        problem, T, second = self.problem, self.states.shape[1] - 1, self.states[:, 1]
        backward = _reversed(problem, second)
        if solver is None or self.left < 1:
            found = Together(backward, _reversed(problem, second, "ddim"), self.call.bar)
            found.solve(self.left)
            self.states, self.known, self.short = found.states, found.settled, found.short & self.sound
            self.evaluations += found.evaluations
            self.smooth = found.smooth
        else:
            guess, stop = torch.zeros_like(self.states[:, 1:]), Stop(PRECISE, max_steps=int(min(T, self.left)))
            self.states, _, rows = fixed_point(backward, guess, stop, solver, callback=_ticking(self.call.bar))
            self.evaluations += rows
            self.short[:] = False

    def go_on(self, images: Tensor) -> bool:
        """The states of some images (n,) from the last that is right of all, one after the other, if rounds suffice."""
        T = self.states.shape[1] - 1
        first = int(self.known[images].min()) if len(images) else T
        if not len(images) or self.left < T - first:
            return False
        here, states = self.problem.pick(images), list(self.states[images, : first + 1].unbind(1))
        a, c, a_before, _ = here.map.chain.coefficients
        for k in range(T - first, 0, -1):
            at = torch.full((len(images),), k, device=images.device)
            eps = here.map.epsilon(states[-1], at, here.conditioning)
            states.append((states[-2] - a[k] * states[-1] - c[k] * eps) / a_before[k])
            self.call.bar.update()
        self.states[images] = torch.stack(states, 1)
        self.evaluations[images] += T - first
        self.known[images], self.exact[images] = T, True
        return True

    def offer(self, images: Tensor) -> None:
        """Samples some images (n,) from their first two states, which `best` keeps where they are better."""
        best, network = self.best, self.problem.map.network
        calls, (second, x_T) = network.calls, self.states[images, -2:].unbind(1)
        run = replace(self.problem.pick(images).at(x_T), second=second)
        forward, _ = forward_map(network, run.map.chain, run.map.splitting, None, given=1)
        loss = (in_steps(replace(run, map=forward))[:, -1] - best.target[images]).square().sum(1)
        best.check += network.calls - calls
        best.rows[images] += network.calls - calls
        better = ~(loss >= best.loss[images])
        assert best.second is not None
        best.x_T[images] = torch.where(better[:, None], x_T, best.x_T[images])
        best.second[images] = torch.where(better[:, None], second, best.second[images])
        best.loss[images] = torch.where(better, loss, best.loss[images])


def _before_last(problem: ChainProblem) -> Tensor:
    """s_{T−1} (B, D): a DDIM step backwards with ε at the image, taken for a state of the last step's time."""
    m, image = problem.map, problem.latent
    chain, T = m.chain, len(m.chain)
    ddim = replace(chain, rule="ddim")
    there = image * (chain.size[T - 1] / chain.size[T])
    eps = m.says(there, torch.full((len(image),), T - 1, device=image.device), problem.conditioning)
    return (image - ddim.c[-1] * eps) / ddim.a[-1]


def _reversed(problem: ChainProblem, second: Tensor, rule: str = "belm") -> ChainProblem:
    """The chain from the image to the latent as a two-step chain whose first two states are given.

    Its step j ≥ 1 goes from s_k, k = T − j, to s_{k−1}; step 0, whose end is given, stands for nothing. By the rule
    "ddim" it goes by s_{k−1} = (s_k − c_k ε(s_k, t_k))/a_k, one-pass inversion.
    """
    m = problem.map
    T, split, device = len(m.chain), m.splitting, problem.latent.device
    k = torch.cat([torch.tensor([T - 1], device=device), torch.arange(T - 1, 0, -1, device=device)])
    steps = m.chain if rule == m.chain.rule else replace(m.chain, rule=rule)
    a, c, a_before, _ = (part[k][:, None] for part in steps.coefficients)
    kappa, offset = split.kappa[k], None if split.offset is None else split.offset[k]
    none = torch.zeros_like(a)
    linear = TwoStepChain(-(a + c * kappa) / a_before, -c / a_before, 1 / a_before, none, given=1)
    if rule == "ddim":
        linear = TwoStepChain((1 - c * kappa) / a, -c / a, none, none, given=1)
    chain = m.chain.at(k)
    backward = Remainders(m.network, chain, Splitting(kappa, offset), linear, scale=scale_of(chain))
    drift = None if offset is None else linear.added(offset[None])
    return ChainProblem(backward, problem.latent, problem.conditioning, drift, problem.numbers, second)


def _ticking(bar: Any) -> Any:
    def tick(step: int, states: Tensor, residual: Tensor) -> bool:
        bar.update()
        return False

    return tick
