"""Sampling in another orthonormal basis of the pixels, where the linear part of a splitting is diagonal.

DDIM steps commute with a rotation of all states: for x = Q y the chain is y_{k+1} = a_k y_k + c_k Qᵀ ε(Q y_k, t_k) with
latents Qᵀ x_T. So latents, noises, model and what the caller sees are rotated, and nothing else knows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .chain import Edit


@dataclass(eq=False)
class Rotated:
    """model, in coordinates y = Qᵀ x. Q (D, D), orthonormal columns."""

    model: Callable[..., Tensor]
    Q: Tensor
    dtype: torch.dtype  # in which the model wants x

    def __call__(self, y: Tensor, t: Tensor, *inputs: Tensor) -> Tensor:
        """Qᵀ model(Q y, t) (N, …) for y (N, …)."""
        value = self.model(rotate(y, self.Q.T).to(self.dtype), t, *inputs)
        if not isinstance(value, Tensor) or value.shape != y.shape:
            return value  # refused where every model's answer is looked at
        return rotate(value.to(y.dtype), self.Q)


def rotate(x: Tensor, Q: Tensor) -> Tensor:
    """x (N, …), its entries as one row each times Q (D, D), in the dtype of x, or float32 where that is wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide).flatten(1) @ Q.to(x.device, wide)).reshape(x.shape).to(x.dtype)


def rotate_states(x: Tensor, Q: Tensor) -> Tensor:
    """The same for states (B, n, …)."""
    return rotate(x.flatten(0, 1), Q).reshape(x.shape)


def rotated_edit(edit: Edit | None, Q: Tensor) -> Edit | None:
    """An edit of x, for y."""
    if edit is None:
        return None
    return lambda y, k, image: rotate(edit(rotate(y, Q.T), k, image), Q)


def rotated_callback(callback: Callable[[int, Tensor, Tensor], Any] | None, Q: Tensor) -> Any:
    """A callback that wants trajectories in x, for y."""
    if callback is None:
        return None
    return lambda step, trajectory, residual: callback(step, rotate_states(trajectory, Q.T), residual)
