"""Implicit, Phantom and Unrolled against linear algebra, finite differences and each other; failure modes; contexts."""

import gc
import warnings
import weakref

import problems
import pytest
import torch
from torch import Tensor, nn

from pydeqsolve import (
    DEQ,
    GMRES,
    Anderson,
    Broyden,
    ConvergenceError,
    Implicit,
    Phantom,
    Picard,
    Status,
    Stop,
    Unrolled,
    solve,
)  # fmt: skip

f64 = torch.float64
TIGHT = Stop(rtol=1e-13, max_steps=2000)
ADJOINTS = [GMRES(), GMRES(restart=5), Anderson(), Anderson(kind="I"), Broyden(), Broyden(kind="bad"), Picard()]


def exact_weight_gradient(z: Tensor, W: Tensor, x: Tensor, g: Tensor) -> Tensor:
    """dL/dW of z = tanh(W z + x) by dense solves: u = (I − SW)⁻ᵀ g, S = diag(1 − z²)."""
    total = torch.zeros_like(W)
    identity = torch.eye(len(W), dtype=f64)
    for z_i, g_i in zip(z.double(), g.double(), strict=True):
        s = 1 - z_i**2
        u = torch.linalg.solve((identity - s[:, None] * W.double()).T, g_i)
        total += torch.outer(s * u, z_i)
    return total


def layer(D: int = 24, B: int = 3, radius: float = 0.8) -> tuple[problems.Map, Tensor]:
    return problems.tanh_layer(D, radius, B)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# Right gradients


@pytest.mark.parametrize("loss_scale", [1.0, 1e-8, 1e8])
def test_the_weight_gradient_of_a_tanh_layer_is_right_to_1e_6_at_the_default_settings(loss_scale):
    problem, W = problems.tanh_layer()
    solution = solve(problem.fn, problem.start, problem.inputs, stop=TIGHT).check()
    z = solution.z
    (loss_scale * z.square().mean()).backward()
    expected = exact_weight_gradient(z.detach(), W.detach(), problem.inputs[0], loss_scale * 2 * z.detach() / z.numel())
    assert relative(W.grad, expected) <= 1e-6
    assert (solution.adjoint.status == Status.CONVERGED).all()


@pytest.mark.parametrize("solver", ADJOINTS, ids=str)
@pytest.mark.parametrize("loss_scale", [1.0, 1e-8, 1e8])
def test_every_adjoint_solver_gives_the_same_gradient_at_every_scale_of_the_loss(solver, loss_scale):
    problem, W = layer(radius=0.9)
    gradient = Implicit(solver=solver, stop=Stop(rtol=1e-9, max_steps=500))
    z = solve(problem.fn, problem.start, problem.inputs, stop=TIGHT, gradient=gradient).z
    (loss_scale * z.square().mean()).backward()
    expected = exact_weight_gradient(z.detach(), W.detach(), problem.inputs[0], loss_scale * 2 * z.detach() / z.numel())
    assert relative(W.grad, expected) <= 1e-6


def test_the_adjoint_reports_a_residual_that_is_true():
    problem, W = layer()
    solution = solve(problem.fn, problem.start, problem.inputs, stop=TIGHT, gradient=Implicit(stop=Stop(rtol=1e-3)))
    solution.z.square().sum().backward()
    adjoint = solution.adjoint
    assert (adjoint.residual <= 1e-3).all()
    assert (adjoint.residual > 0).all()
    assert (adjoint.evaluations > 1).all()
    exact = exact_weight_gradient(solution.z.detach(), W.detach(), problem.inputs[0], 2 * solution.z.detach())
    # u is off by (I − Jᵀ)⁻¹ of the residual: at most 1e-3 ‖g‖/(1 − .8), while ‖u‖ ≥ ‖g‖/1.8.
    assert relative(W.grad, exact) <= 9e-3


