"""KINSOL's Anderson acceleration on a Python map, by ctypes; Debian: apt-get install libsundials-dev."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes.util import find_library

import numpy as np

KIN_FP = 3  # kinsol/kinsol.h
STATUSES = {0: "KIN_SUCCESS", 1: "KIN_INITIAL_GUESS_OK", 2: "KIN_STEP_LT_STPTOL", -6: "KIN_MAXITER_REACHED"}
SYSTEM = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)

Array = np.ndarray[tuple[int], np.dtype[np.float64]]


class Kinsol:
    """The shared libraries of SUNDIALS 6 or 7; OSError where they are not installed."""

    def __init__(self) -> None:
        names = ("sundials_kinsol", "sundials_nvecserial")
        found = {name: find_library(name) for name in names}
        if missing := [name for name in names if found[name] is None]:
            raise OSError(f"{', '.join(missing)} not found")
        self.solver, self.vectors = (ctypes.CDLL(found[name], ctypes.RTLD_GLOBAL) for name in names)
        for function in (self.vectors.N_VMake_Serial, self.vectors.N_VGetArrayPointer_Serial, self.solver.KINCreate):
            function.restype = ctypes.c_void_p
        self.context = ctypes.c_void_p()
        core = self.solver if hasattr(self.solver, "SUNContext_Create") else self.vectors
        self._checked(core.SUNContext_Create(None, ctypes.byref(self.context)))

    @property
    def version(self) -> str:
        name = ctypes.create_string_buffer(40)
        core = self.solver if hasattr(self.solver, "SUNDIALSGetVersion") else self.vectors
        core.SUNDIALSGetVersion(name, len(name))
        return name.value.decode()

    def solve(self, fn: Callable[[Array], Array], start: Array, memory: int, goal: float, budget: int) -> str:
        """KINSOL's flag after z ← fn(z) from `start` (D,) until max|fn(z) − z| ≤ goal/√D, so that ‖·‖₂ ≤ goal."""
        z, ones = start.astype(np.float64), np.ones(start.size)
        state, scale = self._vector(z), self._vector(ones)

        def system(u: int, value: int, _: int) -> int:
            try:
                with np.errstate(all="ignore"):
                    self._entries(value, z.size)[:] = fn(self._entries(u, z.size).copy())
            except Exception:  # of the map: KINSOL ends with KIN_SYSFUNC_FAIL
                return -1
            return 0

        call = SYSTEM(system)
        kinsol = ctypes.c_void_p(self.solver.KINCreate(self.context))
        if hasattr(self.solver, "KINSetErrFile"):  # version 6 writes each failure to standard error
            self.solver.KINSetErrFile(kinsol, None)
        self._checked(self.solver.KINSetMAA(kinsol, ctypes.c_long(min(memory, z.size))))
        self._checked(self.solver.KINInit(kinsol, call, state))
        self._checked(self.solver.KINSetFuncNormTol(kinsol, ctypes.c_double(goal / z.size**0.5)))
        self._checked(self.solver.KINSetNumMaxIters(kinsol, ctypes.c_long(budget)))
        flag = self.solver.KINSol(kinsol, state, KIN_FP, scale, scale)
        self.solver.KINFree(ctypes.byref(kinsol))
        for vector in (state, scale):
            self.vectors.N_VDestroy_Serial(vector)
        return STATUSES.get(flag, f"flag {flag}")

    def _vector(self, entries: Array) -> ctypes.c_void_p:
        return ctypes.c_void_p(self.vectors.N_VMake_Serial(
            ctypes.c_int64(entries.size), entries.ctypes.data_as(ctypes.c_void_p), self.context
        ))  # fmt: skip

    def _entries(self, vector: int, size: int) -> Array:
        at = self.vectors.N_VGetArrayPointer_Serial(ctypes.c_void_p(vector))
        return np.ctypeslib.as_array(ctypes.cast(at, ctypes.POINTER(ctypes.c_double)), (size,))

    @staticmethod
    def _checked(flag: int) -> None:
        if flag:
            raise RuntimeError(f"KINSOL: flag {flag}")
