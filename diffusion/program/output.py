"""Where the programs put what they have to say: messages, and files in a folder."""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def say(line: str) -> None:
    """Print a line on standard error; standard output is for results."""
    print(line, file=sys.stderr, flush=True)


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
def writable(folder: str | Path) -> Iterator[Path]:
    """Create a folder and try writing to it; if the block fails, remove what was created and is still empty.

    Raises:
        ValueError: it cannot be created or written to.
    """
    folder = Path(folder)
    created = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{os.getpid()}.probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"--output {folder}: cannot be written to ({error.strerror or error})") from error
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
