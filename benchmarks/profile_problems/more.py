"""Least squares of Moré, Garbow & Hillstrom (1981) as gradient descent, their systems at larger sizes, examples of
KINSOL, jaxopt and cvxgrp/aa."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import equations as eq
from .case import Case, descent, f64, known, problems, root
from .equations import stacked


def beale(z: Tensor) -> Tensor:
    a, b = z.unbind(-1)
    return stacked(*[y - a * (1 - b**k) for k, y in enumerate((1.5, 2.25, 2.625), start=1)])


def bard(z: Tensor) -> Tensor:
    y = torch.tensor([14, 18, 22, 25, 29, 32, 35, 39, 37, 58, 73, 96, 134, 210, 439], dtype=f64) / 100
    u = torch.arange(1, 16, dtype=f64)
    v = 16 - u
    return y - (z[:, :1] + u / (v * z[:, 1:2] + torch.minimum(u, v) * z[:, 2:]))


def gaussian(z: Tensor) -> Tensor:
    half = [0.0009, 0.0044, 0.0175, 0.0540, 0.1295, 0.2420, 0.3521]
    y = torch.tensor([*half, 0.3989, *reversed(half)], dtype=f64)
    t = (8 - torch.arange(1, 16, dtype=f64)) / 2
    return z[:, :1] * torch.exp(-z[:, 1:2] * (t - z[:, 2:]) ** 2 / 2) - y


def box(z: Tensor) -> Tensor:
    t = 0.1 * torch.arange(1, 11, dtype=f64)
    return torch.exp(-t * z[:, :1]) - torch.exp(-t * z[:, 1:2]) - z[:, 2:] * (torch.exp(-t) - torch.exp(-10 * t))


def kowalik_osborne(z: Tensor) -> Tensor:
    y = [0.1957, 0.1947, 0.1735, 0.1600, 0.0844, 0.0627, 0.0456, 0.0342, 0.0323, 0.0235, 0.0246]
    u = torch.tensor([4, 2, 1, 0.5, 0.25, 0.167, 0.125, 0.1, 0.0833, 0.0714, 0.0625], dtype=f64)
    a, b, c, d = z[..., None].unbind(1)
    return torch.tensor(y, dtype=f64) - a * (u * u + u * b) / (u * u + u * c + d)


def brown_dennis(z: Tensor) -> Tensor:
    t = torch.arange(1, 21, dtype=f64) / 5
    a, b, c, d = z[..., None].unbind(1)
    return (a + t * b - torch.exp(t)) ** 2 + (c + d * torch.sin(t) - torch.cos(t)) ** 2


def biggs(z: Tensor) -> Tensor:
    t = 0.1 * torch.arange(1, 14, dtype=f64)
    y = torch.exp(-t) - 5 * torch.exp(-10 * t) + 3 * torch.exp(-4 * t)
    a, b, c, d, e, f = z[..., None].unbind(1)
    return c * torch.exp(-t * a) - d * torch.exp(-t * b) + f * torch.exp(-t * e) - y


def penalty(z: Tensor) -> Tensor:
    return torch.cat([1e-5**0.5 * (z - 1), z.square().sum(1, keepdim=True) - 0.25], 1)


def pairs(z: Tensor) -> Tensor:
    """Rosenbrock's function of every pair of unknowns."""
    a, b = z[:, ::2], z[:, 1::2]
    return torch.cat([10 * (b - a * a), 1 - a], 1)


def fours(z: Tensor) -> Tensor:
    """Powell's singular function of every four unknowns."""
    return eq.powell_singular(z.reshape(-1, 4)).reshape(len(z), -1)


def least_squares() -> list[Case]:
    return [
        descent("M1 Rosenbrock", pairs, [-1.2, 1]),
        descent("M2 Freudenstein–Roth", eq.freudenstein_roth, [0.5, -2]),
        descent("M3 Beale", beale, [1, 1]),
        descent("M4 helical valley", eq.helical_valley, [-1, 0, 0]),
        descent("M5 Bard", bard, [1, 1, 1]),
        descent("M6 Gaussian", gaussian, [0.4, 1, 0]),
        descent("M7 Box", box, [0, 10, 20]),
        descent("M8 Kowalik–Osborne", kowalik_osborne, [0.25, 0.39, 0.415, 0.39]),
        descent("M9 Brown–Dennis", brown_dennis, [25, 5, -5, -1]),
        descent("M10 Biggs", biggs, [1, 2, 1, 1, 1, 1]),
        descent("M11 penalty I, n=10", penalty, torch.arange(1, 11)),
        descent("M12 extended Rosenbrock, n=20", pairs, torch.tensor([-1.2, 1]).repeat(10)),
        descent("M13 extended Powell, n=12", fours, torch.tensor([3, -1, 0, 1]).repeat(3)),
    ]


def larger() -> list[Case]:
    def case(name: str, F: eq.Function, start: Tensor, rate: float) -> Case:
        return Case(name, lambda z: z - rate * F(z), start.to(f64)[None])

    n = 50
    t = eq.mesh(n)
    ones = torch.ones(n, dtype=f64)
    return [
        case("M28 discrete boundary value, Jacobi, n=50", eq.discrete_boundary, t * (t - 1), 0.5),
        case("M29 discrete integral, n=50", eq.discrete_integral, t * (t - 1), 1.0),
        case("M30 Broyden tridiagonal, n=50", eq.broyden_tridiagonal, -ones, 1 / 7),
        case("M31 Broyden banded, n=50", eq.broyden_banded, -ones, 1 / 17),
        root("M27 Brown almost linear, n=50", eq.brown_almost_linear, 0.5 * ones, ones),
        root("M26 trigonometric, n=30", eq.trigonometric, torch.ones(30) / 30),
        root("M30 Broyden tridiagonal, n=200", eq.broyden_tridiagonal, -torch.ones(200)),
        root("M35 Chebyquad, n=7", eq.chebyquad, eq.mesh(7)),
    ]


def ferraris_tronconi(z: Tensor) -> Tensor:
    """SUNDIALS kinFerTron_dns, its two equations without the bounds."""
    a, b = z.unbind(-1)
    e = math.e
    return stacked(
        0.5 * torch.sin(a * b) - b / (4 * math.pi) - 0.5 * a,
        (1 - 1 / (4 * math.pi)) * (torch.exp(2 * a) - e) + e * b / math.pi - 2 * e * a,
    )


def examples() -> list[Case]:
    return [
        known("KINSOL analytic", problems.kinsol_analytic()),
        known("KINSOL Roberts", problems.roberts()),
        root("KINSOL Ferraris–Tronconi", ferraris_tronconi, [0.25, 1.5], torch.tensor([0.5, math.pi])),
        known("jaxopt geometric", problems.geometric()),
        known("jaxopt rotation", problems.rotation()),
        known("cvxgrp/aa ill-conditioned", problems.ill_conditioned()),
        known("rank deficient, n=50", problems.rank_deficient()),
        Case("cosine", torch.cos, torch.zeros(1, 1, dtype=f64), torch.tensor([0.7390851332151607])),
    ]


def cases() -> list[Case]:
    return [*least_squares(), *larger(), *examples()]
