"""Products with Jacobians: of functions, inside any transforms, and of graphs that are there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_torch: Any = torch.func  # whose functions have no types of use
_functorch: Any = getattr(torch._C, "_functorch", None)


def pulled(h: Callable[..., Tensor], at: Sequence[Tensor], cotangent: Tensor) -> list[Tensor | None]:
    """The cotangents of `at` for that of h(*at)."""
    at = [_alive(x) for x in at]
    real = [i for i, x in enumerate(at) if x.is_floating_point() or x.is_complex()]
    if not real:
        return [None] * len(at)
    value, pull = _torch.vjp(_only(h, at, real), *[at[i] for i in real])
    found = dict(zip(real, pull(cotangent.to(value.dtype)), strict=True))
    return [found.get(i) for i in range(len(at))]


def pushed(h: Callable[..., Tensor], at: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> Tensor:
    """The tangent of h(*at): that of a product with the transpose, which is linear."""
    at = [_alive(x) for x in at]
    real = [i for i, t in enumerate(tangents) if t is not None]
    value, pull = _torch.vjp(_only(h, at, real), *[at[i] for i in real])
    _, push = _torch.vjp(pull, torch.zeros_like(value))
    found: Tensor = push(tuple(tangents[i] for i in real))[0]
    return found


def _alive(x: Tensor) -> Tensor:
    """x without the levels of transforms that have ended: torch cannot make zeros like what has two of them."""
    while True:
        inner: Tensor = _functorch.unwrap_if_dead(x)
        if inner is x:
            return x
        x = inner


def _only(h: Callable[..., Tensor], at: Sequence[Tensor], which: list[int]) -> Callable[..., Tensor]:
    """h as a function of `which` of its arguments."""

    def called(*chosen: Tensor) -> Tensor:
        given = dict(zip(which, chosen, strict=True))
        return h(*[given.get(i, x) for i, x in enumerate(at)])

    return called


def forward_products(f: Tensor, z: Tensor) -> Callable[[Tensor], Tensor]:
    """v ↦ J v, (n, T, D): the derivative of u ↦ Jᵀu, which is linear."""
    if not f.requires_grad:
        return torch.zeros_like
    with torch.enable_grad():
        u = torch.zeros_like(f, requires_grad=True)
        (product,) = torch.autograd.grad(f, z, u, create_graph=True, allow_unused=True)
    if product is None or not product.requires_grad:
        return torch.zeros_like

    def image(v: Tensor) -> Tensor:
        cotangent = v.to(product.dtype).view(product.shape)
        (found,) = torch.autograd.grad(product, u, cotangent, retain_graph=True, allow_unused=True)
        return torch.zeros_like(v) if found is None else found

    return image
