"""Where a chain was evaluated, and how steep the network was found to be there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..trajectory import EditedChain, LinearChain

TOLD = 100.0  # a move of fewer units of rounding of the state tells no slope,
ROUNDED = 4.0  # units of rounding of the state that N may change by without any move
LARGE = 3e-3  # of a state: a network as steep as 1/LARGE turns within a larger move
TELLS = 0.03  # unless it is so large a part of the state: in 16 bits few moves are of a hundred units


@dataclass(eq=False)
class Visits:
    """Where every step was evaluated last, its value there, and what its last move told of N.

    That is a Jacobian of rank one, J = change·directionᵀ, which maps the move to the change of the value (Broyden 1965,
    his first method, from J = 0); both are 0 where nothing was told.
    """

    x: Tensor  # (B, T, D), NaN where it was not
    value: Tensor  # (B, T, D)
    slope: Tensor  # (B, T) of N along the last move, NaN where unknown
    least: Tensor  # (B, T), the least slope of all moves
    across: Tensor  # (B, T), the most that N changed at a right angle to a move, per unit of it, NaN where unknown
    near: Tensor  # (B, T, 2), along a small move from the state measured and at a right angle to it, NaN where unknown
    change: Tensor  # (B, T, D), ΔN
    direction: Tensor  # (B, T, D), Δx/|Δx|²
    precision: float  # machine epsilon of the network

    @staticmethod
    def none(like: Tensor, precision: float) -> Visits:
        """Before the first round; like (B, T, D)."""
        unknown, zero = torch.full_like(like, torch.nan), torch.zeros_like(like)
        slope = unknown[..., 0].clone()
        near = unknown[..., :1].repeat(1, 1, 2)
        return Visits(unknown, zero, slope, slope.clone(), slope.clone(), near, zero.clone(), zero.clone(), precision)

    def note(self, i: Tensor, k: Tensor, x: Tensor, value: Tensor) -> None:
        """N is `value` (n, D) at states x (n, D) of the images i and steps k (n,)."""
        at = i, k
        move, change = x - self.x[i, k], value - self.value[i, k]
        slope, across, sound = slopes(move, change, x, self.precision)
        self.slope[i, k] = torch.where(sound, slope, self.slope[i, k])
        self.least[i, k] = torch.where(sound, torch.fmin(slope, self.least[i, k]), self.least[i, k])
        self.across[i, k] = torch.where(sound, torch.fmax(across, self.across[i, k]), self.across[i, k])
        i, k, move, change = i[sound], k[sound], move[sound], change[sound]
        self.change[i, k], self.direction[i, k] = change, move / move.square().sum(1, keepdim=True)
        self.x[at], self.value[at] = x, value

    def look(self, i: Tensor, k: Tensor, x: Tensor, value: Tensor) -> None:
        """N is `value` (n, D) at states x (n, D) beside those visited last: how steep it is there."""
        slope, across, _ = slopes(x - self.x[i, k], value - self.value[i, k], x, self.precision)
        self.near[i, k] = torch.stack([slope, across], 1)

    def large(self, image: Tensor, x: Tensor) -> Tensor:
        """Whether the last move that told was larger than LARGE of the states x (n, T, D), or none did, (n, T)."""
        return ~(self.direction[image].norm(dim=2) * LARGE * x.norm(dim=2) >= 1)

    def foretold(self, linear: LinearChain, delta: Tensor, image: Tensor) -> Tensor:
        """δ + J d (n, T, D): by how much N changes when it is set right by the defects δ, to first order.

        The states move by d_{k+1} = A_k d_k + c_k (δ_k + J_k d_k), d_0 = 0. δ alone for an image whose d is not finite,
        and under an edit, which need not be linear.
        """
        if isinstance(linear, EditedChain):
            return delta
        change, direction, out = self.change[image], self.direction[image], delta.clone()
        d, told = (
            [torch.zeros_like(delta[:, 0])],
            zip(change.unbind(1), direction.unbind(1), out.unbind(1), strict=True),
        )
        for k, (one, along, own) in enumerate(told):
            own += one * (along * d[-1]).sum(1, keepdim=True)
            d = [*d[-1:], linear.next(k, d, out)]
        return torch.where(d[-1].isfinite().all(1)[:, None, None], out, delta)


def slopes(s: Tensor, y: Tensor, x: Tensor, precision: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of moves s and changes y (…, D) at x: ⟨y, s⟩/|s|² (…), what y has beside that, and where the move can tell.

    The second is |y − slope·s|/|s|, without what rounding makes of it: how steep N is in directions that the slope says
    nothing of.
    """
    moved, size = s.square().sum(-1), x.square().sum(-1)
    slope = (y * s).sum(-1) / moved
    rounded = (ROUNDED * precision) ** 2 * size / moved
    across = (y.square().sum(-1) / moved - slope.square() - rounded).clamp_min(0).sqrt()
    return slope, across, (moved > min(TOLD * precision, TELLS) ** 2 * size) & slope.isfinite()
