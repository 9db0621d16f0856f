"""solve: statuses, budgets, tolerances, best iterates, compaction, callbacks, refusals, and maps from other suites."""

import math
from dataclasses import replace

import numpy
import problems
import pytest
import scipy.optimize
import torch
from torch import Tensor

from pydeqsolve import Anderson, Broyden, ConvergenceError, Implicit, Picard, Status, Stop, solve

f64 = torch.float64
CONVERGED, MAX_STEPS, STALLED, DIVERGED, NONFINITE = Status


def run(problem: problems.Map, solver=None, stop=None, **keywords):
    return solve(
        problem.fn, problem.start, problem.inputs, solver=solver or Anderson(), stop=stop or Stop(rtol=1e-10),
        gradient=None, **keywords,
    )  # fmt: skip


def error(solution, problem: problems.Map) -> float:
    return float((solution.z - problem.solution).abs().max())


# Statuses


def test_a_contraction_ends_converged_with_its_residual_within_the_tolerance():
    problem = problems.cosine()
    solution = run(problem)
    assert solution.status.tolist() == [CONVERGED] * 5
    assert (solution.residual <= 1e-10 * torch.cos(solution.z[:, 0])).all()
    assert error(solution, problem) < 1e-9


def test_without_budget_z0_comes_back_with_an_infinite_residual():
    z0 = torch.arange(6.0).reshape(2, 3)
    solution = solve(torch.cos, z0, stop=Stop(max_steps=0), gradient=None, trace=True)
    assert torch.equal(solution.z, z0)
    assert solution.status.tolist() == [MAX_STEPS] * 2
    assert solution.residual.tolist() == [math.inf] * 2
    assert solution.evaluations.tolist() == [0, 0]
    assert solution.trace.shape == (0, 2)


def test_one_call_of_fn_measures_z0_and_no_more():
    z0 = torch.tensor([[1.0], [2.0]], dtype=f64)
    solution = solve(lambda z: 0.5 * z, z0, stop=Stop(max_steps=1), gradient=None)
    assert torch.equal(solution.z, z0)
    assert solution.residual.tolist() == [0.5, 1.0]
    assert solution.evaluations.tolist() == [1, 1]


def test_an_exact_start_takes_one_evaluation():
    solution = solve(lambda z: z, torch.ones(3, 2), stop=Stop(rtol=0.0), gradient=None)
    assert solution.status.tolist() == [CONVERGED] * 3
    assert solution.evaluations.tolist() == [1, 1, 1]
    assert solution.residual.tolist() == [0.0, 0.0, 0.0]


def test_nan_at_the_first_evaluation_is_nonfinite_and_leaves_z0():
    z0 = torch.tensor([[-1.0], [4.0]], dtype=f64)
    solution = solve(lambda z: z.sqrt() + 0.25, z0, gradient=None)
    assert solution.status.tolist() == [NONFINITE, CONVERGED]
    assert solution.z[0].item() == -1.0
    assert solution.residual[0].item() == math.inf
    assert solution.evaluations[0].item() == 1


@pytest.mark.parametrize("solver", [Picard(), Anderson(memory=0)], ids=str)
def test_nan_later_ends_a_plain_iteration_at_once_with_the_last_finite_best(solver):
    # 2 → 1 → 0 → −1 → NaN by Picard: sqrt of a negative number.
    solution = solve(
        lambda z: torch.where(z < 0, torch.nan, z - 1.0), torch.tensor([[2.0]]), solver=solver, gradient=None
    )
    assert solution.status.item() == NONFINITE
    assert solution.evaluations.item() == 4
    assert solution.rejections.item() == 0
    assert math.isfinite(solution.residual.item())
    assert solution.z.item() >= 0


def test_an_exploding_picard_iteration_is_diverged_and_keeps_its_best():
    solution = solve(
        lambda z: 10 * z * z + 10, torch.ones(1, 2, dtype=f64), solver=Picard(), gradient=None, stop=Stop(rtol=1e-6)
    )
    assert solution.status.item() == DIVERGED
    assert torch.equal(solution.z, torch.ones(1, 2, dtype=f64))
    assert solution.residual.item() == 19.0


def test_slow_linear_growth_is_diverged_when_the_budget_ends():
    solution = solve(lambda z: 2 * z + 1, torch.ones(1, 1, dtype=f64), solver=Picard(), gradient=None)
    assert solution.status.item() == DIVERGED


