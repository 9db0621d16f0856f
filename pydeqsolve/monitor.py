"""Per-sample judgement of a running solve: converged, stalled, diverged, non-finite, or a step to be refused.

Everything here is a tensor over the n samples at hand; nothing is read back to the host, so that the loop can look at
the flags as late as it likes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops
from .ops import ACCEPT, KEEP, MIX, REJECT
from .ring import Ring
from .solution import Status
from .stop import Front, Stop

FLAT_STEPS = 10  # steps without change after which a residual is called stalled
ROUNDING = 8.0  # residuals within so many units of rounding of ‖f‖ cannot be improved on
RUNNING = -1
COLUMNS = (  # csrc/judge.h, Record
    "best", "previous", "flat", "steps", "status", "evaluations", "rejections", "rank_losses", "judged", "improved",
    "fresh", "left_behind", "residual", "rtol", "atol",
)  # fmt: skip


class Monitor:
    """What is known of n samples: a table (n, len(COLUMNS)) float64, one row per sample.

    best, previous: residuals. flat: steps without change. steps: since the last restart. status: RUNNING or a Status.
    judged: took part in the last measurement. improved: which was its best. fresh: its best iterate is the latest one.
    left_behind: its best iterate is the one before the latest.
    """

    def __init__(self, n: int, stop: Stop, dtype: torch.dtype, device: torch.device, safeguard: float) -> None:
        self.stop, self.safeguard = stop, safeguard
        self.eps = torch.finfo(dtype).eps
        self.table = torch.zeros(n, len(COLUMNS), dtype=torch.float64, device=device)
        self["best"] = self["previous"] = self["residual"] = torch.inf
        self["status"] = RUNNING
        for name in ("rtol", "atol"):
            tolerance = getattr(stop, name)
            if not isinstance(tolerance, Tensor):
                self[name] = tolerance
            elif tolerance.dim() < 2:
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
        self, ring: Ring, f: Tensor, z: Tensor, rows: Tensor, wanted: Tensor | None, entries: int, out: Tensor
    ) -> tuple[Tensor, int, int]:
        """`ops.measure`, `judge` and `ops.advance` at once, where `ops.can_step` says so; the result is judge's."""
        is_max = self.stop.norm == "max"
        return ops.step(ring, f, z, rows, wanted, self.table, self.safeguard, self._entries(entries), is_max, out)

    def _entries(self, entries: int) -> float:
        return float(entries if self.stop.norm == "rms" else 1)

    def _judge(self, residual: Tensor, size: Tensor, lost: Tensor) -> Tensor:
        """The rules, in the order of csrc/judge.h; residual, size and lost (n,)."""
        running, previous, steps = self.running, self["previous"].clone(), self["steps"].clone()
        finite = residual < torch.inf
        converged = residual <= self["atol"] + self["rtol"] * size
        accelerated = (steps >= 2) & (self.safeguard > 0)
        blew_up = accelerated & ~(finite & (residual <= self.safeguard * previous)) & running
        improved = (residual < self["best"]) & running
        unchanged = (residual - previous).abs() <= 4 * self.eps * residual
        at_floor = (residual <= ROUNDING * self.eps * size) & ~improved
        best = torch.where(improved, residual, self["best"])
        exploded = previous > 1e3 * best
        flat = torch.where(unchanged | at_floor, self["flat"] + 1, 0.0)

        status = torch.where(flat >= FLAT_STEPS, float(Status.STALLED), float(RUNNING))
        status = torch.where(finite & (residual > best / self.eps**2), float(Status.DIVERGED), status)
        broken = torch.where(exploded, float(Status.DIVERGED), float(Status.NONFINITE))
        status = torch.where(finite | blew_up, status, broken)
        status = torch.where(converged & finite, float(Status.CONVERGED), status)
        status = torch.where(running, status, self["status"])
        going = status == RUNNING
        # What is returned is the iterate that met the tolerance, even where ‖f‖ was smaller before.
        met = running & converged & finite
        improved, best = improved | met, torch.where(met, residual, best)
        fresh = self["fresh"] != 0
        changes = {
            "best": best,
            "previous": torch.where(running & finite, residual, previous),
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
        }
        for name, value in changes.items():
            self[name] = value
        return torch.where(going, torch.where(blew_up, REJECT, MIX), KEEP).to(torch.uint8)

    def expire(self) -> None:
        """Ends what is still running for want of budget: MAX_STEPS, or DIVERGED when the residual had grown a lot."""
        grown = (self["previous"] > 1e6 * self["best"]) & (self["previous"] < torch.inf)
        ended = torch.where(grown, float(Status.DIVERGED), float(Status.MAX_STEPS))
        self["status"] = torch.where(self.running, ended, self["status"])


