"""Solves of up to four unknowns a sample, whose step keeps no Gram matrices."""

import math

import pytest
import torch

from pydeqsolve import Anderson, Broyden, Picard, Status, Stop, build_info, solve
from pydeqsolve.loop import few
from pydeqsolve.step import native

pytestmark = pytest.mark.skipif(not build_info()["native"], reason="no native module")
f32, f64 = torch.float32, torch.float64
SOLVERS = [
    Anderson(), Anderson(kind="I"), Anderson(damping=0.7, memory=3), Anderson(ridge=1e-8), Broyden(),
    Broyden(kind="bad"), Picard(), Picard(damping=0.5),
]  # fmt: skip


@pytest.fixture(params=["portable", "avx2", "avx512"])
def isa(request):
    before = native._native.cpu_isa()
    if not native._native.choose_cpu_isa(request.param):
        pytest.skip("not on this processor")
    yield request.param
    assert native._native.choose_cpu_isa(before)


def watched(fn, z0, **options):
    """The same solve by the step that keeps Gram matrices, which takes those that somebody looks at."""
    return solve(fn, z0, callback=lambda *step: False, gradient=None, **options)


def contraction(n, N, dtype, seed=0):
    """z = tanh(z W + b), and a Lipschitz constant below one."""
    made = torch.Generator().manual_seed(seed)
    b, W = torch.rand(n, N, generator=made, dtype=f64), torch.randn(N, N, generator=made, dtype=f64)
    W *= 0.6 / torch.linalg.matrix_norm(W, 2)
    return (lambda z: torch.tanh(z @ W.to(dtype) + b.to(dtype))), torch.zeros(n, N, dtype=dtype)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("N", [1, 2, 3, 4])
