"""Performance profile of fixed-point solvers: evaluations of ours and the peers on 171 problems.

    pip install torchdeq==0.1.0 anderson-acceleration==0.0.3 scipy jax jaxopt optimistix
    apt-get install libsundials-dev
    python benchmarks/solver_profile.py run profile.json [--solvers Anderson KINSOL] [--no-jax]
    python benchmarks/solver_profile.py table profile.json [--half even] [--picture profile.png --solvers …]
    python benchmarks/solver_profile.py lost profile.json  # where a peer needs less than our best / 1.1

The counts of the last whole run: benchmarks/profile_counts.json.

Every solver gets the same map, float64, from the same start, and at most 1000 evaluations. A goal is
‖f(z) − z‖₂ ≤ goal · ‖z*‖₂ of the fixed point (of the start where z* = 0), measured by the map itself at every
evaluation, wherever the solver makes it; what counts is the number of the first evaluation that meets it. A product
with the Jacobian counts as one. Peers run with their own defaults but for tolerance and budget; cvxgrp/aa also begins
at once (min_len=1) and, as type I, with the ridge that its README names. `run` adds to a file what is not in it yet;
a peer that is not installed is left out.

Best is the fewest evaluations of all solvers that reach the goal. Problems are in an order that puts those alike next
to each other: choices were made on the odd ones, and the even ones are reported.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from profile_problems import Case, cases
from profile_solvers import CAP, OURS, Counted, Run, contenders

GOALS = (1e-3, 1e-6, 1e-9)
HALVES = {"odd": slice(0, None, 2), "even": slice(1, None, 2), "all": slice(None)}
Counts = list[list[int | None]]


def scale(case: Case) -> float:
    """‖z*‖₂, of the start where z* = 0: in closed form, by SciPy's hybr or by 20,000 plain steps."""
    if case.solution is not None:
        return float(case.solution.norm()) or float(case.start.norm())
    from scipy.optimize import root

    def residual(z: Any) -> Any:
        return (case.fn(torch.from_numpy(z)[None])[0] - torch.from_numpy(z)).numpy()

    z = case.start
    with np.errstate(all="ignore"):
        found = root(residual, case.start[0].numpy(), method="hybr", options={"xtol": 1e-12, "maxfev": 20_000}).x
        if np.linalg.norm(residual(found)) <= 1e-8 * np.linalg.norm(found) < np.inf:
            return float(np.linalg.norm(found))
    for _ in range(20_000):
        z = case.fn(z)
    if float((case.fn(z) - z).norm()) <= 1e-6 * float(z.norm()):
        return float(z.norm())
    return float(max(case.start.norm(), case.fn(case.start).norm()))


def count(run: Run, case: Case, size: float) -> list[int | None]:
    """Evaluations to each goal, None where it was not reached."""
    fn = Counted(case, size, GOALS[-1])
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            run(fn)
    except Exception:  # `Over`, and what solvers say when they fail: what they reached counts
        pass
    return [fn.reached(goal) for goal in GOALS]


def measure(path: Path, only: list[str], with_jax: bool) -> None:
    torch.set_num_threads(1)
    problems = cases()
    found = json.loads(path.read_text()) if path.exists() else {"counts": {}}
    names = [case.name for case in problems]
    if found.get("names") != names:
        found = {"names": names, "D": [case.start.shape[1] for case in problems],
                 "scale": [scale(case) for case in problems], "cap": CAP, "goals": GOALS, "counts": {}}  # fmt: skip
    for label, run in contenders(with_jax).items():
        if label in found["counts"] or (only and not any(word in label for word in only)):
            continue
        found["counts"][label] = [count(run, c, size) for c, size in zip(problems, found["scale"], strict=True)]
        solved = [sum(n[k] is not None for n in found["counts"][label]) for k in range(len(GOALS))]
        print(f"{label:<32} solved {solved} of {len(problems)}", flush=True)
        path.write_text(json.dumps(found))


def of_goal(counts: dict[str, Counts], goal: int, half: slice) -> dict[str, np.ndarray[Any, Any]]:
    """Evaluations of each solver, infinity where the goal was not reached; (problems of the half,)."""
    return {
        name: np.array([np.inf if n[goal] is None else float(n[goal] or 0) for n in found])[half]
        for name, found in counts.items()
    }


