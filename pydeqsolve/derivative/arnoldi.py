"""Restarted GMRES by native passes: `gmres` says the same in PyTorch, for devices without kernels.

A product is followed by one pass over the vectors: dot products with the basis and their subtraction, twice, the next
vector, and a column of every sample's Hessenberg system. Samples that have ended take no part in it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..memory import spaced
from ..step import systems
from ..stop import Stop
from .linear import Products
from .narrowed import Narrowing
from .scaled import Scaled

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


class Arnoldi(Scaled):
    """One solve of u = g + A u for g (B, …), by products u ↦ A u of the shape of g; u is scaled until `deliver`."""

    def __init__(self, handle: Any, products: Products, g: Tensor, most: int) -> None:
        self.narrowing = Narrowing(products, g)
        super().__init__(handle, self.narrowing, g)
        self.most = most
        self.vectors = Vectors(g, self.most)
        self.u: Tensor | None = None  # None: zero

    @staticmethod
    def of(products: Products, g: Tensor, restart: int) -> Arnoldi | None:
        """The solve for g (B, …), float32 or float64, contiguous; None where there are no kernels for it."""
        most = min(restart, g.shape[1:].numel()) if g.shape[0] else 1
        handle = systems.krylov(g, most)
        return None if handle is None else Arnoldi(handle, products, g, most)

    def run(self, stop: Stop, mask: Tensor | None = None, eps: float = 0.0) -> None:
        """Solves to atol + rtol ‖g‖ per sample, but to no less than eps ‖g‖; not where mask (B,) is false."""
        active, calls = self.begin(stop, mask, eps, self.vectors[0]), 0
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
            product = self.product(vector)
            going = self.handle.append(product.data_ptr(), following.data_ptr(), self.threads)
            if not going:
                return k + 1
            if not last:
                self.narrowing.tell(going, following)
            vector = following
        return most

    def _accept(self, candidate: Tensor) -> tuple[int, int]:
        """Finds the next u; the samples that are not done, and the products that took."""
        self.narrowing.widen()
        start = 0 if self.u is None else self.u.data_ptr()
        unsound = self.handle.combine(False, start, candidate.data_ptr(), self.threads)
        tried = [candidate]
        if unsound:
            tried.append(torch.empty_like(candidate))
            self.handle.combine(True, start, tried[1].data_ptr(), self.threads)
        pairs = [(u, self.product(u)) for u in tried]
        places = [x.data_ptr() for pair in pairs for x in pair] + [0, 0]
        self.u = candidate if self.u is None else self.u
        return self.handle.accept(*places[:4], self.u.data_ptr(), self.threads), len(tried)

    def deliver(self, dtype: torch.dtype) -> Tensor:
        """u (B, …) of the unscaled system in `dtype`."""
        u = torch.zeros_like(self.g) if self.u is None else self.u
        self.vectors.made.clear()
        return self.delivered(u, dtype)
