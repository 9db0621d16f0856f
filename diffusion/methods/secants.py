"""A Jacobian of the remainders at every node, learnt from the rounds that were made, and what it foretells.

A round gives N'_k = N_k(x_k) at the states x_k of the nodes. The states then move by d, of which plain iteration knows
only the part d⁰ that N' − N makes. With J_k ≈ ∂N_k/∂x the values move with the states, N'_k + J_k d_k, and

    d = d⁰ + G J d,    J_k = Σ_a u_ka v_kaᵀ,    a = 1 … m,

G being the response of the chain's states to the remainders. Each round adds a term to J_k, s the change of x_k since
the node was evaluated last and y that of its value: u = y − J_k s, v = s/|s|² (Broyden 1965, his first method), which
makes J_k s = y. So d is found from the n·m numbers w_ka = v_kaᵀ d_k alone, w = Vᵀ d⁰ + Vᵀ G U w, one small system per
image. In it G is taken as its mean over the entries of an image. That could change how fast a solve gets to its fixed
point, not the fixed point, where d⁰ = 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..remainder import Remainders
from .grid import NodeChain
from .visits import slopes

MEMORY = 3  # m
FADES = 0.5  # a round, of what the network did across the moves before: they were longer, and further from the solution
TELLING = 4.0  # a move of fewer units of rounding of the state says nothing


class Secants:
    """The map N ↦ N' + J d at the nodes, for `pydeqsolve.solve` without acceleration; one for all solves of B images.

    Takes 2 (m + 1) words per image, node and entry, and (m n)² per image. An image's J comes from its own rounds alone.
    """

    def __init__(self, part: Remainders, images: int, entries: int) -> None:
        """part: the map at n nodes, whose linear part is a `NodeChain`."""
        assert isinstance(part.linear, NodeChain)
        self.map, self.chain, G = part, part.linear, part.linear.G
        B, m, n, D, device = images, MEMORY, G.shape[1], entries, G.device
        self.U = torch.zeros(B, m, n, D, dtype=torch.float64, device=device)
        self.V = torch.zeros_like(self.U)
        self.x = torch.full((B, n, D), torch.nan, dtype=torch.float64, device=device)  # where last evaluated
        self.value = torch.zeros_like(self.x)  # N there
        self.slope = torch.full((B, n), torch.nan, dtype=torch.float64, device=device)  # of N along its last move
        self.steepest = self.slope.clone()  # the least of all moves
        self.across = self.slope.clone()  # as of `Visits`, of earlier moves FADES for every round since
        self.rounds = torch.zeros(B, dtype=torch.int64, device=device)
        self.G = G.mean(0).repeat(m, m)  # (m n, m n)
        self.precision = torch.finfo(part.network.dtype).eps
        self.least = (TELLING * self.precision) ** 2
        self.one = torch.eye(m * n, dtype=torch.float64, device=device)

    def __call__(
        self, N: Tensor, image: Tensor, base: Tensor, *conditioning: Tensor, wanted: Tensor | None = None
    ) -> Tensor:
        """N' + J d (b, n, D) where `wanted` (b, n), N elsewhere; arguments as of `Remainders`."""
        m, scale = self.map, 1.0 if self.map.scale is None else self.map.scale
        N = N / scale
        (x, i, k), value = m.visited(N, image, base, wanted), N.clone()
        value[i, k] = m.remainder(x[i, k], k, [c[i] for c in conditioning])
        self.note(image, x, value, wanted)
        return (value + self.change(image, self.chain.response(value - N), wanted)) * scale

    def note(self, image: Tensor, x: Tensor, value: Tensor, wanted: Tensor | None = None) -> None:
        """Adds a term to J: N is `value` (b, n, D) at states x (b, n, D) of the images (b,), where `wanted`."""
        U, V, old, before = (rows_of(part, image) for part in (self.U, self.V, self.x, self.value))
        s, y = x - old, value - before
        u = y - (U * (V * s[:, None]).sum(3, keepdim=True)).sum(1)
        moved, missed, size = (part.square().sum(2) for part in (s, u, x))
        # A move within the rounding of what the network is given says nothing; nor does the first, where `old` is NaN.
        sound = (moved > self.least * size) & (missed < torch.inf)
        seen = value.isfinite().all(2)
        if wanted is not None:
            sound, seen = sound & wanted, seen & wanted
        slope, across, told = slopes(s, y, x, self.precision)
        steepest, across = torch.fmin(slope, self.steepest[image]), torch.fmax(across, FADES * self.across[image])
        for kept, new in ((self.slope, slope), (self.steepest, steepest), (self.across, across)):
            kept[image] = torch.where(told & seen, new, kept[image])
        at = self.rounds[image] % MEMORY
        self.U[image, at] = torch.where(sound[..., None], u, 0.0)
        self.V[image, at] = torch.where(sound[..., None], s / moved[..., None], 0.0)
        self.x[image] = torch.where(seen[..., None], x, old)
        self.value[image] = torch.where(seen[..., None], value, before)
        self.rounds[image] += 1

    def change(self, image: Tensor, moved: Tensor, wanted: Tensor | None = None) -> Tensor:
        """J d (b, n, D) where `wanted`, 0 elsewhere; `moved` (b, n, D) is d⁰. 0 for an image whose d is not finite."""
        U, V = rows_of(self.U, image), rows_of(self.V, image)
        b, m, n, D = U.shape
        if wanted is not None:
            U = torch.where(wanted[:, None, :, None], U, 0.0)
        coupling = self.G * (V.reshape(b, m * n, D) @ U.reshape(b, m * n, D).mT)
        w, _ = torch.linalg.solve_ex(self.one - coupling, (V * moved[:, None]).sum(3).view(b, m * n, 1))
        w = torch.where(w.isfinite().all(1, keepdim=True), w, 0.0)
        return (U * w.view(b, m, n, 1)).sum(1)


def rows_of(part: Tensor, images: Tensor) -> Tensor:
    """What belongs to the images (b,), in order, of what belongs to all; where that is all of it, no copy."""
    return part if len(images) == len(part) else part[images]
