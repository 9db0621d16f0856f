"""The programs of docs/examples that use `diffusion` run and say what they promise."""

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"


def output_of(*arguments):
    """What the command prints, of one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_processes_share_the_rows_of_one_image():
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    printed = output_of(*launcher, str(EXAMPLES / "sample_on_ranks.py"), "--steps", "30")
    shares = [int(rows) for rows in re.findall(r"rank \d of 2: (\d+) model rows", printed)]
    rows, error = re.search(r"(\d+) rows in all, (\S+) from", printed).groups()
    assert len(shares) == 2
    assert int(rows) <= sum(shares) < 1.5 * int(rows)
    assert float(error) < 1e-3
