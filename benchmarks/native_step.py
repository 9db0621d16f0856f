"""The whole solver's time per evaluation beside TorchDEQ's, and beside the time the memory alone would need.

    python benchmarks/native_step.py [--threads N] [--repeats N]

fn costs nothing (it returns a stored tensor), so what is timed is the solver. (2m + 3)·B·D words must move per
evaluation; the floor is the time to read as many at the bandwidth measured right before and after each timing, of which
the fraction achieved is the inverse. Ratios are medians of the ratios of single repeats, so that a machine whose
bandwidth others share is compared with itself. TorchDEQ is optional: pip install torchdeq==0.1.0.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from pydeqsolve import Anderson, Stop, build_info, solve

SHAPES = [
    (1, 5, 3_072_000),
    (16, 6, 196_608),
    (256, 6, 4_096),
    (4096, 6, 256),
    (1000, 5, 3_072),
    (32, 5, 64),
    (1, 5, 64),
]


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def reader() -> Callable[[], float]:
    """A measurement of the bandwidth, bytes per second, by summing 512 MB: far more than the caches hold."""
    x = torch.ones(64 * 1024 * 1024, dtype=torch.float64)
    return lambda: x.numel() * 8 / seconds(lambda: x.sum().item())


@dataclass
class Timing:
    """One repeat: seconds per evaluation of both solvers, and the floor."""

    ours: float
    theirs: float
    floor: float


def measure(B: int, m: int, D: int, read: Callable[[], float], repeats: int) -> list[Timing]:
    moved = (2 * m + 3) * B * D * 4
    steps = 40 if moved > 1e6 else 200
    mine, peer = ours(B, m, D, steps), torchdeq(B, m, D, steps)
    timings = []
    for _ in range(repeats + 1):  # the first warms up
        before = read()
        own = seconds(mine) / steps
        bandwidth = (before + read()) / 2
        timings.append(Timing(own, seconds(peer) / steps if peer else math.nan, moved / bandwidth))
    return timings[1:]


def ours(B: int, m: int, D: int, steps: int) -> Callable[[], None]:
    """A solve of exactly `steps` evaluations with m stored rows, that is m − 1 differences."""
    values = iter_values(B, D)
    stop = Stop(rtol=0.0, max_steps=steps)
    solver = Anderson(memory=m - 1)

    def run() -> None:
        solution = solve(values(), torch.zeros(B, D), solver=solver, stop=stop, gradient=None)
        assert int(solution.evaluations.max()) == steps

    return run


def torchdeq(B: int, m: int, D: int, steps: int) -> Callable[[], None] | None:
    """The same by TorchDEQ's anderson_solver with a history of m."""
    try:
        from torchdeq.solver.anderson import anderson_solver
    except ImportError:
        return None
    values = iter_values(B, D)

    def run() -> None:
        anderson_solver(values(), torch.zeros(B, D), max_iter=steps, m=m, tol=0.0, stop_mode="rel")

    return run


def iter_values(B: int, D: int) -> Callable[[], Callable[[torch.Tensor], torch.Tensor]]:
    """Maps that return one of a few random tensors in turn: free of cost, and never converging."""
    store = [torch.randn(B, D) for _ in range(9)]

    def fresh() -> Callable[[torch.Tensor], torch.Tensor]:
        turn = 0

        def fn(z: torch.Tensor) -> torch.Tensor:
            nonlocal turn
            turn += 1
            return store[turn % len(store)]

        return fn

    return fresh


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(build_info())
    read = reader()
    print(f"{options.threads} threads; medians of {options.repeats} repeats")
    print(
        f"{'B, m, D':>20} {'bytes':>10} {'GB/s':>6} {'floor ms':>9} {'ours ms':>9} {'x floor':>8} {'fraction':>9}",
        end="",
    )
    print(f" {'TorchDEQ':>9} {'ratio':>7}")
    for B, m, D in SHAPES:
        timings = measure(B, m, D, read, options.repeats)
        floor, mine, theirs = (
            statistics.median(getattr(t, name) for t in timings) for name in ("floor", "ours", "theirs")
        )
        over = statistics.median(t.ours / t.floor for t in timings)
        gain = statistics.median(t.theirs / t.ours for t in timings)
        moved = (2 * m + 3) * B * D * 4
        print(
            f"{f'{B}, {m}, {D}':>20} {moved:>10.3g} {moved / floor / 1e9:>6.1f} {floor * 1e3:>9.4f} {mine * 1e3:>9.4f} "
            f"{over:>8.2f} {1 / over:>9.2f} {theirs * 1e3:>9.3f} {gain:>7.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
