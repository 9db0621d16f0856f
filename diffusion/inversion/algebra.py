"""O-BELM chains read backwards: every step solved for the state before the last, with the same ε.

s_{k−1} = (s_{k+1} − a_k s_k − c_k ε(s_k, t_k))/a'_k from s_T, the image, and s_{T−1}, one DDIM step read backwards with
ε at the image. Any s_{T−1} gives the image back. It is linear in states and answers, as the chain itself is: so it is
made one state after the other, or as the fixed point of all answers together.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pydeqsolve import Stop

from ..chain import Splitting
from ..methods.parallel import SOLVER, fixed_point
from ..problem import ChainProblem, Found, in_steps
from ..remainder import Remainders, forward_map, scale_of
from ..trajectory import TwoStepChain
from .loss import Best, Call, latents

# Below what a network rounds by nothing is to be had: `fixed_point` raises this to half its machine epsilon.
PRECISE = 1e-300


@torch.no_grad()
def read(problem: ChainProblem, best: Best, call: Call, method: Any) -> Found:
    """The first two states of the chain that ends in the problem's images, which `best` gets with their loss.

    method: OnePass(), one state after the other; Exact(solver), all answers together, to the network's precision.
    """
    network, device = problem.map.network, problem.latent.device
    calls, B, T = network.calls, len(problem.latent), len(problem.map.chain)
    second = _before_last(problem)
    rows = torch.full((B,), T, dtype=torch.int64, device=device)
    if hasattr(method, "solver") and T > 1:
        backward = _reversed(problem, second)
        stop = Stop(PRECISE, max_steps=T if call.max_rounds is None else min(T, call.max_rounds - 1))
        solver = SOLVER if method.solver == type(method)().solver else method.solver
        guess = torch.zeros_like(backward.base()[:, 1:])
        states, _, rows = fixed_point(backward, guess, stop, solver, callback=_ticking(call.bar))
        rows = rows + 1
    else:
        states = _in_sequence(problem, second, call.bar)
    rounds = network.calls - calls
    best.x_T, best.second = states[:, -1], states[:, -2]
    again = replace(problem.at(best.x_T), second=best.second)
    again = replace(again, map=forward_map(network, problem.map.chain, problem.map.splitting, None, given=1)[0])
    x_0 = in_steps(again)[:, -1]
    best.loss, best.check = (x_0 - best.target).square().sum(1), network.calls - calls - rounds
    best.rows = torch.full_like(rows, T - 1)
    return latents(best.x_T, rows, rounds)


def _ticking(bar: Any) -> Any:
    def tick(step: int, states: Tensor, residual: Tensor) -> bool:
        bar.update()
        return False

    return tick


def _before_last(problem: ChainProblem) -> Tensor:
    """s_{T−1} (B, D): a DDIM step backwards with ε at the image, taken for a state of the last step's time."""
    m, image = problem.map, problem.latent
    chain, T = m.chain, len(m.chain)
    ddim = replace(chain, rule="ddim")
    there = image * (chain.size[T - 1] / chain.size[T])
    eps = m.says(there, torch.full((len(image),), T - 1, device=image.device), problem.conditioning)
    return (image - ddim.c[-1] * eps) / ddim.a[-1]


def _reversed(problem: ChainProblem, second: Tensor) -> ChainProblem:
    """The chain from the image to the latent as a two-step chain whose first two states are given.

    Its step j ≥ 1 goes from s_k, k = T − j, to s_{k−1}; step 0, whose end is given, stands for nothing.
    """
    m = problem.map
    T, split, device = len(m.chain), m.splitting, problem.latent.device
    k = torch.cat([torch.tensor([T - 1], device=device), torch.arange(T - 1, 0, -1, device=device)])
    a, c, a_before, _ = (part[k][:, None] for part in m.chain.coefficients)
    kappa, offset = split.kappa[k], None if split.offset is None else split.offset[k]
    none = torch.zeros_like(a)
    linear = TwoStepChain(-(a + c * kappa) / a_before, -c / a_before, 1 / a_before, none, given=1)
    chain = m.chain.at(k)
    backward = Remainders(m.network, chain, Splitting(kappa, offset), linear, scale=scale_of(chain))
    drift = None if offset is None else linear.added(offset[None])
    return ChainProblem(backward, problem.latent, problem.conditioning, drift, problem.numbers, second)


def _in_sequence(problem: ChainProblem, second: Tensor, bar: Any) -> Tensor:
    """The same states, one after the other: T − 1 model calls."""
    m, states = problem.map, [problem.latent, second]
    a, c, a_before, _ = m.chain.coefficients
    for k in range(len(m.chain) - 1, 0, -1):
        eps = m.epsilon(states[-1], torch.full((len(second),), k, device=second.device), problem.conditioning)
        states.append((states[-2] - a[k] * states[-1] - c[k] * eps) / a_before[k])
        bar.update()
    return torch.stack(states, 1)
