"""Of several states that a step takes to the same next one, the one nearest to it.

F(x) = a x + c ε(x, t) folds space where the step is long: many x have F(x) = y. As x = (y − c ε)/a, those of small |ε|
are near y/a, and likely: of noise of unit size. From the ε found last, which points the right way and is too short,
Levenberg-Marquardt steps lead there,

    d = argmin |F(x) − y + J d|² + μ |d|²,

with μ that falls: they follow the directions in which F moves much before those in which it hardly does, and end at a
root near the start. J is not asked for. On the first PROBES vectors of its Krylov space it is taken by differences,
each an evaluation; then STEPS steps are made, each of which adds the direction of the residual that was left, and
corrects J by what F did (Broyden 1965). There are CYCLES of both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .backwards import NOISE, SPARE, Backwards, Steps

PROBES, STEPS, CYCLES = 40, 4, 6
# μ in unit of a²: at first, and by what it is multiplied after a step that lowered the residual, or did not.
RIDGE, FALLS, RISES, LEAST, MOST = 0.1, 0.4, 2.0, 1e-9, 1.0
REACH = 0.3  # the most that a step moves, in unit of the state's noise
GUESS = 0.7  # of a: J in a direction of which nothing is known
ROUNDS = CYCLES * (PROBES + STEPS) + 1


def nearest(way: Backwards, k: int, atol: Tensor) -> Steps:
    """ε at x_k from x_{k+1}, of the root near the state that the ε found last leads to; unsettled where none was found.

    atol (B,): of the residual, in the unit of the image. At most ROUNDS evaluations an image, and 2 (PROBES + STEPS)
    words of memory for each of its entries.
    """
    search = Search(way, k, atol)
    for _ in range(CYCLES):
        search.probe()
        search.move()
    way.traces.append(torch.stack(search.trace))
    eps, residual = (way.x - search.a * search.x) / search.c, search.residual
    return Steps(eps[:, None], residual, residual <= search.goal)


@dataclass(eq=False)
class Search:
    """The states x (B, D), f = F(x) − y there, and of the images `image` (n,) J on directions Q: J Q_j = Y_j.

    Q and Y (n, p, D), Q orthonormal. ridge (B,) is μ.
    """

    way: Backwards
    k: int
    goal: Tensor  # (B,) of the residual

    def __post_init__(self) -> None:
        way, chain = self.way, self.way.problem.map.chain
        self.a, self.c, noise = (float(part[self.k]) for part in (chain.a, chain.c, chain.noise))
        self.size = float(chain.size[self.k + 1])
        precision = torch.finfo(way.problem.map.network.dtype).eps
        self.goal = self.goal.clamp_min(NOISE * precision / 2 * abs(self.c) / self.size)
        self.reach = noise * way.x.shape[1] ** 0.5  # the length of the noise
        self.x, self.trace = (way.x - self.c * way.last) / self.a, list[Tensor]()
        self.h = self.reach * precision ** (1 / 3)
        self.f, self.ridge = torch.full_like(way.x, torch.nan), torch.full_like(way.left, RIDGE * self.a**2)
        finite = self.x.isfinite().all(1).nonzero()[:, 0]
        self.f[finite] = self.asked(self.x[finite], finite)

    @property
    def residual(self) -> Tensor:
        """(B,) root mean square, in the unit of the image."""
        return self.f.square().mean(1).sqrt() / self.size

    def live(self) -> Tensor:
        """The images (n,) that go on."""
        going = (self.residual > self.goal) & (self.way.allowance > SPARE * self.k)
        return going.nonzero()[:, 0]

    def asked(self, x: Tensor, image: Tensor) -> Tensor:
        """F(x) − y (n, D) at states x (n, D) of some images (n,), one evaluation each."""
        way = self.way
        steps = torch.full_like(image, self.k)
        eps = way.problem.map.epsilon(x, steps, [c[image] for c in way.problem.conditioning])
        way.evaluations[image] += 1
        way.allowance[image] -= 1
        way.bar.update()
        row = torch.full_like(way.left, torch.nan)
        f = self.a * x + self.c * eps - way.x[image]
        row[image] = f.square().mean(1).sqrt() / self.size
        self.trace.append(row)
        return f

    def probe(self) -> None:
        """Learns J anew, on the Krylov space of f."""
        self.image = image = self.live()
        x, f = self.x[image], self.f[image]
        self.Q = self.Y = x.new_zeros(len(image), 0, x.shape[1])
        v = f
        for _ in range(min(PROBES, x.shape[1]) if len(image) else 0):
            v = self.across(v)
            Jv = (self.asked(x + self.h * v, image) - f) / self.h
            self.learn(v, Jv)
            v = Jv

    def across(self, v: Tensor) -> Tensor:
        """The part of v (n, D) at a right angle to Q, of unit length; zero where nothing is left."""
        size = v.norm(dim=1, keepdim=True)
        for _ in range(2):
            v = v - ((self.Q @ v[..., None]).mT @ self.Q)[:, 0]
        left = v.norm(dim=1, keepdim=True)
        return torch.where(left > 1e-10 * size, v / left, 0.0)

    def learn(self, v: Tensor, Jv: Tensor) -> None:
        """Adds a direction v (n, D) and what J makes of it."""
        self.Q, self.Y = torch.cat([self.Q, v[:, None]], 1), torch.cat([self.Y, Jv[:, None]], 1)

    def move(self) -> None:
        """STEPS steps by what is known of J."""
        for _ in range(STEPS):
            going = torch.isin(self.image, self.live())
            self.image, self.Q, self.Y = self.image[going], self.Q[going], self.Y[going]
            image = self.image
            if not len(image):
                return
            x, f, ridge = self.x[image], self.f[image], self.ridge[image]
            v = self.across(f)
            self.learn(v, GUESS * self.a * v)
            unit = torch.eye(self.Y.shape[1], dtype=x.dtype, device=x.device)
            z = -torch.linalg.solve_ex(self.Y @ self.Y.mT + ridge[:, None, None] * unit, self.Y @ f[..., None])[0]
            z = z * (REACH * self.reach / z.norm(dim=1, keepdim=True)).clamp_max(1.0)
            d = (z.mT @ self.Q)[:, 0]
            f_next = self.asked(x + d, image)
            told = (f_next - f)[:, None] - z.mT @ self.Y
            correction = z / z.square().sum(1, keepdim=True) * told
            self.Y = torch.where(correction.isfinite(), self.Y + correction, self.Y)
            lower = f_next.norm(dim=1) < f.norm(dim=1)
            self.x[image] = torch.where(lower[:, None], x + d, x)
            self.f[image] = torch.where(lower[:, None], f_next, f)
            ridge = ridge * torch.where(lower, FALLS, RISES)
            self.ridge[image] = ridge.clamp(LEAST * self.a**2, MOST * self.a**2)
