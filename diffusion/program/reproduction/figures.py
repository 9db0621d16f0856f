"""Figures 1 and 2 of the paper: convergence of the fixed point over solver steps, and the latents it passes through."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pydeqsolve import Anderson, Stop

from ...chain import Chain
from ...methods.parallel import SOLVER, Parallel, fixed_point
from ...models.checkpoint import Checkpoint
from ...problem import ChainProblem
from ...sample import sample
from ...trajectory import LinearChain
from .. import pictures
from ..commands import options_of
from .ledger import Ledger, Measurement
from .subject import Subject

PAPER, OURS = "paper", "default"
SOLVERS: dict[str, dict[str, Any]] = {
    PAPER: {"splitting": "epsilon", "solver": Anderson(memory=5, coupling="independent", safeguard=10.0)},
    OURS: {},
}
LABELS = {PAPER: "paper: Anderson per time step, on ε", OURS: "default here: causal Anderson, split"}
EXACT = 0.0  # a tolerance that no round meets before the chain is exact: every round is seen
LATENTS_SHOWN = 4


def chain_residual(checkpoint: Checkpoint, chain: Chain, trajectory: Tensor) -> Tensor:
    """Return ‖h̃(x_{0:T}) − x_{0:T}‖₂ (B,) float64 of trajectories (B, T+1, C, H, W), x_T first.

    h̃ is the unsplit chain (Pokle, Geng & Kolter 2022, Eq. 10), whatever solver the trajectory comes from.
    """
    B, T = len(trajectory), len(chain)
    device = trajectory.device
    x, latent = trajectory.double().flatten(2), trajectory[:, 0].float()
    chain_map = ChainProblem.of(checkpoint.model, latent, chain, prediction=checkpoint.prediction).map
    with torch.no_grad():
        eps = chain_map.epsilon(x[:, :-1].flatten(0, 1), torch.arange(T, device=device).repeat(B)).reshape(B, T, -1)
    linear = LinearChain(chain.a[:, None].to(device), chain.c[:, None].to(device))
    return (linear.trajectory(linear.base(x[:, 0], None), eps) - x).flatten(1).norm(dim=1)


def convergence(subject: Subject, steps: int, solver: str, ledger: Ledger) -> Tensor:
    """Return the residual (rounds, runs) of the chain of `steps` after each solver step."""
    plan, checkpoint = subject.plan, subject.checkpoint
    chain = checkpoint.schedule.chain(steps, eta=0.0)
    rounds = min(plan.rounds, steps)

    def one_batch(number: int, count: int) -> Measurement:
        seen: list[Tensor] = []

        options = {**options_of(checkpoint, chain, None), **SOLVERS[solver]}
        chosen = options.pop("solver", SOLVER)
        with torch.no_grad():
            problem = ChainProblem.of(checkpoint.model, subject.latents(number, count), chain, **options)

            def see(_: int, states: Tensor, residual: Tensor) -> None:
                seen.append(chain_residual(checkpoint, chain, problem.shaped(states)).cpu())

            guess = problem.latent.new_zeros(count, steps, problem.latent.shape[1])
            fixed_point(problem, guess, Stop(EXACT, max_steps=rounds), chosen, callback=see)
        return Measurement(tensors={"residual": torch.stack(seen)})

    parts = []
    for number, count in enumerate(batches(plan.runs, plan.batch)):
        settings = {**subject.identity, "steps": steps, "rounds": rounds, "number": number, "count": count}
        name = f"{subject.name}-figure1-T{steps}-{solver}-{number}"
        part = ledger.once(name, settings, lambda number=number, count=count: one_batch(number, count))  # type: ignore[misc]
        parts.append(part.tensors["residual"])
    least = min(len(part) for part in parts)
    return torch.cat([part[:least] for part in parts], dim=1)


def batches(count: int, size: int) -> list[int]:
    """Return the sizes of the batches that `count` things make, `size` at most each."""
    return [min(size, count - start) for start in range(0, count, size)]


def figure1(subject: Subject, folder: Path, ledger: Ledger) -> list[dict[str, Any]]:
    """Write Figure 1, one picture per length of chain; return what they show."""
    found = []
    for steps in subject.plan.steps:
        curves = {solver: convergence(subject, steps, solver, ledger) for solver in SOLVERS}
        file = f"{subject.name}-figure1-T{steps}.png"
        pictures.draw_curves(
            folder / file, f"{subject.name}, T = {steps}", {LABELS[solver]: c for solver, c in curves.items()},
            "solver step", "‖h̃(x) − x‖₂",
        )  # fmt: skip
        last = {solver: c.median(1).values.tolist() for solver, c in curves.items()}
        found.append({"steps": steps, "runs": subject.plan.runs, "file": file, "median_residual": last})
    return found


def figure2(subject: Subject, folder: Path, ledger: Ledger) -> dict[str, Any]:
    """Write Figure 2, the states x_t after the solver steps of the plan; return what it shows."""
    steps, checkpoint = max(subject.plan.steps), subject.checkpoint
    chain = checkpoint.schedule.chain(steps, eta=0.0)
    rounds = min(subject.plan.rounds, steps)

    def solve() -> Measurement:
        with torch.no_grad():
            out = sample(
                checkpoint.model, subject.latents(0, LATENTS_SHOWN), chain, Parallel(), max_rounds=rounds,
                **options_of(checkpoint, chain, None),
            )  # fmt: skip
        return Measurement({"rounds": out.rounds}, {"states": out.trajectory[:, paper_states(steps)]})

    settings = {**subject.identity, "steps": steps, "rounds": rounds}
    found = ledger.once(f"{subject.name}-figure2-T{steps}", settings, solve)
    file, at = f"{subject.name}-figure2.png", paper_states(steps)
    states = found.tensors["states"]
    trajectory = states.new_zeros(len(states), steps + 1, *states.shape[2:])
    trajectory[:, at] = states
    title = f"{subject.name}: x_t after {found.facts['rounds']} solver steps, T = {steps}"
    pictures.draw_latents(folder / file, title, trajectory, chain, at)
    return {"steps": steps, "rounds": found.facts["rounds"], "file": file}


def paper_states(steps: int) -> Tensor:
    """Return the positions that the paper shows: every tenth part of the chain, and its last five states."""
    tenths = torch.arange(0, steps + 1, max(1, steps // 10))
    return torch.cat([tenths, torch.arange(max(0, steps - 4), steps + 1)]).unique()
