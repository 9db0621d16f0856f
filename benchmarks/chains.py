"""Chains of other kinds on the shipped checkpoints: flows and O-BELM's two-step chains, sampled and inverted.

    python benchmarks/chains.py [flows] [belm] [--images 8] [--real 16]

Rounds and evaluations to the default error, 1e-3, of images sampled one by one; of inversion the loss and evaluations.

The checkpoint predicts ε of a chain whose variance is preserved. It is made a flow's model by the time step of the same
σ/α, the nearest of its 1,000, and x scaled to unit variance: v = ε − x_0, x_0 = (x − s ε)/(1 − s).
"""

from __future__ import annotations

import argparse
import platform
import warnings
from statistics import median

import torch
from torch import Tensor, nn

from diffusion import Checkpoint, OnePass, Sample, Schedule, invert, load_checkpoint, sample


class FlowOf(nn.Module):
    """v(x, t) of a rectified flow from a checkpoint that predicts ε; t = 1000 s."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        self.network = checkpoint.model
        alphas = checkpoint.schedule.alphas_cumprod
        self.most = float(1 / (1 + (alphas[-1] / (1 - alphas[-1])).sqrt()))  # s of the noisiest step that it knows
        self.register_buffer("angles", torch.atan2((1 - alphas).sqrt(), alphas.sqrt()))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        s = (t.double() / 1000).clamp(max=self.most)
        step = (torch.atan2(s, 1 - s)[:, None] - self.angles).abs().argmin(1)
        s = s.view(-1, *[1] * (x.dim() - 1)).to(x)
        eps = self.network(x / ((1 - s).square() + s.square()).sqrt(), step)
        return eps - (x - s * eps) / (1 - s)


def relative(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).flatten(1).norm(dim=1) / y.flatten(1).norm(dim=1)


def off(x: Tensor, y: Tensor) -> float:
    """Median over the images of the root mean square difference of an entry."""
    return float((x.double() - y.double()).flatten(1).square().mean(1).sqrt().median())


def counted(outs: list[Sample], expected: Tensor, steps: int) -> str:
    """Cells: rounds, evaluations over T, largest error."""
    rounds, error = [out.rounds for out in outs], torch.cat([out.x_0 for out in outs])
    rows = sum(float(out.evaluations) for out in outs) / len(outs) / steps
    return f"{median(rounds):g} (most {max(rounds)}) | {rows:.1f} | {float(relative(error, expected).max()):.0e}"


def flows(images: int, real: int) -> None:
    checkpoint = load_checkpoint("digits")
    model = FlowOf(checkpoint).eval().requires_grad_(False)
    noise = torch.randn(images, *checkpoint.shape, generator=torch.Generator().manual_seed(0))
    print("\n| shift | T | rounds | evaluations/T | error | inverted | loss | evaluations | converged |")
    print("|---|---|---|---|---|---|---|---|---|")
    for shift in (1.0, 2.0, 3.0):
        for steps in (28, 50):
            chain = Schedule.flow(shift).chain(steps)
            exact = sample(model, noise, chain, "sequential", prediction="flow").x_0
            outs = [sample(model, x[None], chain, prediction="flow") for x in noise]
            cells = counted(outs, exact, steps)
            for what, targets, error in (
                ("its own", exact, None),
                ("digits", checkpoint.images[:real], None),
                ("digits, error=2e-4", checkpoint.images[:real], 2e-4),
            ):
                found = invert(model, targets, chain, prediction="flow", error=error)
                print(
                    f"| {shift:g} | {steps} | {cells} | {what} | {float(found.loss.median()):.0e} (most "
                    f"{float(found.loss.max()):.0e}) | {float(found.evaluations.median()):.0f} (most "
                    f"{int(found.evaluations.max())}) | {int(found.converged.sum())} of {len(targets)} |",
                    flush=True,
                )


def belm(images: int, real: int) -> None:
    for name in ("digits", "fashion"):
        checkpoint = load_checkpoint(name)
        checkpoint.model.requires_grad_(False)
        noise = torch.randn(images, *checkpoint.shape, generator=torch.Generator().manual_seed(0))
        fine = sample(checkpoint.model, noise, checkpoint.schedule.chain(1000), "sequential").x_0
        print(f"\n{name}: O-BELM, distance to the image of 1,000 DDIM steps beside that of DDIM with as many steps\n")
        print("| spacing | T | distance | DDIM's | rounds | evaluations/T | error | loss in sequence | in parallel | "
              "rounds | evaluations | rounds to 1e-3 |")  # fmt: skip
        print("|---|---|---|---|---|---|---|---|---|---|---|---|")
        for spacing in ("linspace", "quadratic"):
            for steps in (20, 50, 100):
                print(
                    f"| {spacing} | {steps} | {belm_row(checkpoint, noise, fine, steps, spacing, real)} |", flush=True
                )


def belm_row(checkpoint: Checkpoint, noise: Tensor, fine: Tensor, steps: int, spacing: str, real: int) -> str:
    model, schedule, targets = checkpoint.model, checkpoint.schedule, checkpoint.images[:real]
    chain = schedule.chain(steps, spacing, rule="belm")
    splitting = checkpoint.splitting(chain, "pixels")
    exact = sample(model, noise, chain, "sequential").x_0
    ddim = sample(model, noise, schedule.chain(steps, spacing), "sequential").x_0
    outs = [sample(model, x[None], chain, splitting=splitting) for x in noise]
    alone = invert(model, targets, chain, OnePass())
    found = invert(model, targets, chain, splitting=splitting)
    rounds = next(
        r for r in range(9, found.rounds + 1)  # before, DDIM's states are made
        if relative(invert(model, targets, chain, splitting=splitting, max_rounds=r).x_T, alone.x_T).max() <= 1e-3
    )  # fmt: skip
    return (
        f"{off(exact, fine):.3f} | {off(ddim, fine):.3f} | {counted(outs, exact, steps)} | "
        f"{float(alone.loss.max()):.0e} | {float(found.loss.max()):.0e} | {found.rounds} | "
        f"{float(found.evaluations.median()):.0f} | {rounds}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("which", nargs="*", choices=["flows", "belm"], default=["flows", "belm"])
    parser.add_argument("--images", type=int, default=8, help="sampled")
    parser.add_argument("--real", type=int, default=16, help="inverted")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="x_0: pixels reach")  # some images of a flow do
    print(f"torch {torch.__version__}, {platform.machine()}, one thread, float32 networks")
    for which in args.which:
        {"flows": flows, "belm": belm}[which](args.images, args.real)


if __name__ == "__main__":
    main()
