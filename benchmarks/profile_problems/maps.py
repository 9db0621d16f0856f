"""Affine maps of known spectra, and layers of deep equilibrium models."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .case import Case, Function, f64, known, normal, problems, uniform


def affine(name: str, A: Tensor, seed: int = 1) -> Case:
    """z = A z + b; A (D, D)."""
    b = normal(1, len(A), seed=seed)
    solution = torch.linalg.solve(torch.eye(len(A), dtype=f64) - A, b[0])
    return Case(name, lambda z: z @ A.T + b, torch.zeros_like(b), solution)


def convection(n: int, peclet: float) -> Tensor:
    """Jacobi's matrix of −u″ + p u′ with central differences, n points, cell Péclet number `peclet`."""
    left, right = (1 + peclet) / 2, (1 - peclet) / 2
    return torch.diag(torch.full((n - 1,), left, dtype=f64), -1) + torch.diag(torch.full((n - 1,), right, dtype=f64), 1)


def scattering(destruction: float) -> Case:
    """Λ-iteration (Ng 1974)."""
    return known(f"Λ-iteration, ε={destruction:g}", problems.scattering(destruction))


def spectra() -> list[Case]:
    def spread(low: float, high: float, n: int, seed: int = 0) -> Tensor:
        return problems.with_spectrum(torch.linspace(low, high, n, dtype=f64), seed)

    clusters = torch.cat([torch.full((20,), c, dtype=f64) for c in (-0.7, 0.2, 0.9)]) + 1e-3 * normal(60, seed=2)
    geometric = 1 - torch.logspace(0, -4, 60, dtype=f64)
    beyond = torch.cat([torch.linspace(1.5, 3, 7, dtype=f64), torch.linspace(-0.5, 0.9, 57, dtype=f64)])
    gauss = normal(200, 200, seed=3) / 200**0.5
    defective = 0.7 * torch.eye(40, dtype=f64) + torch.diag(torch.full((39,), 0.25, dtype=f64), 1)
    skew = normal(60, 60, seed=4)
    skew = (skew - skew.T) / torch.linalg.matrix_norm(skew - skew.T, 2)
    return [
        affine("spectrum [−.5, .97], n=32", spread(-0.5, 0.97, 32)),
        affine("spectrum [−.5, .97], n=256", spread(-0.5, 0.97, 256)),
        affine("spectrum [0, .99], n=64", spread(0, 0.99, 64)),
        affine("spectrum [0, .999], n=100", spread(0, 0.999, 100)),
        affine("spectrum [−.9, .9], n=128", spread(-0.9, 0.9, 128)),
        affine("spectrum [−.99, .5], n=64", spread(-0.99, 0.5, 64)),
        affine("spectrum [−3, .9], n=64", spread(-3, 0.9, 64)),
        affine("spectrum [−10, .5], n=64", spread(-10, 0.5, 64)),
        affine("spectrum in three clusters", problems.with_spectrum(clusters, 5)),
        affine("spectrum 1 − 10⁻⁴ᵗ", problems.with_spectrum(geometric, 6)),
        affine(".95 × orthogonal, n=64", 0.95 * problems.orthogonal(64, 7)),
        affine(".99 × orthogonal, n=16", 0.99 * problems.orthogonal(16, 8)),
        affine("Gaussian matrix, ρ=.9, n=200", 0.9 * gauss),
        affine("Gaussian matrix, ρ=.5, n=200", 0.5 * gauss),
        affine("Jordan block .7, coupling .25", defective),
        affine("1.5 × skew-symmetric, n=60", 1.5 * skew),
        affine("shift, n=20", torch.diag(torch.ones(19, dtype=f64), -1)),
        affine("convection, Péclet .5, n=40", convection(40, 0.5)),
        affine("convection, Péclet 3, n=40", convection(40, 3.0)),
        affine("seven eigenvalues beyond 1", problems.with_spectrum(beyond, 9)),
        scattering(1e-2),
        scattering(1e-4),
    ]


def layer(name: str, W: Tensor, act: Callable[[Tensor], Tensor] = torch.tanh, gain: float = 1.0) -> Case:
    """z = act(W z + x)."""
    D = len(W)
    x = gain * normal(1, D, seed=11)
    return Case(name, lambda z: act(z @ W.T + x), torch.zeros(1, D, dtype=f64))


def graph(name: str, nodes: int, features: int, gain: float, act: Callable[[Tensor], Tensor] = torch.tanh) -> Case:
    """Z = act(Â Z W + X), Â the normalised adjacency of a ring with random chords (implicit graph layer)."""
    ring = torch.arange(nodes)
    A = torch.eye(nodes, dtype=f64)
    A[ring, (ring + 1) % nodes] = 1
    chords = (uniform(nodes, nodes, seed=12) < 3 / nodes).to(f64)
    A = ((A + A.T + chords + chords.T) > 0).to(f64)
    degree = A.sum(1).rsqrt()
    A = degree[:, None] * A * degree
    W, X = gain * problems.orthogonal(features, 13), normal(nodes, features, seed=14)

    def fn(z: Tensor) -> Tensor:
        Z = z.reshape(-1, nodes, features)
        return act(A @ Z @ W + X).flatten(1)

    return Case(name, fn, torch.zeros(1, nodes * features, dtype=f64))


