"""Ways of inverting real images, side by side on one model and the same images: loss, PSNR, evaluations, depth.

    python benchmarks/inversion_peers.py --steps 20 50 --spacing linspace quadratic

DDIM inversion as diffusers has it (DDIMInverseScheduler, where it is installed, sampled back by its DDIMScheduler) and
ours; each step's equation x_k = (x_{k+1} − c_k ε(x_k))/a_k by plain iteration and by Anderson's, in the manner of AIDI
(Pan et al. 2023, arXiv:2309.04907), from the ε found last, 11 evaluations a step and as many as it takes; EDICT
(Wallace et al. 2022, arXiv:2211.12446; p = .93, the pair in turns, as its authors' code has it), whose latent is a
pair; exact inversion of DPM-Solver++ 2M in the manner of Hong et al. 2024 (arXiv:2311.18387, Algorithm 2), see
`exact_dpm`; O-BELM (Wang et al. 2024, arXiv:2410.07273), its coefficients as in its authors' code; and "exact" on the
same DDIM chain. The peers are written here from their formulas, with float64 states and the whole batch in a call, so
that counts and not implementations are compared.

loss: ‖x̂_0 − x_0‖² of the image that the method's own chain makes of its latent, median and largest. PSNR: of the
median, 10 log10(4 D/loss), pixels being in [−1, 1]. evaluations, depth: of the inversion alone; those of a slow image
count for the batch where a peer knows no other stop.
"""

from __future__ import annotations

import argparse
import importlib
import math
import platform
from collections.abc import Callable, Iterator
from typing import Any

import torch
from inversion_table import images_of
from torch import Tensor

from diffusion import Chain, Checkpoint, OnePass, invert, load_checkpoint, sample
from pydeqsolve import Anderson, Picard, Stop, solve

FEW, MANY = 11, 200  # evaluations of a step's equation
MIX = 0.93  # p of EDICT
# Of DPM-Solver++ read backwards: time steps of a fine step; forward steps, of which the first grow; without progress
# before they are halved; and the mean square at which they end, the authors' 1e-3 for 4×64×64 entries.
FINE, MOST, GROWING, PATIENCE, NEAR = 10, 500, 20, 20, 1e-3 / 2**14
Result = tuple[Tensor, float, int]  # the image made again (B, D), evaluations per image, calls one after the other


class Peer:
    """ε of a chain, counted."""

    def __init__(self, checkpoint: Checkpoint, chain: Chain) -> None:
        self.checkpoint, self.chain, self.calls, self.rows = checkpoint, chain, 0, 0

    def __call__(self, x: Tensor, k: int) -> Tensor:
        """ε (B, D) at states x (B, D) of step k."""
        return self.at(x, self.chain.timesteps[k])

    def at(self, x: Tensor, t: Tensor) -> Tensor:
        """The same at a time step."""
        self.calls, self.rows = self.calls + 1, self.rows + len(x)
        answer: Tensor = self.checkpoint.model(x.float().view(-1, *self.checkpoint.shape), t.expand(len(x)))
        return answer.flatten(1).double()

    def spent(self, images: int) -> tuple[float, int]:
        return self.rows / images, self.calls


def steps_of(chain: Chain) -> Iterator[tuple[int, float, float]]:
    """k, a_k and c_k from the image's step to the noisiest."""
    for k in range(len(chain) - 1, -1, -1):
        yield k, float(chain.a[k]), float(chain.c[k])


def denoised(eps: Peer, x: Tensor) -> Tensor:
    """x_0 of the chain from x_T, in sequence."""
    for k, a, c in reversed(list(steps_of(eps.chain))):
        x = a * x + c * eps(x, k)
    return x


def per_step(eps: Peer, x: Tensor, solver: Any, most: int, rtol: float) -> Result:
    """Every step's equation solved by itself, as a fixed point in ε."""
    told = torch.zeros_like(x)
    for k, a, c in steps_of(eps.chain):
        if not told.any():
            told = eps(x, k)
        found = solve(
            lambda e, y, k=k, a=a, c=c: eps((y - c * e) / a, k), told, (x,), solver=solver, stop=Stop(rtol, 0.0, most),
            gradient=None,
        )  # fmt: skip
        told = found.z
        x = (x - c * told) / a
    spent = eps.spent(len(x))
    return denoised(eps, x), *spent


