"""Implicit differentiation of a solution: the adjoint solve, its own derivative, and forward mode.

J = ∂f/∂z at z*, g the cotangent of z*. dz* = (I − J)⁻¹ ∂f/∂θ dθ, so f's cotangent is u = (I − Jᵀ)⁻¹ g. u is itself the
fixed point of u ↦ g + J(z*, θ)ᵀ u: its derivative is taken by the same theorem once more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..memory import is_stacked
from ..precision import Autocast, of_graph
from ..problem import Problem
from ..solution import Adjoint, Recorder
from .adjoint import AdjointSolve, worst
from .batched import one_by_one
from .closure import Closure, cut
from .leaves import leaves, leaves_before, nodes
from .linearise import DEPENDS, Good, Linearised, evaluate, is_same
from .narrowed import Products
from .products import forward_products


def attach(how: AdjointSolve, problem: Problem, finite: Tensor, z: Tensor, closure: Closure | None = None) -> Tensor:
    """z (B, T, D), a solution, with its implicit derivative for the samples that are `finite` (B,).

    closure: what fn closes over, where that is known.
    """
    shards = problem.shards
    at = shards.attempt(lambda: Linearised.of(problem, finite, z), lambda: None)
    shards.check_alike(at is not None, DEPENDS)
    if at is None:
        return z
    # Autograd must know of every tensor that a second derivative reaches without passing through f: the inputs, and
    # what fn reads besides them, an input among that too.
    given = list({id(x): x for x in problem.inputs if x.requires_grad}.values())
    closure = closure or Closure.of(problem, at)
    closed = [x for x in closure.tensors if all(x is not y for y in given)]
    before = leaves_before(at.f, {x.grad_fn for x in closed}) if closed else at.leaves
    reached = [x for x in before if x is not at.z]
    how = how.computing_in(shards.coarsest(max(how.eps, of_graph(at.f, at.z, at.behind))))
    step = _Step(how, problem, finite, z.detach(), at, Autocast.of(z), Closure(closed, closure.hidden))
    value = at.z.detach().view(at.f.shape)
    return at.good.put(_ImplicitFunction.apply(at.f, value, step, *given, *reached, *closed), z)


CHANGED = (
    "create_graph evaluates fn again in the backward pass, and it was another map then: take the gradient inside "
    "functional_call, bind loop variables, keep dropout masks and parameters as they were"
)


@dataclass(eq=False)
class _Step:
    """What the backward and forward modes of one solution need."""

    how: AdjointSolve
    problem: Problem
    finite: Tensor  # (B,) bool
    z: Tensor  # (B, T, D)
    at: Linearised
    autocast: Autocast
    closure: Closure

    def each(self, act: Callable[[_Step, Tensor], Sequence[Tensor | None]], g: Tensor) -> list[Tensor | None]:
        """act(step, g) for each of the tensors that g stands for; the outcome that is reported is that of all."""
        if not is_stacked(g):
            return list(act(self, g))
        seen: list[Adjoint] = []

        def noted(g: Tensor) -> Sequence[Tensor | None]:
            own = Recorder()
            try:
                return act(replace(self, how=replace(self.how, recorder=own)), g)
            finally:
                seen.extend([] if own.last is None else [own.last])

        try:
            return one_by_one(noted, g)
        finally:
            if seen:
                self.how.recorder.note(worst(seen))

    def adjoint(self, g: Tensor) -> Tensor:
        """u (n, T, D) of u = g + Jᵀ u, without a graph."""
        return self.how(Products(self.at, self.problem, self.autocast.again), g, self.at.good)

    def tangent(self, t: Tensor) -> Tensor:
        """v (n, T, D) of v = t + J v, without a graph."""
        at = self.at
        with torch.enable_grad():  # unpacked without, f would have lost its graph
            image = forward_products(forward_ad.unpack_dual(at.f).primal, at.z)
        with torch.no_grad():
            v = self.how(lambda v: forward_ad.unpack_dual(image(v)).primal, t.detach(), at.good)
        return _Mixed.apply(v, t)

    def differentiable(self, g: Tensor, boundary: tuple[Tensor, ...]) -> list[Tensor | None]:
        """The cotangents of the tensors `boundary`, as differentiable functions of g, of those tensors and of z*.

        The gates keep the first derivative to its own terms, (∂f/∂θ)ᵀ u at fixed z* and fixed inputs; what the second
        one finds at a gate goes on, to z* and from there by its own implicit derivative.
        """
        if self.closure.hidden:
            raise NotImplementedError(
                "create_graph: fn closes over a tensor with a graph of its own (of an outer solve, if this is one "
                "inside another) that compiled code or torch.ops alone reads: pass it in inputs"
            )
        gates = _Gates()
        with self.autocast.again():
            z = gates.put(attach(self.how, self.problem, self.finite, self.z, self.closure))
            swap = {id(x): gates.put(x) for x in self.problem.inputs if x.requires_grad}
            problem = replace(self.problem, inputs=[swap.get(id(x), x) for x in self.problem.inputs])
            good = Good.of(problem, self.finite)
            start = good.take(z)
            f = evaluate(problem, start, good.inputs)
        self._check_same(f, boundary[len(swap) :])
        u = self._attached_adjoint(f, start, g)
        wanted = [*swap.values(), *boundary[len(swap) :]]
        with cut(self.closure.tensors):
            found = torch.autograd.grad(f, wanted, u, create_graph=True, allow_unused=True)
        gates.open = True
        return list(found)

    def _check_same(self, f: Tensor, reached: tuple[Tensor, ...]) -> None:
        """Raises unless f (n, T, D), evaluated again for a second derivative, is that of the forward pass."""
        same = self.problem.shards.all_claim(is_same(f.detach(), self.at.f.detach()))
        behind = set(nodes(f))
        known = {id(x) for x in leaves(f)} | {id(x) for x in self.closure.tensors if x.grad_fn in behind}
        if not same or any(id(x) not in known for x in reached):
            raise RuntimeError(CHANGED)

    def _attached_adjoint(self, f: Tensor, z: Tensor, g: Tensor) -> Tensor:
        """u (n, T, D) with its own implicit derivative, from f (n, T, D) at z with a graph of both."""
        good = self.at.good
        mask = good.mask_taken()[:, None, None]
        u = self.adjoint(g.detach()).requires_grad_()
        (product,) = torch.autograd.grad(f, z, u, create_graph=True, allow_unused=True)
        value = torch.where(mask, g, 0.0) + (0.0 if product is None else torch.where(mask, product, 0.0))
        # A map that has changed may have the same fixed points, such as one of another damping.
        found, before = torch.zeros_like(g) if product is None else product.detach(), self.at.transposed(u.detach())
        if not self.problem.shards.all_claim(is_same(torch.where(mask, found, 0.0), before)):
            raise RuntimeError(CHANGED)
        quiet = replace(self.how, recorder=Recorder())
        return _AdjointFunction.apply(value, u.detach(), Linearised(u, value, good), quiet)


class _Gates:
    """Points of a graph that no gradient passes until they are open."""

    def __init__(self) -> None:
        self.open = False

    def put(self, x: Tensor) -> Tensor:
        return _Gate.apply(x, self)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gates: _Gates) -> Tensor:
        ctx.gates = gates
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return (grads[0] if ctx.gates.open else None), None


class _ImplicitFunction(torch.autograd.Function):
    """Returns z* and, backward, hands u to f, whose own graph leads on; or, differentiably, to the tensors behind f."""

    @staticmethod
    def forward(ctx: Any, f: Tensor, z: Tensor, step: _Step, *boundary: Tensor) -> Tensor:
        ctx.step = step
        ctx.state_leaf = step.at.z  # `leaves` passes it over
        ctx.save_for_backward(*boundary)
        ctx.set_materialize_grads(False)  # nothing, where zeros would cost a solve: from behind a closed gate
        return z.detach().clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        boundary = ctx.saved_tensors
        if grads[0] is None:
            return None, None, None, *[None] * len(boundary)
        if any(forward_ad.unpack_dual(x).tangent is not None for x in (grads[0], ctx.step.at.f)):
            raise NotImplementedError("forward mode over reverse mode through Implicit is not supported")
        if torch.is_grad_enabled():
            return None, None, None, *ctx.step.each(lambda step, g: step.differentiable(g, boundary), grads[0])
        (u,) = ctx.step.each(lambda step, g: [step.adjoint(g)], grads[0])
        return u, None, None, *[None] * len(boundary)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return None if tangents[0] is None else ctx.step.each(lambda step, t: [step.tangent(t)], tangents[0])[0]


class _Mixed(torch.autograd.Function):
    """Returns v, a tangent; refuses to be differentiated with respect to the tangent t that it came from."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, t: Tensor) -> Tensor:
        return v.view_as(v)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError("reverse mode over forward mode through Implicit is not supported")


class _AdjointFunction(torch.autograd.Function):
    """Returns u and, backward, hands v = (I − J)⁻¹ w to the value of u ↦ g + Jᵀ u, whose own graph leads on."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, u: Tensor, at: Linearised, how: AdjointSolve) -> Tensor:
        ctx.at, ctx.how = at, how
        return u.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            raise NotImplementedError("third derivatives through Implicit are not supported")
        (v,) = one_by_one(lambda w: [ctx.how(ctx.at.transposed, w, ctx.at.good)], grads[0])
        return v, None, None, None
