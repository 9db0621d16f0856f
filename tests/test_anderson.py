"""Anderson: figures of the acceptance table, the least-squares definition, secant conditions, scale, safeguard."""

import itertools

import problems
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pydeqsolve import Anderson, Picard, Status, Stop, solve
from pydeqsolve.step.backend import choose
from pydeqsolve.step.records import MIX
from pydeqsolve.step.ring import Ring

f64 = torch.float64


def within(tolerance: float, max_steps: int) -> Stop:
    return Stop(rtol=0.0, atol=tolerance, norm="l2", max_steps=max_steps)


def run(problem: problems.Map, solver: Anderson, stop: Stop, **keywords):
    return solve(problem.fn, problem.start, problem.inputs, solver=solver, stop=stop, gradient=None, **keywords)


def error(solution, problem: problems.Map) -> float:
    return float((solution.z - problem.solution).abs().max())


# Figures


def test_kinsol_analytic_takes_six_evaluations_at_most():
    problem = problems.kinsol_analytic()
    solution = run(problem, Anderson(memory=2), within(1.5e-6, 6)).check()
    assert error(solution, problem) < 1e-5


def test_kinsol_roberts_takes_nine_evaluations_at_most():
    problem = problems.roberts()
    solution = run(problem, Anderson(memory=2), within(1e-10, 9)).check()
    assert error(solution, problem) < 1e-9


def test_jaxopt_geometric_takes_eight_evaluations_at_most():
    run(problems.geometric(), Anderson(memory=5), within(1e-6, 8)).check()


@pytest.mark.parametrize(("memory", "evaluations"), [(10, 45), (14, 18)])
def test_jaxopt_rotation_is_solved_though_nothing_contracts(memory, evaluations):
    run(problems.rotation(), Anderson(memory=memory), within(1e-4, evaluations)).check()


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_an_ill_conditioned_quadratic_is_solved_to_1e_8(scale):
    problem = problems.ill_conditioned(scale)
    run(problem, Anderson(memory=10), within(1e-8 * scale, 2000)).check()


def test_three_slow_modes_in_fifty_dimensions_lose_rank_without_harm():
    problem = problems.rank_deficient()
    solution = run(problem, Anderson(memory=15), within(1e-9, 500)).check()
    assert error(solution, problem) < 1e-6
    assert solution.z.isfinite().all()


def test_dependent_differences_are_counted_per_sample():
    # Sample 0 lives in one dimension, so its second difference is a multiple of the first; sample 1 in five.
    rate = torch.tensor([[0.5] * 5, [0.9, 0.7, 0.5, 0.3, 0.1]], dtype=f64)
    b = torch.randn(2, 5, dtype=f64, generator=problems.generator(0))
    solution = solve(lambda z, rate, b: rate * torch.sin(z) + b, b * 0, (rate, b), solver=Anderson(memory=4),
                     stop=Stop(rtol=1e-6), gradient=None).check()  # fmt: skip
    flat = solve(lambda z: 0.5 * z + 1, torch.zeros(1, 5, dtype=f64), solver=Anderson(memory=4),
                 stop=Stop(rtol=0.0, max_steps=4), gradient=None)  # fmt: skip
    assert solution.rank_losses.tolist() == [0, 0]
    assert flat.converged.all()


