"""All states of a chain from its latent and the remainders: the linear part in closed form, or step by step.

With a splitting ε = κ_k s + b_k + N(s) the chain is s_{k+1} = A_k s_k + c_k (b_k + N_k) + σ_k n_k, A_k = a_k + c_k κ_k.
Given all N_k the whole trajectory is one cumulative sum: s_k = P_k (s_0 + Σ_{j<k} (c_j (b_j + N_j) + σ_j n_j)/P_{j+1}),
P_k = Π_{j<k} A_j.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

Edit = Callable[[Tensor, int, Tensor], Tensor]  # edit(x, k, image): what becomes of the states that k steps leave

DRAWS = 8  # of the signs of independent errors, where their sum has no closed form


class LinearChain:
    """s_{k+1} = A_k s_k + c_k N_k + d_k from a given s_0, for every k at once. A (T, 1) or (T, D), c (T, 1).

    Works from the product form where that is safe; when some A_k is so small that dividing by the products loses
    digits (a chain that jumps from pure noise to the image), it goes step by step.
    """

    given = 0  # states after the first that are given too: what makes them is of no use

    def __init__(self, A: Tensor, c: Tensor) -> None:
        self.A, self.c = A, c

    @cached_property
    def products(self) -> Tensor:
        """P_k = A_0 … A_{k−1} (T+1, 1 or D)."""
        return torch.cat([torch.ones_like(self.A[:1]), self.A.cumprod(0)])

    @cached_property
    def safe(self) -> bool:
        """Whether the product form loses no digits."""
        size = self.products.abs()
        return bool(size.isfinite().all()) and bool(size.min() > 1e-8 * size.max()) and bool(size.min() > 1e-100)

    @cached_property
    def w(self) -> Tensor:
        """c_k/P_{k+1} (T, 1 or D), or c where that is not safe."""
        return self.c / self.products[1:] if self.safe else self.c

    def base(self, x: Tensor, d: Tensor | None, second: Tensor | None = None) -> Tensor:
        """The trajectory (B, T+1, D) with N = 0, from x (B, D); d (B or 1, T, D) or None.

        second: (B, D) the state after, of a `TwoStepChain` that has it given.
        """
        if not self.safe:
            return self._stepwise(x, d)
        drift = 0 if d is None else torch.nn.functional.pad((d / self.products[1:]).cumsum(1), (0, 0, 1, 0))
        return self.products * (x[:, None] + drift)

    def trajectory(self, base: Tensor, N: Tensor, image: Tensor | None = None) -> Tensor:
        """(B, T+1, D): base plus the response to N (B, T, D). image (B,): numbers, which `EditedChain` needs."""
        if not self.safe:
            return base + self._stepwise(torch.zeros_like(base[:, 0]), self.c * N)
        out = base.clone()
        out[:, 1:] += (self.w * N).cumsum_(1).mul_(self.products[1:])
        return out

    def added(self, N: Tensor) -> Tensor:
        """What N (B, T, D) adds to the state that each step leaves."""
        return self.c * N

    def next(self, k: int, states: list[Tensor], N: Tensor) -> Tensor:
        """The response (n, D) after step k, of that so far and N (n, T, D)."""
        return self.A[k] * states[-1] + self.c[k] * N[:, k]

    @cached_property
    def extremes(self) -> tuple[Tensor, Tensor]:
        """The largest and the least of A_k over the entries (T,)."""
        return self.A.amax(1), self.A.amin(1)

    def factor(self, J: Tensor) -> Tensor:
        """Of A_k + c_k J_k over the entries the one of the largest magnitude (n, T); J (n, T)."""
        c, (most, least) = self.c[:, 0] * J, self.extremes
        return most + c if self.A.shape[1] == 1 else larger(most + c, least + c)

    def errors(self, J: Tensor, added: Tensor) -> Tensor:
        """e_T (m, n, D) of e_{k+1} = (A_k + c_k J_k) e_k + added_k from e_0 = 0; J (m, n, T), added (n, T, D)."""
        if self.A.shape[1] == 1:
            return (products_after(self.A[:, 0] + self.c[:, 0] * J).transpose(0, 1) @ added).transpose(0, 1)
        c, A, back = (self.c[:, 0] * J).flip(2)[..., :-1, None], self.A.flip(0)[:-1], added.flip(1)  # latest first
        return torch.stack([(A + part).cumprod_(1).mul_(back[:, 1:]).sum(1).add_(back[:, 0]) for part in c])

    def independent(self, J: Tensor, squares: Tensor) -> Tensor:
        """(n,) the expected |e_T|² where each step adds an independent error of these squares (n, T, D); J (n, T).

        Their sums over the entries (n, T, 1) are enough.
        """
        return summed(self.factor(J).square(), squares.sum(2))

    def _stepwise(self, x: Tensor, d: Tensor | None) -> Tensor:
        states = [x]
        for k in range(self.A.shape[0]):
            x = self.A[k] * x
            x = x if d is None else x + d[:, k]
            states.append(x)
        return torch.stack(states, 1)


class EditedChain(LinearChain):
    """The same with x_k ← edit(x_k, k, image) after every step.

    An edit need not be linear, so no closed form is left: the states are made one after the other, in every round. The
    map from N to the states is still lower triangular, and its fixed point is the chain sampled step by step.
    """

    def __init__(self, A: Tensor, c: Tensor, edit: Edit, shape: torch.Size) -> None:
        super().__init__(A, c)
        self.edit, self.shape = edit, shape

    def base(self, x: Tensor, d: Tensor | None, second: Tensor | None = None) -> Tensor:
        """(B, T+1, D): x, then what every step adds."""
        drift = torch.zeros_like(self.c)[None] if d is None else d
        return torch.cat([x[:, None], drift.expand(len(x), -1, x.shape[1])], 1)

    def trajectory(self, base: Tensor, N: Tensor, image: Tensor | None = None) -> Tensor:
        x, added = base[:, 0], base[:, 1:] + self.c * N
        out = [x]
        for k in range(N.shape[1]):
            x = self.after(self.A[k] * x + added[:, k], k, image)
            out.append(x)
        return torch.stack(out, 1)

    def after(self, x: Tensor, k: int, image: Tensor | None) -> Tensor:
        """The state (B, D) that step k leaves."""
        images = x.reshape(-1, *self.shape)
        edited = self.edit(images, k + 1, image if image is not None else torch.arange(len(x), device=x.device))
        if not isinstance(edited, Tensor) or edited.shape != images.shape:
            got = tuple(edited.shape) if isinstance(edited, Tensor) else type(edited).__name__
            raise ValueError(f"edit: a tensor of the shape of x, {tuple(images.shape)}, is required, got {got}")
        return edited.to(x.dtype).reshape(x.shape)


class TwoStepChain(LinearChain):
    """s_{k+1} = A_k s_k + A'_k s_{k−1} + c_k N_k + c'_k N_{k−1} + d_k, one state after the other; A'_0 = c'_0 = 0.

    given: 1 where s_1 is given beside s_0.
    """

    def __init__(self, A: Tensor, c: Tensor, A_before: Tensor, c_before: Tensor, given: int = 0) -> None:
        super().__init__(A, c)
        self.safe, self.A_before, self.c_before, self.given = False, A_before, c_before, given

    def factor_before(self, J: Tensor) -> Tensor:
        """Of A'_k + c'_k J_{k−1} over the entries the one of the largest magnitude (n, T); J (n, T)."""
        c = self.c_before[:, 0] * J.roll(1, 1)
        return larger(self.A_before.amax(1) + c, self.A_before.amin(1) + c)

    def base(self, x: Tensor, d: Tensor | None, second: Tensor | None = None) -> Tensor:
        return self._from([x] if second is None else [x, second], d)

    def trajectory(self, base: Tensor, N: Tensor, image: Tensor | None = None) -> Tensor:
        return base + self._from([torch.zeros_like(base[:, 0])] * (1 + self.given), self.added(N))

    def added(self, N: Tensor) -> Tensor:
        return self.c * N + self.c_before * torch.nn.functional.pad(N[:, :-1], (0, 0, 1, 0))

    def next(self, k: int, states: list[Tensor], N: Tensor) -> Tensor:
        if k < self.given:
            return torch.zeros_like(states[-1])
        after = self.A[k] * states[-1] + self.c[k] * N[:, k]
        return after + self.A_before[k] * states[-2] + self.c_before[k] * N[:, k - 1] if k else after

    def errors(self, J: Tensor, added: Tensor) -> Tensor:
        return torch.stack([self._carried(part[..., None], added) for part in J])

    def independent(self, J: Tensor, squares: Tensor) -> Tensor:
        """As of one step, but needs every entry: two states that alternate in sign cancel."""
        generator, total = torch.Generator().manual_seed(0), torch.zeros_like(squares[:, 0, 0])
        for _ in range(DRAWS):
            signs = torch.randint(2, squares.shape[1:], generator=generator).to(squares) * 2 - 1
            total = total + self._carried(J[..., None], signs * squares.sqrt()).square().sum(1) / DRAWS
        return total

    def _from(self, states: list[Tensor], d: Tensor | None) -> Tensor:
        for k in range(len(states) - 1, len(self.A)):
            x = self.A[k] * states[-1]
            x = x + self.A_before[k] * states[-2] if k else x
            states = [*states, x if d is None else x + d[:, k]]
        return torch.stack(torch.broadcast_tensors(*states), 1)

    def _carried(self, J: Tensor, added: Tensor) -> Tensor:
        """e_T (n, D) where each step adds `added` (n, T, D) and the network answers an error e_k by J_k e_k."""
        before = e = torch.zeros_like(added[:, 0])
        for k in range(self.given, added.shape[1]):
            after = (self.A[k] + self.c[k] * J[:, k]) * e + added[:, k]
            after = after + (self.A_before[k] + self.c_before[k] * J[:, k - 1]) * before if k else after
            before, e = e, after
        return e


def summed(A: Tensor, b: Tensor) -> Tensor:
    """e_T (n,) of e_{k+1} = A_k e_k + b_k from e_0 = 0: Σ_k A_{T−1} … A_{k+1} b_k; A and b (n, T)."""
    return (products_after(A) * b).sum(1)


def products_after(A: Tensor) -> Tensor:
    """A_{T−1} … A_{k+1} (…, T) of A (…, T); 1 of the last."""
    later = A.roll(-1, -1)
    later[..., -1] = 1.0
    return later.flip(-1).cumprod(-1).flip(-1)


def larger(a: Tensor, b: Tensor) -> Tensor:
    """Of two tensors the entries of the larger magnitude."""
    return torch.where(a.abs() >= b.abs(), a, b)
