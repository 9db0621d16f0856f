"""A history with a row that is infinite or NaN: what it spoils gets weight 0, and weight 0 reads nothing. On every
backend alike: the reference, the CPU kernels of each instruction set, and those of CUDA, emulated
(test_infinite_rows_emulated.py)."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from emulation.backend import emulator
from torch import Tensor

from pydeqsolve.step import native, reference
from pydeqsolve.step.backend import choose
from pydeqsolve.step.records import ACCEPT, MIX, PLAIN, REJECT
from pydeqsolve.step.ring import KINDS, STORAGES, Method, Ring

BACKENDS = ("reference", "portable", "avx2", "avx512")
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}


class Backend:
    """The two passes over all samples of a ring."""

    def __init__(self, name: str) -> None:
        self.kernels = emulator() if name == "emulated" else None
        self.native = name not in ("reference", "emulated")

    def measure(self, ring: Ring, f: Tensor, z: Tensor) -> None:
        rows = torch.arange(len(f))
        if self.native:
            choose(ring, fresh=False).measure(f, z, rows, None)
            return
        ring.head = (ring.head + 1) % ring.slots
        (self.kernels or reference).measure(ring, f, z, rows, None, "rms")

    def advance(self, ring: Ring, z: Tensor, mode: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.arange(len(z))
        if self.native:
            return choose(ring, fresh=False).advance(z, mode, rows)
        if self.kernels is not None:
            return self.kernels.advance(ring, z, mode, rows)[:2]
        count = ring.count[rows]
        gamma, dropped = reference.weights(ring, mode, rows)
        return reference.mix(ring, gamma, mode, z, rows, count), dropped


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    if request.param == "reference":
        yield Backend(request.param)
        return
    if native._native is None:
        pytest.skip("no native module")
    best = native._native.cpu_isa()
    if not native._native.choose_cpu_isa(request.param):
        pytest.skip(f"this processor has no {request.param}")
    yield Backend(request.param)
    native._native.choose_cpu_isa(best)


def filled(
    backend: Backend, method: Method, shape: tuple[int, int, int], dtype: torch.dtype,
    change: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]] = lambda k, f, z: (f, z),
    spoil: Callable[[int, Ring], None] = lambda k, ring: None,
) -> tuple[Ring, Tensor]:  # fmt: skip
    """A ring that is full, of random states, and the last z. Step k goes through `change`, its row through `spoil`."""
    generator = torch.Generator().manual_seed(3)
    ring = Ring(method, *shape, dtype, torch.device("cpu"))
    ring.R.zero_(), ring.F.zero_()
    B, T, D = shape
    for k in range(ring.slots):
        both = torch.randn(2, B, T, D, generator=generator, dtype=torch.float64).to(dtype)
        f, z = change(k, both[0].contiguous(), both[1].contiguous())
        backend.measure(ring, f, z)
        spoil(ring.slots - 1 - k, ring)
    return ring, z


def modes(z: Tensor, what: int) -> Tensor:
    return torch.full(z.shape[:2], what, dtype=torch.uint8)


# Coupling, blocks, features, damping, what the entry is, and the age of its row.
SPOILT = (
    ("joint", 1, 5, 1.0, math.inf, 1), ("joint", 2, 300, 0.6, math.nan, 3), ("independent", 2, 40, 1.0, math.inf, 2),
    ("causal", 2, 300, 1.0, math.nan, 4), ("causal", 2, 5, 0.6, -math.inf, 1), ("joint", 1, 300, 1.0, -math.inf, 2),
)  # fmt: skip


def beside_a_spoilt_row(backend: Backend, kind: str, dtype: torch.dtype, case: tuple) -> tuple[Tensor, Tensor]:
    coupling, T, D, damping, value, age = case

    def spoil(at: int, ring: Ring) -> None:
        if at == age:
            ring.R[0, ring.head, 0, 2] = ring.F[0, ring.head, 0, 2] = value

    ring, z = filled(backend, Method(kind, 5, damping, 0.0, coupling), (2, T, D), dtype, spoil=spoil)
    return backend.advance(ring, z, modes(z, MIX))


beside_a_spoilt_row_by_the_reference = functools.cache(functools.partial(beside_a_spoilt_row, Backend("reference")))


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_is_not_finite_leaves_the_others_as_the_reference_takes_them(backend, kind):
    for dtype, case in itertools.product(STORAGES, SPOILT):
        found, dropped = beside_a_spoilt_row(backend, kind, dtype, case)
        expected, lost = beside_a_spoilt_row_by_the_reference(kind, dtype, case)
        assert found.isfinite().all(), case
        assert torch.equal(dropped, lost), case
        assert (dropped[0] >= 1).any(), case
        size = TOLERANCE[dtype]
        assert torch.isclose(found.double(), expected.double(), rtol=size, atol=size).all(), (dtype, case)


@pytest.mark.parametrize("memory", [5, 13])
def test_weight_zero_reads_no_row(backend, memory):
    # Rows of ages 2, 3 and 4 are alike, so that the differences between them are zero: the one in the middle, which no
    # other weight reads, may be infinite.
    kept: dict[str, tuple[Tensor, Tensor]] = {}

    def change(k: int, f: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return kept.setdefault("state", (f, z)) if memory - k in (2, 3, 4) else (f, z)

    for kind, dtype, (D, damping) in itertools.product(KINDS, STORAGES, ((3, 1.0), (300, 1.0), (40, 0.6))):
        kept.clear()
        ring, z = filled(backend, Method(kind, memory, damping), (2, 1, D), dtype, change)
        plain, _ = backend.advance(ring.clone(), z, modes(z, MIX))
        ring.F[:, (ring.head - 3) % ring.slots] = math.inf
        if damping != 1:
            ring.R[:, (ring.head - 3) % ring.slots] = math.nan
        found, dropped = backend.advance(ring, z, modes(z, MIX))
        assert (dropped >= 2).all()
        assert torch.equal(found, plain)


@pytest.mark.parametrize(("mode", "age"), [(PLAIN, 0), (ACCEPT, 0), (REJECT, 1)])
def test_without_damping_an_infinite_residual_is_not_read(backend, mode, age):
    for D, dtype in itertools.product((3, 300), STORAGES):
        ring, z = filled(backend, Method("anderson II", 3), (2, 1, D), dtype)
        expected = ring.F[:, (ring.head - age) % ring.slots].clone()
        ring.R.fill_(math.inf)
        assert torch.equal(backend.advance(ring, z, modes(z, mode))[0], expected)


def test_accepted_values_read_no_residual_at_any_damping(backend):
    ring, z = filled(backend, Method("anderson II", 3, 0.5), (2, 1, 8), torch.float64)
    expected = ring.F[:, ring.head].clone()
    ring.R.fill_(math.nan)
    assert torch.equal(backend.advance(ring, z, modes(z, ACCEPT))[0], expected)
