"""The adjoint u = g + Jᵀu as operators of a graph: a matrix solve of few unknowns, and GMRES as one `while_loop`.

The formulas are those of `gmres` and `krylov`. Nothing depends on data but the loop's end: finished samples are frozen,
not left out, and every tensor has its last size from the start. What the loop reads goes in by name, `saved`, for the
graph that it is part of is written down already.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._higher_order_ops.while_loop import while_loop_op

from ..solution import Adjoint, Status
from .adjoint import AdjointSolve
from .linear import System, blurred, lengths

DENSE = 64  # unknowns up to which all products are made at once
Saved = Sequence[Any]  # tensors, and sizes


class Bounds(NamedTuple):
    """What is asked for, as tensors of the graph."""

    rtol: Tensor  # (B,)
    atol: Tensor  # (B,)
    budget: Tensor  # () int64: calls of the product


@dataclass(frozen=True, eq=False)
class LoopedSystem:
    """rhs + A u = u for B samples, (B, N) each, scaled as in `linear.System`, by operators of a graph.

    product(u, saved) is A u. dtype: that in which u is returned; it is measured as it comes back from there.
    """

    product: Callable[[Tensor, Saved], Tensor]
    dtype: torch.dtype
    eps: float
    restart: int

    def measured(self, u: Tensor, rhs: Tensor, exponent: Tensor, saved: Saved) -> tuple[Tensor, Tensor, Tensor]:
        """u (B, N) as its dtype holds it, its residual (B, N), and how large that is known to be, (B,)."""
        zero = torch.zeros_like(rhs[:, 0], dtype=torch.float64)
        system = System(lambda u: self.product(u, saved), rhs, zero, zero, exponent)
        u = system.lowered(system.raised(u).to(self.dtype).to(u.dtype))
        residual = system.residual(u)
        return u, residual, blurred(lengths(residual), u, self.eps)

    def solve(self, system: System, budget: Tensor, saved: Saved, dense: bool) -> tuple[Tensor, Adjoint]:
        """u (B, N) of least residual, and status, residual and products (B,) each; budget () calls of `product`."""
        rhs = system.rhs
        u, r, best, calls, used = self._first(system, saved, dense)
        stalled = torch.zeros_like(used, dtype=torch.bool)
        state = (calls, used, u, r, best, stalled)
        fixed = (rhs, system.goal, system.exponent, budget)
        n = len(state)

        def going(*given: Any) -> Tensor:
            calls, _, _, _, best, stalled = given[:n]
            _, goal, _, budget = given[n : n + 4]
            return (calls + 2 <= budget) & _active(best, goal, stalled).any()

        def cycle(*given: Any) -> tuple[Tensor, ...]:
            return self._cycle(given[:n], given[n : n + 4], given[n + 4 :])

        calls, used, u, r, best, stalled = _loop(going, cycle, state, (*fixed, *saved))
        status = torch.where(stalled, int(Status.STALLED), int(Status.MAX_STEPS))
        status = torch.where(best <= system.goal, int(Status.CONVERGED), status)
        return u, Adjoint(torch.where(best.isfinite(), status, int(Status.NONFINITE)), best, used)

    def _first(self, system: System, saved: Saved, dense: bool) -> tuple[Tensor, ...]:
        """A first u, its residual (B, N) and the size of that, calls, and products (B,): by a matrix, or zero."""
        rhs, (B, N) = system.rhs, system.rhs.shape
        none = torch.zeros(B, dtype=torch.int64, device=rhs.device)
        best = lengths(rhs)
        if not dense:
            return torch.zeros_like(rhs), rhs.clone(), best, none.new_zeros(()), none
        identity = torch.eye(N, dtype=rhs.dtype, device=rhs.device)
        columns = torch.func.vmap(lambda e: self.product(e.expand(B, N), saved))(identity)
        matrix = identity.double() - columns.permute(1, 2, 0).double()
        u = torch.linalg.solve_ex(matrix, rhs.double())[0].to(rhs.dtype)
        u = torch.where(u.isfinite().all(1)[:, None], u, 0.0)
        u, r, size = self.measured(u, rhs, system.exponent, saved)
        better = size < best
        rows = better[:, None]
        first = torch.where(rows, u, 0.0), torch.where(rows, r, rhs), torch.where(better, size, best)
        return *first, none.new_full((), 2), none + N + 1

    def _cycle(self, state: tuple[Tensor, ...], fixed: tuple[Tensor, ...], saved: Saved) -> tuple[Tensor, ...]:
        """One cycle of GMRES from u, and the true residual where it leads."""
        calls, used, u, r, best, stalled = state
        rhs, goal, exponent, budget = fixed
        active = _active(best, goal, stalled)
        d, columns, made = self._correction(r, active, goal, budget - calls, saved)
        candidate, residual, size = self.measured(u + d, rhs, exponent, saved)
        doubtful = self.eps * lengths(candidate) > 0.5 * size
        enough = torch.where(doubtful, 0.5 * best, 0.999 * best)
        better = active & ((size < enough) | ((size < best) & (size <= goal)))
        rows = better[:, None]
        lost = torch.where(active & ~size.isfinite(), torch.inf, best)
        return (
            calls + made + 1, used + torch.where(active, columns + 1, 0), torch.where(rows, candidate, u),
            torch.where(rows, residual, r), torch.where(better, size, lost), stalled | (active & ~better),
        )  # fmt: skip

    def _correction(
        self, r: Tensor, active: Tensor, goal: Tensor, budget: Tensor, saved: Saved
    ) -> tuple[Tensor, Tensor, Tensor]:
        """d (B, N) of least ‖r − (I − A) d‖ over a Krylov space, its dimension (B,), and the calls made."""
        (B, N), device = r.shape, r.device
        m = min(self.restart, N)
        beta = lengths(r)
        beta = torch.where(active & (beta > 0), beta, 1.0)
        first = torch.arange(m + 1, device=device) == 0
        V = torch.where(first[:, None], (r / beta[:, None].to(r.dtype))[:, None], 0.0)  # (B, m + 1, N)
        # Columns that are never taken stand apart from all others, with the coordinate 0.
        H = torch.diag_embed(torch.ones(B, m, dtype=torch.float64, device=device), -1)[..., :-1]  # (B, m + 1, m)
        G = torch.where(first, torch.ones_like(beta)[:, None], 0.0)  # (B, m + 1), Gᵀ H = 0
        j = torch.zeros((), dtype=torch.int64, device=device)
        state = (j, V, H, G, active.clone(), torch.zeros_like(active, dtype=torch.int64))

        def going(j: Tensor, *given: Any) -> Tensor:
            return (j < m) & (j + 2 <= given[7]) & given[3].any()

        def step(*given: Any) -> tuple[Tensor, ...]:
            return self._arnoldi(given[:6], given[6], given[7], given[9:])

        j, V, H, G, _, columns = _loop(going, step, state, (beta, goal, budget, *saved))
        y = _least_squares(H, beta, self.eps)
        d = torch.bmm(y[:, None].to(V.dtype), V[:, :m])[:, 0]
        return torch.where(active[:, None], d, 0.0), columns, j

    def _arnoldi(self, state: tuple[Tensor, ...], beta: Tensor, goal: Tensor, saved: Saved) -> tuple[Tensor, ...]:
        """One more vector, and column of H, for the samples that are open (B,)."""
        j, V, H, G, open_, columns = state
        v = V.index_select(1, j[None])[:, 0]
        w = v - self.product(v, saved)
        h = torch.bmm(V, w[..., None])
        w = w - torch.bmm(h.transpose(1, 2), V)[:, 0]
        again = torch.bmm(V, w[..., None])
        w = w - torch.bmm(again.transpose(1, 2), V)[:, 0]
        h = h[..., 0].double() + again[..., 0]
        length = lengths(w)
        size = 1 + (h.square().sum(1) + length.square()).sqrt()  # w is the difference of v, of length 1, and A v
        new = open_ & size.isfinite()
        ends = length <= 4 * self.eps * size
        safe = torch.where(new & ~ends, length, 1.0)
        at = torch.arange(G.shape[1], device=G.device) == j + 1
        unit = torch.where((new & ~ends)[:, None], w / safe[:, None].to(w.dtype), 0.0)
        V = torch.where(at[:, None], unit[:, None], V)
        column = torch.where(at, length[:, None], h)
        H = torch.where((at[1:] & new[:, None])[:, None], column[..., None], H)
        G = torch.where(at & new[:, None], -((G * h).sum(1) / safe)[:, None], G)
        estimate = beta / G.square().sum(1).sqrt()
        return j + 1, V, H, G, new & ~ends & (estimate > 0.9 * goal), columns + new


def _active(best: Tensor, goal: Tensor, stalled: Tensor) -> Tensor:
    """(B,) bool: what is still to be solved."""
    return (best > goal) & best.isfinite() & ~stalled


def _least_squares(H: Tensor, beta: Tensor, eps: float) -> Tensor:
    """y (B, m) of least ‖β e_1 − H y‖ over the columns before the first that is rounding beyond those before it.

    Where that makes y huge it has to gain by it what its rounding costs, or those before the first that is nearly
    spanned have to do.
    """
    Q, R = torch.linalg.qr(H)
    diagonal, sizes = R.diagonal(dim1=1, dim2=2).abs(), 1 + H.square().sum(1).sqrt()
    rhs = (Q[:, 0] * beta[:, None])[..., None]
    start = beta[:, None] * (torch.arange(H.shape[1], device=H.device) == 0)

    def without(share: float) -> tuple[Tensor, Tensor]:
        kept = (diagonal > share * sizes).long().cumprod(1) > 0
        y = torch.linalg.solve_triangular(torch.where(torch.diag_embed(~kept), 1e300, R), rhs, upper=True)
        left = start - torch.bmm(H, y)[..., 0]
        return y[..., 0], torch.maximum(lengths(left), eps * lengths(y[..., 0]))

    (y, size), (careful, other) = without(4 * eps), without(eps**0.5)
    return torch.where((size < 0.5 * other)[:, None], y, careful)


def _loop(
    going: Callable[..., Tensor], body: Callable[..., tuple[Tensor, ...]], state: tuple[Tensor, ...], fixed: Saved
) -> tuple[Tensor, ...]:
    def apart(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:  # in memory of their own, of the same strides always
        return tuple(x.clone(memory_format=torch.contiguous_format) for x in tensors)

    operator: Any = while_loop_op
    found: tuple[Tensor, ...] = operator(going, lambda *given: apart(body(*given)), apart(state), tuple(fixed))
    return found


def solved(
    how: AdjointSolve, product: Callable[[Tensor, Saved], Tensor], saved: Saved, g: Tensor, good: Tensor,
    bounds: Bounds, plain: bool,
) -> tuple[Tensor, Adjoint]:  # fmt: skip
    """u (B, T, D) of u = g + product(u), zero but for the samples that are `good` (B,), as `AdjointSolve`.

    plain: vmap knows what product is made of.
    """
    wide = torch.float64 if g.dtype == torch.float64 else torch.float32
    g = torch.where(good[:, None, None], g, 0.0)
    finite = g.isfinite().flatten(1).all(1)
    rhs = torch.where(finite[:, None, None], g, 0.0).to(wide).flatten(1)

    def flat(u: Tensor, saved: Saved) -> Tensor:
        return product(u.reshape(g.shape).to(g.dtype).contiguous(), saved).to(wide).flatten(1)

    system = System.of(lambda u: flat(u, saved), rhs, bounds)
    eps = max(how.eps, torch.finfo(g.dtype).eps)
    pursued = replace(system, goal=torch.maximum(system.goal, eps * system.norm))
    looped = LoopedSystem(flat, g.dtype, eps, how.solver.restart)
    u, outcome = looped.solve(pursued, bounds.budget, saved, plain and rhs.shape[1] <= DENSE)
    status, residual = how._judge(system, u, outcome.status, outcome.residual, eps)
    u = system.raised(u).to(g.dtype)
    lost = ~finite | ~(outcome.residual < torch.inf)
    status = torch.where(lost, int(Status.NONFINITE), status)
    residual = torch.where(lost, torch.inf, residual)
    u = torch.where((lost & u.isfinite().all(1))[:, None], torch.nan, u).reshape(g.shape)
    if how.on_failure == "phantom":
        u = torch.where((status != 0)[:, None, None], g, u)
    u = torch.where(good[:, None, None], u, 0.0).contiguous()
    status = torch.where(good, status, int(Status.NONFINITE))
    return u, Adjoint(status, torch.where(good, residual, torch.inf), outcome.evaluations)
