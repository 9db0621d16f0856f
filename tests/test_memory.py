"""Tensors whose memory is not what it seems: none, negated lazily, shared, or changed by fn on the way."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import pydeqsolve.operators  # noqa: F401 - registers them
from pydeqsolve import DEQ, Anderson, Broyden, Phantom, Picard, Status, Stop, solve
from pydeqsolve.step import native
from pydeqsolve.step.records import PLAIN
from pydeqsolve.step.ring import KINDS, Method, Ring

f64 = torch.float64
SOLVERS = [Anderson(), Anderson(kind="I"), Broyden(), Picard()]


class Wrapper(Tensor):
    """A tensor that only stands for others."""

    @staticmethod
    def __new__(cls, x):
        return Tensor._make_wrapper_subclass(cls, x.shape, dtype=x.dtype)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError("nothing is to be computed")


def fake() -> Tensor:
    with FakeTensorMode():
        return torch.ones(3, 4)


def short(bytes_left: int) -> Tensor:
    x = torch.ones(3, 4)
    x.untyped_storage().resize_(bytes_left)
    return x


WITHOUT_MEMORY = {
    "zeros never stored": lambda: torch._efficientzerotensor((3, 4)),
    "meta": lambda: torch.ones(3, 4, device="meta"),
    "fake": fake,
    "wrapper": lambda: Wrapper(torch.ones(3, 4)),
    "let go of": lambda: short(0),
    "cut short": lambda: short(16),
    "sparse": lambda: torch.ones(3, 4).to_sparse(),
    "sparse rows": lambda: torch.ones(3, 4).to_sparse_csr(),
    "mkldnn": lambda: torch.ones(3, 4).to_mkldnn(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(4)] * 3),
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(4)] * 3, layout=torch.jagged),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3, 4), 0.1, 0, torch.qint8),
}
pytestmark = pytest.mark.filterwarnings("ignore:.*(prototype|beta|deprecated|Sparse|sparse)")


@pytest.mark.parametrize("name", WITHOUT_MEMORY)
def test_a_first_guess_without_memory_is_refused(name):
    z0 = WITHOUT_MEMORY[name]()
    with pytest.raises(TypeError, match=r"^z0 must be a dense tensor with memory of its own, got "):
        solve(torch.cos, z0)
    with pytest.raises(TypeError, match=r"^z0 must be a dense tensor"):
        solve(lambda z: z, (torch.ones(3, 4), z0))


@pytest.mark.parametrize("name", WITHOUT_MEMORY)
def test_a_value_of_fn_without_memory_is_refused(name):
    value = WITHOUT_MEMORY[name]()
    with pytest.raises(TypeError, match=r"^the value of fn must be a dense tensor with memory of its own, got "):
        solve(lambda z: value, torch.ones(3, 4))
    with pytest.raises(TypeError, match=r"^the value of fn must be a dense tensor"):
        solve(lambda z: (z[0], value), (torch.ones(3, 4), torch.ones(3, 4)))


def test_a_tolerance_without_memory_is_refused():
    with pytest.raises(TypeError, match=r"^rtol must be a dense tensor"):
        Stop(rtol=torch.ones(3, device="meta"))


def test_a_complex_value_is_refused_and_not_cut_to_its_real_part():
    with pytest.raises(TypeError, match=r"must be real like z0, got torch\.complex64"):
        solve(lambda z: torch.complex(z, z), torch.ones(3, 4))


# Lazy negation


def negated(x: Tensor) -> Tensor:
    """x, as the negative of what lies in its memory."""
    lazy = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert lazy.is_neg()
    return lazy


def stored_negated(x: Tensor) -> Tensor:
    """The same, one entry after the other."""
    lazy = torch._neg_view(-x)
    assert lazy.is_contiguous()
    return lazy


@pytest.mark.parametrize("lazily", [negated, stored_negated])
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 5), (3, 5), (3, 1, 2)], ids=str)
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_a_value_that_is_negated_lazily_is_read_with_its_sign(solver, shape, lazily):
    b = torch.linspace(0.5, 1, 15, dtype=f64)[: torch.Size(shape).numel()].reshape(shape)
    stop = Stop(rtol=1e-10)
    found = solve(lambda z: lazily(0.5 * torch.cos(z) + b), b * 0, solver=solver, stop=stop, gradient=None)
    plain = solve(lambda z: 0.5 * torch.cos(z) + b, b * 0, solver=solver, stop=stop, gradient=None)
    assert torch.equal(found.z, plain.z)
    assert torch.equal(found.evaluations, plain.evaluations)


@pytest.mark.parametrize("lazily", [negated, stored_negated])
@pytest.mark.parametrize("max_steps", [0, 1, 100])
def test_a_first_guess_that_is_negated_lazily_is_read_with_its_sign(lazily, max_steps):
    z0, stop = torch.linspace(1, 2, 6, dtype=f64).reshape(2, 3), Stop(max_steps=max_steps)
    found = solve(torch.cos, lazily(z0), stop=stop, gradient=None)
    assert torch.equal(found.z, solve(torch.cos, z0, stop=stop, gradient=None).z)


def test_a_gradient_passes_through_a_value_that_is_negated_lazily():
    def slope(lazily):
        w = torch.tensor(0.5, dtype=f64, requires_grad=True)
        z = solve(lambda z: lazily(w * torch.cos(z) + 1), torch.zeros(1, 1, dtype=f64), stop=Stop(rtol=1e-12)).z
        return torch.autograd.grad(z.sum(), w)[0]

    torch.testing.assert_close(slope(stored_negated), slope(lambda x: x), rtol=1e-12, atol=0)


@pytest.mark.parametrize("expanded", [lambda: torch.ones(1, 1).expand(3, 4), lambda: torch.ones(4).expand(3, 4)])
def test_expanded_tensors_are_read_as_they_look(expanded):
    solution = solve(lambda z: expanded(), expanded(), gradient=None)
    assert torch.equal(solution.z, torch.ones(3, 4))
    assert solution.converged.all()
    halved = solve(lambda z: (0.5 * z[:1]).expand(3, 4), 2 * torch.ones(3, 4), stop=Stop(max_steps=1), gradient=None)
    assert torch.equal(halved.residual, torch.ones(3, dtype=f64))


def test_overlapping_memory_is_read_as_it_looks():
    windows = torch.arange(6.0).as_strided((3, 4), (1, 1))
    solution = solve(lambda z: windows, windows, gradient=None)
    assert torch.equal(solution.z, torch.stack([torch.arange(4.0) + i for i in range(3)]))


# Arguments that fn changes

CHANGES = {
    "itself": lambda z: z.mul_(0.5),
    "a view": lambda z: z[:, 1:].mul_(0.5),
    "a copy into it": lambda z: z.copy_(torch.cos(z)),
    "an activation": lambda z: torch.nn.functional.relu(z.sub_(1), inplace=True),
    "out=": lambda z: torch.cos(z, out=z),
    "an entry": lambda z: z.__setitem__((0, 0), 7.0),
}
CONTEXTS = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "enable_grad": torch.enable_grad}


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("from_call", [1, 4])
def test_a_change_of_the_argument_in_place_is_noticed(context, change, from_call):
    calls = []

    def fn(z):
        calls.append(1)
        if len(calls) >= from_call:
            CHANGES[change](z)
        return 0.5 * torch.cos(z) + 1

    z0 = torch.full((2, 3), 0.25)
    with CONTEXTS[context](), pytest.raises(ValueError, match="fn must not change its argument z in place"):
        solve(fn, z0, stop=Stop(rtol=1e-7), gradient=None)
    assert torch.equal(z0, torch.full((2, 3), 0.25))


def test_a_first_guess_made_in_inference_mode_is_watched_too():
    with torch.inference_mode():
        z0 = torch.full((2, 3), 0.25)
        with pytest.raises(ValueError, match="in place"):
            solve(lambda z: z.mul_(0.5).add(1), z0)
        assert torch.equal(z0, torch.full((2, 3), 0.25))


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize(
    "change",
    [lambda z: z.data.mul_(0.5), lambda z: z.detach().numpy().__imul__(0.5), lambda z: z.untyped_storage().fill_(1)],
    ids=["data", "numpy", "storage"],
)
def test_a_change_past_autograd_is_noticed_at_the_first_call(context, change):
    def fn(z):
        change(z)
        return z + 1

    z0 = torch.full((2, 3), 0.25)
    with CONTEXTS[context](), pytest.raises(ValueError, match=r"in place, through z\.data or z\.numpy\(\)"):
        solve(fn, z0, gradient=None)
    assert torch.equal(z0, torch.full((2, 3), 0.25))


def test_a_change_past_autograd_that_spares_zeros_is_noticed_at_the_second_call():
    with pytest.raises(ValueError, match="in place"):
        solve(lambda z: z.data.mul_(0.5) + 1, torch.zeros(2, 3), gradient=None)


def test_a_first_guess_that_is_nan_is_not_taken_for_a_change():
    z0 = torch.tensor([[torch.nan, 1.0], [torch.inf, 2.0]])
    assert (solve(lambda z: torch.ones_like(z), z0, gradient=None).status == Status.NONFINITE).all()


@pytest.mark.parametrize("context", CONTEXTS)
def test_a_change_of_an_input_in_place_is_noticed(context):
    x, y = torch.ones(2, 3), torch.ones(2, 3)
    with CONTEXTS[context](), pytest.raises(ValueError, match=r"fn must not change its argument inputs\[1\] in place"):
        solve(lambda z, x, y: 0.5 * z + y.mul_(0.9), torch.zeros(2, 3), (x, y), gradient=None)


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, torch.Tensor.t], ids=["contiguous", "transposed"])
def test_a_change_of_an_input_made_in_inference_mode_is_noticed(layout):
    with torch.inference_mode():
        x, y = torch.ones(3, 3), layout(torch.ones(3, 3))
        with pytest.raises(ValueError, match=r"fn must not change its argument inputs\[1\] in place"):
            solve(lambda z, x, y: 0.5 * z + y.mul_(0.9), torch.zeros(3, 3), (x, y))


def test_inputs_made_in_inference_mode_may_be_nan_or_empty():
    with torch.inference_mode():
        x, y = torch.full((2, 3), torch.nan), torch.ones(2, 0)
        assert solve(lambda z, x, y: 0.5 * z + 1, torch.zeros(2, 3), (x, y)).converged.all()
        assert solve(lambda z, x, y: 0.5 * z + 1, torch.zeros(0, 3), (x[:0], y[:0])).z.shape == (0, 3)


def test_in_inference_mode_a_layer_finds_what_it_finds_outside():
    torch.manual_seed(0)
    linear = torch.nn.Linear(4, 4)
    layer, x = DEQ(lambda z, x: 0.5 * torch.tanh(linear(z)) + x, stop=Stop(rtol=1e-6)), torch.randn(3, 4)
    seen = []
    with torch.inference_mode():
        z = layer(x)
        solve(
            lambda z: 0.5 * z + x, x, callback=lambda step, z, residual: seen.append(torch.is_inference_mode_enabled())
        )
    assert torch.equal(z, layer(x))
    assert seen
    assert all(seen)


# The registered operators


def of_the_operators() -> list[tuple[object, dict[str, object]]]:
    ring = Ring(Method("broyden good", 3), 3, 2, 5, f64, torch.device("cpu"))
    ring.R.zero_(), ring.F.zero_()
    state = torch.arange(30, dtype=f64).reshape(3, 2, 5)
    held = {name: getattr(ring, name) for name in ("R", "F", "gram", "steps_gram", "rhs", "squares", "count")}
    held |= {"z": state / 7, "rows": torch.arange(3), "head": 1, "kind": KINDS.index("broyden good")}
    wanted, modes = torch.ones(3, 2, dtype=torch.bool), torch.full((3, 2), PLAIN, dtype=torch.uint8)
    return [
        (torch.ops.pydeqsolve.measure, held | {"f": state, "wanted": wanted, "is_max": False}),
        (torch.ops.pydeqsolve.advance, held | {"modes": modes, "coupling": 0, "ridge": 0.0, "damping": 1.0}),
    ]


@pytest.mark.parametrize("name", ["R", "F", "gram", "steps_gram", "rhs", "squares", "count", "f", "z", "rows", "wanted",
                                  "modes"])  # fmt: skip
def test_an_operator_refuses_a_tensor_whose_storage_was_let_go_of(name):
    for operator, given in of_the_operators():
        if name in given:
            gone = given[name].clone(memory_format=torch.preserve_format)
            gone.untyped_storage().resize_(0)
            with pytest.raises(TypeError, match=f"{name} must (be a dense tensor|have memory)"):
                operator(**given | {name: gone})


def test_an_operator_reads_states_that_are_negated_lazily_with_their_sign():
    for (operator, given), (_, same) in zip(of_the_operators(), of_the_operators(), strict=True):
        lazy = {name: stored_negated(x) if name in "fz" else x for name, x in given.items()}
        torch.testing.assert_close(operator(**lazy), operator(**same), rtol=0, atol=0)
        assert torch.equal(given["R"], same["R"])


def test_an_operator_refuses_zeros_that_were_never_stored():
    for operator, given in of_the_operators():
        with pytest.raises(ValueError, match=r"^z must be contiguous"):
            operator(**given | {"z": torch._efficientzerotensor((3, 2, 5), dtype=f64)})


def test_without_kernels_an_operator_refuses_the_same(monkeypatch):
    monkeypatch.setattr(native, "_native", None)
    for operator, given in of_the_operators():
        gone = given["z"].clone()
        gone.untyped_storage().resize_(0)
        with pytest.raises(TypeError, match=r"^z must be a dense tensor"):
            operator(**given | {"z": gone})


# What fn returns


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_fn_may_return_its_argument_or_a_view_of_it(solver):
    z0 = torch.arange(6.0, dtype=f64).reshape(2, 3)
    for same in (lambda z: z, lambda z: z[:], lambda z: z.view(2, 3), lambda z: z.T.T):
        solution = solve(same, z0, solver=solver, gradient=None)
        assert torch.equal(solution.z, z0)
        assert solution.evaluations.tolist() == [1, 1]
    shuffled = solve(lambda z: z.flip(1)[:, :], z0, solver=solver, stop=Stop(max_steps=1), gradient=None)
    assert shuffled.residual.tolist() == [(8 / 3) ** 0.5] * 2


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_fn_may_return_one_buffer_every_time(solver, compact):
    rate = torch.linspace(0.1, 0.9, 6, dtype=f64)[:, None].expand(6, 4).contiguous()
    buffer = torch.empty(6, 4, dtype=f64)

    def fn(z, rate):
        return torch.add(rate * torch.sin(z), 1.0, out=buffer[: len(z)])

    stop = Stop(rtol=1e-10, max_steps=300)
    found = solve(fn, rate * 0, (rate,), solver=solver, stop=stop, gradient=None, compact=compact)
    plain = solve(lambda z, r: r * torch.sin(z) + 1.0, rate * 0, (rate,), solver=solver, stop=stop, gradient=None)
    assert torch.equal(found.z, plain.z)
    assert torch.equal(found.evaluations, plain.evaluations)


def test_a_phantom_step_reads_the_buffer_of_fn_before_it_changes():
    b, w = torch.arange(1.0, 5.0, dtype=f64)[None], torch.tensor(0.5, dtype=f64, requires_grad=True)
    z = solve(lambda z: w * z + b, b * 0, stop=Stop(rtol=1e-12), gradient=Phantom(steps=2)).z
    torch.testing.assert_close(torch.autograd.grad(z.sum(), w)[0], (1.5 * 2 * b).sum(), rtol=1e-9, atol=0)
