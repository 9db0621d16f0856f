"""The judgement of samples whose blocks finish one by one, from the front (`Front`)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..step.backend import Backend
from ..step.records import BLOCK, Records
from ..step.rules import open_blocks
from ..stop import Front, Stop
from .batch import Batch
from .judge import SampleJudge, Verdict


class BlockJudge(SampleJudge):
    """`SampleJudge` for the T blocks of each sample, by `rules.judge_blocks`.

    Blocks that finish together keep the z at which they were measured, so that their residuals are true of what is
    returned; a block that is the first unfinished one and finishes alone takes f, which is then exact.
    """

    def __init__(self, B: int, T: int, front: Front, stop: Stop, backend: Backend) -> None:
        super().__init__(B, stop, backend)
        self.front = front
        device = self.samples.table.device
        self.blocks = Records(BLOCK, torch.zeros(B, T, len(BLOCK), dtype=torch.float64, device=device))
        self.blocks["previous"] = self.blocks["residual"] = torch.inf
        for name in ("rtol", "atol"):
            tolerance = getattr(stop, name)
            if isinstance(tolerance, Tensor):
                wide = tolerance.to(device, torch.float64)
                tolerance = wide[:, None] if wide.dim() == 1 else wide
            self.blocks[name] = tolerance
        self.open = open_blocks(self.samples, self.blocks, front)  # (n, T), those that the next step is to evaluate

    @property
    def tolerances(self) -> Records:
        return self.blocks

    def settle(self, eps: float) -> None:
        """A block may be exact, whatever its tolerance."""

    def leave(self, batch: Batch, leaving: Tensor, z: Tensor) -> None:
        self.left.table[batch.rows[leaving]] = self.samples.table[leaving]

    def wanted(self, T: int) -> Tensor:
        return self.open

    def judge(self, batch: Batch, f: Tensor, norms: Tensor, dropped: Tensor | None, wanted: Tensor | None) -> Verdict:
        assert wanted is not None
        mode, broken, self.open, finished = self.backend.judge_blocks(self.samples, self.blocks, norms, wanted)
        if broken is not None:  # rows of broken blocks would spoil the sums of later ones
            count = self.backend.ring.count
            count[batch.rows] = torch.where(broken, 0, count[batch.rows])
        return Verdict(mode, finished)

    def final(self, batch: Batch, leaving: Tensor, mode: Tensor, ended: bool) -> tuple[Tensor, Tensor]:
        return leaving, batch.z if ended else self.backend.advance(batch.z, mode, batch.rows)[0]

    def select(self, keep: Tensor) -> None:
        super().select(keep)
        self.blocks.select(keep)
        self.open = self.open[keep]
