"""The size and the channels that pictures of a folder have in common, read from their headers."""

from collections import Counter
from pathlib import Path

from .data import picture_files

GREY = ("1", "L", "LA", "La", "I;16", "I;16B", "I;16L", "I;16N")  # modes of Pillow


def shape_of_folder(path: str | Path) -> tuple[int, int, int]:
    """Return (C, H, W) of the PNG and JPEG files in a folder and its subfolders, C = 1 if they are grey, else 3.

    A picture counts as its EXIF record turns it.

    Raises:
        ImportError: Pillow is not installed.
        FileNotFoundError, ValueError: no such folder, no picture in it, a file that is none, or pictures of several
            sizes, or grey ones beside colours.
    """
    try:
        from PIL import ExifTags, Image
    except ImportError as error:
        raise ImportError("pictures are read by Pillow: pip install 'pydeqsolve[data]'") from error
    found: Counter[tuple[int, int, int]] = Counter()
    for file in picture_files(path, deep=True):
        try:
            with Image.open(file) as picture:
                width, height = picture.size
                if picture.getexif().get(ExifTags.Base.Orientation, 1) >= 5:  # lies on its side
                    width, height = height, width
                found[1 if picture.mode in GREY else 3, height, width] += 1
        except OSError as error:
            raise ValueError(f"{file}: cannot be read as a picture ({error})") from error
    if len(found) > 1:
        kinds = [f"{n} of {w}x{h} in {'grey' if c == 1 else 'colour'}" for (c, h, w), n in found.most_common(4)]
        more = ", …" if len(found) > 4 else ""
        raise ValueError(
            f"{path}: pictures of one size, all grey or all in colour, are required, got {', '.join(kinds)}{more}; "
            "--shape C H W cuts and scales them"
        )
    (shape,) = found
    return shape
