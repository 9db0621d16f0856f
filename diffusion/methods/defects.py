"""The error of x_0, from the defects of the chain that is returned.

The states x_0 … x_T were made from remainders N_k; the network says N'_k = N(x_k) there. With δ_k = N'_k − N_k the
error e of the states, x − x of sequential sampling, obeys to first order

    e_{k+1} = (A_k + c_k J_k) e_k − c_k δ_k,

J_k = ∂N/∂x, of which one number is known, its slope along the last move of x_k whose answer was seen: ⟨ΔN, Δx⟩/|Δx|².
It stands for J_k; for a network that is a multiple of x it is J_k itself. What the network does at a right angle to a
move is known by its size alone: it bounds the error (`bound`), which it can only raise where it expands over the chain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..remainder import Remainders
from ..trajectory import EditedChain, LinearChain, TwoStepChain, larger, summed
from .visits import Visits

SAFETY = 2.0  # by which the first-order estimate is raised: J is known along one direction only
LARGEST = 1e100  # of a bound
# Of what the network does across its moves an error meets ALIGNED; all of it where that multiplies errors by exp(STEEP)
# over the chain: under trained denoisers it is exp(2) to exp(5), and errors keep turning.
ALIGNED, STEEP = 0.5, 8.0
FEW = 4
SAME = 0.125  # a move of fewer units of rounding gives the network the same numbers
NEAR = 300.0  # units of rounding of a move that tells how steep the network is where it is


def filled(*slopes: Tensor) -> Tensor:
    """Slopes (n, T) with every NaN replaced by the next value that is none, after the last by the last; 0 without any.

    A step that never moves, as the first, tells nothing of itself, and its neighbours' slopes are nearest to its own.
    Several are (m, n, T) in the end.
    """
    slope = slopes[0] if len(slopes) == 1 else torch.stack(slopes)
    T, known = slope.shape[-1], ~slope.isnan()
    k = torch.arange(T, device=slope.device).expand_as(slope)
    after = torch.where(known, k, T).flip(-1).cummin(-1).values.flip(-1)
    before = torch.where(known, k, -1).cummax(-1).values
    at = torch.where(after < T, after, before.clamp_min(0))
    return slope.gather(-1, at).nan_to_num(0.0)


def finite(x: Tensor) -> Tensor:
    """Whether all entries of x (…, D) are finite (…): their sum is not where one is not, which is quicker."""
    return x.sum(-1).isfinite()


def lowest(m: Remainders, slope: Tensor, least: Tensor) -> Tensor:
    """least (n, T); of an image of which no slope (n, T) is known, −κ, which is that of a network deaf to x.

    Then errors grow as the states do, a_k a step, which is the most that they do under a denoiser.
    """
    deaf = -m.splitting.kappa.mean(1).expand_as(least)
    return torch.where(slope.isnan().all(1, keepdim=True), deaf, least)


def defects(
    m: Remainders, image: Tensor, x: Tensor, N: Tensor, visits: Visits, settled: Tensor, conditioning: Sequence[Tensor],
    most: int, looking: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """δ (n, T, D) at every step of the states x (n, T+1, D), and the rows (n,) that it took; notes the visits.

    settled (n,): whether every N_k is the network's value where step k was visited last: then a step whose state has
    not moved since has no defect, and is not asked again. Rounds of at most so many time steps; where `looking`, a few
    steps are asked `beside` their states too, in the one round or in one more after several.
    """
    T = N.shape[1]
    x, before = x[:, :T], visits.x[image]
    still = (x - before).square().sum(2) <= (SAME * visits.precision) ** 2 * x.square().sum(2)  # never, where NaN
    wanted = finite(x) & ~(still & settled[:, None])
    wanted[:, : m.linear.given] = False
    delta, asked = torch.zeros_like(N), beside(m, x, visits, image, most if looking else 0)
    aside = torch.randn(N.shape[2], generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(x.device)
    aside = NEAR * visits.precision * aside / aside.norm()
    rounds, none = [(wanted, asked)], torch.zeros_like(wanted)
    if most < T:
        span = torch.arange(T, device=x.device) // most
        rounds = [*((wanted & (span == n), none) for n in range(-(-T // most))), (none, asked)]
    for own, near in rounds:
        i, k = own.nonzero(as_tuple=True)
        j, h = near.nonzero(as_tuple=True)
        if not len(i) + len(j):
            continue
        rows, moved = torch.cat([i, j]), x[j, h] + x[j, h].norm(dim=1, keepdim=True) * aside
        said = m.remainder(torch.cat([x[i, k], moved]), torch.cat([k, h]), [c[rows] for c in conditioning])
        value = said[: len(i)]
        delta[i, k] = value - N[i, k]
        visits.note(image[i], k, x[i, k], value)
        visits.look(image[j], h, moved, said[len(i) :])
    return delta, wanted.sum(1) + asked.sum(1)


def beside(m: Remainders, x: Tensor, visits: Visits, image: Tensor, most: int) -> Tensor:
    """The steps (n, T) to be asked near their states x (n, T, D), once for an image: of FEW and T/32 evenly, at most a
    third of all and `most`, those whose last move was large."""
    T, near = x.shape[1], visits.near[image, :, 0]
    count = min(FEW + T // 32, (T - m.linear.given + 2) // 3, most)
    chosen = torch.zeros_like(near, dtype=torch.bool)
    chosen[:, torch.linspace(m.linear.given, T - 1, max(count, 0), device=x.device).round().long()] = True
    return chosen & finite(x) & near.isnan().all(1, keepdim=True) & visits.large(image, x)


def carried(
    linear: LinearChain, base: Tensor, x: Tensor, N: Tensor, delta: Tensor, slope: Tensor, least: Tensor,
    across: Tensor, image: Tensor,
) -> Tensor:  # fmt: skip
    """The estimate (n,) of the relative error of x_0: SAFETY·|e_T|/|x_T|, of states x (n, T+1, D) and their defects.

    slope (n, T) stands for J; where it is NaN, the next step's that is known. An error has parts along which N is
    steeper and less steep than along the move that told: so the largest is taken of the errors with J = slope, with
    J = 0, and with J the least slope that was seen at all, if that is negative: it keeps what expands. No less than
    `bound`/|x_T|.
    """
    slope, least, across = filled(slope, least, across)
    added = linear.added(delta)
    most = bound(linear, slope, across, added)
    trials = torch.stack([slope, torch.zeros_like(slope), torch.minimum(slope, least).clamp_max(0)])
    if isinstance(linear, EditedChain):
        moved = torch.stack([edited(linear, base, N, x, delta, J[..., None], image) for J in trials])
    else:
        moved = linear.errors(trials, added)
    worst, size = moved.norm(dim=2).amax(0), x[:, -1].norm(dim=1)
    estimate = torch.where(worst == 0, worst, SAFETY * worst / size)
    most = _limited(most / size)
    return torch.where(estimate.isfinite() & (worst > 0), torch.maximum(estimate, most), estimate)


def bound(linear: LinearChain, J: Tensor, across: Tensor, added: Tensor) -> Tensor:
    """(n,) the most that |e_T| is of e_{k+1} = (A_k + c_k (J_k + R_k)) e_k + added_k, |R_k e| ≤ share·across_k |e|.

    J and across (n, T); share is ALIGNED to 1. An edit is taken to leave distances as they are. Under a trained network
    this is about what `carried` estimates; under a network that is steep in many directions it is many times that.
    With R = 0 the errors are ē_k, vectors, whose parts may cancel; the rest, e_k − ē_k, grows by sizes, from R_k ē_k.
    """
    own, parts = linear.factor(J), linear.c[:, 0].abs() * across
    if isinstance(linear, TwoStepChain):
        own_before = linear.factor_before(J)
        both = torch.stack([parts, linear.c_before[:, 0].abs() * across.roll(1, 1)])
        both = both * aligned(both.sum(0) / 2)  # c is that of two steps
        return _bound_of_two(own, own_before, both, added, linear.given)
    parts, known = parts * aligned(parts), running(own[..., None], added).norm(dim=2)
    met = parts * torch.nn.functional.pad(known[:, :-1], (1, 0))
    return known[:, -1] + summed(own.abs() + parts, met)


def running(A: Tensor, b: Tensor) -> Tensor:
    """All e_1 … e_T (n, T, D) of e_{k+1} = A_k e_k + b_k from e_0 = 0; A (n, T, 1 or D), b (n, T, D)."""
    A, b, step = A.clone(), b.clone(), 1
    while step < b.shape[1]:
        b[:, step:] += A[:, step:] * b[:, :-step]
        A[:, step:] = A[:, step:] * A[:, :-step]
        step *= 2
    return b


def aligned(parts: Tensor) -> Tensor:
    """ALIGNED to 1 (n, 1), by how much the parts (n, T) may multiply an error by over the chain."""
    return (parts.sum(1, keepdim=True) / STEEP).clamp(ALIGNED, 1)


def _bound_of_two(own: Tensor, own_before: Tensor, parts: Tensor, added: Tensor, given: int) -> Tensor:
    """|e_T| of e_{k+1} = own_k e_k + own_before_k e_{k−1} + p_k + added_k, |p_k| ≤ parts_0k |e_k| + parts_1k |e_{k−1}|.

    By the sum Σ_j |Φ_kj| |p_j| over the steps before, Φ_kj what an error that step j adds has become before step k: two
    states that alternate in sign cancel, which sizes alone would not see.
    """
    n, T = own.shape
    unknown, size = torch.zeros_like(own), own.new_zeros(2, n)  # |p_j|; |e_k| and |e_{k−1}| at most
    carried, response = torch.zeros_like(added[:, :2]), own.new_zeros(n, 2, T)  # without p; Φ: the last two each
    for k in range(given, T):
        now = torch.stack([own[:, k], own_before[:, k] * (k > 0)], 1)[..., None]
        unknown[:, k] = parts[0, :, k] * size[0] + parts[1, :, k] * size[1]
        after, own_response = (now * carried).sum(1) + added[:, k], (now * response).sum(1)
        own_response[:, k] = 1.0
        carried = torch.stack([after, carried[:, 0]], 1)
        response = torch.stack([own_response, response[:, 0]], 1)
        size = torch.stack([after.norm(dim=1) + (own_response.abs() * unknown).sum(1), size[0]])
    return size[0]


def rounding(
    m: Remainders, base: Tensor, x: Tensor, N: Tensor, slope: Tensor, across: Tensor, precision: float,
    near: Tensor | None = None, large: Tensor | None = None,
) -> tuple[Tensor, Callable[[], Tensor], Tensor]:  # fmt: skip
    """The relative error (n,) of x_0 that rounding alone leaves: of ε by the network, of the states in float64.

    As `carried` with J = slope, of defects that are independent from step to step: squares add. Its `bound`, made when
    called. And what `turning` makes of them and of the network's answer to the rounding of its input, which no defect
    shows.

    near (n, T, 2) and large (n, T): of `Visits`. A network that turns within a large move, as a sine does, is steeper
    than the move tells. Steps not asked are taken to be as steep as the next that was, in unit of the step's length.
    """
    eps = torch.addcmul(N, m.splitting.kappa, x[:, :-1])
    eps = eps if m.splitting.offset is None else eps + m.splitting.offset
    made, sizes, unit = m.linear.added(eps), x.norm(dim=2), torch.finfo(torch.float64).eps
    own_rounding = unit * (sizes + base.norm(dim=2))[:, 1:]  # of sums in float64
    squares = (precision * made.norm(dim=2)).square() + own_rounding.square()
    slope, across = filled(slope, across)
    own, steep, c = slope, across, m.linear.c[:, 0]
    if near is not None and large is not None:
        step = c.abs().clamp_min(torch.finfo(x.dtype).tiny)
        own, turns = (filled(part * step) / step for part in near.unbind(2))
        own, steep = torch.where(large, own, slope), torch.where(large, torch.maximum(across, turns), across)
    answer = precision * (larger(slope, own).square() + steep.square()).sqrt() * sizes[:, :-1]
    turned = turning(m.linear, (slope, own), steep, squares + c.square() * answer.square())

    def most() -> Tensor:
        added = (precision * made).abs() + own_rounding[..., None] / made.shape[2] ** 0.5
        return _limited(bound(m.linear, slope, across, added) / sizes[:, -1])

    own_squares = squares[..., None]
    if isinstance(m.linear, TwoStepChain):
        own_squares = (precision * made).square() + own_rounding.square()[..., None] / made.shape[2]
    independent = m.linear.independent(slope, own_squares).sqrt() / sizes[:, -1]
    return independent.nan_to_num(0.0), most, _limited(turned.sqrt() / sizes[:, -1])


def _limited(part: Tensor) -> Tensor:
    return part.nan_to_num(LARGEST, LARGEST).clamp_max(LARGEST)


def turning(linear: LinearChain, J: tuple[Tensor, Tensor], across: Tensor, squares: Tensor) -> Tensor:
    """(n,) the expected |e_T|² of e_{k+1} = (A_k + c_k (J_k + R_k)) e_k + p_k, |p_k|² = squares_k (n, T) independent.

    J_k is the one of two, each (n, T), that makes more of an error. R_k e, of size across_k |e|, has a direction of its
    own at every step, as under a steep network: so squares add, where `bound` adds sizes. Under a gentle one it makes
    next to nothing of many small turns. Of DPM-Solver++, where an answer counts in two steps, the two are taken for
    independent.
    """
    own, parts = larger(*(linear.factor(part) for part in J)), linear.c[:, 0] * across
    if not isinstance(linear, TwoStepChain):
        return summed(own.square() + parts.square(), squares)
    own_before = larger(*(linear.factor_before(part) for part in J))
    parts_before = linear.c_before[:, 0] * across.roll(1, 1)
    n, T = own.shape
    size, response, made = own.new_zeros(2, n), own.new_zeros(n, 2, T), torch.zeros_like(squares)
    for k in range(linear.given, T):
        now = torch.stack([own[:, k], own_before[:, k] * (k > 0)], 1)[..., None]
        made[:, k] = squares[:, k] + parts[:, k].square() * size[0] + parts_before[:, k].square() * size[1]
        after = (now * response).sum(1)
        after[:, k] = 1.0
        response = torch.stack([after, response[:, 0]], 1)
        size = torch.stack([(after.square() * made).sum(1), size[0]])
    return size[0]


def spread_of(linear: LinearChain, x: Tensor, slope: Tensor, doubt: Tensor) -> Tensor:
    """As `carried` (n,), of defects known but for an independent error of the size of `doubt` (n, T, D)."""
    total = linear.independent(slope, linear.added(doubt).square())
    return (total / x[:, -1].square().sum(1)).sqrt().nan_to_num(0.0)


def scatter(at: Tensor, values: Tensor) -> Tensor:
    """By how much values (n, m) at positions `at` (m,) differ from the line between their neighbours (n, m)."""
    share = (at[1:-1] - at[:-2]) / (at[2:] - at[:-2])
    between = values[:, :-2] + share * (values[:, 2:] - values[:, :-2])
    inner = (values[:, 1:-1] - between).abs() / (1 + share.square() + (1 - share).square()).sqrt()
    return torch.cat([inner[:, :1], inner, inner[:, -1:]], 1)


def edited(linear: EditedChain, base: Tensor, N: Tensor, x: Tensor, delta: Tensor, J: Tensor, image: Tensor) -> Tensor:
    """How far (n, D) x_T moves when N becomes N + δ + J·(move of the states x), step by step through the edit."""
    y, added = base[:, 0], base[:, 1:] + linear.c * (N + delta)
    for k in range(N.shape[1]):
        y = linear.after(linear.A[k] * y + added[:, k] + linear.c[k] * J[:, k] * (y - x[:, k]), k, image)
    return y - x[:, -1]
