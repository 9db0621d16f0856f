"""Systems u = g + A u for tests of the adjoint's solvers."""

import problems
import torch

from pydeqsolve import GMRES
from pydeqsolve.derivative.adjoint import AdjointSolve
from pydeqsolve.derivative.linearise import Good
from pydeqsolve.solution import Recorder
from pydeqsolve.step import native

f64 = torch.float64


def without_native(fn, *given, **keywords):
    """fn(...) by the reference in PyTorch."""
    kept, native._native = native._native, None
    try:
        return fn(*given, **keywords)
    finally:
        native._native = kept


def matrices(B, N, dtype, radius=0.9, seed=0, normal=True):
    """A (B, N, N) of spectral radius about `radius`; else as far from normal as a triangle."""
    draw = torch.randn(B, N, N, dtype=f64, generator=problems.generator(seed)) * radius / N**0.5
    if not normal:
        draw = 2 * draw.triu(1) + radius * torch.eye(N, dtype=f64)
    return draw.to(dtype)


def rhs(B, N, dtype, seed=1):
    return torch.randn(B, N, dtype=f64, generator=problems.generator(seed)).to(dtype)


def by(A):
    """u ↦ A u, every row as if alone."""
    return lambda u: (A @ u[..., None])[..., 0]


def diagonal(N, dtype):
    rate = torch.linspace(-0.7, 0.9, N, dtype=f64).to(dtype)
    return lambda u: u * rate


def adjoint(products, g, mask, stop, follows, eps):
    """`AdjointSolve` for g (n, 1, D): u and how it went."""
    recorder = Recorder()
    how = AdjointSolve(GMRES(), stop, follows, "phantom" if mask is None else "warn", recorder, eps)
    whole = mask is None
    mask = torch.ones(len(g), dtype=torch.bool) if mask is None else mask
    with torch.no_grad():
        u = how(lambda u: products(u[:, 0])[:, None].to(u.dtype), g, Good(mask, None, [], whole))
    return u, recorder.last