def test_a_map_without_fixed_point_stalls():
    solution = solve(lambda z: z + 1, torch.zeros(1, 3, dtype=f64), gradient=None, stop=Stop(max_steps=200))
    assert solution.status.item() == STALLED
    assert solution.residual.item() == 1.0


def test_a_tolerance_below_rounding_ends_stalled_well_before_the_budget():
    b = torch.randn(4, 50, generator=problems.generator(0))
    solution = solve(
        lambda z, b: 0.5 * torch.tanh(z) + b, torch.zeros_like(b), (b,), stop=Stop(rtol=1e-12, max_steps=1000),
        gradient=None,
    )  # fmt: skip
    assert set(solution.status.tolist()) <= {STALLED, CONVERGED}
    assert solution.evaluations.max() < 100


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_steady_slow_progress_is_not_called_stalled(dtype):
    # The residual falls by 1 % a step, less than a few units of rounding of bfloat16, yet every step counts.
    solution = solve(
        lambda z: (0.99 * z.float() + 1).to(dtype), torch.zeros(1, 8, dtype=dtype), solver=Picard(), gradient=None,
        stop=Stop(rtol=0.3, max_steps=500),
    )  # fmt: skip
    assert solution.status.item() == CONVERGED


def test_check_counts_the_failed_samples_and_says_what_to_change():
    solution = solve(torch.cos, torch.tensor([[0.7390851332151607], [torch.nan]], dtype=f64), gradient=None)
    with pytest.raises(ConvergenceError, match=r"1 of 2 NONFINITE \(fn returned NaN or infinity"):
        solution.check()
    assert run(problems.cosine()).check().converged.all()


def test_a_solution_shows_itself_in_one_line():
    solution = solve(lambda z: z.sqrt() + 0.25, torch.tensor([[-1.0], [4.0]], dtype=f64), gradient=None)
    assert repr(solution).startswith("Solution(1 CONVERGED, 1 NONFINITE; 1 to ")
    assert repr(solution).endswith("residual at most inf)")
    assert repr(solve(torch.cos, torch.ones(0, 2), gradient=None)) == "Solution(no samples)"


# Tolerances


def test_each_sample_may_have_its_own_tolerance():
    b = torch.ones(3, 4, dtype=f64)
    rtol = torch.tensor([1e-2, 1e-5, 1e-8])
    solution = solve(lambda z: 0.9 * z + b, torch.zeros_like(b), solver=Picard(), stop=Stop(rtol=rtol, max_steps=500),
                     gradient=None)  # fmt: skip
    alone = [
        solve(lambda z: 0.9 * z + b[:1], b[:1] * 0, solver=Picard(), stop=Stop(rtol=r, max_steps=500), gradient=None)
        for r in rtol.tolist()
    ]
    assert solution.evaluations.tolist() == [s.evaluations.item() for s in alone]


def test_a_tolerance_may_be_a_tensor_without_dimensions():
    problem = problems.mixed_batch(8)
    solution = run(problem, stop=Stop(rtol=torch.tensor(1e-8, dtype=f64)))
    assert torch.equal(solution.evaluations, run(problem, stop=Stop(rtol=1e-8)).evaluations)


@pytest.mark.parametrize(("norm", "expected"), [("rms", math.sqrt(14 / 3)), ("l2", math.sqrt(14)), ("max", 3.0)])
def test_residuals_are_measured_in_the_norm_asked_for(norm, expected):
    b = torch.tensor([[1.0, -2.0, -3.0]], dtype=f64)
    solution = solve(lambda z: z + b, torch.zeros_like(b), stop=Stop(norm=norm, max_steps=1), gradient=None)
    assert solution.residual.item() == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("norm", ["rms", "l2", "max"])
def test_infinity_and_nan_anywhere_in_a_sample_are_seen_by_every_norm(norm):
    for bad in (math.nan, math.inf, -math.inf):
        f = torch.zeros(2, 1000)
        f[0, 777] = bad
        solution = solve(lambda z, f=f: f, torch.ones(2, 1000), stop=Stop(norm=norm, max_steps=3), gradient=None)
        assert solution.status.tolist() == [NONFINITE, CONVERGED]


@pytest.mark.parametrize("exponent", [-400, 500])
def test_magnitudes_far_from_one_are_solved(exponent):
    b = 2.0**exponent
    solution = solve(lambda z: 0.5 * z + b, torch.zeros(1, 3, dtype=f64), gradient=None).check()
    torch.testing.assert_close(solution.z / b, torch.full((1, 3), 2.0, dtype=f64), rtol=1e-4, atol=0)


