"""Implicit gradients inside a graph of torch.compile: against unrolled iteration, and against the eager ones."""

import sys
import types
import warnings
from unittest import mock

import problems
import pytest
import torch

from pydeqsolve import (
    DEQ,
    Adjoint,
    Anderson,
    ConvergenceError,
    Implicit,
    Phantom,
    Picard,
    Status,
    Stop,
    derivative,
    solution,
    solve,
)
from pydeqsolve.derivative import compiled
from pydeqsolve.derivative.numbered import drawn, solved
from pydeqsolve.loop import held

pytestmark = pytest.mark.filterwarnings("ignore")  # the compiler's own


class Cell(torch.nn.Module):
    def __init__(self, D):
        super().__init__()
        self.linear = torch.nn.Linear(D, D, dtype=torch.float64)
        with torch.no_grad():
            self.linear.weight.copy_(0.6 * problems.orthogonal(D, 1))

    def forward(self, z, x):
        return torch.tanh(self.linear(z) + x)


def gradients(z, tensors):
    return torch.autograd.grad((torch.view_as_real(z) if z.is_complex() else z).sin().sum(), tensors)


@pytest.mark.parametrize(
    ("D", "backend"),
    [(8, "eager"), (72, "aot_eager"), pytest.param(72, "inductor", marks=pytest.mark.check)],
    ids=["by-matrix", "by-loop", "inductor"],
)
def test_a_compiled_training_step_has_the_gradients_of_unrolled_iteration(D, backend):
    layer = DEQ(Cell(D), solver=Anderson(1), stop=Stop(1e-11))
    x = torch.randn(3, D, dtype=torch.float64, generator=problems.generator(2)).requires_grad_()
    wanted = [x, *layer.parameters()]
    z = torch.zeros_like(x)
    for _ in range(60):
        z = layer.cell(z, x)
    truth = gradients(z, wanted)
    gradients(layer(x), wanted)
    eager = layer.solution
    torch._dynamo.reset()
    found = gradients(torch.compile(layer, fullgraph=True, backend=backend)(x), wanted)
    for a, b in zip(truth, found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-8, atol=1e-10)
    assert layer.solution.status.tolist() == eager.status.tolist()
    assert layer.solution.evaluations.tolist() == eager.evaluations.tolist()
    adjoint = layer.solution.adjoint
    assert adjoint.status.tolist() == [Status.CONVERGED] * 3
    assert adjoint.residual.max() <= 1e-11
    assert adjoint.evaluations.tolist() == eager.adjoint.evaluations.tolist()


def both(fn, x, *closed):
    """The solution, the gradients of x and of what fn closes over, and the warnings of it: eager and compiled."""

    def run(x):
        return solve(fn, torch.zeros_like(x), (x,), solver=Anderson(2), stop=Stop(1e-9))

    torch._dynamo.reset()
    for form in (run, torch.compile(run, fullgraph=True, backend="eager")):
        at = [x.clone().requires_grad_(), *closed]
        found = form(at[0])
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            slopes = gradients(found.z[found.residual.isfinite()], at)
        yield found, slopes, [str(w.message) for w in told if "adjoint" in str(w.message)]


def test_a_layer_compiled_for_any_batch_size_has_the_gradients_of_each():
    layer = DEQ(Cell(6), solver=Anderson(2), stop=Stop(1e-9))
    torch._dynamo.reset()
    compiled_layer = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (3, 5, 2):
        x = torch.randn(n, 6, dtype=torch.float64, generator=problems.generator(n)).requires_grad_()
        expected = gradients(layer(x), [x, *layer.parameters()])
        for a, b in zip(expected, gradients(compiled_layer(x), [x, *layer.parameters()]), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-7, atol=1e-9)
        assert layer.solution.adjoint.status.tolist() == [Status.CONVERGED] * n


def test_a_failed_sample_has_no_implicit_gradient_in_a_graph_and_spoils_none():
    x = torch.randn(3, 6, dtype=torch.float64, generator=problems.generator(3))
    x[1] = torch.nan
    W = (0.7 * problems.orthogonal(6, 2)).requires_grad_()
    (_, expected, _), (found, slopes, told) = both(lambda z, x: torch.tanh(z @ W.T + x), x, W)
    assert found.adjoint.status.tolist() == [Status.CONVERGED, Status.NONFINITE, Status.CONVERGED]
    assert not told
    for a, b in zip(expected, slopes, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-7, atol=1e-9)


def flat_line(z, x):
    """z_0 keeps its value, so that I − J is singular; the rest contracts."""
    return torch.cat([z[:, :1], 0.5 * z[:, 1:] + x[:, 1:]], 1)


