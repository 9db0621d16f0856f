"""What is known of each sample and each block of a running solve: tables of doubles, one row each.

The native module reads and writes the same tables; it is loaded only if its columns are these.
"""

from __future__ import annotations

from torch import Tensor

KEEP, MIX, REJECT, PLAIN, ACCEPT = range(5)  # what becomes of a block; csrc/step.h, Mode
RUNNING = -1  # a status beside those of `Status`
SAMPLE = (  # csrc/judge.h, Sample
    "best", "previous", "flat", "steps", "status", "evaluations", "rejections", "rank_losses", "judged", "improved",
    "fresh", "left_behind", "residual", "rtol", "atol", "size", "recent", "recent_size", "earlier", "earlier_size",
    "unknowns", "floor",
)  # fmt: skip
BLOCK = ("previous", "steps", "residual", "done", "rtol", "atol")  # csrc/judge.h, Block


class Records:
    """A table (…, len(columns)) float64 whose columns have names.

    Of samples (`SAMPLE`): best, previous: residuals, least and last taken; size: ‖f‖ at the best. flat: steps without
    change. steps: since the last restart. status: RUNNING or a Status. judged: took part in the last measurement.
    improved: which was its best. fresh: its best iterate is the latest one. left_behind: its best iterate is the one
    before the latest. recent, earlier: best as it was at the last two powers of two of `evaluations`, with the sizes.
    unknowns: entries of the sample. floor: residuals within so much of ‖f‖ are rounding.
    Of blocks (`BLOCK`): previous, residual: as last measured, residual 0 where a block was made exact. steps: since
    the block's last restart. done: finished, 0 or 1.
    """

    def __init__(self, columns: tuple[str, ...], table: Tensor) -> None:
        self.columns, self.table = columns, table

    def __getitem__(self, name: str) -> Tensor:
        """One column, (n,) or (n, T), a view."""
        return self.table[..., self.columns.index(name)]

    def __setitem__(self, name: str, value: Tensor | float) -> None:
        self.table[..., self.columns.index(name)] = value

    @property
    def running(self) -> Tensor:
        """(n,) bool, of samples."""
        return self["status"] == RUNNING

    def select(self, keep: Tensor) -> None:
        """Keeps the samples whose positions are in `keep` (k,)."""
        self.table = self.table[keep]
