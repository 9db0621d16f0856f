"""The solver's steps as a differentiable program, for `Unrolled`."""

from __future__ import annotations

import torch
from torch import Tensor

from .gradient import evaluate
from .iterate import Problem, Solver
from .reference import PIVOT_CUTOFF
from .stop import Stop


def unroll(problem: Problem, z0: Tensor, solver: Solver, stop: Stop, steps: Tensor) -> Tensor:
    """z (B, T, D) after steps (B,) − 1 updates from z0 with full history, with a graph through all of them.

    The samples take as many steps as the plain solve took; refusals and restarts are not replayed.
    """
    method = solver.method()
    z, out = z0, z0
    values: list[Tensor] = []
    residuals: list[Tensor] = []
    for k in range(1, int(steps.max()) + 1 if steps.numel() else 0):
        running = (steps > k)[:, None, None]
        f = evaluate(problem, z, list(problem.inputs))
        values = [*values, f][-method.memory - 1 :]
        residuals = [*residuals, f - z][-method.memory - 1 :]
        z = torch.where(running, _update(method.kind, method.damping, method.ridge, values, residuals), z)
        out = z
    return out


def _update(kind: str, damping: float, ridge: float, values: list[Tensor], residuals: list[Tensor]) -> Tensor:
    """f − Σ γ_a (f_a − f_{a+1}) damped, by age (newest first), differentiable in the weights too."""
    f, r = values[-1], residuals[-1]
    x = f - (1 - damping) * r
    if len(values) == 1:
        return x
    F, R = torch.stack(values[::-1], 1), torch.stack(residuals[::-1], 1)  # (B, k, T, D)
    dF, dR = F[:, :-1] - F[:, 1:], R[:, :-1] - R[:, 1:]
    W = dR if kind in ("anderson II", "broyden bad") else dF - dR
    y, w, flat = (t.flatten(2).double() for t in (dR, W, r[:, None]))
    A = w @ y.transpose(1, 2)
    if kind == "broyden good":
        A = A + (w @ w.transpose(1, 2)).triu(1)
    elif kind == "broyden bad":
        A = A.tril()
    b = (w @ flat.transpose(1, 2))[..., 0]
    rows = A.abs().amax(2).clamp_min(torch.finfo(A.dtype).tiny).detach()
    A, b = A / rows[..., None], b / rows
    identity = torch.eye(A.shape[1], dtype=A.dtype, device=A.device)
    gamma = torch.linalg.solve(A + max(ridge, PIVOT_CUTOFF) * identity, b[..., None])[..., 0].to(f.dtype)
    mixed = dF - (1 - damping) * dR
    return x - torch.einsum("bk,bktd->btd", gamma, mixed)
