"""What a solve returns or hands out lies in memory that nothing else writes to: no later iterate, solve or thread."""

import copy
import itertools
import threading

import problems
import pytest
import torch
from torch import Tensor, nn

from pydeqsolve import DEQ, Anderson, Broyden, Front, Implicit, Phantom, Picard, Stop, Unrolled, solve

f64 = torch.float64
SOLVERS = [Anderson(), Anderson(2, coupling="causal"), Broyden(), Broyden(line_search=4), Picard(), Anderson(memory=0)]
MAPS = {
    "slow": lambda z, x: 0.8 * torch.cos(z) + x,
    "solved at once": lambda z, x: z,
    "x": lambda z, x: x,
    "never finite": lambda z, x: z * torch.nan,
    "expands": lambda z, x: 3 * z * z + 5,
}
OPTIONS = {
    "plain": {},
    "no budget": {"stop": Stop(max_steps=0)},
    "one call": {"stop": Stop(max_steps=1)},
    "read late": {"stop": Stop(check_every=3)},
    "every sample": {"compact": False},
    "implicit": {"gradient": Implicit()},
    "phantom": {"gradient": Phantom()},
    "trace": {"trace": True},
}


def storages(tree: object) -> list[tuple[int, int]]:
    """First byte and end of the memory of every tensor in a tree."""
    if isinstance(tree, Tensor):
        x = tree.untyped_storage()
        return [(x.data_ptr(), x.data_ptr() + x.nbytes())] if x.nbytes() else []
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else []
    return [found for part in parts for found in storages(part)]


def assert_apart(**trees: object) -> None:
    """No two of them share memory."""
    found = sorted((first, end, name) for name, tree in trees.items() for first, end in set(storages(tree)))
    for (_, end, name), (first, _, other) in itertools.pairwise(found):
        assert end <= first, f"{name} and {other} share memory"


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_a_solution_shares_memory_with_nothing_else(solver, name):
    for options in OPTIONS:
        assert_solution_apart(solver, name, options)


def assert_solution_apart(solver, name, options):
    values, z0 = [], torch.linspace(-1, 1, 12, dtype=f64).reshape(3, 2, 2).contiguous()
    x = torch.linspace(0, 1, 12, dtype=f64).reshape(3, 2, 2).requires_grad_("gradient" in OPTIONS[options])
    keywords = {"stop": Stop(max_steps=12), "gradient": None, **OPTIONS[options]}

    def fn(z, x):
        values.append(MAPS[name](z, x))
        return values[-1]

    solution = solve(fn, z0, (x,), solver=solver, snapshots=(1, 1, 2, 5, 40), **keywords)
    taken = {f"snapshot {i}": z for i, z in enumerate(solution.snapshots)}
    rest = {"residual": solution.residual, "status": solution.status, "evaluations": solution.evaluations}
    for i, value in enumerate(values):
        if value.untyped_storage().data_ptr() != x.untyped_storage().data_ptr():
            rest[f"value {i}"] = value
    if name == "solved at once":  # values are arguments
        rest = {key: tree for key, tree in rest.items() if key in ("residual", "status", "value 0")}
    assert_apart(z=solution.z, z0=z0, x=x, **taken, **rest)


@pytest.mark.parametrize("structure", [lambda z: (z, z.clone()), lambda z: {"a": z}], ids=["tuple", "dict"])
def test_nested_solutions_share_memory_with_nothing_else(structure):
    z0 = structure(torch.ones(3, 2, dtype=f64))
    solution = solve(lambda z: z, z0, snapshots=(1, 3), gradient=None)
    assert_apart(z=solution.z, z0=z0, first=solution.snapshots[0], third=solution.snapshots[1])


