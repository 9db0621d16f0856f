"""Ragged batches: samples that are groups of rows of different number."""

import problems
import pytest
import torch

from pydeqsolve import DEQ, Anderson, Broyden, Front, Implicit, Phantom, Picard, Status, Stop, solve

F64 = torch.float64
SIZES = [3, 1, 7, 4]
GRAPH = torch.repeat_interleave(torch.arange(4), torch.tensor(SIZES))  # (N,)
TIGHT = Stop(1e-11, max_steps=300)


def rings():
    """A directed ring of nodes per graph: edges (2, N), and features (N, 2)."""
    starts = torch.tensor([0, *SIZES]).cumsum(0)
    edges = [[starts[g] + i, starts[g] + (i + 1) % n] for g, n in enumerate(SIZES) for i in range(n)]
    x = torch.randn(len(GRAPH), 2, dtype=F64, generator=problems.generator(1))
    return torch.tensor(edges).T, x


def layer(z, x, edges, rate):
    """z_i = rate · tanh(z_j W) + x_i, j the neighbour before i."""
    W = torch.tensor([[0.8, -0.5], [0.4, 0.9]], dtype=z.dtype)
    out = torch.zeros_like(z).index_add(0, edges[1], torch.tanh(z[edges[0]] @ W))
    return rate * out + x


def alone(g, x, edges, **options):
    rows = (g == GRAPH).nonzero()[:, 0]
    own = edges[:, (edges[0] >= rows[0]) & (edges[0] <= rows[-1])] - rows[0]
    flat = lambda z: layer(z[0], x[rows], own, 0.9)[None]  # noqa: E731
    return solve(flat, torch.zeros(1, len(rows), 2, dtype=F64), **options)


