"""Argument checks, the model's own dtype, and progress bars."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pydeqsolve import Anderson, Broyden, Picard

from .chain import Chain


def check_arguments(model: Any, x: Any, name: str, chain: Any, prediction: str, inputs: Sequence[Tensor]) -> None:
    """Raises for what neither sampling nor inversion can use."""
    if not callable(model):
        raise TypeError(f"model: a callable model(x, t, *inputs) is required, got {type(model).__name__}")
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: a tensor (B, …) is required, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name}: a floating-point tensor is required, got {x.dtype}")
    if x.dim() < 2 or x.shape[1:].numel() == 0:
        raise ValueError(f"{name}: shape (B, …) with at least one entry per image is required, got {tuple(x.shape)}")
    shape = getattr(model, "shape", None)
    if isinstance(model, nn.Module) and isinstance(shape, tuple) and tuple(x.shape[1:]) != shape:
        raise ValueError(f"{name}: images of shape {shape}, the model's, are required, got {tuple(x.shape[1:])}")
    channels = getattr(getattr(model, "model", model), "channels", None)  # of a DiffusersModel, guided or not
    if isinstance(model, nn.Module) and isinstance(channels, int) and x.shape[1] != channels:
        raise ValueError(f"{name}: images of {channels} channels, the model's, are required, got {tuple(x.shape[1:])}")
    if not isinstance(chain, Chain):
        raise TypeError(f"chain: a Chain from Schedule.chain is required, got {type(chain).__name__}")
    chain.check_prediction(prediction)
    if isinstance(inputs, Tensor):
        raise TypeError("inputs: a tuple of tensors is required, got a tensor: write inputs=(labels,)")
    for i, c in enumerate(inputs):
        if not isinstance(c, Tensor) or c.dim() == 0 or len(c) != len(x):
            got = tuple(c.shape) if isinstance(c, Tensor) else type(c).__name__
            raise ValueError(f"inputs[{i}]: a tensor ({len(x)}, …) is required, got {got}")


def check_settings(*, tensors: Mapping[str, Any], functions: Mapping[str, Any]) -> None:
    """Raises, by name, for what is no tensor or no function; None is always allowed."""
    for name, value in tensors.items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{name}: a tensor or None is required, got {type(value).__name__}")
    for name, value in functions.items():
        if value is not None and not callable(value):
            raise TypeError(f"{name}: a function or None is required, got {type(value).__name__}")


def check_solver(solver: Any) -> None:
    """Raises for what is no forward solver."""
    if not isinstance(solver, (Anderson, Broyden, Picard)):
        raise TypeError(f"solver: Anderson(), Broyden() or Picard() is required, got {solver!r}")


def check_options(options: dict[str, Any], function: Callable[..., Any], given: set[str], name: str) -> None:
    """Raises for options that the function does not have, or that whoever calls it gives it already."""
    taken = [option for option in inspect.signature(function).parameters if option not in given]
    for option in options:
        if option not in taken:
            raise TypeError(f"{option}: not an argument of {name}, which takes {', '.join(taken)} besides its own")


def model_dtype(model: Any, default: torch.dtype) -> torch.dtype:
    """The dtype of a module's floating-point parameters, else that of the images."""
    if isinstance(model, nn.Module):
        for p in model.parameters():
            if p.is_floating_point():
                return p.dtype
    return default


class Silent:
    """Stands in for a progress bar."""

    def update(self, n: int = 1) -> None: ...
    def close(self) -> None: ...


def progress_bar(progress: bool, what: str, unit: str) -> Any:
    """A tqdm bar on standard error that is quiet when that is no terminal, or nothing at all."""
    if not progress:
        return Silent()
    from tqdm import tqdm

    return tqdm(desc=what, unit=unit, disable=None, leave=False)
