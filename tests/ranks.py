"""Processes that form a gloo group, and the cases each of them runs: what tests/test_distributed.py starts."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import spawned
import torch
import torch.distributed as dist
from mixture import Mixture, latents, means
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from diffusion import Parallel, Schedule, Splitting, load_checkpoint, sample
from pydeqsolve import Anderson, Implicit, Stop

SCHEDULE = Schedule.linear(1000, 1e-4, 0.02)
TIGHT = 1e-8
AT_ONCE = Implicit(solver=Anderson(2, coupling="causal"), stop=Stop(rtol=1e-8))
SILENCE = 10.0  # seconds


def start(folder: Path) -> spawned.Everything:
    """What each of three processes found, by phase, and their exit codes."""
    return spawned.start(_child, folder)


def _child(rank: int, folder: Path) -> None:
    spawned.meet(rank, folder)
    pair, short = dist.new_group([0, 1]), dist.new_group([0, 1], timeout=timedelta(seconds=2))
    if rank < 2:
        torch.save(agreeing(rank, pair), folder / f"pair-{rank}.pt")
    torch.save(agreeing(rank, dist.group.WORLD), folder / f"three-{rank}.pt")
    torch.save(losing_a_rank(rank, short), folder / f"lost-{rank}.pt")
    os._exit(0)  # a group that has lost a rank would wait for it when it is taken down


class Fails(nn.Module):
    """A model that calls `fail` instead of answering its third call, on one rank."""

    def __init__(self, fail: Any, on: int) -> None:
        super().__init__()
        self.model, self.fail, self.on, self.calls = Mixture(SCHEDULE, means()), fail, on, 0

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == 3 and dist.get_rank() == self.on:
            self.fail()
        return self.model(x, t)


class Normed(nn.Module):
    """A model with buffers, which DDP broadcasts before every forward pass, and parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.norm = Mixture(SCHEDULE, means()), nn.BatchNorm1d(6, dtype=torch.float64)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.model(x, t) + 0.1 * self.norm(x)


class SampledLoss(nn.Module):
    """A loss of sampled images, differentiable in the model's parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Mixture(SCHEDULE, means())

    def forward(self, x_T: torch.Tensor) -> torch.Tensor:
        out = sample(self.model, x_T, SCHEDULE.chain(8), error=TIGHT, gradient=Implicit())
        return (out.x_0 * torch.arange(1, 7)).sin().mean()


def run(group: Any, model: Any = None, count: int = 2, steps: int = 30, eta: float = 0.0, **options: Any) -> Any:
    """A sample of the mixture; the same call on every rank and, with group=None, on none."""
    model = Mixture(SCHEDULE, means()) if model is None else model
    generator = options.pop("generator", None) or torch.Generator().manual_seed(3)
    chain = SCHEDULE.chain(steps, eta=eta)
    x_T = options.pop("x_T", None)
    x_T = latents(count, 6) if x_T is None else x_T
    return sample(model, x_T, chain, group=group, generator=generator, **options)


CASES: dict[str, dict[str, Any]] = {
    "parallel": {},
    "sequential": {"method": "sequential"},
    "one row for many ranks": {"count": 1, "method": Parallel(window=1)},
    "window and noise": {"method": Parallel(window=7), "eta": 0.5},
    "small calls": {"steps": 60, "rows_per_call": 5},
    "nodes": {"steps": 300},
    "conditioning": {"inputs": (latents(2, 6, seed=5),)},
}


# What ranks can disagree on: the arguments of a call on this rank, by the name that the error is to say.
DIFFERENT: dict[str, Any] = {
    "latent": lambda rank: {"x_T": latents(2, 6, seed=rank)},
    "latent (count)": lambda rank: {"x_T": latents(2 + rank, 6)},
    "latent (shape)": lambda rank: {"x_T": latents(4, 6).reshape(2 + 2 * (rank > 0), -1, 2)},
    "latent (dtype)": lambda rank: {"x_T": latents(2, 6).to(torch.float32 if rank else torch.float64)},
    "latent (not a tensor)": lambda rank: {"x_T": [1.0] if rank else latents(2, 6)},
    "chain": lambda rank: {"steps": 10 + rank},
    "chain (eta)": lambda rank: {"eta": 0.5 * min(rank, 1)},
    "generator": lambda rank: {"eta": 1.0, "generator": torch.Generator().manual_seed(rank)},
    "noises": lambda rank: {"eta": 1.0, "noises": latents(2, 30, 6, seed=rank)},
    "prediction": lambda rank: {"prediction": ("epsilon", "v")[min(rank, 1)]},
    "splitting": lambda rank: {"splitting": ("v", "epsilon")[min(rank, 1)]},
    "splitting (offset)": lambda rank: {
        "splitting": Splitting.named("gaussian", SCHEDULE.chain(30), torch.full((6,), 0.1 * rank), torch.ones(6))
    },
    "splitting (basis)": lambda rank: {
        "splitting": Splitting(torch.zeros(30, 1, dtype=torch.float64), basis=torch.eye(6 + rank, dtype=torch.float64))
    },
    "method": lambda rank: {"method": ("parallel", "sequential")[min(rank, 1)]},
    "method (solver)": lambda rank: {"method": Parallel(solver=Anderson(2 + rank, coupling="causal"))},
    "inputs": lambda rank: {"inputs": (latents(2, 6, seed=rank),)},
    "inputs (dtype)": lambda rank: {"inputs": (latents(2, 6).to(torch.float32 if rank else torch.float64),)},
    "inputs (number)": lambda rank: {"inputs": (latents(2, 6),) * (1 + min(rank, 1))},
    "gradient": lambda rank: {"gradient": (Implicit(), AT_ONCE)[min(rank, 1)]},
    "edit": lambda rank: {"edit": (None, _unchanged)[min(rank, 1)]},
    "method (window)": lambda rank: {"method": Parallel(7 + rank)},
    "rows_per_call": lambda rank: {"rows_per_call": 5 + rank},
    "model": lambda rank: {"model": Mixture(SCHEDULE, means()).train(rank > 0)},
}


def _unchanged(x: torch.Tensor, k: int, image: torch.Tensor) -> torch.Tensor:
    return x


class Widened(nn.Module):
    """A model that answers one call in another dtype on rank 1: more than the arguments can tell."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.calls = Mixture(SCHEDULE, means()), 0

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.model(x, t).to(torch.float32 if self.calls == 3 and dist.get_rank() == 1 else torch.float64)


