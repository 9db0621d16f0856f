"""The adjoint solve u = g + Jᵀu: its scaling, its tolerance, and the status of what is returned."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..layout import Layout
from ..loop.iterate import iterate
from ..problem import Problem, Solver
from ..shards import WHOLE, Whole
from ..solution import Adjoint, ConvergenceError, Recorder, Status
from ..status import describe_adjoint
from ..stop import Stop
from .arnoldi import Arnoldi
from .gmres import GMRES, Known, in_pytorch, is_direct, rest
from .linear import Products, System, blurred
from .linearise import Good
from .neumann import Neumann, series
from .scaled import ByOther
from .small import Rest, Small

LOOSEST = 0.1  # of the tolerance that follows the forward solve: at 1, u = 0 would do
FINEST = 1e-6  # of the same, where the forward solve has none
ROUNDING = 2.0  # units of rounding of u within which a residual is as small as it gets


@dataclass(frozen=True, eq=False)
class AdjointSolve:
    """How u = g + Aᵀ u is solved, and where the outcome is left; settings as in `Implicit`.

    follows: the tolerance was left to the library, which asks for no more than the precision allows. eps: that of the
    products, which may be computed in less than the dtype of g. shards: who holds which entries of g and u.
    """

    solver: Any
    stop: Stop
    follows: bool
    on_failure: str
    recorder: Recorder
    eps: float
    shards: Whole = WHOLE

    def computing_in(self, eps: float) -> AdjointSolve:
        """The same, of products with machine epsilon `eps` or less precision."""
        if eps <= self.eps:
            return self
        return AdjointSolve(self.solver, self.stop, self.follows, self.on_failure, self.recorder, eps, self.shards)

    def __call__(self, products: Callable[[Tensor], Tensor], g: Tensor, good: Good) -> Tensor:
        """u (n, T, D) of u = g + products(u), zero for the samples that are not `good`.

        A sample whose g or u is not finite has a u that is not: what reads gradients for overflow must see it.
        """
        mask, found = good.mask_taken(), self._natively(products, g, good)
        u, outcome, failures = found or (*self._solve(products, torch.where(mask[:, None, None], g, 0.0), good), None)
        self.recorder.note(_of_all(outcome, good))
        if failures == 0:
            return u
        failed = mask & (outcome.status != 0)
        if self.on_failure == "phantom":
            u = torch.where(failed[:, None, None], g, u)
        elif bool(failed.any()):
            message = f"the adjoint of solve did not converge: {describe_adjoint(outcome.status[mask], self.solver)}"
            if self.on_failure == "raise":
                raise ConvergenceError(message)
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        return torch.where(mask[:, None, None], u, 0.0)

    def _natively(
        self, products: Callable[[Tensor], Tensor], g: Tensor, good: Good
    ) -> tuple[Tensor, Adjoint, int] | None:
        """`_solve` by native passes, with the number of good samples that failed; None where they do not serve."""
        solver = self.solver
        other = isinstance(solver, Neumann) or not hasattr(solver, "solve")
        if self.shards.many or not (self.stop.max_steps if other else isinstance(solver, GMRES)):
            return None
        wide = g.to(torch.promote_types(g.dtype, torch.float32)).contiguous()
        wide = wide.view(getattr(products, "shape", g.shape))  # that in which they take no views
        stop = self.stop
        if good.rows is not None or isinstance(stop.rtol, Tensor) or isinstance(stop.atol, Tensor):
            stop = self._stop(good, g.device)
        eps, mask = max(self.eps, torch.finfo(g.dtype).eps), None if good.whole else good.mask_taken()
        judged = (True, self.follows, eps)
        solve: ByOther | Arnoldi | None
        if other:
            solve = ByOther.of(products, wide)
            if solve is None:
                return None
            u = solve.delivered(solve.run(solver, stop, mask, eps), g.dtype).view(g.shape)
            return _with_lost(u, *solve.outcome(*judged))
        if is_direct(solver, wide, stop):
            small = Small.of(products, wide, stop, mask, eps)
            if small is None:
                return None
            u, outcome, failures = small.run(g.dtype, judged, self._left(g, stop))
            return u.view(g.shape), outcome, failures
        solve = Arnoldi.of(products, wide, solver.restart)
        if solve is None:
            return None
        solve.run(stop, mask, eps)
        u = solve.deliver(g.dtype).view(g.shape)
        return _with_lost(u, *solve.outcome(*judged))

    def _left(self, g: Tensor, stop: Stop) -> Rest:
        """`_solve` for the rows that `Small` leaves."""

        def solve(rows: Tensor, matrix: Tensor, products: Products) -> tuple[Tensor, Adjoint]:
            how = replace(self, solver=Known(self.solver, matrix), stop=rest(stop, g, rows))
            return how._solve(products, g[rows], Good(torch.ones_like(rows, dtype=torch.bool), None, [], True))

        return solve

    def _solve(self, products: Callable[[Tensor], Tensor], g: Tensor, good: Good) -> tuple[Tensor, Adjoint]:
        wide = torch.float64 if g.dtype == torch.float64 else torch.float32
        finite = self.shards.everywhere(g.isfinite().flatten(1).all(1))
        rhs = torch.where(finite[:, None, None], g, 0.0).to(wide).flatten(1)

        def product(u: Tensor) -> Tensor:
            found = self.shards.attempt(lambda: products(u.reshape(g.shape)), lambda: torch.zeros_like(g))
            return found.to(wide).flatten(1)

        system = System.of(product, rhs, self._stop(good, g.device), self.shards)
        eps = max(self.eps, torch.finfo(g.dtype).eps)
        pursued = replace(self.stop, rtol=0.0, atol=torch.maximum(system.goal, eps * system.norm), norm="l2")
        u, outcome = self._method(eps)(product, system.rhs, pursued)
        lost = ~finite | ~(outcome.residual < torch.inf)
        raised, size, again = system.deliver(u, outcome.residual * system.norm, g.dtype)
        status, residual = self._judge(system, u, outcome.status, size, eps)
        lost = lost | (status == int(Status.NONFINITE)) & ~(residual < torch.inf)
        status = torch.where(lost, int(Status.NONFINITE), status)
        residual = torch.where(lost, torch.inf, residual)
        raised = torch.where((lost & raised.isfinite().all(1))[:, None], torch.nan, raised)
        return raised.reshape(g.shape), Adjoint(status, residual, outcome.evaluations + again)

    def _method(self, eps: float) -> Callable[[Products, Tensor, Stop], tuple[Tensor, Adjoint]]:
        """The solver for g (n, N) of ‖g‖ about 1 and an absolute tolerance; eps: of the products."""
        solver, shards = self.solver, self.shards
        if shards.many and isinstance(solver, GMRES):
            return lambda A, g, stop: in_pytorch(solver, A, g, stop, shards=shards)
        if shards.many and isinstance(solver, Neumann):
            return lambda A, g, stop: series(solver, A, g, stop, shards)
        return getattr(solver, "solve", None) or _by_fixed_point(solver, shards, eps)

    def _judge(self, system: System, u: Tensor, status: Tensor, size: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Status and relative residual (n,) of u (n, N), whose residual was measured to be `size` (n,)."""
        floor = blurred(torch.zeros_like(size), u, eps, self.shards)
        size, goal = torch.maximum(size, floor), system.goal
        if self.follows:
            # No finer than rounding, but half of the digits are the least that deserve the name.
            allowed = ROUNDING * torch.maximum(floor, eps * system.norm)
            goal = torch.maximum(goal, torch.minimum(allowed, eps**0.5 * system.norm))
        met = size <= goal
        hopeless = ~met & ((floor > goal) | (status == int(Status.CONVERGED)))
        hopeless &= (status == int(Status.CONVERGED)) | (status == int(Status.MAX_STEPS))
        status = torch.where(hopeless, int(Status.STALLED), status)
        status = torch.where(met, int(Status.CONVERGED), status)
        status = torch.where(size < torch.inf, status, int(Status.NONFINITE))
        return status, size / system.norm

    def _stop(self, good: Good, device: torch.device) -> Stop:
        """The tolerances of the samples that are solved for."""
        tolerances = [
            torch.as_tensor(t, dtype=torch.float64, device=device).expand(good.mask.shape[0])
            for t in (self.stop.rtol, self.stop.atol)
        ]
        rtol, atol = (t if good.rows is None else t[good.rows] for t in tolerances)
        return replace(self.stop, rtol=rtol, atol=atol)


