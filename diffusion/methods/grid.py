"""A coarse time grid of a chain: N at few of its steps, a spline between; what sampling and inversion use of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ..chain import Splitting
from ..remainder import Remainders
from ..trajectory import LinearChain

STEPS_PER_NODE, MOST_NODES = 4.5, 24
DENSITY = 1.7  # the number of steps left falls with this power from node to node
INVERSE = 0.6  # inversion has steps^INVERSE nodes
SMALL = 2**19  # entries of a product that is written out before it is summed


@dataclass(frozen=True, eq=False)
class TimeGrid:
    """n of the steps of a chain, first and last included, denser towards the image, where N changes most.

    at: (n,) int64, positions. spread: (steps, n) float64, from values there to all steps.
    """

    at: Tensor
    spread: Tensor

    @staticmethod
    def of(at: Tensor, steps: int, device: torch.device | None = None) -> TimeGrid:
        """The grid at the positions (n,) among so many steps."""
        return TimeGrid(at.to(device), interpolation(at, steps).to(device))

    @staticmethod
    def sampling(T: int, device: torch.device | None = None) -> TimeGrid:
        """Of all T steps: T − k falls as a power, since N changes over a range of steps that shrinks with their number
        left as σ goes to 0."""
        return TimeGrid.of(nodes(T), T, device)

    @staticmethod
    def inversion(steps: int, device: torch.device | None = None) -> TimeGrid:
        """Of steps that are read from the image to the latent."""
        return TimeGrid.of(joint_nodes(steps), steps, device)

    def part(self, m: Remainders, images: int, scaled: bool) -> Remainders:
        """The map of those steps alone, as they are in the whole chain; it counts evaluations (images,) of its own."""
        offset = None if m.splitting.offset is None else m.splitting.offset[self.at]
        split = Splitting(m.splitting.kappa[self.at], offset)
        scale = m.scale[self.at] if scaled and m.scale is not None else None
        chain, linear = m.chain.at(self.at), NodeChain(m.linear, self.at, self.spread)
        part = Remainders(m.network, chain, split, linear, scale=scale)
        part.evaluations = torch.zeros(images, dtype=torch.int64, device=self.at.device)
        return part


class NodeChain(LinearChain):
    """The states at n nodes of a chain, from N at the nodes and a spline between: x = base + G N."""

    def __init__(self, linear: LinearChain, at: Tensor, spread: Tensor) -> None:
        """at (n,): the nodes, first and last step included. spread (T, n): from nodes to all steps."""
        super().__init__(linear.A, linear.c)
        self.products, self.safe, self.w = linear.products, linear.safe, linear.w
        segments = list(pairwise(at.tolist()))
        sums = torch.stack([self.w[a:b].T @ spread[a:b] for a, b in segments]).cumsum(0)  # (n − 1, 1 or D, n)
        G = torch.cat([torch.zeros_like(sums[:1]), sums * self.products[at[1:], :, None]])
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


@dataclass(eq=False)
class OnGrid:
    """A map N ↦ N' of which only the steps of a grid are evaluated: all others follow by a spline of the changes."""

    map: Remainders
    grid: TimeGrid

    def __call__(self, N: Tensor, image: Tensor, base: Tensor, *conditioning: Tensor) -> Tensor:
        m, at = self.map, self.grid.at
        unit = m.unit
        x = m.linear.trajectory(base, N / unit)[:, at + m.shift]  # (n, nodes, D)
        m.evaluations.index_add_(0, image, torch.full_like(image, len(at)))
        rows = [c.repeat_interleave(len(at), 0) for c in conditioning]
        value = m.remainder(x.flatten(0, 1), at.repeat(len(x)), rows).view_as(x)
        return N + unit * (self.grid.spread @ (value - (N / unit)[:, at]))


def nodes(T: int) -> Tensor:
    """Positions (n,) int64 of the nodes among T steps, both ends included, denser towards the image."""
    return placed(T, max(4, min(MOST_NODES, int(T / STEPS_PER_NODE))), DENSITY)


def placed(T: int, n: int, power: float) -> Tensor:
    """Positions of at most n nodes, T − k falling as `power`: fewer where rounding brings two together."""
    left = T * (1 - torch.linspace(0, 1, n, dtype=torch.float64)).pow(power)
    return (T - left).round().long().clamp(max=T - 1).unique()


def joint_nodes(steps: int) -> Tensor:
    """Positions (n,) of steps^0.6 nodes, position 0 next to the image, denser there."""
    n = max(2, round(steps**INVERSE))
    return ((steps - 1) * torch.linspace(0, 1, n, dtype=torch.float64).square()).round().long().unique()


def between(at: Tensor, trial: int) -> Tensor:
    """One step between each two nodes that leave one, drawn at random by position: no period of a network fits them."""
    generator = torch.Generator().manual_seed(int(at[-1]) + 2**20 * trial)
    share = torch.rand(len(at) - 1, generator=generator, dtype=torch.float64)
    steps = at[:-1] + 1 + ((at.diff() - 1) * share).long()
    return steps[at.diff() > 1]


def interpolation(positions: Tensor, count: int, degree: int = 3) -> Tensor:
    """(count, n) float64: from values at `positions` (n,) to 0 … count−1, by a cubic spline (n ≥ 4) or linearly."""
    return _interpolation(tuple(positions.tolist()), count, degree).clone()


@lru_cache(maxsize=64)
def _interpolation(at: tuple[int, ...], count: int, degree: int) -> Tensor:
    from scipy.interpolate import CubicSpline, make_interp_spline

    n = len(at)
    identity = np.eye(n)
    grid = np.arange(count)
    spline = CubicSpline(at, identity) if n >= 4 and degree == 3 else make_interp_spline(at, identity, k=min(1, n - 1))
    return torch.from_numpy(np.ascontiguousarray(spline(grid)))
