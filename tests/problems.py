"""Maps with known fixed points: each function returns a `Map`, with z* where there is a closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pydeqsolve.step.rules import Rule

f64 = torch.float64


@dataclass(frozen=True)
class Map:
    """z = fn(z, *inputs) from `start` (B, …); solution (B, …) is the fixed point, None where it has no closed form."""

    fn: Callable[..., Tensor]
    start: Tensor
    solution: Tensor | None = None
    inputs: tuple[Tensor, ...] = ()


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def orthogonal(n: int, seed: int = 0) -> Tensor:
    """A random orthogonal matrix (n, n), float64."""
    return torch.linalg.qr(torch.randn(n, n, dtype=f64, generator=generator(seed))).Q


def with_spectrum(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix (D, D) with these eigenvalues."""
    Q = orthogonal(len(eigenvalues), seed)
    return (Q * eigenvalues) @ Q.T


def affine(A: Tensor, b: Tensor, start: Tensor | None = None) -> Map:
    """z = A z + b; A (B, D, D) or (D, D), b (B, D). Rows are computed by bmm, each as if alone."""
    matrices = A.expand(b.shape[0], *A.shape[-2:])
    identity = torch.eye(b.shape[1], dtype=f64)
    solution = torch.linalg.solve(identity - matrices.double(), b.double())
    return Map(
        lambda z, A, b: (A @ z[..., None])[..., 0] + b,
        torch.zeros_like(b) if start is None else start,
        solution,
        (matrices.to(b.dtype).contiguous(), b),
    )


def spectrum_sweep(D: int = 32, seed: int = 0, dtype: torch.dtype = f64) -> Map:
    """One sample, symmetric A with spectrum [−.5, .97]."""
    A = with_spectrum(torch.linspace(-0.5, 0.97, D, dtype=f64), seed)
    return affine(A.to(dtype), torch.randn(1, D, dtype=f64, generator=generator(seed + 1)).to(dtype))


def mixed_batch(B: int = 64, D: int = 16) -> Map:
    """B samples that contract by .3 … .97, elementwise: z = ρ_i σ_d z + b."""
    rate = torch.linspace(0.3, 0.97, B, dtype=f64)[:, None] * torch.linspace(-1, 1, D, dtype=f64)
    b = torch.randn(B, D, dtype=f64, generator=generator(3))
    return Map(lambda z, rate, b: rate * z + b, torch.zeros_like(b), b / (1 - rate), (rate, b))


def kinsol_analytic() -> Map:
    """SUNDIALS kinAnalytic_fp; fixed point (½, 1, −π/6)."""

    def fn(z: Tensor) -> Tensor:
        x, y, w = z.unbind(-1)
        return torch.stack(
            [
                torch.cos((y - 1) * w) / 3 + 1 / 6,
                torch.sqrt(x * x + torch.sin(w) + 1.06) / 9 + 0.9,
                -torch.exp(-x * (y - 1)) / 20 - (10 * math.pi - 3) / 60,
            ],
            -1,
        )

    return Map(fn, torch.tensor([[0.1, 0.1, -0.1]], dtype=f64), torch.tensor([[0.5, 1.0, -math.pi / 6]], dtype=f64))


def roberts() -> Map:
    """SUNDIALS kinRoberts_fp: one implicit Euler step of Robertson's stiff kinetics."""

    def fn(y: Tensor) -> Tensor:
        a = 0.1 * (-0.04 * y[:, 0] + 1e4 * y[:, 1] * y[:, 2])
        c = 0.1 * 3e2 * y[:, 1] ** 2
        return torch.stack([1 + a, -a - c, c], -1)

    root = [9.9678538655358029e-01, 2.9530060962800345e-03, 2.6160735013975683e-04]
    return Map(fn, torch.tensor([[1.0, 0.0, 0.0]], dtype=f64), torch.tensor([root], dtype=f64))


def geometric() -> Map:
    rate = torch.tensor([0.9, 0.99, 0.999], dtype=f64)
    return Map(lambda z: rate * z, torch.tensor([[1.0, 0.4, -0.2]], dtype=f64), torch.zeros(1, 3, dtype=f64))


def rotation() -> Map:
    """Seven plane rotations about c = 1 … 14: no contraction anywhere."""
    angles = [math.pi / k for k in (2, 3, 4, 5, 6, 1.27, 1.73)]
    R = torch.block_diag(
        *[torch.tensor([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]], dtype=f64) for a in angles]
    )
    c = torch.arange(1, 15, dtype=f64)
    return Map(lambda z: (z - c) @ R.T + c, torch.zeros(1, 14, dtype=f64), c[None])


