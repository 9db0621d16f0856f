"""How the laws of `testing` compare results, and the bad neighbours that they add."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch import Tensor

from .solution import Solution

Fn = Callable[..., Tensor]
NAN, EXPLODES, NO_FIXED_POINT, EXACT = range(1, 5)  # troubles of the samples added by `check_independence`


def with_troubles(fn: Fn) -> Fn:
    """fn with one more input, a code per sample: 0 leaves it alone, others make that sample go wrong."""

    def troubled(z: Tensor, *rest: Tensor) -> Tensor:
        *inputs, code = rest
        f = fn(z, *inputs)
        code = code.reshape(-1, *[1] * (z.dim() - 1))
        f = torch.where(code == NAN, torch.nan, f)
        f = torch.where(code == EXPLODES, 10 * z * z + 10, f)
        f = torch.where(code == NO_FIXED_POINT, z + 1, f)
        return torch.where(code == EXACT, z, f)

    return troubled


def bytes_alive() -> int:
    """Of the tensors in this process that have memory of their own: sparse, opaque and fake ones have none."""
    storages = {}
    for thing in gc.get_objects():
        if type(thing) is Tensor:
            try:
                storage = thing.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
            except (NotImplementedError, RuntimeError):
                continue
    return sum(storages.values())


def require(holds: bool | Tensor, message: str) -> None:
    if not holds:
        raise AssertionError(message)


def same_sample(what: str, one: Solution, i: int, other: Solution, j: int, bitwise: bool, tolerance: float) -> None:
    for name in ("status", "evaluations"):
        a, b = int(getattr(one, name)[i]), int(getattr(other, name)[j])
        require(a == b, f"{what}: {name} {b}, in the plain batch {a}")
    if bitwise:
        apart = (one.z[i].detach().double() - other.z[j].detach().double()).abs().max()
        require(torch.equal(one.z[i], other.z[j]), f"{what}: z differs by {float(apart)}")
        require(one.residual[i] == other.residual[j], f"{what}: residual {other.residual[j]}, not {one.residual[i]}")
    else:
        close(f"{what}: z", other.z[j], one.z[i], tolerance)


def close(what: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Largest error within tolerance × largest entry of `expected`; NaN nowhere."""
    found, expected = found.detach(), expected.detach()
    error, size = float((found - expected).abs().max()), float(expected.abs().max())
    require(error <= tolerance * size, f"{what}: off by {error}, largest entry {size}")
