"""Small systems solved directly, from their matrices."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .linear import System, lengths

ROWS = 1 << 12  # matrices in float64 at a time


class Dense:
    """Corrections d = (I − A)⁻¹ r; A is found from N products."""

    def __init__(self, system: System, eps: float, matrix: Tensor | None = None) -> None:
        self.system, self.eps = system, eps
        self.matrix = matrix  # (N, B, N): the columns of I − A
        self.d = self.weak = torch.empty(0)  # the last correction; (B,) bool: where I − A nearly loses a direction

    def correction(self, r: Tensor, active: Tensor, budget: int) -> tuple[Tensor, Tensor]:
        """d (B, N) for the residual r (B, N) of the rows `active` (B,), and the products each has used, (B,) int64.

        A row's d is NaN when a product is not finite. budget: not less than N at the first call.
        """
        used = torch.zeros(len(r), dtype=torch.int64, device=r.device)
        if self.matrix is None:
            self.matrix = self._found(r)
            used += r.shape[1]
        d = torch.empty_like(r)
        for rows, M, finite in self._parts():
            solved = torch.linalg.solve_ex(M, r[rows].double())[0]
            solved = torch.where(solved.isfinite(), solved, torch.finfo(r.dtype).max)
            d[rows] = torch.where(finite[:, None], solved, torch.nan).to(r.dtype)
        self.weak = active & (lengths(d) > lengths(r) / self.eps**0.5)
        self.d = d
        return d, used

    def cautious(self, r: Tensor) -> Tensor | None:
        """d (B, N) of least squares, without the directions that I − A nearly loses; None when it loses none."""
        if not bool(self.weak.any()):
            return None
        d = self.d.clone()
        for rows, M, finite in self._parts():
            which = (self.weak[rows] & finite).nonzero()[:, 0]
            if len(which):
                inverse = torch.linalg.pinv(M[which], rtol=self.eps**0.5)
                d[rows.start + which] = (inverse @ r[rows][which].double()[..., None])[..., 0].to(r.dtype)
        return d

    def _found(self, r: Tensor) -> Tensor:
        unit = torch.eye(r.shape[1], dtype=r.dtype, device=r.device)
        columns = r.new_empty(r.shape[1], *r.shape)
        for j, e in enumerate(unit):
            columns[j] = e - self.system.A(e.expand(r.shape).contiguous())
        return columns

    def _parts(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Rows, their matrices (n, N, N) in float64 with the identity for those not finite, and which are, (n,)."""
        assert self.matrix is not None
        N, B, _ = self.matrix.shape
        identity = torch.eye(N, dtype=torch.float64, device=self.matrix.device)
        for at in range(0, B, ROWS):
            rows = slice(at, at + ROWS)
            M = self.matrix[:, rows].permute(1, 2, 0).double()
            finite = M.isfinite().flatten(1).all(1)
            yield rows, torch.where(finite[:, None, None], M, identity), finite
