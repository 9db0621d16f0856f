"""How many rows a call of the model has: a bound, halved where the device's memory does not suffice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..checks import count

CPU_ROWS = 256  # rows per model call on a CPU: enough to use it fully, few enough to stay in its caches
GPU_ENTRIES = 2**22  # entries of the states in one call elsewhere: 65,536 rows of 8×8, 256 of 4×64×64, 16 of 16×128×128

T = TypeVar("T")


@dataclass(frozen=True)
class FixedRows:
    """As rows_per_call: every call of the model has exactly so many rows, whatever is left to evaluate.

    A call of fewer is filled up with copies of its last row, whose answers are dropped and count no evaluations: a
    compiled network or a CUDA graph then meets one shape only. With a group, on every rank.

    Raises:
        TypeError, ValueError: `rows` is no integer of at least 1.
    """

    rows: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", count("rows", self.rows, least=1))


@dataclass(eq=False)
class Calls:
    """Divides rows between calls of the model.

    rows: the most of one call; FixedRows, exactly these; None is CPU_ROWS on a CPU and GPU_ENTRIES elsewhere.
    entries: of the state in one row. fitting: the most that has been found to fit, once memory did not suffice.
    """

    rows: int | FixedRows | None
    entries: int
    fitting: int | None = field(default=None, init=False)

    @property
    def fixed(self) -> int | None:
        """The rows that every call has, if it is a fixed number."""
        return self.rows.rows if isinstance(self.rows, FixedRows) else None

    def asked(self, device: torch.device, usual: int | None = None) -> int:
        """Rows of a call, at most, whatever fits; usual: what None stands for, where it is something else."""
        given = self.rows.rows if isinstance(self.rows, FixedRows) else self.rows
        return given or usual or (CPU_ROWS if device.type == "cpu" else max(1, GPU_ENTRIES // self.entries))

    def most(self, device: torch.device, usual: int | None = None) -> int:
        """Rows of a call, at most."""
        return min(self.asked(device, usual), self.fitting or 2**62)

    def each(
        self, n: int, device: torch.device, work: Callable[[slice], T], usual: int | None = None, retry: bool = True
    ) -> list[T]:
        """work(portion) for portions of n rows. Out of memory, a portion is halved, for good, and tried again.

        Raises:
            torch.OutOfMemoryError: for one row, for a fixed number of rows, or where `retry` is false.
        """
        done: list[T] = []
        at = 0
        while at < n:
            part = slice(at, min(at + self.most(device, usual), n))
            rows = part.stop - part.start
            try:
                done.append(work(part))
            except torch.OutOfMemoryError:
                if not retry or rows == 1 or self.fixed is not None:
                    raise
                self.fitting = rows // 2  # what failed is freed when this clause is left, then less is tried
            else:
                at = part.stop
        return done


def filled(rows: list[Tensor], size: int) -> list[Tensor]:
    """Tensors (n, …) with copies of their last row up to `size` rows."""
    n = len(rows[0])
    if n == size:
        return rows
    at = torch.arange(size, device=rows[0].device).clamp_(max=n - 1)
    return [part[at] for part in rows]


def check_rows(rows: Any) -> None:
    """Raises for what is no number of rows per call."""
    if rows is not None and not isinstance(rows, FixedRows):
        count("rows_per_call", rows, least=1)
