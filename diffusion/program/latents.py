"""Latents in a file, in which `invert`, `edit` and `sample` hand them on, each with a name and all with their chain."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..models.files import parse_json, read_tensors, write_tensors

LATENTS = "latents.safetensors"
FOUND_IN = (LATENTS, "inversion.safetensors", "samples.safetensors")
TENSORS = ("x_T", "done.x_T")
CHAIN = {"model": str, "steps": int, "spacing": str, "eta": float}


@dataclass(frozen=True, eq=False)
class Latents:
    """What a chain starts from.

    Attributes:
        x_T: (n, C, H, W).
        names: of the n images that they belong to.
        chain: model, steps, spacing and eta of the chain that makes these images of them; what is unknown is missing.
    """

    x_T: Tensor
    names: list[str]
    chain: dict[str, Any] = field(default_factory=dict)


def numbered(count: int) -> list[str]:
    """Return the names 01, 02, … of images without a name of their own."""
    return [f"{i:0{max(2, len(str(count)))}}" for i in range(1, count + 1)]


def names_of(files: Sequence[Path]) -> list[str]:
    """Return the names of pictures, without their suffix where that still tells them apart."""
    count = Counter(file.stem for file in files)
    return [file.stem if count[file.stem] == 1 else file.name.replace(".", "-") for file in files]


def header(names: Sequence[str], **chain: Any) -> dict[str, str]:
    """Return the entries of a file's header that say what its latents belong to."""
    return {"names": json.dumps(list(names)), "settings": json.dumps(chain)}


def write_latents(path: Path, latents: Latents) -> None:
    """Write latents, in one move."""
    write_tensors(path, {"x_T": latents.x_T.cpu()}, header(latents.names, **latents.chain))


def read_latents(place: str) -> Latents:
    """Return the latents in a file, or in the folder that `invert`, `edit` or `sample` wrote.

    Raises:
        FileNotFoundError, ValueError: there is none, or the file holds no latents.
    """
    path = Path(place)
    if path.is_dir():
        found = [path / name for name in FOUND_IN if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"--latents {place}: holds none of {', '.join(FOUND_IN)}")
        path = found[0]
    tensors, metadata = read_tensors(path)
    x_T = next((tensors[name] for name in TENSORS if name in tensors), None)
    if x_T is None or x_T.ndim != 4 or not len(x_T) or not x_T.is_floating_point() or not bool(x_T.isfinite().all()):
        raise ValueError(f"--latents {path}: x_T (n, C, H, W), floating-point and finite, is required")
    try:
        settings = parse_json(metadata.get("settings", "{}"))
        names = json.loads(metadata.get("names", "[]"))
    except ValueError as error:
        raise ValueError(f"--latents {path}: {error}") from error
    known = isinstance(names, list) and len(names) == len(x_T) and all(isinstance(name, str) for name in names)
    chain = {name: settings[name] for name, kind in CHAIN.items() if type(settings.get(name)) is kind}
    return Latents(x_T, names if known else numbered(len(x_T)), chain)
