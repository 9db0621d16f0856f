"""A solve of a few unknowns a sample, in the native module from the first step to the outcome (`csrc/few.h`).

Of each sample the module keeps the rows of its history and 64 bytes; the samples that run on are a list of places, and
nothing but that list closes up when others finish.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..stop import NORMS, Stop
from . import native
from .backend import Backend, on_the_host
from .records import SAMPLE
from .ring import KINDS, STORAGES, Method, _rows
from .rules import Rule

ENTRIES, SLOTS, STEPS = 4, 17, 65535  # csrc/few.h


def is_few(method: Method, stop: Stop, z0: Tensor) -> bool:
    """Whether solves from z0 (B, T, D) are small enough, on a device with such kernels."""
    _, T, D = z0.shape
    single = T == 1 or method.coupling == "joint" or method.memory == 0
    fits = 0 < T * D <= ENTRIES and method.memory < SLOTS and stop.max_steps <= STEPS
    return fits and single and z0.is_cpu and z0.dtype in STORAGES and native.is_native(z0) and type(z0) is Tensor


class Few(Backend):
    """The passes over samples (B, T, D) of a few unknowns, all blocks of a sample coupled.

    wide: fn is given all samples at each step; else those that still run. floor: residuals within floor·‖f‖ are
    rounding.
    """

    best: Tensor  # (B, T, D)
    handle: Any

    def __init__(self, method: Method, rule: Rule, stop: Stop, floor: float, wide: bool) -> None:
        self.method, self.rule, self.stop, self.floor, self.wide = method, rule, stop, floor, wide

    def begin(self, best: Tensor) -> Few:
        """Itself, with memory for a solve from best (B, T, D), contiguous, where better iterates go when found."""
        method, rule, stop = self.method, self.rule, self.stop
        B, T, D = best.shape
        M, device = method.memory + 1, best.device
        self.best = best
        self.rtol = 0.0 if isinstance(stop.rtol, Tensor) else float(stop.rtol)
        atol = 0.0 if isinstance(stop.atol, Tensor) else float(stop.atol)
        self._each = [
            x.to(device, torch.float64).expand(B).contiguous() if isinstance(x, Tensor) else None
            for x in (stop.rtol, stop.atol)
        ]
        # A map without a memory has no history.
        self._R, self._F = (_rows(B if M > 1 else min(B, 1), M, 1, T * D, best.dtype, device) for _ in "RF")
        self._known = native.on_large_pages(torch.empty(2, B, 4, dtype=torch.float64, device=device))
        self._places = torch.empty(2 if self.wide else 1, B, dtype=torch.int64, device=device)
        self.done = torch.empty(B, dtype=torch.uint8, device=device)
        records, past = self._known.unbind()
        rows, ended = self._places[0], self._places[-1]
        tolerances = (0 if x is None else x.data_ptr() for x in self._each)
        addresses = (x.data_ptr() for x in (self._R, self._F, best, records, past, rows, ended, self.done))
        self.handle = native.system(
            "Few", STORAGES.index(best.dtype), M, KINDS.index(method.kind), torch.finfo(best.dtype).eps, B, T * D,
            self._R.stride(1), float(method.ridge), float(method.damping), rule.safeguard, rule.divisor,
            NORMS.index(rule.norm), self.rtol, atol, self.floor, *tolerances, self.wide,
            *addresses,
        )  # fmt: skip
        return self

    def set_tolerance(self, least_rtol: float, floor: float) -> None:
        """From here on rtol is no less, and residuals within floor·‖f‖ are rounding."""
        self.rtol = max(self.rtol, least_rtol)
        self.handle.set_tolerance(self.rtol, floor)

    def step(self, f: Tensor, z: Tensor, z_next: Tensor | None, settled: int) -> int:
        """Measures f at z, judges, and writes the next iterates to z_next; returns how many samples run on.

        Wide: all three are (B, T, D), and z_next, which held the best iterates of the first `settled` samples that
        finished, then holds those of all that have. Else they are those of the samples at hand, and z_next closes up.
        z_next None: no step follows; what still runs ends. f and z are contiguous and share no memory with z_next.
        """
        following = 0 if z_next is None else z_next.data_ptr()
        left: int = self.handle.step(
            f.data_ptr(), z.data_ptr(), following, settled, z_next is None, torch.get_num_threads()
        )
        return left

    def outcome(self) -> tuple[list[Tensor], int]:
        """`Backend.tell` of all samples."""
        B, device = self.best.shape[0], self.best.device
        best = torch.empty(B, dtype=torch.float64, device=device)
        counts = [torch.empty(B, dtype=torch.int64, device=device) for _ in range(4)]
        failed: int = self.handle.tell(best.data_ptr(), *(x.data_ptr() for x in counts))
        return [best, *counts], failed

    def table(self) -> Tensor:
        """The records (B, len(SAMPLE)) float64 of all samples; `residual` and `previous` are the last ones taken."""
        table = torch.empty(self.best.shape[0], len(SAMPLE), dtype=torch.float64, device=self.best.device)
        self.handle.records(table.data_ptr())
        return table

    def buffer_like(self, x: Tensor) -> Tensor:
        return native.buffer_like(x)

    def copy_of(self, x: Tensor) -> Tensor:
        return on_the_host(x)
