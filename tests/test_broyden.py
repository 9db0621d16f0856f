"""Broyden: the dense textbook update as oracle, secant conditions, limited memory, figures."""

import problems
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_anderson import apply_inverse, secants

from pydeqsolve import Broyden, Status, Stop, solve

f64 = torch.float64


@pytest.mark.parametrize("kind", ["good", "bad"])
def test_memory_ten_solves_256_unknowns_to_1e_8_in_a_hundred_evaluations(kind):
    problem = problems.spectrum_sweep(256)
    solution = solve(problem.fn, problem.start, problem.inputs, solver=Broyden(memory=10, kind=kind),
                     stop=Stop(rtol=1e-8, max_steps=100), gradient=None).check()  # fmt: skip
    # ‖z − z*‖ ≤ ‖r‖ / (1 − .97).
    assert (solution.z - problem.solution).norm() <= 34 * 1e-8 * problem.solution.norm()


def dense_iterates(fn, z, steps: int, kind: str):
    """Broyden 1965 with dense matrices from B₀ = −I (J of r = f − z), no limit of memory; yields iterates (D,)."""
    D = len(z)
    H = -torch.eye(D, dtype=f64)
    r = fn(z[None])[0] - z
    for _ in range(steps):
        yield z
        s = -H @ r
        z = z + s
        after = fn(z[None])[0] - z
        y, r = after - r, after
        v = H.T @ s if kind == "good" else y
        H = H + torch.outer(s - H @ y, v) / (v @ y)


@pytest.mark.parametrize("kind", ["good", "bad"])
def test_iterates_are_those_of_the_dense_update(kind):
    A = problems.with_spectrum(torch.linspace(-0.8, 0.7, 10, dtype=f64), 3)
    b = torch.randn(10, dtype=f64, generator=problems.generator(4))
    z0 = torch.zeros(10, dtype=f64)
    seen = []
    solve(lambda z: torch.tanh(z @ A.T + b), z0[None], solver=Broyden(memory=12, kind=kind, safeguard=float("inf")),
          stop=Stop(rtol=0.0, max_steps=10), gradient=None, callback=lambda k, z, r: seen.append(z[0]))  # fmt: skip
    for found, expected in zip(seen, dense_iterates(lambda z: torch.tanh(z @ A.T + b), z0, 10, kind), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=20)
@given(
    kind=st.sampled_from(["good", "bad"]), memory=st.integers(1, 5), extra=st.integers(0, 3), seed=st.integers(0, 99)
)
def test_the_newest_secant_equation_holds_and_no_more(kind, memory, extra, seed):
    solver = Broyden(memory=memory, kind=kind)
    ring, s, y = secants(solver, 12, memory + extra, seed)
    for age in range(memory + extra):
        found = apply_inverse(ring, solver, s, y, y[-1 - age])
        assert torch.allclose(found, s[-1 - age], rtol=1e-6, atol=1e-6) == (age == 0), age


@settings(max_examples=20)
@given(
    kind=st.sampled_from(["good", "bad"]), memory=st.integers(1, 4), extra=st.integers(1, 4), seed=st.integers(0, 99)
)
def test_a_full_memory_gives_the_matrix_of_the_newest_pairs_alone(kind, memory, extra, seed):
    solver = Broyden(memory=memory, kind=kind)
    ring, s, y = secants(solver, 9, memory + extra, seed)
    H = -torch.eye(9, dtype=f64)
    for a, b in zip(s[-memory:], y[-memory:], strict=True):
        v = H.T @ a if kind == "good" else b
        H = H + torch.outer(a - H @ b, v) / (v @ b)
    v = torch.randn(9, dtype=f64, generator=problems.generator(seed + 1))
    torch.testing.assert_close(apply_inverse(ring, solver, s, y, v), H @ v, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["good", "bad"])
def test_kinsol_analytic_is_solved(kind):
    problem = problems.kinsol_analytic()
    solution = solve(problem.fn, problem.start, solver=Broyden(kind=kind), stop=Stop(rtol=1e-12), gradient=None).check()
    torch.testing.assert_close(solution.z, problem.solution, rtol=1e-10, atol=0)


def test_a_map_without_a_fixed_point_does_not_converge():
    solution = solve(lambda z: z + 1 + z * z, torch.zeros(1, 4, dtype=f64), solver=Broyden(), gradient=None)
    assert solution.status.item() != Status.CONVERGED


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"memory": 0}, "memory must be at least 1"),
        ({"kind": "ugly"}, "kind must be"),
        ({"safeguard": 0.5}, "safeguard must exceed 1"),
    ],
)
def test_impossible_settings_are_refused_by_name(keywords, message):
    with pytest.raises(ValueError, match=message):
        Broyden(**keywords)
