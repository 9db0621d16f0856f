"""Where a solve by limited-memory Broyden spends its time on the CPU: in the native step, or around it.

    python benchmarks/broyden_profile.py [--repeats N] [--threads N]

fn costs nothing (it returns a stored tensor). Per shape and solver: time per evaluation, the share of it inside the
native module (every call of `_native` is timed, which adds about .2 µs to each), and the words that move against
those of Anderson: Broyden's small matrix takes products with steps s, so it reads F as well as R.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from native_step import SHAPES, iter_values

from pydeqsolve import Anderson, Broyden, Stop, build_info, solve
from pydeqsolve.step import native

SOLVERS = {
    "Anderson II": lambda m: Anderson(memory=m),
    "Anderson I": lambda m: Anderson(memory=m, kind="I"),
    "Broyden good": lambda m: Broyden(memory=m),
    "Broyden bad": lambda m: Broyden(memory=m, kind="bad"),
}


class Timed:
    """The native module, with the seconds spent in its functions."""

    def __init__(self, module: Any) -> None:
        self._module, self.spent = module, 0.0

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        if not callable(value) or isinstance(value, type):
            return value

        def timed(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = value(*arguments)
            self.spent += time.perf_counter() - start
            return result

        return timed


def profile(run: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median seconds of a run, and of the native module inside it."""
    wholes, shares = [], []
    for _ in range(repeats + 1):  # the first warms up
        timed = Timed(native._native)
        with mock.patch.object(native, "_native", timed):
            start = time.perf_counter()
            run()
            wholes.append(time.perf_counter() - start)
        shares.append(timed.spent)
    return statistics.median(wholes[1:]), statistics.median(shares[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(build_info())
    print(f"{'B, m, D':>20} {'solver':>13} {'µs':>10} {'native %':>9} {'of Anderson II':>15}")
    for B, m, D in SHAPES:
        steps, base = (20 if B * D > 1e6 else 60), 0.0
        values, z0 = iter_values(B, D, torch.float32), torch.zeros(B, D)
        for name, solver in SOLVERS.items():

            def run(values: Any = values, z0: Any = z0, solver: Any = solver(m - 1), steps: int = steps) -> None:
                stop = Stop(rtol=0.0, max_steps=steps)
                solution = solve(values(), z0, solver=solver, stop=stop, gradient=None)
                assert int(solution.evaluations.max()) == steps

            whole, native = profile(run, options.repeats)
            base = base or whole
            print(
                f"{f'{B}, {m}, {D}':>20} {name:>13} {whole / steps * 1e6:>10.1f} {100 * native / whole:>9.1f} "
                f"{whole / base:>15.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
