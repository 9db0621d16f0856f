"""Noise maps: the fresh noise with which a chain of eta > 0 makes an image (Huberman-Spiegelglas et al. 2024).

The states of such a chain need not be found. They are drawn, and the noise of every step is what its two ends leave:
n_k = (s_{k+1} − a_k s_k − c_k ε(s_k, t_k))/σ_k. As the states are drawn independently of each other, so far apart from
step to step, the maps are larger than the chain's own noise and hold more of the image: it stays recognisable under
another condition and at any guidance.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..chain import Splitting
from ..models.answers import draw
from ..problem import ChainProblem, Found, in_steps, noise_scale
from .loss import Best, Call, latents


@dataclass(frozen=True)
class NoiseMaps:
    """s_k = α_k x_0 + σ_k ε̃_k with independent ε̃_k (Huberman-Spiegelglas et al. 2024, Eq. 6), and the noise between
    them (Eq. 5): all T steps evaluated in one round. Of a chain of eta > 0, clipping or not.

    The maps, in float64, are exact for any network. A float32 network answers the T calls of sampling with other last
    digits than the one call of all steps; what that changes in the image is added to the last map.
    """

    @torch.no_grad()
    def find(self, problem: ChainProblem, best: Best, call: Call, splitting: Splitting | None = None) -> Found:
        """The latents, which `best` is given with their maps (B, T, D) and the loss measured with both."""
        m, x_0 = problem.map, problem.latent
        calls, scale, T = m.network.calls, noise_scale(m.chain), len(m.chain)
        states = self._states(problem, best.dtype, call)
        noises = between(problem, states) / scale
        rounds = m.network.calls - calls
        made = with_noise(problem.at(states[:, 0]), scale * noises)
        sampled = in_steps(made, call.bar)[:, -1]
        before = scale[-1] * noises[:, -1]
        noises[:, -1] += (x_0 - sampled) / scale[-1]
        sampled = sampled - before + scale[-1] * noises[:, -1]
        best.x_T, best.noises = states[:, 0], noises
        best.loss, best.check = (sampled - x_0).square().sum(1), m.network.calls - calls - rounds
        best.rows += T
        return latents(best.x_T, T, rounds)

    def _states(self, problem: ChainProblem, dtype: torch.dtype, call: Call) -> Tensor:
        """s_0 … s_T (B, T+1, D): drawn around the images, the first rounded to `dtype`, the last the images."""
        chain, x_0, shape = problem.map.chain, problem.latent, problem.map.network.shape
        noise = draw((len(x_0), len(chain), *shape), call.generator, x_0.device).flatten(2)
        alpha, sigma = (part[:, None] for part in chain.before)
        states = torch.cat([alpha * x_0[:, None] + sigma * noise, x_0[:, None]], 1)
        states[:, 0] = states[:, 0].to(dtype).double()
        return states


def between(problem: ChainProblem, states: Tensor) -> Tensor:
    """s_{k+1} − a_k s_k − c_k ε(s_k, t_k) (B, T, D) of states (B, T+1, D), every step in one call."""
    m, (B, T) = problem.map, (len(states), states.shape[1] - 1)
    k = torch.arange(T, device=states.device).repeat(B)
    conditioning = [c.repeat_interleave(T, 0) for c in problem.conditioning]
    eps = m.epsilon(states[:, :-1].flatten(0, 1), k, conditioning).unflatten(0, (B, T))
    return states[:, 1:] - m.chain.a[:, None] * states[:, :-1] - m.chain.c[:, None] * eps


def with_noise(problem: ChainProblem, noise: Tensor) -> ChainProblem:
    """The same problem with noise (B, T, D) added to its steps."""
    return replace(problem, drift=noise if problem.drift is None else problem.drift + noise)