# Samples of a batch


def test_rows_passed_to_fn_exceed_the_evaluations_by_two_per_cent_at_most():
    problem = problems.mixed_batch()
    rows = []

    def counted(z, rate, b):
        rows.append(len(z))
        return problem.fn(z, rate, b)

    solution = run(replace(problem, fn=counted), stop=Stop(rtol=1e-8)).check()
    assert sum(rows) <= 1.02 * int(solution.evaluations.sum())
    assert solution.evaluations.min() < 0.7 * solution.evaluations.max()


def troubled(z: Tensor, rate: Tensor, b: Tensor, code: Tensor) -> Tensor:
    f = torch.where(code == 1, torch.nan, rate * torch.sin(z) + b)
    f = torch.where(code == 2, z + b.abs() + 1, f)  # I − J singular: no fixed point
    f = torch.where(code == 3, 10 * z * z + 10, f)  # no real fixed point, explodes
    return torch.where(code == 4, z, f)  # solved before it starts


@pytest.mark.parametrize("solver", [Anderson(), Anderson(kind="I"), Broyden(), Broyden(kind="bad"), Picard()], ids=str)
def test_bad_neighbours_end_with_their_status_and_change_nobody(solver):
    g = problems.generator(0)
    rate = 0.9 * torch.rand(64, 6, dtype=f64, generator=g)
    b, z0 = torch.randn(64, 6, dtype=f64, generator=g), torch.randn(64, 6, dtype=f64, generator=g)
    code = torch.zeros(64, 1, dtype=torch.int64)
    bad = {10: 1, 20: 2, 30: 3, 40: 4}
    for i, c in bad.items():
        code[i] = c
    inputs = (rate, b, code)
    stop = Stop(rtol=1e-8, max_steps=400)
    together = solve(troubled, z0, inputs, solver=solver, stop=stop, gradient=None)
    for i in range(64):
        alone = solve(troubled, z0[i : i + 1], [x[i : i + 1] for x in inputs], solver=solver, stop=stop, gradient=None)
        assert torch.equal(alone.z[0], together.z[i])
        for name in ("status", "evaluations", "residual", "rejections"):
            assert getattr(alone, name)[0] == getattr(together, name)[i], (i, name)
    good = [i for i in range(64) if i not in bad]
    assert together.converged[good].all()
    assert together.status[10] == NONFINITE
    assert together.status[20] in (STALLED, MAX_STEPS)
    assert together.status[30] in (DIVERGED, STALLED, MAX_STEPS)
    assert together.status[40] == CONVERGED
    assert together.evaluations[40] == 1
    assert torch.equal(together.z[10], z0[10])
    for i in (20, 30):
        f = troubled(together.z, *inputs)[i]
        assert together.residual[i].item() == pytest.approx(
            (f - together.z[i]).square().mean().sqrt().item(), rel=1e-12
        )


def test_without_compaction_fn_sees_every_sample_and_the_answers_are_the_same():
    problem = problems.mixed_batch(16)
    sizes = set()

    def counted(z, rate, b):
        sizes.add(len(z))
        return problem.fn(z, rate, b)

    full = run(replace(problem, fn=counted), compact=False)
    assert sizes == {16}
    part = run(problem)
    assert torch.equal(full.z, part.z)
    assert torch.equal(full.evaluations, part.evaluations)


def test_a_closure_over_per_sample_data_is_not_compacted_unless_asked():
    problem = problems.mixed_batch(16)
    rate, b = problem.inputs
    solution = solve(lambda z: rate * z + b, problem.start, stop=Stop(rtol=1e-10), gradient=None)
    assert error(solution, problem) < 1e-7


@pytest.mark.parametrize("solver", [Anderson(), Broyden(), Picard(), Anderson(memory=2, kind="I")], ids=str)
@pytest.mark.parametrize("interval", [3, 8, 1000])
def test_how_often_the_host_reads_the_flags_changes_no_result(solver, interval):
    problem = problems.mixed_batch(12)
    inputs = (torch.cat([problem.inputs[0][:-1], problem.inputs[0][-1:] * torch.nan]), problem.inputs[1])
    often, seldom = (
        solve(problem.fn, problem.start, inputs, solver=solver, gradient=None, stop=Stop(rtol=1e-7, check_every=k))
        for k in (1, interval)
    )
    for name in ("z", "residual", "status", "evaluations", "rejections", "rank_losses"):
        assert torch.equal(getattr(often, name), getattr(seldom, name)), name


