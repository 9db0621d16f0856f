"""Memory and native numbers of a small solve that has ended serve the next one like it, and nothing shows it."""

import dataclasses
import gc
import threading
import weakref

import problems
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pydeqsolve import Anderson, Broyden, Picard, Stop, build_info, solve
from pydeqsolve.loop import reuse

pytestmark = pytest.mark.skipif(not build_info()["native"], reason="no native module")


@pytest.fixture(autouse=True)
def nothing_idle():
    reuse._idle.clear()
    yield
    reuse._idle.clear()


def contraction(seed, B=3, D=5, dtype=torch.float64):
    draw = problems.generator(seed)
    W = torch.randn(D, D, generator=draw, dtype=torch.float64)
    W = (0.8 * W / torch.linalg.matrix_norm(W, 2)).to(dtype)
    x = torch.randn(B, D, generator=draw, dtype=torch.float64).to(dtype)
    return lambda z: torch.tanh(z @ W.T + x), torch.zeros(B, D, dtype=dtype)


def tensors(solution):
    values = [getattr(solution, field.name) for field in dataclasses.fields(solution)]
    return [value for value in values if isinstance(value, Tensor)]


def same(a, b):
    return len(tensors(a)) == len(tensors(b)) and all(map(torch.equal, tensors(a), tensors(b)))


def idle():
    return [step for steps in reuse._idle.values() for step in steps]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("solver", [Anderson(), Anderson(kind="I"), Broyden(), Picard()], ids=str)
def test_a_solve_is_the_same_bit_for_bit_whatever_was_solved_before(solver, dtype):
    fn, z0 = contraction(0, dtype=dtype)
    stop = Stop(rtol=0.05 if dtype is torch.bfloat16 else 1e-4, max_steps=200)
    alone = solve(fn, z0, solver=solver, stop=stop, gradient=None)
    other, far = contraction(1, dtype=dtype)
    solve(other, far + 100, solver=solver, stop=stop, gradient=None)
    assert len(idle()) == 1
    assert same(solve(fn, z0, solver=solver, stop=stop, gradient=None), alone)


def test_samples_that_leave_one_by_one_are_the_same_again():
    fn, z0 = contraction(0, B=6)
    z0 = z0 + 10.0 ** torch.arange(-12, 0, 2, dtype=torch.float64)[:, None]
    alone, again = (solve(fn, z0, gradient=None) for _ in range(2))
    assert idle()
    assert same(alone, again)


def test_no_solution_shares_memory_with_what_is_kept_or_with_another_solution():
    fn, z0 = contraction(0)
    first, second = (solve(fn, z0, gradient=None) for _ in range(2))
    (step,) = idle()
    ring = step.backend.ring
    places = [x.untyped_storage().data_ptr() for x in (ring.R, ring.F, ring.gram, step.judge.samples.table)]
    places += [x.untyped_storage().data_ptr() for x in tensors(first) + tensors(second)]
    assert len(set(places)) == len(places)


def test_what_a_failed_solve_says_of_itself_outlives_the_next_solves():
    fn, z0 = contraction(0)
    failed = solve(fn, z0, stop=Stop(rtol=1e-12, max_steps=3), gradient=None)
    before = failed.course.table.clone()
    for _ in range(3):
        solve(fn, z0 + 5, stop=Stop(rtol=1e-12, max_steps=50), gradient=None)
    assert torch.equal(failed.course.table, before)


def test_a_solve_within_fn_has_memory_of_its_own():
    (outer, z0), (inner, _) = contraction(0), contraction(1)

    def nested(z):
        return outer(z) + 0.1 * solve(inner, z, gradient=None).z

    alone = solve(nested, z0, gradient=None)
    solve(inner, z0, gradient=None)
    assert same(solve(nested, z0, gradient=None), alone)


def test_solves_in_threads_do_not_meet():
    problems_of_threads = [contraction(seed) for seed in range(4)]
    alone = [solve(fn, z0, gradient=None) for fn, z0 in problems_of_threads]
    wrong = []

    def work(k):
        fn, z0 = problems_of_threads[k]
        wrong.extend(k for _ in range(100) if not same(solve(fn, z0, gradient=None), alone[k]))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(idle()) <= reuse.EACH


def test_after_fn_has_raised_the_next_solve_is_right():
    fn, z0 = contraction(0)
    alone = solve(fn, z0, gradient=None)

    def broken(z, calls=[]):  # noqa: B006
        calls.append(z)
        if len(calls) == 4:
            raise KeyError("fn")
        return fn(z)

    with pytest.raises(KeyError):
        solve(broken, z0, gradient=None)
    assert same(solve(fn, z0, gradient=None), alone)


def test_a_tolerance_that_has_changed_in_place_is_read_anew():
    fn, z0 = contraction(0)
    rtol = torch.full((3,), 1e-2, dtype=torch.float64)
    stop = Stop(rtol=rtol)
    coarse = solve(fn, z0, stop=stop, gradient=None)
    rtol[1] = 1e-9
    fine = solve(fn, z0, stop=stop, gradient=None)
    assert fine.residual[1] < 1e-6 * coarse.residual[1].clamp_min(1e-3)
    assert fine.evaluations[0] == coarse.evaluations[0]


