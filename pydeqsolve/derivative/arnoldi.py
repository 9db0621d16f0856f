"""Restarted GMRES by native passes: `gmres` says the same in PyTorch, for devices without kernels.

A product is followed by one pass over the vectors: dot products with the basis and their subtraction, twice, the next
vector, and a column of every sample's Hessenberg system. Samples that have ended take no part in it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..memory import address, spaced
from ..solution import Adjoint
from ..step import systems
from ..stop import Stop
from .linear import Products
from .narrowed import Narrowing

TOGETHER = 8  # vectors in one piece of memory


class Vectors:
    """Memory for at most `most` vectors like g, which grows with them and is never copied."""

    def __init__(self, g: Tensor, most: int) -> None:
        self.g, self.most = g, most
        self.made: list[Tensor] = []

    def __getitem__(self, k: int) -> Tensor:
        """Vector k, of the shape of g."""
        if k == len(self.made):
            g, count = self.g, min(TOGETHER, self.most - k)
            strides = (spaced(g.numel(), g.itemsize), *g.stride())
            memory = torch.empty_strided((count, *g.shape), strides, dtype=g.dtype, device=g.device)
            self.made += memory.unbind(0)
        return self.made[k]


class Arnoldi:
    """One solve of u = g + A u for g (B, …), by products u ↦ A u of the shape of g; u is scaled until `deliver`."""

    def __init__(self, handle: Any, products: Products, g: Tensor, most: int) -> None:
        self.handle, self.g, self.most = handle, g, most
        self.products = Narrowing(products, g)
        self.vectors = Vectors(g, self.most)
        self.u: Tensor | None = None  # None: zero
        self.threads = torch.get_num_threads()

    @staticmethod
    def of(products: Products, g: Tensor, restart: int) -> Arnoldi | None:
        """The solve for g (B, …), float32 or float64, contiguous; None where there are no kernels for it."""
        most = min(restart, g.shape[1:].numel()) if g.shape[0] else 1
        handle = systems.krylov(g, most)
        return None if handle is None else Arnoldi(handle, products, g, most)

    def run(self, stop: Stop, mask: Tensor | None = None, eps: float = 0.0) -> None:
        """Solves to atol + rtol ‖g‖ per sample, but to no less than eps ‖g‖; not where mask (B,) is false."""
        rtol, atol = (self._tolerance(t) for t in (stop.rtol, stop.atol))
        active, calls = self.handle.begin(
            0 if mask is None else address(mask), rtol[0], atol[0], *(0 if t[1] is None else t[1].data_ptr()
            for t in (rtol, atol)), eps, self.vectors[0].data_ptr(), self.threads,
        ), 0  # fmt: skip
        while active and stop.max_steps - calls >= 2:
            candidate = torch.empty_like(self.g)
            calls += self._cycle(candidate, min(self.most, stop.max_steps - calls - 1))
            active, used = self._accept(candidate)
            calls += used

    def _cycle(self, candidate: Tensor, most: int) -> int:
        """Takes in at most that many products; candidate (B, …) may be written to. Returns their number."""
        vector = self.vectors[0]
        for k in range(most):
            last = k + 1 == most
            following = candidate if last else self.vectors[k + 1]
            product = self._product(vector)
            going = self.handle.append(product.data_ptr(), following.data_ptr(), self.threads)
            if not going:
                return k + 1
            if not last:
                self.products.tell(going, following)
            vector = following
        return most

    def _accept(self, candidate: Tensor) -> tuple[int, int]:
        """Finds the next u; the samples that are not done, and the products that took."""
        self.products.widen()
        start = 0 if self.u is None else self.u.data_ptr()
        unsound = self.handle.combine(False, start, candidate.data_ptr(), self.threads)
        tried = [candidate]
        if unsound:
            tried.append(torch.empty_like(candidate))
            self.handle.combine(True, start, tried[1].data_ptr(), self.threads)
        pairs = [(u, self._product(u)) for u in tried]
        places = [x.data_ptr() for pair in pairs for x in pair] + [0, 0]
        self.u = candidate if self.u is None else self.u
        return self.handle.accept(*places[:4], self.u.data_ptr(), self.threads), len(tried)

    def deliver(self, dtype: torch.dtype) -> Tensor:
        """u (B, …) of the unscaled system in `dtype`. Its residual is measured again where that changes it."""
        u = torch.zeros_like(self.g) if self.u is None else self.u
        self.vectors.made.clear()
        changed = self.handle.raise_(u.data_ptr(), self.threads)
        out = u.to(dtype)
        if changed or out is not u:
            back = out.to(u.dtype, copy=True)
            if self.handle.lower(back.data_ptr(), u.data_ptr(), self.threads):
                product = self._product(back)
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

    def _product(self, u: Tensor) -> Tensor:
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
