"""The Krylov passes of a device, run under the emulator of tests/emulation, against GMRES in PyTorch."""

import functools

import krylov_laws as laws
import pytest
import torch
from emulation.backend import emulated_backend
from emulation.krylov import emulated_krylov
from examples import examples
from hypothesis import given
from hypothesis import strategies as st
from systems import JUDGED, diagonal, rhs

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


def here(fn, *given_):
    """fn(…) by the passes of the host."""
    return fn(*given_)


# A warp owns up to 1024 entries, a thread block up to 4096 and chunks of that; packs are 4 floats or 2 doubles.
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", [f32, f64])
@pytest.mark.parametrize(
    ("B", "N", "radius", "normal"),
    [*laws.SHAPES, (9, 65, 0.5, True), (2, 1027, 0.3, True), (1, 1100, 0.3, True)],
)  # fmt: skip
def test_it_takes_the_products_that_the_reference_takes_to_the_same_u(B, N, radius, normal, dtype, schedule):
    run = functools.partial(emulated, schedule=schedule)
    laws.takes_the_products_of_the_reference(run, B, N, radius, normal, dtype, restart=min(N, 100))


@pytest.mark.parametrize("dtype", [f32, f64])
@pytest.mark.parametrize("N", [4096, 4097, 9002, 20_000])
def test_samples_of_several_chunks_are_solved_as_the_reference_does(N, dtype):
    laws.solves_long_samples_as_the_reference_does(emulated, N, dtype, GMRES(12))


@pytest.mark.parametrize("N", [40, 6000])
def test_a_breakdown_ends_a_cycle_with_the_answer(N):
    rate = torch.tensor([-0.5, 0.3, 0.8], dtype=f64)[torch.arange(N) % 3]
    g = rhs(2, N, f64)
    u, how = emulated(GMRES().solve, lambda u: u * rate, g, Stop(1e-12))
    assert how.status.tolist() == [Status.CONVERGED] * 2
    assert how.evaluations.tolist() == [4, 4]  # three directions, and the residual
    torch.testing.assert_close(u, g / (1 - rate), rtol=1e-11, atol=1e-11)


def test_a_singular_system_whose_basis_is_whole_is_that_of_least_squares():
    laws.ends_a_singular_system_at_least_squares(emulated)


@pytest.mark.parametrize("restart", [1, 2, 5])
def test_short_cycles_end_where_long_ones_do(restart):
    laws.ends_short_cycles_where_long_ones_end(emulated, restart)


@pytest.mark.parametrize("N", [6, 65, 1500, 9000])
def test_a_sample_is_what_it_is_alone_bit_for_bit_beside_bad_ones(N):
    laws.solves_a_sample_beside_bad_ones_as_if_alone(emulated, N)


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
    laws.has_a_power_of_two_of_the_cotangent_in_the_answer(emulated, dtype, k)


@pytest.mark.parametrize("largest", [3e-42, 2.0**-149, 3e38])
def test_a_cotangent_at_the_ends_of_its_dtype_is_solved_for(largest):
    g = rhs(2, 40, f64)
    g = (g / g.abs().amax(1, keepdim=True) * largest).float()
    u, how = emulated(GMRES().solve, lambda u: -u, g, Stop(1e-6))
    assert how.status.tolist() == GMRES().solve(lambda u: -u, g, Stop(1e-6))[1].status.tolist()
    torch.testing.assert_close(u.double(), g.double() / 2, rtol=1e-6, atol=2.0**-150)


@pytest.mark.parametrize("budget", [0, 1, 2, 7, 12])
def test_a_budget_counts_products_and_ends_as_in_the_reference(budget):
    laws.counts_the_products_of_a_budget(emulated, budget)


@pytest.mark.filterwarnings("ignore:the adjoint of solve:RuntimeWarning")
@examples(60)
@given(st.fixed_dictionaries(JUDGED | {"each": st.booleans()}))
def test_an_adjoint_is_judged_as_on_the_host(case):
    laws.judges_an_adjoint_alike(emulated, here, **case)


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
