"""Trains a small DEQ classifier on scikit-learn's digits, by implicit and by phantom gradients, beside TorchDEQ.

    python docs/examples/deq_classifier.py [--epochs 30] [--seeds 3]

The cell is z = tanh(W z + U x + b), W with spectral norm at most one by torch's own parametrization; every variant
starts from the same weights and sees the same batches. Printed, medians over the seeds: test accuracy, seconds of
training, evaluations of the cell per sample in the forward pass and vector-Jacobian products in the backward pass, and
the bytes that autograd keeps for the backward pass of one batch. TorchDEQ (pip install torchdeq==0.1.0) is left out
where it is missing.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from pydeqsolve import DEQ, Anderson, Implicit, Phantom, Stop

WIDTH = 96
STOP = Stop(rtol=1e-3, max_steps=50)


class Cell(nn.Module):
    """z ↦ tanh(W z + U x + b)."""

    def __init__(self) -> None:
        super().__init__()
        self.state = spectral_norm(nn.Linear(WIDTH, WIDTH, bias=False))
        self.injection = nn.Linear(64, WIDTH)

    def inject(self, x: Tensor) -> Tensor:
        return self.injection(x)

    def forward(self, z: Tensor, injected: Tensor) -> Tensor:
        return torch.tanh(self.state(z) + injected)


@dataclass
class Cost:
    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)


class Ours(nn.Module):
    def __init__(self, gradient: Implicit | Phantom, cost: Cost) -> None:
        super().__init__()
        self.deq = DEQ(Cell(), solver=Anderson(memory=5), stop=STOP, gradient=gradient)
        self.head = nn.Linear(WIDTH, 10)
        self.cost, self.gradient = cost, gradient

    def forward(self, x: Tensor) -> Tensor:
        z = self.deq(self.deq.cell.inject(x))
        self.cost.forward.append(float(self.deq.solution.evaluations.double().mean()))
        return self.head(z)

    def after_backward(self) -> None:
        steps = getattr(self.gradient, "steps", None)
        adjoint = self.deq.solution.adjoint
        self.cost.backward.append(steps or float(adjoint.evaluations.double().mean()))


class TorchDEQ(nn.Module):
    """The same model; its solvers stop on the whole batch, so every sample takes as many evaluations as the slowest."""

    def __init__(self, options: dict[str, Any], cost: Cost) -> None:
        super().__init__()
        self.cell, self.head = Cell(), nn.Linear(WIDTH, 10)
        torchdeq = importlib.import_module("torchdeq")
        shared = {"f_solver": "anderson", "b_solver": "anderson", "f_max_iter": 50, "f_stop_mode": "rel"}
        self.deq = torchdeq.get_deq(**shared, f_tol=1e-3, b_tol=1e-6, **options)
        self.cost, self.calls = cost, 0

    def forward(self, x: Tensor) -> Tensor:
        injected = self.cell.inject(x)
        calls = 0

        def fn(z: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return self.cell(z, injected)

        z = self.deq(fn, torch.zeros_like(injected))[0][-1]
        self.cost.forward.append(calls)
        return self.head(z)

    def after_backward(self) -> None: ...


def train(make: Callable[[Cost], nn.Module], epochs: int, seed: int) -> dict[str, float]:
    """Accuracy and costs of one variant."""
    digits = load_digits()
    parts = train_test_split(digits.data / 8 - 1, digits.target, test_size=360, random_state=0, stratify=digits.target)
    x, x_test = (torch.tensor(p, dtype=torch.float32) for p in parts[:2])
    y, y_test = (torch.tensor(p) for p in parts[2:])
    torch.manual_seed(seed)
    cost = Cost()
    model = make(cost)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    batches = torch.Generator().manual_seed(seed)
    saved = saved_bytes(model, x[:64])
    started = time.perf_counter()
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=batches).split(64):
            optimizer.zero_grad()
            noisy = x[rows] + 0.1 * torch.randn(len(rows), 64, generator=batches)
            nn.functional.cross_entropy(model(noisy), y[rows]).backward()
            model.after_backward()
            optimizer.step()
        schedule.step()
    seconds = time.perf_counter() - started
    model.eval()
    with torch.no_grad():
        accuracy = float((model(x_test).argmax(1) == y_test).double().mean())
    backward = statistics.mean(cost.backward) if cost.backward else float("nan")
    return {
        "accuracy": accuracy, "seconds": seconds, "forward": statistics.mean(cost.forward), "backward": backward,
        "saved": saved,
    }  # fmt: skip


def saved_bytes(model: nn.Module, x: Tensor) -> float:
    """KiB that one forward pass leaves for its backward pass, memory shared by several tensors counted once."""
    storages: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = model(x).sum()
    del loss
    return sum(storages.values()) / 1024


def variants() -> dict[str, Callable[[Cost], nn.Module]]:
    found: dict[str, Callable[[Cost], nn.Module]] = {
        "pydeqsolve, implicit": lambda cost: Ours(Implicit(stop=Stop(rtol=1e-3)), cost),
        "pydeqsolve, phantom 5": lambda cost: Ours(Phantom(5, 0.8), cost),
    }
    try:
        importlib.import_module("torchdeq")
    except ImportError:
        print("TorchDEQ is missing: pip install torchdeq==0.1.0")
        return found
    found["TorchDEQ 0.1.0, implicit"] = lambda cost: TorchDEQ({"ift": True}, cost)
    found["TorchDEQ 0.1.0, phantom 5"] = lambda cost: TorchDEQ({"grad": 5, "tau": 0.8}, cost)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, {args.epochs} epochs of 1,437 digits, {args.seeds} seeds, medians")
    print(f"{'':<28}{'test accuracy':>14}{'seconds':>10}{'forward':>10}{'backward':>10}{'saved KiB':>11}")
    for name, make in variants().items():
        runs = [train(make, args.epochs, seed) for seed in range(args.seeds)]
        row = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        print(
            f"{name:<28}{row['accuracy']:>14.2%}{row['seconds']:>10.1f}{row['forward']:>10.1f}{row['backward']:>10.1f}"
            f"{row['saved']:>11.0f}"
        )


if __name__ == "__main__":
    main()
