"""A model under study, with the images and the feature space that go with it."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...models.checkpoint import SHIPPED, Checkpoint
from ...models.files import fingerprint
from ...sample import Sample, sample
from ...training.data import Dataset, class_folder, digits
from ...training.frechet import FEATURES_FILE, FeatureSpace, fit_classifier, load_features, save_features
from ..commands import load, options_of, splitting_of
from ..output import say
from .ledger import Ledger
from .plan import Plan, plan_of


@dataclass(frozen=True, eq=False)
class Subject:
    """A model under study.

    Attributes:
        checkpoint: the model and its schedule.
        images: (n, C, H, W) real images that were not trained on, to invert.
        space: features in which distances are measured.
        plan: how much is measured.
        seed: of latents and noises.
        identity: what a measurement depends on of all this, JSON-ready.
    """

    checkpoint: Checkpoint
    images: Tensor
    space: FeatureSpace
    plan: Plan
    seed: int
    identity: dict[str, Any]

    @property
    def name(self) -> str:
        """Name of the checkpoint."""
        return self.checkpoint.name

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.checkpoint.model.parameters()).device

    def latents(self, number: int, count: int) -> Tensor:
        """Return batch `number` of the latents (count, C, H, W), the same ones on every device."""
        generator = torch.Generator().manual_seed(self.seed + number)
        return torch.randn(count, *self.checkpoint.shape, generator=generator).to(self.device)

    def sampler(self, steps: int, method: str, eta: float = 0.0, number: int = 0) -> Callable[[Tensor], Sample]:
        """Return a function from latents to samples of a chain; `number` seeds its fresh noise."""
        chain = self.checkpoint.schedule.chain(steps, eta=eta)
        options = options_of(self.checkpoint, chain, None)

        def run(x_T: Tensor) -> Sample:
            generator = torch.Generator().manual_seed(2**20 + self.seed + number) if eta else None
            with torch.no_grad():
                return sample(self.checkpoint.model, x_T, chain, method=method, generator=generator, **options)

        return run

    def describe(self) -> dict[str, Any]:
        """Return what the report says of the model, the images and the classifier."""
        parameters = sum(p.numel() for p in self.checkpoint.model.parameters())
        return {
            "name": self.name, "shape": list(self.checkpoint.shape), "parameters": parameters,
            "splitting": splitting_of(self.checkpoint, None), "images": len(self.images),
            "classifier": self.space.record, "features": len(self.space.mean),
        }  # fmt: skip


def subjects(args: Namespace, device: torch.device, ledger: Ledger) -> list[Subject]:
    """Return the models that the options name, each with its images and features.

    Raises:
        FileNotFoundError, ValueError: no such model or folder, or options that do not fit it.
    """
    names = args.model or ["digits", "fashion"]
    if args.dataset_folder is not None and len(names) != 1:
        raise ValueError("--dataset-folder: exactly one --model, trained on such images, is required")
    checkpoints = [load(name, device) for name in names]
    for checkpoint in checkpoints:  # what is wrong is said before the work
        plan = plan_of(checkpoint.name, args)
        for steps in (*plan.steps, *plan.invert_steps):
            checkpoint.schedule.chain(steps)
        if args.dataset_folder is None and not (SHIPPED / checkpoint.name / FEATURES_FILE).is_file():
            lacks = "features in which distances are measured" if checkpoint.images is not None else "real images"
            raise ValueError(f"--dataset-folder: required for {checkpoint.name}, which comes without {lacks}")
    return [_subject(args, checkpoint, ledger) for checkpoint in checkpoints]


def _subject(args: Namespace, checkpoint: Checkpoint, ledger: Ledger) -> Subject:
    plan = plan_of(checkpoint.name, args)
    if args.dataset_folder is None:
        images, space = _shipped_images(checkpoint), load_features(SHIPPED / checkpoint.name)
    else:
        data = class_folder(args.dataset_folder, checkpoint.shape)
        images, space = data.test, _features(data, plan, args.seed, checkpoint, ledger)
    images = images[: plan.images].clone()  # not a view, which would keep the whole set
    identity = {
        "weights": fingerprint(checkpoint.model.state_dict().values()), "images": fingerprint([images]),
        "features": fingerprint([space.mean, *space.model.state_dict().values()]), "seed": args.seed,
    }  # fmt: skip
    return Subject(checkpoint, images, space, plan, args.seed, identity)


def _shipped_images(checkpoint: Checkpoint) -> Tensor:
    """Return real images: all held-out digits where scikit-learn is at hand, else those of the checkpoint."""
    assert checkpoint.images is not None
    if checkpoint.name == "digits":
        try:
            return digits().test
        except ImportError:
            pass
    return checkpoint.images.cpu()


def _features(data: Dataset, plan: Plan, seed: int, checkpoint: Checkpoint, ledger: Ledger) -> FeatureSpace:
    """Return the features of a classifier trained on these images, once."""
    settings = {"images": fingerprint([data.train, data.train_labels]), "seed": seed, "steps": plan.classifier_steps}
    folder = ledger.place(f"{checkpoint.name}-classifier", settings)
    if not (folder / FEATURES_FILE).is_file():
        say(f"training a classifier on the {len(data.train)} images of the folder")
        device = next(checkpoint.model.parameters()).device
        save_features(folder, fit_classifier(data, steps=plan.classifier_steps, seed=seed, device=device))
    return load_features(folder)
