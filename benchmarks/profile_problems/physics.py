"""Physics, chemistry and engineering: self-consistent fields, differential equations, networks, orbits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .case import Case, Function, f64, jacobian, known, normal, problems, uniform


def laplacian(n: int) -> Tensor:
    """−u″ on n inner points of [0, 1], (n, n)."""
    off = torch.ones(n - 1, dtype=f64)
    return (n + 1) ** 2 * (2 * torch.eye(n, dtype=f64) - torch.diag(off, 1) - torch.diag(off, -1))


def laplacian_2d(n: int) -> Tensor:
    one, eye = laplacian(n), torch.eye(n, dtype=f64)
    return torch.kron(one, eye) + torch.kron(eye, one)


def bratu(lam: float, n: int = 15) -> Case:
    """−Δu = λ eᵘ on the square by Picard: u ← (−Δ)⁻¹ λ eᵘ; its fold lies at λ = 6.8."""
    solve = torch.linalg.inv(laplacian_2d(n))
    return Case(f"Bratu, λ={lam:g}", lambda u: lam * torch.exp(u) @ solve, torch.zeros(1, n * n, dtype=f64))


def jacobi(name: str, A: Tensor, nonlinear: Function, rate: float) -> Case:
    """u ← u − rate (A u + nonlinear(u))."""
    return Case(name, lambda u: u - rate * (u @ A.T + nonlinear(u)), torch.zeros(1, len(A), dtype=f64))


def burgers(n: int = 40, viscosity: float = 0.05) -> Case:
    """Steady viscous Burgers, u(0) = 1, u(1) = −1: u ← solution of the equation linearised at the last u."""
    h = 1 / (n + 1)
    off = torch.ones(n - 1, dtype=f64)
    D = (torch.diag(off, 1) - torch.diag(off, -1)) / (2 * h)
    A = viscosity * laplacian(n)
    edge, x = torch.zeros(n, dtype=f64), torch.arange(1, n + 1, dtype=f64) * h
    edge[0], edge[-1] = 1.0, -1.0
    ends = torch.zeros(n, dtype=f64)
    ends[0], ends[-1] = 1.0, 1.0

    def fn(u: Tensor) -> Tensor:
        matrix = A + u[..., None] * D
        right = viscosity * edge / h**2 + u * ends / (2 * h)  # of both boundary values in u u′
        return torch.linalg.solve(matrix, right[..., None])[..., 0]

    return Case(f"Burgers, lagged convection, ν={viscosity:g}", fn, (1 - 2 * x)[None] * 0.9 + 0.02)


def hubbard(repulsion: float, sites: int = 16) -> Case:
    """Mean field of the Hubbard ring: densities of two spins, at a temperature of .1, chemical potential `level`."""
    ring = torch.arange(sites)
    hopping = torch.zeros(sites, sites, dtype=f64)
    hopping[ring, (ring + 1) % sites] = -1
    level = repulsion / 2 - 0.4
    hopping = hopping + hopping.T + torch.diag(normal(sites, seed=46))

    def occupied(potential: Tensor) -> Tensor:
        energies, states = torch.linalg.eigh(hopping + torch.diag_embed(potential))
        return (states**2 @ torch.sigmoid((level - energies) / 0.1)[..., None])[..., 0]

    def fn(n: Tensor) -> Tensor:
        up, down = n.chunk(2, 1)
        return torch.cat([occupied(repulsion * down), occupied(repulsion * up)], 1)

    start = torch.full((1, 2 * sites), 6 / sites, dtype=f64)
    start[:, :sites] += 0.01 * normal(sites, seed=47)
    return Case(f"Hubbard mean field, U={repulsion:g}", fn, start)


def charge_sloshing(length: float, n: int = 60) -> Case:
    """Density of a periodic model metal, ρ ← ρ₀ + χ(v ρ)/(1 + .2 |v ρ|) with v = 4π/q²: the long waves of SCF."""
    q = 2 * math.pi * torch.fft.rfftfreq(n, length / n, dtype=f64)
    v = torch.where(q > 0, 4 * math.pi / q.clamp_min(1e-9) ** 2, 0.0)
    outer = torch.exp(-((torch.linspace(0, 1, n, dtype=f64) - 0.4) ** 2) / 0.02)[None]

    def fn(rho: Tensor) -> Tensor:
        potential = torch.fft.irfft(v * torch.fft.rfft(rho - outer), n)
        return outer - 0.05 * potential / (1 + 0.2 * potential.abs()) + 0.02 * torch.tanh(rho)

    return Case(f"charge sloshing, length {length:g}", fn, torch.full((1, n), float(outer.mean()), dtype=f64))


def mean_field(beta: float, n: int = 100) -> Case:
    """m = tanh β (J m + h), J symmetric Gaussian couplings: naive mean field of a spin glass."""
    J = problems.with_spectrum(torch.linspace(-1, 1, n, dtype=f64), 48)
    h = 0.1 * normal(1, n, seed=49)
    return Case(f"mean field of spins, β={beta:g}", lambda m: torch.tanh(beta * (m @ J + h)), torch.zeros(1, n).to(f64))


def hypernetted(density: float, n: int = 128) -> Case:
    """Hypernetted-chain equation of a fluid of Gaussian cores in indirect correlations γ(r) (Ng 1974).

    c = exp(−u + γ) − γ − 1; γ̂ = ρ ĉ² / (1 − ρ ĉ), transforms being sine transforms of r c(r).
    """
    dr = 10 / n
    r = dr * torch.arange(1, n, dtype=f64)
    dk = math.pi / (n * dr)
    k = dk * torch.arange(1, n, dtype=f64)
    sines = torch.sin(r[:, None] * k)
    u = 2 * torch.exp(-(r**2))

    def fn(gamma: Tensor) -> Tensor:
        c = torch.exp(-u + gamma) - gamma - 1
        c_hat = 4 * math.pi * dr * (r * c) @ sines / k
        gamma_hat = density * c_hat**2 / (1 - density * c_hat)
        return dk / (2 * math.pi**2) * (k * gamma_hat) @ sines.T / r

    return Case(f"hypernetted chain, density {density:g}", fn, torch.zeros(1, n - 1, dtype=f64))


def kepler(eccentricity: float) -> Case:
    """E = M + e sin E at 50 mean anomalies."""
    M = torch.linspace(0.05, math.pi - 0.05, 50, dtype=f64)[None]
    return Case(f"Kepler, e={eccentricity:g}", lambda E: M + eccentricity * torch.sin(E), M)


def power_flow(load: float, buses: int = 30) -> Case:
    """Gauss's iteration V ← Y⁻¹ (conj(S/V) − Y₀ V₀) of a ring network with chords; z holds real and imaginary parts."""
    lines = [(i, i + 1) for i in range(buses)] + [(i, (7 * i + 3) % (buses + 1)) for i in range(0, buses, 3)]
    Y = torch.zeros(buses + 1, buses + 1, dtype=torch.complex128)
    for i, j in lines:
        if i != j:
            y = 1 / torch.tensor(0.02 + 0.06j, dtype=torch.complex128)
            Y[i, i] += y
            Y[j, j] += y
            Y[i, j] -= y
            Y[j, i] -= y
    power = -load * torch.complex(uniform(buses, seed=50), 0.4 * uniform(buses, seed=51))
    inverse, slack = torch.linalg.inv(Y[1:, 1:]), Y[1:, 0]

    def fn(z: Tensor) -> Tensor:
        V = torch.complex(*z.chunk(2, 1))
        V = ((power / V).conj() - slack) @ inverse.T
        return torch.cat([V.real, V.imag], 1)

    start = torch.cat([torch.ones(1, buses, dtype=f64), torch.zeros(1, buses, dtype=f64)], 1)
    return Case(f"power flow, load {load:g}", fn, start)


