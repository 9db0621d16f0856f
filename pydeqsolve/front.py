"""The judgement of samples whose blocks finish one by one, from the front (`Front`)."""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops
from .monitor import RUNNING, Monitor
from .ops import ACCEPT, KEEP, MIX, REJECT
from .status import Status
from .stop import Front, Stop

BLOCK_COLUMNS = ("previous", "steps", "residual", "done", "rtol", "atol")  # csrc/judge.h, Block


class FrontMonitor(Monitor):
    """`Monitor` for n samples of T blocks each: a second table, blocks (n, T, len(BLOCK_COLUMNS)) float64.

    previous, residual: as last measured, residual 0 where a block was made exact. steps: since the block's last
    restart. done: finished, 0 or 1. open (n, T) bool: the blocks that the next step is to evaluate.
    """

    def __init__(self, n: int, T: int, front: Front, stop: Stop, dtype: torch.dtype, device: torch.device,
                 safeguard: float) -> None:  # fmt: skip
        super().__init__(n, stop, dtype, device, safeguard)
        self.front = front
        self.blocks = torch.zeros(n, T, len(BLOCK_COLUMNS), dtype=torch.float64, device=device)
        self._set("previous", torch.inf)
        self._set("residual", torch.inf)
        for name in ("rtol", "atol"):
            tolerance = getattr(stop, name)
            if isinstance(tolerance, Tensor):
                wide = tolerance.to(device, torch.float64)
                tolerance = wide[:, None] if wide.dim() == 1 else wide
            self._set(name, tolerance)
        self.open = self._open()

    def block(self, name: str) -> Tensor:
        """One column of the blocks, (n, T)."""
        return self.blocks[..., BLOCK_COLUMNS.index(name)]

    def _set(self, name: str, value: Tensor | float) -> None:
        self.blocks[..., BLOCK_COLUMNS.index(name)] = value

    def select(self, keep: Tensor) -> None:
        super().select(keep)
        self.blocks, self.open = self.blocks[keep], self.open[keep]

    def wanted(self) -> Tensor:
        """(n, T) bool: the unfinished blocks of the unfinished samples, at most `window` of them each."""
        return self.open

    def _open(self) -> Tensor:
        open_ = (self.block("done") == 0) & self.running[:, None]
        if self.front.window is not None:
            open_ = open_ & (open_.cumsum(1) <= self.front.window)
        return open_

    def judge_blocks(self, norms: Tensor, entries: int, wanted: Tensor) -> tuple[Tensor, Tensor | None, int | None]:
        """Takes in one measurement, norms (n, T, 2) of blocks of so many entries as `ops.measure` returns them.

        Returns mode (n, T); the blocks whose value is not finite, None where there is none; and how many samples have
        finished, None where counting would wait for the device.

        Blocks that finish together keep the z at which they were measured, so that their residuals are true of what is
        returned; a block that is the first unfinished one and finishes alone takes f, which is then exact.
        """
        native = ops.judge_front(
            self.table, self.blocks, norms, wanted, self.safeguard, self.front, self.stop.norm, entries
        )
        if native is not None:
            mode, broken, self.open, finished, some = native
            return mode, broken if some else None, finished
        if self.stop.norm != "max":
            norms = (norms / entries).sqrt() if self.stop.norm == "rms" else norms.sqrt()
        mode, broken = self._judge_blocks(norms[..., 0], norms[..., 1], wanted)
        self.open = self._open()
        return mode, broken, None

    def _judge_blocks(self, residual: Tensor, size: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """The rules, in the order of csrc/judge.h; residual and size (n, T)."""
        running = self.running
        finite = (residual < torch.inf) & (size < torch.inf)
        done, block_residual = self.block("done") != 0, torch.where(wanted, residual, self.block("residual"))
        tolerance = self.block("atol") + self.block("rtol") * size
        before = torch.nn.functional.pad(done, (1, 0), value=True)[:, :-1]
        first = before & ~done  # done is a leading run, so this is one block of each unfinished sample
        small = wanted & finite & ~(residual > self.front.margin * tolerance)
        run = (done | small).cumprod(1).bool() & ~done
        alone = (run.sum(1) <= 1)[:, None] & first & wanted & finite
        within = done | (wanted & finite & ~(residual > tolerance))
        within[:, -1] |= alone[:, -1]  # where others follow, they were measured at a z that is about to move
        converged = within.all(1) & running
        # When the rest converges as it stands, it stays as it was measured; only a last block may still move.
        whole = converged & ~(done | alone).all(1)
        finished = torch.where(whole[:, None], within, run & running[:, None]) & ~done
        accepted = alone & ~whole[:, None]
        if self.front.latest:
            accepted = accepted | (finished & wanted)
        self._set("residual", block_residual)
        measured = self._total()
        self._set("residual", torch.where(alone & accepted, 0.0, block_residual))
        done = done | accepted | finished
        self._set("done", done.double())

        previous, steps = self.block("previous").clone(), self.block("steps").clone()
        blew_up = wanted & (steps >= 2) & (self.safeguard > 0) & ~(residual <= self.safeguard * previous)
        lost = (first & wanted & ~finite).any(1)
        status = torch.where(lost, float(Status.NONFINITE), float(RUNNING))
        status = torch.where(converged, float(Status.CONVERGED), status)
        self["status"] = torch.where(running, status, self["status"])
        self["judged"] = running
        self["evaluations"] += running
        blew_up &= ~done & self.running[:, None] & (previous < torch.inf)
        self["rejections"] += blew_up.any(1)
        # Where the budget ends here, z is what was measured: an accepted block has not moved yet.
        total = torch.where(converged, self._total(), measured)
        self["best"] = self["residual"] = torch.where(running, total, self["residual"])
        self._set("previous", torch.where(wanted & finite, residual, previous))
        broken = wanted & ~finite & ~blew_up
        self._set("steps", torch.where(blew_up | ~wanted | broken, 0.0, steps + 1))
        mode = torch.where(blew_up, REJECT, torch.where(done | broken, KEEP, MIX))
        mode = torch.where(accepted & wanted, ACCEPT, mode)
        return torch.where(wanted, mode, KEEP).to(torch.uint8), broken

    def _total(self) -> Tensor:
        """The residual of whole samples (n,), of blocks as last measured; infinite before all were, and with a NaN."""
        of_blocks = self.block("residual").nan_to_num(torch.inf, torch.inf)
        if self.stop.norm == "max":
            return of_blocks.amax(1)
        squares = of_blocks.square()
        return (squares.mean(1) if self.stop.norm == "rms" else squares.sum(1)).sqrt()
