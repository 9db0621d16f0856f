"""Systems u = g + A u for tests of the adjoint's solvers."""

import math

import problems
import torch
from hypothesis import strategies as st

from pydeqsolve import GMRES, Stop
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


def adjoint(products, g, mask, stop, follows, eps, solver=GMRES()):
    """`AdjointSolve` for g (n, 1, D): u and how it went."""
    recorder = Recorder()
    how = AdjointSolve(solver, stop, follows, "phantom" if mask is None else "warn", recorder, eps)
    whole = mask is None
    mask = torch.ones(len(g), dtype=torch.bool) if mask is None else mask
    with torch.no_grad():
        u = how(lambda u: products(u[:, 0])[:, None].to(u.dtype), g, Good(mask, None, [], whole))
    return u, recorder.last


JUDGED = {
    "dtype": st.sampled_from([torch.bfloat16, torch.float16, torch.float32, f64]),
    "rtol": st.sampled_from([1e-3, 1e-7, 0.0]),
    "eps": st.sampled_from([0.0, 1e-3, 1e-8]),
    "follows": st.booleans(),
    "radius": st.sampled_from([0.5, 0.99, 1.0, 1.5]),
    "exponent": st.integers(-20, 20),
    "seed": st.integers(0, 3),
    "budget": st.sampled_from([20, 100]),
}


def judged(dtype, rtol, eps, follows, radius, exponent, seed, budget, each=False):
    """Arguments of `adjoint`: four systems, one singular, with a right side or a sample that is bad for some seeds.

    each: the tolerance is a tensor, one for each.
    """
    N, B = 9, 4
    A = matrices(B, N, f64, radius, seed)
    A[0] = torch.diag(torch.linspace(0.1, radius, N, dtype=f64))  # radius 1: singular
    g = (rhs(B, N, f64, seed) * 2.0**exponent).to(dtype)[:, None]
    g[1] = math.inf if seed == 1 else 0.0 if seed == 2 else g[1]
    mask = torch.tensor([True, True, seed != 3, True])

    def products(u):
        return by(A)(u.double()).to(torch.promote_types(u.dtype, torch.float32))

    stop = Stop(torch.full((B,), rtol, dtype=f64) if each else rtol, max_steps=budget)
    return products, g, None if bool(mask.all()) else mask, stop, follows, eps