# Trace and callback


@pytest.mark.parametrize("interval", [1, 5])
def test_the_trace_holds_every_residual_and_nan_once_a_sample_has_finished(interval):
    problem = problems.mixed_batch(8)
    solution = run(problem, solver=Picard(), stop=Stop(rtol=1e-3, check_every=interval), trace=True)
    assert solution.trace.shape == (solution.steps, 8)
    for i in range(8):
        n = int(solution.evaluations[i])
        assert solution.trace[:n, i].isfinite().all()
        assert solution.trace[n:, i].isnan().all()
    rate, b = problem.inputs
    assert torch.allclose(solution.trace[1], (rate * b).square().mean(1).sqrt(), rtol=1e-14)


def test_the_callback_sees_each_measured_iterate_and_can_stop_the_solve():
    seen = []

    def callback(step, z, residual):
        seen.append((step, z.item(), residual.item()))
        return step == 3

    solution = solve(lambda z: 0.5 * z, torch.ones(1, 1, dtype=f64), solver=Picard(), gradient=None, callback=callback)
    assert seen == [(1, 1.0, 0.5), (2, 0.5, 0.25), (3, 0.25, 0.125)]
    assert solution.status.item() == MAX_STEPS
    assert solution.z.item() == 0.25
    assert solution.evaluations.item() == 3


def test_stopping_from_the_callback_keeps_the_samples_that_had_converged():
    problem = problems.mixed_batch(8)
    solution = run(problem, solver=Picard(), stop=Stop(rtol=1e-2), callback=lambda step, z, r: step == 12)
    full = run(problem, solver=Picard(), stop=Stop(rtol=1e-2))
    early = full.evaluations < 12
    assert early.any()
    assert not early.all()
    assert (solution.status[early] == CONVERGED).all()
    assert torch.equal(solution.z[early], full.z[early])
    assert (solution.status[full.evaluations > 12] == MAX_STEPS).all()


# Maps from the suites of KINSOL, NLsolve, NonlinearSolve.jl and optimistix


@pytest.mark.parametrize("solver", [Anderson(), Anderson(kind="I"), Broyden(), Broyden(kind="bad")], ids=str)
@pytest.mark.parametrize("c", [0.5, 0.9, 0.99])
def test_chandrasekhar_h_equation_has_the_mean_of_its_closed_form(solver, c):
    solution = run(problems.chandrasekhar(c), solver, Stop(rtol=1e-12)).check()
    assert solution.z.mean().item() == pytest.approx(2 / c * (1 - math.sqrt(1 - c)), rel=1e-9)


@pytest.mark.parametrize("solver", [Anderson(), Broyden(), Picard()], ids=str)
def test_the_discrete_integral_equation_is_solved_to_its_truncation_error(solver):
    errors = []
    for n in (25, 51):
        problem = problems.discrete_integral(n)
        errors.append(error(run(problem, solver, Stop(rtol=1e-12)).check(), problem))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)  # second order in h = 1/(n + 1)


@pytest.mark.parametrize("solver", [Anderson(), Broyden()], ids=str)
@pytest.mark.parametrize("step", [2e-4, 2e-3])
def test_nonlinear_heat_agrees_with_scipys_newton_krylov(solver, step):
    problem = problems.nonlinear_heat(step=step)
    expected = scipy.optimize.root(
        lambda u: (problem.fn(torch.from_numpy(u)[None])[0] - torch.from_numpy(u)).numpy(), problem.start[0].numpy(),
        method="hybr", tol=1e-13,
    ).x  # fmt: skip
    solution = run(problem, solver, Stop(rtol=1e-12)).check()
    torch.testing.assert_close(solution.z[0], torch.from_numpy(expected), rtol=0, atol=1e-10)


@pytest.mark.parametrize("solver", [Anderson(), Broyden(), Broyden(kind="bad")], ids=str)
def test_the_logit_map_inverts_market_shares(solver):
    problem = problems.logit()
    assert error(run(problem, solver, Stop(rtol=1e-12)).check(), problem) < 1e-9


@pytest.mark.parametrize("solver", [Anderson(), Anderson(kind="I"), Broyden(), Picard()], ids=str)
def test_em_ends_where_the_likelihood_is_stationary(solver):
    problem, log_likelihood = problems.em_means()
    z = run(problem, solver, Stop(rtol=1e-12, max_steps=500)).check().z.requires_grad_()
    (slope,) = torch.autograd.grad(log_likelihood(z).sum(), z)
    assert slope.abs().max() < 1e-8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("solver", [Anderson(), Broyden(), Picard(), Anderson(kind="I")], ids=str)