@pytest.mark.parametrize("solver", ADJOINTS, ids=str)
def test_the_adjoint_tolerance_is_relative_to_the_cotangent_for_every_solver(solver):
    # u is 1,000 times as large as g: a tolerance relative to u would leave half of it out.
    rate = torch.tensor([0.999, 0.5], dtype=f64)
    b = torch.ones(1, 2, dtype=f64, requires_grad=True)
    gradient = Implicit(solver=solver, stop=Stop(rtol=1e-3, max_steps=20_000))
    solution = solve(lambda z, b: rate * z + b, torch.zeros_like(b), (b,), gradient=gradient)
    (found,) = torch.autograd.grad(solution.z.sum(), b)
    assert solution.adjoint.status.item() == Status.CONVERGED
    assert solution.adjoint.residual.item() <= 1e-3
    torch.testing.assert_close(found, 1 / (1 - rate)[None], rtol=2e-3, atol=0)


def test_the_adjoint_may_have_a_tolerance_per_sample_though_a_sample_failed():
    w = torch.tensor(0.5, dtype=f64, requires_grad=True)
    x = torch.tensor([[1.0], [torch.nan], [0.5]], dtype=f64)
    gradient = Implicit(stop=Stop(rtol=torch.tensor([1e-9, 1e-6, 1e-9], dtype=f64)))
    z = solve(lambda z, x: w * torch.sin(z) + x, torch.zeros_like(x), (x,), stop=TIGHT, gradient=gradient).z
    (found,) = torch.autograd.grad(z[[0, 2]].sum(), w)
    s, c = torch.sin(z[[0, 2]]).detach(), torch.cos(z[[0, 2]]).detach()
    assert found.item() == pytest.approx((s / (1 - 0.5 * c)).sum().item(), rel=1e-7)


def test_closures_modules_and_inputs_all_receive_their_gradient():
    cell = nn.Linear(4, 4).double()
    with torch.no_grad():
        cell.weight.mul_(0.4)
    scale = torch.tensor(0.7, dtype=f64, requires_grad=True)
    x = torch.randn(3, 4, dtype=f64, generator=problems.generator(1)).requires_grad_()

    def fn(z, x):
        return scale * torch.tanh(cell(z)) + x

    leaves = [cell.weight, cell.bias, scale, x]
    z = solve(fn, torch.zeros_like(x), (x,), stop=TIGHT, gradient=Implicit(stop=Stop(rtol=1e-11))).z
    found = torch.autograd.grad(z.pow(3).sum(), leaves)
    w = torch.zeros_like(x)
    for _ in range(200):
        w = fn(w, x)
    expected = torch.autograd.grad(w.pow(3).sum(), leaves)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_the_first_guess_gets_no_gradient():
    problem, _ = layer()
    z0 = problem.start.clone().requires_grad_()
    z = solve(problem.fn, z0, problem.inputs).z
    assert torch.autograd.grad(z.sum(), z0, allow_unused=True) == (None,)


@pytest.mark.parametrize("gradient", [Implicit(), Phantom()], ids=["implicit", "phantom"])
def test_attaching_a_gradient_changes_no_bit_of_the_solution(gradient):
    problem, _ = layer()
    plain = solve(problem.fn, problem.start, problem.inputs, gradient=None)
    attached = solve(problem.fn, problem.start, problem.inputs, gradient=gradient)
    assert torch.equal(plain.z, attached.z.detach())
    assert attached.z.requires_grad
    assert not plain.z.requires_grad


def test_two_forwards_before_one_backward_give_the_sum_of_their_gradients():
    problem, W = layer()
    (x,) = problem.inputs

    def loss(x):
        return (
            solve(problem.fn, problem.start, (x,), stop=TIGHT, gradient=Implicit(stop=Stop(rtol=1e-10)))
            .z.square()
            .sum()
        )

    (both,) = torch.autograd.grad(loss(x) + loss(-2 * x), W)
    one, other = torch.autograd.grad(loss(x), W)[0], torch.autograd.grad(loss(-2 * x), W)[0]
    torch.testing.assert_close(both, one + other, rtol=1e-9, atol=1e-12)


def test_solutions_inside_solutions_are_differentiated():
    a = torch.tensor([[0.6]], dtype=f64, requires_grad=True)

    def inner(y):
        return solve(lambda z, y: 0.3 * torch.sin(z) + y, y * 0, (y,), stop=TIGHT, gradient=IMPLICIT).z

    IMPLICIT = Implicit(stop=Stop(rtol=1e-11))
    z = solve(lambda z, a: 0.5 * inner(torch.cos(z)) * a, a * 0, (a,), stop=TIGHT, gradient=IMPLICIT).z
    (found,) = torch.autograd.grad(z.sum(), a)
    h = 1e-5
    with torch.no_grad():
        above, below = (
            solve(lambda z, a: 0.5 * inner(torch.cos(z)) * a, a * 0, (a + d,), stop=TIGHT, gradient=None).z.item()
            for d in (h, -h)
        )
    assert found.item() == pytest.approx((above - below) / (2 * h), rel=1e-7)


