"""Warm starts: going on from a Solution, with and without what the solver has learnt."""

import copy
import pickle
from dataclasses import replace

import problems
import pytest
import torch

from pydeqsolve import DEQ, Anderson, Broyden, Front, Picard, Status, Stop, solve

f64 = torch.float64


def first(solver, problem=None, steps=6, **keywords):
    problem = problem or problems.mixed_batch(8)
    stop = Stop(rtol=1e-9, max_steps=steps)
    return solve(problem.fn, problem.start, problem.inputs, solver=solver, stop=stop, gradient=None,
                 keep_history=True, **keywords)  # fmt: skip


def test_a_solution_as_first_guess_starts_at_its_z():
    problem = problems.mixed_batch(8)
    solved = solve(
        problem.fn, problem.start, problem.inputs, stop=Stop(rtol=1e-9, max_steps=500), gradient=None
    ).check()
    again = solve(problem.fn, solved, problem.inputs, stop=Stop(rtol=1e-9), gradient=None)
    assert again.evaluations.tolist() == [1] * 8
    assert torch.equal(again.z, solved.z)
    assert solved.history is None


def test_going_on_twice_from_one_solution_gives_the_same_bits():
    problem = problems.mixed_batch(8)
    start = first(Anderson(), problem)
    before = copy.deepcopy(start.history)
    ends = [solve(problem.fn, start, problem.inputs, stop=Stop(rtol=1e-9), gradient=None) for _ in range(2)]
    assert torch.equal(ends[0].z, ends[1].z)
    assert torch.equal(before.ring.R, start.history.ring.R)
    assert torch.equal(before.ring.count, start.history.ring.count)


def test_without_its_history_a_solution_is_a_first_guess_and_no_more():
    problem = problems.mixed_batch(8)
    start = first(Anderson(), problem)
    start = replace(start, history=None)
    stop = Stop(rtol=1e-9)
    again, cold = (solve(problem.fn, z0, problem.inputs, stop=stop, gradient=None) for z0 in (start, start.z))
    assert torch.equal(again.z, cold.z)
    assert torch.equal(again.evaluations, cold.evaluations)


@pytest.mark.parametrize("solver", [Broyden(memory=30), Anderson(memory=10)], ids=str)
def test_the_history_of_a_nearby_map_saves_evaluations(solver):
    # Maps that drift by a hundredth; 64 unknowns, so that the Jacobian takes many steps to learn.
    W = problems.with_spectrum(torch.linspace(-0.95, 0.97, 64, dtype=f64), 3)
    x = torch.randn(16, 64, dtype=f64, generator=problems.generator(1))
    drift = 0.01 * torch.randn(6, 16, 64, dtype=f64, generator=problems.generator(2))

    def evaluations(warm):
        total, last = 0, None
        for t in range(6):
            z0 = torch.zeros_like(x) if last is None else warm(last)
            last = solve(lambda z, x: torch.tanh(z @ W.T + 0.3 * x), z0, (x + drift[: t + 1].sum(0),), solver=solver,
                         stop=Stop(rtol=1e-6), gradient=None, keep_history=True).check()  # fmt: skip
            total += int(last.evaluations.sum()) if t else 0
        return total

    with_history, with_z = evaluations(lambda s: s), evaluations(lambda s: s.z)
    assert with_history < 0.95 * with_z


@pytest.mark.parametrize("solver", [Anderson(kind="I"), Broyden(), Broyden(kind="bad"), Picard()], ids=str)
def test_a_shift_of_the_map_leaves_the_differences_as_they_are(solver):
    problem = problems.mixed_batch(4)
    rate, b = problem.inputs
    start = first(solver, problem)
    ring = start.history.fork()
    f = problem.fn(start.history.z[:, 0], rate, b + 0.25)[:, None]
    start.history.shift(ring, f)
    newest = (ring.head + 1) % ring.slots
    torch.testing.assert_close(ring.F[:, newest], f, rtol=1e-13, atol=1e-15)
    for age in range(1, ring.slots):
        slot, next_ = (newest - age) % ring.slots, (newest - age + 1) % ring.slots
        old = start.history.ring
        if int(old.count.min()) > age:
            torch.testing.assert_close(
                ring.R[:, next_] - ring.R[:, slot], old.R[:, next_] - old.R[:, slot], rtol=0, atol=1e-13
            )