def attention(tokens: int = 12, width: int = 16, gain: float = 0.9) -> Function:
    """Z = norm(X + gain · softmax(Z Q Kᵀ Zᵀ/√d) Z V), layer-normalised."""
    Q, K, V = (problems.orthogonal(width, seed) for seed in (15, 16, 17))
    X = normal(tokens, width, seed=18)

    def fn(z: Tensor) -> Tensor:
        Z = z.reshape(-1, tokens, width)
        scores = (Z @ Q) @ (Z @ K).transpose(1, 2) / width**0.5
        return torch.nn.functional.layer_norm(X + gain * scores.softmax(-1) @ Z @ V, (width,)).flatten(1)

    return fn


def normalised(width: int = 64, gain: float = 2.0) -> Function:
    """z = norm(x + W₂ relu(W₁ z)): the block of a multiscale DEQ in small."""
    first, second = gain * problems.orthogonal(width, 19), problems.orthogonal(width, 20)
    x = normal(1, width, seed=21)

    def fn(z: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(x + torch.relu(z @ first.T) @ second.T, (width,))

    return fn


def convolutional(size: int = 12, gain: float = 0.9) -> Case:
    """z = relu(conv(z) + x), a 3 × 3 kernel of two channels, scaled to spectral norm `gain` or a little less."""
    kernel = normal(2, 2, 3, 3, seed=22)
    bound = torch.fft.fft2(kernel, (16, 16)).permute(2, 3, 0, 1)
    kernel = gain * kernel / float(torch.linalg.matrix_norm(bound, 2).max())
    x = normal(1, 2, size, size, seed=23)

    def fn(z: Tensor) -> Tensor:
        return torch.relu(torch.nn.functional.conv2d(z.reshape(-1, 2, size, size), kernel, padding=1) + x).flatten(1)

    return Case(f"convolutional layer, gain {gain:g}", fn, torch.zeros(1, 2 * size * size, dtype=f64))


def monotone(width: int = 60) -> Case:
    """Forward–backward splitting of z = relu(W z + x), W = (1 − m) I − AᵀA + B − Bᵀ (Winston & Kolter 2020)."""
    A, B = normal(width, width, seed=24) / width**0.5, normal(width, width, seed=25) / width**0.5
    W = 0.9 * torch.eye(width, dtype=f64) - A.T @ A + B - B.T
    x = normal(1, width, seed=26)
    return Case(
        "monotone operator layer, step .1",
        lambda z: torch.relu(z + 0.1 * (z @ W.T + x - z)), torch.zeros(1, width, dtype=f64),
    )  # fmt: skip


def networks() -> list[Case]:
    Q = problems.orthogonal

    def wide(low: float, high: float, n: int) -> Tensor:
        return problems.with_spectrum(torch.linspace(low, high, n, dtype=f64), 10)

    elu = torch.nn.functional.elu
    return [
        layer("tanh layer, orthogonal ρ=.9, n=64", 0.9 * Q(64, 1)),
        layer("tanh layer, orthogonal ρ=.9, n=256", 0.9 * Q(256, 2)),
        layer("tanh layer, orthogonal ρ=.99, weak input", 0.99 * Q(64, 3), gain=0.1),
        layer("tanh layer, orthogonal ρ=.99, weaker input", 0.99 * Q(128, 4), gain=0.03),
        layer("tanh layer, orthogonal ρ=1.5", 1.5 * Q(64, 5)),
        layer("tanh layer, orthogonal ρ=2", 2 * Q(64, 6)),
        layer("tanh layer, symmetric [−.95, .95]", wide(-0.95, 0.95, 128), gain=0.01),
        layer("tanh layer, symmetric [−.5, .99]", wide(-0.5, 0.99, 64), gain=0.01),
        layer("tanh layer, symmetric [−4, .9]", wide(-4, 0.9, 64), gain=0.3),
        layer("tanh layer, Gaussian ρ=1.2", 1.2 * normal(100, 100, seed=27) / 10),
        layer("relu layer, orthogonal ρ=.9", 0.9 * Q(64, 7), torch.relu),
        layer("relu layer, Gaussian ρ=.95", 0.95 * normal(150, 150, seed=28) / math.sqrt(150), torch.relu),
        layer("elu layer, symmetric [−.9, .9]", wide(-0.9, 0.9, 64), elu),
        layer("sine layer, Gaussian ρ=.8", 0.8 * normal(80, 80, seed=29) / math.sqrt(80), torch.sin),
        graph("graph layer, gain .9", 30, 8, 0.9),
        graph("graph layer, gain .98, relu", 30, 8, 0.98, torch.relu),
        graph("graph layer, gain .99, linear", 60, 4, 0.99, lambda z: z),
        graph("graph layer, gain 1.5", 30, 8, 1.5),
        Case("attention layer", attention(), torch.zeros(1, 192, dtype=f64)),
        Case("attention layer, gain 2", attention(gain=2.0), torch.zeros(1, 192, dtype=f64)),
        Case("normalised layer, gain 1", normalised(gain=1.0), torch.zeros(1, 64, dtype=f64)),
        Case("normalised layer, gain 2", normalised(), torch.zeros(1, 64, dtype=f64)),
        convolutional(gain=0.9),
        convolutional(gain=0.99),
        monotone(),
    ]


def cases() -> list[Case]:
    return [*spectra(), *networks()]
