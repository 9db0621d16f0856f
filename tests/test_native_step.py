"""The native step against the PyTorch reference, on every instruction set; threads; installations without it."""

import math

import problems
import pytest
import torch
from examples import examples
from hypothesis import given
from hypothesis import strategies as st

from pydeqsolve import Anderson, Broyden, build_info, solve
from pydeqsolve.step import native as binding
from pydeqsolve.step import reference
from pydeqsolve.step.backend import choose
from pydeqsolve.step.records import ACCEPT, KEEP, MIX, PLAIN, REJECT
from pydeqsolve.step.ring import COUPLINGS, KINDS, STORAGES, Method, Ring

native = pytest.mark.skipif(not build_info()["native"], reason="no native module")
f64 = torch.float64


@pytest.fixture(params=["portable", "avx2", "avx512"])
def isa(request):
    """Runs the test on this instruction set, where the processor has it."""
    before = binding._native.cpu_isa() if binding._native is not None else ""
    if binding._native is None or not binding._native.choose_cpu_isa(request.param):
        pytest.skip(f"no {request.param} here")
    yield request.param
    assert binding._native.choose_cpu_isa(before)


@pytest.fixture
def no_native(monkeypatch):
    monkeypatch.setattr(binding, "_native", None)


def twins(method: Method, B: int, T: int, D: int, dtype: torch.dtype) -> tuple[Ring, Ring]:
    """Two equal rings, the first for the native step, the second for the reference."""
    rings = Ring(method, B, T, D, dtype, torch.device("cpu")), Ring(method, B, T, D, dtype, torch.device("cpu"))
    for ring in rings:
        ring.R.fill_(math.nan)  # what was never written must never be read
        ring.F.fill_(math.nan)
    return rings


def reference_step(ring: Ring, f, z, rows, wanted, norm: str, modes):
    ring.head = (ring.head + 1) % ring.slots
    norms = reference.measure(ring, f, z, rows, wanted, norm)
    mode = modes(ring)
    count = ring.count[rows]
    gamma, dropped = reference.weights(ring, mode, rows)
    return norms, mode, reference.mix(ring, gamma, mode, z, rows, count), dropped, gamma


shapes = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 90))


