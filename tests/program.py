"""The program deq-ddim as the tests run it, in this process or as one of its own, and pictures for it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

import diffusion
from diffusion.program.cli import main

SMALL = ["--shape", 1, 8, 8, "--batch", 2, "--distance", 0]  # of fit: what takes no time
ROOT = Path(diffusion.__file__).parent.parent


def run(*argv, capsys):
    """(exit code, standard output, lines of standard error) of the program, run in this process."""
    code = main([str(part) for part in argv])
    out, err = capsys.readouterr()
    return code, out, err.splitlines()


def program(*argv, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *map(str, argv)], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        **options,
    )  # fmt: skip


def signal_when(process, condition, number):
    """Send a signal to a program once a condition holds; the lines of its standard error."""
    end = time.monotonic() + 90
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.005)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    return err.splitlines()


def kill_when(condition, *argv):
    """Run the program and kill it, with no chance to save, once a condition holds."""
    process = program("-m", "diffusion", *argv)
    signal_when(process, condition, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL


def write_pictures(folder, count=5):
    """`count` random 8×8 PNG files in a new folder, which is returned."""
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8), dtype=np.uint8)
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / f"{i}.png")
    return folder
