"""pydeqsolve beside TorchDEQ, SciPy, cvxgrp/aa and KINSOL on the solver problems of the tests: evaluations, residuals.

    pip install torchdeq==0.1.0 anderson-acceleration==0.0.3; apt-get install libsundials-dev
    python benchmarks/solver_peers.py [--json FILE]

Every solver gets the same map, start and goal ‖f(z) − z‖₂. An evaluation is counted where it happens, inside the map;
"to goal" is the call at which the residual first met the goal, "-" if it never did. Peers run with their own defaults
but for memory, tolerance and budget; cvxgrp/aa also begins at once (min_len=1) and, as type I, with the ridge its
README names. A peer that is not installed is said to be missing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import problems
from kinsol import Kinsol

from pydeqsolve import Anderson, Broyden, Implicit, Picard, Status, Stop, build_info, solve

f64 = torch.float64


def peer(name: str) -> Any:
    """The module, or None when it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


torchdeq, scipy_optimize, aa = peer("torchdeq"), peer("scipy.optimize"), peer("aa")
PACKAGES = ((torchdeq, "torchdeq==0.1.0"), (scipy_optimize, "scipy"), (aa, "anderson-acceleration==0.0.3"))
try:
    sundials: Kinsol | None = Kinsol()
except OSError:
    sundials = None


@dataclass(frozen=True)
class Row:
    problem: str
    goal: float
    solver: str
    to_goal: int | None  # evaluations until the residual first met the goal
    total: int
    least: float | None  # ‖r‖ of the best evaluation
    status: str


