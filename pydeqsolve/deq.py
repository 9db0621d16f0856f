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
from .structure import detached


class DEQ(nn.Module):
    """z* = cell(z*, x) as a layer (Bai, Kolter & Koltun 2019).

    cell: a module called as cell(z, x); z has the shape of z0, by default that of x. `forward(x, z0=None)` returns z*.
    The last `Solution`, detached, is at `layer.solution`, for inspection and as a warm start,
    `layer(x, layer.solution)`.

    warm_start: without z0, start from the last solution if it is of the shape of x, as for frames of a video or steps
    of a training set seen in the same order; `reset` forgets it. keep_history: the solver's history goes with it
    (`solve`), which takes memory and pays for long memories.
    """

    solution: Solution | None

    def __init__(
        self, cell: nn.Module, *, solver: Solver = ANDERSON, stop: Stop = STOP, gradient: Gradient | None = IMPLICIT,
        warm_start: bool = False, keep_history: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.cell = cell
        self.solver, self.stop, self.gradient = solver, stop, gradient
        self.warm_start, self.keep_history = warm_start, keep_history
        self.solution = None

    def reset(self) -> None:
        """Forgets the last solution, so that the next call starts cold."""
        self.solution = None

    def forward(self, x: Tensor, z0: Any = None) -> Any:
        """z* for input x (B, …); z0 is the first guess or a `Solution`, zeros like x by default."""
        last = self.solution.z if self.warm_start and self.solution is not None else None
        if (
            z0 is None
            and isinstance(last, Tensor)
            and (last.shape, last.dtype, last.device) == (x.shape, x.dtype, x.device)
        ):
            z0 = self.solution
        start = torch.zeros_like(x) if z0 is None else z0
        solution = solve(
            self.cell, start, (x,), solver=self.solver, stop=self.stop, gradient=self.gradient,
            keep_history=self.keep_history,
        )  # fmt: skip
        z = solution.z
        solution.z = detached(z)  # adjoint results still arrive here, through the graph of z
        self.solution = solution
        return z
