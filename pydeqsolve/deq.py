"""A deep equilibrium layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .gradient import Gradient
from .iterate import Solver
from .solution import Solution
from .solve import ANDERSON, IMPLICIT, STOP, solve
from .stop import Stop


class DEQ(nn.Module):
    """z* = cell(z*, x) as a layer (Bai, Kolter & Koltun 2019).

    cell: a module called as cell(z, x); z has the shape of z0, by default that of x. `forward(x, z0=None)` returns z*.
    The last `Solution`, detached, is at `layer.solution`, for inspection and as a warm start,
    `layer(x, layer.solution.z)`.
    """

    solution: Solution | None

    def __init__(
        self, cell: nn.Module, *, solver: Solver = ANDERSON, stop: Stop = STOP, gradient: Gradient | None = IMPLICIT
    ) -> None:
        super().__init__()
        self.cell = cell
        self.solver, self.stop, self.gradient = solver, stop, gradient
        self.solution = None

    def forward(self, x: Tensor, z0: Any = None) -> Any:
        """z* for input x (B, …); z0 is the first guess, zeros like x by default."""
        start = torch.zeros_like(x) if z0 is None else z0
        solution = solve(self.cell, start, (x,), solver=self.solver, stop=self.stop, gradient=self.gradient)
        z = solution.z
        solution.z = _detach(z)  # adjoint results still arrive here, through the graph of z
        self.solution = solution
        return z


def _detach(tree: Any) -> Any:
    from .structure import leaves_of, rebuild

    leaves = iter([leaf.detach() for leaf in leaves_of(tree, "z")])
    return rebuild(tree, lambda: next(leaves))
