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


def test_digits_change_their_class_and_noise_maps_lose_nothing_at_any_guidance(tmp_path):
    picture = tmp_path / "edited.png"
    options = ["--count", "10", "--steps", "20", "--guidance", "1", "7.5", "--ways", "noise maps", "plain DDIM"]
    printed = output_of(str(EXAMPLES / "edit_class.py"), *options, "--output", str(picture))
    lines = re.findall(r"(.+), w = (\S+): loss \S+ \(most (\S+)\); new class (\S+), old (\S+);", printed)
    found = {(way, scale): (float(loss), float(new), float(old)) for way, scale, loss, new, old in lines}
    for scale in ("1", "7.5"):
        loss, new, old = found["noise maps", scale]
        assert loss <= 1e-12
        assert new >= 0.9
        assert old == 0
    assert found["plain DDIM", "7.5"][0] > 1
    assert picture.read_bytes().startswith(b"\x89PNG")
