"""Checks of numbers, and of the tensors that schedules and chains are made of."""

from __future__ import annotations

import math
import operator
from numbers import Real
from typing import Any

import torch
from torch import Tensor

SPACINGS = ("linspace", "leading", "trailing", "quadratic")
PREDICTIONS = ("epsilon", "v", "sample", "flow")
VARIANCES = ("small", "large")
RULES = ("ddim", "dpmsolver++2m", "belm")


def real(name: str, value: Any) -> float:
    """The value as a float: a finite number that is no bool, NumPy's among them."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: a number is required, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: a finite number is required, got {value!r}")
    return float(value)


def integer(name: str, value: Any, required: str = "an integer") -> int:
    """An integer of any kind, NumPy's and tensors of one included, as an int; no bool."""
    try:
        if not isinstance(value, bool) and "bool" not in str(getattr(value, "dtype", "")):
            return operator.index(value)
    except TypeError:
        pass
    raise TypeError(f"{name}: {required} is required, got {value!r}")


def count(name: str, value: Any, least: int, most: int | None = None) -> int:
    """An integer of any kind, at least `least` and at most `most`, as an int."""
    number = integer(name, value)
    if number < least:
        raise ValueError(f"{name}: at least {least} is required, got {number}")
    if most is not None and number > most:
        raise ValueError(f"{name}: at most {most:,} is required, got {number:,}")
    return number


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
    if isinstance(eta, bool) or not isinstance(eta, Real):
        raise TypeError(f"eta: a number is required, got {eta!r}")
    if not 0 <= float(eta) <= 1:
        raise ValueError(f"eta: 0 to 1 is required, got {eta}")


def time_steps(name: str, t: Any) -> Tensor:
    """(T,) int64 or float32: at least one, integers not negative, the noisiest first."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: a tensor (T,) of numbers is required, got {type(t).__name__}")
    if t.dim() != 1 or len(t) == 0:
        raise ValueError(f"{name}: a tensor (T,) of at least one time step is required, got shape {tuple(t.shape)}")
    if t.is_complex() or t.dtype == torch.bool:
        raise TypeError(f"{name}: integers or real numbers are required, got {t.dtype}")
    t = t.detach().to(torch.float32 if t.is_floating_point() else torch.int64)
    if bool((~t.isfinite()).any()):
        raise ValueError(f"{name}: finite numbers are required, got {t[_first(~t.isfinite())].item()}")
    if bool((t.diff() > 0).any()):
        at = _first(t.diff() > 0)
        raise ValueError(f"{name}: must decrease, noisiest first, but {t[at + 1]:g} follows {t[at]:g}")
    if not t.is_floating_point() and bool((t < 0).any()):
        raise ValueError(f"{name}: 0 at least is required, got {int(t.min())}")
    return t


def levels(signal: Any, noise: Any, ends: Any, steps: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """α and σ of the states (T+1,), and of the ends of steps (2, T) or None, float64; σ/α falls, or stays."""
    parts = [_reals(name, part, (steps + 1,)) for name, part in (("signal", signal), ("noise", noise))]
    if not bool((parts[0][1:] > 0).all() and parts[0][0] >= 0):
        raise ValueError(f"signal: above 0 is required, or 0 at the first, got {parts[0].min().item():g}")
    if not bool((parts[1][:-1] > 0).all() and parts[1][-1] >= 0):
        raise ValueError(f"noise: above 0 is required, or 0 at the last, got {parts[1].min().item():g}")
    own = None if ends is None else _reals("ends", ends, (2, steps))
    if own is not None and not bool((own[0] > 0).all() and (own[1] >= 0).all()):
        raise ValueError("ends: signal above 0 and noise of at least 0 are required")
    after = (parts[0][1:], parts[1][1:]) if own is None else (own[0], own[1])
    more = after[1] * parts[0][:-1] > parts[1][:-1] * after[0] * (1 + 1e-12)
    if bool(more.any()):
        raise ValueError(f"noise: σ/α must not rise from step to step, but does at step {_first(more)}")
    return parts[0], parts[1], own


def _reals(name: str, values: Any, shape: tuple[int, ...]) -> Tensor:
    if not isinstance(values, Tensor) or not values.is_floating_point():
        got = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"{name}: a tensor {shape} of floating-point values is required, got {got}")
    if tuple(values.shape) != shape:
        raise ValueError(f"{name}: shape {shape}, T = {shape[-1] - (name != 'ends')} steps, is required, got "
                         f"{tuple(values.shape)}")  # fmt: skip
    values = values.detach().double()
    if not bool(values.isfinite().all()):
        raise ValueError(f"{name}: finite values are required")
    return values


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
