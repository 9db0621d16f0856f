"""The demonstration: both ways of sampling compared and timed, four ways of inversion, and pictures of it all."""

from __future__ import annotations

import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pydeqsolve import Status

from ..chain import Chain
from ..inversion.descent import Descent
from ..invert import METHODS, NAMED, invert
from ..methods.parallel import Parallel
from ..models.checkpoint import Checkpoint
from ..models.files import write_json
from ..sample import Sample, sample
from . import pictures
from .commands import load, noise, options_of, splitting_of
from .inversion import inverter_of, reconstruct
from .machine import cores, device_of, threads
from .output import counted, finite, say, writable
from .timing import compare, relative_errors, thread_counts

MODELS = ("digits", "fashion")
PICTURES = ("samples", "latents", "convergence", "inversion", "losses")
LONG = {"digits": 1000}  # T of sampling, where it is not 100
AGREEMENT = 1e-3  # relative error at most, parallel against sequential
DESCENTS = tuple(name for name, method in NAMED.items() if isinstance(method, Descent))
REPEATS = 5  # latents that are timed one at a time
REPEATS_BATCH = 3
ROUNDS_SHOWN = 30
SPLITTINGS = {"epsilon": "epsilon (no splitting)", "v": "v", "gaussian": "gaussian"}


def run_demo(args: Namespace) -> dict[str, Any]:
    """Demonstrate on the chosen models, write pictures and summary.json, and return the summary."""
    pictures.require_matplotlib()
    device = device_of(args.device)
    checkpoints = [load(name, device) for name in ([args.model] if args.model else MODELS)]
    for checkpoint in checkpoints:  # what is wrong is said before the work
        if checkpoint.images is None:
            raise ValueError(f"--model {checkpoint.name}: a checkpoint with real images is required")
        _chains(args, checkpoint)
    files = [f"{checkpoint.name}-{what}.png" for checkpoint in checkpoints for what in PICTURES]
    with writable(args.output, [*files, "summary.json"], args.overwrite) as folder:
        start = time.perf_counter()
        models = [_demonstrate(args, checkpoint, folder, device) for checkpoint in checkpoints]
        summary = {
            "command": "demo", "models": models, "agrees": all(model["agrees"] for model in models),
            "device": _describe(device), "torch": torch.__version__, "seed": args.seed,
            "seconds": time.perf_counter() - start, "output": str(folder),
            "files": [file for model in models for file in model.pop("files")] + ["summary.json"],
        }  # fmt: skip
        write_json(folder / "summary.json", finite(summary))
    return summary


def _chains(args: Namespace, checkpoint: Checkpoint) -> tuple[Chain, Chain]:
    """Return the chains of sampling and of inversion."""
    steps = LONG.get(checkpoint.name, 100) if args.steps is None else args.steps
    return checkpoint.schedule.chain(steps, eta=0.0), checkpoint.schedule.chain(args.invert_steps, eta=0.0)


