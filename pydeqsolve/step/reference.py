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
    r, kept = difference(f, z)
    taken = torch.ones(f.shape[:2], dtype=torch.bool, device=f.device) if wanted is None else wanted
    for stored, new in ((ring.R, kept), (ring.F, f)):
        stored[rows, head] = torch.where(taken[..., None], new, stored[rows, head])
    older = ring.count[rows].clamp(max=M - 1)
    ages = [(head - a) % M for a in range(M)]
    residuals = ring.R[rows][:, ages].double()
    iterates = ring.F[rows][:, ages].double() - residuals
    if M > 1:
        valid = (torch.arange(M - 1, device=f.device)[None, None] < older[..., None]) & taken[..., None]  # (n, T, M-1)
        row, column, rhs, steps_row = products(residuals, iterates, ring.by_steps, ring.steps_gram is not None)
        gram, slots = ring.gram[rows], ages[:-1]
        gram[:, :, head, slots] = torch.where(valid, row, gram[:, :, head, slots])
        gram[:, :, slots, head] = torch.where(valid, column, gram[:, :, slots, head])
        ring.gram[rows] = gram
        ring.rhs[rows] = torch.nn.functional.pad(torch.where(valid, rhs, 0.0), (0, 1))
        if ring.steps_gram is not None and steps_row is not None:
            steps = ring.steps_gram[rows]
            steps[:, :, head, slots] = torch.where(valid, steps_row, steps[:, :, head, slots])
            steps[:, :, slots, head] = steps[:, :, head, slots]
            ring.steps_gram[rows] = steps
    ring.count[rows] = torch.where(taken, older + 1, 0).to(ring.count.dtype)
    both = torch.stack([r, f.to(r.dtype)], dim=2).double()  # (n, T, 2, D)
    squares = both.square().sum(-1)
    ring.squares[rows] = torch.where(taken[..., None], squares, ring.squares[rows])
    if norm == "max":
        squares = torch.where(squares.isfinite(), both.abs().amax(-1), squares)
    return torch.where(taken[..., None], squares, 0.0)