def test_low_precision_states_converge_to_a_few_units_in_the_last_place(dtype, solver):
    b = torch.linspace(-1, 1, 64).reshape(4, 16)
    exact = solve(lambda z, b: 0.5 * torch.sin(z) + b, b.double() * 0, (b.double(),), stop=Stop(rtol=1e-14),
                  gradient=None).z  # fmt: skip
    eps = torch.finfo(dtype).eps
    solution = solve(lambda z, b: 0.5 * torch.sin(z) + b, b.to(dtype) * 0, (b.to(dtype),), solver=solver,
                     stop=Stop(rtol=2 * eps, norm="max"), gradient=None)  # fmt: skip
    assert solution.z.dtype == dtype
    # The residual, at most 2 eps, and the rounding of f, at most 1 eps, both grow by 1/(1 − ½).
    assert (solution.z.double() - exact).abs().max() <= 6 * eps * exact.abs().max()


# Refusals


@pytest.mark.parametrize(
    ("keywords", "kind", "message"),
    [
        ({"fn": 3}, TypeError, "fn must be callable, got int"),
        ({"solver": "anderson"}, TypeError, "solver must be"),
        ({"stop": 1e-3}, TypeError, "stop must be a Stop, got float"),
        ({"gradient": "implicit"}, TypeError, "gradient must be"),
        ({"inputs": torch.ones(2)}, TypeError, r"write inputs=\(x,\)"),
        ({"inputs": (3.0,)}, TypeError, r"inputs\[0\] must be a tensor, None, or a nested .*, got float"),
        ({"inputs": (torch.ones(3),)}, ValueError, r"inputs\[0\] must have leading dimension 2"),
        ({"z0": torch.ones(2, 0)}, ValueError, "at least one entry"),
        ({"z0": torch.ones(2, 3, dtype=torch.int64)}, TypeError, "got torch.int64"),
        ({"z0": torch.tensor(1.0)}, ValueError, r"must have shape \(B, …\)"),
        ({"stop": Stop(rtol=torch.ones(3))}, ValueError, r"stop.rtol must have shape \(2,\)"),
        ({"front": 3}, TypeError, "front must be"),
        ({"solver": Anderson}, TypeError, "solver must be"),
        ({"gradient": Implicit}, TypeError, "gradient must be"),
        (
            {"inputs": (x for x in [torch.ones(2)])},
            TypeError,
            "inputs must be a tuple or list of tensors, got generator",
        ),
        ({"inputs": None}, TypeError, "inputs must be a tuple or list of tensors, got NoneType"),
        ({"snapshots": 5}, TypeError, "snapshots must be a tuple of steps, got int"),
        ({"callback": 3}, TypeError, "callback must be callable, got int"),
        ({"compact": 1}, TypeError, "compact must be True, False or None, got int"),
        ({"trace": 1}, TypeError, "trace must be True or False, got int"),
        ({"keep_history": "yes"}, TypeError, "keep_history must be True or False, got str"),
        ({"solver": Stop()}, TypeError, "solver must be .*got Stop"),
        ({"stop": Stop}, TypeError, r"stop must be a Stop, got the class Stop: write Stop\(\)"),
        ({"gradient": True}, TypeError, "gradient must be .*got bool"),
        ({"gradient": Stop()}, TypeError, "gradient must be .*got Stop"),
        ({"front": True}, TypeError, "front must be a Front or None, got bool"),
        ({"snapshots": (True,)}, TypeError, "snapshots must be an int, got bool"),
        ({"snapshots": (0,)}, ValueError, "snapshots must be at least 1, got 0"),
        ({"snapshots": [1.5]}, TypeError, "snapshots must be an int, got float"),
        ({"snapshots": range(3)}, TypeError, "snapshots must be a tuple of steps, got range"),
        ({"inputs": {"x": torch.ones(2)}}, TypeError, "inputs must be a tuple or list of tensors, got dict"),
        ({"inputs": "x"}, TypeError, "inputs must be a tuple or list of tensors, got str"),
        ({"inputs": (torch.ones(2), "x")}, TypeError, r"inputs\[1\] must be a tensor, .*, got str"),
        ({"inputs": [numpy.ones(2)]}, TypeError, r"inputs\[0\] must be a tensor, .*, got ndarray"),
        (
            {"inputs": [torch.tensor(1.0)]},
            ValueError,
            r"inputs\[0\] must have leading dimension 2 .*\(\)",
        ),
        ({"inputs": [torch.ones(2, device="meta")]}, ValueError, r"inputs\[0\] must be on cpu like z0, got meta"),
        ({"z0": None}, TypeError, "z0 must be a tensor or a nested tuple, list or dict of tensors, got NoneType"),
        ({"z0": numpy.ones((2, 3))}, TypeError, "z0 must be a tensor .*, got ndarray"),
        ({"z0": {"a": torch.ones(2, 3), "b": 1.0}}, TypeError, r"z0\['b'\] must be a tensor .*, got float"),
        ({"z0": ()}, ValueError, "z0 must hold at least one tensor"),
        ({"z0": torch.ones(2, 3, dtype=torch.bool)}, TypeError, "z0 must be float64.*, got torch.bool"),
        ({"z0": torch.ones(2, 3, dtype=torch.int16)}, TypeError, "z0 must be float64.*complex64, got torch.int16"),
        ({"fn": None}, TypeError, "fn must be callable, got NoneType"),
    ],
)
def test_wrong_arguments_are_refused_by_name(keywords, kind, message):
    arguments = {"fn": torch.cos, "z0": torch.ones(2, 3), **keywords}
    with pytest.raises(kind, match=message):
        solve(arguments.pop("fn"), arguments.pop("z0"), arguments.pop("inputs", ()), **arguments)


