"""Training of a denoiser: resumable at any moment, with the result of an uninterrupted run, bit for bit."""

import hashlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import count, integer
from ..models.checkpoint import IMAGES, Checkpoint, add_statistics, check_images, load_checkpoint, save_images
from ..models.configuration import ARCHITECTURES, PREDICTIONS, check_timesteps
from ..models.statistics import check_eigenvectors
from ..models.unet import UNet
from ..schedule import Schedule
from .data import Dataset, digits, fashion
from .emoji import emoji
from .run import Run

KEPT = 32  # images that were not trained on, beside a checkpoint
EMOJI_BATCH = 32  # of few pictures
LOSS_SHOWN = 50  # steps from one loss in the bar to the next


def fit(
    images: Tensor | Dataset,
    folder: str | Path,
    *,
    model: nn.Module | None = None,
    schedule: Schedule | None = None,
    steps: int = 20_000,
    batch: int = 64,
    lr: float = 1.5e-3,
    ema: float = 0.998,
    seed: int = 0,
    resume: bool = True,
    save_every: int = 1000,
    prediction: str = "epsilon",
    dtype: torch.dtype | None = None,
    drop_label: float = 0.1,
    eigenvectors: int | None = None,
    device: str | torch.device | None = None,
    progress: bool = False,
    callback: Callable[[int, float], Any] | None = None,
) -> Checkpoint:
    """Return the checkpoint, in `folder`, of a model trained on the images; the weights are the running average.

    Loss: mean of ‖model(x_t, t) − target‖² per pixel, x_t = √ᾱ_t x_0 + √(1−ᾱ_t) ε (Ho et al. 2020, Eq. 14), t
    stratified over the batch, x_0 drawn with replacement. Adam, rate lr·(1 + cos(π k/steps))/2, gradient norm
    clipped at 1. The folder holds a usable checkpoint from the first save on, and training/ the state of the run
    until it is done: the same call again goes on from there. The checkpoint carries the images' `Statistics`;
    to a run that was done before checkpoints did, the same call adds them and trains no more.

    A model with classes is trained as model(x_t, t, label), which classifier-free guidance needs (Ho & Salimans 2022):
    with the images' labels, and with none for a share of them.

    Args:
        images: (n, C, H, W) in about [−1, 1]; or a `Dataset`, of whose test images 32 are kept beside the checkpoint,
            and whose labels a model with classes is trained with.
        folder: created if need be.
        model: trained in place, on its device; None: a `UNet` of default size, started from `seed`.
        schedule: None: `Schedule.linear()`.
        steps: optimiser steps in all.
        batch: images per step.
        lr: largest rate.
        ema: decay per step of the running average of the weights, in [0, 1); shorter during the first steps.
        seed: of images, time steps and noises.
        resume: False: start again, whatever the folder holds.
        save_every: steps between two saves.
        prediction: what the model learns to return: "epsilon", "v" (√ᾱ ε − √(1−ᾱ) x_0) or "sample" (x_0).
        dtype: type of the weights on disk; None: as trained.
        drop_label: of a model with classes, the share of images trained on without their label, in [0, 1].
        eigenvectors: of the images' covariance, kept in the checkpoint at most (`Statistics.of`).
        device: where the model is moved before, and trained; None: where it is.
        progress: show a bar with the loss on stderr (tqdm), if that is a terminal.
        callback: callback(step, loss) after each step; a true return saves and ends the run for now. Reading the
            loss waits for the device.

    Raises:
        ValueError: an argument out of range, a run with other settings or a damaged state in the folder, which is left
            as it is, or a loss that is not finite.
        KeyboardInterrupt: passed on, after saving.
    """
    held_out, levels, labels = None, 255, None
    if isinstance(images, Dataset):
        held_out, levels = images.test[:KEPT], images.levels
        labels = images.train_labels
        images = images.train
    steps, batch = count("steps", steps, least=1), count("batch", batch, least=1)
    save_every, seed = count("save_every", save_every, least=1), integer("seed", seed)
    _check(images, held_out, levels, lr, ema, prediction)
    check_eigenvectors(eigenvectors)
    folder = Path(folder)
    schedule = schedule or Schedule.linear()
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule: a Schedule with a table of ᾱ is required, got {type(schedule).__name__}")
    if model is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = UNet((images.shape[1], images.shape[2], images.shape[3]), timesteps=len(schedule))
    _check_model(model, schedule)
    labels = _checked_labels(labels, model, drop_label)
    model = model if device is None else model.to(device)
    settings = {
        "steps": steps, "batch": batch, "lr": lr, "ema": ema, "seed": seed, "prediction": prediction,
        "model": model.config, "schedule": schedule.to_config(),
        "images": hashlib.sha256(images.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest(),
    }  # fmt: skip
    if labels is not None:
        settings |= {"drop_label": drop_label, "labels": hashlib.sha256(labels.numpy().tobytes()).hexdigest()}
    run = Run(images, folder, model, schedule, settings, dtype, labels, eigenvectors)
    finished = resume and run.finished()
    if resume and not finished:
        run.resume()

    def save() -> None:
        run.save()
        if held_out is not None and run.step:
            save_images(folder, held_out, levels)

    if finished:
        if held_out is not None and not (folder / IMAGES).is_file():
            save_images(folder, held_out, levels)
        checkpoint = load_checkpoint(folder)
        if checkpoint.statistics is not None and checkpoint.statistics.frequencies is not None:
            return checkpoint
        add_statistics(folder, images, eigenvectors)  # trained before checkpoints carried them
        return load_checkpoint(folder)
    try:
        for step in _counter(run, steps, progress):
            loss = run.advance()
            stop = callback is not None and callback(step, loss.item())
            if stop:
                break
            if run.step % save_every == 0 and run.step < steps:
                save()
    except KeyboardInterrupt:
        if not run.torn:  # else the last regular save is what a new call goes on from
            save()
        raise
    save()
    return load_checkpoint(folder)


def _counter(run: Run, steps: int, progress: bool) -> Iterator[int]:
    """Numbers of the steps to do, with a bar that shows the running average of the loss."""
    if not progress:
        yield from range(run.step, steps)
        return
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("progress=True shows the bar of tqdm: pip install tqdm") from error
    with tqdm(range(run.step, steps), initial=run.step, total=steps, unit="step", disable=None) as bar:
        for step in bar:
            if step % LOSS_SHOWN == 0 and not bar.disable:  # reading it waits for the device
                bar.set_postfix_str(f"loss {run.loss.item():.4f}", refresh=False)
            yield step


def _check(images: Tensor, held_out: Tensor | None, levels: int, lr: float, ema: float, prediction: str) -> None:
    if images.ndim != 4 or len(images) == 0 or not images.is_floating_point():
        raise ValueError(f"images: floating point (n, C, H, W) is required, got {tuple(images.shape)}, {images.dtype}")
    if not bool(images.isfinite().all()):
        raise ValueError("images: finite values are required")
    if held_out is not None:
        check_images(held_out, levels)
        if held_out.shape[1:] != images.shape[1:] or not len(held_out):
            got = tuple(held_out.shape)
            raise ValueError(f"held_out: (m, {', '.join(map(str, images.shape[1:]))}) is required, got {got}")
    if not 0 < lr < math.inf:
        raise ValueError(f"lr: a positive number is required, got {lr!r}")
    if not 0 <= ema < 1:
        raise ValueError(f"ema: a number in [0, 1) is required, got {ema!r}")
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction: one of {', '.join(PREDICTIONS)} is required, got {prediction!r}")


def _check_model(model: nn.Module, schedule: Schedule) -> None:
    """Refuse before training what could not be loaded after it, or does not know the schedule's last time step."""
    if ARCHITECTURES.get(type(model).__name__) is not type(model):
        raise TypeError(f"model: one of {', '.join(ARCHITECTURES)} is required, got {type(model).__name__}")
    check_timesteps(model, schedule)


def _checked_labels(labels: Tensor | None, model: nn.Module, drop: float) -> Tensor | None:
    """The labels (n,) long on the CPU that the model is trained with; None of one without classes."""
    classes = int(getattr(model, "classes", 0))
    if not 0 <= drop <= 1:
        raise ValueError(f"drop_label: a number in [0, 1] is required, got {drop!r}")
    if not classes:
        return None
    if labels is None:
        raise ValueError(f"images: a Dataset, which has labels, is required by a model of {classes} classes")
    labels = labels.detach().long().cpu().contiguous()
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        got = f"{int(labels.min())} to {int(labels.max())}"
        raise ValueError(f"images: labels 0 to {classes - 1}, the model's classes, are required, got {got}")
    return labels


def fit_digits(folder: str | Path, *, steps: int = 20_000, seed: int = 0, **options: Any) -> Checkpoint:
    """Return the checkpoint of the 8×8 digits; about five minutes on one core. `options` go to `fit`."""
    network = {"channels": 32, "multipliers": (1, 2), "blocks": (1, 3), "unshuffle": 2}
    return _fit_dataset(digits(), folder, network, steps=steps, seed=seed, **options)


def fit_fashion(folder: str | Path, *, steps: int = 9_000, seed: int = 0, **options: Any) -> Checkpoint:
    """Return the checkpoint of Fashion-MNIST; about a quarter of an hour on one core. `options` go to `fit`."""
    network = {"channels": 32, "multipliers": (1, 2, 4), "blocks": (1, 1, 1), "unshuffle": 2}
    return _fit_dataset(fashion(), folder, network, steps=steps, seed=seed, **options)


def fit_digit_classes(folder: str | Path, *, steps: int = 8_000, seed: int = 0, **options: Any) -> Checkpoint:
    """Return the checkpoint of the 8×8 digits conditional on their class; about two minutes on one core."""
    network = {"channels": 32, "multipliers": (1, 2), "blocks": (1, 3), "unshuffle": 2, "classes": 10}
    return _fit_dataset(digits(), folder, network, steps=steps, seed=seed, **options)


def fit_fashion_classes(folder: str | Path, *, steps: int = 6_000, seed: int = 0, **options: Any) -> Checkpoint:
    """Return the checkpoint of Fashion-MNIST conditional on the class; about 13 minutes of one core.

    Of the covariance of its images, 2.2 MB of `fit_fashion`, 32 eigenvectors are kept. `options` go to `fit`.
    """
    network = {"channels": 32, "multipliers": (1, 2, 4), "blocks": (1, 1, 1), "unshuffle": 2, "classes": 10}
    return _fit_dataset(fashion(), folder, network, steps=steps, seed=seed, **{"eigenvectors": 32, **options})


def fit_emoji(folder: str | Path, *, steps: int = 12_000, seed: int = 0, **options: Any) -> Checkpoint:
    """Return the checkpoint of emoji in colour, 3×32×32; about a quarter of an hour on one core.

    It learns v on the cosine schedule. There are few pictures, and what it draws is most often one of them.
    """
    network = {"channels": 32, "multipliers": (1, 2, 4), "blocks": (1, 1, 1), "unshuffle": 2, "attention": True}
    options = {"batch": EMOJI_BATCH, "prediction": "v", "schedule": Schedule.cosine(), "eigenvectors": 64, **options}
    return _fit_dataset(emoji(), folder, network, steps=steps, seed=seed, **options)


recipes: dict[str, Callable[..., Checkpoint]] = {
    "digits": fit_digits, "fashion": fit_fashion, "digit-classes": fit_digit_classes,
    "fashion-classes": fit_fashion_classes, "emoji": fit_emoji,
}  # fmt: skip


def _fit_dataset(data: Dataset, folder: str | Path, network: dict[str, Any], **options: Any) -> Checkpoint:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options["seed"])
        model = UNet((data.train.shape[1], data.train.shape[2], data.train.shape[3]), **network)
    return fit(data, folder, model=model, **{"dtype": torch.float16, **options})
