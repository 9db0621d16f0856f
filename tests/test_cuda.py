"""The CUDA kernels on a GPU. Without one these tests are skipped, and tests/test_cuda_emulation.py stands in."""

from __future__ import annotations

import itertools

import pytest
import torch
from emulation.backend import emulator
from torch import Tensor

from pydeqsolve import GMRES, Anderson, Broyden, Picard, Stop, build_info, solve
from pydeqsolve.loop.judge import SampleJudge
from pydeqsolve.step import reference, systems
from pydeqsolve.step.backend import choose
from pydeqsolve.step.device import DeviceKrylov
from pydeqsolve.step.records import ACCEPT, KEEP, MIX, PLAIN, REJECT
from pydeqsolve.step.ring import COUPLINGS, KINDS, STORAGES, Method, Ring
from pydeqsolve.step.rules import Rule

pytestmark = pytest.mark.cuda

# (B, T, D): a warp's packs and their remainder, the border to thread blocks, one and several chunks.
SHAPES = ((3, 1, 64), (2, 3, 65), (2, 1, 1024), (2, 2, 1025), (1, 1, 4096), (2, 1, 9001), (1, 1, 50_000))


@pytest.fixture(autouse=True)
def kernels_are_built() -> None:
    assert build_info()["cuda_architectures"], "there is a GPU, but the native module was built without CUDA kernels"


def ring_on(device: str, method: Method, shape: tuple[int, int, int], dtype: torch.dtype) -> Ring:
    ring = Ring(method, *shape, dtype, torch.device(device))
    return ring


def state(ring: Ring) -> list[Tensor]:
    """What both passes leave in a history, on the CPU."""
    return [x.cpu() for x in (ring.gram, ring.rhs, ring.squares, ring.count)]


