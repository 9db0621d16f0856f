"""The classes that a command line asks for, of a class-conditional model: one an image, and how far to lead to it."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models.checkpoint import Checkpoint
from ..models.wrappers import DiffusersModel, Guided
from .parser import NO_CLASS

RECORDED = {"guidance": float, "negative_label": int}  # what a file says of a condition, beside its labels


def classes_of(checkpoint: Checkpoint) -> int:
    """The number of classes of a checkpoint's model, 0 of one without."""
    classes = getattr(checkpoint.model, "classes", None)
    return classes if isinstance(classes, int) else 0


def no_class_of(checkpoint: Checkpoint) -> int | None:
    """The label that stands for no class; None where the checkpoint does not say, as none of diffusers does."""
    found: Tensor | None = getattr(checkpoint.model, "no_class", None)
    return None if found is None or not classes_of(checkpoint) else int(found)


@dataclass(frozen=True)
class Condition:
    """Which class each image is to be of.

    labels: one for each image, None is no class; None for all is a model that is given none. guidance: scale of
    classifier-free guidance, 1 is none. negative: the label that guidance leads away from, None the checkpoint's own.
    """

    labels: list[int | None] | None = None
    guidance: float = 1.0
    negative: int | None = None

    @staticmethod
    def of(
        args: Namespace, checkpoint: Checkpoint, count: int, found: Mapping[str, Any] | None = None,
        labels: Sequence[int | None] | None = None,
    ) -> Condition:  # fmt: skip
        """What the options say, else the latents: `found` of their chain, and their labels.

        Raises:
            ValueError: classes that the model has not, another number of them than images, guidance without.
        """
        recorded, name, classes = found or {}, checkpoint.name, classes_of(checkpoint)
        given = labels if args.label is None else args.label
        if not classes and given is not None:
            option = "--label" if args.label is not None else "--latents, which are of classes"
            raise ValueError(f"{option}: a model with classes, such as digit-classes, is required, {name} has none")
        if given is None:
            if args.guidance not in (None, 1.0) or args.negative_label is not None:
                option = "guidance" if args.guidance not in (None, 1.0) else "negative-label"
                raise ValueError(f"--{option}: of a model by class, together with --label; none came")
            if classes and isinstance(checkpoint.model, DiffusersModel) and checkpoint.model.takes.needed:
                raise ValueError(f"--label: required by {name}, {_known(classes)}")
            return Condition()
        if len(given) not in (1, count):
            raise ValueError(f"--label: 1 or {count}, one for each image, is required, got {len(given)}")
        guidance = args.guidance if args.guidance is not None else recorded.get("guidance", 1.0)
        negative = args.negative_label if args.negative_label is not None else recorded.get("negative_label")
        condition = Condition([*given] * (count if len(given) == 1 else 1), guidance, negative)
        condition._check(args, checkpoint, classes)
        return condition

    def _check(self, args: Namespace, checkpoint: Checkpoint, classes: int) -> None:
        name, own = checkpoint.name, no_class_of(checkpoint)
        for option, values in (("label", self.labels or []), ("negative-label", [self.negative])):
            wrong = next((value for value in values if value is not None and not 0 <= value < classes), None)
            if wrong is not None:
                raise ValueError(f"--{option}: {_known(classes)} of {name} {'is' if classes == 1 else 'are'} required, "
                                 f"got {wrong}")  # fmt: skip
        if own is None and None in (self.labels or []):
            raise ValueError(f"--label {NO_CLASS}: {name} does not say which of {_known(classes)} stands for no class")
        if self.guidance == 1 and args.negative_label is not None:
            raise ValueError("--negative-label: of --guidance other than 1, which leads away from it")
        if self.guidance != 1 and self.negative is None and own is None:
            raise ValueError(f"--negative-label: required for guidance, {name} does not say which of "
                             f"{_known(classes)} stands for no class")  # fmt: skip

    def model(self, checkpoint: Checkpoint) -> Callable[..., Tensor]:
        """The checkpoint's model, with guidance where it is asked for."""
        if self.labels is None or self.guidance == 1:
            return checkpoint.model
        negative = no_class_of(checkpoint) if self.negative is None else self.negative
        device = next(checkpoint.model.parameters()).device
        return Guided(checkpoint.model, self.guidance, torch.tensor(negative, device=device))

    def inputs(self, checkpoint: Checkpoint, part: slice = slice(None)) -> tuple[Tensor, ...]:
        """What the model is given of these images: their labels (n,), or nothing."""
        if self.labels is None:
            return ()
        none, device = no_class_of(checkpoint), next(checkpoint.model.parameters()).device
        return (torch.tensor([none if own is None else own for own in self.labels[part]], device=device),)

    def record(self) -> dict[str, Any]:
        """What a file says of it, from which `of` makes it again."""
        if self.labels is None:
            return {}
        return {"guidance": self.guidance} | ({} if self.negative is None else {"negative_label": self.negative})


def _known(classes: int) -> str:
    return f"classes 0 … {classes - 1}" if classes > 1 else "class 0"
