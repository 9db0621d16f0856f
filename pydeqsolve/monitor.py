"""Per-sample judgement of a running solve: converged, stalled, diverged, non-finite, or a step to be refused.

Everything here is a tensor over the n samples at hand; nothing is read back to the host, so that the loop can look at
the flags as late as it likes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .ops import ACCEPT, KEEP, MIX, REJECT
from .solution import Status
from .stop import Front, Stop

FLAT_STEPS = 10  # steps without change after which a residual is called stalled
ROUNDING = 8.0  # residuals within so many units of rounding of ‖f‖ cannot be improved on
RUNNING = -1


class Monitor:
    """Residual history of n samples: residual (n,), best (n,), status (n,) with RUNNING for the unfinished."""

    def __init__(self, n: int, stop: Stop, dtype: torch.dtype, device: torch.device, safeguard: float) -> None:
        self.stop, self.safeguard = stop, safeguard
        self.eps = torch.finfo(dtype).eps
        self.best = torch.full((n,), torch.inf, dtype=torch.float64, device=device)
        self.previous = torch.full((n,), torch.inf, dtype=torch.float64, device=device)
        self.flat = torch.zeros(n, dtype=torch.int32, device=device)
        self.steps = torch.zeros(n, dtype=torch.int32, device=device)  # since the last restart
        self.status = torch.full((n,), RUNNING, dtype=torch.int64, device=device)
        self.evaluations = torch.zeros(n, dtype=torch.int64, device=device)
        self.rejections = torch.zeros(n, dtype=torch.int64, device=device)
        self.rank_losses = torch.zeros(n, dtype=torch.int64, device=device)
        self.rtol, self.atol = (_on(device, tolerance) for tolerance in (stop.rtol, stop.atol))
        self.judged = torch.zeros(n, dtype=torch.bool, device=device)  # was running at the last measurement
        self.improved = torch.zeros(n, dtype=torch.bool, device=device)

    def select(self, keep: Tensor) -> None:
        """Keeps the samples whose positions are in `keep` (k,)."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value[keep])

    def judge(self, residual: Tensor, size: Tensor) -> Tensor:
        """Takes in one measurement, ‖f − z‖ and ‖f‖ (n,); returns mode (n,): MIX, REJECT, or KEEP when finished."""
        running = self.judged = self.status == RUNNING
        finite = residual < torch.inf
        converged = residual <= self.atol + self.rtol * size
        accelerated = self.steps >= 2
        blew_up = accelerated & ~(residual <= self.safeguard * self.previous) & running
        self.improved = (residual < self.best) & running
        unchanged = (residual - self.previous).abs() <= 4 * self.eps * residual
        at_floor = (residual <= ROUNDING * self.eps * size) & ~self.improved
        self.flat = torch.where(unchanged | at_floor, self.flat + 1, 0)
        self.best = torch.where(self.improved, residual, self.best)
        exploded = self.previous > 1e3 * self.best

        status = torch.where(self.flat >= FLAT_STEPS, int(Status.STALLED), RUNNING)
        status = torch.where(residual > self.best / self.eps**2, int(Status.DIVERGED), status)
        broken = torch.where(exploded, int(Status.DIVERGED), int(Status.NONFINITE))
        status = torch.where(finite | blew_up, status, broken)
        status = torch.where(converged & finite, int(Status.CONVERGED), status)
        self.status = torch.where(running, status, self.status)
        self.evaluations = self.evaluations + running
        self.rejections = self.rejections + (blew_up & (self.status == RUNNING))
        self.previous = torch.where(running & finite, residual, self.previous)
        self.steps = torch.where(blew_up, 0, self.steps + 1)
        mode = torch.where(blew_up, REJECT, MIX)
        return torch.where(self.status == RUNNING, mode, KEEP).to(torch.uint8)

    def expire(self) -> None:
        """Ends what is still running for want of budget: MAX_STEPS, or DIVERGED when the residual had grown a lot."""
        grown = (self.previous > 1e6 * self.best) & (self.previous < torch.inf)
        ended = torch.where(grown, int(Status.DIVERGED), int(Status.MAX_STEPS))
        self.status = torch.where(self.status == RUNNING, ended, self.status)


class FrontMonitor(Monitor):
    """The same for samples whose T blocks finish one by one, from the front (`Front`)."""

    def __init__(self, n: int, T: int, front: Front, stop: Stop, dtype: torch.dtype, device: torch.device,
                 safeguard: float) -> None:  # fmt: skip
        super().__init__(n, stop, dtype, device, safeguard)
        self.rtol, self.atol = (_per_block(tolerance, n, T) for tolerance in (self.rtol, self.atol))
        self.front = front
        self.block_previous = torch.full((n, T), torch.inf, dtype=torch.float64, device=device)
        self.block_steps = torch.zeros(n, T, dtype=torch.int32, device=device)
        self.done = torch.zeros(n, T, dtype=torch.bool, device=device)
        self.block_evaluations = torch.zeros(n, dtype=torch.int64, device=device)

    def wanted(self) -> Tensor:
        """(n, T) bool: the unfinished blocks of the unfinished samples, at most `window` of them each."""
        open_ = ~self.done & (self.status == RUNNING)[:, None]
        if self.front.window is not None:
            open_ &= open_.cumsum(1) <= self.front.window
        return open_

    def judge_blocks(self, residual: Tensor, size: Tensor, wanted: Tensor, total: Tensor) -> Tensor:
        """Takes in the norms of every block (n, T) and the residual of the whole (n,); returns mode (n, T)."""
        running = self.status == RUNNING
        finite = residual < torch.inf
        tolerance = self.atol + self.rtol * size
        before = torch.nn.functional.pad(self.done, (1, 0), value=True)[:, :-1].cumprod(1).bool()
        exact = before & wanted & finite
        small = wanted & finite & (residual <= self.front.margin * tolerance)
        was_done = self.done
        self.done = (was_done | exact | small).cumprod(1).bool()
        within = self.done | (wanted & finite & (residual <= tolerance))
        converged = within.all(1)

        blew_up = wanted & (self.block_steps >= 2) & ~(residual <= self.safeguard * self.block_previous)
        lost = (wanted & ~finite & ~blew_up & ~self.done).any(1)
        self.best = torch.where(running, total, self.best)
        status = torch.where(lost, int(Status.NONFINITE), RUNNING)
        status = torch.where(converged, int(Status.CONVERGED), status)
        self.status = torch.where(running, status, self.status)
        self.evaluations = self.evaluations + running
        self.block_evaluations = self.block_evaluations + wanted.sum(1)
        blew_up &= ~self.done & (self.status == RUNNING)[:, None]
        self.rejections = self.rejections + blew_up.any(1)
        self.previous = torch.where(running, total, self.previous)
        self.block_previous = torch.where(wanted & finite, residual, self.block_previous)
        self.block_steps = torch.where(blew_up | ~wanted, 0, self.block_steps + 1)
        mode = torch.where(blew_up, REJECT, MIX)
        mode = torch.where(self.done | (self.status == int(Status.CONVERGED))[:, None], ACCEPT, mode)
        return torch.where(wanted, mode, KEEP).to(torch.uint8)


def _on(device: torch.device, tolerance: Tensor | float) -> Tensor | float:
    return tolerance.to(device, torch.float64) if isinstance(tolerance, Tensor) else tolerance


def _per_block(tolerance: Tensor | float, n: int, T: int) -> Tensor | float:
    if not isinstance(tolerance, Tensor):
        return tolerance
    return (tolerance[:, None] if tolerance.dim() == 1 else tolerance).expand(n, T)
