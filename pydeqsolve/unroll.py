"""The solver's steps as a differentiable program, for `Unrolled`."""

from __future__ import annotations

import torch
from torch import Tensor

from .iterate import Problem, Solver
from .linearise import Good, evaluate
from .reference import PIVOT_CUTOFF
from .ring import Method
from .solution import Solution


def unroll(problem: Problem, z0: Tensor, solver: Solver, solution: Solution) -> Tensor:
    """z (B, T, D) by as many steps from z0 as the solve of each sample took, with a graph through all of them.

    Refusals and restarts are not replayed; samples without a finite residual keep their z, without a graph.
    """
    good = Good.of(problem, solution.residual.isfinite())
    steps = solution.evaluations if good.rows is None else solution.evaluations[good.rows]
    z = good.take(z0)
    values: list[Tensor] = []
    residuals: list[Tensor] = []
    for k in range(1, int(steps.max()) if steps.numel() else 0):
        running = (steps > k)[:, None, None]
        f = evaluate(problem, z, good.inputs)
        values = [*values, f][-solver.method().memory - 1 :]
        residuals = [*residuals, f - z][-solver.method().memory - 1 :]
        z = torch.where(running, _update(solver.method(), values, residuals), z)
    return good.put(z, solution.z)


def _update(method: Method, values: list[Tensor], residuals: list[Tensor]) -> Tensor:
    """f − Σ γ_a (f_a − f_{a+1}) damped, by age (newest first), differentiable in the weights too."""
    f, r, undamped = values[-1], residuals[-1], 1 - method.damping
    x = f - undamped * r
    if len(values) == 1:
        return x
    F, R = torch.stack(values[::-1], 1), torch.stack(residuals[::-1], 1)  # (B, k, T, D)
    dF, dR = F[:, :-1] - F[:, 1:], R[:, :-1] - R[:, 1:]
    W = dR if method.kind in ("anderson II", "broyden bad") else dF - dR
    y, w, flat = (t.flatten(2).double() for t in (dR, W, r[:, None]))
    A, b = w @ y.transpose(1, 2), (w @ flat.transpose(1, 2))[..., 0]
    if method.kind == "broyden good":
        A = A + (w @ w.transpose(1, 2)).triu(1)
    elif method.kind == "broyden bad":
        A = A.tril()
    tiny = torch.finfo(A.dtype).tiny
    if method.kind == "anderson II":
        left = right = A.diagonal(dim1=1, dim2=2).clamp_min(tiny).rsqrt()
    else:
        left, right = 1 / A.abs().amax(2).clamp_min(tiny), torch.ones_like(b)
    A = left[..., None] * A * right[:, None, :]
    identity = torch.eye(A.shape[1], dtype=A.dtype, device=A.device)
    gamma = right * torch.linalg.solve(A + max(method.ridge, PIVOT_CUTOFF) * identity, (left * b)[..., None])[..., 0]
    return x - torch.einsum("bk,bktd->btd", gamma.to(f.dtype), dF - undamped * dR)
