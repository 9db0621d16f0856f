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


def picture_files(folder: str | Path, deep: bool = False) -> list[Path]:
    """Return the PNG and JPEG files of a folder, with `deep` those of its subfolders too, sorted by path.

    Raises:
        FileNotFoundError, ValueError: there is no such folder, or no picture in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    found = folder.rglob("*") if deep else folder.iterdir()
    files = sorted(file for file in found if file.suffix.lower() in PICTURES)
    if not files:
        raise ValueError(f"{folder}: holds no file named .png, .jpg or .jpeg")
    return files


def read_picture(file: Path, shape: tuple[int, int, int]) -> tuple[Tensor, tuple[int, int]]:
    """Return a picture as (C, H, W) float32 in [−1, 1], and its own (width, height).

    It is turned as its EXIF record says, cut to the largest centred rectangle of the wanted proportions, then resized.
    What is transparent becomes white; 16 bits per pixel become 8.

    Args:
        file: of a format that Pillow reads.
        shape: (C, H, W); C is 1 (grey) or 3 (colour).

    Raises:
        ImportError: Pillow is not installed.
        ValueError: the file cannot be read as a picture, or another number of channels.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError("pictures are read by Pillow: pip install 'pydeqsolve[data]'") from error
    channels, height, width = shape
    if channels not in (1, 3):
        raise ValueError(f"shape: pictures have 1 or 3 channels, shape asks for {channels}")
    try:
        with Image.open(file) as opened:
            picture: Image.Image = ImageOps.exif_transpose(opened)
            size = picture.size
            if picture.mode in ("F", "I"):
                raise ValueError(f"8 or 16 bits per pixel are required, got mode {picture.mode}")
            if picture.mode.startswith("I;16"):  # Pillow's own conversion would clip, not scale
                picture = Image.fromarray((np.asarray(picture).astype(np.uint16) >> 8).astype(np.uint8))
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", size, "white"), picture)
            fitted = ImageOps.fit(picture.convert("L" if channels == 1 else "RGB"), (width, height))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file}: cannot be read as a picture ({error})") from error
    values = torch.from_numpy(np.array(fitted, dtype=np.float32)).reshape(height, width, channels)
    return values.permute(2, 0, 1) * (2 / 255) - 1, size


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
