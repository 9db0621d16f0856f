"""Inversion by descent on the loss: Adam on x_T, through the sequential chain or through its fixed point."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pydeqsolve import Implicit, Phantom, Stop

from ..sampler import Sampler
from .exact import Outcome

EPOCHS = {"naive": 400, "deq": 400}
# Measured on digits at T = 10 … 100 as the best of 0.01, 0.03, 0.1, 0.3, for each method by itself.
LEARNING_RATES = {"naive": 0.3, "deq": 0.1}
# The relative error of x_0 that a solve of "deq" may leave, as part of that of the last epoch, and at least.
FINER, FINEST = 0.03, 1e-7
EPOCH_STOP = Stop(rtol=1e-3, max_steps=1000)  # of the solve in each epoch of "deq"


@dataclass(eq=False)
class Epoch:
    """What the callback of `invert` sees after each epoch: its number, the losses (B,), and a state to resume from."""

    number: int
    loss: Tensor
    best: Tensor
    snapshot: Callable[[], dict[str, Tensor]]


@dataclass(eq=False)
class Descent:
    """Adam on x_T; everything that a resumed run needs is in `snapshot`."""

    sampler: Sampler
    target: Tensor
    method: str
    optimizer: torch.optim.Optimizer
    x_T: Tensor  # (B, D) float64, the variable
    best: Tensor  # (B, D)
    best_loss: Tensor  # (B,)
    epoch: int
    history: list[Tensor]
    evaluations: Tensor  # (B,)
    rounds: int
    N: Tensor  # (B, T, D) remainders of the last solve

    @staticmethod
    def start(
        sampler: Sampler, target: Tensor, method: str, lr: float, make: Any, generator: Any,
        state: Mapping[str, Tensor] | None,
    ) -> Descent:  # fmt: skip
        B, D = target.shape
        T, device = len(sampler.map.chain), target.device
        if state is None:
            start = torch.randn(B, D, dtype=torch.float64, generator=generator).to(device) * sampler.map.chain.size[0]
            state = {
                "x_T": start, "best": start, "best_loss": torch.full((B,), torch.inf, dtype=torch.float64),
                "history": torch.empty(0, B, dtype=torch.float64), "evaluations": torch.zeros(B, dtype=torch.int64),
                "rounds": torch.zeros((), dtype=torch.int64), "N": torch.zeros(B, T, D, dtype=torch.float64),
            }  # fmt: skip
        check_state(state, B, T, D, named_moments=make is None)
        at = {name: value.clone().to(device) for name, value in state.items()}
        x_T = at["x_T"].requires_grad_()
        optimizer = make([x_T]) if make is not None else torch.optim.Adam([x_T], lr=lr)
        moments = {name[5:]: value for name, value in at.items() if name.startswith("adam.")}
        if moments:
            optimizer.state[x_T] = moments
        return Descent(
            sampler, target, method, optimizer, x_T, at["best"], at["best_loss"], len(at["history"]),
            list(at["history"]), at["evaluations"], int(at["rounds"]), at["N"],
        )  # fmt: skip

    def snapshot(self) -> dict[str, Tensor]:
        """Tensors by name, from which `start` goes on."""
        B = len(self.target)
        moments = {f"adam.{k}": v for k, v in self.optimizer.state[self.x_T].items() if isinstance(v, Tensor)}
        history = torch.stack(self.history) if self.history else self.target.new_empty(0, B)
        state = {
            "x_T": self.x_T, "best": self.best, "best_loss": self.best_loss, "history": history, "N": self.N,
            "evaluations": self.evaluations, "rounds": torch.tensor(self.rounds), **moments,
        }  # fmt: skip
        return {name: value.detach().clone().contiguous() for name, value in state.items()}

    def run(
        self, epochs: int, limit: int | None, gradient: Phantom | Implicit, solver: Any, callback: Any, bar: Any
    ) -> Outcome:
        """Epochs up to number `epochs` and rounds up to `limit`, those of the resumed state included."""
        while self.epoch < epochs and (limit is None or self.rounds + self._most_rounds(gradient) <= limit):
            sampler = self.sampler.at(self.x_T.detach())
            before, solution = sampler.map.network.calls, None
            if self.method == "naive":
                x_0, rows = sampler.differentiable_sequential(self.x_T)
            else:
                x_0, solution, rows = sampler.differentiable_parallel(
                    self.x_T, self.N, gradient, self._tightened(EPOCH_STOP), solver
                )
                self.N = solution.z
            loss = (x_0 - self.target).square().sum(1)
            self._step(loss)
            if solution is not None and solution.adjoint is not None:
                rows = rows + solution.adjoint.evaluations
            self.epoch, self.rounds = self.epoch + 1, self.rounds + sampler.map.network.calls - before
            self.evaluations = self.evaluations + rows
            bar.update()
            seen = Epoch(self.epoch, self.history[-1], self.best_loss, self.snapshot)
            if callback is not None and callback(seen):
                break
        history = torch.stack(self.history) if self.history else self.target.new_empty(0, len(self.target))
        return Outcome(self.best, history, self.evaluations, self.rounds, self.snapshot())

    def _most_rounds(self, gradient: Phantom | Implicit) -> int:
        """What an epoch may take: a causal chain of T steps is solved after T rounds, and swept back in T more."""
        T = len(self.sampler.map.chain)
        if self.method == "naive":
            return T
        return T + (T if isinstance(gradient, Implicit) else gradient.steps)

    def _tightened(self, stop: Stop) -> Stop:
        """The tolerance of this epoch's solve: as the loss falls, what the solve leaves must fall below it."""
        if not self.history:
            return stop
        needed = FINER * (self.history[-1] / self.target.square().sum(1)).sqrt()
        allowed = torch.as_tensor(stop.rtol, dtype=needed.dtype, device=needed.device)
        return replace(stop, rtol=torch.minimum(needed.nan_to_num(1.0).clamp_min(FINEST), allowed))

    def _step(self, loss: Tensor) -> None:
        """Remembers the best latent of every image, then one step of the optimiser."""
        value = loss.detach()
        better = value < self.best_loss
        self.best = torch.where(better[:, None], self.x_T.detach(), self.best)
        self.best_loss = torch.where(better, value, self.best_loss)
        self.history.append(value)
        # Every image is a problem of its own: the sum gives each exactly its own gradient.
        (grad,) = torch.autograd.grad(loss.sum(), self.x_T)
        self.x_T.grad = torch.where(grad.isfinite(), grad, 0.0)
        self.optimizer.step()


