"""Broyden's methods with limited memory."""

from __future__ import annotations

from dataclasses import dataclass, field

from .checks import check_real, keep_count
from .step.ring import Method


@dataclass(frozen=True)
class Broyden:
    """z ← z − H r, H the inverse Jacobian estimate of r = f − z built from −I by the last `memory` rank-one updates.

    kind "good" updates the Jacobian, "bad" its inverse (Broyden 1965). Both are kept in compact form (Byrd, Nocedal &
    Schnabel 1994, Thm 6.1): with S, Y the differences of iterates and residuals, oldest first,
      good: H = −I + (S + Y) (−L − SᵀY)⁻¹ Sᵀ, L the strictly lower part of SᵀS;
      bad:  H = −I + (S + Y) U⁻¹ Yᵀ, U the upper part of YᵀY.
    When the memory is full the oldest pair is left out, which gives exactly Broyden's matrix from the newest pairs; the
    newest secant equation H y = s always holds. safeguard as in `Anderson`.

    line_search: halvings of a step that the safeguard would refuse, at most, each one evaluation of fn; 0 is none. It
    keeps the history where the safeguard restarts, and refuses growth that repeats (beyond three safeguards above the
    least residual). After the last halving the sample takes the plain step f(z) and forgets its history. A trial at
    which fn is NaN or infinite is halved too, but forgets the history. `Solution.rejections` counts the trials refused.
    Takes two words more per entry of the state. Goes with neither a `Front` nor a kept history.
    """

    memory: int = 10
    kind: str = "good"
    safeguard: float = 10.0
    line_search: int = 0
    _method: Method = field(init=False, repr=False, compare=False)  # made once: a solve asks for it often

    def __post_init__(self) -> None:
        keep_count(self, "memory", least=1)
        keep_count(self, "line_search", least=0)
        check_real("safeguard", self.safeguard)
        if self.kind not in ("good", "bad"):
            raise ValueError(f'kind must be "good" or "bad", got {self.kind!r}')
        if not self.safeguard > 1:
            raise ValueError(f"safeguard must exceed 1, got {self.safeguard}")
        object.__setattr__(self, "_method", Method(f"broyden {self.kind}", self.memory))

    def method(self) -> Method:
        return self._method
