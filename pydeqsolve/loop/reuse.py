"""Steps of small solves that have ended, for later solves like them: memory and native numbers are used again.

A step is held by one solve at a time, and given back when that has ended and nobody else refers to its memory: one that
failed, or whose fn raised, is let go. Nothing of the user's is kept alive.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..step import native
from ..step.records import SAMPLE
from ..step.ring import Method
from ..step.rules import Rule
from ..stop import Stop
from .step import FusedStep

KINDS, EACH = 16, 2  # configurations, and steps of each, that are kept
MOST = 1 << 17  # bytes of a step: beyond, making them is little of what a solve takes

Key = tuple[Any, ...]
_idle: dict[Key, list[FusedStep]] = {}  # no lock: each operation on it is whole, whichever thread comes next
_modes = getattr(torch._C, "_len_torch_dispatch_stack", None)


def key_of(method: Method, rule: Rule, z0: Tensor) -> Key | None:
    """What a step is found by: all that it depends on but the states and `Stop`. None: it is not to be kept.

    z0 (B, T, D). Where a dispatch mode looks on, it sees every tensor made.
    """
    if not z0.is_cpu or not native.is_native(z0) or _modes is None or _modes():
        return None
    (B, T, _), M = z0.shape, method.memory + 1
    if 2 * M * z0.nbytes + 8 * B * (len(SAMPLE) + T * (2 * M * M + M + 3)) > MOST:
        return None
    numbers = (method.kind, method.memory, float(method.damping), float(method.ridge), method.coupling)
    return (*numbers, rule, z0.shape, z0.dtype)


def take(key: Key | None, stop: Stop) -> FusedStep | None:
    """A step that is about to begin; None where none is idle."""
    idle = _idle.get(key) if key is not None else None
    if not idle:
        return None
    try:
        step = idle.pop()
    except IndexError:  # another thread was faster
        return None
    step.restart(stop)
    return step


def give(step: FusedStep) -> None:
    """Takes a step whose solve has ended, and of which nobody knows any part."""
    if step.key is None:
        return
    step.forget()
    idle = _idle.get(step.key)
    if idle is None:
        if len(_idle) >= KINDS:
            _idle.clear()
        _idle[step.key] = [step]
    elif len(idle) < EACH:
        idle.append(step)
