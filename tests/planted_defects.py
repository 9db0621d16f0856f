"""Plants one defect at a time into a copy of the library and runs the test that is to notice it.

    python tests/planted_defects.py

Prints a line per defect with the test that failed; exits non-zero when a defect goes unnoticed, or when a test fails
without one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Defect:
    """`before` occurs once in pydeqsolve/<file> and becomes `after`; `test` is then to fail."""

    name: str
    file: str
    before: str
    after: str
    test: str


DEFECTS = [
    Defect("the ridge is dropped", "anderson.py", "self.damping, self.ridge or 0.0,", "self.damping, 0.0,",
           "test_anderson.py::test_a_ridge_is_added_to_the_unit_diagonal_of_the_scaled_normal_equations"),
    Defect("the ring is overwritten a slot too early", "ops.py", "ring.head = (ring.head + 1) % ring.slots",
           "ring.head = (ring.head + 1) % max(1, ring.slots - 1)",
           "test_broyden.py::test_a_full_memory_gives_the_matrix_of_the_newest_pairs_alone"),
    Defect("evaluations are counted wrong", "run.py", 'evaluations, status, steps, rejections, rank_losses, history',
           'evaluations + 1, status, steps, rejections, rank_losses, history',
           "test_laws.py::test_evaluations_count_the_rows_passed_to_fn"),
    Defect("a bad sample is masked by multiplication", "linearise.py",
           "torch.where(self.mask[:, None, None], z, stand_in)", "z * self.mask[:, None, None]",
           "test_gradient.py::test_a_first_guess_that_is_nan_poisons_no_gradient_without_compaction"),
    Defect("types I and II are swapped", "anderson.py", 'f"anderson {self.kind}"',
           '"anderson " + ("I" if self.kind == "II" else "II")',
           "test_anderson.py::test_iterates_solve_the_least_squares_problem_of_the_definition"),
    Defect("damping is forgotten", "anderson.py", "self.memory, self.damping,", "self.memory, 1.0,",
           "test_anderson.py::test_iterates_solve_the_least_squares_problem_of_the_definition"),
    Defect("samples are frozen too early", "monitor.py", "self[name] = tolerance\n", "self[name] = 2 * tolerance\n",
           "test_solve.py::test_a_contraction_ends_converged_with_its_residual_within_the_tolerance"),
    Defect("the safeguard is skipped", "run.py", "else solver.safeguard) if self.method.memory else 0.0",
           "else torch.inf) if self.method.memory else 0.0",
           "test_anderson.py::test_a_refused_step_is_counted_and_goes_back_to_the_value_before_it"),
    Defect("the adjoint has the wrong sign", "implicit.py",
           "return products(u.reshape(g.shape)).to(wide).flatten(1)",
           "return -products(u.reshape(g.shape)).to(wide).flatten(1)",
           "test_gradient.py::test_the_weight_gradient_of_a_tanh_layer_is_right_to_1e_6_at_the_default_settings"),
    Defect("a warm start keeps stale rows", "history.py", "if not bool((change != 0).any()):", "if True:",
           "test_history.py::test_a_shift_of_the_map_leaves_the_differences_as_they_are"),
    Defect("inputs are not gathered with their samples", "run.py", "self.inputs = [x[stay] for x in self.inputs]",
           "self.inputs = [x[: len(stay)] for x in self.inputs]",
           "test_laws.py::test_a_sample_does_not_depend_on_its_neighbours"),
    Defect("the last iterate is returned, not the best", "run.py",
           'leaving & (self.monitor["fresh"] != 0), self.z', 'leaving & (self.monitor["fresh"] >= 0), self.z',
           "test_laws.py::test_the_residual_is_the_least_seen_and_belongs_to_the_z_returned"),
    Defect("second derivatives ignore that z* moves", "implicit.py", "gates.open = True", "gates.open = False",
           "test_second_order.py::test_the_second_derivative_of_a_scalar_fixed_point_is_that_of_its_closed_slope"),
    Defect("refused trials are not halved", "search.py", "0.5 * (self.base.to(wide) + z.to(wide))", "self.base",
           "test_line_search.py::test_a_trial_that_grows_the_residual_is_halved_towards_the_iterate_before"),
    Defect("a spent search does not go back to the plain step", "search.py",
           "self.back = fails & ~refused & ~self.plain", "self.back = fails & ~fails",
           "test_line_search.py::test_after_the_last_halving_the_plain_step_is_taken"),
    Defect("a residual whose square vanishes is called converged", "run.py", "        self._doubt(leaving, z)\n", "",
           "test_status.py::test_a_fixed_point_of_zero_is_not_said_to_be_met_where_squares_vanish"),
    Defect("a fixed point of zero is told to take more steps", "status.py", "zero = known & c.to_zero",
           "zero = known & ~known",
           "test_status.py::test_a_fixed_point_of_zero_is_told_to_set_atol"),
    Defect("noise is told to take more steps", "status.py", "falls = known & ~zero & c.falling",
           "falls = known & ~zero", "test_status.py::test_noise_in_fn_is_not_told_that_more_steps_help"),
    Defect("the autocast dtype is forgotten", "monitor.py", "ROUNDING * precision(dtype, device)",
           "ROUNDING * self.eps",
           "test_status.py::test_under_autocast_the_rounding_is_that_of_its_dtype"),
]  # fmt: skip


def run_tests(copy: Path, tests: list[str]) -> bool:
    """True when all pass, with the library of `copy`."""
    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_WAIT_POLICY": "PASSIVE", "CI": "true"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *[f"tests/{t}" for t in tests]]
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True).returncode == 0


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("pydeqsolve", "tests", "pyproject.toml"):
            source, target = ROOT / name, copy / name
            shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
        if not run_tests(copy, sorted({d.test for d in DEFECTS})):
            print("the tests fail without any defect")
            return 1
        unnoticed = 0
        for defect in DEFECTS:
            path = copy / "pydeqsolve" / defect.file
            text = path.read_text(encoding="utf-8")
            assert text.count(defect.before) == 1, f"{defect.file} has {text.count(defect.before)} × {defect.before!r}"
            path.write_text(text.replace(defect.before, defect.after), encoding="utf-8")
            noticed = not run_tests(copy, [defect.test])
            path.write_text(text, encoding="utf-8")
            unnoticed += not noticed
            print(f"{'caught' if noticed else 'MISSED'}: {defect.name}, by {defect.test}", flush=True)
        print(f"{len(DEFECTS) - unnoticed} of {len(DEFECTS)} planted defects caught")
        return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main())
