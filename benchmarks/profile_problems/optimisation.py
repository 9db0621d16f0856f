"""First-order methods of convex optimisation, and multiplicative updates: one iteration is the map."""

from __future__ import annotations

import torch
from torch import Tensor

from .case import Case, f64, normal, problems, uniform


def shrunk(z: Tensor, by: float) -> Tensor:
    return z.sign() * (z.abs() - by).clamp_min(0)


def regression(rows: int, columns: int, condition: float, seed: int) -> tuple[Tensor, Tensor]:
    """A (rows, columns) with singular values from 1 down to 1/condition in even ratios, and b of a sparse z."""
    k = min(rows, columns)
    values = torch.logspace(0, -float(torch.log10(torch.tensor(condition))), k, dtype=f64)
    A = problems.orthogonal(rows, seed)[:, :k] * values @ problems.orthogonal(columns, seed + 1)[:k]
    truth = normal(columns, seed=seed + 2) * (uniform(columns, seed=seed + 3) < 0.2)
    return A, A @ truth + 0.01 * normal(rows, seed=seed + 4)


def lasso(name: str, rows: int, columns: int, condition: float, penalty: float, ridge: float = 0.0) -> Case:
    """ISTA: z ← shrink(z − Aᵀ(A z − b) − ridge z, λ), ‖A‖ = 1."""
    A, b = regression(rows, columns, condition, 60)
    rate = 1 / (1 + ridge)

    def fn(z: Tensor) -> Tensor:
        return shrunk(z - rate * ((z @ A.T - b) @ A + ridge * z), rate * penalty)

    return Case(name, fn, torch.zeros(1, columns, dtype=f64))


def nonnegative(condition: float) -> Case:
    A, b = regression(80, 60, condition, 65)
    return Case(
        f"non-negative least squares, condition {condition:g}",
        lambda z: (z - (z @ A.T - b) @ A).clamp_min(0), torch.zeros(1, 60, dtype=f64),
    )  # fmt: skip


def logistic(penalty: float) -> Case:
    """Gradient descent of ℓ₂-regularised logistic regression at the rate 1/L."""
    X = normal(200, 30, seed=70) * torch.logspace(0, -1, 30, dtype=f64)
    y = torch.sign(X @ normal(30, seed=71) + 0.5 * normal(200, seed=72))
    rate = 1 / (float(torch.linalg.matrix_norm(X, 2)) ** 2 / 800 + penalty)

    def fn(w: Tensor) -> Tensor:
        slope = -y * torch.sigmoid(-y * (w @ X.T))
        return w - rate * (slope @ X / 200 + penalty * w)

    return Case(f"logistic regression, penalty {penalty:g}", fn, torch.zeros(1, 30, dtype=f64))


def admm_lasso(rho: float) -> Case:
    """ADMM in the state (z, u)."""
    A, b = regression(40, 80, 30, 75)
    inverse = torch.linalg.inv(A.T @ A + rho * torch.eye(80, dtype=f64))

    def fn(state: Tensor) -> Tensor:
        z, u = state.chunk(2, 1)
        x = (A.T @ b + rho * (z - u)) @ inverse
        z = shrunk(x + u, 0.01 / rho)
        return torch.cat([z, u + x - z], 1)

    return Case(f"ADMM, LASSO, ρ={rho:g}", fn, torch.zeros(1, 160, dtype=f64))


def douglas_rachford() -> Case:
    """A point of an affine set with no negative entry: z ← z + P(2 Q(z) − z) − Q(z)."""
    A = normal(20, 50, seed=80)
    b = A @ uniform(50, seed=81)
    pseudo = torch.linalg.pinv(A)

    def fn(z: Tensor) -> Tensor:
        x = z.clamp_min(0)
        y = 2 * x - z
        return z + y - (y @ A.T - b) @ pseudo.T - x

    return Case("Douglas–Rachford, feasibility", fn, -torch.ones(1, 50, dtype=f64))


def alternating() -> Case:
    """Projections onto two subspaces that meet in a point at small angles."""
    P, Q = (problems.orthogonal(60, seed)[:, :25] for seed in (82, 83))
    Q = torch.linalg.qr(P + 0.3 * Q).Q
    shift = normal(1, 60, seed=84)

    def fn(z: Tensor) -> Tensor:
        y = (z @ P) @ P.T
        return shift + ((y - shift) @ Q) @ Q.T

    return Case("alternating projections", fn, torch.zeros(1, 60, dtype=f64))