def ill_conditioned(scale: float = 1.0) -> Map:
    """Gradient steps on ½ zᵀQz, Q = diag(1e-10 … 1) in equal steps, n = 40 (cvxgrp/aa); the residual is −Qz."""
    Q = torch.linspace(1e-10, 1, 40, dtype=f64)
    start = scale * torch.randn(1, 40, dtype=f64, generator=generator(0))
    return Map(lambda z: z - Q * z, start, torch.zeros(1, 40, dtype=f64))


def rank_deficient() -> Map:
    """n = 50 with three slow modes and 47 that vanish in one step: differences span three dimensions."""
    rate = torch.zeros(50, dtype=f64)
    rate[:3] = torch.tensor([0.99, 0.98, 0.95])
    A = with_spectrum(rate, 5)
    b = torch.randn(1, 50, dtype=f64, generator=generator(6))
    return affine(A, b)


def tanh_layer(D: int = 256, radius: float = 0.95, B: int = 4, dtype: torch.dtype = f64) -> tuple[Map, Tensor]:
    """z = tanh(W z + x), W symmetric of spectral radius `radius`; x small, so that tanh helps little to contract."""
    W = with_spectrum(torch.linspace(-radius, radius, D, dtype=f64), 7).to(dtype)
    x = 0.01 * torch.randn(B, D, dtype=f64, generator=generator(8)).to(dtype)
    W.requires_grad_()
    return Map(lambda z, x: torch.tanh(z @ W.T + x), torch.zeros_like(x), None, (x,)), W


def chandrasekhar(c: float, n: int = 100) -> Map:
    """H_i = 1/(1 − c/(2n) Σ_j μ_i H_j/(μ_i + μ_j)), midpoint rule; the mean of H is (2/c)(1 − √(1−c)) exactly."""
    mu = (torch.arange(n, dtype=f64) + 0.5) / n
    kernel = c / (2 * n) * mu[:, None] / (mu[:, None] + mu)
    return Map(lambda H: 1 / (1 - H @ kernel.T), torch.ones(1, n, dtype=f64))


def discrete_integral(n: int = 50) -> Map:
    """Moré, Garbow & Hillstrom no. 29; solution is of the continuous problem, u = 2/(2−t) − t − 1, O(h²) away."""
    h = 1 / (n + 1)
    t = torch.arange(1, n + 1, dtype=f64) * h
    below = torch.ones(n, n, dtype=f64).tril()
    weight = h / 2 * torch.where(below.bool(), (1 - t)[:, None] * t, t[:, None] * (1 - t))
    return Map(lambda u: -((u + t + 1) ** 3) @ weight.T, (t * (t - 1))[None], (2 / (2 - t) - t - 1)[None])


