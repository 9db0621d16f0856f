"""All steps of an O-BELM chain read backwards at once: rounds that evaluate every step that is not yet right.

The first states are DDIM's: O-BELM's own recurrence amplifies errors of alternating sign on its way to the latent, as
long as the remainders are not right. Then its remainders move as `Pooled` foretells. A step stays as it is, and is not
evaluated again, when it and all before it are settled: within the network's rounding, or evaluated with all before it
as they will stay, which is at least one step more a round.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..methods.parallel import MARGIN, UNITS_PER_RTOL
from ..problem import ChainProblem
from ..remainder import rounding, scale_of
from ..trajectory import TwoStepChain
from .neighbours import Pooled

FIRST = 2  # rounds on DDIM's states
FEW = 7  # rounds of which all are made there: O-BELM's own states are further off so soon
FELL, PATIENCE = 0.7, 2  # an image whose residual has not fallen to this part of its least in so many rounds
SHORT = 2.0  # tolerances that a residual is above where rounding keeps it from settling
NEAR = 1000.0  # and is within so many tolerances has come to what the network's rounding grows to


@dataclass(eq=False)
class Together:
    """What the rounds have found of B images.

    backward: the chain from image to latent, `diffusion.inversion.algebra`; ddim: the same by DDIM's steps.
    """

    backward: ChainProblem
    ddim: ChainProblem
    bar: Any

    def __post_init__(self) -> None:
        base = self.backward.base()
        self.N = torch.zeros_like(base[:, 1:])
        self.settled = torch.ones(len(base), dtype=torch.int64, device=base.device)  # the first step's end is given
        self.evaluations = torch.zeros_like(self.settled)
        self.smooth: Tensor | None = None  # (B, 2, D), DDIM's last two states, where other rounds followed
        self.short = torch.ones_like(self.settled, dtype=torch.bool)  # of the network's precision

    @property
    def states(self) -> Tensor:
        """(B, T+1, D), s_T, the image, to s_0."""
        return self.backward.map.linear.trajectory(self.backward.base(), self.N)

    def _first(self, limit: float) -> int:
        """Rounds on DDIM's states; none that a step a round, which settles all, would lack."""
        steps = self.N.shape[1] - 1
        if limit >= steps:
            return int(min(FIRST, limit - steps))
        return int(limit) if limit <= FEW else FIRST

    def solve(self, limit: float) -> None:
        """At most `limit` rounds, until every step is at the network's precision.

        Without a limit an image is left as soon as rounding keeps it from that; one after the other is cheaper then.
        """
        problem, m, T = self.backward, self.backward.map, self.N.shape[1]
        for part in (m, self.ddim.map):
            part.evaluations = self.evaluations
        pooled, first = Pooled(self.ddim.map, *problem.latent.shape), self._first(limit)
        images = torch.arange(len(self.N), device=self.N.device)
        self._along_ddim(pooled, images, first)
        self.smooth = self.smooth if 0 < first < limit else None
        pooled.map, base, steps = m, problem.base(), torch.arange(T, device=self.N.device)
        tolerance = UNITS_PER_RTOL * rounding(m.network.dtype)
        least, waited = torch.full_like(base[:, 0, 0], torch.inf), torch.zeros_like(images)
        for _ in range(int(min(limit - first, T - 1))):
            if not len(images):
                return
            here, wanted = problem.pick(images), steps >= self.settled[images, None]
            out = pooled(self.N[images], images, base[images], *here.conditioning, wanted=wanted)
            self.bar.update()
            residual = ((out - self.N[images]) * scale_of(m.chain)).square().mean(2).sqrt()  # (n, T)
            self.N[images] = out
            right = (residual <= MARGIN * tolerance).long().cumprod(1).sum(1)
            self.settled[images] = torch.maximum(self.settled[images] + 1, right)
            residual = residual.amax(1)
            fell = residual <= FELL * least[images]
            waited[images] = torch.where(fell, 0, waited[images] + 1)
            least[images] = torch.where(fell, residual, least[images])
            stuck = (waited[images] >= PATIENCE) & (residual <= NEAR * tolerance) & (limit == math.inf)
            self.short[images] = ~(residual <= SHORT * tolerance) & (self.settled[images] < T)
            images = images[(residual > tolerance) & ~stuck & residual.isfinite()]

    def _along_ddim(self, pooled: Pooled, images: Tensor, rounds: int) -> None:
        """N that makes the states which DDIM makes of so many rounds."""
        base = self.ddim.base()
        for _ in range(rounds):
            self.N = pooled(self.N, images, base, *self.backward.conditioning)
            self.bar.update()
        states = self.ddim.map.linear.trajectory(base, self.N)
        self.smooth, self.N = states[:, -2:].clone(), remainders(self.backward, states)


def remainders(problem: ChainProblem, states: Tensor) -> Tensor:
    """N (B, T, D) that makes the states (B, T+1, D) of a two-step chain whose first two are given."""
    linear = problem.map.linear
    assert isinstance(linear, TwoStepChain)
    before = torch.cat([torch.zeros_like(states[:, :1]), states[:, :-2]], 1)
    added = states[:, 1:] - linear.A * states[:, :-1] - linear.A_before * before
    added = added if problem.drift is None else added - problem.drift
    N = added / linear.c
    N[:, 0] = 0.0
    return N
