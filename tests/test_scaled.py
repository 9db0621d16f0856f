"""The adjoint by other methods than GMRES: scaled, measured and judged by native passes as in PyTorch."""

import math

import krylov_laws as laws
import pytest
import torch
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from systems import JUDGED, adjoint, by, matrices, rhs, without_native
from test_krylov import here, isa  # noqa: F401

from pydeqsolve import Anderson, Broyden, Implicit, Neumann, Picard, Status, Stop, build_info, solve
from pydeqsolve.step import systems

pytestmark = pytest.mark.skipif(not build_info()["native"], reason="no native module")
f32, f64 = torch.float32, torch.float64
SOLVERS = [Neumann(), Neumann(terms=1), Picard(), Picard(damping=0.5), Anderson(), Broyden()]


@pytest.mark.filterwarnings("ignore:the adjoint of solve:RuntimeWarning")
@examples(60)
@given(st.sampled_from(SOLVERS), st.fixed_dictionaries(JUDGED | {"budget": st.sampled_from([5, 20])}), st.booleans())
def test_an_adjoint_is_judged_as_in_pytorch(solver, case, each):
    laws.judges_an_adjoint_alike(here, without_native, solver=solver, each=each, **case)


@pytest.mark.parametrize("dtype", [f32, f64])
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("N", [5, 40_000])
def test_it_takes_the_products_of_the_reference_to_the_same_u(solver, N, dtype, isa):  # noqa: F811
    g, rate = rhs(3, N, dtype)[:, None], torch.linspace(-0.7, 0.8, N, dtype=f64).to(dtype)
    given_ = (lambda u: u * rate, g, None, Stop(1e-4), False, 0.0, solver)
    (u, how), (expected, known) = adjoint(*given_), without_native(adjoint, *given_)
    assert how.evaluations.tolist() == known.evaluations.tolist()
    assert how.status.tolist() == known.status.tolist()
    torch.testing.assert_close(how.residual, known.residual, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(u, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("k", [-100, -30, 30, 100])
def test_a_power_of_two_in_the_cotangent_is_one_in_the_answer(solver, k, isa):  # noqa: F811
    A, g = matrices(3, 30, f32, 0.6), rhs(3, 30, f32)[:, None]
    u, how = adjoint(by(A), g, None, Stop(1e-4), False, 0.0, solver)
    scaled, own = adjoint(by(A), g * 2.0**k, None, Stop(1e-4), False, 0.0, solver)
    assert torch.equal(scaled, u * 2.0**k)
    assert how.evaluations.tolist() == own.evaluations.tolist()


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.filterwarnings("ignore:the adjoint of solve:RuntimeWarning")
def test_a_sample_is_what_it_is_alone_bit_for_bit_beside_bad_ones(solver):
    g = rhs(4, 30, f32)[:, None]
    g[1], g[2, 0, 3] = 0, math.inf
    rate = torch.linspace(-0.7, 0.8, 30) * torch.tensor([1.0, 1.0, 1.0, math.nan])[:, None]

    def of(rows):
        asked = torch.ones(len(g[rows]), dtype=torch.bool)
        return adjoint(lambda u: u * rate[rows], g[rows], asked, Stop(1e-4), False, 0.0, solver)

    u, how = of(slice(None))
    for i in range(4):
        alone, own = of(slice(i, i + 1))
        assert torch.equal(u[i], alone[0]) or bool(alone.isnan().any())
        assert (how.status[i], how.evaluations[i]) == (own.status[0], own.evaluations[0])
    assert how.status[2:].tolist() == [Status.NONFINITE] * 2
    assert not u[2:].isfinite().flatten(1).all(1).any()
    assert not u[1].any()


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("budget", [0, 1, 2])
@pytest.mark.filterwarnings("ignore:the adjoint of solve:RuntimeWarning")
def test_a_budget_counts_products(solver, budget):
    calls = []

    def counted(u):
        calls.append(1)
        return 0.5 * u

    given_ = (counted, rhs(2, 8, f64)[:, None], None, Stop(1e-9, max_steps=budget), False, 0.0, solver)
    u, how = adjoint(*given_)
    assert len(calls) <= budget
    expected, known = without_native(adjoint, *given_)
    assert how.status.tolist() == known.status.tolist()
    assert how.evaluations.tolist() == known.evaluations.tolist()
    torch.testing.assert_close(u, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_the_cotangent_and_the_products_are_not_written_to(solver):
    g = rhs(2, 8, f32)[:, None]
    before, constant = g.clone(), torch.full((2, 1, 8), 0.25)
    adjoint(lambda u: constant[:, 0], g, None, Stop(1.0), False, 0.0, solver)
    assert torch.equal(g, before)
    assert bool((constant == 0.25).all())


@pytest.mark.parametrize("solver", [Anderson(), Neumann()], ids=repr)
def test_the_passes_are_those_of_the_native_module(solver, monkeypatch):
    made = []
    kept = systems.krylov
    monkeypatch.setattr(systems, "krylov", lambda *given_: made.append(kept(*given_)) or made[-1])
    w = torch.tensor(0.4, requires_grad=True)
    z = solve(lambda z: torch.tanh(w * z + 1), torch.zeros(3, 9), gradient=Implicit(solver=solver)).z
    z.sum().backward()
    assert len(made) == 1
    assert made[0] is not None
