"""Whether the user's functions leave alone what they are given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SOUGHT = 2  # calls of fn after which its argument is compared with a copy
SEEN = 4096  # entries of it, the leading ones


def _leading(x: Tensor) -> Tensor:
    """Of contiguous x, the entries in which writes are seen."""
    return x if x.numel() <= SEEN else x.view(-1)[:SEEN]


def _first(x: Tensor) -> Tensor:
    """Of an input x (n, …), which need not be contiguous, the samples in which writes are seen: one at least."""
    return x[: max(1, SEEN * x.shape[0] // max(1, x.numel()))]


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) or torch.allclose(a, b, 0, 0, equal_nan=True)


class Untouched:
    """What z (n, T, D), about to be given to a function, and the inputs are like; `check` says whether they still are.

    What is written past autograd, by z.data or z.numpy(), changes no version, and inputs made in inference mode have
    none: in the first `SOUGHT` calls a copy tells. who: the function. names: of the inputs, where they are not a row.
    like: a copy of z that there is already.
    """

    def __init__(
        self, z: Tensor, inputs: Sequence[Tensor], call: int, who: str = "fn", names: Sequence[str] = (),
        like: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.who, self.names = who, names
        self.z, self.version, self.inputs = z, z._version, inputs
        self.versions = [None if x.is_inference() else x._version for x in inputs] if inputs else ()
        self.copies: dict[int, Tensor] = {}
        self.copy: Tensor | None = None
        if call < SOUGHT:
            if None in self.versions:
                unseen = [i for i, version in enumerate(self.versions) if version is None]
                self.copies = {i: _first(inputs[i]).clone() for i in unseen}
            if z.is_cpu:
                self.copy = _leading(z).clone() if like is None else _leading(like)

    def check(self) -> None:
        """Raises ValueError where the function has changed an argument."""
        if self.z._version != self.version:
            raise ValueError(f"{self.who} must not change its argument z in place")
        for i, version in enumerate(self.versions):
            x, copy = self.inputs[i], None if version is not None else self.copies.get(i)
            if (version is not None and x._version != version) or (copy is not None and not _equal(_first(x), copy)):
                name = self.names[i] if self.names else f"inputs[{i}]"
                raise ValueError(f"{self.who} must not change its argument {name} in place")
        if self.copy is not None and not _equal(_leading(self.z), self.copy):
            raise ValueError(f"{self.who} must not change its argument z in place, through z.data or z.numpy() either")
