"""How samples end: that a status says no more than was measured, and what the messages name as cause and remedy."""

import math

import problems
import pytest
import torch

from pydeqsolve import (
    GMRES,
    Anderson,
    Broyden,
    ConvergenceError,
    Implicit,
    Neumann,
    Picard,
    Status,
    Stop,
    solve,
)

f64 = torch.float64
EVERY = pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden(), Broyden(line_search=4)], ids=str)


def ended(solution):
    return Status(solution.status.item())


def message(fn, z0, inputs=(), **options):
    """What `check` says of the solve."""
    with pytest.raises(ConvergenceError) as error:
        solve(fn, z0, inputs, gradient=None, **options).check()
    return str(error.value)


@EVERY
@pytest.mark.parametrize("D", [8, 40])
def test_a_delay_line_whose_residual_only_moves_on_is_not_called_stalled(solver, D):
    # ‖r‖ = 1 at every step until the ones have come to the end: exact after D steps.
    shift = lambda z: torch.cat([torch.ones_like(z[:, :1]), z[:, :-1]], 1)  # noqa: E731
    solution = solve(shift, torch.zeros(1, D, dtype=f64), solver=solver, stop=Stop(max_steps=400), gradient=None)
    assert ended(solution) is Status.CONVERGED


def test_slow_progress_in_bfloat16_is_not_called_stalled():
    # The residual falls by 2 % a step, less than four units of rounding of bfloat16.
    z0, stop = torch.ones(1, 8, dtype=torch.bfloat16), Stop(rtol=0.0, atol=0.05, max_steps=300)
    solution = solve(lambda z: (-0.98 * z.float()).to(z.dtype), z0, solver=Picard(), stop=stop, gradient=None)
    assert ended(solution) is Status.CONVERGED


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, f64])
@pytest.mark.parametrize("solver", [Anderson(), Anderson(kind="I"), Broyden()], ids=str)
def test_an_accelerated_step_with_a_huge_residual_is_taken_back_like_one_that_is_nan(solver, dtype):
    """At an iterate beyond ±2 the residual is some 10^4 … 10^40 times what it was; Picard never goes there."""
    size = {torch.bfloat16: 1e8, torch.float16: 6e4, torch.float32: 1e20, f64: 1e40}[dtype]
    b = torch.linspace(0.05, 0.95, 16).to(dtype)[:, None]

    def fn(z, b):
        inside = z.double() + 0.45 * (b.double() - z.double() ** 3)
        return torch.where(z.abs() < 1, inside, size).to(dtype)

    stop = Stop(rtol=8 * torch.finfo(dtype).eps, max_steps=300)
    solution = solve(fn, torch.zeros_like(b), (b,), solver=solver, stop=stop, gradient=None)
    assert Status.DIVERGED not in solution.status


@pytest.mark.parametrize("norm", ["rms", "l2", "max"])
def test_a_norm_of_f_that_overflows_does_not_excuse_the_residual(norm):
    # ‖f‖² overflows float64, ‖r‖² does not: r is 1 % of f, a thousand times the tolerance.
    solution = solve(
        lambda z: torch.full_like(z, 1e155), torch.full((1, 2), 1.01e155, dtype=f64), solver=Picard(),
        stop=Stop(norm=norm, max_steps=1), gradient=None,
    )  # fmt: skip
    assert not solution.converged.any()


def test_an_infinite_relative_tolerance_takes_a_value_of_zero_too():
    stop = Stop(rtol=math.inf)
    for z0 in (torch.zeros(1, 2), torch.ones(1, 2)):
        assert solve(lambda z: 0 * z, z0, stop=stop, gradient=None).evaluations.item() == 1


def test_an_infinite_tolerance_does_not_take_nan():
    for stop in (Stop(rtol=math.inf), Stop(atol=math.inf)):
        solution = solve(lambda z: z * torch.nan, torch.ones(1, 2), stop=stop, gradient=None)
        assert ended(solution) is Status.NONFINITE


def test_a_refused_excursion_at_the_end_of_the_budget_is_not_called_divergence():
    calls = []

    def fn(z):
        calls.append(1)
        return 0.5 * torch.sin(z) + (1e9 if len(calls) == 6 else 1.0)

    solution = solve(fn, torch.zeros(1, 3, dtype=f64), stop=Stop(rtol=0.0, max_steps=6), gradient=None)
    assert solution.rejections.item() == 1
    assert ended(solution) is Status.MAX_STEPS


