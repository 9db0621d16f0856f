"""How often the error that is asked for is met, and how often it is said to be: `sample` against sequential sampling.

Run: OMP_WAIT_POLICY=PASSIVE python benchmarks/sampling_error.py --noises 20
One line per kind of network and error asked for, all chains and noises of it together: the true error as a part of the
one asked for, how often `converged` was said and how often that was false, `out.error` as a multiple of the true error
(where that is beyond rounding), rounds of a batch, and network evaluations per image and step.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from diffusion import Chain, Sample, Schedule, load_checkpoint, sample

ERRORS = (1e-2, 1e-3, 1e-4, 1e-5)
SPACINGS = ("linspace", "trailing", "quadratic")
SCHEDULE = Schedule.linear(1000, 1e-4, 0.02)
Problem = tuple[Callable[..., Tensor], Tensor, Chain, str]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def linear(noises: int) -> Iterator[Problem]:
    """ε = M x: multiples of x, and random matrices."""
    maps = [s * torch.eye(6, dtype=torch.float64) for s in (0.1, 0.5, 1.0, -0.3)]
    maps += [0.5 * torch.eye(6, dtype=torch.float64) + normal(6, 6, seed=seed) / 4 for seed in range(3)]
    for number, M in enumerate(maps):
        for T in (20, 100, 300, 1000):
            for spacing in SPACINGS:
                yield (lambda x, t, M=M: x @ M.T), normal(noises, 6, seed=number), SCHEDULE.chain(T, spacing), "epsilon"


def mixtures(noises: int) -> Iterator[Problem]:
    """The exact ε of mixtures of Gaussians."""
    alphas = SCHEDULE.alphas_cumprod
    for number, spread in enumerate((0.5, 0.2, 0.05)):
        means = 1.5 * normal(4, 6, seed=number)

        def epsilon(x: Tensor, t: Tensor, means: Tensor = means, spread: float = spread) -> Tensor:
            alpha = alphas[t][:, None]
            variance = alpha * spread**2 + 1 - alpha
            offset = x[:, None] - alpha[:, None].sqrt() * means
            weight = (-offset.square().sum(-1) / (2 * variance)).softmax(1)[..., None]
            return (1 - alpha).sqrt() * (weight * offset).sum(1) / variance

        for T in (20, 100, 300, 1000):
            for spacing in SPACINGS:
                yield epsilon, normal(noises, 6, seed=10 + number), SCHEDULE.chain(T, spacing), "epsilon"


def rough(noises: int) -> Iterator[Problem]:
    """Sharp in time: waves, kinks, bumps, and another value at every step."""
    noise = normal(1000, 6, seed=1)
    networks: list[Callable[..., Tensor]] = [
        lambda x, t: 0.5 * torch.sin(t.double())[:, None] * x,
        lambda x, t: 0.5 * x + 0.3 * torch.sin(7 * t.double())[:, None],
        lambda x, t: 0.4 * x * (1 + (t % 2 == 0).double())[:, None],
        lambda x, t: torch.where(t[:, None] > 500, 0.3 * x, 0.6 * x),
        lambda x, t: 0.5 * x * (1 + 0.5 * ((t // 37) % 2)[:, None]),
        lambda x, t: 0.5 * x + 2 * torch.exp(-(((t.double() - 333) / 3) ** 2))[:, None] * torch.sin(3 * x),
        lambda x, t: 0.5 * x + 0.3 * torch.tanh(2 * x) * (1 + 0.5 * noise[t]),
    ]
    for number, network in enumerate(networks):
        for T in (20, 100, 300, 1000):
            for spacing in SPACINGS:
                yield network, normal(noises, 6, seed=20 + number), SCHEDULE.chain(T, spacing), "epsilon"


def steep(noises: int) -> Iterator[Problem]:
    """Random perceptrons of large weights, by every rule, on chains of kept variance, of flows and of EDM."""
    vp, flow, edm = SCHEDULE, Schedule.flow(3.0), Schedule.edm(0.002, 80.0, 7.0)
    kinds = ((vp, "sample"), (vp, "v"), (flow, "flow"), (edm, "epsilon"))
    for (schedule, prediction), rule, T, weight in product(kinds, ("ddim", "dpmsolver++2m", "belm"), (20, 50), (2, 4)):
        chain = schedule.chain(T, rule=rule) if (schedule, rule) != (flow, "belm") else flow.chain(T + 1).tail(1)
        chain = replace(chain, rule=rule)
        for size, layers, seed in product((4, 12), (1, 2), (0, 1)):
            network = perceptron(size, layers, weight, seed)
            yield network, normal(noises, size, seed=seed + 50) * chain.init_noise_sigma, chain, prediction


def perceptron(size: int, layers: int, weight: float, seed: int) -> Callable[..., Tensor]:
    """tanh layers of 32 units whose weights are `weight` times as large as keeps the variance of what passes."""
    first, bias, wave, inner, last = (
        normal(*shape, seed=10 * seed + number) * scale
        for number, (shape, scale) in enumerate((
            ((32, size), weight / size**0.5), ((32,), 0.5), ((32,), 1 / 300), ((32, 32), weight / 32**0.5),
            ((size, 32), 1 / 32**0.5),
        ))
    )  # fmt: skip

    def network(x: Tensor, t: Tensor) -> Tensor:
        h = torch.tanh(x @ first.T + bias + wave * t.double()[:, None])
        return (torch.tanh(h @ inner.T) if layers == 2 else weight * h) @ last.T

    return network


def shipped(name: str, steps: tuple[int, ...]) -> Callable[[int], Iterator[Problem]]:
    """A shipped model."""

    def problems(noises: int) -> Iterator[Problem]:
        checkpoint = load_checkpoint(name)
        checkpoint.model.requires_grad_(False)
        for T in steps:
            yield (
                checkpoint.model,
                normal(noises, *checkpoint.shape, seed=T).float(),
                checkpoint.schedule.chain(T),
                "epsilon",
            )

    return problems


KINDS: dict[str, Callable[[int], Iterator[Problem]]] = {
    "linear": linear, "mixtures": mixtures, "sharp in time": rough, "steep": steep,
    "digits": shipped("digits", (50, 100, 300, 1000)), "Fashion-MNIST": shipped("fashion", (100,)),
}  # fmt: skip


def true_error(got: Sample, expected: Sample) -> Tensor:
    """(B,) relative errors of x_0."""
    found, right = (out.x_0.double().flatten(1) for out in (got, expected))
    return (found - right).norm(dim=1) / right.norm(dim=1)


def study(kind: str, noises: int, errors: tuple[float, ...]) -> None:
    """Print one line per error asked for."""
    seen: dict[float, list[tuple[Tensor, Tensor, Tensor, Tensor, int]]] = {error: [] for error in errors}
    for network, x, chain, prediction in KINDS[kind](noises):
        expected = sample(network, x, chain, "sequential", prediction=prediction)
        for error in errors:
            got = sample(network, x, chain, prediction=prediction, error=error)
            part = got.evaluations.double() / len(chain)
            seen[error].append((true_error(got, expected), got.error, got.converged, part, got.rounds))
    for error, parts in seen.items():
        true, estimate, said, rows = (torch.cat([p[i] for p in parts]) for i in range(4))
        ratio = (estimate / true)[true > 1e-12]
        rounds = torch.tensor([float(p[4]) for p in parts])
        share = true / error
        print(
            f"{kind:14} {error:7.0e} {share.median():7.2f} {share.quantile(0.99):6.2f} {share.max():6.2f} "
            f"{int(said.sum()):6} of {len(said):<6} {int((said & (true > error)).sum()):5} "
            f"{ratio.quantile(0.01):7.2f} {ratio.median():6.2f} {ratio.quantile(0.99):7.1f} "
            f"{rounds.median():7.0f} ≤ {rounds.max():<4.0f} {rows.mean():7.2f}", flush=True,
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noises", type=int, default=20, help="noises per chain (default 20)")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--errors", type=float, nargs="+", default=list(ERRORS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {platform.machine()}, {args.noises} noises per chain")
    print(f"{'network':14} {'asked':>7} {'true/asked: median, 99 %, most':>22} {'said':>12} {'false':>9} "
          f"{'said/true: 1 %, median, 99 %':>24} {'rounds':>9} {'evaluations/T':>15}")  # fmt: skip
    for kind in args.kinds:
        study(kind, args.noises, tuple(args.errors))


if __name__ == "__main__":
    with torch.no_grad():
        main()