@pytest.mark.parametrize("D", [5, 70])
def test_a_singular_adjoint_is_warned_of_and_stalled_in_a_graph_too(D):
    x = torch.randn(2, D, dtype=torch.float64, generator=problems.generator(4))
    (_, expected, _), (found, slopes, told) = both(flat_line, x)
    assert found.adjoint.status.tolist() == [Status.STALLED] * 2
    assert len(told) == 1
    assert "2 of 2 STALLED" in told[0]
    torch.testing.assert_close(slopes[0], expected[0], rtol=1e-7, atol=1e-9)


def test_a_compiled_adjoint_that_fails_raises_where_that_is_asked_for():
    x = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    gradient = Implicit(on_failure="raise")
    run = lambda x: solve(flat_line, torch.zeros_like(x), (x,), gradient=gradient, solver=Anderson(1)).z  # noqa: E731
    torch._dynamo.reset()
    z = torch.compile(run, fullgraph=True, backend="eager")(x)
    with pytest.raises(ConvergenceError, match="2 of 2 STALLED"):
        gradients(z, [x])


def test_the_graph_breaks_where_it_may_for_the_eager_solve_is_quicker():
    def outer(x):
        inner = lambda z, x: solve(lambda y, z, x: 0.3 * y + 0.3 * z + x, torch.zeros_like(z), (z, x)).z  # noqa: E731
        return solve(inner, torch.zeros_like(x), (x,), stop=Stop(1e-9)).z

    x = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    torch._dynamo.reset()
    run = lambda x: solve(lambda z, x: 0.5 * z + x, torch.zeros_like(x), (x,)).z.sum()  # noqa: E731
    with mock.patch.object(compiled, "_with_implicit", side_effect=AssertionError):
        (slope,) = torch.autograd.grad(torch.compile(run, backend="eager")(x), x)
        (nested,) = torch.autograd.grad(torch.compile(outer, backend="eager")(x).sum(), x)
    torch.testing.assert_close(slope, torch.full_like(x, 2.0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(nested, torch.full_like(x, 2.5), rtol=1e-4, atol=1e-4)


def test_a_solve_inside_the_map_of_another_has_its_gradient_in_one_graph():
    def inner(z, x):
        return solve(lambda y, z, x: 0.3 * y + 0.3 * z.sin() + x, torch.zeros_like(z), (z, x), stop=Stop(1e-11)).z

    x = torch.randn(2, 3, dtype=torch.float64, generator=problems.generator(6)).requires_grad_()
    run = lambda x: solve(inner, torch.zeros_like(x), (x,), stop=Stop(1e-10)).z  # noqa: E731
    torch._dynamo.reset()
    (expected,), (found,) = (
        gradients(f(x), [x]) for f in (run, torch.compile(run, fullgraph=True, backend="aot_eager"))
    )
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


def test_a_map_that_returns_an_input_has_its_gradient_in_a_graph():
    x = torch.randn(2, 3, dtype=torch.float64, generator=problems.generator(6))
    (_, expected, _), (_, slopes, _) = both(lambda z, x: x, x)
    torch.testing.assert_close(slopes[0], expected[0])


def test_another_adjoint_solver_breaks_the_graph_and_is_right():
    gradient = Implicit(Anderson())

    def run(x):
        return solve(lambda z, x: 0.5 * z + x, torch.zeros_like(x), (x,), gradient=gradient).z.sum()

    x = torch.randn(2, 3, generator=problems.generator(5), requires_grad=True)
    torch._dynamo.reset()
    (slope,) = torch.autograd.grad(torch.compile(run, backend="eager")(x), x)
    torch.testing.assert_close(slope, torch.full_like(x, 2.0), rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(run, fullgraph=True, backend="eager")(x)


def test_a_compiled_solve_of_what_requires_no_gradient_returns_its_solution():
    run = lambda x: solve(lambda z, x: 0.5 * z + x, torch.zeros_like(x), (x,), solver=Picard()).z  # noqa: E731
    torch._dynamo.reset()
    x = torch.ones(2, 3)
    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(x), 2 * x, rtol=1e-4, atol=1e-4)


def test_a_complex_state_has_an_implicit_gradient_in_a_graph():
    x = torch.randn(3, 4, dtype=torch.complex128, generator=problems.generator(9))
    fn = lambda z, x: 0.4 * (1 + 0.3j) * torch.tanh(z.roll(1, -1)) + x  # noqa: E731
    (_, expected, _), (found, slopes, _) = both(fn, x)
    assert found.adjoint.status.tolist() == [Status.CONVERGED] * 3
    torch.testing.assert_close(slopes[0], expected[0], rtol=1e-7, atol=1e-9)


@pytest.mark.check
@pytest.mark.parametrize("options", [{"cpp_wrapper": True}, {"max_autotune": True}], ids=str)
def test_options_of_inductor_leave_gradients_and_outcomes_right(options):
    x = torch.randn(3, 6, dtype=torch.float64, generator=problems.generator(3))
    W = (0.7 * problems.orthogonal(6, 2)).requires_grad_()

    def run(x):
        return solve(
            lambda z, x: torch.tanh(z @ W.T + x), torch.zeros_like(x), (x,), solver=Anderson(2), stop=Stop(1e-9)
        )

    torch._dynamo.reset()
    outside, inside = run(x), torch.compile(run, fullgraph=True, options=options)(x)
    for a, b in zip(gradients(outside.z, [W]), gradients(inside.z, [W]), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-7, atol=1e-9)
    for name in ("status", "evaluations"):
        assert getattr(inside, name).tolist() == getattr(outside, name).tolist()
        assert getattr(inside.adjoint, name).tolist() == getattr(outside.adjoint, name).tolist()
    torch.testing.assert_close(inside.residual, outside.residual, rtol=1e-2, atol=1e-12)
    torch.testing.assert_close(inside.adjoint.residual, outside.adjoint.residual, rtol=1e-2, atol=1e-12)


def test_a_graph_of_another_process_is_refused():
    with pytest.raises(RuntimeError, match="another process"):
        held.held("0" * 32 + "-0", [], [])


def test_the_precision_of_autocast_bounds_what_a_compiled_adjoint_pursues():
    linear = torch.nn.Linear(8, 8)
    torch.nn.init.orthogonal_(linear.weight, 0.5)

    def run(x):
        with torch.autocast("cpu", torch.bfloat16):
            return solve(lambda z, x: linear(z) + x, torch.zeros_like(x), (x,), solver=Anderson(1))

    x = torch.randn(3, 8, generator=problems.generator(6), requires_grad=True)
    torch._dynamo.reset()
    found = torch.compile(run, fullgraph=True, backend="eager")(x)
    (slope,) = gradients(found.z, [x])
    assert found.adjoint.status.tolist() == [Status.CONVERGED] * 3
    expected = found.z.detach().cos() @ torch.linalg.inv(torch.eye(8) - linear.weight.detach())
    torch.testing.assert_close(slope, expected, rtol=0.05, atol=0.05)


def adjoint(matrix, g, good=None, rtol=1e-10, restart=30, budget=200, on_failure="warn"):
    """u of u = g + matrix u by what the operator calls, and the outcome."""
    n = len(g)
    rtol = torch.as_tensor(rtol, dtype=torch.float64).expand(n)
    good = torch.ones(n) if good is None else good
    bounds = torch.stack([good.double(), rtol, torch.zeros_like(rtol), torch.full_like(rtol, budget)], 1)
    ticket, eps = drawn(g), torch.finfo(g.dtype).eps
    u = solved(lambda u: u @ matrix.T, g[:, None], bounds, ticket, eps, restart, False, on_failure)
    return u[:, 0], solution.Recorder(ticket=ticket).found


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_the_adjoint_of_a_graph_solves_a_system_that_expands_at_every_scale(scale):
    draw = problems.generator(7)
    matrix = torch.randn(24, 24, dtype=torch.float64, generator=draw) / 3
    g = torch.randn(4, 24, dtype=torch.float64, generator=draw)
    u, outcome = adjoint(matrix, g * scale)
    torch.testing.assert_close(u / scale, torch.linalg.solve(torch.eye(24) - matrix, g.T).T, rtol=1e-7, atol=1e-9)
    assert outcome.status.tolist() == [Status.CONVERGED] * 4
    assert outcome.evaluations.tolist() == [25] * 4


def test_the_adjoint_of_a_graph_keeps_to_its_budget_and_to_the_tolerance_of_each_sample():
    matrix = 0.9 * problems.orthogonal(40, 3)
    g = torch.randn(3, 40, dtype=torch.float64, generator=problems.generator(8))
    _, outcome = adjoint(matrix, g, restart=7, budget=400)
    assert outcome.status.tolist() == [Status.CONVERGED] * 3
    with pytest.warns(RuntimeWarning, match="3 of 3 MAX_STEPS"):
        _, outcome = adjoint(matrix, g, restart=7, budget=20)
    assert outcome.status.tolist() == [Status.MAX_STEPS] * 3
    assert outcome.evaluations.max() <= 20
    _, outcome = adjoint(matrix, g, rtol=torch.tensor([1e-1, 1e-3, 1e-6]))
    assert sorted(set(outcome.evaluations.tolist())) == outcome.evaluations.tolist()
    assert (outcome.residual <= torch.tensor([1e-1, 1e-3, 1e-6])).all()


def test_a_cotangent_that_is_not_finite_stays_so_and_spoils_no_other_sample():
    g = torch.ones(4, 5, dtype=torch.float64)
    g[1, 2], g[2] = torch.inf, 0.0
    good = torch.tensor([True, True, True, False])
    with pytest.warns(RuntimeWarning, match="1 of 3 NONFINITE"):
        u, outcome = adjoint(0.5 * torch.eye(5, dtype=torch.float64), g, good)
    assert outcome.status.tolist() == [Status.CONVERGED, Status.NONFINITE, Status.CONVERGED, Status.NONFINITE]
    assert u[0].tolist() == [2.0] * 5
    assert not u[1].isfinite().any()
    assert u[2:].tolist() == [[0.0] * 5] * 2


def test_a_failed_adjoint_of_a_graph_may_be_replaced_by_the_phantom_gradient():
    g = torch.ones(1, 3, dtype=torch.float64)
    assert adjoint(torch.eye(3, dtype=torch.float64), g, on_failure="phantom")[0].tolist() == g.tolist()


@pytest.mark.parametrize(("count", "samples"), [(solution.KEPT + 1, 1), (2, solution.SAMPLES)])
def test_only_the_last_outcomes_of_compiled_backward_passes_are_kept(count, samples):
    outcomes = [Adjoint(*torch.zeros(3, 1).expand(3, samples)) for _ in range(count)]
    numbers = [torch.tensor(-k) for k in range(1, count + 1)]
    for number, outcome in zip(numbers, outcomes, strict=True):
        solution.note_numbered(number, outcome)
    assert solution.Recorder(ticket=numbers[0]).found is None
    assert solution.Recorder(ticket=numbers[-1]).found is outcomes[-1]


@pytest.mark.parametrize("gradient", [Implicit(), Phantom()], ids=["implicit", "phantom"])
def test_samples_that_have_all_failed_give_a_gradient_of_zero_in_a_graph_too(gradient):
    x = torch.full((2, 3), torch.nan, dtype=torch.float64, requires_grad=True)
    W = torch.eye(3, dtype=torch.float64, requires_grad=True)
    options = {"solver": Picard(), "gradient": gradient}
    run = lambda x: solve(lambda z, x: (z @ W + x).sin(), torch.zeros_like(x), (x,), **options).z  # noqa: E731
    torch._dynamo.reset()
    slopes = gradients(torch.compile(run, fullgraph=True, backend="eager")(x).nan_to_num(), [x, W])
    assert [float(slope.abs().max()) for slope in slopes] == [0.0, 0.0]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_what_fn_closes_over_may_not_change_before_a_compiled_backward_pass(backend):
    w = torch.full((3,), 0.5, requires_grad=True)

    def run(x):
        factor = w * 1.0
        z = solve(lambda z, x: factor * z + x, torch.zeros_like(x), (x,), solver=Picard()).z
        factor.mul_(0.1)
        return z

    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(torch.compile(run, fullgraph=True, backend=backend)(torch.ones(2, 3)), [w])


def test_second_derivatives_of_a_compiled_solve_are_refused():
    x = torch.ones(2, 3, requires_grad=True)
    run = lambda x: solve(lambda z, x: 0.5 * z.sin() + x, torch.zeros_like(x), (x,), solver=Picard()).z  # noqa: E731
    torch._dynamo.reset()
    z = torch.compile(run, fullgraph=True, backend="eager")(x)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.autograd.grad(z.sum(), x, create_graph=True)


@pytest.mark.parametrize(
    "hidden", ["torch._dynamo.symbolic_convert", "torch._higher_order_ops", "torch._higher_order_ops.utils"]
)
def test_a_torch_without_what_the_compiled_adjoint_is_made_of_has_the_graph_broken(hidden, monkeypatch):
    at_work = types.SimpleNamespace(one_graph=True, error_on_graph_break=False)
    monkeypatch.setattr(torch._dynamo.symbolic_convert.InstructionTranslator, "current_tx", lambda: at_work)
    assert compiled._must_be_whole()
    for name in ("graph", "numbered"):
        monkeypatch.delitem(sys.modules, f"pydeqsolve.derivative.{name}", raising=False)
        monkeypatch.delattr(derivative, name, raising=False)
    monkeypatch.setitem(sys.modules, hidden, None)
    assert not compiled._must_be_whole()


def test_a_compiler_that_does_not_say_whether_its_graph_may_break_breaks_it(monkeypatch):
    monkeypatch.setattr(torch._dynamo.symbolic_convert.InstructionTranslator, "current_tx", object)
    assert not compiled._must_be_whole()