@pytest.mark.parametrize("B", [0, 1, 3])
def test_a_solution_and_its_history_are_not_changed_by_the_solve_that_goes_on_from_it(B):
    x = torch.linspace(0, 1, 4 * B, dtype=f64).reshape(B, 4)

    def fn(z, x):
        return 0.9 * torch.cos(z) + x

    first = solve(fn, x * 0, (x,), stop=Stop(max_steps=4), keep_history=True, gradient=None)
    before = copy.deepcopy(first)
    later = solve(lambda z, x: fn(z, x) + 0.1, first, (x,), keep_history=True, gradient=None, snapshots=(1, 2))
    assert torch.equal(first.z, before.z)
    assert torch.equal(first.residual, before.residual)
    assert torch.equal(first.history.z, before.history.z)
    for name, x_before in before.history.ring.tensors().items():
        count = before.history.ring.count
        if name not in ("R", "F"):
            assert torch.equal(getattr(first.history.ring, name), x_before), name
        elif count.numel():
            kept = [(first.history.ring.head - a) % first.history.ring.slots for a in range(int(count.min()))]
            assert torch.equal(getattr(first.history.ring, name)[:, kept], x_before[:, kept]), name
    if B:
        rings = {f"ring {i}": list(s.history.ring.tensors().values()) for i, s in enumerate((first, later))}
        assert_apart(z=first.z, later=later.z, snapshots=later.snapshots[0], own=first.history.z, next=later.history.z,
                     **rings)  # fmt: skip


HOLDS = {
    "the tensor": lambda z: z,
    "a view": lambda z: z[:, 1:],
    "detached": lambda z: z.detach(),
    "an array": lambda z: z.numpy(),
    "a memory view": lambda z: memoryview(z.numpy()),
    "its storage": lambda z: z.untyped_storage(),
    "by dlpack": lambda z: torch.from_dlpack(z),
}


@pytest.mark.parametrize("hold", HOLDS)
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
@pytest.mark.parametrize("compact", [True, False])
def test_an_argument_that_fn_holds_in_any_way_is_never_written_again(solver, hold, compact):
    rate = torch.linspace(0.1, 0.95, 8, dtype=f64)[:, None, None].expand(8, 2, 2).contiguous()
    held, bits = [], []

    def fn(z, rate):
        held.append(HOLDS[hold](z))
        bits.append(z.clone())
        return rate * torch.cos(z) + 1

    solve(fn, rate * 0, (rate,), solver=solver, gradient=None, compact=compact, stop=Stop(rtol=1e-10, max_steps=40))
    for kept, expected in zip(held, bits, strict=True):
        if isinstance(kept, torch.UntypedStorage):
            assert bytes(kept)[: expected.nbytes] == expected.numpy().tobytes()
        elif isinstance(kept, memoryview):
            assert kept.tobytes() == expected.numpy().tobytes()
        else:
            assert torch.equal(torch.as_tensor(kept), HOLDS[hold](expected) if hold == "a view" else expected)


@pytest.mark.parametrize("solver", [Anderson(), Broyden(), Picard()], ids=str)
def test_memory_that_nobody_holds_is_written_again(solver):
    places = []

    def fn(z):
        places.append(z.data_ptr())
        return 0.9 * torch.cos(z) + 1

    solve(fn, torch.zeros(4, 2, 500, dtype=f64), solver=solver, gradient=None, stop=Stop(rtol=0.0, max_steps=15))
    assert len(set(places)) <= 3 < len(places)


def test_what_a_callback_holds_is_never_written_again_and_may_be_written():
    seen, copies = [], []

    def callback(step, z, residual):
        seen.append((z, residual))
        copies.append((z.clone(), residual.nan_to_num(-1)))

    problem = problems.mixed_batch(8)
    solution = solve(problem.fn, problem.start, problem.inputs, callback=callback, gradient=None)
    for (z, residual), expected in zip(seen, copies, strict=True):
        assert torch.equal(z, expected[0])
        assert torch.equal(residual.nan_to_num(-1), expected[1])
    spoilt = solve(problem.fn, problem.start, problem.inputs, gradient=None,
                   callback=lambda step, z, residual: (z.fill_(7), residual.fill_(0), None)[-1])  # fmt: skip
    assert torch.equal(spoilt.z, solution.z)


def test_blocks_of_a_front_that_fn_holds_are_never_written_again():
    held, bits = [], []

    def fn(z, wanted):
        held.append((z, wanted))
        bits.append((z.clone(), wanted.clone()))
        return 0.5 * torch.nn.functional.pad(z, (0, 0, 1, 0))[:, :-1] + 1

    solve(fn, torch.zeros(2, 6, 3, dtype=f64), solver=Anderson(2, coupling="causal"), front=Front(), gradient=None)
    assert len(held) > 2
    for kept, expected in zip(held, bits, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(kept, expected, strict=True))


