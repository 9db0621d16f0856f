"""An inversion kept in a folder: batch after batch of images, and within a batch epoch after epoch.

One file holds the results of the images that are done and the state of the batch under way, and is replaced in one
move; so whatever stops the run, the same command goes on from a state that the run was in, with the same result.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..descent import Epoch
from ..files import read_tensors, write_json, write_tensors
from ..invert import Inversion

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
            history (n, rounds or epochs), NaN where an image took fewer.
        state: of the batch under way, as `invert` takes it; empty between batches and for methods that have none.
        first: number of the first image of that batch.
        seconds: spent so far, over all runs.
    """

    folder: Path
    settings: dict[str, Any]
    done: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)
    first: int = 0
    seconds: float = 0.0

    @staticmethod
    def open(folder: Path, settings: dict[str, Any], restart: bool = False) -> Record:
        """Return the record in a folder, or a new one if there is none or `restart` is asked for.

        Raises:
            ValueError: the folder's record is of other settings, or its file is cut short.
        """
        settings = json.loads(json.dumps(settings))
        if restart or not (folder / TENSORS).is_file():
            return Record(folder, settings)
        try:
            tensors, header = read_tensors(folder / TENSORS)
            saved, first, seconds = dict(json.loads(header["settings"])), int(header["first"]), float(header["seconds"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder / TENSORS}: not the record of an inversion; --restart replaces it") from error
        names = [name for name in {**saved, **settings} if saved.get(name) != settings.get(name)]
        if names:
            was = ", ".join(f"{name} = {saved.get(name)!r} there, {settings.get(name)!r} here" for name in names)
            raise ValueError(f"{folder} holds an inversion with other settings: {was}; --restart replaces it")
        parts: dict[str, dict[str, Tensor]] = {"done": {}, "state": {}}
        for name, value in tensors.items():
            part, _, own = name.partition(".")
            parts[part][own] = value
        return Record(folder, settings, parts["done"], parts["state"], first, seconds)

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
        write_tensors(self.folder / TENSORS, {name: value.cpu() for name, value in tensors.items()}, header)

    def add(self, inversion: Inversion) -> None:
        """Append a batch that is done."""
        n = len(inversion.loss)
        batch = {
            "x_T": inversion.x_T, "loss": inversion.loss, "status": inversion.status,
            "typicality": inversion.typicality, "rounds": torch.full((n,), inversion.rounds),
            "evaluations": inversion.evaluations, "history": inversion.history.T,
        }  # fmt: skip
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
        """
        if len(self) < len(images):
            write_json(self.folder / SETTINGS, {"settings": self.settings, "complete": False})
        while len(self) < len(images):
            with _Saver(self) as saver:
                part = images[len(self) : len(self) + batch]
                self.add(invert_batch(part, len(self), self.state if self.epochs else None, saver.see))
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


def _padded(history: Tensor, longest: int) -> Tensor:
    return torch.nn.functional.pad(history, (0, longest - history.shape[1]), value=torch.nan)
