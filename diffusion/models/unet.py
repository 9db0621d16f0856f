"""A small U-Net for denoising: few kernels per call, so that one image is fast, and narrow layers, so that many are."""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

# 3×3 convolutions of this width run up to five times faster in this layout at batch 1 on a CPU: the weights
# need no reordering on each call.
LAYOUT = torch.channels_last


class GroupNorm(nn.GroupNorm):
    """Group normalisation whose forward-mode derivative works in every memory layout."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised x (N, width, h, w)."""
        if unpack_dual(x).tangent is not None:
            x = x.contiguous()  # torch takes that derivative on a view which other layouts refuse
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class ResidualBlock(nn.Module):
    """x + W₂ silu(norm(W₁ silu(norm(x)) + e)), all convolutions 3×3; the last one starts at zero."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.norm2 = GroupNorm(groups, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        start_at_zero(self.conv2)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """Return the block's output (N, width, h, w) for x (N, width, h, w) and time embedding e (N, width, 1, 1)."""
        h: Tensor = self.conv1(F.silu(self.norm1(x))) + e
        h = x + self.conv2(F.silu(self.norm2(h)))
        return h


def start_at_zero(layer: nn.Module) -> None:
    """Zero the parameters of a layer, so that what it is added to passes unchanged at first."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


class Stage(nn.ModuleList):
    """Residual blocks of one width, one after the other."""

    def __init__(self, width: int, blocks: int, groups: int) -> None:
        super().__init__(ResidualBlock(width, groups) for _ in range(blocks))

    def forward(self, x: Tensor, e: Iterator[Tensor]) -> Tensor:
        """Return x (N, width, h, w) after all blocks, each taking its time embedding (N, width, 1, 1) from e."""
        h = x
        for block in self:
            h = block(h, next(e))
        return h


class Attention(nn.Module):
    """x + P softmax(QKᵀ/√width) V over the pixels of norm(x), one head; P starts at zero."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.norm = GroupNorm(groups, width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        start_at_zero(self.project)

    def forward(self, x: Tensor) -> Tensor:
        """Return x (N, width, h, w) with every pixel informed of the others."""
        pixels = self.norm(x).flatten(2).transpose(1, 2)  # (N, h·w, width)
        query, key, value = self.query_key_value(pixels).chunk(3, dim=2)
        mixed: Tensor = self.project(F.scaled_dot_product_attention(query, key, value)).transpose(1, 2)
        return x + mixed.reshape(x.shape)


