"""Ways of sampling all time steps at once, side by side on one model and the same noises.

Run: OMP_WAIT_POLICY=PASSIVE python benchmarks/sampling_peers.py --model digits --steps 25 50 100 250 500 1000

Sequential DDIM; the Anderson iteration of Pokle, Geng & Kolter 2022, Eq. 10 (every time step by itself, m = 5, on ε);
ParaDiGMS (Shih et al. 2023, Algorithm 1: Picard over a sliding window, a step leaves it when its change is within a
tolerance); ParaTAA (Tang et al. 2024, Sec. 3: triangular Anderson, m = 3, over a window, a step leaves it when its
residual is small); parareal in the manner of SRDS (Selvam, Merchant & Ermon 2024, arXiv:2412.08292, whose code is not
out: √T blocks, a DDIM step across each as the coarse solver, the block's own steps as the fine one, not pipelined); and
`diffusion.sample`. The peers are written here from their formulas, with the linear parts in float64 like ours and rows
in calls of 256, so that counts and not implementations are compared. Each is given the loosest tolerance, out of a few,
with which it meets --error for nine noises of ten; "-" where none does. All chains are spaced "trailing", as diffusers
has it. diffusers' DDIMScheduler, if installed, runs its own loop of T steps.

rounds: model calls one after the other. rows/T: model rows per image and time step. error: relative, of x_0, against
sequential DDIM, median and largest. ms: the median for one image. speed: against sequential DDIM here.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffusion import Chain, Checkpoint, CoarseToFine, Parallel, load_checkpoint, sample

CALL = 256  # rows of a model call
MOST_ROUNDS = 60  # of a method that does not finish (the paper takes 15)
TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-5)


@dataclass
class Peer:
    """One image's chain: ε at many states at once, counted."""

    checkpoint: Checkpoint
    chain: Chain
    rounds: int = 0
    rows: int = 0

    def epsilon(self, x: Tensor, k: Tensor) -> Tensor:
        """ε (n, D) at states x (n, D) of steps k (n,)."""
        self.rounds, self.rows = self.rounds + 1, self.rows + len(x)
        images, t = x.float().view(-1, *self.checkpoint.shape), self.chain.timesteps[k]
        parts = [self.checkpoint.model(images[i : i + CALL], t[i : i + CALL]) for i in range(0, len(x), CALL)]
        return torch.cat(parts).flatten(1).double()

    def states(self, x: Tensor, eps: Tensor, first: int) -> Tensor:
        """x_{first+1} … from x_first = x (D,) and ε (n, D) of the steps from `first` on."""
        a, c = (part[first : first + len(eps), None] for part in (self.chain.a, self.chain.c))
        products = a.cumprod(0)
        return products * (x + (c * eps / products).cumsum(0))


def paradigms(peer: Peer, x_T: Tensor, tolerance: float, window: int | None = None) -> Tensor:
    """Shih et al. 2023, Algorithm 1: x_{j+1} ← x_first + Σ drift(x_i), the window moving past what has settled.

    A step has settled when its mean square change is within tolerance² times the variance of its noise, 1 − ᾱ.
    """
    T = len(peer.chain)
    window = window or T
    X = x_T.repeat(T + 1, 1)
    first = 0
    while first < T:
        last = min(first + window, T)
        k = torch.arange(first, last)
        new = peer.states(X[first], peer.epsilon(X[first:last], k), first)
        scale = 1 - peer.chain.alphas_next[first:last].clamp(max=1 - 1e-4)
        change = (new - X[first + 1 : last + 1]).square().mean(1) / scale
        X[first + 1 : last + 1] = new
        settled = int((change <= tolerance**2).long().cumprod(0).sum())
        first = min(last, first + max(1, settled))
        X[last + 1 :] = X[last]
    return X[-1]


def anderson(peer: Peer, x_T: Tensor, tolerance: float, memory: int, causal: bool) -> Tensor:
    """Anderson on the states x_1 … x_T, F(X)_k = x_T carried to k with ε(X): one system per time step, or triangular.

    Triangular (Tang et al. 2024, Theorem 3.2): step k uses the residuals of steps 1 … k; finished leading steps are no
    longer evaluated. Per time step (Pokle et al. 2022, their code): step k uses its own residual, and all steps are
    evaluated until the last has converged.
    """
    T, first = len(peer.chain), 0
    X = x_T.repeat(T + 1, 1)
    past: list[tuple[Tensor, Tensor]] = []
    for _ in range(min(T, MOST_ROUNDS)):
        F = X.clone()
        F[first + 1 :] = peer.states(X[first], peer.epsilon(X[first:T], torch.arange(first, T)), first)
        R = F - X
        small = R.square().mean(1) <= tolerance**2 * (1 - torch.cat([peer.chain.alphas, peer.chain.alphas_next[-1:]])
                                                      ).clamp_min(1e-4)  # fmt: skip
        past = [*past[-memory:], (F, R)]
        X = mixed(past, causal)
        X[: first + 2] = F[: first + 2]  # exact by now
        if causal:
            first = min(T, first + max(1, int(small[first + 1 :].long().cumprod(0).sum())))
            if first == T:
                return F[-1]
        elif bool(small.all()):
            return F[-1]
    return F[-1]