def following(stop: Stop) -> Stop:
    """The adjoint's tolerance when none is given: the forward's rtol per sample, 1e-6 where that is 0.

    At most .1; with a tolerance per block the smallest of a sample. As many products as the forward has steps, but no
    fewer than 100.
    """
    rtol: float | Tensor
    if isinstance(stop.rtol, Tensor):
        rtol = stop.rtol.double()
        rtol = rtol.amin(1) if rtol.dim() == 2 else rtol
        rtol = torch.where(rtol > 0, rtol, FINEST).clamp_max(LOOSEST)
    else:  # no tensor: the compiler would stop at reading it
        rtol = min(float(stop.rtol) or FINEST, LOOSEST)
    return Stop(rtol, max_steps=max(Stop.max_steps, stop.max_steps))


def worst(outcomes: list[Adjoint]) -> Adjoint:
    """The outcome of several solves for the same samples: failed where one has, the largest residual, all products."""
    status, residual, evaluations = (
        torch.stack([getattr(outcome, name) for outcome in outcomes]) for name in ("status", "residual", "evaluations")
    )
    return Adjoint(status.amax(0), residual.amax(0), evaluations.sum(0))


def _with_lost(u: Tensor, outcome: Adjoint, failures: int) -> tuple[Tensor, Adjoint, int]:
    """The three, u (n, T, D) NaN for samples whose residual is infinite."""
    if failures:
        lost = (outcome.residual == torch.inf) & u.isfinite().flatten(1).all(1)
        u = torch.where(lost[:, None, None], torch.nan, u)
    return u, outcome, failures


