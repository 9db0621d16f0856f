"""The adjoint systems u = g + A u scaled by native passes, as `linear.System` says it in PyTorch, on the host."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..layout import Layout
from ..loop.iterate import iterate
from ..memory import address
from ..problem import Problem, Solver
from ..solution import Adjoint
from ..step import systems
from ..stop import Stop
from .linear import Products
from .neumann import Neumann


class Scaled:
    """Systems for g (B, …), by products u ↦ A u of the shape of g; u is scaled until `delivered`."""

    def __init__(self, handle: Any, products: Products, g: Tensor) -> None:
        self.handle, self.products, self.g = handle, products, g
        self.threads = torch.get_num_threads()

    def begin(self, stop: Stop, mask: Tensor | None, eps: float, first: Tensor) -> int:
        """To atol + rtol ‖g‖ per sample, but to no less than eps ‖g‖; not where mask (B,) is false.

        Writes g, normalised, to first (B, …). Returns how many samples are to be solved.
        """
        rtol, atol = (self._tolerance(t) for t in (stop.rtol, stop.atol))
        active: int = self.handle.begin(
            0 if mask is None else address(mask), rtol[0], atol[0], *(0 if t[1] is None else t[1].data_ptr()
            for t in (rtol, atol)), eps, first.data_ptr(), self.threads,
        )  # fmt: skip
        return active

    def delivered(self, u: Tensor, dtype: torch.dtype) -> Tensor:
        """u (B, …) of the unscaled system in `dtype`, in place if it is that of u.

        Its residual is measured again where that changes it.
        """
        changed = self.handle.raise_(u.data_ptr(), self.threads)
        out = u.to(dtype)
        if changed or out is not u:
            back = out.to(u.dtype, copy=True)
            if self.handle.lower(back.data_ptr(), u.data_ptr(), self.threads):
                product = self.product(back)
                self.handle.remeasure(back.data_ptr(), product.data_ptr(), self.threads)
        return out

    def outcome(self, adjoint: bool = False, follows: bool = False, eps: float = 0.0) -> tuple[Adjoint, int]:
        """How the solve went, and the samples asked for that failed; adjoint: judged as `AdjointSolve` does."""
        status = torch.empty(len(self.g), dtype=torch.int64, device=self.g.device)
        residual, evaluations = torch.empty_like(status, dtype=torch.float64), torch.empty_like(status)
        failed = self.handle.judge(
            adjoint, follows, eps, status.data_ptr(), residual.data_ptr(), evaluations.data_ptr()
        )
        return Adjoint(status, residual, evaluations), failed

    def product(self, u: Tensor) -> Tensor:
        """A u, where the passes can read it."""
        product = self.products(u)
        if product.dtype is not self.g.dtype or not product.is_contiguous() or product.is_neg():
            product = product.to(self.g.dtype).contiguous().resolve_neg()
        if product.shape != self.g.shape:
            raise ValueError(f"A must return {tuple(self.g.shape)} like g, got {tuple(product.shape)}")
        return product

    def _tolerance(self, value: float | Tensor) -> tuple[float, Tensor | None]:
        if not isinstance(value, Tensor):
            return float(value), None
        return 0.0, value.to(self.g.device, torch.float64).expand(len(self.g)).contiguous()


class ByOther(Scaled):
    """One solve by another method than GMRES, which is handed the scaled system and says how it went."""

    @staticmethod
    def of(products: Products, g: Tensor) -> ByOther | None:
        """The solve for g (B, …), float32 or float64, contiguous; None where there are no kernels for it."""
        handle = systems.krylov(g, 1) if g.is_cpu else None
        return None if handle is None else ByOther(handle, products, g)

    def run(self, solver: Neumann | Solver, stop: Stop, mask: Tensor | None, eps: float) -> Tensor:
        """u (B, …), by at least one product; tolerances as in `begin`."""
        rhs, pursued = torch.empty_like(self.g), torch.empty(len(self.g), dtype=torch.float64)
        self.begin(stop, mask, eps, rhs)
        self.handle.scale(rhs.data_ptr(), pursued.data_ptr(), self.threads)
        if isinstance(solver, Neumann):
            return self._series(rhs, min(solver.terms, stop.max_steps))
        return self._iterated(solver, rhs, replace(stop, rtol=0.0, atol=pursued, norm="l2"), eps)

    def _series(self, rhs: Tensor, count: int) -> Tensor:
        """The first `count` terms, of which one more product measures the residual."""
        u, term = rhs, rhs
        for k in range(1, count):
            term = self.product(term)
            u = u + term if k == 1 else u.add_(term)
        product = self.product(u)
        self.handle.settle(u.data_ptr(), product.data_ptr(), count, 0, 0, 0, self.threads)
        return u

    def _iterated(self, solver: Solver, rhs: Tensor, stop: Stop, eps: float) -> Tensor:
        """The fixed point of u ↦ rhs + A u by a forward solver."""
        products = self.products
        layout = Layout.of(rhs, by_blocks=False)
        problem = Problem(
            lambda u: products(u) + rhs, (), layout, compact=False, eps=max(eps, torch.finfo(rhs.dtype).eps)
        )
        found = iterate(problem, rhs.flatten(1)[:, None], solver=solver, stop=stop)
        u = found.z
        self.handle.settle(
            u.data_ptr(), 0, 0, found.residual.data_ptr(), found.evaluations.data_ptr(), found.status.data_ptr(),
            self.threads,
        )  # fmt: skip
        return u.view(rhs.shape)