@native
@pytest.mark.parametrize("dtype", STORAGES)
@examples(60)
@given(
    kind=st.sampled_from(KINDS), coupling=st.sampled_from(COUPLINGS), shape=shapes, memory=st.integers(0, 20),
    damping=st.sampled_from([1.0, 0.6, 1.5]), ridge=st.sampled_from([0.0, 1e-6]), norm=st.sampled_from(["l2", "max"]),
    steps=st.integers(1, 30), masked=st.booleans(), seed=st.integers(0, 9999),
)  # fmt: skip
def test_each_step_equals_the_reference(
    dtype, kind, coupling, shape, memory, damping, ridge, norm, steps, masked, seed
):
    B, T, D = shape
    D += 2 * memory  # more features than differences: the small systems keep their rank
    method = Method(kind, memory, damping, ridge, coupling)
    rings = twins(method, B, T, D, dtype)
    g = problems.generator(seed)
    rows = torch.randperm(B, generator=g)
    for _ in range(steps):
        rows = rows[torch.rand(len(rows), generator=g) < 0.97]  # samples leave for good
        n = len(rows)
        if n == 0:
            break
        f, z = (torch.randn(n, T, D, dtype=f64, generator=g).to(dtype) for _ in range(2))
        wanted = torch.rand(n, T, generator=g) < 0.8 if masked else None
        draw = torch.rand(n, T, generator=g)

        def modes(ring, rows=rows, wanted=wanted, draw=draw):
            mode = torch.full(draw.shape, MIX, dtype=torch.uint8)
            mode[draw < 0.15] = PLAIN
            mode[draw < 0.10] = ACCEPT
            mode[(draw < 0.05) & (ring.count[rows] >= 2)] = REJECT
            mode[draw > 0.95] = KEEP
            if wanted is not None:
                mode[~wanted] = KEEP
            return mode

        norms, mode, expected, dropped, gamma = reference_step(rings[1], f, z, rows, wanted, norm, modes)
        torch.testing.assert_close(
            choose(rings[0], problems.measured_in(norm)).measure(f, z, rows, wanted), norms, rtol=1e-12, atol=0
        )
        found, found_dropped = choose(rings[0]).advance(z, mode, rows)
        assert torch.equal(rings[0].count, rings[1].count)
        assert torch.equal(found_dropped, dropped)
        if gamma.abs().max() < 30:  # larger weights tell of a nearly singular system, where rounding decides
            tolerance = {f64: 1e-7, torch.float32: 1e-4}.get(dtype, 1.01 * torch.finfo(dtype).eps)
            assert torch.equal(rings[0].R[rows, rings[0].head].isnan(), rings[1].R[rows, rings[1].head].isnan())
            assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@native
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", STORAGES)
def test_each_instruction_set_gives_the_reference_solution(isa, kind, dtype):
    A = problems.with_spectrum(torch.linspace(-0.5, 0.9, 70, dtype=f64)).to(dtype)
    b = torch.randn(3, 70, dtype=f64, generator=problems.generator(1)).to(dtype)
    rings = twins(Method(kind, 6), 3, 1, 70, dtype)
    rows = torch.arange(3)
    z = torch.zeros(3, 1, 70, dtype=dtype)
    for _ in range(9):
        f = (z.double() @ A.T.double() + b[:, None].double()).to(dtype)
        _, mode, expected, _, _ = reference_step(
            rings[1], f, z, rows, None, "l2", lambda ring: torch.zeros(3, 1, dtype=torch.uint8) + MIX
        )
        choose(rings[0]).measure(f, z, rows, None)
        found, _ = choose(rings[0]).advance(z, mode, rows)
        size = expected.abs().max()
        tolerance = {f64: 1e-8, torch.float32: 1e-5}.get(dtype, 1.01 * torch.finfo(dtype).eps)
        assert (found - expected).abs().max() <= tolerance * size
        z = expected


@native
@pytest.mark.parametrize("solver", [Anderson(), Anderson(kind="I"), Broyden(), Anderson(coupling="causal")], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 200_000), (9, 4, 3_000), (4000, 2, 8)])
def test_the_number_of_threads_changes_no_bit(solver, shape):
    rate = torch.linspace(-0.5, 0.95, math.prod(shape)).reshape(shape)
    b = torch.randn(shape, generator=problems.generator(0))
    before = torch.get_num_threads()
    solutions = []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            solutions.append(solve(lambda z: rate * z + b, torch.zeros(shape), solver=solver, gradient=None))
    finally:
        torch.set_num_threads(before)
    for other in solutions[1:]:
        assert torch.equal(solutions[0].z, other.z)
        assert torch.equal(solutions[0].residual, other.residual)


@native
@pytest.mark.parametrize("length", [1, 7, 15, 16, 17, 511, 512, 513, 1 << 14, (1 << 14) + 1, 40_001])
def test_tails_of_every_length_are_summed(isa, length):
    ring = Ring(Method(memory=1), 1, 1, length, f64, torch.device("cpu"))
    f, z = torch.randn(2, 1, 1, length, dtype=f64, generator=problems.generator(length))
    squares = choose(ring).measure(f, z, torch.zeros(1, dtype=torch.int64), None)
    torch.testing.assert_close(
        squares[0, 0], torch.stack([(f - z).square().sum(), f.square().sum()]), rtol=1e-12, atol=0
    )
    largest = choose(ring, problems.measured_in("max")).measure(f, z, torch.zeros(1, dtype=torch.int64), None)
    assert torch.equal(largest[0, 0], torch.stack([(f - z).abs().max(), f.abs().max()]))


