"""The registered operators: declared as they behave, equal to the passes that `solve` uses, traceable."""

import pytest
import torch

import pydeqsolve.operators  # noqa: F401 - registers them
from pydeqsolve.step import native
from pydeqsolve.step.backend import choose
from pydeqsolve.step.records import MIX, PLAIN
from pydeqsolve.step.ring import COUPLINGS, KINDS, STORAGES, Method, Ring

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
    mode = torch.full((3, 2), MIX, dtype=torch.uint8)
    torch.library.opcheck(advance.default, (z, mode, *tensors(ring), rows, 1, number, 0, 0.0, 1.0))


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_three_steps_by_the_operators_equal_those_of_the_solver(coupling):
    ours, theirs, rows = history("anderson II"), history("anderson II"), torch.arange(3)
    theirs.coupling = coupling
    mode = torch.full((3, 2), MIX, dtype=torch.uint8)
    for step in range(1, 4):
        f, z = states(seed=step)
        head = step % ours.slots
        norms = measure(f, z, *tensors(ours), rows, None, head, 0, False)
        assert torch.equal(norms, choose(theirs).measure(f, z, rows, None))
        got = advance(z, mode, *tensors(ours), rows, head, 0, COUPLINGS.index(coupling), 0.0, 1.0)
        expected = choose(theirs).advance(z, mode, rows)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_loop_of_them_compiles_into_one_graph():
    def three_steps(z, ring_tensors):
        rows = torch.arange(3)
        mode = torch.full((3, 2), MIX, dtype=torch.uint8)
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
    mode = torch.full((3, 2), MIX, dtype=torch.uint8)
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


def passes(dtype=torch.float32, kind="anderson II"):
    """Each operator with arguments by name that it takes."""
    ring, (f, z), rows = history(kind, dtype), states(dtype), torch.arange(3)
    both = dict(zip(("R", "F", "gram", "steps_gram", "rhs", "squares", "count"), tensors(ring), strict=True))
    both |= {"z": z, "rows": rows, "head": 1, "kind": KINDS.index(kind)}
    modes = torch.full((3, 2), PLAIN, dtype=torch.uint8)
    return (
        (measure, both | {"f": f, "wanted": None, "is_max": False}),
        (advance, both | {"modes": modes, "coupling": 0, "ridge": 0.0, "damping": 1.0}),
    )


@pytest.mark.parametrize("name", ["f", "z", "F"])
def test_a_gradient_is_refused_and_not_lost(name):
    for operator, given in passes():
        if name in given and (operator, name) != (measure, "F"):
            learned = given | {name: given[name].detach().requires_grad_()}
            with pytest.raises(NotImplementedError, match="a step has no derivative"):
                operator(**learned)
            with torch.no_grad():
                operator(**learned)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("f", lambda f: f.double()),
        ("f", lambda f: f[:, :, :4].contiguous()),
        ("z", lambda z: z.double()),
        ("z", lambda z: z.half()),
        ("z", lambda z: torch.stack([z, z], -1)[..., 0]),
        ("z", lambda z: z[:2].contiguous()),
        ("modes", lambda modes: modes.long()),
        ("wanted", lambda _: torch.ones(2, 3, dtype=torch.bool).T),
        ("wanted", lambda _: torch.ones(3, 2, dtype=torch.uint8)),
        ("rows", lambda rows: rows.int()),
        ("rows", lambda rows: torch.stack([rows, rows], 1)[:, 0]),
        ("rows", lambda rows: rows[None]),
        ("R", lambda R: R.int()),
        ("R", lambda R: R[0]),
        ("R", lambda R: R[..., :4]),
        ("R", lambda R: R[:1].expand(R.shape)),
        ("R", lambda R: R[:, :0]),
        ("F", lambda F: F.bfloat16()),
        ("F", lambda F: F.contiguous()),
        ("F", lambda F: F[:2]),
        ("gram", lambda gram: gram.float()),
        ("steps_gram", lambda _: torch.zeros(3, 2, 4, 4)),
        ("count", lambda count: count.long()),
        ("rhs", lambda rhs: rhs[:, :, :2].contiguous()),
        ("squares", lambda squares: squares.transpose(0, 1)),
    ],
)
def test_a_tensor_that_the_kernels_would_misread_is_refused(name, change):
    for operator, given in passes():
        operator(**given)
        if name in given:
            with pytest.raises(ValueError, match=rf"^{name} must be"):
                operator(**given | {name: change(given[name])})


@pytest.mark.parametrize("name", ["kind", "coupling"])
@pytest.mark.parametrize("number", [-1, 4])
def test_a_kind_and_a_coupling_that_there_are_not_are_refused(name, number):
    for operator, given in passes():
        if name in given:
            with pytest.raises(ValueError, match=f"^{name} must be a place in"):
                operator(**given | {name: number})


def test_broyden_good_asks_for_the_gram_matrix_of_its_steps():
    for operator, given in passes(kind="broyden good"):
        with pytest.raises(ValueError, match=r"^steps_gram is required"):
            operator(**given | {"steps_gram": None})


