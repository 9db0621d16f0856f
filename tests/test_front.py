"""Front: blocks of a causal chain finish from the front, and a finished block costs nothing."""

import problems
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pydeqsolve import Anderson, Front, Implicit, Picard, Status, Stop, build_info, solve
from pydeqsolve.loop.blocks import BlockJudge
from pydeqsolve.step import native
from pydeqsolve.step.backend import choose
from pydeqsolve.step.ring import Method, Ring
from pydeqsolve.step.rules import Rule, judge_blocks, open_blocks

f64 = torch.float64
CAUSAL = Anderson(coupling="causal")


class Watched:
    """A causal map that records what was wanted: (n, T) per call."""

    def __init__(self, problem: problems.Map) -> None:
        self.problem = problem
        self.wanted: list[torch.Tensor] = []

    def __call__(self, z, *inputs, wanted):
        self.wanted.append(wanted.clone())
        return self.problem.fn(z, *inputs, wanted)

    @property
    def rows(self) -> int:
        return sum(int(w.sum()) for w in self.wanted)


def run(problem, front=None, stop=None, solver=CAUSAL, **keywords):
    watched = Watched(problem)
    solution = solve(watched, problem.start, problem.inputs, solver=solver, front=front or Front(),
                     stop=stop or Stop(rtol=1e-10), gradient=None, **keywords)  # fmt: skip
    return solution, watched


def error(solution, problem) -> float:
    return float((solution.z - problem.solution).abs().max())


@pytest.mark.parametrize("solver", [CAUSAL, Picard(), Anderson(coupling="independent")], ids=str)
@settings(max_examples=8)
@given(T=st.integers(1, 15), gain=st.sampled_from([0.5, 1.5, 3.0]))
def test_a_triangular_map_is_exact_after_as_many_rounds_as_blocks(solver, T, gain):
    problem = problems.triangular(T, gain=gain)
    solution, _ = run(problem, solver=solver, stop=Stop(rtol=0.0, max_steps=T))
    assert solution.converged.all()
    assert torch.equal(solution.z, problem.solution)


def test_the_front_moves_one_block_a_round_at_least_and_never_back():
    _, watched = run(problems.triangular(12), stop=Stop(rtol=1e-6))
    for k, wanted in enumerate(watched.wanted):
        assert not wanted[:, :k].any()
        assert torch.equal(wanted, wanted.cummax(1).values)  # unwanted blocks are the leading ones
    for before, after in zip(watched.wanted, watched.wanted[1:], strict=False):
        if len(before) == len(after):
            assert not (after & ~before).any()


def test_a_contracting_chain_finishes_in_far_fewer_rounds_than_blocks():
    problem = problems.triangular(40, gain=0.3)
    solution, watched = run(problem, stop=Stop(rtol=1e-6))
    assert solution.converged.all()
    assert solution.steps <= 15
    assert watched.rows < 0.35 * 40 * 40 * 2
    assert error(solution, problem) < 1e-5


@pytest.mark.parametrize("window", [1, 3, 7])
def test_a_window_bounds_the_blocks_wanted_and_gives_the_same_answer(window):
    problem = problems.triangular(12)
    solution, watched = run(problem, Front(window=window), stop=Stop(rtol=1e-8, max_steps=200))
    assert solution.converged.all()
    assert max(int(w.sum(1).max()) for w in watched.wanted) == window
    for wanted in watched.wanted:  # the first unfinished ones, in one piece
        for row in wanted:
            at = row.nonzero()[:, 0]
            assert len(at) == 0 or torch.equal(at, torch.arange(int(at[0]), int(at[0]) + len(at)))
    assert error(solution, problem) < 1e-6


def test_a_window_of_one_is_forward_substitution():
    problem = problems.triangular(9)
    solution, watched = run(problem, Front(window=1))
    assert torch.equal(solution.z, problem.solution)
    assert solution.steps == 9
    assert watched.rows == 9 * 2


def test_blocks_may_have_tolerances_of_their_own():
    problem = problems.triangular(10, gain=0.5)
    tight, loose = torch.full((1, 10), 1e-9, dtype=f64), torch.full((1, 10), 3e-2, dtype=f64)
    one, _ = run(problem, stop=Stop(rtol=tight))
    other, _ = run(problem, stop=Stop(rtol=loose))
    assert other.steps < one.steps
    assert torch.equal(one.z, run(problem, stop=Stop(rtol=1e-9))[0].z)
    assert torch.equal(one.z, run(problem, stop=Stop(rtol=tight.expand(2, 10)))[0].z)


