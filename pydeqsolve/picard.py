"""Picard iteration."""

from __future__ import annotations

from dataclasses import dataclass, field

from .checks import check_damping
from .step.ring import Method


@dataclass(frozen=True)
class Picard:
    """z ← z + β (f(z) − z): the plain fixed-point iteration, damped by β.

    Converges when fn contracts (for β < 1 also for some maps that do not, such as rotations). One evaluation a step,
    no history.
    """

    damping: float = 1.0
    safeguard = float("inf")
    _method: Method = field(init=False, repr=False, compare=False)  # made once: a solve asks for it often

    def __post_init__(self) -> None:
        check_damping(self.damping)
        object.__setattr__(self, "_method", Method(damping=self.damping))

    def method(self) -> Method:
        return self._method