def test_heads_are_counted_modulo_the_slots():
    once, again = passes(), passes()
    for (operator, given), (_, same) in zip(once, again, strict=True):
        torch.testing.assert_close(operator(**given), operator(**same | {"head": 9}), rtol=0, atol=0)
    assert torch.equal(once[0][1]["R"], again[0][1]["R"])
    assert once[0][1]["R"][:, 1].any()


def test_blocks_that_are_not_wanted_have_norms_of_zero():
    given = passes()[0][1]
    torch.full((3, 2, 2), 7.0, dtype=torch.float64)  # lies where the norms will
    wanted = torch.tensor([[True, False], [True, True], [False, True]])
    assert torch.equal(measure(**given | {"wanted": wanted}) > 0, wanted[..., None].expand(3, 2, 2))


def test_a_parameter_is_taken_and_a_tensor_without_memory_is_not():
    class Empty(torch.Tensor):
        __torch_dispatch__ = classmethod(lambda cls, function, types, args=(), kwargs=None: function(*args, **kwargs))

    for operator, given in passes():
        held = {name: x for name, x in given.items() if isinstance(x, torch.Tensor)}
        for name, x in held.items():
            taken = torch.nn.Parameter(x, requires_grad=False)
            operator(**given | {name: taken})
            empty = torch.Tensor._make_wrapper_subclass(Empty, x.shape, strides=x.stride(), dtype=x.dtype)
            with torch._C._DisableTorchDispatch(), pytest.raises(TypeError, match=f"^{name} must be a dense tensor"):
                operator(**given | {name: empty})


def test_no_kernel_of_the_host_runs_where_a_tensor_lies_elsewhere():
    for operator, given in passes():
        given["count"].fill_(7)
        for name, x in given.items():
            if isinstance(x, torch.Tensor):
                operator(**given | {name: x.to("meta")})
                assert (given["count"] == 7).all()
        operator(**given)
        assert not (given["count"] == 7).any()


@pytest.mark.cuda
def test_on_a_device_they_equal_those_of_the_host_and_refuse_its_tensors():
    for (operator, host), (_, given) in zip(passes(torch.float64), passes(torch.float64), strict=True):
        device = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in given.items()}
        for name, x in host.items():
            if isinstance(x, torch.Tensor):
                with pytest.raises(ValueError, match=r"^all tensors must be on one device, got cpu, cuda:0$"):
                    operator(**device | {name: x})
        torch.testing.assert_close(operator(**device), operator(**host), rtol=1e-12, atol=1e-12, check_device=False)


def test_without_kernels_the_operators_are_the_reference(monkeypatch):
    natively, plainly = passes(torch.float64), passes(torch.float64)
    expected = [operator(**given) for operator, given in natively]
    monkeypatch.setattr(native, "_native", None)
    got = [operator(**given) for operator, given in plainly]
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(plainly[0][1]["gram"], natively[0][1]["gram"], rtol=1e-12, atol=0)


def test_a_module_that_holds_its_history_is_exported():
    class Norms(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name, x in passes()[0][1].items():
                if isinstance(x, torch.Tensor) and name != "f":
                    self.register_buffer(name, x.clone())

        def forward(self, f):
            ring = (self.R, self.F, self.gram, None, self.rhs, self.squares, self.count)
            return measure(f, self.z, *ring, self.rows, None, 1, 0, False)

    f = states(torch.float32)[0]
    exported = torch.export.export(Norms(), (f,)).module()
    assert torch.equal(exported(f), Norms()(f))
    assert (exported.count == 1).all()


@pytest.mark.parametrize("name", ["f", "z"])
def test_a_state_in_the_memory_of_the_history_is_refused(name):
    ring, (f, z) = history("anderson II", B=3, M=4), states(n=3)
    inside = torch.zeros(3 * 4 * 2 * 5, dtype=torch.float64)
    ring.R, ring.F = inside.view(3, 4, 2, 5), torch.zeros(3, 4, 2, 5, dtype=torch.float64)
    given = {"f": f, "z": z, name: inside[-30:].view(3, 2, 5)}
    with pytest.raises(ValueError, match="must not lie in the history"):
        measure(given["f"], given["z"], *tensors(ring), torch.arange(3), None, 1, 0, False)
    assert not ring.count.any()


@pytest.mark.parametrize("row", [-1, 3, 2**40])
def test_a_row_that_the_history_does_not_have_is_refused(row):
    ring, (f, z) = history("anderson II"), states()
    with pytest.raises(ValueError, match=r"rows must lie in 0 \.\.\. 2"):
        measure(f, z, *tensors(ring), torch.tensor([0, row, 1]), None, 1, 0, False)
    mode = torch.full((3, 2), PLAIN, dtype=torch.uint8)
    with pytest.raises(ValueError, match="rows must lie in"):
        advance(z, mode, *tensors(ring), torch.tensor([0, row, 1]), 1, 0, 0, 0.0, 1.0)
    assert not ring.count.any()


def test_an_iterate_is_not_written_over_the_one_it_is_made_from():
    ring, (f, z) = history("anderson II"), states()
    choose(ring).measure(f, z, torch.arange(3), None)
    mode = torch.full((3, 2), PLAIN, dtype=torch.uint8)
    with pytest.raises(ValueError, match="share no memory"):
        choose(ring).advance(z, mode, torch.arange(3), out=z)