# Phantom and Unrolled


def test_the_one_step_phantom_gradient_passes_the_cotangent_straight_to_f():
    problem, W = layer()
    z = solve(problem.fn, problem.start, problem.inputs, stop=TIGHT, gradient=Phantom()).z
    (found,) = torch.autograd.grad(z.square().sum(), W)
    again = torch.tanh(z.detach() @ W.T + problem.inputs[0])
    (expected,) = torch.autograd.grad((2 * z.detach() * again).sum(), W)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("damping", [1.0, 0.6])
def test_phantom_gradients_are_damped_neumann_sums_and_tend_to_the_implicit_one(damping):
    A = problems.with_spectrum(torch.linspace(-0.5, 0.8, 5, dtype=f64), 2)
    b = torch.randn(1, 5, dtype=f64, generator=problems.generator(3)).requires_grad_()
    g = torch.randn(5, dtype=f64, generator=problems.generator(4))
    identity = torch.eye(5, dtype=f64)
    for steps in (1, 3, 200):
        z = solve(lambda z, b: z @ A.T + b, b.detach() * 0, (b,), stop=TIGHT, gradient=Phantom(steps, damping)).z
        (found,) = torch.autograd.grad((z * g).sum(), b)
        M = damping * A + (1 - damping) * identity  # one damped step; Geng et al. 2021, Eq. 9
        expected = sum(damping * torch.linalg.matrix_power(M, k) @ g for k in range(steps))
        torch.testing.assert_close(found[0], expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[0], torch.linalg.solve(identity - A, g), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "solver",
    [Picard(), Picard(0.7), Anderson(), Anderson(kind="I"), Anderson(ridge=1e-2), Broyden(), Broyden(kind="bad")],
    ids=str,
)
def test_unrolled_follows_the_solver_step_by_step(solver):
    problem, _ = layer()
    for steps in (1, 2, 4, 7):
        stop = Stop(rtol=0.0, max_steps=steps)
        seen = []
        solve(problem.fn, problem.start, problem.inputs, solver=solver, stop=stop, gradient=None,
              callback=lambda k, z, r, seen=seen: seen.append(z))  # fmt: skip
        z = solve(problem.fn, problem.start, problem.inputs, solver=solver, stop=stop, gradient=Unrolled()).z
        torch.testing.assert_close(z.detach(), seen[-1], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden()], ids=str)
def test_unrolled_gradients_tend_to_the_implicit_ones(solver):
    problem, W = layer(radius=0.6)
    grads = []
    for gradient in (Unrolled(), Implicit(stop=Stop(rtol=1e-11))):
        z = solve(problem.fn, problem.start, problem.inputs, solver=solver, stop=Stop(rtol=1e-11), gradient=gradient).z
        grads.append(torch.autograd.grad(z.square().sum(), W)[0])
    assert relative(grads[0], grads[1]) < 1e-6


def test_unrolled_gradients_reach_the_first_guess():
    z0 = torch.tensor([[0.3]], dtype=f64, requires_grad=True)
    z = solve(torch.cos, z0, solver=Picard(), stop=Stop(rtol=0.0, max_steps=3), gradient=Unrolled()).z
    (found,) = torch.autograd.grad(z.sum(), z0)
    z1 = torch.cos(z0.detach())
    assert found.item() == pytest.approx((torch.sin(z1) * torch.sin(z0.detach())).item(), rel=1e-14)


def test_an_exact_start_beside_it_does_not_poison_an_unrolled_gradient():
    w = torch.tensor(0.5, dtype=f64, requires_grad=True)
    x = torch.tensor([[1.0, 2.0], [0.0, 0.0]], dtype=f64)
    z = solve(lambda z, x: w * torch.sin(z) + x, x * 0, (x,), gradient=Unrolled()).z
    (found,) = torch.autograd.grad(z.sum(), w)
    alone = solve(lambda z, x: w * torch.sin(z) + x, x[:1] * 0, (x[:1],), gradient=Unrolled()).z
    assert found.item() == pytest.approx(torch.autograd.grad(alone.sum(), w)[0].item(), rel=1e-9)


