"""What the ranks of a sharded solve must agree on before the first exchange whose size depends on it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .loop.watches import Callback
from .shards import WHOLE, Shards, Whole

WORDS = 24  # that a rank sends: whether it has refused its arguments, has a callback, its features, and digests


def shards_of(group: Any) -> Whole:
    """The shards over a process group, or the whole where that is None."""
    if group is None:
        return WHOLE
    if torch.compiler.is_compiling():
        raise NotImplementedError("group: a sharded solve is no part of a compiled graph: compile fn alone")
    return Shards(group)


def join(
    shards: Whole, settings: Mapping[str, Any], features: int, callback: Callback | None
) -> tuple[Whole, Callback | None]:
    """The shards with what they hold, and a callback that stops all ranks once that of one of them says so.

    features: D of this rank. ValueError on every rank unless all were given the same `settings`, by name.
    """
    assert isinstance(shards, Shards)
    names = sorted(settings)
    words = [0, int(callback is not None), features, _digest(names), *(_digest(settings[name]) for name in names)]
    table = shards.gathered(words + [0] * (WORDS - len(words)))
    _raise_refused(table)
    different = [name for name, column in zip(names, table.T[4:], strict=False) if bool((column != column[0]).any())]
    if bool((table[:, 3] != table[0, 3]).any()):
        raise ValueError("group: the same version of this package is required on every rank")
    if different:
        raise ValueError(
            f"group: ranks disagree on {', '.join(different)}: the same is required on every rank, but for the "
            "features of z0, the values of inputs, and callback"
        )
    joined = shards.holding(features, int(table[:, 2].sum()))
    return joined, _shared(joined, callback) if bool(table[:, 1].any()) else None


def refuse(shards: Whole) -> None:
    """Tells the other ranks, if there are any, that this one has refused its arguments."""
    if isinstance(shards, Shards):
        shards.gathered([1] + [0] * (WORDS - 1))


def _shared(shards: Shards, callback: Callback | None) -> Callback:

    def called(*seen: Any) -> bool:
        answer = shards.attempt(lambda: callback is not None and bool(callback(*seen)), lambda: False)
        return shards.any_claims(answer)

    return called


def _raise_refused(table: Tensor) -> None:
    refused = [str(rank) for rank, flag in enumerate(table[:, 0].tolist()) if flag]
    if refused:
        where = f"rank {refused[0]}" if len(refused) == 1 else f"ranks {', '.join(refused)}"
        raise ValueError(f"group: the arguments were refused on {where}; the error is reported there")


def _digest(value: Any) -> int:
    """63 bits that are equal on two ranks where the values are, and hardly otherwise."""
    code = hashlib.blake2b(repr(_plain(value)).encode(), digest_size=8).digest()
    return int.from_bytes(code, "little") >> 1


def _plain(value: Any) -> Any:
    """`value` as something whose repr says what it is, and no address."""
    if isinstance(value, Tensor):
        x = value.detach().cpu().contiguous()
        return str(x.dtype), tuple(x.shape), hashlib.blake2b(x.view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
    if isinstance(value, (tuple, list)):
        return [_plain(part) for part in value]
    kind = type(value).__qualname__
    if isinstance(value, (bool, int, float, str, torch.dtype, type(None))):
        return kind, repr(value)
    fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
    return kind, [(field.name, _plain(getattr(value, field.name))) for field in fields]
