"""When a sample is done."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import check_real, keep_count
from .memory import check_dense

NORMS = ("rms", "l2", "max")


class Default(float):
    """A tolerance that nobody chose, which gives way to what the precision of fn allows."""


RTOL = Default(1e-5)


@dataclass(frozen=True, eq=False)
class Stop:
    """Converged, per sample: ‖f(z) − z‖ ≤ atol + rtol·‖f(z)‖.

    rtol, atol: floats, or tensors (B,), one tolerance per sample; with `Front` also (B, T) or (1, T), one per block.
    An rtol that is left at its default is raised to the machine epsilon of what fn computes in, where that is more
    (float16, bfloat16, autocast); one that is given and finer than half of it is pursued as far as that goes, and ends
    STALLED.
    max_steps: calls of fn, the first included. norm: "rms" (root mean square over the sample's entries), "l2" or "max".
    check_every: steps between two readings of the finished samples by the host; None is 1 on the CPU, where reading is
    free, and 8 on a GPU, where it waits for the device. A sample that finishes in between is frozen at once either way.
    """

    rtol: float | Tensor = RTOL
    atol: float | Tensor = 0.0
    max_steps: int = 100
    norm: str = "rms"
    check_every: int | None = None

    def __post_init__(self) -> None:
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            if isinstance(value, Tensor):
                check_dense(name, value)
                if not value.is_floating_point() or bool((~(value >= 0)).any()):
                    raise ValueError(f"{name} must be floating point and non-negative everywhere")
            elif isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a float or a tensor, got {type(value).__name__}")
            elif not value >= 0:
                raise ValueError(f"{name} must be non-negative, got {value}")
        keep_count(self, "max_steps", least=0)
        if self.norm not in NORMS:
            raise ValueError(f"norm must be one of {NORMS}, got {self.norm!r}")
        if self.check_every is not None:
            keep_count(self, "check_every", least=1)

    def interval(self, device: torch.device) -> int:
        """Steps between two readings of the stop flags on `device`."""
        return self.check_every if self.check_every is not None else 1 if device.type == "cpu" else 8


def is_left_open(stop: Stop) -> bool:
    """rtol is the default itself, not a number that someone chose."""
    return isinstance(stop.rtol, Default)


@dataclass(frozen=True)
class Front:
    """Blocks of a causal map finish one by one, from the front; a finished block costs nothing more.

    For maps whose state is (B, T, …) and whose block k depends on earlier blocks only (see `strict`). fn is then called
    with the keyword `wanted`, a bool tensor (n, T), and needs to fill only those blocks of its result. A leading block
    finishes when its residual is within `margin` times its tolerance and everything before it has finished, keeping the
    z at which it was measured; or, when it would finish alone, by taking the value f, which is then exact. So a chain
    of T blocks is exact after T steps, whatever the tolerance.

    window: at most so many blocks of a sample are wanted at a time, the first unfinished ones; None is all.
    latest: every block takes the value f when it finishes, one update better than what was measured; the residual of
    the solution is then an estimate from above for contracting maps, no longer that of exactly the z returned.
    strict: False for maps whose block k depends on itself too, such as the tokens of a causal transformer block: a
    leading block finishes by its residual alone, never by being the next.
    """

    window: int | None = None
    margin: float = 0.5
    latest: bool = False
    strict: bool = True

    def __post_init__(self) -> None:
        if self.window is not None:
            keep_count(self, "window", least=1)
        check_real("margin", self.margin)
        if not 0 <= self.margin <= 1:
            raise ValueError(f"margin must be in [0, 1], got {self.margin}")
        for name in ("latest", "strict"):
            if not isinstance(value := getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {type(value).__name__}")
