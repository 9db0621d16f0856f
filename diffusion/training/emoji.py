"""Small pictures in colour: emoji of the font Noto Color Emoji, drawn in 32×32 pixels on white.

The font is Google's, under the SIL Open Font License 1.1, its pictures under the Apache License 2.0; it is read from
where Debian's package puts it, and not part of this project.
"""

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..models.files import require_file
from .data import HELD_OUT, Dataset

EMOJI_FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
EMOJI_PACKAGE = "fonts-noto-color-emoji"
STRIKE = 109  # the one size whose bitmaps, 136×128 pixels, the font has
CELL, REDUCED = 128, 4  # the centred square that is drawn, and how many of its pixels across make one
EMOJI: dict[str, tuple[tuple[int, int], ...]] = {  # code points, from … to
    "faces": (
        (0x1F600, 0x1F60F), (0x1F618, 0x1F618), (0x1F61B, 0x1F61D), (0x1F620, 0x1F622), (0x1F62D, 0x1F62D),
        (0x1F631, 0x1F631), (0x1F634, 0x1F634), (0x1F637, 0x1F638), (0x1F63A, 0x1F63B), (0x1F643, 0x1F644),
    ),
    "animals": (
        (0x1F41E, 0x1F41E), (0x1F427, 0x1F428), (0x1F42D, 0x1F43C), (0x1F981, 0x1F981), (0x1F989, 0x1F98B),
    ),
    "food": ((0x1F345, 0x1F353), (0x1F366, 0x1F366), (0x1F369, 0x1F36A)),
    "plants": ((0x1F332, 0x1F332), (0x1F335, 0x1F335), (0x1F337, 0x1F33C), (0x1F340, 0x1F340)),
    "hearts": ((0x1F494, 0x1F494), (0x1F497, 0x1F49C)),
    "sky": ((0x1F30D, 0x1F30F), (0x1F31D, 0x1F31F)),
}  # fmt: skip


def emoji(font: str | Path | None = None) -> Dataset:
    """Return 95 emoji as 3×32×32 images, every tenth of them as test.

    Each pixel is the mean of 4×4 pixels of the font's own bitmap on white. Labels: the groups of `EMOJI`, in order.

    Args:
        font: the file NotoColorEmoji.ttf, with bitmaps (CBDT); None: where the Debian package puts it.

    Raises:
        ImportError: Pillow is not installed.
        FileNotFoundError: the font is missing; says how to get it.
        ValueError: the file is no font, lacks the bitmaps in colour, or one of the emoji.
    """
    path = EMOJI_FONT if font is None else Path(font)
    if not os.path.lexists(path):
        raise FileNotFoundError(f"{path} is missing: apt-get install {EMOJI_PACKAGE}, or name the font's file")
    require_file(path)
    groups = enumerate(EMOJI.values())
    points = [(n, group) for group, ranges in groups for first, last in ranges for n in range(first, last + 1)]
    images, labels = drawn([n for n, _ in points], path), torch.tensor([group for _, group in points])
    if bool((images == images[:, :1]).all()):
        raise ValueError(f"{path}: a font in colour is required, Noto Color Emoji with its bitmaps")
    held_out = torch.arange(len(images)) % HELD_OUT == 0
    return Dataset(images[~held_out], images[held_out], labels[~held_out], labels[held_out], levels=255)


def drawn(points: list[int], path: Path) -> Tensor:
    """Return the pictures of code points, (n, 3, 32, 32) float32 in [−1, 1] in steps of 2/255, drawn by a font."""
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise ImportError("emoji are drawn by Pillow: pip install 'pydeqsolve[data]'") from error
    try:
        font = ImageFont.truetype(path, STRIKE)
    except OSError as error:
        raise ValueError(f"{path}: a font with bitmaps of size {STRIKE} is required ({error})") from error
    images = np.empty((len(points), CELL // REDUCED, CELL // REDUCED, 3), dtype=np.uint8)
    for image, point in zip(images, points, strict=True):
        canvas = Image.new("RGBA", (CELL, CELL))
        left, top, right, bottom = font.getbbox(chr(point))
        place = (CELL - left - right) // 2, (CELL - top - bottom) // 2
        ImageDraw.Draw(canvas).text(place, chr(point), font=font, fill="black", embedded_color=True)
        values = np.asarray(canvas, dtype=np.float64)
        if not values.any():
            raise ValueError(f"{path}: the emoji U+{point:X} is missing")
        opaque = values[..., 3:] / 255
        on_white = opaque * values[..., :3] + (1 - opaque) * 255
        shape = CELL // REDUCED, REDUCED, CELL // REDUCED, REDUCED, 3
        image[:] = on_white.reshape(shape).mean((1, 3)).round()
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() * (2 / 255) - 1
