"""Ideas for fewer rows and rounds that were tried and not kept, each written out here: what they give beside Picard.

Run: OMP_WAIT_POLICY=PASSIVE python benchmarks/sampling_ideas.py --model digits --steps 100 --noises 32

secants: what the nodes have (`diffusion.methods.secants`) at all steps: a Jacobian of N from the last rounds, the
chain solved.
multistep: N at the nodes one after the other, each state from the last values of N by Adams and Bashforth's formula on
the chain's own sums; then a spline. mean wiggle: what a spline misses of N, averaged over other images, is added to it.
Errors are relative, of x_0 against sequential sampling: median and nine in ten.
"""

from __future__ import annotations

import numpy as np
import torch
from sampling_study import asked
from torch import Tensor

from diffusion.methods.grid import interpolation, placed
from diffusion.problem import ChainProblem, in_steps

MEMORY = 3


def said(found: Tensor, right: Tensor) -> str:
    error = (found - right).norm(dim=1) / right.norm(dim=1)
    return f"{error.median():.1e} ≤ {error.quantile(0.9):.1e}"


def evaluate(run: ChainProblem, x: Tensor, k: Tensor) -> Tensor:
    """N (B, n, D) at states x (B, n, D) of the steps k (n,)."""
    return run.map.remainder(x.flatten(0, 1), k.repeat(len(x))).view_as(x)


def try_secants(run: ChainProblem, right: Tensor, rounds: int = 10) -> None:
    """Rounds of all steps: x_{k+1} = A_k x_k + c_k (N_k + J_k (x_k − x_k^old)) against Picard's J = 0."""
    T, linear, base = len(run.map.chain), run.map.linear, run.base()
    k = torch.arange(T)
    for memory in (0, MEMORY):
        x, states, values, line = base.clone(), [], [], []
        for _ in range(rounds):
            states, values = [*states, x[:, :T]][-memory - 1 :], [*values, evaluate(run, x[:, :T], k)][-memory - 1 :]
            N, old = values[-1], states[-1]
            if len(states) < 2:
                x = linear.trajectory(base, N)
            else:
                X, Y = (torch.stack([s[-1] - e for e in s[:-1]], -1) for s in (states, values))  # (B, T, D, m)
                pinv = torch.linalg.pinv(X, rtol=1e-3)
                at = [base[:, 0]]
                for j in range(T):
                    change = Y[:, j] @ (pinv[:, j] @ (at[-1] - old[:, j])[..., None])
                    drift = base[:, j + 1] - linear.A[j] * base[:, j]  # what is added besides N
                    at.append(linear.A[j] * at[-1] + drift + linear.c[j] * (N[:, j] + change[..., 0]))
                x = torch.stack(at, 1)
            line.append(said(x[:, -1], right[:, -1]))
        print(f"{'secants, m = ' + str(memory) if memory else 'Picard':16} " + ", ".join(line[3:]), flush=True)


def multistep(run: ChainProblem, at: Tensor, order: int) -> Tensor:
    """N (B, n, D) at the nodes, in n calls of one row per image."""
    T, linear, base = len(run.map.chain), run.map.linear, run.base()
    ends, found, total = [*at.tolist(), T], [], torch.zeros_like(base[:, 0])
    for j, k in enumerate(ends[:-1]):
        x = base[:, k] + linear.products[k] * total
        found.append(evaluate(run, x[:, None], torch.tensor([k]))[:, 0])
        used = ends[max(0, j - order + 1) : j + 1]
        grid = np.arange(k, ends[j + 1])
        for node, N in zip(used, found[-len(used) :], strict=True):
            others = [o for o in used if o != node]
            lagrange = np.prod([(grid - o) / (node - o) for o in others], axis=0) * np.ones(len(grid))
            total = total + linear.w[k : ends[j + 1]].T @ torch.from_numpy(lagrange) * N
    return torch.stack(found, 1)


def try_nodes(run: ChainProblem, right: Tensor) -> None:
    """The multistep predictor, and splines with the mean of what they miss, by number of nodes."""
    T, linear, base, half = len(run.map.chain), run.map.linear, run.base(), len(right) // 2
    N = evaluate(run, right[:, :T], torch.arange(T))
    for n in (15, 22, 30, 45):
        at = placed(T, n, 1.7)
        spread = interpolation(at, T)
        orders = [
            f"{order}: {said(linear.trajectory(base, spread @ multistep(run, at, order))[:, -1], right[:, -1])}"
            for order in (2, 3, 4)
        ]
        print(f"multistep, {len(at):2} nodes, by order " + ", ".join(orders), flush=True)
        missed = (N - spread @ N[:, at])[:half].mean(0)
        for name, more in (("spline of the right N", 0.0), ("with mean wiggle", missed)):
            x_0 = linear.trajectory(base, spread @ N[:, at] + more)[half:, -1]
            print(f"{name}, {len(at):2} nodes: {said(x_0, right[half:, -1])}", flush=True)


def main() -> None:
    args, checkpoint, x = asked(__doc__, noises=32)
    for steps in args.steps:
        chain = checkpoint.schedule.chain(steps)
        run = ChainProblem.of(
            checkpoint.model, x, chain, prediction=checkpoint.prediction, splitting=checkpoint.splitting(chain)
        )
        right = in_steps(run)
        print(f"{args.model}, T = {steps}, {args.noises} noises; torch {torch.__version__}")
        try_secants(run, right)
        try_nodes(run, right)


if __name__ == "__main__":
    with torch.no_grad():
        main()
