"""Why some chains do not give a known latent back: singular values of dx_0/dx_T, and the roots that inversion finds.

    python benchmarks/inversion_roots.py                                   # digits, 16 latents, about four minutes
    python benchmarks/inversion_roots.py --count 8 --steps 50 --spacing linspace

Network and states in float64. For known latents x_T: the singular values of J = dx_0/dx_T by automatic differentiation
(an error δ of the image moves the latent by up to δ/σ_min) and the sign of det J. The chain, as a map of R^D whose ε
is bounded, has degree 1: the signs of all latents of an image add up to 1, so a latent of negative sign is never the
only one. Then exact inversion of the image, with the default error and with 1e-9, and with
`Exact(nearest=True)`, which looks for the root of least |ε|² at the stiff steps: how far from x_T its latent is
(root mean square), the loss, and |x|²/D of both.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from diffusion import Exact, Schedule, invert, load_checkpoint
from diffusion.chain import Chain
from diffusion.invert import Inversion

TIGHT = 1e-9
WAYS = (("default", None, Exact()), ("1e-9", TIGHT, Exact()), ("nearest, 1e-9", TIGHT, Exact(nearest=True)))
FOUND = 1e-3  # root mean square distance from the latent at which it counts as found again


def image_and_jacobian(model: nn.Module, chain: Chain, x: Tensor) -> tuple[Tensor, Tensor]:
    """x_0 (B, …) and J (B, D, D) of ε-predicting `model` at latents x (B, …), step by step by the chain rule."""
    B, D = len(x), x[0].numel()
    unit = torch.eye(D, dtype=x.dtype)
    J = unit.repeat(B, 1, 1)
    for k in range(len(chain)):
        copies = x.repeat_interleave(D, 0).requires_grad_()  # one for every row of ε's own Jacobian
        eps = model(copies, chain.timesteps[k].expand(len(copies)))
        (rows,) = torch.autograd.grad((eps.flatten(1) * unit.repeat(B, 1)).sum(), copies)
        J = chain.a[k] * J + chain.c[k] * rows.view(B, D, D) @ J
        x = (chain.a[k] * x + chain.c[k] * eps[::D]).detach()
    return x, J


def show(name: str, found: Inversion, x_T: Tensor) -> None:
    error = (found.x_T - x_T).flatten(1).square().mean(1).sqrt()
    near = int((error <= FOUND).sum())
    print(
        f"    {name:<13} distance {error.median():.1e} ({error.min():.0e} … {error.max():.0e}), found again {near} of "
        f"{len(x_T)}; loss {found.loss.median():.0e} (most {found.loss.max():.0e}); |x|²/D "
        f"{found.typicality.median():.2f}, of the known {x_T.flatten(1).square().mean(1).median():.2f}; "
        f"{found.evaluations.double().mean():.0f} evaluations",
        flush=True,
    )


def study(model: nn.Module, schedule: Schedule, steps: int, spacing: str, x_T: Tensor) -> None:
    chain = schedule.chain(steps, spacing)
    x_0, J = image_and_jacobian(model, chain, x_T)
    s = torch.linalg.svdvals(J)
    negative = int((torch.linalg.det(J) < 0).sum())
    print(
        f"{spacing} T={steps}: singular values {s[:, 0].median():.1f} … {s[:, -1].median():.1e} (least of all "
        f"{s[:, -1].min():.0e}); det J < 0 at {negative} of {len(x_T)} latents",
        flush=True,
    )
    for name, error, method in WAYS:
        show(name, invert(model, x_0, chain, method, error=error), x_T)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=16, help="latents")
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 50, 100])
    parser.add_argument("--spacing", nargs="+", default=["linspace", "quadratic"])
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint = load_checkpoint("digits")
    model = checkpoint.model.double().requires_grad_(False)
    generator = torch.Generator().manual_seed(args.seed)
    x_T = torch.randn(args.count, *checkpoint.shape, generator=generator).double()
    print(f"digits, float64, {args.count} latents, torch {torch.__version__}")
    for spacing in args.spacing:
        for steps in args.steps:
            study(model, checkpoint.schedule, steps, spacing, x_T)


if __name__ == "__main__":
    main()
