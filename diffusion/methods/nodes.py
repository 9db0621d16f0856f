"""A few time steps of a long chain, its nodes, and the chain as they see it: N at the nodes, a spline between."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..chain import EditedChain, LinearChain, Splitting, interpolation
from ..remainder import Remainders

if TYPE_CHECKING:
    from ..sampler import Sampler

FEWEST_STEPS = 60  # with fewer the nodes are too few to tell what they miss
STEPS_PER_NODE, MOST_NODES = 4.5, 24
DENSITY = 1.7  # the number of steps left falls with this power from node to node
SMALL = 2**19  # entries of a product that is written out before it is summed
START = 2  # first rounds of a solve of all steps that are made on the nodes


class NodeChain(LinearChain):
    """The states at n nodes of a chain, from N at the nodes and a spline between: x = base + G N."""

    def __init__(self, linear: LinearChain, at: Tensor, spread: Tensor) -> None:
        """at (n,): the nodes, first and last step included. spread (T, n): from nodes to all steps."""
        super().__init__(linear.A, linear.c)
        segments = list(pairwise(at.tolist()))
        sums = torch.stack([self.w[a:b].T @ spread[a:b] for a, b in segments]).cumsum(0)  # (n − 1, 1 or D, n)
        G = torch.cat([torch.zeros_like(sums[:1]), sums * self.P[at[1:], :, None]])
        self.G = G.transpose(0, 1).contiguous()  # (1 or D, n, n)
        rows = self.G.permute(1, 2, 0)  # (n, n, 1 or D)
        self.rows = rows.contiguous() if rows.numel() <= SMALL else rows  # larger ones are not used: no copy

    def trajectory(self, base: Tensor, N: Tensor, image: Tensor | None = None) -> Tensor:
        """(B, n, D): base plus the response to N (B, n, D)."""
        return base + self.response(N)

    def response(self, N: Tensor) -> Tensor:
        """G N (B, n, D), what N (B, n, D) does to the states."""
        if len(self.G) == 1:
            return self.G[0] @ N
        if len(N) * self.G.numel() <= SMALL:  # for few images the D products of tiny matrices are ten times slower
            return (self.rows * N[:, None]).sum(2)
        return (self.G @ N.permute(2, 1, 0)).permute(2, 1, 0)


def nodes(T: int) -> Tensor:
    """Positions (n,) int64 of the nodes among T steps, both ends included, denser towards the image.

    T − k falls as a power: where σ goes to 0, N changes over a range of steps that shrinks with their number left.
    """
    return placed(T, max(4, min(MOST_NODES, int(T / STEPS_PER_NODE))), DENSITY)


def placed(T: int, n: int, power: float) -> Tensor:
    """Positions of at most n nodes, T − k falling as `power`: fewer where rounding brings two together."""
    left = T * (1 - torch.linspace(0, 1, n, dtype=torch.float64)).pow(power)
    return (T - left).round().long().clamp(max=T - 1).unique()


def between(at: Tensor, trial: int) -> Tensor:
    """One step between each two nodes that leave one, drawn at random by position: no period of a network fits them."""
    generator = torch.Generator().manual_seed(int(at[-1]) + 2**20 * trial)
    share = torch.rand(len(at) - 1, generator=generator, dtype=torch.float64)
    steps = at[:-1] + 1 + ((at.diff() - 1) * share).long()
    return steps[at.diff() > 1]


def possible(run: Sampler, window: int | None) -> bool:
    """Whether nodes serve: the chain long, in closed form, all of it at hand, its states smooth."""
    linear, T = run.map.linear, len(run.map.chain)
    closed = linear.safe and not isinstance(linear, EditedChain) and (window is None or window >= T)
    smooth = not bool((run.map.chain.blind | run.map.chain.still).any())  # else N is another quantity at that step
    return closed and smooth and T >= FEWEST_STEPS and run.map.chain.eta == 0


@dataclass(eq=False)
class Nodes:
    """The map N ↦ N' at the nodes of a chain.

    Attributes:
        at: (n,) int64, their positions among the T steps.
        spread: (T, n) float64, from values at the nodes to all steps.
        chain: the states there.
        map: the remainders there; it counts its own evaluations.
    """

    at: Tensor
    spread: Tensor
    chain: NodeChain
    map: Remainders

    @staticmethod
    def of(run: Sampler, scale: Tensor | None = None) -> Nodes:
        """The nodes of a run's chain; scale (T, 1) as in `Remainders`, of all steps."""
        m, device = run.map, run.x_T.device
        at = nodes(len(m.chain)).to(device)
        spread = interpolation(at.cpu(), len(m.chain)).to(device)
        offset = m.splitting.offset
        split = Splitting(m.splitting.kappa[at], None if offset is None else offset[at])
        there = None if scale is None else scale[at]
        chain = NodeChain(m.linear, at, spread)
        part = Remainders(m.network, m.chain.at(at), split, chain, scale=there)
        part.evaluations = torch.zeros(len(run.x_T), dtype=torch.int64, device=device)
        return Nodes(at, spread, chain, part)


def start(run: Sampler) -> tuple[Tensor, int, Tensor]:
    """A first guess of N (B, T, D) by `START` rounds on the nodes, from N = 0; its rounds, and rows (B,).

    As long as the errors are tenths, N at n ≪ T steps says as much as N at all of them.
    """
    grid, B = Nodes.of(run), len(run.x_T)
    base, image = run.base()[:, grid.at], torch.arange(B, device=run.x_T.device)
    N = torch.zeros_like(base)
    for _ in range(START):
        N = grid.map(N, image, base, *run.conditioning)
    sound = N.isfinite().flatten(1).all(1)[:, None, None]
    return grid.spread @ torch.where(sound, N, 0.0), START, grid.map.evaluations