def parareal(peer: Peer, x_T: Tensor, tolerance: float) -> Tensor:
    """In the manner of Selvam et al. 2024: X_{i+1} ← F(X_i) + G(X_i new) − G(X_i), i = 0 … √T − 1, G in sequence.

    Ends when the image's mean absolute change is within the tolerance. After p iterations p blocks are exact: left out.
    """
    chain = peer.chain
    edges = torch.linspace(0, len(chain), max(1, round(len(chain) ** 0.5)) + 1).round().long()
    first, last = edges[:-1], edges[1:]
    across = chain.signal[last] / chain.signal[first]
    bend = chain.noise[last] - across * chain.noise[first]

    def coarse(x: Tensor, i: int) -> Tensor:
        return across[i] * x + bend[i] * peer.epsilon(x[None], first[i : i + 1])[0]

    X, G = [x_T], []
    for i in range(len(first)):
        X.append(coarse(X[i], i))
        G.append(X[-1])
    for done in range(len(first)):
        F = torch.stack(X[done:-1])
        for step in range(int((last - first).max())):
            k = first[done:] + step
            going = k < last[done:]
            eps = peer.epsilon(F[going], k[going])
            F[going] = chain.a[k[going], None] * F[going] + chain.c[k[going], None] * eps
        before, X[done + 1] = X[-1], F[0]
        for i in range(done + 1, len(first)):
            new = coarse(X[i], i)
            X[i + 1], G[i] = F[i - done] + new - G[i], new
        if float((X[-1] - before).abs().mean()) <= tolerance:
            break
    return X[-1]


def mixed(past: list[tuple[Tensor, Tensor]], causal: bool) -> Tensor:
    """F − Σ γ ΔF, γ from least squares on ΔR of each step, or of it and all before it."""
    F, R = past[-1]
    if len(past) == 1:
        return F.clone()
    dF, dR = (torch.stack([a[i] - b[i] for a, b in zip(past[1:], past, strict=False)], 1) for i in (0, 1))
    gram, right = dR @ dR.mT, dR @ R[:, :, None]
    if causal:
        gram, right = gram.cumsum(0), right.cumsum(0)
    scale = gram.diagonal(dim1=1, dim2=2).sqrt().clamp_min(1e-300)
    scaled = gram / scale[:, :, None] / scale[:, None] + 1e-8 * torch.eye(gram.shape[1], dtype=torch.float64)
    gamma = torch.linalg.solve(scaled, right / scale[:, :, None]) / scale[:, :, None]
    return F - (dF * gamma).sum(1)


