"""The precision that a map computes in, which may be less than that of its state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FIRST, LATE = 0, 20  # evaluations at which it may be looked into what a map computes in


def is_due(steps: int, device: torch.device) -> bool:
    """A map is looked into at its first evaluation under autocast, and once if it takes long, casting without."""
    return steps == LATE or (steps == FIRST and is_autocast(device.type))


def is_autocast(kind: str) -> bool:
    """Whether autocast is on for devices of a kind, some of which do not know it."""
    return (kind == "cpu" or torch.amp.is_autocast_available(kind)) and torch.is_autocast_enabled(kind)


@dataclass(frozen=True)
class Autocast:
    """The autocast state of a forward pass, for maps that are evaluated again in the backward pass."""

    device: str
    enabled: bool
    dtype: torch.dtype

    @staticmethod
    def of(z: Tensor) -> Autocast:
        kind = z.device.type
        return Autocast(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))

    def again(self) -> Any:
        return torch.autocast(self.device, dtype=self.dtype, enabled=self.enabled)


def of_value(value: Any, dtype: torch.dtype) -> float:
    """The largest machine epsilon of `dtype` and of the tensors in `value`."""
    if type(value) is Tensor and value.dtype == dtype:
        return torch.finfo(dtype).eps
    found = [value] if isinstance(value, Tensor) else tree_leaves(value)
    return max(torch.finfo(t).eps for t in (dtype, *(x.dtype for x in found if _has_eps(x))))


class Watch(TorchDispatchMode):
    """While it is entered: the largest machine epsilon, `eps`, of what is computed from z."""

    def __init__(self, z: Tensor) -> None:
        super().__init__()
        self.eps = torch.finfo(z.dtype).eps
        self.derived = {_memory(z)}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # telling the compiler to keep out imports it, which takes seconds

    def __torch_dispatch__(self, fn: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [_memory(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        result = fn(*args, **kwargs or {})
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if self.derived.isdisjoint(given):
            self.derived.difference_update(map(_memory, made))  # memory that is used again
        else:
            self.derived.update(map(_memory, made))
            self.eps = max(self.eps, *(torch.finfo(x.dtype).eps for x in made if _has_eps(x)), 0.0)
        return result


def _memory(x: Tensor) -> int:
    """What stands for the memory of x while it lives: views of one another share it."""
    try:
        return x.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse and opaque tensors have no storage of their own
        return id(x)


def _has_eps(x: Any) -> bool:
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def of_graph(f: Tensor, z: Tensor, behind: Sequence[Any]) -> float:
    """The largest machine epsilon among the dtypes through which f depends on the leaf z; behind: the nodes of f.

    Casts inside the map are seen, those of autocast among them; what does not depend on z is not looked at. Under
    autocast a function that autograd cannot look into (compiled, or of one's own) is taken to use autocast's dtype.
    """
    eps, kind = torch.finfo(z.dtype).eps, z.device.type
    autocast = torch.get_autocast_dtype(kind) if is_autocast(kind) else z.dtype
    if autocast is z.dtype and all(m.dtype is z.dtype for node in behind for m in getattr(node, "_input_metadata", ())):
        return eps

    def coarser(node: Any, dtypes: set[torch.dtype]) -> float:
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            dtypes.add(autocast)
        return max([eps, *(torch.finfo(t).eps for t in dtypes - {z.dtype} if t.is_floating_point or t.is_complex)])

    suspects = [node for node in behind if coarser(node, {m.dtype for m in getattr(node, "_input_metadata", ())}) > eps]
    if not suspects:
        return eps
    # Of an output without derivative, such as indices, a node holds no dtype but torch's default one.
    used = {(f.grad_fn, f.output_nr)} | {edge for node in behind for edge in node.next_functions}
    between = set(_between(f, z)).intersection(suspects)
    return max(
        (coarser(node, {m.dtype for k, m in enumerate(node._input_metadata) if (node, k) in used}) for node in between),
        default=eps,
    )


def _between(f: Tensor, z: Tensor) -> list[Any]:
    """The nodes of f's graph from which the leaf z can be reached."""
    order: list[Any] = []  # parents before children
    stack: list[tuple[Any, bool]] = [(f.grad_fn, False)]
    seen: set[Any] = set()
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node is not None and node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((parent, False) for parent, _ in node.next_functions)
    reach: set[Any] = set()
    for node in order:
        if getattr(node, "variable", None) is z or any(parent in reach for parent, _ in node.next_functions):
            reach.add(node)
    return [node for node in order if node in reach]