def test_unrolled_carries_a_causal_coupling_or_says_that_it_cannot():
    problem = problems.triangular(6, gain=0.9)
    stop = Stop(rtol=0.0, max_steps=4)
    seen = []
    solver = Anderson(coupling="causal")
    solve(problem.fn, problem.start, problem.inputs, solver=solver, stop=stop, gradient=None,
          callback=lambda k, z, r: seen.append(z))  # fmt: skip
    try:
        z = solve(problem.fn, problem.start, problem.inputs, solver=solver, stop=stop, gradient=Unrolled()).z
    except (NotImplementedError, ValueError):
        return
    torch.testing.assert_close(z.detach(), seen[-1], rtol=1e-6, atol=1e-9)


# Isolation


def gradients_beside(bad: Tensor, gradient) -> tuple[Tensor, Tensor]:
    """Derivatives of the first three samples with respect to a parameter and the inputs."""
    w = torch.tensor(0.6, dtype=f64, requires_grad=True)
    x = torch.cat([torch.rand(3, 2, dtype=f64, generator=problems.generator(5)), bad]).requires_grad_()
    z = solve(lambda z, x: w * torch.sin(z) + x, torch.zeros_like(x), (x,), gradient=gradient).z
    return torch.autograd.grad(z[:3].square().sum(), [w, x])


@pytest.mark.parametrize(
    "gradient", [Implicit(), Phantom(steps=2), Unrolled()], ids=["implicit", "phantom", "unrolled"]
)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_sample_whose_input_is_nan_poisons_no_other_gradient(gradient, bad):
    clean_w, clean_x = gradients_beside(torch.empty(0, 2, dtype=f64), gradient)
    w, x = gradients_beside(torch.tensor([[bad, 1.0]], dtype=f64), gradient)
    torch.testing.assert_close(w, clean_w, rtol=1e-9, atol=0)
    torch.testing.assert_close(x[:3], clean_x, rtol=1e-9, atol=0)
    assert (x[3] == 0).all()


@pytest.mark.parametrize("gradient", [Implicit(), Phantom(steps=2)], ids=["implicit", "phantom"])
def test_a_sample_that_is_nan_where_it_starts_poisons_no_gradient_without_compaction(gradient):
    w = torch.tensor(0.6, dtype=f64, requires_grad=True)
    z0 = torch.tensor([[1.0], [2.0], [-1.0]], dtype=f64)

    def grad(z0):
        z = solve(lambda z: w * z.sqrt() + 1, z0, gradient=gradient, stop=TIGHT).z
        return torch.autograd.grad(z[:2].sum(), w)[0]

    torch.testing.assert_close(grad(z0), grad(z0[:2]), rtol=1e-9, atol=0)


@pytest.mark.parametrize("gradient", [Implicit(), Phantom(), Unrolled()], ids=["implicit", "phantom", "unrolled"])
def test_a_first_guess_that_is_nan_poisons_no_gradient_without_compaction(gradient):
    w = torch.tensor(0.6, dtype=f64, requires_grad=True)
    z0 = torch.tensor([[1.0], [2.0], [torch.nan]], dtype=f64)

    def grad(z0):
        z = solve(lambda z: w * torch.sin(z) + 1, z0, gradient=gradient, stop=TIGHT).z
        return torch.autograd.grad(z[:2].sum(), w)[0]

    torch.testing.assert_close(grad(z0), grad(z0[:2]), rtol=1e-9, atol=0)


@pytest.mark.parametrize("gradient", [Implicit(), Implicit(solver=Anderson()), Phantom()], ids=str)
def test_a_batch_of_bad_samples_alone_has_zero_gradients(gradient):
    x = torch.full((2, 3), torch.nan, dtype=f64, requires_grad=True)
    z = solve(lambda z, x: 0.5 * torch.sin(z) + x, torch.zeros(2, 3, dtype=f64), (x,), gradient=gradient).z
    (found,) = torch.autograd.grad(z.sum(), x)
    assert torch.equal(found, torch.zeros_like(x))


