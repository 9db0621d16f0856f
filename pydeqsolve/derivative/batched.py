"""Cotangents that torch has stacked behind its back: is_grads_batched, vectorize=True, torch.func.vmap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_torch: Any = torch  # whose functions on batched tensors have no types
_functorch: Any = getattr(torch._C, "_functorch", None)


def one_by_one(fn: Callable[[Tensor], Sequence[Tensor | None]], x: Tensor) -> list[Tensor | None]:
    """fn(x), for each of the tensors that x stands for inside a vmap; what fn returns is stacked likewise.

    fn solves systems, and looks at what comes out: no batching rule does that.
    """
    if _functorch is None:
        return list(fn(x))
    if _functorch.is_legacy_batchedtensor(x):
        level = _torch._C._vmapmode_increment_nesting() - 1
        _torch._C._vmapmode_decrement_nesting()
        return _legacy(fn, x, level)
    if _functorch.is_batchedtensor(x):
        level = _functorch.maybe_get_level(x)
        # The size is read off x itself: a tensor batched at this level ignores the one given.
        rows = _functorch._remove_batch_dim(x, level, 1, 0)
        return [
            None if y is None else _functorch._add_batch_dim(y, 0, level)
            for y in _stacked(lambda row: one_by_one(fn, row), rows)
        ]
    return list(fn(x))


def _legacy(fn: Callable[[Tensor], Sequence[Tensor | None]], x: Tensor, level: int) -> list[Tensor | None]:
    """The same for the older kind of vmap, x batched at some of the levels up to `level`."""
    if level < 1 or not _functorch.is_legacy_batchedtensor(x):
        return list(fn(x))
    rows = _torch._remove_batch_dim(x, level, 1, 0)
    found = _stacked(lambda row: _legacy(fn, row, level - 1), rows)
    return [None if y is None else _torch._add_batch_dim(y, 0, level) for y in found]


def _stacked(fn: Callable[[Tensor], Sequence[Tensor | None]], rows: Tensor) -> list[Tensor | None]:
    columns = zip(*[fn(row) for row in rows.unbind(0)], strict=True)
    return [None if any(y is None for y in column) else torch.stack(column) for column in columns]
