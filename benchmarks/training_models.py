"""What a training step of small real models costs, ours beside TorchDEQ's: time, evaluations, error of the gradient.

    pip install torchdeq==0.1.0
    python benchmarks/training_models.py [--models digits transformer convolution] [--steps 3] [--repeats 9]

digits: the classifier of docs/examples/deq_classifier.py, tanh(W z + U x + b) of width 96, on 64 pictures of 8 × 8.
transformer: a block with LayerNorm, attention of 4 heads and an MLP, 8 sequences of 24 tokens of width 64.
convolution: the residual cell of the deep implicit layers tutorial (Kolter, Duvenaud & Johnson 2020), group norms, 24
channels, 8 pictures of 28 × 28: Fashion-MNIST where it is installed, else noise.

A step is forward, loss and backward to every parameter, at the weights that `--steps` steps of Adam have led to. Every
column solves to 1e-4, relative, both ways, and keeps its defaults otherwise. Processor time of one thread, the median
over repeats in which all columns take turns. The error is that of all gradients together against damped plain iteration
to the end in float64, forward and adjoint.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from diffusion.training import data
from pydeqsolve import Anderson, Implicit, Phantom, Stop, solve

RTOL, MOST = 1e-4, 100
Solve = Callable[[Callable[[Tensor, Tensor], Tensor], Tensor], Tensor]  # (cell, injected) to z* (B, …)


class Digits(nn.Module):
    """z ↦ tanh(W z + U x + b), and a linear classifier of z*."""

    def __init__(self) -> None:
        super().__init__()
        self.state = spectral_norm(nn.Linear(96, 96, bias=False))
        self.injection, self.head = nn.Linear(64, 96), nn.Linear(96, 10)

    def cell(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.state(z) + x)

    @staticmethod
    def batch() -> tuple[Tensor, Tensor]:
        digits = load_digits()
        return torch.tensor(digits.data[:64] / 8 - 1, dtype=torch.float32), torch.tensor(digits.target[:64])


class Transformer(nn.Module):
    """A block over the state of all tokens, and a linear read-out of their mean."""

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.injection, self.read = nn.Linear(width, width), nn.Linear(width, 10)

    def cell(self, z: Tensor, x: Tensor) -> Tensor:
        B, T, D = z.shape
        q, k, v = self.qkv(z).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, D)
        z = self.first(x + self.out(mixed))
        return self.second(z + self.down(F.gelu(self.up(z))))

    def head(self, z: Tensor) -> Tensor:
        return self.read(z.mean(1))

    @staticmethod
    def batch() -> tuple[Tensor, Tensor]:
        draw = torch.Generator().manual_seed(0)
        return torch.randn(8, 24, 64, generator=draw), torch.randint(10, (8,), generator=draw)


class Convolution(nn.Module):
    """A residual cell of two convolutions, and a linear classifier of the pooled state."""

    def __init__(self, channels: int = 24, groups: int = 8) -> None:
        super().__init__()
        self.one = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.two = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        for conv in (self.one, self.two):
            nn.init.normal_(conv.weight, std=0.01)
        self.norms = nn.ModuleList([nn.GroupNorm(groups, channels) for _ in range(3)])
        self.injection = nn.Conv2d(1, channels, 3, padding=1)
        self.read = nn.Linear(channels * 49, 10)

    def cell(self, z: Tensor, x: Tensor) -> Tensor:
        y = self.norms[0](F.relu(self.one(z)))
        return self.norms[2](F.relu(z + self.norms[1](x + self.two(y))))

    def head(self, z: Tensor) -> Tensor:
        return self.read(F.avg_pool2d(z, 4).flatten(1))

    @staticmethod
    def batch() -> tuple[Tensor, Tensor]:
        if data.FASHION_FOLDER.exists():
            found = data.fashion()
            return found.train[:8], found.train_labels[:8]
        draw = torch.Generator().manual_seed(0)
        return torch.randn(8, 1, 28, 28, generator=draw), torch.randint(10, (8,), generator=draw)


def loss_of(model: Any, batch: tuple[Tensor, Tensor], how: Solve) -> Tensor:
    injected = model.injection(batch[0])
    return F.cross_entropy(model.head(how(model.cell, injected)), batch[1])


def ours(gradient: Any, seen: list[Any] | None = None) -> Solve:
    def how(cell: Callable[..., Tensor], injected: Tensor) -> Tensor:
        stop = Stop(rtol=RTOL, max_steps=MOST)
        found = solve(cell, torch.zeros_like(injected), (injected,), stop=stop, gradient=gradient)
        if seen is not None:
            seen[:] = [found]
        return found.z  # type: ignore[no-any-return]

    return how


def of_torchdeq(torchdeq: Any, **options: Any) -> Solve:
    core = {"f_solver": "anderson", "f_tol": RTOL, "b_tol": RTOL, "f_max_iter": MOST, "b_max_iter": MOST,
            "f_stop_mode": "rel", "b_stop_mode": "rel"}  # fmt: skip
    deq = torchdeq.get_deq(**core, **options)
    return lambda cell, injected: deq(lambda z: cell(z, injected), torch.zeros_like(injected))[0][-1]


class Damped(torch.autograd.Function):
    """z* of a cell that is told of by its value there; the adjoint by damped plain iteration."""

    @staticmethod
    def forward(ctx: Any, f: Tensor, z: Tensor) -> Tensor:
        ctx.pair = f, z
        return f.detach().clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        f, z = ctx.pair
        g = grads[0]
        return to_the_end(lambda u: g + torch.autograd.grad(f, z, u, retain_graph=True)[0], g), None


def to_the_end(step: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    for _ in range(20_000):
        change = step(z) - z
        z = z + 0.5 * change
        if float(change.norm()) <= 1e-12 * float(z.norm()):
            return z
    raise RuntimeError("damped plain iteration does not converge here: there is no truth to compare with")


def exact(cell: Callable[..., Tensor], injected: Tensor) -> Tensor:
    with torch.no_grad():
        z = to_the_end(lambda z: cell(z, injected), torch.zeros_like(injected))
    z.requires_grad_()
    found: Tensor = Damped.apply(cell(z, injected), z)  # type: ignore[no-untyped-call]
    return found


def gradients(model: nn.Module, batch: tuple[Tensor, Tensor], how: Solve) -> Tensor:
    """All gradients, one after the other."""
    found = torch.autograd.grad(loss_of(model, batch, how), list(model.parameters()))
    return torch.cat([g.flatten() for g in found])


def trained(kind: type[Any], steps: int) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model, batch = kind(), kind.batch()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, batch, ours(Implicit())).backward()
        optimizer.step()
    return model.eval(), batch


def columns() -> dict[str, Solve]:
    found = {
        "Implicit()": ours(Implicit()),
        "Implicit(Anderson())": ours(Implicit(solver=Anderson())),
        "Phantom(5)": ours(Phantom(5)),
    }
    try:
        torchdeq = importlib.import_module("torchdeq")
    except ImportError:
        print("TorchDEQ is not installed: pip install torchdeq==0.1.0")
        return found
    for name, backward in (("TorchDEQ Anderson", "anderson"), ("TorchDEQ plain", "fixed_point_iter")):
        found[name] = of_torchdeq(torchdeq, ift=True, b_solver=backward)
    found["TorchDEQ phantom 5"] = of_torchdeq(torchdeq, grad=5, tau=1.0)
    return found


def measure(kind: type[Any], steps: int, repeats: int) -> None:
    model, batch = trained(kind, steps)
    seen: list[Any] = []
    gradients(model, batch, ours(Implicit(), seen))
    forward, backward = seen[0].evaluations, seen[0].adjoint.evaluations
    print(
        f"{kind.__name__.lower()}: {int(seen[0].converged.sum())} of {len(forward)} converged, "
        f"{int(forward.min())} to {int(forward.max())} evaluations, {int(backward.max())} products"
    )
    double = copy.deepcopy(model).double()
    truth = gradients(double, (batch[0].double(), batch[1]), exact)
    found = columns()
    error = {name: float((gradients(model, batch, how) - truth).norm() / truth.norm()) for name, how in found.items()}
    times: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(repeats):
        for name, how in found.items():
            begun = time.process_time()
            gradients(model, batch, how)
            times[name].append(time.process_time() - begun)
    peer = statistics.median(times.get("TorchDEQ Anderson", [math.inf]))
    for name, took in times.items():
        median = statistics.median(took)
        ratio = f"{median / peer:8.2f} × TorchDEQ Anderson" if peer < math.inf else ""
        print(f"  {name:22}{1e3 * median:9.2f} ms   gradient error {error[name]:.1e} {ratio}")


def main() -> None:
    kinds = {kind.__name__.lower(): kind for kind in (Digits, Transformer, Convolution)}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", default=list(kinds), choices=list(kinds))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=9)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, rtol {RTOL:g}, the median of {given.repeats}")
    for name in given.models:
        measure(kinds[name], given.steps, given.repeats)


if __name__ == "__main__":
    main()
