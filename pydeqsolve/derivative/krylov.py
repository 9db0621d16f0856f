"""One cycle of GMRES: an orthonormal Krylov basis, and the least-squares problem in its coordinates."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..shards import Whole
from .linear import System, lengths

FIRST = 8  # vectors for which there is room at first


@dataclass(eq=False)
class Krylov:
    """Corrections from min ‖r − (I − A) d‖ over d in span{r, (I − A) r, …}, at most `most` vectors of it."""

    system: System
    eps: float
    most: int
    last: tuple[Basis, LeastSquares, Tensor] | None = None  # of the last correction; NaN for rows that are not finite

    def correction(self, r: Tensor, active: Tensor, budget: int) -> tuple[Tensor, Tensor]:
        """d (B, N) for the residual r (B, N) of the rows `active` (B,), and the products each has used, (B,) int64.

        A row's d is NaN when a product is not finite. budget: most calls of A.
        """
        most = min(self.most, budget)
        beta = torch.where(active, self.system.shards.lengths(r), 1.0)
        basis = Basis(torch.where(active[:, None], r / beta.to(r.dtype)[:, None], 0.0), most, self.system.shards)
        small = LeastSquares(torch.where(active, beta, 0.0))
        used = torch.zeros(len(r), dtype=torch.int64, device=r.device)
        going, broken = active, torch.zeros_like(active)
        for k in range(most):
            newest = basis.vectors[k]
            w, h = basis.orthogonal(newest - self.system.A(newest))
            length, size = self.system.shards.lengths(w), lengths(h)
            finite = (length + size).isfinite()
            broken = broken | (going & ~finite)
            used += going
            going, left = small.append(torch.where(finite[:, None], h, 0.0), length, going & finite, self.eps)
            # Nothing left of a vector (a breakdown) ends the cycle; whether with an answer the true residual tells.
            going = going & (left > 0.5 * self.system.goal) & (length > self.eps * size)
            if k + 1 == most or not bool(going.any()):
                break
            basis.append(torch.where(going[:, None], w / torch.where(going, length, 1.0).to(w.dtype)[:, None], 0.0))
        self.last = basis, small, torch.where(broken, torch.nan, 1.0)
        return self._combined(small.taken), used

    def cautious(self, r: Tensor) -> Tensor | None:
        """d (B, N) from the columns that nearly lose no direction; None when every row has only such."""
        assert self.last is not None
        small = self.last[1]
        count = small.strong(self.eps)
        return self._combined(count) if bool((count < small.taken).any()) else None

    def _combined(self, count: Tensor) -> Tensor:
        """d (B, N) of the first `count` (B,) columns of each row."""
        assert self.last is not None
        basis, small, broken = self.last
        return basis.combine(small.coordinates(count)) * broken[:, None].to(basis.vectors.dtype)


class Basis:
    """Orthonormal vectors (k, B, N), in memory that grows with them."""

    def __init__(self, first: Tensor, most: int, shards: Whole) -> None:
        self.most, self.count, self.shards = most, 1, shards
        self.vectors = first.new_empty(min(FIRST, most), *first.shape)
        self.vectors[0] = first

    def append(self, v: Tensor) -> None:
        if self.count == len(self.vectors):
            wider = v.new_empty(min(2 * self.count, self.most), *v.shape)
            wider[: self.count] = self.vectors
            self.vectors = wider
        self.vectors[self.count] = v
        self.count += 1

    def orthogonal(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """w (B, N) without its components in the basis, and these, (B, k) float64."""
        Q = self.vectors[: self.count].transpose(0, 1)
        total = torch.zeros(len(w), self.count, dtype=torch.float64, device=w.device)
        for _ in range(2):  # twice is enough to keep the basis orthogonal to rounding
            h = self.shards.total(torch.bmm(Q, w[..., None]))
            w = torch.baddbmm(w[:, None], h.transpose(1, 2), Q, alpha=-1)[:, 0]
            total += h[..., 0]
        return w, total

    def combine(self, y: Tensor) -> Tensor:
        """Σ_j y_j q_j, (B, N), for y (B, k)."""
        Q = self.vectors[: y.shape[1]].transpose(0, 1)
        return torch.bmm(y.to(Q.dtype)[:, None], Q)[:, 0]


@dataclass(eq=False)
class LeastSquares:
    """min ‖β e_1 − H y‖ for Hessenberg matrices H of B rows, taken in column by column, in float64.

    The rotations that make H triangular are kept as their product G, so that a column costs one multiplication.
    """

    beta: Tensor  # (B,)
    columns: list[Tensor] = field(default_factory=list)  # of the triangle, (B, 1), (B, 2), …
    y: list[Tensor] = field(default_factory=list)  # (B,) each: what the triangle times the coordinates is to be
    G: Tensor = field(init=False)  # (B, k + 1, k + 1)
    taken: Tensor = field(init=False)  # (B,) int64: columns that a row has taken
    sound: Tensor = field(init=False)  # (B,) int64: those before the first that the ones before it nearly span

    def __post_init__(self) -> None:
        self.G = torch.ones_like(self.beta)[:, None, None]
        self.taken = torch.zeros(len(self.beta), dtype=torch.int64, device=self.beta.device)
        self.sound = self.taken

    def append(self, h: Tensor, length: Tensor, going: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Takes in a column, h (B, k + 1) and `length` (B,) below it, for the rows `going` (B,).

        Returns the rows that took it, and the residual of each, (B,). A column that adds nothing but rounding to the
        span is not taken: its coordinate would be of the size of 1/eps.
        """
        k = len(self.columns)
        above = torch.bmm(self.G, h[..., None])[..., 0]
        radius = torch.hypot(above[:, k], length)
        size = torch.hypot(lengths(h), length)
        going = going & (radius > 4 * eps * size)
        self.sound = self.sound + (going & (self.sound == k) & (radius > eps**0.5 * size))
        self.taken = self.taken + going
        safe = torch.where(going, radius, 1.0)
        cosine = torch.where(going, above[:, k] / safe, 1.0)
        sine = torch.where(going, length / safe, 0.0)
        last = self.G[:, k]
        self.y.append(torch.where(going, self.beta * cosine * last[:, 0], 0.0))
        self.columns.append(torch.where(going[:, None], torch.cat([above[:, :k], safe[:, None]], 1), 0.0))
        self.G = torch.nn.functional.pad(self.G, (0, 1, 0, 1))
        self.G[:, k + 1, :-1], self.G[:, k + 1, -1] = -sine[:, None] * last, cosine
        self.G[:, k, :-1], self.G[:, k, -1] = cosine[:, None] * last, sine
        return going, (self.beta * sine * last[:, 0]).abs()

    def strong(self, eps: float) -> Tensor:
        """The number of columns, (B,) int64, that are sound and whose minimiser is not huge.

        Together columns may nearly lose a direction of which their diagonal does not tell.
        """
        count = self.sound
        while True:
            huge = (count > 0) & ~(lengths(self.coordinates(count)) <= self.beta / eps**0.5)
            if not bool(huge.any()):
                return count
            count = count - huge.long()

    def coordinates(self, count: Tensor) -> Tensor:
        """The minimiser (B, k) over the first `count` (B,) columns of each row."""
        y = torch.stack(self.y, 1)
        y = torch.where(torch.arange(y.shape[1], device=y.device) < count[:, None], y, 0.0)
        for j in range(len(self.columns) - 1, -1, -1):
            column = self.columns[j]
            y[:, j] /= torch.where(column[:, j] == 0, 1.0, column[:, j])
            y[:, :j] -= y[:, j : j + 1] * column[:, :j]
        return y
