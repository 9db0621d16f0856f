"""What a tensor depends on, read off its autograd graph."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def leaves(x: Tensor) -> list[Tensor]:
    """The leaf tensors that require a gradient and that x depends on, each once.

    A function of one's own that carries a gradient past autograd (`torch.autograd.Function`) must name every tensor
    that receives one, also what a closure or a module reads: these are found from one evaluation. A leaf that this
    evaluation did not use is not among them. x itself is returned when it is such a leaf; without a graph, nothing is.

    Args:
        x: any tensor, of any shape.

    Raises:
        TypeError: x is not a tensor.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x: a tensor is required, got {type(x).__name__}")
    if x.grad_fn is None:
        return [x] if x.requires_grad else []
    found: dict[int, Tensor] = {}
    seen: set[Any] = set()
    stack: list[Any] = [x.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            found.setdefault(id(leaf), leaf)
        stack.extend(parent for parent, _ in node.next_functions)
    return list(found.values())
