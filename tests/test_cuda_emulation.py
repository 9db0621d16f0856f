"""The CUDA kernels, run on the CPU under the emulator of tests/emulation: results, schedules, sanitizers, faults."""

from __future__ import annotations

import copy
import functools
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from emulation.backend import CSRC, HERE, MAX_SLOTS, Emulator, compile_emulated, emulated_backend, emulator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pydeqsolve import Anderson, Broyden, Picard, Status, Stop, solve
from pydeqsolve.loop.judge import SampleJudge
from pydeqsolve.step import reference
from pydeqsolve.step.backend import choose
from pydeqsolve.step.records import ACCEPT, KEEP, MIX, PLAIN, REJECT, Records
from pydeqsolve.step.ring import COUPLINGS, KINDS, STORAGES, Method, Ring
from pydeqsolve.step.rules import Rule, judge_samples

# Around a warp's packs, the border between warps and thread blocks (1024), and that between chunks (4096).
FEATURES = (1, 2, 3, 4, 7, 32, 65, 100, 128, 129, 1023, 1024, 1025, 1500, 4096, 4097, 9000)
# Around the groups of ages (4, 8, 16), the systems solved inside the mix kernel (8, 16), and the largest there is.
MEMORIES = (0, 1, 2, 3, 4, 5, 7, 8, 9, 11, 16, 17, 19)
SCHEDULES = (0, 1, 2, 3, 12345)

pytestmark = pytest.mark.check
STEP = {"damping": 0.7, "dtype": torch.float32, "seed": 0}


@pytest.fixture(scope="session")
def kernels() -> Emulator:
    return emulator()


class Case:
    """A ring, and what two calls on it need."""

    def __init__(self, kind: str, memory: int, coupling: str, damping: float, shape: tuple[int, int, int],
                 dtype: torch.dtype, seed: int, misaligned: bool, norm: str = "rms") -> None:  # fmt: skip
        self.generator = torch.Generator().manual_seed(seed)
        self.ring = Ring(Method(kind, memory, damping, 0.0, coupling), *shape, dtype, torch.device("cpu"))
        self.shape, self.dtype, self.misaligned, self.norm = shape, dtype, misaligned, norm
        self.ring.R, self.ring.F = self.placed(self.ring.R), self.placed(self.ring.F)

    def placed(self, x: Tensor) -> Tensor:
        """x where this case has its tensors: off 16 bytes by one entry, or not."""
        if not self.misaligned:
            return x
        memory = torch.empty(x.numel() + 1, dtype=x.dtype)
        return memory[1:].view(x.shape).copy_(x)

    def normal(self, *shape: int) -> Tensor:
        return self.placed(torch.randn(*shape, generator=self.generator, dtype=self.dtype))

    def choice(self, *shape: int, of: tuple[int, ...]) -> Tensor:
        return torch.tensor(of)[torch.randint(len(of), shape, generator=self.generator)]

    def rows(self) -> Tensor:
        """Some of the samples, in any order."""
        n = int(torch.randint(1, self.shape[0] + 1, (), generator=self.generator))
        return torch.randperm(self.shape[0], generator=self.generator)[:n]

    def __repr__(self) -> str:
        ring = self.ring
        return f"{ring.kind} {ring.coupling} M={ring.slots} {self.shape} {self.dtype} misaligned={self.misaligned}"


@st.composite
def cases(draw: st.DrawFn, memories: tuple[int, ...] = MEMORIES, features: tuple[int, ...] = FEATURES) -> Case:
    D = draw(st.sampled_from(features))
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 4 if D < 1000 else 2)), D)
    return Case(
        draw(st.sampled_from(KINDS)), draw(st.sampled_from(memories)), draw(st.sampled_from(COUPLINGS)),
        draw(st.sampled_from((1.0, 0.5, 1.3))), shape, draw(st.sampled_from(STORAGES)),
        draw(st.integers(0, 2**31)), draw(st.booleans()), draw(st.sampled_from(("rms", "max"))),
    )  # fmt: skip


schedules = st.sampled_from(SCHEDULES)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * max(1.0, float(expected.abs().max())))