def equilibrium_chemistry() -> Case:
    """A polyprotic acid in ln of five concentrations: four laws of mass action and a total, by the chord method."""
    K = torch.tensor([-2.1, -7.2, -12.7, -6.4], dtype=f64)

    def law(z: Tensor) -> Tensor:
        h, a, b, c, d = z.unbind(-1)
        total = torch.logsumexp(torch.stack([a, b, c], -1), -1)
        return torch.stack([h + b - a - K[0], h + c - b - K[1], h + d - K[2], total + 4.0, h - d - 0.3 * b - K[3]], -1)

    start = torch.full((1, 5), -5.0, dtype=f64)
    preconditioner = torch.linalg.inv(jacobian(law, start))
    return Case("acid–base equilibrium", lambda z: z - law(z) @ preconditioner.T, start)


def colebrook() -> Case:
    """1/√f of pipes at 30 Reynolds numbers: x = −2 log₁₀(k/3.7 + 2.51 x/Re)."""
    Re, k = torch.logspace(3.6, 7, 30, dtype=f64), torch.logspace(-6, -1.5, 30, dtype=f64)
    return Case("Colebrook", lambda x: -2 * torch.log10(k / 3.7 + 2.51 * x / Re), torch.full((1, 30), 4.0, dtype=f64))


