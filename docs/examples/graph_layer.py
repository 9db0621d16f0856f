"""Trains an implicit graph layer on graphs of different sizes, each with its own convergence.

    python docs/examples/graph_layer.py --graphs 64 --steps 60

Task: of a random graph with one marked node, how far the mark spreads: the mean over nodes of .9^distance. A layer of
fixed depth sees as far as it is deep; the fixed point sees the whole graph. The batch is as in PyTorch Geometric: rows
are nodes, `edges` (2, E) number them through, `batch` (N,) says to which graph each belongs. Printed: the loss, and how
many network evaluations the graphs took, beside those of all graphs as one block-diagonal sample.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from pydeqsolve import DEQ, Stop, solve


class Cell(nn.Module):
    """z_i ← γ ⊙ mean_j z_j + U x_i, j the neighbours of i; γ (width,) in (0, 1), so that it contracts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.logit(torch.linspace(0.5, 0.99, width)))
        self.enter = nn.Linear(2, width)

    def forward(self, z: Tensor, x: Tensor, edges: Tensor) -> Tensor:
        degree = torch.zeros(len(z), 1).index_add(0, edges[1], torch.ones(edges.shape[1], 1)).clamp_min(1)
        neighbours = torch.zeros_like(z).index_add(0, edges[1], z[edges[0]]) / degree
        return self.decay.sigmoid() * neighbours + self.enter(x)


def random_graphs(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (N, 2), edges (2, E), batch (N,) and targets (count,) of paths with a few chords, of 4 to 40 nodes."""
    features, edges, batch, targets, first = [], [], [], [], 0
    for g in range(count):
        n = int(torch.randint(4, 41, (), generator=generator))
        path = torch.stack([torch.arange(n - 1), torch.arange(1, n)])
        chords = torch.randint(0, n, (2, n // 8), generator=generator)
        pairs = torch.cat([path, chords], 1)
        pairs = torch.cat([pairs, pairs.flip(0)], 1)
        mark = torch.randint(0, n, (), generator=generator)
        distance = torch.full((n,), torch.inf)
        distance[mark] = 0
        for _ in range(n):
            distance = distance.scatter_reduce(0, pairs[1], distance[pairs[0]] + 1, "amin")
        features.append(torch.stack([torch.ones(n), (torch.arange(n) == mark).float()], 1))
        edges.append(pairs + first)
        batch.append(torch.full((n,), g))
        targets.append((0.9**distance).mean())
        first += n
    return torch.cat(features), torch.cat(edges, 1), torch.cat(batch), torch.stack(targets)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--graphs", type=int, default=64)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    x, edges, batch, targets = random_graphs(options.graphs, generator)
    width = 16
    layer, head = DEQ(Cell(width), stop=Stop(1e-4)), nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1))
    adam = torch.optim.Adam([*layer.parameters(), *head.parameters()], lr=1e-2)
    for step in range(options.steps):
        z = layer(x, edges, z0=torch.zeros(len(x), width), segments=batch)
        mean = torch.zeros(options.graphs, width).index_add(0, batch, z) / batch.bincount()[:, None]
        loss = (head(mean)[:, 0] - targets).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        if step in (0, options.steps - 1):
            print(f"step {step}: loss {loss.item():.4f}, variance of the targets {targets.var().item():.4f}")
    solution = layer.solution
    assert solution is not None
    with torch.no_grad():
        z0 = torch.zeros(1, len(x), width)
        whole = solve(lambda z: layer.cell(z[0], x, edges)[None], z0, stop=Stop(1e-4))
    print(f"each graph by itself: {solution}")
    print(f"one block-diagonal sample: {whole}")
    worst = torch.zeros(options.graphs).index_add(
        0, batch, (layer.cell(whole.z[0], x, edges) - whole.z[0]).square().sum(1)
    )
    size = torch.zeros(options.graphs).index_add(0, batch, whole.z[0].square().sum(1))
    print(f"graphs that miss the tolerance there: {int((worst.sqrt() > 1e-4 * size.sqrt()).sum())} of {options.graphs}")


if __name__ == "__main__":
    main()
