"""Graphs that operators call: what a compiled graph knows of the map that it solves.

A compiler traces no loop whose length depends on data at a cost that a small problem can bear. It hands an operator the
graph of the map, which is kept here under a key, and puts another operator into its own graph, which runs the loop.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

Run = Callable[[list[Any]], Sequence[Tensor]]

# Keys are of this process alone: a compiler that finds its graph in a cache on disk finds none of another process.
_process = uuid.uuid4().hex
_numbers = itertools.count()  # no two threads draw the same
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
        self.options = options_of_inductor() if fuses and is_static(self.module) else None
        self.run: Run | None = None  # takes its arguments in a list

    def key(self, given: Sequence[Any]) -> tuple[str, list[Tensor], list[Any]]:
        """The key of this graph from now on, and what of `given` an operator hands on: tensors, and sizes."""
        rest = [given[i] for i in self.places]
        self.is_size = [not isinstance(x, Tensor) for x in rest]
        key = f"{_process}-{next(_numbers)}"
        _held[key] = self
        tensors = [x for x in rest if isinstance(x, Tensor)]
        return key, tensors, [x for x in rest if not isinstance(x, Tensor)]

    def taking(self, given: Sequence[Any]) -> Callable[[Tensor], Tensor]:
        """The function, of all that the graph was given."""
        return self._function([given[i] for i in self.places])

    def _function(self, rest: list[Any]) -> Callable[[Tensor], Tensor]:
        if self.at < 0:
            before, after, used = rest, [], False
        else:
            before, after, used = rest[: self.at], rest[self.at :], True

        def function(z: Tensor) -> Tensor:
            args = [*before, z, *after] if used else [*before]
            found: Tensor = (self.run or self._made(args))(args)[0]
            return found

        return function

    def _made(self, args: list[Any]) -> Run:
        """What runs the graph, from its first call with `args` on."""
        if self.options is None:
            self.run = lambda args: self.module(*args)
        else:
            self.run = fused(self.module, args, self.options)
        return self.run


def held(key: str, tensors: Sequence[Tensor], sizes: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """The function that was kept under a key, of the tensors and sizes that go with it."""
    if key not in _held:
        raise RuntimeError("a graph with a solve was compiled in another process: it cannot be loaded, compile it here")
    graph, of_tensors, of_sizes = _held[key], iter(tensors), iter(sizes)
    return graph._function([next(of_sizes) if size else next(of_tensors) for size in graph.is_size])


def first_output(graph: fx.GraphModule) -> tuple[fx.GraphModule, list[int]]:
    """What computes the first output alone, and the places of the inputs that it reads."""
    own = fx.Graph()
    copies: dict[fx.Node, Any] = {}
    for node in graph.graph.nodes:
        if node.op != "output":
            copies[node] = own.node_copy(node, copies.__getitem__)
            continue
        returned: Any = node.args[0]
        value = copies[returned[0]]
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


def is_static(module: fx.GraphModule) -> bool:
    """Whether the shapes of what a graph reads are numbers, the same at every call."""
    inputs = [node.meta.get("val") for node in module.graph.nodes if node.op == "placeholder"]
    return all(isinstance(x, Tensor) and all(isinstance(n, int) for n in x.shape) for x in inputs)


def options_of_inductor() -> dict[str, Any]:
    """Its options as they are now: those given to torch.compile hold only while that traces."""
    from torch._inductor import config

    options: dict[str, Any] = config.get_config_copy()
    return options


def fused(module: fx.GraphModule, args: Sequence[Any], options: dict[str, Any]) -> Run:
    """The module as Inductor makes it with `options`."""
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses.functional_tensor import dispatch_functionalize
    from torch.fx.experimental.proxy_tensor import make_fx

    functional = make_fx(dispatch_functionalize(module), select_decomp_table(), tracing_mode="fake")(*args)
    inputs = [node.meta["val"] for node in functional.graph.nodes if node.op == "placeholder"]
    with config.patch(options):
        made: Any = compile_fx_inner(functional, inputs)
    called: Run = made.current_callable
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
