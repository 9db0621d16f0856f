"""The loop as one operator of a graph, `while_loop`, for torch.export: of operators that torch has anywhere.

The formulas are those of the reference step, which a compiler makes one kernel of. The history lies by age and is
moved by one place each step: 4 (m + 1) words per entry of the state, where `loop` takes 2 (m + 1) and moves nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import precision
from ..problem import Problem, Solver
from ..step import reference
from ..step.records import MIX, REJECT, RUNNING, Records
from ..step.ring import Method
from ..step.rules import Rule, judge_totals
from ..stop import RTOL, Stop, is_left_open
from .iterate import Outcome
from .judge import ROUNDING, doubt, expire, is_unresolved, is_unseen

LARGEST = 16  # memory up to which the small systems are written out; the graph grows with its cube
CARRIED = (
    "best", "previous", "flat", "steps", "status", "evaluations", "rejections", "rank_losses", "size",
    "floor",
)  # fmt: skip


class Columns(Records):
    """Records whose columns are tensors (n,) of their own: a graph has no views to write to."""

    def __init__(self, columns: dict[str, Tensor]) -> None:
        self.by_name = columns

    def __getitem__(self, name: str) -> Tensor:
        return self.by_name[name]

    def __setitem__(self, name: str, value: Tensor | float) -> None:
        self.by_name[name] = value  # type: ignore[assignment]


def is_traceable(solver: Solver, options: tuple[Any, ...]) -> bool:
    """Whether a solve has a traced form: Anderson of kind "II" or Picard, and none of these `options` of `loop`."""
    method = solver.method()
    return method.kind == "anderson II" and method.memory <= LARGEST and not any(options)


@torch.no_grad()
def traced(problem: Problem, z0: Tensor, *, solver: Solver, stop: Stop) -> Outcome:
    """What `loop` finds, as one operator of a graph; finished samples are frozen, not left out.

    `Outcome.steps` is a tensor (), int64, and there is no course. Casts inside fn are seen in the dtype of its value
    and in autocast's.
    """
    from torch._higher_order_ops.while_loop import while_loop

    rtol, atol = (tolerance(t, z0) for t in (stop.rtol, stop.atol))
    step = TracedStep(problem, solver.method(), solver.safeguard, stop, rtol, atol)
    n = len(CARRIED)

    def going(k: Tensor, z: Tensor, full: Tensor, *rest: Tensor) -> Tensor:
        return (k < stop.max_steps) & (rest[CARRIED.index("status")] == RUNNING).any()

    def body(k: Tensor, z: Tensor, full: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        samples = Columns(dict(zip(CARRIED, rest[:n], strict=True)))
        z, full, history = step(z, full, samples, rest[n:])
        return k + 1, z, full, *(samples[name].clone() for name in CARRIED), *history

    k = torch.zeros((), dtype=torch.int64, device=z0.device)
    first = step.first(z0)
    found = while_loop(going, body, (k, z0.clone(), z0.clone(), *first, *step.history(z0)))
    samples, z = Columns(dict(zip(CARRIED, found[3 : 3 + n], strict=True))), found[2]
    eps = samples["floor"] / ROUNDING
    step.tolerances(samples, eps)
    expire(samples)
    if z.dtype == torch.float64 and stop.norm != "max":
        doubt(samples, is_unseen(samples) & (z != 0).flatten(1).any(1))
    if not is_left_open(stop):
        doubt(samples, is_unresolved(samples, eps))
    counts = (samples[name].long() for name in ("evaluations", "status", "rejections", "rank_losses"))
    evaluations, status, rejections, losses = counts
    return Outcome(
        z, samples["best"], evaluations, status, found[0], rejections, losses, None, [], None, None, solver, stop
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class TracedStep:
    """One step of all samples; everything it takes and returns is a tensor."""

    problem: Problem
    method: Method
    safeguard: float
    stop: Stop
    rtol: Tensor  # (B,) float64, made outside of the loop: a number that changes between calls cannot enter it
    atol: Tensor

    def first(self, z0: Tensor) -> list[Tensor]:
        """The columns `CARRIED` (B,) of samples that nothing is known of."""
        known = {"best": math.inf, "previous": math.inf, "status": RUNNING}
        B, device = z0.shape[0], z0.device
        return [torch.full((B,), float(known.get(x, 0.0)), dtype=torch.float64, device=device) for x in CARRIED]

    def history(self, z0: Tensor) -> list[Tensor]:
        """R, F (B, M, T, D) by age, the Gram matrix (B, T, m, m), counts of rows and of dropped differences (B, T)."""
        (B, T, D), m = z0.shape, self.method.memory
        rows = [torch.zeros(B, m + 1, T, D, dtype=z0.dtype, device=z0.device) for _ in range(2)]
        gram = torch.zeros(B, T, m, m, dtype=torch.float64, device=z0.device)
        return [*rows, gram, *(torch.zeros(B, T, dtype=torch.int32, device=z0.device) for _ in range(2))]

    def tolerances(self, samples: Columns, eps: float | Tensor) -> None:
        """Puts in rtol and atol, (B,) each, for a map that computes with machine epsilon `eps`."""
        samples["rtol"], samples["atol"] = self.rtol, self.atol
        if is_left_open(self.stop):
            samples["rtol"] = torch.where(samples["floor"] > ROUNDING * RTOL, eps, samples["rtol"])

    def __call__(
        self, z: Tensor, full: Tensor, samples: Columns, history: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """The next iterate (B, T, D), the best one, and the history, after one evaluation at z (B, T, D)."""
        (R, F, gram, count, dropped), (B, T) = history, z.shape[:2]
        value = self.problem.value(z, self.problem.inputs)
        eps = precision.of_value(value, z.dtype)
        if precision.is_autocast(z.device.type):
            eps = max(eps, torch.finfo(torch.get_autocast_dtype(z.device.type)).eps)
        f = self.problem.layout.pack(value, "the value of fn")
        r, kept = reference.difference(f, z)
        R, F = newest_first(kept, R), newest_first(f, F)
        count = (count + 1).clamp_max(R.shape[1])
        mode = self._judge(samples, r, f, dropped, eps)
        full = torch.where(samples["improved"][:, None, None], z, full)
        mixes = mode == MIX
        gamma = torch.zeros(B, T, 0, dtype=torch.float64, device=z.device)
        if self.method.memory:
            size = torch.where(mixes, count - 1, 0)
            gamma, dropped, gram = self._weights(R, F, r, f, gram, size, mixes)
        z_next = reference.mixed(F, R, gamma, mode, z, count, float(self.method.damping))
        return z_next, full, (R, F, gram.clone(), torch.where(mode == REJECT, 0, count), dropped.clone())

    def _judge(self, samples: Columns, r: Tensor, f: Tensor, dropped: Tensor, eps: float) -> Tensor:
        """Mode (B, T), as `rules.judge_samples`."""
        B, T, D = f.shape
        rule = Rule(
            self.safeguard if self.method.memory else 0.0, torch.finfo(f.dtype).eps, self.stop.norm, T * D, T * D
        )
        zero = torch.zeros_like(samples["best"])
        unused = ("fresh", "recent", "earlier", "recent_size", "earlier_size")
        samples.by_name.update(dict.fromkeys(unused, zero))
        samples["floor"], samples["unknowns"] = zero + ROUNDING * eps, zero + rule.unknowns
        self.tolerances(samples, eps)
        residual, size = length(r, rule), length(f, rule)
        return judge_totals(samples, residual, size, (dropped > 0).any(1), rule)[:, None].expand(B, T)

    def _weights(
        self, R: Tensor, F: Tensor, r: Tensor, f: Tensor, gram: Tensor, size: Tensor, mixes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """γ (B, T, m) by age, differences dropped (B, T), and the Gram matrix with the newest entries."""
        residuals = R.double()
        row, column, rhs, _ = reference.products(residuals, residuals, by_steps=False, with_steps=False)
        gram = bordered(row, column, gram)
        squares = reference.together([x.double().square().sum(-1) for x in (r, f)])
        how = (self.method.kind, self.method.coupling, float(self.method.ridge))
        gamma, dropped = reference.coefficients(how, torch.finfo(F.dtype).eps, gram, None, rhs, squares, size, mixes)
        return gamma, dropped, gram


def tolerance(value: float | Tensor, z0: Tensor) -> Tensor:
    """A tolerance for each of the samples z0 (B, …), (B,) float64."""
    if isinstance(value, Tensor):
        return value.to(z0.device, torch.float64).expand(z0.shape[:1])
    return torch.full(z0.shape[:1], value, dtype=torch.float64, device=z0.device)


def length(x: Tensor, rule: Rule) -> Tensor:
    """The norm (B,) of x (B, T, D) that a rule asks for; NaN or infinite where an entry is."""
    squares = x.double().square().flatten(1).sum(1)
    if rule.norm != "max":
        return (squares / rule.divisor).sqrt()
    return torch.where(squares.isfinite(), x.double().abs().flatten(1).amax(1), squares)


def newest_first(x: Tensor, rows: Tensor) -> Tensor:
    """rows (B, M, T, D) by age with x (B, T, D) as the newest, without the oldest."""
    first = torch.arange(rows.shape[1], device=x.device) == 0
    return torch.where(first[:, None, None], x[:, None], rows.roll(1, 1))


def bordered(row: Tensor, column: Tensor, gram: Tensor) -> Tensor:
    """gram (B, T, m, m) by age with a new first row and column (B, T, m), without the last ones."""
    first = torch.arange(gram.shape[2], device=gram.device) == 0
    moved = torch.where(first, column[..., None], gram.roll((1, 1), (2, 3)))
    return torch.where(first[:, None], row[..., None, :], moved)