@pytest.mark.parametrize("kind", ["I", "II"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scale_changes_neither_counts_nor_relative_results(dtype, kind):
    problem = problems.spectrum_sweep(dtype=dtype)
    A, b = problem.inputs
    stop = Stop(rtol=1e-6 if dtype == f64 else 1e-4, max_steps=200)
    expected = run(problem, Anderson(kind=kind), stop).check()
    for k in (-60, -33, -10, 10, 33, 60):
        scaled = solve(problem.fn, problem.start, (A, b * 2.0**k), solver=Anderson(kind=kind), stop=stop, gradient=None)
        assert torch.equal(scaled.evaluations, expected.evaluations), k
        assert torch.equal(scaled.z / 2.0**k, expected.z), k


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_anderson_beats_picard_at_every_scale(scale):
    problem = problems.spectrum_sweep()
    A, b = problem.inputs
    counts = [
        solve(problem.fn, problem.start, (A, b * scale), solver=solver, stop=Stop(rtol=1e-6, max_steps=1000),
              gradient=None).check().evaluations.item()
        for solver in (Anderson(), Picard())
    ]  # fmt: skip
    assert counts[0] < 0.5 * counts[1]


# Definition


def reference_iterates(fn, z: Tensor, steps: int, memory: int, damping: float, kind: str):
    """Walker & Ni 2011, Eq. 2.2 (II), Fang & Saad 2009 (I), by lstsq and solve on (D,) vectors; yields iterates."""
    Z, R = [], []
    for _ in range(steps):
        yield z
        r = fn(z[None])[0] - z
        Z, R = [*Z, z][-memory - 1 :], [*R, r][-memory - 1 :]
        if len(R) == 1:
            z = z + damping * r
            continue
        S = torch.stack([b - a for a, b in itertools.pairwise(Z)], 1)
        Y = torch.stack([b - a for a, b in itertools.pairwise(R)], 1)
        gamma = torch.linalg.lstsq(Y, r[:, None]).solution if kind == "II" else torch.linalg.solve(
            S.T @ Y, (S.T @ r)[:, None])  # fmt: skip
        z = z + damping * r - ((S + damping * Y) @ gamma)[:, 0]


@pytest.mark.parametrize("kind", ["I", "II"])
@pytest.mark.parametrize("damping", [1.0, 0.7])
@pytest.mark.parametrize("memory", [1, 3])
def test_iterates_solve_the_least_squares_problem_of_the_definition(kind, damping, memory):
    A = problems.with_spectrum(torch.linspace(-0.8, 0.9, 12, dtype=f64), 3)
    b = torch.randn(12, dtype=f64, generator=problems.generator(4))

    def fn(z):
        return torch.tanh(z @ A.T + b)

    seen = []
    solver = Anderson(memory=memory, damping=damping, kind=kind, safeguard=float("inf"))
    solve(fn, torch.zeros(1, 12, dtype=f64), solver=solver, stop=Stop(rtol=0.0, max_steps=9), gradient=None,
          callback=lambda step, z, residual: seen.append(z[0]))  # fmt: skip
    for found, expected in zip(seen, reference_iterates(fn, torch.zeros(12, dtype=f64), 9, memory, damping, kind),
                               strict=True):  # fmt: skip
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def secants(solver, D: int, pairs: int, seed: int) -> tuple[Ring, list[Tensor], list[Tensor]]:
    """A ring fed with `pairs` + 1 random iterates; also s and y, oldest first, (D,) each."""
    g = problems.generator(seed)
    Z, F = torch.randn(2, pairs + 1, D, dtype=f64, generator=g)
    ring = Ring(solver.method(), 1, 1, D, f64, torch.device("cpu"))
    for z, f in zip(Z, F, strict=True):
        choose(ring).measure(f[None, None], z[None, None], torch.zeros(1, dtype=torch.int64), None)
    R = F - Z
    return ring, list(Z[1:] - Z[:-1]), list(R[1:] - R[:-1])


def apply_inverse(ring: Ring, solver, s: list[Tensor], y: list[Tensor], v: Tensor) -> Tensor:
    """H v of the quasi-Newton step z' = z − H r, by asking the step for the weights of v instead of r."""
    left = s if ring.by_steps else y
    newest_first = [w @ v for w in reversed(left)][: ring.slots - 1]
    ring.rhs[0, 0, : len(newest_first)] = torch.stack(newest_first)
    z = torch.zeros(1, 1, len(v), dtype=f64)
    f = ring.F[0, ring.head, 0]
    z_next, _ = choose(ring).advance(z, torch.full((1, 1), MIX, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64))
    return -v + f - z_next[0, 0]


@settings(max_examples=20)
@given(kind=st.sampled_from(["I", "II"]), memory=st.integers(1, 5), extra=st.integers(0, 3), seed=st.integers(0, 999))
def test_the_last_m_secant_equations_hold_and_no_more(kind, memory, extra, seed):
    solver = Anderson(memory=memory, kind=kind)
    ring, s, y = secants(solver, 12, memory + extra, seed)
    for age in range(memory + extra):
        found = apply_inverse(ring, solver, s, y, y[-1 - age])
        holds = torch.allclose(found, s[-1 - age], rtol=1e-6, atol=1e-6)
        assert holds == (age < memory), age


@settings(max_examples=20)
@given(ridge=st.sampled_from([1e-6, 1e-2, 0.5]), exponent=st.integers(-40, 40), seed=st.integers(0, 99))
def test_a_ridge_is_added_to_the_unit_diagonal_of_the_scaled_normal_equations(ridge, exponent, seed):
    solver = Anderson(memory=4, ridge=ridge)
    ring, s, y = secants(solver, 9, 4, seed)
    Y = torch.stack(y[::-1], 1)
    d = Y.norm(dim=0)
    v = torch.randn(9, dtype=f64, generator=problems.generator(seed + 1))
    gamma = torch.linalg.solve(Y.T @ Y / torch.outer(d, d) + ridge * torch.eye(4, dtype=f64), Y.T @ v / d) / d
    expected = -v + (torch.stack(s[::-1], 1) + Y) @ gamma
    torch.testing.assert_close(apply_inverse(ring, solver, s, y, v), expected, rtol=1e-9, atol=1e-9)


# Safeguard


@pytest.mark.parametrize("jump", [1000.0, float("nan"), float("inf")])
def test_a_refused_step_is_counted_and_goes_back_to_the_value_before_it(jump):
    values, seen = [], []

    def fn(z):
        f = 0.5 * torch.sin(z) + 1 + (jump if len(values) == 3 else 0.0)
        values.append(f)
        return f

    solution = solve(fn, torch.zeros(1, 3, dtype=f64), stop=Stop(rtol=1e-10), gradient=None,
                     callback=lambda step, z, residual: seen.append(z)).check()  # fmt: skip
    assert solution.rejections.item() == 1
    assert torch.equal(seen[4], values[2])  # refused: the fourth iterate; its predecessor's value is the third
    assert torch.equal(seen[5], values[4])  # then a plain step, from an empty history


def test_without_a_safeguard_nothing_finite_is_refused():
    values = []

    def fn(z):
        values.append(z)
        return 0.5 * torch.sin(z) + 1 + 1000.0 * (len(values) == 4)

    solution = solve(fn, torch.zeros(1, 3, dtype=f64), solver=Anderson(safeguard=float("inf")), gradient=None)
    assert solution.rejections.item() == 0


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"memory": -1}, "memory must be at least 0"),
        ({"damping": 0}, "damping must be in"),
        ({"kind": "III"}, "kind must be"),
        ({"ridge": 1.0}, "ridge must be"),
        ({"ridge": -1e-9}, "ridge must be"),
        ({"coupling": "time"}, "coupling must be one of"),
        ({"safeguard": 1.0}, "safeguard must exceed 1"),
        ({"kind": "I", "ridge": 1e-3}, "ridge"),
    ],
)
def test_impossible_settings_are_refused_by_name(keywords, message):
    with pytest.raises(ValueError, match=message):
        Anderson(**keywords)


