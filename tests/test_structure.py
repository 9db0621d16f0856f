"""Nested states, empty batches, strides, and what is said of a state or a value of the wrong structure."""

import warnings
from collections import OrderedDict, defaultdict
from typing import NamedTuple

import problems
import pytest
import torch
from torch import Tensor

from pydeqsolve import Anderson, Implicit, Phantom, Picard, Status, Stop, Unrolled, solve

f64 = torch.float64


class Pair(NamedTuple):
    a: Tensor
    b: Tensor


def couple(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a (B, 2, 3) and b (B,) depend on each other."""
    return 0.5 * torch.cos(a) + 0.1 * b[:, None, None], 0.3 * torch.sin(a).mean((1, 2)) + 1


def start(B: int = 3) -> tuple[Tensor, Tensor]:
    return torch.linspace(-1, 1, 6 * B, dtype=f64).reshape(B, 2, 3), torch.zeros(B, dtype=f64)


def as_flat(fn):
    def flat(z: Tensor) -> Tensor:
        a, b = fn(z[:, :6].reshape(-1, 2, 3), z[:, 6])
        return torch.cat([a.flatten(1), b[:, None]], 1)

    return flat


STRUCTURES = {
    "tuple": (lambda a, b: (a, b), lambda z: couple(*z)),
    "list": (lambda a, b: [a, b], lambda z: list(couple(*z))),
    "dict": (lambda a, b: {"a": a, "b": b}, lambda z: dict(zip("ab", couple(z["a"], z["b"]), strict=True))),
    "ordered": (
        lambda a, b: OrderedDict(a=a, b=b),
        lambda z: OrderedDict(zip("ab", couple(z["a"], z["b"]), strict=True)),
    ),
    "named": (Pair, lambda z: Pair(*couple(z.a, z.b))),
    "nested": (lambda a, b: {"x": (a,), "y": [b]}, lambda z: {"x": couple(z["x"][0], z["y"][0])[:1],
                                                             "y": [couple(z["x"][0], z["y"][0])[1]]}),
}  # fmt: skip


def leaves(tree) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    return [leaf for part in (tree.values() if isinstance(tree, dict) else tree) for leaf in leaves(part)]


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("gradient", [None, Implicit(), Phantom()], ids=["none", "implicit", "phantom"])
def test_a_nested_state_is_solved_as_its_concatenation_would_be(name, gradient):
    build, fn = STRUCTURES[name]
    w = torch.tensor(1.0, dtype=f64, requires_grad=gradient is not None)

    def weighted(z):
        return rebuild_like(z, [w * leaf for leaf in leaves(fn(z))])

    nested = solve(weighted, build(*start()), gradient=gradient, stop=Stop(rtol=1e-10))
    flat = solve(as_flat(couple), torch.cat([start()[0].flatten(1), start()[1][:, None]], 1), gradient=None,
                 stop=Stop(rtol=1e-10))  # fmt: skip
    assert type(nested.z) is type(build(*start()))
    a, b = leaves(nested.z)
    assert torch.equal(a.flatten(1), flat.z[:, :6])
    assert torch.equal(b, flat.z[:, 6])
    assert torch.equal(nested.evaluations, flat.evaluations)
    if gradient is not None:
        assert torch.autograd.grad(a.sum() + b.sum(), w)[0].isfinite()


def rebuild_like(tree, parts: list[Tensor]):
    if isinstance(tree, dict):
        return type(tree)((key, rebuild_like(value, parts)) for key, value in tree.items())
    if isinstance(tree, Tensor):
        return parts.pop(0)
    rebuilt = [rebuild_like(part, parts) for part in tree]
    return type(tree)(*rebuilt) if hasattr(tree, "_fields") else type(tree)(rebuilt)


def test_the_residual_of_a_nested_state_runs_over_all_its_entries():
    solution = solve(lambda z: (z[0] + 1, z[1] + 3), (torch.zeros(1, 3), torch.zeros(1, 1)), stop=Stop(max_steps=1),
                     gradient=None)  # fmt: skip
    assert solution.residual.item() == pytest.approx(3**0.5, rel=1e-12)


def test_a_dict_is_matched_by_key_whatever_order_fn_builds_it_in():
    def swapped(z):
        return {"b": 0.5 * z["b"] + 1, "a": 0.5 * z["a"] - 1}

    z0 = {"a": torch.zeros(1, 2, dtype=f64), "b": torch.zeros(1, 2, dtype=f64)}
    z = solve(swapped, z0, gradient=None, stop=Stop(rtol=1e-10)).z
    torch.testing.assert_close(z["a"], torch.full((1, 2), -2.0, dtype=f64))
    torch.testing.assert_close(z["b"], torch.full((1, 2), 2.0, dtype=f64))


@pytest.mark.parametrize(
    "value",
    [
        lambda z: {"a": z["a"], "c": z["b"]},
        lambda z: (z["a"], z["b"]),
        lambda z: {"a": z["a"]},
        lambda z: {"a": z["a"], "b": z["b"], "c": z["b"]},
        lambda z: {"a": z["a"], "b": (z["b"],)},
        lambda z: torch.cat([z["a"], z["b"]], 1),
        lambda z: {"a": z["a"], "b": z["b"].tolist()},
        lambda z: None,
    ],
    ids=["other key", "tuple", "missing", "extra", "deeper", "tensor", "list of floats", "nothing"],
)
def test_a_value_of_another_structure_is_refused(value):
    z0 = {"a": torch.zeros(2, 3), "b": torch.zeros(2, 3)}
    with pytest.raises((TypeError, ValueError), match="value of fn"):
        solve(value, z0, gradient=None)


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda z: z[:, :2], r"the value of fn must have shape \(2, 3\) like z0, got \(2, 2\)"),
        (lambda z: z[:1], "must have 2 samples like its argument, got 1"),
        (lambda z: z.sum(), r"must have shape .* got \(\)"),
        (lambda z: z.T, r"must have shape"),
    ],
)
def test_a_value_of_another_shape_is_refused(fn, message):
    with pytest.raises(ValueError, match=message):
        solve(fn, torch.zeros(2, 3), gradient=None)


@pytest.mark.parametrize(
    ("z0", "kind", "message"),
    [
        ("z", TypeError, "z0 must be a tensor or a nested"),
        ((), ValueError, "z0 must hold at least one tensor"),
        ((torch.zeros(2, 1), torch.zeros(3, 1)), ValueError, "must share their leading dimensions"),
        ((torch.zeros(2, 1), torch.zeros(2, 1, dtype=f64)), ValueError, "must share dtype and device"),
        ({"a": torch.zeros(2, 1), "b": 3.0}, TypeError, r"z0\['b'\] must be"),
        (torch.zeros(2, 3, dtype=torch.int32), TypeError, "int32"),
    ],
)
def test_an_unusable_state_is_refused(z0, kind, message):
    with pytest.raises(kind, match=message):
        solve(lambda z: z, z0, gradient=None)


def test_a_coupling_over_blocks_needs_a_second_dimension():
    with pytest.raises(ValueError, match=r"shape \(B, T, …\)"):
        solve(lambda z: z, torch.zeros(3), solver=Anderson(coupling="causal"), gradient=None)


@pytest.mark.parametrize("gradient", [None, Implicit(), Phantom(), Unrolled()], ids=str)
@pytest.mark.parametrize("solver", [Anderson(), Anderson(coupling="causal"), Picard()], ids=str)
def test_an_empty_batch_gives_an_empty_solution_and_is_never_evaluated(gradient, solver):
    def fn(z, x):
        raise AssertionError("called")

    solution = solve(fn, torch.zeros(0, 3, 2), (torch.zeros(0, 4),), solver=solver, gradient=gradient, trace=True)
    assert solution.z.shape == (0, 3, 2)
    assert solution.status.shape == solution.residual.shape == solution.evaluations.shape == (0,)
    assert solution.check().steps == 0


@pytest.mark.parametrize("gradient", [None, Implicit(), Phantom()], ids=str)
def test_snapshots_of_an_empty_batch_are_empty(gradient):
    W = torch.ones(2, requires_grad=True)
    solution = solve(lambda z: 0.5 * z + W, torch.zeros(0, 2), snapshots=(1, 2), gradient=gradient)
    assert [z.shape for z in solution.snapshots] == [(0, 2)] * 2


def test_strides_of_state_inputs_and_value_do_not_matter():
    z0 = torch.randn(4, 3, 5, dtype=f64, generator=problems.generator(0))
    x = torch.randn(4, 3, 5, dtype=f64, generator=problems.generator(1))

    def fn(z, x):
        return 0.4 * torch.cos(z) + x

    expected = solve(fn, z0, (x,), gradient=None)
    odd = solve(
        lambda z, x: fn(z, x).transpose(1, 2).contiguous().transpose(1, 2),
        z0.permute(2, 1, 0).contiguous().permute(2, 1, 0), (x.repeat_interleave(2, 0)[::2],), gradient=None,
    )  # fmt: skip
    assert torch.equal(odd.z, expected.z)
    broadcast = solve(fn, z0[:1].expand(4, 3, 5), (x,), gradient=None)
    assert broadcast.converged.all()


# One dimension


@pytest.mark.filterwarnings("ignore:z0 has shape:UserWarning")
def test_scalars_per_sample_are_a_state():
    solution = solve(torch.cos, torch.zeros(3, dtype=f64), gradient=None, stop=Stop(rtol=1e-12))
    assert solution.z.shape == (3,)
    torch.testing.assert_close(solution.z, torch.full((3,), 0.7390851332151607, dtype=f64), rtol=1e-11, atol=0)


def told(z0, fn=torch.cos) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        solve(fn, z0, gradient=None)
    assert all(each.category is UserWarning and each.filename == __file__ for each in caught)
    return [str(each.message) for each in caught]


@pytest.mark.parametrize("n", [0, 1, 30])
def test_a_first_guess_of_one_dimension_is_told_of_once_at_every_call(n):
    many = "1 problem" if n == 1 else f"{n} problems"
    message = (
        f"z0 has shape ({n},), which is {many} of one unknown each: for one problem of {n} unknowns give z0[None], "
        f"shape (1, {n}), and for {many} z0[:, None], shape ({n}, 1)"
    )
    for _ in range(2):
        assert told(torch.zeros(n)) == [message]


def test_a_structure_of_one_dimension_throughout_is_told_of_and_one_of_two_somewhere_is_not():
    (message,) = told((torch.zeros(4), torch.zeros(4)), lambda z: (z[1], z[0]))
    assert message.startswith("every tensor of z0 has shape (4,), which is 4 problems of one unknown per tensor each")
    assert "z0[None]" in message
    assert told((torch.zeros(4), torch.zeros(4, 1)), lambda z: z) == []
    assert told([torch.zeros(4)], lambda z: z) != []


def test_a_solution_of_one_dimension_is_told_of_as_a_first_guess_too():
    with pytest.warns(UserWarning, match=r"z0\[None\]"):
        solution = solve(torch.cos, torch.zeros(3), gradient=None)
    assert len(told(solution)) == 1


@pytest.mark.parametrize("shape", [(1, 30), (30, 1), (0, 3)])
def test_a_first_guess_of_two_dimensions_is_not_told_of(shape):
    assert told(torch.zeros(shape)) == []


def test_the_solution_does_not_keep_the_first_guess_alive():
    import weakref

    z0 = torch.zeros(2, 3)
    dead = weakref.ref(z0)
    solution = solve(torch.cos, z0)
    del z0
    assert dead() is None
    assert solution.status.tolist() == [Status.CONVERGED] * 2


def test_a_defaultdict_stays_one():
    z0 = defaultdict(list, {"a": torch.ones(2, 3)})
    z = solve(lambda z: defaultdict(list, {"a": torch.cos(z["a"])}), z0, gradient=None).z
    assert type(z) is defaultdict
    assert z.default_factory is list
    assert torch.equal(z["a"], solve(torch.cos, torch.ones(2, 3), gradient=None).z)
