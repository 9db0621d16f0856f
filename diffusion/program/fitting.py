"""What the commands `fit` and `classifier` do, once their options are read; each returns its summary."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..models.checkpoint import IMAGES, SHIPPED, Checkpoint
from ..models.configuration import CONFIG, WEIGHTS
from ..models.files import read_json
from ..sample import sample
from ..training.data import Dataset, class_folder, digits, fashion
from ..training.emoji import emoji
from ..training.fit import fit, recipes
from ..training.frechet import FEATURES_FILE, FeatureSpace, fit_classifier, load_features, save_features
from ..training.shape import shape_of_folder
from .machine import device_of
from .output import counted, finite, say, writable

CLASSIFIER_STEPS = {"digits": 600, "fashion": 1200}  # where it is not 1000
FILES = (WEIGHTS, CONFIG, IMAGES, FEATURES_FILE)
SAMPLED_STEPS, SAMPLED_BATCH = 50, 64  # of the images whose distance is measured
FEATURES_OF = {"digit-classes": "digits", "fashion-classes": "fashion"}  # the shipped data of the same images
NAMED: dict[str, Callable[[], Dataset]] = {"digits": digits, "fashion": fashion, "emoji": emoji}


def run_fit(args: Namespace) -> dict[str, Any]:
    """Train a denoiser, from where an earlier run stopped; return the summary."""
    device = device_of(args.device)
    _check_shape(args)
    chosen = {"steps": args.steps, "lr": args.lr, "batch": args.batch, "save_every": args.save_every}
    options: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
    options.update(seed=args.seed, resume=not args.restart, progress=True, device=device)
    with writable(args.output, [WEIGHTS, CONFIG, IMAGES], replace=True) as folder:  # `fit` knows whose they are
        data = None if args.data in recipes else _own_pictures(args)
        start, before = time.perf_counter(), 0 if args.restart else steps_saved(folder)
        try:
            trained = recipes[args.data](folder, **options) if data is None else fit(data, folder, **options)
        except KeyboardInterrupt:
            saved = f"after {counted(steps_saved(folder), 'step')}, saved in {folder}"
            raise KeyboardInterrupt(f"{saved}: the same command goes on from there") from None
        except ValueError as error:
            raise ValueError(str(error).replace("pass resume=False to replace it", "--restart replaces it")) from error
        if before == trained.training["steps_done"]:
            say(f"deq-ddim: already done, nothing to train: {folder} has its {counted(before, 'step')}")
        seconds = time.perf_counter() - start
        distance = _distance(args, data, trained, folder, device) if args.distance else None
    return finite({
        "command": "fit", "data": args.data, "shape": list(trained.shape), "steps": trained.training["steps_done"],
        "loss": trained.training["loss"], "parameters": trained.training["parameters"], "seed": args.seed,
        "device": str(device), "threads": torch.get_num_threads(), "distance": distance, "seconds": seconds,
        "output": str(folder), "files": sorted(path.name for path in folder.iterdir() if path.name in FILES),
    })  # fmt: skip


def _check_shape(args: Namespace) -> None:
    if args.shape and args.data in {*NAMED, *recipes}:
        raise ValueError(f"--shape: of a folder of pictures, --data {args.data} has its own")


def _own_pictures(args: Namespace) -> Dataset:
    """The pictures of a folder, one in ten held out, in the size that they have or that the user asks for."""
    shape = tuple(args.shape) if args.shape else shape_of_folder(args.data)
    data = class_folder(args.data, shape)
    colours, size = {1: "grey", 3: "colour"}.get(shape[0], "?"), f"{shape[2]}x{shape[1]}"
    held_out = f"{len(data.test):,} held out"
    say(f"deq-ddim: {counted(len(data.train), 'picture')} to train on, {held_out}: {size} pixels, {colours}")
    return data


def steps_saved(folder: Path) -> int:
    """Return the number of training steps that the checkpoint in a folder has behind it, 0 without one."""
    try:
        return int(read_json(folder / CONFIG)["training"]["steps_done"])
    except (OSError, KeyError, ValueError):
        return 0


def _distance(
    args: Namespace, data: Dataset | None, trained: Checkpoint, folder: Path, device: torch.device
) -> dict[str, Any] | None:
    """How far sampled images lie from the training images, beside real ones that were not trained on."""
    space = _space(args, data, folder, device)
    if space is None:
        return None
    say(f"deq-ddim: {counted(args.distance, 'image')} sampled, to measure their distance from the training images")
    generator = torch.Generator().manual_seed(args.seed)
    x_T = torch.randn(max(2, args.distance), *trained.shape, generator=generator)
    model, chain = trained.model.to(device).requires_grad_(False), trained.schedule.chain(SAMPLED_STEPS)
    options: dict[str, Any] = {"method": "sequential", "prediction": trained.prediction}
    images = [sample(model, part.to(device), chain, **options).x_0.cpu() for part in x_T.split(SAMPLED_BATCH)]
    features = space.of(torch.cat(images))
    real = space.held_out
    return {
        "images": len(features), "steps": SAMPLED_STEPS, "sampled": space.distance(features),
        "error": space.error(features), "real_images": len(real),
        "real": space.distance(real) if len(real) > 1 else None,
    }  # fmt: skip


def _space(args: Namespace, data: Dataset | None, folder: Path, device: torch.device) -> FeatureSpace | None:
    """The features in which distances are measured: shipped, or of a classifier of these pictures, trained once."""
    if data is None:
        shipped = SHIPPED / FEATURES_OF.get(args.data, args.data)
        if (shipped / FEATURES_FILE).is_file():
            return load_features(shipped)
        data = NAMED[args.data]()
    if (folder / FEATURES_FILE).is_file() and not args.restart:
        return load_features(folder)
    say(f"deq-ddim: training the classifier in whose features the distance is measured, {_steps(None, '')} steps")
    try:
        space = fit_classifier(data, steps=_steps(None, ""), seed=args.seed, device=device)
    except ValueError as error:  # too few pictures, or of one class and not square
        say(f"deq-ddim: no distance: {error}")
        return None
    save_features(folder, space)
    return space


def _steps(given: int | None, name: str) -> int:
    return given or CLASSIFIER_STEPS.get(name, 1000)


def run_classifier(args: Namespace) -> dict[str, Any]:
    """Train the classifier in whose features the report measures distances; return the summary."""
    device = device_of(args.device)
    _check_shape(args)
    with writable(args.output, [FEATURES_FILE], args.overwrite) as folder:
        data = NAMED[args.data]() if args.data in NAMED else _own_pictures(args)
        start = time.perf_counter()
        space = fit_classifier(data, steps=_steps(args.steps, args.data), seed=args.seed, device=device)
        save_features(folder, space)
    held_out = {"distance": space.distance(space.held_out), "images": len(space.held_out)}
    return {
        "command": "classifier", "data": args.data, "seed": args.seed, **space.record, "held_out": held_out,
        "seconds": time.perf_counter() - start, "output": str(folder), "files": [FEATURES_FILE],
    }  # fmt: skip