@pytest.mark.parametrize("solver", [Anderson(), Anderson(kind="I"), Broyden(), Broyden(line_search=8)], ids=str)
def test_starts_of_a_mixture_from_which_plain_steps_stay_in_the_domain_never_end_non_finite(solver):
    problem = problems.poisson_mixture(60)
    solution = solve(problem.fn, problem.start, solver=solver, stop=Stop(rtol=1e-7, max_steps=300), gradient=None)
    assert Status.NONFINITE not in solution.status
    assert solution.rejections.sum() > 0


@pytest.mark.parametrize("solver", [Anderson(), Broyden()], ids=str)
def test_after_a_value_that_is_nan_the_next_iterate_is_the_last_finite_value(solver):
    seen, values = [], []

    def fn(z):
        seen.append(z.clone())
        values.append(0.5 * torch.sin(z) + 1 + (torch.nan if len(seen) == 5 else 0.0))
        return values[-1]

    solution = solve(fn, torch.zeros(1, 3, dtype=f64), solver=solver, stop=Stop(rtol=1e-10), gradient=None)
    assert torch.equal(seen[5], values[3])
    assert solution.rejections.item() == 1
    assert ended(solution) is Status.CONVERGED


@EVERY
def test_a_map_that_is_nan_from_some_call_on_ends_non_finite_soon(solver):
    calls = []

    def fn(z):
        calls.append(1)
        return 0.5 * torch.sin(z) + (1.0 if len(calls) <= 4 else torch.nan)

    solution = solve(fn, torch.zeros(1, 3, dtype=f64), solver=solver, stop=Stop(rtol=1e-10), gradient=None)
    assert ended(solution) is Status.NONFINITE
    assert solution.evaluations.item() <= 4 + 2 * 5


# Messages.


@EVERY
def test_a_fixed_point_of_zero_is_told_to_set_atol(solver):
    W = problems.with_spectrum(torch.linspace(-0.8, 0.8, 64, dtype=f64)).float()
    z0 = torch.randn(4, 64, generator=problems.generator(0))
    said = message(lambda z: torch.tanh(z @ W), z0, solver=solver)
    assert said.startswith("solve did not converge: 4 of 4 MAX_STEPS (‖f‖ falls with the residual")
    assert "set Stop.atol" in said


def test_a_far_start_of_a_slow_map_is_not_taken_for_a_fixed_point_of_zero():
    said = message(lambda z: 0.97 * z + 1, torch.full((1, 3), 100.0, dtype=f64), solver=Picard())
    assert "Stop.atol" not in said


def test_a_budget_that_is_too_small_is_told_how_much_it_takes():
    fn = lambda z: 0.97 * z + 1  # noqa: E731
    z0 = torch.zeros(1, 3, dtype=f64)
    said = message(fn, z0, solver=Picard())
    assert "raise Stop.max_steps (to some " in said
    needed = solve(fn, z0, solver=Picard(), stop=Stop(max_steps=1000), gradient=None).evaluations.item()
    assert int(said.split("to some ")[1].split()[0]) == pytest.approx(needed, rel=0.25)


def test_a_solve_that_the_callback_ends_is_not_told_of_its_budget():
    solution = solve(
        lambda z: 0.9 * z + 1, torch.zeros(2, 3), solver=Picard(), callback=lambda step, z, r: step == 3, gradient=None
    )
    assert solution.status.tolist() == [Status.MAX_STEPS] * 2
    with pytest.raises(ConvergenceError, match="the callback ended the solve") as told:
        solution.check()
    assert "budget" not in str(told.value)


@pytest.mark.parametrize("stop", [Stop(rtol=0.0, max_steps=9), Stop(max_steps=0), Stop(max_steps=1)], ids=str)
def test_a_budget_that_cannot_be_foretold_has_a_message_too(stop):
    assert "raise Stop.max_steps" in message(
        lambda z: 0.97 * z + 1, torch.zeros(1, 3, dtype=f64), solver=Picard(), stop=stop
    )


@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden()], ids=str)
def test_noise_in_fn_is_not_told_that_more_steps_help(solver):
    g = problems.generator(0)
    W = torch.randn(16, 16, generator=g) / 8

    def noisy(z):
        return torch.tanh(z @ W + 1) + 1e-3 * torch.randn(z.shape, generator=g)

    said = message(noisy, torch.zeros(1, 16), solver=solver)
    assert "fn is noisy" in said
    assert "raise Stop.max_steps" not in said


@pytest.mark.parametrize("rate", [3.2, 3.5])
def test_a_cycle_is_told_to_damp_and_nothing_of_the_dtype(rate):
    said = message(
        lambda z: rate * z * (1 - z), torch.full((1, 1), 0.3, dtype=f64), solver=Picard(), stop=Stop(max_steps=300)
    )
    assert "lower the damping" in said
    assert "Anderson" in said
    assert "dtype" not in said