@given(cases(), schedules, st.booleans())
@settings(max_examples=300)
def test_measure_equals_the_reference(kernels: Emulator, case: Case, schedule: int, full: bool) -> None:
    kernels.choose_schedule(schedule)
    ring, oracle = case.ring, copy.deepcopy(case.ring)
    _, T, D = case.shape
    rounding = 1e-12  # sums of products differ in their order alone
    rows = case.rows()  # the same throughout: a sample that leaves a solve does not come back
    for _ in range(ring.slots + 2 if full else 3):  # the oldest ages are those of a ring that has gone round
        f, z = case.normal(len(rows), T, D), case.normal(len(rows), T, D)
        wanted = case.choice(len(rows), T, of=(1,) * (2 * ring.slots + 2) + (0,)).bool()
        for each in (ring, oracle):
            each.head = (each.head + 1) % each.slots
        actual = kernels.measure(ring, f, z, rows, wanted, case.norm)
        expected = reference.measure(oracle, f, z, rows, wanted, case.norm)
        assert_close(actual, expected, 1e-12)
        assert torch.equal(ring.count, oracle.count)
        assert_close(ring.squares, oracle.squares, 1e-12)
        for b, t in ring.count.nonzero().tolist():
            count = int(ring.count[b, t])
            slots = [(ring.head - a) % ring.slots for a in range(count)]
            assert torch.equal(ring.R[b, slots, t], oracle.R[b, slots, t])
            assert torch.equal(ring.F[b, slots, t], oracle.F[b, slots, t])
            if count == 1:
                continue
            ages = torch.tensor(slots[:-1])
            for name in ("gram", "steps_gram"):
                if (gram := getattr(ring, name)) is not None:
                    newest = gram[b, t][ages[0]][ages], gram[b, t][ages][:, ages[0]]
                    gram = getattr(oracle, name)
                    assert_close(newest[0], gram[b, t][ages[0]][ages], rounding * D)
                    assert_close(newest[1], gram[b, t][ages][:, ages[0]], rounding * D)
            assert_close(ring.rhs[b, t, : count - 1], oracle.rhs[b, t, : count - 1], rounding * D)


