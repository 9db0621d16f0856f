"""What the command `invert` does, once its options are read; it returns its summary."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pydeqsolve import Implicit, Phantom, Status

from ..chain import Chain
from ..inversion.descent import Descent, Epoch
from ..invert import NAMED, Inversion, invert
from ..models.checkpoint import Checkpoint
from ..models.files import fingerprint, write_json
from ..sample import sample
from . import pictures
from .chains import Asked
from .classes import Condition
from .commands import load, options_of, splitting_of
from .images import earlier_images, image_files, read_images, remove_images, write_images
from .latents import numbered
from .machine import device_of
from .output import counted, finite, say, writable
from .record import SETTINGS, TENSORS, Record, under_way

SHOWN = 16  # images in the picture of the reconstructions, at most
STEPS = 50  # T, where it is not given
COUNT = 8  # of the checkpoint's images, where no number is given
LONGEST_NAME = 12  # letters of a name above an image
OPTIONS = {
    "epochs": ("naive", "deq"),
    "lr": ("naive", "deq"),
    "gradient": ("deq",),
    "error": ("exact",),
    "eta": ("ddpm",),
}
READ = {"belm": ("exact", "ddim"), "dpmsolver++2m": ("naive",)}  # the methods that invert chains of a rule
GRADIENTS: dict[str, Phantom | Implicit] = {"phantom": Phantom(1, 0.1), "implicit": Implicit()}


def run_invert(args: Namespace) -> dict[str, Any]:
    """Find the latents of images, from where an earlier run stopped; return the summary."""
    _check_used(args)
    device = device_of(args.device)
    checkpoint = load(args.model, device)
    eta = (args.eta or 1.0) if args.method == "ddpm" else 0.0
    asked = replace(Asked.of(args, checkpoint, STEPS), eta=eta)
    chain = asked.chain(checkpoint)
    images, names = _images(args, checkpoint)
    condition = Condition.of(args, checkpoint, len(images))
    if args.pictures:
        pictures.require_matplotlib()
    drawn = ["reconstruction.png", "history.png", *image_files(names)] if args.pictures else []
    own = args.restart or under_way(Path(args.output))
    earlier = earlier_images(args.output, SETTINGS)
    with writable(args.output, [TENSORS, SETTINGS, *drawn], own, "--restart replaces it") as folder:
        settings = _settings(args, checkpoint, images, device, asked, condition)
        record = Record.open(folder, settings, images, args.restart, names)
        if len(record) == len(images):
            say(f"deq-ddim: already done, nothing to compute: {folder} holds {counted(len(images), 'latent')}")
        elif record.done or record.state:
            say(f"deq-ddim: goes on after {_progress(record, images)}")
        try:
            record.run(images.to(device), args.batch, _inverter(args, checkpoint, chain, condition))
        except KeyboardInterrupt:
            saved = f"after {_progress(record, images)}, saved in {folder}"
            raise KeyboardInterrupt(f"{saved}: the same command goes on from there") from None
        summary = _write(args, checkpoint, chain, images, record, condition)
        if args.pictures:
            remove_images(folder, earlier - set(summary["files"]))
    return summary


def _check_used(args: Namespace) -> None:
    """Raises for an option that the method has no use for."""
    for option, methods in OPTIONS.items():
        if getattr(args, option) is not None and args.method not in methods:
            raise ValueError(f"--{option}: of {' and '.join(methods)}, got --method {args.method}")
    if args.rule in READ and args.method not in READ[args.rule]:
        raise ValueError(f"--rule {args.rule}: inverted by --method {' or '.join(READ[args.rule])}, got {args.method}")
    args.gradient = args.gradient or "phantom"


def _images(args: Namespace, checkpoint: Checkpoint) -> tuple[Tensor, list[str]]:
    """The images to invert, and their names."""
    if args.images is not None:
        return read_images(args.images, checkpoint.shape, args.resize, args.count)
    if checkpoint.images is None:
        raise ValueError(f"--images: a picture or a folder is required, since {checkpoint.name} comes without images")
    images = checkpoint.images[: args.count or COUNT].cpu()
    return images, numbered(len(images))


def _progress(record: Record, images: Tensor) -> str:
    return f"{len(record)} of {counted(len(images), 'image')} and {counted(record.epochs, 'epoch')}"


def _settings(
    args: Namespace, checkpoint: Checkpoint, images: Tensor, device: torch.device, asked: Asked, condition: Condition
) -> dict[str, Any]:
    """Return all that the result depends on."""
    method = inverter_of(args.method, args.epochs, args.lr, GRADIENTS[args.gradient])
    descent = method if isinstance(method, Descent) else None
    return {
        "model": checkpoint.name, "weights": fingerprint(checkpoint.model.state_dict().values()), "images": len(images),
        "pixels": fingerprint([images]),
        "method": args.method, **asked.record(checkpoint),
        "taken": None if asked.strength is None else len(asked.chain(checkpoint)),
        "splitting": splitting_of(checkpoint, args.splitting), "batch": args.batch, "device": device.type,
        "error": args.error, "max_rounds": args.max_rounds,
        "epochs": None if descent is None else descent.epochs, "lr": None if descent is None else descent.rate,
        "seed": args.seed if descent is not None or args.method == "ddpm" else None,
        "gradient": args.gradient if args.method == "deq" else None,
        "labels": condition.labels, **condition.record(),
    }  # fmt: skip


def inverter_of(
    name: str, epochs: int | None = None, lr: float | None = None, gradient: Phantom | Implicit | None = None
) -> Any:
    """Return the method of `invert` of that name, with the options that are given of a descent."""
    method = NAMED[name]
    if not isinstance(method, Descent):
        return method
    given: dict[str, Any] = {"epochs": epochs, "lr": lr, "gradient": gradient}
    return replace(method, **{option: value for option, value in given.items() if value is not None})


def _inverter(args: Namespace, checkpoint: Checkpoint, chain: Chain, condition: Condition) -> Callable[..., Inversion]:
    method = inverter_of(args.method, args.epochs, args.lr, GRADIENTS[args.gradient])
    model = condition.model(checkpoint)

    def invert_batch(
        images: Tensor, number: int, state: dict[str, Tensor] | None, callback: Callable[[Epoch], Any]
    ) -> Inversion:
        return invert(
            model, images, chain, method, generator=torch.Generator().manual_seed(args.seed + number),
            error=args.error, max_rounds=args.max_rounds, state=state, callback=callback, progress=True,
            inputs=condition.inputs(checkpoint, slice(number, number + len(images))),
            **options_of(checkpoint, chain, args.splitting),
        )  # fmt: skip

    return invert_batch


def reconstruct(
    checkpoint: Checkpoint,
    x_T: Tensor,
    chain: Chain,
    second: Tensor | None = None,
    noises: Tensor | None = None,
    condition: Condition = Condition(),
) -> Tensor:
    """Return the images (n, C, H, W) that the chain makes of the latents, on the CPU."""
    device = next(checkpoint.model.parameters()).device
    x_T = x_T.to(device)
    latent = x_T if second is None else (x_T, second.to(device))
    noises = None if noises is None else noises.to(device)
    given: dict[str, Any] = {"prediction": checkpoint.prediction, "noises": noises}
    given["inputs"] = condition.inputs(checkpoint)
    return sample(condition.model(checkpoint), latent, chain, "sequential", **given).x_0.cpu()


def _write(
    args: Namespace, checkpoint: Checkpoint, chain: Chain, images: Tensor, record: Record, condition: Condition
) -> dict[str, Any]:
    """Write pictures and summary; return the summary."""
    done, folder = record.done, record.folder
    summary: dict[str, Any] = {
        "command": "invert", "settings": record.settings, "complete": True, "names": record.names,
        "threads": torch.get_num_threads(),
        "loss_median": done["loss"].median().item(), "loss_max": done["loss"].max().item(),
        "rounds": int(done["rounds"].max()), "evaluations_per_image": done["evaluations"].double().mean().item(),
        "loss": done["loss"].tolist(), "status": [Status(k).name for k in done["status"].tolist()],
        "typicality": done["typicality"].tolist(), "seconds": record.seconds,
        "output": str(folder), "files": [TENSORS, SETTINGS],
    }  # fmt: skip
    failed = len(images) - summary["status"].count("CONVERGED")
    if args.method == "exact" and failed:
        missed = f"{failed} of {counted(len(images), 'image')}"
        say(f"deq-ddim: warning: {missed} missed the error asked for, see their loss")
    if args.pictures:
        summary["files"] += _draw(checkpoint, chain, images, record, condition)
    write_json(folder / SETTINGS, finite(summary))
    return summary


def _draw(checkpoint: Checkpoint, chain: Chain, images: Tensor, record: Record, condition: Condition) -> list[str]:
    """Write the pictures; return their names."""
    done, folder, method = record.done, record.folder, record.settings["method"]
    title = f"{checkpoint.name}: inversion by {method}, T = {len(chain)}"
    x_0 = reconstruct(checkpoint, done["x_T"], chain, done.get("second"), done.get("noises"), condition).to(images)
    losses = [f"{loss:.1e}" for loss in done["loss"][:SHOWN].tolist()]
    rows = {
        "real image": images[:SHOWN], "latent x_T": done["x_T"][:SHOWN] / 2, "sampled\nfrom it": x_0[:SHOWN],
    }  # fmt: skip
    above = [name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…" for name in record.names[:SHOWN]]
    pictures.draw_rows(
        folder / "reconstruction.png", title, rows, {"sampled\nfrom it": losses}, above,
        "Below: sum of the squared differences from the real image.", framed=True,
    )  # fmt: skip
    write_images(folder, x_0, record.names)
    files = ["reconstruction.png", *image_files(record.names)]
    if done["history"].shape[1]:
        what = ("epoch", "loss") if isinstance(NAMED[method], Descent) else ("round", "residual")
        pictures.draw_curves(folder / "history.png", title, {method: done["history"].T}, *what)
        files.append("history.png")
    return files
