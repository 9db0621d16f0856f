"""The solver's steps as a differentiable program, for `Unrolled`."""

from __future__ import annotations

import warnings
from functools import partial

import torch
from torch import Tensor

from ..loop.iterate import Outcome
from ..problem import Problem
from ..shards import Whole
from ..step.reference import PIVOT_CUTOFF
from ..step.ring import Method
from .linearise import Good, Replace, evaluate, of_finite

ELSEWHERE = 1e-3  # relative to the largest entry of z


def unroll(problem: Problem, z0: Tensor, outcome: Outcome) -> Tensor:
    """z (B, T, D) of the outcome, with the graph of as many steps from z0 as the solve of each sample took.

    Refusals and restarts are not replayed: a sample whose replay does not end at its z keeps that, without a graph.
    """
    good, replayed = of_finite(
        problem,
        outcome.finite,
        lambda good: _replay(problem, good, good.take(z0), outcome.solver.method(), outcome),
    )
    z = good.take(outcome.z).detach()
    apart, size = (x.double().flatten(1).abs().amax(1) for x in (replayed.detach() - z, z))
    allowed = max(ELSEWHERE, 8 * torch.finfo(z.dtype).eps) * problem.shards.largest(size)
    elsewhere = good.mask_taken() & ~(problem.shards.largest(apart) <= allowed)
    same = good.without(elsewhere)
    if not bool((same | ~outcome.finite).all()):
        warnings.warn(
            "Unrolled: the replay of some samples does not end at their solution (steps were refused, or it is not "
            "finite), so they have no gradient: use gradient=Implicit()",
            RuntimeWarning,
            stacklevel=2,
        )
    if not bool(same.any()):
        return outcome.z
    return torch.where(same[:, None, None], good.put(Replace.apply(replayed, z), outcome.z), outcome.z.detach())


def _replay(problem: Problem, good: Good, z: Tensor, method: Method, outcome: Outcome) -> Tensor:
    """The last iterates (n, T, D) of the steps from z (n, T, D)."""
    steps = outcome.evaluations if good.rows is None else outcome.evaluations[good.rows]
    steps = torch.where(good.mask_taken(), steps, 0)
    values: list[Tensor] = []
    residuals: list[Tensor] = []
    for k in range(1, int(steps.max()) if steps.numel() else 0):
        running = (steps > k)[:, None, None]
        f = problem.shards.attempt(partial(evaluate, problem, z, good.inputs), z.clone)
        values = [*values, f][-method.memory - 1 :]
        residuals = [*residuals, f - z][-method.memory - 1 :]
        z = torch.where(running, _update(method, values, residuals, problem.shards), z)
    return z


def _update(method: Method, values: list[Tensor], residuals: list[Tensor], shards: Whole) -> Tensor:
    """f − Σ γ_a (f_a − f_{a+1}) damped, by age (newest first), differentiable in the weights too."""
    f, r, undamped = values[-1], residuals[-1], 1 - method.damping
    x = f - undamped * r
    if len(values) == 1:
        return x
    F, R = torch.stack(values[::-1], 1), torch.stack(residuals[::-1], 1)  # (B, k, T, D)
    dF, dR = F[:, :-1] - F[:, 1:], R[:, :-1] - R[:, 1:]
    W = dR if method.kind in ("anderson II", "broyden bad") else dF - dR
    y, w, flat = (t.flatten(2).double() for t in (dR, W, r[:, None]))
    products = [w @ x.transpose(1, 2) for x in ((y, flat, w) if method.kind == "broyden good" else (y, flat))]
    A, b, *steps = shards.summed(products)
    b = b[..., 0]
    if steps:
        A = A + steps[0].triu(1)
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
