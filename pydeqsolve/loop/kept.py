"""What a solver has learnt of a map, kept from one solve for the next."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..step.ring import Method, Ring


@dataclass(eq=False)
class History:
    """The rows of a solve that has ended, per sample aligned to one head; made by `solve(..., keep_history=True)`.

    A solve that starts from it evaluates fn at `z` once more. What the map has changed there, δ = f_new(z) − f(z), is
    added to every stored row, which leaves the differences (the estimate of the Jacobian) as they are, up to the
    rounding of the rows. Where nothing has changed, δ = 0 and the solve goes on bit for bit as if it had never stopped,
    but for the best iterate, which it looks for anew. Takes 2 (memory + 1) + 1 words per entry of the state.
    """

    method: Method
    ring: Ring
    z: Tensor  # (B, T, D) last iterate, dtype of the ring
    since: Tensor  # (B,) float64, steps since the last restart
    heads: Tensor  # (B,) slot of each sample's newest row
    counts: Tensor  # (B, T) rows of each block when its sample finished
    open: Tensor  # (B,) bool, not finished yet
    segments: Tensor | None = None  # (N,) which rows were whose, where samples are groups of rows (`solve`)

    def __repr__(self) -> str:
        """One line: the method, and the shape of the last iterate as it lies in the ring."""
        return f"History({self.method}, z {tuple(self.z.shape)})"

    ranks: int = 1  # over which the Gram matrices were added up

    @staticmethod
    def begin(method: Method, ring: Ring, z0: Tensor) -> History:
        """The history of a solve that is about to start from z0 (B, T, D); samples are put into it as they leave."""
        B = z0.shape[0]
        since = torch.zeros(B, dtype=torch.float64, device=z0.device)
        heads = torch.full((B,), ring.head, dtype=torch.int64, device=z0.device)
        going = torch.ones(B, dtype=torch.bool, device=z0.device)
        return History(method, ring, z0.to(ring.dtype), since, heads, torch.zeros_like(ring.count), going)

    def note(self, rows: Tensor, running: Tensor) -> None:
        """Marks the place of the samples at `rows` (n,) in the ring, as long as they are `running` (n,) and once more.

        A finished sample may stay in the batch for a while (`Stop.check_every`), as the ring turns on without it.
        """
        open_ = self.open[rows]
        self.heads[rows] = torch.where(open_, self.ring.head, self.heads[rows])
        self.counts[rows] = torch.where(open_[:, None], self.ring.count[rows], self.counts[rows])
        self.open[rows] = open_ & running

    def take(self, at: Tensor, z: Tensor, since: Tensor, lost: Tensor) -> None:
        """Puts in the samples `at` (k,): their iterates z (k, T, D) and steps since (k,); `lost` (k,) have no rows."""
        self.z[at], self.since[at] = z, since
        self.counts[at] = torch.where(lost[:, None], 0, self.counts[at])

    def seal(self) -> History:
        """Itself, after turning every sample's rows so that the newest is at the head of the ring."""
        ring, M = self.ring, self.ring.slots
        ring.count.copy_(self.counts)
        turn = (torch.arange(M, device=self.heads.device) + self.heads[:, None] - ring.head) % M  # (B, M) old slots
        if bool((self.heads != ring.head).any()):
            each = torch.arange(len(self.heads), device=self.heads.device)
            ring.R, ring.F = (rows.transpose(0, 1)[turn.T, each].transpose(0, 1) for rows in (ring.R, ring.F))
            down, across = turn[:, None, :, None], turn[:, None, None, :]
            for name in ("gram", "steps_gram"):
                matrices = getattr(ring, name)  # (B, T, M, M)
                if matrices is not None:
                    matrices.copy_(torch.take_along_dim(torch.take_along_dim(matrices, down, 2), across, 3))
            self.heads = torch.full_like(self.heads, ring.head)
        return self

    def check(self, method: Method, z0: Tensor, ranks: int = 1) -> None:
        """Raises ValueError unless a solve by `method` of states like z0 (B, T, D), on so many ranks, can go on from
        here."""
        if method != self.method:
            raise ValueError(f"z0 holds the history of {self.method}, which {method} cannot use")
        if ranks != self.ranks:
            raise ValueError(
                f"z0 holds a history of {self.ranks} ranks, group has {ranks}: start from its z alone, z0=z0.z"
            )
        if self.z.shape != z0.shape or self.z.dtype != z0.dtype or self.z.device != z0.device:
            raise ValueError(
                f"z0 holds a history of shape {tuple(self.z.shape)} in {self.z.dtype} on {self.z.device}, "
                f"but the state is {tuple(z0.shape)} in {z0.dtype} on {z0.device}"
            )

    def fork(self) -> Ring:
        """A ring of its own for the next solve, with the newest row left out: it is about to be measured again."""
        ring = self.ring.clone()
        ring.head = (ring.head - 1) % ring.slots
        ring.count.sub_(1).clamp_(min=0)
        return ring

    def is_of(self, segments: Tensor | None) -> bool:
        """Whether the samples are those of `segments` (N,), of None where they are no groups of rows."""
        own = self.segments
        if own is None or segments is None:
            return own is segments
        return own.device == segments.device and torch.equal(own, segments)

    def shift(self, ring: Ring, f: Tensor) -> None:
        """Adds what the map has changed at `z`, where its value is now f (B, T, D), to the rows of `ring`, a fork."""
        newest = (ring.head + 1) % ring.slots
        known = (self.ring.count > 0)[..., None]  # (B, T, 1)
        wide = torch.promote_types(ring.dtype, torch.float32)
        change = f.to(wide) - ring.F[:, newest].to(wide)
        change = torch.where(
            known & change.isfinite(), change, 0.0
        )  # a map that has become NaN must not spoil the rows
        if not bool((change != 0).any()):
            return
        largest = torch.finfo(ring.dtype).max
        for rows in (ring.R, ring.F):
            for slot in range(ring.slots):
                rows[:, slot] = (rows[:, slot].to(wide) + change).clamp(-largest, largest).to(ring.dtype)
