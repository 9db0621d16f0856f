"""The whole solver's time per evaluation beside TorchDEQ's, and beside the time the memory alone would need.

    python benchmarks/native_step.py [--threads N] [--repeats N] [--dtype float32 bfloat16 float16]

fn costs nothing (it returns a stored tensor), so what is timed is the solver. (2m + 3)·B·D words must move per
evaluation; the floor is the time to read as many at the bandwidth measured right before and after each timing, of which
the fraction achieved is the inverse. Ratios are medians of the ratios of single repeats, so that a machine whose
bandwidth others share is compared with itself. With several dtypes the last column is the time over that of the first,
of solves that follow each other. TorchDEQ is optional: pip install torchdeq==0.1.0.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
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


def measure(
    B: int, m: int, D: int, dtypes: Sequence[torch.dtype], read: Callable[[], float], repeats: int
) -> dict[torch.dtype, list[Timing]]:
    """`repeats` timings of each dtype, which take turns."""
    steps = 40 if bytes_moved(B, m, D, dtypes[0]) > 1e6 else 200
    solvers = {dtype: (ours(B, m, D, steps, dtype), torchdeq(B, m, D, steps, dtype)) for dtype in dtypes}
    timings: dict[torch.dtype, list[Timing]] = {dtype: [] for dtype in dtypes}
    for _ in range(repeats + 1):  # the first warms up
        for dtype, (mine, peer) in solvers.items():
            before = read()
            own = seconds(mine) / steps
            floor = bytes_moved(B, m, D, dtype) / ((before + read()) / 2)
            timings[dtype].append(Timing(own, seconds(peer) / steps if peer else math.nan, floor))
    return {dtype: of_it[1:] for dtype, of_it in timings.items()}


def bytes_moved(B: int, m: int, D: int, dtype: torch.dtype) -> int:
    return (2 * m + 3) * B * D * dtype.itemsize


def ours(B: int, m: int, D: int, steps: int, dtype: torch.dtype) -> Callable[[], None]:
    """A solve of exactly `steps` evaluations with m stored rows, that is m − 1 differences."""
    values = iter_values(B, D, dtype)
    stop = Stop(rtol=0.0, max_steps=steps)
    solver = Anderson(memory=m - 1)

    def run() -> None:
        solution = solve(values(), torch.zeros(B, D, dtype=dtype), solver=solver, stop=stop, gradient=None)
        assert int(solution.evaluations.max()) == steps

    return run


def torchdeq(B: int, m: int, D: int, steps: int, dtype: torch.dtype) -> Callable[[], None] | None:
    """The same by TorchDEQ's anderson_solver with a history of m; it has none for states of 16 bits."""
    if dtype.itemsize < 4:  # torch.linalg.solve, which it calls, refuses them
        return None
    try:
        from torchdeq.solver.anderson import anderson_solver
    except ImportError:
        return None
    values = iter_values(B, D, dtype)

    def run() -> None:
        anderson_solver(values(), torch.zeros(B, D, dtype=dtype), max_iter=steps, m=m, tol=0.0, stop_mode="rel")

    return run


def iter_values(B: int, D: int, dtype: torch.dtype) -> Callable[[], Callable[[torch.Tensor], torch.Tensor]]:
    """Maps that return one of a few random tensors in turn: free of cost, and never converging.

    Their sizes differ, so that the residual changes even in units of rounding of 16 bits.
    """
    store = [((1 + k % 3) * torch.randn(B, D)).to(dtype) for k in range(9)]

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
    names = ["float64", "float32", "bfloat16", "float16"]
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=names)
    options = parser.parse_args()
    dtypes = [getattr(torch, name) for name in options.dtype]
    torch.set_num_threads(options.threads)
    print(build_info())
    read = reader()
    print(f"{options.threads} threads; medians of {options.repeats} repeats")
    print(
        f"{'B, m, D':>20} {'dtype':>9} {'bytes':>10} {'GB/s':>6} {'floor ms':>9} {'ours ms':>9} {'x floor':>8} "
        f"{'fraction':>9} {'TorchDEQ':>9} {'ratio':>7} {'/ first':>8}"
    )
    for B, m, D in SHAPES:
        by_dtype = measure(B, m, D, dtypes, read, options.repeats)
        for dtype, timings in by_dtype.items():
            report(f"{B}, {m}, {D}", dtype, bytes_moved(B, m, D, dtype), timings, by_dtype[dtypes[0]])


def report(shape: str, dtype: torch.dtype, moved: int, timings: list[Timing], first: list[Timing]) -> None:
    floor, mine, theirs = (statistics.median(getattr(t, name) for t in timings) for name in ("floor", "ours", "theirs"))
    over = statistics.median(t.ours / t.floor for t in timings)
    gain = statistics.median(t.theirs / t.ours for t in timings)
    of_first = statistics.median(t.ours / other.ours for t, other in zip(timings, first, strict=True))
    print(
        f"{shape:>20} {str(dtype).removeprefix('torch.'):>9} {moved:>10.3g} {moved / floor / 1e9:>6.1f} "
        f"{floor * 1e3:>9.4f} {mine * 1e3:>9.4f} {over:>8.2f} {1 / over:>9.2f} {theirs * 1e3:>9.3f} {gain:>7.1f} "
        f"{of_first:>8.2f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
