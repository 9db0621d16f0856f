"""The registered operators: declared as they behave, equal to the passes that `solve` uses, traceable."""

import pytest
import torch

import pydeqsolve.operators  # noqa: F401 - registers them
from pydeqsolve import ops
from pydeqsolve.ring import COUPLINGS, KINDS, STORAGES, Method, Ring

measure, advance = torch.ops.pydeqsolve.measure, torch.ops.pydeqsolve.advance


def history(kind, dtype=torch.float64, B=3, M=4, T=2, D=5):
    ring = Ring(Method(kind, M - 1), B, T, D, dtype, torch.device("cpu"))
    ring.R.zero_(), ring.F.zero_()
    return ring


def tensors(ring):
    return (ring.R, ring.F, ring.gram, ring.steps_gram, ring.rhs, ring.squares, ring.count)


def states(dtype=torch.float64, n=3, T=2, D=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, T, D, dtype=dtype, generator=g), torch.randn(n, T, D, dtype=dtype, generator=g)


@pytest.mark.parametrize(
    ("kind", "dtype"), [*((kind, torch.float64) for kind in KINDS), *(("anderson II", dtype) for dtype in STORAGES[1:])]
)
@pytest.mark.parametrize("masked", [False, True])
def test_the_operators_pass_opcheck(kind, dtype, masked):
    ring, (f, z), rows = history(kind, dtype), states(dtype), torch.arange(3)
    wanted = torch.tensor([[True, False], [True, True], [False, True]]) if masked else None
    number = KINDS.index(kind)
    torch.library.opcheck(measure.default, (f, z, *tensors(ring), rows, wanted, 1, number, False))
    measure(f, z, *tensors(ring), rows, wanted, 1, number, False)
    mode = torch.full((3, 2), ops.MIX, dtype=torch.uint8)
    torch.library.opcheck(advance.default, (z, mode, *tensors(ring), rows, 1, number, 0, 0.0, 1.0))


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_three_steps_by_the_operators_equal_those_of_the_solver(coupling):
    ours, theirs, rows = history("anderson II"), history("anderson II"), torch.arange(3)
    theirs.coupling = coupling
    ops.start(theirs)
    mode = torch.full((3, 2), ops.MIX, dtype=torch.uint8)
    for step in range(1, 4):
        f, z = states(seed=step)
        head = step % ours.slots
        norms = measure(f, z, *tensors(ours), rows, None, head, 0, False)
        assert torch.equal(norms, ops.measure(theirs, f, z, rows, None, "rms"))
        got = advance(z, mode, *tensors(ours), rows, head, 0, COUPLINGS.index(coupling), 0.0, 1.0)
        expected = ops.advance(theirs, z, mode, rows)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_loop_of_them_compiles_into_one_graph():
    def three_steps(z, ring_tensors):
        rows = torch.arange(3)
        mode = torch.full((3, 2), ops.MIX, dtype=torch.uint8)
        for head in (1, 2, 3):
            measure(torch.cos(z), z, *ring_tensors, rows, None, head, 0, False)
            z, _ = advance(z, mode, *ring_tensors, rows, head, 0, 0, 0.0, 1.0)
        return z

    z = states()[1]
    plain = three_steps(z, tensors(history("anderson II")))
    compiled = torch.compile(three_steps, backend="aot_eager", fullgraph=True)(z, tensors(history("anderson II")))
    torch.testing.assert_close(compiled, plain, rtol=1e-12, atol=0)


def test_a_history_that_is_not_contiguous_is_refused():
    ring, (f, z) = history("anderson II"), states()
    parts = list(tensors(ring))
    parts[0] = parts[0].transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ValueError, match="contiguous"):
        measure(f, z, *parts, torch.arange(3), None, 1, 0, False)


@pytest.mark.parametrize("layout", ["samples", "slots", "padded"])
def test_samples_and_slots_may_lie_in_any_order(layout):
    B, M, T, D = shape = (3, 4, 2, 5)
    stride = {"samples": (M * T * D, T * D), "slots": (T * D, B * T * D), "padded": (T * D, B * T * D + 8)}[layout]
    ours, theirs, rows = history("anderson II"), history("anderson II"), torch.arange(3)
    ours.R, ours.F = (
        torch.zeros(M * (B * T * D + 8), dtype=torch.float64).as_strided(shape, (*stride, D, 1)) for _ in "RF"
    )
    mode = torch.full((3, 2), ops.MIX, dtype=torch.uint8)
    for head in (1, 2, 3, 0):
        f, z = states(seed=head)
        norms = [measure(f, z, *tensors(ring), rows, None, head, 0, False) for ring in (ours, theirs)]
        assert torch.equal(*norms)
        nexts = [advance(z, mode, *tensors(ring), rows, head, 0, 0, 0.0, 1.0)[0] for ring in (ours, theirs)]
        assert torch.equal(*nexts)
    assert torch.equal(ours.R, theirs.R)


def test_blocks_that_overlap_are_refused():
    ring, (f, z) = history("anderson II"), states()
    ring.R, ring.F = (torch.zeros(200, dtype=torch.float64).as_strided((3, 4, 2, 5), (10, 20, 5, 1)) for _ in "RF")
    with pytest.raises(ValueError, match="apart"):
        measure(f, z, *tensors(ring), torch.arange(3), None, 1, 0, False)


def test_a_gradient_is_refused_and_not_lost():
    ring, (f, z), rows = history("anderson II"), states(), torch.arange(3)
    f.requires_grad_()
    with pytest.raises(NotImplementedError, match="a step has no derivative"):
        measure(f, z, *tensors(ring), rows, None, 1, 0, False)
    with torch.no_grad():
        assert measure(f, z, *tensors(ring), rows, None, 1, 0, False).isfinite().all()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("z", lambda z: z.double()),
        ("z", lambda z: z.half()),
        ("z", lambda z: torch.stack([z, z], -1)[..., 0]),
        ("z", lambda z: z[:2].contiguous()),
        ("modes", lambda modes: modes.long()),
        ("rows", lambda rows: rows.int()),
        ("rows", lambda rows: torch.stack([rows, rows], 1)[:, 0]),
        ("F", lambda F: F.bfloat16()),
        ("gram", lambda gram: gram.float()),
        ("count", lambda count: count.long()),
        ("rhs", lambda rhs: rhs[:, :, :2].contiguous()),
    ],
)
def test_a_tensor_that_the_kernels_would_misread_is_refused(name, change):
    ring = history("anderson II", torch.float32)
    given = {
        "z": states(torch.float32)[1], "modes": torch.full((3, 2), ops.PLAIN, dtype=torch.uint8), "R": ring.R,
        "F": ring.F, "gram": ring.gram, "steps_gram": None, "rhs": ring.rhs, "squares": ring.squares,
        "count": ring.count, "rows": torch.arange(3),
    }  # fmt: skip
    advance(*given.values(), 1, 0, 0, 0.0, 1.0)
    given[name] = change(given[name])
    with pytest.raises(ValueError, match=rf"^{name} must be contiguous"):
        advance(*given.values(), 1, 0, 0, 0.0, 1.0)
