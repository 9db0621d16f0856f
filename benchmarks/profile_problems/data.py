"""Statistics, transport and planning: EM, Sinkhorn, Markov chains, value iteration."""

from __future__ import annotations

import torch
from torch import Tensor

from .case import Case, f64, known, normal, problems, uniform


def two_groups(gap: float, n: int = 300) -> Tensor:
    """Points on the line, (n,): 60 % about 0, 40 % about `gap`, unit deviation."""
    return normal(n, seed=30) + gap * (torch.arange(n) >= 0.6 * n).to(f64)


def gaussian_means(gap: float) -> Case:
    data = two_groups(gap)

    def fn(z: Tensor) -> Tensor:
        weight = (-0.5 * (data[None, :, None] - z[:, None]) ** 2).softmax(-1)
        return (weight * data[:, None]).sum(1) / weight.sum(1)

    return Case(f"EM, two means {gap:g} apart", fn, torch.tensor([[-0.5, gap + 0.5]], dtype=f64))


def gaussian_mixture(gap: float) -> Case:
    """EM for weight, two means and two variances."""
    data = two_groups(gap)

    def fn(z: Tensor) -> Tensor:
        p, means, variances = z[:, None, :1], z[:, None, 1:3], z[:, None, 3:]
        log = -0.5 * (data[None, :, None] - means) ** 2 / variances - 0.5 * variances.log()
        weight = (log + torch.cat([p.log(), (1 - p).log()], -1)).softmax(-1)
        total = weight.sum(1)
        means = (weight * data[:, None]).sum(1) / total
        spread = (weight * (data[None, :, None] - means[:, None]) ** 2).sum(1) / total
        return torch.cat([total[:, :1] / len(data), means, spread], 1)

    start = torch.tensor([[0.5, -0.3, gap + 0.3, 1.0, 1.0]], dtype=f64)
    return Case(f"EM, Gaussian mixture {gap:g} apart", fn, start)


def student(dof: float) -> Case:
    """EM for centre and scatter of Student's t in the plane, z = (m, Σ by rows)."""
    data = normal(120, 2, seed=31) / uniform(120, 1, seed=32).sqrt() @ torch.tensor([[1.0, 0.5], [0, 2]], dtype=f64)

    def fn(z: Tensor) -> Tensor:
        offset = data - z[:, None, :2]
        distance = (offset @ torch.linalg.inv(z[:, 2:].reshape(-1, 2, 2)) * offset).sum(-1)
        weight = ((dof + 2) / (dof + distance))[..., None]
        centre = (weight * data).sum(1) / weight.sum(1)
        offset = data - centre[:, None]
        return torch.cat([centre, ((weight * offset).transpose(1, 2) @ offset / len(data)).flatten(1)], 1)

    return Case(f"EM, Student's t, {dof:g} degrees", fn, torch.tensor([[1.0, 1, 1, 0, 0, 1]], dtype=f64))


def factor_analysis(features: int = 8, factors: int = 2) -> Case:
    """EM for loadings and noise variances (Rubin & Thayer 1982)."""
    loadings = normal(features, factors, seed=33)
    data = normal(200, factors, seed=34) @ loadings.T + normal(200, features, seed=35)
    C = data.T @ data / len(data)

    def fn(z: Tensor) -> Tensor:
        L, psi = z[:, :-features].reshape(-1, features, factors), z[:, -features:]
        beta = torch.linalg.solve(L @ L.transpose(1, 2) + torch.diag_embed(psi), L).transpose(1, 2)
        second = torch.eye(factors, dtype=f64) - beta @ L + beta @ C @ beta.transpose(1, 2)
        L = torch.linalg.solve(second, beta @ C).transpose(1, 2)
        return torch.cat([L.flatten(1), (C.diagonal() - (L * (beta @ C).transpose(1, 2)).sum(-1))], 1)

    start = torch.cat([normal(features * factors, seed=36), torch.ones(features, dtype=f64)])
    return Case("EM, factor analysis", fn, start[None])


def dirichlet() -> Case:
    """Maximum likelihood of a Dirichlet distribution in ln α, by the fixed point of Minka (2000, Eq. 10, simple form).

    α_k ← α_k (Ψ(α_k) − Ψ(Σα)) / mean ln p_k, of which mean ln p_k is known.
    """
    truth = torch.tensor([2.0, 0.8, 4.0, 1.5], dtype=f64)
    logs = torch.digamma(truth) - torch.digamma(truth.sum())

    def fn(z: Tensor) -> Tensor:
        alpha = z.exp()
        return z + ((torch.digamma(alpha) - torch.digamma(alpha.sum(1, keepdim=True))) / logs).log()

    return Case("Dirichlet likelihood", fn, torch.zeros(1, 4, dtype=f64), truth.log())


