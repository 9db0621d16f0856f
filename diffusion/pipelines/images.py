"""Checks of pictures that the pipelines take: PIL images, arrays or tensors, as diffusers' image processor has them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .conditions import check_values

KINDS = {Image.Image: "PIL image", np.ndarray: "array", Tensor: "tensor"}


def check_images(images: Any) -> None:
    """Raises for what is no picture, nor a list of pictures of one kind and size.

    Arrays are (H, W, C) or (n, H, W, C), tensors (C, H, W) or (n, C, H, W), of real numbers.

    Raises:
        TypeError: another kind, or several.
        ValueError: none, no height, width or channels, or several sizes.
    """
    given = list(images) if isinstance(images, (list, tuple)) else [images]
    if not given:
        raise ValueError("image: at least one is required, got none")
    kinds = {next((kind for kind in KINDS if isinstance(one, kind)), type(one)) for one in given}
    if len(kinds) > 1 or not kinds <= KINDS.keys():
        got = ", ".join(sorted(KINDS.get(kind, kind.__name__) for kind in kinds))
        raise TypeError(f"image: PIL images, arrays or tensors, of one kind, are required, got {got}")
    shapes = {(one.mode, *one.size) if isinstance(one, Image.Image) else _shape(one) for one in given}
    if len(shapes) > 1:
        got = " and ".join(map(str, sorted(shapes)[:2]))
        raise ValueError(f"image: pictures of one size, and all grey or all in colour, are required, got {got}")


def _shape(one: Any) -> tuple[Any, ...]:
    """(C, H, W) of a tensor, (H, W, C) of an array."""
    shape = tuple(one.shape)
    if len(shape) not in (3, 4) or 0 in shape:
        required = "(C, H, W) or (n, C, H, W)" if isinstance(one, Tensor) else "(H, W, C) or (n, H, W, C)"
        raise ValueError(f"image: shape {required} with at least one entry is required, got {shape}")
    if isinstance(one, Tensor):
        check_values("image", one)
        real = not one.is_complex() and one.dtype != torch.bool
    else:
        real = one.dtype.kind in "iuf"
    if not real:
        raise TypeError(f"image: real numbers are required, got {one.dtype}")
    return len(shape), *shape[-3:]
