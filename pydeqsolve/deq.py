"""A deep equilibrium layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .arguments import check_cell, check_gradient, check_solver, check_stop
from .checks import check_flag
from .derivative.gradient import Gradient
from .derivative.lifted import is_transformed
from .derivative.transformed import outside
from .layout import copied
from .problem import Solver
from .solution import Solution, holding
from .solve import ANDERSON, IMPLICIT, STOP, refuse_pairs, solve
from .stop import Stop


class DEQ(nn.Module):
    """z* = cell(z*, *inputs) as a layer (Bai, Kolter & Koltun 2019).

    cell: a module (or function) called as cell(z, *inputs), kept as `layer.cell`; its value has the shape of z.
    `layer(*inputs, z0=None)` returns z*. The last `Solution`, detached and in memory of its own, is at
    `layer.solution`, for inspection and as a warm start, `layer(x, z0=layer.solution)`; None after a call in a vmap.

    warm_start: without z0, start from the last solution if that is one tensor of the shape of the first input, as for
    frames of a video or a training set seen in the same order; `reset` forgets it. keep_history: the solver's history
    goes with it (`solve`), which takes memory and pays for long memories. has_aux: the cell returns a pair (z, aux)
    (`solve`), and the layer (z*, aux at z*).

    Inside `torch.nn.utils.parametrize.cached()` parametrised tensors of the cell, such as normalised weights, are made
    once per call, with their graph, and not at every evaluation.

    Raises TypeError, and ValueError or NotImplementedError for options that do not go together, when it is made.
    """

    solution: Solution | None

    def __init__(
        self, cell: Callable[..., Any], *, solver: Solver = ANDERSON, stop: Stop = STOP,
        gradient: Gradient | None = IMPLICIT, warm_start: bool = False, keep_history: bool = False,
        has_aux: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        check_cell(cell)
        check_solver(solver)
        check_stop(stop)
        check_gradient(gradient)
        check_flag("warm_start", warm_start)
        check_flag("keep_history", keep_history)
        check_flag("has_aux", has_aux)
        refuse_pairs(solver, gradient, None, None, keep_history, (), empty=False)
        self.cell = cell
        self.solver, self.stop, self.gradient = solver, stop, gradient
        self.warm_start, self.keep_history, self.has_aux = warm_start, keep_history, has_aux
        self.solution = None

    def extra_repr(self) -> str:
        """Solver, tolerance and gradient, a line each, and what is switched on."""
        on = [f"{name}=True" for name in ("warm_start", "keep_history", "has_aux") if getattr(self, name)]
        return "\n".join([*(f"{name}={getattr(self, name)!r}" for name in ("solver", "stop", "gradient")), *on])

    def reset(self) -> None:
        """Forgets the last solution, so that the next call starts cold."""
        self.solution = None

    def forward(self, *inputs: Any, z0: Any = None, segments: Tensor | None = None, group: Any = None) -> Any:
        """z* for inputs (B, …) each; with `has_aux` a pair, z* and aux.

        z0, by name: the first guess in the structure of the state, or a `Solution`; by default zeros like the first
        input. segments, by name: which rows belong to which sample; group, by name: whose ranks hold shards of every
        sample's features (`solve`). Raises as `solve` does.
        """
        for i, x in enumerate(inputs):
            if isinstance(x, Solution):
                raise TypeError(f"inputs[{i}] must be a tensor, got a Solution: give a first guess by name, z0=")
        if getattr(parametrize, "_cache_enabled", 0):
            _make_parametrised(self.cell)
        start = self._start(inputs, segments) if z0 is None else z0
        solution = solve(
            self.cell, start, inputs, solver=self.solver, stop=self.stop, gradient=self.gradient,
            keep_history=self.keep_history, segments=segments, group=group, has_aux=self.has_aux,
        )  # fmt: skip
        if is_transformed():
            self.solution = outside(solution)
        else:
            aux = copied(solution.aux) if self.has_aux else None
            self.solution = holding(solution, copied(solution.z), aux)
        return (solution.z, solution.aux) if self.has_aux else solution.z

    def _start(self, inputs: tuple[Any, ...], segments: Tensor | None) -> Any:
        """The first guess where none is given: the last solution where it fits, else zeros like the first input."""
        if not inputs:
            raise TypeError("z0 must be given where there are no inputs: layer(z0=…)")
        x = inputs[0]
        if not isinstance(x, Tensor):
            if x is not None and not isinstance(x, (tuple, list, dict)):
                raise TypeError(f"inputs[0] must be a tensor, got {type(x).__name__}")
            raise TypeError(
                f"z0 must be given where inputs[0] is not a tensor, got {type(x).__name__}: layer(*inputs, z0=…)"
            )
        if not x.is_floating_point() and not x.is_complex():
            raise TypeError(f"z0 must be given where inputs[0] is not a state, got {x.dtype}: layer(x, z0=…)")
        last = self._last(x, segments) if self.warm_start else None
        return torch.zeros_like(x) if last is None else last

    def _last(self, x: Tensor, segments: Any) -> Any:
        """The last solution where it fits x, with its history where that fits the solver and the segments."""
        last = self.solution
        z = None if last is None else last.z
        if not isinstance(z, Tensor) or (z.shape, z.dtype, z.device) != (x.shape, x.dtype, x.device):
            return None
        assert last is not None
        history = last.history
        if history is None or not (segments is None or isinstance(segments, Tensor)):
            return z  # segments of another kind are for `solve` to name
        return last if history.method == self.solver.method() and history.is_of(segments) else z


def _make_parametrised(cell: Any) -> None:
    """Makes the parametrised tensors of a cell, in `parametrize.cached()`, before a solve does so without a graph."""
    for module in cell.modules() if isinstance(cell, nn.Module) else ():
        if parametrize.is_parametrized(module):
            for name, _ in module.get_submodule("parametrizations").named_children():
                getattr(module, name)
