"""One-pass inversion: the chain read backwards, ε taken one state too early."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..chain import Splitting
from ..problem import ChainProblem, Found
from .loss import Best, Call, latents


@dataclass(frozen=True)
class OnePass:
    """T evaluations, approximate (Song et al. 2021)."""

    @torch.no_grad()
    def find(self, problem: ChainProblem, best: Best, call: Call, splitting: Splitting | None = None) -> Found:
        """The latents, which are offered to `best`."""
        calls = problem.map.network.calls
        x_T = one_pass(problem)
        found = latents(x_T, len(problem.map.chain), problem.map.network.calls - calls)
        best.offer(x_T, None, torch.arange(len(x_T), device=x_T.device))
        return found


def one_pass(problem: ChainProblem) -> Tensor:
    """x_k ≈ (x_{k+1} − c_k ε(x_{k+1}, t_{k+1})) / a_k; at the image itself, which has no t, that of the last step.

    The latents (B, D) of the problem's images.
    """
    m, x = problem.map, problem.latent
    chain, T, (a, c) = m.chain, len(m.chain), (m.chain.a, m.chain.c)
    for k in range(T - 1, -1, -1):
        at = torch.full((len(x),), min(k + 1, T - 1), device=x.device)
        there = x * (chain.size[min(k + 1, T - 1)] / chain.size[k + 1])  # the image too as the last step has its states
        eps = m.says(there, at, problem.conditioning)
        if k + 1 < T and chain.blind[k]:  # step k wants −x̂_0
            eps = (chain.noise[k + 1] * eps - there) / chain.signal[k + 1]
        x = (x - c[k] * eps) / a[k]
    return x
