"""Checks of numbers, and of the tensors that schedules and chains are made of."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

SPACINGS = ("linspace", "leading", "trailing", "quadratic")
PREDICTIONS = ("epsilon", "v", "sample")
VARIANCES = ("small", "large")


def real(name: str, value: Any) -> float:
    """The value as a float: a finite number that is no bool."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: a number is required, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: a finite number is required, got {value!r}")
    return float(value)


def count(name: str, value: Any, least: int) -> None:
    """Raises unless the value is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: an integer is required, got {value!r}")
    if value < least:
        raise ValueError(f"{name}: at least {least} is required, got {value}")


def flag(name: str, value: Any) -> None:
    """Raises unless the value is true or false."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: true or false is required, got {value!r}")


def one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    """Raises unless the value is one of the names known."""
    if value not in known:
        raise ValueError(f"{name}: one of {', '.join(known)} is required, got {value!r}")


def share_of_noise(eta: Any) -> None:
    """Raises unless eta is a number from 0 to 1."""
    if isinstance(eta, bool) or not isinstance(eta, (int, float)):
        raise TypeError(f"eta: a number is required, got {eta!r}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta: 0 to 1 is required, got {eta}")


def time_steps(name: str, t: Any) -> Tensor:
    """(T,) int64: at least one, none negative, the noisiest first."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: a tensor (T,) of integers is required, got {type(t).__name__}")
    if t.dim() != 1 or len(t) == 0:
        raise ValueError(f"{name}: a tensor (T,) of at least one time step is required, got shape {tuple(t.shape)}")
    if t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
        raise TypeError(f"{name}: integers are required, got {t.dtype}")
    t = t.to(torch.int64)
    if bool((t.diff() >= 0).any()):
        at = int((t.diff() >= 0).nonzero()[0])
        raise ValueError(f"{name}: must decrease, noisiest first, but {int(t[at + 1])} follows {int(t[at])}")
    if bool((t < 0).any()):
        raise ValueError(f"{name}: 0 at least is required, got {int(t.min())}")
    return t


def signal(name: str, alphas: Any, steps: int, least: Tensor | None = None) -> Tensor:
    """ᾱ of the states of a chain (T,) float64: in [0, 1], 0 at the first alone, never falling, none below `least`."""
    if not isinstance(alphas, Tensor):
        raise TypeError(f"{name}: a tensor ({steps},) is required, got {type(alphas).__name__}")
    if not alphas.is_floating_point():
        raise TypeError(f"{name}: floating-point values are required, got {alphas.dtype}")
    if tuple(alphas.shape) != (steps,):
        raise ValueError(f"{name}: a tensor ({steps},), one value per step, is required, got {tuple(alphas.shape)}")
    alphas = alphas.detach().double()
    positive = alphas if least is not None else alphas[1:]
    if not bool(((alphas >= 0) & (alphas <= 1)).all() and (positive > 0).all()):
        where = "in (0, 1]" if least is not None else "in (0, 1], or 0 at the first,"
        low, high = alphas.min().item(), alphas.max().item()
        raise ValueError(f"{name}: finite values {where} are required, got {low:g} … {high:g}")
    if bool((alphas.diff() < 0).any()):
        raise ValueError(f"{name}: must not fall from step to step, but does at step {_first(alphas.diff() < 0) + 1}")
    if least is not None and bool((alphas < least).any()):
        k = _first(alphas < least)
        raise ValueError(f"{name}: at least alphas is required, got {alphas[k]:g} for {least[k]:g} at step {k}")
    return alphas


def _first(true: Tensor) -> int:
    return int(true.nonzero()[0])
