"""The two passes of a solver step, native where they can be; the only file that touches the native module.

`measure` forms r = f − z, writes the newest row and the new Gram entries and returns the norms. `advance` solves the
small systems and mixes the next iterate. Both work on n samples at hand, which `rows` maps to the B of the ring.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import reference
from .memory import address
from .reference import ACCEPT, KEEP, MIX, PLAIN, REJECT
from .ring import COUPLINGS, KINDS, STORAGES, Ring
from .stop import NORMS, Front

__all__ = [
    "ACCEPT",
    "KEEP",
    "MIX",
    "PLAIN",
    "REJECT",
    "advance",
    "buffer_like",
    "build_info",
    "can_step",
    "judge",
    "judge_front",
    "keep",
    "measure",
    "start",
    "step",
]


def _load() -> tuple[ModuleType | None, str]:
    try:
        module = importlib.import_module("._native", __package__)
    except ImportError as error:
        return None, str(error)
    if getattr(module, "INTERFACE", 0) != INTERFACE:
        return None, "it was built from other sources than these: build it again"
    return module, ""


INTERFACE = 9  # csrc/bindings.cpp
LARGE_PAGE = 1 << 21  # bytes


_native: Any
_native, _why_not = _load()
_warned = False
_handles = "_native_ring"


def _warn_once() -> None:
    """Says, once in a process, that an installation lacks the native module: solves are right without, but slower."""
    global _warned
    if _native is None and _why_not and not _warned:
        _warned = True
        warnings.warn(
            f"pydeqsolve solves without its native module, by a slower reference in PyTorch ({_why_not}); install it "
            "where there is a C++17 compiler, see pydeqsolve.build_info()",
            RuntimeWarning,
            stacklevel=2,
        )


def start(ring: Ring, fresh: bool = True) -> None:
    """Prepares `ring` for the native step when device, size and build allow it; warns once where there is none.

    fresh: nothing was written to its rows yet, so what lies under them may still be chosen.
    """
    R = ring.R
    backend = handle = None
    if _is_native(R):
        for name, x in ring.tensors().items():
            if not fresh or type(x) is not Tensor:
                address(x, f"{name} of the history")
        numbers = layout(KINDS.index(ring.kind), ring.eps, ring.dtype, R.shape, R.stride())
        handle = bind(numbers, R, ring.F, ring.gram, ring.steps_gram, ring.rhs, ring.squares, ring.count)
        backend = None if handle is None else "cpu" if R.is_cpu else R.device.type
    _warn_once()
    if fresh and backend == "cpu":
        for rows in (R, ring.F):
            _native.use_large_pages(rows.data_ptr(), rows.untyped_storage().nbytes())
    ring.__dict__[_handles] = (backend, handle)


def buffer_like(x: Tensor) -> Tensor:
    """An uninitialised tensor like x, on large pages where it is that long."""
    buffer = torch.empty_like(x)
    if buffer.nbytes >= LARGE_PAGE and _native is not None and x.is_cpu:
        _native.use_large_pages(address(buffer), buffer.nbytes)
    return buffer


def layout(
    kind: int, eps: float, dtype: torch.dtype, shape: torch.Size, strides: tuple[int, ...]
) -> tuple[Any, ...]:  # fmt: skip
    """What the native module must know of R (B, M, T, D) besides its address; kind is a place in `KINDS`."""
    B, M, T, D = shape
    return STORAGES.index(dtype), M, kind, eps, B, T, D, *strides[:2]


def bind(
    numbers: tuple[Any, ...], R: Tensor, F: Tensor, gram: Tensor, steps_gram: Tensor | None, rhs: Tensor,
    squares: Tensor, count: Tensor,
) -> Any:  # fmt: skip
    """A history of that `layout` as the native module takes it, or None where there are no kernels for it.

    It is addresses alone: nothing is checked, and no tensor is kept alive.
    """
    if _native is None or numbers[1] > _native.MAX_SLOTS or not (R.is_cpu or _is_native(R)):
        return None
    return _history(
        *numbers, R.data_ptr(), F.data_ptr(), gram.data_ptr(), 0 if steps_gram is None else steps_gram.data_ptr(),
        rhs.data_ptr(), squares.data_ptr(), count.data_ptr(),
    )  # fmt: skip


@functools.lru_cache(maxsize=64)
def _history(*numbers: Any) -> Any:
    """Numbers and addresses, copied once for all calls that name the same ones, whatever lies there by then."""
    return _native.Ring(*numbers)


def release(ring: Ring) -> None:
    """Lets go of what `start` made: the ring is plain tensors again, to be copied or pickled."""
    ring.__dict__.pop(_handles, None)


def _turn(ring: Ring) -> None:
    """The oldest row makes way for the newest."""
    ring.head = (ring.head + 1) % ring.slots


def measure(ring: Ring, f: Tensor, z: Tensor, rows: Tensor, wanted: Tensor | None, norm: str) -> Tensor:
    """Pass 1. f, z (n, T, D) in the ring's dtype, contiguous; rows (n,) int64; wanted (n, T) bool or None.

    Returns norms (n, T, 2) float64, of r and of f: sums of squares, or maxima when norm is "max"; NaN or infinity in a
    block makes its norm NaN or infinite. Blocks that are not wanted return 0 and lose their history.
    """
    _turn(ring)
    backend, handle = ring.__dict__[_handles]
    if backend is None:
        return reference.measure(ring, f, z, rows, wanted, norm)
    _check(ring, f, z)
    wanted = None if wanted is None else wanted.contiguous()
    return measure_bound(handle, ring.head, f, z, rows, wanted, norm == "max", ring.squares)


def measure_bound(
    handle: Any, head: int, f: Tensor, z: Tensor, rows: Tensor, wanted: Tensor | None, is_max: bool, squares: Tensor
) -> Tensor:
    """`measure` of a history that `bind` returned, whose newest row goes to slot `head`. Nothing is checked."""
    n, T, _ = f.shape
    mask = 0 if wanted is None else wanted.data_ptr()
    if f.is_cpu:
        # Norms of blocks that are not wanted are not written.
        norms = squares.new_empty(n, T, 2) if wanted is None else squares.new_zeros(n, T, 2)
        _native.measure(
            handle, head, n, rows.data_ptr(), mask, f.data_ptr(), z.data_ptr(), norms.data_ptr(), is_max,
            torch.get_num_threads(),
        )  # fmt: skip
        return norms
    norms, partial = squares.new_zeros(n, T, 2), _workspace(handle, f)
    with torch.cuda.device(f.device):
        _native.measure_cuda(
            handle, head, n, rows.data_ptr(), mask, f.data_ptr(), z.data_ptr(), norms.data_ptr(), is_max,
            partial.data_ptr(), torch.cuda.current_stream(f.device).cuda_stream,
        )  # fmt: skip
    return norms


def _workspace(handle: Any, x: Tensor) -> Tensor:
    """Memory for the partial sums of a pass over the samples of x (n, T, D) on its device."""
    return torch.empty(max(1, _native.workspace_doubles(handle, x.shape[0])), dtype=torch.float64, device=x.device)


def judge(
    table: Tensor, norms: Tensor, dropped: Tensor | None, safeguard: float, eps: float, entries: float, is_max: bool
) -> tuple[Tensor, int | None, int | None] | None:
    """`Monitor.judge` natively: mode (n, T), samples finished, samples left behind; None where it cannot run.

    The counts are None on a device: reading them would wait for it.
    """
    if not _is_native(table):
        return None
    n, T, _ = norms.shape
    mode = torch.empty(n, T, dtype=torch.uint8, device=table.device)  # whatever the default device
    shared = (
        n, T, norms.data_ptr(), 0 if dropped is None else dropped.data_ptr(), table.data_ptr(), safeguard, eps, entries,
        is_max, mode.data_ptr(),
    )  # fmt: skip
    if table.device.type == "cpu":
        return (mode, *_native.judge(*shared))
    with torch.cuda.device(table.device):
        _native.judge_cuda(*shared, torch.cuda.current_stream(table.device).cuda_stream)
    return mode, None, None


def keep(best: Tensor, rows: Tensor, before: Tensor, table: Tensor) -> bool:
    """best[rows] = before on a device, for the samples that `table` says were left behind.

    best (B, T, D), before (n, T, D), rows (n,) int64. Returns False, having done nothing, where it cannot run.
    """
    if table.device.type == "cpu" or not _is_native(table):
        return False
    if best.dtype != before.dtype or not best.is_contiguous() or not before.is_contiguous():
        return False
    with torch.cuda.device(table.device):
        _native.keep_cuda(
            len(rows), best[0].nbytes, table.data_ptr(), rows.data_ptr(), before.data_ptr(), best.data_ptr(),
            torch.cuda.current_stream(table.device).cuda_stream,
        )  # fmt: skip
    return True


def _is_native(x: Tensor) -> bool:
    """Whether there are kernels for the device of x."""
    if _native is None:
        return False
    return x.is_cpu or (x.is_cuda and bool(_native.cuda_architectures))


def judge_front(
    table: Tensor, blocks: Tensor, norms: Tensor, wanted: Tensor, safeguard: float, front: Front, norm: str,
    entries: int,
) -> tuple[Tensor, Tensor, Tensor, int, int] | None:  # fmt: skip
    """`FrontMonitor.judge_blocks` on the host: mode, broken, open (n, T), samples finished, blocks broken; or None."""
    if _native is None or table.device.type != "cpu":
        return None
    n, T, _ = norms.shape
    mode = torch.empty(n, T, dtype=torch.uint8, device=table.device)  # whatever the default device
    broken, open_ = torch.empty_like(mode, dtype=torch.bool), torch.empty_like(mode, dtype=torch.bool)
    counts = _native.judge_front(
        n, T, norms.data_ptr(), wanted.data_ptr(), table.data_ptr(), blocks.data_ptr(), safeguard, front.margin,
        front.latest, T if front.window is None else front.window, NORMS.index(norm), entries, mode.data_ptr(),
        broken.data_ptr(), open_.data_ptr(),
    )  # fmt: skip
    return (mode, broken, open_, *counts)


def can_step(ring: Ring) -> bool:
    """Whether `step` can take steps of this ring: on the host, natively."""
    return ring.__dict__[_handles][0] == "cpu"


def step(
    ring: Ring, f: Tensor, z: Tensor, rows: Tensor, wanted: Tensor | None, table: Tensor, safeguard: float,
    entries: float, is_max: bool, before: Tensor | None, best: Tensor | None, out: Tensor,
) -> tuple[Tensor, int, int]:  # fmt: skip
    """`measure`, `judge` and `advance` at once: each sample passes through all three while it is in a core's cache.

    Writes the next iterate to out (n, T, D), which must share no memory with f and z; counts in `table` what it drops.
    Copies the samples that are left behind from before (n, T, D), the iterate before z, to best (B, T, D), where these
    are given: like f and z, contiguous and in the ring's dtype. Returns mode (n, T), samples finished, samples left
    behind.
    """
    _turn(ring)
    _check(ring, f, z)
    n, T, _ = f.shape
    mode = torch.empty(n, T, dtype=torch.uint8, device=table.device)  # whatever the default device
    wanted = None if wanted is None else wanted.contiguous()
    counts = _native.step(
        ring.__dict__[_handles][1], ring.head, n, rows.data_ptr(),
        0 if wanted is None else wanted.data_ptr(), f.data_ptr(), z.data_ptr(), table.data_ptr(),
        safeguard, entries, is_max, COUPLINGS.index(ring.coupling), ring.ridge, ring.damping,
        *((0, 0) if before is None or best is None else (before.data_ptr(), best.data_ptr())), mode.data_ptr(),
        out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return (mode, *counts)


def advance(ring: Ring, z: Tensor, mode: Tensor, rows: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Pass 2. Returns the next iterate (n, T, D) and how many differences each block dropped (n, T).

    z (n, T, D) the current iterate; mode (n, T) uint8 says what becomes of each block: KEEP z, MIX, REJECT the newest
    row (back to the value f of the row before), PLAIN f, or ACCEPT f without damping. out (n, T, D) may receive the
    iterate; it must not share memory with z.
    """
    backend, handle = ring.__dict__[_handles]
    if backend is None:
        count = ring.count[rows]
        gamma, dropped = reference.weights(ring, mode, rows)
        return reference.mix(ring, gamma, mode, z, rows, count), dropped
    coupling = COUPLINGS.index(ring.coupling)
    return advance_bound(
        handle, ring.head, z, mode, rows, coupling, ring.ridge, ring.damping, ring.rhs, ring.count, out
    )


