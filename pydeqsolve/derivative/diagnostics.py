"""The Jacobian at a solution: its spectral radius, and a penalty on its size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import check_count
from ..layout import Layout
from ..problem import Problem
from .linearise import evaluate


def _problem(fn: Callable[..., Any], z: Any, inputs: Sequence[Tensor]) -> tuple[Problem, Tensor]:
    layout = Layout.of(z, by_blocks=False)
    return Problem(fn, tuple(inputs), layout, compact=False), layout.pack(z, "z")


def _transposed(f: Tensor, at: Tensor, u: Tensor, create_graph: bool) -> Tensor:
    """Jᵀu; zero when f does not depend on its argument."""
    if not f.requires_grad:
        return torch.zeros_like(at)
    (product,) = torch.autograd.grad(f, at, u, retain_graph=True, create_graph=create_graph, allow_unused=True)
    return torch.zeros_like(at) if product is None else product


def spectral_radius(
    fn: Callable[..., Any],
    z: Any,
    inputs: Sequence[Tensor] = (),
    *,
    steps: int = 50,
    generator: torch.Generator | None = None,
) -> Tensor:
    """|λ|max of J = ∂fn/∂z at z per sample, (B,) float64, by power iteration on Jᵀ.

    The estimate is the geometric mean growth over the last half of `steps` products, which also settles for complex
    pairs. Below 1, Picard converges near z. Costs one evaluation and `steps` vector-Jacobian products; no graph.
    """
    steps = check_count("steps", steps, least=2)
    problem, flat = _problem(fn, z, inputs)
    with torch.enable_grad():
        at = flat.detach().clone().requires_grad_()
        f = evaluate(problem, at, list(inputs))
    u = torch.randn(flat.shape, dtype=flat.dtype, device=flat.device, generator=generator)
    growth = torch.zeros(flat.shape[0], dtype=torch.float64, device=flat.device)
    for k in range(steps + 1):
        norm = torch.linalg.vector_norm(u.flatten(1).double(), dim=1)
        if k > steps // 2:
            growth += norm.log()
        u = u / torch.where(norm > 0, norm, 1.0).to(u.dtype)[:, None, None]
        if k < steps:
            u = _transposed(f, at, u, create_graph=False)
    return (growth / (steps - steps // 2)).exp()


def jacobian_penalty(
    fn: Callable[..., Any],
    z: Any,
    inputs: Sequence[Tensor] = (),
    probes: int = 1,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """‖J‖²_F / (entries of z), estimated by Hutchinson's method: a scalar, differentiable in the parameters of fn.

    The mean over `probes` Gaussian ε of ‖Jᵀε‖² (Bai, Koltun & Kolter 2021, Eq. 7). z is taken as a constant.
    """
    probes = check_count("probes", probes, least=1)
    problem, flat = _problem(fn, z, inputs)
    with torch.enable_grad():
        at = flat.detach().clone().requires_grad_()
        f = evaluate(problem, at, list(inputs))
        total = torch.zeros((), dtype=flat.dtype, device=flat.device)
        for _ in range(probes):
            probe = torch.randn(flat.shape, dtype=flat.dtype, device=flat.device, generator=generator)
            total = total + _transposed(f, at, probe, create_graph=True).square().sum()
    return total / max(1, probes * flat.numel())
