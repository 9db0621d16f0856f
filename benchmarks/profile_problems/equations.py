"""Nonlinear equations F(z) = 0 as fixed points: the 23 that NonlinearSolve.jl tests its solvers with.

They are those of the collection of Burkardt (test_nonlin), most of them from Moré, Garbow & Hillstrom (1981).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .case import Case, Function, f64, root


def stacked(*columns: Tensor) -> Tensor:
    return torch.stack(columns, dim=-1)


def rosenbrock(z: Tensor) -> Tensor:
    return torch.cat([1 - z[:, :1], 10 * (z[:, 1:] - z[:, :-1] ** 2)], 1)


def powell_singular(z: Tensor) -> Tensor:
    a, b, c, d = z.unbind(-1)
    return stacked(a + 10 * b, 5**0.5 * (c - d), (b - 2 * c) ** 2, 10**0.5 * (a - d) ** 2)


def powell_badly_scaled(z: Tensor) -> Tensor:
    a, b = z.unbind(-1)
    return stacked(1e4 * a * b - 1, torch.exp(-a) + torch.exp(-b) - 1.0001)


def wood(z: Tensor) -> Tensor:
    a, b, c, d = z.unbind(-1)
    u, v = b - a * a, d - c * c
    return stacked(
        -200 * a * u - (1 - a), 200 * u + 20.2 * (b - 1) + 19.8 * (d - 1),
        -180 * c * v - (1 - c), 180 * v + 20.2 * (d - 1) + 19.8 * (b - 1),
    )  # fmt: skip


def helical_valley(z: Tensor) -> Tensor:
    a, b, c = z.unbind(-1)
    angle = torch.atan2(b, a) / (2 * math.pi)
    angle = torch.where((a < 0) & (b < 0), angle + 1, angle)
    return stacked(10 * (c - 10 * angle), 10 * (torch.hypot(a, b) - 1), c)


def watson_residuals(z: Tensor) -> Tensor:
    n = z.shape[1]
    t = torch.arange(1, 30, dtype=f64)[:, None] / 29
    powers = torch.arange(n, dtype=f64)
    values = t**powers  # (29, n)
    slopes = powers[1:] * t ** (powers[1:] - 1)
    f = z[:, 1:] @ slopes.T - (z @ values.T) ** 2 - 1
    return torch.cat([f, z[:, :1], z[:, 1:2] - z[:, :1] ** 2 - 1], 1)


def watson(z: Tensor) -> Tensor:
    return torch.func.grad(lambda z: 0.5 * watson_residuals(z).square().sum())(z)


def chebyquad(z: Tensor) -> Tensor:
    n = z.shape[1]
    x, before, now, found = 2 * z - 1, torch.ones_like(z), 2 * z - 1, []
    for i in range(1, n + 1):
        found.append(now.mean(1) + (1 / (i * i - 1) if i % 2 == 0 else 0.0))
        before, now = now, 2 * x * now - before
    return stacked(*found)


def brown_almost_linear(z: Tensor) -> Tensor:
    n = z.shape[1]
    return torch.cat([z[:, :-1] + z.sum(1, keepdim=True) - (n + 1), z.prod(1, keepdim=True) - 1], 1)


def mesh(n: int) -> Tensor:
    return torch.arange(1, n + 1, dtype=f64) / (n + 1)


def discrete_boundary(z: Tensor) -> Tensor:
    n = z.shape[1]
    padded = torch.nn.functional.pad(z, (1, 1))
    return 2 * z - padded[:, :-2] - padded[:, 2:] + (z + mesh(n) + 1) ** 3 / (2 * (n + 1) ** 2)


def discrete_integral(z: Tensor) -> Tensor:
    n = z.shape[1]
    t = mesh(n)
    kernel = torch.where(t[None] <= t[:, None], (1 - t)[:, None] * t, t[:, None] * (1 - t))
    return z + (z + t + 1) ** 3 @ kernel.T / (2 * (n + 1))


def trigonometric(z: Tensor) -> Tensor:
    n = z.shape[1]
    i = torch.arange(1, n + 1, dtype=f64)
    return n - torch.cos(z).sum(1, keepdim=True) + i * (1 - torch.cos(z)) - torch.sin(z)


def variably_dimensioned(z: Tensor) -> Tensor:
    j = torch.arange(1, z.shape[1] + 1, dtype=f64)
    s = ((z - 1) * j).sum(1, keepdim=True)
    return z - 1 + j * s * (1 + 2 * s * s)


def broyden_tridiagonal(z: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(z, (1, 1))
    return (3 - 2 * z) * z - padded[:, :-2] - 2 * padded[:, 2:] + 1


def broyden_banded(z: Tensor) -> Tensor:
    n = z.shape[1]
    i = torch.arange(n)
    near = ((i[None] - i[:, None]).clamp(-6, 2) == i[None] - i[:, None]) & (i[None] != i[:, None])
    return z * (2 + 5 * z * z) + 1 - (z * (1 + z)) @ near.to(f64).T


def matrix_square_root(A: Tensor) -> Function:
    """X² = A (Hammarling); X (n, k·k) row by row."""
    k = len(A)

    def square(z: Tensor) -> Tensor:
        X = z.reshape(-1, k, k)
        return (X @ X - A).flatten(1)

    return square


def chandrasekhar(c: float) -> Function:
    def equation(z: Tensor) -> Tensor:
        n = z.shape[1]
        mu = (torch.arange(n, dtype=f64) + 0.5) / n
        return z - 1 / (1 - z @ (c / (2 * n) * mu[:, None] / (mu[:, None] + mu)).T)

    return equation


def sample_18(z: Tensor) -> Tensor:
    a, b = z.unbind(-1)
    return stacked(-torch.expm1(-a * a) / a * b * b, -torch.expm1(-b * b) / b * a)


def dennis_schnabel(z: Tensor) -> Tensor:
    a, b = z.unbind(-1)
    return stacked(a + b - 3, a * a + b * b - 9)


def freudenstein_roth(z: Tensor) -> Tensor:
    a, b = z.unbind(-1)
    return stacked(a - b**3 + 5 * b * b - 2 * b - 13, a + b**3 + b * b - 14 * b - 29)


def boggs(z: Tensor) -> Tensor:
    a, b = z.unbind(-1)
    return stacked(a * a - b + 1, a - torch.cos(math.pi / 2 * b))


def cases() -> list[Case]:
    n = 10
    j = torch.arange(1, n + 1, dtype=f64)
    small = torch.tensor([[1e-4, 1.0], [0.0, 1e-4]], dtype=f64)
    larger = torch.block_diag(small, torch.tensor([[1e-4]], dtype=f64))
    ones, t = torch.ones(n, dtype=f64), mesh(n)
    made = [
        ("Rosenbrock, n=10", rosenbrock, torch.cat([-1.2 * ones[:1], ones[1:]]), ones),
        ("Powell singular", powell_singular, [3, -1, 0, 1], torch.zeros(4, dtype=f64)),
        ("Powell badly scaled", powell_badly_scaled, [0, 1], torch.tensor([1.098159e-5, 9.106146])),
        ("Wood", wood, [-3, -1, -3, -1], torch.ones(4, dtype=f64)),
        ("helical valley", helical_valley, [-1, 0, 0], torch.tensor([1.0, 0, 0])),
        ("Watson, n=6", watson, torch.zeros(6), None),
        ("Chebyquad, n=5", chebyquad, mesh(5), None),
        ("Brown almost linear, n=10", brown_almost_linear, 0.5 * ones, ones),
        ("discrete boundary value, n=10", discrete_boundary, t * (t - 1), None),
        ("discrete integral, n=10", discrete_integral, t * (t - 1), None),
        ("trigonometric, n=10", trigonometric, ones / n, None),
        ("variably dimensioned, n=10", variably_dimensioned, 1 - j / n, ones),
        ("Broyden tridiagonal, n=10", broyden_tridiagonal, -ones, None),
        ("Broyden banded, n=10", broyden_banded, -ones, None),
        ("Hammarling 2×2", matrix_square_root(small), [1, 0, 0, 1], torch.tensor([0.01, 50, 0, 0.01])),
        ("Hammarling 3×3", matrix_square_root(larger), torch.eye(3).flatten(), torch.tensor([50.0])),
        ("Dennis–Schnabel 2×2", dennis_schnabel, [1, 5], torch.tensor([0.0, 3])),
        ("sample 18", sample_18, [2, 2], torch.zeros(2)),
        ("sample 19", lambda z: z * z.square().sum(1, keepdim=True), [3, 3], torch.zeros(2)),
        ("scalar z(z−5)²", lambda z: z * (z - 5) ** 2, [1], torch.zeros(1)),
        ("Freudenstein–Roth", freudenstein_roth, [0.5, -2], torch.tensor([5.0, 4])),
        ("Boggs", boggs, [1, 0], torch.tensor([0.0, 1])),
        ("Chandrasekhar, c=.9, n=10", chandrasekhar(0.9), ones, None),
    ]
    return [root(f"N{k + 1} {name}", F, start, solution) for k, (name, F, start, solution) in enumerate(made)]
