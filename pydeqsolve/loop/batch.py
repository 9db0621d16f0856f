"""The samples still running, and what the finished ones left: compaction lives here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import precision
from ..memory import address, is_let_go
from ..problem import Problem
from ..step import native
from ..step.backend import Backend
from ..step.records import Records
from .untouched import Untouched


class Batch:
    """n samples still running, which `rows` maps to the B of all.

    size: n. inputs: (n, …) each, when the problem is compact. z: (n, T, D), the current iterate.
    before: the one before it. full: (B, T, D), finished samples; of the others the iterate of least residual that has
    been left behind, else z0. eps: the largest machine epsilon that fn was seen to compute with.
    """

    def __init__(self, problem: Problem, z0: Tensor, z: Tensor, backend: Backend) -> None:
        self.problem, self.backend = problem, backend
        self.size = z0.shape[0]
        self.mapped: Tensor | None = None  # (n,) int64, `rows`; None as long as nobody has left
        self.inputs = list(problem.inputs)
        # In memory of its own, so that fn cannot reach what it comes from.
        self.z = self.before = backend.copy_of(z)
        self.full = backend.copy_of(z0)
        self._begins_as: Tensor | None = self.full if z is z0 else None  # what z was before anybody could write to it
        self._buffers = [self.z]
        self._calls = self._asked = 0  # of fn, of others
        self.eps = problem.eps or torch.finfo(z.dtype).eps

    @property
    def rows(self) -> Tensor:
        """(n,) int64, where the samples still running are among the B of all."""
        if self.mapped is None:
            self.mapped = torch.arange(self.size, device=self.z.device)
        return self.mapped

    @property
    def _partial(self) -> bool:
        """fn sees all samples, of which some have finished."""
        return not self.problem.compact and self.size != self.full.shape[0]

    def evaluate(self, wanted: Tensor | None) -> Tensor:
        """f at the current iterates, contiguous; wanted (n, T) bool: the blocks that are needed of it.

        It is (n, T, D), or of the same entries as fn returned them, (n, …): a view takes longer than a pass.
        """
        z, asked, problem = self.z, None, self.problem
        partial = self.mapped is not None and self._partial
        if partial:
            z = self.full.index_copy(0, self.rows, z)
        if wanted is not None and problem.causal:
            asked = wanted.clone()  # a copy: fn may write into it
            if partial:
                none = torch.zeros(self.full.shape[:2], dtype=torch.bool, device=z.device)
                asked = none.index_copy(0, self.rows, asked)
        call, self._calls = self._calls, self._calls + 1
        given = Untouched(z, self.inputs, call, "fn", problem.names, self._begins_as)
        self._begins_as = None
        state = problem.layout.unpack(z)
        looked_into = problem.eps is None and (call == precision.FIRST or call == precision.LATE)
        if looked_into and precision.is_due(call, z.device):
            with precision.Watch(z) as watch:
                value = problem.value_of(state, self.inputs, asked)
            self.eps = max(self.eps, watch.eps)
        else:
            value = problem.value_of(state, self.inputs, asked)
            if looked_into and call == precision.FIRST:
                self.eps = precision.of_value(value, z.dtype)
        given.check()
        if not problem.layout.is_like(value, state):
            value = problem.layout.pack(value, "the value of fn")
            if value.shape[0] != z.shape[0]:
                raise ValueError(
                    f"the value of fn must have {z.shape[0]} samples like its argument, got {value.shape[0]}"
                )
            address(value, "the value of fn")
        return value[self.rows] if partial else value

    def ask(self, question: Callable[..., Any], name: str, z: Tensor) -> Any:
        """question(z, *inputs) of the samples that fn sees, for the n of z (n, T, D) alone; z is not to be changed."""
        partial = self._partial
        seen = self.full.index_copy(0, self.rows, z) if partial else z
        given = Untouched(seen, self.inputs, self._asked, name, self.problem.names)
        self._asked += 1
        answer = question(self.problem.layout.unpack(seen.clone()), *self.inputs)
        given.check()
        usable = partial and isinstance(answer, Tensor) and answer.dim() > 0 and len(answer) == len(seen)
        return answer[self.rows] if usable else answer

    def store(self, at: Tensor, z: Tensor) -> None:
        """Stores the final iterates z (n, T, D) of the samples `at` (n,) bool."""
        self.full[self.rows[at]] = z[at]

    def select(self, keep: Tensor) -> None:
        """Keeps the samples whose positions are in `keep` (k,)."""
        self.mapped, self.z, self.size = self.rows[keep], self.z[keep], keep.numel()
        self.before = self.z
        if self.problem.compact:
            self.inputs = [x[keep] for x in self.inputs]

    def close_up(self, k: int, samples: Records, z_next: Tensor) -> Tensor:
        """`select` of the k samples that still run, on the host, their records included; their z_next (k, T, D)."""
        if self.problem.compact and self.inputs:
            stay = samples.running.nonzero()[:, 0]
            self.inputs = [x[stay] for x in self.inputs]
        parts = [self.rows, self.z, z_next, samples.table]
        self.mapped, self.z, z_next, samples.table = native.close_up(samples, k, parts)
        self.before, self.size = self.z, k
        return z_next

    def move(self, z: Tensor) -> None:
        """Goes to the next iterates z (n, T, D)."""
        self.before, self.z = self.z, z

    def current(self, there: Tensor | None = None) -> Tensor:
        """The current iterate of all samples (B, T, D); where `there` (n,) is false, what is stored of them."""
        z = self.z
        if there is not None:
            z = torch.where(there[:, None, None], z, self.full[self.rows])
        return self.full.index_copy(0, self.rows, z)

    def spare(self) -> Tensor:
        """A buffer for the next iterate that nobody looks at any more; fresh memory costs more than the step itself."""
        if not self.z.is_cpu:  # another stream may still read what Python has let go
            return torch.empty_like(self.z)
        for buffer in self._buffers:
            unused = buffer is not self.z and buffer is not self.before and buffer.shape == self.z.shape
            if unused and is_let_go(buffer):
                return buffer
        buffer = self.backend.buffer_like(self.z)
        self._buffers.append(buffer)
        del self._buffers[:-3]
        return buffer
