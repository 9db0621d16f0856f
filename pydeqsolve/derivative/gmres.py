"""Restarted GMRES for u = g + A u, batched and matrix-free; the default adjoint solver."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..checks import keep_count
from ..shards import WHOLE, Whole
from ..solution import Adjoint, Status
from ..stop import Stop
from .arnoldi import Arnoldi
from .dense import Dense
from .krylov import Krylov
from .linear import Products, System, blurred, check_right_side
from .small import Rest, Small

DENSE = 4  # unknowns up to which a matrix takes no more products, and less memory, than a Krylov basis


@dataclass(frozen=True)
class GMRES:
    """Solves (I − A) u = g per sample, A given by its action (Saad & Schultz 1986).

    restart: Krylov vectors per cycle; the basis takes min(restart, N) words per entry of the state, N entries per
    sample, and grows as it is needed. Every cycle ends with the true residual g + A u − u, and the u of least true
    residual is returned. States of up to 4 entries are solved directly, from as many products as they have entries.
    """

    restart: int = 30

    def __post_init__(self) -> None:
        keep_count(self, "restart", least=1)

    def solve(self, A: Products, g: Tensor, stop: Stop) -> tuple[Tensor, Adjoint]:
        """u (B, N) with ‖g + A u − u‖ ≤ atol + rtol ‖g‖ per sample where it could be reached.

        A maps (B, N) to (B, N), row by row; g (B, N) float32 or float64. `stop.max_steps` counts calls of A. A residual
        is known to no less than the rounding eps ‖u‖ of its measurement, eps that of g's dtype: where that exceeds the
        goal, as with a singular I − A, the status is STALLED. A row for which A or g is not finite is NONFINITE.
        TypeError or ValueError says what else g is.
        """
        check_right_side(g)
        g = g.contiguous()
        if is_direct(self, g, stop):
            small = Small.of(A, g, stop)
            if small is not None:
                plain = (False, False, 0.0)
                return small.run(g.dtype, plain, _left(self, g, stop))[:2]
        else:
            arnoldi = Arnoldi.of(A, g, self.restart)
            if arnoldi is not None:
                arnoldi.run(stop)
                return arnoldi.deliver(g.dtype), arnoldi.outcome()[0]
        return in_pytorch(self, A, g, stop)


def is_direct(gmres: GMRES, g: Tensor, stop: Stop) -> bool:
    """Whether the systems for g (B, …) are solved from their matrices."""
    return g.shape[1:].numel() <= min(DENSE, gmres.restart, stop.max_steps - 1)


def in_pytorch(
    gmres: GMRES, A: Products, g: Tensor, stop: Stop, matrix: Tensor | None = None, shards: Whole = WHOLE
) -> tuple[Tensor, Adjoint]:
    """`GMRES.solve`, on any device. matrix (N, B, N): the columns of I − A, where they are known."""
    system, eps = System.of(A, g, stop, shards), torch.finfo(g.dtype).eps
    most = min(gmres.restart, shards.entries(g.shape[1]))
    direct = matrix is not None or (not shards.many and is_direct(gmres, g, stop))
    method = Dense(system, eps, matrix) if direct else Krylov(system, eps, most)
    least = 1 if matrix is not None else 2
    u, residual = torch.zeros_like(g), system.rhs
    best = shards.lengths(residual)
    evaluations = torch.zeros(g.shape[0], dtype=torch.int64, device=g.device)
    stalled, calls = torch.zeros_like(best, dtype=torch.bool), 0
    while True:
        active = (best > system.goal) & best.isfinite() & ~stalled
        if stop.max_steps - calls < least or not bool(active.any()):
            break
        candidate, residual, size, used = _corrected(system, method, u, residual, active, stop.max_steps - calls, eps)
        # A residual that is mostly the rounding of a huge u is hardly known: it has to be less by more than that.
        doubtful = eps * shards.lengths(candidate) > 0.5 * size
        enough = torch.where(doubtful, 0.5 * best, 0.999 * best)
        better = active & ((size < enough) | ((size < best) & (size <= system.goal)))
        stalled |= active & ~better
        u = torch.where(better[:, None], candidate, u)
        best = torch.where(better, size, torch.where(active & ~size.isfinite(), torch.inf, best))
        evaluations += torch.where(active, used, 0)
        calls += int(used.max())
    u, best, again = system.deliver(u, best, g.dtype)
    status = torch.where(stalled, int(Status.STALLED), int(Status.MAX_STEPS))
    status = torch.where(best <= system.goal, int(Status.CONVERGED), status)
    status = torch.where(best.isfinite(), status, int(Status.NONFINITE))
    return u, Adjoint(status, best / system.norm, evaluations + again)


@dataclass(frozen=True, eq=False)
class Known:
    """GMRES for systems whose matrices are known: the columns of I − A are matrix (N, B, N)."""

    gmres: GMRES
    matrix: Tensor

    def solve(self, A: Products, g: Tensor, stop: Stop) -> tuple[Tensor, Adjoint]:
        return in_pytorch(self.gmres, A, g, stop, self.matrix)


def rest(stop: Stop, g: Tensor, rows: Tensor | None = None) -> Stop:
    """What is left of a stop for the systems g (B, …) after a direct solve, for the samples `rows` (k,)."""
    spent = g[0].numel() + 1
    chosen = [
        t if rows is None or not isinstance(t, Tensor) else t.expand(len(g))[rows] for t in (stop.rtol, stop.atol)
    ]
    return replace(stop, rtol=chosen[0], atol=chosen[1], max_steps=max(0, stop.max_steps - spent))


def _left(gmres: GMRES, g: Tensor, stop: Stop) -> Rest:
    """The solve in PyTorch for the rows that `Small` leaves."""
    return lambda rows, matrix, A: Known(gmres, matrix).solve(A, g[rows], rest(stop, g, rows))


def _corrected(
    system: System, method: Dense | Krylov, u: Tensor, r: Tensor, active: Tensor, budget: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The next u (B, N) after u (B, N) of residual r (B, N), as `_measured`, and the products used, (B,) int64.

    Where I − A nearly loses a direction, a huge u has to gain by it what its rounding costs.
    """
    d, used = method.correction(r, active, budget - 1)
    found = _measured(system, u + d, eps)
    other = method.cautious(r)
    if other is None:
        return *found, used + 1
    careful = _measured(system, u + other, eps)
    gains = found[2] < 0.5 * careful[2]
    rows = gains[:, None]
    chosen = (torch.where(rows, found[0], careful[0]), torch.where(rows, found[1], careful[1]))
    return *chosen, torch.where(gains, found[2], careful[2]), used + 2


def _measured(system: System, u: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """u (B, N), its residual (B, N), and how large that is known to be, (B,)."""
    residual = system.residual(u)
    return u, residual, blurred(system.shards.lengths(residual), u, eps, system.shards)