def logit_demand(nested: float = 0.0) -> Case:
    """Berry's inversion δ ← δ + ln s − ln ŝ(δ) with consumers of five kinds (Berry, Levinsohn & Pakes 1995)."""
    J = 20
    tastes = 2 * normal(5, J, seed=37) + nested

    def shares(z: Tensor) -> Tensor:
        utility = torch.nn.functional.pad(z[:, None] + tastes, (1, 0))
        return utility.softmax(-1).mean(1)[:, 1:]

    truth = normal(1, J, seed=38)
    observed = shares(truth).log()
    return Case(
        f"demand inversion, outside share e^−{nested:g}", lambda z: z + observed - shares(z).log(),
        torch.zeros(1, J, dtype=f64), truth,
    )  # fmt: skip


def pagerank(damping: float, n: int = 200) -> Case:
    links = (uniform(n, n, seed=39) < 4 / n).to(f64) + torch.diag(torch.ones(n - 1, dtype=f64), 1)
    links[-1, 0] = 1
    P = links / links.sum(1, keepdim=True)
    return Case(
        f"PageRank, damping {damping:g}", lambda z: damping * z @ P + (1 - damping) / n,
        torch.full((1, n), 1 / n, dtype=f64),
    )  # fmt: skip


def sinkhorn(epsilon: float, n: int = 40) -> Case:
    """Dual potentials of entropic transport between two clouds, one sweep of both in the log domain."""
    x, y = uniform(n, 2, seed=40), uniform(n, 2, seed=41) ** 2
    cost = torch.cdist(x, y).square() / epsilon
    log_a, log_b = (uniform(n, seed=seed).softmax(0).log() for seed in (42, 43))

    def fn(f: Tensor) -> Tensor:
        g = log_b - (f[:, :, None] - cost).logsumexp(1)
        f = log_a - (g[:, None] - cost).logsumexp(2)
        return f - f.mean(1, keepdim=True)

    return Case(f"Sinkhorn, ε={epsilon:g}", fn, torch.zeros(1, n, dtype=f64))


def balancing(n: int = 30) -> Case:
    """Logarithms of row factors that bring a positive matrix of widely varying entries to equal row and column sums."""
    log_K = 3 * normal(n, n, seed=44)

    def fn(z: Tensor) -> Tensor:
        columns = (log_K + z[:, :, None]).logsumexp(1)
        z = -(log_K - columns[:, None]).logsumexp(2)
        return z - z.mean(1, keepdim=True)

    return Case("matrix balancing", fn, torch.zeros(1, n, dtype=f64))


def chain(states: int, actions: int) -> tuple[Tensor, Tensor]:
    """Transitions (A, S, S) of a slippery walk on a ring of states, and rewards (A, S)."""
    S = torch.arange(states)
    P = torch.zeros(actions, states, states, dtype=f64)
    for a in range(actions):
        for move, chance in ((a - 1, 0.8), (0, 0.1), (2 * a - 1, 0.1)):
            P[a, S, (S + move) % states] += chance
    return P, uniform(actions, states, seed=45)


def values(kind: str, discount: float, states: int = 100) -> Case:
    P, reward = chain(states, 3)

    def fn(V: Tensor) -> Tensor:
        Q = reward + discount * torch.einsum("ast,nt->nas", P, V)
        if kind == "policy evaluation":
            return Q.mean(1)
        return Q.amax(1) if kind == "value iteration" else 0.1 * torch.logsumexp(Q / 0.1, 1)

    return Case(f"{kind}, discount {discount:g}", fn, torch.zeros(1, states, dtype=f64))


def cases() -> list[Case]:
    return [
        known("EM, Poisson mixture, near start", problems.poisson_mixture(1), [0.3, 1.0, 2.5]),
        known("EM, Poisson mixture, far start", problems.poisson_mixture(1), [0.2, 2.0, 6.0]),
        gaussian_means(3.0),
        gaussian_means(1.5),
        gaussian_mixture(3.0),
        gaussian_mixture(2.0),
        student(1.0),
        student(5.0),
        factor_analysis(),
        dirichlet(),
        logit_demand(0.0),
        logit_demand(4.0),
        pagerank(0.85),
        pagerank(0.99),
        sinkhorn(0.1),
        sinkhorn(0.02),
        sinkhorn(0.005),
        balancing(),
        *[values(kind, discount) for kind in ("policy evaluation", "value iteration", "soft value iteration")
          for discount in (0.95, 0.99)],
    ]  # fmt: skip
