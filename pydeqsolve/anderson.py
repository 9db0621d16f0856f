"""Anderson acceleration."""

from __future__ import annotations

from dataclasses import dataclass, field

from .checks import check_damping, check_real, keep_count
from .step.ring import COUPLINGS, Method


@dataclass(frozen=True)
class Anderson:
    """z ← f − ΔF γ − (1−β)(r − ΔR γ), with γ from the last `memory` differences: AA(m) of Walker & Ni 2011, Eq. 2.2.

    kind "II": γ = argmin ‖r − ΔR γ‖₂. kind "I": ΔZᵀ(r − ΔR γ) = 0 (Fang & Saad 2009, Sec. 3).
    memory: differences kept, m; the history takes 2 (m + 1) words per entry of the state.
    damping: β in (0, 2], the weight of the residual in the step.
    ridge: added to the unit diagonal of the scaled normal equations, so it is relative; None adds nothing: differences
    that depend on newer ones are left out instead (`Solution.rank_losses` counts such steps).
    coupling: which residuals γ is fitted to. "joint": one γ per sample. "independent" and "causal" read dimension 1 of
    the state as blocks in order; block k has a γ of its own, fitted to itself, or to blocks 0…k.
    safeguard: an accelerated step after which the residual exceeds so many times the one before is refused, and the
    sample (or block) restarts from the plain step before it (`Solution.rejections`). Infinity refuses only steps that
    end in NaN or infinity.
    """

    memory: int = 5
    damping: float = 1.0
    kind: str = "II"
    ridge: float | None = None
    coupling: str = "joint"
    safeguard: float = 100.0
    _method: Method = field(init=False, repr=False, compare=False)  # made once: a solve asks for it often

    def __post_init__(self) -> None:
        keep_count(self, "memory", least=0)
        check_damping(self.damping)
        if self.kind not in ("I", "II"):
            raise ValueError(f'kind must be "I" or "II", got {self.kind!r}')
        if self.ridge is not None:
            check_real("ridge", self.ridge)
        check_real("safeguard", self.safeguard)
        if self.ridge is not None and not 0 <= self.ridge < 1:
            raise ValueError(f"ridge must be None or in [0, 1), got {self.ridge}")
        if self.ridge and self.kind == "I":
            raise ValueError('ridge must be None for kind "I", whose system is not symmetric')
        if self.coupling not in COUPLINGS:
            raise ValueError(f"coupling must be one of {COUPLINGS}, got {self.coupling!r}")
        if not self.safeguard > 1:
            raise ValueError(f"safeguard must exceed 1, got {self.safeguard}")
        object.__setattr__(
            self,
            "_method",
            Method(f"anderson {self.kind}", self.memory, self.damping, self.ridge or 0.0, self.coupling),
        )

    def method(self) -> Method:
        return self._method
