"""What the commands `sample` and `fit` do, once their options are read; each returns its summary."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pydeqsolve import Status

from ..chain import Chain, Splitting
from ..methods.coarse import CoarseToFine
from ..methods.fastest import NAMES
from ..methods.parallel import Parallel
from ..models.checkpoint import IMAGES, Checkpoint, load_checkpoint
from ..models.configuration import CONFIG, WEIGHTS
from ..models.files import read_json, write_json, write_tensors
from ..sample import Sample, sample
from ..training.data import Dataset, class_folder, digits, fashion, image_folder
from ..training.fit import fit, recipes
from ..training.frechet import FEATURES_FILE, fit_classifier, save_features
from . import pictures
from .machine import device_of
from .output import finite, say, writable

CLASSIFIER_STEPS = {"digits": 600, "fashion": 1200}  # where it is not 1000
SHOWN = 64  # images in the picture of the samples, at most


def load(name: str, device: torch.device) -> Checkpoint:
    """Return a checkpoint whose parameters ask for no gradients."""
    checkpoint = load_checkpoint(name, device)
    checkpoint.model.requires_grad_(False)
    return checkpoint


def splitting_of(checkpoint: Checkpoint, name: str | None) -> str:
    """Return the splitting asked for, or that of the checkpoint: gaussian where it knows its data, else v."""
    return name or ("v" if checkpoint.mean is None or checkpoint.variance is None else "gaussian")


def options_of(checkpoint: Checkpoint, chain: Chain, splitting: str | None) -> dict[str, Any]:
    """Return the arguments of `sample` and `invert` that the checkpoint decides, if the user does not."""
    name, known = splitting_of(checkpoint, splitting), (checkpoint.mean, checkpoint.variance)
    moments = [part.flatten() for part in known if part is not None]
    split = Splitting.named(name, chain, *moments) if name == "gaussian" and len(moments) == 2 else name
    return {"prediction": checkpoint.prediction, "splitting": split}


def sampler_of(name: str, window: int | None) -> Any:
    """Return the method of `sample` that the options name."""
    if window is not None and name not in ("parallel", "all-steps"):
        raise ValueError(f"--window: of the methods parallel and all-steps, got --method {name}")
    objects = {"all-steps": Parallel(window), "coarse-to-fine": CoarseToFine()}
    if name not in (*NAMES, *objects):
        raise ValueError(f"--method: one of {', '.join((*NAMES, *objects))} is required, got {name!r}")
    return Parallel(window) if window is not None else objects.get(name, name)


def noise(seed: int, count: int, checkpoint: Checkpoint, device: torch.device) -> Tensor:
    """Return latents (count, C, H, W), the same ones on every device."""
    return torch.randn(count, *checkpoint.shape, generator=torch.Generator().manual_seed(seed)).to(device)


def run_sample(args: Namespace) -> dict[str, Any]:
    """Sample images and write them; return the summary."""
    device = device_of(args.device)
    checkpoint = load(args.model, device)
    chain = checkpoint.schedule.chain(args.steps, args.spacing, args.eta)
    if args.pictures:
        pictures.require_matplotlib()
    x_T = noise(args.seed, args.count, checkpoint, device) * chain.init_noise_sigma
    files = ["samples.safetensors", "summary.json", *(["samples.png", "latents.png"] if args.pictures else [])]
    with writable(args.output, files, args.overwrite) as folder:
        start = time.perf_counter()
        parts = _sample_batches(args, checkpoint, x_T, chain)
        seconds = time.perf_counter() - start
        x_0 = torch.cat([part.x_0 for part in parts]).cpu()
        unknown = torch.cat([part.error for part in parts]).isnan().cpu()
        bad = int((unknown | ~x_0.flatten(1).isfinite().all(1)).sum())
        if bad:
            raise ArithmeticError(f"{bad} of {len(x_0)} images are not finite: the model returned NaN or infinity")
        evaluations = torch.cat([part.evaluations for part in parts]).double()
        summary: dict[str, Any] = {
            "command": "sample", "model": checkpoint.name, "method": args.method, "images": len(x_0),
            "steps": len(chain), "seed": args.seed, "device": str(device), "threads": torch.get_num_threads(),
            "rounds": max(part.rounds for part in parts), "rows_per_image": evaluations.mean().item(),
            "converged": sum(int(part.converged.sum()) for part in parts), "seconds": seconds,
            "output": str(folder), "files": files,
        }  # fmt: skip
        write_tensors(folder / "samples.safetensors", {"x_T": x_T.cpu(), "x_0": x_0}, {"command": "deq-ddim sample"})
        if args.pictures:
            title = f"{checkpoint.name}: {args.method} DDIM, T = {len(chain)}"
            pictures.draw_samples(folder / "samples.png", title, {"": x_0[:SHOWN]})
            pictures.draw_latents(folder / "latents.png", title, parts[0].trajectory[:4], chain)
        write_json(folder / "summary.json", finite(summary))
    return summary


def _sample_batches(args: Namespace, checkpoint: Checkpoint, x_T: Tensor, chain: Chain) -> list[Sample]:
    generator = torch.Generator().manual_seed(args.seed + 1) if chain.eta else None
    method = sampler_of(args.method, args.window)
    parts: list[Sample] = []
    for part in x_T.split(args.batch):
        out = sample(
            checkpoint.model, part, chain, method, error=args.error, generator=generator, progress=True,
            **options_of(checkpoint, chain, args.splitting),
        )  # fmt: skip
        if parts:  # only the first batch's is drawn
            out.trajectory = out.trajectory[:0]
        parts.append(out)
        missed = int((~out.converged & ~out.error.isnan()).sum())
        if missed:
            floored = out.solution is not None and bool((out.solution.status == Status.STALLED).any())
            why = ": no less is possible in the network's precision" if floored else ""
            most = out.error.nan_to_num(0.0).max().item()
            say(f"deq-ddim: warning: {missed} of {len(part)} images miss the error asked for, off by {most:.1e}{why}")
    return parts


def run_fit(args: Namespace) -> dict[str, Any]:
    """Train a denoiser, from where an earlier run stopped; return the summary."""
    chosen = {"steps": args.steps, "lr": args.lr, "batch": args.batch, "save_every": args.save_every}
    options: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
    options.update(seed=args.seed, resume=not args.restart, progress=True)
    with writable(args.output, [WEIGHTS, CONFIG, IMAGES], replace=True) as folder:  # `fit` knows whose they are
        images = None if args.data in recipes else image_folder(args.data, tuple(args.shape))
        start = time.perf_counter()
        try:
            trained = recipes[args.data](folder, **options) if images is None else fit(images, folder, **options)
        except KeyboardInterrupt:
            saved = f"after {steps_saved(folder)} steps, saved in {folder}"
            raise KeyboardInterrupt(f"{saved}: the same command goes on from there") from None
        except ValueError as error:
            raise ValueError(str(error).replace("pass resume=False to replace it", "--restart replaces it")) from error
    return {
        "command": "fit", "data": args.data, "steps": trained.training["steps_done"], "loss": trained.training["loss"],
        "parameters": trained.training["parameters"], "seed": args.seed, "threads": torch.get_num_threads(),
        "seconds": time.perf_counter() - start, "output": str(folder),
    }  # fmt: skip


def steps_saved(folder: Path) -> int:
    """Return the number of training steps that the checkpoint in a folder has behind it, 0 without one."""
    try:
        return int(read_json(folder / CONFIG)["training"]["steps_done"])
    except (OSError, KeyError, ValueError):
        return 0


def run_classifier(args: Namespace) -> dict[str, Any]:
    """Train the classifier in whose features the report measures distances; return the summary."""
    named: dict[str, Callable[[], Dataset]] = {"digits": digits, "fashion": fashion}
    steps = args.steps or CLASSIFIER_STEPS.get(args.data, 1000)
    with writable(args.output, [FEATURES_FILE], args.overwrite) as folder:
        data = named[args.data]() if args.data in named else class_folder(args.data, tuple(args.shape))
        start = time.perf_counter()
        space = fit_classifier(data, steps=steps, seed=args.seed)
        save_features(folder, space)
    held_out = {"distance": space.distance(space.held_out), "images": len(space.held_out)}
    return {
        "command": "classifier", "data": args.data, "seed": args.seed, **space.record, "held_out": held_out,
        "seconds": time.perf_counter() - start, "output": str(folder), "files": [FEATURES_FILE],
    }  # fmt: skip