def test_samples_finish_at_their_own_pace_and_leave_the_batch():
    g = problems.generator(0)
    b = torch.randn(2, 10, 3, dtype=f64, generator=g)
    gain = torch.tensor([0.1, 1.5], dtype=f64)[:, None, None]

    def fn(z, b, gain, wanted):
        return b + torch.nn.functional.pad(gain * torch.sin(z[:, :-1]), (0, 0, 1, 0))

    together = solve(fn, b * 0, (b, gain), solver=CAUSAL, front=Front(), stop=Stop(rtol=1e-6), gradient=None)
    assert together.evaluations[0] < together.evaluations[1]
    for i in range(2):
        alone = solve(fn, b[i : i + 1] * 0, (b[i : i + 1], gain[i : i + 1]), solver=CAUSAL, front=Front(),
                      stop=Stop(rtol=1e-6), gradient=None)  # fmt: skip
        assert torch.equal(alone.z[0], together.z[i])
        assert alone.evaluations[0] == together.evaluations[i]


def test_without_compaction_fn_sees_all_samples_and_wants_nothing_of_the_finished():
    problem = problems.triangular(8, B=3)
    part, _ = run(problem)
    full, watched = run(problem, compact=False)
    assert torch.equal(full.z, part.z)
    assert {len(w) for w in watched.wanted} == {3}


def test_how_often_the_host_reads_the_flags_changes_no_result():
    problem = problems.triangular(10, gain=0.7)
    often, seldom = (run(problem, stop=Stop(rtol=1e-7, check_every=k))[0] for k in (1, 6))
    for name in ("z", "status", "evaluations", "residual"):
        assert torch.equal(getattr(often, name), getattr(seldom, name)), name


def true_residual(solution, problem):
    return (problem.fn(solution.z, *problem.inputs) - solution.z).flatten(1).square().mean(1).sqrt()


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("steps", [2, 5])
def test_the_residual_of_an_unfinished_front_covers_every_block(window, steps):
    problem = problems.triangular(10, gain=0.8)
    solution, _ = run(problem, Front(window=window), stop=Stop(rtol=1e-6, max_steps=steps))
    assert solution.status.tolist() == [Status.MAX_STEPS] * 2
    assert (solution.residual >= 0.999 * true_residual(solution, problem)).all()


@pytest.mark.parametrize("window", [None, 3])
def test_the_residual_of_a_finished_front_is_that_of_the_z_returned(window):
    problem = problems.triangular(10, gain=0.8)
    solution, _ = run(problem, Front(window=window), stop=Stop(rtol=1e-6))
    assert solution.converged.all()
    torch.testing.assert_close(solution.residual, true_residual(solution, problem), rtol=1e-9, atol=1e-15)


def test_a_nan_block_ends_its_sample_as_nonfinite_and_leaves_the_other():
    problem = problems.triangular(8, B=2)
    b = problem.inputs[0].clone()
    b[0, 4] = torch.nan
    watched = Watched(problem)
    solution = solve(watched, problem.start, (b,), solver=CAUSAL, front=Front(), stop=Stop(rtol=1e-10), gradient=None)
    assert solution.status.tolist() == [Status.NONFINITE, Status.CONVERGED]
    assert (solution.z[1] - problem.solution[1]).abs().max() < 1e-9
    assert solution.z[0].isfinite().all()


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("norm", ["rms", "l2", "max"])
def test_the_residual_of_a_sample_with_a_nan_block_is_infinite_as_without_a_front(kernels, norm, monkeypatch):
    if not kernels:
        monkeypatch.setattr(native, "_native", None)
    problem = problems.triangular(8, B=2)
    problem.inputs[0][0, 0] = torch.nan
    whole = solve(problem.fn, problem.start, problem.inputs, solver=Picard(), stop=Stop(norm=norm), gradient=None)
    blocks, _ = run(problem, solver=Picard(), stop=Stop(norm=norm), trace=True)
    for solution in (whole, blocks):
        assert solution.status.tolist() == [Status.NONFINITE, Status.CONVERGED]
        assert solution.residual[0] == torch.inf
        assert repr(solution).endswith("residual at most inf)")
    assert blocks.trace[0, 0] == torch.inf


