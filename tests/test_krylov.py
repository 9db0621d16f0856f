"""GMRES by native passes against GMRES in PyTorch, and what a batch, its order and its threads may not change."""

import math

import krylov_laws as laws
import problems
import pytest
import torch
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from systems import JUDGED, by, diagonal, matrices, rhs, without_native

from pydeqsolve import GMRES, Neumann, Status, Stop, build_info
from pydeqsolve.step import native, systems

pytestmark = pytest.mark.skipif(not build_info()["native"], reason="no native module")
f32, f64, cpu = torch.float32, torch.float64, torch.device("cpu")
LONG = 40_000  # entries: three pieces of a sample


def here(fn, *given_):
    """fn(…) by the passes of the host."""
    return fn(*given_)


@pytest.fixture(params=["portable", "avx2", "avx512"])
def isa(request):
    """Every build of the passes that this processor runs."""
    best = build_info()["cpu_isa"]
    if not native._native.choose_cpu_isa(request.param):
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    native._native.choose_cpu_isa(best)


@pytest.mark.parametrize("dtype", [f32, f64])
@pytest.mark.parametrize(
    ("B", "N", "radius", "normal"),
    laws.SHAPES,
)
def test_it_takes_the_products_that_the_reference_takes_to_the_same_u(B, N, radius, normal, dtype, isa):
    laws.takes_the_products_of_the_reference(here, B, N, radius, normal, dtype, restart=N)


@pytest.mark.parametrize("dtype", [f32, f64])
def test_samples_of_several_pieces_are_solved_as_the_reference_does(dtype, isa):
    laws.solves_long_samples_as_the_reference_does(here, LONG, dtype, GMRES())


def test_the_residual_that_is_told_is_the_true_one(isa):
    A, g = matrices(3, 50, f64), rhs(3, 50, f64)
    u, how = GMRES().solve(by(A), g, Stop(1e-3))
    true = (g + by(A)(u) - u).norm(dim=1) / g.norm(dim=1)
    torch.testing.assert_close(how.residual, true, rtol=1e-9, atol=0)


@pytest.mark.parametrize("restart", [1, 2, 5])
def test_short_cycles_end_where_long_ones_do(restart, isa):
    laws.ends_short_cycles_where_long_ones_end(here, restart)


@pytest.mark.parametrize("budget", [0, 1, 2, 7, 12])
def test_a_budget_counts_products_and_ends_as_in_the_reference(budget):
    laws.counts_the_products_of_a_budget(here, budget)


