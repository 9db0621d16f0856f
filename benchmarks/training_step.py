"""One training step of a deep equilibrium layer: forward, backward, gradients of its parameters; ours beside others.

    pip install torchdeq==0.1.0
    python benchmarks/training_step.py [--shapes 1x64 32x64 64x256 256x1024] [--repeats N] [--compiled] [--jax FILE]
                                       [--json FILE]

The layer is z = tanh(z Wᵀ + x), W .9 times an orthogonal matrix, the loss a mean of squares, float32, on one thread.
Every column solves to 1e-4, relative, both ways, and keeps its defaults otherwise; ours are named by adjoint solver.
Processor time, the median over repeats in which all columns take turns; the error of the gradient of W against plain
iteration to the end in float64. "alone" is what our default must do anyhow: as many evaluations without a graph as its
forward took, one with, as many vector-Jacobian products as its backward took, and one for W. "unrolled" is 40 plain
steps with autograd. --compiled adds our default under torch.compile(fullgraph=True), which takes some ten seconds to
compile for each shape. --jax names the output of `jax_training_step.py`, from an environment of its own. Small real
models: `training_models.py`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pydeqsolve import Anderson, Broyden, Implicit, Neumann, Phantom, Solution, Stop, build_info, solve

RTOL, UNROLLED, RHO = 1e-4, 40, 0.9


@dataclass(frozen=True, eq=False)
class Layer:
    """z = tanh(z Wᵀ + x) and the loss mean (z − y)²."""

    W: Tensor  # (D, D), requires a gradient
    x: Tensor  # (B, D)
    y: Tensor  # (B, D)

    @staticmethod
    def of(B: int, D: int) -> Layer:
        draw = torch.Generator().manual_seed(0)
        Q = torch.linalg.qr(torch.randn(D, D, generator=draw))[0]
        x, y = (torch.randn(B, D, generator=draw) for _ in range(2))
        return Layer((RHO * Q).requires_grad_(), x, y)

    def cell(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ self.W.T + x)

    def loss(self, z: Tensor) -> Tensor:
        return (z - self.y).square().mean()

    def truth(self) -> Tensor:
        """The gradient of W, (D, D) float64, by plain iteration."""
        W, x, y = (t.detach().double() for t in (self.W, self.x, self.y))
        z, change = torch.zeros_like(x), 1.0
        while change > 1e-13:
            before, z = z, torch.tanh(z @ W.T + x)
            change = float((z - before).abs().max())
        g, slope = 2 * (z - y) / z.numel(), 1 - z * z
        u, change = g, 1.0
        while change > 1e-13:
            before, u = u, g + (u * slope) @ W
            change = float((u - before).abs().max() / g.abs().max())
        return (u * slope).T @ z


def ours(layer: Layer, gradient: Any) -> tuple[Tensor, Solution]:
    solution = solve(layer.cell, torch.zeros_like(layer.x), (layer.x,), stop=Stop(rtol=RTOL), gradient=gradient)
    return torch.autograd.grad(layer.loss(solution.z), layer.W)[0], solution


def unrolled(layer: Layer) -> Tensor:
    z = torch.zeros_like(layer.x)
    for _ in range(UNROLLED):
        z = layer.cell(z, layer.x)
    return torch.autograd.grad(layer.loss(z), layer.W)[0]


def alone(layer: Layer, evaluations: int, products: int) -> Tensor:
    z = torch.zeros_like(layer.x)
    with torch.no_grad():
        for _ in range(evaluations):
            z = layer.cell(z, layer.x)
    z = z.requires_grad_()
    f = layer.cell(z, layer.x)
    (g,) = torch.autograd.grad(layer.loss(z), z)
    u = g
    for _ in range(products):
        (u,) = torch.autograd.grad(f, z, u, retain_graph=True)
    return torch.autograd.grad(f, layer.W, u)[0]


def of_torchdeq(torchdeq: Any, backward: str) -> Callable[[Layer], Tensor]:
    core = {"f_solver": "anderson", "b_solver": backward, "ift": True, "f_tol": RTOL, "b_tol": RTOL,
            "f_max_iter": 100, "b_max_iter": 100, "f_stop_mode": "rel", "b_stop_mode": "rel"}  # fmt: skip
    deq = torchdeq.get_deq(**core)

    def step(layer: Layer) -> Tensor:
        z = deq(lambda z: layer.cell(z, layer.x), torch.zeros_like(layer.x))[0][-1]
        return torch.autograd.grad(layer.loss(z), layer.W)[0]

    return step


def compiled(layer: Layer) -> Callable[[], Tensor]:
    """Our default, forward and backward in one graph each."""

    def loss(W: Tensor, x: Tensor, y: Tensor) -> Tensor:
        own = Layer(W, x, y)
        return own.loss(solve(own.cell, torch.zeros_like(x), (x,), stop=Stop(rtol=RTOL)).z)

    torch.compiler.reset()
    graph = torch.compile(loss, fullgraph=True, dynamic=False)
    return lambda: torch.autograd.grad(graph(layer.W, layer.x, layer.y), layer.W)[0]


def columns(layer: Layer, with_compiled: bool) -> dict[str, Callable[[], Tensor]]:
    solution = ours(layer, Implicit())[1]
    assert solution.adjoint is not None
    counts = int(solution.evaluations.max()), int(solution.adjoint.evaluations.max())
    print(f"  GMRES: {counts[0]} evaluations, {counts[1]} products")
    found: dict[str, Callable[[], Tensor]] = {"GMRES (default)": lambda: ours(layer, Implicit())[0]}
    for solver in (Anderson(), Anderson(memory=10), Broyden(), Neumann(terms=60)):
        gradient = Implicit(solver=solver)
        found[str(solver).split("(")[0] + (" 10" if solver == Anderson(memory=10) else "")] = (
            lambda gradient=gradient: ours(layer, gradient)[0]  # type: ignore[misc]
        )
    if with_compiled:
        found["compiled"] = compiled(layer)
    found["Phantom(5)"] = lambda: ours(layer, Phantom(5))[0]
    found["no gradient"] = lambda: ours_forward(layer)
    try:
        torchdeq = importlib.import_module("torchdeq")
        for name, backward in (("TorchDEQ Anderson", "anderson"), ("TorchDEQ plain", "fixed_point_iter")):
            found[name] = lambda step=of_torchdeq(torchdeq, backward): step(layer)  # type: ignore[misc]
    except ImportError:
        print("  TorchDEQ is not installed: pip install torchdeq==0.1.0")
    found["unrolled 40"] = lambda: unrolled(layer)
    found["alone"] = lambda: alone(layer, *counts)
    return found


def ours_forward(layer: Layer) -> Tensor:
    """The forward solve alone; what it returns is no gradient."""
    stop = Stop(rtol=RTOL)
    z = solve(layer.cell, torch.zeros_like(layer.x), (layer.x,), stop=stop, gradient=None).z
    return torch.full_like(layer.W, torch.nan) * z[0, 0]


def measured(layer: Layer, repeats: int, with_compiled: bool) -> dict[str, dict[str, float]]:
    """By column: ms of processor time, the median, and the relative error of the gradient."""
    truth, steps = layer.truth(), columns(layer, with_compiled)
    errors = {name: float((step().double() - truth).norm() / truth.norm()) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            begun = time.process_time()
            step()
            times[name].append(time.process_time() - begun)
    return {name: {"ms": 1e3 * statistics.median(times[name]), "error": errors[name]} for name in steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shapes", nargs="+", default=["1x64", "32x64", "64x256", "256x1024"])
    parser.add_argument("--repeats", type=int, help="default: about two seconds of each column, 5 at least")
    parser.add_argument("--compiled", action="store_true", help="our default under torch.compile too")
    parser.add_argument("--jax", help="JSON of jax_training_step.py")
    parser.add_argument("--json", help="write the figures there")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(build_info())
    jax = {}
    if given.jax:
        with open(given.jax) as file:
            jax = json.load(file)
    table: dict[str, dict[str, dict[str, float]]] = {}
    for shape in given.shapes:
        B, D = map(int, shape.split("x"))
        print(f"({B}, {D})")
        repeats = given.repeats or max(5, min(101, 20_000_000 // (B * D * D)))
        table[shape] = measured(Layer.of(B, D), repeats, given.compiled) | jax.get(shape, {})
        peer = table[shape].get("TorchDEQ Anderson", {}).get("ms")
        for name, row in table[shape].items():
            ratio = f"{row['ms'] / peer:8.2f} × TorchDEQ Anderson" if peer else ""
            print(f"  {name:20}{row['ms']:10.2f} ms   gradient error {row['error']:.1e} {ratio}")
    if given.json:
        with open(given.json, "w") as file:
            json.dump(table, file, indent=1)


if __name__ == "__main__":
    main()
