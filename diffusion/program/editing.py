"""What the command `edit` does, once its options are read; it returns its summary."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..models.files import write_json
from .latents import LATENTS, Latents, numbered, read_latents, write_latents
from .output import writable
from .parser import NO_CLASS

COUNT = {"between": 7, "vary": 4}  # latents that are made, unless the user says how many


def spherical(a: Tensor, b: Tensor, s: Tensor) -> Tensor:
    """Return the latents (k, …) at shares s (k,) of the way from a to b: directions on the sphere, lengths in between.

    Direction: sin((1−s) θ)/sin θ a/|a| + sin(s θ)/sin θ b/|b|, θ the angle between (Shoemake 1985). A straight line
    would pass through latents that are shorter than the model ever sees, and make bland images.
    """
    first, last = shares(a, b, s)
    return first * a + last * b


def shares(a: Tensor, b: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """How much of a and of b (k, 1, …) makes the latents that `spherical` returns."""
    lengths = a.norm(), b.norm()
    angle = ((a / lengths[0]) * (b / lengths[1])).sum().clamp(-1 + 1e-6, 1 - 1e-6).acos()
    s = s.to(a.dtype).reshape(-1, *[1] * a.dim())
    size = torch.lerp(*lengths, s) / angle.sin()
    return ((1 - s) * angle).sin() * size / lengths[0], (s * angle).sin() * size / lengths[1]


def run_edit(args: Namespace) -> dict[str, Any]:
    """Make new latents of those that were found, and write them; return the summary."""
    operation = "between" if args.between else "vary" if args.vary else "label"
    if operation == "label" and args.label is None and args.guidance is None:
        raise ValueError("one of --between, --vary, --label and --guidance is required")
    latents = read_latents(args.latents)
    if not bool((latents.x_T.flatten(1).norm(dim=1) > 0).all()):
        raise ValueError(f"--latents {args.latents}: a latent of length 0 has no direction to turn")
    if operation == "label" and args.count is not None:
        raise ValueError("--count: of --between and --vary, none came")
    if args.vary and latents.chain.get("strength", 1.0) < 1:
        raise ValueError(f"--vary: of latents that are noise alone, these still show their picture (strength "
                         f"{latents.chain['strength']:g}); sample --images with another --seed varies it")  # fmt: skip
    count = args.count or COUNT.get(operation, 0)
    if args.between:
        first, last = (_find(latents, word) for word in args.between)
        edited = _walk(latents, first, last, count)
        ends = [] if latents.labels is None else [latents.labels[end] for end in (first, last)]
        if args.label is None and len(set(ends)) > 1:
            raise ValueError(f"--label: required, these two are of classes {ends[0]} and {ends[1]}")
    elif args.vary:
        edited = _variants(latents, args.vary, count, args.seed)
    else:
        edited = latents if args.label is None else _of_classes(latents, args.label)
    edited = _asked(edited, args)
    with writable(args.output, [LATENTS, "summary.json"], args.overwrite) as folder:
        summary = {
            "command": "edit", "operation": operation, "from": args.latents, "latents": len(edited.x_T),
            "names": edited.names, "labels": edited.labels, "chain": edited.chain, "seed": args.seed,
            "output": str(folder), "files": [LATENTS, "summary.json"],
        }  # fmt: skip
        write_latents(folder / LATENTS, edited)
        write_json(folder / "summary.json", summary)
    return summary


def _of_classes(latents: Latents, labels: Sequence[int | None]) -> Latents:
    """Every latent once for each class, with the noise maps and the second state that it has."""
    rows = torch.arange(len(latents.x_T)).repeat_interleave(len(labels))
    names = [f"{name}-{NO_CLASS if label is None else label}" for name in latents.names for label in labels]
    second, noises = (None if x is None else x[rows] for x in (latents.second, latents.noises))
    return Latents(latents.x_T[rows], names, latents.chain, second, noises, [*labels] * len(latents.x_T))


def _asked(latents: Latents, args: Namespace) -> Latents:
    """The latents with the classes and the guidance that the options name."""
    labels, count = latents.labels, len(latents.x_T)
    if args.label is not None and (args.between or args.vary):
        if len(args.label) not in (1, count):
            raise ValueError(f"--label: 1 or {count}, one for each latent, is required, got {len(args.label)}")
        labels = [*args.label] * (count if len(args.label) == 1 else 1)
    if args.guidance is not None and labels is None:
        raise ValueError("--guidance: of latents with a class, --label; none came")
    own = {} if args.guidance is None else {"guidance": args.guidance}
    return replace(latents, chain={**latents.chain, **own}, labels=labels)


def _find(latents: Latents, word: str) -> int:
    """The position of the latent that the user names, or gives the number of."""
    if word in latents.names:
        return latents.names.index(word)
    if word.isdecimal() and 1 <= int(word) <= len(latents.names):
        return int(word) - 1
    known = ", ".join(latents.names[:8]) + (", …" if len(latents.names) > 8 else "")
    raise ValueError(f"--between {word}: a number from 1 to {len(latents.names)} is required, or one of {known}")


def _walk(latents: Latents, first: int, last: int, count: int) -> Latents:
    """The way from one latent to another, both included."""
    if count < 2:
        raise ValueError(f"--count: at least 2, both ends, is required, got {count}")
    s, x_T, second, noises = torch.linspace(0, 1, count), latents.x_T, latents.second, latents.noises
    a, b = shares(x_T[first], x_T[last], s)
    if second is not None:  # the pairs stay pairs: both states by the same shares
        second = a * second[first] + b * second[last]
    if noises is not None:
        noises = spherical(noises[first], noises[last], s)
    names = [f"{latents.names[first]}-{latents.names[last]}-{number}" for number in numbered(count)]
    labels = None if latents.labels is None else [latents.labels[first]] * count
    return Latents(a * x_T[first] + b * x_T[last], names, latents.chain, second, noises, labels)


def _variants(latents: Latents, amount: float, count: int, seed: int) -> Latents:
    """`count` neighbours of each latent, each this share of the way to a fresh one, and its noise maps as far.

    Of a pair of states the first alone is turned: the chain makes the second of it.
    """
    generator = torch.Generator().manual_seed(seed)
    names = [f"{name}-{number}" for name in latents.names for number in numbered(count)]

    def turned(parts: Tensor) -> Tensor:
        made = []
        for part in parts:
            fresh = torch.randn(count, *part.shape, generator=generator).to(part)
            made += [spherical(part, noise, torch.tensor([amount]))[0] for noise in fresh]
        return torch.stack(made)

    x_T = turned(latents.x_T)
    noises = None if latents.noises is None else turned(latents.noises)
    labels = None if latents.labels is None else [label for label in latents.labels for _ in range(count)]
    return Latents(x_T, names, latents.chain, noises=noises, labels=labels)
