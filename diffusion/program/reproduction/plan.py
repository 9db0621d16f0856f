"""How much of the report is measured: lengths of chains, numbers of images and epochs."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Plan:
    """The sizes of one model's part of the report.

    Attributes:
        steps: lengths T of the chains of Figure 1; the longest is that of Figure 2 and Table 1.
        runs: latents of Figure 1.
        rounds: solver steps of Figures 1 and 2.
        samples: images per row of Table 1.
        invert_steps: lengths T of the chains of Table 3.
        images: real images inverted.
        epochs: of naive and deq.
        lr: learning rate of naive and deq; None is the one that suits each.
        batch: images sampled at a time.
        classifier_steps: of training the classifier, where none is shipped.
    """

    steps: tuple[int, ...] = (50, 100)
    runs: int = 25
    rounds: int = 15
    samples: int = 128
    invert_steps: tuple[int, ...] = (10, 20)
    images: int = 100
    epochs: int = 30
    lr: float | None = None
    batch: int = 16
    classifier_steps: int = 1000


PLANS = {
    "digits": Plan(steps=(100, 1000), samples=256, invert_steps=(10, 20, 100), batch=64),
    "fashion": Plan(steps=(25, 50), invert_steps=(10,), images=32, batch=32),
}
QUICK: dict[str, Any] = {
    "steps": (20,), "runs": 5, "samples": 32, "invert_steps": (10,), "images": 8, "epochs": 6, "classifier_steps": 100,
}  # fmt: skip


def plan_of(name: str, args: Namespace) -> Plan:
    """Return the plan of a model: the shipped ones have their own, --quick and single options change it."""
    plan = PLANS.get(name, Plan())
    if args.quick:
        plan = replace(plan, **QUICK)
    options = ("steps", "runs", "samples", "invert_steps", "images", "epochs", "lr", "batch")
    chosen = {option: getattr(args, option) for option in options}
    chosen = {key: tuple(value) if isinstance(value, list) else value for key, value in chosen.items()}
    return replace(plan, **{key: value for key, value in chosen.items() if value is not None})
