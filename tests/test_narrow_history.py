"""Histories of bfloat16 and float16 states: what is kept in 16 bits, and what that changes."""

import copy
import math
import pickle
from dataclasses import replace

import problems
import pytest
import torch
from examples import examples
from hypothesis import given
from hypothesis import strategies as st

from pydeqsolve import DEQ, Anderson, Broyden, Picard, Status, Stop, solve
from pydeqsolve.loop import iterate
from pydeqsolve.step import native
from pydeqsolve.step.backend import Backend, choose
from pydeqsolve.step.records import KEEP, MIX
from pydeqsolve.step.ring import COUPLINGS, KINDS, Method, Ring

NARROW = [torch.bfloat16, torch.float16]
cpu = torch.device("cpu")


@pytest.fixture(params=["native", "reference"])
def backend(request, monkeypatch):
    if request.param == "reference":
        monkeypatch.setattr(native, "_native", None)
    elif native._native is None:
        pytest.skip("no native module")


def ring_of(method, shape, dtype, stored=None):
    """A ring for states of `dtype`, whose rows are `stored` in that or another."""
    ring = Ring(method, *shape, stored or dtype, cpu)
    ring.eps = torch.finfo(dtype).eps
    ring.R.fill_(math.nan)  # what was never written must never be read
    ring.F.fill_(math.nan)
    return ring


class WideRing(Ring):
    """A ring whose rows are float32 whatever the state's dtype."""

    def __init__(self, method, B, T, D, dtype, device):
        super().__init__(method, B, T, D, torch.float32, device)
        self.eps = torch.finfo(dtype).eps


class Wide(Backend):
    """Steps of states in 16 bits whose history is a `WideRing`."""

    def measure(self, f, z, rows, wanted):
        return choose(self.ring, self.rule).measure(f.float(), z.float(), rows, wanted)

    def advance(self, z, mode, rows, out=None):
        z_next, dropped = choose(self.ring).advance(z.float(), mode, rows)
        return z_next.to(z.dtype), dropped


def affine(dtype, most, seed=0, D=48, B=6):
    """z = A z + b in `dtype`, spectrum [−.5, most]."""
    A = problems.with_spectrum(torch.linspace(-0.5, most, D, dtype=torch.float64), seed)
    b = torch.randn(B, D, dtype=torch.float64, generator=problems.generator(seed + 1))
    return lambda z: (z.double() @ A + b).to(dtype), torch.zeros(B, D, dtype=dtype)


@pytest.mark.parametrize("dtype", NARROW)
@examples(60)
@given(
    kind=st.sampled_from(KINDS), coupling=st.sampled_from(COUPLINGS), B=st.integers(1, 4), T=st.integers(1, 3),
    D=st.sampled_from([1, 7, 16, 33, 70, 600, 16_400]), memory=st.integers(0, 12), steps=st.integers(1, 14),
    norm=st.sampled_from(["l2", "max"]), masked=st.booleans(), seed=st.integers(0, 9999),
)  # fmt: skip
def test_residuals_that_need_no_rounding_give_the_gram_matrices_of_a_float32_history(
    dtype, kind, coupling, B, T, D, memory, steps, norm, masked, seed
):
    method, g = Method(kind, memory, 1.0, 0.0, coupling), problems.generator(seed)
    narrow, wide = (ring_of(method, (B, T, D), dtype, stored) for stored in (dtype, torch.float32))
    rows = torch.randperm(B, generator=g)
    for _ in range(steps):
        # Integers up to 64: their differences, and all sums of products, are exact in either.
        f, z = torch.randint(-64, 65, (2, B, T, D), generator=g).to(dtype)
        wanted = torch.rand(B, T, generator=g) < 0.8 if masked else None
        mode = torch.full((B, T), MIX, dtype=torch.uint8)
        if wanted is not None:
            mode[~wanted] = KEEP
        rule = problems.measured_in(norm)
        norms = choose(narrow, rule).measure(f, z, rows, wanted)
        assert torch.equal(norms, choose(wide, rule).measure(f.float(), z.float(), rows, wanted))
        for name in ("gram", "steps_gram", "rhs", "squares", "count"):
            if getattr(narrow, name) is not None:
                assert torch.equal(getattr(narrow, name), getattr(wide, name)), name
        found, dropped = choose(narrow).advance(z, mode, rows)
        expected, expected_dropped = choose(wide).advance(z.float(), mode, rows)
        assert torch.equal(dropped, expected_dropped)
        if expected.abs().max() < 1000:  # else weights are large, and either loses digits of its own
            assert (found.float() - expected).abs().max() <= torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("kind", ["anderson II", "anderson I"])
