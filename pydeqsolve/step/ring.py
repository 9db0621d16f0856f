"""The history of a solve: a ring of raw rows per sample, and the two passes of a step over it."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..memory import spaced
from . import native

KINDS = ("anderson II", "anderson I", "broyden good", "broyden bad")  # csrc/step.h, Kind
COUPLINGS = ("joint", "independent", "causal")  # csrc/step.h, Coupling
STORAGES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # csrc/scalar.h, Storage
SMALL = ("gram", "steps_gram", "rhs", "squares", "count")  # of a ring, a few numbers per sample each


@dataclass(frozen=True)
class Method:
    """What distinguishes the solvers that share the ring: memory (differences kept), kind, coupling, β and ridge."""

    kind: str = "anderson II"
    memory: int = 0
    damping: float = 1.0
    ridge: float = 0.0
    coupling: str = "joint"


def _rows(B: int, M: int, T: int, D: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for rows (B, M, T, D), slot by slot: a step reads each slot's from the first sample to the last."""
    stride = spaced(B * T * D, dtype.itemsize)
    rows = torch.empty_strided((B, M, T, D), (T * D, stride, D, 1), dtype=dtype, device=device)
    return native.on_large_pages(rows)


def addresses(tensors: Iterable[Tensor | None]) -> tuple[int, ...]:
    """The address of each; 0 for None."""
    return tuple(0 if x is None else x.data_ptr() for x in tensors)


class Ring:
    """Memory of B samples × T blocks × D features: memory + 1 rows of r and of f, and the Gram matrices.

    Takes 2 (memory + 1)·B·T·D words of the state's own dtype, whatever the number of steps. In 16 bits r is rounded
    once more, by half a unit of rounding of r, which is no more than what f and z have lost already: as if fn had been
    evaluated that far from z. Where ½ f ≤ z ≤ 2 f, as it is close to a fixed point, f − z takes no more bits than f,
    and nothing is rounded (Sterbenz 1974). Norms are of r as it is.
    """

    R: Tensor  # (B, M, T, D)
    F: Tensor  # (B, M, T, D)
    gram: Tensor  # (B, T, M, M) float64
    rhs: Tensor  # (B, T, M) float64
    squares: Tensor  # (B, T, 2) float64, r·r and f·f of the newest row
    steps_gram: Tensor | None  # (B, T, M, M) float64
    count: Tensor  # (B, T) int32, valid rows, the newest included

    def __init__(self, method: Method, B: int, T: int, D: int, dtype: torch.dtype, device: torch.device) -> None:
        self.kind, self.coupling = method.kind, method.coupling
        self.damping, self.ridge = float(method.damping), float(method.ridge)
        self.slots = M = method.memory + 1
        self.head = 0
        self.eps = torch.finfo(dtype).eps
        self.dtype = dtype
        self.R, self.F = _rows(B, M, T, D, dtype, device), _rows(B, M, T, D, dtype, device)
        # One piece of memory, of which small tensors are made where one is asked for: the native passes ask for none.
        matrices, of_count = B * T * M * M, (B * T + 1) // 2
        steps = matrices if self.kind == "broyden good" else 0
        self._sizes = (matrices, steps, B * T * M, B * T * 2, of_count)
        doubles = matrices + steps + B * T * (M + 2) + of_count
        self._small: Tensor | None = native.zeros(doubles, device)

    def __getattr__(self, name: str) -> Tensor | None:
        if name not in SMALL or self._small is None:
            raise AttributeError(f"Ring has no attribute {name!r}")
        B, M, T, _ = self.R.shape
        gram, steps, rhs, squares, count = self._small.split(self._sizes)
        self.gram, self.rhs, self.squares = gram.view(B, T, M, M), rhs.view(B, T, M), squares.view(B, T, 2)
        self.steps_gram = steps.view(B, T, M, M) if self.kind == "broyden good" else None
        self.count = count.view(torch.int32)[: B * T].view(B, T)
        self._small = None
        return vars(self)[name]

    @property
    def places(self) -> tuple[int, ...]:
        """The addresses of gram, steps_gram, rhs, squares and count; 0 for one that there is not."""
        if self._small is None:
            return addresses(map(vars(self).get, SMALL))
        matrices, steps, rhs, squares, _ = self._sizes
        first = self._small.data_ptr()
        after = first + 8 * (matrices + steps)
        of_steps = first + 8 * matrices if steps else 0
        return first, of_steps, after, after + 8 * rhs, after + 8 * (rhs + squares)

    @property
    def by_steps(self) -> bool:
        """The left vectors of the small system are iterate differences s (else residual differences y)."""
        return self.kind in ("anderson I", "broyden good")

    def clear(self) -> None:
        """Forgets all rows."""
        self.head = 0
        (self.count if self._small is None else self._small).zero_()

    def tensors(self) -> dict[str, Tensor]:
        """All that it holds, by name."""
        return {name: x for name in ("R", "F", *SMALL) if (x := getattr(self, name)) is not None}

    def clone(self) -> Ring:
        """A ring with tensors of its own."""
        other = copy.copy(self)
        for name, x in self.tensors().items():
            setattr(other, name, x.clone())
        return other
