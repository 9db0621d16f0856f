"""The state of a training run, one step of it, and its saving and loading.

Everything random in step k is drawn from a generator seeded by (seed, k) alone, so the state of a run is its weights,
their running average, Adam's moments and k.
"""

import copy
import hashlib
import json
import math
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models.checkpoint import IMAGES, save_checkpoint
from ..models.configuration import CONFIG, WEIGHTS
from ..models.files import Stored, check_parts, parse_json, read_header, read_json, read_tensors, write_tensors
from ..models.statistics import Statistics
from ..schedule import Schedule

STATE = Path("training") / "state.safetensors"
AGAIN = "pass resume=False to replace it"
LOSS_MEMORY = 0.998  # of the running average of the loss: about the last 500 steps


class Run:
    """A training run: weights, their running average, Adam's moments and the number of steps done.

    Args:
        images: (n, C, H, W).
        folder: where it is saved.
        model: trained in place.
        schedule: of the noise.
        settings: steps, batch, lr, ema, seed, prediction as in `fit`, and what else must agree on resuming.
        dtype: type of the weights in the checkpoint; None: as trained.
        labels: (n,) long, the classes of the images, for a class-conditional model; settings then say `drop_label`.
        eigenvectors: as in `fit`.

    Attributes:
        step: steps done.
        torn: true while the weights are between two steps, when saving them would be wrong.
    """

    def __init__(
        self, images: Tensor, folder: Path, model: nn.Module, schedule: Schedule, settings: dict[str, Any],
        dtype: torch.dtype | None, labels: Tensor | None = None, eigenvectors: int | None = None,
    ) -> None:  # fmt: skip
        self.labels, self.eigenvectors = labels, eigenvectors
        self.images, self.folder, self.model, self.schedule = images, folder, model, schedule
        self.settings, self.dtype = settings, dtype
        self.shape = (images.shape[1], images.shape[2], images.shape[3])
        self.average = copy.deepcopy(model)
        self.parameters = list(model.parameters())
        self.averages = [p.detach() for p in self.average.parameters()]
        self.optimizer = torch.optim.Adam(self.parameters, lr=settings["lr"])
        self.device, self.precision = self.parameters[0].device, self.parameters[0].dtype
        self.loss = torch.zeros((), device=self.device, dtype=self.precision)
        self.step = 0
        self.torn = False

    @cached_property
    def statistics(self) -> Statistics:
        """Of the images; their covariance takes a while, and a run that is done does not need it."""
        return Statistics.of(self.images, self.eigenvectors)

    def advance(self) -> Tensor:
        """Do one step and return its loss, a scalar on the model's device."""
        settings, k = self.settings, self.step
        x_t, t, target = self.draw(k)
        x_t, target = x_t.to(self.device, self.precision), target.to(self.device, self.precision)
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = settings["lr"] * (1 + math.cos(math.pi * k / settings["steps"])) / 2
        self.optimizer.zero_grad(set_to_none=True)
        label = () if self.labels is None else (self.draw_labels(k).to(self.device),)
        loss: Tensor = (self.model(x_t, t.to(self.device), *label) - target).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.torn = True
        self.optimizer.step()
        # a fixed decay would keep the untrained weights in the average of a short run
        decay = min(settings["ema"], (1 + k) / (10 + k))
        torch._foreach_lerp_(self.averages, [p.detach() for p in self.parameters], 1 - decay)
        loss = loss.detach()
        self.loss = torch.lerp(loss, self.loss, min(LOSS_MEMORY, k / (k + 1)))
        self.step += 1
        self.torn = False
        return loss

    def draw(self, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the noisy images, time steps and targets of step k, which depend on nothing but seed and k."""
        batch, count = self.settings["batch"], len(self.schedule)
        generator = self._generator(k)
        x_0 = self.images[torch.randint(len(self.images), (batch,), generator=generator)].float()
        within = torch.rand(batch, generator=generator, dtype=torch.float64)
        t = ((torch.arange(batch) + within) * (count / batch)).long().clamp(max=count - 1)
        noise = torch.randn(x_0.shape, generator=generator)
        target = {
            "epsilon": lambda: noise,
            "v": lambda: self.schedule.add_noise(noise, -x_0, t),
            "sample": lambda: x_0,
        }[self.settings["prediction"]]()
        return self.schedule.add_noise(x_0, noise, t), t, target

    def draw_labels(self, k: int) -> Tensor:
        """Return the labels (batch,) of the images of step k, a share of them replaced by no class."""
        assert self.labels is not None
        batch, classes = self.settings["batch"], self.settings["model"]["classes"]
        labels = self.labels[torch.randint(len(self.images), (batch,), generator=self._generator(k))]
        dropped = torch.rand(batch, generator=self._generator(k, "label")) < self.settings["drop_label"]
        return labels.masked_fill(dropped, classes)

    def _generator(self, *step: int | str) -> torch.Generator:
        # torch's CPU generator keeps 32 bits of its seed: hashing is what makes (seed, k) count as a pair
        digest = hashlib.sha256(":".join(map(str, (self.settings["seed"], *step))).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))

    def finished(self) -> bool:
        """Return whether the folder holds the result of this very run.

        Raises:
            ValueError: it holds another run, weights that `fit` did not write, or a run without its state.
        """
        config, state = self.folder / CONFIG, os.path.lexists(self.folder / STATE)
        if state:
            return False
        if not os.path.lexists(config):
            if any(os.path.lexists(self.folder / name) for name in (WEIGHTS, IMAGES)):
                self._require_same(None)
            return False
        try:
            record = read_json(config).get("training")
        except ValueError as error:
            raise ValueError(f"{error}; {AGAIN}") from error
        self._require_same(record.get("settings") if isinstance(record, dict) else None)
        if record is None or record.get("steps_done") != self.settings["steps"]:
            raise ValueError(f"{self.folder / STATE}: missing, without which a run cannot go on; {AGAIN}")
        return True

    def resume(self) -> None:
        """Go on from the saved state, if there is one.

        Raises:
            ValueError: its file is cut short, of another run, or lacks a part.
        """
        path = self.folder / STATE
        if not os.path.lexists(path):
            return
        try:
            stored, metadata = read_header(path)
            self._require_same(parse_json(metadata.get("settings", "")))
            step = metadata.get("step", "")
            if not (step.isascii() and step.isdecimal() and 0 < int(step[:20]) < self.settings["steps"]):
                raise ValueError(f"{path}: step from 1 to {self.settings['steps'] - 1} is required, got {step!r:.40}")
            check_parts(stored, self._parts(), path)
            tensors, _ = read_tensors(path)
            for name, value in tensors.items():
                if not bool(value.isfinite().all()) or (name.startswith("second.") and bool((value < 0).any())):
                    raise ValueError(f"{path}: {name} is not finite, or below 0 where it is a square")
        except ValueError as error:
            place = "" if str(error).startswith((str(path), str(self.folder))) else f"{path}: "
            again = "" if AGAIN in str(error) else f"; {AGAIN}"
            raise ValueError(f"{place}{error}{again}") from error
        self.step, self.loss = int(step), tensors["loss"].to(self.device)
        names = [name for name, _ in self.model.named_parameters()]
        for name, weight, average in zip(names, self.parameters, self.averages, strict=True):
            weight.data.copy_(tensors[f"weight.{name}"])
            average.copy_(tensors[f"average.{name}"])
            self.optimizer.state[weight] = {
                "step": torch.tensor(float(self.step)),
                "exp_avg": tensors[f"first.{name}"].to(self.device),
                "exp_avg_sq": tensors[f"second.{name}"].to(self.device),
            }

    def _parts(self) -> dict[str, Stored]:
        """What a saved state holds."""
        parts = {"loss": Stored(self.loss.dtype, ())}
        for name, p in self.model.named_parameters():
            for kind in ("weight", "average", "first", "second"):
                parts[f"{kind}.{name}"] = Stored(p.dtype, tuple(p.shape))
        return parts

    def save(self) -> None:
        """Write the checkpoint, and the state of the run, or remove that if the run is done."""
        if self.step == 0:
            return
        loss = self.loss.item()
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss} after {self.step} steps: lower lr, or look for bad values in images")
        record = {"steps_done": self.step, "seed": self.settings["seed"], "loss": loss, "settings": self.settings}
        done = self.step == self.settings["steps"]
        if not done:  # first: whatever ends this between the two files, the next run finds its state
            self._save_state()
        save_checkpoint(
            self.folder, self.average, self.schedule, prediction=self.settings["prediction"],
            shape=self.shape, statistics=self.statistics, extra=record, dtype=self.dtype,
        )  # fmt: skip
        if done:
            path = self.folder / STATE
            path.unlink(missing_ok=True)
            if path.parent.is_dir() and not any(path.parent.iterdir()):
                path.parent.rmdir()

    def _save_state(self) -> None:
        path = self.folder / STATE
        tensors = {"loss": self.loss}
        for (name, weight), average in zip(self.model.named_parameters(), self.averages, strict=True):
            moments = self.optimizer.state[weight]
            tensors[f"weight.{name}"], tensors[f"average.{name}"] = weight.detach(), average
            tensors[f"first.{name}"], tensors[f"second.{name}"] = moments["exp_avg"], moments["exp_avg_sq"]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, tensors, {"step": str(self.step), "settings": json.dumps(self.settings)})

    def _require_same(self, saved: Any) -> None:
        if not isinstance(saved, dict):
            raise ValueError(f"{self.folder} holds a checkpoint not written by fit; {AGAIN}")
        own = json.loads(json.dumps(self.settings))
        different = [key for key in {**saved, **own} if own.get(key) != saved.get(key)]
        if different:
            was = ", ".join(f"{key} = {saved.get(key)!r} there, {own.get(key)!r} here" for key in different)
            raise ValueError(f"{self.folder} holds a run with other settings: {was}; {AGAIN}")
