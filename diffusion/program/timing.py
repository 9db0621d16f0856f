"""Time and agreement of two ways of sampling, measured side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..sample import Sample
from .machine import cores, threads

Run = Callable[[Tensor], Sample]


def thread_counts() -> list[int]:
    """Return 1, 2, 4, … and the number of cores."""
    return sorted({2**k for k in range(cores().bit_length()) if 2**k <= cores()} | {cores()})


def relative_errors(found: Tensor, expected: Tensor) -> Tensor:
    """Return ‖found − expected‖ / ‖expected‖ (B,) float64 on the CPU."""
    a, b = (x.detach().cpu().double().flatten(1) for x in (found, expected))
    return (a - b).norm(dim=1) / b.norm(dim=1)


def timed(run: Run, x_T: Tensor) -> tuple[float, Sample]:
    """Return the seconds a call takes, until its images are on the host, and what it returns."""
    start = time.perf_counter()
    out = run(x_T)
    out.x_0.cpu()
    return time.perf_counter() - start, out


def measure(
    runs: Mapping[str, Run], latents: Sequence[Tensor], counts: Sequence[int], tries: int
) -> tuple[dict[str, Any], dict[str, list[Sample]]]:
    """Return cost and median time of each run, at the thread count that suits it best, and what it made of the latents.

    Args:
        runs: sample from latents (B, …), by name.
        latents: timed one after the other, all runs in turn, so that a change of the machine's load meets every one.
        counts: thread counts to try.
        tries: how often; the least time counts.
    """
    result: dict[str, Any] = {}
    for name, run in runs.items():
        least = {}
        for count in counts:
            with threads(count):
                least[count] = min(timed(run, latents[0])[0] for _ in range(tries))
        result[name] = {"threads": min(least, key=least.__getitem__), "seconds_by_threads": least}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    outs: dict[str, list[Sample]] = {name: [] for name in runs}
    for x_T in latents:
        for name, run in runs.items():
            with threads(result[name]["threads"]):
                spent, out = timed(run, x_T)
            seconds[name].append(spent)
            outs[name].append(out)
    for name, made in outs.items():
        result[name]["seconds"] = statistics.median(seconds[name])
        result[name]["rounds"] = statistics.median(out.rounds for out in made)
        result[name]["evaluations_per_image"] = statistics.mean(out.evaluations.double().mean().item() for out in made)
    return result, outs


def compare(
    sequential: Run, parallel: Run, latents: Sequence[Tensor], counts: Sequence[int], tries: int
) -> tuple[dict[str, Any], Sample, Sample]:
    """Return what `measure` finds of both and how far they agree, and what they made of latents[0]."""
    result, outs = measure({"sequential": sequential, "parallel": parallel}, latents, counts, tries)
    pairs = zip(outs["parallel"], outs["sequential"], strict=True)
    errors = torch.cat([relative_errors(found.x_0, expected.x_0) for found, expected in pairs])
    result.update(images=len(latents[0]), error_median=errors.median().item(), error_max=errors.max().item())
    result["speedup"] = result["sequential"]["seconds"] / result["parallel"]["seconds"]
    return result, outs["sequential"][0], outs["parallel"][0]
