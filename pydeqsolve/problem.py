"""What is solved, and what the loop asks of a solver."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .layout import Layout
from .shards import WHOLE, Whole
from .step.ring import Method


@dataclass(eq=False)
class Problem:
    """z = fn(z, *inputs) for B samples. Calling it is the only way in which the library calls the user's function.

    Nothing in it changes; a frozen class would take longer to make than all that a solve checks.
    compact: fn may be given the unfinished samples alone. causal: fn takes the keyword `wanted` (`Front`). has_aux: fn
    returns a pair, its value and what is wanted at the solution alone.
    """

    fn: Callable[..., Any]
    inputs: Sequence[Tensor]  # (B, …) each
    layout: Layout
    compact: bool
    causal: bool = False
    has_aux: bool = False
    names: Sequence[str] = ()  # of the inputs, where they come from a nest
    split: Whole | None = None  # `shards`, where there are several
    eps: float | None = None  # machine epsilon of what fn computes in, where that is known

    @property
    def shards(self) -> Whole:
        """Who holds which features of the state; a default of the field would be in the compiler's way."""
        return WHOLE if self.split is None else self.split

    def __call__(self, z: Tensor, inputs: Sequence[Tensor], wanted: Tensor | None = None) -> Tensor:
        """f (n, T, D) at the flat state z (n, T, D) and its inputs (n, …); wanted (n, T) bool goes with `causal`."""
        return self.layout.pack(self.value(z, inputs, wanted), "the value of fn")

    def value(self, z: Tensor, inputs: Sequence[Tensor], wanted: Tensor | None = None) -> Any:
        """The same as fn returns it, in the structure and dtype of its own."""
        return self.value_of(self.layout.unpack(z), inputs, wanted)

    def value_of(self, state: Any, inputs: Sequence[Tensor], wanted: Tensor | None = None) -> Any:
        """The same at a state in the structure of z0."""
        found = self._call(state, inputs, wanted)
        return found[0] if self.has_aux else found

    def aux(self, z: Tensor, inputs: Sequence[Tensor]) -> Any:
        """The second of what fn returns with `has_aux`, at the flat state z (n, T, D) and its inputs (n, …)."""
        wanted = torch.ones(z.shape[:2], dtype=torch.bool, device=z.device) if self.causal else None
        return self._call(self.layout.unpack(z), inputs, wanted)[1]

    def _call(self, state: Any, inputs: Sequence[Tensor], wanted: Tensor | None) -> Any:
        named = {"wanted": wanted} if self.causal else {}
        found = self.fn(state, *inputs, **named)
        if self.has_aux and not (isinstance(found, tuple) and len(found) == 2):
            raise TypeError(f"fn must return (z, aux) with has_aux=True, got {type(found).__name__}")
        return found


class Solver(Protocol):
    """What the loop needs of a solver: its method, and the growth of the residual at which a step is refused."""

    @property
    def safeguard(self) -> float: ...

    def method(self) -> Method:
        """The member of the family of ring methods that this solver is."""
        ...
