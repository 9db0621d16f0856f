# %% [markdown]
# # Graphs of different sizes
#
# An implicit graph layer sees the whole graph, a layer of fixed depth as far as it is deep. The task: of a random
# graph with one marked node, how far the mark spreads, the mean over nodes of .9^distance.
#
# The batch is as in PyTorch Geometric: rows are nodes, `edges` (2, E) number them through, `batch` (N,) says to which
# graph each belongs. Each graph converges by itself.

# %%
import matplotlib.pyplot as plt
import torch
from torch import nn

from pydeqsolve import DEQ, Stop, solve

GRAPHS = 64
STEPS = 60
WIDTH = 16


def random_graphs(count, generator):
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


# %% [markdown]
# The cell: z_i ← γ ⊙ mean_j z_j + U x_i over the neighbours j of i. γ lies in (0, 1), so it contracts.


# %%
class Cell(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.decay = nn.Parameter(torch.logit(torch.linspace(0.5, 0.99, width)))
        self.enter = nn.Linear(2, width)

    def forward(self, z, x, edges):
        degree = torch.zeros(len(z), 1).index_add(0, edges[1], torch.ones(edges.shape[1], 1)).clamp_min(1)
        neighbours = torch.zeros_like(z).index_add(0, edges[1], z[edges[0]]) / degree
        return self.decay.sigmoid() * neighbours + self.enter(x)


torch.manual_seed(0)
x, edges, batch, targets = random_graphs(GRAPHS, torch.Generator().manual_seed(0))
layer = DEQ(Cell(WIDTH), stop=Stop(1e-4))
head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 1))
adam = torch.optim.Adam([*layer.parameters(), *head.parameters()], lr=1e-2)
for step in range(STEPS):
    z = layer(x, edges, z0=torch.zeros(len(x), WIDTH), segments=batch)
    mean = torch.zeros(GRAPHS, WIDTH).index_add(0, batch, z) / batch.bincount()[:, None]
    loss = (head(mean)[:, 0] - targets).square().mean()
    adam.zero_grad()
    loss.backward()
    adam.step()
    if step in (0, STEPS - 1):
        print(f"step {step}: loss {loss.item():.4f}, variance of the targets {targets.var().item():.4f}")

# %% [markdown]
# ## Beside one large graph
#
# Without `segments` the batch is one block-diagonal problem, in which large graphs answer for small ones.

# %%
apart = layer.solution
with torch.no_grad():
    together = solve(lambda z: layer.cell(z[0], x, edges)[None], torch.zeros(1, len(x), WIDTH), stop=Stop(1e-4))
    off = (layer.cell(together.z[0], x, edges) - together.z[0]).square().sum(1)
    missed = torch.zeros(GRAPHS).index_add(0, batch, off).sqrt()
    size = torch.zeros(GRAPHS).index_add(0, batch, together.z[0].square().sum(1)).sqrt()
print(f"each graph by itself: {apart}")
print(f"one block-diagonal sample: {together}")
print(f"graphs that miss the tolerance there: {int((missed > 1e-4 * size).sum())} of {GRAPHS}")

# %% [markdown]
# What each graph costs. The dashed line is what all of them cost as one.

# %%
plt.figure(figsize=(6, 3))
plt.plot(batch.bincount(), apart.evaluations, "o")
plt.axhline(int(together.evaluations), linestyle="--", color="grey")
plt.xlabel("nodes of the graph")
plt.ylabel("evaluations")
plt.ylim(0)
plt.savefig("graphs.png")
