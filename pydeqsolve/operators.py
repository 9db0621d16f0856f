"""The two passes of a step as torch.library operators, `torch.ops.pydeqsolve.measure` and `.advance`.

For programs that write a loop of their own and want it traced by torch.compile or export: schema, fake implementation
and mutated arguments are declared, so nothing breaks the graph. `solve` calls the same passes directly
(`step.backend`), which costs less per call. The tensors are those of `step.ring.Ring`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from .memory import address
from .step import native
from .step.backend import Backend
from .step.ring import COUPLINGS, KINDS, STORAGES, Ring, addresses
from .step.rules import Rule

RULES = tuple(Rule(0.0, 0.0, norm, 1) for norm in ("rms", "max"))  # a call of a pass alone judges nothing
RULED = tuple(native.ruled(rule, None, 0) for rule in RULES)
# What a call takes besides R and F; it may take steps_gram too, and wanted.
MEASURED = ("gram", "rhs", "squares", "count", "rows", "f", "z")
ADVANCED = ("gram", "rhs", "squares", "count", "rows", "z", "modes")


@functools.lru_cache(maxsize=256)
def _contract(
    names: tuple[str, ...], kind: int, n: int, dtype: torch.dtype, shape: torch.Size, strides: tuple[int, ...]
) -> tuple[list[tuple[object, ...]], tuple[Any, ...]]:
    """What a call of n samples takes beside such an R (B, M, T, D), which F must be like; and the `native.layout` of R.

    Of each name: type, dtype, shape, and that it is contiguous. Raises ValueError where R holds no history. Kept, for a
    call to be compared with it at little cost.
    """
    if dtype not in STORAGES or len(shape) != 4 or not shape[1] or not _are_rows(shape, strides):
        raise ValueError(
            f"R must be (B, M, T, D), M > 0, in one of {STORAGES}, its blocks (T, D) contiguous and apart, got {dtype} "
            f"of shape {tuple(shape)} with strides {strides}"
        )
    if not 0 <= kind < len(KINDS):
        raise ValueError(f"kind must be a place in {KINDS}, got {kind}")
    if KINDS[kind] == "broyden good" and "steps_gram" not in names:
        raise ValueError("steps_gram is required for Broyden good")
    B, M, T, D = shape
    table = {
        "gram": (torch.float64, (B, T, M, M)), "steps_gram": (torch.float64, (B, T, M, M)),
        "rhs": (torch.float64, (B, T, M)), "squares": (torch.float64, (B, T, 2)), "count": (torch.int32, (B, T)),
        "rows": (torch.int64, (n,)), "f": (dtype, (n, T, D)), "z": (dtype, (n, T, D)),
        "wanted": (torch.bool, (n, T)), "modes": (torch.uint8, (n, T)),
    }  # fmt: skip
    layout = native.layout(kind, torch.finfo(dtype).eps, STORAGES.index(dtype), shape, strides)
    return [(Tensor, *table[name], True) for name in names], layout


def _are_rows(shape: torch.Size, strides: tuple[int, ...]) -> bool:
    """Whether the blocks (T, D) of R (B, M, T, D) are contiguous, and no two of them share memory."""
    T, D = shape[2:]
    taken = T * D
    for stride, size in sorted(zip(strides[:2], shape[:2], strict=True)):
        if size > 1 and stride < taken:
            return False
        taken += stride * (size - 1)
    return (D <= 1 or strides[3] == 1) and (T <= 1 or strides[2] == D)


def _check(
    kind: int, R: Tensor, F: Tensor, steps_gram: Tensor | None, n: int, names: tuple[str, ...],
    others: tuple[Tensor, ...],
) -> tuple[Any, ...]:  # fmt: skip
    """The `native.layout` of a history. Raises unless every tensor is what the kernels take its address for."""
    if steps_gram is not None:
        names, others = (*names, "steps_gram"), (*others, steps_gram)
    dtype, shape, strides = like_R = (R.dtype, R.shape, R.stride())
    expected, layout = _contract(names, kind, n, dtype, shape, strides)
    found = [(type(x), x.dtype, x.shape, x.is_contiguous()) for x in others]
    if found != expected or (F.dtype, F.shape, F.stride()) != like_R or not type(R) is type(F) is Tensor:
        _look_closely(R, F, names, others, expected)
    return layout


def _look_closely(
    R: Tensor, F: Tensor, names: tuple[str, ...], others: tuple[Tensor, ...], expected: list[tuple[Any, ...]]
) -> None:
    """Raises for the first tensor that is not as it must be; it may be of a subclass that has memory."""
    _refuse_without_memory(("R", "F", *names), (R, F, *others))
    if _words(F) != _words(R):
        raise ValueError(f"F must be {_words(R)}, as R is, got {_words(F)}")
    for name, x, (_, dtype, shape, _) in zip(names, others, expected, strict=True):
        if x.dtype != dtype or x.shape != shape or not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous {dtype} of shape {shape}, got {_words(x)}")


def _refuse_without_memory(names: tuple[str, ...], tensors: tuple[Tensor, ...]) -> None:
    """Raises TypeError by the name of the first that has none; where there are kernels, they see to it."""
    for name, x in zip(names, tensors, strict=True):
        address(x, name)


def _words(x: Tensor) -> str:
    return f"{x.dtype} of shape {tuple(x.shape)} with strides {x.stride()}"


def _ring(
    R: Tensor, F: Tensor, gram: Tensor, steps_gram: Tensor | None, rhs: Tensor, squares: Tensor, count: Tensor,
    head: int, kind: int, coupling: int = 0, ridge: float = 0.0, damping: float = 1.0,
) -> Ring:  # fmt: skip
    """A `Ring` over tensors that exist already: the reference, which runs where there are no kernels, takes one."""
    ring = Ring.__new__(Ring)
    ring.kind, ring.coupling, ring.damping, ring.ridge = KINDS[kind], COUPLINGS[coupling], damping, ridge
    ring.slots, ring.dtype, ring.eps = R.shape[1], R.dtype, torch.finfo(R.dtype).eps
    ring.head = head % ring.slots
    ring.R, ring.F, ring.gram, ring.steps_gram = R, F, gram, steps_gram
    ring.rhs, ring.squares, ring.count = rhs, squares, count
    return ring


def _refuse_gradient() -> NoReturn:
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
    """Pass 1 of a step whose newest row goes to slot `head`: norms (n, T, 2); see `Backend.measure`.

    kind is a place in `ring.KINDS`; head is taken modulo the number of slots. Raises ValueError for a tensor that
    is not as `_contract` says or shares memory with the history, TypeError for one that has no memory,
    NotImplementedError where a gradient would be lost. On the host rows outside 0 … B − 1 are a ValueError too; a
    device is not waited for to find them.
    """
    if (f.requires_grad or z.requires_grad) and torch.is_grad_enabled():
        _refuse_gradient()
    names: tuple[str, ...] = MEASURED
    others: tuple[Tensor, ...] = (gram, rhs, squares, count, rows, f, z)
    if wanted is not None:
        names, others = (*names, "wanted"), (*others, wanted)
        _refuse_without_memory(("wanted",), (wanted,))  # to the kernels no address would be none given
    layout = _check(kind, R, F, steps_gram, rows.numel(), names, others)
    handle = native.bind(layout, R, F, addresses((gram, steps_gram, rhs, squares, count)), rule=RULED[is_max])
    if handle is None:
        _refuse_without_memory(("R", "F", *names), (R, F, *others))
        ring = _ring(R, F, gram, steps_gram, rhs, squares, count, head - 1, kind)
        return Backend(ring, RULES[is_max]).measure(f, z, rows, wanted)
    return native.measure_bound(handle, head % layout[1], f, z, rows, wanted)


def advance(
    z: Tensor, modes: Tensor, R: Tensor, F: Tensor, gram: Tensor, steps_gram: Tensor | None, rhs: Tensor,
    squares: Tensor, count: Tensor, rows: Tensor, head: int, kind: int, coupling: int, ridge: float, damping: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Pass 2: the next iterate (n, T, D) and the differences dropped (n, T); see `Backend.advance`.

    coupling is a place in `ring.COUPLINGS`; the rest, and what is raised, as in `measure`.
    """
    if (z.requires_grad or F.requires_grad) and torch.is_grad_enabled():
        _refuse_gradient()
    others = (gram, rhs, squares, count, rows, z, modes)
    layout = _check(kind, R, F, steps_gram, rows.numel(), ADVANCED, others)
    if not 0 <= coupling < len(COUPLINGS):
        raise ValueError(f"coupling must be a place in {COUPLINGS}, got {coupling}")
    handle = native.bind(layout, R, F, addresses((gram, steps_gram, rhs, squares, count)), (coupling, ridge, damping))
    if handle is None:
        _refuse_without_memory(("R", "F", *ADVANCED), (R, F, *others))
        ring = _ring(R, F, gram, steps_gram, rhs, squares, count, head, kind, coupling, ridge, damping)
        return Backend(ring, RULES[0]).advance(z, modes, rows)
    return native.advance_bound(handle, head % layout[1], layout[1], z, modes, rows)


def _on_one_device(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel, for tensors that all lie on one device."""

    def checked(*given: object) -> Any:
        devices = {x.device for x in given if isinstance(x, Tensor)}
        if len(devices) > 1:
            raise ValueError(f"all tensors must be on one device, got {', '.join(sorted(map(str, devices)))}")
        return kernel(*given)

    return checked


for _kernel in (measure, advance):
    # The dispatcher calls the host's kernel only where all tensors lie there, a device's where one does.
    _library.impl(_kernel.__name__, _kernel, "CPU")
    _library.impl(_kernel.__name__, _on_one_device(_kernel), "CUDA")


@torch.library.register_fake("pydeqsolve::measure", lib=_library)
def _(f: Tensor, z: Tensor, R: Tensor, *rest: object) -> Tensor:
    return f.new_empty(f.shape[0], f.shape[1], 2, dtype=torch.float64)


@torch.library.register_fake("pydeqsolve::advance", lib=_library)
def _(z: Tensor, modes: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(z), modes.new_empty(modes.shape, dtype=torch.int32)
