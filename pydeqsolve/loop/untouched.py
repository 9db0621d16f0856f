"""Whether fn leaves alone what it is given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SOUGHT = 2  # calls of fn after which its argument is compared with a copy
SEEN = 4096  # entries of it, the leading ones


def _leading(x: Tensor) -> Tensor:
    """Of contiguous x, the entries in which writes are seen."""
    return x if x.numel() <= SEEN else x.view(-1)[:SEEN]


class Untouched:
    """What z (n, T, D), about to be given to fn, and the inputs are like; `check` says whether they still are.

    What is written past autograd, by z.data or z.numpy(), changes no version: in the first `SOUGHT` calls a copy tells.
    """

    def __init__(self, z: Tensor, inputs: Sequence[Tensor], call: int) -> None:
        self.z, self.version, self.inputs = z, z._version, inputs
        if inputs:  # those made in inference mode have no versions
            self.versions = [None if x.is_inference() else x._version for x in inputs]
        self.copy = _leading(z).clone() if call < SOUGHT and z.is_cpu else None

    def check(self) -> None:
        """Raises ValueError where fn has changed an argument."""
        if self.z._version != self.version:
            raise ValueError("fn must not change its argument z in place")
        for i, x in enumerate(self.inputs):
            if self.versions[i] is not None and x._version != self.versions[i]:
                raise ValueError(f"fn must not change its argument inputs[{i}] in place")
        if self.copy is not None:
            found = _leading(self.z)
            if not torch.equal(found, self.copy) and not torch.allclose(found, self.copy, 0, 0, equal_nan=True):
                raise ValueError("fn must not change its argument z in place, through z.data or z.numpy() either")