# Couplings


@pytest.mark.parametrize("coupling", ["independent", "causal"])
def test_one_block_coupled_any_way_is_the_joint_solve(coupling):
    problem = problems.mixed_batch(4)
    rate, b = (x[:, None] for x in problem.inputs)
    solutions = [
        solve(problem.fn, b * 0, (rate, b), solver=Anderson(coupling=c), stop=Stop(rtol=1e-8), gradient=None)
        for c in ("joint", coupling)
    ]
    assert torch.equal(solutions[0].z, solutions[1].z)
    assert torch.equal(solutions[0].evaluations, solutions[1].evaluations)


def test_independent_blocks_are_solved_as_samples_of_their_own_would_be():
    rate = torch.linspace(0.3, 0.95, 6, dtype=f64)[None, :, None] * torch.linspace(-1, 1, 8, dtype=f64)
    b = torch.randn(1, 6, 8, dtype=f64, generator=problems.generator(2))
    steps = Stop(rtol=0.0, max_steps=7)
    blocks = solve(lambda z, rate, b: rate * z + b, b * 0, (rate, b), solver=Anderson(coupling="independent"),
                   stop=steps, gradient=None, trace=True)  # fmt: skip
    samples = solve(lambda z, rate, b: rate * z + b, b[0] * 0, (rate[0], b[0]), solver=Anderson(), stop=steps,
                    gradient=None, trace=True)  # fmt: skip
    torch.testing.assert_close(blocks.trace[:, 0], samples.trace.square().mean(1).sqrt(), rtol=1e-9, atol=0)


def test_causal_weights_of_a_block_ignore_the_blocks_after_it():
    def first_blocks(T):
        problem = problems.triangular(T, B=1, gain=0.9)
        seen = []
        b = problems.triangular(12, B=1, gain=0.9).inputs[0][:, :T]
        solve(problem.fn, b * 0, (b,), solver=Anderson(coupling="causal"), stop=Stop(rtol=0.0, max_steps=6),
              gradient=None, callback=lambda step, z, r: seen.append(z[:, :4]))  # fmt: skip
        return torch.stack(seen)

    assert torch.equal(first_blocks(4), first_blocks(12))


def test_causal_anderson_solves_a_far_from_normal_chain_while_its_residual_grows_first():
    problem = problems.triangular(20, gain=2.5)
    solution = run(problem, Anderson(coupling="causal"), Stop(rtol=1e-10), trace=True).check()
    assert error(solution, problem) < 1e-6
    assert (solution.trace[1:20] > 3 * solution.trace[0]).any()


@pytest.mark.parametrize("norm", ["rms", "l2", "max"])
@pytest.mark.parametrize("block", [0, 1, 2])
@pytest.mark.parametrize("coupling", ["independent", "causal"])
def test_a_block_that_is_nan_is_never_converged(coupling, block, norm):
    def fn(z):
        f = 0.5 * z + 1
        f[0, block] = torch.nan
        return f

    solution = solve(
        fn, torch.zeros(2, 3, 4), solver=Anderson(coupling=coupling), stop=Stop(rtol=1e-4, norm=norm), gradient=None
    )
    assert solution.status.tolist() == [Status.NONFINITE, Status.CONVERGED]
    assert solution.z.isfinite().all()
