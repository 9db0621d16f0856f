"""A reversible two-state iteration (McCallum, Rathore & Foster 2025) beside the implicit gradient.

y ← (1 − β) y + β f(z), then z ← (1 − β) z + β f(y): the steps are undone backwards, so the gradient of all of them
takes the memory of one. Two evaluations a step, and as many again with their products on the way back. Printed:
evaluations, products, the error of z and that of the gradient of W, for z = tanh(z Wᵀ + x), float32, |λ|max .9.
"""

import math

import torch
from torch import Tensor

from pydeqsolve import Implicit, Stop, solve

B, D = 32, 64


def data(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """W (D, D) with a largest absolute eigenvalue of .9, x (B, D) and a cotangent (B, D)."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(D, D, dtype=torch.float64, generator=generator)
    W *= 0.9 / torch.linalg.eigvals(W).abs().max()
    x, g = (torch.randn(B, D, dtype=torch.float64, generator=generator) for _ in range(2))
    return W.to(dtype), (0.1 * x).to(dtype), g.to(dtype)


def pulled(z: Tensor, W: Tensor, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """f(z), and the cotangents of z and W for g."""
    z, W = z.detach().requires_grad_(), W.detach().requires_grad_()
    f = torch.tanh(z @ W.T + x)
    return f.detach(), *torch.autograd.grad(f, (z, W), g)


def reversible(W: Tensor, x: Tensor, g: Tensor, steps: int, beta: float) -> tuple[Tensor, Tensor]:
    """z after the steps, and the gradient of W by undoing them."""
    y = z = torch.zeros_like(x)
    for _ in range(steps):
        y = (1 - beta) * y + beta * torch.tanh(z @ W.T + x)
        z = (1 - beta) * z + beta * torch.tanh(y @ W.T + x)
    found, of_y, of_z, of_W = z, torch.zeros_like(g), g, torch.zeros_like(W)
    for _ in range(steps):
        f, by_y, by_W = pulled(y, W, x, beta * of_z)
        z, of_y, of_z, of_W = (z - beta * f) / (1 - beta), of_y + by_y, (1 - beta) * of_z, of_W + by_W
        f, by_z, by_W = pulled(z, W, x, beta * of_y)
        y, of_z, of_y, of_W = (y - beta * f) / (1 - beta), of_z + by_z, (1 - beta) * of_y, of_W + by_W
    return found, of_W


def error(found: Tensor, exact: Tensor) -> float:
    """‖found − exact‖ / ‖exact‖."""
    return float((found.double() - exact).norm() / exact.norm())


def implicit(dtype: torch.dtype, rtol: float) -> tuple[Tensor, Tensor, float, float]:
    """z, the gradient of W, and evaluations and products per sample."""
    W, x, g = data(dtype)
    W.requires_grad_()
    stop = Stop(rtol=rtol, max_steps=500)
    solution = solve(lambda z, x: torch.tanh(z @ W.T + x), torch.zeros_like(x), (x,), stop=stop, gradient=Implicit())
    (of_W,) = torch.autograd.grad(solution.z, W, g)
    products = solution.adjoint.evaluations.double().mean() if solution.adjoint else math.nan
    return solution.z.detach(), of_W, float(solution.evaluations.double().mean()), float(products)


def main() -> None:
    """Prints the table."""
    print(f"torch {torch.__version__}, ({B}, {D}), float32")
    z, of_W, *_ = implicit(torch.float64, 1e-12)
    print("| method | evaluations, products | error of z | error of the gradient |\n|---|---|---|---|")
    for rtol in (1e-4, 1e-6):
        found, gradient, calls, products = implicit(torch.float32, rtol)
        told = f"| {calls + 1:.0f}, {products:.0f} | {error(found, z):.1e} | {error(gradient, of_W):.1e} |"
        print(f"| Implicit(), rtol {rtol:.0e} {told}")
    for beta in (0.5, 0.8, 0.9):
        for steps in (8, 16, 32, 64):
            found, gradient = reversible(*data(torch.float32), steps, beta)
            told = f"| {4 * steps}, {2 * steps} | {error(found, z):.1e} | {error(gradient, of_W):.1e} |"
            print(f"| reversible, β = {beta}, {steps} steps {told}")


if __name__ == "__main__":
    main()
