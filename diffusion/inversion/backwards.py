"""The chain read from the image to the latent: some steps at once as a fixed point, or one step by itself.

Backwards, step k is an equation for x_k: F_k(x_k) = x_{k+1} with F_k(x) = a_k x + c_k ε(x, t_k). With ε = κ x + b + N
it is x_k = (x_{k+1} − c_k (b_k + N_k)) / A_k, N_k = N(x_k), and the steps from `last` back to `first` together are one
fixed point in their N. A residual r_k of N_k is an error |c_k| r_k of x_{k+1}: in that unit, that of the image, all
residuals and tolerances are given here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pydeqsolve import Status, Stop, solve

from ..chain import Chain, Splitting
from ..methods.grid import OnGrid, TimeGrid
from ..problem import ChainProblem
from ..remainder import Remainders, rounding
from ..trajectory import LinearChain

NOISE = 64.0  # residuals within so many units of the network's rounding are taken for its doing where they stay
SPARE = 10  # of the evaluations allowed to an image, what a solve leaves to each of the steps after it
SMALLEST_UNIT = 1e-6  # of |c_k|: a step that does nothing has no unit of its own


def reversed_map(forward: Remainders, first: int, last: int, splitting: Splitting) -> Remainders:
    """Steps first … last − 1 of the chain, read backwards: position j ends at x_k, k = last − 1 − j, where N_k is read.

    splitting: of all the chain's steps. Its unit is √steps |c_k|: the root mean square of all residuals together is
    the error that they would leave in the image if none of the errors were damped.
    """
    chain, cut = forward.chain, slice(first, last)
    flipped = chain.at(torch.arange(last - 1, first - 1, -1, device=chain.signal.device))
    offset = None if splitting.offset is None else splitting.offset[cut].flip(0)
    kappa = splitting.kappa[cut].flip(0)
    a, c = flipped.a[:, None], flipped.c[:, None]
    A = a + c * kappa
    size = flipped.after[0].square() + flipped.after[1].square()  # in unit of a state of unit variance
    unit = (c.abs() / size[:, None].sqrt()).clamp_min(SMALLEST_UNIT) * (last - first) ** 0.5
    return Remainders(forward.network, flipped, Splitting(kappa, offset), LinearChain(1 / A, -c / A), 1, unit)


@dataclass(eq=False)
class Steps:
    """ε (n, steps, D) at the states before some steps of the chain, and what is left of them (n,)."""

    eps: Tensor
    residual: Tensor
    settled: Tensor  # (n,) bool: within the tolerance, or at what the network's rounding lets through

    def put(self, images: Tensor, part: Steps) -> None:
        """Takes in what was found of some images (n,)."""
        self.eps[images], self.residual[images], self.settled[images] = part.eps, part.residual, part.settled


@dataclass(eq=False)
class Patient:
    """A map that ends the solve of an image whose residual no longer halves, by answering z itself.

    Steps whose residual is within `settled` (B,), and that of all before them, are evaluated no more: they keep the
    value that they had then.

    patience: evaluations without, of a residual that the network's rounding may explain, and of any other. Attributes,
    over all images: least, the least residual; z where it was measured; mark, the last one that had halved; since then
    `waited` evaluations; ended.
    """

    map: Any
    noise: float | Tensor
    patience: tuple[int, int]
    allowance: Tensor  # (B,) evaluations that each may still have
    spare: int  # of them, those to be left
    settled: Tensor

    def __call__(self, z: Tensor, image: Tensor, *inputs: Tensor) -> Tensor:
        if not hasattr(self, "least"):
            self._begin(z)
        value = self._value(z, image, inputs)
        residual = (value - z).square().mean((1, 2)).sqrt()
        better, halved = residual < self.least[image], residual <= 0.5 * self.mark[image]
        self.least[image] = torch.where(better, residual, self.least[image])
        self.z[image] = torch.where(better[:, None, None], z, self.z[image])
        self.mark[image] = torch.where(halved, residual, self.mark[image])
        self.waited[image] = torch.where(halved, 0, self.waited[image] + 1)
        few, many = self.patience
        self.allowance[image] -= 1
        late = self.waited[image] >= torch.where(self.least[image] <= self.noise, few, many)
        self.ended[image] = late | (self.allowance[image] <= self.spare)
        return torch.where(self.ended[image][:, None, None], z, value)

    def _begin(self, z: Tensor) -> None:
        B, whole = len(self.allowance), z.shape[1:]
        self.least, self.mark = z.new_full((2, B), torch.inf)
        self.waited = torch.zeros_like(self.allowance)
        self.ended = torch.zeros(B, dtype=torch.bool, device=z.device)
        self.z, self.kept = z.new_zeros(2, B, *whole)
        self.done = torch.zeros(B, whole[0], dtype=torch.bool, device=z.device)

    def _value(self, z: Tensor, image: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        """The map's value (n, steps, D), of steps that were done before as it was then."""
        done = self.done[image]
        value: Tensor = self.map(z, image, *inputs, wanted=~done)
        value = torch.where(done[:, :, None], self.kept[image], value)
        small = (value - z).square().mean(2).sqrt() <= self.settled[image, None]
        self.done[image] = (done | small).cumprod(1).bool()
        self.kept[image] = value
        return value


