"""Prints the calls between public functions and what they lead to, both ends excluded: `python benchmarks/frames.py`.

Of `solve` to the native step and to the user's function, of `sample` and `invert` to the network. A reader who follows
one value passes through as many functions.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from diffusion import Schedule, invert, sample
from pydeqsolve import solve
from pydeqsolve.step import native


class Way:
    """Wraps a function and keeps the longest way to it from the function named `start`."""

    def __init__(self, start: str, goal: Callable[..., Any]) -> None:
        self.start, self.goal = start, goal
        self.frames: list[str] = []

    def __call__(self, *args: Any, **options: Any) -> Any:
        stack = traceback.extract_stack()[:-1]
        first = next(i for i, frame in enumerate(stack) if frame.name == self.start)
        found = [
            f"{frame.filename.rpartition('/')[2].removesuffix('.py')}.{frame.name}" for frame in stack[first + 1 :]
        ]
        if len(found) > len(self.frames):
            self.frames = found
        return self.goal(*args, **options)

    def show(self, goal: str) -> None:
        print(f"{self.start} to {goal}: {len(self.frames)}  ({', '.join(self.frames)})")


def main() -> None:
    if native._native is not None:
        to_native = Way("solve", native._native.step)
        with mock.patch.object(native._native, "step", to_native):
            solve(lambda z: 0.5 * z + 1, torch.zeros(2, 3), gradient=None)
        to_native.show("the native step")
    to_fn = Way("solve", lambda z: 0.5 * z + 1)
    solve(to_fn, torch.zeros(2, 3), gradient=None)
    to_fn.show("fn")
    schedule, noise = Schedule.linear(1000, 1e-4, 0.02), torch.randn(2, 4)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return 0.1 * x

    for steps, method in ((50, "sequential"), (50, "parallel"), (300, "parallel")):
        way = Way("sample", model)
        sample(way, noise, schedule.chain(steps=steps), method=method)
        way.show(f"the network, {steps} steps, {method}")
    way = Way("invert", model)
    invert(way, 0.1 * noise, schedule.chain(steps=50))
    way.show("the network, exact")


if __name__ == "__main__":
    main()
