"""The map at a solution, with its graph: what derivatives of a solution are made of."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..layout import Layout
from ..problem import Problem
from .leaves import leaves_among, nodes

DEPENDS = "whether fn depends on a tensor that requires a gradient"  # what ranks may differ in


def are_same(now: Tensor, before: Tensor) -> Tensor:
    """(n,) bool: whether values (n, …) of two evaluations at the same states are those of one map."""
    apart, size = (torch.linalg.vector_norm(x.double().flatten(1), dim=1) for x in (now - before, before))
    return apart <= torch.finfo(now.dtype).eps ** 0.5 * size


def is_same(now: Tensor, before: Tensor) -> bool:
    """`are_same` of all together; so are values that were not finite."""
    return bool(are_same(now[None], before[None])) or not bool(before.isfinite().all())


def evaluate(problem: Problem, z: Tensor, inputs: list[Tensor]) -> Tensor:
    """f at flat z (n, T, D), with gradients as the current mode says."""
    wanted = torch.ones(z.shape[:2], dtype=torch.bool, device=z.device) if problem.causal else None
    return problem(z, inputs, wanted)


@dataclass(eq=False)
class Good:
    """The samples that a gradient passes through: those with a finite residual.

    A bad sample must stay out of the graph: a cotangent of zero times its NaN would still be NaN in the parameters.
    With compaction it is left out of the batch; without, fn sees a good sample's state in its place, and has to be
    finite there (`tell_lost`).
    """

    mask: Tensor  # (B,) bool
    rows: Tensor | None  # positions of the good samples, when fn is given them alone
    inputs: list[Tensor]  # of those samples
    whole: bool  # all samples are good, as far as was looked
    layout: Layout | None = None  # of the states, where fn is given bad samples too

    @staticmethod
    def of(problem: Problem, good: Tensor) -> Good:
        whole = (problem.compact or good.is_cpu) and bool(good.all())  # elsewhere looking would wait for the device
        if whole or not problem.compact:
            return Good(good, None, list(problem.inputs), whole, problem.layout)
        rows = good.nonzero()[:, 0]
        return Good(good, rows, [x[rows] for x in problem.inputs], False)

    def take(self, z: Tensor) -> Tensor:
        """(B, T, D) → (n, T, D), what fn is given."""
        if self.rows is not None:
            return z[self.rows]
        if self.whole or not len(z) or self.layout is None:
            return z
        stand_in = self.layout.stand_in(z.detach(), self.mask).nan_to_num(0.0, 0.0, 0.0)
        return torch.where(self.mask[:, None, None], z, stand_in)

    def mask_taken(self) -> Tensor:
        """(n,) bool: which of the taken samples are good."""
        return self.mask if self.rows is None else self.mask[self.rows]

    def put(self, part: Tensor, z: Tensor) -> Tensor:
        """(n, T, D) → (B, T, D); the bad samples keep z, without a graph."""
        if self.whole:
            return part
        if self.rows is None:
            return torch.where(self.mask[:, None, None], part, z.detach())
        return z.detach().index_copy(0, self.rows, part)

    def without(self, bad: Tensor) -> Tensor:
        """The mask (B,) that is left without the taken samples `bad` (n,)."""
        if self.rows is None:
            return self.mask & ~bad
        return self.mask.index_fill(0, self.rows[bad], False)

    def tell_lost(self, f: Tensor) -> None:
        """Warns when f (n, T, D) is not finite at a sample that is not good, and so in everything it shares."""
        if self.whole or self.rows is not None:
            return
        if not bool((f.isfinite().flatten(1).all(1) | self.mask).all()):
            warnings.warn(
                "fn is NaN or infinite for a sample that has failed, and so are gradients of what the samples share: "
                "give per-sample data in inputs, so that failed samples are left out",
                RuntimeWarning,
                stacklevel=2,
            )


def of_finite(problem: Problem, finite: Tensor, value: Callable[[Good], Tensor]) -> tuple[Good, Tensor]:
    """The samples out of `finite` (B,) for which value(good) (n, T, D) is finite, and that value of them alone.

    A sample that becomes NaN on the way is left out and all is done again: its NaN would reach the others through what
    they share.
    """
    while True:
        good = Good.of(problem, finite)
        taken, shards = good.mask_taken(), problem.shards
        found = shards.attempt(partial(value, good), partial(torch.zeros, len(taken), 1, device=taken.device))
        lost = taken & shards.somewhere(~found.isfinite().flatten(1).all(1))
        if not bool(lost.any()):
            return good, found
        finite = good.without(lost)


def is_wanted() -> bool:
    """Derivatives are: grad mode is on, or dual numbers are about."""
    return torch.is_grad_enabled() or getattr(forward_ad, "_current_level", -1) >= 0


@dataclass(eq=False)
class Linearised:
    """f with its graph at the samples `rows` of z*, and the product Jᵀu there."""

    z: Tensor  # (n, T, D) or in the user's shape, a leaf
    f: Tensor  # (n, T, D)
    good: Good
    behind: Sequence[Any] = ()  # the nodes of f's graph
    leaves: Sequence[Tensor] = ()  # of it
    begun: int = 0  # number of the first autograd node of the evaluation
    value: Tensor | None = None  # f as fn returned it, of the shape of z, where nothing but views lies between

    @staticmethod
    def of(problem: Problem, finite: Tensor, z: Tensor) -> Linearised | None:
        """At z (B, T, D), for the samples that are `finite` (B,).

        None when no gradient is asked for: grad mode off, or fn depends on nothing that requires one.
        """
        if not is_wanted():
            return None
        good = Good.of(problem, finite)
        with torch.enable_grad():
            begun = _next_node()
            z, f, value = _evaluated(problem, good.take(z).detach(), good)
        good.tell_lost(f)
        behind = nodes(f)
        leaves = leaves_among(behind)
        if all(leaf is z for leaf in leaves) and forward_ad.unpack_dual(f).tangent is None:
            return None
        return Linearised(z, f, good, behind, leaves, begun, value)

    @staticmethod
    def again(problem: Problem, z: Tensor, good: Good) -> Linearised:
        """At z (n, T, D), for products alone: fn evaluated once more, as the current mode says."""
        return Linearised(*_evaluated(problem, z, good)[:2], good)

    @property
    def shape(self) -> torch.Size:
        """That of f as fn returned it, in which products take no views."""
        return (self.f if self.value is None else self.value).shape

    def transposed(self, u: Tensor) -> Tensor:
        """Jᵀu of the shape of u: (n, T, D), or `shape`."""
        if not self.good.whole:
            u = torch.where(self.good.mask_taken().view(-1, *[1] * (u.dim() - 1)), u, 0.0)
        f = self.f if self.value is None else self.value
        if not f.requires_grad:
            return torch.zeros_like(u)
        fits = u.dtype is f.dtype and u.shape == f.shape
        (product,) = _gradients((f,), (u if fits else u.to(f.dtype).view(f.shape),), (self.z,))
        if product is None:
            return torch.zeros_like(u)
        return product if fits else product.reshape(u.shape)


_sequence = getattr(torch.autograd, "_get_sequence_nr", None)


def _next_node() -> int:
    """The number of the node that autograd makes next in this thread; 0 where torch does not say."""
    if _sequence is not None:
        return int(_sequence())
    return int(getattr(torch.zeros(1, requires_grad=True).view(1).grad_fn, "_sequence_nr", int)())


_engine = getattr(torch.autograd.Variable, "_execution_engine", None)


def _gradients(outputs: tuple[Tensor], cotangents: tuple[Tensor], leaves: tuple[Tensor]) -> Sequence[Tensor | None]:
    """`torch.autograd.grad` of what is known to fit, the graph kept.

    Its checks of shapes take as long as a small product; the engine itself is asked where torch still has it there.
    """
    if _engine is None:
        return torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True, allow_unused=True)
    found: Sequence[Tensor | None] = _engine.run_backward(
        outputs, cotangents, True, False, leaves, allow_unreachable=True, accumulate_grad=False
    )
    return found


def _evaluated(problem: Problem, z: Tensor, good: Good) -> tuple[Tensor, Tensor, Tensor | None]:
    """A leaf at z (n, T, D), the value f (n, T, D) there with its graph, and f as fn returned it.

    Views between the leaf, fn and f would be gone through at every product: for one tensor there are none.
    """
    layout = problem.layout
    if problem.causal or not layout.is_view:
        leaf = z.clone().requires_grad_()
        return leaf, evaluate(problem, leaf, good.inputs), None
    leaf = layout.unpack(z).clone().requires_grad_()
    value = problem.value_of(leaf, good.inputs)
    f = layout.pack(value, "the value of fn")
    plain = isinstance(value, Tensor) and value.dtype == f.dtype and value.shape == leaf.shape
    return leaf, f, value if plain else None


class Replace(torch.autograd.Function):
    """Value of `value`, gradient of `x`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.detach().clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return tangents[0]
