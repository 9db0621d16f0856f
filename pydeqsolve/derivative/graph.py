"""The implicit derivative as an operator of torch.compile's graphs.

The compiler cannot trace a vector-Jacobian product inside a loop, but it hands an operator the graph of a function that
the operator is given, with all that the function reads as inputs. The graph of the products is made from that one; what
of it does not depend on the cotangent is computed once, before the loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._higher_order_ops import BaseHOP
from torch._higher_order_ops.utils import materialize_as_graph

from ..loop.captured import LOCAL, marked
from ..loop.held import Held, is_inductor, is_traced
from .numbered import solved

MARKED = 3  # inputs that the function returns after its value: z, the bounds of `attach_in_graph`, the ticket


class _Implicit(BaseHOP):
    """implicit(fn, z, …): z, with the derivative of the fixed point z = fn(z, …), in the order in which fn reads its
    inputs. fn returns its value and copies of the `MARKED` inputs, which tell where these are."""

    def __init__(self) -> None:
        super().__init__("pydeqsolve_implicit")

    def _call_Autograd(self, subgraph: Any, *operands: Any, **kwargs: Any) -> tuple[Tensor, ...]:  # noqa: N802
        places = marked(subgraph, MARKED)
        wanted = [i for i, x in enumerate(operands) if isinstance(x, Tensor) and x.requires_grad]
        pulled = _Pulled.of(subgraph, operands, places[0], [i for i in wanted if i not in places])
        z = _Attached.apply(pulled, places, kwargs, *operands)
        return z, *(operands[i].detach().clone() for i in places)

    def _call_Functionalize(self, ctx: Any, subgraph: Any, *operands: Any, **kwargs: Any) -> tuple[Tensor, ...]:  # noqa: N802
        given = ctx.unwrap_tensors(operands)
        with ctx.redispatch_to_next():
            found = _without(subgraph, given)
        wrapped: tuple[Tensor, ...] = ctx.wrap_tensors(found)
        return wrapped

    def _call_CompositeExplicitAutograd(self, subgraph: Any, *operands: Any, **kwargs: Any) -> tuple[Tensor, ...]:  # noqa: N802
        return _without(subgraph, operands)


def _without(fn: fx.GraphModule, given: Sequence[Any]) -> tuple[Tensor, ...]:
    """What `implicit` returns where nothing requires a gradient."""
    places = marked(fn, MARKED)
    return given[places[0]].clone(), *(given[i].clone() for i in places)


implicit = _Implicit()


class _Pulled:
    """The products u ↦ (∂f/∂x)ᵀu of a graph f for several of its inputs x, split where u comes in."""

    def __init__(self, before: fx.GraphModule, after: fx.GraphModule, wanted: list[int], eps: float) -> None:
        self.before, self.after, self.wanted, self.eps = before, after, wanted, eps

    @staticmethod
    def of(fn: fx.GraphModule, given: Sequence[Any], z: int, wanted: list[int]) -> _Pulled:
        def pull(*both: Any) -> list[Tensor]:
            *rest, u = both
            with torch.enable_grad():
                at = [x.detach() if isinstance(x, Tensor) else x for x in rest]
                leaves = [at[i].requires_grad_() for i in (z, *wanted)]
                f = fn(*at)[0]
                found: Sequence[Any] = [None] * len(leaves)
                if f.requires_grad:
                    found = torch.autograd.grad(f, leaves, u, allow_unused=True)
            return [torch.zeros_like(x) if y is None else y for x, y in zip(leaves, found, strict=True)]

        included, excluded = (local() for local in LOCAL)
        at_u = (*given, given[z].detach())
        whole = materialize_as_graph(pull, at_u, included, excluded, force_enable_grad=True)
        before, after = _split(whole)
        return _Pulled(before, after, wanted, _coarsest(before, given[z].dtype))

    def adjoint(self, saved: Sequence[Any], g: Tensor, bounds: Tensor, ticket: Tensor, how: dict[str, Any]) -> Tensor:
        """u (B, T, D) of u = g + (∂f/∂z)ᵀu, by an operator where a compiler traces."""
        held = Held(self.after, len(saved), is_inductor())
        if not is_traced((g, *saved)):
            return solved(held.taking(saved), g, bounds, ticket, self.eps, **how)
        key, tensors, sizes = held.key(saved)
        u: Tensor = torch.ops.pydeqsolve.adjoint(key, g, bounds, ticket, self.eps, tensors, sizes, *how.values())
        return u


def _coarsest(graph: fx.GraphModule, dtype: torch.dtype) -> float:
    """The largest machine epsilon of what is computed in a graph."""
    values = [node.meta.get("val") for node in graph.graph.nodes if node.op == "call_function"]
    dtypes = {dtype, *(x.dtype for x in values if isinstance(x, Tensor) and x.is_floating_point())}
    return max(torch.finfo(x).eps for x in dtypes)


def _split(whole: fx.GraphModule) -> tuple[fx.GraphModule, fx.GraphModule]:
    """A graph of (…, u) as one of the rest, and one of what that returns and u."""
    nodes = list(whole.graph.nodes)
    u = [node for node in nodes if node.op == "placeholder"][-1]
    late = {u}
    for node in nodes:
        if node.op == "output" or not late.isdisjoint(node.all_input_nodes):
            late.add(node)
    own = {node for node in nodes if node.op == "get_attr" and not isinstance(node.meta.get("val"), Tensor)}
    border = [node for node in nodes if node not in late | own and not late.isdisjoint(node.users)]

    before, after = fx.Graph(), fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        if node not in late:
            copies[node] = before.node_copy(node, copies.__getitem__)
    before.output(tuple(copies[node] for node in border))

    copies = {}
    for node in (*border, u):
        copies[node] = after.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in nodes:
        if node in own or (node in late and node is not u):
            copies[node] = after.node_copy(node, copies.__getitem__)
    return fx.GraphModule(whole, before), fx.GraphModule(whole, after)


class _Attached(torch.autograd.Function):
    """Returns z and, backward, gives what z was computed from the cotangents of the fixed point."""

    @staticmethod
    def forward(ctx: Any, pulled: _Pulled, marked: list[int], settings: dict[str, Any], *given: Any) -> Tensor:
        ctx.pulled, ctx.marked, ctx.settings = pulled, marked, settings
        ctx.sizes = [None if isinstance(x, Tensor) else x for x in given]
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in given))  # changed since then: an error
        return given[marked[0]].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            raise NotImplementedError("second derivatives of a compiled solve with Implicit are not supported")
        pulled, g = ctx.pulled, grads[0].contiguous()
        given = [size if x is None else x for size, x in zip(ctx.sizes, ctx.saved_tensors, strict=True)]
        _, bounds, ticket = (given[i] for i in ctx.marked)
        saved = [x.resolve_conj().resolve_neg() if isinstance(x, Tensor) else x for x in pulled.before(*given)]
        u = pulled.adjoint(saved, g, bounds, ticket, ctx.settings)
        # Where no sample is good, one that is not stands in for all.
        some = (bounds[:, 0] != 0).any()
        found = [torch.where(some, x, 0.0) for x in pulled.after(*saved, u)[1:]]
        by_place = dict(zip(pulled.wanted, found, strict=True))
        return None, None, None, *(by_place.get(i) for i in range(len(given)))