def primal_dual(n: int = 60) -> Case:
    """Total-variation denoising in one dimension by Chambolle & Pock (2011), state (x, y)."""
    data = torch.sign(torch.sin(torch.linspace(0, 9, n, dtype=f64))) + 0.3 * normal(n, seed=85)

    def fn(state: Tensor) -> Tensor:
        x, y = state[:, :n], state[:, n:]
        divergence = torch.nn.functional.pad(y, (1, 0)) - torch.nn.functional.pad(y, (0, 1))
        new = (x - 0.45 * divergence + 0.45 * data) / 1.45
        return torch.cat([new, (y + 0.45 * (2 * new - x).diff()).clamp(-0.5, 0.5)], 1)

    return Case("primal–dual, total variation", fn, torch.zeros(1, 2 * n - 1, dtype=f64))


def soft_impute() -> Case:
    """Completion of a matrix of rank 3 by shrinking singular values (Mazumder, Hastie & Tibshirani 2010)."""
    full = normal(20, 3, seed=86) @ normal(3, 15, seed=87)
    seen = (uniform(20, 15, seed=88) < 0.6).to(f64)

    def fn(z: Tensor) -> Tensor:
        U, s, V = torch.linalg.svd(seen * full + (1 - seen) * z.reshape(-1, 20, 15), full_matrices=False)
        return (U * (s - 0.5).clamp_min(0)[:, None] @ V).flatten(1)

    return Case("soft-impute", fn, torch.zeros(1, 300, dtype=f64))


def weiszfeld() -> Case:
    """Geometric median of points in the plane."""
    points = normal(40, 2, seed=89) * torch.tensor([1.0, 5.0], dtype=f64)

    def fn(z: Tensor) -> Tensor:
        weight = 1 / (points - z[:, None]).norm(dim=2, keepdim=True)
        return (weight * points).sum(1) / weight.sum(1)

    return Case("Weiszfeld", fn, torch.tensor([[4.0, 9.0]], dtype=f64))


def huber() -> Case:
    """Robust regression by iteratively reweighted least squares."""
    X = normal(100, 8, seed=90)
    y = X @ normal(8, seed=91) + normal(100, seed=92) / uniform(100, seed=93)

    def fn(w: Tensor) -> Tensor:
        weight = 0.5 / (y - w @ X.T).abs().clamp_min(0.5)
        weighted = weight[..., None] * X
        return torch.linalg.solve(X.T @ weighted, (weighted.transpose(1, 2) @ y[:, None]))[..., 0]

    return Case("Huber regression, reweighted", fn, torch.zeros(1, 8, dtype=f64))


def factorisation() -> Case:
    """Non-negative matrix factorisation by multiplicative updates (Lee & Seung 2001), rank 3."""
    V = uniform(20, 3, seed=94) @ uniform(3, 15, seed=95) + 0.1 * uniform(20, 15, seed=96)

    def fn(z: Tensor) -> Tensor:
        W, H = z[:, :60].reshape(-1, 20, 3), z[:, 60:].reshape(-1, 3, 15)
        H = H * (W.transpose(1, 2) @ V) / (W.transpose(1, 2) @ W @ H)
        W = W * (V @ H.transpose(1, 2)) / (W @ H @ H.transpose(1, 2))
        return torch.cat([W.flatten(1), H.flatten(1)], 1)

    return Case("non-negative factorisation", fn, 0.1 + uniform(1, 105, seed=97))


def robust_scatter() -> Case:
    """Tyler's scatter matrix, trace normalised."""
    X = normal(60, 5, seed=98) @ torch.diag(torch.tensor([1, 2, 3, 1, 0.5], dtype=f64))

    def fn(z: Tensor) -> Tensor:
        inverse = torch.linalg.inv(z.reshape(-1, 5, 5))
        weight = 1 / ((X @ inverse) * X).sum(-1)
        S = X.T @ (weight[..., None] * X)
        return (5 * S / S.diagonal(dim1=1, dim2=2).sum(-1)[:, None, None]).flatten(1)

    return Case("Tyler's scatter", fn, torch.eye(5, dtype=f64).reshape(1, 25))


def cases() -> list[Case]:
    return [
        lasso("LASSO, 40 × 100, λ=.01", 40, 100, 10, 0.01),
        lasso("LASSO, 40 × 100, λ=.001", 40, 100, 10, 0.001),
        lasso("LASSO, 100 × 60, λ=.01", 100, 60, 30, 0.01),
        lasso("elastic net, 40 × 100", 40, 100, 10, 0.005, ridge=0.01),
        nonnegative(10),
        nonnegative(100),
        logistic(0.01),
        logistic(1e-4),
        admm_lasso(0.1),
        admm_lasso(1.0),
        douglas_rachford(),
        alternating(),
        primal_dual(),
        soft_impute(),
        weiszfeld(),
        huber(),
        factorisation(),
        robust_scatter(),
    ]