def sinusoids(count: int, width: int) -> Tensor:
    """Return (count, width): cos and sin of t·10000^(−k/(width/2)), k < width/2, for t = 0 … count−1."""
    if torch.get_default_device().type == "meta":  # only shapes are asked for
        return torch.empty(count, width)
    frequency = torch.exp(-math.log(10000.0) * torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    angle = torch.arange(count, dtype=torch.float64)[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1).float()


class UNet(nn.Module):
    """A denoiser x_t, t ↦ ε̂ with residual blocks at several resolutions, each half as wide and high as the one before.

    With `classes` it is x_t, t, label ↦ ε̂: an embedding of the label is added to that of the time.

    Level i has width channels·multipliers[i]; blocks[i] residual blocks on the way down and as many on the way up,
    the last level blocks[-1] in all. A level's result is added to (not concatenated with) what comes up from below.

    Args:
        shape: (C, H, W) of an image.
        channels: width of the first level; every width is a multiple of `groups`.
        multipliers: one factor per level.
        blocks: residual blocks per level.
        unshuffle: r folds r×r pixels into channels on entry and unfolds them at the exit, exactly; divides H and W.
        attention: attention over the pixels of the lowest level, ahead of its blocks.
        groups: groups of every group normalisation.
        embedding: width of the time embedding, even.
        timesteps: t runs over 0 … timesteps−1.
        classes: of a class-conditional network, its labels 0 … classes−1; 0 is a network without.

    Raises:
        ValueError: an argument out of range, by name.
    """

    sinusoids: Tensor  # (timesteps, embedding)

    def __init__(
        self,
        shape: tuple[int, int, int],
        channels: int = 32,
        multipliers: tuple[int, ...] = (1, 2),
        blocks: tuple[int, ...] = (1, 4),
        unshuffle: int = 1,
        attention: bool = False,
        groups: int = 8,
        embedding: int = 64,
        timesteps: int = 1000,
        classes: int = 0,
    ) -> None:
        super().__init__()
        self.config = {
            "shape": list(shape),
            "channels": channels,
            "multipliers": list(multipliers),
            "blocks": list(blocks),
            "unshuffle": unshuffle,
            "attention": attention,
            "groups": groups,
            "embedding": embedding,
            "timesteps": timesteps,
        }
        _check(self.config, classes)
        if classes:  # a network without keeps the configuration that it always had
            self.config["classes"] = classes
        self.shape = tuple(shape)
        self.unshuffle, self.classes = unshuffle, classes
        widths = [channels * m for m in multipliers]
        inner = shape[0] * unshuffle**2

        self.enter = nn.Conv2d(inner, widths[0], 3, padding=1)
        self.down = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(widths))
        self.up = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in pairwise(widths))
        stages = list(zip(widths, blocks, strict=True))
        self.descent = nn.ModuleList(Stage(w, n, groups) for w, n in stages)
        self.ascent = nn.ModuleList(Stage(w, n, groups) for w, n in stages[:-1])
        self.attention = Attention(widths[-1], groups) if attention else None
        self.norm = GroupNorm(groups, widths[0])
        self.exit = nn.Conv2d(widths[0], inner, 3, padding=1)
        start_at_zero(self.exit)

        levels = [*range(len(widths)), *range(len(widths) - 2, -1, -1)]
        self.splits = [widths[i] for i in levels for _ in range(blocks[i])]  # of the time embedding, block by block
        self.register_buffer("sinusoids", sinusoids(timesteps, embedding), persistent=False)
        self.embed = nn.Linear(embedding, 2 * embedding)
        self.project = nn.Linear(2 * embedding, sum(self.splits))
        self.label = nn.Embedding(classes + 1, 2 * embedding) if classes else None
        self.to(memory_format=LAYOUT)  # type: ignore[call-overload]

    @property
    def no_class(self) -> Tensor:
        """The label () long that stands for no class: `Guided(model, scale, model.no_class)`."""
        return torch.tensor(self.classes, device=self.sinusoids.device)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Return ε̂ (N, C, H, W) for x (N, C, H, W), t (N,) long and label (N,) long; None is `no_class` for all.

        Raises:
            ValueError: x, t or label of another shape, a label that is no class, or one for a network without classes.
        """
        if x.shape[1:] != self.shape or t.shape != x.shape[:1]:
            raise ValueError(
                f"x, t: shapes (N, {', '.join(map(str, self.shape))}) and (N,) are required, "
                f"got {tuple(x.shape)} and {tuple(t.shape)}"
            )
        embedded = self.embed(self.sinusoids[t])
        if self.label is not None or label is not None:
            embedded = embedded + self._of_class(label, t)
        embedded = self.project(F.silu(embedded))
        e = iter(embedded[:, :, None, None].split(self.splits, dim=1))
        h = self.enter(F.pixel_unshuffle(x, self.unshuffle) if self.unshuffle > 1 else x)
        passed = []
        for stage, down in zip(self.descent, self.down, strict=False):  # every stage but the lowest
            h = stage(h, e)
            passed.append(h)
            h = down(h)
        if self.attention is not None:
            h = self.attention(h)
        h = self.descent[-1](h, e)
        for stage, up in zip(reversed(self.ascent), reversed(self.up), strict=True):
            skip = passed.pop()
            h = stage(skip + F.interpolate(up(h), size=skip.shape[2:], mode="nearest"), e)
        h = self.exit(F.silu(self.norm(h)))
        return F.pixel_shuffle(h, self.unshuffle) if self.unshuffle > 1 else h

    def _of_class(self, label: Tensor | None, t: Tensor) -> Tensor:
        """The embedding (N, 2·embedding) of labels (N,), or of none."""
        if self.label is None:
            raise ValueError("label: none is taken by a network without classes")
        if label is None:
            return self.label.weight[-1:].expand(len(t), -1)
        if label.shape != t.shape or label.is_floating_point() or label.is_complex() or label.dtype == torch.bool:
            raise ValueError(f"label: integers of shape {tuple(t.shape)} are required, got {tuple(label.shape)}, "
                             f"{label.dtype}")  # fmt: skip
        try:
            embedded: Tensor = self.label(label.long())
        except IndexError as error:
            got = f"{int(label.min())} to {int(label.max())}"
            raise ValueError(f"label: 0 to {self.classes}, which is no class, is required, got {got}") from error
        return embedded


def _check(config: dict[str, Any], classes: int) -> None:
    """Raise ValueError for the first argument of `UNet` out of range."""
    if isinstance(classes, bool) or not isinstance(classes, int) or classes < 0:
        raise ValueError(f"classes: an integer of at least 0 is required, got {classes!r}")
    lists = {name: config[name] for name in ("shape", "multipliers", "blocks")}
    single = {name: config[name] for name in ("channels", "unshuffle", "groups", "embedding", "timesteps")}
    for name, value in [*single.items(), *((name, n) for name, values in lists.items() for n in values)]:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: positive integers are required, got {value!r}")
    if not isinstance(config["attention"], bool):
        raise ValueError(f"attention: true or false is required, got {config['attention']!r}")
    if len(config["shape"]) != 3 or any(n % config["unshuffle"] for n in config["shape"][1:]):
        raise ValueError(
            f"shape: (C, H, W), H and W multiples of unshuffle = {config['unshuffle']}, is required, "
            f"got {tuple(config['shape'])}"
        )
    if not config["multipliers"] or len(config["blocks"]) != len(config["multipliers"]):
        raise ValueError(
            f"blocks: one number for each of {len(config['multipliers'])} (≥ 1) multipliers is required, "
            f"got {len(config['blocks'])}"
        )
    if config["embedding"] % 2:
        raise ValueError(f"embedding: an even number is required, got {config['embedding']}")
    for multiplier in config["multipliers"]:
        if config["channels"] * multiplier % config["groups"]:
            raise ValueError(
                f"channels: a width {config['channels'] * multiplier} is no multiple of groups = {config['groups']}"
            )
