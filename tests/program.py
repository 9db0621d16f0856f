"""The program deq-ddim as the tests run it, in this process or as one of its own, and pictures for it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

import diffusion
from diffusion.cli import main

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


def write_pictures(folder, count=5):
    """`count` random 8×8 PNG files in a new folder, which is returned."""
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8), dtype=np.uint8)
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / f"{i}.png")
    return folder
