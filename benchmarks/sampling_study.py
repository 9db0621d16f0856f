"""What was tried to cut rounds and rows of sampling, each change alone: memory, window, nodes, splines alone.

Run: OMP_WAIT_POLICY=PASSIVE python benchmarks/sampling_study.py --model digits --steps 100 --noises 16

Noises are sampled in one batch, each with its own convergence: rounds are the largest of an image, rows their mean.
`splines alone` takes N of the sequential trajectory at n of the T steps only, a cubic spline between, and says how
far x_0 is from sequential sampling: the best that evaluating fewer than T steps could do.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from diffusion import Chain, Checkpoint, CoarseToFine, Parallel, load_checkpoint, sample
from diffusion.methods import coarse, defects, grid, parallel, secants
from diffusion.trajectory import LinearChain
from pydeqsolve import Anderson, Picard


def errors(found: Tensor, expected: Tensor) -> str:
    """Median and largest relative error of images (B, …)."""
    error = (found - expected).double().flatten(1).norm(dim=1) / expected.double().flatten(1).norm(dim=1)
    return f"error {error.median():.1e} ≤ {error.max():.1e}"


def try_ways(checkpoint: Checkpoint, chain: Chain, x: Tensor, expected: Tensor) -> None:
    """Solvers and windows, by options of `Parallel`."""
    T = len(chain)
    ways: dict[str, dict[str, Any]] = {
        "Picard": {"solver": Picard()},
        **{f"Anderson, causal, m = {m}": {"solver": Anderson(m, coupling="causal")} for m in (1, 2, 3, 5)},
        "Anderson, independent, m = 2": {"solver": Anderson(2, coupling="independent")},
        "Anderson, joint, m = 2": {"solver": Anderson(2)},
        **{f"window T/{part}": {"window": T // part} for part in (2, 4, 10)},
    }
    for name, options in ways.items():
        out = sample(checkpoint.model, x, chain, Parallel(**options), splitting=checkpoint.splitting(chain))
        report(name, out, expected, T)


def try_nodes(checkpoint: Checkpoint, chain: Chain, x: Tensor, expected: Tensor) -> None:
    """The numbers behind `CoarseToFine` and the start on the nodes, varied one at a time.

    TELLING = inf leaves Picard on the nodes: no move tells the Jacobians anything.
    """
    variants: list[dict[str, float]] = [
        {}, {"TELLING": float("inf")}, {"MEMORY": 1}, {"MEMORY": 2}, {"MEMORY": 4}, {"STEPS_PER_NODE": 7},
        {"DENSITY": 2.0}, {"FIRST": 5.0}, {"FIRST": 20.0}, {"CORRECTION": 0.1}, {"CORRECTION": 0.5},
        {"TRIALS": 1}, {"TRIALS": 2}, {"SAMPLED": 1.0}, {"SAFETY": 1.0},
    ]  # fmt: skip
    for variant in variants:
        try_numbers(checkpoint, chain, x, expected, CoarseToFine(), variant)
    for variant in [{}, {"START": 0}, {"START": 1}, {"START": 3}, {"START": 4}, {"RTOL": 0.05}, {"RTOL": 0.2}]:
        try_numbers(checkpoint, chain, x, expected, Parallel(), variant)


def try_numbers(
    checkpoint: Checkpoint, chain: Chain, x: Tensor, expected: Tensor, method: Any, variant: dict[str, float]
) -> None:
    """One way of sampling with some of its numbers changed."""
    homes = {name: next(m for m in (grid, parallel, coarse, defects, secants) if name in vars(m)) for name in variant}
    usual = {name: getattr(home, name) for name, home in homes.items()}
    for name, value in variant.items():
        setattr(homes[name], name, value)
    out = sample(checkpoint.model, x, chain, method, splitting=checkpoint.splitting(chain))
    report(f"{type(method).__name__} {variant or ''}", out, expected, len(chain))
    for name, value in usual.items():
        setattr(homes[name], name, value)


def report(name: str, out: Any, expected: Tensor, T: int) -> None:
    rows = out.evaluations.double().mean() / T
    print(f"{name:48} rounds {out.rounds:4} rows/T {rows:5.2f} {errors(out.x_0, expected)}", flush=True)


def try_splines(checkpoint: Checkpoint, chain: Chain, trajectory: Tensor) -> None:
    """x_0 from N at n nodes of the right trajectory."""
    X, T = trajectory.double().flatten(2), len(chain)
    kappa = chain.noise[:-1, None]
    N = torch.stack(
        [checkpoint.model(trajectory[:, k], chain.timesteps[k].expand(len(X))).flatten(1).double() for k in range(T)], 1
    )
    N = N - kappa * X[:, :T]
    linear = LinearChain(chain.a[:, None] + chain.c[:, None] * kappa, chain.c[:, None])
    base = linear.base(X[:, 0], None)
    right = linear.trajectory(base, N)[:, -1]
    for n in (20, 40, 80, 160, 320, 640):
        if n < T:
            at = grid.placed(T, n, 2.0)
            found = linear.trajectory(base, grid.interpolation(at, T) @ N[:, at])[:, -1]
            print(f"splines alone, {len(at):4} nodes {'':24} rows/T {len(at) / T:5.2f} {errors(found, right)}")


def asked(description: str | None, noises: int) -> tuple[argparse.Namespace, Checkpoint, Tensor]:
    """The arguments of a study with so many noises by default, the model they name, and its latents; on one thread."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits", help="digits, fashion or a folder")
    parser.add_argument("--steps", type=int, nargs="+", default=[100])
    parser.add_argument("--noises", type=int, default=noises)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint = load_checkpoint(args.model)
    generator = torch.Generator().manual_seed(args.seed)
    return args, checkpoint, torch.randn(args.noises, *checkpoint.shape, generator=generator)


def main() -> None:
    args, checkpoint, x = asked(__doc__, noises=16)
    for steps in args.steps:
        chain = checkpoint.schedule.chain(steps)
        reference = sample(checkpoint.model, x, chain, method="sequential")
        print(f"{args.model}, T = {steps}, {args.noises} noises")
        try_ways(checkpoint, chain, x, reference.x_0)
        try_nodes(checkpoint, chain, x, reference.x_0)
        try_splines(checkpoint, chain, reference.trajectory)


if __name__ == "__main__":
    with torch.no_grad():
        main()
