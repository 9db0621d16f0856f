"""The native step takes its threads from the pool that torch uses."""

import subprocess
import sys
from pathlib import Path

import pytest

from pydeqsolve.step import native

# The step is work for two of the four threads.
SCRIPT = """
import os
import torch
from pydeqsolve import Anderson, Stop, solve
torch.set_num_threads(4)
x = torch.ones(1_000_000)
target = torch.randn(8, 400)
threads = lambda: set(os.listdir("/proc/self/task"))
x.tanh()
before = threads()
solve(lambda z: 0.5 * z + target, torch.zeros_like(target), solver=Anderson(6), stop=Stop(max_steps=3))
x.tanh()
assert len(before) >= 4
print(len(threads() - before))
print(len({line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}))
"""


@pytest.mark.skipif(native._native is None, reason="no native module")
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted as Linux shows them")
def test_a_solve_starts_no_threads_beside_those_of_torch_nor_ends_any_of_them():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "1"]
