"""Inverts two real images, walks from one latent to the other on the sphere between them, and samples along the way.

    python docs/examples/interpolate.py --model digits --images 0 1 --count 7 --output interpolation.png

The picture: the two real images at both ends, between them what the model makes of the latents. Printed: the loss of
both inversions, how far the ends of the walk are from the real images, and the rounds of model calls spent.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from diffusion import invert, load_checkpoint, sample
from diffusion.program.pictures import draw_rows


def spherical(a: Tensor, b: Tensor, count: int) -> Tensor:
    """Latents (count, …) from a to b (Shoemake 1985): sin((1−s) θ)/sin θ a + sin(s θ)/sin θ b, θ the angle between.

    A straight line would pass through latents that are shorter than the model ever sees, and make bland images.
    """
    cosine = (a * b).sum() / (a.norm() * b.norm())
    angle = cosine.clamp(-1 + 1e-6, 1 - 1e-6).acos()
    s = torch.linspace(0, 1, count, dtype=a.dtype).reshape(-1, *[1] * a.dim())
    return (((1 - s) * angle).sin() * a + (s * angle).sin() * b) / angle.sin()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="digits", help="digits, fashion or a checkpoint's folder that has images")
    add("--images", type=int, nargs=2, default=(0, 1), help="positions of the two among the checkpoint's images")
    add("--steps", type=int, default=100, help="T")
    add("--count", type=int, default=7, help="latents from one end to the other, both included")
    add("--output", type=Path, default=Path("interpolation.png"))
    args = parser.parse_args()
    checkpoint = load_checkpoint(args.model)
    if checkpoint.images is None:
        parser.error(f"{checkpoint.name} comes without images")
    chain = checkpoint.schedule.chain(args.steps)
    real = checkpoint.images[list(args.images)]
    with torch.no_grad():
        found = invert(checkpoint.model, real, chain, prediction=checkpoint.prediction)
        between = sample(
            checkpoint.model, spherical(found.x_T[0], found.x_T[1], args.count), chain, prediction=checkpoint.prediction
        )
    ends = between.x_0[[0, -1]]
    print(f"loss of the inversions: {found.loss[0]:.1e}, {found.loss[1]:.1e} ({found.rounds} rounds)")
    error = (ends - real).double().square().flatten(1).sum(1)
    print(f"ends of the walk against the real images: {error[0]:.1e}, {error[1]:.1e} ({between.rounds} rounds)")
    row = torch.cat([real[:1], between.x_0, real[1:]])
    labels = ["real", *[f"{100 * k // (args.count - 1)}%" for k in range(args.count)], "real"]
    draw_rows(args.output, f"{checkpoint.name}: between two real images, T = {args.steps}", {"": row}, above=labels)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
