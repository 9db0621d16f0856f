"""Rounds, model rows, error and time of the ways of sampling, on a shipped model against its own sequential sampling.

Speed is against the bare loop x = a x + c·model(x, t) in float32, with the coefficients made before.

Run: OMP_WAIT_POLICY=PASSIVE python benchmarks/sampling_rounds.py --model digits --steps 100 1000 --noises 20
An image at a time (--batch): rounds and rows are then that image's own. Time is the processor's, the median over the
noises, the ways taken in turn for every noise, and speed the median ratio to the bare loop's on the same noise;
`network` is the part of the time spent inside the model. `met` is the share of images within
--error, which is what is asked for, of sequential sampling. --json writes rounds, rows and errors, which are counts.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion import Chain, CoarseToFine, Parallel, Sample, Sequential, load_checkpoint, sample

WAYS: dict[str, dict[str, Any]] = {
    "sequential": {"method": Sequential()},
    "parallel, v": {"method": Parallel()},
    "parallel, gaussian": {"method": Parallel(), "basis": "pixels"},
    "parallel, frequencies": {"method": Parallel(), "basis": "frequencies"},
    "parallel, covariance": {"method": Parallel(), "basis": "covariance"},
    "coarse, v": {"method": CoarseToFine()},
    "coarse, gaussian": {"method": CoarseToFine(), "basis": "pixels"},
    "coarse, covariance": {"method": CoarseToFine(), "basis": "covariance"},
    "auto, gaussian": {"method": "auto", "basis": "pixels"},
}


class Timed(nn.Module):
    """A model that adds up the time spent in it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.seconds = model, 0.0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        start = time.process_time()
        out: Tensor = self.model(x, t)
        self.seconds += time.process_time() - start
        return out


def bare(model: nn.Module, chain: Chain, prediction: str) -> Callable[[Tensor], Tensor]:
    """The loop that anyone would write: x = a x + c·model(x, t), in the dtype of x."""
    a, c, reading = chain.a, chain.c, chain.reading(prediction)
    if reading.state is not None and reading.output is not None:
        a, c = a + c * reading.state, c * reading.output

    def loop(x: Tensor) -> Tensor:
        for a_k, c_k, t in steps:
            x = a_k * x + c_k * model(x, t.expand(len(x)))
        return x

    steps = list(zip(a.tolist(), c.tolist(), chain.timesteps, strict=True))
    return loop


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits", help="digits, fashion or a folder")
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--noises", type=int, default=20)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--error", type=float, default=1e-3, help="relative error of x_0 asked for")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    checkpoint = load_checkpoint(args.model)
    model = Timed(checkpoint.model)
    print(f"{args.model} {checkpoint.shape}, {args.noises} noises in batches of {args.batch}, {args.threads} threads, "
          f"asked for {args.error:g}; torch {torch.__version__}, {platform.machine()}")  # fmt: skip
    print(f"{'T':>5} {'way':20} {'rounds':>10} {'rows/T':>6} {'error: median':>14} {'99 %':>8} {'largest':>8} "
          f"{'met':>6} {'ms':>8} {'network':>8} {'speed':>6}")  # fmt: skip
    rows = []
    for steps in args.steps:
        chain = checkpoint.schedule.chain(steps)
        generator = torch.Generator().manual_seed(args.seed)
        latents = torch.randn(args.noises, *checkpoint.shape, generator=generator).split(args.batch)
        bases = {WAYS[way].get("basis") for way in args.ways} - {None}
        splittings = {basis: checkpoint.splitting(chain, basis) for basis in bases}

        def run(way: str, x: Tensor, chain: Any = chain, splittings: Any = splittings) -> Sample:
            options = {"error": args.error, **WAYS[way]}
            basis = options.pop("basis", None)
            if basis is not None:
                options["splitting"] = splittings[basis]
            return sample(model, x, chain, prediction=checkpoint.prediction, **options)

        loop = bare(model, chain, checkpoint.prediction)
        rows += table(steps, args, model, run, latents, loop)
    if args.json:
        about = {
            "pydeqsolve": importlib.metadata.version("pydeqsolve"), "torch": torch.__version__,
            "machine": platform.machine(), "model": args.model, "noises": args.noises, "batch": args.batch,
            "error": args.error, "seed": args.seed,
        }  # fmt: skip
        args.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


def table(
    steps: int, args: Any, model: Timed, run: Callable[[str, Tensor], Sample], latents: Any,
    loop: Callable[[Tensor], Tensor],
) -> list[dict[str, Any]]:  # fmt: skip
    """Print one line per way, and return what is counted."""
    counted = []
    ways = ["sequential", *[way for way in args.ways if way != "sequential"]]
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    network: dict[str, list[float]] = {way: [] for way in ways}
    results: dict[str, list[Sample]] = {way: [] for way in ways}
    alone: list[float] = []
    for way in ways:
        run(way, latents[0])
    for x in latents:
        start = time.process_time()
        loop(x)
        alone.append(time.process_time() - start)
        for way in ways:
            model.seconds, start = 0.0, time.process_time()
            results[way].append(run(way, x))
            seconds[way].append(time.process_time() - start)
            network[way].append(model.seconds)
    expected = torch.cat([out.x_0 for out in results["sequential"]]).double().flatten(1)
    print(f"{steps:5} {'bare loop':20} {'':10} {'':6} {'':14} {'':8} {'':8} {'':6} {median(alone) * 1e3:8.1f}")
    for way in ways:
        found = torch.cat([out.x_0 for out in results[way]]).double().flatten(1)
        error = (found - expected).norm(dim=1) / expected.norm(dim=1)
        rounds = torch.tensor([float(out.rounds) for out in results[way]])
        rows = torch.cat([out.evaluations for out in results[way]]).double() / steps
        counts = f"{rounds.median():4.0f} ≤{rounds.max():4.0f} {rows.mean():6.2f}"
        errors = f"{error.median():14.1e} {error.quantile(0.99):8.1e} {error.max():8.1e}"
        met = (error <= args.error).double().mean()
        times = f"{median(seconds[way]) * 1e3:8.1f} {median(network[way]) * 1e3:8.1f}"
        speed = median([base / own for base, own in zip(alone, seconds[way], strict=True)])
        print(f"{steps:5} {way:20} {counts} {errors} {met:6.1%} {times} {speed:6.2f}", flush=True)
        counted.append(
            {
                "steps": steps,
                "way": way,
                "rounds": rounds.median().item(),
                "most_rounds": rounds.max().item(),
                "evaluations_per_step": rows.mean().item(),
                "largest_error": error.max().item(),
                "met": met.item(),
            }
        )
    return counted


def median(values: list[float]) -> float:
    return float(torch.tensor(values, dtype=torch.float64).median())


if __name__ == "__main__":
    with torch.no_grad():
        main()
