"""Where the programs put what they have to say: messages, and files in a folder."""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# what a folder is not called
FILE_SUFFIXES = {
    ".png", ".jpg", ".jpeg", ".gif", ".pdf", ".html", ".json", ".txt", ".csv", ".safetensors", ".pt", ".pth", ".ckpt",
    ".bin", ".npy", ".npz", ".zip", ".gz", ".tar",
}  # fmt: skip

NAMED = 4  # files in a message, at most


def say(line: str) -> None:
    """Print a line on standard error; standard output is for results."""
    print(line, file=sys.stderr, flush=True)


def counted(number: int, noun: str) -> str:
    """Return a number and its noun, which has an s unless there is one: "1 image", "1,200 images"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def require(module: str, purpose: str, extra: str) -> None:
    """Nothing, if a module that an extra installs can be imported.

    Raises:
        ImportError: it cannot; says what it is for and how to get it.
    """
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{purpose}: pip install 'pydeqsolve[{extra}]'") from error


@contextmanager
def writable(
    folder: str | Path, files: Sequence[str] = (), replace: bool = False, remedy: str = "--overwrite replaces it"
) -> Iterator[Path]:
    """Create a folder and try writing to it; if the block fails, remove what was created and is still empty.

    Args:
        folder: where a command's files go.
        files: their names; in the place of a file there may be another file, if `replace` is set, but no folder.
        replace: files that are there already may be replaced.
        remedy: what the user can do if they may not.

    Raises:
        ValueError: it cannot be created or written to, has the name of a file, or holds what would be replaced.
    """
    if not str(folder):
        raise ValueError("--output: the name of a folder is required, got ''")
    folder = Path(folder)
    if folder.suffix.lower() in FILE_SUFFIXES and not os.path.lexists(folder):
        raise ValueError(f"--output {folder}: the name of a folder is required, {folder.suffix} is that of a file")
    created = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{os.getpid()}.probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"--output {folder}: cannot be written to ({error.strerror or error})") from error
    taken = [name for name in files if os.path.lexists(folder / name)]
    for name in taken:
        if (folder / name).is_dir():
            raise ValueError(f"--output {folder}: {name} is the name of a file to write, but a folder is there")
    for inner in {(folder / name).parent for name in files}:
        if os.path.lexists(inner) and not inner.is_dir():
            raise ValueError(f"--output {folder}: {inner.name} is the name of a folder to write, but a file is there")
    if taken and not replace:
        more = f" and {len(taken) - NAMED} more" if len(taken) > NAMED else ""
        raise ValueError(f"--output {folder}: holds {', '.join(taken[:NAMED])}{more} already; {remedy}")
    try:
        yield folder
    except BaseException:
        for path in created:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        raise


def finite(value: Any) -> Any:
    """Return the same structure with null for NaN and infinity, which JSON lacks."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
