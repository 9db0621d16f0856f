"""What the CPU kernels were compiled to, and what a call costs before any kernel runs.

    python benchmarks/cpu_static.py

Disassembles the installed module (objdump of GNU binutils) and counts, per instruction set, the instructions of the row
kernels that read whole vectors from memory, convert to wider numbers, multiply and add, and read single numbers. Then
times both passes of a step on one system of 64 numbers, m = 5: the module's own function, that of `Backend`, and the
operator registered with torch.library, the kernel included in each; least of several medians, in microseconds.
"""

from __future__ import annotations

import re
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable

import torch

import pydeqsolve.operators  # noqa: F401 - registers them
from pydeqsolve import build_info
from pydeqsolve.step import native
from pydeqsolve.step.backend import choose
from pydeqsolve.step.records import MIX
from pydeqsolve.step.ring import STORAGES, Method, Ring

KERNELS = re.compile(
    r"<void pydeqsolve::(portable|avx2|avx512)::.*?(measure_rows|mix_rows|mix_piece)<(?:pydeqsolve::)?(\w+)"
)
WIDTH = {"xmm": 16, "ymm": 32, "zmm": 64}
COLUMNS = ("vector loads", "conversions", "multiply-adds", "scalar loads")


def kind_of(instruction: str) -> tuple[str, int] | None:
    """What an instruction is counted as, and how many bytes it reads."""
    name, _, operands = instruction.partition(" ")
    reads = "(" in operands.rsplit(",", 1)[0] and not name.startswith("prefetch")
    registers = [WIDTH[r] for r in re.findall(r"%([xyz]mm)\d", operands)]
    if not registers:
        return None
    if re.match(r"v?cvt(ps2pd|ph2ps)", name):
        return "conversions", max(registers) // 2 if reads else 0
    if re.match(r"vf(n?m)(add|sub)\d+p[sd]", name) or re.match(r"v?mulp[sd]", name):
        return "multiply-adds", max(registers) if reads else 0
    if re.match(r"v?movs[sd]\b|vf\w+s[sd]\b", name) and reads:
        return "scalar loads", 0
    if re.match(r"v?mov[ua]p[sd]|v?movdq|v?movq|v?subp[sd]|v?addp[sd]|v?psll|v?pand", name) and reads:
        return "vector loads", max(registers)
    return None


def disassembly() -> dict[tuple[str, str, str], Counter[str]]:
    """Counts per (instruction set, kernel, scalar)."""
    path = sys.modules["pydeqsolve._native"].__file__
    listing = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", str(path)], capture_output=True, text=True, check=True
    ).stdout
    found: dict[tuple[str, str, str], Counter[str]] = {}
    counts: Counter[str] | None = None
    for line in listing.splitlines():
        if line.endswith(">:"):
            match = KERNELS.search(line)
            counts = found.setdefault(match.groups(), Counter()) if match else None
        elif counts is not None and "\t" in line:
            instruction = re.sub(r"\s+", " ", line.split("\t")[-1].strip())
            kind = kind_of(instruction)
            if kind is None:
                continue
            counts[kind[0]] += 1
            if kind[1]:
                counts["vector loads"] += kind[0] != "vector loads"
                counts[f"of {kind[1]} bytes"] += 1
    return found


def best(call: Callable[[], object], repeats: int = 2000) -> float:
    """Microseconds a call; medians of stretches too short to be interrupted often."""
    medians = []
    for _ in range(20):
        times = []
        for _ in range(10):
            started = time.perf_counter()
            for _ in range(repeats // 10):
                call()
            times.append((time.perf_counter() - started) / (repeats // 10))
        medians.append(statistics.median(times))
    return 1e6 * min(medians)


def calls() -> None:
    ring = Ring(Method("anderson II", 5), 1, 1, 64, torch.float32, torch.device("cpu"))
    ring.R.zero_(), ring.F.zero_()
    backend = choose(ring)
    f, z, rows = torch.randn(1, 1, 64), torch.randn(1, 1, 64), torch.arange(1)
    modes = torch.full((1, 1), MIX, dtype=torch.uint8)
    tensors = (ring.R, ring.F, ring.gram, ring.steps_gram, ring.rhs, ring.squares, ring.count)
    first, second = (f, z, *tensors, rows, None, 1, 0, False), (z, modes, *tensors, rows, 1, 0, 0, 0.0, 1.0)
    measure, advance = torch.ops.pydeqsolve.measure.default, torch.ops.pydeqsolve.advance.default
    for _ in range(ring.slots):  # fills the history
        backend.measure(torch.randn(1, 1, 64), z, rows, None)
    module = sys.modules["pydeqsolve._native"]
    layout = native.layout(0, ring.eps, STORAGES.index(ring.dtype), ring.R.shape, ring.R.stride())
    history = native.bind(layout, ring.R, ring.F, ring.places)
    norms, dropped, out = torch.empty(1, 1, 2, dtype=torch.float64), ring.count.clone(), torch.empty_like(z)
    index, of_f, of_z, to = (x.data_ptr() for x in (rows, f, z, out))
    measured = (history, 1, 1, index, 0, of_f, of_z, norms.data_ptr(), 1, 0, 0)
    advanced = (history, 1, 1, index, modes.data_ptr(), 0, dropped.data_ptr(), of_z, to, 1, 0, 0)
    paths: dict[str, Callable[[], object]] = {
        "an empty function of the module": module.cpu_isa,
        "the module's own measure": lambda: module.measure(*measured),
        "Backend.measure": lambda: backend.measure(f, z, rows, None),
        "torch.ops.pydeqsolve.measure": lambda: measure(*first),
        "the module's own advance": lambda: module.advance(*advanced),
        "Backend.advance": lambda: backend.advance(z, modes, rows),
        "torch.ops.pydeqsolve.advance": lambda: advance(*second),
    }
    for name, call in paths.items():
        print(f"  {name:<34}{best(call):6.2f} us")


def main() -> int:
    torch.set_num_threads(1)
    info = build_info()
    print(f"pydeqsolve {info['version']}, torch {info['torch']}, runs {info['cpu_isa'] or 'without the native module'}")
    if not info["native"]:
        print(info["native_error"])
        return 1
    if shutil.which("objdump") is None:
        print("objdump is missing: sudo apt-get install -y binutils")
        return 1
    print(f"{'instruction set, kernel':<32}" + "".join(f"{column:>15}" for column in COLUMNS))
    for (isa, kernel, scalar), counts in sorted(disassembly().items()):
        widths = ", ".join(f"{counts[key]} {key}" for key in sorted(counts) if key.startswith("of "))
        print(f"{f'{isa} {kernel}<{scalar}>':<32}" + "".join(f"{counts[c]:>15}" for c in COLUMNS) + f"   {widths}")
    print("calls, one system of 64 numbers, m = 5:")
    calls()
    return 0


if __name__ == "__main__":
    sys.exit(main())
