"""A deep equilibrium layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .derivative.gradient import Gradient
from .layout import detached
from .problem import Solver
from .solution import Solution
from .solve import ANDERSON, IMPLICIT, STOP, solve
from .stop import Stop


class DEQ(nn.Module):
    """z* = cell(z*, x) as a layer (Bai, Kolter & Koltun 2019).

    cell: a module called as cell(z, x); z has the shape of z0, by default that of x. `forward(x, z0=None)` returns z*.
    The last `Solution`, detached, is at `layer.solution`, for inspection and as a warm start,
    `layer(x, layer.solution)`.

    warm_start: without z0, start from the last solution if that is one tensor of the shape of x, as for frames of a
    video or a training set seen in the same order; `reset` forgets it. keep_history: the solver's history goes with it
    (`solve`), which takes memory and pays for long memories.
    """

    solution: Solution | None

    def __init__(
        self, cell: nn.Module, *, solver: Solver = ANDERSON, stop: Stop = STOP, gradient: Gradient | None = IMPLICIT,
        warm_start: bool = False, keep_history: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if not callable(cell):
            raise TypeError(f"cell must be a module called as cell(z, x), got {type(cell).__name__}")
        self.cell = cell
        self.solver, self.stop, self.gradient = solver, stop, gradient
        self.warm_start, self.keep_history = warm_start, keep_history
        self.solution = None

    def reset(self) -> None:
        """Forgets the last solution, so that the next call starts cold."""
        self.solution = None

    def forward(self, x: Tensor, z0: Any = None) -> Any:
        """z* for input x (B, …); z0 is the first guess or a `Solution`, zeros like x by default."""
        if z0 is None and self.warm_start:
            z0 = self._last(x)
        start = torch.zeros_like(x) if z0 is None else z0
        solution = solve(
            self.cell, start, (x,), solver=self.solver, stop=self.stop, gradient=self.gradient,
            keep_history=self.keep_history,
        )  # fmt: skip
        z = solution.z
        solution.z = detached(z)  # adjoint results still arrive here, through the graph of z
        self.solution = solution
        return z

    def _last(self, x: Tensor) -> Any:
        """The last solution where it fits x, with its history where that fits the solver."""
        last = self.solution
        z = None if last is None else last.z
        if not isinstance(z, Tensor) or (z.shape, z.dtype, z.device) != (x.shape, x.dtype, x.device):
            return None
        assert last is not None
        fits = last.history is None or last.history.method == self.solver.method()
        return last if fits else z
