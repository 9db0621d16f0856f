"""Images to train on and to invert, scaled to [−1, 1]: handwritten digits, Fashion-MNIST, a folder of pictures."""

import gzip
import math
import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..models.files import require_file

FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where the Debian package puts the files
FASHION_PACKAGE = "dataset-fashion-mnist"
DIGITS_TEST = 297
PICTURES = {".png", ".jpg", ".jpeg"}
MOST_PIXELS = 2**26  # of a picture: 200 MB of colours
LARGEST_IDX = 2**30  # values
HELD_OUT = 10  # every tenth picture of a folder without a split of its own


@dataclass(frozen=True)
class Dataset:
    """Images in [−1, 1] and their labels, split once and for all.

    Attributes:
        train: (n, C, H, W) float32.
        test: (m, C, H, W) float32, never trained on.
        train_labels: (n,) long.
        test_labels: (m,) long.
        levels: the originals are integers 0 … levels; a value v is here 2v/levels − 1.
    """

    train: Tensor
    test: Tensor
    train_labels: Tensor
    test_labels: Tensor
    levels: int


def digits(seed: int = 0) -> Dataset:
    """Return the 1,797 8×8 handwritten digits that come with scikit-learn, 297 of them (drawn by `seed`) as test.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("digits() reads the images from scikit-learn: pip install scikit-learn") from error
    raw = load_digits()
    order = torch.randperm(len(raw.images), generator=torch.Generator().manual_seed(seed))
    levels = 16
    images = (torch.from_numpy(raw.images).float() * (2 / levels) - 1)[order, None]
    labels = torch.from_numpy(raw.target).long()[order]
    test, train = slice(0, DIGITS_TEST), slice(DIGITS_TEST, None)
    return Dataset(images[train], images[test], labels[train], labels[test], levels)


def fashion(folder: str | Path | None = None) -> Dataset:
    """Return Fashion-MNIST (Xiao et al. 2017): 60,000 training and 10,000 test images 1×28×28, ten classes.

    Args:
        folder: holds the four IDX files (…-idx3-ubyte.gz, …-idx1-ubyte.gz); None: where the Debian package puts them.

    Raises:
        FileNotFoundError: a file is missing; says how to get it.
        ValueError: a file is not of the IDX format or is cut short.
    """
    folder = FASHION_FOLDER if folder is None else Path(folder)
    parts = {}
    for split in ("train", "t10k"):
        images = torch.from_numpy(read_idx(folder / f"{split}-images-idx3-ubyte.gz", dimensions=3))
        labels = torch.from_numpy(read_idx(folder / f"{split}-labels-idx1-ubyte.gz", dimensions=1))
        if len(images) != len(labels):
            raise ValueError(f"{folder}: {len(images)} {split} images but {len(labels)} labels")
        parts[split] = (images[:, None].float() * (2 / 255) - 1, labels.long())
    (train, train_labels), (test, test_labels) = parts["train"], parts["t10k"]
    return Dataset(train, test, train_labels, test_labels, levels=255)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Return the unsigned bytes of a gzipped IDX file as an array of that many dimensions.

    The format: two zero bytes, a type (8: unsigned byte), the number of dimensions, each size as a big-endian
    32-bit integer, then the values.
    """
    header = 4 + 4 * dimensions
    if not os.path.lexists(path):
        raise FileNotFoundError(f"{path} is missing: apt-get install {FASHION_PACKAGE}, or name the folder")
    require_file(path)
    try:
        with gzip.open(path) as file:
            start = file.read(header)
            if len(start) < header or start[:4] != bytes((0, 0, 8, dimensions)):
                raise ValueError(f"not an IDX file of {dimensions}-dimensional unsigned bytes")
            sizes = struct.unpack(f">{dimensions}I", start[4:])
            count = math.prod(sizes)
            if count > LARGEST_IDX:
                raise ValueError(f"at most {LARGEST_IDX:,} values are read, its header announces {count:,}")
            content = file.read(count + 1)  # not all of it, which may unpack to any size
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: not a whole gzip file ({error})") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if len(content) != count:
        found = len(content) if len(content) < count else "more"
        raise ValueError(f"{path}: {count} values announced by its header, {found} found")
    return np.frombuffer(content, dtype=np.uint8).reshape(sizes).copy()


