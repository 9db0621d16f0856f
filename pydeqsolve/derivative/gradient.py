"""How derivatives pass through a solution: implicit, phantom or unrolled.

J = ∂f/∂z at z*, g the cotangent of z*. The implicit function theorem gives dz* = (I − J)⁻¹ ∂f/∂θ dθ, hence the
cotangent u = (I − Jᵀ)⁻¹ g for f, which autograd then carries on to θ: parameters, inputs, whatever fn closes over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..checks import check_real, keep_count
from ..loop.iterate import Outcome
from ..problem import Problem
from ..solution import Recorder
from ..stop import Stop
from .adjoint import AdjointSolve, following
from .gmres import GMRES
from .implicit import attach
from .linearise import DEPENDS, Good, Replace, evaluate, is_wanted, of_finite
from .neumann import Neumann
from .unroll import unroll


class Gradient(Protocol):
    """A way to differentiate a solution."""

    def attach(self, problem: Problem, start: Tensor, outcome: Outcome, recorder: Recorder) -> Tensor:
        """`outcome.z` (B, T, D) with a graph behind it; the value stays the same, bit for bit.

        start (B, T, D): the first guess. recorder: where a backward pass leaves how its adjoint solve went.
        """
        ...


@dataclass(frozen=True)
class Implicit:
    """Exact gradients by the implicit function theorem: u = g + Jᵀ u is solved in the backward pass.

    solver: a Krylov method (`GMRES`), a Neumann series of bounded cost (`Neumann`) or any forward solver. stop: the
    adjoint's tolerance, relative to ‖g‖ per sample, so that a scaled loss gives the scaled gradient. None: the
    forward's rtol per sample (at most .1, and 1e-6 where it is 0), but no less than the rounding of u, eps ‖u‖/‖g‖ up
    to sqrt(eps), eps that of the precision fn computes in, autocast and casts included; as many products as the forward
    may take steps, and at least 100. on_failure: what happens when a sample's adjoint does not converge: "warn" (a
    RuntimeWarning, the best u is used), "raise" (ConvergenceError) or "phantom" (that sample uses u = g).

    The outcome is left in `Solution.adjoint`: its residual is that of the u that is returned, after the cast to its
    dtype, and known to no less than eps ‖u‖; a sample for which that exceeds a given tolerance is STALLED, as for a
    singular I − J. A cotangent, slope or adjoint that is not finite makes the gradient of its sample, and of what
    samples share, not finite. Costs one more evaluation of fn in the forward pass, not counted in
    `Solution.evaluations`, and keeps its graph, whatever the solve took. Where few samples of a large batch go on, and
    `compact` allows it, fn is evaluated for these alone in the backward pass, for products that cost less: counters and
    running statistics of fn see it.

    Second derivatives (`create_graph=True`) are right: they cost two more evaluations of fn, a solve for u's own
    derivative and an adjoint solve. fn is then evaluated in the backward pass, and a RuntimeError says when it has
    become another map (new dropout masks, a functional_call that has ended). Tensors that fn closes
    over and that are no leaves are found by one more evaluation, in the forward pass; NotImplementedError says when
    compiled code hides them. Forward mode by dual numbers
    (`torch.autograd.forward_ad`) solves v = ḟ + J v. Third derivatives, and forward mode mixed with reverse mode, raise
    NotImplementedError; inside transforms of torch.func they are right.
    """

    solver: Any = field(default_factory=GMRES)
    stop: Stop | None = None
    on_failure: str = "warn"

    def __post_init__(self) -> None:
        if self.on_failure not in ("warn", "raise", "phantom"):
            raise ValueError(f'on_failure must be "warn", "raise" or "phantom", got {self.on_failure!r}')
        if self.stop is not None and not isinstance(self.stop, Stop):
            raise TypeError(f"stop must be a Stop or None, got {type(self.stop).__name__}")
        of_a_kind = hasattr(self.solver, "solve") or hasattr(self.solver, "method")
        if isinstance(self.solver, type) or not of_a_kind:
            raise TypeError(f"solver must be GMRES(), Neumann() or a forward solver, got {type(self.solver).__name__}")

    def attach(self, problem: Problem, start: Tensor, outcome: Outcome, recorder: Recorder) -> Tensor:
        if problem.shards.many and hasattr(self.solver, "solve") and not isinstance(self.solver, (GMRES, Neumann)):
            name = type(self.solver).__name__
            raise NotImplementedError(f"group: {name} knows of one process: use GMRES, Neumann or a forward solver")
        chosen = following(outcome.stop) if self.stop is None else self.stop
        how = AdjointSolve(self.solver, chosen, self.stop is None, self.on_failure, recorder, 0.0, problem.shards)
        return attach(how, problem, outcome.finite, outcome.z)


@dataclass(frozen=True)
class Phantom:
    """Approximate gradients: those of z ← τ f(z) + (1 − τ) z, `steps` times from z* (Geng et al. 2021).

    damping is τ. steps=1, damping=1 is the one-step gradient, u = g; as steps grow it tends to the implicit gradient
    when J contracts. Costs `steps` evaluations of fn with their graphs.
    """

    steps: int = 1
    damping: float = 1.0

    def __post_init__(self) -> None:
        keep_count(self, "steps", least=1)
        check_real("damping", self.damping)
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must be in (0, 1], got {self.damping}")

    def attach(self, problem: Problem, start: Tensor, outcome: Outcome, recorder: Recorder) -> Tensor:
        z, finite = outcome.z, outcome.finite
        if not is_wanted():
            return z

        def steps(good: Good) -> Tensor:
            return stepped(self, lambda z: evaluate(problem, z, good.inputs), good.take(z).detach())

        good, moved = of_finite(problem, finite, steps)
        good.tell_lost(moved)
        moves = moved.requires_grad or forward_ad.unpack_dual(moved).tangent is not None
        problem.shards.check_alike(moves, DEPENDS)
        if not moves:
            return z
        # The value stays that of z, whose residual was measured.
        return good.put(Replace.apply(moved, good.take(z).detach()), z)


def stepped(how: Phantom, f: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """z (…) after the steps of a phantom gradient."""
    for _ in range(how.steps):
        z = how.damping * f(z) + (1 - how.damping) * z
    return z


@dataclass(frozen=True)
class Unrolled:
    """Differentiates through every step of the solver; memory and time grow with the steps.

    The steps are replayed in PyTorch with their graph; z0 takes part in it. The value stays that of the solve. A sample
    whose replay ends elsewhere (steps were refused, or rounding took over) keeps its z without a graph, and a
    RuntimeWarning says so.
    """

    def attach(self, problem: Problem, start: Tensor, outcome: Outcome, recorder: Recorder) -> Tensor:
        return unroll(problem, start, outcome) if torch.is_grad_enabled() else outcome.z
