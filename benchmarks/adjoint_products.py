"""Products of the adjoint: with the samples that go on alone, and from a first guess, on layers z = tanh(z Wᵀ + x).

    python benchmarks/adjoint_products.py

W is ρ times an orthogonal matrix; float32, one thread. First, a mixed batch and an even one: vector-Jacobian products
times samples, evaluations in the backward pass, and its processor time (median), with all samples in every product and
as it is. Then calls that GMRES takes cold, and after a first guess u of best scale, whose own product counts: the u of
the last backward pass, as inputs or weights move, and the transpose of the inverse in the forward's history (Ramzi et
al. 2022).
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor

from pydeqsolve import GMRES, Implicit, Stop, build_info, solve
from pydeqsolve.derivative import narrowed

SHAPES = ((32, 64, 0.9, 1e-4), (64, 256, 0.9, 1e-4), (32, 64, 0.97, 1e-6), (16, 256, 0.95, 1e-6), (16, 256, 1.2, 1e-6))
NEVER = 10**12


class Counted(torch.autograd.Function):
    """The identity; its backward counts the samples."""

    rows = 0

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        Counted.rows += len(grads[0])
        return grads[0]


def layer(B: int, D: int, rho: float) -> tuple[Tensor, Tensor, Tensor]:
    """W (D, D), x and y (B, D)."""
    draw = torch.Generator().manual_seed(0)
    W = rho * torch.linalg.qr(torch.randn(D, D, generator=draw))[0]
    return W, torch.randn(B, D, generator=draw), torch.randn(B, D, generator=draw)


def backward(W: Tensor, x: Tensor, least: int, counted: bool) -> tuple[float, int, int, Tensor]:
    """Milliseconds, products and evaluations times samples, and products of each sample, of a backward pass."""
    kept, narrowed.LEAST = narrowed.LEAST, least
    seen = 0

    def fn(z: Tensor, x: Tensor) -> Tensor:
        nonlocal seen
        seen += len(z)
        return torch.tanh((Counted.apply(z) if counted else z) @ W.T + x)

    solution = solve(fn, torch.zeros_like(x), (x,), stop=Stop(1e-4, max_steps=400), gradient=Implicit())
    loss, before, Counted.rows = solution.z.square().sum(), seen, 0
    start = time.process_time()
    torch.autograd.grad(loss, W)
    spent = 1e3 * (time.process_time() - start)
    narrowed.LEAST = kept
    assert solution.adjoint is not None
    return spent, Counted.rows, seen - before, solution.adjoint.evaluations


def print_narrowed() -> None:
    for B, D, rho, mixed in ((64, 256, 0.97, True), (256, 1024, 0.97, True), (64, 256, 0.9, False)):
        W, x, _ = layer(B, D, rho)
        W.requires_grad_()
        x = x * torch.logspace(1, -1.5, B)[:, None] if mixed else x
        _, whole, _, each = backward(W, x, NEVER, True)
        _, rows, seen, _ = backward(W, x, narrowed.LEAST, True)
        spent = [[backward(W, x, least, False)[0] for least in (NEVER, narrowed.LEAST)] for _ in range(5)]
        before, after = (statistics.median(times) for times in zip(*spent, strict=True))
        print(
            f"({B}, {D}) ρ {rho} {'mixed' if mixed else 'even'}: a sample takes {int(each.min())} … {int(each.max())} "
            f"products; all together {whole}, narrowed {rows} and {seen} evaluations; {before:.1f} ms, {after:.1f} ms "
            f"({after / before:.2f})"
        )


def products(W: Tensor, z: Tensor, g: Tensor, rtol: float, guess: Tensor | None = None) -> tuple[int, Tensor]:
    """Calls of GMRES for u = g + Jᵀ u at z to rtol, and u; from a guess (B, D) of best scale where one is given."""
    slope, calls = 1 - z * z, 0

    def product(u: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return (u * slope) @ W

    atol = rtol * g.double().norm(dim=1)
    start = torch.zeros_like(g)
    if guess is not None:
        image = guess - product(guess)
        scale = (image * g).sum(1, keepdim=True) / image.square().sum(1, keepdim=True)
        start, g = scale * guess, g - scale * image
    u, _ = GMRES().solve(product, g, Stop(0.0, atol=atol, max_steps=500))
    return calls, start + u


def print_last(B: int, D: int, rho: float, rtol: float, moves: str, by: float) -> None:
    W, x, y = layer(B, D, rho)
    W.requires_grad_()
    adam, draw = torch.optim.Adam([W], lr=by), torch.Generator().manual_seed(5)
    z, last, cold, warm = torch.zeros_like(x), None, 0, 0
    for call in range(12):
        with torch.no_grad():
            z = solve(lambda z, x: torch.tanh(z @ W.T + x), z, (x,), stop=Stop(rtol, max_steps=400)).z
            g = 2 * (z - y) / z.numel()
            taken, u = products(W.detach(), z, g, rtol)
            if call > 1:
                cold, warm = cold + taken, warm + products(W.detach(), z, g, rtol, last)[0]
        last = u
        if moves == "inputs":
            x = x + by * torch.randn(x.shape, generator=draw)
        else:
            W.grad = (u * (1 - z * z)).T @ z
            adam.step()
    print(f"({B}, {D}) ρ {rho} to {rtol:g}, {moves} by {by:g}: {cold / 10:.1f} cold, {warm / 10:.1f} from the last u "
          f"({warm / cold - 1:+.0%})")  # fmt: skip


def print_history(B: int, D: int, rho: float, rtol: float, memory: int) -> None:
    W, x, y = layer(B, D, rho)
    z, states, values = torch.zeros_like(x), [], []
    while True:  # Anderson, by hand, for its history
        f = torch.tanh(z @ W.T + x)
        states, values = [*states, z][-memory - 1 :], [*values, f][-memory - 1 :]
        if bool(((f - z).norm(dim=1) <= rtol * f.norm(dim=1)).all()):
            break
        z = f
        if len(states) > 1:
            F, Z = (torch.stack(rows, 1).double().diff(dim=1) for rows in (values, states))
            R = F - Z
            gamma = torch.linalg.lstsq(R.mT, (values[-1] - states[-1]).double()[..., None]).solution
            z = (f - (F.mT @ gamma)[..., 0]).float()
    g = 2 * (f - y) / f.numel()
    inverse = torch.linalg.pinv(R @ R.mT, rcond=1e-10) @ (F @ g.double()[..., None])
    guess = (g.double() - (R.mT @ inverse)[..., 0]).float()
    print(f"({B}, {D}) ρ {rho} to {rtol:g}, history of {memory}: {products(W, f, g, rtol)[0]} cold, "
          f"{products(W, f, g, rtol, guess)[0]} from it")  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    print({name: build_info()[name] for name in ("version", "torch", "cpu_isa")})
    print_narrowed()
    for shape in SHAPES:
        for moves, by in (("inputs", 0.03), ("inputs", 0.3), ("Adam", 1e-3), ("Adam", 1e-2)):
            print_last(*shape, moves, by)
        for memory in (5, 20):
            print_history(*shape, memory)


if __name__ == "__main__":
    main()
