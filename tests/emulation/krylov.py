"""The Krylov passes of a device, emulated: what `DeviceKrylov` takes for the native module."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from emulation.backend import Emulator, emulator
from torch import Tensor

from pydeqsolve.step import systems
from pydeqsolve.step.device import DeviceKrylov


class KrylovCall(ctypes.Structure):
    """`KrylovCall` of csrc/krylov_device.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("B", "N", "most")), ("eps", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in (
            "g", "samples", "vectors", "columns", "workspace", "counts", "stream",
        )),
        *((name, ctypes.c_int32) for name in ("is_double", "aligned", "k", "cautious")),
        *((name, ctypes.c_void_p) for name in ("mask", "rtols", "atols")),
        *((name, ctypes.c_double) for name in ("rtol", "atol", "rounding")),
        *((name, ctypes.c_void_p) for name in (
            "product", "product2", "u1", "u2", "u", "next", "column", "values", "raised",
        )),
        *((name, ctypes.c_int32) for name in ("adjoint", "follows")),
        *((name, ctypes.c_void_p) for name in ("status", "residual", "evaluations")),
    )  # fmt: skip


class Kernels:
    """The emulated passes under the names that they have in the native module; counts their launches."""

    KrylovCall = KrylovCall

    def __init__(self, kernels: Emulator) -> None:
        self.kernels, self.library = kernels, kernels.library
        for name in ("workspace_doubles", "call_bytes", "sample_bytes", "counts", "most_vectors"):
            getattr(self.library, f"emulated_krylov_{name}").restype = ctypes.c_int64
        self.library.emulated_krylov.restype = ctypes.c_char_p
        assert self.library.emulated_krylov_call_bytes() == ctypes.sizeof(KrylovCall), "not as in krylov_device.h"
        self.KRYLOV_SAMPLE_BYTES = int(self.library.emulated_krylov_sample_bytes())
        self.KRYLOV_COUNTS = int(self.library.emulated_krylov_counts())
        self.KRYLOV_MOST_VECTORS = int(self.library.emulated_krylov_most_vectors())
        self.launches: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def krylov(self, name: str, call: KrylovCall) -> None:
        before = self.kernels.launches
        error = self.library.emulated_krylov(name.encode(), ctypes.byref(call))
        if error:
            raise RuntimeError(f"{name}: {error.decode()}")
        self.calls[name] += 1
        self.launches[name] += self.kernels.launches - before

    def krylov_workspace_doubles(self, B: int, N: int, most: int) -> int:
        sizes = [ctypes.c_int64(size) for size in (B, N, most)]
        return int(self.library.emulated_krylov_workspace_doubles(*sizes))


@contextmanager
def emulated_krylov(schedule: int = 0) -> Iterator[Kernels]:
    """Inside it every Krylov solve for a tensor on the host takes the emulated passes."""
    kernels = Kernels(emulator())
    kernels.kernels.choose_schedule(schedule)

    def krylov(g: Tensor, restart: int) -> Any:
        if systems._systems(g) is None or restart > kernels.KRYLOV_MOST_VECTORS:
            return None
        return DeviceKrylov(g, restart, kernels)

    with mock.patch.object(systems, "krylov", krylov):
        yield kernels