def test_counts_and_states_are_those_of_the_step_with_gram_matrices(N, solver, isa):
    fn, z0 = contraction(203, N, f64)
    for norm in ("rms", "l2", "max"):
        stop = Stop(1e-6, norm=norm)
        found = solve(fn, z0, solver=solver, stop=stop, gradient=None)
        known = watched(fn, z0, solver=solver, stop=stop)
        assert torch.equal(found.status, known.status)
        assert torch.equal(found.rejections, known.rejections)
        torch.testing.assert_close(found.z, known.z, rtol=1e-5, atol=1e-5)
        if isinstance(solver, Anderson) and solver.kind == "II" and not solver.ridge:
            # More than N differences depend on each other, whatever rounding makes of them.
            assert (found.evaluations == known.evaluations).double().mean() > 0.98
            assert (found.rank_losses == known.rank_losses).double().mean() > 0.9
            continue
        assert torch.equal(found.evaluations, known.evaluations)
        assert torch.equal(found.rank_losses, known.rank_losses)
        torch.testing.assert_close(found.z, known.z, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found.residual, known.residual, rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize("dtype", [f32, f64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_input", [False, True])
def test_the_residual_told_is_that_of_the_state_returned(dtype, with_input):
    b = torch.rand(101, 3, generator=torch.Generator().manual_seed(1)).to(dtype)
    fn = (lambda z, x: torch.cos(x * z)) if with_input else (lambda z: torch.cos(b * z))
    found = solve(fn, torch.zeros_like(b), (b,) if with_input else (), gradient=None)
    f = torch.cos(b * found.z)
    residual = (f.float() - found.z.float() if dtype != f64 else f - found.z).double().square().mean(1).sqrt()
    torch.testing.assert_close(found.residual, residual, rtol=1e-6, atol=1e-12)
    size = f.double().square().mean(1).sqrt()
    assert (residual <= max(1e-5, torch.finfo(dtype).eps) * size)[found.converged].all()
    assert found.converged.double().mean() > 0.9


@pytest.mark.parametrize("compact", [True, False])
def test_fn_sees_finished_samples_at_their_solution_or_not_at_all(compact):
    rate = torch.linspace(0.1, 0.9, 50, dtype=f64)[:, None]
    seen = []

    def fn(z, rate):
        seen.append(z)
        return rate * torch.cos(z)

    found = solve(fn, torch.zeros(50, 1, dtype=f64), (rate,), gradient=None, compact=compact)
    assert found.converged.all()
    for step, z in enumerate(seen):
        runs = found.evaluations > step
        assert len(z) == (int(runs.sum()) if compact else 50)
        if not compact:
            assert torch.equal(z[~runs], found.z[~runs])


def test_an_iterate_that_fn_keeps_is_not_written_to():
    kept, copies = [], []

    def fn(z):
        kept.append(z)
        copies.append(z.clone())
        return 0.9 * torch.cos(z)

    solve(fn, torch.linspace(0, 3, 40, dtype=f64)[:, None], stop=Stop(1e-12), gradient=None)
    assert len(kept) > 4
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))


def test_each_sample_ends_as_it_would_alone():
    z0, rate = torch.zeros(37, 3), torch.ones(37, 1)
    rate[5], rate[17], rate[20] = math.nan, 1e30, -3.0

    x = torch.rand(37, 3, generator=torch.Generator().manual_seed(3))
    stop = Stop(max_steps=25)
    together = solve(lambda z, x, r: r * torch.tanh(z * x + 0.1), z0, (x, rate), stop=stop, gradient=None)
    for i in range(37):
        alone = solve(lambda z, x, r: r * torch.tanh(z * x + 0.1), z0[:1], (x[i : i + 1], rate[i : i + 1]),
                      stop=stop, gradient=None)  # fmt: skip
        assert torch.equal(alone.z[0], together.z[i])
        assert torch.equal(alone.status[0], together.status[i])
        assert torch.equal(alone.evaluations[0], together.evaluations[i])
        assert torch.equal(alone.rank_losses[0], together.rank_losses[i])


def test_tolerances_of_their_own_and_zero_steps():
    fn, z0 = contraction(9, 2, f64)
    rtol = torch.logspace(-1, -9, 9, dtype=f64)
    found, known = solve(fn, z0, stop=Stop(rtol), gradient=None), watched(fn, z0, stop=Stop(rtol))
    assert torch.equal(found.evaluations, known.evaluations)
    none = solve(fn, z0, stop=Stop(max_steps=0), gradient=None)
    assert none.status.tolist() == [Status.MAX_STEPS] * 9
    assert torch.equal(none.z, z0)
    assert none.residual.isinf().all()


def test_a_failure_is_explained_as_by_the_step_with_gram_matrices():
    drift = torch.tensor([[0.5], [1.0], [2.0]], dtype=f64)
    cases = [
        (lambda z: z + drift, torch.zeros(3, 1, dtype=f64)),
        (lambda z: drift * z.sqrt(), torch.tensor([[1.0], [-1.0], [2.0]], dtype=f64)),
        (lambda z: 1 - z.sign() * drift, torch.ones(3, 1, dtype=f64)),
    ]
    for fn, z0 in cases:
        stop = Stop(1e-14, max_steps=30)
        found, known = solve(fn, z0, stop=stop, gradient=None), watched(fn, z0, stop=stop)
        assert found.status.tolist() == known.status.tolist()
        messages = []
        for solution in (found, known):
            with pytest.raises(RuntimeError) as caught:
                solution.check()
            messages.append(str(caught.value))
        assert messages[0] == messages[1]


def test_a_step_reads_no_more_than_its_rows_and_64_bytes_of_a_sample():
    made = []
    begin = few.Few.begin

    def noted(self, best):
        made.append(begin(self, best))
        return made[-1]

    few.Few.begin = noted
    try:
        fn, z0 = contraction(1000, 3, f32)
        solve(fn, z0, gradient=None)
    finally:
        few.Few.begin = begin
    (one,) = made
    assert one._known.nbytes == 64 * 1000
    assert one._R.nbytes + one._F.nbytes == 2 * 6 * 3 * 4 * 1000
