"""Reading and writing JSON and safetensors files: writes in one move, errors that name the file."""

import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        FileNotFoundError, ValueError: no such file; not a JSON object.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such file") from error
    except ValueError as error:  # not UTF-8, or not JSON
        raise ValueError(f"{path}: not a JSON file ({error})") from error
    kind = type(content).__name__
    if kind != "dict":
        raise ValueError(f"{path}: a JSON object is required, got {kind}")
    return content


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the header entries of a safetensors file.

    Raises:
        FileNotFoundError, ValueError: no such file; cut short or malformed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from error


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace a file by this JSON object, in one move."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, content: str) -> None:
    """Replace a file by this text, in one move."""
    with replacing(path) as temporary:
        temporary.write_text(content, encoding="utf-8")


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Replace a safetensors file, in one move."""
    with replacing(path) as temporary:
        # not save_file, which leaves a file that only its owner may read
        temporary.write_bytes(save({key: value.contiguous() for key, value in tensors.items()}, metadata))


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """Return 16 hexadecimal digits that depend on every bit of the tensors, in their order."""
    digest = hashlib.sha256()
    for value in tensors:
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())  # NumPy has no bfloat16
    return digest.hexdigest()[:16]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a new file beside `path` to write to, and move it there: nobody, whatever crashes, meets half a file."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # else a power cut may leave the new name with an empty file
        os.replace(temporary, path)
    except OSError as error:
        if error.filename is None and error.errno is not None:  # a write that fails does not say of which file
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