def edict(eps: Peer, x: Tensor) -> Result:
    """Two coupled states, each read backwards with the other's ε; at every second step the other one is first."""
    y = x
    for k, a, c in steps_of(eps.chain):
        y = (y - (1 - MIX) * x) / MIX
        x = (x - (1 - MIX) * y) / MIX
        if k % 2:
            x = (x - c * eps(y, k)) / a
        y = (y - c * eps(x, k)) / a
        if not k % 2:
            x = (x - c * eps(y, k)) / a
    spent = eps.spent(len(x))
    for k, a, c in reversed(list(steps_of(eps.chain))):
        if not k % 2:
            x = a * x + c * eps(y, k)
        y = a * y + c * eps(x, k)
        if k % 2:
            x = a * x + c * eps(y, k)
        x = MIX * x + (1 - MIX) * y
        y = MIX * y + (1 - MIX) * x
    return x, *spent


def exact_dpm(eps: Peer, x: Tensor) -> Result:
    """DPM-Solver++ 2M read backwards, in the manner of Hong et al. 2024, Algorithm 2; eps.chain is of that rule.

    s_{k+1} = a s_k + c ε(s_k) + h, a and c DDIM's. h, the part of second order, is made once of the s_k and s_{k−1}
    that DDIM inversion in steps of 10 time steps finds from s_{k+1}; then forward steps from that s_k, of length 10/t
    (no more than 1), t of s_{k+1}. The first and last step have no h: from one step of DDIM inversion, of length 1 next
    to the image, halved where they make no progress. Lengths and numbers as in the authors' code, image by image.
    """
    chain, (first, slope) = eps.chain, ddim_of(eps.chain)
    past = chain.past
    assert past is not None
    for k in range(len(chain) - 1, -1, -1):
        a, c = float(first[k]), float(slope[k])
        last = k == len(chain) - 1
        length = 1.0 if last else min(1.0, FINE / max(float(chain.timesteps[k + 1]), 1.0))
        if k and not last:
            at = finely(eps, x, k + 1, k)
            before = finely(eps, at, k, k - 1)
            second = (chain.a[k] - a) * at + (chain.c[k] - c) * eps(at, k)
            second = second + past[0][k] * before + past[1][k] * eps(before, k - 1)
            x = forward_steps(eps, at, x - second, k, (a, c), length, halved=False)
        else:
            x = forward_steps(eps, (x - c * eps(x, k)) / a, x, k, (a, c), length, halved=True)
    spent = eps.spent(len(x))
    image = sample(eps.checkpoint.model, x.view(-1, *eps.checkpoint.shape), chain, "sequential").x_0
    return image.flatten(1), *spent


def finely(eps: Peer, x: Tensor, of: int, to: int) -> Tensor:
    """DDIM inversion from state `of` to the noisier `to`, in steps of FINE time steps."""
    start, end = (int(eps.chain.timesteps[k]) for k in (of, to))
    alphas = eps.checkpoint.schedule.alphas_cumprod.double()
    for t in range(start, end, FINE):
        s = min(t + FINE, end)
        a = float((alphas[s] / alphas[t]).sqrt())
        c = float((1 - alphas[s]).sqrt()) - a * float((1 - alphas[t]).sqrt())
        x = a * x + c * eps.at(x, torch.tensor(s))
    return x


def forward_steps(
    eps: Peer, x: Tensor, goal: Tensor, k: int, step: tuple[float, float], length: float, halved: bool
) -> Tensor:
    """x ← x − length (a x + c ε(x) − goal) of every image that is not near."""
    left, lengths = torch.arange(len(x)), torch.full((len(x),), length, dtype=x.dtype)
    best, idle = torch.full_like(lengths, torch.inf), torch.zeros(len(x))
    for i in range(MOST):
        off = step[0] * x[left] + step[1] * eps(x[left], k) - goal[left]
        loss = off.square().mean(1)
        left, off, loss = (part[loss >= NEAR] for part in (left, off, loss))
        if not len(left):
            break
        x = x.index_add(0, left, -min(1.0, (i + 1) / GROWING) * lengths[left, None] * off)
        better = loss < (1 - 1e-4) * best[left]
        idle[left] = torch.where(better, 0.0, idle[left] + 1)
        best[left] = torch.where(better, loss, best[left])
        slow = left[idle[left] > PATIENCE] if halved else left[:0]
        lengths[slow], idle[slow] = lengths[slow] / 2, 0.0
    return x


