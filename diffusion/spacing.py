"""Which of a schedule's time steps a chain visits."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .checks import SPACINGS, one_of


def time_steps_of(N: int, T: int, spacing: str, offset: int, like_diffusers: bool) -> Tensor:
    """(T,) int64, strictly decreasing. like_diffusers: one step of "linspace" starts at 0, not at N − 1."""
    one_of("spacing", spacing, SPACINGS)
    if spacing == "linspace":
        t = np.linspace(0, N - 1, T).round() if T > 1 or like_diffusers else np.array([N - 1.0])
    elif spacing == "leading":
        t = np.arange(T) * (N // T) + offset
    elif spacing == "trailing":
        t = np.round(np.arange(N, 0, -N / T))[:T][::-1] - 1
    else:
        t = np.round((N - 1) * (np.linspace(0, 1, T) if T > 1 else np.ones(1)) ** 2)
        steps = np.arange(T)
        t = np.maximum.accumulate(t - steps) + steps  # equal neighbours move up until all differ
        t = np.minimum(t, N - T + steps)
    t = t.astype(np.int64)[::-1].copy()
    if t[0] >= N or t[-1] < 0:
        raise ValueError(f"steps_offset: {offset} pushes time step {t[0]} out of 0 … {N - 1}")
    return torch.from_numpy(t)