@dataclass
class Counted:
    """A map of one sample that keeps the residual of every evaluation."""

    problem: problems.Map
    residuals: list[float] = field(default_factory=list)

    def __call__(self, z: Tensor, *inputs: Tensor) -> Tensor:
        f = self.problem.fn(z, *(inputs or self.problem.inputs))
        self.residuals.append(float((f - z).detach().double().norm()))
        return f

    def of_array(self, z: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """fn(z) of z (D,), both arrays of NumPy."""
        return self(torch.from_numpy(z)[None])[0].numpy()

    @property
    def start(self) -> np.ndarray[Any, Any]:
        """(D,)"""
        return self.problem.start[0].double().numpy().copy()

    def row(self, problem: str, solver: str, goal: float, status: str) -> Row:
        first = next((k + 1 for k, r in enumerate(self.residuals) if r <= goal), None)
        least = min((r for r in self.residuals if np.isfinite(r)), default=None)
        return Row(problem, goal, solver, first, len(self.residuals), least, status)


def ours(solver: Any) -> Callable[[Counted, float, int], str]:
    def run(fn: Counted, goal: float, budget: int) -> str:
        stop = Stop(rtol=0.0, atol=goal, norm="l2", max_steps=budget)
        solution = solve(fn, fn.problem.start, fn.problem.inputs, solver=solver, stop=stop, gradient=None)
        return Status(int(solution.status)).name

    return run


def of_torchdeq(name: str, **options: Any) -> Callable[[Counted, float, int], str]:
    def run(fn: Counted, goal: float, budget: int) -> str:
        module = importlib.import_module(f"torchdeq.solver.{name}")
        with torch.no_grad():
            getattr(module, f"{name}_solver")(fn, fn.problem.start, max_iter=budget, tol=goal, **options)
        return "returned"

    return run


def of_scipy(name: str, **options: Any) -> Callable[[Counted, float, int], str]:
    def run(fn: Counted, goal: float, budget: int) -> str:
        def residual(z: Any) -> Any:
            if len(fn.residuals) >= budget:
                raise RuntimeError("budget spent")
            return fn.of_array(z) - z

        method = getattr(scipy_optimize, name)
        method(residual, fn.start, f_tol=goal, maxiter=budget, tol_norm=lambda r: float((r**2).sum() ** 0.5), **options)
        return "returned"

    return run


def of_aa(memory: int, **options: Any) -> Callable[[Counted, float, int], str]:
    def run(fn: Counted, goal: float, budget: int) -> str:
        z = fn.start
        accelerator = aa.AndersonAccelerator(z.size, min(memory, z.size), min_len=1, **options)
        for step in range(budget):
            before = z.copy()
            z = fn.of_array(before).copy()
            if not np.isfinite(z).all() or fn.residuals[-1] <= goal:
                break
            if step:
                accelerator.safeguard(z, before)
            accelerator.apply(z, before)
        counts = accelerator.stats
        return f"{sum(counts[c] for c in counts if 'reject' in c)} rejections"

    return run


def of_kinsol(memory: int) -> Callable[[Counted, float, int], str]:
    def run(fn: Counted, goal: float, budget: int) -> str:
        assert sundials is not None
        return sundials.solve(fn.of_array, fn.start, memory, goal, budget)

    return run


def attempt(run: Callable[[Counted, float, int], str], fn: Counted, goal: float, budget: int) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return run(fn, goal, budget)
    except Exception as error:  # a peer's failure is a result
        return f"{type(error).__name__}: {str(error).splitlines()[0][:50] if str(error) else ''}"


def table() -> list[tuple[str, problems.Map, int, float, int]]:
    """(name, map, memory, goal, budget)."""
    sweep = problems.spectrum_sweep()
    A, b = sweep.inputs

    def scaled(s: float) -> problems.Map:
        return problems.Map(sweep.fn, sweep.start, None, (A, b * s))

    broyden = problems.spectrum_sweep(256)
    return [
        ("KINSOL analytic", problems.kinsol_analytic(), 2, 1.5e-6, 60),
        ("KINSOL Roberts", problems.roberts(), 2, 1e-10, 60),
        ("jaxopt geometric", problems.geometric(), 5, 1e-6, 10_000),
        ("jaxopt rotation, m=10", problems.rotation(), 10, 1e-4, 500),
        ("jaxopt rotation, m=14", problems.rotation(), 14, 1e-4, 500),
        *[(f"spectrum [-.5, .97], scale {s:g}", scaled(s), 5, 1e-6 * s, 1000) for s in (1e-4, 1.0, 1e4)],
        ("ill conditioned, n=40", problems.ill_conditioned(), 10, 1e-8, 2000),
        ("rank deficient, n=50", problems.rank_deficient(), 15, 1e-9, 500),
        ("linear, D=256, m=10", broyden, 10, 1e-8 * float(broyden.solution.norm()), 1000),
        ("Chandrasekhar H, c=.99", problems.chandrasekhar(0.99), 5, 1e-10, 200),
        ("discrete integral", problems.discrete_integral(), 5, 1e-12, 200),
        ("nonlinear heat", problems.nonlinear_heat(step=2e-3), 5, 1e-10, 200),
        ("EM means", problems.em_means()[0], 5, 1e-10, 500),
    ]


def contenders(memory: int) -> dict[str, Callable[[Counted, float, int], str]]:
    """Every solver that is here, at this memory."""
    found: dict[str, Any] = {
        f"pydeqsolve Anderson({memory})": ours(Anderson(memory)),
        f"pydeqsolve Anderson({memory}, I)": ours(Anderson(memory, kind="I")),
        f"pydeqsolve Broyden({memory})": ours(Broyden(memory)),
        "pydeqsolve Picard": ours(Picard()),
        # Their m counts stored values, one more than differences.
        f"TorchDEQ anderson(m={memory + 1})": of_torchdeq("anderson", m=memory + 1) if torchdeq else None,
        f"TorchDEQ broyden(LBFGS_thres={memory})": of_torchdeq("broyden", LBFGS_thres=memory) if torchdeq else None,
        f"SciPy anderson(M={memory})": of_scipy("anderson", M=memory) if scipy_optimize else None,
        "SciPy broyden1": of_scipy("broyden1") if scipy_optimize else None,
        "SciPy broyden2": of_scipy("broyden2") if scipy_optimize else None,
        f"cvxgrp/aa({memory})": of_aa(memory, type1=False) if aa else None,
        f"cvxgrp/aa({memory}, I)": of_aa(memory, type1=True, regularization=1e-8) if aa else None,
        f"KINSOL anderson({memory})": of_kinsol(memory) if sundials else None,
        "KINSOL Picard": of_kinsol(0) if sundials else None,
    }
    return {label: run for label, run in found.items() if run is not None}


def compare() -> list[Row]:
    rows = []
    print(f"{'problem / solver':<42}{'to goal':>8}{'total':>8}{'least ‖r‖':>12}  status")
    for name, problem, memory, goal, budget in table():
        print(f"{name}, goal {goal:.1e}")
        for label, run in contenders(memory).items():
            fn = Counted(problem)
            row = fn.row(name, label, goal, attempt(run, fn, goal, budget))
            first = "-" if row.to_goal is None else row.to_goal
            least = float("nan") if row.least is None else row.least
            print(f"  {label:<40}{first:>8}{row.total:>8}{least:>12.1e}  {row.status}", flush=True)
            rows.append(row)
    return rows


def compare_batches() -> None:
    """64 samples of contraction .3 … .97: rows passed to fn, over the evaluations that pydeqsolve counts."""
    problem, rows, tolerance = problems.mixed_batch(), [], 1e-3

    def fn(z: Tensor, rate: Tensor, b: Tensor) -> Tensor:
        rows.append(len(z))
        return problem.fn(z, rate, b)

    stop = Stop(rtol=0.0, atol=tolerance, norm="l2", max_steps=500)
    solution = solve(fn, problem.start, problem.inputs, stop=stop, gradient=None)
    needed = int(solution.evaluations.sum())
    print(f"mixed batch of 64: pydeqsolve passes {sum(rows)} rows for {needed} evaluations, {sum(rows) / needed:.2f} ×")
    if torchdeq:
        module = importlib.import_module("torchdeq.solver.anderson")
        rows.clear()
        info = module.anderson_solver(lambda z: fn(z, *problem.inputs), problem.start, max_iter=500, tol=tolerance)[2]
        ratio, worst = sum(rows) / needed, float(info["abs_lowest"].max())
        print(
            f"  TorchDEQ anderson passes {sum(rows)} rows, {ratio:.2f} × what pydeqsolve needs; worst ‖r‖ {worst:.1e}"
        )


def compare_adjoints() -> None:
    """dL/dW of a tanh layer, ρ = .95, D = 256, mean-square loss, against dense linear algebra."""
    print("relative error of dL/dW through a tanh layer, ρ = .95")
    for scale in (1.0, 1e-8, 1e8):
        problem, W = problems.tanh_layer()
        (x,) = problem.inputs
        z = solve(problem.fn, problem.start, (x,), stop=Stop(rtol=1e-13, max_steps=2000), gradient=Implicit()).z
        g = scale * 2 * z.detach() / z.numel()
        S = 1 - z.detach() ** 2
        u = torch.stack(
            [
                torch.linalg.solve((torch.eye(256, dtype=f64) - s[:, None] * W.detach()).T, r)
                for s, r in zip(S, g, strict=True)
            ]
        )
        truth = (S * u).T @ z.detach()
        (found,) = torch.autograd.grad(scale * z.square().mean(), W)
        line = f"  loss × {scale:g}: pydeqsolve {float((found - truth).norm() / truth.norm()):.1e}"
        if torchdeq:
            deq = torchdeq.get_deq(ift=True, f_solver="anderson", b_solver="anderson", f_max_iter=200, f_tol=1e-12)
            z = deq(lambda z, fn=problem.fn, x=x: fn(z, x), problem.start)[0][-1]
            (found,) = torch.autograd.grad(scale * z.square().mean(), W)
            line += f", TorchDEQ with its Anderson adjoint {float((found - truth).norm() / truth.norm()):.1e}"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the evaluations there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    version = importlib.import_module("importlib.metadata").version
    print(f"pydeqsolve {build_info()}; float64, one thread")
    for module, package in PACKAGES:
        name = package.partition("=")[0]
        print(f"{name} {version(name)}" if module else f"{name} is missing: pip install {package}")
    print(f"KINSOL {sundials.version}\n" if sundials else "KINSOL is missing: apt-get install libsundials-dev\n")
    rows = compare()
    if args.json:
        present = {
            package.partition("=")[0]: version(package.partition("=")[0]) for module, package in PACKAGES if module
        }
        about = {
            "pydeqsolve": version("pydeqsolve"),
            "torch": torch.__version__,
            "machine": platform.machine(),
            **present,
        }
        about |= {"KINSOL": sundials.version} if sundials else {}
        args.json.write_text(json.dumps({"about": about, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    print()
    compare_batches()
    print()
    compare_adjoints()


if __name__ == "__main__":
    main()
