"""A Jacobian of the remainders at every step, learnt from the moves of the step and its two neighbours.

Every round tells of step k that its state moved by s and N_k by y ≈ J_k s. The networks of neighbouring time steps are
nearly one, so what k − 1 and k + 1 have told serves k too. J_k is what Broyden's first method (1965) makes of the moves
s_1 … s_r of the last m rounds, the oldest first and the step's own last in each, from J = 0:

    J d = Y R⁻¹ Sᵀ d,    R the upper triangle of SᵀS,    S = (s_1 … s_r), Y = (y_1 … y_r),

which maps the last move to what it did. With it the states after the next round are foretold, one step after the other,
d_{k+1} = A_k d_k + A'_k d_{k−1} + c_k (δ_k + J_k d_k), δ = N' − N, and N moves along: N ← N' + J d.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..methods.secants import TELLING, rows_of
from ..remainder import Remainders

MEMORY = 3  # m
NEIGHBOURS = (2, 0, 1)  # k + 1, k − 1 and k, as rows from k − 1 on


class Pooled:
    """The map N ↦ N' + J d of all steps of B images. Its fixed point is the map's own, where d = 0.

    Takes 2 (m + 1) words per image, step and entry. An image's J comes from its own rounds alone.
    """

    def __init__(self, part: Remainders, images: int, entries: int) -> None:
        B, T, D, device = images, len(part.chain), entries, part.chain.signal.device
        self.map = part
        self.moves = torch.zeros(B, T + 2, MEMORY, D, dtype=torch.float64, device=device)  # of steps −1 … T
        self.changes = torch.zeros_like(self.moves)
        self.x = torch.full((B, T, D), torch.nan, dtype=torch.float64, device=device)  # where last evaluated
        self.value = torch.zeros_like(self.x)  # N there
        self.rounds = 0
        self.least = (TELLING * torch.finfo(part.network.dtype).eps) ** 2

    def __call__(
        self, N: Tensor, image: Tensor, base: Tensor, *conditioning: Tensor, wanted: Tensor | None = None
    ) -> Tensor:
        """N' + J d (n, T, D) where `wanted` (n, T), N elsewhere; image (n,), base (n, T+1, D), conditioning (n, …)."""
        m = self.map
        (x, i, k), value = m.visited(N, image, base, wanted), N.clone()
        value[i, k] = m.remainder(x[i, k], k, [c[i] for c in conditioning])
        self._note(image, x, value)
        return self._foretold(image, N, value)

    def _note(self, image: Tensor, x: Tensor, value: Tensor) -> None:
        """N is `value` (n, T, D) at states x (n, T, D) of the images (n,)."""
        s, y = x - rows_of(self.x, image), value - rows_of(self.value, image)
        # A move within the rounding of what the network is given says nothing; nor does the first, from NaN.
        sound = (s.square().sum(2) > self.least * x.square().sum(2)) & y.isfinite().all(2)
        at = self.rounds % MEMORY
        for kept, new in ((self.moves, s), (self.changes, y)):
            kept[image, 1:-1, at] = torch.where(sound[..., None], new, 0.0)
        self.x[image], self.value[image] = x, value
        self.rounds += 1

    def _foretold(self, image: Tensor, N: Tensor, value: Tensor) -> Tensor:
        """N' + J d (n, T, D) from N' = `value`; N' alone for an image whose d is not finite."""
        moves, changes = rows_of(self.moves, image), rows_of(self.changes, image)
        order = [row * MEMORY + (self.rounds + age) % MEMORY for age in range(MEMORY) for row in NEIGHBOURS]
        out = value - N
        d = [torch.zeros_like(out[:, 0])]
        for k in range(out.shape[1]):
            S, Y = (part[:, k : k + 3].flatten(1, 2)[:, order] for part in (moves, changes))
            R = (S @ S.mT).triu()
            R.diagonal(dim1=1, dim2=2).add_(R.diagonal(dim1=1, dim2=2) == 0)  # of no move: it adds nothing
            w = torch.linalg.solve_triangular(R, S @ d[-1][..., None], upper=True)
            out[:, k] += (Y.mT @ w)[..., 0]
            d = [*d[-1:], self.map.linear.next(k, d, out)]
        return torch.where(d[-1].isfinite().all(1)[:, None, None], N + out, value)
