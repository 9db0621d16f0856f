"""Which accelerated iterates may be gone to: those in the map's domain, and those that do not raise a merit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..step.backend import Backend
from ..step.records import MIX
from .batch import Batch
from .judge import SampleJudge, Verdict

EPS = torch.finfo(torch.float64).eps
ROUNDING = 64.0  # units of rounding of a merit, within which it is not raised

Question = Callable[..., Tensor]  # of (z, *inputs), in the structure of the state


class Gate:
    """Replaces accelerated iterates that are refused by the plain step f − (1−β) r, at no evaluation.

    A refused sample keeps its history: what was measured stays true, and the next residual adds to it. Its plain step
    is not asked about, nor held against it by the safeguard. merit is compared with that of the current iterate, and
    takes the place of the safeguard: on 500 starts of an EM map, growth of the residual beyond tenfold as well sent
    samples back that were on their way, 99 evaluations in the mean instead of 37.
    """

    def __init__(self, backend: Backend, admissible: Question | None, merit: Question | None, n: int) -> None:
        self.backend, self.admissible, self.merit = backend, admissible, merit
        device = backend.ring.R.device
        self.value = torch.zeros(n, dtype=torch.float64, device=device)  # (n,) merit of the current iterate
        self.known = torch.zeros(n, dtype=torch.bool, device=device)

    def passed(self, batch: Batch, judge: SampleJudge, verdict: Verdict, z_next: Tensor) -> Tensor:
        """z_next (n, T, D) with the refused samples' plain step; counts the rejections."""
        ring, rows = self.backend.ring, batch.rows
        accelerated = ((verdict.mode == MIX) & (ring.count[rows] > 1)).any(1)
        refused = torch.zeros_like(accelerated)
        if z_next.is_cpu and not bool(accelerated.any()):
            self.known = refused
            return z_next
        if self.admissible is not None:
            refused = accelerated & ~_claims(batch, self.admissible, "admissible", z_next)
        if self.merit is not None:
            refused = self._raised(batch, z_next, accelerated, refused)
        judge.samples["rejections"] = judge.samples["rejections"] + refused
        judge.samples["steps"] = torch.where(refused, judge.samples["steps"].clamp_max(1.0), judge.samples["steps"])
        plain = ring.F[rows, ring.head].double() - (1 - ring.damping) * ring.R[rows, ring.head].double()
        return torch.where(refused[:, None, None], plain.to(z_next.dtype), z_next)

    def _raised(self, batch: Batch, z_next: Tensor, accelerated: Tensor, refused: Tensor) -> Tensor:
        """The samples `refused` (n,), and those whose merit at z_next is NaN, or above that at the current iterate."""
        assert self.merit is not None
        now = self.value
        if not z_next.is_cpu or not bool(self.known.all()):
            now = torch.where(self.known, now, _merits(batch, self.merit, batch.z))
        value = _merits(batch, self.merit, z_next)
        refused = refused | (accelerated & (value.isnan() | (value - now > ROUNDING * EPS * now.abs())))
        self.value, self.known = value, accelerated & ~refused
        return refused

    def select(self, keep: Tensor) -> None:
        """Keeps the samples whose positions are in `keep` (k,)."""
        self.value, self.known = self.value[keep], self.known[keep]


def _claims(batch: Batch, question: Question, name: str, z: Tensor) -> Tensor:
    """(n,) bool: what is answered of z (n, T, D), by all shards."""
    shards = batch.problem.shards
    ask = lambda: _claim(batch.ask(question, name, z), name, len(z))  # noqa: E731
    return shards.everywhere(shards.attempt(ask, lambda: torch.ones(len(z), dtype=torch.bool, device=z.device)))


def _merits(batch: Batch, question: Question, z: Tensor) -> Tensor:
    """(n,) float64: the merit of z (n, T, D), the largest that a shard answers."""
    shards = batch.problem.shards
    ask = lambda: _merit(batch.ask(question, "merit", z), len(z))  # noqa: E731
    return shards.largest(shards.attempt(ask, lambda: torch.zeros(len(z), dtype=torch.float64, device=z.device)))


def _claim(answer: Any, name: str, n: int) -> Tensor:
    """`answer`, if it is one truth value per sample."""
    if not isinstance(answer, Tensor) or answer.dtype != torch.bool or answer.shape != (n,):
        raise TypeError(f"{name} must return a bool tensor ({n},), one per sample, got {_words(answer)}")
    return answer


def _merit(answer: Any, n: int) -> Tensor:
    """`answer` in float64, if it is one number per sample."""
    if not isinstance(answer, Tensor) or not answer.is_floating_point() or answer.shape != (n,):
        raise TypeError(f"merit must return a floating-point tensor ({n},), one per sample, got {_words(answer)}")
    return answer.double()


def _words(answer: Any) -> str:
    if isinstance(answer, Tensor):
        return f"{answer.dtype} of shape {tuple(answer.shape)}"
    return type(answer).__name__