def advance_bound(
    handle: Any, head: int, z: Tensor, mode: Tensor, rows: Tensor, coupling: int, ridge: float, damping: float,
    rhs: Tensor, count: Tensor, out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`advance` of a history that `bind` returned, whose newest row is in slot `head`. Nothing is checked."""
    n, T, _ = z.shape
    dropped = count.new_empty(n, T)
    z_next = torch.empty_like(z) if out is None else out
    if z.is_cpu:
        _native.advance(
            handle, head, n, rows.data_ptr(), mode.data_ptr(), dropped.data_ptr(), coupling, ridge, damping,
            z.data_ptr(), z_next.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return z_next, dropped
    gamma, workspace = rhs.new_empty(n, T, rhs.shape[2]), _workspace(handle, z)
    with torch.cuda.device(z.device):
        _native.advance_cuda(
            handle, head, n, rows.data_ptr(), mode.data_ptr(), gamma.data_ptr(), dropped.data_ptr(), coupling, ridge,
            damping, z.data_ptr(), z_next.data_ptr(), workspace.data_ptr(),
            torch.cuda.current_stream(z.device).cuda_stream,
        )  # fmt: skip
    return z_next, dropped


def _check(ring: Ring, f: Tensor, z: Tensor) -> None:
    """Raises ValueError unless f and z are what the kernels will take them for: they get addresses alone.

    Whether memory lies there was checked where the tensors came from (`memory.address`); no address is a TypeError.
    """
    R, dtype, shape = ring.R, ring.dtype, f.shape
    _, _, T, D = R.shape
    if not (
        f.dtype == z.dtype == dtype and f.get_device() == z.get_device() == R.get_device()
        and f.is_contiguous() and z.is_contiguous() and not f.is_neg() and not z.is_neg()
    ):  # fmt: skip
        got = ", ".join(f"{name} {x.dtype} on {x.device}" for name, x in (("f", f), ("z", z)))
        raise ValueError(f"f and z must be contiguous {dtype} on {R.device}, got {got}")
    if shape != z.shape or len(shape) != 3 or shape[1] != T or shape[2] != D:
        raise ValueError(f"f and z must have shape (n, {T}, {D}), got {tuple(shape)}")


def build_info() -> dict[str, Any]:
    """What this installation can do: native module, instruction set, CUDA architectures, devices, threads, versions."""
    from . import __version__

    return {
        "version": __version__,
        "torch": torch.__version__,
        "native": _native is not None,
        "native_error": _why_not,
        "cpu_isa": _native.cpu_isa() if _native is not None else "",
        "cuda_architectures": _native.cuda_architectures if _native is not None else "",
        "devices": _native.device_count() if _native is not None else 0,
        "threads": torch.get_num_threads(),
    }
