"""Random steps of the CPU kernels under sanitizers (tests/fuzz/step_fuzz.cpp); `make fuzz` runs 100,000 of them."""

import os
import subprocess
from pathlib import Path

import pytest
from emulation.backend import compiler

ROOT = Path(__file__).parents[1]
CASES = int(os.environ.get("FUZZ_CASES", "200"))
FLAGS = (
    "-std=c++17",
    "-O0" if CASES < 2000 else "-O1",  # compiles in a quarter of the time; runs three times as long
    "-g",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-pthread",
    "-Wno-subobject-linkage",
)
pytestmark = pytest.mark.check


# "address,undefined" on the widest vectors of this machine, "thread" on the portable ones.
@pytest.mark.parametrize(
    ("sanitizers", "extra"),
    [("address,undefined", ("-march=native",)), ("thread", ("-DPYDEQSOLVE_BYTES_PER_THREAD=64",))],
)
def test_random_steps_are_clean_under_sanitizers(tmp_path, sanitizers, extra):
    program = tmp_path / "step_fuzz"
    source = ROOT / "tests" / "fuzz" / "step_fuzz.cpp"
    subprocess.run(
        [compiler(), *FLAGS, *extra, f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", f"-I{ROOT / 'csrc'}",
         "-o", str(program), str(source)], check=True,
    )  # fmt: skip
    done = subprocess.run([str(program), str(CASES)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{CASES} cases")