def diffusers_ddim(checkpoint: Checkpoint, x_T: Tensor, steps: int) -> Tensor | None:
    """x_0 of diffusers' own scheduler and loop, None when it is not installed."""
    try:
        scheduler_type = importlib.import_module("diffusers").DDIMScheduler
    except ImportError:
        return None
    betas = 1 - checkpoint.schedule.alphas_cumprod / torch.nn.functional.pad(
        checkpoint.schedule.alphas_cumprod[:-1], (1, 0), value=1.0
    )
    scheduler = scheduler_type(trained_betas=betas.numpy(), clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    x = x_T
    for t in scheduler.timesteps:
        x = scheduler.step(checkpoint.model(x, t.expand(1)), t, x).prev_sample
    return x


@dataclass
class Row:
    """What one method needed for every noise."""

    rounds: list[int]
    rows: list[float]
    errors: list[float]
    seconds: list[float]

    def met(self, error: float) -> bool:
        """Whether most noises are within it."""
        within = sum(e <= error for e in self.errors)
        return statistics.median(self.errors) <= error and within >= 0.9 * len(self.errors)

    def line(self, name: str, steps: int, base: float) -> str:
        ms = statistics.median(self.seconds) * 1e3
        counts = f"{statistics.median(self.rounds):6.0f} {statistics.median(self.rows) / steps:7.2f}"
        errors = f"{statistics.median(self.errors):9.1e} {max(self.errors):9.1e}"
        return f"{steps:5} {name:34} {counts} {errors} {ms:9.1f} {base / ms:6.2f}"


def measure(
    run: Callable[[Tensor], tuple[Tensor, int, float]], latents: list[Tensor], expected: list[Tensor] | None
) -> tuple[Row, list[Tensor]]:
    """Runs all noises; expected x_0, or None for the reference itself."""
    row, images = Row([], [], [], []), []
    for i, x in enumerate(latents):
        start = time.perf_counter()
        image, rounds, rows = run(x)
        row.seconds.append(time.perf_counter() - start)
        image = image.double().flatten()
        goal = image if expected is None else expected[i]
        row.rounds.append(rounds)
        row.rows.append(rows)
        row.errors.append(float((image - goal).norm() / goal.norm()))
        images.append(image)
    return row, images


def compare(checkpoint: Checkpoint, steps: int, latents: list[Tensor], error: float) -> None:
    """One table of a number of steps."""
    chain = checkpoint.schedule.chain(steps, "trailing")

    def ours(x: Tensor, **options: Any) -> tuple[Tensor, int, float]:
        out = sample(checkpoint.model, x, chain, prediction=checkpoint.prediction, **options)
        return out.x_0, out.rounds, float(out.evaluations)

    def peer(solve: Callable[[Peer, Tensor, float], Tensor], tolerance: float) -> Any:
        def run(x: Tensor) -> tuple[Tensor, int, float]:
            counted = Peer(checkpoint, chain)
            return solve(counted, x.double().flatten(), tolerance), counted.rounds, counted.rows

        return run

    row, expected = measure(lambda x: ours(x, method="sequential"), latents, None)
    base = statistics.median(row.seconds) * 1e3
    print(row.line("sequential DDIM", steps, base), flush=True)
    peers: dict[str, Callable[[Peer, Tensor, float], Tensor]] = {
        "Anderson per time step (Pokle)": lambda p, x, tol: anderson(p, x, tol, 5, False),
        "ParaDiGMS, window of all": paradigms,
        "ParaDiGMS, window of T/4": lambda p, x, tol: paradigms(p, x, tol, max(1, steps // 4)),
        "SRDS, parareal": parareal,
        "ParaTAA, triangular Anderson": lambda p, x, tol: anderson(p, x, tol, 3, True),
    }
    for name, solve in peers.items():
        print(cheapest(solve, peer, latents, expected, error, name, steps, base), flush=True)
    for name, options in {
        "ours, Parallel": {"method": Parallel()},
        "ours, CoarseToFine": {"method": CoarseToFine()} if steps >= 60 else None,
        "ours, automatic": {"method": "auto"},
    }.items():
        if options is not None:
            run = partial(ours, splitting=checkpoint.splitting(chain), error=error, **options)
            run(latents[0])
            print(measure(run, latents, expected)[0].line(name, steps, base), flush=True)
    if diffusers_ddim(checkpoint, latents[0], 2) is None:
        print(f"{steps:5} diffusers' DDIM: not installed")
        return
    row, _ = measure(lambda x: (diffusers_ddim(checkpoint, x, steps), steps, steps), latents, expected)  # type: ignore[arg-type,return-value]
    print(row.line("diffusers' DDIM", steps, base), flush=True)


def cheapest(
    solve: Any, peer: Any, latents: list[Tensor], expected: list[Tensor], error: float, name: str, steps: int,
    base: float,
) -> str:  # fmt: skip
    """The line of the loosest tolerance that meets the error."""
    for tolerance in TOLERANCES:
        few, _ = measure(peer(solve, tolerance), latents[:2], expected)
        if not few.met(error):
            continue
        row, _ = measure(peer(solve, tolerance), latents, expected)
        if row.met(error):
            return row.line(f"{name}, {tolerance:g}", steps, base)
    row, _ = measure(peer(solve, TOLERANCES[-1]), latents, expected)
    return row.line(f"{name}, -", steps, base)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits", help="digits, fashion or a folder")
    parser.add_argument("--steps", type=int, nargs="+", default=[25, 50, 100, 250, 500, 1000])
    parser.add_argument("--noises", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--error", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    checkpoint = load_checkpoint(args.model)
    generator = torch.Generator().manual_seed(args.seed)
    latents = list(torch.randn(args.noises, *checkpoint.shape, generator=generator).split(1))
    print(f"{args.model}, {args.noises} noises one at a time, {args.threads} threads, error {args.error:g}, "
          f"torch {torch.__version__}")  # fmt: skip
    print(f"{'T':>5} {'method, tolerance':34} {'rounds':>6} {'rows/T':>7} {'error':>9} {'largest':>9} {'ms':>9} "
          f"{'speed':>6}")  # fmt: skip
    for steps in args.steps:
        compare(checkpoint, steps, latents, args.error)


if __name__ == "__main__":
    with torch.no_grad():
        main()
