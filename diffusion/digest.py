"""Digests of arguments: 64 bits that differ wherever shapes, dtypes, values or settings do."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PLAIN = (bool, int, float, complex, str, bytes, Enum, torch.dtype, type(None), np.generic)


def digest(value: Any) -> int:
    """A signed integer of 64 bits that depends on every bit of an argument.

    Tensors and arrays count by shape, dtype, values and whether a gradient is asked for, wherever they are;
    generators by their state; dataclasses, sequences and mappings by their parts; plain values by themselves. Of a
    module count its class, dtype and mode, of a function or any other object its name or class: their weights and code
    are not read.

    Copies each tensor to the host, once.
    """
    hashed = hashlib.blake2b(digest_size=8)
    for part in _parts(value):
        hashed.update(len(part).to_bytes(8, "little"))
        hashed.update(part)
    return int.from_bytes(hashed.digest(), "little", signed=True)


def _parts(value: Any) -> Iterator[Any]:
    """The bytes that stand for a value, piece by piece."""
    if isinstance(value, Tensor):
        yield from _tensor(value)
    elif isinstance(value, PLAIN):
        yield f"{type(value).__qualname__} {value!r}".encode()
    elif isinstance(value, torch.Generator):
        yield from _tensor(value.get_state())
    elif isinstance(value, np.ndarray):
        yield f"{value.shape} {value.dtype}".encode()
        yield value.tobytes()
    elif isinstance(value, partial):
        yield from _parts([value.func, value.args, value.keywords])
    elif isinstance(value, nn.Module):
        yield _module(value).encode()
    elif isinstance(value, Mapping):
        yield f"mapping {len(value)}".encode()
        for key in sorted(value, key=repr):
            yield from _parts(key)
            yield from _parts(value[key])
    elif isinstance(value, Sequence):
        yield f"sequence {len(value)}".encode()
        for entry in value:
            yield from _parts(entry)
    elif is_dataclass(value) and not isinstance(value, type):
        yield _name(type(value)).encode()
        for field in fields(value):
            yield field.name.encode()
            yield from _parts(getattr(value, field.name, None))
    else:
        yield _name(value if hasattr(value, "__qualname__") else type(value)).encode()


def _tensor(x: Tensor) -> Iterator[Any]:
    wanted = x.requires_grad and torch.is_grad_enabled()
    yield f"{tuple(x.shape)} {x.dtype} {wanted}".encode()
    plain = x.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    yield plain.view(torch.uint8).numpy().data.cast("B") if plain.numel() else b""


def _module(module: nn.Module) -> str:
    parameters = list(module.parameters())
    dtypes = sorted({str(p.dtype) for p in parameters if p.is_floating_point()})
    wanted = [p.requires_grad for p in parameters] if torch.is_grad_enabled() else []
    return f"{_name(type(module))} {dtypes} {module.training} {wanted}"


def _name(named: Any) -> str:
    return f"{getattr(named, '__module__', '')}.{named.__qualname__}"