def _of_all(outcome: Adjoint, good: Good) -> Adjoint:
    """The outcome (n,) spread over all samples (B,); those left out are NONFINITE."""
    if good.whole:
        return outcome
    if good.rows is None:
        status = torch.where(good.mask, outcome.status, int(Status.NONFINITE))
        return Adjoint(status, torch.where(good.mask, outcome.residual, torch.inf), outcome.evaluations)
    B = good.mask.shape[0]
    full = Adjoint(
        outcome.status.new_full((B,), int(Status.NONFINITE)), outcome.residual.new_full((B,), torch.inf),
        outcome.evaluations.new_zeros(B),
    )  # fmt: skip
    for name in ("status", "residual", "evaluations"):
        getattr(full, name)[good.rows] = getattr(outcome, name)
    return full


def _by_fixed_point(
    solver: Solver, shards: Whole, eps: float
) -> Callable[[Products, Tensor, Stop], tuple[Tensor, Adjoint]]:
    """u = g + A u by a forward solver, as an adjoint solver for g (n, N) of ‖g‖ about 1 and an absolute tolerance."""
    split = shards if shards.many else None

    def solve(A: Products, g: Tensor, stop: Stop) -> tuple[Tensor, Adjoint]:
        rhs = g[:, None]
        layout = Layout.of(rhs, by_blocks=True)
        problem = Problem(lambda u: A(u[:, 0])[:, None] + rhs, (), layout, compact=False, split=split, eps=eps)
        solved = iterate(problem, rhs, solver=solver, stop=stop)
        norm = shards.lengths(g)
        residual = solved.residual / torch.where(norm > 0, norm, 1.0)
        none = solved.evaluations == 0  # a budget of no products: u = 0, whose residual is g
        u = torch.where(none[:, None], 0.0, solved.z[:, 0])
        return u, Adjoint(solved.status, torch.where(none, 1.0, residual), solved.evaluations)

    return solve
