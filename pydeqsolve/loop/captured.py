"""The loop as an operator of a graph of torch.compile, which runs it as it runs outside of a graph.

The operator is given the graph of fn, and all that fn reads; nothing in the graph around it depends on data.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._higher_order_ops import BaseHOP
from torch._higher_order_ops.utils import materialize_as_graph

from .. import precision
from ..layout import Layout
from ..problem import Problem, Solver
from ..step.backend import Backend
from ..step.ring import Method
from ..stop import RTOL, Stop, is_left_open
from .batch import Batch
from .held import Held, held, is_inductor, is_traced
from .iterate import Outcome, loop
from .traced import tolerance

# Of the dispatch keys of this thread; asked for here, so that a torch without them is seen at the import.
LOCAL = torch._C._dispatch_tls_local_include_set, torch._C._dispatch_tls_local_exclude_set
MARKED = 3  # inputs that the function returns after its value: z, the table (5, B), the numbers

_library = torch.library.Library("pydeqsolve", "FRAGMENT")
_library.define(
    "solve(str graph, Tensor z, Tensor table, Tensor numbers, float eps, Tensor[] tensors, SymInt[] sizes, str norm, "
    "bool is_open, bool is_each) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.nondeterministic_seeded,),
)


@dataclass(frozen=True)
class _Chosen:
    """A solver by its numbers."""

    chosen: Method
    safeguard: float

    def method(self) -> Method:
        return self.chosen


class _Batch(Batch):
    """A batch of a graph, which neither writes to what it is given nor hides the precision, eps, it computes in."""

    def __init__(self, eps: float, problem: Problem, z0: Tensor, z: Tensor, backend: Backend) -> None:
        super().__init__(problem, z0, z, backend)
        self.eps = max(self.eps, eps)

    def evaluate(self, wanted: Tensor | None) -> Tensor:
        """f (n, T, D), contiguous, at the current iterates; the graph is given all samples."""
        if self.size == len(self.full):
            f: Tensor = self.problem.value_of(self.z, ())
            return f if f.is_contiguous() else f.contiguous()
        f = self.problem.value_of(self.full.index_copy(0, self.rows, self.z), ())
        return f[self.rows]

    def spare(self) -> Tensor:
        """As `Batch.spare`, where nobody else can hold a buffer."""
        z, before = self.z, self.before
        if not z.is_cpu:
            return super().spare()
        for buffer in self._buffers:
            if buffer is not z and buffer is not before and buffer.shape == z.shape:
                return buffer
        self._buffers = [*self._buffers[-2:], self.backend.buffer_like(z)]
        return self._buffers[-1]


def captured(problem: Problem, z0: Tensor, *, solver: Solver, stop: Stop) -> Outcome:
    """What `loop` finds, by one operator of a graph; `Outcome.steps` is a tensor (), int64, and there is no course."""
    method, B = solver.method(), z0.shape[0]
    is_each = isinstance(stop.rtol, Tensor) or isinstance(stop.atol, Tensor)
    table = torch.zeros(5, B, dtype=torch.float64, device=z0.device)
    chosen: list[Any] = [method.memory, method.damping, method.ridge, solver.safeguard, stop.max_steps]
    if is_each:
        table = torch.cat([tolerance(stop.rtol, z0)[None], tolerance(stop.atol, z0)[None], table[2:]])
    else:
        chosen += [0.0 if is_left_open(stop) else stop.rtol, stop.atol]
    numbers = torch.stack([torch.full((), float(x), dtype=torch.float64, device="cpu") for x in chosen])

    def fn(z: Tensor, table: Tensor, numbers: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        value = problem.value(z, inputs)
        eps = precision.of_value(value, z.dtype)
        if precision.is_autocast(z.device.type):
            eps = max(eps, torch.finfo(torch.get_autocast_dtype(z.device.type)).eps)
        f = problem.layout.pack(value, "the value of fn").clone()
        known = torch.full((), eps, dtype=torch.float64, device="cpu")
        return f, z.clone(), table.clone(), numbers.clone(), known

    options: dict[str, Any] = {"norm": stop.norm, "is_open": is_left_open(stop), "is_each": is_each}
    with torch.no_grad():
        _, z, table, numbers, _ = capture(fn, z0, table, numbers, *problem.inputs, **options)
    evaluations, status, rejections, losses = (x.long() for x in table[1:].unbind(0))
    return Outcome(
        z, table[0], evaluations, status, numbers[0].long(), rejections, losses, None, [], None, None, solver, stop
    )  # fmt: skip


class _Capture(BaseHOP):
    """capture(fn, z0, table, numbers, …): a solve of the map z, … ↦ fn(z, …)[0], in the order in which fn reads its
    inputs. fn returns its value and copies of the `MARKED` inputs, which tell where these are; in their places come z,
    the outcome, and how many steps it took."""

    def __init__(self) -> None:
        super().__init__("pydeqsolve_capture")

    def _call_Autograd(self, subgraph: Any, *operands: Any, **kwargs: Any) -> tuple[Tensor, ...]:  # noqa: N802
        return _captured(subgraph, operands, kwargs)

    def _call_Functionalize(self, ctx: Any, subgraph: Any, *operands: Any, **kwargs: Any) -> tuple[Tensor, ...]:  # noqa: N802
        given = ctx.unwrap_tensors(operands)
        with ctx.redispatch_to_next():
            found = _captured(subgraph, given, kwargs)
        wrapped: tuple[Tensor, ...] = ctx.wrap_tensors(found)
        return wrapped

    def _call_CompositeExplicitAutograd(self, subgraph: Any, *operands: Any, **kwargs: Any) -> tuple[Tensor, ...]:  # noqa: N802
        return _captured(subgraph, operands, kwargs)


capture = _Capture()


def _captured(graph: fx.GraphModule, operands: Sequence[Any], options: dict[str, Any]) -> tuple[Tensor, ...]:
    """What `capture` returns: by an operator where a compiler traces, else at once."""
    at = marked(graph, MARKED)
    given = [x.detach() if isinstance(x, Tensor) else x for x in operands]
    z, table, numbers = (given[i] for i in at)
    with torch.no_grad():
        if not is_traced(operands):
            eps = float(graph(*given)[-1])
            function = Held(graph, at[0], False).taking(given)
            found = _solve(function, z, table, numbers, eps, **options)
        else:
            own = materialize_as_graph(graph, tuple(given), LOCAL[0](), LOCAL[1]())
            returned: Any = own.graph.output_node().args[0]
            eps = float(returned[-1].args[1])  # of torch.full
            key, tensors, sizes = Held(own, at[0], is_inductor()).key(given)
            found = torch.ops.pydeqsolve.solve(key, z, table, numbers, eps, tensors, sizes, *options.values())
        return found[0].clone(), *found, torch.full((), eps, dtype=torch.float64, device="cpu")


def marked(fn: fx.GraphModule, count: int) -> list[int]:
    """The places of the inputs that fn returns copies of, `count` of them after its value."""
    inputs = [node for node in fn.graph.nodes if node.op == "placeholder"]
    returned: Any = fn.graph.output_node().args[0]
    return [inputs.index(node.all_input_nodes[0]) for node in returned[1 : 1 + count]]


def _solve(
    function: Any, z: Tensor, table: Tensor, numbers: Tensor, eps: float, norm: str, is_open: bool, is_each: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """z (B, T, D) of z = function(z), the outcome (5, B) as residual, evaluations, status, rejections and rank losses,
    and a copy of the numbers with that of steps as the first."""
    memory, damping, ridge, safeguard, steps, *rest = numbers.tolist()
    rtol, atol = (table[0], table[1]) if is_each else rest
    stop = Stop(RTOL if is_open else rtol, atol, int(steps), norm)
    solver = _Chosen(Method("anderson II", int(memory), damping, ridge), safeguard)
    problem = Problem(function, (), Layout.of(z, by_blocks=True), compact=False)
    found = loop(problem, z, solver=solver, stop=stop, of=functools.partial(_Batch, eps))
    counts = (found.evaluations, found.status, found.rejections, found.rank_losses)
    told = torch.stack([found.residual, *(x.double() for x in counts)])
    return found.z, told, torch.full_like(numbers, float(found.steps))


@torch.no_grad()
def _run(
    graph: str, z: Tensor, table: Tensor, numbers: Tensor, eps: float, tensors: list[Tensor], sizes: list[int],
    norm: str, is_open: bool, is_each: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`_solve` of the map that is held as `graph`."""
    return _solve(held(graph, tensors, sizes), z, table, numbers, eps, norm, is_open, is_each)


_library.impl("solve", _run, "CompositeExplicitAutograd")


@torch.library.register_fake("pydeqsolve::solve", lib=_library)
def _(graph: str, z: Tensor, table: Tensor, numbers: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(z), torch.empty_like(table), torch.empty_like(numbers)
