"""A solve inside a graph of torch.compile or torch.export: the traced loop against the eager one."""

import subprocess
import sys

import problems
import pytest
import torch

from pydeqsolve import DEQ, Anderson, Broyden, Phantom, Picard, Status, Stop, solve

pytestmark = pytest.mark.filterwarnings("ignore")  # the compiler's own


def both(fn, z0, inputs=(), **options):
    """The same solve eager and in one graph: (z, status, evaluations, residual, rejections, steps) of each."""

    def run(z0, *inputs):
        out = solve(fn, z0, inputs, gradient=None, **options)
        return out.z, out.status, out.evaluations, out.residual, out.rejections, torch.as_tensor(out.steps)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    with torch.no_grad():
        return run(z0, *inputs), compiled(z0, *inputs)


def mixed(z, scale):
    """Converges, runs out of budget, cycles, grows without bound, is NaN: one kind per row by `scale` (n, 1)."""
    return torch.where(scale < 50, scale * z + 1, torch.where(scale < 90, 1.5 * z * z + 1e3, z / 0 - z / 0))


@pytest.mark.parametrize(
    ("solver", "norm"), [(Anderson(), "rms"), (Anderson(memory=2, damping=0.7, ridge=1e-10), "max"), (Picard(), "l2")]
)
def test_every_sample_ends_as_it_does_outside_a_graph(solver, norm):
    scale = torch.tensor([[0.5], [0.999], [-1.0], [3.0], [60.0], [100.0]], dtype=torch.float64)
    z0 = torch.linspace(0.1, 0.4, 18, dtype=torch.float64).reshape(6, 3)
    stop = Stop(1e-8, max_steps=40, norm=norm)
    (z, status, evaluations, residual, rejections, steps), found = both(mixed, z0, (scale,), solver=solver, stop=stop)
    assert status.tolist() == found[1].tolist()
    bounded = scale[:, 0] != 60.0  # where a sample grows without bound, rounding is all that its steps agree to
    assert evaluations[bounded].tolist() == found[2][bounded].tolist()
    assert rejections[bounded].tolist() == found[4][bounded].tolist()
    assert (evaluations - found[2]).abs().max() <= 2
    assert (int(steps), int(found[5])) == (int(evaluations.max()), int(found[2].max()))
    good = status != int(Status.NONFINITE)
    torch.testing.assert_close(found[0][good], z[good], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found[3][status == 0], residual[status == 0], rtol=1e-2, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_takes_as_many_evaluations_in_every_dtype(dtype):
    problem, _ = problems.tanh_layer(24, 0.8, 3)
    weight = problem.inputs[0].to(dtype)
    with torch.no_grad():
        fn = lambda z, x: torch.tanh(0.5 * z.roll(1, -1) + x)  # noqa: E731
    expected, found = both(fn, torch.zeros_like(weight), (weight,))
    assert expected[1].tolist() == found[1].tolist()
    assert (expected[2] - found[2]).abs().max() <= 1
    torch.testing.assert_close(found[0], expected[0], rtol=4 * torch.finfo(dtype).eps ** 0.5, atol=0.01)


def test_a_tolerance_per_sample_holds_in_a_graph():
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)
    cell = lambda z, x: torch.tanh(0.9 * z + x)  # noqa: E731
    stop = Stop(torch.tensor([1e-2, 1e-4, 1e-8, 1e-12], dtype=torch.float64))
    expected, found = both(cell, torch.zeros_like(x), (x,), solver=Anderson(2), stop=stop)
    assert expected[2].tolist() == found[2].tolist()