def test_a_nan_cotangent_stays_in_its_sample():
    problem, _ = layer()
    x = problem.inputs[0].clone().requires_grad_()
    z = solve(problem.fn, problem.start, (x,)).z
    g = torch.ones_like(z)
    g[1] = torch.nan
    with pytest.warns(RuntimeWarning, match="1 of 3 NONFINITE"):
        (found,) = torch.autograd.grad(z, x, g)
    (clean,) = torch.autograd.grad(solve(problem.fn, problem.start, (x,)).z.sum(), x)
    torch.testing.assert_close(found[[0, 2]], clean[[0, 2]], rtol=1e-6, atol=0)


# Failure is reported


def expanding(on_failure: str):
    """J = −3: Picard diverges on the adjoint; u = g/4."""
    b = torch.tensor([[1.0], [2.0]], dtype=f64, requires_grad=True)
    gradient = Implicit(solver=Picard(), stop=Stop(rtol=1e-6, max_steps=20), on_failure=on_failure)
    solution = solve(lambda z, b: -3 * z + b, torch.zeros_like(b), (b,), gradient=gradient)
    return solution.check(), b


def test_an_adjoint_that_does_not_converge_warns_and_reports():
    solution, _ = expanding("warn")
    with pytest.warns(RuntimeWarning, match="the adjoint of solve did not converge: 2 of 2"):
        solution.z.sum().backward()
    assert (solution.adjoint.status != Status.CONVERGED).all()
    assert (solution.adjoint.residual > 1e-6).all()


def test_an_adjoint_that_does_not_converge_raises_when_asked():
    solution, b = expanding("raise")
    with pytest.raises(ConvergenceError, match="the adjoint of solve did not converge"):
        solution.z.sum().backward()
    assert b.grad is None


def test_an_adjoint_that_does_not_converge_falls_back_to_the_one_step_gradient_when_asked():
    solution, b = expanding("phantom")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution.z.sum().backward()
    assert b.grad.tolist() == [[1.0], [1.0]]
    assert (solution.adjoint.status != Status.CONVERGED).all()


@pytest.mark.parametrize("solver", [GMRES(), Anderson(), Broyden()], ids=str)
def test_an_expanding_map_has_its_right_gradient_by_krylov_and_quasi_newton_adjoints(solver):
    b = torch.tensor([[1.0], [2.0]], dtype=f64, requires_grad=True)
    z = solve(lambda z, b: -3 * z + b, torch.zeros_like(b), (b,), gradient=Implicit(solver=solver)).z
    (found,) = torch.autograd.grad(z.sum(), b)
    torch.testing.assert_close(found, torch.full_like(b, 0.25), rtol=1e-9, atol=0)


# A Jacobian far from normal: GMRES stagnates until the last step, the residual of Picard grows first.


@pytest.mark.parametrize("solver", [GMRES(restart=30), Picard(), Anderson()], ids=str)
def test_the_adjoint_of_a_strictly_triangular_map_is_the_reverse_sweep(solver):
    problem = problems.triangular(12, B=1, D=1, gain=2.0)
    b = problem.inputs[0].clone().requires_grad_()
    gradient = Implicit(solver=solver, stop=Stop(rtol=1e-12, max_steps=200))
    z = solve(problem.fn, problem.start, (b,), solver=Picard(), stop=Stop(rtol=1e-14), gradient=gradient).z
    (found,) = torch.autograd.grad(z[:, -1].sum(), b)
    slope = 1 + torch.cos(problem.solution[0, :-1, 0])  # gain/2 · (1 + cos z)
    expected = torch.cat([slope.flip(0).cumprod(0).flip(0), torch.ones(1, dtype=f64)])
    torch.testing.assert_close(found[0, :, 0], expected, rtol=1e-8, atol=1e-10)


# Contexts


def test_no_graph_is_built_without_a_gradient_under_no_grad_or_in_inference_mode():
    problem, _ = layer()
    calls = []

    def fn(z, x):
        calls.append(torch.is_grad_enabled())
        return problem.fn(z, x)

    assert not solve(fn, problem.start, problem.inputs, gradient=None).z.requires_grad
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            for gradient in (Implicit(), Phantom(), Unrolled()):
                assert not solve(fn, problem.start, problem.inputs, gradient=gradient).z.requires_grad
    assert not any(calls)