class Backwards:
    """The way from the images to their latents, so far.

    Attributes:
        x: (B, D) float64, the state before the last step solved.
        eps: (B, T, D) what the network is taken to say at every state.
        last: (B, D) of that the one at x; zero at the image.
        left: (B,) root of the summed squares of all residuals so far: the error of the image if nothing damped them.
        evaluations: (B,).
        allowance: (B,) evaluations one after the other that each image may still have.
        traces: residuals (rounds, B) of every solve, NaN where an image took no part.
    """

    def __init__(self, problem: ChainProblem, limit: float, allowance: Tensor, bar: Any) -> None:
        target = problem.latent
        self.problem, self.bar, self.x, self.limit, self.allowance = problem, bar, target, limit, allowance
        B, D = target.shape
        self.last = torch.zeros_like(target)
        self.eps = target.new_zeros(B, len(problem.map.chain), D)
        self.left = target.new_zeros(B)
        self.evaluations = torch.zeros(B, dtype=torch.int64, device=target.device)
        self.traces: list[Tensor] = []

    @property
    def rounds_left(self) -> float:
        """Of the budget, which the network's calls use up."""
        return max(0, self.limit - self.problem.map.network.calls)

    def solve(
        self, first: int, last: int, splitting: Splitting, solver: Any, atol: Tensor, rounds: int, *,
        patience: tuple[int, int], node_rounds: int = 0, guess: Tensor | None = None, images: Tensor | None = None,
    ) -> Steps:  # fmt: skip
        """ε at x_first … x_last − 1 from x_last, all steps at once, to atol (n,); x stays where it is.

        rounds: the most, those on nodes included. patience: of `Patient`. guess: ε (n, steps, D) or the last found.
        images: (n,) those to be solved, None is all.
        """
        image = torch.arange(len(self.x), device=self.x.device) if images is None else images
        backward = reversed_map(self.problem.map, first, last, splitting)
        split, unit = backward.splitting, backward.unit
        backward.evaluations = self.evaluations
        x, rounds = self.x[image], int(min(rounds, self.rounds_left))
        drift = None if split.offset is None else (backward.linear.c * split.offset)[None]
        base = backward.linear.base(x, drift).expand(len(x), -1, -1)
        inputs = (image, base, *[c[image] for c in self.problem.conditioning])
        eps = self.last[image, None].expand(-1, last - first, -1) if guess is None else guess.flip(1)
        start: Any = unit * remainders(eps, _straight(backward.chain, x, eps), split)
        if node_rounds:
            on_grid = OnGrid(backward, TimeGrid.inversion(last - first, base.device))
            start = solve(
                on_grid, start, inputs, solver=solver, stop=Stop(0.0, 0.0, node_rounds), gradient=None, trace=True,
                callback=self._tick, keep_history=True,
            )  # fmt: skip
            self._keep(start.trace, image)
        # A network rounds its answer at least; more of a floor than that loses digits of the image:
        # docs/inversion-study.md.
        floor = rounding(self.problem.map.network.dtype) * unit.square().mean().sqrt()
        atol = torch.maximum(atol, floor)
        stop = Stop(0.0, atol, max(0, rounds - node_rounds))
        settled = torch.zeros_like(self.left).index_put((image,), atol)
        patient = Patient(backward, NOISE * floor, patience, self.allowance, SPARE * first, settled)
        solution = solve(
            patient, start, inputs, solver=solver, stop=stop, gradient=None, trace=True, callback=self._tick
        )
        N, residual, settled = solution.z, solution.residual, solution.status == Status.CONVERGED
        trace = solution.trace
        if solution.steps:
            ended = patient.ended[image]
            N = torch.where(ended[:, None, None], patient.z[image], N)
            residual = torch.where(ended, patient.least[image], residual)
            settled = torch.where(ended, residual <= NOISE * floor, settled)
            assert trace is not None
            trace = torch.where(ended & (trace == 0), residual, trace)
        self._keep(trace, image)
        N = N / unit
        states = backward.linear.trajectory(base, N)[:, 1:]
        eps = N + split.kappa * states if split.offset is None else N + split.kappa * states + split.offset
        return Steps(eps.flip(1), residual, settled)

    def take(self, first: int, last: int, found: Steps) -> None:
        """Moves on to x_first by what was found for all images."""
        chain = reversed_map(self.problem.map, first, last, self.problem.map.splitting).chain
        self.eps[:, first:last], self.last = found.eps, found.eps[:, 0]
        self.x = _straight(chain, self.x, found.eps.flip(1))[:, -1]
        self.left = (self.left.square() + found.residual.square()).sqrt()

    def join(self, other: Backwards, images: Tensor) -> None:
        """Takes in what another way of some images (n,) has found and spent; x stays."""
        self.eps[images], self.allowance[images] = other.eps, other.allowance
        self.evaluations[images] += other.evaluations
        for trace in other.traces:
            self._keep(trace, images)

    def remainders(self) -> Tensor:
        """N (B, T, D) of the problem's own splitting along the whole way from the image."""
        chain = reversed_map(self.problem.map, 0, self.eps.shape[1], self.problem.map.splitting).chain
        states = _straight(chain, self.problem.latent, self.eps.flip(1)).flip(1)
        return remainders(self.eps, states, self.problem.map.splitting)

    def _keep(self, trace: Tensor | None, images: Tensor) -> None:
        assert trace is not None
        whole = trace.new_full((len(trace), len(self.evaluations)), torch.nan)
        whole[:, images] = trace
        self.traces.append(whole)

    def _tick(self, step: int, N: Tensor, residual: Tensor) -> bool:
        self.bar.update()
        return False