def test_a_tolerance_below_the_precision_of_autocast_ends_stalled_in_a_graph():
    linear = torch.nn.Linear(8, 8)
    torch.nn.init.orthogonal_(linear.weight, 0.5)

    def run(x):
        with torch.autocast("cpu", torch.bfloat16):
            fn = lambda z, x: linear(z) + x  # noqa: E731
            return solve(fn, torch.zeros_like(x), (x,), solver=Picard(), stop=Stop(1e-6), gradient=None).status

    torch._dynamo.reset()
    with torch.no_grad():
        x = torch.randn(3, 8, generator=problems.generator(1))
        assert torch.compile(run, fullgraph=True, backend="eager")(x).tolist() == run(x).tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    "changes",
    [
        [{"stop": Stop(1e-4)}, {"stop": Stop(1e-6)}, {"stop": Stop(1e-3)}],
        [{"stop": Stop(1e-4, 1e-4)}, {"stop": Stop(1e-4, 1e-5)}],
        [{"stop": Stop(1e-9, max_steps=3)}, {"stop": Stop(1e-9, max_steps=5)}, {"stop": Stop(1e-9, max_steps=4)}],
        [{"solver": Picard(0.7)}, {"solver": Picard(0.8)}, {"solver": Picard()}],
        [{"solver": Anderson(2, damping=0.7)}, {"solver": Anderson(2, damping=0.8)}, {"solver": Anderson(2)}],
        [{"solver": Anderson(2, ridge=1e-4)}, {"solver": Anderson(2, ridge=1e-6)}],
        [{"solver": Anderson(2, safeguard=3.0)}, {"solver": Anderson(2, safeguard=5.0)}],
    ],
)
def test_a_compiled_layer_takes_other_numbers_at_the_same_place(changes):
    layer = DEQ(lambda z, x: 0.5 * torch.tanh(z) + x, solver=Anderson(2)).eval()
    x = torch.randn(4, 6, dtype=torch.float64, generator=problems.generator(7))
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    with torch.no_grad():
        for change in changes:
            for name, value in change.items():
                setattr(layer, name, value)
            expected, evaluations = layer(x), layer.solution.evaluations
            torch.testing.assert_close(compiled(x), expected, rtol=1e-9, atol=1e-12)
            assert layer.solution.evaluations.tolist() == evaluations.tolist()


