"""Inversion of real images by every method: loss, model rows, depth, time, and what becomes of known latents.

    python benchmarks/inversion_table.py                                # digits, 100 test images, T = 10, 20, 50, 100
    python benchmarks/inversion_table.py --spacing quadratic --descents 0
    python benchmarks/inversion_table.py --model fashion --steps 10 50 --json fashion.json

After Table 3 and Figure 3 of Pokle, Geng & Kolter 2022. loss is ‖x̂_0 − x_0‖² of the image that the chain makes of the
latent found; rows are model evaluations per image, the sampling that measures the loss included; depth is model calls
one after the other, those of that sampling beside it. deq and naive go in turns: some epochs of deq, then naive until
it has used as much processor time, and so on, so that whatever else the machine does falls on both. Both start from the
same latents and have the learning rate that suits them best. The backward passes of naive, T an epoch, are in its time
but not in its rows; deq, with the paper's gradient of one step, has none.
"recovery" inverts images that were sampled from known latents: the root mean square error of the latent, in
standard deviations. The JSON file holds all of that and the loss of every epoch (least, median, greatest): Figure 3.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion import Descent, Parallel, Sequential, invert, load_checkpoint, sample
from diffusion.chain import Chain
from diffusion.invert import Inversion
from diffusion.models.checkpoint import Checkpoint
from diffusion.training.data import digits, fashion
from pydeqsolve import Status

TURNS = 20
THROUGH = {"deq": Parallel(), "naive": Sequential()}


@dataclass
class Row:
    """One method on one chain; medians over the images unless said."""

    method: str
    steps: int
    images: int
    loss_min: float
    loss_median: float
    loss_max: float
    rows: float
    depth: int
    check: int
    seconds: float  # of processor time, per image
    epochs: int
    converged: int
    typicality: float
    band: dict[str, list[float]] = field(default_factory=dict)  # loss of every epoch over the images


def row_of(method: str, chain: Chain, found: Inversion, seconds: float) -> Row:
    loss, count = found.loss, len(found.loss)
    descent = method in ("naive", "deq")
    best = found.history.cummin(0).values
    band = {"least": best.amin(1), "median": best.median(1).values, "greatest": best.amax(1)} if descent else {}
    return Row(
        method, len(chain), count, loss.min().item(), loss.median().item(), loss.max().item(),
        found.evaluations.double().mean().item(), found.rounds, found.check, seconds / count,
        len(found.history) if descent else 0, int((found.status == Status.CONVERGED).sum()),
        found.typicality.median().item(), {name: value.tolist() for name, value in band.items()},
    )  # fmt: skip


def images_of(checkpoint: Checkpoint, count: int) -> Tensor:
    """Test images, from the data set where it is installed, else those that come with the checkpoint."""
    try:
        return {"digits": digits, "fashion": fashion}[checkpoint.name]().test[:count]
    except (KeyError, ImportError, FileNotFoundError):
        if checkpoint.images is None:
            raise SystemExit(f"{checkpoint.name}: a model with real images is required") from None
        return checkpoint.images[:count]


def timed(checkpoint: Checkpoint, x_0: Tensor, chain: Chain, method: Any, **options: Any) -> tuple[Inversion, float]:
    """What `invert` found, and its seconds of processor time."""
    begin = time.process_time()
    found = invert(checkpoint.model, x_0, chain, method, prediction=checkpoint.prediction, **options)
    return found, time.process_time() - begin


def table(checkpoint: Checkpoint, x_0: Tensor, chain: Chain, descents: int, epochs: int, seed: int) -> list[Row]:
    """Rows of one chain: ddim and exact on all images, deq and naive on the first `descents`."""
    rows = [row_of(method, chain, *timed(checkpoint, x_0, chain, method)) for method in ("ddim", "exact")]
    part = x_0[:descents]
    if not len(part):
        return rows
    for through in THROUGH.values():  # imports and first allocations belong to nobody's time
        timed(checkpoint, part, chain, Descent(through, epochs=1), generator=seeded(seed))
    state = timed(checkpoint, part, chain, Descent(epochs=0), generator=seeded(seed))[0].state
    states, seconds = {"deq": state, "naive": state}, {"deq": 0.0, "naive": 0.0}
    found = {}
    for turn in range(TURNS):
        until = (turn + 1) * epochs // TURNS
        found["deq"], spent = timed(checkpoint, part, chain, Descent(epochs=until), state=states["deq"])
        seconds["deq"] += spent
        begin, left = time.process_time(), seconds["deq"] - seconds["naive"]
        found["naive"], spent = timed(
            checkpoint, part, chain, Descent(Sequential(), epochs=100 * epochs), state=states["naive"],
            callback=lambda epoch, end=begin + left: time.process_time() >= end,
        )  # fmt: skip
        seconds["naive"] += spent
        states = {method: result.state for method, result in found.items()}
    return [*rows, *(row_of(method, chain, found[method], seconds[method]) for method in ("deq", "naive"))]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def recovery(checkpoint: Checkpoint, chain: Chain, count: int, seed: int) -> dict[str, object]:
    """Root mean square errors of the latents found for images sampled from known ones."""
    x_T = torch.randn(count, *checkpoint.shape, generator=seeded(seed))
    with torch.no_grad():
        x_0 = sample(checkpoint.model, x_T, chain, "sequential", prediction=checkpoint.prediction).x_0
    result: dict[str, object] = {"steps": len(chain), "images": count}
    for method in ("ddim", "exact"):
        found, _ = timed(checkpoint, x_0, chain, method)
        error = (found.x_T - x_T).double().flatten(1).square().mean(1).sqrt()
        result[method] = {
            "rmse_min": error.min().item(), "rmse_median": error.median().item(), "rmse_max": error.max().item(),
            "loss_median": found.loss.median().item(),
        }  # fmt: skip
    return result


def show(rows: list[Row]) -> None:
    """Prints one chain's rows and the ratios that matter."""
    for r in rows:
        print(
            f"{r.steps:>5} {r.method:<6}{r.images:>7}{r.loss_min:>10.0e}{r.loss_median:>10.1e}{r.loss_max:>10.0e}"
            f"{r.rows:>10,.0f}{r.depth:>8,}+{r.check:<4}{r.seconds:>9.2f}{r.epochs or '':>8}{r.typicality:>8.2f}",
            flush=True,
        )
    by = {r.method: r for r in rows}
    if "deq" in by:
        deq, naive, exact = by["deq"], by["naive"], by["exact"]
        print(
            f"      deq: {naive.loss_median / deq.loss_median:,.0f} × less loss than naive in "
            f"{deq.seconds / naive.seconds:.2f} × its time; exact: {deq.rows / exact.rows:.0f} × fewer rows than deq",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="digits", help="digits, fashion or a checkpoint's folder")
    add("--count", type=int, default=100, help="images for ddim and exact")
    add("--descents", type=int, default=16, help="of them for deq and naive, which take some hundred times as long")
    add("--epochs", type=int, default=400, help="of deq")
    add("--steps", type=int, nargs="+", default=[10, 20, 50, 100], help="lengths of the chains")
    add("--spacing", default="linspace", help="of the time steps: linspace, leading, trailing or quadratic")
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=1)
    add("--json", metavar="FILE", help="write everything there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    checkpoint = load_checkpoint(args.model)
    x_0 = images_of(checkpoint, args.count)
    about = {
        "model": checkpoint.name, "shape": list(checkpoint.shape), "images": len(x_0), "spacing": args.spacing,
        "dtype": str(x_0.dtype),
        "device": "cpu", "machine": platform.machine(), "torch": torch.__version__, "threads": args.threads,
        "pydeqsolve": importlib.metadata.version("pydeqsolve"),
    }  # fmt: skip
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print("    T method images  loss min    median       max      rows   depth+check s/image  epochs |x_T|²/D")
    rows, recovered = [], []
    for steps in args.steps:
        chain = checkpoint.schedule.chain(steps, args.spacing)
        found = table(checkpoint, x_0, chain, args.descents, args.epochs, args.seed)
        show(found)
        rows += found
        recovered.append(recovery(checkpoint, chain, min(len(x_0), 64), args.seed + 1))
        print(f"      recovery of latents: {json.dumps(recovered[-1])}", flush=True)
        if args.json:
            result = {"about": about, "rows": [asdict(r) for r in rows], "recovery": recovered}
            Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
