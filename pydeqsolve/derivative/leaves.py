"""What a tensor depends on, read off its autograd graph."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor


def leaves(x: Tensor) -> list[Tensor]:
    """The leaf tensors that require a gradient and that x depends on, each once.

    A function of one's own that carries a gradient past autograd (`torch.autograd.Function`) must name every tensor
    that receives one, also what a closure or a module reads: these are found from one evaluation. A leaf that this
    evaluation did not use is not among them, nor is the state at which a solve takes its derivative. x itself is
    returned when it is such a leaf; without a graph, nothing is.

    Args:
        x: any tensor, of any shape.

    Raises:
        TypeError: x is not a tensor.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x: a tensor is required, got {type(x).__name__}")
    if x.grad_fn is None:
        return [x] if x.requires_grad else []
    return leaves_before(x, ())


def leaves_before(x: Tensor, until: Iterable[Any]) -> list[Tensor]:
    """The leaves of x, without those that only the nodes `until` lead to."""
    return leaves_among(nodes(x, until))


def leaves_among(behind: Iterable[Any]) -> list[Tensor]:
    """The leaves of a tensor, given the nodes of the graph behind it."""
    found: dict[int, Tensor] = {}
    passed: set[int] = set()
    for node in behind:
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            found[id(leaf)] = leaf
        elif hasattr(node, "state_leaf"):
            passed.add(id(node.state_leaf))  # where a solve takes its own derivative
    return [leaf for key, leaf in found.items() if key not in passed]


def nodes(x: Tensor, until: Iterable[Any] = ()) -> list[Any]:
    """The nodes of the autograd graph behind x, each once, without those in `until` and what only they lead to."""
    seen: set[Any] = {None, *until}
    stack: list[Any] = [x.grad_fn]
    found: list[Any] = []
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            found.append(node)
            stack += [parent for parent, _ in node.next_functions]
    return found
