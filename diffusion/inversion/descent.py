"""Inversion by descent on the loss: Adam on x_T, through the sequential chain or through its fixed point."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pydeqsolve import Implicit, Phantom, Solution, Stop

from ..chain import Splitting
from ..checks import count, real
from ..gradients import attach, check_gradient
from ..methods.parallel import Parallel, fixed_point
from ..methods.sequential import Sequential
from ..models.answers import draw
from ..problem import ChainProblem, Found, in_steps
from .loss import Best, Call, latents

EPOCHS = 400
# Measured on digits at T = 10 … 100 as the best of 0.01, 0.03, 0.1, 0.3, for each by itself.
LEARNING_RATES = {Sequential: 0.3, Parallel: 0.1}
# The relative error of x_0 that a solve may leave, as part of that of the last epoch, and at least.
FINER, FINEST = 0.03, 1e-7
EPOCH_STOP = Stop(rtol=1e-3, max_steps=1000)  # of the solve in each epoch


@dataclass(eq=False)
class Epoch:
    """What the callback of `invert` sees after each epoch: its number, the losses (B,), and a state to resume from."""

    number: int
    loss: Tensor
    best: Tensor
    snapshot: Callable[[], dict[str, Tensor]]


@dataclass(frozen=True)
class Descent:
    """Gradient descent on the loss, through the sequential chain (Pokle et al. 2022, Algorithm 1) or through its fixed
    point, solved in every epoch from that of the last (Algorithms 2 and 3).

    Attributes:
        through: Sequential() or Parallel(…).
        epochs: how many, those of a resumed state included.
        lr: rate of Adam; None is 0.3 through Sequential, 0.1 through Parallel, the best for each.
        optimizer: makes another one than Adam from [x_T]; lr is its own affair then.
        gradient: of Parallel: Phantom(steps, damping) or Implicit().
    """

    through: Sequential | Parallel = field(default_factory=Parallel)
    epochs: int = EPOCHS
    lr: float | None = None
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None
    gradient: Phantom | Implicit = field(default_factory=lambda: Phantom(1, 0.1))

    def __post_init__(self) -> None:
        if not isinstance(self.through, (Sequential, Parallel)):
            raise TypeError(f"through: Sequential() or Parallel() is required, got {self.through!r}")
        object.__setattr__(self, "epochs", count("epochs", self.epochs, least=0))
        if self.lr is not None and real("lr", self.lr) <= 0:
            raise ValueError(f"lr: a positive number is required, got {self.lr}")
        if self.optimizer is not None and not callable(self.optimizer):
            raise TypeError(f"optimizer: a function or None is required, got {type(self.optimizer).__name__}")
        if not isinstance(self.gradient, (Implicit, Phantom)):
            raise TypeError(f"gradient: Phantom(...) or Implicit() is required, got {type(self.gradient).__name__}")
        check_gradient(self.gradient, None)

    @property
    def rate(self) -> float:
        """lr, or the default."""
        return LEARNING_RATES[type(self.through)] if self.lr is None else self.lr

    def find(self, problem: ChainProblem, best: Best, call: Call, splitting: Splitting | None = None) -> Found:
        """The latents of least loss, which are offered to `best`."""
        run = Run.start(self, problem, call.generator, call.state)
        found = run.run(call)
        with torch.no_grad():
            best.offer(found.states[:, 0], None, problem.image)
        return found


@dataclass(eq=False)
class Run:
    """A descent on its way; everything that a resumed run needs is in `snapshot`."""

    method: Descent
    problem: ChainProblem  # whose latents are the images
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
        method: Descent, problem: ChainProblem, generator: Any, state: Mapping[str, Tensor] | None
    ) -> Run:  # fmt: skip
        """Before the first epoch, or after the last of a state."""
        (B, D), T, device = problem.latent.shape, len(problem.map.chain), problem.latent.device
        size = float(problem.map.chain.size[0])  # of the latent, whose unit is that of the rate
        make, lr = method.optimizer, method.rate * size if method.lr is None else method.lr
        if state is None:
            start = draw((B, D), generator, device) * size
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
        return Run(
            method, problem, optimizer, x_T, at["best"], at["best_loss"], len(at["history"]),
            list(at["history"]), at["evaluations"], int(at["rounds"]), at["N"],
        )  # fmt: skip

    def snapshot(self) -> dict[str, Tensor]:
        """Tensors by name, from which `start` goes on."""
        moments = {f"adam.{k}": v for k, v in self.optimizer.state[self.x_T].items() if isinstance(v, Tensor)}
        state = {
            "x_T": self.x_T, "best": self.best, "best_loss": self.best_loss, "history": self._history(), "N": self.N,
            "evaluations": self.evaluations, "rounds": torch.tensor(self.rounds), **moments,
        }  # fmt: skip
        return {name: value.detach().clone().contiguous() for name, value in state.items()}

    def run(self, call: Call) -> Found:
        """Epochs and rounds up to the most, those of the resumed state included."""
        limit, network = call.max_rounds, self.problem.map.network
        while self.epoch < self.method.epochs and (limit is None or self.rounds + self._most_rounds() <= limit):
            before = network.calls
            x_0, solution, rows = self._sampled()
            self._step((x_0 - self.problem.latent).square().sum(1))
            if solution is not None and solution.adjoint is not None:
                rows = rows + solution.adjoint.evaluations
            self.epoch, self.rounds = self.epoch + 1, self.rounds + network.calls - before
            self.evaluations = self.evaluations + rows
            call.bar.update()
            seen = Epoch(self.epoch, self.history[-1], self.best_loss, self.snapshot)
            if call.callback is not None and call.callback(seen):
                break
        found = latents(self.best, self.evaluations, self.rounds, self._history())
        found.state = self.snapshot()
        return found

    def _sampled(self) -> tuple[Tensor, Solution | None, Tensor | int]:
        """The images (B, D) of the latents with their graph, the solution if it is one, and rows (B,)."""
        problem, through, gradient = self.problem.at(self.x_T.detach()), self.method.through, self.method.gradient
        if isinstance(through, Sequential):
            return in_steps(self.problem.at(self.x_T))[:, -1], None, len(problem.map.chain)
        with torch.no_grad():
            stop = self._tightened(EPOCH_STOP)
            states, solution, rows = fixed_point(problem, self.N, stop, through.solver, through.window)
        self.N = solution.z
        states = attach(problem, states, self.x_T, problem.conditioning, gradient, solution, latent_alone=True)
        if isinstance(gradient, Phantom) and gradient.steps > 1:  # one step reads no model
            rows = rows + gradient.steps * len(problem.map.chain)
        return states[:, -1], solution, rows

    def _history(self) -> Tensor:
        return torch.stack(self.history) if self.history else self.x_T.new_empty(0, len(self.x_T)).detach()

    def _most_rounds(self) -> int:
        """What an epoch may take: a causal chain of T steps is solved after T rounds, and swept back in T more."""
        T, gradient = len(self.problem.map.chain), self.method.gradient
        if isinstance(self.method.through, Sequential):
            return T
        return T + (T if isinstance(gradient, Implicit) else gradient.steps)

    def _tightened(self, stop: Stop) -> Stop:
        """The tolerance of this epoch's solve: as the loss falls, what the solve leaves must fall below it."""
        if not self.history:
            return stop
        needed = FINER * (self.history[-1] / self.problem.latent.square().sum(1)).sqrt()
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
