"""Pictures that a command is given, and images as PNG files of their own size, one each, under their names."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.files import read_json, replacing
from ..training.data import picture_files, read_picture
from .latents import names_of

IMAGES = "images"  # folder within that of a command
LONGEST = 60  # letters of a file's name: 255 bytes are what most systems allow


def read_images(
    paths: Sequence[str], shape: tuple[int, int, int], resize: bool, count: int | None
) -> tuple[Tensor, list[str]]:
    """Return pictures, those of a folder in the order of their names, `count` at most: (n, C, H, W) in [−1, 1]; names.

    Raises:
        FileNotFoundError, ValueError: no such file, no picture, or one of another size unless `resize` is set.
    """
    size, images, files = (shape[2], shape[1]), [], []
    for place in map(Path, paths):
        if not os.path.exists(place):
            raise FileNotFoundError(f"--images {place}: no such file or folder")
        if not place.is_file() and not place.is_dir():
            raise ValueError(f"--images {place}: a picture or a folder is required")
        files += [place] if place.is_file() else picture_files(place)
    files = files[:count]
    for file in files:
        image, found = read_picture(file, shape)
        if found != size and not resize:
            raise ValueError(
                f"{file}: {size[0]}x{size[1]} pixels are required, got {found[0]}x{found[1]}; --resize cuts and scales"
            )
        images.append(image)
    return torch.stack(images), names_of(files)


def image_files(names: Sequence[str]) -> list[str]:
    """Return the files of images with these names, each another one, within a command's folder."""
    files: dict[str, None] = {}
    for name in names:
        safe = re.sub(r"[^\w.+-]+", "-", name)[:LONGEST].strip(".") or "image"
        number = 1
        while (file := f"{IMAGES}/{safe}{f'-{number}' if number > 1 else ''}.png") in files:
            number += 1
        files[file] = None
    return list(files)


def write_images(folder: Path, images: Tensor, names: Sequence[str]) -> None:
    """Write images (n, C, H, W) in [−1, 1], of one channel as grey, of three or more the first three as colours."""
    from PIL import Image  # comes with matplotlib

    (folder / IMAGES).mkdir(exist_ok=True)
    values = ((images.detach().cpu().float().nan_to_num(0.0).clamp(-1, 1) + 1) * 127.5).round().byte()
    for file, image in zip(image_files(names), values, strict=True):
        pixels = image[:3].permute(1, 2, 0) if len(image) >= 3 else image[0]
        with replacing(folder / file) as temporary:
            Image.fromarray(pixels.contiguous().numpy()).save(temporary, format="PNG")


def earlier_images(folder: str | Path, record: str) -> set[str]:
    """Return the image files that the JSON file of an earlier run in a folder names."""
    try:
        files: Any = read_json(Path(folder) / record).get("files")
    except (OSError, ValueError):
        return set()
    return {file for file in files or [] if re.fullmatch(rf"{IMAGES}/[^/]+\.png", str(file))}


def remove_images(folder: Path, files: set[str]) -> None:
    """Remove images of an earlier run that this one has not replaced."""
    for file in files:
        (folder / file).unlink(missing_ok=True)