def test_a_block_that_is_nan_only_until_its_predecessors_are_right_is_solved():
    # sqrt of the block before: NaN from the zero start is gone once the front arrives.
    b = torch.full((1, 6, 1), 2.0, dtype=f64)

    def fn(z, b, wanted=None):
        return b + torch.nn.functional.pad(torch.sqrt(z[:, :-1] - 1), (0, 0, 1, 0))

    expected = [2.0]
    for _ in range(5):
        expected.append(2 + (expected[-1] - 1) ** 0.5)
    solution = solve(fn, b * 0, (b,), solver=CAUSAL, front=Front(), stop=Stop(rtol=1e-10), gradient=None)
    assert solution.converged.all()
    torch.testing.assert_close(solution.z[0, :, 0], torch.tensor(expected, dtype=f64), rtol=1e-9, atol=0)


def test_the_budget_ends_a_front_with_max_steps_and_finite_values():
    problem = problems.triangular(20)
    solution, _ = run(problem, stop=Stop(rtol=1e-10, max_steps=4))
    assert solution.status.tolist() == [Status.MAX_STEPS] * 2
    assert solution.evaluations.tolist() == [4, 4]
    assert solution.z.isfinite().all()
    assert torch.equal(solution.z[:, :3], problem.solution[:, :3])


def test_an_exploding_chain_is_still_exact_at_the_end():
    # The residual grows by 4 a block before it vanishes: a guard against the best residual would give up.
    problem = problems.triangular(12, gain=4.0)
    solution, _ = run(problem, stop=Stop(rtol=1e-12))
    assert solution.converged.all()
    assert error(solution, problem) <= 1e-9 * float(problem.solution.abs().max())