def nonlinear_heat(n: int = 30, step: float = 2e-4) -> Map:
    """One implicit Euler step of u_t = (u² u_x)_x on [0, 1], u = 0 outside, from a hump: u = u₀ + Δt L(u)."""
    x = torch.linspace(0, 1, n + 2, dtype=f64)[1:-1]
    before = torch.exp(-50 * (x - 0.5) ** 2)[None]

    def fn(u: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(u, (1, 1))
        middle = (padded[:, 1:] + padded[:, :-1]) / 2
        flux = middle**2 * (padded[:, 1:] - padded[:, :-1]) * (n + 1)
        return before + step * (flux[:, 1:] - flux[:, :-1]) * (n + 1)

    return Map(fn, before)


def logit(B: int = 8, J: int = 10) -> Map:
    """Berry's inversion δ ← δ + ln s − ln ŝ(δ), ŝ the logit shares with an outside good; δ* = ln s_j − ln s_0."""
    utilities = torch.randn(B, J + 1, dtype=f64, generator=generator(9))
    shares = torch.softmax(utilities, 1)
    observed = shares[:, 1:]

    def fn(delta: Tensor, log_share: Tensor) -> Tensor:
        total = torch.nn.functional.pad(delta, (1, 0)).logsumexp(1, keepdim=True)
        return log_share + total

    solution = observed.log() - shares[:, :1].log()
    return Map(fn, torch.zeros(B, J, dtype=f64), solution, (observed.log(),))


def em_means() -> tuple[Map, Callable[[Tensor], Tensor]]:
    """EM for the means of two equal unit Gaussians on a fixed sample; also the log-likelihood it climbs."""
    g = generator(10)
    data = torch.cat([torch.randn(60, dtype=f64, generator=g) - 1.2, torch.randn(40, dtype=f64, generator=g) + 1.2])

    def log_density(means: Tensor) -> Tensor:
        return -0.5 * (data[:, None] - means[:, None]) ** 2

    def fn(means: Tensor) -> Tensor:
        weight = log_density(means).softmax(-1)
        return (weight * data[:, None]).sum(1) / weight.sum(1)

    def log_likelihood(means: Tensor) -> Tensor:
        return log_density(means).logsumexp(-1).sum(-1)

    return Map(fn, torch.tensor([[-0.5, 0.6]], dtype=f64)), log_likelihood


def poisson_mixture(B: int, seed: int = 0) -> Map:
    """EM for two Poisson components, z = (p, λ, μ), on the London Times deaths of 1910-12 (Hasselblad 1969), from B
    random starts. Outside 0 < p < 1, 0 < λ, μ it is NaN. solution is the estimate of greatest likelihood, to 4 digits;
    the components may swap, and λ = μ is a fixed point too."""
    deaths = torch.arange(10, dtype=f64)
    days = torch.tensor([162, 267, 271, 185, 111, 61, 27, 8, 3, 1], dtype=f64)
    start = torch.rand(B, 3, dtype=f64, generator=generator(seed)) * torch.tensor([0.9, 10, 10], dtype=f64) + 0.05

    def fn(z: Tensor) -> Tensor:
        p, a, b = z[:, :1], z[:, 1:2], z[:, 2:]
        odds = p.log() - a + deaths * a.log() - ((1 - p).log() - b + deaths * b.log())
        first = torch.sigmoid(odds) * days
        second = days - first
        means = [(w * deaths).sum(1, keepdim=True) / w.sum(1, keepdim=True) for w in (first, second)]
        return torch.cat([first.sum(1, keepdim=True) / days.sum(), *means], 1)

    return Map(fn, start, torch.tensor([[0.3599, 1.2561, 2.6634]], dtype=f64))


def scattering(destruction: float, n: int = 80) -> Map:
    """Λ-iteration S ← (1 − ε) Λ S + ε in a plane-parallel atmosphere, optical depths 1e-4 … 1e4, ε the destruction
    probability: the classic of Ng acceleration (Ng 1974). Affine, of spectral radius close to 1 − ε."""
    depth = torch.logspace(-4, 4, n, dtype=f64)
    escape = torch.zeros(n, n, dtype=f64)
    for mu, weight in ((0.0694, 0.1739), (0.3300, 0.3261), (0.6700, 0.3261), (0.9306, 0.1739)):  # Gauss, 4 points
        kept = torch.exp(-depth.diff() / mu)
        up, down = torch.zeros(n, n, dtype=f64), torch.zeros(n, n, dtype=f64)
        up[-1, -1] = 1
        for i in reversed(range(n - 1)):
            up[i] = up[i + 1] * kept[i]
            up[i, i : i + 2] += (1 - kept[i]) / 2
        for i in range(1, n):
            down[i] = down[i - 1] * kept[i - 1]
            down[i, i - 1 : i + 1] += (1 - kept[i - 1]) / 2
        escape += weight / 2 * (up + down)
    return Map(lambda S: (1 - destruction) * S @ escape.T + destruction, torch.ones(1, n, dtype=f64))


def triangular(T: int = 20, B: int = 2, D: int = 3, gain: float = 1.5, dtype: torch.dtype = f64) -> Map:
    """z_k = b_k + gain (z_{k−1} + sin z_{k−1})/2, z_0 = b_0: strictly causal over (B, T, D), far from normal for
    gain > 1; solved by forward substitution."""
    b = 0.3 * torch.randn(B, T, D, dtype=f64, generator=generator(11)).to(dtype)

    def update(z: Tensor) -> Tensor:
        return gain * (z + torch.sin(z)) / 2

    def fn(z: Tensor, b: Tensor, wanted: Tensor | None = None) -> Tensor:
        f = b + torch.nn.functional.pad(update(z[:, :-1]), (0, 0, 1, 0))
        # Blocks nobody asked for may hold anything: NaN shows whoever reads them.
        return f if wanted is None else torch.where(wanted[..., None], f, torch.nan)

    chain = [b[:, 0]]
    for k in range(1, T):
        chain.append(b[:, k] + update(chain[-1]))
    return Map(fn, torch.zeros_like(b), torch.stack(chain, 1), (b,))


def cosine(B: int = 5) -> Map:
    """z = cos z from several starts; the fixed point is Dottie's number."""
    start = torch.linspace(-1, 2, B, dtype=f64)[:, None]
    return Map(torch.cos, start, torch.full((B, 1), 0.7390851332151607, dtype=f64))


def exact_weight_gradient(z: Tensor, W: Tensor, x: Tensor, g: Tensor) -> Tensor:
    """dL/dW of z = tanh(W z + x) by dense solves: u = (I − SW)⁻ᵀ g, S = diag(1 − z²)."""
    total = torch.zeros_like(W)
    identity = torch.eye(len(W), dtype=f64)
    for z_i, g_i in zip(z.double(), g.double(), strict=True):
        s = 1 - z_i**2
        u = torch.linalg.solve((identity - s[:, None] * W.double()).T, g_i)
        total += torch.outer(s * u, z_i)
    return total


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def measured_in(norm: str) -> Rule:
    """The rule of measurements in `norm` that nobody judges."""
    return Rule(0.0, 0.0, norm, 1)
