"""Anderson acceleration with adaptive damping, adaptive depth and restarts, beside fixed damping and depth.

    python benchmarks/anderson_variants.py [--seeds 6]

One dense textbook implementation (least squares by SVD, float64), so that only the variant differs. Printed: the
geometric mean of evaluations to ‖r‖ ≤ 1e-8, relative to β = 1 and depth m, per family of maps. θ = ‖r − ΔR γ‖ / ‖r‖ is
the gain of the least-squares problem (Evans, Pollock, Rebholz & Xiao 2020); "depth" drops rows whose residual exceeds
1/δ times the newest (Chupin, Dupuy, Legendre & Séré 2021); "restart" empties a full memory.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import problems

f64 = torch.float64
BUDGET = 600
Damping = Callable[[float], float]
VARIANTS: dict[str, dict[str, object]] = {
    "β=.9": {"damping": lambda theta: 0.9},
    "1-.1θ": {"damping": lambda theta: 1 - 0.1 * theta},
    "1-.3θ": {"damping": lambda theta: 1 - 0.3 * theta},
    "1-.5θ": {"damping": lambda theta: 1 - 0.5 * theta},
    "δ=1e-2": {"depth": 1e-2},
    "δ=1e-4": {"depth": 1e-4},
    "restart": {"restart": True},
}


def evaluations(
    fn: Callable[[Tensor], Tensor], z: Tensor, memory: int, damping: Damping = lambda theta: 1.0, depth: float = 0.0,
    restart: bool = False,
) -> int:  # fmt: skip
    """Evaluations of fn, (D,) → (D,), until ‖f − z‖ ≤ 1e-8; the budget when that is not reached."""
    Z: list[Tensor] = []
    R: list[Tensor] = []
    for k in range(BUDGET):
        f = fn(z)
        r = f - z
        size = float(r.norm())
        if size <= 1e-8:
            return k + 1
        if not size < 1e100:
            return BUDGET
        Z, R = [*Z, z], [*R, r]
        if restart and len(R) > memory + 1:
            Z, R = [z], [r]
        Z, R = Z[-memory - 1 :], R[-memory - 1 :]
        while len(R) > 2 and depth * float(R[0].norm()) > size:
            Z, R = Z[1:], R[1:]
        if len(R) == 1:
            z = f
            continue
        S, Y = torch.stack(Z, 1).diff(dim=1), torch.stack(R, 1).diff(dim=1)
        scale = Y.norm(dim=0).clamp_min(1e-300)
        gamma = torch.linalg.lstsq(Y / scale, r[:, None], driver="gelsd", rcond=1e-12).solution[:, 0] / scale
        left = r - Y @ gamma
        z = z - S @ gamma + damping(float(left.norm()) / size) * left
    return BUDGET


def families(seed: int) -> dict[str, tuple[Callable[[Tensor], Tensor], int]]:
    """Maps by name, with their dimension."""
    g = problems.generator(seed)

    def linear(A: Tensor) -> Callable[[Tensor], Tensor]:
        b = torch.randn(len(A), dtype=f64, generator=g)
        return lambda z: A @ z + b

    def tanh(A: Tensor) -> Callable[[Tensor], Tensor]:
        inner = linear(A)
        return lambda z: torch.tanh(inner(z))

    def symmetric(n: int, top: float) -> Tensor:
        return problems.with_spectrum(torch.linspace(-0.5, top, n, dtype=f64), seed)

    def full(n: int, gain: float) -> Tensor:
        return gain * torch.randn(n, n, dtype=f64, generator=g) / n**0.5

    return {
        "linear, symmetric, [-.5, .97], 48": (linear(symmetric(48, 0.97)), 48),
        "linear, symmetric, [-.5, .99], 200": (linear(symmetric(200, 0.99)), 200),
        "linear, full, gain .95, 60": (linear(full(60, 0.95)), 60),
        "tanh, symmetric, [-.5, .99], 48": (tanh(symmetric(48, 0.99)), 48),
        "tanh, full, gain 1.6, 40": (tanh(full(40, 1.6)), 40),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=6)
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {seeds} seeds; evaluations relative to fixed damping 1 and depth m")
    for memory in (3, 5, 10):
        print(f"\n{f'm = {memory}':<38}{'fixed':>8}" + "".join(f"{name:>9}" for name in VARIANTS))
        logs: dict[str, dict[str, list[float]]] = {}
        counts: dict[str, list[int]] = {}
        for seed in range(seeds):
            for name, (fn, D) in families(seed).items():
                z0 = torch.zeros(D, dtype=f64)
                base = evaluations(fn, z0, memory)
                counts.setdefault(name, []).append(base)
                for variant, options in VARIANTS.items():
                    ratio = evaluations(fn, z0, memory, **options) / base  # type: ignore[arg-type]
                    for row in (name, "all"):
                        logs.setdefault(row, {}).setdefault(variant, []).append(math.log(ratio))
        for row in sorted(logs, key=lambda r: r == "all"):
            fixed = f"{sorted(counts[row])[seeds // 2]:>8}" if row in counts else f"{'':>8}"
            print(f"{row:<38}{fixed}" + "".join(f"{math.exp(sum(x) / len(x)):>9.2f}" for x in logs[row].values()))


if __name__ == "__main__":
    main()