def called_back(rank: int, group: Any, answer: Any) -> Any:
    """A sample with a callback on rank 1 alone."""
    return run(group, steps=40, callback=answer if rank == 1 else None, progress=rank == 0)


def digits(group: Any, model: nn.Module | None = None, count: int = 2, **options: Any) -> torch.Tensor:
    """Images of the shipped float32 model."""
    checkpoint = load_checkpoint("digits")
    x_T, chain = latents(count, *checkpoint.shape).float(), checkpoint.schedule.chain(50)
    return sample(model or checkpoint.model, x_T, chain, group=group, error=1e-5, **options).x_0


def message(action: Any) -> str:
    """Kind and text of the error that action() raises, or nothing."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _give_up() -> None:
    raise MemoryError("no room for the rows")


@torch.no_grad()
def agreeing(rank: int, group: Any) -> dict[str, Any]:
    """Every case that must end well or in an error on all ranks."""
    found = {}
    for name, options in CASES.items():
        model = Mixture(SCHEDULE, means())
        out = run(group, model, **options)
        found[name] = {
            "trajectory": out.trajectory, "rounds": out.rounds, "evaluations": out.evaluations, "rows": model.rows,
        }  # fmt: skip
    found["digits"] = digits(group)
    found["model fails"] = message(lambda: run(group, Fails(_give_up, on=1)))
    found["different"] = {name: message(lambda of=of: run(group, **of(rank))) for name, of in DIFFERENT.items()}
    found["refused by all"] = message(lambda: run(group, method="fast"))
    found["dtype of the answer"] = message(lambda: run(group, Widened()))
    found["stopped"] = called_back(rank, group, lambda step, *_: step == 2).rounds
    found["callback fails"] = message(lambda: called_back(rank, group, lambda *_: _give_up()))
    found["after errors"] = run(group).trajectory
    wrapped = nn.parallel.DistributedDataParallel(Normed().eval(), process_group=group)
    found["DDP shared"] = run(group, wrapped, count=1, method=Parallel(window=1)).x_0
    network = load_checkpoint("digits").model.to(memory_format=torch.contiguous_format)  # which FSDP asks for
    found["FSDP"] = digits(
        group, fully_shard(network, mesh=DeviceMesh.from_group(group, "cpu")), method=Parallel(window=1), count=1
    )
    found["DDP alone"] = run(None, wrapped, count=1, steps=40 + 60 * rank).rounds
    with torch.enable_grad():
        loss = nn.parallel.DistributedDataParallel(SampledLoss(), process_group=group)
        loss(latents(2, 6, seed=rank)).backward()
        found["sampling in DDP"] = loss.module.model.means.grad
        found["DDP in sampling"] = [sampled_gradient(wrapped, rank, turn) for turn in range(2)]
        x_T = latents(2, 6).requires_grad_()
        model = Mixture(SCHEDULE, means())
        out = run(group, model, x_T=x_T, gradient=AT_ONCE)
        found["shared gradient"] = torch.autograd.grad(out.x_0.sin().sum(), [x_T, model.means])
        swept = run(group, model, x_T=x_T, gradient=Implicit())
        found["swept gradient"] = torch.autograd.grad(swept.x_0.sin().sum(), [x_T, model.means])
        found["shared products"] = out.solution.adjoint.evaluations
    return found


def sampled_gradient(model: nn.Module, rank: int, turn: int) -> torch.Tensor:
    """The gradient of a model's own parameters from one sampled batch; every rank and turn has another."""
    model.zero_grad()
    x_T = latents(2, 6, seed=10 * turn + rank)
    sample(model, x_T, SCHEDULE.chain(6 + turn), error=TIGHT, gradient=Implicit()).x_0.sin().sum().backward()
    return next(p.grad.clone() for name, p in model.named_parameters() if name.endswith("norm.weight"))


@torch.no_grad()
def losing_a_rank(rank: int, short: Any) -> dict[str, Any]:
    """Rank 1 keeps rank 0 waiting for longer than their group's limit; then rank 2 dies."""
    found: dict[str, Any] = {}
    if rank < 2:
        begin = time.monotonic()
        found["silent"] = message(lambda: run(short, Fails(lambda: time.sleep(SILENCE), on=1)))
        found["silent seconds"] = time.monotonic() - begin
    dist.barrier()
    found["dead"] = message(lambda: run(dist.group.WORLD, Fails(lambda: os._exit(7), on=2)))
    return found
