"""What else Anderson acceleration could do, tried on the problems of `solver_profile.py` in a prototype in NumPy.

    python benchmarks/profile_rules.py [--half odd] [--memories 5 10] [--rules II I mean trust]

Two things are varied. The rule for γ: kind II, kind I, their mean, or the kind whose model told the last pair of
differences better, averaged over steps ("trust"). And what a refused step (residual more than ten times the one before)
leaves: "forget" restarts, as `Anderson` does; "keep" takes the same plain
step and keeps all rows, the refused one too, if it is finite. Printed: problems solved to the three goals, and the
geometric mean of evaluations to them, 2000 where they are not reached.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from profile_problems import cases
from profile_solvers import CAP, Counted, Over
from solver_profile import GOALS, HALVES, scale

Array = np.ndarray[Any, Any]
CUTOFF = 1e-14  # of pivots on unit diagonals
GROWTH = 10.0
RULES = ("II", "I", "mean", "trust")


def minimising(Y: Array, r: Array) -> Array:
    """γ (m,) of kind II for differences Y (D, m), newest first: Cholesky on unit diagonals, dependent ones left out."""
    A, b = Y.T @ Y, Y.T @ r
    m, diagonal = len(b), np.diag(A)
    unit = np.where(diagonal > 0, 1 / np.sqrt(np.where(diagonal > 0, diagonal, 1)), 0)
    A, b = A * unit[:, None] * unit, b * unit
    kept: list[int] = []
    for j in range(m):
        trial = [*kept, j]
        rest = A[j, j] - (A[j, kept] @ np.linalg.solve(A[np.ix_(kept, kept)], A[kept, j]) if kept else 0)
        if unit[j] > 0 and rest > CUTOFF:
            kept = trial
    gamma = np.zeros(m)
    gamma[kept] = np.linalg.solve(A[np.ix_(kept, kept)], b[kept])
    return gamma * unit


def projecting(S: Array, Y: Array, r: Array) -> Array:
    """γ (m,) of kind I: Sᵀ(r − Y γ) = 0, of least norm where it is not unique."""
    A, b = S.T @ Y, S.T @ r
    rows = np.abs(A).max(1)
    A, b = A / np.where(rows > 0, rows, 1)[:, None], b / np.where(rows > 0, rows, 1)
    columns = np.abs(A).max(0)
    columns = np.where(columns > 0, columns, 1)
    return np.linalg.lstsq(A / columns, b, rcond=CUTOFF)[0] / columns


class Rule:
    """γ from the differences S, Y (D, m), newest first, and r (D,)."""

    def __init__(self, name: str) -> None:
        self.name, self.scores = name, {"I": 0.0, "II": 0.0}

    def __call__(self, S: Array, Y: Array, r: Array) -> Array:
        if self.name == "II" or (self.name == "trust" and not self._trusts_one(S, Y)):
            return minimising(Y, r)
        one = projecting(S, Y, r)
        if self.name in ("I", "trust"):
            return one
        return 0.5 * (one + minimising(Y, r))

    def _trusts_one(self, S: Array, Y: Array) -> bool:
        """Whether kind I's model of the Jacobian told the newest pair better than kind II's of its inverse."""
        (s, y), (older_s, older_y) = (S[:, 0], Y[:, 0]), (S[:, 1:], Y[:, 1:])
        change = older_s + older_y
        told = change @ minimising(older_s, s) - s, change @ minimising(older_y, y) - y
        for kind, error in (("I", _ratio(told[0] - y, y)), ("II", _ratio(told[1] - s, s))):
            self.scores[kind] = 0.5 * (self.scores[kind] + np.log(max(error, 1e-16)))
        return self.scores["I"] < self.scores["II"]


def _ratio(error: Array, of: Array) -> float:
    return float(np.linalg.norm(error) / np.linalg.norm(of))


def iterate(fn: Counted, memory: int, rule: Callable[[Array, Array, Array], Array], keeps: bool) -> None:
    z, before, accelerated = fn.array, np.inf, False
    last = z  # f of the last step taken
    rows: list[tuple[Array, Array]] = []  # (f, r), newest first
    for _ in range(CAP + 1):
        f = fn.of_array(z)
        r = f - z
        length = float(np.linalg.norm(r))
        if accelerated and not length <= GROWTH * before:
            z, accelerated = last, False
            rows = [(f, r), *rows][: memory + 1] if keeps and np.isfinite(length) else []
            continue
        if not np.isfinite(length):
            return
        rows, before, last = [(f, r), *rows][: memory + 1], length, f
        z, accelerated = f, len(rows) > 1
        if accelerated:
            F, R = (np.array(x).T for x in zip(*rows, strict=True))
            Y = R[:, :-1] - R[:, 1:]
            S = F[:, :-1] - F[:, 1:] - Y
            z = f - (S + Y) @ rule(S, Y, r)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--half", choices=HALVES, default="odd")
    parser.add_argument("--memories", type=int, nargs="+", default=[5, 10])
    parser.add_argument("--rules", nargs="+", choices=RULES, default=RULES)
    given = parser.parse_args()
    problems = [(case, scale(case)) for case in cases()[HALVES[given.half]]]
    print(f"{len(problems)} problems, {given.half}; goals {GOALS}")
    for memory in given.memories:
        for name in given.rules:
            for keeps in (False, True):
                reached = []
                for case, size in problems:
                    fn = Counted(case, size, GOALS[-1])
                    try:
                        with np.errstate(all="ignore"), warnings.catch_warnings():
                            warnings.simplefilter("ignore")
                            iterate(fn, memory, Rule(name), keeps)
                    except (Over, np.linalg.LinAlgError):
                        pass
                    reached.append([fn.reached(goal) or 2 * CAP for goal in GOALS])
                counts = np.array(reached)
                means = " ".join(f"{n:6.1f}" for n in np.exp(np.log(counts).mean(0)))
                solved = " ".join(f"{n:3d}" for n in (counts <= CAP).sum(0))
                print(
                    f"memory {memory:2d} {name:8} {'keep' if keeps else 'forget':7} solved {solved}, mean {means}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