class FrontMonitor(Monitor):
    """The same for samples whose T blocks finish one by one, from the front (`Front`)."""

    def __init__(self, n: int, T: int, front: Front, stop: Stop, dtype: torch.dtype, device: torch.device,
                 safeguard: float) -> None:  # fmt: skip
        super().__init__(n, stop, dtype, device, safeguard)
        self.rtol, self.atol = (_per_block(tolerance, n, T, device) for tolerance in (stop.rtol, stop.atol))
        self.front = front
        self.block_previous = torch.full((n, T), torch.inf, dtype=torch.float64, device=device)
        self.block_steps = torch.zeros(n, T, dtype=torch.int32, device=device)
        self.block_residual = torch.full((n, T), torch.inf, dtype=torch.float64, device=device)
        self.done = torch.zeros(n, T, dtype=torch.bool, device=device)

    def select(self, keep: Tensor) -> None:
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value[keep])

    def wanted(self) -> Tensor:
        """(n, T) bool: the unfinished blocks of the unfinished samples, at most `window` of them each."""
        open_ = ~self.done & self.running[:, None]
        if self.front.window is not None:
            open_ &= open_.cumsum(1) <= self.front.window
        return open_

    def judge_blocks(self, residual: Tensor, size: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Takes in the norms of every block (n, T); returns mode (n, T) and the blocks whose value is not finite.

        Blocks that finish together keep the z at which they were measured, so that their residuals are true of what is
        returned; a block that is the first unfinished one and finishes alone takes f, which is then exact.
        """
        running = self.running
        finite = residual < torch.inf
        self.block_residual = torch.where(wanted, residual, self.block_residual)
        tolerance = self.atol + self.rtol * size
        before = torch.nn.functional.pad(self.done, (1, 0), value=True)[:, :-1]
        first = before & ~self.done  # done is a leading run, so this is one block of each unfinished sample
        small = wanted & finite & (residual <= self.front.margin * tolerance)
        run = (self.done | small).cumprod(1).bool() & ~self.done
        alone = (run.sum(1) <= 1)[:, None] & first & wanted & finite
        within = self.done | alone | (wanted & finite & (residual <= tolerance))
        converged = within.all(1) & running
        # When the rest converges as it stands, it stays as it was measured; only a last block may still move.
        whole = converged & ~(self.done | alone).all(1)
        finished = torch.where(whole[:, None], within, run & running[:, None]) & ~self.done
        accepted = alone & ~whole[:, None]
        if self.front.latest:
            accepted = accepted | (finished & wanted)
        measured = self._total()
        self.block_residual = torch.where(alone & accepted, 0.0, self.block_residual)
        self.done = self.done | accepted | finished

        blew_up = wanted & (self.block_steps >= 2) & ~(residual <= self.safeguard * self.block_previous)
        lost = (first & wanted & ~finite).any(1)
        status = torch.where(lost, float(Status.NONFINITE), float(RUNNING))
        status = torch.where(converged, float(Status.CONVERGED), status)
        self["status"] = torch.where(running, status, self["status"])
        self["judged"] = running
        self["evaluations"] += running
        blew_up &= ~self.done & self.running[:, None] & (self.block_previous < torch.inf)
        self["rejections"] += blew_up.any(1)
        # Where the budget ends here, z is what was measured: an accepted block has not moved yet.
        total = torch.where(converged, self._total(), measured)
        self["best"] = self["residual"] = torch.where(running, total, self["residual"])
        self.block_previous = torch.where(wanted & finite, residual, self.block_previous)
        broken = wanted & ~finite & ~blew_up
        self.block_steps = torch.where(blew_up | ~wanted | broken, 0, self.block_steps + 1)
        mode = torch.where(blew_up, REJECT, torch.where(self.done | broken, KEEP, MIX))
        mode = torch.where(accepted & wanted, ACCEPT, mode)
        return torch.where(wanted, mode, KEEP).to(torch.uint8), broken

    def _total(self) -> Tensor:
        """The residual of whole samples (n,), of blocks as last measured; infinite before all were."""
        if self.stop.norm == "max":
            return self.block_residual.amax(1)
        squares = self.block_residual.square()
        return (squares.mean(1) if self.stop.norm == "rms" else squares.sum(1)).sqrt()


def _per_block(tolerance: Tensor | float, n: int, T: int, device: torch.device) -> Tensor | float:
    if not isinstance(tolerance, Tensor):
        return tolerance
    wide = tolerance.to(device, torch.float64)
    return (wide[:, None] if wide.dim() == 1 else wide).expand(n, T).clone()
