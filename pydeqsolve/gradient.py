"""How derivatives pass through a solution: implicit, phantom or unrolled.

J = ∂f/∂z at z*, g the cotangent of z*. The implicit function theorem gives dz* = (I − J)⁻¹ ∂f/∂θ dθ, hence the
cotangent u = (I − Jᵀ)⁻¹ g for f, which autograd then carries on to θ: parameters, inputs, whatever fn closes over.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .gmres import GMRES
from .iterate import Problem, Solver, call, iterate
from .leaves import leaves
from .solution import Adjoint, ConvergenceError, Solution, describe_failures
from .stop import Stop, check_count, relative_goal
from .structure import Layout


class LinearSolver(Protocol):
    """Solves u = g + A u per sample; see `GMRES.solve`."""

    def solve(self, A: Callable[[Tensor], Tensor], g: Tensor, stop: Stop) -> tuple[Tensor, Adjoint]: ...


class Gradient(Protocol):
    """A way to differentiate a solution."""

    def attach(self, problem: Problem, solution: Solution) -> Tensor:
        """`solution.z` (B, T, D) with a graph behind it; the value stays the same, bit for bit."""
        ...


@dataclass(frozen=True)
class Implicit:
    """Exact gradients by the implicit function theorem: u = g + Jᵀ u is solved in the backward pass.

    solver: a Krylov method (`GMRES`), a Neumann series of bounded cost (`Neumann`) or any forward solver. stop: the
    adjoint's tolerance, relative to ‖g‖ per sample, so that a scaled loss gives the scaled gradient. on_failure: what
    happens when a sample's adjoint does not converge: "warn" (a RuntimeWarning, the best u is used), "raise"
    (ConvergenceError) or "phantom" (that sample uses u = g).
    The outcome is left in `Solution.adjoint`. Costs one more evaluation of fn in the forward pass, not counted in
    `Solution.evaluations`, and keeps its graph, whatever the solve took. Second derivatives and forward mode raise
    NotImplementedError.
    """

    solver: Any = field(default_factory=GMRES)
    stop: Stop = field(default_factory=lambda: Stop(rtol=1e-6))
    on_failure: str = "warn"

    def __post_init__(self) -> None:
        if self.on_failure not in ("warn", "raise", "phantom"):
            raise ValueError(f'on_failure must be "warn", "raise" or "phantom", got {self.on_failure!r}')
        if not (hasattr(self.solver, "solve") or hasattr(self.solver, "method")):
            raise TypeError(f"solver must be GMRES(), Neumann() or a forward solver, got {type(self.solver).__name__}")

    def attach(self, problem: Problem, solution: Solution) -> Tensor:
        at = _Linearised.of(problem, solution)
        if at is None:
            return solution.z
        backward = _Backward(self, at, weakref.ref(solution))
        attached = _ImplicitFunction.apply(at.f, at.z.detach(), backward)
        return at.good.put(attached, solution.z)


@dataclass(frozen=True)
class Phantom:
    """Approximate gradients: those of z ← τ f(z) + (1 − τ) z, `steps` times from z* (Geng et al. 2021).

    damping is τ. steps=1, damping=1 is the one-step gradient, u = g; as steps grow it tends to the implicit gradient
    when J contracts. Costs `steps` evaluations of fn with their graphs.
    """

    steps: int = 1
    damping: float = 1.0

    def __post_init__(self) -> None:
        check_count("steps", self.steps, least=1)
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must be in (0, 1], got {self.damping}")

    def attach(self, problem: Problem, solution: Solution) -> Tensor:
        return self.attach_at(problem, solution.residual.isfinite(), solution.z)

    def attach_at(self, problem: Problem, finite: Tensor, z: Tensor) -> Tensor:
        """z (B, T, D), any iterate, with the graph of the steps from it, for the samples that are `finite` (B,)."""
        if not torch.is_grad_enabled():
            return z
        good = Good.of(problem, finite)
        start = good.take(z).detach()
        moved = start
        for _ in range(self.steps):
            moved = self.damping * evaluate(problem, moved, good.inputs) + (1 - self.damping) * moved
        if not moved.requires_grad and forward_ad.unpack_dual(moved).tangent is None:
            return z
        # The value stays that of z, whose residual was measured.
        return good.put(_Replace.apply(moved, start), z)


@dataclass(frozen=True)
class Unrolled:
    """Differentiates through every step of the solver; memory and time grow with the steps.

    Runs in PyTorch, not in the native step. z0 takes part in the graph.
    """

    def attach(self, problem: Problem, solution: Solution) -> Tensor:
        raise NotImplementedError("Unrolled is carried out by solve itself")


def evaluate(problem: Problem, z: Tensor, inputs: list[Tensor]) -> Tensor:
    """f at flat z (n, T, D), with gradients as the current mode says."""
    layout: Layout = problem.layout
    wanted = torch.ones(z.shape[:2], dtype=torch.bool, device=z.device) if problem.by_front else None
    return layout.pack(call(problem, layout.unpack(z), inputs, wanted), "the value of fn")


@dataclass(eq=False)
class Good:
    """The samples that a gradient passes through: those with a finite residual.

    A bad sample must stay out of the graph: a cotangent of zero times its NaN would still be NaN in the parameters.
    With compaction it is left out of the batch; without, fn sees zeros in its place.
    """

    mask: Tensor  # (B,) bool
    rows: Tensor | None  # positions of the good samples, when fn is given them alone
    inputs: list[Tensor]  # of those samples

    @staticmethod
    def of(problem: Problem, good: Tensor) -> Good:
        if not problem.compact or bool(good.all()):
            return Good(good, None, list(problem.inputs))
        rows = good.nonzero()[:, 0]
        return Good(good, rows, [x[rows] for x in problem.inputs])

    def take(self, z: Tensor) -> Tensor:
        """(B, T, D) → (n, T, D), what fn is given."""
        return torch.where(self.mask[:, None, None], z, 0.0) if self.rows is None else z[self.rows]

    def mask_taken(self) -> Tensor:
        """(n,) bool: which of the taken samples are good."""
        return self.mask if self.rows is None else self.mask[self.rows]

    def put(self, part: Tensor, z: Tensor) -> Tensor:
        """(n, T, D) → (B, T, D); the bad samples keep z, without a graph."""
        if self.rows is None:
            return torch.where(self.mask[:, None, None], part, z.detach())
        return z.detach().index_copy(0, self.rows, part)


@dataclass(eq=False)
class _Linearised:
    """f with its graph at the samples `rows` of z*, and the product Jᵀu there."""

    z: Tensor  # (n, T, D), a leaf
    f: Tensor  # (n, T, D)
    good: Good

    @staticmethod
    def of(problem: Problem, solution: Solution) -> _Linearised | None:
        """None when no gradient is asked for: grad mode off, or fn depends on nothing that requires one."""
        if not torch.is_grad_enabled():
            return None
        good = Good.of(problem, solution.residual.isfinite())
        z = good.take(solution.z).detach().clone().requires_grad_()
        f = evaluate(problem, z, good.inputs)
        if all(leaf is z for leaf in leaves(f)) and forward_ad.unpack_dual(f).tangent is None:
            return None
        return _Linearised(z, f, good)

    def transposed(self, u: Tensor) -> Tensor:
        """Jᵀu, (n, T, D) → (n, T, D)."""
        u = torch.where(self.good.mask_taken()[:, None, None], u, 0.0).to(self.f.dtype)
        (product,) = torch.autograd.grad(self.f, self.z, u, retain_graph=True, allow_unused=True)
        return torch.zeros_like(self.z) if product is None else product


@dataclass(eq=False)
class _Backward:
    """The adjoint solve of one forward pass."""

    gradient: Implicit
    at: _Linearised
    solution: weakref.ref[Solution]  # its z holds the graph, and so this: a strong one would be a cycle

    def __call__(self, g: Tensor) -> Tensor:
        """u (n, T, D) of u = g + Jᵀu."""
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "second derivatives through Implicit are not supported: use solver=Picard() with gradient=Unrolled()"
            )
        good = self.at.good.mask_taken()[:, None, None]
        g = torch.where(good, g, 0.0)
        u, outcome = self._solve(g)
        self._report(outcome)
        failed = outcome.status != 0
        if self.gradient.on_failure == "phantom":
            u = torch.where(failed[:, None, None], g, u)
        elif bool(failed.any()):
            message = f"the adjoint of solve did not converge: {describe_failures(outcome.status)}"
            if self.gradient.on_failure == "raise":
                raise ConvergenceError(message)
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        return torch.where(good & u.isfinite(), u, 0.0)

    def _solve(self, g: Tensor) -> tuple[Tensor, Adjoint]:
        wide = torch.float64 if g.dtype == torch.float64 else torch.float32
        solver, stop = self.gradient.solver, self._stop(g)

        def transposed(u: Tensor) -> Tensor:
            return self.at.transposed(u.reshape(g.shape)).to(wide).flatten(1)

        rhs = g.to(wide).flatten(1)
        if hasattr(solver, "solve"):
            u, outcome = solver.solve(transposed, rhs, stop)
        else:
            u, outcome = _by_fixed_point(solver, transposed, rhs, stop)
        return u.reshape(g.shape).to(g.dtype), outcome

    def _stop(self, g: Tensor) -> Stop:
        """The user's, for the samples at hand, and no tighter than Jᵀu can be computed in this dtype."""
        stop, rows = self.gradient.stop, self.at.good.rows
        tolerances = [
            torch.as_tensor(t, dtype=torch.float64, device=g.device).expand(self.at.good.mask.shape[0])
            for t in (stop.rtol, stop.atol)
        ]
        rtol, atol = (t if rows is None else t[rows] for t in tolerances)
        return replace(stop, rtol=rtol.clamp_min(4 * torch.finfo(g.dtype).eps), atol=atol)

    def _report(self, outcome: Adjoint) -> None:
        solution, rows = self.solution(), self.at.good.rows
        if solution is None:
            return
        if rows is None:
            solution.adjoint = outcome
            return
        none = torch.zeros_like(solution.evaluations)
        full = Adjoint(solution.status.clone(), solution.residual.clone(), none)
        for name in ("status", "residual", "evaluations"):
            getattr(full, name)[rows] = getattr(outcome, name)
        solution.adjoint = full


