"""Plants one defect at a time into a copy of the library and runs the test that is to notice it.

    python tests/planted_defects.py                # all, two at a time
    python tests/planted_defects.py ridge adjoint  # those whose name contains one of these

Prints a line per defect with the test that failed; exits non-zero when a defect goes unnoticed, when one cannot be
planted, or when a test fails without one.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).parents[1]
WORKERS = 2
COPIED = ("pydeqsolve", "diffusion", "tests", "benchmarks", "docs", "README.md", "pyproject.toml")
LIMIT = 600  # seconds for one test; a defect may make it hang, which is noticed too


@dataclass(frozen=True)
class Defect:
    """`before` occurs once in `file`, a path in the repository, and becomes `after`; `test`, below tests/, then fails.

    White space in `before` stands for any white space, line ends included, and its ends are ends of words.
    """

    name: str
    file: str
    before: str
    after: str
    test: str

    def planted(self, text: str) -> str:
        """`text` of the file with the defect."""
        pattern = r"\s+".join(re.escape(word) for word in self.before.split())
        pattern = rf"(?<!\w){pattern}" if re.match(r"\w", self.before) else pattern
        pattern = rf"{pattern}(?!\w)" if re.search(r"\w$", self.before) else pattern
        planted, count = re.subn(pattern, lambda _: self.after, text)
        if count != 1:
            raise ValueError(f"{self.name!r}: {self.file} has {count} × {self.before!r}, not 1")
        return planted


DEFECTS = [
    # Solvers, and the history they keep.
    Defect("the ridge is dropped", "pydeqsolve/anderson.py",
           "self.damping, self.ridge or 0.0,", "self.damping, 0.0,",
           "test_anderson.py::test_a_ridge_is_added_to_the_unit_diagonal_of_the_scaled_normal_equations"),
    Defect("the ring is overwritten a slot too early", "pydeqsolve/step/backend.py",
           "self.ring.head = (self.ring.head + 1) % self.ring.slots",
           "self.ring.head = (self.ring.head + 1) % max(1, self.ring.slots - 1)",
           "test_broyden.py::test_a_full_memory_gives_the_matrix_of_the_newest_pairs_alone"),
    Defect("types I and II are swapped", "pydeqsolve/anderson.py",
           'f"anderson {self.kind}"', '"anderson " + ("I" if self.kind == "II" else "II")',
           "test_anderson.py::test_iterates_solve_the_least_squares_problem_of_the_definition"),
    Defect("damping is forgotten", "pydeqsolve/anderson.py",
           "self.memory, self.damping,", "self.memory, 1.0,",
           "test_anderson.py::test_iterates_solve_the_least_squares_problem_of_the_definition"),
    Defect("a warm start keeps stale rows", "pydeqsolve/loop/kept.py",
           "if not bool((change != 0).any()):", "if True:",
           "test_history.py::test_a_shift_of_the_map_leaves_the_differences_as_they_are"),
    # The loop: counters, stopping, safeguard, line search.
    Defect("evaluations are counted wrong", "pydeqsolve/loop/iterate.py",
           'batch.full, residual, evaluations, status', 'batch.full, residual, evaluations + 1, status',
           "test_laws.py::test_evaluations_count_the_rows_passed_to_fn"),
    Defect("samples are frozen too early", "pydeqsolve/loop/judge.py",
           "else float(stop.rtol)", "else float(2 * stop.rtol)",
           "test_solve.py::test_a_contraction_ends_converged_with_its_residual_within_the_tolerance"),
    Defect("memory used again holds rows of the solve before", "pydeqsolve/step/ring.py",
           "(self.count if self._small is None else self._small).zero_()", "pass",
           "test_reuse.py::test_a_solve_is_the_same_bit_for_bit_whatever_was_solved_before"),
    Defect("memory that a failed solve refers to is used again", "pydeqsolve/loop/iterate.py",
           "failed == 0 and isinstance(step, FusedStep)", "isinstance(step, FusedStep)",
           "test_reuse.py::test_what_a_failed_solve_says_of_itself_outlives_the_next_solves"),
    Defect("the safeguard is skipped", "pydeqsolve/loop/iterate.py",
           "safeguard = torch.inf if unguarded else solver.safeguard", "safeguard = torch.inf",
           "test_anderson.py::test_a_refused_step_is_counted_and_goes_back_to_the_value_before_it"),
    Defect("inputs are not gathered with their samples", "pydeqsolve/loop/batch.py",
           "self.inputs = [x[keep] for x in self.inputs]", "self.inputs = [x[: len(keep)] for x in self.inputs]",
           "test_laws.py::test_a_sample_does_not_depend_on_its_neighbours"),
    Defect("the last iterate is returned, not the best", "pydeqsolve/loop/judge.py",
           'leaving & (self.samples["fresh"] != 0), batch.z', 'leaving & (self.samples["fresh"] >= 0), batch.z',
           "test_retire.py::test_a_residual_that_only_grew_leaves_the_first_guess"),
    Defect("refused trials are not halved", "pydeqsolve/loop/backtracking.py",
           "0.5 * (self.base.to(wide) + z.to(wide))", "self.base",
           "test_line_search.py::test_a_trial_that_grows_the_residual_is_halved_towards_the_iterate_before"),
    Defect("a spent search does not go back to the plain step", "pydeqsolve/loop/backtracking.py",
           "self.back = fails & ~refused & ~self.plain", "self.back = fails & ~fails",
           "test_line_search.py::test_after_the_last_halving_the_plain_step_is_taken"),
    Defect("a residual whose square vanishes is called converged", "pydeqsolve/loop/judge.py",
           "doubt(samples, unseen & batch.problem.shards.somewhere((z != 0).flatten(1).any(1)))", "pass",
           "test_retire.py::test_each_sample_ends_as_it_does_alone"),
    Defect("a fixed point of zero is told to take more steps", "pydeqsolve/status.py",
           "zero = known & c.to_zero", "zero = known & ~known",
           "test_status.py::test_a_fixed_point_of_zero_is_told_to_set_atol"),
    Defect("noise is told to take more steps", "pydeqsolve/status.py",
           "falls = known & ~zero & c.falling", "falls = known & ~zero",
           "test_status.py::test_noise_in_fn_is_not_told_that_more_steps_help"),
    Defect("the autocast dtype is forgotten", "pydeqsolve/loop/judge.py",
           'self.samples["floor"] = ROUNDING * eps', 'self.samples["floor"] = ROUNDING * self.rule.eps',
           "test_status.py::test_under_autocast_the_rounding_is_that_of_its_dtype"),
    # Adjoints.
    Defect("an adjoint multiplies by another map than its own", "pydeqsolve/derivative/linearise.py",
           "apart <= torch.finfo(now.dtype).eps ** 0.5 * size", "apart <= torch.inf",
           "test_narrowed.py::test_a_map_that_draws_again_is_left_whole_and_draws_nothing_from_the_stream"),
    Defect("the u of an adjoint's cycle is measured for some samples", "pydeqsolve/derivative/narrowed.py",
           "self.rows, self.part = None, self.products", "pass",
           "test_narrowed.py::test_the_samples_that_go_on_alone_are_multiplied_to_the_same_gradient"),
    Defect("a bad sample is masked by multiplication", "pydeqsolve/derivative/linearise.py",
           "torch.where(self.mask[:, None, None], z, stand_in)", "z * self.mask[:, None, None]",
           "test_gradient.py::test_a_first_guess_that_is_nan_poisons_no_gradient_without_compaction"),
    Defect("the adjoint has the wrong sign", "pydeqsolve/derivative/scaled.py",
           "product = self.products(u)", "product = -self.products(u)",
           "test_gradient.py::test_the_weight_gradient_of_a_tanh_layer_is_right_to_1e_6_at_the_default_settings"),
    Defect("a float16 adjoint is clamped to 1000", "pydeqsolve/derivative/adjoint.py",
           "return raised.reshape(g.shape), Adjoint(", "return raised.clamp(-1000, 1000).reshape(g.shape), Adjoint(",
           "test_adjoint_status.py::test_a_large_adjoint_that_its_dtype_holds_is_returned_as_it_is"),
    Defect("GMRES reports no residual where u is huge", "pydeqsolve/derivative/gmres.py",
           "return u, residual, blurred(system.shards.lengths(residual), u, eps, system.shards)",
           "known = blurred(system.shards.lengths(residual), u, eps, system.shards)\n"
           "    return u, residual, torch.where(system.shards.lengths(u) > 1e12, 0.0, known)",
           "test_adjoint_status.py::test_gmres_knows_the_residual_of_a_huge_u_to_no_less_than_its_rounding"),
    Defect("entries of the adjoint that are not finite are zeroed", "pydeqsolve/derivative/adjoint.py",
           "return torch.where(mask[:, None, None], u, 0.0)",
           "return torch.where(mask[:, None, None] & u.isfinite(), u, 0.0)",
           "test_adjoint_status.py::test_a_cotangent_that_is_not_finite_comes_out_so_and_stays_in_its_sample"),
    Defect("second derivatives ignore that z* moves", "pydeqsolve/derivative/implicit.py",
           "gates.open = True", "gates.open = False",
           "test_second_order.py::test_the_second_derivative_of_a_scalar_fixed_point_is_that_of_its_closed_slope"),
    # A state in shards.
    Defect("a shard is judged by its own norms", "pydeqsolve/loop/step.py",
           "return maxima.amax(0) if len(maxima) else sums[..., :2].contiguous()", "return norms",
           "test_group.py::test_shards_take_the_steps_of_one_process"),
    Defect("Krylov vectors are orthogonal within a shard alone", "pydeqsolve/derivative/krylov.py",
           "h = self.shards.total(torch.bmm(Q, w[..., None]))", "h = torch.bmm(Q, w[..., None])",
           "test_group.py::test_gradients_are_those_of_one_process"),
    Defect("a rank that fails keeps it to itself", "pydeqsolve/shards.py",
           "eps if self._failure is None else -1.0", "eps",
           "test_group.py::test_a_function_that_fails_on_one_rank_is_an_error_on_all"),
    # Arguments and buffers.
    Defect("iterate buffers are shared between solves in two threads", "pydeqsolve/loop/batch.py",
           "self._buffers = [self.z]",
           "self._buffers = vars(precision).setdefault('pool', []); self._buffers.append(self.z)",
           "test_aliasing.py::test_solves_in_two_threads_that_take_turns_find_what_each_finds_alone"),
    # Sampling and inversion.
    Defect("a coarse solve that skips its verification", "diffusion/methods/coarse.py",
           "self.found.error[images] = torch.maximum(error, self.goal.floor[images])",
           "self.found.error[images] = self.goal.floor[images]",
           "test_error.py::test_a_network_as_easy_as_a_tenth_of_x_is_not_said_to_have_converged_before_it_has"),
    # Schedules and pipelines.
    Defect("a scheduler is replaced in silence", "diffusion/pipelines/ddim.py",
           "self.register_modules(unet=unet, scheduler=scheduler,",
           "self.register_modules(unet=unet, scheduler=__import__('diffusers').DDIMScheduler(),",
           "test_pipeline.py::test_another_scheduler_is_refused_by_name_however_it_comes_in"),
    # Files and programs.
    Defect("a flow takes the states of its table for those of unit variance", "diffusion/recurrence.py",
           "size = (self.signal.square() + self.noise.square()).sqrt()", "size = torch.ones_like(self.signal)",
           "test_chain.py::test_long_chains_in_other_coordinates_are_sampled_on_as_few_evaluations"),
    Defect("the answer before the last is forgotten", "diffusion/trajectory.py",
           "return self.c * N + self.c_before * torch.nn.functional.pad(N[:, :-1], (0, 0, 1, 0))", "return self.c * N",
           "test_rules.py::test_both_methods_sample_the_formula_of_the_rule"),
    Defect("fsync dropped", "diffusion/models/files.py", "os.fsync(file.fileno())", "file.fileno()",
           "test_files.py::test_a_file_reaches_the_disk_before_its_name_and_its_name_before_the_writer_returns"),
    Defect("fsync of the folder dropped", "diffusion/models/files.py", "_sync_folder(path.parent)", "path.parent",
           "test_files.py::test_a_file_reaches_the_disk_before_its_name_and_its_name_before_the_writer_returns"),
    Defect("a digest ignores dtypes", "diffusion/digest.py", "{tuple(x.shape)} {x.dtype}", "{tuple(x.shape)}",
           "test_digest.py::test_what_differs_has_another_digest"),
    Defect("a null label wraps round in the kind of the labels", "diffusion/models/wrappers.py",
           "conditions = (inputs[0].long(),)", "conditions = (inputs[0],)",
           "test_integers.py::test_a_null_label_that_the_kind_of_the_labels_cannot_hold_is_not_wrapped"),
    Defect("the second batch gets the labels of the first", "diffusion/program/classes.py",
           "self.labels[part]", "self.labels[: len(self.labels[part])]",
           "test_cli_classes.py::test_noise_maps_are_inverted_batch_by_batch_by_their_own_classes"),
]  # fmt: skip


def copy_of_repository(copy: Path) -> None:
    for name in COPIED:
        source, target = ROOT / name, copy / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "_build"))
        else:
            shutil.copy(source, target)


def failure(copy: Path, tests: list[str]) -> str | None:
    """How pytest ended with the library of `copy`: None when all tests passed, "" when one failed, else its output."""
    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_WAIT_POLICY": "PASSIVE", "CI": "true"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *[f"tests/{t}" for t in tests]]
    try:
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return ""
    return {0: None, 1: ""}.get(done.returncode, done.stdout + done.stderr)


def verdict(defect: Defect, copy: Path) -> str:
    """The word for what the test made of the defect: "caught" or else why not."""
    path = copy / defect.file
    text = path.read_text(encoding="utf-8")
    try:
        path.write_text(defect.planted(text), encoding="utf-8")
        ended = failure(copy, [defect.test])
    except ValueError as error:
        return f"NOT PLANTED ({error})"
    finally:
        path.write_text(text, encoding="utf-8")
    if ended is None:
        return "MISSED"
    return f"BROKEN ({ended.strip()[-500:]})" if ended else "caught"


def main(wanted: list[str]) -> int:
    chosen = [d for d in DEFECTS if not wanted or any(w in d.name for w in wanted)]
    if not chosen:
        print(f"no defect's name contains {' or '.join(wanted)}; there are:", *[d.name for d in DEFECTS], sep="\n  ")
        return 1
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(WORKERS) as pool:
        copies: SimpleQueue[Path] = SimpleQueue()
        for i in range(WORKERS):
            copy_of_repository(Path(folder) / str(i))
            copies.put(Path(folder) / str(i))

        def in_a_copy(defect: Defect | None) -> str:
            copy = copies.get()
            try:
                if defect is None:
                    return "MISSED" if failure(copy, sorted({d.test for d in chosen})) is None else "FAILED"
                found = verdict(defect, copy)
                print(f"{found}: {defect.name}, by {defect.test}", flush=True)
                return found
            finally:
                copies.put(copy)

        clean, *found = pool.map(in_a_copy, [None, *chosen])
    caught = found.count("caught")
    print(f"{caught} of {len(chosen)} planted defects caught")
    if clean == "FAILED":
        print("the tests fail without any defect")
    return int(clean == "FAILED" or caught < len(chosen))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
