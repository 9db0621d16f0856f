"""`NativeCPU.step`, the whole step at once, against the three passes it joins."""

import math

import problems
import pytest
import torch
from examples import examples
from hypothesis import given
from hypothesis import strategies as st

from pydeqsolve import Stop, build_info
from pydeqsolve.loop.judge import SampleJudge
from pydeqsolve.step.backend import choose
from pydeqsolve.step.records import MIX
from pydeqsolve.step.ring import COUPLINGS, KINDS, STORAGES, Method, Ring
from pydeqsolve.step.rules import Rule

pytestmark = pytest.mark.skipif(not build_info()["native"], reason="no native module")
cpu = torch.device("cpu")


class Passes:
    """A ring and its records, stepped by `NativeCPU.step` or by the passes one after the other."""

    def __init__(self, method: Method, shape: tuple[int, int, int], dtype: torch.dtype, norm: str) -> None:
        self.ring = Ring(method, *shape, dtype, cpu)
        self.ring.R.fill_(math.nan)  # what was never written must never be read
        self.ring.F.fill_(math.nan)
        self.rule = Rule(2.0, torch.finfo(dtype).eps, norm, shape[1] * shape[2])
        judge = SampleJudge(shape[0], Stop(rtol=1e-3, norm=norm), choose(self.ring, self.rule))
        self.samples = judge.samples
        self.best = torch.full(shape, math.nan, dtype=dtype)
        self.before: torch.Tensor | None = None

    def whole(self, f, z, rows, wanted):
        out = torch.full_like(z, math.nan)
        before = z if self.before is None else self.before
        step = choose(self.ring, self.rule).step
        mode = torch.full(f.shape[:2], 99, dtype=torch.uint8)
        counts = list(step(f, z, rows, wanted, self.samples, before, self.best, mode, out))
        self.before = z
        return mode, counts, out

    def parts(self, f, z, rows, wanted):
        norms = choose(self.ring, self.rule).measure(f, z, rows, wanted)
        mode, *counts = choose(self.ring, self.rule).judge(self.samples, norms, None)
        out, dropped = choose(self.ring).advance(z, mode, rows)
        self.samples["rank_losses"] += (dropped > 0).any(1)
        left_behind = self.samples["left_behind"] != 0
        if left_behind.any():
            self.best[rows[left_behind]] = self.before[left_behind]
        self.before = z
        return mode, counts, out

    def select(self, keep):
        self.samples.select(keep)
        self.before = self.before[keep]

    @property
    def state(self):
        ring = self.ring
        return ring.gram, ring.rhs, ring.squares, ring.count, self.samples.table, self.best


# Around whole vectors and lines, a piece of 16384 entries, and the size up to which a sample passes through at once.
FEATURES = (1, 3, 8, 15, 16, 17, 100, 600, 4096, 16_384, 16_385, 40_000)


