"""Per-sample judgement of a running solve: converged, stalled, diverged, non-finite, or a step to be refused.

Everything here is a tensor over the n samples at hand; nothing is read back to the host, so that the loop can look at
the flags as late as it likes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import ops
from .ops import KEEP, MIX, REJECT
from .ring import Ring
from .status import Status
from .stop import Stop

FLAT_STEPS = 10  # steps without change after which a residual is called stalled
ROUNDING = 8.0  # residuals within so many units of rounding of ‖f‖ cannot be improved on
GROWTH = 2.0**104  # of the residual, that float64 does not recover from
RUNNING = -1
COLUMNS = (  # csrc/judge.h, Record
    "best", "previous", "flat", "steps", "status", "evaluations", "rejections", "rank_losses", "judged", "improved",
    "fresh", "left_behind", "residual", "rtol", "atol", "size", "recent", "recent_size", "earlier", "earlier_size",
    "unknowns", "floor",
)  # fmt: skip


def precision(dtype: torch.dtype, device: torch.device) -> float:
    """The unit of rounding that fn computes in: that of the state, or of autocast where that is on and coarser."""
    eps = torch.finfo(dtype).eps
    kind = device.type
    if dtype == torch.float64 or not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return eps
    return max(eps, torch.finfo(torch.get_autocast_dtype(kind)).eps)


def _rows(n: int, row: list[float], device: torch.device) -> Tensor:
    """n times the same row, (n, len(row)) float64; nothing is copied to a device, which might wait for it."""
    if device.type == "cpu":
        return torch.tensor(row, dtype=torch.float64, device=device).repeat(n, 1)
    table = torch.zeros(n, len(row), dtype=torch.float64, device=device)
    for i, value in enumerate(row):
        if value:
            table[:, i] = value
    return table


class Monitor:
    """What is known of n samples: a table (n, len(COLUMNS)) float64, one row per sample.

    best, previous: residuals, least and last taken; size: ‖f‖ at the best. flat: steps without change. steps: since the
    last restart. status: RUNNING or a Status. judged: took part in the last measurement. improved: which was its best.
    fresh: its best iterate is the latest one. left_behind: its best iterate is the one before the latest. recent,
    earlier: best as it was at the last two powers of two of `evaluations`, with the sizes. unknowns: entries of the
    sample. floor: residuals within so much of ‖f‖ are rounding.
    """

    def __init__(
        self, n: int, stop: Stop, dtype: torch.dtype, device: torch.device, safeguard: float, unknowns: int = 0
    ) -> None:
        self.stop, self.safeguard = stop, safeguard
        self.eps = torch.finfo(dtype).eps
        first = dict.fromkeys(("best", "previous", "residual", "recent", "earlier"), math.inf)
        first |= {"status": RUNNING, "unknowns": unknowns, "floor": ROUNDING * precision(dtype, device)}
        first |= {name: t for name in ("rtol", "atol") if not isinstance(t := getattr(stop, name), Tensor)}
        self.table = _rows(n, [float(first.get(name, 0.0)) for name in COLUMNS], device)
        for name in ("rtol", "atol"):
            tolerance = getattr(stop, name)
            if isinstance(tolerance, Tensor) and tolerance.dim() < 2:
                self[name] = tolerance.to(device, torch.float64)

    def __getitem__(self, name: str) -> Tensor:
        """One column, (n,)."""
        return self.table[:, COLUMNS.index(name)]

    def __setitem__(self, name: str, value: Tensor | float) -> None:
        self.table[:, COLUMNS.index(name)] = value

    @property
    def running(self) -> Tensor:
        """(n,) bool."""
        return self["status"] == RUNNING

    def select(self, keep: Tensor) -> None:
        """Keeps the samples whose positions are in `keep` (k,)."""
        self.table = self.table[keep]

    def judge(self, norms: Tensor, dropped: Tensor | None, entries: int) -> tuple[Tensor, int | None, int | None]:
        """Takes in one measurement, norms (n, T, 2) of r and f as `ops.measure` returns them.

        Returns mode (n, T): MIX, REJECT, or KEEP when finished; and how many samples are finished and how many are
        left behind, None where counting would wait for the device. dropped (n, T) is what the step before dropped.
        """
        rule = (self.safeguard, self.eps, self._entries(entries), self.stop.norm == "max")
        native = ops.judge(self.table, norms, dropped, *rule)
        if native is not None:
            return native
        totals = norms.amax(1) if self.stop.norm == "max" else (norms.sum(1) / rule[2]).sqrt()
        lost = (dropped > 0).any(1) if dropped is not None else torch.zeros_like(self.running)
        mode = self._judge(totals[:, 0], totals[:, 1], lost)
        return mode[:, None].expand(-1, norms.shape[1]).contiguous(), None, None

    def step(
        self, ring: Ring, f: Tensor, z: Tensor, rows: Tensor, wanted: Tensor | None, entries: int,
        before: Tensor | None, best: Tensor | None, out: Tensor,
    ) -> tuple[Tensor, int, int]:  # fmt: skip
        """`ops.measure`, `judge` and `ops.advance` at once, where `ops.can_step` says so; the result is judge's."""
        rule = (self.safeguard, self._entries(entries), self.stop.norm == "max")
        return ops.step(ring, f, z, rows, wanted, self.table, *rule, before, best, out)

    def _entries(self, entries: int) -> float:
        return float(entries if self.stop.norm == "rms" else 1)

    def _judge(self, residual: Tensor, size: Tensor, lost: Tensor) -> Tensor:
        """The rules, in the order of csrc/judge.h; residual, size and lost (n,)."""
        running, previous, steps = self.running, self["previous"].clone(), self["steps"].clone()
        finite = (residual < torch.inf) & (size < torch.inf)  # a size that overflows would excuse any residual
        converged = finite & ~(residual > self["atol"] + self["rtol"] * size)
        accelerated = (steps >= 2) & (self.safeguard > 0)
        blew_up = accelerated & ~(finite & (residual <= self.safeguard * previous)) & running
        improved = finite & (residual < self["best"]) & running
        unchanged = (residual - previous).abs() <= 4 * self.eps * residual
        at_floor = residual <= self["floor"] * size
        best = torch.where(improved, residual, self["best"])
        exploded = previous > 1e3 * best
        flat = torch.where((unchanged | at_floor) & ~improved, self["flat"] + 1, 0.0)

        # A causal map may pass its residual on, unchanged, through as many steps as there are unknowns.
        stalled = flat >= FLAT_STEPS + torch.where(at_floor, 0.0, self["unknowns"])
        status = torch.where(stalled, float(Status.STALLED), float(RUNNING))
        status = torch.where(finite & ~blew_up & (residual > best * GROWTH), float(Status.DIVERGED), status)
        broken = torch.where(exploded, float(Status.DIVERGED), float(Status.NONFINITE))
        status = torch.where(finite | blew_up, status, broken)
        status = torch.where(converged, float(Status.CONVERGED), status)
        status = torch.where(running, status, self["status"])
        going = status == RUNNING
        # What is returned is the iterate that met the tolerance, even where ‖f‖ was smaller before.
        met = running & converged
        improved, best = improved | met, torch.where(met, residual, best)
        fresh = self["fresh"] != 0
        changes = {
            "best": best,
            "previous": torch.where(running & finite & ~blew_up, residual, previous),
            "flat": torch.where(running, flat, self["flat"]),
            "steps": torch.where(running, torch.where(blew_up, 0.0, steps + 1), steps),
            "status": status,
            "evaluations": self["evaluations"] + running,
            "rejections": self["rejections"] + (blew_up & going),
            "rank_losses": self["rank_losses"] + lost,
            "judged": running,
            "improved": improved,
            "left_behind": fresh & ~improved & running,
            "fresh": torch.where(running, improved, fresh),
            "residual": residual,
            "size": torch.where(improved, size, self["size"]),
        }
        for name, value in changes.items():
            self[name] = value
        self._mark(running)
        return torch.where(going, torch.where(blew_up, REJECT, MIX), KEEP).to(torch.uint8)

    def _mark(self, running: Tensor) -> None:
        """Moves recent to earlier and best to recent, at every evaluation whose number is a power of two."""
        count = self["evaluations"].long()
        now = running & ((count & (count - 1)) == 0)
        for old, new in (("earlier", "recent"), ("earlier_size", "recent_size"), ("recent", "best"),
                         ("recent_size", "size")):  # fmt: skip
            self[old] = torch.where(now, self[new], self[old])

    def expire(self) -> None:
        """Ends what is still running for want of budget: MAX_STEPS, or DIVERGED when the residual had grown a lot."""
        grown = (self["previous"] > 1e6 * self["best"]) & (self["previous"] < torch.inf)
        ended = torch.where(grown, float(Status.DIVERGED), float(Status.MAX_STEPS))
        self["status"] = torch.where(self.running, ended, self["status"])
