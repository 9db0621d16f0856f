"""The CPU kernels on processors other than this one: 64-bit Arm, and x86-64 without AVX2, FMA or F16C, under emulation.

`make arm-check` names the Debian packages where a compiler or an emulator is missing; `.ci/run` installs them.
"""

import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from emulation.backend import compiler

from pydeqsolve.step import native

ROOT = Path(__file__).parents[1]
FLAGS = ("-std=c++17", "-O2", "-fno-math-errno", "-fno-trapping-math", "-pthread", "-Wno-subobject-linkage", "-static")
CASES = 100

PROGRAMS = ("aarch64-linux-gnu-g++", "qemu-aarch64", "qemu-x86_64")
missing = [program for program in PROGRAMS if shutil.which(program) is None]
pytestmark = [
    pytest.mark.check,
    pytest.mark.skipif(platform.machine() != "x86_64", reason="compares with x86-64; elsewhere every test is a test"),
    pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} missing: make arm-check says where from"),
]


def fuzz(program: Path, build: Sequence[str], run: Sequence[str] = ()) -> str:
    """What tests/fuzz/step_fuzz.cpp prints, compiled by `build` and run by `run`."""
    source = ROOT / "tests" / "fuzz" / "step_fuzz.cpp"
    subprocess.run([*build, *FLAGS, f"-I{ROOT / 'csrc'}", "-o", str(program), str(source)], check=True)
    done = subprocess.run([*run, str(program), str(CASES)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{CASES} cases, ")
    return done.stdout


def test_random_steps_on_arm_have_the_bits_of_the_portable_build_on_x86(tmp_path):
    # Both with two lanes and each operation rounded by itself: then nothing may differ.
    arm = fuzz(tmp_path / "arm", ["aarch64-linux-gnu-g++", "-ffp-contract=off"], ["qemu-aarch64"])
    assert arm == fuzz(tmp_path / "x86", [compiler(), "-ffp-contract=off"])


def test_a_whole_step_on_arm_equals_its_passes_with_the_fused_operations_of_the_module(tmp_path):
    fuzz(tmp_path / "arm", ["aarch64-linux-gnu-g++", "-ffp-contract=fast"], ["qemu-aarch64"])


@pytest.mark.skipif(native._native is None, reason="no native module")
@pytest.mark.parametrize(
    ("processor", "isa"),
    [("Nehalem", "portable"), ("Haswell", "avx2"), ("Haswell,-f16c", "portable"), ("Haswell,-fma", "portable")],
)
def test_the_module_takes_what_the_processor_has(processor, isa):
    command = ["qemu-x86_64", "-cpu", processor, sys.executable, str(ROOT / "tests" / "old_processor.py")]
    done = subprocess.run([*command, native._native.__file__], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == f"{isa}\n"
