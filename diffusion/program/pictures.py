"""PNG pictures of samples, reconstructions, convergence and trajectories, drawn by matplotlib.

Images are drawn at whole multiples of their own pixels, so that a pixel of an image is a square of one colour.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..chain import Chain
from ..models.files import replacing
from .output import require

DPI = 100
CURVES_DPI = 160  # lines and letters stay sharp where a page shows them larger
TILE = 64  # pixels of the picture that an image takes, about
GAP, MARGIN, TEXT, TITLE = 4, 16, 18, 30  # pixels
HEADING: dict[str, Any] = {"size": 12, "weight": "bold"}
FAINT = "#555"
FRAME = 0.75  # grey of the line around an image
SMALL: dict[str, Any] = {"size": 8, "align": "center", "color": FAINT}
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")  # told apart by the colour-blind (Okabe and Ito)


def require_matplotlib() -> None:
    """Nothing, if pictures can be drawn; else ImportError."""
    require(
        "matplotlib.figure", "matplotlib draws the pictures (--no-pictures does without, where it is an option)", "viz"
    )


class Sheet:
    """A white page on which images and lines of text are put at pixels counted from the upper left corner."""

    def __init__(self, width: int, height: int) -> None:
        require_matplotlib()
        from matplotlib.figure import Figure

        self.width, self.height = width, height
        self.figure: Any = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")

    def image(self, x: float, y: float, pixels: np.ndarray) -> None:
        """Put pixels (h, w, 3) in [0, 1] with the upper left corner at (x, y)."""
        self.figure.figimage(pixels, round(x), self.height - round(y) - pixels.shape[0], origin="upper")

    def text(
        self, x: float, y: float, line: str, size: float = 9, weight: str = "normal", align: str = "left",
        color: str = "#222",
    ) -> None:  # fmt: skip
        """Put a line of text of `size` points, its middle at height y, at, or with align="center" around, x."""
        at = (x / self.width, 1 - y / self.height)
        self.figure.text(*at, line, fontsize=size, fontweight=weight, ha=align, va="center", color=color)

    def save(self, path: Path) -> None:
        """Write the page as PNG, in one move."""
        _save(self.figure, path)


def _save(figure: Any, path: Path, dpi: int = DPI) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi)


def text_width(line: str, size: float = 9, weight: str = "normal", **_: Any) -> int:
    """Return the pixels that a line of text takes."""
    require_matplotlib()
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    if not line.strip():
        return 0
    extent = TextPath((0, 0), line, size=size, prop=FontProperties(weight=weight)).get_extents()
    return int(extent.x1 * DPI / 72) + 2


def tile(image: Tensor, scale: int) -> np.ndarray:
    """Return the pixels (h·scale, w·scale, 3) in [0, 1] of an image (C, h, w) in [−1, 1], one channel as grey."""
    values = (image.detach().cpu().float().clamp(-1, 1) + 1) / 2
    values = values.nan_to_num(0.5).expand(3, -1, -1) if len(values) == 1 else values[:3]
    values = values.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    return values.permute(1, 2, 0).numpy()


def scale_of(shape: Sequence[int]) -> int:
    """Return the factor by which images of that shape (C, h, w) are enlarged."""
    return max(1, round(TILE / max(shape[1:])))


def _put_grid(sheet: Sheet, x: int, y: int, images: Tensor, columns: int) -> None:
    """Put images (n, C, h, w) in rows of `columns`, from the corner (x, y) on."""
    scale = scale_of(images.shape[1:])
    h, w = images.shape[2] * scale + GAP, images.shape[3] * scale + GAP
    for i, image in enumerate(images):
        sheet.image(x + i % columns * w, y + i // columns * h, tile(image, scale))


def draw_samples(path: Path, title: str, blocks: Mapping[str, Tensor], caption: str = "") -> None:
    """Write grids of images side by side.

    Args:
        path: the PNG file.
        title, caption: lines above and below.
        blocks: images (n, C, h, w) in [−1, 1] of each grid, by the label above it.
    """
    count, *shape = next(iter(blocks.values())).shape
    columns = max(1, round(count**0.5)) if count > 3 else count
    rows, scale = -(-count // columns), scale_of(shape)
    high = rows * (shape[1] * scale + GAP) - GAP
    wide = max(columns * (shape[2] * scale + GAP) - GAP, *map(text_width, blocks))
    top = MARGIN + TITLE + (TEXT if any(blocks) else 0)
    width = max(len(blocks) * (wide + 2 * MARGIN), 2 * MARGIN + max(text_width(caption), text_width(title, **HEADING)))
    sheet = Sheet(width, top + high + (TEXT + GAP if caption else 0) + MARGIN)
    sheet.text(MARGIN, MARGIN + TEXT / 2, title, **HEADING)
    for i, (label, images) in enumerate(blocks.items()):
        x = MARGIN + i * (wide + 2 * MARGIN)
        sheet.text(x, top - TEXT / 2 - 2, label)
        _put_grid(sheet, x, top, images, columns)
    sheet.text(MARGIN, top + high + GAP + TEXT / 2, caption, color=FAINT)
    sheet.save(path)


def magnified(difference: Tensor) -> tuple[int, Tensor]:
    """Return a factor 1, 2, 5, 10, 20 … by which |difference| ≤ 1 is still visible at most white, and that picture."""
    size = difference.abs()
    largest = max(size.max().item(), 1e-12)
    steps = [m * 10**k for k in range(13) for m in (1, 2, 5)]
    factor = max((n for n in steps if n * largest <= 1), default=1)
    return factor, 2 * factor * size - 1


def draw_rows(
    path: Path, title: str, rows: Mapping[str, Tensor], below: Mapping[str, Sequence[str]] | None = None,
    above: Sequence[str] = (), caption: str = "", framed: bool = False,
) -> None:  # fmt: skip
    """Write rows of images, each with its label on the left.

    Args:
        path: the PNG file.
        title, caption: lines above and below.
        rows: images (n, C, h, w) in [−1, 1], by label; a label may have several lines.
        below: for some rows, by label, a text under each image.
        above: text over each column, of several lines if need be.
        framed: draw a line around each image, which may be white.
    """
    below = below or {}
    count, *shape = next(iter(rows.values())).shape
    scale = scale_of(shape)
    texts = [*(line for text in above for line in text.split("\n")), *(text for row in below.values() for text in row)]
    pitch = max([shape[2] * scale, *(text_width(text, **SMALL) for text in texts)]) + GAP
    left = MARGIN + max(text_width(line) for label in rows for line in label.split("\n")) + 2 * GAP
    heights = [shape[1] * scale + (TEXT if label in below else 0) + GAP for label in rows]
    over = TEXT * max((text.count("\n") + 1 for text in above), default=0)
    y = MARGIN + TITLE + over
    width = max(left + count * pitch - GAP, *(MARGIN + w for w in (text_width(caption), text_width(title, **HEADING))))
    sheet = Sheet(width + MARGIN, y + sum(heights) - GAP + (TEXT + GAP if caption else 0) + MARGIN)
    sheet.text(MARGIN, MARGIN + TEXT / 2, title, **HEADING)
    sheet.text(MARGIN, sheet.height - MARGIN - TEXT / 2, caption, color=FAINT)
    corners = [left + i * pitch + (pitch - GAP - shape[2] * scale) // 2 for i in range(count)]
    middles = [x + shape[2] * scale / 2 for x in corners]
    for middle, text in zip(middles, above, strict=False):
        sheet.text(middle, y - over / 2, text, **SMALL)
    for (label, images), height in zip(rows.items(), heights, strict=True):
        sheet.text(MARGIN, y + shape[1] * scale / 2, label)
        for x, image in zip(corners, images, strict=True):
            if framed:
                sheet.image(x - 1, y - 1, np.full((shape[1] * scale + 2, shape[2] * scale + 2, 3), FRAME))
            sheet.image(x, y, tile(image, scale))
        for middle, text in zip(middles, below.get(label, ()), strict=False):
            sheet.text(middle, y + shape[1] * scale + TEXT / 2, text, **SMALL)
        y += height
    sheet.save(path)


def even_states(chain: Chain, count: int = 11) -> Tensor:
    """Return `count` positions (n,) in a trajectory, from x_T to the image.

    They are evenly spread in the angle φ, tan φ = α/σ, which runs from 0 (noise) to π/2 (image).
    """
    angle = torch.atan2(chain.signal, chain.noise)
    wanted = torch.linspace(angle[0].item(), angle[-1].item(), count, dtype=torch.float64)
    return (angle[:, None] - wanted).abs().argmin(0).unique()


def draw_latents(
    path: Path, title: str, trajectory: Tensor, chain: Chain, at: Tensor | None = None, caption: str = ""
) -> None:
    """Write x_t over time, one row per sample.

    Args:
        path: the PNG file.
        title, caption: lines above and below.
        trajectory: (B, T+1, C, h, w), x_T first.
        chain: of T steps.
        at: positions of the states drawn; None is `even_states`.
    """
    at = even_states(chain) if at is None else at
    times = [f"t = {chain.timesteps[k]:.4g}" if k < len(chain) else "image" for k in at.tolist()]
    share = (chain.signal / chain.size).square()[at]
    contrast = (0.5 + share / 2).float().view(-1, 1, 1, 1)  # noise reaches about twice as far as an image
    contrast = contrast / chain.size[at].float().view(-1, 1, 1, 1)
    rows = {f"{i + 1}": states[at].float() * contrast for i, states in enumerate(trajectory.detach().cpu())}
    draw_rows(path, title, rows, above=times, caption=caption)


def draw_curves(path: Path, title: str, curves: Mapping[str, Tensor], x_label: str, y_label: str) -> None:
    """Write the median over the images, with a band from the least to the greatest, on a logarithmic axis.

    Args:
        path: the PNG file.
        title, x_label, y_label: texts.
        curves: (rounds, B) positive values by label; an image keeps its last value where it has NaN.
    """
    require_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure: Any = Figure(figsize=(5.6, 3.6), dpi=CURVES_DPI, layout="constrained", facecolor="white")
    axes = figure.subplots()
    for colour, (label, values) in zip(COLOURS * len(curves), curves.items(), strict=False):
        held = _hold(values.detach().cpu().double().numpy())
        rounds = np.arange(1, len(held) + 1)
        if held.shape[1] > 1:
            axes.fill_between(rounds, held.min(1), held.max(1), color=colour, alpha=0.15, linewidth=0)
        axes.plot(rounds, np.median(held, 1), color=colour, label=label, linewidth=1.8, marker=".", markersize=5)
    axes.set(yscale="log", xlabel=x_label, ylabel=y_label)
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    if len(curves) > 1:
        axes.legend(frameon=False)
    _save(figure, path, CURVES_DPI)


def _hold(values: np.ndarray) -> np.ndarray:
    """Return values (rounds, B), NaN and 0 replaced by what the image had before, at least 1e-16."""
    held = values.copy()
    for k in range(1, len(held)):
        missing = ~np.isfinite(held[k])
        held[k, missing] = held[k - 1, missing]
    return np.nan_to_num(held, nan=1e-16, posinf=1e16).clip(min=1e-16)
