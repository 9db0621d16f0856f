"""Whether torch's own work slows down beside native steps: one thread pool serves both.

    python benchmarks/torch_neighbours.py [--threads N ...] [--repeats N]

A process for every count of threads and OMP_WAIT_POLICY times torch's work (a product of matrices, a convolution, tanh)
right after itself, after the two passes of an Anderson step, and, for what a large step displaces from the caches,
after torch has read as many bytes; in turn in one run. Ratios are of medians over the half of the repeats in which the
system took the processor away least often (involuntary switches). Also printed: how many
new threads torch's work had to start after a step, and how many copies of libgomp are loaded.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pydeqsolve import build_info
from pydeqsolve.step.backend import choose
from pydeqsolve.step.records import MIX
from pydeqsolve.step.ring import Method, Ring

SHAPES = [(256, 6, 4_096), (8, 6, 400), (1, 5, 64)]  # B, memory, D: every thread, two threads' worth, one thread


def stepper(B: int, memory: int, D: int) -> tuple[Ring, Callable[[], object]]:
    """A ring with all its rows, and a step of it: `measure` and `advance`."""
    ring = Ring(Method(memory=memory), B, 1, D, torch.float32, torch.device("cpu"))
    backend = choose(ring)
    z, f, rows = torch.randn(B, 1, D), torch.randn(B, 1, D), torch.arange(B)
    out, mode = torch.empty_like(z), torch.full((B, 1), MIX, dtype=torch.uint8)

    def step() -> None:
        backend.measure(f, z, rows, None)
        backend.advance(z, mode, rows, out)

    for _ in range(ring.slots):
        f.normal_()
        step()
    return ring, step


def works() -> dict[str, Callable[[], Tensor]]:
    a, x, kernel, v = (torch.randn(s) for s in ((512, 512), (8, 32, 32, 32), (32, 32, 3, 3), (1_000_000,)))
    return {
        "product": lambda: a @ a,
        "convolution": lambda: torch.nn.functional.conv2d(x, kernel, padding=1),
        "tanh": lambda: v.tanh(),
    }


def timed(before: Callable[[], object], work: Callable[[], object]) -> tuple[int, float]:
    """Involuntary switches during `before` and `work`, and the seconds of `work`."""
    switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
    before()
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw - switches, seconds


def quiet_median(times: list[tuple[int, float]]) -> float:
    quiet = sorted(times, key=lambda time: time[0])[: (len(times) + 1) // 2]
    return statistics.median(seconds for _, seconds in quiet)


def child(threads: int, repeats: int) -> None:
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    print(f"{threads} threads, OMP_WAIT_POLICY={os.environ['OMP_WAIT_POLICY']}")
    for shape in SHAPES:
        ring, step = stepper(*shape)
        reading = torch.cat((ring.R.flatten(), ring.F.flatten()))
        for name, work in works().items():
            befores = {"itself": work, "step": step, "reading": lambda reading=reading: reading.sum()}
            times: dict[str, list[tuple[int, float]]] = {key: [] for key in befores}
            for _ in range(repeats):
                for key, before in befores.items():
                    before()
                    times[key].append(timed(before, work))
            t = {key: quiet_median(value) for key, value in times.items()}
            work()
            tasks = set(os.listdir("/proc/self/task"))
            step()
            work()
            new = set(os.listdir("/proc/self/task")) - tasks
            itself, step_ratio, reading_ratio = t["itself"], t["step"] / t["itself"], t["reading"] / t["itself"]
            print(
                f"  {shape!s:15} {name:11} {1e3 * itself:6.2f} ms after itself; times as long after a step "
                f"{step_ratio:.2f}, after reading {reading_ratio:.2f}; threads {len(tasks)}, new {len(new)}",
                flush=True,
            )
    copies = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line}
    print(f"  copies of libgomp: {len(copies)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(arguments.child, arguments.repeats)
    print(f"torch {torch.__version__}, {build_info()['cpu_isa']}, {os.cpu_count()} cores", flush=True)
    for threads in arguments.threads:
        for policy in ("PASSIVE", "ACTIVE"):
            command = [sys.executable, __file__, "--child", str(threads), "--repeats", str(arguments.repeats)]
            subprocess.run(command, check=True, env={**os.environ, "OMP_WAIT_POLICY": policy})


if __name__ == "__main__":
    main()