def picture_files(folder: str | Path, deep: bool = False) -> list[Path]:
    """Return the PNG and JPEG files of a folder, with `deep` those of its subfolders too, sorted by path.

    Links are followed, and each folder is read once. What is named like a picture and is no file (a folder, a FIFO, a
    socket, a device, a link to nothing) is passed over.

    Raises:
        FileNotFoundError, ValueError: there is no such folder, or no picture in it.
        PermissionError: a subfolder may not be read.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{folder}: no such folder")
    files = sorted(_pictures(folder, deep, set()))
    if not files:
        raise ValueError(f"{folder}: holds no file named .png, .jpg or .jpeg")
    return files


def _pictures(folder: Path, deep: bool, seen: set[str]) -> Iterator[Path]:
    here = os.path.realpath(folder)
    if here in seen:
        return
    seen.add(here)
    for path in sorted(folder.iterdir()):
        if deep and path.is_dir():
            yield from _pictures(path, deep, seen)
        elif path.suffix.lower() in PICTURES and path.is_file():
            yield path


def read_picture(file: Path, shape: tuple[int, int, int]) -> tuple[Tensor, tuple[int, int]]:
    """Return a picture as (C, H, W) float32 in [−1, 1], and its own (width, height).

    It is turned as its EXIF record says, cut to the largest centred rectangle of the wanted proportions, then resized.
    What is transparent becomes grey; 16 bits per pixel become 8; palettes and CMYK become colours; of several frames
    the first is taken.

    Args:
        file: of a format that Pillow reads, of at most 2²⁶ pixels (8192×8192).
        shape: (C, H, W); C is 1 (grey) or 3 (colour), H·W at most 2²⁶.

    Raises:
        ImportError: Pillow is not installed.
        FileNotFoundError: no such file.
        ValueError: the file cannot be read as a picture, has more pixels, or another number of channels is asked for.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("pictures are read by Pillow: pip install 'pydeqsolve[data]'") from error
    channels, height, width = shape
    if channels not in (1, 3):
        raise ValueError(f"shape: pictures have 1 or 3 channels, shape asks for {channels}")
    if min(height, width) < 1 or height * width > MOST_PIXELS:
        raise ValueError(f"shape: 1 to {MOST_PIXELS:,} pixels are required, got {width}x{height}")
    require_file(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # fewer pixels are refused here by name
            warnings.filterwarnings("ignore", module=r"PIL\.")  # of damaged records; damaged pixels are errors
            with Image.open(file) as opened:
                picture, size = _upright(opened)
                fitted = _fitted(picture, channels, width, height)
    except MemoryError:
        raise
    except Exception as error:  # of a damaged file Pillow says struct.error, zlib.error, EOFError, IndexError, …
        raise ValueError(f"{file}: cannot be read as a picture ({error or type(error).__name__})") from error
    values = torch.from_numpy(fitted).reshape(height, width, channels)
    return values.permute(2, 0, 1) * (2 / 255) - 1, size


def _upright(opened: Any) -> tuple[Any, tuple[int, int]]:
    """An opened picture, turned as its EXIF record says, and its size."""
    from PIL import ImageOps

    width, height = opened.size
    if width * height > MOST_PIXELS:
        raise ValueError(f"at most {MOST_PIXELS:,} pixels are read, got {width}x{height}")
    if opened.mode in ("F", "I"):
        raise ValueError(f"8 or 16 bits per pixel are required, got mode {opened.mode}")
    picture = ImageOps.exif_transpose(opened)
    return picture, picture.size


def _fitted(picture: Any, channels: int, width: int, height: int) -> np.ndarray:
    """Its pixels (H, W) or (H, W, 3) float32 0 … 255, cut and scaled."""
    from PIL import Image, ImageOps

    if picture.mode.startswith("I;16"):  # Pillow's own conversion would clip, not scale
        picture = Image.fromarray((np.asarray(picture).astype(np.uint16) >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, (128, 128, 128, 255)), picture)
    return np.array(ImageOps.fit(picture.convert("L" if channels == 1 else "RGB"), (width, height)), dtype=np.float32)


def image_folder(path: str | Path, shape: tuple[int, int, int]) -> Tensor:
    """Return the PNG and JPEG files of a folder (not of its subfolders), sorted by name, as (n, C, H, W) in [−1, 1].

    Raises:
        As `picture_files` and `read_picture`.
    """
    return torch.stack([read_picture(file, shape)[0] for file in picture_files(path)])


def class_folder(path: str | Path, shape: tuple[int, int, int], most: int = 50_000) -> Dataset:
    """Return the pictures of a folder and of its subfolders, split into train and test.

    The usual layouts: path/train/<class>/… beside path/test/<class>/…; path/<class>/…, or pictures side by side, of
    which every tenth is held out as test. A picture's class is the folder it lies in.

    Args:
        path: the folder.
        shape: (C, H, W) that pictures are cut and scaled to.
        most: pictures of each part, at most; of more, evenly spread ones are taken.

    Raises:
        As `picture_files` and `read_picture`.
    """
    path = Path(path)
    if (path / "train").is_dir() and (path / "test").is_dir():
        parts = [picture_files(path / split, deep=True) for split in ("train", "test")]
    else:
        files = picture_files(path, deep=True)
        held_out = files[::HELD_OUT] if len(files) > 1 else files
        parts = [[file for i, file in enumerate(files) if i % HELD_OUT] or files, held_out]
    parts = [files[:: -(-len(files) // most)] for files in parts]
    names = sorted({file.parent.name for files in parts for file in files})
    images = [torch.stack([read_picture(file, shape)[0] for file in files]) for files in parts]
    labels = [torch.tensor([names.index(file.parent.name) for file in files]) for files in parts]
    return Dataset(images[0], images[1], labels[0], labels[1], levels=255)