@pytest.mark.parametrize("solver", [Anderson(), Anderson(kind="I", memory=3), Broyden(), Picard(0.9)])
@pytest.mark.parametrize("norm", ["rms", "l2", "max"])
def test_every_graph_ends_as_it_does_alone(solver, norm):
    edges, x = rings()
    stop = Stop(1e-6, 1e-4, max_steps=200, norm=norm)
    out = solve(
        layer, torch.zeros_like(x), (x, edges, torch.tensor(0.9, dtype=F64)), segments=GRAPH, solver=solver, stop=stop,
        gradient=None, trace=True,
    )  # fmt: skip
    assert out.z.shape == x.shape
    for g in range(4):
        one = alone(g, x, edges, solver=solver, stop=stop, gradient=None, trace=True)
        assert out.status[g] == one.status[0]
        assert out.evaluations[g] == one.evaluations[0]
        torch.testing.assert_close(out.z[g == GRAPH], one.z[0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(out.residual[g], one.residual[0], rtol=1e-4, atol=1e-12)
        torch.testing.assert_close(out.trace[: one.steps, g], one.trace[:, 0], rtol=1e-4, atol=1e-12)


def test_graphs_finish_at_their_own_time_and_fn_sees_all_rows():
    edges, x = rings()
    rate = torch.tensor([0.2, 0.9, 0.99, 0.5], dtype=F64)[GRAPH][:, None]
    seen = []

    def fn(z, *inputs):
        seen.append(len(z))
        return layer(z, *inputs)

    out = solve(fn, torch.zeros_like(x), (x, edges, rate), segments=GRAPH, gradient=None)
    assert out.evaluations.shape == (4,)
    assert len(set(out.evaluations.tolist())) > 1
    assert set(seen) == {len(GRAPH)}


@pytest.mark.parametrize("gradient", [Implicit(), Phantom(80)])
def test_gradients_are_those_of_the_iteration(gradient):
    edges, x = rings()
    x = x.requires_grad_()
    rate = torch.full((len(GRAPH), 1), 0.6, dtype=F64).requires_grad_()
    z = solve(layer, torch.zeros_like(x), (x, edges, rate), segments=GRAPH, gradient=gradient, stop=TIGHT).z
    found = torch.autograd.grad(z.square().sum(), (x, rate))
    z = torch.zeros_like(x)
    for _ in range(200):
        z = layer(z, x, edges, rate)
    expected = torch.autograd.grad(z.square().sum(), (x, rate))
    for g, e in zip(found, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-8, atol=1e-10)


def test_the_adjoint_is_told_per_graph():
    edges, x = rings()
    x = x.requires_grad_()
    out = solve(layer, torch.zeros_like(x), (x, edges, torch.tensor(0.6)), segments=GRAPH)
    out.z.sum().backward()
    assert out.adjoint.status.tolist() == [Status.CONVERGED] * 4


def test_a_graph_that_fails_leaves_the_others_right():
    edges, x = rings()
    x[GRAPH == 2] = torch.nan
    out = solve(layer, torch.zeros_like(x), (x, edges, torch.tensor(0.6)), segments=GRAPH, gradient=None)
    assert out.status.tolist() == [0, 0, int(Status.NONFINITE), 0]
    assert out.z[GRAPH == 2].abs().max() == 0


def test_a_sample_without_rows_has_nothing_to_solve():
    segments = torch.tensor([0, 0, 2])
    out = solve(lambda z: 0.5 * z + 1, torch.zeros(3, 2), segments=segments, gradient=None)
    assert out.converged.tolist() == [True, True, True]
    assert out.evaluations.tolist()[1] == 1
    empty = solve(lambda z: 0.5 * z, torch.zeros(0, 2), segments=torch.zeros(0, dtype=torch.int64), gradient=None)
    assert empty.status.shape == (0,)


def test_a_tolerance_per_graph_and_nested_rows():
    edges, x = rings()
    stop = Stop(torch.tensor([1e-2, 1e-10, 1e-4, 1e-6], dtype=F64))

    def fn(z, x, edges):
        return {"a": layer(z["b"], x, edges, 0.7), "b": 0.5 * z["a"]}

    z0 = {"a": torch.zeros_like(x), "b": torch.zeros_like(x)}
    out = solve(fn, z0, (x, edges), segments=GRAPH, stop=stop, gradient=None)
    f = fn(out.z, x, edges)
    size = lambda d: torch.zeros(4, dtype=F64).index_add(0, GRAPH, (d["a"] ** 2 + d["b"] ** 2).sum(1)).sqrt()  # noqa: E731
    assert (size({k: f[k] - out.z[k] for k in f}) <= stop.rtol * size(f) * (1 + 1e-9)).all()
    assert out.evaluations[0] < out.evaluations[1]


def test_a_merit_and_an_admissible_are_per_graph():
    edges, x = rings()
    ok = lambda z, *_: torch.zeros(len(z), dtype=torch.bool)  # noqa: E731
    with pytest.raises(TypeError, match=r"admissible must return a bool tensor \(4,\)"):
        solve(layer, torch.zeros_like(x), (x, edges, torch.tensor(0.6)), segments=GRAPH, gradient=None, admissible=ok)
    never = lambda z, *_: torch.tensor([False, True, True, True])  # noqa: E731
    out = solve(
        layer, torch.zeros_like(x), (x, edges, torch.tensor(0.6)), segments=GRAPH, gradient=None, admissible=never
    )
    assert (out.rejections > 0).tolist() == [True, False, False, False]


def test_a_layer_of_graphs_warm_starts():
    edges, x = rings()
    deq = DEQ(lambda z, x: layer(z, x, edges, 0.6), warm_start=True, stop=Stop(1e-8))
    z = deq(x, segments=GRAPH)
    assert deq.solution.evaluations.shape == (4,)
    torch.testing.assert_close(deq(x, segments=GRAPH), z)
    assert deq.solution.evaluations.max() <= 2


@pytest.mark.parametrize(
    ("segments", "options", "error", "message"),
    [
        ([0, 0, 1], {}, TypeError, "segments must be an int64 tensor"),
        (torch.zeros(3), {}, TypeError, "segments must be an int64 tensor .* got torch.float32"),
        (torch.tensor([[0, 0, 1]]), {}, ValueError, r"segments must have shape \(N,\)"),
        (torch.tensor([0, 1, 0]), {}, ValueError, "segments must be sorted"),
        (torch.tensor([-1, 0, 0]), {}, ValueError, "segments must be sorted and non-negative"),
        (torch.tensor([0, 1]), {}, ValueError, "z0 must have 2 rows like segments, got 3"),
        (torch.tensor([0, 0, 1]), {"front": Front()}, ValueError, "segments go with none of"),
        (torch.tensor([0, 0, 1]), {"compact": True}, ValueError, "segments go with none of"),
        (torch.tensor([0, 0, 1]), {"stop": Stop(torch.ones(3))}, ValueError, r"stop.rtol must have shape \(2,\)"),
    ],
)
def test_segments_that_cannot_be_are_refused(segments, options, error, message):
    with pytest.raises(error, match=message):
        solve(lambda z, **_: 0.5 * z, torch.ones(3, 2), segments=segments, **options)


@pytest.mark.parametrize("other", [torch.tensor([0, 0, 1, 1, 1]), None])
def test_a_history_goes_on_with_its_own_segments_alone(other):
    first, z0 = torch.tensor([0, 0, 0, 1, 1]), torch.arange(5.0)[:, None]
    fn = lambda z: 0.5 * z.cos()  # noqa: E731
    s = solve(fn, z0, segments=first, keep_history=True, gradient=None, stop=Stop(1e-2))
    again = solve(fn, s, segments=first.clone(), gradient=None)
    assert again.converged.all()
    with pytest.raises(ValueError, match="segments must be those of the history that z0 holds"):
        solve(fn, s, segments=other, gradient=None)
    plain = solve(fn, torch.ones(2, 3), keep_history=True, gradient=None)
    with pytest.raises(ValueError, match="segments must be those of the history that z0 holds"):
        solve(fn, plain, segments=torch.tensor([0, 1]), gradient=None)


@pytest.mark.parametrize("segments", [[0, 0, 1, 1, 1], [0, 0, 0, 0, 1]])
def test_a_layer_starts_other_segments_from_the_state_alone(segments):
    x = torch.linspace(-1, 1, 5, dtype=F64)[:, None]
    deq = DEQ(lambda z, x: 0.9 * torch.tanh(z) + x, warm_start=True, keep_history=True, stop=Stop(1e-8))
    z = deq(x, segments=torch.tensor([0, 0, 0, 1, 1]))
    torch.testing.assert_close(deq(x, segments=torch.tensor(segments)), z, rtol=1e-6, atol=1e-6)
    assert deq.solution.evaluations.max() <= 2
    deq(x)
    assert deq.solution.converged.all()


def test_gradients_pass_by_a_sample_that_failed_whatever_its_length():
    for groups, z0 in (([1, 1, 2, 2], [1.0, 1, 0, 1]), ([0, 1, 1, 1], [1.0, 0, 1, 1]), ([0, 0, 0, 1], [0.0, 1, 1, 1])):
        segments, start = torch.tensor(groups), torch.tensor(z0, dtype=F64)[:, None]
        x, w = torch.full_like(start, 2.0).requires_grad_(), torch.ones(1, dtype=F64, requires_grad=True)
        fn = lambda z, x: 0.5 * (z + w * x / z)  # noqa: B023, E731
        s = solve(fn, start, (x,), segments=segments, stop=TIGHT)
        good = s.status[segments] == 0
        assert good.any()
        assert not good.all()
        found = torch.autograd.grad(s.z[good].sum(), (x, w))  # z = √(w x)
        torch.testing.assert_close(found[0], torch.where(good[:, None], 0.5 * 2**-0.5, 0.0).to(F64))
        torch.testing.assert_close(found[1], 0.5 * 2**0.5 * good.sum().to(F64)[None])


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        (
            torch.tensor([0, 0, 2**40]),
            r"segments must be less than the number of rows \+ 2\*\*20, 1048579, got 1099511627776",
        ),
        (torch.tensor([0, 0, 0], device="meta"), "segments must be a dense tensor"),
    ],
)
def test_segments_that_no_memory_holds_are_refused(segments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        solve(lambda z: 0.5 * z, torch.ones(3, 2), segments=segments, gradient=None)