@pytest.mark.parametrize(("B", "N"), [(64, 2_000), (3, LONG)])
def test_the_count_of_threads_changes_no_bit(B, N, isa):
    A, g = diagonal(N, f32), rhs(B, N, f32)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(GMRES().solve(A, g, Stop(1e-4))[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("N", [6, 65, LONG])
def test_a_sample_is_what_it_is_alone_bit_for_bit_beside_bad_ones(N, isa):
    laws.solves_a_sample_beside_bad_ones_as_if_alone(here, N)


@pytest.mark.parametrize("k", [-100, -30, 30, 100])
@pytest.mark.parametrize("dtype", [f32, f64])
def test_a_power_of_two_in_the_cotangent_is_one_in_the_answer(dtype, k, isa):
    laws.has_a_power_of_two_of_the_cotangent_in_the_answer(here, dtype, k)


def test_products_of_samples_that_have_ended_are_not_read():
    A, g = matrices(3, 40, f64, 0.9), rhs(3, 40, f64)
    A[1] *= 1e-4
    expected, known = GMRES().solve(by(A), g, Stop(1e-10, max_steps=400))
    calls = []

    def act(u):
        calls.append(u)
        product = by(A)(u)
        if not u[1].any() and len(calls) > 1:
            product[1] = math.nan
        return product

    found, how = GMRES().solve(act, g, Stop(1e-10, max_steps=400))
    assert any(not u[1].any() for u in calls)
    assert torch.equal(found, expected)
    assert torch.equal(how.status, known.status)


@pytest.mark.parametrize("seed", range(6))
def test_a_huge_u_has_to_gain_what_its_rounding_hides(seed, isa):
    # g does not lie in the range of I − A: some u of 10⁷ times its size have a residual that rounding makes look less.
    M = torch.randn(8, 20, dtype=f64, generator=problems.generator(seed)).float() / 20**0.5
    u, how = GMRES().solve(lambda u: u - 0.5 * (u @ M.T) @ M, rhs(2, 20, f32, 7), Stop(1e-6, max_steps=1000))
    assert how.status.tolist() == [Status.STALLED] * 2
    assert u.norm() < 1e4 * rhs(2, 20, f32, 7).norm()


def test_a_singular_system_whose_basis_is_whole_is_that_of_least_squares(isa):
    for run in (here, without_native):
        laws.ends_a_singular_system_at_least_squares(run)


@pytest.mark.filterwarnings("ignore:the adjoint of solve:RuntimeWarning")
@examples(60)
@given(st.fixed_dictionaries(JUDGED))
def test_an_adjoint_is_judged_as_in_pytorch(case):
    laws.judges_an_adjoint_alike(here, without_native, **case)


def test_a_cotangent_with_large_gaps_in_memory_is_taken_as_it_is(isa):
    A, g = matrices(3, 30, f64), rhs(3, 60, f64)[:, ::2]
    assert not g.is_contiguous()
    assert torch.equal(GMRES().solve(by(A), g, Stop(1e-6))[0], GMRES().solve(by(A), g.contiguous(), Stop(1e-6))[0])


def test_a_product_of_another_shape_is_refused():
    g = rhs(3, 30, f64)
    with pytest.raises(ValueError, match=r"A must return \(3, 30\) like g, got \(3, 29\)"):
        GMRES().solve(lambda u: u[:, :29], g, Stop(1e-6))


def test_a_map_that_returns_its_argument_is_not_written_to():
    # The product is then the basis vector itself.
    g = rhs(2, 30, f64)
    u, how = GMRES().solve(lambda u: -u if len(u) == 0 else u, g, Stop(1e-6))
    assert how.status.tolist() == [Status.STALLED] * 2
    assert u.isfinite().all()


@pytest.mark.parametrize("solver", [GMRES(), Neumann(2)])
@pytest.mark.parametrize("N", [3, 6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex64, torch.int64])
def test_a_right_side_that_no_kernel_can_read_is_refused(solver, N, dtype):
    message = rf"g must be a float32 or float64 tensor \(B, N\), got {dtype}"
    with pytest.raises(TypeError, match=message):
        solver.solve(lambda u: u, torch.ones(300, N, dtype=dtype), Stop(1e-2))


@pytest.mark.parametrize("solver", [GMRES(), Neumann(2)])
def test_a_right_side_must_be_a_tensor_of_two_dimensions(solver):
    with pytest.raises(TypeError, match=r"g must be a float32 or float64 tensor \(B, N\), got list"):
        solver.solve(lambda u: u, [[1.0]], Stop(1e-2))
    for g in (torch.ones(3), torch.ones(3, 2, 2)):
        with pytest.raises(ValueError, match=r"g must have shape \(B, N\), got"):
            solver.solve(lambda u: u, g, Stop(1e-2))
    with pytest.raises(TypeError, match="g must be a dense tensor"):
        solver.solve(lambda u: u, torch.ones(3, 2, device="meta"), Stop(1e-2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex64, torch.int64])
def test_the_kernels_are_handed_float32_and_float64_alone(dtype):
    g = torch.ones(4, 6, dtype=dtype)
    assert systems.krylov(g, 3) is None
    assert systems.small(g[:, :3].contiguous(), None, 1e-2, 0.0, 0.0) is None
