"""The step on a GPU: its kernels' bandwidth, and the whole solver beside TorchDEQ's.

    python benchmarks/cuda_benchmark.py [--repeats N]

fn costs nothing (it returns a stored tensor), so what is timed is the solver. `kernels` is the time of the launches of
one step between two events, `GB/s` the (2m + 4)·B·D words they move in that time, `copy` what a device-to-device copy
of a large tensor reaches in the same run. TorchDEQ is optional: pip install torchdeq==0.1.0.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from native_step import SHAPES, median_time, ours, torchdeq

from pydeqsolve import build_info, ops
from pydeqsolve.ring import Method, Ring


def kernel_time(B: int, m: int, D: int, repeats: int) -> float:
    """Median seconds of measure and advance with m stored rows, by events."""
    device = torch.device("cuda")
    ring = Ring(Method(memory=m - 1), B, 1, D, torch.float32, device)
    ops.start(ring)
    rows = torch.arange(B, device=device)
    f, z = torch.randn(2, B, 1, D, device=device)
    mode = torch.full((B, 1), ops.MIX, dtype=torch.uint8, device=device)
    for _ in range(m + 1):  # fills the ring
        ops.measure(ring, f, z, rows, None, "rms")
        ops.advance(ring, z, mode, rows)
        f = torch.randn(B, 1, D, device=device)
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(20):
            ops.measure(ring, f, z, rows, None, "rms")
            ops.advance(ring, z, mode, rows)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 20e3)
    return sorted(times)[len(times) // 2]


def copy_bandwidth(repeats: int) -> float:
    """Bytes read and written per second by a copy of 1 GiB."""
    x = torch.zeros(2**28, device="cuda")
    y = torch.empty_like(x)
    return 2 * 4 * x.numel() / median_time(finished(lambda: y.copy_(x)), repeats)


def finished(run: Callable[[], object]) -> Callable[[], None]:
    def and_wait() -> None:
        run()
        torch.cuda.synchronize()

    return and_wait


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=11)
    options = parser.parse_args()
    info = build_info()
    print(info)
    if not torch.cuda.is_available():
        print("NO GPU HERE: NOTHING WAS MEASURED. benchmarks/cuda_static.py says what can be known without one.")
        return
    if not info["cuda_architectures"]:
        print("THIS BUILD HAS NO CUDA KERNELS: NOTHING WAS MEASURED. Install where nvcc is found.")
        return
    torch.set_default_device("cuda")
    copy = copy_bandwidth(options.repeats)
    print(f"{torch.cuda.get_device_name()}: copy {copy / 1e9:.0f} GB/s; median of {options.repeats}")
    titles = ("kernels µs", "GB/s", "% of copy", "solver µs", "TorchDEQ µs", "ratio")
    print(f"{'B, m, D':>20}" + "".join(f"{title:>13}" for title in titles))
    for B, m, D in SHAPES:
        moved = (2 * m + 4) * B * D * 4
        steps = 40
        kernels = kernel_time(B, m, D, options.repeats)
        mine = median_time(finished(ours(B, m, D, steps)), options.repeats) / steps
        peer = torchdeq(B, m, D, steps)
        theirs = median_time(finished(peer), options.repeats) / steps if peer else float("nan")
        reached = moved / kernels
        figures = (kernels * 1e6, reached / 1e9, 100 * reached / copy, mine * 1e6, theirs * 1e6, theirs / mine)
        print(f"{f'{B}, {m}, {D}':>20}" + "".join(f"{figure:>13.1f}" for figure in figures), flush=True)


if __name__ == "__main__":
    main()