def shares(of: dict[str, np.ndarray[Any, Any]], slack: float = 1.1) -> dict[str, tuple[float, float]]:
    """Of the problems that anyone solves: the share that each solves, and that within `slack` times the best."""
    best = np.min(list(of.values()), axis=0)
    some = best < np.inf
    return {n: (float((x < np.inf)[some].mean()), float((x <= slack * best)[some].mean())) for n, x in of.items()}


def with_virtual(counts: dict[str, Counts]) -> dict[str, Counts]:
    """And the best of ours on each problem, as one that knew it beforehand."""

    def best(problem: int, goal: int) -> int | None:
        reached = [counts[name][problem][goal] for name in OURS if name in counts]
        return min((n for n in reached if n is not None), default=None)

    size = len(next(iter(counts.values())))
    return counts | {"our best": [[best(p, g) for g in range(len(GOALS))] for p in range(size)]}


def table(found: dict[str, Any], half: str) -> list[str]:
    """The lines of a table in Markdown: per solver and goal the problems solved, and those within 1.1 × of the best."""
    counts = with_virtual(found["counts"])
    columns = [shares(of_goal(counts, k, HALVES[half])) for k in range(len(GOALS))]
    lines = ["| solver | " + " | ".join(f"{g:.0e} solved | near best" for g in GOALS) + " |", "|---" * 7 + "|"]
    for name in counts:
        cells = [f"{100 * share:.0f} %" for column in columns for share in column[name]]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def lost(path: Path, half: str, goal: int) -> None:
    """The problems on which a peer needs less than 1/1.1 of what our best needs."""
    found = json.loads(path.read_text())
    of = of_goal(with_virtual(found["counts"]), goal, HALVES[half])
    mine = of.pop("our best")
    for p, name in enumerate(found["names"][HALVES[half]]):
        ranked = sorted((float(x[p]), label) for label, x in of.items())
        if ranked[0][0] * 1.1 < mine[p]:
            first = ", ".join(f"{label} {n:.0f}" for n, label in ranked[:3] if n < np.inf)
            print(f"{name}: our best {mine[p]:.0f}, default {of['Anderson(5), the default'][p]:.0f}; {first}")


def draw(path: Path, half: str, picture: Path, chosen: list[str], goal: int = 1) -> None:
    """The share of problems on which a solver takes at most τ times the evaluations of the best (Dolan & Moré 2002)."""
    from matplotlib.figure import Figure

    of = of_goal(with_virtual(json.loads(path.read_text())["counts"]), goal, HALVES[half])
    best = np.min(list(of.values()), axis=0)
    some, ratios = best < np.inf, np.geomspace(1, 16, 200)
    figure = Figure(figsize=(8, 4.6), dpi=110)
    axes = figure.add_subplot()
    for name in chosen:
        at = [(of[name] <= ratio * best)[some].mean() for ratio in ratios]
        mine = name in OURS or name == "our best"
        axes.plot(ratios, at, label=name, linewidth=2 if mine else 1.2, linestyle="-" if mine else "--")
    axes.set(xscale="log", xlabel=f"evaluations over the best's, goal {GOALS[goal]:.0e}", ylabel="share of problems",
             ylim=(0, 1), xlim=(1, 16), xticks=[1, 2, 4, 8, 16], xticklabels=["1", "2", "4", "8", "16"])  # fmt: skip
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.savefig(picture, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=("run", "table", "lost"))
    parser.add_argument("json", type=Path)
    parser.add_argument("--solvers", nargs="+", default=[], help="those whose name contains one of these words")
    parser.add_argument("--no-jax", action="store_true")
    parser.add_argument("--half", choices=HALVES, default="even")
    parser.add_argument("--goal", type=float, choices=GOALS, default=1e-6)
    parser.add_argument("--picture", type=Path)
    given = parser.parse_args()
    if given.what == "run":
        measure(given.json, given.solvers, not given.no_jax)
    elif given.what == "lost":
        lost(given.json, given.half, GOALS.index(given.goal))
    else:
        print("\n".join(table(json.loads(given.json.read_text()), given.half)))
        if given.picture:
            draw(given.json, given.half, given.picture, given.solvers, GOALS.index(given.goal))


if __name__ == "__main__":
    main()