@pytest.mark.parametrize("solver", ["Anderson(2)", "Picard()"])
def test_a_solver_that_never_ran_before_is_compiled(solver):
    program = f"""
import torch
from pydeqsolve import Anderson, Picard, solve
solver = {solver}
def run(x):
    return solve(lambda z, x: 0.5 * z + x, torch.zeros_like(x), (x,), solver=solver, gradient=None).z
with torch.no_grad():
    x = torch.ones(2, 3)
    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="eager")(x), 2 * x, rtol=1e-4, atol=1e-4)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_nested_states_and_empty_batches_are_traced():
    def fn(z):
        return {"a": 0.5 * z["b"] + 1, "b": 0.25 * z["a"]}

    for n in (2, 0):
        z0 = {"a": torch.zeros(n, 3), "b": torch.zeros(n, 3)}
        expected, found = both(fn, z0, solver=Anderson(1))
        torch.testing.assert_close(found[0], expected[0])
        assert found[1].tolist() == expected[1].tolist()


def test_a_deq_layer_compiles_into_one_graph_without_gradient():
    layer = DEQ(torch.nn.Bilinear(4, 4, 4), solver=Anderson(2)).eval()
    with torch.no_grad():
        layer.cell.weight.mul_(0.1)
        x = torch.randn(3, 4, generator=problems.generator(2))
        expected = layer(x)
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), expected)


@pytest.mark.parametrize("strict", [True, False])
def test_a_model_with_a_solve_is_exported_for_any_batch_size(strict):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)
            torch.nn.init.orthogonal_(self.linear.weight, 0.8)

        def forward(self, x):
            fn = lambda z, x: torch.tanh(self.linear(z) + x)  # noqa: E731
            out = solve(fn, torch.zeros_like(x), (x,), solver=Anderson(2), gradient=None)
            return out.z, out.status

    model = Model()
    with torch.no_grad():
        x = torch.randn(3, 4, generator=problems.generator(3))
        batch = torch.export.Dim("batch", min=2)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},), strict=strict)
        y = torch.randn(7, 4, generator=problems.generator(4))
        torch.testing.assert_close(program.module()(y), model(y))


@pytest.mark.parametrize("strict", [True, False])
def test_the_export_of_a_solve_that_no_program_can_hold_says_what_one_can(strict):
    class Model(torch.nn.Module):
        def forward(self, x):
            return solve(lambda z, x: 0.5 * z + x, torch.zeros_like(x), (x,)).z

    with pytest.raises(Exception, match="takes a solve without gradient"):
        torch.export.export(Model(), (torch.ones(2, 3, requires_grad=True),), strict=strict)


def test_what_has_no_traced_form_breaks_the_graph_and_is_right():
    def run(x):
        return 2 * solve(lambda z, x: 0.5 * z + x, torch.zeros_like(x), (x,), solver=Broyden(), gradient=None).z

    torch._dynamo.reset()
    with torch.no_grad():
        x = torch.randn(3, 4, generator=problems.generator(5))
        torch.testing.assert_close(torch.compile(run, backend="eager")(x), 4 * x, rtol=1e-4, atol=1e-4)
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported):
            torch.compile(run, fullgraph=True, backend="eager")(x)


@pytest.mark.check
def test_inductor_makes_a_program_of_the_loop():
    def run(x):
        out = solve(lambda z, x: torch.tanh(0.9 * z.roll(1, -1) + x), torch.zeros_like(x), (x,), gradient=None)
        return out.z, out.status, out.evaluations

    torch._dynamo.reset()
    with torch.no_grad():
        x = torch.randn(5, 16, generator=problems.generator(6))
        torch.testing.assert_close(torch.compile(run, fullgraph=True)(x), run(x), rtol=1e-4, atol=1e-5)


def with_phantom(x, W, backend, gradient):
    """z, counts, and the gradients of x and W, eager and in one graph."""

    def run(x, W):
        out = solve(lambda z, x: torch.tanh(z @ W.T + x), torch.zeros_like(x), (x,), gradient=gradient)
        return out.z, out.evaluations, out.status

    torch._dynamo.reset()
    for fn in (run, torch.compile(run, fullgraph=True, backend=backend)):
        at = [t.clone().requires_grad_() for t in (x, W)]
        z, evaluations, status = fn(*at)
        found = torch.autograd.grad(z[:2].sin().sum(), at)
        yield z.detach(), evaluations, status, *found


def layer_data():
    x = torch.randn(3, 4, dtype=torch.float64, generator=problems.generator(3))
    return x, 0.5 * problems.orthogonal(4, 1)


@pytest.mark.parametrize(
    ("backend", "gradient"),
    [
        ("eager", Phantom(3, 0.7)),
        pytest.param("aot_eager", Phantom(2), marks=pytest.mark.check),
    ],
    ids=str,
)
def test_a_phantom_gradient_in_a_graph_is_that_outside(backend, gradient):
    outside, inside = with_phantom(*layer_data(), backend, gradient)
    assert torch.equal(outside[1], inside[1])
    for a, b in zip(outside, inside, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-12)


def test_a_failed_sample_has_no_gradient_in_a_graph_and_spoils_none():
    x, W = layer_data()
    x[2] = torch.nan
    outside, inside = with_phantom(x, W, "eager", Phantom(2))
    assert inside[2].tolist() == [Status.CONVERGED, Status.CONVERGED, Status.NONFINITE]
    for a, b in zip(outside[3:], inside[3:], strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-12)


def test_a_sample_that_overflows_on_the_way_of_a_phantom_gradient_spoils_none_in_a_graph():
    x, W = layer_data()
    scale = torch.tensor([[1.0], [1e150], [1.0]], dtype=torch.float64)

    def run(x, V):
        fn = lambda z, x, s: s * (torch.sin(0.5 * z @ V) + x + (s > 1) * z)  # noqa: E731
        return solve(fn, torch.zeros_like(x), (x, scale), gradient=Phantom(4), stop=Stop(1e-10)).z

    found = []
    for solved in (run, torch.compile(run, backend="eager", fullgraph=True)):
        V = W.clone().requires_grad_()
        z = solved(x, V)
        found.append((z.detach(), *torch.autograd.grad(z[0].sin().sum(), V)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-7, atol=1e-9)


def test_an_empty_batch_of_a_phantom_gradient_is_traced():
    x, W = layer_data()
    V = W.requires_grad_()
    run = lambda x: solve(lambda z, x: torch.tanh(z @ V + x), torch.zeros_like(x), (x,), gradient=Phantom()).z  # noqa: E731
    assert torch.compile(run, backend="eager", fullgraph=True)(x[:0]).shape == (0, 4)
