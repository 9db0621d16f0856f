"""Ragged batches: samples that are groups of rows of different number, such as the nodes of graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from .layout import Layout
from .loop.iterate import Outcome
from .memory import check_dense
from .stop import Stop

EMPTY = 2**20  # samples without rows, at most


@dataclass(frozen=True, eq=False)
class Segments:
    """Row i of N belongs to sample segments[i] of G, where it is number `place[i]` of `counts[segments[i]]`."""

    segments: Tensor  # (N,) int64, sorted
    place: Tensor  # (N,) int64
    counts: Tensor  # (G,) int64
    longest: int  # L, the most rows of a sample

    @staticmethod
    def of(segments: Any) -> Segments:
        """Raises TypeError or ValueError unless `segments` is a sorted (N,) int64 tensor of numbers from 0."""
        if not isinstance(segments, Tensor) or segments.dtype != torch.int64:
            got = segments.dtype if isinstance(segments, Tensor) else type(segments).__name__
            raise TypeError(f"segments must be an int64 tensor (N,), got {got}")
        check_dense("segments", segments)
        if segments.dim() != 1:
            raise ValueError(f"segments must have shape (N,), got {tuple(segments.shape)}")
        if len(segments) and (int(segments[0]) < 0 or bool((segments[1:] < segments[:-1]).any())):
            raise ValueError("segments must be sorted and non-negative: order the rows by sample")
        if len(segments) and int(segments[-1]) >= (most := len(segments) + EMPTY):
            raise ValueError(f"segments must be less than the number of rows + 2**20, {most}, got {int(segments[-1])}")
        counts = torch.bincount(segments)
        first = counts.cumsum(0) - counts
        place = torch.arange(len(segments), device=segments.device) - first[segments]
        return Segments(segments, place, counts, int(counts.max()) if len(counts) else 0)

    @property
    def share(self) -> Tensor:
        """(G,) float64: the square root of a sample's share of the L rows that it takes."""
        return (self.counts.double() / max(self.longest, 1)).sqrt()

    def tolerance(self, stop: Stop) -> Stop:
        """`stop` for samples in L rows each: a root mean square over L rows is `share` times that over its own."""
        if stop.norm != "rms" or (not isinstance(stop.atol, Tensor) and not stop.atol):
            return stop
        return replace(
            stop, atol=torch.as_tensor(stop.atol, dtype=torch.float64, device=self.share.device) * self.share
        )

    def told(self, callback: Callable[..., Any] | None, norm: str) -> Callable[..., Any] | None:
        """callback(step, z, residual) with the residual of the samples' own rows."""
        if callback is None:
            return None
        return lambda step, z, residual: callback(step, z, self._own(residual, norm))

    def measured(self, found: Outcome) -> Outcome:
        """An outcome with the residuals of the samples' own rows."""
        norm, trace = found.stop.norm, found.trace
        trace = None if trace is None else self._own(trace, norm)
        return found._replace(residual=self._own(found.residual, norm), trace=trace)

    def _own(self, residual: Tensor, norm: str) -> Tensor:
        """A residual (…, G) over L rows as one over the sample's own."""
        return residual / self.share.clamp_min(1e-300) if norm == "rms" else residual


@dataclass(frozen=True, eq=False)
class SegmentLayout(Layout):
    """Samples of up to L rows in (G, 1, L F): a sample's rows one after the other, then zeros, which stay zeros.

    So a sample's norms, inner products and weights are those of its own rows alone.
    """

    where: Segments | None = None

    @staticmethod
    def over(rows: Layout, where: Segments) -> SegmentLayout:
        """The layout of samples `where` over the rows (N, 1, F) of another layout."""
        if where.segments.device != rows.device:
            raise ValueError(f"segments must be on {rows.device} like z0, got {where.segments.device}")
        return SegmentLayout(**{field.name: getattr(rows, field.name) for field in fields(rows)}, where=where)

    @property
    def is_view(self) -> bool:
        return False

    def pack(self, tree: Any, name: str) -> Tensor:
        where, rows = self._where, super().pack(tree, name)
        N, G, F = len(where.segments), len(where.counts), rows.shape[2]
        if len(rows) != N:
            raise ValueError(f"{name} must have {N} rows like segments, got {len(rows)}")
        padded = torch.zeros(G, where.longest, F, dtype=rows.dtype, device=rows.device)
        return padded.index_put((where.segments, where.place), rows[:, 0]).reshape(G, 1, where.longest * F)

    def is_like(self, value: Any, state: Any) -> bool:
        return False

    def unpack(self, flat: Tensor) -> Any:
        where = self._where
        G, L = len(where.counts), where.longest
        return super().unpack(flat.reshape(G, L, -1 if L else 0)[where.segments, where.place][:, None])

    def stand_in(self, flat: Tensor, good: Tensor) -> Tensor:
        """The rows of good samples, over and over: the first good sample may have fewer rows than a place has."""
        where, (G, _, D) = self._where, flat.shape
        at, N = (where.segments, where.place), len(where.segments)
        rows, known = flat.reshape(G, where.longest, -1)[at], good[where.segments]
        order = (~known).to(torch.uint8).argsort(stable=True)  # the good rows first
        turn = torch.arange(N, device=flat.device) % known.sum().clamp_min(1)
        places = torch.zeros(G, where.longest, rows.shape[1], dtype=flat.dtype, device=flat.device)
        return places.index_put(at, rows[order[turn]]).reshape(G, 1, D)

    @property
    def _where(self) -> Segments:
        assert self.where is not None
        return self.where
