"""Restarted GMRES for u = g + A u, batched and matrix-free; the default adjoint solver."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_count
from ..solution import Adjoint, Status
from ..stop import Stop, relative_goal


@dataclass(frozen=True)
class GMRES:
    """Solves (I − A) u = g per sample, A given by its action (Saad & Schultz 1986).

    restart: Krylov vectors per cycle; the basis takes restart + 1 words per entry of the state. Every cycle ends with
    the true residual g + A u − u, and the u of least true residual is returned.
    """

    restart: int = 30

    def __post_init__(self) -> None:
        check_count("restart", self.restart, least=1)

    def solve(self, A: Callable[[Tensor], Tensor], g: Tensor, stop: Stop) -> tuple[Tensor, Adjoint]:
        """u (B, N) with ‖g + A u − u‖ ≤ atol + rtol ‖g‖ per sample where it could be reached.

        A maps (B, N) to (B, N), row by row; g (B, N) float32 or float64. `stop.max_steps` counts calls of A.
        """
        norm, goal = relative_goal(g, stop)
        scale = norm.to(g.dtype)
        rhs = g / scale[:, None]
        u = torch.zeros_like(rhs)
        best = torch.linalg.vector_norm(rhs.double(), dim=1)
        residual = rhs
        evaluations = torch.zeros(g.shape[0], dtype=torch.int64, device=g.device)
        calls = 0
        stalled = torch.zeros_like(best, dtype=torch.bool)
        while True:
            active = (best > goal) & best.isfinite() & ~stalled
            budget = min(self.restart, stop.max_steps - calls - 1)
            if budget < 1 or not bool(active.any()):
                break
            step, used = _cycle(A, residual, active, goal, budget)
            candidate = u + step
            residual = rhs + A(candidate) - candidate
            size = torch.linalg.vector_norm(residual.double(), dim=1)
            better = active & (size < best)
            stalled |= active & ~(size < 0.999 * best)
            u = torch.where(better[:, None], candidate, u)
            best = torch.where(better, size, best)
            evaluations += torch.where(active, used + 1, 0)
            calls += int(used.max()) + 1
        status = torch.where(stalled, int(Status.STALLED), int(Status.MAX_STEPS))
        status = torch.where(best <= goal, int(Status.CONVERGED), status)
        status = torch.where(best.isfinite(), status, int(Status.NONFINITE))
        return u * scale[:, None], Adjoint(status, best, evaluations)


def _cycle(A: Callable[[Tensor], Tensor], r: Tensor, active: Tensor, goal: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """One Arnoldi cycle from residual r (B, N): the correction (B, N) and the columns used (B,)."""
    B, N = r.shape
    beta = torch.linalg.vector_norm(r.double(), dim=1)
    Q = torch.zeros(B, most + 1, N, dtype=r.dtype, device=r.device)
    Q[:, 0] = torch.where(active[:, None], r / torch.where(active, beta, 1.0).to(r.dtype)[:, None], 0.0)
    H = torch.zeros(B, most + 1, most, dtype=torch.float64, device=r.device)  # triangular after the rotations
    cosine = torch.ones(B, most, dtype=torch.float64, device=r.device)
    sine = torch.zeros_like(cosine)
    y = torch.zeros(B, most + 1, dtype=torch.float64, device=r.device)
    y[:, 0] = torch.where(active, beta, 0.0)
    used = torch.zeros(B, dtype=torch.int64, device=r.device)
    going = active.clone()
    for k in range(most):
        w = Q[:, k] - A(Q[:, k])
        column = torch.zeros(B, most + 1, dtype=torch.float64, device=r.device)
        for _ in range(2):  # twice is enough to keep the basis orthogonal to rounding
            h = torch.einsum("bkn,bn->bk", Q[:, : k + 1], w)
            w = w - torch.einsum("bk,bkn->bn", h, Q[:, : k + 1])
            column[:, : k + 1] += h.double()
        length = torch.linalg.vector_norm(w.double(), dim=1)
        going = going & length.isfinite() & column.isfinite().all(1)
        column[:, k + 1] = length
        for i in range(k):
            top, low = column[:, i].clone(), column[:, i + 1].clone()
            column[:, i] = cosine[:, i] * top + sine[:, i] * low
            column[:, i + 1] = cosine[:, i] * low - sine[:, i] * top
        radius = torch.hypot(column[:, k], column[:, k + 1])
        going = going & (radius > 0)
        safe = torch.where(going, radius, 1.0)
        cosine[:, k] = torch.where(going, column[:, k] / safe, 1.0)
        sine[:, k] = torch.where(going, column[:, k + 1] / safe, 0.0)
        column[:, k], column[:, k + 1] = radius, 0.0
        H[:, :, k] = torch.where(going[:, None], column, 0.0)
        H[:, k, k] = torch.where(going, radius, 1.0)
        y[:, k + 1] = torch.where(going, -sine[:, k] * y[:, k], 0.0)
        y[:, k] = torch.where(going, cosine[:, k] * y[:, k], 0.0)
        used = used + going
        # A column that leaves nothing (a happy breakdown) ends the cycle with the exact answer.
        going = going & (y[:, k + 1].abs() > 0.5 * goal) & (length > 0)
        Q[:, k + 1] = torch.where(going[:, None], w / torch.where(going, length, 1.0).to(w.dtype)[:, None], 0.0)
        if not bool(going.any()):
            break
    k = int(used.max())
    triangle = H[:, :k, :k].triu()
    diagonal = triangle.diagonal(dim1=1, dim2=2)
    triangle = triangle + torch.diag_embed((diagonal == 0).double())
    inside = torch.arange(k, device=r.device) < used[:, None]
    coefficients = torch.linalg.solve_triangular(triangle, torch.where(inside, y[:, :k], 0.0)[..., None], upper=True)[
        ..., 0
    ]
    return torch.einsum("bk,bkn->bn", coefficients.to(r.dtype), Q[:, :k]), used
