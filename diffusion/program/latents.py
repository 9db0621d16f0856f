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
from .classes import RECORDED

LATENTS = "latents.safetensors"
FOUND_IN = (LATENTS, "inversion.safetensors", "samples.safetensors")
PREFIXES = ("", "done.")  # of a tensor's name, in the file of latents or of an inversion
CHAIN = {
    "model": str, "steps": int, "spacing": str, "eta": float, "rule": str, "timesteps": list, "sigmas": list,
    "strength": float, **RECORDED,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Latents:
    """What a chain starts from.

    Attributes:
        x_T: (n, C, H, W).
        names: of the n images that they belong to.
        chain: model, steps, spacing, eta and rule of the chain that makes these images of them, timesteps or sigmas of
            one's own, strength; what is unknown, or as usual, is missing.
        second: (n, C, H, W), the second state of a chain of rule "belm", or None.
        noises: (n, T, C, H, W), the noise maps that its steps add, or None.
        labels: the n classes of the images, None is no class; None for all of a model without.
    """

    x_T: Tensor
    names: list[str]
    chain: dict[str, Any] = field(default_factory=dict)
    second: Tensor | None = None
    noises: Tensor | None = None
    labels: list[int | None] | None = None

    def kept(self, count: int | None) -> Latents:
        """The first `count`, None is all."""
        part = slice(count)
        second, noises = (None if x is None else x[part] for x in (self.second, self.noises))
        labels = None if self.labels is None else self.labels[part]
        return Latents(self.x_T[part], self.names[part], self.chain, second, noises, labels)

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds of them, by name."""
        parts = {"x_T": self.x_T, "second": self.second, "noises": self.noises}
        return {name: part.cpu() for name, part in parts.items() if part is not None}

    def header(self) -> dict[str, str]:
        """The entries of a file's header that say what they belong to."""
        labels = {} if self.labels is None else {"labels": self.labels}
        return {"names": json.dumps(self.names), "settings": json.dumps({**self.chain, **labels})}


def numbered(count: int) -> list[str]:
    """Return the names 01, 02, … of images without a name of their own."""
    return [f"{i:0{max(2, len(str(count)))}}" for i in range(1, count + 1)]


def names_of(files: Sequence[Path]) -> list[str]:
    """Return the names of pictures, without their suffix where that still tells them apart.

    Those that have one name in several folders are numbered from the second on.
    """
    count = Counter(file.stem for file in files)
    names: dict[str, None] = {}
    for file in files:
        own = name = file.stem if count[file.stem] == 1 else file.name.replace(".", "-")
        k = 1
        while name in names:
            k += 1
            name = f"{own}-{k}"
        names[name] = None
    return list(names)


def write_latents(path: Path, latents: Latents) -> None:
    """Write latents, in one move."""
    write_tensors(path, latents.tensors(), latents.header())


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
    x_T, second, noises = (
        next((tensors[prefix + name] for prefix in PREFIXES if prefix + name in tensors), None)
        for name in ("x_T", "second", "noises")
    )
    if x_T is None or x_T.ndim != 4 or not len(x_T) or not x_T.is_floating_point() or not bool(x_T.isfinite().all()):
        raise ValueError(f"--latents {path}: x_T (n, C, H, W), floating-point and finite, is required")
    for name, part, shape in (("second", second, x_T.shape), ("noises", noises, (len(x_T), None, *x_T.shape[1:]))):
        if part is not None and not (_fits(part, shape) and bool(part.isfinite().all())):
            raise ValueError(f"--latents {path}: {name} that fits x_T {tuple(x_T.shape)}, finite, is required, got "
                             f"{tuple(part.shape)}")  # fmt: skip
    try:
        settings = parse_json(metadata.get("settings", "{}"))
        names = json.loads(metadata.get("names", "[]"))
    except ValueError as error:
        raise ValueError(f"--latents {path}: {error}") from error
    known = isinstance(names, list) and len(names) == len(x_T) and all(isinstance(name, str) for name in names)
    chain = {name: settings[name] for name, kind in CHAIN.items() if type(settings.get(name)) is kind}
    labels = settings.get("labels")
    if labels is not None and not (
        isinstance(labels, list) and len(labels) >= len(x_T) and all(map(_is_label, labels))
    ):
        raise ValueError(f"--latents {path}: labels, one for each latent, are required, got {labels!r:.80}")
    labels = None if labels is None else labels[: len(x_T)]  # an inversion under way knows those to come too
    return Latents(x_T, names if known else numbered(len(x_T)), chain, second, noises, labels)


def _is_label(value: Any) -> bool:
    return value is None or (type(value) is int and value >= 0)


def _fits(x: Tensor, shape: Sequence[int | None]) -> bool:
    """Whether x is of this shape, None being any length."""
    return x.dim() == len(shape) and all(want in (None, got) for want, got in zip(shape, x.shape, strict=True))
