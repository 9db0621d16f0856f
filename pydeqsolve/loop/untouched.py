"""Whether fn leaves alone what it is given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SOUGHT = 2  # calls of fn after which its argument is compared with a copy
SEEN = 4096  # entries of it, the leading ones


def version(x: Tensor) -> int | None:
    """How often x was changed in place, or None where nobody counts."""
    return None if x.is_inference() else x._version


class Untouched:
    """What z (n, T, D), about to be given to fn, and the inputs are like; `check` says whether they still are.

    What is written past autograd, by z.data or z.numpy(), changes no version: of the first `SOUGHT` calls a copy tells.
    """

    def __init__(self, z: Tensor, inputs: Sequence[Tensor], call: int) -> None:
        self.given = (z, *inputs)
        self.versions = [version(x) for x in self.given]
        self.copy = z.view(-1)[:SEEN].clone() if call <= SOUGHT and z.is_cpu else None

    def check(self) -> None:
        """Raises ValueError where fn has changed an argument."""
        for i, (x, before) in enumerate(zip(self.given, self.versions, strict=True)):
            if before is not None and x._version != before:
                name = f"inputs[{i - 1}]" if i else "z"
                raise ValueError(f"fn must not change its argument {name} in place")
        if self.copy is not None:
            found = self.given[0].view(-1)[:SEEN]
            if not torch.equal(found, self.copy) and not torch.allclose(found, self.copy, 0, 0, equal_nan=True):
                raise ValueError("fn must not change its argument z in place, through z.data or z.numpy() either")
