"""The truncated Neumann series for u = g + A u, batched and matrix-free."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import keep_count
from ..shards import WHOLE, Whole
from ..solution import Adjoint, Status
from ..stop import Stop
from .linear import Products, System, blurred, check_right_side


@dataclass(frozen=True)
class Neumann:
    """u = Σ_{j<k} Aʲ g, the first `terms` = k terms of (I − A)⁻¹ g; an adjoint solver of bounded cost.

    k − 1 products make it and one more measures its residual g + A u − u, which is Aᵏ g. Converges as k grows when the
    spectral radius of A is below 1 (Lorraine, Vicol & Duvenaud 2020 use it for hypergradients). As for any adjoint
    solver, `Implicit` tells when the tolerance is missed; Stop(rtol=math.inf) says that the truncation is meant.
    Memory: three vectors, whatever k.
    """

    terms: int = 20

    def __post_init__(self) -> None:
        keep_count(self, "terms", least=1)

    def solve(self, A: Products, g: Tensor, stop: Stop) -> tuple[Tensor, Adjoint]:
        """u (B, N) with ‖g + A u − u‖ ≤ atol + rtol ‖g‖ per sample if k terms suffice.

        A maps (B, N) to (B, N), row by row; g (B, N) float32 or float64. Calls A `terms` times, or `stop.max_steps`
        times if that is less. TypeError or ValueError says what else g is.
        """
        check_right_side(g)
        return series(self, A, g, stop)


def series(neumann: Neumann, A: Products, g: Tensor, stop: Stop, shards: Whole = WHOLE) -> tuple[Tensor, Adjoint]:
    """`Neumann.solve`, of rows that may be held in shards."""
    system = System.of(A, g, stop, shards)
    count = min(neumann.terms, stop.max_steps)
    u = term = system.rhs if count else torch.zeros_like(g)
    for _ in range(count - 1):
        term = A(term)
        u = u + term
    left = system.residual(u) if count else system.rhs
    size = blurred(shards.lengths(left), u, torch.finfo(g.dtype).eps, shards)
    u, size, again = system.deliver(u, size, g.dtype)
    evaluations = torch.full((g.shape[0],), count, dtype=torch.int64, device=g.device) + again
    status = torch.where(size <= system.goal, int(Status.CONVERGED), int(Status.MAX_STEPS))
    status = torch.where(size.isfinite(), status, int(Status.NONFINITE))
    return u, Adjoint(status, size / system.norm, evaluations)