@examples(80)
@given(
    kind=st.sampled_from(KINDS), coupling=st.sampled_from(COUPLINGS), B=st.integers(1, 40), T=st.integers(1, 3),
    D=st.sampled_from(FEATURES), memory=st.integers(0, 18), damping=st.sampled_from([1.0, 0.6]),
    norm=st.sampled_from(["rms", "max"]), dtype=st.sampled_from(STORAGES), masked=st.booleans(),
    threads=st.integers(1, 3), seed=st.integers(0, 9999),
)  # fmt: skip
def test_a_whole_step_equals_its_passes_bit_for_bit(
    kind, coupling, B, T, D, memory, damping, norm, dtype, masked, threads, seed
):
    B = max(1, min(B, 200_000 // (D * T * (memory + 1))))
    method, g = Method(kind, memory, damping, 0.0, coupling), problems.generator(seed)
    one, other = (Passes(method, (B, T, D), dtype, norm) for _ in range(2))
    rows = torch.randperm(B, generator=g)
    before = torch.get_num_threads()
    for k in range(min(memory, 4) + 3):
        n = len(rows)
        z = torch.randn(n, T, D, dtype=torch.float64, generator=g).to(dtype)
        # Residuals fall, jump, or hold a NaN: every mode comes up.
        size = torch.rand(n, 1, 1, dtype=torch.float64, generator=g) ** 4
        f = (z.double() + size * torch.randn(n, T, D, dtype=torch.float64, generator=g)).to(dtype)
        f[torch.rand(n, generator=g) < 0.03] = math.nan
        wanted = (torch.rand(n, 1, generator=g) < 0.8).expand(n, T).contiguous() if masked else None
        expected = other.parts(f, z, rows, wanted)
        try:
            torch.set_num_threads(threads)
            found = one.whole(f, z, rows, wanted)
        finally:
            torch.set_num_threads(before)
        assert torch.equal(found[0], expected[0]), k
        assert found[1] == expected[1]
        torch.testing.assert_close(found[2], expected[2], rtol=0, atol=0, equal_nan=True)
        for a, b in zip(one.state, other.state, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        keep = (torch.rand(n, generator=g) < 0.9).nonzero()[:, 0]
        if not keep.numel():
            break
        rows = rows[keep]
        one.select(keep)
        other.select(keep)


def test_systems_solved_side_by_side_do_not_see_each_other():
    B, D, memory = 21, 50, 5
    f, z = torch.randn(2, 8, B, 1, D, generator=problems.generator(3))
    f[4, 7] = math.inf  # a neighbour that breaks
    f[:, 12] = f[0, 12]  # and one whose differences all vanish
    z[:, 12] = z[0, 12]
    together = Passes(Method(memory=memory), (B, 1, D), torch.float32, "rms")
    alone = [Passes(Method(memory=memory), (1, 1, D), torch.float32, "rms") for _ in range(B)]
    for k in range(8):
        _, _, out = together.whole(f[k], z[k], torch.arange(B), None)
        for i, passes in enumerate(alone):
            _, _, single = passes.whole(f[k, i : i + 1], z[k, i : i + 1], torch.zeros(1, dtype=torch.int64), None)
            torch.testing.assert_close(single[0], out[i], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("B", [1, 300])  # at once, and past the caches: streamed stores and fetching ahead
def test_rows_that_are_not_aligned_take_the_same_values(B):
    D, memory = 4096, 5
    aligned, shifted = (Passes(Method(memory=memory), (B, 1, D), torch.float32, "rms") for _ in range(2))
    for name in ("R", "F"):
        rows = torch.full((getattr(shifted.ring, name).numel() + 1,), math.nan)[1:]
        setattr(shifted.ring, name, rows.view(B, memory + 1, 1, D))
    g = problems.generator(1)
    for _ in range(memory + 2):
        f, z = torch.randn(2, B, 1, D, generator=g)
        expected, found = (p.whole(f, z, torch.arange(B), None)[2] for p in (aligned, shifted))
        assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", ["rms", "max"])
def test_features_measured_in_two_parts_take_the_step_of_the_whole(kind, norm):
    B, T, D, cut = 3, 2, 40, 13
    method = Method(kind, 4, 0.7)
    sizes = (D, cut, D - cut)
    whole, *parts = (choose(Ring(method, B, T, d, torch.float64, cpu), problems.measured_in(norm)) for d in sizes)
    g = problems.generator(0)
    rows, mode = torch.tensor([2, 0, 1]), torch.full((B, T), MIX, dtype=torch.uint8)
    for _ in range(7):
        # Integers: sums of their products are exact in any order.
        f, z = torch.randint(-64, 65, (2, B, T, D), generator=g).double()
        norms = whole.measure(f, z, rows, None)
        pieces = [
            (f[..., :cut].contiguous(), z[..., :cut].contiguous()),
            (f[..., cut:].contiguous(), z[..., cut:].contiguous()),
        ]
        both = [part.measure(*piece, rows, None) for part, piece in zip(parts, pieces, strict=True)]
        assert torch.equal(torch.maximum(*both) if norm == "max" else both[0] + both[1], norms)
        total = parts[0].sums(rows) + parts[1].sums(rows)
        assert torch.equal(total, whole.sums(rows))
        for part in parts:
            part.put_sums(rows, total)
        expected, dropped = whole.advance(z, mode, rows)
        found = [part.advance(piece[1], mode, rows) for part, piece in zip(parts, pieces, strict=True)]
        assert torch.equal(torch.cat([x for x, _ in found], -1), expected)
        assert all(torch.equal(own, dropped) for _, own in found)


def test_sums_put_back_change_no_bit():
    backend = choose(Ring(Method("broyden good", 3), 4, 1, 9, torch.float32, cpu))
    rows, g = torch.arange(4), problems.generator(1)
    for _ in range(5):
        backend.measure(*torch.randn(2, 4, 1, 9, generator=g), rows, None)
    z, mode = torch.randn(4, 1, 9, generator=g), torch.full((4, 1), MIX, dtype=torch.uint8)
    expected = backend.advance(z, mode, rows)[0]
    backend.put_sums(rows, backend.sums(rows))
    assert torch.equal(backend.advance(z, mode, rows)[0], expected)
