"""Training with DEQ layers: in DistributedDataParallel, and the example classifier."""

import importlib.util
import os
import sys
from pathlib import Path

import problems
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pydeqsolve import DEQ, Implicit, Phantom, Stop

f64 = torch.float64
GRADIENTS = {"implicit": Implicit(stop=Stop(rtol=1e-11)), "phantom": Phantom(steps=3, damping=0.8)}


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(0.6 * problems.orthogonal(5, 1))

    def forward(self, z, x):
        return torch.tanh(z @ self.W.T + x)


def model(gradient: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), DEQ(Cell(), stop=Stop(rtol=1e-13), gradient=GRADIENTS[gradient])).double()


def batch() -> torch.Tensor:
    scale = torch.linspace(0.1, 3, 6, dtype=f64)[:, None]  # samples that take different numbers of steps
    return scale * torch.randn(6, 3, dtype=f64, generator=problems.generator(4))


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found = {}
    for name in GRADIENTS:
        parallel = DistributedDataParallel(model(name))
        for _ in range(2):  # the reducer must have seen every parameter the first time
            parallel.zero_grad()
            parallel(batch()[3 * rank : 3 * rank + 3]).square().mean().backward()
        found[name] = [p.grad for p in parallel.parameters()]
    torch.save(found, f"{folder}/rank-{rank}.pt")
    dist.barrier()
    os._exit(0)  # threads of gloo may abort a process that ends while they run


def test_two_ranks_of_ddp_have_the_gradient_of_the_whole_batch(tmp_path):
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    for name in GRADIENTS:
        whole = model(name)
        whole(batch()).square().mean().backward()
        for rank in range(2):
            found = torch.load(tmp_path / f"rank-{rank}.pt")[name]
            for a, p in zip(found, whole.parameters(), strict=True):
                torch.testing.assert_close(a, p.grad, rtol=1e-8, atol=1e-12)


def example():
    path = Path(__file__).parents[1] / "docs" / "examples" / "deq_classifier.py"
    spec = importlib.util.spec_from_file_location("deq_classifier", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("gradient", [Implicit(stop=Stop(rtol=1e-3)), Phantom(5, 0.8)], ids=["implicit", "phantom"])
def test_the_example_classifies_97_per_cent_of_unseen_digits(gradient):
    module = example()
    found = module.train(lambda cost: module.Ours(gradient, cost), epochs=10, seed=0)
    assert found["accuracy"] >= 0.97
    assert found["forward"] < 12