def ddim_of(chain: Chain) -> tuple[Tensor, Tensor]:
    """a and c (T,) of DDIM's steps between the same states."""
    (alpha, sigma), (alpha_next, sigma_next) = chain.before, chain.after
    a = alpha_next / alpha
    return a, sigma_next - a * sigma


def ours(checkpoint: Checkpoint, x_0: Tensor, chain: Chain, method: Any) -> Result:
    found = invert(checkpoint.model, x_0, chain, method, prediction=checkpoint.prediction)
    image = sample(checkpoint.model, found.latent, chain, "sequential", prediction=checkpoint.prediction).x_0
    return image.double().flatten(1), float((found.evaluations - found.check).double().mean()), found.rounds


def inverse_scheduler(checkpoint: Checkpoint, x_0: Tensor, steps: int) -> Result | None:
    """diffusers' DDIMInverseScheduler and DDIMScheduler, at their own spacing; None where it is not installed."""
    try:
        diffusers = importlib.import_module("diffusers")
    except ImportError:
        return None
    alphas = checkpoint.schedule.alphas_cumprod
    betas = (1 - alphas / torch.nn.functional.pad(alphas[:-1], (1, 0), value=1.0)).numpy()
    options = {"trained_betas": betas, "clip_sample": False, "timestep_spacing": "leading"}
    x = x_0
    for kind in (diffusers.DDIMInverseScheduler, diffusers.DDIMScheduler):
        scheduler = kind(**options)
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            x = scheduler.step(checkpoint.model(x, t.expand(len(x))), t, x).prev_sample
    return x.double().flatten(1), float(steps), steps


def compare(checkpoint: Checkpoint, x_0: Tensor, steps: int, spacing: str) -> None:
    """Prints the lines of one chain."""
    schedule, flat = checkpoint.schedule, x_0.double().flatten(1)
    chain, two, belm = (schedule.chain(steps, spacing, rule=rule) for rule in ("ddim", "dpmsolver++2m", "belm"))
    peer = lambda chain=chain: Peer(checkpoint, chain)  # noqa: E731
    anderson = Anderson(memory=5)
    ways: dict[str, Callable[[], Result | None]] = {
        "DDIMInverseScheduler (leading)": lambda: inverse_scheduler(checkpoint, x_0, steps),
        "ours, one pass": lambda: ours(checkpoint, x_0, chain, OnePass()),
        f"per step, plain, {FEW}": lambda: per_step(peer(), flat, Picard(), FEW, 0.0),
        f"per step, plain, to {MANY}": lambda: per_step(peer(), flat, Picard(), MANY, 1e-6),
        f"per step, Anderson (as AIDI), {FEW}": lambda: per_step(peer(), flat, anderson, FEW, 0.0),
        f"per step, Anderson, to {MANY}": lambda: per_step(peer(), flat, anderson, MANY, 1e-6),
        "EDICT": lambda: edict(peer(), flat),
        "exact DPM-Solver++ 2M": lambda: exact_dpm(peer(two), flat),
        "O-BELM, one pass": lambda: ours(checkpoint, x_0, belm, OnePass()),
        "ours, exact": lambda: ours(checkpoint, x_0, chain, "exact"),
    }
    for name, way in ways.items():
        found = way()
        if found is None:
            continue
        image, rows, depth = found
        loss = (image - flat).square().sum(1)
        middle = float(loss.median())
        psnr = 10 * math.log10(4 * flat.shape[1] / middle) if middle > 0 else math.inf
        print(f"| {spacing} | {steps} | {name} | {middle:.0e} | {float(loss.max()):.0e} | {psnr:.0f} | {rows:,.0f} | "
              f"{depth:,} |", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits", help="digits or fashion, which predict ε")
    parser.add_argument("--count", type=int, default=32, help="images")
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 50])
    parser.add_argument("--spacing", nargs="+", default=["linspace", "quadratic"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint = load_checkpoint(args.model)
    checkpoint.model.requires_grad_(False)
    x_0 = images_of(checkpoint, args.count)
    print(f"{args.model}, {len(x_0)} images; torch {torch.__version__}, {platform.machine()}\n")
    print("| spacing | T | method | loss, median | largest | PSNR | evaluations | depth |")
    print("|---|---|---|---|---|---|---|---|")
    for spacing in args.spacing:
        for steps in args.steps:
            compare(checkpoint, x_0, steps, spacing)


if __name__ == "__main__":
    with torch.no_grad():
        main()