def test_samples_that_left_early_keep_rows_that_are_turned_to_one_head():
    problem = problems.mixed_batch(8)
    start = first(Anderson(memory=3), problem, steps=25)
    assert len(set(start.evaluations.tolist())) > 3
    history = start.history
    z = history.ring.F[:, history.ring.head] - history.ring.R[:, history.ring.head]
    torch.testing.assert_close(z, history.z, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(history.z[:, 0], start.z, rtol=1e-3, atol=1e-2)


def test_a_failed_sample_starts_again_from_its_best_without_history():
    start = solve(lambda z, c: torch.where(c > 0, torch.nan, 0.5 * torch.cos(z)), torch.ones(2, 3, dtype=f64),
                  (torch.tensor([[1.0], [0.0]]),), gradient=None, keep_history=True)  # fmt: skip
    assert start.status.tolist() == [Status.NONFINITE, Status.CONVERGED]
    again = solve(lambda z, c: 0.5 * torch.cos(z), start, (torch.zeros(2, 1),), stop=Stop(rtol=1e-10), gradient=None)
    assert again.converged.all()
    torch.testing.assert_close(again.z[0], again.z[1], rtol=1e-8, atol=0)


@pytest.mark.parametrize("solver", [Anderson(memory=4), Broyden(memory=4)], ids=str)
def test_when_the_flags_are_read_changes_nothing_of_what_is_kept(solver):
    problem = problems.mixed_batch(8)
    ends = []
    for interval in (1, 8):
        start = solve(problem.fn, problem.start, problem.inputs, solver=solver, gradient=None, keep_history=True,
                      stop=Stop(rtol=1e-4, max_steps=60, check_every=interval))  # fmt: skip
        assert (start.history.ring.count > 1).all()
        ends.append(solve(problem.fn, start, problem.inputs, solver=solver, gradient=None,
                          stop=Stop(rtol=1e-9, max_steps=500)))  # fmt: skip
    assert torch.equal(ends[0].z, ends[1].z)
    assert torch.equal(ends[0].evaluations, ends[1].evaluations)


@pytest.mark.parametrize(
    "watch", [{}, {"callback": lambda *seen: False}, {"snapshots": (1,)}], ids=["no", "yes", "snap"]
)
def test_a_map_that_has_become_nan_ends_finite_and_harms_no_other(watch):
    problem = problems.mixed_batch(4)
    start = first(Anderson(), problem)
    rate, b = problem.inputs
    broken = torch.cat([rate[:1] * torch.nan, rate[1:]])
    stop = Stop(rtol=1e-9, max_steps=500)
    again = solve(problem.fn, start, (broken, b), stop=stop, gradient=None, **watch)
    good = solve(problem.fn, start, (rate, b), stop=stop, gradient=None)
    assert again.status[0] == Status.NONFINITE
    assert again.z.isfinite().all()
    assert torch.equal(again.z[1:], good.z[1:])


def test_a_solve_without_steps_passes_the_history_on():
    problem = problems.mixed_batch(4)
    start = first(Anderson(), problem)
    idle = solve(problem.fn, start, problem.inputs, stop=Stop(max_steps=0), gradient=None, keep_history=True)
    ends = [solve(problem.fn, s, problem.inputs, stop=Stop(rtol=1e-9), gradient=None) for s in (start, idle)]
    assert torch.equal(ends[0].z, ends[1].z)
    assert torch.equal(ends[0].evaluations, ends[1].evaluations)


def test_a_history_can_be_copied_and_pickled():
    problem = problems.mixed_batch(8)
    start = first(Broyden(), problem)
    expected = solve(problem.fn, start, problem.inputs, solver=Broyden(), gradient=None)
    for other in (copy.deepcopy(start), pickle.loads(pickle.dumps(start))):
        assert torch.equal(solve(problem.fn, other, problem.inputs, solver=Broyden(), gradient=None).z, expected.z)


def test_a_history_of_another_solver_shape_or_dtype_is_refused():
    problem = problems.mixed_batch(8)
    start = first(Anderson(), problem)
    with pytest.raises(ValueError, match="holds the history of"):
        solve(problem.fn, start, problem.inputs, solver=Broyden(), gradient=None)
    start = replace(start, z=start.z[:4])
    with pytest.raises(ValueError, match="history of shape"):
        solve(problem.fn, start, [x[:4] for x in problem.inputs], gradient=None)


def test_a_front_keeps_no_history():
    problem = problems.triangular(5)
    with pytest.raises(ValueError, match="front must be None with a history"):
        solve(problem.fn, problem.start, problem.inputs, solver=Anderson(coupling="causal"), front=Front(),
              gradient=None, keep_history=True)  # fmt: skip


# The layer


class Cell(torch.nn.Module):
    def forward(self, z, x):
        return 0.9 * torch.sin(z) + x


@pytest.mark.parametrize("keep_history", [False, True])
def test_a_warm_layer_starts_from_its_last_solution_until_it_is_reset(keep_history):
    x = torch.randn(4, 5, dtype=f64, generator=problems.generator(0))
    layer = DEQ(Cell(), stop=Stop(rtol=1e-8), warm_start=True, keep_history=keep_history)
    cold = layer(x)
    count = layer.solution.evaluations
    layer(x)
    assert layer.solution.evaluations.tolist() == [1] * 4
    layer(x + 1e-4)
    assert (layer.solution.evaluations < count).all()
    layer.reset()
    assert torch.equal(layer(x), cold)
    assert torch.equal(layer.solution.evaluations, count)


def test_a_warm_layer_whose_solver_has_changed_starts_from_z_alone():
    x = torch.randn(4, 5, dtype=f64, generator=problems.generator(0))
    layer = DEQ(Cell(), warm_start=True, keep_history=True)
    layer(x)
    layer.solver = Broyden()
    layer(x)
    assert layer.solution.evaluations.tolist() == [1] * 4


def test_a_warm_layer_starts_cold_for_a_batch_of_another_shape():
    x = torch.randn(4, 5, dtype=f64, generator=problems.generator(0))
    layer = DEQ(Cell(), warm_start=True)
    layer(x)
    z = layer(x[:3])
    assert torch.equal(z, DEQ(Cell())(x[:3]))