def stiff_step(step: float) -> Case:
    """An implicit Euler step of van der Pol's oscillator, μ = 10, in 20 places coupled by diffusion."""
    n = 20
    A = laplacian(n) / (n + 1) ** 2
    x0, y0 = 2 + 0.1 * normal(n, seed=52), 0.1 * normal(n, seed=53)

    def fn(z: Tensor) -> Tensor:
        x, y = z.chunk(2, 1)
        return torch.cat([x0 + step * (y - x @ A), y0 + step * (10 * (1 - x * x) * y - x)], 1)

    return Case(f"implicit Euler, van der Pol, Δt={step:g}", fn, torch.cat([x0, y0])[None])


def eigenvector(gap: float) -> Case:
    """The dominant eigenvector by power iteration, normalised."""
    A = problems.with_spectrum(torch.cat([torch.linspace(0, 1 - gap, 49, dtype=f64), torch.ones(1, dtype=f64)]), 54)
    start = torch.rand(1, 50, dtype=f64, generator=problems.generator(55))

    def fn(v: Tensor) -> Tensor:
        w = v @ A
        return w / w.norm(dim=1, keepdim=True)

    return Case(f"power iteration, gap {gap:g}", fn, start, torch.ones(1))


def cases() -> list[Case]:
    n, m = 40, 12
    A, A2 = laplacian(n), laplacian_2d(m)
    inverse = torch.linalg.inv(A)
    charge = 40 * torch.sign(torch.linspace(-1, 1, n, dtype=f64))
    off = torch.diag(torch.ones(m - 1, dtype=f64), 1)
    wind = A2 + 15 * (m + 1) * torch.kron(torch.eye(m, dtype=f64), off - off.T)
    rate = 1 / float(A2[0, 0])
    return [
        bratu(1.0),
        bratu(6.0),
        jacobi("Bratu, Jacobi, λ=3", A2, lambda u: -3 * torch.exp(u), rate),
        jacobi("convection–diffusion, Jacobi", wind, lambda u: u**3 - 50.0, rate),
        Case("Poisson–Boltzmann, Picard", lambda u: (charge - 2 * torch.sinh(u)) @ inverse, torch.zeros(1, n).to(f64)),
        jacobi("Poisson–Boltzmann, Jacobi", A, lambda u: 20 * torch.sinh(u) - charge, 1 / float(A[0, 0] + 40)),
        burgers(),
        burgers(viscosity=0.02),
        known("nonlinear heat, Δt=0.0002", problems.nonlinear_heat(step=2e-4)),
        known("nonlinear heat, Δt=0.002", problems.nonlinear_heat(step=2e-3)),
        known("Chandrasekhar, c=0.99, n=100", problems.chandrasekhar(0.99)),
        known("Chandrasekhar, c=0.9999, n=100", problems.chandrasekhar(0.9999)),
        hubbard(1.0),
        hubbard(3.0),
        charge_sloshing(3.0),
        charge_sloshing(10.0),
        mean_field(0.8),
        mean_field(1.5),
        hypernetted(0.1),
        hypernetted(0.6),
        kepler(0.5),
        kepler(0.95),
        power_flow(0.08),
        power_flow(0.16),
        equilibrium_chemistry(),
        colebrook(),
        stiff_step(0.05),
        stiff_step(0.2),
        eigenvector(0.1),
        eigenvector(0.01),
    ]
