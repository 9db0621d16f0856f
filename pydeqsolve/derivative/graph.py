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

from ..solution import Recorder
from ..stop import Stop
from .adjoint import AdjointSolve
from .gmres import GMRES
from .looped import Bounds, solved
from .numbered import told

# Of the dispatch keys of this thread; asked for here, so that a torch without them is seen at the import.
LOCAL = torch._C._dispatch_tls_local_include_set, torch._C._dispatch_tls_local_exclude_set
MARKED = 3  # inputs that the function returns after its value: z, the bounds of `attach_in_graph`, the ticket


class _Implicit(BaseHOP):
    """implicit(fn, z, …): z, with the derivative of the fixed point z = fn(z, …), in the order in which fn reads its
    inputs. fn returns its value and copies of the `MARKED` inputs, which tell where these are."""

    def __init__(self) -> None:
        super().__init__("pydeqsolve_implicit")

    def _call_Autograd(self, subgraph: Any, *operands: Any, **kwargs: Any) -> tuple[Tensor, ...]:  # noqa: N802
        _refuse_inductor()
        marked = _marked(subgraph)
        wanted = [i for i, x in enumerate(operands) if isinstance(x, Tensor) and x.requires_grad]
        pulled = _Pulled.of(subgraph, operands, marked[0], [i for i in wanted if i not in marked])
        z = _Attached.apply(pulled, marked, kwargs, *operands)
        return z, *(operands[i].detach().clone() for i in marked)

    def _call_Functionalize(self, ctx: Any, subgraph: Any, *operands: Any, **kwargs: Any) -> tuple[Tensor, ...]:  # noqa: N802
        given = ctx.unwrap_tensors(operands)
        with ctx.redispatch_to_next():
            found = _without(subgraph, given)
        wrapped: tuple[Tensor, ...] = ctx.wrap_tensors(found)
        return wrapped

    def _call_CompositeExplicitAutograd(self, subgraph: Any, *operands: Any, **kwargs: Any) -> tuple[Tensor, ...]:  # noqa: N802
        return _without(subgraph, operands)


def _refuse_inductor() -> None:
    """Raises NotImplementedError where options of Inductor, which is at work if torch has its values, spoil numbers."""
    import torch._functorch.config
    from torch._inductor import config
    from torch._inductor.virtualized import V
    from torch._subclasses import FakeTensorMode

    wrong = "gradient=Implicit() in a graph that is compiled with "
    if config.cpp_wrapper:
        raise NotImplementedError(
            f"{wrong}cpp_wrapper: torch 2.13 hands on wrong status and residual of the adjoint there: leave that "
            "option off, or use gradient=Phantom()"
        )
    if isinstance(V.fake_mode, FakeTensorMode) and torch._functorch.config.donated_buffer:
        raise NotImplementedError(
            f"{wrong}donated_buffer: torch 2.13 writes over tensors that loops of a backward pass still need: set "
            "torch._functorch.config.donated_buffer = False, or use gradient=Phantom()"
        )


def _without(fn: fx.GraphModule, given: Sequence[Any]) -> tuple[Tensor, ...]:
    """What `implicit` returns where nothing requires a gradient."""
    marked = _marked(fn)
    return given[marked[0]].clone(), *(given[i].clone() for i in marked)


implicit = _Implicit()


def _marked(fn: fx.GraphModule) -> list[int]:
    """The places of the `MARKED` inputs."""
    inputs = [node for node in fn.graph.nodes if node.op == "placeholder"]
    returned: Any = fn.graph.output_node().args[0]
    return [inputs.index(node.all_input_nodes[0]) for node in returned[1:]]


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

    @property
    def is_plain(self) -> bool:
        """What depends on u is made of torch's own operators, which vmap knows."""
        return not any(isinstance(node.target, torch._ops.HigherOrderOperator) for node in self.after.graph.nodes)


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
        pulled, settings, g = ctx.pulled, ctx.settings, grads[0]
        given = [size if x is None else x for size, x in zip(ctx.sizes, ctx.saved_tensors, strict=True)]
        _, columns, ticket = (given[i] for i in ctx.marked)
        good, rtol, atol, budget = columns.unbind(1)
        good = good != 0
        saved = [x.resolve_conj().resolve_neg() if isinstance(x, Tensor) else x for x in pulled.before(*given)]

        def product(u: Tensor, saved: Sequence[Any]) -> Tensor:
            return pulled.after(*saved, u)[0]

        how = AdjointSolve(
            GMRES(settings["restart"]), Stop(), settings["follows"], settings["on_failure"], Recorder(), pulled.eps
        )
        bounds = Bounds(rtol, atol, budget[0].long())
        u, outcome = solved(how, product, saved, g, good, bounds, pulled.is_plain)
        u = told(u, good, outcome, ticket, settings["restart"], settings["on_failure"])
        # Where no sample is good, one that is not stands in for all.
        found = [torch.where(good.any(), x, 0.0) for x in pulled.after(*saved, u)[1:]]
        by_place = dict(zip(pulled.wanted, found, strict=True))
        return None, None, None, *(by_place.get(i) for i in range(len(given)))