def test_a_map_that_changes_its_argument_in_place_is_refused():
    with pytest.raises(ValueError, match="in place"):
        solve(lambda z: z.mul_(0.5), torch.ones(2, 3), gradient=None)


def test_the_first_guess_is_left_alone_and_not_shared():
    z0 = torch.full((2, 3), 0.25)
    solution = solve(lambda z: z, z0, gradient=None)
    solution.z.zero_()
    assert torch.equal(z0, torch.full((2, 3), 0.25))


@pytest.mark.parametrize("keep", [lambda z: z, lambda z: z[:, 1:].T, lambda z: z.numpy()], ids=["it", "view", "numpy"])
@pytest.mark.parametrize("compact", [True, False])
def test_an_argument_that_fn_keeps_is_never_written_again(keep, compact):
    problem = problems.mixed_batch(6)
    kept, copies = [], []

    def fn(z, rate, b):
        kept.append(keep(z))
        copies.append(torch.as_tensor(keep(z)).clone())
        return problem.fn(z, rate, b)

    run(replace(problem, fn=fn), compact=compact)
    for held, copy in zip(kept, copies, strict=True):
        assert torch.equal(torch.as_tensor(held), copy)


def test_a_value_of_fn_kept_in_one_buffer_is_read_before_it_changes():
    buffer = torch.empty(1, 4, dtype=f64)
    b = torch.arange(4.0, dtype=f64)[None]
    solution = solve(lambda z: torch.add(b, z, alpha=0.5, out=buffer), b * 0, gradient=None, stop=Stop(rtol=1e-12))
    torch.testing.assert_close(solution.z, 2 * b, rtol=1e-11, atol=0)


def test_the_solution_does_not_keep_the_graph_or_history_alive_between_solves():
    import gc
    import weakref

    w = torch.tensor(0.5, requires_grad=True)
    solution = solve(lambda z: torch.tanh(w * z) + 1, torch.ones(2, 3), gradient=Implicit())
    dead = weakref.ref(solution)
    solution.z.sum().backward()
    del solution
    gc.collect()
    assert dead() is None


# Where tensors live


def test_another_default_device_changes_nothing():
    problem = problems.mixed_batch(4)
    expected = run(problem)
    for keywords in ({}, {"callback": lambda *seen: False}):
        with torch.device("meta"):
            found = run(problem, **keywords)
        assert torch.equal(found.z, expected.z)


@pytest.mark.parametrize("norm", ["rms", "max"])
def test_a_block_that_is_nan_makes_its_whole_sample_nonfinite(norm):
    def fn(z, bad):
        return torch.where(bad[:, None, None] & (torch.arange(3) == 0)[:, None], torch.nan, 0.5 * z + 1)

    bad = torch.tensor([False, True])
    solution = solve(
        fn,
        torch.zeros(2, 3, 4),
        (bad,),
        solver=Anderson(2, coupling="independent"),
        stop=Stop(norm=norm),
        gradient=None,
    )
    assert solution.status.tolist() == [Status.CONVERGED, Status.NONFINITE]
