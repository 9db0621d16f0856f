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


def test_latents_are_optimised_until_a_classifier_sees_the_target():
    printed = output_of(str(EXAMPLES / "optimise_latent.py"), "--iterations", "8", "--steps", "20", "--images", "3")
    before, after = (
        [float(p) for p in line.split(",")] for line in re.findall(r"probability of 8: ([\d., ]+) \(", printed)
    )
    accuracy = float(re.search(r"classifier: ([\d.]+)%", printed).group(1))
    assert accuracy > 90
    assert sum(after) > sum(before) + 1


def test_a_walk_between_two_inverted_images_starts_and_ends_at_them(tmp_path):
    picture = tmp_path / "walk.png"
    printed = output_of(str(EXAMPLES / "interpolate.py"), "--steps", "50", "--count", "5", "--output", str(picture))
    ends = [float(e) for e in re.search(r"real images: (\S+), (\S+) \(", printed).groups()]
    assert max(ends) < 1e-3
    assert picture.read_bytes().startswith(b"\x89PNG")


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