def _straight(chain: Chain, x: Tensor, eps: Tensor) -> Tensor:
    """The states (B, steps, D) that ε (B, steps, D) makes of x (B, D), chain and steps read backwards."""
    a, c = chain.a[:, None], chain.c[:, None]
    straight = LinearChain(1 / a, -c / a)
    return straight.trajectory(straight.base(x, None), eps)[:, 1:]


def remainders(eps: Tensor, states: Tensor, splitting: Splitting) -> Tensor:
    """N = ε − κ x − b, all (B, T, D)."""
    N = eps - splitting.kappa * states
    return N if splitting.offset is None else N - splitting.offset


def stiff_steps(chain: Chain, stiffness: float) -> int:
    """How many steps next to the image shrink what is not like the data to less than 1 − stiffness of its size."""
    (alpha, sigma), (alpha_next, sigma_next) = chain.before, chain.after
    stiff = 1 - sigma_next * alpha / (alpha_next * sigma) > stiffness
    return int(stiff.flip(0).cumprod(0).sum())


def removing(chain: Chain, share: float, resolution: float) -> Splitting:
    """κ = share·σ/(σ² + resolution² (α² + σ²)); 0 where there is no signal and the answer is −x̂_0."""
    sigma, size = chain.before[1][:, None], chain.size[:-1, None]
    kappa = share * sigma / (sigma.square() + (resolution * size).square())
    return Splitting(torch.where(chain.blind[:, None], 0.0, kappa))