@pytest.mark.parametrize(
    ("given", "error", "name"),
    [
        ({"z0": torch.zeros(3, 5, dtype=torch.int64)}, TypeError, "z0"),
        ({"z0": torch.zeros(3, 5).to_sparse()}, TypeError, "z0"),
        ({"inputs": (torch.zeros(2, 5),)}, ValueError, r"inputs\[0\]"),
        ({"inputs": torch.zeros(3, 5)}, TypeError, "inputs"),
        ({"fn": lambda z, x: z[:, :4]}, ValueError, "fn"),
        ({"fn": lambda z, x: z[:2]}, ValueError, "fn"),
        ({"fn": lambda z, x: z.to(torch.complex64)}, TypeError, "fn"),
        ({"fn": lambda z, x: z.add_(1)}, ValueError, "in place"),
        ({"fn": lambda z, x: z.data.add_(1)}, ValueError, "in place"),
        ({"trace": 1}, TypeError, "trace"),
        ({"stop": Stop(rtol=torch.ones(4))}, ValueError, "stop.rtol"),
    ],
)
def test_bad_arguments_raise_after_good_ones_of_the_same_kind_too(given, error, name):
    x = torch.ones(3, 5)
    good = {"fn": lambda z, x: 0.5 * z + x, "z0": torch.zeros(3, 5), "inputs": (x,), "gradient": None}
    for _ in range(2):
        assert solve(**good).converged.all()
    with pytest.raises(error, match=name):
        solve(**(good | given))
    assert solve(**good).converged.all()


def test_a_real_value_of_a_complex_state_is_taken_for_the_complex_number_that_it_is():
    z0 = torch.zeros(3, 5, dtype=torch.complex128)
    solution = solve(lambda z: torch.full((3, 5), 2.0, dtype=torch.float64), z0, gradient=None)
    assert solution.z.dtype == torch.complex128
    assert torch.equal(solution.z, torch.full_like(z0, 2.0))


def test_a_state_whose_memory_was_let_go_is_refused_after_a_good_one():
    z0 = torch.zeros(3, 5)
    solve(lambda z: 0.5 * z + 1, z0, gradient=None)
    z0.untyped_storage().resize_(0)
    with pytest.raises(TypeError, match="z0"):
        solve(lambda z: 0.5 * z + 1, z0, gradient=None)


def test_nothing_of_the_users_is_kept_alive():
    fn, z0 = contraction(0)
    x, stop, solver = torch.ones(3, 5, dtype=torch.float64), Stop(rtol=torch.full((3,), 1e-5)), Anderson(memory=3)

    def own(z, x):
        return fn(z) + 0 * x

    solution = solve(own, z0, (x,), solver=solver, stop=stop, gradient=None, compact=False)
    assert idle()
    known = [weakref.ref(each) for each in (z0, x, own, stop, stop.rtol, solver, solution, solution.z, solution.status)]
    del z0, x, own, stop, solver, solution
    gc.collect()
    assert [ref() for ref in known] == [None] * len(known)


def test_what_is_kept_is_bounded_and_does_not_grow():
    for D in range(1, 3 * reuse.KINDS):
        solve(lambda z: 0.5 * z + 1, torch.zeros(2, D), gradient=None)
        assert len(reuse._idle) <= reuse.KINDS
    count = []
    for _ in range(3):
        for _ in range(20):
            solve(lambda z: 0.5 * z + 1, torch.zeros(2, 4), gradient=None)
        gc.collect()
        count.append(sum(type(each) is Tensor for each in gc.get_objects()))
    assert count[1] == count[2]


@pytest.mark.parametrize("shape", [(64, 1024), (4000, 1)])
def test_large_states_and_many_samples_are_not_kept(shape):
    solve(lambda z: 0.5 * z + 1, torch.zeros(shape), solver=Picard(), gradient=None, compact=False)
    assert not idle()


def test_all_that_one_step_keeps_counts():
    B, D = 50, 10
    solve(lambda z: 0.5 * z + 1, torch.zeros(B, D, dtype=torch.float32), gradient=None)
    (step,) = idle()
    ring = step.backend.ring
    held = [step.judge.samples.table, *ring.tensors().values()]
    assert sum(each.nbytes for each in held) <= reuse.MOST


def test_a_history_that_was_asked_for_is_not_kept():
    fn, z0 = contraction(0)
    solution = solve(fn, z0, gradient=None, keep_history=True)
    assert not idle()
    assert solution.history.ring.R.shape[0] == 3


class Made(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, fn, types, arguments=(), keywords=None):
        self.names.append(fn.overloadpacket.__name__)
        return fn(*arguments, **keywords or {})


def test_a_dispatch_mode_sees_as_much_of_the_second_solve_as_of_the_first():
    fn, z0 = contraction(0)
    solve(fn, z0, gradient=None)
    seen = []
    for _ in range(2):
        with Made() as mode:
            solve(fn, z0, gradient=None)
        seen.append(mode.names)
    assert seen[0] == seen[1]
    assert seen[0].count("empty_strided") == 2