def test_a_mask_of_blocks_that_fn_writes_into_is_a_copy():
    def chain(spoil):
        def fn(z, wanted):
            if spoil:
                wanted.fill_(False)
            return 0.5 * torch.nn.functional.pad(z, (0, 0, 1, 0))[:, :-1] + 1

        front = Front(window=2)
        return solve(fn, torch.zeros(2, 6, 3, dtype=f64), solver=Anderson(2, coupling="causal"), front=front,
                     gradient=None)  # fmt: skip

    assert torch.equal(chain(True).z, chain(False).z)


# Layers


def test_the_solution_that_a_layer_keeps_is_not_changed_with_its_output():
    x = torch.randn(3, 4, generator=problems.generator(0))
    layer = DEQ(lambda z, x: 0.5 * torch.cos(z) + x, warm_start=True, stop=Stop(rtol=1e-6))
    with torch.no_grad():
        z = layer(x)
        expected = z.clone()
        z.zero_()
    assert torch.equal(layer.solution.z, expected)
    with torch.no_grad():
        layer(x)
    assert layer.solution.evaluations.tolist() == [1] * 3


def test_a_layer_that_starts_warm_leaves_the_solution_before_as_it_was():
    class Cell(nn.Module):
        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return 0.5 * torch.cos(z) + x

    x = torch.randn(3, 4, generator=problems.generator(0))
    layer = DEQ(Cell(), warm_start=True, keep_history=True)
    layer(x)
    first, before = layer.solution, copy.deepcopy(layer.solution)
    layer(x + 0.1)
    assert torch.equal(first.z, before.z)
    assert_apart(first=first.z, second=layer.solution.z)


@pytest.mark.parametrize("gradient", [Implicit(), Phantom(), Unrolled()], ids=["implicit", "phantom", "unrolled"])
def test_a_layer_that_was_asked_in_inference_mode_trains_from_there(gradient):
    w = torch.tensor(0.5, requires_grad=True)
    x = torch.randn(3, 4, generator=problems.generator(0))
    layer = DEQ(lambda z, x: w * torch.cos(z) + x, warm_start=True, keep_history=False, gradient=gradient)
    with torch.inference_mode():
        layer(x)
    layer(x + 0.1).sum().backward()
    assert w.grad.isfinite()


# Solves at the same time


@pytest.mark.parametrize("solver", [Anderson(), Broyden(), Picard(), Broyden(line_search=2)], ids=str)
def test_solves_in_two_threads_that_take_turns_find_what_each_finds_alone(solver):
    rates, found = (0.6, 0.9), {}
    turns = [threading.Semaphore(1), threading.Semaphore(0)]
    b = torch.linspace(-1, 1, 40, dtype=f64).reshape(4, 10)

    def run(rate, callback=None):
        return solve(lambda z: rate * torch.cos(z) + b, torch.zeros_like(b), stop=Stop(rtol=0.0, max_steps=12),
                     solver=solver, callback=callback, gradient=None)  # fmt: skip

    def in_turn(i):
        def hand_over(step, z, residual):
            if step % 3 == 0:  # in a turn of three steps every buffer that is not in use is written
                turns[1 - i].release()
                assert turns[i].acquire(timeout=30)

        assert turns[i].acquire(timeout=30)
        found[i] = run(rates[i], hand_over)
        turns[1 - i].release(12)

    threads = [threading.Thread(target=in_turn, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, rate in enumerate(rates):
        alone = run(rate)
        assert torch.equal(found[i].z, alone.z)
        assert torch.equal(found[i].residual, alone.residual)


def test_a_solve_inside_of_fn_leaves_the_outer_one_alone():
    b = torch.linspace(-1, 1, 40, dtype=f64).reshape(4, 10)

    def outer(inner):
        return solve(lambda z: 0.5 * torch.cos(inner(z)) + b, torch.zeros_like(b), gradient=None)

    def nested(z):
        return solve(lambda u: 0.3 * torch.sin(u) + z, torch.zeros_like(z), stop=Stop(rtol=1e-15), gradient=None).z

    def by_hand(z):
        u = torch.zeros_like(z)
        for _ in range(40):
            u = 0.3 * torch.sin(u) + z
        return u

    torch.testing.assert_close(outer(nested).z, outer(by_hand).z, rtol=1e-9, atol=1e-11)
