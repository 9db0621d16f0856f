"""Draws how noise becomes pictures in colour, all time steps at once and one after the other, and edits two of them.

    python docs/examples/colour_picture.py --output docs/emoji.png

Printed: rounds, network evaluations per image and the difference of both ways; the loss of the inversions.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion import Parallel, invert, load_checkpoint, sample
from diffusion.program.editing import spherical
from diffusion.program.pictures import draw_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="emoji", help="a shipped model, or the folder of another")
    add("--steps", type=int, default=1000, help="T of sampling")
    add("--rounds", type=int, nargs="*", default=(1, 2, 4), help="rounds after which the pictures are shown")
    add("--invert-steps", type=int, default=100, help="T of inversion and editing")
    add("--images", type=int, nargs=2, default=(0, 7), help="positions of the two real pictures")
    add("--columns", type=int, default=10)
    add("--seed", type=int, default=1)
    add("--output", type=Path, default=Path("emoji.png"))
    args = parser.parse_args()
    shipped = load_checkpoint(args.model)
    model, chain = shipped.model.requires_grad_(False), shipped.schedule.chain(args.steps)
    options: dict[str, Any] = {"prediction": shipped.prediction}
    latents = torch.randn(args.columns, *shipped.shape, generator=torch.Generator().manual_seed(args.seed))
    one_by_one = sample(model, latents, chain, "sequential", **options)
    seen: list[Tensor] = [latents]
    at_once = sample(model, latents, chain, Parallel(), callback=lambda _, x, r: seen.append(x[:, -1]), **options)
    off = (at_once.x_0 - one_by_one.x_0).flatten(1).norm(dim=1) / one_by_one.x_0.flatten(1).norm(dim=1)
    print(f"rounds: {one_by_one.rounds:,} and {at_once.rounds}; differ by {off.max():.1e} at most")
    print(f"network evaluations per image: {args.steps:,} and {at_once.evaluations.double().mean():,.0f}")

    short = shipped.schedule.chain(args.invert_steps, spacing="quadratic")
    assert shipped.images is not None
    real = shipped.images[list(args.images)]
    found = invert(model, real, short, **options)
    way = spherical(found.x_T[0], found.x_T[1], torch.linspace(0, 1, args.columns - 2))
    walk = sample(model, way, short, **options).x_0.to(real)
    print(f"loss of the inversions: {found.loss.max():.1e}")
    rows = {
        "noise": latents / 3,
        **{f"after {counted(k)}\nof all {args.steps:,} steps": seen[k] for k in args.rounds if k < len(seen)},
        f"after {counted(at_once.rounds)}: done": at_once.x_0,
        f"one step after another:\n{one_by_one.rounds:,} rounds": one_by_one.x_0,
        "edited: from one real\npicture to another": torch.cat([real[:1], walk, real[1:]]),
    }
    draw_rows(args.output, "Pictures of 32×32 pixels in colour, on a shipped model", rows, framed=True)
    print(f"wrote {args.output}")


def counted(rounds: int) -> str:
    return "1 round" if rounds == 1 else f"{rounds} rounds"


if __name__ == "__main__":
    main()
