"""Images to train on and to invert, scaled to [−1, 1]: handwritten digits, Fashion-MNIST, a folder of pictures."""

import gzip
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where the Debian package puts the files
FASHION_PACKAGE = "dataset-fashion-mnist"
DIGITS_TEST = 297
PICTURES = {".png", ".jpg", ".jpeg"}


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
    try:
        with gzip.open(path) as file:
            content = file.read()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing: apt-get install {FASHION_PACKAGE}, or name the folder") from error
    except (OSError, EOFError) as error:
        raise ValueError(f"{path}: not a whole gzip file ({error})") from error
    header = 4 + 4 * dimensions
    if len(content) < header or content[:4] != bytes((0, 0, 8, dimensions)):
        raise ValueError(f"{path}: not an IDX file of {dimensions}-dimensional unsigned bytes")
    sizes = struct.unpack(f">{dimensions}I", content[4:header])
    count = int(np.prod(sizes, dtype=np.int64))
    if len(content) - header != count:
        raise ValueError(f"{path}: {count} values announced by its header, {len(content) - header} found")
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(sizes).copy()


def image_folder(path: str | Path, shape: tuple[int, int, int]) -> Tensor:
    """Return the PNG and JPEG files of a folder, sorted by name, as (n, C, H, W) float32 in [−1, 1].

    Each picture is cut to the largest centred rectangle of the wanted proportions, then resized.

    Args:
        path: the folder; its subfolders are not searched.
        shape: (C, H, W); C is 1 (grey) or 3 (colour).

    Raises:
        ImportError: Pillow is not installed.
        FileNotFoundError: there is no such folder.
        ValueError: no picture in it, one that cannot be read, or another number of channels.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError("image_folder() reads pictures with Pillow: pip install pillow") from error
    channels, height, width = shape
    if channels not in (1, 3):
        raise ValueError(f"shape: pictures have 1 or 3 channels, shape asks for {channels}")
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in PICTURES)
    if not files:
        raise ValueError(f"{folder}: holds no file named .png, .jpg or .jpeg")
    images = []
    for file in files:
        try:
            with Image.open(file) as picture:
                fitted = ImageOps.fit(picture.convert("L" if channels == 1 else "RGB"), (width, height))
        except OSError as error:
            raise ValueError(f"{file}: cannot be read as a picture ({error})") from error
        values = torch.from_numpy(np.array(fitted, dtype=np.float32)).reshape(height, width, channels)
        images.append(values.permute(2, 0, 1))
    return torch.stack(images) * (2 / 255) - 1
