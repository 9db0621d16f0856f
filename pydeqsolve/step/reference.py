"""The solver step in plain PyTorch: the oracle of the native one, and what runs when there is none.

Letters: R, F (B, M, T, D) raw rows of residuals r = f − z and of values f, in a ring of M slots; age a counts back
from the newest row; y_a = r_a − r_{a+1}, s_a = z_a − z_{a+1}; Gram entries of age a are kept under its slot.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .records import ACCEPT, MIX, PLAIN, REJECT
from .ring import Ring

PIVOT_CUTOFF = 1e-14
NOISE = 16.0  # units of rounding of f that a difference may consist of; csrc/core.h


def measure(ring: Ring, f: Tensor, z: Tensor, rows: Tensor, wanted: Tensor | None, norm: str) -> Tensor:
    """Writes r and f into the ring, updates the Gram matrices, returns norms (n, T, 2) of r and of f, float64.

    The matrices are those of the rows as the ring keeps them, the norms those of r before it is rounded to its dtype.
    Norms are sums of squares, or maxima when norm is "max". f, z (n, T, D); rows (n,); wanted (n, T) or None.
    """
    M, head = ring.slots, ring.head
    wide = torch.promote_types(f.dtype, torch.float32)
    r = f.to(wide) - z.to(wide)
    largest = torch.finfo(ring.dtype).max
    kept = (r.clamp(-largest, largest) if ring.dtype.itemsize == 2 else r).to(ring.dtype)  # csrc/scalar.h
    taken = torch.ones(f.shape[:2], dtype=torch.bool, device=f.device) if wanted is None else wanted
    for stored, new in ((ring.R, kept), (ring.F, f)):
        stored[rows, head] = torch.where(taken[..., None], new, stored[rows, head])
    older = ring.count[rows].clamp(max=M - 1)
    ages = [(head - a) % M for a in range(M)]
    residuals = ring.R[rows][:, ages].double()
    iterates = ring.F[rows][:, ages].double() - residuals
    y = residuals[:, :-1] - residuals[:, 1:]  # (n, M-1, T, D)
    s = iterates[:, :-1] - iterates[:, 1:]
    w = s if ring.by_steps else y
    if M > 1:
        valid = (torch.arange(M - 1, device=f.device)[None, None] < older[..., None]) & taken[..., None]  # (n, T, M-1)
        row = torch.einsum("ntd,natd->nta", w[:, 0], y)
        column = torch.einsum("natd,ntd->nta", w, y[:, 0])
        rhs = torch.einsum("natd,ntd->nta", w, residuals[:, 0])
        gram, slots = ring.gram[rows], ages[:-1]
        gram[:, :, head, slots] = torch.where(valid, row, gram[:, :, head, slots])
        gram[:, :, slots, head] = torch.where(valid, column, gram[:, :, slots, head])
        ring.gram[rows] = gram
        ring.rhs[rows] = torch.nn.functional.pad(torch.where(valid, rhs, 0.0), (0, 1))
        if ring.steps_gram is not None:
            steps, new = ring.steps_gram[rows], torch.einsum("ntd,natd->nta", s[:, 0], s)
            steps[:, :, head, slots] = torch.where(valid, new, steps[:, :, head, slots])
            steps[:, :, slots, head] = steps[:, :, head, slots]
            ring.steps_gram[rows] = steps
    ring.count[rows] = torch.where(taken, older + 1, 0).to(ring.count.dtype)
    both = torch.stack([r, f.to(wide)], dim=2).double()  # (n, T, 2, D)
    squares = both.square().sum(-1)
    ring.squares[rows] = torch.where(taken[..., None], squares, ring.squares[rows])
    if norm == "max":
        squares = torch.where(squares.isfinite(), both.abs().amax(-1), squares)
    return torch.where(taken[..., None], squares, 0.0)


def weights(ring: Ring, mode: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """gamma (n, T, M) by age, from the Gram summed over blocks as the coupling says; dropped (n, T) differences."""
    M, head = ring.slots, ring.head
    n, T = mode.shape
    gamma = torch.zeros(n, T, M, dtype=torch.float64, device=mode.device)
    dropped = torch.zeros(n, T, dtype=torch.int32, device=mode.device)
    mixes = mode == MIX
    count = ring.count[rows]
    size = torch.where(mixes, count - 1, 0)
    ring.count[rows] = torch.where(mode == REJECT, 0, torch.where(mode == PLAIN, 1, count))
    if M == 1:
        return gamma, dropped
    slots = [(head - a) % M for a in range(M - 1)]
    valid = torch.arange(M - 1, device=mode.device)[None, None] < size[..., None]  # (n, T, M-1)
    pair = valid[..., :, None] & valid[..., None, :]
    A = ring.gram[rows][:, :, slots][:, :, :, slots]
    if ring.kind == "broyden good" and ring.steps_gram is not None:
        A = A + ring.steps_gram[rows][:, :, slots][:, :, :, slots].triu(1)
    if ring.kind == "broyden bad":
        A = A.tril()
    A = torch.where(pair, A, 0.0)
    b = torch.where(valid, ring.rhs[rows][..., :-1], 0.0)
    squares = torch.where(mixes[..., None], ring.squares[rows], 0.0)
    if ring.coupling == "causal":
        A, b, squares, size = A.cumsum(1), b.cumsum(1), squares.cumsum(1), torch.where(mixes, size, 0)
    elif ring.coupling == "joint":
        A, b, squares = (x.sum(1, keepdim=True).expand_as(x) for x in (A, b, squares))
        size = torch.where(mixes, size.amax(1, keepdim=True), 0)
    inside = torch.arange(M - 1, device=mode.device)[None, None] < size[..., None]
    A = torch.where(inside[..., :, None] & inside[..., None, :], A, 0.0).reshape(-1, M - 1, M - 1)
    b = torch.where(inside, b, 0.0).reshape(-1, M - 1)
    solver = _solve_positive if ring.kind == "anderson II" else _solve_general
    x, kept = solver(A, b, ring.ridge)
    x, kept = x.reshape(n, T, M - 1), kept.reshape(n, T)
    noise = NOISE * ring.eps * x.abs().amax(-1)
    sound = noise.square() * squares[..., 1] <= squares[..., 0]
    gamma[..., :-1] = torch.where(sound[..., None], x, 0.0)
    return gamma, torch.where(sound, size - kept, size).to(torch.int32)


def mix(ring: Ring, gamma: Tensor, mode: Tensor, z: Tensor, rows: Tensor, count: Tensor) -> Tensor:
    """The next iterate (n, T, D): f − Σ γ_a (f_a − f_{a+1}), damped; per block as `mode` says. count (n, T)."""
    M, head = ring.slots, ring.head
    ages = [(head - a) % M for a in range(M)]
    F, R = ring.F[rows][:, ages].double(), ring.R[rows][:, ages].double()
    undamped = 1 - ring.damping
    damped = F - undamped * R if undamped else F  # (n, M, T, D); 0 times infinity is NaN
    used = torch.arange(M, device=z.device)[None, None] < (count - 1)[..., None]
    difference = damped - damped.roll(-1, dims=1)
    x = damped[:, 0]
    for a in range(M - 1):
        weight = gamma[..., a, None]
        x = torch.where(used[..., a, None] & (weight != 0), x - weight * difference[:, a], x)
    choices = {MIX: x, REJECT: damped[:, 1 % M], PLAIN: damped[:, 0], ACCEPT: F[:, 0]}
    out = z.double()
    for what, value in choices.items():
        out = torch.where((mode == what)[..., None], value, out)
    return out.to(z.dtype)


def _solve_positive(A: Tensor, b: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Cholesky on unit diagonals, newest difference first; dependent ones get weight 0. A (K, m, m), b (K, m)."""
    K, m = b.shape
    diagonal = A.diagonal(dim1=1, dim2=2)
    scale = torch.where(diagonal > 0, diagonal.clamp_min(torch.finfo(A.dtype).tiny).rsqrt(), 0.0)
    A, b = A * scale[:, :, None] * scale[:, None, :], b * scale
    L = torch.zeros_like(A)
    kept = torch.zeros(K, m, dtype=torch.bool, device=A.device)
    for j in range(m):
        for k in range(j):
            value = (A[:, j, k] - (L[:, j, :k] * L[:, k, :k]).sum(-1)) / torch.where(kept[:, k], L[:, k, k], 1.0)
            L[:, j, k] = torch.where(kept[:, k], value, 0.0)
        pivot = A[:, j, j] + ridge - L[:, j, :j].square().sum(-1)
        kept[:, j] = (scale[:, j] > 0) & (pivot > PIVOT_CUTOFF)
        L[:, j, j] = torch.where(kept[:, j], pivot.clamp_min(0).sqrt(), 1.0)
        L[:, j, :j] = torch.where(kept[:, j, None], L[:, j, :j], 0.0)
    rhs = torch.where(kept, b, 0.0)[..., None]
    x = torch.cholesky_solve(rhs, L)[..., 0]
    return torch.where(kept, x, 0.0) * scale, kept.sum(-1)