def _by_fixed_point(solver: Solver, A: Callable[[Tensor], Tensor], g: Tensor, stop: Stop) -> tuple[Tensor, Adjoint]:
    """u = g + A u by a forward solver, each sample scaled by its ‖g‖."""
    norm, goal = relative_goal(g, stop)
    scale = norm.to(g.dtype)
    rhs = (g / scale[:, None])[:, None]
    layout = Layout.of(rhs, by_blocks=True)
    problem = Problem(lambda u: A(u[:, 0])[:, None] + rhs, (), layout, compact=False)
    l2 = Stop(0.0, goal, stop.max_steps, "l2", stop.check_every)  # relative to ‖g‖, which is 1 here
    solved = iterate(problem, rhs, solver=solver, stop=l2)
    return solved.z[:, 0] * scale[:, None], Adjoint(solved.status, solved.residual, solved.evaluations)


class _ImplicitFunction(torch.autograd.Function):
    """Returns z* and, backward, hands u to f, whose own graph leads on."""

    @staticmethod
    def forward(ctx: Any, f: Tensor, z: Tensor, backward: _Backward) -> Tensor:
        ctx.solve = backward
        return z.detach().clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.solve(grads[0]), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError("forward mode through Implicit is not supported: use gradient=Unrolled()")


class _Replace(torch.autograd.Function):
    """Value of `value`, gradient of `x`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.detach().clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return tangents[0]
