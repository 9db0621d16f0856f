"""What a kept history and a line search are worth: evaluations of drifting maps, and starts that are solved.

python benchmarks/warm_start_and_search.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import problems

from pydeqsolve import Anderson, Broyden, Solution, Stop, solve

f64 = torch.float64
MAPS, SAMPLES, WIDTH = 20, 16, 64


def drifting(solver: Any, drift: float, warm: Callable[[Solution], Any] | None) -> float:
    """Mean evaluations per sample of tanh(W z + .3 x), W and x changing by `drift` from map to map."""
    W = problems.with_spectrum(torch.linspace(-0.95, 0.97, WIDTH, dtype=f64), 3)
    x = torch.randn(SAMPLES, WIDTH, dtype=f64, generator=problems.generator(1))
    dx = torch.randn(MAPS, SAMPLES, WIDTH, dtype=f64, generator=problems.generator(2))
    dW = 0.3 * torch.randn(MAPS, WIDTH, WIDTH, dtype=f64, generator=problems.generator(4)) / WIDTH**0.5
    last, total = None, 0.0
    for t in range(MAPS):
        x, A = x + drift * dx[t], W + drift * dW[t]
        z0 = torch.zeros_like(x) if last is None or warm is None else warm(last)

        def fn(z: Tensor, x: Tensor, A: Tensor = A) -> Tensor:
            return torch.tanh(z @ A.T + 0.3 * x)

        last = solve(fn, z0, (x,), solver=solver, stop=Stop(rtol=1e-6, max_steps=300), gradient=None, keep_history=True)
        total += float(last.evaluations.double().mean()) if t else 0.0
    return total / (MAPS - 1)


def starts(name: str) -> problems.Map:
    """200 samples of one map from random starts."""
    g = problems.generator(0)
    b, z0 = (torch.randn(200, 6, dtype=f64, generator=g) for _ in range(2))
    W = torch.randn(200, 6, 6, dtype=f64, generator=g) / 6**0.5
    if name == "tanh, gain 2":
        return problems.Map(lambda z, W, b: torch.tanh(2 * (W @ z[..., None])[..., 0] + b), z0, None, (W, b))
    return problems.Map(lambda z, W, b: b - z**3 - 0.3 * (W @ z[..., None])[..., 0], z0, None, (W, b))


def compare(name: str, problem: problems.Map, stop: Stop) -> None:
    """Prints how many samples converge, and in how many evaluations on average: without and with a line search."""
    found = [solve(problem.fn, problem.start, solver=Broyden(line_search=k), stop=stop, gradient=None) for k in (0, 8)]
    counts = [f"{int(s.converged.sum())} in {float(s.evaluations.double().mean()):.0f}" for s in found]
    print(f"  {name:<32}{counts[0]:>16}{counts[1]:>16}")


def main() -> None:
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}; evaluations per sample to 1e-6: cold, from the last z, from its history as well")
    for drift in (1e-1, 1e-2, 1e-3):
        for solver in (Anderson(5), Anderson(10), Broyden(10), Broyden(30)):
            counts = [drifting(solver, drift, warm) for warm in (None, lambda s: s.z, lambda s: s)]
            label = f"{type(solver).__name__}({solver.memory})"
            print(f"  drift {drift:g}  {label:<12}" + "".join(f"{c:>8.1f}" for c in counts))
    print("starts solved of 200 to ‖r‖ ≤ 1e-8 in 200 evaluations: no search, line_search=8, and safeguard=1.2 with it")
    stop = Stop(rtol=0.0, atol=1e-8, norm="l2", max_steps=200)
    for name in ("monotone cubic", "tanh, gain 2"):
        problem = starts(name)
        for kind in ("good", "bad"):
            found = [
                solve(problem.fn, problem.start, problem.inputs, stop=stop, gradient=None,
                      solver=Broyden(kind=kind, line_search=k, safeguard=growth))
                for k, growth in ((0, 10.0), (8, 10.0), (8, 1.2))
            ]  # fmt: skip
            print(f"  {name:<16}Broyden {kind:<6}" + "".join(f"{int(s.converged.sum()):>6}" for s in found))
    print("converged, in evaluations on average: without a search, with line_search=8")
    compare("Poisson mixture, 500 starts", problems.poisson_mixture(500), Stop(rtol=1e-7, max_steps=3000))
    for destruction in (1e-2, 3e-3, 1e-4, 1e-6):
        stop = Stop(rtol=0.0, atol=1e-8, norm="l2", max_steps=5000)
        compare(f"scattering, ε = {destruction:g}", problems.scattering(destruction), stop)


if __name__ == "__main__":
    main()
