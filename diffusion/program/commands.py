"""What the command `sample` does, once its options are read; it returns its summary."""

from __future__ import annotations

import time
from argparse import Namespace
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pydeqsolve import Status

from ..chain import Chain, Splitting
from ..methods.coarse import CoarseToFine
from ..methods.fastest import NAMES
from ..methods.parallel import Parallel
from ..models.checkpoint import SHIPPED, Checkpoint, load_checkpoint
from ..models.files import write_json, write_tensors
from ..sample import Sample, sample
from . import pictures
from .chains import Asked, warn_of_another
from .classes import Condition
from .images import earlier_images, image_files, read_images, remove_images, write_images
from .latents import Latents, numbered, read_latents
from .machine import device_of
from .output import counted, finite, say, writable
from .parser import guess

MODEL, STEPS, COUNT = "digits", 100, 16  # unless the user or the latents say otherwise
USUAL_STRENGTH = 0.8  # of pictures that noise is added to
SHOWN = 64  # images in the picture of the samples, at most
RECORD = "summary.json"


def load(name: str, device: torch.device) -> Checkpoint:
    """Return a checkpoint whose parameters ask for no gradients."""
    try:
        checkpoint = load_checkpoint(name, device)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}{guess(name, (path.name for path in SHIPPED.glob('*')))}") from error
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


def sampler_of(name: str, window: int | None, error: float | None = None) -> Any:
    """Return the method of `sample` that the options name; one that it has no use for is refused."""
    if error is not None and name == "sequential":
        raise ValueError(f"--error: of the methods that sample in parallel, got --method {name}, which is exact")
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
    sampler_of(args.method, args.window, args.error)
    found = None if args.latents is None else read_latents(args.latents)
    name = args.model or (found.chain.get("model") if found else None) or MODEL
    try:
        checkpoint = load(name, device)
    except FileNotFoundError as error:
        if args.model is not None or found is None:
            raise
        raise FileNotFoundError(f"--model: required, the latents are of {name}, which is not here") from error
    latents, chain, condition = _start(args, checkpoint, found)
    if args.pictures:
        pictures.require_matplotlib()
    images = image_files(latents.names) if args.pictures else []
    files = ["samples.safetensors", RECORD, *(["samples.png", "latents.png", *images] if args.pictures else [])]
    earlier = earlier_images(args.output, RECORD)
    with writable(args.output, files, args.overwrite) as folder:
        start = time.perf_counter()
        parts = _sample_batches(args, checkpoint, latents, chain, condition)
        seconds = time.perf_counter() - start
        x_0 = torch.cat([part.x_0 for part in parts]).cpu()
        _require_finite(x_0, torch.cat([part.error for part in parts]).cpu())
        evaluations = torch.cat([part.evaluations for part in parts]).double()
        summary: dict[str, Any] = {
            "command": "sample", "model": checkpoint.name, "method": args.method, "images": len(x_0),
            "names": latents.names, "labels": latents.labels, "steps": len(chain), "chain": latents.chain,
            "seed": args.seed, "device": str(device), "threads": torch.get_num_threads(),
            "rounds": max(part.rounds for part in parts), "evaluations_per_image": evaluations.mean().item(),
            "converged": sum(int(part.converged.sum()) for part in parts), "seconds": seconds,
            "output": str(folder), "files": files,
        }  # fmt: skip
        write_tensors(folder / "samples.safetensors", {**latents.tensors(), "x_0": x_0}, latents.header())
        if args.pictures:
            title = f"{checkpoint.name}: {args.method} DDIM, T = {len(chain)}"
            pictures.draw_samples(folder / "samples.png", title, {"": x_0[:SHOWN]})
            pictures.draw_latents(folder / "latents.png", title, parts[0].trajectory[:4], chain)
            write_images(folder, x_0, latents.names)
        write_json(folder / RECORD, finite(summary))
        remove_images(folder, earlier - set(files))
    return summary


