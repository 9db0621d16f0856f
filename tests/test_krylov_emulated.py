"""The Krylov passes of a device, run under the emulator of tests/emulation, against GMRES in PyTorch."""

import math

import pytest
import torch
from emulation.backend import emulated_backend
from emulation.krylov import emulated_krylov
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from systems import adjoint, by, diagonal, matrices, rhs, without_native

from pydeqsolve import GMRES, Implicit, Status, Stop, build_info, solve
from pydeqsolve.derivative import narrowed
from pydeqsolve.step.device import LATE, DeviceKrylov

pytestmark = [pytest.mark.check, pytest.mark.skipif(not build_info()["native"], reason="no native module")]
f32, f64 = torch.float32, torch.float64
SCHEDULES = (0, 1, 12345)


@pytest.fixture(autouse=True)
def nothing_is_read_before_it_was_written():
    """New tensors are full of NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def emulated(fn, *given_, schedule=0):
    with emulated_krylov(schedule) as kernels:
        found = fn(*given_)
    assert kernels.calls["begin"] > 0
    return found


# A warp owns up to 1024 entries, a thread block up to 4096 and chunks of that; packs are 4 floats or 2 doubles.
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", [f32, f64])
@pytest.mark.parametrize(
    ("B", "N", "radius", "normal"),
    [(1, 5, 0.5, True), (3, 17, 0.9, True), (4, 64, 0.9, True), (9, 65, 0.5, True), (2, 100, 1.3, True),
     (2, 24, 0.5, False), (2, 1027, 0.3, True), (1, 1100, 0.3, True)],
)  # fmt: skip
def test_it_takes_the_products_that_the_reference_takes_to_the_same_u(B, N, radius, normal, dtype, schedule):
    A, g = matrices(B, N, dtype, radius, normal=normal), rhs(B, N, dtype)
    stop = Stop(1e-5 if dtype == f32 else 1e-11, max_steps=400)
    u, how = emulated(GMRES(min(N, 100)).solve, by(A), g, stop, schedule=schedule)
    expected, known = without_native(GMRES(min(N, 100)).solve, by(A), g, stop)
    assert how.status.tolist() == known.status.tolist() == [Status.CONVERGED] * B
    assert (how.evaluations - known.evaluations).abs().max() <= (1 if known.evaluations.max() <= 31 else 3)
    exact = torch.linalg.solve(torch.eye(N, dtype=f64) - A.double(), g.double())
    allowed = stop.rtol * g.norm() * torch.linalg.inv(torch.eye(N, dtype=f64) - A.double()).norm(dim=(1, 2)).max()
    assert (u.double() - exact).norm() <= allowed
    assert (u - expected).norm() <= 2 * allowed


@pytest.mark.parametrize("dtype", [f32, f64])
@pytest.mark.parametrize("N", [4096, 4097, 9002, 20_000])
def test_samples_of_several_chunks_are_solved_as_the_reference_does(N, dtype):
    A, g = diagonal(N, dtype), rhs(2, N, dtype)
    u, how = emulated(GMRES(12).solve, A, g, Stop(1e-5))
    expected, known = without_native(GMRES(12).solve, A, g, Stop(1e-5))
    assert how.evaluations.tolist() == known.evaluations.tolist()
    torch.testing.assert_close(how.residual, known.residual, rtol=0.05, atol=0)
    assert (u - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("N", [40, 6000])
def test_a_breakdown_ends_a_cycle_with_the_answer(N):
    rate = torch.tensor([-0.5, 0.3, 0.8], dtype=f64)[torch.arange(N) % 3]
    g = rhs(2, N, f64)
    u, how = emulated(GMRES().solve, lambda u: u * rate, g, Stop(1e-12))
    assert how.status.tolist() == [Status.CONVERGED] * 2
    assert how.evaluations.tolist() == [4, 4]  # three directions, and the residual
    torch.testing.assert_close(u, g / (1 - rate), rtol=1e-11, atol=1e-11)


def test_a_singular_system_whose_basis_is_whole_is_that_of_least_squares():
    rate = torch.linspace(-0.5, 1, 50, dtype=f64)
    g = rhs(4, 50, f64, 8)
    u, how = emulated(GMRES(60).solve, lambda u: u * rate, g, Stop(1e-8, max_steps=400))
    assert how.status.tolist() == [Status.STALLED] * 4
    torch.testing.assert_close(how.residual, g[:, -1].abs() / g.norm(dim=1), rtol=1e-6, atol=0)
    torch.testing.assert_close(u[:, :-1], g[:, :-1] / (1 - rate[:-1]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("restart", [1, 2, 5])
def test_short_cycles_end_where_long_ones_do(restart):
    A, g = matrices(3, 12, f64, 0.6), rhs(3, 12, f64)
    u, how = emulated(GMRES(restart).solve, by(A), g, Stop(1e-9, max_steps=500))
    _, known = without_native(GMRES(restart).solve, by(A), g, Stop(1e-9, max_steps=500))
    assert how.status.tolist() == [Status.CONVERGED] * 3
    assert how.evaluations.tolist() == known.evaluations.tolist()
    exact = torch.linalg.solve(torch.eye(12, dtype=f64) - A, g)
    assert (u - exact).norm() <= 1e-7 * exact.norm()


@pytest.mark.parametrize("N", [6, 65, 1500, 9000])
def test_a_sample_is_what_it_is_alone_bit_for_bit_beside_bad_ones(N):
    rate = torch.linspace(-0.7, 0.9, N, dtype=f32)
    scale = torch.tensor([1.0, 0.3, 0.0, math.nan, 1e20])[:, None]
    g = rhs(5, N, f32)
    g[1] *= 1e-20
    g[2] = 0

    def run(rows):
        return emulated(GMRES().solve, lambda u: u * (rate * scale[rows]), g[rows], Stop(1e-5))

    together, how = run(slice(None))
    for i in range(5):
        alone, own = run(slice(i, i + 1))
        assert torch.equal(together[i], alone[0]) or bool(alone.isnan().any())
        assert how.status[i] == own.status[0]
        assert how.evaluations[i] == own.evaluations[0]
    assert how.status[:4].tolist() == [0, 0, 0, Status.NONFINITE]
    assert how.evaluations[2] == 0


@pytest.mark.parametrize("N", [64, 1500, 9000])
def test_neither_the_schedule_nor_alignment_changes_a_bit(N):
    A, g = diagonal(N, f32), rhs(2, N, f32)

    def shifted(u):
        memory = u.new_empty(u.numel() + 1)
        return memory[1:].view(u.shape).copy_(A(u))

    found = [emulated(GMRES().solve, A, g, Stop(1e-4), schedule=schedule) for schedule in SCHEDULES]
    found.append(emulated(GMRES().solve, shifted, g, Stop(1e-4)))
    for u, how in found[1:]:
        assert torch.equal(u, found[0][0])
        assert torch.equal(how.residual, found[0][1].residual)


@pytest.mark.parametrize("k", [-100, -30, 30, 100])
@pytest.mark.parametrize("dtype", [f32, f64])
def test_a_power_of_two_in_the_cotangent_is_one_in_the_answer(dtype, k):
    A, g = matrices(2, 40, dtype, 0.8), rhs(2, 40, dtype)
    u, how = emulated(GMRES().solve, by(A), g, Stop(1e-4))
    scaled, also = emulated(GMRES().solve, by(A), g * 2.0**k, Stop(1e-4))
    assert torch.equal(scaled, u * 2.0**k)
    assert torch.equal(also.residual, how.residual)


@pytest.mark.parametrize("largest", [3e-42, 2.0**-149, 3e38])
def test_a_cotangent_at_the_ends_of_its_dtype_is_solved_for(largest):
    g = rhs(2, 40, f64)
    g = (g / g.abs().amax(1, keepdim=True) * largest).float()
    u, how = emulated(GMRES().solve, lambda u: -u, g, Stop(1e-6))
    assert how.status.tolist() == GMRES().solve(lambda u: -u, g, Stop(1e-6))[1].status.tolist()
    torch.testing.assert_close(u.double(), g.double() / 2, rtol=1e-6, atol=2.0**-150)


@pytest.mark.parametrize("budget", [0, 1, 2, 7, 12])
def test_a_budget_counts_products_and_ends_as_in_the_reference(budget):
    A, g = matrices(2, 30, f64, 0.97), rhs(2, 30, f64)
    calls = []

    def counted(u):
        calls.append(1)
        return by(A)(u)

    u, how = emulated(GMRES(5).solve, counted, g, Stop(1e-12, max_steps=budget))
    assert len(calls) <= budget
    expected, known = without_native(GMRES(5).solve, by(A), g, Stop(1e-12, max_steps=budget))
    assert how.status.tolist() == known.status.tolist() == [Status.MAX_STEPS] * 2
    assert how.evaluations.tolist() == known.evaluations.tolist()
    torch.testing.assert_close(u, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:the adjoint of solve:RuntimeWarning")
@examples(60)
@given(
    st.sampled_from([torch.bfloat16, torch.float16, f32, f64]),
    st.sampled_from([1e-3, 1e-7, 0.0]),
    st.sampled_from([0.0, 1e-3, 1e-8]),
    st.booleans(),
    st.sampled_from([0.5, 0.99, 1.0, 1.5]),
    st.integers(-20, 20),
    st.integers(0, 3),
    st.sampled_from([20, 100]),
    st.booleans(),
)
def test_an_adjoint_is_judged_as_on_the_host(dtype, rtol, eps, follows, radius, exponent, seed, budget, each):
    N, B = 9, 4
    A = matrices(B, N, f64, radius, seed)
    A[0] = torch.diag(torch.linspace(0.1, radius, N, dtype=f64))  # radius 1: singular
    g = (rhs(B, N, f64, seed) * 2.0**exponent).to(dtype)[:, None]
    g[1] = math.inf if seed == 1 else 0.0 if seed == 2 else g[1]
    mask = torch.tensor([True, True, seed != 3, True])

    def products(u):
        return by(A)(u.double()).to(torch.promote_types(u.dtype, f32))

    stop = Stop(torch.full((B,), rtol, dtype=f64) if each else rtol, max_steps=budget)
    given_ = (products, g, None if bool(mask.all()) else mask, stop, follows, eps)
    u, how = emulated(adjoint, *given_)
    expected, known = adjoint(*given_)
    assert u.dtype == expected.dtype == dtype
    assert torch.equal(u.isfinite(), expected.isfinite())
    sure = known.residual.isinf() | ((known.residual - how.residual).abs() <= 0.5 * known.residual)
    # Rounding decides how such a residual comes out.
    near = max(4 * max(eps, torch.finfo(dtype).eps), 1e-12)
    assert (sure | (torch.maximum(known.residual, how.residual) <= near)).all()
    clear = (known.status == how.status) | ~((known.residual > 2 * max(rtol, near)) | (known.residual < rtol / 2))
    assert clear.all()
    assert (how.status[~mask] == int(Status.NONFINITE)).all()
    assert not u[~mask].any()


def test_a_batch_that_several_thread_blocks_count_is_solved():
    rate = torch.linspace(-0.5, 0.5, 5)
    g = rhs(700, 5, f32)
    with emulated_krylov() as kernels:
        u, how = GMRES().solve(lambda u: u * rate, g, Stop(1e-3))
    assert kernels.launches["count"] == 2 * kernels.calls["count"]
    assert not how.status.any()
    torch.testing.assert_close(u, g / (1 - rate), rtol=1e-2, atol=1e-2)


def test_more_samples_than_all_counting_threads_are_counted():
    B = 33_001
    with emulated_krylov() as kernels:
        krylov = DeviceKrylov(torch.ones(B, 5), 3, kernels)
        krylov.samples.fill_(1)  # every claim holds, and as many columns are sound as are taken
        found = [krylov._counted(which) for which in range(kernels.KRYLOV_COUNTS)]
    assert found == [B, B, 0, B, B]


def test_more_vectors_than_fit_in_shared_memory_are_left_to_pytorch():
    g = rhs(1, 1100, f32)
    with emulated_krylov() as kernels:
        _, how = GMRES(1025).solve(diagonal(1100, f32), g, Stop(1e-3))
    assert not kernels.calls
    assert how.status.tolist() == [Status.CONVERGED]


def test_an_empty_batch_has_no_launches():
    with emulated_krylov() as kernels:
        u, how = GMRES().solve(lambda u: u, torch.zeros(0, 7), Stop(1e-3))
    assert u.shape == (0, 7)
    assert how.status.shape == (0,)
    assert not kernels.calls


@pytest.mark.parametrize(("N", "launches", "others"), [(64, 1, 11), (4096, 1, 11), (9000, 7, 17)])
def test_launches_per_product_and_per_solve(N, launches, others):
    g, stop = rhs(2, N, f32), Stop(1e-4)
    with emulated_krylov() as kernels:
        _, how = GMRES().solve(diagonal(N, f32), g, stop)
    products = int(how.evaluations.max()) - 1
    assert kernels.calls["append"] == products + LATE
    assert kernels.launches["append"] == launches * kernels.calls["append"]
    # A count goes with each product; the others are begin, combine, accept, raise and judge, four of them counted.
    once = sum(kernels.launches.values()) - kernels.launches["append"] - kernels.calls["append"]
    assert once == others
    assert kernels.calls["count"] == kernels.calls["append"] + 4  # each of the four is a wait


def train(gradient):
    """A gradient of W through z = tanh(z Wᵀ + x), and the solution."""
    generator = torch.Generator().manual_seed(0)
    W = (torch.randn(64, 64, generator=generator) * 0.9 / 8).requires_grad_()
    x = torch.randn(32, 64, generator=generator)
    solution = solve(lambda z, x: torch.tanh(z @ W.T + x), torch.zeros(32, 64), (x,), stop=Stop(1e-4),
                     gradient=gradient)  # fmt: skip
    solution.z.square().sum().backward()
    return W.grad, solution


def test_a_training_step_has_the_gradient_that_it_has_on_the_host():
    expected, known = train(Implicit())
    with emulated_backend(), emulated_krylov() as kernels:
        found, solution = train(Implicit())
    assert kernels.calls["append"] >= int(solution.adjoint.evaluations.max()) - 1
    assert solution.adjoint.status.tolist() == known.adjoint.status.tolist() == [Status.CONVERGED] * 32
    assert (solution.adjoint.evaluations - known.adjoint.evaluations).abs().max() <= 1
    assert (found - expected).norm() <= 1e-3 * expected.norm()


def test_products_are_of_the_samples_that_go_on_alone_where_these_are_few(monkeypatch):
    monkeypatch.setattr(narrowed, "LEAST", 1)
    rate = torch.logspace(-3, -0.01, 8, dtype=f64)[:, None] * torch.linspace(-1, 1, 24, dtype=f64)
    x = rhs(8, 24, f64).requires_grad_()
    seen = []

    def fn(z, x, rate):
        seen.append(len(z))
        return rate * torch.tanh(z) + x

    solution = solve(fn, torch.zeros_like(x), (x, rate), stop=Stop(1e-10))
    seen.clear()
    with emulated_krylov():
        (found,) = torch.autograd.grad(solution.z.sum(), x)
    assert seen
    assert max(seen) <= 4
    assert solution.adjoint.status.tolist() == [Status.CONVERGED] * 8
    z = solution.z.detach()
    torch.testing.assert_close(found, 1 / (1 - rate * (1 - z.tanh() ** 2)), rtol=1e-8, atol=1e-8)
