"""An inversion kept in a folder: batch after batch of images, and within a batch epoch after epoch.

One file holds the results of the images that are done and the state of the batch under way, and is replaced in one
move; so whatever stops the run, the same command goes on from a state that the run was in, with the same result.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pydeqsolve import Status

from ..inversion.descent import Epoch
from ..invert import Inversion
from ..models.files import (
    Stored,
    check_parts,
    parse_json,
    read_header,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)

TENSORS, SETTINGS = "inversion.safetensors", "inversion.json"
SAVE_EVERY = 5.0  # seconds

# invert one batch: (its images, its number, state to go on from or None, callback)
InvertBatch = Callable[[Tensor, int, dict[str, Tensor] | None, Callable[[Epoch], Any]], Inversion]


@dataclass(eq=False)
class Record:
    """What is known of an inversion.

    Attributes:
        folder: where it is kept.
        settings: JSON-ready; a run with others is refused.
        done: of the n images that are done: x_T (n, C, h, w), loss, status, typicality, rounds, evaluations (n,) and
            history (n, rounds or epochs), NaN where an image took fewer; of the method "ddpm" noises (n, T, C, h, w),
            of the rule "belm" second (n, C, h, w).
        state: of the batch under way, as `invert` takes it; empty between batches and for methods that have none.
        first: number of the first image of that batch.
        seconds: spent so far, over all runs.
        names: of the images; a file says them for those who read it.
    """

    folder: Path
    settings: dict[str, Any]
    done: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)
    first: int = 0
    seconds: float = 0.0
    names: Sequence[str] = ()

    @staticmethod
    def open(
        folder: Path, settings: dict[str, Any], images: Tensor, restart: bool = False, names: Sequence[str] = ()
    ) -> Record:
        """Return the record in a folder, or a new one if there is none or `restart` is asked for.

        Args:
            folder, settings: as above.
            images: (n, C, h, w) that are inverted.
            restart: whatever the folder holds.
            names: of the images.

        Raises:
            ValueError: the folder's record is of other settings, its file is cut short, or a part of it is missing,
                unknown, or not of these images.
        """
        settings = json.loads(json.dumps(settings))
        path = folder / TENSORS
        if restart or not os.path.lexists(path):
            return Record(folder, settings, names=names)
        try:
            stored, header = read_header(path)
            saved, first, seconds = _read_header(header)
            others = [name for name in {**saved, **settings} if saved.get(name) != settings.get(name)]
            if others:
                was = ", ".join(f"{name} = {saved.get(name)!r} there, {settings.get(name)!r} here" for name in others)
                raise ValueError(f"{folder} holds an inversion with other settings: {was}")
            check_parts(stored, _required(stored, images, settings), path)
            tensors, _ = read_tensors(path)
            parts: dict[str, dict[str, Tensor]] = {"done": {}, "state": {}}
            for name, value in tensors.items():
                part, _, own = name.partition(".")
                parts[part][own] = value
            _check_done(parts["done"], first)
        except ValueError as error:
            where = (
                "" if str(error).startswith((str(path), str(folder))) else f"{path}: not the record of an inversion: "
            )
            raise ValueError(f"{where}{error}; --restart replaces it") from error
        return Record(folder, settings, parts["done"], parts["state"], first, seconds, names)

    def __len__(self) -> int:
        return len(self.done["loss"]) if self.done else 0

    @property
    def epochs(self) -> int:
        """Epochs done of the batch under way."""
        return len(self.state["history"]) if self.state and self.first == len(self) else 0

    def save(self) -> None:
        """Replace the folder's record by this one."""
        tensors = {f"{part}.{name}": value for part in ("done", "state") for name, value in getattr(self, part).items()}
        header = {"settings": json.dumps(self.settings), "first": str(self.first), "seconds": repr(self.seconds)}
        header["names"] = json.dumps(list(self.names))
        write_tensors(self.folder / TENSORS, {name: value.cpu() for name, value in tensors.items()}, header)

    def add(self, inversion: Inversion) -> None:
        """Append a batch that is done."""
        n = len(inversion.loss)
        batch = {
            "x_T": inversion.x_T, "loss": inversion.loss, "status": inversion.status,
            "typicality": inversion.typicality, "rounds": torch.full((n,), inversion.rounds),
            "evaluations": inversion.evaluations, "history": inversion.history.T,
        }  # fmt: skip
        batch |= {name: value for name in ("second", "noises") if (value := getattr(inversion, name)) is not None}
        batch = {name: value.detach().cpu() for name, value in batch.items()}
        if self.done:
            longest = max(self.done["history"].shape[1], batch["history"].shape[1])
            both = [{**part, "history": _padded(part["history"], longest)} for part in (self.done, batch)]
            batch = {name: torch.cat([part[name] for part in both]) for name in batch}
        self.done, self.state = batch, {}

    def run(self, images: Tensor, batch: int, invert_batch: InvertBatch) -> None:
        """Invert the images (n, C, h, w) that are not done yet, `batch` at a time.

        Raises:
            KeyboardInterrupt: passed on, after saving.
            ValueError: the state does not fit the images or the method; the file stays as it is.
        """
        if len(self) < len(images):
            write_json(self.folder / SETTINGS, {"settings": self.settings, "complete": False})
        while len(self) < len(images):
            with _Saver(self) as saver:
                part = images[len(self) : len(self) + batch]
                try:
                    self.add(invert_batch(part, len(self), self.state if self.epochs else None, saver.see))
                except ValueError as error:
                    if not str(error).startswith("state: "):
                        raise
                    raise ValueError(f"{self.folder / TENSORS}: {error}; --restart replaces it") from error
            self.save()


