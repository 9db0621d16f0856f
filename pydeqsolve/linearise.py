"""The map at a solution, with its graph: what derivatives of a solution are made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .iterate import Problem, call
from .leaves import leaves
from .structure import Layout


def evaluate(problem: Problem, z: Tensor, inputs: list[Tensor]) -> Tensor:
    """f at flat z (n, T, D), with gradients as the current mode says."""
    layout: Layout = problem.layout
    wanted = torch.ones(z.shape[:2], dtype=torch.bool, device=z.device) if problem.by_front else None
    return layout.pack(call(problem, layout.unpack(z), inputs, wanted), "the value of fn")


@dataclass(eq=False)
class Good:
    """The samples that a gradient passes through: those with a finite residual.

    A bad sample must stay out of the graph: a cotangent of zero times its NaN would still be NaN in the parameters.
    With compaction it is left out of the batch; without, fn sees zeros in its place.
    """

    mask: Tensor  # (B,) bool
    rows: Tensor | None  # positions of the good samples, when fn is given them alone
    inputs: list[Tensor]  # of those samples

    @staticmethod
    def of(problem: Problem, good: Tensor) -> Good:
        if not problem.compact or bool(good.all()):
            return Good(good, None, list(problem.inputs))
        rows = good.nonzero()[:, 0]
        return Good(good, rows, [x[rows] for x in problem.inputs])

    def take(self, z: Tensor) -> Tensor:
        """(B, T, D) → (n, T, D), what fn is given."""
        return torch.where(self.mask[:, None, None], z, 0.0) if self.rows is None else z[self.rows]

    def mask_taken(self) -> Tensor:
        """(n,) bool: which of the taken samples are good."""
        return self.mask if self.rows is None else self.mask[self.rows]

    def put(self, part: Tensor, z: Tensor) -> Tensor:
        """(n, T, D) → (B, T, D); the bad samples keep z, without a graph."""
        if self.rows is None:
            return torch.where(self.mask[:, None, None], part, z.detach())
        return z.detach().index_copy(0, self.rows, part)


@dataclass(eq=False)
class Linearised:
    """f with its graph at the samples `rows` of z*, and the product Jᵀu there."""

    z: Tensor  # (n, T, D), a leaf
    f: Tensor  # (n, T, D)
    good: Good

    @staticmethod
    def of(problem: Problem, finite: Tensor, z: Tensor) -> Linearised | None:
        """At z (B, T, D), for the samples that are `finite` (B,).

        None when no gradient is asked for: grad mode off, or fn depends on nothing that requires one.
        """
        if not torch.is_grad_enabled():
            return None
        good = Good.of(problem, finite)
        z = good.take(z).detach().clone().requires_grad_()
        f = evaluate(problem, z, good.inputs)
        if all(leaf is z for leaf in leaves(f)) and forward_ad.unpack_dual(f).tangent is None:
            return None
        return Linearised(z, f, good)

    def transposed(self, u: Tensor) -> Tensor:
        """Jᵀu, (n, T, D) → (n, T, D)."""
        u = torch.where(self.good.mask_taken()[:, None, None], u, 0.0).to(self.f.dtype)
        (product,) = torch.autograd.grad(self.f, self.z, u, retain_graph=True, allow_unused=True)
        return torch.zeros_like(self.z) if product is None else product
