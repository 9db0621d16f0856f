"""Argument checks: what each must be, said by its name at the public entry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .anderson import Anderson
from .broyden import Broyden
from .layout import named_leaves
from .picard import Picard
from .step.ring import Method
from .stop import Stop

SOLVERS = (Anderson, Broyden, Picard)  # which have checked themselves


def check_solver(solver: Any) -> None:
    """Raises TypeError unless `solver` is a forward solver: an object, not its class, whose method() is a `Method`."""
    if type(solver) in SOLVERS:
        return
    method = None if isinstance(solver, type) else getattr(solver, "method", None)
    if not callable(method) or not hasattr(solver, "safeguard") or not isinstance(method(), Method):
        raise TypeError(f"solver must be Anderson(), Broyden() or Picard(), got {_words(solver)}")


def check_stop(stop: Any) -> None:
    """Raises TypeError unless `stop` is a `Stop`."""
    if not isinstance(stop, Stop):
        raise TypeError(f"stop must be a Stop, got {_words(stop)}")


def check_tolerances(name: str, stop: Stop, shapes: Sequence[tuple[int, ...]]) -> None:
    """Raises ValueError unless the tolerances of `stop` that are tensors have one of the `shapes`."""
    if not isinstance(stop.rtol, Tensor) and not isinstance(stop.atol, Tensor):
        return
    for kind in ("rtol", "atol"):
        tolerance = getattr(stop, kind)
        if isinstance(tolerance, Tensor) and tuple(tolerance.shape) not in shapes:
            raise ValueError(f"{name}.{kind} must have shape {shapes[0]}, got {tuple(tolerance.shape)}")


def check_gradient(gradient: Any) -> None:
    """Raises TypeError unless `gradient` is a way to differentiate, not its class, or None."""
    if gradient is not None and (isinstance(gradient, type) or not callable(getattr(gradient, "attach", None))):
        raise TypeError(f"gradient must be Implicit(), Phantom(), Unrolled() or None, got {_words(gradient)}")


def check_inputs(inputs: Any, B: int | None, device: torch.device) -> tuple[tuple[Tensor, ...], list[str] | None]:
    """The tensors of `inputs`, a tuple or list of tensors (B, …) on `device`, None, or nests of these; else raises.

    And their names, None where they are `inputs` one by one. B None: of any shape.
    """
    if isinstance(inputs, Tensor):
        raise TypeError("inputs must be a tuple or list of tensors, got a tensor: write inputs=(x,)")
    if not isinstance(inputs, (tuple, list)):
        raise TypeError(f"inputs must be a tuple or list of tensors, got {type(inputs).__name__}")
    given, names = tuple(inputs), None
    for part in inputs:
        if not isinstance(part, Tensor):
            named = [pair for i, part in enumerate(inputs) for pair in named_leaves(part, f"inputs[{i}]")]
            given, names = tuple([x for _, x in named]), [name for name, _ in named]
            break
    for i, x in enumerate(given):
        if (B is None or (x.dim() and x.shape[0] == B)) and x.device == device:
            continue
        name = f"inputs[{i}]" if names is None else names[i]
        if B is not None and (x.dim() == 0 or x.shape[0] != B):
            raise ValueError(f"{name} must have leading dimension {B} like z0, got shape {tuple(x.shape)}")
        raise ValueError(f"{name} must be on {device} like z0, got {x.device}")
    return given, names


def check_cell(cell: Any) -> None:
    """Raises TypeError unless `cell` is a module or a function, not a class."""
    if isinstance(cell, type) or not callable(cell):
        raise TypeError(f"cell must be a module called as cell(z, *inputs), got {_words(cell)}")


def _words(value: Any) -> str:
    """`value` as an error names it."""
    if isinstance(value, type):
        return f"the class {value.__name__}: write {value.__name__}()"
    return repr(value) if isinstance(value, str) else type(value).__name__
