"""The native module, by addresses alone; the only file that touches it.

`Backend` (backend.py) is what a solve uses. The passes here are those of a history that `bind` returned.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import stop
from .records import BLOCK, SAMPLE, Records
from .rules import Rule


def _load() -> tuple[ModuleType | None, str]:
    try:
        module = importlib.import_module("pydeqsolve._native")
    except ImportError as error:
        return None, str(error)
    if getattr(module, "INTERFACE", 0) != INTERFACE or (module.SAMPLE, module.BLOCK) != (SAMPLE, BLOCK):
        return None, "it was built from other sources than these: build it again"
    return module, ""


LARGE_PAGE = 1 << 21  # bytes
INTERFACE = 16  # csrc/bindings.cpp


_native: Any
_native, _why_not = _load()
_warned = False


def warn_once() -> None:
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


def is_native(x: Tensor) -> bool:
    """Whether there are kernels for the device of x."""
    return _native is not None and (x.is_cpu or (x.is_cuda and bool(_native.cuda_architectures)))


def on_large_pages(x: Tensor) -> Tensor:
    """x, nothing of which was written yet, on large pages where it is that long and on the host."""
    if x.nbytes >= LARGE_PAGE and _native is not None and x.is_cpu:
        _native.use_large_pages(x.data_ptr(), x.untyped_storage().nbytes())
    return x


def buffer_like(x: Tensor) -> Tensor:
    """An uninitialised tensor like x, on large pages where it is that long."""
    return on_large_pages(torch.empty_like(x))


def zeros(n: int, device: torch.device) -> Tensor:
    """n zeros, float64, on large pages where they are that many."""
    if 8 * n < LARGE_PAGE:
        return torch.zeros(n, dtype=torch.float64, device=device)
    return on_large_pages(torch.empty(n, dtype=torch.float64, device=device)).zero_()


def layout(kind: int, eps: float, storage: int, shape: torch.Size, strides: tuple[int, ...]) -> tuple[Any, ...]:
    """What the module must know of R (B, M, T, D) besides its address; kind, storage: places in `KINDS`, `STORAGES`."""
    B, M, T, D = shape
    return storage, M, kind, eps, B, T, D, *strides[:2]


def bind(
    numbers: tuple[Any, ...], R: Tensor, F: Tensor, places: tuple[int, ...],
    use: tuple[int, float, float] = (0, 0.0, 1.0), rule: tuple[Any, ...] = (0.0, 1.0, 0, 0.0, False, 0),
    kept: bool = True,
) -> Any:  # fmt: skip
    """What is constant in a solve as the native module takes it, or None where there are no kernels for it.

    numbers: `layout` of R. places: `Ring.places`. use: the place of the coupling in `COUPLINGS`, ridge, damping. rule:
    `ruled`. kept: for a later call that names the same. Nothing is checked, and no tensor is kept alive.
    """
    if _native is None or numbers[1] > _native.MAX_SLOTS or not (R.is_cpu or is_native(R)):
        return None
    make = _solve if kept else _native.Solve
    return make(*numbers, not R.is_cpu, *use, R.data_ptr(), F.data_ptr(), *places, *rule)


def ruled(rule: Rule, front: stop.Front | None, T: int) -> tuple[Any, ...]:
    """What the native module must know of the judgement of T blocks."""
    shared = (rule.safeguard, rule.divisor, stop.NORMS.index(rule.norm))
    if front is None:
        return (*shared, 0.0, False, T)
    return (*shared, front.margin, front.latest, T if front.window is None else front.window)


@functools.lru_cache(maxsize=64)
def _solve(*numbers: Any) -> Any:
    """Numbers and addresses, copied once for all calls that name the same ones, whatever lies there by then."""
    return _native.Solve(*numbers)


def measure_bound(handle: Any, head: int, f: Tensor, z: Tensor, rows: Tensor, wanted: Tensor | None) -> Tensor:
    """`measure` of a history that `bind` returned, whose newest row goes to slot `head`. Nothing is checked."""
    n, T, _ = f.shape
    mask = 0 if wanted is None else wanted.data_ptr()
    if f.is_cpu:
        # Norms of blocks that are not wanted are not written.
        norms = (torch.empty if wanted is None else torch.zeros)(n, T, 2, dtype=torch.float64, device=f.device)
        _native.measure(
            handle, head, n, rows.data_ptr(), mask, f.data_ptr(), z.data_ptr(), norms.data_ptr(),
            torch.get_num_threads(), 0, 0,
        )  # fmt: skip
        return norms
    norms, partial = torch.zeros(n, T, 2, dtype=torch.float64, device=f.device), _workspace(handle, f)
    with torch.cuda.device(f.device):
        _native.measure(
            handle, head, n, rows.data_ptr(), mask, f.data_ptr(), z.data_ptr(), norms.data_ptr(), 0,
            partial.data_ptr(), _stream(f),
        )  # fmt: skip
    return norms


def _workspace(handle: Any, x: Tensor) -> Tensor:
    """Memory for the partial sums of a pass over the samples of x (n, T, D) on its device."""
    return torch.empty(max(1, _native.workspace_doubles(handle, x.shape[0])), dtype=torch.float64, device=x.device)


def _stream(x: Tensor) -> int:
    """The current stream of the device of x."""
    return int(torch.cuda.current_stream(x.device).cuda_stream)


def judge(
    handle: Any, samples: Records, norms: Tensor, dropped: Tensor | None
) -> tuple[Tensor, int | None, int | None]:
    """`rules.judge_samples`: mode (n, T), samples finished, samples left behind.

    The counts are None on a device: reading them would wait for it.
    """
    n, T, _ = norms.shape
    table = samples.table
    mode = torch.empty(n, T, dtype=torch.uint8, device=table.device)  # whatever the default device
    lost = 0 if dropped is None else dropped.data_ptr()
    shared = (handle, n, norms.data_ptr(), lost, table.data_ptr(), mode.data_ptr())
    if table.is_cpu:
        return (mode, *_native.judge_samples(*shared, 0))
    with torch.cuda.device(table.device):
        _native.judge_samples(*shared, _stream(table))
    return mode, None, None


def judge_blocks(
    handle: Any, samples: Records, blocks: Records, norms: Tensor, wanted: Tensor
) -> tuple[Tensor, Tensor, Tensor, int, int]:
    """`rules.judge_blocks` on the host: mode, broken, open (n, T), samples finished, blocks broken."""
    n, T, _ = norms.shape
    mode = torch.empty(n, T, dtype=torch.uint8, device=norms.device)  # whatever the default device
    broken, open_ = torch.empty_like(mode, dtype=torch.bool), torch.empty_like(mode, dtype=torch.bool)
    counts = _native.judge_blocks(
        handle, n, norms.data_ptr(), wanted.data_ptr(), samples.table.data_ptr(), blocks.table.data_ptr(),
        mode.data_ptr(), broken.data_ptr(), open_.data_ptr(),
    )  # fmt: skip
    return (mode, broken, open_, *counts)


def keep(best: Tensor, rows: Tensor, before: Tensor, samples: Records) -> None:
    """best[rows] = before on a device, for the samples that were left behind; one dtype, both contiguous.

    best (B, T, D), before (n, T, D), rows (n,) int64.
    """
    with torch.cuda.device(best.device):
        _native.keep(
            len(rows), best[0].nbytes, samples.table.data_ptr(), rows.data_ptr(), before.data_ptr(), best.data_ptr(),
            _stream(best),
        )  # fmt: skip


def step(
    handle: Any, head: int, f: Tensor, z: Tensor, rows: Tensor | None, wanted: Tensor | None, samples: Records,
    before: Tensor, best: Tensor, mode: Tensor, out: Tensor,
) -> tuple[int, int]:  # fmt: skip
    """`measure_bound`, `judge` and `advance_bound` at once on the host; see `NativeCPU.step`."""
    counts: tuple[int, int] = _native.step(
        handle, head, f.shape[0], 0 if rows is None else rows.data_ptr(), 0 if wanted is None else wanted.data_ptr(),
        f.data_ptr(), z.data_ptr(), samples.table.data_ptr(), before.data_ptr(), best.data_ptr(), mode.data_ptr(),
        out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return counts


def table_of(n: int, row: list[float], device: torch.device, table: Tensor | None = None) -> Tensor:
    """n times the same row of a sample's records, (n, len(row)) float64; nothing is copied to a device, which might
    wait for it. table: where it is to be, on the host."""
    if device.type == "cpu" and _native is not None:
        if table is None:
            table = on_large_pages(torch.empty(n, len(row), dtype=torch.float64, device=device))
        _native.fill(table.data_ptr(), n, row)
        return table
    if device.type == "cpu":
        return torch.tensor(row, dtype=torch.float64, device=device).repeat(n, 1)
    table = torch.zeros(n, len(row), dtype=torch.float64, device=device)
    for i, value in enumerate(row):
        if value:
            table[:, i] = value
    return table


def leave(
    handle: Any, rows: Tensor | None, z: Tensor, samples: Records, best: Tensor, left: Tensor, ended: bool
) -> None:
    """Stores iterates and records of finished samples on the host; see `NativeCPU.leave`."""
    _native.leave(
        handle, z.shape[0], 0 if rows is None else rows.data_ptr(), z.data_ptr(), samples.table.data_ptr(),
        best.data_ptr(), left.data_ptr(), ended, torch.get_num_threads(),
    )  # fmt: skip


def close_up(samples: Records, k: int, tensors: list[Tensor]) -> list[Tensor]:
    """The k samples of contiguous `tensors` (n, …) on the host that are still running, one after the other."""
    n, found = samples.table.shape[0], [buffer_like(x[:k]) for x in tensors]
    pairs = zip(tensors, found, strict=True)
    parts = [(x.data_ptr(), y.data_ptr(), x.nbytes // n) for x, y in pairs]
    _native.close_up(n, samples.table.data_ptr(), torch.get_num_threads(), parts)
    return found


def tell(left: Tensor) -> tuple[list[Tensor], int]:
    """best float64, then evaluations, status, rejections and rank_losses int64, (B,) each, of records left (B, …) on
    the host; and how many did not converge."""
    B, device = left.shape[0], left.device
    best = torch.empty(B, dtype=torch.float64, device=device)
    evaluations, rejections = torch.empty_like(best, dtype=torch.int64), torch.empty_like(best, dtype=torch.int64)
    status, losses = torch.empty_like(evaluations), torch.empty_like(evaluations)
    failed: int = _native.tell(
        B, left.data_ptr(), best.data_ptr(), evaluations.data_ptr(), status.data_ptr(), rejections.data_ptr(),
        losses.data_ptr(),
    )  # fmt: skip
    return [best, evaluations, status, rejections, losses], failed


def advance_bound(
    handle: Any, head: int, slots: int, z: Tensor, mode: Tensor, rows: Tensor, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`advance` of a history that `bind` returned, whose newest row is in slot `head`. Nothing is checked."""
    n, T, _ = z.shape
    dropped = torch.empty(n, T, dtype=torch.int32, device=z.device)
    z_next = torch.empty_like(z) if out is None else out
    if z.is_cpu:
        _native.advance(
            handle, head, n, rows.data_ptr(), mode.data_ptr(), 0, dropped.data_ptr(), z.data_ptr(), z_next.data_ptr(),
            torch.get_num_threads(), 0, 0,
        )  # fmt: skip
        return z_next, dropped
    gamma = torch.empty(n, T, slots, dtype=torch.float64, device=z.device)
    workspace = _workspace(handle, z)
    with torch.cuda.device(z.device):
        _native.advance(
            handle, head, n, rows.data_ptr(), mode.data_ptr(), gamma.data_ptr(), dropped.data_ptr(), z.data_ptr(),
            z_next.data_ptr(), 0, workspace.data_ptr(), _stream(z),
        )  # fmt: skip
    return z_next, dropped


def build_info() -> dict[str, Any]:
    """What this installation can do: native module, instruction set, CUDA architectures, devices, threads, versions."""
    from .. import __version__

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


def system(kind: str, *numbers: Any) -> Any:
    """A solve of the adjoint's systems, "Krylov" or "Small", from numbers and addresses; None without the module."""
    return None if _native is None else getattr(_native, kind)(*numbers)


def on_device() -> Any:
    """The module, where it has the Krylov passes of a device, which `DeviceKrylov` calls; else None."""
    return _native if hasattr(_native, "KrylovCall") else None
