"""Networks filled from a file, once dtypes and shapes in its header are known to be theirs: before memory is taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from .files import Stored

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
PREFIX = "model."

M = TypeVar("M", bound=nn.Module)


def skeleton(make: Callable[[], M]) -> M:
    """The network that make() returns, on the meta device: names and shapes of its weights, and no memory.

    Raises:
        ValueError: make() refuses its arguments, or they are of sizes beyond all memory.
    """
    try:
        with torch.device("meta"):
            return make()
    except (KeyError, TypeError, ValueError, RuntimeError, MemoryError, OverflowError, IndexError) as error:
        raise ValueError(str(error).splitlines()[0] if str(error) else type(error).__name__) from error


def check_stored(model: nn.Module, stored: Mapping[str, Stored], path: Path) -> None:
    """Raises ValueError unless the tensors "model.…" of a file are those of a network: no other, and of its shapes."""
    own = model.state_dict()
    given = {key.removeprefix(PREFIX): value for key, value in stored.items() if key.startswith(PREFIX)}
    for key in sorted(own.keys() | given.keys()):
        if key not in given:
            raise ValueError(f"{path}: no tensor {PREFIX}{key}")
        if key not in own:
            raise ValueError(f"{path}: tensor {PREFIX}{key} is not of this architecture")
        if given[key].shape != tuple(own[key].shape):
            raise ValueError(
                f"{path}: {PREFIX}{key} of shape {tuple(own[key].shape)} is required, got {given[key].shape}"
            )
        dtypes = FLOATS if own[key].is_floating_point() else (own[key].dtype,)
        if given[key].dtype not in dtypes:
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ValueError(f"{path}: {PREFIX}{key} of {names} is required, got {given[key].dtype}")


def build(make: Callable[[], M], tensors: Mapping[str, Tensor], path: Path, dtype: torch.dtype) -> M:
    """The network that make() returns, in `dtype`, with the tensors "model.…" of a file that `check_stored` accepted.

    Raises:
        ValueError: weights that are not finite, in the file or in `dtype`, or a network beyond all memory.
    """
    state = {key.removeprefix(PREFIX): value for key, value in tensors.items() if key.startswith(PREFIX)}
    for key, value in state.items():
        if value.is_floating_point() and not bool(value.to(dtype).isfinite().all()):
            inside = f" in {dtype}" if bool(value.isfinite().all()) else ""
            raise ValueError(f"{path}: {PREFIX}{key} is not finite{inside}")
    try:
        with torch.random.fork_rng(devices=[]):  # drawing weights only to replace them must not move the caller's seed
            model = make()
        model.load_state_dict(state)
        return model.to(dtype)
    except (MemoryError, RuntimeError) as error:
        raise ValueError(f"{path}: the network does not fit into memory ({str(error).splitlines()[0]})") from error