def test_stalling_at_the_rounding_of_the_dtype_is_told_so():
    g = problems.generator(0)
    W, x = torch.randn(16, 16, generator=g) / 6, torch.randn(4, 16, generator=g)
    said = message(lambda z, x: torch.tanh(z @ W + x), x, (x,), stop=Stop(rtol=1e-12, max_steps=300))
    assert "rounding of float32" in said
    assert "damping" not in said


def test_under_autocast_the_rounding_is_that_of_its_dtype():
    g = problems.generator(0)
    W, x = torch.randn(16, 16, generator=g) / 6, torch.randn(8, 16, generator=g)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        solution = solve(lambda z, x: torch.tanh(z @ W + x).float(), x, (x,), stop=Stop(rtol=1e-7), gradient=None)
    assert set(solution.status.tolist()) <= {Status.CONVERGED, Status.STALLED}
    with pytest.raises(ConvergenceError, match="rounding of the autocast dtype"):
        solution.check()


def test_a_map_beyond_its_fold_is_told_that_there_may_be_no_fixed_point():
    said = message(lambda z: z * z + 0.26, torch.zeros(1, 1, dtype=f64))
    assert "no fixed point nearby (a parameter beyond a fold)" in said
    assert "raise Stop.max_steps" not in said


def test_nan_at_the_start_is_told_apart_from_nan_later():
    assert "at z0" in message(lambda z: z.sqrt(), torch.full((1, 1), -1.0))
    later = message(lambda z: torch.where(z < 0, torch.nan, z - 1.0), torch.full((1, 1), 3.0), solver=Picard())
    assert "plain step" in later


def test_samples_are_counted_by_their_cause():
    rate = torch.tensor([[0.5], [0.99], [0.0]], dtype=f64)
    b = torch.tensor([[0.0], [1.0], [1.0]], dtype=f64)
    said = message(lambda z, rate, b: rate * z + b, torch.ones(3, 1, dtype=f64), (rate, b), solver=Picard())
    assert "1 of 3 MAX_STEPS (‖f‖ falls" in said
    assert "1 of 3 MAX_STEPS (the residual fell until" in said


def adjoint_warning(A, gradient):
    p = torch.ones(1, len(A), dtype=f64, requires_grad=True)
    solution = solve(
        lambda z, p: z @ A + p, torch.zeros(1, len(A), dtype=f64), (p,), stop=Stop(rtol=1e-6, max_steps=300),
        solver=Anderson(10), gradient=gradient,
    )  # fmt: skip
    with pytest.warns(RuntimeWarning, match="the adjoint of solve did not converge") as caught:
        solution.z.sum().backward()
    return str(caught[0].message)


def test_a_short_gmres_is_told_its_restart():
    A = problems.with_spectrum(torch.linspace(-0.5, 0.999, 60, dtype=f64))
    said = adjoint_warning(A, Implicit(solver=GMRES(8)))
    assert "GMRES(restart=" in said
    assert "damping" not in said


def test_a_singular_adjoint_is_called_singular():
    said = adjoint_warning(torch.eye(3, dtype=f64), Implicit())
    assert "singular" in said
    assert "damping" not in said


def test_adjoint_solvers_that_do_not_suffice_are_told_what_does():
    A = problems.with_spectrum(torch.linspace(-0.5, 0.999, 20, dtype=f64))
    assert "terms" in adjoint_warning(A, Implicit(solver=Neumann(5)))
    assert "use GMRES instead of Picard" in adjoint_warning(A, Implicit(solver=Picard()))


@pytest.mark.parametrize("status", list(Status))
def test_every_status_has_a_message(status):
    assert len(status.message) > 20


@pytest.mark.parametrize(
    ("norm", "status"), [("rms", Status.STALLED), ("l2", Status.STALLED), ("max", Status.CONVERGED)]
)
def test_a_residual_whose_square_vanishes_meets_no_tolerance(norm, status):
    # The squares of z are there, those of residuals a millionth of it are not.
    solution = solve(
        lambda z: 0.5 * z + 1e-160, torch.zeros(1, 4, dtype=f64), solver=Picard(), stop=Stop(norm=norm), gradient=None
    )
    assert solution.status.tolist() == [status]


def test_a_fixed_point_of_zero_is_not_said_to_be_met_where_squares_vanish():
    # z and f below 1e-162: their squares are 0 in float64, so that no residual is known.
    z0 = torch.full((2, 2), 1e-165, dtype=f64)
    z0[1] = 0
    solution = solve(lambda z: 0.5 * z, z0, solver=Picard(), gradient=None)
    assert solution.status.tolist() == [Status.STALLED, Status.CONVERGED]
    assert solve(lambda z: 0.5 * z, z0, solver=Picard(), stop=Stop(atol=1e-9), gradient=None).converged.all()
