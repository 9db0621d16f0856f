"""The linear systems u = g + A u of the adjoint: their scaling, and the residual of an answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..memory import check_dense
from ..shards import WHOLE, Whole

Products = Callable[[Tensor], Tensor]  # (B, N) to (B, N), row by row


class Tolerances(Protocol):
    """What a system reads of a `Stop`."""

    @property
    def rtol(self) -> float | Tensor: ...

    @property
    def atol(self) -> float | Tensor: ...


@dataclass(frozen=True, eq=False)
class System:
    """u = g + A u for B samples, each divided by a power of two near the largest entry of its g.

    Products and sums of squares then neither overflow nor vanish, whatever the scale of g, and scaling back is exact
    wherever the dtype holds the result.
    """

    A: Products
    rhs: Tensor  # (B, N): the scaled g
    norm: Tensor  # (B,) float64: ‖rhs‖, one where it is zero
    goal: Tensor  # (B,) float64: the largest ‖rhs + A u − u‖ that is asked for
    exponent: Tensor  # (B,) int64: g = rhs · 2^exponent
    shards: Whole = WHOLE  # who holds which entries of a row

    @staticmethod
    def of(A: Products, g: Tensor, stop: Tolerances, shards: Whole = WHOLE) -> System:
        """A maps (B, N) to (B, N); g (B, N) is finite; the goal is atol + rtol ‖g‖, per row."""
        exponent = _exponent(shards.largest(g.abs().amax(1)) if g.shape[1] else g.new_zeros(len(g)))
        rhs = _times_power(g, -exponent)
        norm = shards.lengths(rhs)
        norm = torch.where(norm > 0, norm, 1.0)
        rtol, atol = (torch.as_tensor(t, dtype=torch.float64, device=g.device).expand(len(g)) for t in _of(stop))
        goal = rtol * norm + _times_power(atol[:, None], -exponent)[:, 0]
        return System(A, rhs, norm, goal, exponent, shards)

    def lowered(self, u: Tensor) -> Tensor:
        """The unknown of this system for the u (B, N) of the unscaled one."""
        return _times_power(u, -self.exponent)

    def raised(self, u: Tensor) -> Tensor:
        """The u (B, N) of the unscaled system: infinite where the dtype does not hold it."""
        return _times_power(u, self.exponent)

    def residual(self, u: Tensor) -> Tensor:
        """rhs + A u − u, (B, N), by one product."""
        return self.rhs + self.A(u) - u

    def deliver(self, u: Tensor, size: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """The solution u (B, N) of this system as that of the unscaled one, in `dtype`.

        size (B,): ‖rhs + A u − u‖. Returns the unscaled u, the size at exactly that u, and the rows (B,) bool for which
        that took a product: those that `dtype` does not hold as they were. A row that overflows has size infinity.
        """
        raised = self.raised(u).to(dtype)
        back = self.lowered(raised.to(u.dtype))
        changed = self.shards.somewhere((back != u).any(1)) & size.isfinite()
        if bool(changed.any()):
            fits = self.shards.everywhere(raised.isfinite().all(1))
            again = self.shards.lengths(self.residual(torch.where(fits[:, None], back, 0.0)))
            size = torch.where(changed, torch.where(fits, again, torch.inf), size)
        return raised, size, changed


def check_right_side(g: Any) -> None:
    """Raises TypeError or ValueError unless g is a dense tensor (B, N), float32 or float64."""
    if not isinstance(g, Tensor) or g.dtype not in (torch.float32, torch.float64):
        got = g.dtype if isinstance(g, Tensor) else type(g).__name__
        raise TypeError(f"g must be a float32 or float64 tensor (B, N), got {got}")
    check_dense("g", g)
    if g.dim() != 2:
        raise ValueError(f"g must have shape (B, N), got {tuple(g.shape)}")


def lengths(r: Tensor) -> Tensor:
    """‖r‖ per row of r (B, N), (B,) float64, of what is here."""
    return WHOLE.lengths(r)


def blurred(residual: Tensor, u: Tensor, eps: float, shards: Whole = WHOLE) -> Tensor:
    """What is known of a residual (B,) that was measured at u (B, N) with rounding eps: not less than eps ‖u‖."""
    return torch.maximum(residual, eps * shards.lengths(u))


def _of(stop: Tolerances) -> tuple[float | Tensor, float | Tensor]:
    return stop.rtol, stop.atol


def _exponent(x: Tensor) -> Tensor:
    """e (B,) int64 of 2^(e − 1) ≤ x < 2^e for finite x ≥ 0 (B,), and 0 for 0.

    That of torch.frexp; where a compiler traces, from the bits: it makes C++ of frexp that does not compile if x is
    float64.
    """
    if type(x) is Tensor:
        return torch.frexp(x)[1].long()
    wide = x.double()
    tiny = wide < 2.0**-900  # among them what has fewer digits, and no exponent of its own
    bits = torch.where(tiny, wide * 2.0**100, wide).view(torch.int64)
    return torch.where(wide > 0, (bits >> 52) - torch.where(tiny, 1122, 1022), 0)


def _times_power(x: Tensor, exponent: Tensor) -> Tensor:
    """x (B, N) · 2^exponent (B,), exact but for what x's dtype does not hold; in three factors that it does hold."""
    part = exponent // 3
    for e in (part, part, exponent - 2 * part):
        # 2^e by its bits: torch.ldexp and torch.exp2 would take it from a float32 power.
        x = x * ((e + 1023) << 52).view(torch.float64).to(x.dtype)[:, None]
    return x