@pytest.mark.parametrize("norm", ["rms", "max"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("D", [64, 1100, 9000])
def test_a_value_that_is_not_finite_shows_in_its_norm(kernels: Emulator, D: int, value: float, norm: str) -> None:
    case = Case("anderson II", 2, "joint", shape=(3, 1, D), misaligned=False, **STEP)
    f, z = case.normal(3, 1, D), case.normal(3, 1, D)
    f[1, 0, D - 2] = value
    norms = kernels.measure(case.ring, f, z, None, None, norm)
    assert not norms[1].isfinite().any()
    assert norms[[0, 2]].isfinite().all()


@pytest.mark.parametrize("damping", [1.0, 0.5])
def test_a_row_of_weight_zero_may_hold_anything(kernels: Emulator, damping: float) -> None:
    case = Case("anderson II", 3, "joint", shape=(1, 1, 64), misaligned=False, **{**STEP, "damping": damping})
    fill(case)
    ring, mode = case.ring, torch.full((1, 1), MIX, dtype=torch.uint8)
    ring.count.fill_(4)
    for rows in (ring.R, ring.F):
        rows[:, (ring.head - 3) % 4] = torch.inf
    gamma = torch.tensor([[[0.5, 0.25, 0.0, 0.0]]], dtype=torch.float64)
    assert kernels.mix(ring, gamma, mode, case.normal(1, 1, 64), None).isfinite().all()


def fill(case: Case) -> None:
    """Well conditioned small systems with a diagonal that dominates, any history, any counts."""
    ring, (B, T, _) = case.ring, case.shape
    M = ring.slots
    for name in ("gram", "steps_gram"):
        if getattr(ring, name) is not None:
            entries = 0.5 * torch.rand(B, T, M, M, generator=case.generator, dtype=torch.float64)
            if ring.kind == "anderson II":
                entries = (entries + entries.mT) / 2
            setattr(ring, name, (entries + M * torch.eye(M, dtype=torch.float64)).contiguous())
    ring.rhs = torch.randn(B, T, M, generator=case.generator, dtype=torch.float64)
    # r so small next to f, in some blocks, that no weight is worth its rounding.
    ring.squares = torch.rand(B, T, 2, generator=case.generator, dtype=torch.float64)
    ring.squares[..., 0] *= case.choice(B, T, of=(0, 1, 1, 1))
    ring.R, ring.F = case.normal(*ring.R.shape), case.normal(*ring.F.shape)
    ring.count = torch.randint(1, M + 1, (B, T), generator=case.generator, dtype=torch.int32)
    ring.head = int(torch.randint(M, (), generator=case.generator))


def modes(case: Case, n: int) -> Tensor:
    return case.choice(n, case.shape[1], of=(MIX, MIX, MIX, MIX, KEEP, REJECT, PLAIN, ACCEPT)).to(torch.uint8)


@given(cases(features=(2,), memories=(*MEMORIES, MAX_SLOTS - 1)), schedules, st.sampled_from((1, 3, 33, 70)))
@settings(max_examples=300)
def test_weights_equal_the_reference(kernels: Emulator, case: Case, schedule: int, T: int) -> None:
    kernels.choose_schedule(schedule)
    method = Method(case.ring.kind, case.ring.slots - 1, 1.0, 0.01, case.ring.coupling)
    case.shape = (case.shape[0], T, 2)
    case.ring = Ring(method, *case.shape, case.dtype, torch.device("cpu"))
    fill(case)
    rows = case.rows()
    mode, ring, oracle = modes(case, len(rows)), case.ring, copy.deepcopy(case.ring)
    gamma, dropped = kernels.weights(ring, mode, rows)
    expected, expected_dropped = reference.weights(oracle, mode, rows)
    mixes = mode == MIX
    torch.testing.assert_close(gamma[mixes], expected[mixes], rtol=1e-9, atol=1e-11)
    assert torch.equal(dropped[mixes], expected_dropped[mixes])
    assert not dropped[~mixes].any()
    assert torch.equal(ring.count, oracle.count)


@given(cases(), schedules)
@settings(max_examples=300)
def test_mix_equals_the_reference(kernels: Emulator, case: Case, schedule: int) -> None:
    kernels.choose_schedule(schedule)
    fill(case)
    ring, rows = case.ring, case.rows()
    mode = modes(case, len(rows))
    z = case.normal(len(rows), *case.shape[1:])
    gamma = torch.randn(len(rows), case.shape[1], ring.slots, generator=case.generator, dtype=torch.float64)
    gamma *= case.choice(*gamma.shape, of=(0, 1, 1))
    actual = kernels.mix(ring, gamma, mode, z, rows)
    expected = reference.mix(ring, gamma, mode, z, rows, ring.count[rows])
    assert_close(actual, expected, 1e-13 if case.dtype == torch.float64 else 2 * torch.finfo(case.dtype).eps)


@given(cases(), schedules)
@settings(max_examples=300)
def test_advance_is_weights_then_mix_to_the_bit(kernels: Emulator, case: Case, schedule: int) -> None:
    kernels.choose_schedule(schedule)
    fill(case)
    ring, apart, rows = case.ring, copy.deepcopy(case.ring), case.rows()
    mode, z = modes(case, len(rows)), case.normal(len(rows), *case.shape[1:])
    z_next, dropped, gamma = kernels.advance(ring, z, mode, rows)
    gamma_apart, dropped_apart = kernels.weights(apart, mode, rows)
    assert torch.equal(z_next, kernels.mix(apart, gamma_apart, mode, z, rows))
    assert torch.equal(dropped, dropped_apart)
    assert torch.equal(gamma[mode == MIX], gamma_apart[mode == MIX])
    assert torch.equal(ring.count, apart.count)


def records(n: int, stop: Stop, rule: Rule) -> Records:
    """Those of n samples before their first step."""
    return SampleJudge(n, stop, choose(Ring(Method(), n, 1, 1, torch.float32, torch.device("cpu")), rule)).samples


@given(
    st.integers(1, 20), st.integers(1, 70), st.sampled_from(("rms", "max")), st.booleans(), st.integers(0, 2**31),
    schedules,
)  # fmt: skip
@settings(max_examples=100)
def test_judge_equals_the_tensors(
    kernels: Emulator, n: int, T: int, norm: Literal["rms", "max"], drops: bool, seed: int, schedule: int
) -> None:
    kernels.choose_schedule(schedule)
    generator = torch.Generator().manual_seed(seed)
    rule = Rule(2.0, torch.finfo(torch.float32).eps, norm, 7)
    ours, oracle = (records(n, Stop(rtol=0.3, norm=norm), rule) for _ in range(2))
    for _ in range(6):
        norms = torch.rand(n, T, 2, generator=generator, dtype=torch.float64)
        norms[torch.rand(n, T, generator=generator) < 0.5 / T / n] = torch.nan
        norms[..., 0] *= 10.0 ** torch.randint(-3, 4, (n, 1), generator=generator)
        dropped = torch.randint(2, (n, T), generator=generator, dtype=torch.int32) if drops else None
        assert torch.equal(kernels.judge(ours, norms, dropped, rule), judge_samples(oracle, norms, dropped, rule))
        torch.testing.assert_close(ours.table, oracle.table, rtol=1e-12, atol=0, equal_nan=True)


@pytest.mark.parametrize(("D", "dtype"), [(3, torch.float16), (64, torch.bfloat16), (90_001, torch.float32)], ids=str)
def test_keep_copies_what_was_left_behind(kernels: Emulator, D: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    best, before = torch.randn(9, 2, D, generator=generator).to(dtype).split((6, 3))
    rows = torch.tensor([4, 0, 3])
    samples = records(3, Stop(), Rule(0.0, torch.finfo(dtype).eps, "rms", D))
    samples["left_behind"] = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    expected = best.clone()
    expected[4], expected[3] = before[0], before[2]
    kernels.keep(best, rows, before, samples)
    assert torch.equal(best, expected)


@pytest.mark.parametrize("D", [5, 1025, 2**31 - 1, 2**31 + 3, 2**33])
@pytest.mark.parametrize(("n", "T"), [(1, 1), (3, 2), (70_000, 3)])
def test_pieces_of_any_size_lie_where_the_shapes_say(kernels: Emulator, n: int, T: int, D: int) -> None:
    slots = 6
    pieces = kernels.piece(n, T, D, slots, 0)[-1]
    chunks = pieces // (n * T)
    assert (chunks == 1) == (D <= 4096)
    last_end = kernels.piece(n, T, D, slots, pieces - 1)[5]
    assert last_end == D
    for index in {0, pieces // 2, pieces - 1}:
        block, at, row, chunk, begin, end, _ = kernels.piece(n, T, D, slots, index)
        assert (block, chunk) == divmod(index, chunks)
        assert at == block  # no rows are chosen
        assert row == (block // T * slots * T + block % T) * D
        assert 0 <= begin < end <= D
        if chunk:
            assert kernels.piece(n, T, D, slots, index - 1)[5] == begin


def run_steps(kernels: Emulator, case: Case, f: Tensor, z: Tensor) -> list[Tensor]:
    """Everything two passes write, over the leading dimension of f and z (steps, B, T, D)."""
    written = []
    ring = case.ring
    for f_now, z_now in zip(f, z, strict=True):
        ring.head = (ring.head + 1) % ring.slots
        here = case.placed(z_now)
        norms = kernels.measure(ring, case.placed(f_now), here, None, None, case.norm)
        mode = torch.full(norms.shape[:2], MIX, dtype=torch.uint8)
        written += [norms, ring.gram.clone(), ring.rhs.clone(), *kernels.advance(ring, here, mode, None)]
    return written


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize(
    ("memory", "shape"), [(5, (3, 2, 96)), (10, (2, 2, 1100)), (3, (2, 1, 5000)), (18, (2, 3, 60))]
)
def test_the_schedule_changes_no_bit(
    kernels: Emulator, coupling: str, memory: int, shape: tuple[int, int, int]
) -> None:
    f, z = torch.randn(2, 4, *shape, generator=torch.Generator().manual_seed(1))
    runs = []
    for schedule in SCHEDULES:
        kernels.choose_schedule(schedule)
        case = Case("anderson II", memory, coupling, shape=shape, misaligned=False, **STEP)
        runs.append(run_steps(kernels, case, f, z))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("D", [64, 1100, 5000])
def test_alignment_changes_no_bit(kernels: Emulator, D: int) -> None:
    f, z = torch.randn(2, 4, 2, 2, D, generator=torch.Generator().manual_seed(1))
    runs = []
    for misaligned in (False, True):
        case = Case("broyden good", 5, "causal", shape=(2, 2, D), misaligned=misaligned, **STEP)
        runs.append(run_steps(kernels, case, f, z))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("D", [64, 1100, 5000])
def test_a_sample_alone_has_the_bits_it_has_in_a_batch(kernels: Emulator, D: int) -> None:
    f, z = torch.randn(2, 4, 5, 2, D, generator=torch.Generator().manual_seed(1))
    together = run_steps(kernels, Case("anderson I", 4, "joint", shape=(5, 2, D), misaligned=False, **STEP), f, z)
    alone = Case("anderson I", 4, "joint", shape=(1, 2, D), misaligned=False, **STEP)
    for a, b in zip(together, run_steps(kernels, alone, f[:, 3:4], z[:, 3:4]), strict=True):
        assert torch.equal(a[3:4], b)


@pytest.mark.parametrize(
    ("coupling", "shape", "launches"),
    [
        ("joint", (4, 1, 64), 2),
        ("joint", (2, 1, 4096), 2),
        ("independent", (2, 3, 64), 2),
        ("joint", (1, 1, 4100), 3),  # the sums of several chunks are added up by a kernel of their own
        ("causal", (2, 3, 64), 4),  # sums over time, then the small systems
        ("joint", (2, 3, 64), 4),
    ],
)
def test_launches_per_step(kernels: Emulator, coupling: str, shape: tuple[int, int, int], launches: int) -> None:
    f, z = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(1))
    before = kernels.launches
    run_steps(kernels, Case("anderson II", 5, coupling, shape=shape, misaligned=False, **STEP), f, z)
    assert kernels.launches - before == 3 * launches


def contraction(D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A symmetric A (D, D) with spectrum in [−0.5, 0.9], and b (8, D)."""
    generator = torch.Generator().manual_seed(0)
    Q, _ = torch.linalg.qr(torch.randn(D, D, generator=generator, dtype=torch.float64))
    A = Q * torch.linspace(-0.5, 0.9, D, dtype=torch.float64) @ Q.mT
    return A.to(dtype), torch.randn(8, D, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", STORAGES)
@pytest.mark.parametrize(
    "solver",
    [Picard(0.9), Anderson(5), Anderson(9, kind="I"), Anderson(18, damping=0.8), Broyden(8), Broyden(8, kind="bad")],
    ids=str,
)
def test_a_solve_takes_the_steps_it_takes_on_the_cpu(solver: Anderson | Broyden | Picard, dtype: torch.dtype) -> None:
    A, b = contraction(48, torch.float64 if dtype == torch.float64 else torch.float32)

    def fn(z: Tensor) -> Tensor:
        return (z.to(A.dtype) @ A + b).to(dtype)

    stop = Stop(
        rtol={torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype], max_steps=400
    )
    native = solve(fn, torch.zeros_like(b).to(dtype), solver=solver, stop=stop, gradient=None)
    with emulated_backend(schedule=7) as kernels:
        before = kernels.launches
        emulated = solve(fn, torch.zeros_like(b).to(dtype), solver=solver, stop=stop, gradient=None)
        assert kernels.launches > before
    assert emulated.converged.all()
    assert ((emulated.evaluations - native.evaluations).abs() <= 2).all()
    assert_close(emulated.z.double(), native.z.double(), 30 * float(stop.rtol))


def test_a_bad_sample_spoils_no_other() -> None:
    _, b = contraction(40, torch.float64)
    a = torch.linspace(-0.5, 0.9, 40, dtype=torch.float64)

    def fn(z: Tensor, b: Tensor, bad: Tensor) -> Tensor:
        return torch.where(bad[:, None], torch.nan, a * z + b)

    bad = torch.arange(8) == 3
    with emulated_backend():
        good = solve(fn, torch.zeros_like(b), (b, torch.zeros(8, dtype=torch.bool)), gradient=None)
        mixed = solve(fn, torch.zeros_like(b), (b, bad), gradient=None)
    assert mixed.status[3] == Status.NONFINITE
    assert torch.equal(mixed.z[~bad], good.z[~bad])
    assert torch.equal(mixed.evaluations[~bad], good.evaluations[~bad])


DRIVERS = ("driver", "krylov_driver")
ADDRESS = ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
THREAD = ["-g", "-fsanitize=thread"]


def run_driver(program: Path, schedule: int) -> subprocess.CompletedProcess[str]:
    # Leaks are not looked for: LeakSanitizer does not know the fibers' stacks, and cannot run under a tracer.
    options = {
        "ASAN_OPTIONS": "detect_leaks=0",
        "TSAN_OPTIONS": "halt_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=0",
    }
    return subprocess.run([program, str(schedule)], capture_output=True, text=True, env={**os.environ, **options})


@pytest.fixture(scope="session")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Path]]:
    """Objects of the CPU step, which is always the unchanged one, by flags."""

    @functools.cache
    def build(*flags: str) -> list[Path]:
        folder = tmp_path_factory.mktemp("oracle")
        return [
            compile_emulated([CSRC / "cpu" / f"{name}.cpp"], folder / f"{name}.o", ["-O0", "-c", *flags])
            for name in ("step_cpu", "dispatch", "krylov_cpu", "krylov_dispatch")
        ]

    return build


def build_driver(
    name: str, folder: Path, flags: list[str], oracle: Callable[..., list[Path]], csrc: Path = CSRC
) -> Path:
    return compile_emulated([HERE / f"{name}.cpp", *oracle(*flags)], folder / name, ["-O0", *flags], csrc)


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize(
    ("flags", "schedules"), [(ADDRESS, (0, 1, 5)), (THREAD, (0, 6))], ids=["address and undefined", "thread"]
)
def test_sanitizers_find_nothing(
    tmp_path: Path, oracle: Callable[..., list[Path]], flags: list[str], schedules: tuple[int, ...], driver: str
) -> None:
    program = build_driver(driver, tmp_path, flags, oracle)
    for schedule in schedules:
        done = run_driver(program, schedule)
        assert done.returncode == 0, done.stderr[-4000:]
        assert ", 0 failures" in done.stdout


FAULTS = {
    "a removed __syncthreads": (
        THREAD, "pieces.cuh", "      __syncthreads();\n    }\n  }\n};", "    }\n  }\n};", "data race",
    ),
    "a removed __syncwarp": (THREAD, "pieces.cuh", "      __syncwarp();\n", "", "data race"),
    "a removed team barrier": (
        THREAD, "sums.cuh", "parts + warp * Mine::kValues);\n  team.sync();\n", "parts + warp * Mine::kValues);\n",
        "data race",
    ),
    "an index out of bounds": (
        ["-g", "-fsanitize=address"], "packs.cuh", "pack.set(k, k < length ? p[k] : Scalar(0));",
        "pack.set(k, p[k]);", "AddressSanitizer: heap-buffer-overflow",
    ),
    "shared memory one double too small": (
        ["-g", "-fsanitize=address"], "launch.cuh", "static_cast<std::size_t>(teams * bytes)}",
        "static_cast<std::size_t>(teams * bytes) - 8}", "AddressSanitizer: heap-buffer-overflow",
    ),
    "an alignment not checked": (
        ["-g", "-fsanitize=alignment", "-fno-sanitize-recover=all"], "launch.cuh", "return bits % 16 == 0;",
        "return bits % 16 != 1;", "misaligned address",
    ),
    "a barrier in a divergent branch": (
        [], "sums.cuh", "parts + warp * Mine::kValues);\n  team.sync();\n",
        "parts + warp * Mine::kValues);\n  if (team.rank > 0) team.sync();\n", "EMULATION ERROR: barrier not reached",
    ),
    "sums of warps that are read before they are written": (
        THREAD, "krylov_sums.cuh", "parts + warp * kValues);\n  team.sync();\n", "parts + warp * kValues);\n",
        "data race",
    ),
    "rotations that are read before they are there": (
        THREAD, "krylov_append.cuh", "rotation[1];\n  }\n  team.sync();\n", "rotation[1];\n  }\n", "data race",
    ),
    "a column one double too small": (
        ["-g", "-fsanitize=address"], "krylov_append.cuh", "call.column + i * (k + 4), k,",
        "call.column + i * (k + 4) + 1, k,", "AddressSanitizer: heap-buffer-overflow",
    ),
    "a shuffle in a divergent branch": (
        [], "sums.cuh", "  add_over_warp(mine.values, lane,", "  if (lane != 5) add_over_warp(mine.values, lane,",
        "EMULATION ERROR",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(tmp_path: Path, oracle: Callable[..., list[Path]], fault: str) -> None:
    flags, name, old, new, message = FAULTS[fault]
    csrc = tmp_path / "csrc"
    shutil.copytree(CSRC, csrc)
    source = csrc / "cuda" / name
    text = source.read_text()
    assert text.count(old) == 1, "the planted fault no longer fits the source"
    source.write_text(text.replace(old, new))
    driver = "krylov_driver" if name.startswith("krylov") else "driver"
    done = run_driver(build_driver(driver, tmp_path, flags, oracle, csrc), schedule=0)
    assert done.returncode != 0
    assert message in done.stderr


def test_a_launch_that_fails_is_reported(kernels: Emulator) -> None:
    case = Case("anderson II", 3, "joint", shape=(1, 1, 64), misaligned=False, **STEP)
    x = torch.zeros(1, 1, 64)
    case.ring.slots = 10**4  # shared memory that no device has
    with pytest.raises(RuntimeError, match="invalid configuration"):
        kernels.measure(case.ring, x, x, None, None, "rms")
