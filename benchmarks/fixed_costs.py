"""What a solve costs besides fn: before its first step and after its last, in each step, and with many small states.

    python benchmarks/fixed_costs.py [--before TREE] [--repeats 3] [--million]

Processor time of one thread; the least of some repetitions, calls of fn alone taken off. TREE is another checkout of
this repository, built: both are measured in turns, in processes of their own, and the last column is the ratio.
Python calls are counted by the interpreter's profile hook and do not depend on the machine. --million solves a million
small states too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pydeqsolve import DEQ, Stop, solve

STEPS = 100


def seconds(act: Callable[[], object], calls: int, turns: int = 3) -> float:
    """Processor time of one call of act: the least of some turns."""
    act()
    found = []
    for _ in range(turns):
        start = time.thread_time()
        for _ in range(calls):
            act()
        found.append((time.thread_time() - start) / calls)
    return min(found)


def python_calls(act: Callable[[], object]) -> int:
    """Calls of functions, those written in C among them."""
    act()
    count = 0

    def hook(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(hook)
    act()
    sys.setprofile(None)
    return count


def wandering(steps: int) -> Callable[[], object]:
    """A solve of `steps` steps, none of which converges: fn returns tensors that were made before."""
    z0, stop = torch.zeros(1, 64), Stop(rtol=0.0, max_steps=steps)
    values = [torch.randn(1, 64, generator=torch.Generator().manual_seed(k)) for k in range(steps)]

    def run() -> object:
        following = iter(values)
        return solve(lambda z: next(following), z0, stop=stop, gradient=None)

    return run


def small(n: int, features: int) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """n states of a few unknowns each, z = tanh(z W + b): a cheap map."""
    b = torch.rand(n, features, generator=torch.Generator().manual_seed(0))
    W = 0.3 * torch.randn(features, features, generator=torch.Generator().manual_seed(1))
    return lambda z: torch.tanh(z @ W + b), torch.zeros(n, features)


def cheap(n: int, features: int) -> dict[str, tuple[Callable[[Tensor], Tensor], Tensor]]:
    """The cheapest maps there are, entry by entry, each with its start: from one multiplication and addition on."""
    made = torch.Generator().manual_seed(0)
    b, e = torch.rand(n, features, generator=made), 0.9 * torch.rand(n, features, generator=made)
    zero, one = torch.zeros(n, features), torch.ones(n, features)
    return {
        "b + z/2": (lambda z: b + 0.5 * z, zero),
        "(z + a/z)/2": (lambda z: 0.5 * (z + (b + 0.5) / z), one),
        "cos z": (torch.cos, zero),
        "M + e sin z": (lambda z: 6 * b + e * torch.sin(z), zero),
    }


def sweep(fn: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """A hundred plain sweeps from z."""
    for _ in range(100):
        z = fn(z)
    return z


def measured(sizes: tuple[int, ...]) -> dict[str, float]:
    """Microseconds, and counts of calls, by what was measured."""
    z = torch.randn(1, 64)
    layer = DEQ(lambda z, x: x, gradient=None)
    few, many = wandering(10), wandering(10 + STEPS)
    cases: dict[str, Callable[[], object]] = {
        "solve, one evaluation": lambda: solve(lambda y: z, z, gradient=None),
        "solve, one evaluation, an input": lambda: solve(lambda y, x: x, z, (z,), gradient=None),
        "DEQ.forward, one evaluation": lambda: layer(z, z0=z),
    }
    out: dict[str, float] = {}
    for name, act in cases.items():
        out[f"{name}: us"] = 1e6 * seconds(act, 200)
        out[f"{name}: calls"] = python_calls(act)
    out["a step: us"] = 1e6 * (seconds(many, 5) - seconds(few, 50)) / STEPS
    out["a step: calls"] = (python_calls(many) - python_calls(few)) / STEPS
    many_states = [(f"{n:,} x 3 states", *small(n, 3)) for n in sizes]
    n = sizes[0]
    many_states += [(f"{n:,} x {D}, {name}", *case) for D in (1, 3, 4) for name, case in cheap(n, D).items()]
    for name, fn, z0 in many_states:
        swept = seconds(lambda fn=fn, z0=z0: sweep(fn, z0), 1, 2)  # type: ignore[misc]
        solved = seconds(lambda fn=fn, z0=z0: solve(fn, z0, gradient=None), 1, 2)  # type: ignore[misc]
        out[f"{name}: solve / 100 plain sweeps"] = solved / swept
    return out


def elsewhere(tree: Path, million: bool) -> dict[str, float]:
    """`measured` of another tree, by this script in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--json", *["--million"] * million]
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=tree, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--before", type=Path, help="another tree to measure beside this one")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--million", action="store_true", help="a million small states too")
    parser.add_argument("--json", action="store_true", help="one measurement, as JSON")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.json:
        print(json.dumps(measured((200_000, 1_000_000) if given.million else (200_000,))))
        return
    here = Path(__file__).resolve().parents[1]
    trees = [here] if given.before is None else [given.before.resolve(), here]
    found: list[list[dict[str, float]]] = [[] for _ in trees]
    for _ in range(given.repeats):
        for tree, results in zip(trees, found, strict=True):
            results.append(elsewhere(tree, given.million))
    columns = "before, after, their ratio" if len(trees) > 1 else "this tree"
    print(f"torch {torch.__version__}, one thread, the least of {given.repeats} runs: {columns}")
    for name in found[0][0]:
        least = [min(result[name] for result in results) for results in found]
        ratio = f"{least[-1] / least[0]:8.2f}" if len(least) > 1 else ""
        print(f"{name:<48}" + "".join(f"{value:10.2f}" for value in least) + ratio)


if __name__ == "__main__":
    main()