def test_the_ring_keeps_residuals_to_the_nearest_and_norms_without_rounding(backend, dtype, kind):
    g = problems.generator(5)
    f, z = (s * torch.randn(2, 1, 777, generator=g) for s in (1.0, 1e-3))
    f, z = f.to(dtype), z.to(dtype)
    ring = ring_of(Method(kind, 2), (2, 1, 777), dtype)
    norms = choose(ring).measure(f, z, torch.arange(2), None)
    exact = f.double() - z.double()
    assert torch.equal(ring.R[:, ring.head], exact.to(dtype))
    assert torch.equal(ring.F[:, ring.head], f)
    torch.testing.assert_close(norms[..., 0], exact.square().sum(-1), rtol=1e-6, atol=0)  # r is formed in float32
    rounded = exact.to(dtype).double().square().sum(-1)
    assert ((norms[..., 0] - rounded).abs() > 1e-6 * norms[..., 0]).all()


@pytest.mark.parametrize("kind", ["anderson II", "broyden good"])
def test_a_residual_beyond_the_range_of_float16_is_kept_at_its_largest(backend, kind):
    f = torch.full((1, 1, 40), 60_000.0, dtype=torch.float16)
    f[..., 20:] = -60_000.0
    f[..., 7] = math.nan
    ring = ring_of(Method(kind, 1), (1, 1, 40), torch.float16)
    choose(ring, problems.measured_in("max")).measure(f, -f, torch.arange(1), None)
    kept = ring.R[0, ring.head, 0]
    assert kept[7].isnan()
    assert set(kept[~kept.isnan()].tolist()) == {65_504.0, -65_504.0}
    f[..., 7] = 0
    assert choose(ring, problems.measured_in("max")).measure(f, -f, torch.arange(1), None)[0, 0].tolist() == [
        120_000.0,
        60_000.0,
    ]


@pytest.mark.parametrize("kind", ["anderson II", "broyden good"])
@pytest.mark.parametrize("D", [1, 40])  # in single numbers and in vectors
def test_a_residual_that_bfloat16_would_round_to_infinity_is_kept_at_its_largest(backend, kind, D):
    largest = torch.finfo(torch.bfloat16).max  # the next number up would be 2^128; from half way on r is nearer to it
    f = torch.full((1, 1, D), largest, dtype=torch.bfloat16)
    f[..., 1::2] = -largest
    ring = ring_of(Method(kind, 1), (1, 1, D), torch.bfloat16)
    norms = choose(ring, problems.measured_in("max")).measure(f, -(2.0**-8) * f, torch.arange(1), None)
    assert norms[0, 0, 0] == (1 + 2.0**-8) * largest
    assert torch.equal(ring.R[0, ring.head], f[0])


def test_a_map_at_the_top_of_the_range_of_bfloat16_ends_as_its_scaled_down_twin(backend):
    largest = torch.finfo(torch.bfloat16).max
    ends, stop = [], Stop(rtol=2.0**-6)
    for scale in (1.0, 2.0**-40):
        f = torch.full((1, 40), scale * largest, dtype=torch.bfloat16)
        out = solve(lambda z, f=f: f, -(2.0**-8) * f, solver=Picard(damping=0.5), stop=stop, gradient=None)
        ends.append((out.status.item(), out.evaluations.item(), out.residual.item() / scale, out.z / scale))
    assert ends[0][:3] == ends[1][:3]
    assert ends[0][0] == Status.CONVERGED
    assert torch.equal(ends[0][3], ends[1][3])