def _solve_general(A: Tensor, b: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Elimination with complete pivoting, cut off at the numerical rank. A (K, m, m), b (K, m); ridge is unused.

    Differences that are not finite get weight 0.
    """
    K, m = b.shape
    A, b = _without_infinite(A, b)
    rows, each = torch.arange(K, device=A.device), torch.arange(m, device=A.device)
    largest = A.abs().amax(2)
    factor = torch.where(largest > 0, 1 / largest, 0.0)
    A, b = A * factor[..., None], b * factor
    largest = A.abs().amax(1)
    scale = torch.where(largest > 0, 1 / largest, 0.0)
    A, b = A * scale[:, None, :], b.clone()
    order = each.expand(K, m).clone()
    rank = torch.zeros(K, dtype=torch.int64, device=A.device)
    alive = torch.ones(K, dtype=torch.bool, device=A.device)
    for k in range(m):
        at = A[:, k:, k:].abs().reshape(K, -1).argmax(1)
        i, j = k + at // (m - k), k + at % (m - k)
        alive = alive & (A[rows, i, j].abs() > PIVOT_CUTOFF)
        rank += alive
        for tensor, other in ((A, i), (b, i)):
            tensor[rows, k], tensor[rows, other] = tensor[rows, other].clone(), tensor[rows, k].clone()
        A[rows, :, k], A[rows, :, j] = A[rows, :, j].clone(), A[rows, :, k].clone()
        order[rows, k], order[rows, j] = order[rows, j].clone(), order[rows, k].clone()
        elimination = torch.where(
            alive[:, None] & (each > k), A[:, :, k] / torch.where(alive, A[:, k, k], 1.0)[:, None], 0.0
        )
        A = A - elimination[..., None] * torch.where(each >= k, A[:, k], 0.0)[:, None, :]
        b = b - elimination * b[:, k, None]
    inside = each < rank[:, None]
    identity = torch.eye(m, dtype=A.dtype, device=A.device)
    U = torch.where(inside[:, :, None] & inside[:, None, :], A.triu(), identity)
    x = torch.linalg.solve_triangular(U, torch.where(inside, b, 0.0)[..., None], upper=True)[..., 0]
    return torch.zeros_like(x).scatter(1, order, torch.where(inside, x, 0.0)) * scale, rank


def _without_infinite(A: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A (K, m, m) and b (K, m), zero at differences whose diagonal entry is not finite; all zero if others are not."""
    sound = A.diagonal(dim1=1, dim2=2).isfinite()
    A, b = torch.where(sound[:, :, None] & sound[:, None, :], A, 0.0), torch.where(sound, b, 0.0)
    whole = A.isfinite().all(2).all(1) & b.isfinite().all(1)
    return torch.where(whole[:, None, None], A, 0.0), torch.where(whole[:, None], b, 0.0)