def check_state(state: Mapping[str, Tensor], B: int, T: int, D: int, named_moments: bool) -> None:
    """Raises ValueError unless a state to resume from has every part, no other, and is of B images, T steps, D pixels.

    named_moments: the optimiser is Adam, whose moments are known by name; another one keeps what it likes as "adam.…".
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"state: tensors by name are required, got {type(state).__name__}")
    epochs = len(state["history"]) if "history" in state and state["history"].dim() else 0
    shapes: dict[str, tuple[int, ...]] = {
        "x_T": (B, D), "best": (B, D), "best_loss": (B,), "history": (epochs, B), "evaluations": (B,), "rounds": (),
        "N": (B, T, D),
    }  # fmt: skip
    moments = {"adam.step": (), "adam.exp_avg": (B, D), "adam.exp_avg_sq": (B, D)}
    shapes |= moments if epochs and named_moments else {}
    for name in sorted(shapes.keys() | state.keys()):
        if name not in state:
            raise ValueError(f"state: {name} is missing")
        if name not in shapes and (named_moments or not name.startswith("adam.")):
            raise ValueError(f"state: {name} is not known")
        value = state[name]
        if not isinstance(value, Tensor):
            raise ValueError(f"state: {name}: a tensor is required, got {type(value).__name__}")
        dtype = torch.int64 if name in ("evaluations", "rounds") else torch.float64
        if name in shapes and tuple(value.shape) != shapes[name]:
            raise ValueError(f"state: {name} of shape {shapes[name]} is required, got {tuple(value.shape)}")
        if not name.startswith("adam.") and value.dtype != dtype:
            raise ValueError(f"state: {name} of {dtype} is required, got {value.dtype}")
