"""Where the entries of a tensor lie: the kernels are given addresses alone."""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor

LINE, PAGE = 64, 4096  # bytes


def spaced(size: int, itemsize: int) -> int:
    """How many entries apart pieces of `size` entries begin: those that begin at one place of a page would share few
    places of a cache."""
    line = LINE // itemsize
    return size if size * itemsize < PAGE else (size + line - 1) // line * line + 13 * line


def is_plain(x: Tensor) -> bool:
    """Whether the entries of x, whatever lies there, are one after the other as they are read."""
    if torch.compiler.is_compiling():  # a graph has no tensors that are negated lazily, and no way to ask
        return x.is_contiguous()
    return x.layout is torch.strided and not x.is_nested and not x.is_neg() and x.is_contiguous()


def check_dense(name: str, x: Tensor) -> None:
    """Raises TypeError unless x is a dense tensor with memory of its own, all of it there.

    Values inside a transform of torch.func pass: what they stand for has memory; `address` refuses them.
    """
    if torch.compiler.is_compiling():
        return
    try:
        if _whole(x):
            return
    except (RuntimeError, NotImplementedError):
        pass  # it stands for a value inside a transform, or has no storage
    what = _instead_of_dense(x)
    if what:
        raise TypeError(f"{name} must be a dense tensor with memory of its own, got {what}")


def address(x: Tensor, name: str = "a tensor") -> int:
    """The address of x, whose entries lie there as they are.

    Raises TypeError as `check_dense`, and where entries are to be negated when they are read (`x.is_neg()`);
    NotImplementedError inside a transform of torch.func.
    """
    try:
        start = _whole(x)
        if start:
            return start
        start = x.data_ptr()
    except RuntimeError as error:
        check_dense(name, x)
        raise NotImplementedError(f"{name} is a value inside a torch.func transform, without memory") from error
    check_dense(name, x)
    if x.is_neg():
        raise TypeError(f"{name} must not be negated lazily: take its resolve_neg()")
    return start


def is_whole(x: Tensor) -> bool:
    """Whether x is a plain tensor with memory of its own, whose entries lie there one after the other as they are."""
    try:
        return _whole(x) != 0
    except RuntimeError:  # it stands for a value inside a transform, or has no storage
        return False


def _whole(x: Tensor) -> int:
    """The address of a plain tensor whose entries lie there one after the other as they are; else, or if empty, 0."""
    if type(x) is not Tensor:
        return 0
    start = x.data_ptr()
    if (
        start and x.is_contiguous() and not x.is_neg() and not x.is_nested and not x.is_quantized
        and x.untyped_storage().nbytes() >= x.nbytes + x.storage_offset() * x.itemsize
    ):  # fmt: skip
        return start
    return 0


def _instead_of_dense(x: Tensor) -> str:
    """What x is instead of a dense tensor with memory; empty where it is one, or stands for one in a transform."""
    if type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return f"a {type(x).__name__}"
    if x.layout is not torch.strided or x.is_nested or x.is_quantized:
        return f"a {'nested' if x.is_nested else 'quantized' if x.is_quantized else x.layout} tensor"
    if x.is_meta or x._is_zerotensor() or torch._is_functional_tensor(x):
        return "one on the meta device" if x.is_meta else "zeros or values that were never stored"
    size = x.numel()
    if not size:
        return ""
    try:
        start, held = x.data_ptr(), x.untyped_storage().nbytes()
    except (RuntimeError, NotImplementedError):
        return ""
    if not x.is_contiguous():
        size = 1 + sum(stride * (n - 1) for stride, n in zip(x.stride(), x.shape, strict=True))
    if not start or (x.storage_offset() + size) * x.element_size() > held:
        return f"one of shape {tuple(x.shape)} whose storage holds {held} bytes"
    return ""


_functorch: Any = getattr(torch._C, "_functorch", None)


def is_stacked(x: Tensor) -> bool:
    """Whether x stands for several tensors inside a vmap."""
    return _functorch is not None and (_functorch.is_legacy_batchedtensor(x) or _functorch.is_batchedtensor(x))


_uses = getattr(torch._C, "_storage_Use_Count", None)


def _references(x: Tensor) -> tuple[int, int]:
    """How many refer to the memory of x, in C++ (tensors) and in Python (storages)."""
    storage = x.untyped_storage()
    return _uses(storage._cdata), sys.getrefcount(storage)  # type: ignore[misc]


@functools.cache
def _alone() -> tuple[int, int]:
    """`_references` of a tensor whose memory nobody else refers to."""
    return _references(torch.empty(1, device="cpu"))


def is_let_go(x: Tensor) -> bool:
    """Whether nobody but the holder of x refers to its memory: no view, array or storage; false if torch hides it."""
    return _uses is not None and _references(x) == _alone()