@pytest.mark.parametrize("dtype", STORAGES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("kind", "coupling"), list(itertools.product(KINDS, COUPLINGS)))
def test_a_step_equals_the_reference(kind: str, coupling: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    method = Method(kind, 5, 0.7, 0.0, coupling)
    ring, oracle = ring_on("cuda", method, shape, dtype), Ring(method, *shape, dtype, torch.device("cpu"))
    for each in (ring, oracle):  # a block may be sent back to a row that it never had
        each.R.zero_()
        each.F.zero_()
    B, T, D = shape
    rows = torch.randperm(B, generator=generator)
    for step in range(8):
        f, z = torch.randn(2, B, T, D, generator=generator, dtype=torch.float64).to(dtype)
        wanted = torch.rand(B, T, generator=generator) > 0.1
        oracle.head = (oracle.head + 1) % oracle.slots
        norm = "max" if step % 2 else "rms"
        norms = choose(ring, Rule(0.0, 0.0, norm, 1)).measure(f.cuda(), z.cuda(), rows.cuda(), wanted.cuda())
        expected = reference.measure(oracle, f, z, rows, wanted, norm)
        torch.testing.assert_close(norms.cpu(), expected, rtol=1e-12, atol=0)
        mode = torch.tensor([MIX, MIX, MIX, REJECT, PLAIN, ACCEPT])[torch.randint(6, (B, T), generator=generator)]
        mode = torch.where(wanted, mode, KEEP).to(torch.uint8)
        count = oracle.count[rows]
        z_next, dropped = choose(ring).advance(z.cuda(), mode.cuda(), rows.cuda())
        gamma, expected_dropped = reference.weights(oracle, mode, rows)
        assert torch.equal(dropped.cpu(), expected_dropped)
        assert torch.equal(ring.count.cpu(), oracle.count)
        expected_next = reference.mix(oracle, gamma, mode, z, rows, count)
        # Weights of nearly dependent differences are large, and so are the roundings that they magnify.
        tolerance = max(1e-8, 2 * torch.finfo(dtype).eps) * max(1.0, float(expected_next.abs().max()))
        torch.testing.assert_close(z_next.cpu(), expected_next, rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_sums_have_the_bits_of_the_emulation(kind: str, shape: tuple[int, int, int]) -> None:
    method = Method(kind, 5)
    ring, emulated = ring_on("cuda", method, shape, torch.float32), ring_on("cpu", method, shape, torch.float32)
    rows, generator = torch.arange(shape[0]), torch.Generator().manual_seed(0)
    for _ in range(7):
        f, z = torch.randn(2, *shape, generator=generator)
        choose(ring).measure(f.cuda(), z.cuda(), rows.cuda(), None)
        emulated.head = (emulated.head + 1) % emulated.slots
        emulator().measure(emulated, f, z, rows, None, "rms")
    for ours, theirs in zip(state(ring), state(emulated), strict=True):
        assert torch.equal(ours, theirs)


def take_steps(ring: Ring, f: Tensor, z: Tensor, steps: int = 7) -> Tensor:
    """The last of some iterates; f, z (n, T, D) are rolled along, so that every step sees other values."""
    rows = torch.arange(len(f), device=f.device)
    mode = torch.full(f.shape[:2], MIX, dtype=torch.uint8, device=f.device)
    for _ in range(steps):
        f, z = f.roll(1, -1) * 0.9, z.roll(2, -1).contiguous()
        choose(ring).measure(f, z, rows, None)
        z, _ = choose(ring).advance(z, mode, rows)
    return z


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_repetition_has_the_same_bits(shape: tuple[int, int, int]) -> None:
    f, z = torch.randn(2, *shape, device="cuda")
    runs = [take_steps(ring_on("cuda", Method(memory=5), shape, torch.float32), f, z) for _ in range(3)]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("D", [64, 1100, 5000])
def test_a_sample_alone_has_the_bits_it_has_in_a_batch(D: int) -> None:
    f, z = torch.randn(2, 300, 1, D, device="cuda")
    together = take_steps(ring_on("cuda", Method(memory=5), (300, 1, D), torch.float32), f, z)
    alone = take_steps(ring_on("cuda", Method(memory=5), (1, 1, D), torch.float32), f[7:8], z[7:8])
    assert torch.equal(together[7:8], alone)


def test_a_large_batch_of_small_systems_is_covered() -> None:
    f, z = torch.randn(2, 300_000, 1, 4, device="cuda")
    together = take_steps(ring_on("cuda", Method(memory=2), (300_000, 1, 4), torch.float32), f, z)
    tail = take_steps(ring_on("cuda", Method(memory=2), (5, 1, 4), torch.float32), f[-5:], z[-5:])
    assert torch.equal(together[-5:], tail)


def test_a_step_does_not_wait_for_the_device() -> None:
    f, z = torch.randn(2, 4, 1, 5000, device="cuda")
    ring = ring_on("cuda", Method(memory=5), (4, 1, 5000), torch.float32)
    take_steps(ring, f, z)
    torch.cuda.set_sync_debug_mode("error")
    try:
        take_steps(ring, f, z)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_runs_on_the_current_stream() -> None:
    shape = (4, 1, 50_000)
    f, z = torch.randn(2, *shape, device="cuda")
    expected = take_steps(ring_on("cuda", Method(memory=5), shape, torch.float32), f, z)
    aside = ring_on("cuda", Method(memory=5), shape, torch.float32)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # a step on another stream would not wait for this, nor for f
        late_f, late_z = f.clone(), z.clone()
        z_next = take_steps(aside, late_f, late_z)
    stream.synchronize()
    assert torch.equal(z_next, expected)


def test_a_solve_waits_for_the_device_at_its_stop_tests_only() -> None:
    a, b = torch.linspace(-0.5, 0.9, 300, device="cuda"), torch.randn(8, 300, device="cuda")
    modes: list[str] = []

    def fn(z: Tensor) -> Tensor:
        torch.cuda.set_sync_debug_mode("error" if modes else "default")
        modes.append("")
        return a * z + b

    def callback(step: int, z: Tensor, residual: Tensor) -> bool:
        torch.cuda.set_sync_debug_mode("default")
        return step == 8

    try:
        solve(fn, torch.zeros_like(b), solver=Anderson(5), stop=Stop(rtol=0.0, check_every=100, max_steps=9),
              gradient=None, callback=callback)  # fmt: skip
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(modes) == 8


def test_judge_and_keep_equal_the_tensors() -> None:
    generator = torch.Generator().manual_seed(0)
    rule = Rule(2.0, torch.finfo(torch.float32).eps, "rms", 65)
    backends = [choose(ring_on(d, Method(memory=1), (40, 3, 65), torch.float32), rule) for d in ("cuda", "cpu")]
    records = [SampleJudge(40, Stop(rtol=0.3), backend).samples for backend in backends]
    best, before = torch.randn(2, 40, 3, 65, generator=generator)
    here = best.cuda()
    rows = torch.randperm(40, generator=generator)
    for _ in range(6):
        norms = torch.rand(40, 3, 2, generator=generator, dtype=torch.float64)
        pairs = zip(backends, records, strict=True)
        modes = [backend.judge(own, norms.to(own.table.device), None)[0] for backend, own in pairs]
        assert torch.equal(modes[0].cpu(), modes[1])
        backends[0].keep(here, rows.cuda(), before.cuda(), records[0])
        left = records[1]["left_behind"] != 0
        best[rows[left]] = before[left]
        assert torch.equal(here.cpu(), best)
        before = before.roll(1, 0)
    torch.testing.assert_close(records[0].table.cpu(), records[1].table, rtol=1e-12, atol=0)


def test_a_step_can_be_captured_in_a_graph() -> None:
    shape = (4, 1, 5000)
    f, z = torch.randn(2, *shape, device="cuda")
    eager, captured = (ring_on("cuda", Method(memory=5), shape, torch.float32) for _ in range(2))
    expected = take_steps(eager, f, z)  # loads the kernels too, which a capture may not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z_next = take_steps(captured, f, z)
    graph.replay()
    assert torch.equal(z_next, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("solver", [Picard(), Anderson(5), Anderson(20, kind="I"), Broyden(8)], ids=str)
def test_a_solve_ends_where_it_ends_on_the_cpu(solver: Anderson | Broyden | Picard, dtype: torch.dtype) -> None:
    a = torch.linspace(-0.5, 0.8, 200, dtype=torch.float64)
    b = torch.randn(8, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stop = Stop(rtol=100 * torch.finfo(dtype).eps, max_steps=300)
    z = []
    for device in ("cpu", "cuda"):
        a_here, b_here = a.to(device), b.to(device)

        def fn(z: Tensor, a: Tensor = a_here, b: Tensor = b_here) -> Tensor:
            return (a * z + b).to(z.dtype)

        solution = solve(fn, torch.zeros(8, 200, dtype=dtype, device=device), solver=solver, stop=stop, gradient=None)
        assert solution.converged.all()
        z.append(solution.z.double().cpu())
    torch.testing.assert_close(z[1], z[0], rtol=0, atol=1000 * torch.finfo(dtype).eps * float(z[0].abs().max()))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("N", [5, 64, 1025, 9001])
def test_gmres_takes_the_products_that_it_takes_on_the_host(N: int, dtype: torch.dtype) -> None:
    rate = torch.linspace(-0.7, 0.9, N, dtype=torch.float64).to(dtype)
    g = torch.randn(3, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    assert isinstance(systems.krylov(g.cuda(), 3), DeviceKrylov)
    there = rate.cuda()
    u, how = GMRES().solve(lambda u: u * there, g.cuda(), Stop(1e-5))
    expected, known = GMRES().solve(lambda u: u * rate, g, Stop(1e-5))
    assert how.status.tolist() == known.status.tolist()
    assert ((how.evaluations.cpu() - known.evaluations).abs() <= 1).all()
    assert (u.cpu() - expected).norm() <= 1e-4 * expected.norm()


def test_a_solve_runs_on_the_device_of_z0() -> None:
    with torch.cuda.device(0):
        solution = solve(torch.cos, torch.ones(3, 5, device="cuda:1"), gradient=None)
    assert solution.z.device == torch.device("cuda:1")
    assert solution.converged.all()