def test_a_solve_under_autocast_keeps_its_dtype_and_has_gradients():
    problem, W = problems.tanh_layer(16, 0.5, 2, torch.float32)
    exact = solve(problem.fn, problem.start, problem.inputs, gradient=None).z
    with torch.autocast("cpu", dtype=torch.bfloat16):
        # A product in bfloat16 rounds at 4e-3: neither residual can be smaller.
        gradient = Implicit(stop=Stop(rtol=5e-2))
        z = solve(problem.fn, problem.start, problem.inputs, stop=Stop(rtol=2e-2), gradient=gradient).z
    assert z.dtype == torch.float32
    assert relative(z.detach(), exact) < 0.1
    z.square().sum().backward()
    expected = exact_weight_gradient(exact, W.detach(), problem.inputs[0], 2 * exact)
    assert relative(W.grad.double(), expected) < 0.2


def test_functional_call_differentiates_the_parameters_it_was_given():
    model = DEQ(Cell(4).double(), stop=TIGHT, gradient=Implicit(stop=Stop(rtol=1e-11)))
    x = torch.randn(2, 4, dtype=f64, generator=problems.generator(1))
    given = {name: (1.1 * p).detach().requires_grad_() for name, p in model.named_parameters()}
    found = torch.autograd.grad(torch.func.functional_call(model, given, (x,)).square().sum(), list(given.values()))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(given[name])
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    assert all(p.grad is None for p in model.parameters())


class Cell(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(width, width)
        with torch.no_grad():
            self.linear.weight.mul_(0.5)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(z) + x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.deq = DEQ(Cell(6))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.deq(2 * x))


@pytest.mark.filterwarnings("ignore")  # the compiler's own, on every graph break
def test_a_compiled_model_that_contains_a_solve_gives_the_same_values_and_gradients():
    model = Model()
    x = torch.randn(3, 6, generator=problems.generator(2))
    expected = model(x)
    grads = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    compiled = torch.compile(model, backend="aot_eager")
    found = compiled(x)
    torch.testing.assert_close(found, expected)
    for a, b in zip(torch.autograd.grad(found.square().sum(), list(model.parameters())), grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_checkpointed_map_has_the_same_gradient():
    problem, W = layer()

    def checkpointed(z, x):
        return torch.utils.checkpoint.checkpoint(problem.fn, z, x, use_reentrant=False)

    found, expected = (
        torch.autograd.grad(solve(fn, problem.start, problem.inputs, stop=TIGHT).z.sum(), W)[0]
        for fn in (checkpointed, problem.fn)
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


# Memory


@pytest.mark.parametrize("gradient", [Implicit(), Phantom(), Unrolled()], ids=["implicit", "phantom", "unrolled"])
@pytest.mark.parametrize("backward", [True, False])
def test_a_forgotten_solution_frees_its_tensors(gradient, backward):
    problem, _ = layer()
    solution = solve(problem.fn, problem.start, problem.inputs, gradient=gradient)
    if backward:
        solution.z.sum().backward()
    dead = weakref.ref(solution), weakref.ref(solution.z)
    del solution
    gc.collect()
    assert [d() for d in dead] == [None, None]


def test_the_backward_graph_does_not_grow_with_the_steps_of_the_solver():
    def saved_bytes(max_steps):
        problem, _ = layer(radius=0.99)
        total = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: total.append(t.nbytes) or t, lambda t: t):
            solve(problem.fn, problem.start, problem.inputs, solver=Picard(), stop=Stop(rtol=0.0, max_steps=max_steps))
        return sum(total)

    assert saved_bytes(40) == saved_bytes(4) > 0


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: Implicit(on_failure="ignore"), ValueError, "on_failure must be"),
        (lambda: Implicit(solver="gmres"), TypeError, "solver must be GMRES"),
        (lambda: Phantom(steps=0), ValueError, "steps must be at least 1"),
        (lambda: Phantom(damping=0.0), ValueError, "damping must be in"),
        (lambda: GMRES(restart=0), ValueError, "restart must be at least 1"),
    ],
)
def test_impossible_gradients_are_refused_by_name(make, kind, message):
    with pytest.raises(kind, match=message):
        make()
