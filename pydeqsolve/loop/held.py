"""Graphs that operators call: what a compiled graph knows of the map that it solves.

A compiler traces no loop whose length depends on data at a cost that a small problem can bear. It hands an operator the
graph of the map, which is kept here under a key, and puts another operator into its own graph, which runs the loop.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

# Keys are of this process alone: a compiler that finds its graph in a cache on disk finds none of another process.
_process = uuid.uuid4().hex
_held: dict[str, Held] = {}


class Held:
    """The first output of a graph as a function of one of its inputs; the others are tensors and sizes.

    places: which inputs of the graph the others are, of those that it was given.
    """

    def __init__(self, graph: fx.GraphModule, of: int, fuses: bool) -> None:
        self.module, used = first_output(graph)
        self.places = [i for i in used if i != of]
        self.at = used.index(of) if of in used else -1
        self.is_size = [False] * len(self.places)
        self.fuses = fuses
        self.fused: Callable[[list[Any]], Sequence[Tensor]] | None = None

    def key(self, given: Sequence[Any]) -> tuple[str, list[Tensor], list[Any]]:
        """The key of this graph from now on, and what of `given` an operator hands on: tensors, and sizes."""
        rest = [given[i] for i in self.places]
        self.is_size = [not isinstance(x, Tensor) for x in rest]
        key = f"{_process}-{len(_held)}"
        _held[key] = self
        tensors = [x for x in rest if isinstance(x, Tensor)]
        return key, tensors, [x for x in rest if not isinstance(x, Tensor)]

    def taking(self, given: Sequence[Any]) -> Callable[[Tensor], Tensor]:
        """The function, of all that the graph was given."""
        return self._function([given[i] for i in self.places])

    def _function(self, rest: list[Any]) -> Callable[[Tensor], Tensor]:
        if self.at < 0:
            before, after, used = rest, [], 0
        else:
            before, after, used = rest[: self.at], rest[self.at :], 1

        def function(z: Tensor) -> Tensor:
            found: Tensor = run([*before, *[z] * used, *after])[0]
            return found

        def unfused(args: list[Any]) -> Sequence[Tensor]:
            found: Sequence[Tensor] = self.module(*args)
            return found

        def first(args: list[Any]) -> Sequence[Tensor]:
            nonlocal run
            if self.fused is None:
                self.fused = fused(self.module, args)
            run = self.fused
            return run(args)

        run = first if self.fuses and not any(self.is_size) else unfused
        return function


def held(key: str, tensors: Sequence[Tensor], sizes: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """The function that was kept under a key, of the tensors and sizes that go with it."""
    if key not in _held:
        raise RuntimeError("a graph with a solve was compiled in another process: it cannot be loaded, compile it here")
    graph, of_tensors, of_sizes = _held[key], iter(tensors), iter(sizes)
    return graph._function([next(of_sizes) if size else next(of_tensors) for size in graph.is_size])


def first_output(graph: fx.GraphModule) -> tuple[fx.GraphModule, list[int]]:
    """What computes the first output alone, and the places of the inputs that it reads."""
    own, copies = fx.Graph(), {}
    for node in graph.graph.nodes:
        if node.op != "output":
            copies[node] = own.node_copy(node, copies.__getitem__)
            continue
        value = copies[node.args[0][0]]
        if value.target is torch.ops.aten.clone.default:  # nobody writes to it
            value = value.args[0]
        own.output((value,))
    own.eliminate_dead_code()
    inputs = [node for node in own.nodes if node.op == "placeholder"]
    used = [i for i, node in enumerate(inputs) if node.users]
    for node in inputs:
        if not node.users:
            own.erase_node(node)
    return fx.GraphModule(graph, own), used


def fused(module: fx.GraphModule, args: Sequence[Any]) -> Callable[[list[Any]], Sequence[Tensor]]:
    """The module as Inductor makes it, taking its arguments in a list; the module itself where that fails."""
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses.functional_tensor import dispatch_functionalize
    from torch.fx.experimental.proxy_tensor import make_fx

    functional = make_fx(dispatch_functionalize(module), select_decomp_table(), tracing_mode="fake")(*args)
    inputs = [node.meta["val"] for node in functional.graph.nodes if node.op == "placeholder"]
    made: Any = compile_fx_inner(functional, inputs)
    called: Callable[[list[Any]], Sequence[Tensor]] = made.current_callable
    return called


def is_traced(operands: Sequence[Any]) -> bool:
    """Whether a compiler is tracing what is done with the operands."""
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    return any(isinstance(x, (FakeTensor, FunctionalTensor)) for x in operands)


def is_inductor() -> bool:
    """Whether it is Inductor that traces: torch has its values then."""
    from torch._inductor.virtualized import V
    from torch._subclasses import FakeTensorMode

    return isinstance(V.fake_mode, FakeTensorMode)
