"""The adjoint's systems u = g + A u as the native module takes them: numbers and addresses, no tensor kept alive."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..memory import address
from . import native
from .device import DeviceKrylov


def krylov(g: Tensor, restart: int) -> Any:
    """The Krylov solve for g (B, …) as the native module takes it, or None where there are no kernels for it.

    In cycles of `restart` products at most. g is float32 or float64, contiguous. On the host the solve is addresses
    alone: no tensor is kept alive.
    """
    known = _systems(g)
    if known is None:
        return None
    if g.is_cpu:
        return native.system("Krylov", *known)
    kernels = native.on_device()
    return None if kernels is None or restart > kernels.KRYLOV_MOST_VECTORS else DeviceKrylov(g, restart, kernels)


def small(g: Tensor, mask: Tensor | None, rtol: float | Tensor, atol: float | Tensor, eps: float) -> Any:
    """The same for systems of few unknowns, of the samples where mask (B,) bool is true, to their tolerances.

    Tensors of tolerances are (B,) float64. eps: of the products.
    """
    known = _systems(g) if g.is_cpu else None
    if known is None:
        return None
    numbers = [0.0 if isinstance(t, Tensor) else t for t in (rtol, atol)]
    places = [t.data_ptr() if isinstance(t, Tensor) else 0 for t in (mask, rtol, atol)]
    return native.system("Small", *known, places[0], *numbers, *places[1:], eps, torch.get_num_threads())


def _systems(g: Tensor) -> tuple[Any, ...] | None:
    """What the native module must know of the systems for g (B, …), None where there are no kernels for them."""
    if g.dtype not in (torch.float32, torch.float64) or not native.is_native(g) or not g.numel():
        return None
    try:
        start = address(g, "g")
    except NotImplementedError:  # inside a transform of torch.func
        return None
    return g.dtype == torch.float64, len(g), g.numel() // len(g), torch.finfo(g.dtype).eps, start