def _describe(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {cores()} cores"


def _demonstrate(args: Namespace, checkpoint: Checkpoint, folder: Path, device: torch.device) -> dict[str, Any]:
    """Return the summary of one model, its pictures written."""
    name = checkpoint.name
    chain, _ = _chains(args, checkpoint)
    x_T = noise(args.seed, args.count, checkpoint, device)
    options = options_of(checkpoint, chain, None)

    def sequential(x: Tensor) -> Sample:
        return sample(checkpoint.model, x, chain, method="sequential", prediction=checkpoint.prediction)

    def parallel(x: Tensor) -> Sample:
        return sample(checkpoint.model, x, chain, **options)

    counts = [args.threads] if args.threads else thread_counts()
    parallel(x_T[:1])  # loads and warms what the first call needs
    say(f"{name}: one image at a time, T = {len(chain)}")
    single, _, _ = compare(sequential, parallel, [x_T[i : i + 1] for i in range(min(REPEATS, len(x_T)))], counts, 3)
    say(f"{name}: {counted(len(x_T), 'image')} at once")
    batch, expected, found = compare(sequential, parallel, [x_T] * REPEATS_BATCH, counts, 1)
    with threads(batch["parallel"]["threads"]):
        files = _draw_sampling(folder, checkpoint, chain, x_T, expected, found)
        say(f"{name}: inversion of {counted(max(1, args.count // 2), 'real image')}, T = {args.invert_steps}")
        inversion, more = _invert_all(args, checkpoint, folder, batch)
    return {
        "model": name, "shape": list(checkpoint.shape), "steps": len(chain),
        "splitting": splitting_of(checkpoint, None),
        "single": single, "batch": batch, "inversion": inversion, "files": files + more,
        "agrees": all(timing["error_max"] <= AGREEMENT for timing in (single, batch)),
    }  # fmt: skip


def _draw_sampling(
    folder: Path, checkpoint: Checkpoint, chain: Chain, x_T: Tensor, expected: Sample, found: Sample
) -> list[str]:
    """Write the pictures of sampling; return their names."""
    name, T = checkpoint.name, len(chain)
    factor, difference = pictures.magnified(found.x_0 - expected.x_0)
    blocks = {
        f"sequential, {expected.rounds} rounds": expected.x_0,
        f"parallel, {found.rounds} rounds": found.x_0,
        f"|difference| × {factor:,}": difference,
    }
    error = relative_errors(found.x_0, expected.x_0).max().item()
    pictures.draw_samples(
        folder / f"{name}-samples.png", f"{name}: DDIM in T = {T} steps", blocks,
        f"Same latents on both sides. Relative difference at most {error:.0e}.",
    )  # fmt: skip
    pictures.draw_latents(
        folder / f"{name}-latents.png", f"{name}: x_t from noise to image", found.trajectory[:4], chain
    )
    curves = {}
    for splitting, label in SPLITTINGS.items():
        say(f"{name}: error round by round, splitting {splitting}")
        curves[label] = errors_by_round(checkpoint, chain, splitting, x_T[:4], expected.x_0[:4])
    pictures.draw_curves(
        folder / f"{name}-convergence.png", f"{name}: parallel sampling, T = {T}", curves,
        "round", "relative error of x₀ against sequential",
    )  # fmt: skip
    return [f"{name}-{what}.png" for what in ("samples", "latents", "convergence")]


def errors_by_round(checkpoint: Checkpoint, chain: Chain, splitting: str, x_T: Tensor, expected: Tensor) -> Tensor:
    """Return the relative error (rounds, B) of the images after each round of all steps."""
    errors = []

    def see(_: int, trajectory: Tensor, residual: Tensor) -> None:
        errors.append(relative_errors(trajectory[:, -1], expected))

    options = {"error": 1e-4, "max_rounds": ROUNDS_SHOWN, **options_of(checkpoint, chain, splitting)}
    sample(checkpoint.model, x_T, chain, Parallel(), callback=see, **options)
    return torch.stack(errors)


def _invert_all(
    args: Namespace, checkpoint: Checkpoint, folder: Path, batch: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Invert real images by every method; return the figures, and the names of the pictures written."""
    assert checkpoint.images is not None
    images = checkpoint.images[: max(1, args.count // 2)]
    _, chain = _chains(args, checkpoint)
    methods, rows, below, curves = {}, {"real image": images}, {}, {}
    for method in METHODS:
        say(f"{checkpoint.name}: inversion by {method}")
        side = "sequential" if method in ("ddim", "naive") else "parallel"
        start = time.perf_counter()
        with threads(batch[side]["threads"]):
            found = invert(
                checkpoint.model, images, chain, inverter_of(method, args.epochs, args.lr), progress=True,
                generator=torch.Generator().manual_seed(args.seed), **options_of(checkpoint, chain, None),
            )  # fmt: skip
        seconds = time.perf_counter() - start
        status = [Status(k).name for k in found.status.tolist()]
        methods[method] = {
            "epochs": args.epochs if method in DESCENTS else None, "rounds": found.rounds,
            "evaluations_per_image": found.evaluations.double().mean().item(),
            "loss_median": found.loss.median().item(), "loss_max": found.loss.max().item(),
            "typicality_median": found.typicality.median().item(),
            "status": {name: status.count(name) for name in sorted(set(status))},
            "seconds": seconds, "threads": batch[side]["threads"],
        }  # fmt: skip
        label = f"{method}\n{args.epochs} epochs" if method in DESCENTS else f"{method}\n{found.rounds} rounds"
        rows[label] = reconstruct(checkpoint, found.x_T, chain)
        below[label] = [f"{loss:.1e}" for loss in found.loss.tolist()]
        if method in DESCENTS:
            evaluations = found.evaluations.double().mean().item()
            curves[f"{method}, {evaluations:,.0f} network evaluations per image"] = found.history
    title = f"{checkpoint.name}: real images, and sampled again from their latents, T = {len(chain)}"
    caption = "Below each image: sum of the squared differences from the real one."
    pictures.draw_rows(folder / f"{checkpoint.name}-inversion.png", title, rows, below, caption=caption, framed=True)
    pictures.draw_curves(
        folder / f"{checkpoint.name}-losses.png", f"{checkpoint.name}: inversion by descent, T = {len(chain)}", curves,
        "epoch", "loss, sum of squares over the pixels",
    )  # fmt: skip
    names = [f"{checkpoint.name}-inversion.png", f"{checkpoint.name}-losses.png"]
    return {"steps": len(chain), "images": len(images), "lr": args.lr, "methods": methods}, names
