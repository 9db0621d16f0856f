"""Who carries out the passes of a step: one object per ring, chosen once.

`measure` forms r = f − z, writes the newest row and the new Gram entries and returns the norms. `judge` and
`judge_blocks` say what becomes of each sample and block. `advance` solves the small systems and mixes the next iterate.
All work on the n samples still running, which `rows` maps to the B of the ring.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..memory import address
from ..stop import Front
from . import native, reference
from .records import Records
from .ring import COUPLINGS, KINDS, STORAGES, Ring
from .rules import Rule, judge_blocks, judge_samples, open_blocks


def choose(ring: Ring, rule: Rule | None = None, front: Front | None = None, fresh: bool = True) -> Backend:
    """The backend of a ring: native where device, size and build allow it, else `Backend`, the PyTorch reference.

    rule, front: how its measurements are judged; None is the root mean square, without a safeguard or a front. fresh:
    its tensors are as it made them. Warns once in a process when an installation lacks the native module.
    """
    native.warn_once()
    R = ring.R
    rule = Rule(0.0, ring.eps, "rms", R.shape[2] * R.shape[3]) if rule is None else rule
    if not fresh or type(R) is not Tensor:
        for name, x in ring.tensors().items():
            address(x, f"{name} of the history")
    numbers = native.layout(KINDS.index(ring.kind), ring.eps, STORAGES.index(ring.dtype), R.shape, R.stride())
    handle = native.bind(
        numbers, R, ring.F, ring.places, (COUPLINGS.index(ring.coupling), ring.ridge, ring.damping),
        native.ruled(rule, front, R.shape[2]), kept=False,
    )  # fmt: skip
    if handle is None:
        return Backend(ring, rule, front)
    if not R.is_cpu:
        return NativeCUDA(ring, rule, front, handle)
    return NativeCPU(ring, rule, front, handle)


class Backend:
    """The reference: every pass in PyTorch, on any device."""

    def __init__(self, ring: Ring, rule: Rule, front: Front | None = None) -> None:
        self.ring, self.rule, self.front = ring, rule, front

    def _turn(self) -> None:
        """The oldest row makes way for the newest."""
        self.ring.head = (self.ring.head + 1) % self.ring.slots

    def measure(self, f: Tensor, z: Tensor, rows: Tensor, wanted: Tensor | None) -> Tensor:
        """Pass 1. f, z (n, T, D) in the ring's dtype, contiguous; rows (n,) int64; wanted (n, T) bool or None.

        Returns norms (n, T, 2) float64, of r and of f: sums of squares, or maxima when the norm of the rule is "max";
        NaN or infinity in a block makes its norm NaN or infinite. Blocks that are not wanted return 0 and lose their
        history.
        """
        self._turn()
        return reference.measure(self.ring, f, z, rows, wanted, self.rule.norm)

    def sums(self, rows: Tensor) -> Tensor:
        """What the last `measure` summed over features, (n, T, K) float64: r·r, f·f, right-hand side, new Gram entries.

        K is 2 m + 2 where the Gram matrix is symmetric, 3 m + 2 for Anderson I, 4 m + 2 for Broyden's good update.

        The first half of a step reduces, the second (`advance`) reads nothing of other features: where these are held
        apart, each part measures its own, and `put_sums` takes the sums of all. Norms are summed, or maximised, alike.
        """
        squares, sums = (x[rows] for x in self._summed())
        count = self.ring.count[rows][..., None]
        valid = torch.arange(sums.shape[2], device=count.device) < count - 1  # (n, T, M - 1)
        sums = torch.where(valid[..., None], sums, 0.0).flatten(2)
        return torch.cat([torch.where(count > 0, squares, 0.0), sums], dim=-1)

    def put_sums(self, rows: Tensor, sums: Tensor) -> None:
        """Takes `sums` (n, T, K) in place of those of the last `measure`."""
        ring, M = self.ring, self.ring.slots
        kinds = 4 if ring.steps_gram is not None else 3 if ring.by_steps else 2
        ring.squares[rows] = sums[..., :2]
        rhs, row, *others = sums[..., 2:].unflatten(-1, (M - 1, kinds)).unbind(-1)
        column, *steps = others or [row]
        head, ages = ring.head, self._ages()
        ring.rhs[rows, :, : M - 1] = rhs
        pairs = [(ring.gram, row, column)]
        if ring.steps_gram is not None:
            pairs.append((ring.steps_gram, steps[0], steps[0]))
        for matrices, new_row, new_column in pairs:
            own = matrices[rows]
            own[:, :, head, ages], own[:, :, ages, head] = new_row, new_column
            matrices[rows] = own

    def _summed(self) -> tuple[Tensor, Tensor]:
        """squares (B, T, 2), and by age (B, T, M − 1, 2 to 4): right-hand side, new row of the Gram matrix, column of
        one that is not symmetric, new row of that of steps."""
        ring, head, ages = self.ring, self.ring.head, self._ages()
        found = [ring.rhs[..., : ring.slots - 1], ring.gram[:, :, head, ages]]
        if ring.by_steps:
            found.append(ring.gram[:, :, ages, head])
        if ring.steps_gram is not None:
            found.append(ring.steps_gram[:, :, head, ages])
        return ring.squares, torch.stack(found, dim=-1)

    def _ages(self) -> Tensor:
        """(M − 1,) int64: the slots of the differences, newest first."""
        M = self.ring.slots
        return (self.ring.head - torch.arange(M - 1, device=self.ring.gram.device)) % M

    def judge(self, samples: Records, norms: Tensor, dropped: Tensor | None) -> tuple[Tensor, int | None, int | None]:
        """Mode (n, T): MIX, REJECT, or KEEP when finished; samples finished, samples left behind.

        The counts are None where counting would wait for the device. norms (n, T, 2) are those of `measure`, dropped
        (n, T) what the step before dropped.
        """
        return judge_samples(samples, norms, dropped, self.rule), None, None

    def judge_blocks(
        self, samples: Records, blocks: Records, norms: Tensor, wanted: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor, int | None]:
        """Mode (n, T); the blocks (n, T) whose value is not finite, None where there is none; those to evaluate next
        (n, T); samples finished, None where counting would wait for the device."""
        assert self.front is not None
        mode, broken = judge_blocks(samples, blocks, norms, wanted, self.rule, self.front)
        return mode, broken, open_blocks(samples, blocks, self.front), None

    def keep(self, best: Tensor, rows: Tensor, before: Tensor, samples: Records) -> None:
        """best[rows] = before, for the samples that were left behind: a monotone solve copies nothing.

        best (B, T, D), before (n, T, D), rows (n,) int64.
        """
        left_behind = samples["left_behind"] != 0
        if before.is_cpu:
            at = left_behind.nonzero()[:, 0]
            best[rows[at]] = before[at]
        else:  # choosing rows by number would wait for the device
            best[rows] = torch.where(left_behind[:, None, None], before, best[rows])

    def advance(self, z: Tensor, mode: Tensor, rows: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Pass 2. Returns the next iterate (n, T, D) and how many differences each block dropped (n, T).

        z (n, T, D) the current iterate; mode (n, T) uint8 says what becomes of each block: KEEP z, MIX, REJECT the
        newest row (back to the value f of the row before), PLAIN f, or ACCEPT f without damping. out (n, T, D) may
        receive the iterate; it must not share memory with z.
        """
        count = self.ring.count[rows]
        gamma, dropped = reference.weights(self.ring, mode, rows)
        return reference.mix(self.ring, gamma, mode, z, rows, count), dropped

    def tell(self, left: Records) -> tuple[list[Tensor], int | None]:
        """best float64, then evaluations, status, rejections and rank_losses int64, (B,) each; how many samples did not
        converge, None where counting would wait for the device. left: the records of all samples."""
        counts = [left[name].long() for name in ("evaluations", "status", "rejections", "rank_losses")]
        return [left["best"].clone(), *counts], int((counts[1] != 0).sum()) if left.table.is_cpu else None

    def buffer_like(self, x: Tensor) -> Tensor:
        """An uninitialised tensor like x."""
        return torch.empty_like(x)

    def copy_of(self, x: Tensor) -> Tensor:
        """x in memory of its own."""
        return x.clone()