def measured(kind, dtype, values, memory=3):
    """The ring after it has measured each (f, z) of `values`, both (B, 1, D)."""
    ring = ring_of(Method(kind, memory), values[0][0].shape, dtype)
    for f, z in values:
        choose(ring).measure(f, z, torch.arange(len(f)), None)
    return ring


def pairs(dtype, D, steps, B=2, seed=0):
    """Random f and z (B, 1, D), `steps` of them, that come closer to each other."""
    g = problems.generator(seed)
    base = torch.randn(B, 1, D, generator=g)
    return [
        tuple((base + 0.7**k * torch.randn(B, 1, D, generator=g)).to(dtype) for _ in range(2)) for k in range(steps)
    ]


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("D", [41, 512, 40_000])
def test_products_in_float_are_those_in_double_to_its_precision(dtype, kind, D, monkeypatch):
    values = pairs(dtype, D, 6)
    narrow = measured(kind, dtype, values)
    monkeypatch.setattr(native, "_native", None)
    oracle = measured(kind, dtype, values)
    assert torch.equal(narrow.R.nan_to_num(), oracle.R.nan_to_num())
    torch.testing.assert_close(narrow.squares, oracle.squares, rtol=1e-12, atol=0)
    for name in ("gram", "steps_gram", "rhs"):
        if getattr(oracle, name) is not None:
            found, expected = getattr(narrow, name), getattr(oracle, name)
            assert (found - expected).abs().max() <= 8 * torch.finfo(torch.float32).eps * expected.abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("exponent", [-110, -70, -30, 70, 120])
def test_a_power_of_two_times_bfloat16_rows_changes_no_bit_of_their_sums(kind, exponent):
    values = [(f.clamp(-8, 8), z.clamp(-8, 8)) for f, z in pairs(torch.bfloat16, 777, 7)]
    scale = 2.0**exponent
    plain = measured(kind, torch.bfloat16, values)
    scaled = measured(kind, torch.bfloat16, [(scale * f, scale * z) for f, z in values])
    for name in ("gram", "steps_gram", "rhs", "squares"):
        if getattr(plain, name) is not None:
            assert getattr(plain, name).any()
            assert torch.equal(getattr(scaled, name), scale**2 * getattr(plain, name)), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_residual_that_leaps_beyond_the_products_of_floats_is_summed_all_the_same(kind, monkeypatch):
    values = pairs(torch.bfloat16, 300, 3)
    f, z = values[-1]
    f[0], z[0] = 2.0**100 * f[0], 2.0**100 * z[0]
    narrow = measured(kind, torch.bfloat16, values)
    calm = measured(kind, torch.bfloat16, pairs(torch.bfloat16, 300, 3))
    monkeypatch.setattr(native, "_native", None)
    oracle = measured(kind, torch.bfloat16, values)
    for name in ("gram", "rhs", "squares"):
        torch.testing.assert_close(getattr(narrow, name)[0], getattr(oracle, name)[0], rtol=1e-6, atol=0)
        assert torch.equal(getattr(narrow, name)[1], getattr(calm, name)[1])


@pytest.mark.parametrize("dtype", NARROW)
def test_differences_that_outnumber_their_entries_are_left_out(dtype):
    ring = measured("anderson II", dtype, pairs(dtype, 4, 9, B=6), memory=8)
    _, dropped = choose(ring).advance(torch.zeros(6, 1, 4, dtype=dtype), torch.full((6, 1), MIX, dtype=torch.uint8),
                             torch.arange(6))  # fmt: skip
    assert (dropped >= 4).all()


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("solver", [Anderson(), Anderson(10), Anderson(kind="I"), Anderson(damping=0.7), Broyden(),
                                    Broyden(kind="bad")], ids=str)  # fmt: skip
