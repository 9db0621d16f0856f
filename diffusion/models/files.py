"""Reading and writing JSON and safetensors files: writes in one move, errors that name the file."""

import contextlib
import hashlib
import json
import math
import os
import stat
import struct
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

LARGEST_JSON = 2**26  # bytes of a JSON file, or of the header of a safetensors file
MOST_DIMENSIONS = 16
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """What the header of a safetensors file says of one of its tensors."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def require_file(path: Path) -> None:
    """Raises unless `path` is a regular file: reading a FIFO or a device may never end.

    Raises:
        FileNotFoundError, ValueError: there is nothing; something else than a file.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"{path}: no such file") from error
    except OSError as error:
        if isinstance(error, PermissionError):
            raise
        raise FileNotFoundError(f"{path}: no such file ({error.strerror})") from error  # a circle of links, a long name
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path}: a file is required, got {'a folder' if stat.S_ISDIR(mode) else 'a special file'}")


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        FileNotFoundError, ValueError: no such file; not a JSON object, one with a key twice, or one of over 64 MiB.
    """
    require_file(path)
    size = path.stat().st_size
    if size > LARGEST_JSON:
        raise ValueError(f"{path}: at most {LARGEST_JSON:,} bytes of JSON are read, got {size:,}")
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parse_json(text: str | bytes) -> dict[str, Any]:
    """Return the JSON object that a text, or its UTF-8, says.

    Raises:
        ValueError: it says none, says a key twice, is nested too deeply, or is not UTF-8.
    """
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        content: dict[str, Any] = json.loads(text, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError("not a JSON file (nested too deeply)") from error
    except ValueError as error:
        raise ValueError(f"not a JSON file ({error})") from error
    kind = type(content).__name__
    if kind != "dict":
        raise ValueError(f"a JSON object is required, got {kind}")
    return content


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError(f"key {Counter(name for name, _ in pairs).most_common(1)[0][0]!r} twice")
    return made


def read_header(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Return what a safetensors file holds, without reading it: dtype and shape by name, and its header entries.

    Raises:
        FileNotFoundError, ValueError: no such file; cut short or malformed.
    """
    require_file(path)
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= min(size - 8, LARGEST_JSON):
                raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
            header = parse_json(file.read(length))
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("__metadata__ of texts is required")
        stored = {name: _stored(name, entry) for name, entry in header.items()}
        end = 0
        for name in sorted(stored, key=lambda name: header[name]["data_offsets"]):
            first, last = header[name]["data_offsets"]
            if first != end or last - first != math.prod(stored[name].shape) * stored[name].dtype.itemsize:
                raise ValueError(f"{name}: its place does not fit its shape")
            end = last
        if 8 + length + end != size:
            raise ValueError(f"{8 + length + end:,} bytes announced by its header, {size:,} found")
    except ValueError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from error
    return stored, metadata


def _stored(name: str, entry: Any) -> Stored:
    """One entry of a header, checked."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name}: dtype, shape and data_offsets are required")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise ValueError(f"{name}: a dtype of {', '.join(DTYPES)} is required, got {entry['dtype']!r}")
    for key, least in (("shape", 0), ("data_offsets", 0)):
        whole = isinstance(entry[key], list) and all(type(n) is int and least <= n < 2**63 for n in entry[key])
        if not whole:
            raise ValueError(f"{name}: {key} of whole numbers is required")
    if len(entry["data_offsets"]) != 2 or len(entry["shape"]) > MOST_DIMENSIONS:
        raise ValueError(f"{name}: two data_offsets and at most {MOST_DIMENSIONS} dimensions are required")
    return Stored(DTYPES[entry["dtype"]], tuple(entry["shape"]))


def check_parts(stored: Mapping[str, Stored], required: Mapping[str, Stored], path: Path | str) -> None:
    """Raises ValueError unless a file holds what is required of it, and nothing else; names the first that differs."""
    for name in sorted(stored.keys() | required.keys()):
        if name not in stored:
            raise ValueError(f"{path}: no tensor {name}")
        if name not in required:
            raise ValueError(f"{path}: tensor {name} is not known")
        want, got = required[name], stored[name]
        if want != got:
            raise ValueError(
                f"{path}: {name} of shape {want.shape}, {want.dtype}, is required, got {got.shape}, {got.dtype}"
            )


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the header entries of a safetensors file.

    Raises:
        FileNotFoundError, ValueError: no such file; cut short or malformed, or larger than what memory is left.
    """
    stored, metadata = read_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in stored}, metadata
    except (SafetensorError, OSError, TypeError) as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from error
    except (MemoryError, RuntimeError) as error:
        raise ValueError(f"{path}: its tensors do not fit into memory ({str(error).splitlines()[0]})") from error


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
    """Give a new file beside `path` to write to, and move it there: nobody, whatever crashes, meets half a file.

    The file reaches the disk before its name does, and its name before this returns: a power cut leaves the old file
    or the new one, and after the return the new one.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # else a power cut may leave the new name with an empty file
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        if error.filename is None and error.errno is not None:  # a write that fails does not say of which file
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Have a folder's names reach the disk, where the system can: a few file systems, and Windows, cannot."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