class Native(Backend):
    """What the kernels of both devices share."""

    def __init__(self, ring: Ring, rule: Rule, front: Front | None, handle: Any) -> None:
        super().__init__(ring, rule, front)
        self.handle = handle  # ring, rule and front as the native module takes them: numbers and addresses alone

    def measure(self, f: Tensor, z: Tensor, rows: Tensor, wanted: Tensor | None) -> Tensor:
        self._turn()
        _check(self.ring, f, z)
        wanted = None if wanted is None else wanted.contiguous()
        return native.measure_bound(self.handle, self.ring.head, f, z, rows, wanted)

    def judge(self, samples: Records, norms: Tensor, dropped: Tensor | None) -> tuple[Tensor, int | None, int | None]:
        return native.judge(self.handle, samples, norms, dropped)

    def advance(self, z: Tensor, mode: Tensor, rows: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        ring = self.ring
        return native.advance_bound(self.handle, ring.head, ring.slots, z, mode, rows, out)


class NativeCPU(Native):
    """The C++ kernels, on torch's threads."""

    def judge_blocks(
        self, samples: Records, blocks: Records, norms: Tensor, wanted: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor, int | None]:
        if self.front is not None and not self.front.strict:
            return super().judge_blocks(samples, blocks, norms, wanted)
        mode, broken, open_, finished, some = native.judge_blocks(self.handle, samples, blocks, norms, wanted)
        return mode, broken if some else None, open_, finished

    def step(
        self, f: Tensor, z: Tensor, rows: Tensor | None, wanted: Tensor | None, samples: Records, before: Tensor,
        best: Tensor, mode: Tensor, out: Tensor,
    ) -> tuple[int, int]:  # fmt: skip
        """`measure`, `judge` and `advance` at once: each sample passes through all three while in a core's cache.

        Writes the next iterate to out (n, T, D), which must share no memory with f and z; counts in `samples` what it
        drops. Copies the samples that are left behind from before (n, T, D), the iterate before z, to best (B, T, D):
        like f and z, contiguous and in the ring's dtype, which nobody checks. rows None: all samples, in order. Writes
        mode (n, T) uint8. Returns samples finished, samples left behind.
        """
        ring = self.ring
        ring.head = (ring.head + 1) % ring.slots
        wanted = None if wanted is None else wanted.contiguous()
        return native.step(self.handle, ring.head, f, z, rows, wanted, samples, before, best, mode, out)

    def leave(self, rows: Tensor | None, z: Tensor, samples: Records, best: Tensor, left: Records, ended: bool) -> None:
        """Stores what finished samples leave, with `ended` all: their records, to left, and z (n, T, D), where that is
        their best iterate, to best (B, T, D). What still runs at the end is given up for want of budget."""
        native.leave(self.handle, rows, z, samples, best, left.table, ended)

    def tell(self, left: Records) -> tuple[list[Tensor], int | None]:
        return native.tell(left.table)

    def buffer_like(self, x: Tensor) -> Tensor:
        """An uninitialised tensor like x, on large pages where it is that long."""
        return torch.empty_like(x) if x.nbytes < native.LARGE_PAGE else native.buffer_like(x)

    def copy_of(self, x: Tensor) -> Tensor:
        return on_the_host(x)


def on_the_host(x: Tensor) -> Tensor:
    """x in memory of its own, on large pages where it is that long."""
    return x.clone() if x.nbytes < native.LARGE_PAGE else native.buffer_like(x).copy_(x)


class NativeCUDA(Native):
    """The CUDA kernels, on the current stream."""

    def keep(self, best: Tensor, rows: Tensor, before: Tensor, samples: Records) -> None:
        native.keep(best, rows, before, samples)


def _check(ring: Ring, f: Tensor, z: Tensor) -> None:
    """Raises ValueError unless f and z are what the kernels will take them for: they get addresses alone.

    Whether memory lies there was checked where the tensors came from (`memory.address`); no address is a TypeError.
    """
    R, dtype, shape = ring.R, ring.dtype, f.shape
    _, _, T, D = R.shape
    if not (
        f.dtype == z.dtype == dtype and f.get_device() == z.get_device() == R.get_device()
        and f.is_contiguous() and z.is_contiguous() and not f.is_neg() and not z.is_neg()
    ):  # fmt: skip
        got = ", ".join(f"{name} {x.dtype} on {x.device}" for name, x in (("f", f), ("z", z)))
        raise ValueError(f"f and z must be contiguous {dtype} on {R.device}, got {got}")
    if shape != z.shape or len(shape) != 3 or shape[1] != T or shape[2] != D:
        raise ValueError(f"f and z must have shape (n, {T}, {D}), got {tuple(shape)}")
