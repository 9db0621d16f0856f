"""What a problem of the profile is, and what its modules share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
import problems

f64 = torch.float64
Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """z = fn(z) from `start` (1, D) float64; fn takes (n, D). solution (D,) or (1, D): the fixed point where known."""

    name: str
    fn: Function
    start: Tensor
    solution: Tensor | None = None


def known(name: str, given: problems.Map, start: list[float] | None = None) -> Case:
    """A problem of the tests; start: of its own."""
    first = given.start if start is None else torch.tensor([start], dtype=f64)
    return Case(name, lambda z: given.fn(z, *given.inputs), first, given.solution)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=f64, generator=problems.generator(seed))


def uniform(*shape: int, seed: int) -> Tensor:
    return torch.rand(*shape, dtype=f64, generator=problems.generator(seed))


def jacobian(fn: Function, z: Tensor) -> Tensor:
    """(D, D) at z (1, D)."""
    return torch.func.jacrev(lambda x: fn(x[None])[0])(z[0])


def root(name: str, F: Function, start: Tensor | list[float], solution: Tensor | None = None) -> Case:
    """F(z) = 0 as z = z − F(z)/‖J_F(z₀)‖₂: a step that is the scale of the first one of Newton's method, or less."""
    z = torch.as_tensor(start, dtype=f64).reshape(1, -1)
    rate = 1 / float(torch.linalg.matrix_norm(jacobian(F, z), 2))
    return Case(name, lambda z: z - rate * F(z), z, solution)


def descent(name: str, residuals: Function, start: Tensor | list[float]) -> Case:
    """min ½‖F(z)‖² as z = z − ∇/‖∇²(z₀)‖₂: gradient descent at the rate of the start; F (n, D) → (n, M)."""
    z = torch.as_tensor(start, dtype=f64).reshape(1, -1)

    def gradient(z: Tensor) -> Tensor:
        return torch.func.grad(lambda z: 0.5 * residuals(z).square().sum())(z)

    rate = 1 / float(torch.linalg.matrix_norm(jacobian(gradient, z), 2))
    return Case(name, lambda z: z - rate * gradient(z), z)