def difference(f: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """r = f − z in no less than float32, and as the ring keeps it."""
    wide = torch.promote_types(f.dtype, torch.float32)
    r = f.to(wide) - z.to(wide)
    largest = torch.finfo(f.dtype).max
    return r, (r.clamp(-largest, largest) if f.dtype.itemsize == 2 else r).to(f.dtype)  # csrc/scalar.h


def products(
    residuals: Tensor, iterates: Tensor, by_steps: bool, with_steps: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The Gram entries of the newest difference, (n, T, M-1) each: its row, its column, the right-hand side, s·s.

    residuals, iterates (n, M, T, D) float64 by age. with_steps: s·s too.
    """
    y, s = residuals[:, :-1] - residuals[:, 1:], iterates[:, :-1] - iterates[:, 1:]  # (n, M-1, T, D)
    w = s if by_steps else y
    row, column = (w[:, :1] * y).sum(-1).transpose(1, 2), (w * y[:, :1]).sum(-1).transpose(1, 2)
    rhs = (w * residuals[:, :1]).sum(-1).transpose(1, 2)
    return row, column, rhs, (s[:, :1] * s).sum(-1).transpose(1, 2) if with_steps else None


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
    A, steps = ring.gram[rows][:, :, slots][:, :, :, slots], None
    if ring.steps_gram is not None:
        steps = ring.steps_gram[rows][:, :, slots][:, :, :, slots]
    rhs, method = ring.rhs[rows][..., :-1], (ring.kind, ring.coupling, ring.ridge)
    gamma[..., :-1], dropped = coefficients(method, ring.eps, A, steps, rhs, ring.squares[rows], size, mixes)
    return gamma, dropped


def coefficients(
    method: tuple[str, str, float], eps: float, A: Tensor, steps: Tensor | None, b: Tensor, squares: Tensor,
    size: Tensor, mixes: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """γ (n, T, m) by age and how many differences were dropped (n, T), for the `size` (n, T) differences of a block.

    method: kind, coupling and ridge. eps: of the state's dtype.
    A, steps (n, T, m, m), b (n, T, m): Gram matrices and right-hand sides by age; squares (n, T, 2); mixes (n, T) bool.
    """
    (kind, coupling, ridge), (n, T, m) = method, b.shape
    ages = torch.arange(m, device=b.device)[None, None]
    valid = ages < size[..., None]  # (n, T, m)
    if kind == "broyden good" and steps is not None:
        A = A + steps.triu(1)
    if kind == "broyden bad":
        A = A.tril()
    A = torch.where(valid[..., :, None] & valid[..., None, :], A, 0.0)
    b = torch.where(valid, b, 0.0)
    squares = torch.where(mixes[..., None], squares, 0.0)
    if coupling == "causal":
        A, b, squares, size = A.cumsum(1), b.cumsum(1), squares.cumsum(1), torch.where(mixes, size, 0)
    elif coupling == "joint":
        A, b, squares = (x.sum(1, keepdim=True).expand_as(x) for x in (A, b, squares))
        size = torch.where(mixes, size.amax(1, keepdim=True), 0)
    inside = ages < size[..., None]
    A = torch.where(inside[..., :, None] & inside[..., None, :], A, 0.0).reshape(-1, m, m)
    b = torch.where(inside, b, 0.0).reshape(-1, m)
    solver = _solve_positive if kind == "anderson II" else _solve_general
    x, kept = solver(A, b, ridge)
    x, kept = x.reshape(n, T, m), kept.reshape(n, T)
    noise = NOISE * eps * x.abs().amax(-1)
    sound = noise.square() * squares[..., 1] <= squares[..., 0]
    return torch.where(sound[..., None], x, 0.0), torch.where(sound, size - kept, size).to(torch.int32)


def mix(ring: Ring, gamma: Tensor, mode: Tensor, z: Tensor, rows: Tensor, count: Tensor) -> Tensor:
    """The next iterate (n, T, D): f − Σ γ_a (f_a − f_{a+1}), damped; per block as `mode` says. count (n, T)."""
    M, head = ring.slots, ring.head
    ages = [(head - a) % M for a in range(M)]
    return mixed(ring.F[rows][:, ages], ring.R[rows][:, ages], gamma, mode, z, count, ring.damping)


def mixed(F: Tensor, R: Tensor, gamma: Tensor, mode: Tensor, z: Tensor, count: Tensor, damping: float) -> Tensor:
    """`mix` of rows F, R (n, M, T, D) by age."""
    M, undamped = F.shape[1], 1 - damping
    damped = F.double() - undamped * R.double() if undamped else F.double()  # (n, M, T, D); 0 times infinity is NaN
    used = torch.arange(M, device=z.device)[None, None] < (count - 1)[..., None]
    x = damped[:, 0]
    for a in range(M - 1):
        weight = gamma[..., a, None]
        step = weight * (damped[:, a] - damped[:, a + 1])
        x = torch.where(used[..., a, None] & (weight != 0), x - step, x)
    choices = {MIX: x, REJECT: damped[:, 1 % M], PLAIN: damped[:, 0], ACCEPT: F[:, 0].double()}
    out = z.double()
    for what, value in choices.items():
        out = torch.where((mode == what)[..., None], value, out)
    return out.to(z.dtype)


def _solve_positive(A: Tensor, b: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Cholesky on unit diagonals, newest difference first; dependent ones get weight 0. A (K, m, m), b (K, m)."""
    m = b.shape[1]
    diagonal = A.diagonal(dim1=1, dim2=2)
    scale = torch.where(diagonal > 0, diagonal.clamp_min(torch.finfo(A.dtype).tiny).rsqrt(), 0.0)
    A, b = A * scale[:, :, None] * scale[:, None, :], b * scale
    L: list[list[Tensor]] = []  # entry by entry, (K,) each, so that a compiler makes one kernel of it
    y: list[Tensor] = []
    kept: list[Tensor] = []
    for j in range(m):
        row: list[Tensor] = []
        for k in range(j):
            value = (A[:, j, k] - _inner(row, L[k][:k])) / L[k][k]
            row.append(torch.where(kept[k], value, 0.0))
        pivot = A[:, j, j] + ridge - _inner(row, row)
        kept.append((scale[:, j] > 0) & (pivot > PIVOT_CUTOFF))
        diag = torch.where(kept[j], pivot.clamp_min(0).sqrt(), 1.0)
        row = [torch.where(kept[j], entry, 0.0) for entry in row]
        y.append(torch.where(kept[j], b[:, j] - _inner(row, y), 0.0) / diag)
        L.append([*row, diag])
    x: list[Tensor] = []  # of the last unknowns, in order
    for j in range(m - 1, -1, -1):
        below = [L[k][j] for k in range(j + 1, m)]
        x.insert(0, (y[j] - _inner(below, x)) / L[j][j])
    taken = together(kept)
    return torch.where(taken, together(x), 0.0) * scale, taken.sum(-1)


def together(parts: list[Tensor]) -> Tensor:
    """torch.stack(parts, −1), which a compiler makes memory of, as an expression of the place."""
    at, out = torch.arange(len(parts), device=parts[0].device), parts[0][..., None].expand(*parts[0].shape, len(parts))
    for j in range(1, len(parts)):
        out = torch.where(at == j, parts[j][..., None], out)
    return out


def _inner(a: list[Tensor], b: list[Tensor]) -> Tensor | float:
    """Σ a_i b_i of scalars, (K,) each."""
    total: Tensor | float = 0.0
    for u, v in zip(a, b, strict=True):
        total = total + u * v
    return total


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
