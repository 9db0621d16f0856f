"""Draws the first picture of the README: clothes sampled step by step and all steps at once, and two real ones edited.

    python docs/examples/first_picture.py --output docs/fashion-first.png

Printed: rounds, network evaluations per image and the difference of both ways; the loss of the inversions.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from diffusion import invert, load_checkpoint, sample
from diffusion.program.editing import spherical
from diffusion.program.pictures import draw_rows

COLUMNS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--steps", type=int, default=1000, help="T of sampling")
    add("--invert-steps", type=int, default=100, help="T of inversion and editing")
    add("--images", type=int, nargs=2, default=(28, 9), help="positions of the two real images")
    add("--seed", type=int, default=1)
    add("--output", type=Path, default=Path("fashion-first.png"))
    args = parser.parse_args()
    fashion = load_checkpoint("fashion")
    model, chain = fashion.model.requires_grad_(False), fashion.schedule.chain(args.steps)
    latents = torch.randn(COLUMNS, *fashion.shape, generator=torch.Generator().manual_seed(args.seed))
    one_by_one = sample(model, latents, chain, "sequential")
    at_once = sample(model, latents, chain, splitting=fashion.splitting(chain, "covariance"))
    off = (at_once.x_0 - one_by_one.x_0).flatten(1).norm(dim=1) / one_by_one.x_0.flatten(1).norm(dim=1)
    print(f"rounds: {one_by_one.rounds:,} and {at_once.rounds}; differ by {off.max():.1e} at most")
    print(f"network evaluations per image: {args.steps:,} and {at_once.evaluations.double().mean():,.0f}")

    short = fashion.schedule.chain(args.invert_steps, spacing="quadratic")
    real = fashion.images[list(args.images)]
    found = invert(model, real, short)
    way = spherical(found.x_T[0], found.x_T[1], torch.linspace(0, 1, COLUMNS - 2))
    walk = sample(model, way, short).x_0.to(real)
    print(f"loss of the inversions: {found.loss.max():.1e}")
    rows = {
        f"sampled in {one_by_one.rounds:,} rounds,\none step after the other": one_by_one.x_0,
        f"the same in {at_once.rounds} rounds,\nall steps at once": at_once.x_0,
        "edited: from one real\npicture to another": torch.cat([real[:1], walk, real[1:]]),
    }
    draw_rows(args.output, "Fashion-MNIST, 28×28, on a shipped model", rows, framed=True)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
