"""The history of a solve: a ring of raw rows per sample, and the two passes of a step over it."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("anderson II", "anderson I", "broyden good", "broyden bad")  # csrc/step.h, Kind
COUPLINGS = ("joint", "independent", "causal")  # csrc/step.h, Coupling
STORAGES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # csrc/scalar.h, Storage
PAGE = 4096  # bytes


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
    line = 64 // dtype.itemsize
    stride = B * T * D
    if stride * dtype.itemsize >= PAGE:  # slots that start at one place of a page would share few places of a cache
        stride = (stride + line - 1) // line * line + 13 * line
    return torch.empty(M * stride, dtype=dtype, device=device).as_strided((B, M, T, D), (T * D, stride, D, 1))


class Ring:
    """Memory of B samples × T blocks × D features: memory + 1 rows of r and of f, and the Gram matrices.

    Takes 2 (memory + 1)·B·T·D words of the state's own dtype, whatever the number of steps. In 16 bits r is rounded
    once more, by half a unit of rounding of r, which is no more than what f and z have lost already: as if fn had been
    evaluated that far from z. Where ½ f ≤ z ≤ 2 f, as it is close to a fixed point, f − z takes no more bits than f,
    and nothing is rounded (Sterbenz 1974). Norms are of r as it is.
    """

    def __init__(self, method: Method, B: int, T: int, D: int, dtype: torch.dtype, device: torch.device) -> None:
        self.kind, self.coupling = method.kind, method.coupling
        self.damping, self.ridge = float(method.damping), float(method.ridge)
        self.slots = method.memory + 1
        self.head = 0
        self.eps = torch.finfo(dtype).eps
        self.dtype = dtype
        M = self.slots
        self.R, self.F = (_rows(B, M, T, D, dtype, device) for _ in range(2))
        self.gram = torch.zeros(B, T, M, M, dtype=torch.float64, device=device)
        self.steps_gram = torch.zeros_like(self.gram) if self.kind == "broyden good" else None
        self.rhs = torch.zeros(B, T, M, dtype=torch.float64, device=device)
        self.squares = torch.zeros(B, T, 2, dtype=torch.float64, device=device)  # r·r and f·f of the newest row
        self.count = torch.zeros(B, T, dtype=torch.int32, device=device)  # valid rows, the newest included

    @property
    def by_steps(self) -> bool:
        """The left vectors of the small system are iterate differences s (else residual differences y)."""
        return self.kind in ("anderson I", "broyden good")

    def tensors(self) -> dict[str, Tensor]:
        """All that it holds, by name."""
        return {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}

    def clone(self) -> Ring:
        """A ring with tensors of its own."""
        other = copy.copy(self)
        for name, x in self.tensors().items():
            setattr(other, name, x.clone())
        return other
