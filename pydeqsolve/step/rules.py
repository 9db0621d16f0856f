"""The judgement of a measurement in PyTorch: the oracle of csrc/judge.h, and what runs where there are no kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..status import Status
from ..stop import Front
from .records import ACCEPT, KEEP, MIX, REJECT, RUNNING, Records

FLAT_STEPS = 10  # steps without change after which a residual is called stalled
GROWTH = 2.0**104  # of the residual, that float64 does not recover from


class Rule(NamedTuple):
    """What a judgement knows besides the records.

    safeguard: growth of the residual at which an accelerated step is refused; 0 for solvers without any. eps: of the
    state's dtype. norm: "rms", "l2" or "max". entries: those of a sample, or of a block where blocks are judged.
    unknowns: entries of a sample, 0 where blocks are judged.
    """

    safeguard: float
    eps: float
    norm: str
    entries: int
    unknowns: int = 0

    @property
    def divisor(self) -> float:
        """Of sums of squares: the entries for the root mean square, 1 for other norms."""
        return float(self.entries if self.norm == "rms" else 1)


def judge_samples(samples: Records, norms: Tensor, dropped: Tensor | None, rule: Rule) -> Tensor:
    """Mode (n, T): MIX, REJECT, or KEEP when finished; from norms (n, T, 2) of r and f, dropped (n, T) or None."""
    totals = norms.amax(1) if rule.norm == "max" else (norms.sum(1) / rule.divisor).sqrt()
    lost = (dropped > 0).any(1) if dropped is not None else torch.zeros_like(samples.running)
    mode = judge_totals(samples, totals[:, 0], totals[:, 1], lost, rule)
    return mode[:, None].expand(-1, norms.shape[1]).contiguous()


def judge_totals(samples: Records, residual: Tensor, size: Tensor, lost: Tensor, rule: Rule) -> Tensor:
    """The rules, in the order of csrc/judge.h; residual, size and lost (n,)."""
    running, previous, steps = samples.running, samples["previous"].clone(), samples["steps"].clone()
    finite = (residual < torch.inf) & (size < torch.inf)  # a size that overflows would excuse any residual
    converged = finite & ~(residual > samples["atol"] + samples["rtol"] * size)
    accelerated = (steps >= 2) & (rule.safeguard > 0)
    blew_up = accelerated & ~(finite & (residual <= rule.safeguard * previous)) & running
    improved = finite & (residual < samples["best"]) & running
    unchanged = (residual - previous).abs() <= 4 * rule.eps * residual
    at_floor = residual <= samples["floor"] * size
    best = torch.where(improved, residual, samples["best"])
    exploded = previous > 1e3 * best
    flat = torch.where((unchanged | at_floor) & ~improved, samples["flat"] + 1, 0.0)

    # A causal map may pass its residual on, unchanged, through as many steps as there are unknowns.
    stalled = flat >= FLAT_STEPS + torch.where(at_floor, 0.0, samples["unknowns"])
    status = torch.where(stalled, float(Status.STALLED.value), float(RUNNING))
    status = torch.where(finite & ~blew_up & (residual > best * GROWTH), float(Status.DIVERGED.value), status)
    broken = torch.where(exploded, float(Status.DIVERGED.value), float(Status.NONFINITE.value))
    status = torch.where(finite | blew_up, status, broken)
    status = torch.where(converged, float(Status.CONVERGED.value), status)
    status = torch.where(running, status, samples["status"])
    going = status == RUNNING
    # What is returned is the iterate that met the tolerance, even where ‖f‖ was smaller before.
    met = running & converged
    improved, best = improved | met, torch.where(met, residual, best)
    fresh = samples["fresh"] != 0
    changes = {
        "best": best,
        "previous": torch.where(running & finite & ~blew_up, residual, previous),
        "flat": torch.where(running, flat, samples["flat"]),
        "steps": torch.where(running, torch.where(blew_up, 0.0, steps + 1), steps),
        "status": status,
        "evaluations": samples["evaluations"] + running,
        "rejections": samples["rejections"] + (blew_up & going),
        "rank_losses": samples["rank_losses"] + lost,
        "judged": running,
        "improved": improved,
        "left_behind": fresh & ~improved & running,
        "fresh": torch.where(running, improved, fresh),
        "residual": residual,
        "size": torch.where(improved, size, samples["size"]),
    }
    for name, value in changes.items():
        samples[name] = value
    _mark(samples, running)
    return torch.where(going, torch.where(blew_up, REJECT, MIX), KEEP).to(torch.uint8)


def _mark(samples: Records, running: Tensor) -> None:
    """Moves recent to earlier and best to recent, at every evaluation whose number is a power of two."""
    count = samples["evaluations"].long()
    now = running & ((count & (count - 1)) == 0)
    pairs = (("earlier", "recent"), ("earlier_size", "recent_size"), ("recent", "best"), ("recent_size", "size"))
    for old, new in pairs:
        samples[old] = torch.where(now, samples[new], samples[old])


def judge_blocks(
    samples: Records, blocks: Records, norms: Tensor, wanted: Tensor, rule: Rule, front: Front
) -> tuple[Tensor, Tensor]:
    """Mode and broken (n, T), blocks whose value is not finite; from norms (n, T, 2), wanted (n, T)."""
    if rule.norm != "max":
        norms = (norms / rule.divisor).sqrt()
    residual, size = norms[..., 0], norms[..., 1]
    running = samples.running
    finite = (residual < torch.inf) & (size < torch.inf)
    done, block_residual = blocks["done"] != 0, torch.where(wanted, residual, blocks["residual"])
    tolerance = blocks["atol"] + blocks["rtol"] * size
    before = torch.nn.functional.pad(done, (1, 0), value=True)[:, :-1]
    first = before & ~done  # done is a leading run, so this is one block of each unfinished sample
    small = wanted & finite & ~(residual > front.margin * tolerance)
    run = (done | small).cumprod(1).bool() & ~done
    alone = (run.sum(1) <= 1)[:, None] & first & wanted & finite & front.strict
    within = done | (wanted & finite & ~(residual > tolerance))
    within[:, -1] |= alone[:, -1]  # where others follow, they were measured at a z that is about to move
    converged = within.all(1) & running
    # When the rest converges as it stands, it stays as it was measured; only a last block may still move.
    whole = converged & ~(done | alone).all(1)
    finished = torch.where(whole[:, None], within, run & running[:, None]) & ~done
    accepted = alone & ~whole[:, None]
    if front.latest:
        accepted = accepted | (finished & wanted)
    blocks["residual"] = block_residual
    measured = _total(blocks, rule.norm)
    blocks["residual"] = torch.where(alone & accepted, 0.0, block_residual)
    done = done | accepted | finished
    blocks["done"] = done.double()

    previous, steps = blocks["previous"].clone(), blocks["steps"].clone()
    blew_up = wanted & (steps >= 2) & (rule.safeguard > 0) & ~(residual <= rule.safeguard * previous)
    lost = (first & wanted & ~finite).any(1)
    status = torch.where(lost, float(Status.NONFINITE.value), float(RUNNING))
    status = torch.where(converged, float(Status.CONVERGED.value), status)
    samples["status"] = torch.where(running, status, samples["status"])
    samples["judged"] = running
    samples["evaluations"] += running
    blew_up &= ~done & samples.running[:, None] & (previous < torch.inf)
    samples["rejections"] += blew_up.any(1)
    # Where the budget ends here, z is what was measured: an accepted block has not moved yet.
    total = torch.where(converged, _total(blocks, rule.norm), measured)
    samples["best"] = samples["residual"] = torch.where(running, total, samples["residual"])
    blocks["previous"] = torch.where(wanted & finite, residual, previous)
    broken = wanted & ~finite & ~blew_up
    blocks["steps"] = torch.where(blew_up | ~wanted | broken, 0.0, steps + 1)
    mode = torch.where(blew_up, REJECT, torch.where(done | broken, KEEP, MIX))
    mode = torch.where(accepted & wanted, ACCEPT, mode)
    return torch.where(wanted, mode, KEEP).to(torch.uint8), broken


def open_blocks(samples: Records, blocks: Records, front: Front) -> Tensor:
    """(n, T) bool: the unfinished blocks of the unfinished samples, at most `front.window` of them each."""
    open_ = (blocks["done"] == 0) & samples.running[:, None]
    if front.window is not None:
        open_ = open_ & (open_.cumsum(1) <= front.window)
    return open_


def _total(blocks: Records, norm: str) -> Tensor:
    """The residual of whole samples (n,), of blocks as last measured; infinite before all were, and with a NaN."""
    of_blocks = blocks["residual"].nan_to_num(torch.inf, torch.inf)
    if norm == "max":
        return of_blocks.amax(1)
    squares = of_blocks.square()
    return (squares.mean(1) if norm == "rms" else squares.sum(1)).sqrt()
