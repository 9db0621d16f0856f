"""The truncated Neumann series for u = g + A u, batched and matrix-free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_count
from ..solution import Adjoint, Status
from ..stop import Stop, relative_goal


@dataclass(frozen=True)
class Neumann:
    """u = Σ_{j<k} Aʲ g, the first `terms` = k terms of (I − A)⁻¹ g; an adjoint solver of bounded cost.

    Its residual g + A u − u is Aᵏ g, so k products also tell how good it is. Converges as k grows when the spectral
    radius of A is below 1 (Lorraine, Vicol & Duvenaud 2020 use it for hypergradients). As for any adjoint solver,
    `Implicit` tells when the tolerance is missed; Stop(rtol=math.inf) says that the truncation is meant. Memory: three
    vectors, whatever k.
    """

    terms: int = 20

    def __post_init__(self) -> None:
        check_count("terms", self.terms, least=1)

    def solve(self, A: Callable[[Tensor], Tensor], g: Tensor, stop: Stop) -> tuple[Tensor, Adjoint]:
        """u (B, N) with ‖g + A u − u‖ ≤ atol + rtol ‖g‖ per sample if k terms suffice.

        A maps (B, N) to (B, N), row by row; g (B, N) float32 or float64. Calls A `terms` times, or `stop.max_steps`
        times if that is less.
        """
        scale, goal = relative_goal(g, stop)
        u, term = torch.zeros_like(g), g
        count = min(self.terms, stop.max_steps)
        for _ in range(count):
            u, term = u + term, A(term)
        residual = torch.linalg.vector_norm(term.double(), dim=1) / scale
        evaluations = torch.full((g.shape[0],), count, dtype=torch.int64, device=g.device)
        status = torch.where(residual <= goal, int(Status.CONVERGED), int(Status.MAX_STEPS))
        status = torch.where(residual.isfinite(), status, int(Status.NONFINITE))
        return u, Adjoint(status, residual, evaluations)
