"""Flows on the shipped digits: rounds, evaluations and error of sampling, loss of inversion.

    python benchmarks/chains.py [--images 8] [--real 32]

The checkpoint predicts ε of a chain whose variance is preserved. It is made a flow's model by the time step of the same
σ/α, the nearest of its 1,000, and x scaled to unit variance: v = ε − x_0, x_0 = (x − s ε)/(1 − s).
"""

from __future__ import annotations

import argparse
import platform

import torch
from torch import Tensor, nn

from diffusion import Checkpoint, Schedule, invert, load_checkpoint, sample


class FlowOf(nn.Module):
    """v(x, t) of a rectified flow from a checkpoint that predicts ε; t = 1000 s."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        self.network = checkpoint.model
        alphas = checkpoint.schedule.alphas_cumprod
        self.most = 1 / (1 + (alphas[-1] / (1 - alphas[-1])).sqrt())
        self.register_buffer("angles", torch.atan2((1 - alphas).sqrt(), alphas.sqrt()))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        s = (t.double() / 1000).clamp(max=float(self.most))  # no signal: the noisiest step that the network knows
        step = (torch.atan2(s, 1 - s)[:, None] - self.angles).abs().argmin(1)
        s = s.view(-1, *[1] * (x.dim() - 1)).to(x)
        eps = self.network(x / ((1 - s).square() + s.square()).sqrt(), step)
        return eps - (x - s * eps) / (1 - s)


def relative(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).flatten(1).norm(dim=1) / y.flatten(1).norm(dim=1)


def flows(checkpoint: Checkpoint, images: int, real: int) -> None:
    model = FlowOf(checkpoint).eval().requires_grad_(False)
    noise = torch.randn(images, *checkpoint.shape, generator=torch.Generator().manual_seed(0))
    print("| shift | T | rounds | evaluations/T | error | own images: loss, converged | digits: loss, evaluations |")
    print("|---|---|---|---|---|---|---|")
    for shift in (1.0, 2.0, 3.0):
        for steps in (28, 50):
            chain = Schedule.flow(shift).chain(steps)
            given = {"prediction": "flow"}
            exact = sample(model, noise, chain, "sequential", **given).x_0
            outs = [sample(model, x[None], chain, **given) for x in noise]
            error = max(float(relative(out.x_0, y[None]).max()) for out, y in zip(outs, exact, strict=True))
            rounds = sorted(out.rounds for out in outs)
            rows = sum(float(out.evaluations) for out in outs) / len(outs) / steps
            own = invert(model, exact, chain, **given)
            digits = invert(model, checkpoint.images[:real], chain, **given)
            print(
                f"| {shift:g} | {steps} | {rounds[len(rounds) // 2]} (most {rounds[-1]}) | {rows:.1f} | {error:.1e} "
                f"| {float(own.loss.median()):.1e} (most {float(own.loss.max()):.1e}), {int(own.converged.sum())} of "
                f"{images}, {float(own.evaluations.double().mean()):.0f} | {float(digits.loss.median()):.1e} (most "
                f"{float(digits.loss.max()):.1e}), {int(digits.converged.sum())} of {real}, "
                f"{float(digits.evaluations.double().mean()):.0f} in {digits.rounds} rounds |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--real", type=int, default=32)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {platform.machine()}, one thread, float32 network, images one by one")
    flows(load_checkpoint("digits"), args.images, args.real)


if __name__ == "__main__":
    main()
