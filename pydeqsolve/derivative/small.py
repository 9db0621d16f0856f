"""Systems of a few unknowns by native passes, on the host: from their matrices, with little memory beside these.

Two words per entry and one per unknown: for a million states of three entries the graph of fn takes about as much.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..solution import Adjoint
from ..step import systems
from ..stop import Stop
from .linear import Products

# Solves for the rows (k,) that elimination has not solved, of matrices (N, k, N), by products u ↦ A u of these alone.
Rest = Callable[[Tensor, Tensor, Products], tuple[Tensor, Adjoint]]


@dataclass(frozen=True, eq=False)
class Small:
    """One solve of u = g + A u for g (B, …) of few entries each."""

    handle: Any
    products: Products
    g: Tensor  # float32 or float64, contiguous
    keep: tuple[Tensor, ...]  # what the handle has addresses of

    @staticmethod
    def of(products: Products, g: Tensor, stop: Stop, mask: Tensor | None = None, eps: float = 0.0) -> Small | None:
        """Of the samples where mask (B,) is true, to atol + rtol ‖g‖ or eps ‖g‖ at least; None without kernels."""
        rtol, atol = (_tolerance(t, g) for t in (stop.rtol, stop.atol))
        handle = systems.small(g, mask, rtol, atol, eps)
        keep = tuple(x for x in (g, mask, rtol, atol) if isinstance(x, Tensor))
        return None if handle is None else Small(handle, products, g, keep)

    def run(self, dtype: torch.dtype, judged: tuple[bool, bool, float], rest: Rest) -> tuple[Tensor, Adjoint, int]:
        """u (B, …) in `dtype`, how it went, and the samples asked for that failed.

        judged: as `Arnoldi.outcome`.
        """
        u, N = torch.zeros_like(self.g), self.g[0].numel()
        unmet = torch.zeros(len(u), dtype=torch.bool, device=u.device)
        product, calls, rows, matrix = u, 0, None, None
        if self.handle.active():
            matrix = self._matrix(u)
            self.handle.solve(matrix.data_ptr(), u.data_ptr(), unmet.data_ptr())
            product, calls = self._product(u), N + 1
            missed = self.handle.measure(u.data_ptr(), product.data_ptr(), unmet.data_ptr())
            if dtype != u.dtype:
                out, product = self._rounded(u, dtype, unmet)
                missed, calls = int(unmet.sum()), N + 2
            rows = unmet.nonzero()[:, 0] if missed else None
            matrix = None if rows is None else matrix[rows].permute(2, 0, 1)
        outcome, failed = self._outcome(u, product, unmet, judged, calls)
        if dtype == u.dtype or not calls:
            self.handle.raise_(u.data_ptr())
            out = u.to(dtype)
        if rows is not None:
            assert matrix is not None
            failed += self._take(out, outcome, rows, calls, *rest(rows, matrix, self._on(rows)))
        return out, outcome, failed

    def _matrix(self, unit: Tensor) -> Tensor:
        """I − A (B, N, N) of all samples, by a product for each column; writes to `unit` (B, …)."""
        N = unit[0].numel()
        matrix = unit.new_empty(len(unit), N, N)
        for j in range(N):
            unit.zero_().view(-1, N)[:, j] = 1
            product = self._product(unit)
            self.handle.column(j, product.data_ptr(), matrix.data_ptr())
            del product  # before the next one is made
        return matrix

    def _rounded(self, u: Tensor, dtype: torch.dtype, unmet: Tensor) -> tuple[Tensor, Tensor]:
        """The answer in `dtype`; u is made what that stands for, and its product returned too."""
        self.handle.raise_(u.data_ptr())
        out = u.to(dtype)
        u.copy_(out)
        self.handle.lower(u.data_ptr(), unmet.data_ptr())
        return out, self._product(u)

    def _outcome(
        self, u: Tensor, product: Tensor, unmet: Tensor, judged: tuple[bool, bool, float], calls: int
    ) -> tuple[Adjoint, int]:
        status = torch.empty(len(u), dtype=torch.int64, device=u.device)
        residual, evaluations = torch.empty_like(status, dtype=torch.float64), torch.empty_like(status)
        failed = self.handle.judge(
            u.data_ptr(), product.data_ptr(), unmet.data_ptr(), *judged, calls, status.data_ptr(), residual.data_ptr(),
            evaluations.data_ptr(),
        )  # fmt: skip
        return Adjoint(status, residual, evaluations), failed

    def _on(self, rows: Tensor) -> Products:
        """Products of the samples `rows` (k,) alone, the others zero."""

        def products(u: Tensor) -> Tensor:
            full = torch.zeros_like(self.g)
            full[rows] = u.reshape(-1, *self.g.shape[1:]).to(full.dtype)
            return self._product(full)[rows].reshape(u.shape)

        return products

    def _take(self, out: Tensor, outcome: Adjoint, rows: Tensor, calls: int, u: Tensor, own: Adjoint) -> int:
        out[rows] = u.reshape(out[rows].shape).to(out.dtype)
        outcome.status[rows], outcome.residual[rows] = own.status, own.residual
        outcome.evaluations[rows] = own.evaluations + calls
        return int((own.status != 0).sum())

    def _product(self, u: Tensor) -> Tensor:
        product = self.products(u)
        if product.shape != self.g.shape:
            raise ValueError(f"A must return {tuple(self.g.shape)} like g, got {tuple(product.shape)}")
        return product.to(self.g.dtype).contiguous().resolve_neg()


def _tolerance(value: float | Tensor, g: Tensor) -> float | Tensor:
    if not isinstance(value, Tensor):
        return float(value)
    return value.to(g.device, torch.float64).expand(len(g)).contiguous()
