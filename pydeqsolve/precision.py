"""The precision that a map computes in, which may be less than that of its state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def of_graph(f: Tensor, z: Tensor) -> float:
    """The largest machine epsilon among the dtypes through which f depends on the leaf z, from f's autograd graph.

    Casts inside the map are seen, those of autocast among them; what does not depend on z is not looked at. Under
    autocast a function that autograd cannot look into (compiled, or of one's own) is taken to use autocast's dtype.
    """
    coarsest, eps = z.dtype, torch.finfo(z.dtype).eps
    kind = z.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else z.dtype
    for node in _between(f, z):
        dtypes = [m.dtype for m in getattr(node, "_input_metadata", [])]
        dtypes += [autocast] if isinstance(node, torch.autograd.function.BackwardCFunction) else []
        for dtype in dtypes:
            if dtype.is_floating_point and torch.finfo(dtype).eps > eps:
                coarsest, eps = dtype, torch.finfo(dtype).eps
    return torch.finfo(coarsest).eps


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