def _start(args: Namespace, checkpoint: Checkpoint, found: Latents | None) -> tuple[Latents, Chain, Condition]:
    """What the chain starts from, the chain, and its classes: latents found, pictures with noise, or fresh latents."""
    if args.images is None and args.strength is not None and found is None:
        raise ValueError("--strength: of pictures that noise is added to, --images, or of --latents; none came")
    if args.images is not None and found is not None:
        raise ValueError("--images: not taken beside --latents, which a chain starts from too")
    if args.resize and args.images is None:
        raise ValueError("--resize: of --images, none came")
    if found is not None:
        _check_latents(args, checkpoint, found)
    asked = Asked.of(args, checkpoint, STEPS, None if found is None else found.chain)
    if args.images is not None:
        asked = replace(asked, strength=USUAL_STRENGTH if asked.strength is None else asked.strength)
    chain = asked.chain(checkpoint)
    if found is not None:
        if found.noises is not None and found.noises.shape[1] != len(chain):
            maps = found.noises.shape[1]
            raise ValueError(f"--steps: {maps}, as many as the latents have noise maps, is required, got {len(chain)}")
        latents = found.kept(args.count)
    elif args.images is not None:
        images, names = read_images(args.images, checkpoint.shape, args.resize, args.count)
        noises = noise(args.seed, len(images), checkpoint, torch.device("cpu"))
        latents = Latents(chain.add_noise(images, noises), names)
    else:
        count = args.count or (len(args.label) if args.label is not None and len(args.label) > 1 else COUNT)
        x_T = noise(args.seed, count, checkpoint, torch.device("cpu")) * chain.init_noise_sigma
        latents = Latents(x_T, numbered(count))
    known = None if found is None else found.chain
    condition = Condition.of(args, checkpoint, len(latents.x_T), known, latents.labels)
    recorded = {"model": checkpoint.name, **asked.record(checkpoint), **condition.record()}
    return replace(latents, chain=recorded, labels=condition.labels), chain, condition


def _check_latents(args: Namespace, checkpoint: Checkpoint, latents: Latents) -> None:
    """Raises for latents that the model or the rule has no use for; warns of another chain than theirs."""
    if tuple(latents.x_T.shape[1:]) != checkpoint.shape:
        got = tuple(latents.x_T.shape[1:])
        whose = f": they are of --model {latents.chain['model']}" if "model" in latents.chain else ""
        wanted = f"of {checkpoint.name}, {checkpoint.shape}, are required"
        raise ValueError(f"--latents {args.latents}: {wanted}, got {got}{whose}")
    warn_of_another(args, checkpoint, latents.chain)
    if latents.second is not None and args.rule not in (None, "belm"):
        raise ValueError(f"--rule: belm, whose pairs of states these latents are, is required, got {args.rule}")


def _require_finite(x_0: Tensor, error: Tensor) -> None:
    bad = int((error.isnan() | ~x_0.flatten(1).isfinite().all(1)).sum())
    if bad:
        are = f"{counted(len(x_0), 'image')} {'is' if bad == 1 else 'are'}"
        raise ArithmeticError(f"{bad} of {are} not finite: the model returned NaN or infinity")


def _sample_batches(
    args: Namespace, checkpoint: Checkpoint, latents: Latents, chain: Chain, condition: Condition
) -> list[Sample]:
    generator = torch.Generator().manual_seed(args.seed + 1) if chain.eta else None
    method, model = sampler_of(args.method, args.window), condition.model(checkpoint)
    parts: list[Sample] = []
    for at in range(0, len(latents.x_T), args.batch):
        own = slice(at, at + args.batch)
        part = latents.x_T[own].to(device_of(args.device))
        second, noises = (None if x is None else x[own].to(part.device) for x in (latents.second, latents.noises))
        latent = part if second is None else (part, second)
        out = sample(
            model, latent, chain, method, error=args.error, noises=noises,
            inputs=condition.inputs(checkpoint, own), max_rounds=args.max_rounds, generator=generator, progress=True,
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
            miss = f"{counted(len(part), 'image')} {'misses' if missed == 1 else 'miss'}"
            say(f"deq-ddim: warning: {missed} of {miss} the error asked for, off by {most:.1e}{why}")
    return parts