class _Saver:
    """Keeps the record's state up to date during one batch, and saves it now and then, and at an interrupt."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.mark = time.perf_counter()
        self.saved = float("-inf")

    def see(self, epoch: Epoch) -> bool:
        """Remember the state after an epoch: at an interrupt the optimiser may stand between two."""
        # In this order: a state that an interrupt separates from its number belongs to no batch, and is not used.
        self.record.state, self.record.first = {}, len(self.record)
        self.record.state = epoch.snapshot()
        self._tick()
        if time.perf_counter() - self.saved > SAVE_EVERY:
            self.record.save()
            self.saved = time.perf_counter()
        return False

    def _tick(self) -> None:
        now = time.perf_counter()
        self.record.seconds, self.mark = self.record.seconds + now - self.mark, now

    def __enter__(self) -> _Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._tick()
        if kind is not None and issubclass(kind, KeyboardInterrupt) and (self.record.done or self.record.state):
            with suppress(OSError):  # a full disk: what was saved last is still whole
                self.record.save()


def under_way(folder: Path) -> bool:
    """Return whether a folder holds the record of an inversion, be it that of its settings alone."""
    if os.path.lexists(folder / TENSORS):
        return True
    try:
        return read_json(folder / SETTINGS).get("complete") is False
    except (OSError, ValueError):
        return False


def _read_header(header: dict[str, str]) -> tuple[dict[str, Any], int, float]:
    """Settings, number of the first image of the batch under way, and seconds spent."""
    first, seconds = header.get("first", ""), header.get("seconds", "")
    if not (first.isascii() and first.isdecimal() and len(first) < 16):
        raise ValueError(f"first: the number of an image is required, got {first!r:.40}")
    try:
        spent = float(seconds)
    except ValueError as error:
        raise ValueError(f"seconds: a number is required, got {seconds!r:.40}") from error
    if not 0 <= spent < math.inf:
        raise ValueError(f"seconds: a number of no less than 0 is required, got {seconds!r:.40}")
    return parse_json(header.get("settings", "")), int(first), spent


def _required(stored: Mapping[str, Stored], images: Tensor, settings: Mapping[str, Any]) -> dict[str, Stored]:
    """What a record of these images holds, if it is to hold as many results, and a state, as `stored` says."""
    loss, history, latent = (stored.get(f"done.{name}") for name in ("loss", "history", "x_T"))
    n = loss.shape[0] if loss is not None and loss.shape else 0
    if n > len(images):
        raise ValueError(f"done.loss of at most {len(images)} images is required, got {n}")
    long = history.shape[1] if history is not None and len(history.shape) == 2 else 0
    kept = torch.float64 if latent is not None and latent.dtype == torch.float64 else images.dtype
    done = {
        "x_T": Stored(kept, (n, *images.shape[1:])), "loss": Stored(torch.float64, (n,)),
        "status": Stored(torch.int64, (n,)), "typicality": Stored(torch.float64, (n,)),
        "rounds": Stored(torch.int64, (n,)), "evaluations": Stored(torch.int64, (n,)),
        "history": Stored(torch.float64, (n, long)),
    }  # fmt: skip
    if settings.get("method") == "ddpm":
        done["noises"] = Stored(torch.float64, (n, settings.get("taken") or settings["steps"], *images.shape[1:]))
    if settings.get("rule") == "belm":
        done["second"] = Stored(torch.float64, (n, *images.shape[1:]))
    required = {f"done.{name}": part for name, part in done.items()}
    if not any(name.startswith("done.") for name in stored):
        required = {}
    # of what a method keeps for itself, `invert` checks the rest, where it goes on
    state = {name: part for name, part in stored.items() if name.startswith("state.")}
    if state and len(state.get("state.history", Stored(torch.float64, ())).shape) != 2:
        raise ValueError("state.history of shape (epochs, images) is required")
    return required | state


def _check_done(done: dict[str, Tensor], first: int) -> None:
    count = len(done["loss"]) if done else 0
    if first > count:
        raise ValueError(f"first: at most {count}, the images that are done, is required, got {first}")
    if not done:
        return
    known = torch.tensor([int(status) for status in Status])
    if not bool(torch.isin(done["status"], known).all()):
        raise ValueError(f"done.status: numbers of a Status are required, got {done['status'].unique().tolist()}")
    for name in ("rounds", "evaluations", "loss", "typicality"):
        if bool((done[name] < 0).any()):
            raise ValueError(f"done.{name}: no less than 0 is required, got {done[name].min().item()}")


def _padded(history: Tensor, longest: int) -> Tensor:
    return torch.nn.functional.pad(history, (0, longest - history.shape[1]), value=torch.nan)