def test_implicit_gradients_pass_through_a_front():
    problem = problems.triangular(6, B=1, D=1, gain=1.2)
    b = problem.inputs[0].clone().requires_grad_()
    z = solve(Watched(problem), problem.start, (b,), solver=CAUSAL, front=Front(), stop=Stop(rtol=1e-12),
              gradient=Implicit(stop=Stop(rtol=1e-12))).z  # fmt: skip
    (found,) = torch.autograd.grad(z[:, -1].sum(), b)
    slope = 0.6 * (1 + torch.cos(problem.solution[0, :-1, 0]))
    expected = torch.cat([slope.flip(0).cumprod(0).flip(0), torch.ones(1, dtype=f64)])
    torch.testing.assert_close(found[0, :, 0], expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("available", [True, False], ids=["native", "reference"])
@pytest.mark.parametrize("latest", [False, True])
@pytest.mark.parametrize("solver", [Picard(), CAUSAL], ids=str)
def test_later_blocks_that_stand_still_do_not_end_a_sample_whose_front_still_moves(
    solver, latest, available, monkeypatch
):
    if not available:
        monkeypatch.setattr(native, "_native", None)

    def steps(z, wanted):  # z = (1, 5): at the first measurement the second block has no residual, at z_0 = 0
        return torch.stack([torch.ones_like(z[:, 0]), 5 * z[:, 0].round()], 1)

    z0 = torch.zeros(1, 2, 1, dtype=f64)
    out = solve(steps, z0, solver=solver, stop=Stop(rtol=1e-3), gradient=None, front=Front(latest=latest)).check()
    assert out.z.flatten().tolist() == [1.0, 5.0]


def judged(judge, norms, natively):
    """What a judge makes of norms (n, T, 2) natively or in PyTorch; unwanted blocks measure 0."""
    wanted = judge.wanted(norms.shape[1])
    norms = torch.where(wanted[..., None], norms, 0.0)
    given = judge.samples, judge.blocks, norms, wanted
    if natively:
        mode, broken, judge.open, finished = judge.backend.judge_blocks(*given)
        assert finished == int((~judge.samples.running).sum())
        return mode, torch.zeros_like(wanted) if broken is None else broken
    mode, broken = judge_blocks(*given, judge.rule, judge.front)
    judge.open = open_blocks(judge.samples, judge.blocks, judge.front)
    return mode, broken


@pytest.mark.skipif(not build_info()["native"], reason="without the native module there is nothing to compare")
@pytest.mark.parametrize("safeguard", [0.0, 3.0])
@pytest.mark.parametrize("norm", ["rms", "l2", "max"])
@pytest.mark.parametrize("front", [Front(), Front(3), Front(None, 0.3, latest=True), Front(2, 1.0, latest=True)])
def test_the_native_judgement_of_blocks_is_that_of_the_reference(front, norm, safeguard):
    n, T, entries = 40, 6, 5
    generator = torch.Generator().manual_seed(0)
    atol = torch.rand(n, T, generator=generator, dtype=torch.float64)
    stop = Stop(rtol=torch.full((n,), 0.1, dtype=torch.float64), atol=atol, norm=norm)
    rule = Rule(safeguard, torch.finfo(f64).eps, norm, entries)
    backend = choose(Ring(Method(), n, T, entries, f64, torch.device("cpu")), rule, front)
    ours, theirs = (BlockJudge(n, T, front, stop, backend) for _ in range(2))
    for step in range(12):
        norms = 10 ** (3 * torch.rand(n, T, 2, generator=generator, dtype=torch.float64) - step / 4)
        if step % 3:
            bad = torch.rand(n, T, 1, generator=generator) < 0.02
            norms = torch.where(bad, torch.nan if step % 2 else torch.inf, norms)
        natively, reference = judged(ours, norms, True), judged(theirs, norms, False)
        for found, expected in zip(natively, reference, strict=True):
            assert torch.equal(found, expected)
        assert torch.equal(ours.open, theirs.open)
        torch.testing.assert_close(ours.blocks.table, theirs.blocks.table, rtol=1e-14, atol=0, equal_nan=True)
        torch.testing.assert_close(ours.samples.table, theirs.samples.table, rtol=1e-14, atol=0, equal_nan=True)
    assert not bool(theirs.samples.running.all())


def test_picard_refuses_no_block():
    A = torch.tril(torch.full((1, 5, 5), 2.0, dtype=torch.float64), -1)
    out = solve(
        lambda z, A, wanted: (A @ z + 1), torch.zeros(1, 5, 1, dtype=torch.float64), (A,), solver=Picard(),
        stop=Stop(rtol=1e-12), gradient=None, front=Front(),
    )  # fmt: skip
    assert out.converged.all()
    assert out.rejections.item() == 0


@pytest.mark.parametrize("solver", [Picard(), CAUSAL], ids=["picard", "causal"])
def test_the_default_tolerance_of_blocks_is_no_finer_than_bfloat16(solver):
    W = (0.3 * problems.orthogonal(8, 4)).bfloat16()
    x = torch.randn(4, 40, 8, generator=problems.generator(3)).bfloat16()
    fn = lambda z, x, wanted: torch.tanh(torch.nn.functional.pad(z[:, :-1], (0, 0, 1, 0)) @ W + x)  # noqa: E731
    solution = solve(fn, torch.zeros_like(x), (x,), solver=solver, front=Front(), gradient=None)
    assert solution.converged.all()
    assert solution.evaluations.max() <= 8  # to 1e-5 it takes twice as many: until nothing changes


def self_dependent(scale):
    """A map whose block k is a mean over the blocks 0 … k of z, its own included, times `scale`, and x."""
    mean = torch.ones(12, 12, dtype=torch.float64).tril()
    mean /= mean.sum(1, keepdim=True)
    return lambda z, x, wanted=None: torch.where(
        torch.ones(1, 12, 1, dtype=torch.bool) if wanted is None else wanted[..., None], scale * (mean @ z) + x, z
    )


@pytest.mark.parametrize("solver", [CAUSAL, Picard(), Anderson(coupling="independent")], ids=str)
@settings(max_examples=8)
@given(scale=st.sampled_from([0.5, 0.9, 1.4, -3.0]), seed=st.integers(0, 9))
def test_a_map_whose_blocks_depend_on_themselves_never_converges_by_turns(solver, scale, seed):
    x = torch.randn(3, 12, 2, dtype=torch.float64, generator=problems.generator(seed))
    fn, stop = self_dependent(scale), Stop(rtol=1e-6, max_steps=40)
    front = Front(strict=False)
    solution = solve(fn, torch.zeros_like(x), (x,), solver=solver, stop=stop, front=front, gradient=None)
    f = fn(solution.z, x)
    small = torch.linalg.vector_norm(f - solution.z, dim=2) <= 1e-6 * torch.linalg.vector_norm(f, dim=2) * (1 + 1e-9)
    assert small.all(1)[solution.converged].all()
    if scale == 0.5:
        assert solution.converged.all()


def test_a_strict_front_moves_on_by_turns_where_another_waits():
    x = torch.ones(1, 12, 2, dtype=torch.float64)
    fn, stop = self_dependent(-3.0), Stop(rtol=1e-6, max_steps=40)
    options = {"solver": Picard(), "stop": stop, "gradient": None}
    assert solve(fn, 0 * x, (x,), front=Front(), **options).converged.all()  # as the contract of Front has it
    assert not solve(fn, 0 * x, (x,), front=Front(strict=False), **options).converged.any()
