"""The step on a GPU: its kernels' bandwidth, and the whole solver beside TorchDEQ's.

    python benchmarks/cuda_benchmark.py [--repeats N] [--dtype float32 bfloat16 …]

fn costs nothing (it returns a stored tensor), so what is timed is the solver. `kernels` is the time of the passes of
one step between two events, `GB/s` the (2m + 4)·B·D words they move in that time, `copy` what a device-to-device copy
of a large tensor reaches in the same run. TorchDEQ is optional: pip install torchdeq==0.1.0. Exits with 2 where
nothing can be measured. `--device cpu` runs the same lines on the host, to see that they run: its times mean nothing.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable

import torch
from native_step import SHAPES, ours, torchdeq

from pydeqsolve import build_info
from pydeqsolve.step.backend import choose
from pydeqsolve.step.records import MIX
from pydeqsolve.step.ring import Method, Ring

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
STEPS = 40
CALLS = 20  # of both passes between two events


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Of one run, from an idle device to an idle device; by the device's clock where it has one."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def median(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    run()  # warms up
    return statistics.median(seconds(run, device) for _ in range(repeats))


def passes(B: int, m: int, D: int, dtype: torch.dtype, device: torch.device) -> Callable[[], None]:
    """`CALLS` times measure and advance, with m stored rows."""
    ring = Ring(Method(memory=m - 1), B, 1, D, dtype, device)
    backend = choose(ring)
    rows = torch.arange(B, device=device)
    f, z = torch.randn(2, B, 1, D, device=device, dtype=dtype)
    mode = torch.full((B, 1), MIX, dtype=torch.uint8, device=device)
    out = torch.empty_like(z)
    for _ in range(m + 1):  # fills the ring with rows that differ
        backend.measure(f, z, rows, None)
        backend.advance(z, mode, rows, out)
        f = torch.randn(B, 1, D, device=device, dtype=dtype)

    def run() -> None:
        for _ in range(CALLS):
            backend.measure(f, z, rows, None)
            backend.advance(z, mode, rows, out)

    return run


def copy_bandwidth(device: torch.device, repeats: int) -> float:
    """Bytes read and written per second by a copy of 1 GiB (of 1 MiB on the host)."""
    x = torch.zeros(2**28 if device.type == "cuda" else 2**18, device=device)
    y = torch.empty_like(x)
    return 2 * x.nbytes / median(lambda: y.copy_(x), device, repeats)


def why_not(device: torch.device) -> str:
    """Why nothing can be measured on this device; empty where it can."""
    if device.type == "cpu":
        return ""
    if not torch.cuda.is_available():
        return "NO GPU HERE: NOTHING WAS MEASURED. benchmarks/cuda_static.py says what can be known without one."
    info = build_info()
    if not info["native"]:
        return f"THE NATIVE MODULE IS NOT LOADED: NOTHING WAS MEASURED. {info['native_error']}"
    if not info["cuda_architectures"]:
        return "THIS BUILD HAS NO CUDA KERNELS: NOTHING WAS MEASURED. Install where nvcc is found."
    return ""


def compare(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, repeats: int, copy: float) -> None:
    """Prints the row of one shape."""
    B, m, D = shape
    kernels = median(passes(B, m, D, dtype, device), device, repeats) / CALLS
    mine = median(ours(B, m, D, STEPS, dtype), device, repeats) / STEPS
    peer = torchdeq(B, m, D, STEPS, dtype)
    theirs = median(peer, device, repeats) / STEPS if peer else math.nan
    reached = (2 * m + 4) * B * D * dtype.itemsize / kernels
    figures = (kernels * 1e6, reached / 1e9, 100 * reached / copy, mine * 1e6, theirs * 1e6, theirs / mine)
    print(f"{f'{B}, {m}, {D}':>20}" + "".join(f"{figure:>13.1f}" for figure in figures), flush=True)


def main(arguments: list[str] | None = None, shapes: list[tuple[int, int, int]] = SHAPES) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32", "bfloat16"])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    print(build_info())
    if reason := why_not(device):
        print(reason, file=sys.stderr)
        sys.exit(2)
    if device.type == "cpu":
        print("ON THE HOST: THESE TIMES SAY NOTHING ABOUT A GPU.")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "host"
    with torch.device(device):  # where the solvers' own states are made
        copy = copy_bandwidth(device, options.repeats)
        print(f"{name}: copy {copy / 1e9:.0f} GB/s; median of {options.repeats}")
        if torchdeq(1, 2, 4, 2, torch.float32) is None:
            print("TorchDEQ is not installed (pip install torchdeq==0.1.0): its columns say nan")
        for dtype in options.dtype:
            print(f"\n{dtype}" + (": TorchDEQ has no solver for 16 bits" if DTYPES[dtype].itemsize < 4 else ""))
            titles = ("kernels µs", "GB/s", "% of copy", "solver µs", "TorchDEQ µs", "ratio")
            print(f"{'B, m, D':>20}" + "".join(f"{title:>13}" for title in titles))
            for shape in shapes:
                compare(shape, DTYPES[dtype], device, options.repeats, copy)


if __name__ == "__main__":
    main()