@native
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 3, 599, 40_000])
def test_nan_and_infinity_anywhere_reach_the_norms(isa, bad, position):
    ring = Ring(Method(memory=1), 2, 1, 40_001, torch.float32, torch.device("cpu"))
    f, z = torch.ones(2, 2, 1, 40_001)
    f[0, 0, position] = bad
    for norm in ("l2", "max"):
        norms = choose(ring, problems.measured_in(norm)).measure(f, z, torch.arange(2), None)
        assert not norms[0].isfinite().any()
        assert norms[1, 0].tolist() == [0.0, 40_001.0 if norm == "l2" else 1.0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("available", [True, False], ids=["native", "reference"])
def test_a_repeated_difference_is_left_out_and_counted(kind, available, monkeypatch):
    if available and not build_info()["native"]:
        pytest.skip("no native module")
    if not available:
        monkeypatch.setattr(binding, "_native", None)
    ring = Ring(Method(kind, 3), 1, 1, 6, f64, torch.device("cpu"))
    step, rows = torch.tensor([1.0, 2.0, 0.5, 0, 0, 0], dtype=f64), torch.zeros(1, dtype=torch.int64)
    for k in range(4):  # all iterates and residuals on one line: three equal differences
        z = k * step[None, None]
        choose(ring).measure(0.5 * z + 1, z, rows, None)
    z_next, dropped = choose(ring).advance(z, torch.full((1, 1), MIX, dtype=torch.uint8), rows)
    # The "good" matrix SᵀY + striu(SᵀS) of parallel steps has full rank or loses one; the others keep one difference.
    assert dropped.item() == 2 if kind.startswith("anderson") else z_next.isfinite().all()
    assert z_next.isfinite().all()


# Without the native module


@pytest.mark.parametrize("solver", [Anderson(), Anderson(kind="I"), Broyden(), Broyden(kind="bad")], ids=str)
def test_without_the_native_module_the_answers_are_the_same(no_native, solver):
    assert not build_info()["native"]
    problem = problems.mixed_batch(6)
    fallback = solve(problem.fn, problem.start, problem.inputs, solver=solver, gradient=None).check()
    assert (fallback.z - problem.solution).abs().max() < 1e-2
    again = solve(problem.fn, problem.start, problem.inputs, solver=solver, gradient=None)
    assert torch.equal(again.z, fallback.z)


@native
@pytest.mark.parametrize("solver", [Anderson(), Anderson(kind="I"), Broyden(), Broyden(kind="bad")], ids=str)
def test_native_and_fallback_take_the_same_steps(solver, monkeypatch):
    problem = problems.mixed_batch(6)
    with_native = solve(problem.fn, problem.start, problem.inputs, solver=solver, gradient=None)
    monkeypatch.setattr(binding, "_native", None)
    without = solve(problem.fn, problem.start, problem.inputs, solver=solver, gradient=None)
    assert torch.equal(with_native.evaluations, without.evaluations)
    torch.testing.assert_close(with_native.z, without.z, rtol=1e-7, atol=1e-7)


def test_a_memory_beyond_the_kernels_takes_the_reference():
    problem = problems.mixed_batch(4)
    long, short = (
        solve(problem.fn, problem.start, problem.inputs, solver=Anderson(memory=memory), gradient=None)
        for memory in (80, 60)  # neither fills up
    )
    assert torch.equal(long.evaluations, short.evaluations)
    torch.testing.assert_close(long.z, short.z, rtol=1e-7, atol=1e-7)


@native
def test_tensors_the_kernel_cannot_read_are_refused():
    ring = Ring(Method(memory=1), 2, 1, 4, f64, torch.device("cpu"))
    good, rows = torch.zeros(2, 1, 4, dtype=f64), torch.arange(2)
    for f in (
        good.float(),
        good.transpose(0, 2),
        torch.zeros(2, 1, 8, dtype=f64)[..., ::2],
        good[..., :3].contiguous(),
    ):
        with pytest.raises(ValueError, match="must"):
            choose(ring).measure(f, good, rows, None)
