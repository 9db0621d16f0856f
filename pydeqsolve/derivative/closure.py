"""What a map reads besides its arguments, and is no leaf: tensors that it closes over, made before it was called."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..problem import Problem
from .leaves import nodes
from .linearise import Linearised, evaluate

GATE = "_GateBackward"  # autograd's name of implicit._Gate


@dataclass(frozen=True, eq=False)
class Closure:
    """Tensors with a graph of their own that fn reads from outside; `hidden`: there are others, not found."""

    tensors: list[Tensor]
    hidden: bool

    @staticmethod
    def of(problem: Problem, at: Linearised) -> Closure:
        """Of fn at z*. Its autograd graph tells whether there are any; then one more evaluation of fn finds them.

        Not found are those that are read past torch's Python functions alone, as by compiled code or torch.ops.
        """
        inputs = {x.grad_fn for x in at.good.inputs if x.grad_fn is not None}
        older = _older(nodes(at.f, inputs) if inputs else at.behind, at)
        shards = problem.shards
        if not shards.any_claims(bool(older)):
            return Closure([], hidden=False)
        with torch.enable_grad(), _Reading(older) as reading:
            shards.attempt(lambda: evaluate(problem, at.z, at.good.inputs), lambda: at.f)
        found = list(reading.found.values())
        known = inputs | {x.grad_fn for x in found}
        return Closure(found, bool(_older(nodes(at.f, known), at)))


def _older(behind: Iterable[Any], at: Linearised) -> set[Any]:
    """The nodes made before fn was called, as far as the thread that called it knows; leaves are of no time."""
    found = set()
    for node in behind:
        count = getattr(node, "_sequence_nr", None)
        earlier = count is not None and count() < at.begun and not hasattr(node, "variable")
        if earlier or type(node).__name__ == GATE:
            found.add(node)
    return found


class _Reading(TorchFunctionMode):
    """Collects arguments of torch's functions whose graph ends in one of the nodes `older`."""

    def __init__(self, older: set[Any]) -> None:
        super().__init__()
        self.older = older
        self.found: dict[int, Tensor] = {}

    def __torch_function__(self, fn: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            for x in tree_leaves((args, kwargs)):
                if isinstance(x, Tensor) and x.grad_fn is not None and x.grad_fn in self.older:
                    self.found.setdefault(id(x), x)
        return fn(*args, **kwargs or {})


@contextmanager
def cut(tensors: Sequence[Tensor]) -> Iterator[None]:
    """While it is entered, gradients reach the `tensors` and go no further."""
    stop = lambda grads: tuple(None if g is None else torch.zeros_like(g) for g in grads)  # noqa: E731
    hooks = [node.register_prehook(stop) for node in {x.grad_fn for x in tensors} if node is not None]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
