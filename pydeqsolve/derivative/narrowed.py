"""Products with the samples whose adjoint has not ended: through a graph of fn for these alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..problem import Problem
from .lifted import is_transformed
from .linearise import Good, Linearised, are_same

WAIT = 4  # products with at most half of the samples after which more of them are expected
LEAST = 1 << 14  # entries of a product below which its cost is that of its calls, whatever their number

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Products:
    """u ↦ Jᵀu at a solution, and the same for some of its samples; u is (n, T, D), or of `shape`."""

    at: Linearised
    problem: Problem
    as_before: Callable[[], AbstractContextManager[None]]  # the autocast state of the forward pass

    @property
    def shape(self) -> torch.Size:
        """That in which products take no views."""
        return self.at.shape

    def __call__(self, u: Tensor) -> Tensor:
        return self.at.transposed(u)

    def of(self, rows: Tensor) -> Product | None:
        """Jᵀu of the samples `rows` (k,) alone, u likewise, by one evaluation of fn.

        None where fn may not be given some samples alone, or is another map now than it was in the forward pass: fails
        then, or has another value.
        """
        at, problem = self.at, self.problem
        if not problem.compact or problem.causal or problem.split is not None or is_transformed():
            return None
        k = len(rows)
        if not k:
            return None
        inputs = [x.detach()[rows] for x in at.good.inputs]
        good = Good(torch.ones(k, dtype=torch.bool, device=rows.device), None, inputs, True, problem.layout)
        states, before = at.z.detach().view(at.f.shape)[rows], at.f.detach()[rows]
        devices = [before.device] if before.is_cuda else []
        try:
            with self.as_before(), torch.enable_grad(), torch.random.fork_rng(devices):
                part = Linearised.again(problem, states, good)
        except Exception:  # nobody asked for this evaluation: the products with all samples serve as well
            return None
        same = bool(are_same(part.f.detach(), before).all())
        return part.transposed if same and part.f.requires_grad else None


class Narrowing:
    """The products of one solve: of all samples, or of those that go on, when these have long been few.

    What one more evaluation of fn costs is spent only after `WAIT` products with at most half of the samples that are
    multiplied: where all end together it would not be earned again.
    """

    def __init__(self, products: Product, g: Tensor) -> None:
        self.products, self.size = products, g.numel()
        self.can = isinstance(products, Products) and self.size >= LEAST
        self.waited = 0
        self.rows: Tensor | None = None  # (k,) that are multiplied; None: all
        self.part: Product = products
        self.tried = False  # a product with `part` is known to be that with all samples

    def __call__(self, u: Tensor) -> Tensor:
        """A u; zero for samples that have ended, where they are left out."""
        if self.rows is None:
            return self.products(u)
        product = self.part(u[self.rows])
        if not self.tried:
            # A map that has changed may have the same fixed points, such as one of another damping.
            whole = self.products(u)
            self.tried = bool(are_same(product, whole[self.rows]).all())
            if not self.tried:
                self.can, self.rows, self.part = False, None, self.products
            return whole
        return product.new_zeros(u.shape).index_copy_(0, self.rows, product)

    def widen(self) -> None:
        """All samples again: the next u is measured for every one that was in the cycle."""
        if self.rows is not None:
            self.waited = WAIT  # the next cycle is narrowed at once
        self.rows, self.part = None, self.products

    def tell(self, going: int, following: Tensor) -> None:
        """After a product: `going` samples go on; in `following` (B, …), the next vector, the others are zero."""
        if not self.can:
            return
        n = following.shape[0]
        width = n if self.rows is None else self.rows.shape[0]
        if 2 * going > width or self.size // n * width < LEAST:
            return
        self.waited += 1
        if self.waited <= WAIT:
            return
        assert isinstance(self.products, Products)
        rows = (following.flatten(1) != 0).any(1).nonzero()[:, 0]
        part = self.products.of(rows)
        self.can = part is not None
        if part is not None:
            self.rows, self.part, self.waited, self.tried = rows, part, 0, False