def test_a_history_in_16_bits_costs_no_evaluations(dtype, solver, monkeypatch):
    stop = Stop(rtol=4 * torch.finfo(dtype).eps, max_steps=200)

    def cost():
        total = 0
        for seed in range(4):
            fn, z0 = affine(dtype, 0.9, seed)
            total += int(solve(fn, z0, solver=solver, stop=stop, gradient=None).check().evaluations.sum())
        return total

    narrow = cost()
    monkeypatch.setattr(iterate, "Ring", WideRing)
    monkeypatch.setattr(iterate, "choose", Wide)
    monkeypatch.setattr(iterate.reuse, "take", lambda *_: None)  # a step of before would be narrow
    assert abs(narrow - cost()) <= 0.1 * narrow


@pytest.mark.parametrize("dtype", NARROW)
def test_the_history_takes_two_bytes_an_entry(dtype):
    fn, z0 = affine(dtype, 0.9)
    ring = solve(fn, z0, solver=Anderson(3), stop=Stop(max_steps=4), gradient=None, keep_history=True).history.ring
    assert ring.R.nbytes + ring.F.nbytes == 2 * 2 * (3 + 1) * z0.numel()


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("solver", [Anderson(4), Anderson(4, kind="I"), Broyden(4), Picard(0.8)], ids=str)
def test_a_pickled_solve_goes_on_bit_for_bit(dtype, solver):
    fn, z0 = affine(dtype, 0.95)
    stop = Stop(rtol=0.0, max_steps=9)
    whole = solve(fn, z0, solver=solver, stop=stop, gradient=None, trace=True)
    half = solve(fn, z0, solver=solver, stop=Stop(rtol=0.0, max_steps=5), gradient=None, keep_history=True)
    for start in (half, copy.deepcopy(half), pickle.loads(pickle.dumps(half))):
        rest = solve(fn, start, solver=solver, stop=Stop(rtol=0.0, max_steps=5), gradient=None, trace=True)
        assert torch.equal(rest.trace, whole.trace[4:])


def test_a_shift_of_the_map_beyond_float16_leaves_finite_rows():
    fn, z0 = affine(torch.float16, 0.5)
    start = solve(lambda z: 2000 * fn(z / 2000), z0, stop=Stop(max_steps=4), gradient=None, keep_history=True)
    ring = start.history.fork()
    start.history.shift(ring, torch.full_like(start.history.z, 65_000.0))
    known = ring.F[:, [ring.head, ring.head - 1]]
    assert known.isfinite().all()
    assert (known == torch.finfo(torch.float16).max).any()


@pytest.mark.parametrize("dtype", NARROW)
def test_a_history_goes_with_states_of_its_own_dtype_alone(dtype):
    fn, z0 = affine(dtype, 0.9)
    start = solve(fn, z0, stop=Stop(max_steps=5), gradient=None, keep_history=True)
    start = replace(start, z=start.z.float())
    with pytest.raises(ValueError, match=r"but the state is .* in torch\.float32"):
        solve(fn, start, gradient=None)


@pytest.mark.parametrize("dtype", NARROW)
def test_a_layer_in_16_bits_goes_on_from_its_last_solution(dtype):
    A = problems.with_spectrum(torch.linspace(-0.5, 0.9, 48, dtype=torch.float64))
    layer = DEQ(lambda z, x: (z.double() @ A).to(dtype) + x, stop=Stop(rtol=4 * torch.finfo(dtype).eps), gradient=None,
                warm_start=True, keep_history=True)  # fmt: skip
    x = torch.randn(6, 48, generator=problems.generator(1)).to(dtype)
    cold = layer(x)
    assert cold.dtype == dtype
    again = layer(x)
    assert (layer.solution.evaluations <= 2).all()
    assert (again.float() - cold.float()).abs().max() <= 16 * torch.finfo(dtype).eps * cold.float().abs().max()
