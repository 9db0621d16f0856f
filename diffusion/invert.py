"""Inversion: which latent x_T does the chain turn into this image?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pydeqsolve import Anderson, Implicit, Phantom, Solution, Status, Stop, solve

from .chain import Chain, LinearChain, Splitting
from .remainder import Model, Remainders
from .sampler import Sampler, check_arguments, progress_bar

METHODS = ("ddim", "naive", "deq", "exact")
EXACT_SOLVER = Anderson(memory=10, coupling="joint")
EXACT_STOP = Stop(rtol=0.0, atol=2e-6, max_steps=30)
LOSS_STOP = Stop(rtol=1e-7, max_steps=1000)  # of the sampling that measures the loss
EPOCH_STOP = Stop(rtol=1e-3, max_steps=1000)  # of the solve in each epoch of "deq"
EPOCHS = {"naive": 400, "deq": 400}
LEARNING_RATE = 0.01


@dataclass(eq=False)
class Inversion:
    """What `invert` returns, per image.

    Attributes:
        x_T: (B, …) the latent of least loss that was found.
        loss: (B,) float64, ‖x̂_0 − x_0‖²_F of the image sampled from x_T.
        history: (epochs, B) float64, the loss of every epoch; for "exact" the residual of every round.
        status: (B,) int64 of `pydeqsolve.Status`: of the fixed point for "exact", else MAX_STEPS (epochs have no
            tolerance to meet).
        typicality: (B,) |x_T|²/D, near 1 for a latent that the model would draw; far from 1, the image has no preimage.
        rounds: model calls one after the other. evaluations: (B,) model rows per image, the final check included.
        state: what `invert(..., state=...)` continues from, as tensors by name.
    """

    x_T: Tensor
    loss: Tensor
    history: Tensor
    status: Tensor
    typicality: Tensor
    rounds: int
    evaluations: Tensor
    solution: Solution | None = None
    state: dict[str, Tensor] = field(default_factory=dict)


@dataclass(eq=False)
class Epoch:
    """What the callback of `invert` sees after each epoch: its number, the losses (B,), and a state to resume from."""

    number: int
    loss: Tensor
    best: Tensor
    snapshot: Callable[[], dict[str, Tensor]]


def invert(
    model: Model,
    x_0: Tensor,
    chain: Chain,
    method: str = "exact",
    *,
    prediction: str = "epsilon",
    epochs: int | None = None,
    lr: float = LEARNING_RATE,
    gradient: Phantom | Implicit | None = None,
    stop: Stop | None = None,
    splitting: str | Tensor | Splitting = "v",
    solver: Any = None,
    generator: torch.Generator | None = None,
    inputs: Sequence[Tensor] = (),
    mean: Tensor | None = None,
    variance: Tensor | None = None,
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer] | None = None,
    state: Mapping[str, Tensor] | None = None,
    callback: Callable[[Epoch], Any] | None = None,
    progress: bool = False,
    rows_per_call: int | None = None,
) -> Inversion:
    """The latents x_T from which the chain (eta = 0) samples the images x_0.

    Args:
        model, chain, prediction, splitting, inputs, mean, variance, rows_per_call: as in `sample`.
        x_0: (B, …) images.
        method:
            "ddim": the chain read backwards with ε taken one state too early; T rows, approximate.
            "exact": x_k = (x_{k+1} − c_k (b_k + N(x_k))) / A_k, every k at once, as one fixed point. An image that
                misses the tolerance (see status) gets the better of this and "ddim".
            "naive": Adam on x_T through the sequential chain (Pokle et al. 2022, Algorithm 1).
            "deq": Adam on x_T, a parallel solve per epoch, warm-started from the last (Algorithms 2 and 3).
        epochs, lr: of "naive" and "deq" (default 400, 0.01). optimizer: makes another one from [x_T].
        gradient: of "deq": Phantom(steps, damping), default Phantom(1, 0.1), or Implicit().
        stop: of "exact": atol bounds the change of ε per step; of "deq": of every epoch's solve, as in `sample`.
        solver: of the fixed point, Anderson(10) for "exact", Anderson(2, coupling="causal") for "deq".
        generator: of the first x_T of "naive" and "deq".
        state: `Inversion.state` or an epoch's snapshot; the run goes on from there, bit for bit.
        callback: called with an `Epoch` after each epoch; a true return ends the run.

    Returns:
        Inversion. A NaN image ends with loss NaN and status NONFINITE and changes no other.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, by name.
    """
    check_arguments(model, x_0, "x_0", chain, prediction, inputs)
    if method not in METHODS:
        raise ValueError(f"method: one of {', '.join(METHODS)} is required, got {method!r}")
    if chain.eta != 0:
        raise ValueError(f"chain: eta = 0 is required to invert, got {chain.eta}")
    if gradient is not None and not isinstance(gradient, (Implicit, Phantom)):
        raise TypeError(f"gradient: Phantom(...) or Implicit() is required, got {type(gradient).__name__}")
    target = x_0.detach().double().flatten(1)
    sampler = Sampler.of(model, x_0, chain, prediction, splitting, None, None, inputs, mean, variance, rows_per_call)
    bar = progress_bar(progress, "inverting", "epoch" if method in EPOCHS else "round")
    try:
        if method in EPOCHS:
            count = EPOCHS[method] if epochs is None else epochs
            if isinstance(count, bool) or not isinstance(count, int) or count < 0:
                raise ValueError(f"epochs: a non-negative integer is required, got {count!r}")
            descent = _Descent.start(sampler, target, method, lr, optimizer, generator, state)
            outcome = descent.run(count, gradient or Phantom(1, 0.1), stop or EPOCH_STOP, solver, callback, bar)
        else:
            with torch.no_grad():
                if method == "ddim":
                    outcome = _one_pass(sampler, target)
                else:
                    outcome = _exact(sampler, target, solver or EXACT_SOLVER, stop or EXACT_STOP, bar)
        with torch.no_grad():
            return _finish(sampler, target, outcome, x_0)
    finally:
        bar.close()


@dataclass(eq=False)
class _Outcome:
    x_T: Tensor  # (B, D)
    history: Tensor
    rounds: int
    evaluations: Tensor
    N: Tensor | None = None  # (B, T, D) a guess of the chain's remainders, for the check
    solution: Solution | None = None
    state: dict[str, Tensor] = field(default_factory=dict)


def _finish(sampler: Sampler, target: Tensor, outcome: _Outcome, x_0: Tensor) -> Inversion:
    """Samples from the latents found, which is what the loss is about."""
    B, D = target.shape
    x_T = outcome.x_T
    sampled, rounds, rows = sampler.at(x_T).check(outcome.N, LOSS_STOP)
    loss = (sampled - target).square().sum(1)
    if outcome.solution is not None:
        x_T, loss, more, extra = _or_one_pass(sampler, target, outcome.solution, x_T, loss)
        rounds, rows = rounds + more, rows + extra
    status = torch.full((B,), int(Status.MAX_STEPS), device=target.device)
    if outcome.solution is not None:
        status = outcome.solution.status
    status = torch.where(loss.isfinite(), status, int(Status.NONFINITE))
    return Inversion(
        x_T.to(x_0.dtype).reshape(x_0.shape), loss, outcome.history, status, x_T.square().sum(1) / D,
        outcome.rounds + rounds, outcome.evaluations + rows, outcome.solution, outcome.state,
    )  # fmt: skip


def _or_one_pass(
    sampler: Sampler, target: Tensor, solution: Solution, x_T: Tensor, loss: Tensor
) -> tuple[Tensor, Tensor, int, Tensor]:
    """x_T and loss, from one-pass inversion where the fixed point was missed and that is better; rounds and rows."""
    missed = (~solution.converged & target.isfinite().all(1)).nonzero()[:, 0]
    rows = torch.zeros_like(solution.evaluations)
    if not len(missed):
        return x_T, loss, 0, rows
    part = sampler.pick(missed)
    rough = _one_pass(part, target[missed])
    sampled, rounds, spent = part.at(rough.x_T).check(None, LOSS_STOP)
    rows[missed] = rough.evaluations + spent
    rough_loss = (sampled - target[missed]).square().sum(1)
    better = ~(loss[missed] <= rough_loss)
    x_T, loss = x_T.clone(), loss.clone()
    x_T[missed] = torch.where(better[:, None], rough.x_T, x_T[missed])
    loss[missed] = torch.where(better, rough_loss, loss[missed])
    return x_T, loss, rough.rounds + rounds, rows


def _one_pass(sampler: Sampler, target: Tensor) -> _Outcome:
    """x_k ≈ (x_{k+1} − c_k ε(x_{k+1}, t_{k+1})) / a_k; at the image itself, which has no t, that of the last step."""
    chain, x = sampler.map.chain, target
    T = len(chain)
    a, c = chain.a, chain.c
    for k in range(T - 1, -1, -1):
        at = min(k + 1, T - 1)
        t = chain.timesteps[at].expand(len(x))
        eps = sampler.map.network.epsilon(x, t, chain.alphas[at].expand(len(x)), sampler.conditioning)
        x = (x - c[k] * eps) / a[k]
    return _Outcome(x, x.new_empty(0, len(x)), T, torch.full((len(x),), T, device=x.device))


def reversed_map(forward: Remainders) -> Remainders:
    """The chain read from the image to the latent: step j ends at x_k, k = T − 1 − j, where N_k is evaluated."""
    chain, split = forward.chain, forward.splitting
    flipped = replace(
        chain, timesteps=chain.timesteps.flip(0), alphas=chain.alphas.flip(0), alphas_next=chain.alphas_next.flip(0)
    )
    offset = None if split.offset is None else split.offset.flip(0)
    A, c = forward.linear.A.flip(0), forward.linear.c.flip(0)
    return Remainders(forward.network, flipped, Splitting(split.kappa.flip(0), offset), LinearChain(1 / A, -c / A), 1)


def _exact(sampler: Sampler, target: Tensor, solver: Any, stop: Stop, bar: Any) -> _Outcome:
    """All of x_1 … x_T as one fixed point (joint over time: the steps near the image are stiff and need the others)."""
    backward = reversed_map(sampler.map)
    B, D = target.shape
    T = len(backward.chain)
    backward.evaluations = torch.zeros(B, dtype=torch.int64, device=target.device)
    drift = None if backward.splitting.offset is None else backward.linear.c * backward.splitting.offset
    base = backward.linear.base(target, None if drift is None else drift[None])

    def tick(step: int, N: Tensor, residual: Tensor) -> bool:
        bar.update()
        return False

    guess = torch.zeros(B, T, D, dtype=torch.float64, device=target.device)
    image = torch.arange(B, device=target.device)
    solution = solve(
        backward, guess, (image, base, *sampler.conditioning), solver=solver, stop=stop, gradient=None, trace=True,
        callback=tick,
    )  # fmt: skip
    assert solution.trace is not None
    x_T = backward.linear.trajectory(base, solution.z)[:, -1]
    return _Outcome(x_T, solution.trace, solution.steps, backward.evaluations, solution.z.flip(1), solution)


@dataclass(eq=False)
class _Descent:
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
    ) -> _Descent:  # fmt: skip
        B, D = target.shape
        T, device = len(sampler.map.chain), target.device
        if state is None:
            start = torch.randn(B, D, dtype=torch.float64, generator=generator).to(device)
            state = {
                "x_T": start, "best": start, "best_loss": torch.full((B,), torch.inf, dtype=torch.float64),
                "history": torch.empty(0, B, dtype=torch.float64), "evaluations": torch.zeros(B, dtype=torch.int64),
                "rounds": torch.zeros((), dtype=torch.int64), "N": torch.zeros(B, T, D, dtype=torch.float64),
            }  # fmt: skip
        if state["x_T"].shape != (B, D) or state["N"].shape != (B, T, D):
            raise ValueError(f"state: belongs to {tuple(state['N'].shape)} images × steps × pixels, not {(B, T, D)}")
        at = {name: value.clone().to(device) for name, value in state.items()}
        x_T = at["x_T"].requires_grad_()
        optimizer = make([x_T]) if make is not None else torch.optim.Adam([x_T], lr=lr)
        moments = {name[5:]: value for name, value in at.items() if name.startswith("adam.")}
        if moments:
            optimizer.state[x_T] = moments
        return _Descent(
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
        self, epochs: int, gradient: Phantom | Implicit, stop: Stop, solver: Any, callback: Any, bar: Any
    ) -> _Outcome:
        """Epochs up to number `epochs`, those of the resumed state included."""
        while self.epoch < epochs:
            sampler = self.sampler.at(self.x_T.detach())
            if self.method == "naive":
                x_0, rounds, rows = sampler.differentiable_sequential(self.x_T)
            else:
                x_0, self.N, rounds, rows = sampler.differentiable_parallel(self.x_T, self.N, gradient, stop, solver)
            loss = (x_0 - self.target).square().sum(1)
            self._step(loss)
            self.epoch, self.rounds = self.epoch + 1, self.rounds + rounds
            self.evaluations = self.evaluations + rows
            bar.update()
            seen = Epoch(self.epoch, self.history[-1], self.best_loss, self.snapshot)
            if callback is not None and callback(seen):
                break
        history = torch.stack(self.history) if self.history else self.target.new_empty(0, len(self.target))
        return _Outcome(self.best, history, self.rounds, self.evaluations, None, None, self.snapshot())

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
