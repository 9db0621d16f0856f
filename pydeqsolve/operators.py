"""The two passes of a step as torch.library operators, `torch.ops.pydeqsolve.measure` and `.advance`.

For programs that write a loop of their own and want it traced by torch.compile or export: schema, fake implementation
and mutated arguments are declared, so nothing breaks the graph. `solve` calls the same passes directly (`ops`), which
costs less per call. The tensors are those of `ring.Ring`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops
from .ring import COUPLINGS, KINDS, Ring


def _ring(
    R: Tensor, F: Tensor, gram: Tensor, steps_gram: Tensor | None, rhs: Tensor, squares: Tensor, count: Tensor,
    head: int, kind: int, coupling: int = 0, ridge: float = 0.0, damping: float = 1.0,
) -> Ring:  # fmt: skip
    """A `Ring` over tensors that exist already, made anew for every call: an address says nothing of what it holds."""
    shape, dtype, device = R.shape, R.dtype, R.get_device()
    B, M, T, _ = shape
    steps = gram if steps_gram is None else steps_gram
    as_the_kernels_read = (
        F.dtype == dtype and gram.dtype == steps.dtype == rhs.dtype == squares.dtype == torch.float64
        and count.dtype == torch.int32
        and F.shape == shape and gram.shape == (B, T, M, M) and (steps is gram or steps.shape == gram.shape)
        and rhs.shape == (B, T, M) and squares.shape == (B, T, 2) and count.shape == (B, T)
        and device == F.get_device() == gram.get_device() == steps.get_device() == rhs.get_device()
        == squares.get_device() == count.get_device()
        and _are_rows(R) and F.stride() == R.stride()
        and gram.is_contiguous() and steps.is_contiguous()
        and rhs.is_contiguous() and squares.is_contiguous() and count.is_contiguous()
    )  # fmt: skip
    if not as_the_kernels_read:
        _explain(R, F, gram, steps, rhs, squares, count)
    ring = Ring.__new__(Ring)
    ring.kind, ring.coupling, ring.damping, ring.ridge = KINDS[kind], COUPLINGS[coupling], damping, ridge
    if ring.kind == "broyden good" and steps_gram is None:
        raise ValueError("steps_gram is required for Broyden good")
    ring.slots, ring.head, ring.eps, ring.dtype = M, head, torch.finfo(dtype).eps, dtype
    ring.R, ring.F, ring.gram, ring.steps_gram = R, F, gram, steps_gram
    ring.rhs, ring.squares, ring.count = rhs, squares, count
    ops.start(ring, fresh=False)
    return ring


def _are_rows(R: Tensor) -> bool:
    """Whether blocks (T, D) are contiguous and apart from each other, sample by sample or slot by slot in memory."""
    B, M, T, D = R.shape
    sample, slot, block, feature = R.stride()
    apart = (slot >= T * D and sample >= M * slot) or (sample >= T * D and slot >= B * sample)
    return apart and block == D and feature == 1


def _explain(R: Tensor, F: Tensor, gram: Tensor, steps: Tensor, rhs: Tensor, squares: Tensor, count: Tensor) -> None:
    """Raises for the first tensor of a history that is not as it must be."""
    B, M, T, _ = R.shape
    for name, x in (("R", R), ("F", F)):
        if x.dtype != R.dtype or x.shape != R.shape or x.device != R.device or x.stride() != R.stride():
            raise ValueError(
                f"{name} must be contiguous by blocks, {R.dtype} of shape {tuple(R.shape)} on {R.device} with the "
                f"strides of R, got {x.dtype} of shape {tuple(x.shape)} on {x.device}"
            )
        if not _are_rows(x):
            raise ValueError(f"{name} must be contiguous by blocks, and these apart, got strides {x.stride()}")
    for name, x, dtype, shape in (
        ("gram", gram, torch.float64, (B, T, M, M)),
        ("steps_gram", steps, torch.float64, (B, T, M, M)), ("rhs", rhs, torch.float64, (B, T, M)),
        ("squares", squares, torch.float64, (B, T, 2)), ("count", count, torch.int32, (B, T)),
    ):  # fmt: skip
        _require(name, x, dtype, shape, R.device)


def _require(name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    """Raises ValueError unless x is what the kernels will take it for: they are given its address alone."""
    if x.dtype != dtype or x.shape != shape or x.device != device or not x.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous {dtype} of shape {tuple(shape)} on {device}, got "
            f"{'' if x.is_contiguous() else 'strided '}{x.dtype} of shape {tuple(x.shape)} on {x.device}"
        )


def _require_rows(rows: Tensor, z: Tensor, R: Tensor) -> None:
    alike = rows.dtype == torch.int64 and rows.get_device() == R.get_device() and rows.is_contiguous()
    if not alike or rows.dim() != 1 or len(rows) != len(z):
        _require("rows", rows, torch.int64, z.shape[:1], R.device)


def _refuse_gradient(x: Tensor, y: Tensor) -> None:
    if (x.requires_grad or y.requires_grad) and torch.is_grad_enabled():
        raise NotImplementedError("a step has no derivative: call it under torch.no_grad()")


# Defined on the dispatcher itself: `torch.library.custom_op` would add some 50 µs to every call.
_library = torch.library.Library("pydeqsolve", "DEF")
_RING = "Tensor(a!) R, Tensor(b!) F, Tensor(c!) gram, Tensor(d!)? steps_gram, Tensor(e!) rhs, Tensor(f!) squares"
_library.define(
    f"measure(Tensor f, Tensor z, {_RING}, Tensor(g!) count, Tensor rows, Tensor? wanted, int head, int kind, "
    "bool is_max) -> Tensor"
)
_library.define(
    "advance(Tensor z, Tensor modes, Tensor R, Tensor F, Tensor gram, Tensor? steps_gram, Tensor rhs, Tensor squares, "
    "Tensor(a!) count, Tensor rows, int head, int kind, int coupling, float ridge, float damping) -> (Tensor, Tensor)"
)


def measure(
    f: Tensor, z: Tensor, R: Tensor, F: Tensor, gram: Tensor, steps_gram: Tensor | None, rhs: Tensor, squares: Tensor,
    count: Tensor, rows: Tensor, wanted: Tensor | None, head: int, kind: int, is_max: bool,
) -> Tensor:  # fmt: skip
    """Pass 1 of a step whose newest row goes to slot `head`: norms (n, T, 2); see `ops.measure`. kind is in `KINDS`."""
    _refuse_gradient(f, z)
    M = R.shape[1]
    _require_rows(rows, z, R)
    if wanted is not None:
        _require("wanted", wanted, torch.bool, z.shape[:2], R.device)
    ring = _ring(R, F, gram, steps_gram, rhs, squares, count, (head - 1) % M, kind)
    return ops.measure(ring, f, z, rows, wanted, "max" if is_max else "rms")


def advance(
    z: Tensor, modes: Tensor, R: Tensor, F: Tensor, gram: Tensor, steps_gram: Tensor | None, rhs: Tensor,
    squares: Tensor, count: Tensor, rows: Tensor, head: int, kind: int, coupling: int, ridge: float, damping: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Pass 2: the next iterate (n, T, D) and the differences dropped (n, T); see `ops.advance`."""
    _refuse_gradient(z, F)
    _require("z", z, R.dtype, (len(rows), *R.shape[2:]), R.device)
    _require("modes", modes, torch.uint8, z.shape[:2], R.device)
    _require_rows(rows, z, R)
    ring = _ring(R, F, gram, steps_gram, rhs, squares, count, head, kind, coupling, ridge, damping)
    return ops.advance(ring, z, modes, rows)


for _device in ("CPU", "CUDA"):
    _library.impl("measure", measure, _device)
    _library.impl("advance", advance, _device)


@torch.library.register_fake("pydeqsolve::measure", lib=_library)
def _(f: Tensor, z: Tensor, R: Tensor, *rest: object) -> Tensor:
    return f.new_empty(f.shape[0], f.shape[1], 2, dtype=torch.float64)


@torch.library.register_fake("pydeqsolve::advance", lib=_library)
def _(z: Tensor, modes: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(z), modes.new_empty(modes.shape, dtype=torch.int32)
