"""What the compiled CUDA kernels say about their speed, without a GPU.

    python benchmarks/cuda_static.py [--arch 90 …] [--check]

Compiles csrc/cuda/*.cu to machine code with nvcc and prints, per kernel instance: registers, spills, local
memory, dynamic shared memory of a thread block, and how many threads a multiprocessor can hold; then bytes, launches
and the time that memory and double precision units allow per step, for the shapes of the native step's benchmark.
--check exits with 1 if a kernel spills or uses local memory, or if a kernel for aligned rows has no 16-byte loads.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from native_step import SHAPES

CSRC = Path(__file__).resolve().parents[1] / "csrc"
SOURCES = [CSRC / "cuda" / f"{name}_cuda.cu" for name in ("step", "krylov")]
ARCHITECTURES = ("75", "80", "86", "89", "90", "100", "120")
# Per multiprocessor: threads, thread blocks, KiB of shared memory (CUDA C++ Programming Guide, technical
# specifications per compute capability). Registers: 65,536, handed out to warps 256 at a time.
LIMITS = {
    "75": (1024, 16, 64), "80": (2048, 32, 164), "86": (1536, 16, 100), "89": (1536, 24, 100), "90": (2048, 32, 228),
    "100": (2048, 32, 228), "120": (1536, 24, 100),
}  # fmt: skip
# Bytes per second and double precision multiply-adds per second, as the vendor states them.
DEVICES = {"H100 SXM": (3.35e12, 17e12), "RTX 4090": (1.008e12, 0.645e12)}
WARP_FEATURES, CHUNK_FEATURES, SOLVE_IN_MIX, SOLVE_IN_MIX_ALONE = 1024, 4096, 8, 16  # csrc/cuda/step_cuda.cu
NAMES = (
    "measure|finish|judge|keep|sum|weights|mix|"
    "append|append_part|append_total|coordinates|combine|pass|pass_total|pass_write|tell|count|count_total"
)
SCALAR = r"f|d|NS_8BFloat16E|NS_4HalfE|NS0_4PackIfLb0EEE|t|NS0_\d+[A-Z][a-z]+I[fd]EE"
INSTANCE = re.compile(rf"({NAMES})_kernel(?:I({SCALAR})?((?:L[ib]\d+E)*)E)?")
SCALARS = {
    "f": "float",
    "d": "double",
    "NS_8BFloat16E": "bfloat16",
    "NS_4HalfE": "float16",
    "NS0_4PackIfLb0EEE": "16 bytes",
    "t": "2 bytes",
    None: "",
}


@dataclass
class Kernel:
    """One instance: measure <storage, ages, many, by steps, aligned>, append_part <scalar, aligned, stage>, …"""

    name: str
    scalar: str | None
    arguments: tuple[int, ...]
    registers: int = 0
    stack: int = 0
    spills: int = 0
    wide_loads: int = 0

    @property
    def title(self) -> str:
        arguments = ", ".join([*filter(None, [scalar_name(self.scalar)]), *map(str, self.arguments)])
        return f"{self.name}<{arguments}>" if arguments else self.name

    @property
    def threads(self) -> int:
        return 1024 if self.name == "sum" else 256

    @property
    def has_wide_loads(self) -> bool:
        """Whether it must have them: it reads rows, and these are aligned."""
        by_place = {"measure": 3, "append": 0, "append_part": 0, "combine": 0}
        return self.name == "mix" or (self.name in by_place and bool(self.arguments[by_place[self.name]]))

    def shared(self) -> int:
        """Bytes of a thread block, at the largest memory the instance is chosen for, 16 at most, and at GMRES(30)."""
        if self.name == "measure":
            ages, _, by_steps, _ = self.arguments
            m, dots = ages, 4 if by_steps else 2
            return 8 * 8 * (dots * (m + 1) + 4 + dots * ages + 2 + m + 1)
        if self.name == "finish":
            return 8 * ((4 if self.arguments[0] else 2) * 17 + 4)
        system = 16 * 16 + 2 * 16 + 9
        doubles = {
            "sum": 1024, "weights": 8 * system, "mix": 8 * (system + 17), "judge": 24, "append": 8 * 130,
            "append_part": 186, "append_total": 186, "coordinates": 240, "combine": 240, "pass": 64, "pass_total": 4,
            "count": 45,
        }  # fmt: skip
        return 8 * doubles.get(self.name, 0)

    def resident(self, architecture: str) -> int:
        """Threads that one multiprocessor holds at once."""
        threads, blocks, shared = LIMITS[architecture]
        warps = self.threads // 32
        by_registers = 65536 // (-(-self.registers * 32 // 256) * 256) // warps
        reserved = 0 if architecture == "75" else 1024  # the driver's own, per thread block
        by_shared = shared * 1024 // max(1, self.shared() + reserved)
        return min(threads // self.threads, blocks, by_registers, by_shared) * self.threads


def scalar_name(text: str | None) -> str:
    """The first template argument as the sources write it: a type, or a Krylov pass of one."""
    found = re.fullmatch(r"NS0_\d+([A-Z][a-z]+)I([fd])EE", text or "")
    return f"{found[1]}<{SCALARS[found[2]]}>" if found else SCALARS[text]


def find_nvcc() -> str | None:
    named = os.environ.get("CUDACXX")
    return shutil.which(named) if named else shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def find_cuobjdump() -> str | None:
    """On PATH, or in the wheel nvidia-cuda-cuobjdump, which keeps it out of PATH."""
    if found := shutil.which("cuobjdump"):
        return found
    try:
        files = importlib.metadata.files("nvidia-cuda-cuobjdump") or ()
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((str(f.locate()) for f in files if f.name in ("cuobjdump", "cuobjdump.exe")), None)


def instance(text: str) -> tuple[str, str | None, tuple[int, ...]] | None:
    found = INSTANCE.search(text)
    if not found:
        return None
    return found[1], found[2], tuple(int(n) for n in re.findall(r"L[ib](\d+)E", found[3] or ""))


def compile_kernels(nvcc: str, architecture: str, source: Path, cubin: Path) -> list[Kernel]:
    """The kernels of one source and architecture with what ptxas reports about them."""
    command = [nvcc, "-std=c++17", "-O3", "-Xptxas=-v", f"-arch=sm_{architecture}", "-cubin", "-o", str(cubin)]
    done = subprocess.run([*command, f"-I{CSRC}", str(source)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    kernels: list[Kernel] = []
    for line in done.stderr.splitlines():
        if "Compiling entry function" in line:
            key = instance(line)
            if key is None:
                sys.exit(f"a kernel this script does not know: {line}")
            kernels.append(Kernel(*key))
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            kernels[-1].stack, kernels[-1].spills = int(found[1]), int(found[2]) + int(found[3])
        elif found := re.search(r"Used (\d+) registers", line):
            kernels[-1].registers = int(found[1])
    return sorted(kernels, key=lambda k: (k.name, scalar_name(k.scalar), k.arguments))


def count_wide_loads(cuobjdump: str, cubin: Path, kernels: list[Kernel]) -> None:
    """Fills in how many 16-byte loads from global memory each kernel has."""
    # It calls nvdisasm, which the wheels install beside it.
    path = os.pathsep.join([str(Path(cuobjdump).parent), os.environ.get("PATH", "")])
    done = subprocess.run(
        [cuobjdump, "-sass", str(cubin)], capture_output=True, text=True, env={**os.environ, "PATH": path}
    )
    if done.returncode:
        sys.exit(f"cuobjdump -sass failed: {done.stderr}")
    by_key = {(k.name, k.scalar, k.arguments): k for k in kernels}
    current = None
    for line in done.stdout.splitlines():
        if "Function :" in line:
            key = instance(line)
            current = by_key[key] if key else None
        elif current and re.search(r"\bLDG\.E(\.\w+)*\.128\b", line):
            current.wide_loads += 1


def faults(kernels: list[Kernel], loads_counted: bool) -> list[str]:
    found = []
    for k in kernels:
        if k.stack or k.spills:
            found.append(f"{k.title}: {k.stack} bytes of local memory, {k.spills} bytes of spills")
        if loads_counted and k.has_wide_loads and not k.wide_loads:
            found.append(f"{k.title}: no 16-byte loads")
    return found


def print_kernels(architecture: str, kernels: list[Kernel], loads_counted: bool) -> None:
    print(f"\nsm_{architecture}: {LIMITS[architecture][0]} threads per multiprocessor")
    print(
        f"{'kernel':<34}{'registers':>10}{'local':>7}{'spills':>8}{'shared':>8}{'resident threads':>18}{'LDG.128':>9}"
    )
    for k in kernels:
        resident = k.resident(architecture)
        share = f"{resident} ({100 * resident // LIMITS[architecture][0]} %)"
        loads = k.wide_loads if loads_counted else "?"
        print(f"{k.title:<34}{k.registers:>10}{k.stack:>7}{k.spills:>8}{k.shared():>8}{share:>18}{loads:>9}")


def double_operations(d: int, size: int) -> int:
    """Double precision instructions per entry of both passes, conversions included; d differences, words of `size`."""
    batches = -(-d // (2 if size == 2 and d > 4 else 4))  # csrc/cuda/gram.cuh; each forms r, y_0 and its newest row
    measure = 4 + 4 * batches + 4 * d  # squares of r and f; convert, subtract, two multiply-adds
    return measure + 2 + 3 * d  # mix: convert, subtract, multiply-add


def print_steps(size: int) -> None:
    """Words: f, z, m − 1 older rows of r read and r, f written; then m rows of f read and the iterate written."""
    name = {2: "bfloat16 or float16", 4: "float32"}[size]
    print(f"\nOne step, Anderson II, joint, β = 1, {name}; m stored rows, that is m − 1 differences")
    print("words per system (2m + 4)·D; the design's figure (2m + 3)·D; TorchDEQ 0.1.0 at m = 6: 71·D")
    columns = "".join(f"{name + ': memory µs':>22}{'fp64 µs':>9}" for name in DEVICES)
    print(f"{'B, m, D':>20}{'launches':>10}{'MB':>9}{columns}")
    for B, m, D in SHAPES:
        chunks = 1 if D <= WARP_FEATURES else -(-D // CHUNK_FEATURES)
        alone = m - 1 <= (SOLVE_IN_MIX_ALONE if chunks == 1 else SOLVE_IN_MIX)
        launches = (1 if chunks == 1 else 2) + (1 if alone else 2)
        moved, operations = (2 * m + 4) * B * D * size, double_operations(m - 1, size)
        times = "".join(
            f"{moved / bandwidth * 1e6:>22.2f}{operations * B * D / fp64 * 1e6:>9.2f}"
            for bandwidth, fp64 in DEVICES.values()
        )
        print(f"{f'{B}, {m}, {D}':>20}{launches:>10}{moved / 1e6:>9.3f}{times}")
    print(
        "Computed, not measured: the larger of the two columns is the roofline. A launch takes some microseconds more."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    nvcc, cuobjdump = find_nvcc(), find_cuobjdump()
    if nvcc is None:
        sys.exit("nvcc not found: put it on PATH or name it in CUDACXX")
    if cuobjdump is None:
        message = "cuobjdump not found: pip install nvidia-cuda-cuobjdump; 16-byte loads cannot be counted"
        if options.check:
            sys.exit(message)
        print(message)
    found = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:

        def compiled(job: tuple[str, Path]) -> list[Kernel]:
            architecture, source = job
            cubin = Path(folder) / f"{source.stem}_{architecture}.cubin"
            kernels = compile_kernels(nvcc, architecture, source, cubin)
            if cuobjdump:
                count_wide_loads(cuobjdump, cubin, kernels)
            return kernels

        parts = pool.map(compiled, [(architecture, source) for architecture in options.arch for source in SOURCES])
        for architecture in options.arch:
            kernels = [kernel for _ in SOURCES for kernel in next(parts)]
            print_kernels(architecture, kernels, bool(cuobjdump))
            found += [f"sm_{architecture}: {fault}" for fault in faults(kernels, bool(cuobjdump))]
    for size in (4, 2):
        print_steps(size)
    print("\n" + ("\n".join(found) or "no spills, no local memory" + (", 16-byte loads" if cuobjdump else "")))
    if options.check and found:
        sys.exit(1)


if __name__ == "__main__":
    main()
