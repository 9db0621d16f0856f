"""Gradients through a sampled chain, exact and phantom.

The chain's Jacobian is strictly lower triangular over time, so the implicit gradient is that of sequential sampling:
λ_k = g_k + (a_k + c_k J_ε(x_k)ᵀ) λ_{k+1}, from λ_T = g_T at the image to the noise. Either one step after the other, T
vector-Jacobian products with the graph of one step at a time; or all steps at once: with the splitting it is
λ_k = g_k + A_k λ_{k+1} + c_k M_k, M_k = J_Nᵀ λ_{k+1}, the sampler's own fixed point run from the other end, now linear
and with every x_k known. (A Krylov method may make no progress on such a matrix before its T-th step, and best-iterate
guards would stop it at a wrong answer.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pydeqsolve import GMRES, Adjoint, Front, Implicit, Phantom, Solution, Status, Stop, leaves, solve

from .models.calls import CPU_ROWS
from .problem import ChainProblem
from .ranks import evaluate_shared, sum_shared
from .remainder import Remainders, reachable, rotate
from .trajectory import EditedChain, LinearChain


def attach(
    problem: ChainProblem, states: Tensor, latent: Tensor, inputs: Sequence[Tensor],
    gradient: Implicit | Phantom | None, solution: Solution | None, latent_alone: bool = False,
) -> Tensor:  # fmt: skip
    """The states (B, T+1, D) of a problem with the gradient to the latent (B, …), inputs and what else the model reads.

    latent_alone: the gradient is for the latent only, which saves a row and, with all steps at once, T more.
    gradient.solver: GMRES, the default, stands for the sweep; a forward solver with coupling="causal" solves for all
    steps at once, to gradient.stop (None: rtol 1e-6), and images that miss it are swept.
    """
    if gradient is None or not torch.is_grad_enabled():
        return states
    latent = latent if problem.map.network.basis is None else rotate(latent, problem.map.network.basis)
    if isinstance(gradient, Phantom):
        return through_phantom(problem, states, latent.double().flatten(1), inputs, gradient)
    if not len(states):
        return states + latent.double().flatten(1)[:, None]
    note = None if solution is None else solution.recorder.note
    backward = ChainAdjoint(problem.map, problem.noise, len(inputs), gradient, note, latent.dtype)
    parameters = [] if latent_alone else backward.leaves(states, inputs)
    return _ChainFunction.apply(backward, states, latent, *inputs, *parameters)


def check_gradient(gradient: Any, edit: Any, rule: str = "ddim", pair: bool = False) -> None:
    """Raises for a gradient that a sampled chain does not have."""
    if gradient is not None and not isinstance(gradient, (Implicit, Phantom)):
        raise TypeError(f"gradient: None, Implicit() or Phantom() is required, got {type(gradient).__name__}")
    if gradient is not None and pair:
        raise ValueError("gradient: that of a pair of states is not supported; of one latent it is")
    if gradient is None or (isinstance(gradient, Implicit) and isinstance(gradient.solver, GMRES)):
        return
    if rule != "ddim":
        raise ValueError(f"gradient: with rule={rule!r} only Implicit() is supported, got {gradient}")
    if edit is not None:
        raise ValueError(f"gradient: with an edit only Implicit() is supported, got {gradient}")
    if isinstance(gradient, Implicit) and getattr(gradient.solver, "coupling", "causal") != "causal":
        raise ValueError(f'gradient: the adjoint needs a solver with coupling="causal", got {gradient.solver}')
    if isinstance(gradient, Implicit) and not hasattr(gradient.solver, "method"):
        raise ValueError(f"gradient: GMRES(), the exact sweep, or a forward solver is required, got {gradient.solver}")


@dataclass(eq=False)
class ChainAdjoint:
    """The backward pass of one sampled trajectory. `rest` below: conditioning, then the leaves the model reads."""

    map: Remainders
    noise: Tensor | None
    count: int  # of conditioning tensors
    gradient: Implicit
    note: Callable[[Adjoint], None] | None  # takes the outcome
    dtype: torch.dtype  # of x_T, and so of its gradient

    def leaves(self, trajectory: Tensor, conditioning: Sequence[Tensor]) -> list[Tensor]:
        """What the model and the edit read besides their arguments, from one evaluation of the last step."""
        k = len(self.map.chain) - 1
        with torch.enable_grad():
            after = self._steps(trajectory[:1, k].detach(), k, [c[:1].detach() for c in conditioning])[0]
        return leaves(after)

    def __call__(self, g: Tensor, trajectory: Tensor, rest: Sequence[Tensor], needed: list[int]) -> Any:
        """λ_0 (B, D) and, by position in `rest`, the gradients of the needed ones. g (B, T+1, D)."""
        parallel = not isinstance(self.gradient.solver, GMRES)
        return (self._parallel if parallel else self._sweep)(g, trajectory, rest, needed)

    def _steps(self, x: Tensor, k: int, conditioning: Sequence[Tensor]) -> list[Tensor]:
        """What s_k = x (B, D) makes of s_{k+1}, as sequential sampling has it; and, in a two-step chain, of s_{k+2}."""
        m, chain = self.map, self.map.chain
        eps = m.epsilon(x, torch.full((len(x),), k, device=x.device), conditioning)
        after = chain.a[k] * x + chain.c[k] * eps
        if chain.past is not None and k + 1 < len(chain):
            return [after, chain.past[0][k + 1] * x + chain.past[1][k + 1] * eps]
        if not isinstance(m.linear, EditedChain):
            return [after]
        if self.noise is not None:
            after = after + self.noise[: len(x), k]
        return [m.linear.after(after, k, torch.arange(len(x), device=x.device))]

    def _sweep(self, g: Tensor, trajectory: Tensor, rest: Sequence[Tensor], needed: list[int]) -> Any:
        sums = zeros(rest, needed)
        adjoint, beyond, T = g[:, -1], torch.zeros_like(g[:, -1]), len(self.map.chain)
        for k in range(T - 1, -1, -1):
            with torch.enable_grad():
                x = trajectory[:, k].detach().requires_grad_()
                conditioning = [c.detach().requires_grad_(i in needed) for i, c in enumerate(rest[: self.count])]
                after = self._steps(x, k, conditioning)
            wanted = [conditioning[i] if i < self.count else rest[i] for i in needed]
            cotangents = [adjoint, beyond][: len(after)]
            own, *products = torch.autograd.grad(after, [x, *wanted], cotangents, allow_unused=True)
            add(sums, needed, products)
            adjoint, beyond = g[:, k] + own, adjoint
        self._report(adjoint, torch.zeros_like(g[:, 0, 0]), torch.full((len(g),), T, device=g.device))
        return adjoint, sums

    def _parallel(self, g: Tensor, trajectory: Tensor, rest: Sequence[Tensor], needed: list[int]) -> Any:
        m, T = self.map, len(self.map.chain)
        conditioning = [c.detach() for c in rest[: self.count]]
        size = g.abs().flatten(1).amax(1)  # no square of an entry overflows or vanishes then
        size = torch.where((size > 0) & size.isfinite(), size, 1.0)
        size = (size * (g / size[:, None, None]).square().sum(1).mean(1).sqrt())[:, None, None]
        size = torch.where((size > 0) & size.isfinite(), size, 1.0)
        linear = LinearChain(m.linear.A.flip(0), m.linear.c.flip(0))
        base = linear.base(g[:, -1] / size[:, 0], g[:, :T].flip(1) / size)
        products = torch.zeros(len(g), dtype=torch.int64, device=g.device)

        def transposed(M: Tensor, image: Tensor, base: Tensor, *inputs: Tensor, wanted: Tensor) -> Tensor:
            """M_k = J_N(x_k)ᵀ λ_{k+1}, k = T − 1 − j: position j of the reversed chain holds λ_{T−j}."""
            i, j = wanted.nonzero(as_tuple=True)
            k, u = T - 1 - j, linear.trajectory(base, M)[i, j]
            products.index_add_(0, image[i], torch.ones_like(i))
            out = M.clone()
            out[i, j] = self._products(trajectory[image[i], k], k, u, [c[i] for c in inputs]) - m.splitting.kappa[k] * u
            return out

        goal = self.gradient.stop or Stop(rtol=1e-6)
        stop = Stop(0.0, reachable(goal.rtol, m.network.dtype), min(goal.max_steps, T), "rms", 1)
        guess, image = torch.zeros_like(trajectory[:, 1:]), torch.arange(len(g), device=g.device)
        solved = solve(transposed, guess, (image, base, *conditioning), solver=self.gradient.solver, stop=stop,
                       gradient=None, front=Front())  # fmt: skip
        # λ_0 … λ_T, (B, T+1, D)
        adjoint = linear.trajectory(base, solved.z).flip(1) * size
        missed = (~solved.converged).nonzero()[:, 0]
        for k in range(T - 1, -1, -1) if len(missed) else ():
            step = torch.full_like(missed, k)
            own = self._products(trajectory[missed, k], step, adjoint[missed, k + 1], [c[missed] for c in conditioning])
            adjoint[missed, k] = g[missed, k] + m.chain.a[k] * adjoint[missed, k + 1] + m.chain.c[k] * own
        products[missed] += T
        self._report(adjoint.flatten(1), torch.where(solved.converged, solved.residual, 0.0), products)
        return adjoint[:, 0], self._sums(adjoint, trajectory, rest, needed)

    def _products(self, x: Tensor, k: Tensor, u: Tensor, conditioning: Sequence[Tensor]) -> Tensor:
        """J_ε(x_k)ᵀ u (n, D), the rows shared among the ranks of the group."""
        group = self.map.network.group
        rows = [x, k, u, *conditioning]
        return self._local_products(*rows) if group is None else evaluate_shared(self._local_products, rows, group)

    def _local_products(self, x: Tensor, k: Tensor, u: Tensor, *conditioning: Tensor) -> Tensor:
        out, network = torch.zeros_like(x), self.map.network
        calls = network.calls + 1

        def one(part: slice) -> None:
            with torch.enable_grad():
                state = x[part].detach().requires_grad_()
                eps = self.map.epsilon(state, k[part], [c[part] for c in conditioning])
            if eps.requires_grad:
                (product,) = torch.autograd.grad(eps, state, u[part], allow_unused=True)
                out[part] = 0.0 if product is None else product

        network.portions.each(len(x), x.device, one, CPU_ROWS)  # each portion has a graph
        network.calls = calls  # a round, in however many portions
        return out

    def _sums(
        self, adjoint: Tensor, trajectory: Tensor, rest: Sequence[Tensor], needed: list[int]
    ) -> dict[int, Tensor]:
        """Σ_k c_k (∂ε(x_k)/∂θ)ᵀ λ_{k+1} for what is needed of `rest`; each rank sums its part of the rows."""
        sums = zeros(rest, needed)
        (B, T), group = (len(trajectory), len(self.map.chain)), self.map.network.group
        if not needed:
            return sums
        portions, device = self.map.network.portions, trajectory.device
        # the same on every rank, whatever fits there
        most, own = portions.asked(device, CPU_ROWS), None if group is None else (group.rank(), group.size())
        starts = list(range(0, B * T, most))

        def one(rows: Tensor, part: slice) -> None:
            i, k = rows[part] // T, rows[part] % T
            with torch.enable_grad():
                conditioning = [c.detach().requires_grad_(at in needed) for at, c in enumerate(rest[: self.count])]
                eps = self.map.epsilon(trajectory[i, k].detach(), k, [c[i] for c in conditioning])
            if eps.requires_grad:
                wanted = [conditioning[at] if at < self.count else rest[at] for at in needed]
                u = self.map.chain.c[k, None] * adjoint[i, k + 1]
                add(sums, needed, torch.autograd.grad(eps, wanted, u, allow_unused=True))

        for start in starts if own is None else starts[own[0] :: own[1]]:
            rows = torch.arange(start, min(start + most, B * T), device=device)
            portions.each(len(rows), device, partial(one, rows), CPU_ROWS)
        return sums if group is None else {i: sum_shared(total, group) for i, total in sums.items()}

    def _report(self, adjoint: Tensor, residual: Tensor, evaluations: Tensor) -> None:
        """Leaves the outcome: adjoint (B, …) as found, residual (B,), zero for what was substituted step by step.

        An image whose adjoint is not finite in the dtype of its gradient is NONFINITE; of the others the residual is
        known to no less than the rounding of the network's products.
        """
        if self.note is not None:
            finite = adjoint.to(self.dtype).isfinite().flatten(1).all(1)
            status = torch.where(finite, int(Status.CONVERGED), int(Status.NONFINITE))
            residual = residual.double().clamp_min(torch.finfo(self.map.network.dtype).eps)
            self.note(Adjoint(status, torch.where(finite, residual, torch.inf), evaluations))


def zeros(rest: Sequence[Tensor], needed: list[int]) -> dict[int, Tensor]:
    """Where gradients are summed over the steps: float32 at least, because in bfloat16 late terms would vanish."""
    wide = {i: torch.promote_types(rest[i].dtype, torch.float32) for i in needed}
    return {i: torch.zeros_like(rest[i], dtype=dtype) for i, dtype in wide.items()}


def add(sums: dict[int, Tensor], needed: list[int], products: Sequence[Tensor | None]) -> None:
    """Adds the products that there are to their sums."""
    for i, product in zip(needed, products, strict=True):
        if product is not None:
            sums[i] = sums[i] + product


def _is_batched(x: Tensor) -> bool:
    """x stands for many tensors inside a vmap, torch's older kind or torch.func's."""
    kinds: Any = getattr(torch._C, "_functorch", None)
    return kinds is not None and bool(kinds.is_legacy_batchedtensor(x) or kinds.is_batchedtensor(x))


class _ChainFunction(torch.autograd.Function):
    """The trajectory, whose backward pass is the adjoint chain."""

    @staticmethod
    def forward(ctx: Any, adjoint: ChainAdjoint, trajectory: Tensor, x_T: Tensor, *rest: Tensor) -> Tensor:
        ctx.adjoint, ctx.like = adjoint, x_T
        ctx.save_for_backward(trajectory, *rest)
        return trajectory.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            raise NotImplementedError("second derivatives through sample are not supported")
        if _is_batched(grads[0]):
            raise NotImplementedError("cotangents in batches (is_grads_batched, vmap) through sample are not supported")
        trajectory, *rest = ctx.saved_tensors
        needed = [i for i in range(len(rest)) if ctx.needs_input_grad[3 + i]]
        adjoint, sums = ctx.adjoint(grads[0], trajectory, rest, needed)
        like = ctx.like
        grad_x = adjoint.to(like.dtype).reshape(like.shape) if ctx.needs_input_grad[2] else None
        return None, None, grad_x, *[sums[i].to(x.dtype) if i in sums else None for i, x in enumerate(rest)]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError("forward mode through sample is not supported")


def through_phantom(
    problem: ChainProblem, states: Tensor, latent: Tensor, inputs: Sequence[Tensor], phantom: Phantom
) -> Tensor:
    """The states with the phantom gradient: X ← τ h(X) + (1−τ) X, `steps` times from X*, differentiated.

    h(X)_k = P_k (s_0 + Σ_{j<k} (c_j N(X_j) + …)/P_{j+1}) injects the latent (B, D) in every row. With one step the
    network is read at fixed states, so the gradient of the image with respect to the latent is the number τ P_T times
    the identity: no network Jacobian enters and the backward pass costs nothing. With more steps it reads the latent
    itself at the first one; steps = T and τ = 1 give the exact gradient.
    """
    m, tau = problem.map, phantom.damping
    B, T = states.shape[0], len(m.chain)
    if phantom.steps == 1 or not B:
        return states.detach() + tau * m.linear.products * (latent - latent.detach())[:, None]
    k, rows = torch.arange(T, device=states.device).repeat(B), [c.repeat_interleave(T, 0) for c in inputs]
    full = states.detach()
    X = torch.cat([latent[:, None], full[:, 1:T]], 1)
    for _ in range(phantom.steps):
        N = m.remainder(X.reshape(B * T, -1), k, rows).reshape(B, T, -1)
        full = tau * m.linear.trajectory(m.linear.base(latent, problem.drift), N) + (1 - tau) * full
        X = torch.cat([latent[:, None], full[:, 1:T]], 1)
    return states + (full - full.detach())
