"""A solve and the linear solves of its derivatives as functions of torch.func: differentiable and vmapped to any order.

z* = f(z*, θ), J = ∂f/∂z: the derivatives of z* are linear solves with I − J or its transpose, and those of such a solve
are of the same kind again. vmap makes one solve of all, in which every sample has its own count and status.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.utils._pytree import tree_map_only

from ..layout import Layout
from ..loop.iterate import Outcome, iterate
from ..precision import of_graph
from ..problem import Problem, Solver
from ..solution import Adjoint, Recorder
from ..stop import Stop
from .adjoint import AdjointSolve
from .leaves import nodes
from .lifted import ANOTHER, HIDDEN, Lifted, is_transformed
from .linearise import Good, Linearised, is_same
from .products import forward_products, pulled, pushed

_functorch: Any = getattr(torch._C, "_functorch", None)
_autograd: Any = torch.autograd  # whose functions have no types
_func: Any = torch.func


@dataclass(eq=False)
class How:
    """What a solve and those of its derivatives are asked, and what is kept of it."""

    solver: Solver
    stop: Stop
    adjoint: AdjointSolve | None  # None: no derivative, or that of `steps`
    steps: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor] | None  # (f, z) → z after a few steps
    outcome: Outcome | None = None


def solved(how: How, lifted: Lifted, z0: Tensor) -> tuple[Tensor, ...]:
    """z, residual, evaluations, status, rejections and rank losses of z0 (B, T, D)."""
    *found, _ = _Root.apply(lifted, how, z0.detach(), *lifted.operands)
    return tuple(found)


class _Root(_autograd.Function):  # type: ignore[misc]
    """The solution z*, (*lead, B, T, D), as a function of the operands; with it counts, and f there if asked."""

    @staticmethod
    def forward(lifted: Lifted, how: How, z0: Tensor, *operands: Tensor) -> tuple[Tensor, ...]:
        (*lead, B, T, D), plain = z0.shape, [x.detach() for x in operands]
        start = z0.detach().reshape(-1, T, D).contiguous()
        layout = Layout.of(start, by_blocks=True)
        problem = Problem(lambda z: lifted(z.view(z0.shape), plain).reshape(start.shape), (), layout, compact=False)
        found = how.outcome = iterate(problem, start, solver=how.solver, stop=_spread(how.stop, lead, B))
        z, value = found.z.clone().view(z0.shape), z0.new_empty(*lead, B, 0, 0)
        if how.adjoint is not None or how.steps is not None:
            good = found.residual.isfinite().view(*lead, B)
            with torch.enable_grad():
                value = lifted.guarded(z, plain, good)
            if value.requires_grad:
                raise NotImplementedError(HIDDEN)
            Good(good.reshape(-1), None, [], whole=False).tell_lost(value.reshape(start.shape))
        counts = (found.residual, found.evaluations, found.status, found.rejections, found.rank_losses)
        return z, *(x.clone().view(*lead, B) for x in counts), value.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.lifted, ctx.how, _, *operands = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[0], output[1], output[-1], *operands)
        ctx.save_for_forward(output[0], output[1], output[-1], *operands)

    @staticmethod
    def vmap(info: Any, in_dims: Any, lifted: Lifted, how: How, z0: Tensor, *operands: Tensor) -> Any:
        (z0,), operands = _in_front(info, in_dims[2:3], (z0,)), _in_front(None, in_dims[3:], operands)
        has = tuple(dim is not None for dim in in_dims[3:])
        return _Root.apply(lifted.over(info.batch_size, info.randomness, has), how, z0, *operands), 0

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        z, residual, value, *operands = ctx.saved_tensors
        none = (None, None, None)
        if grads[0] is None:
            return *none, *[None] * len(operands)
        good, g = residual.isfinite(), grads[0]
        h = _of_operands(ctx, z, good)
        u = torch.where(good[..., None, None], g, 0.0)
        if ctx.how.adjoint is not None:
            u = _Linear.apply(ctx.lifted, ctx.how, True, z, good, value, u, *operands)
        return *none, *_sound(good, pulled(h, operands, u))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        if all(t is None for t in tangents[3:]):
            return None, *[None] * 6
        return below(_Root.tangent, ctx, ctx.saved_tensors, tangents[3:]), *[None] * 6

    @staticmethod
    def tangent(ctx: Any, saved: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> Tensor:
        """That of z for those of the operands."""
        z, residual, value, *operands = saved
        good = residual.isfinite()
        t = torch.where(good[..., None, None], pushed(_of_operands(ctx, z, good), operands, tangents), 0.0)
        if ctx.how.adjoint is not None:
            t = _Linear.apply(ctx.lifted, ctx.how, False, z, good, value, t, *operands)
        return t


class _Linear(_autograd.Function):  # type: ignore[misc]
    """u = g + A u at a solution z (*lead, B, T, D), A = J or, transposed, Jᵀ; zero for samples that are not good.

    value: f there, as it was in the solve.
    """

    @staticmethod
    def forward(
        lifted: Lifted, how: How, transposed: bool, z: Tensor, good: Tensor, value: Tensor, g: Tensor,
        *operands: Tensor,
    ) -> Tensor:  # fmt: skip
        assert how.adjoint is not None
        *lead, B, T, D = z.shape
        with torch.enable_grad():
            at = z.detach().reshape(-1, T, D).clone().requires_grad_()
            f = lifted.guarded(at.view(z.shape), [x.detach() for x in operands], good)
            f = f.reshape(at.shape)
        if not is_same(f.detach().view(z.shape), value):
            raise RuntimeError(ANOTHER)
        recorder = Recorder()
        eps = max(of_graph(f, at, list(nodes(f))), torch.finfo(f.dtype).eps)
        adjoint = replace(how.adjoint, recorder=recorder, eps=eps, stop=_spread(how.adjoint.stop, lead, B))
        mask = good.reshape(-1)
        linear = Linearised(at, f, Good(mask, None, [], bool(mask.all())))
        products = linear.transposed if transposed else forward_products(f, at)
        u = adjoint(products, g.detach().reshape(at.shape).contiguous(), linear.good)
        if recorder.last is not None:
            parts = (x.view(*lead, B) for x in vars(recorder.last).values())
            how.adjoint.recorder.note(Adjoint(*parts))
        return u.clone().view(z.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.lifted, ctx.how, ctx.transposed, z, good, value, _, *operands = inputs
        ctx.save_for_backward(output, z, good, value, *operands)
        ctx.save_for_forward(output, z, good, value, *operands)

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, lifted: Lifted, how: How, transposed: bool, z: Tensor, good: Tensor, value: Tensor,
        g: Tensor, *operands: Tensor,
    ) -> Any:  # fmt: skip
        z, good, value, g = _in_front(info, in_dims[3:7], (z, good, value, g))
        operands = _in_front(None, in_dims[7:], operands)
        has = tuple(dim is not None for dim in in_dims[7:])
        over = lifted.over(info.batch_size, info.randomness, has)
        return _Linear.apply(over, how, transposed, z, good, value, g, *operands), 0

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        u, z, good, value, *operands = ctx.saved_tensors
        quiet = _quiet(ctx.how)
        s = _Linear.apply(ctx.lifted, quiet, not ctx.transposed, z, good, value, _masked(good, grads[0]), *operands)
        # ⟨s, Jᵀ u⟩ = ⟨J s, u⟩: of both kinds the derivative is that of a product with Jᵀ.
        right, left = (u, s) if ctx.transposed else (s, u)
        found = pulled(_product(ctx, good, right), (z, *operands), left)
        dz, *others = _sound(good, found)
        return None, None, None, dz, None, None, s, *others

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        if all(t is None for t in tangents[3:]):
            return None
        return below(_Linear.tangent, ctx, ctx.saved_tensors, (tangents[6], tangents[3], *tangents[7:]))

    @staticmethod
    def tangent(ctx: Any, saved: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> Tensor:
        """That of u for those of g, z and the operands."""
        (u, z, good, value, *operands), (t, *moved) = saved, tangents
        if any(x is not None for x in moved):
            product = _product(ctx, good, u) if ctx.transposed else _image(ctx, good, u)
            of_A = pushed(product, (z, *operands), moved)
            t = of_A if t is None else t + of_A
        assert t is not None
        return _Linear.apply(ctx.lifted, _quiet(ctx.how), ctx.transposed, z, good, value, _masked(good, t), *operands)


def below(
    tangent: Callable[..., Tensor], ctx: Any, saved: Sequence[Tensor], tangents: Sequence[Tensor | None]
) -> Tensor:
    """tangent(ctx, saved, tangents) one level of transforms further down, where no tangent of this level is about.

    torch switches the forward mode off around a function's `jvp`, for the levels below too: a jvp of a jvp would be 0.
    """
    if not is_transformed():
        return tangent(ctx, saved, tangents)
    interpreter = retrieve_current_functorch_interpreter()
    level = interpreter.level()
    saved, tangents = tree_map_only(Tensor, lambda x: _functorch._unwrap_for_grad(x, level), (list(saved), tangents))
    with _set_fwd_grad_enabled(True), interpreter.lower():
        found = tangent(ctx, saved, tangents)
    wrapped: Tensor = _functorch._wrap_for_grad(found, level)
    return wrapped


def _of_operands(ctx: Any, z: Tensor, good: Tensor) -> Callable[..., Tensor]:
    """What derivatives pass through: f at z, or a few steps from there, as a function of the operands."""
    lifted, steps = ctx.lifted, ctx.how.steps
    if steps is None:
        return lambda *operands: lifted.guarded(z, operands, good)
    return lambda *operands: steps(lambda z: lifted.guarded(z, operands, good), z.detach())


def _product(ctx: Any, good: Tensor, u: Tensor) -> Callable[..., Tensor]:
    """Jᵀ u as a function of z and the operands."""

    def product(z: Tensor, *operands: Tensor) -> Tensor:
        _, pull = _func.vjp(lambda z: ctx.lifted.guarded(z, operands, good), z)
        found: Tensor = pull(u)[0]
        return found

    return product


def _image(ctx: Any, good: Tensor, u: Tensor) -> Callable[..., Tensor]:
    """J u as a function of z and the operands."""
    return lambda z, *operands: pushed(lambda z: ctx.lifted.guarded(z, operands, good), (z,), (u,))


def _masked(good: Tensor, x: Tensor) -> Tensor:
    return torch.where(good[..., None, None], x, 0.0)


def _sound(good: Tensor, found: list[Tensor | None]) -> list[Tensor | None]:
    """Cotangents, zero where no sample is good."""
    some = good.any()
    return [None if x is None else torch.where(some, x, 0.0) for x in found]


def _quiet(how: How) -> How:
    """The solves of a derivative's own derivative are not what is reported."""
    assert how.adjoint is not None
    return replace(how, adjoint=replace(how.adjoint, recorder=Recorder()))


def _in_front(info: Any, dims: Sequence[int | None], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Tensors with the vmapped dimension first; where there is none, repeated, if `info` says how often."""
    moved = [x if dim is None else x.movedim(dim, 0) for x, dim in zip(tensors, dims, strict=True)]
    if info is not None:
        moved = [x.expand(info.batch_size, *x.shape) if dim is None else x for x, dim in zip(moved, dims, strict=True)]
    return tuple(moved)


def _spread(stop: Stop, lead: Sequence[int], B: int) -> Stop:
    """Tolerances (B,) for the samples of every vmapped solve, one after the other."""
    if not lead:
        return stop
    spread = [
        t.expand(*lead, B).reshape(-1) if isinstance(t, Tensor) and t.dim() else t for t in (stop.rtol, stop.atol)
    ]
    return replace(stop, rtol=spread[0], atol=spread[1])
