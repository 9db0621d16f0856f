"""Solves inside torch.func: grad, vjp, jvp, jacrev, jacfwd, hessian, vmap, and these inside one another."""

import problems
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import func, nn

from pydeqsolve import (
    DEQ,
    GMRES,
    Anderson,
    Broyden,
    ConvergenceError,
    Implicit,
    Neumann,
    Phantom,
    Picard,
    Status,
    Stop,
    Unrolled,
    solve,
)

f64 = torch.float64
TIGHT = Stop(rtol=1e-13, max_steps=300)
EXACT = Implicit(stop=TIGHT)
W = 0.5 * problems.orthogonal(3, 1)
X = torch.randn(2, 3, dtype=f64, generator=problems.generator(5))


def by_inputs(W, x, **options):
    fn = lambda z, x, W: torch.tanh((W @ z[..., None])[..., 0] + x)  # noqa: E731
    inputs = x, W.expand(len(x), *W.shape)
    return solve(fn, torch.zeros_like(x), inputs, **{"stop": TIGHT, "gradient": EXACT} | options).z


def by_closure(W, x, **options):
    fn = lambda z: torch.tanh(z @ W.T + x)  # noqa: E731
    return solve(fn, torch.zeros_like(x), **{"stop": TIGHT, "gradient": EXACT} | options).z


def unrolled(W, x):
    z = torch.zeros_like(x)
    for _ in range(60):
        z = torch.tanh(z @ W.T + x)
    return z


def total(f):
    return lambda W, x: f(W, x).sin().sum()


def directional(f):
    return lambda s: func.jvp(f, (s,), (torch.ones_like(s),))[1]


def thrice(one, two, three):
    return lambda f: one(two(three(lambda s: total(f)(s * W, X))))(torch.tensor(0.7, dtype=f64))


TRANSFORMS = {
    "grad": lambda f: func.grad(total(f), (0, 1))(W, X),
    "vjp": lambda f: func.vjp(f, W, X)[1](torch.ones_like(X)),
    "jvp": lambda f: func.jvp(f, (W, X), (W + 1, X * 2)),
    "jacrev": lambda f: func.jacrev(f, (0, 1))(W, X),
    "jacfwd": lambda f: func.jacfwd(f, (0, 1))(W, X),
    "hessian": lambda f: func.hessian(total(f), (0, 1))(W, X),
    "jacrev of jacrev": lambda f: func.jacrev(func.jacrev(total(f)))(W, X),
    "jacfwd of jacfwd": lambda f: func.jacfwd(func.jacfwd(total(f), 1), 1)(W, X),
    "jacrev of jacfwd": lambda f: func.jacrev(func.jacfwd(total(f), 1), 1)(W, X),
    "vmap over x": lambda f: func.vmap(lambda x: f(W, x[None])[0])(X),
    "vmap over W": lambda f: func.vmap(lambda W: f(W, X))(torch.stack([W, -W])),
    "vmap of jacrev": lambda f: func.vmap(func.jacrev(lambda W: f(W, X)))(torch.stack([W, -W])),
    "vmap of jacfwd": lambda f: func.vmap(func.jacfwd(lambda x: f(W, x)))(torch.stack([X, -X, X / 2])),
    "vmap of hessian": lambda f: func.vmap(func.hessian(lambda W: total(f)(W, X)))(torch.stack([W, -W])),
    "vjp of vmap, vmapped": lambda f: func.vmap(func.vjp(func.vmap(lambda W: f(W, X)), torch.stack([W, -W]))[1])(
        torch.stack([torch.stack([X, k * X]) for k in (1, 2, 3)])
    ),
    "vmap over other dimensions": lambda f: func.vmap(f, (2, 1))(torch.stack([W, -W], 2), torch.stack([X, X / 2], 1)),
    "vmap of vmap": lambda f: func.vmap(lambda W: func.vmap(lambda x: f(W, x[None]))(X))(torch.stack([W, -W])),
    "gradient per sample": lambda f: func.vmap(func.grad(lambda W, x: total(f)(W, x[None])), (None, 0))(W, X),
    "grad of vmap": lambda f: func.grad(lambda W: func.vmap(lambda x: f(W, x[None]))(X).sin().sum())(W),
    "third, reverse": thrice(func.grad, func.grad, func.grad),
    "third, forward": thrice(directional, directional, directional),
    "third, mixed": thrice(directional, func.grad, directional),
}


def close(found, expected, rtol=1e-9, atol=1e-10):
    for a, b in zip(*map(torch.utils._pytree.tree_leaves, (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("root", [by_inputs, by_closure])
def test_a_transformed_solve_is_the_transform_of_what_it_solves_for(root, transform):
    close(transform(root), transform(unrolled))


KINDS = {
    "reverse": func.grad,
    "forward": directional,
    "both": lambda f: lambda s: func.vmap(f)(torch.stack([s, s / 2])).sum(),
}


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=3), st.floats(-0.9, 0.9), st.booleans())
def test_transforms_inside_one_another_are_right_in_any_order(kinds, s, closed):
    root = by_closure if closed else by_inputs
    found, expected = (lambda s: total(root)(s * W, X + s)), (lambda s: total(unrolled)(s * W, X + s))
    for kind in kinds:
        found, expected = KINDS[kind](found), KINDS[kind](expected)
    s = torch.tensor(s, dtype=f64)
    close(found(s), expected(s), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("solver", [GMRES(), Neumann(200), Anderson(), Broyden()], ids=str)
def test_any_solver_serves_the_derivatives(solver):
    options = {"solver": Picard(), "gradient": Implicit(solver, TIGHT)}
    for transform in (TRANSFORMS["gradient per sample"], TRANSFORMS["hessian"]):
        close(transform(lambda W, x: by_closure(W, x, **options)), transform(unrolled), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("gradient", [Phantom(), Phantom(3, 0.7)], ids=str)
def test_phantom_gradients_are_those_outside_of_transforms(gradient):
    at = W.clone().requires_grad_()
    loss = lambda W, x: by_closure(W, x, gradient=gradient).sin().sum()  # noqa: E731
    (expected,) = torch.autograd.grad(loss(at, X), at)
    close(func.grad(loss)(W, X), expected)
    close(func.jvp(lambda W: loss(W, X), (W,), (W,))[1], (expected * W).sum())
    each = func.vmap(func.grad(lambda W, x: loss(W, x[None])), (None, 0))(W, X)
    close(each.sum(0), expected)


def test_without_gradient_nothing_passes():
    found = func.grad(lambda x: x.sum() + by_closure(W, x, gradient=None).sum())(X)
    assert torch.equal(found, torch.ones_like(X))


# ----------------------------------------------------------------------------------------------------------------------
# What a solution is inside a vmap


def told(rate):
    """What is said of z = rate z + 1 for one sample (1, 1), by plain steps."""
    found = solve(lambda z: rate * z + 1, torch.zeros(1, 1, dtype=f64), solver=Picard(), gradient=None)
    return found.status, found.evaluations, found.residual, found.z


def test_each_of_a_vmap_has_its_own_count_and_status():
    rates = torch.tensor([0.1, 0.5, 2.0, torch.nan], dtype=f64)
    found, alone = func.vmap(told)(rates), [told(rate) for rate in rates]
    for column, expected in zip(found, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(column, torch.stack(expected), rtol=0, atol=0, equal_nan=True)
    assert found[0][:, 0].tolist() == [Status.CONVERGED, Status.CONVERGED, Status.DIVERGED, Status.NONFINITE]


def test_a_vmap_is_one_solve_with_a_call_of_fn_for_all():
    calls = []

    def fn(z, x):
        calls.append(z)
        return torch.cos(z + x)

    func.vmap(lambda x: solve(fn, torch.zeros(1, 1, dtype=f64), (x,)).z)(torch.zeros(50, 1, 1, dtype=f64))
    assert len(calls) < 20


def test_tolerances_per_sample_hold_for_every_one_of_a_vmap():
    stop = Stop(rtol=torch.tensor([1e-2, 1e-9], dtype=f64))
    fn = lambda z, x: torch.tanh(z @ W.T + x)  # noqa: E731
    count = lambda x: solve(fn, torch.zeros_like(x), (x,), stop=stop).evaluations  # noqa: E731
    assert torch.equal(func.vmap(count)(torch.stack([X, X / 2])), torch.stack([count(X), count(X / 2)]))


def test_check_inside_a_vmap_is_refused_and_a_repr_is_short():
    def one(x):
        solution = solve(torch.cos, x)
        assert repr(solution) == "Solution(3 samples inside a vmap)"
        return solution.check().z

    with pytest.raises(NotImplementedError, match="check inside"):
        func.vmap(one)(torch.zeros(2, 3, 1))


def test_the_outcome_of_the_adjoint_is_left_in_the_solution():
    kept = []

    def loss(x):
        kept.append(solve(lambda z, x: torch.tanh(z @ W.T + x), torch.zeros_like(x), (x,)))
        return kept[0].z.sum()

    func.grad(loss)(X)
    assert kept[0].adjoint.status.tolist() == [Status.CONVERGED, Status.CONVERGED]
    assert kept[0].adjoint.evaluations.min() > 0


def test_a_map_that_casts_is_known_to_be_imprecise():
    fn = lambda z, x: torch.tanh(z.bfloat16() * 0.5 + x)  # noqa: E731
    status = lambda x: solve(fn, torch.zeros(3, 4), (x,), stop=Stop()).status  # noqa: E731
    x = torch.ones(2, 3, 4, dtype=torch.bfloat16)
    assert torch.equal(func.vmap(status)(x), torch.stack([status(x[0]), status(x[1])]))


# ----------------------------------------------------------------------------------------------------------------------
# Samples that fail


FAILED = torch.cat([X, torch.full((1, 3), torch.nan, dtype=f64)])


def test_a_failed_sample_of_a_vmap_spoils_no_shared_gradient():
    def loss(W, x):
        return func.vmap(lambda x: by_inputs(W, x[None]))(x)[:2].sin().sum()

    close(func.grad(loss)(W, FAILED), func.grad(total(unrolled))(W, X))


def test_a_failed_sample_of_a_batch_spoils_no_shared_gradient():
    found = func.grad(lambda W: by_inputs(W, FAILED)[:2].sin().sum())(W)
    close(found, func.grad(total(unrolled))(W, X))


def test_the_gradient_of_a_failed_sample_alone_is_zero():
    each = func.vmap(func.grad(lambda W, x: total(by_inputs)(W, x[None])), (None, 0))(W, FAILED)
    close(each[:2], TRANSFORMS["gradient per sample"](unrolled))
    assert torch.equal(each[2], torch.zeros_like(W))


def test_a_failed_sample_whose_data_is_closed_over_is_told():
    with pytest.warns(RuntimeWarning, match="give per-sample data in inputs"):
        func.grad(lambda W: by_closure(W, FAILED)[:2].sum())(W)


def test_an_adjoint_that_fails_is_told():
    gradient = Implicit(stop=Stop(rtol=1e-14, max_steps=1), on_failure="raise")
    with pytest.raises(ConvergenceError, match="2 of 2 MAX_STEPS"):
        func.grad(lambda x: by_closure(W, x, gradient=gradient).sum())(X)


def test_an_empty_batch_has_an_empty_gradient():
    assert func.grad(lambda x: by_inputs(W, x).sum())(X[:0]).shape == (0, 3)


# ----------------------------------------------------------------------------------------------------------------------
# Modules, and what fn closes over


class Cell(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.linear = nn.Linear(3, 3, dtype=f64)
        self.dropout = nn.Dropout(dropout)
        with torch.no_grad():
            self.linear.weight.copy_(W)

    def forward(self, z, x):
        return torch.tanh(self.linear(self.dropout(z)) + x)


def layer_and_parameters():
    layer = DEQ(Cell(), stop=TIGHT, gradient=EXACT)
    return layer, {name: x.detach() for name, x in layer.named_parameters()}


def gradients_of(layer, x):
    found = torch.autograd.grad(layer(x).sin().sum(), list(layer.parameters()))
    return dict(zip(dict(layer.named_parameters()), found, strict=True))


def test_gradients_through_functional_call_are_those_of_the_layer():
    layer, parameters = layer_and_parameters()
    found = func.grad(lambda p: func.functional_call(layer, p, (X,)).sin().sum())(parameters)
    close(found, gradients_of(layer, X))


def test_gradients_per_sample_through_functional_call_are_those_of_each_sample():
    layer, parameters = layer_and_parameters()
    loss = lambda p, x: func.functional_call(layer, p, (x[None],)).sin().sum()  # noqa: E731
    found = func.vmap(func.grad(loss), (None, 0))(parameters, X)
    for i, x in enumerate(X):
        close({name: g[i] for name, g in found.items()}, gradients_of(layer, x[None]))


def test_an_ensemble_of_layers_is_that_of_each():
    layer, parameters = layer_and_parameters()
    call = lambda p: func.functional_call(layer, p, (X,))  # noqa: E731
    both = {name: torch.stack([x, x / 2]) for name, x in parameters.items()}
    halves = {name: x / 2 for name, x in parameters.items()}
    close(func.vmap(call)(both), torch.stack([call(parameters), call(halves)]))


def test_parameters_may_be_exchanged_inside_fn():
    layer, parameters = layer_and_parameters()

    def loss(p):
        fn = lambda z, x: func.functional_call(layer, p, (z, x))  # noqa: E731
        return solve(fn, torch.zeros_like(X), (X,), stop=TIGHT, gradient=EXACT).z.sin().sum()

    layer.forward = lambda z, x: layer.cell(z, x)
    found = func.grad(loss)(parameters)
    del layer.forward
    close(found, gradients_of(layer, X))


def test_gradients_of_leaves_outside_of_a_vmap_are_right_to_second_order():
    def both(f):
        at = W.clone().requires_grad_()
        (g,) = torch.autograd.grad(func.vmap(lambda x: f(at, x[None]))(X).sin().sum(), at, create_graph=True)
        return g, torch.autograd.grad(g.square().sum(), at)[0]

    close(both(by_closure), both(unrolled))


def test_a_variable_that_changes_in_a_loop_is_that_of_its_solve():
    def loss(s):
        out = 0
        for w in (s, s / 2):
            z = solve(lambda z: torch.tanh(w * z + 1), torch.zeros(1, 1, dtype=f64), stop=TIGHT, gradient=EXACT).z  # noqa: B023
            out = out + z.sum()
        return out

    def plainly(s):
        out = 0
        for w in (s, s / 2):
            z = torch.zeros(1, 1, dtype=f64)
            for _ in range(100):
                z = torch.tanh(w * z + 1)
            out = out + z.sum()
        return out

    s = torch.tensor(0.5, dtype=f64)
    close(func.grad(loss)(s), func.grad(plainly)(s))


def test_a_map_may_use_transforms_of_its_own():
    pot = lambda z: (z**4 / 4 + z**2).sum()  # noqa: E731
    fn = lambda z, b: z - 0.2 * (func.vmap(func.grad(pot))(z) - b)  # noqa: E731
    b = torch.ones(3, 2, dtype=f64)
    root = lambda b: solve(fn, torch.zeros_like(b), (b,), stop=TIGHT, gradient=EXACT).z  # noqa: E731
    slope = 1 / (3 * root(b) ** 2 + 2)
    close(func.grad(lambda b: root(b).sum())(b), slope)
    close(func.vmap(root)(torch.stack([b, b])), torch.stack([root(b), root(b)]))


def test_the_autocast_of_the_solve_is_that_of_its_derivatives():
    linear = nn.Linear(4, 4)
    x = torch.randn(3, 4, generator=problems.generator(2))

    def loss(weight):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            fn = lambda z, x: torch.tanh(0.5 * nn.functional.linear(z, weight) + x)  # noqa: E731
            return solve(fn, torch.zeros_like(x), (x,), stop=Stop(rtol=1e-2)).z.sum()

    (expected,) = torch.autograd.grad(loss(linear.weight), linear.weight)
    torch.testing.assert_close(func.grad(loss)(linear.weight.detach()), expected, rtol=2e-2, atol=1e-2)


def test_a_solve_inside_the_map_of_a_solve_has_its_gradient():
    def outer(x, solved):
        fn = lambda z, x: 0.3 * torch.tanh(z + solved(x, z))  # noqa: E731
        return solve(fn, torch.zeros_like(x), (x,), stop=TIGHT, gradient=EXACT).z.sum()

    def inner(x, z):
        fn = lambda y, x, z: torch.cos(0.5 * y + x + 0.2 * z)  # noqa: E731
        return solve(fn, torch.zeros_like(x), (x, z), stop=TIGHT, gradient=EXACT).z

    at = X.clone().requires_grad_()
    (expected,) = torch.autograd.grad(outer(at, inner), at)
    close(func.grad(lambda x: outer(x, inner))(X), expected)


def in_one_another(x, root):
    inner = lambda z: root(lambda y: 0.4 * torch.sin(y) + z)  # noqa: E731
    return root(lambda z: torch.tanh(0.5 * inner(z) @ W.T + x)).sin().sum()


@pytest.mark.parametrize("second", [func.grad, func.jacrev, func.jacfwd, directional])
def test_a_solve_inside_the_map_of_a_solve_has_its_second_derivatives(second):
    def by_solve(fn):
        return solve(fn, torch.zeros_like(X), stop=TIGHT, gradient=EXACT).z

    def by_steps(fn):
        z = torch.zeros_like(X)
        for _ in range(60):
            z = fn(z)
        return z

    def derivative(root):
        return second(lambda x: func.grad(lambda x: in_one_another(x, root))(x).sin().sum())(X)

    close(derivative(by_solve), derivative(by_steps))


def test_complex_and_nested_states_are_differentiated():
    a = torch.tensor([[0.4 + 0.3j, 0.2]], dtype=torch.complex128)

    def loss(s):
        fn = lambda z, x: {"p": 0.3 * z["p"] * x[0] + 1j * z["q"], "q": 0.2 * s * z["p"].conj() + 1}  # noqa: E731
        start = {"p": torch.zeros_like(a), "q": torch.zeros_like(a)}
        return solve(fn, start, ((a, None),), stop=TIGHT, gradient=EXACT).z["p"].abs().sum()

    s, h = torch.tensor(0.8, dtype=f64), 1e-5
    difference = (loss(s + h) - loss(s - h)) / (2 * h)
    close((func.grad(loss)(s), directional(loss)(s)), (difference, difference), rtol=1e-7)
    close(func.vmap(func.grad(loss))(torch.stack([s, s])), torch.stack([difference] * 2), rtol=1e-7)


# ----------------------------------------------------------------------------------------------------------------------
# What is kept outside, and what is refused


def test_a_layer_keeps_a_solution_that_may_leave_a_grad_and_none_of_a_vmap():
    layer, parameters = layer_and_parameters()
    func.grad(lambda p: func.functional_call(layer, p, (X,)).sum())(parameters)
    assert layer.solution.converged.all()
    close(layer(X, z0=layer.solution), layer(X))
    func.vmap(lambda x: layer(x[None]))(X)
    assert layer.solution is None


def test_dropout_that_is_drawn_again_is_told():
    layer = DEQ(Cell(0.5), stop=Stop(max_steps=3))
    with pytest.raises(RuntimeError, match="dropout masks"):
        func.grad(lambda x: layer(x).sum())(X)


class Product(torch.autograd.Function):
    """z Wᵀ, in code that torch's functions do not see."""

    @staticmethod
    def forward(z, W):
        return z @ W.T

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        z, W = ctx.saved_tensors
        return g @ W, g.T @ z


def test_what_is_read_past_torchs_functions_is_refused_by_name():
    hidden = lambda W: solve(lambda z: torch.tanh(Product.apply(z, W) + X), torch.zeros_like(X)).z.sum()  # noqa: E731
    with pytest.raises(NotImplementedError, match="pass it in inputs"):
        func.grad(hidden)(W)


def test_what_a_map_reads_away_from_its_first_guess_alone_is_refused():
    def loss(W, V):
        fn = lambda z: torch.tanh(z @ (W + V if z.detach().any() else W).T + X)  # noqa: E731
        return solve(fn, torch.zeros_like(X)).z.sum()

    with pytest.raises(NotImplementedError, match="pass it in inputs"):
        func.grad(loss, (0, 1))(W, W / 2)


def test_what_a_map_hands_to_a_vmap_of_its_own_is_refused_by_name():
    own = lambda x: solve(lambda z: func.vmap(lambda z, x: torch.cos(z + x))(z, x), torch.zeros_like(X)).z.sum()  # noqa: E731
    with pytest.raises(NotImplementedError, match="pass it in inputs"):
        func.grad(own)(X)


OPTIONS = {
    "trace": True, "callback": lambda *seen: False, "keep_history": True, "snapshots": (1,), "merit": torch.sum,
    "gradient": Unrolled(),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_options_that_are_not_there_in_a_transform_are_refused_by_name(name):
    with pytest.raises(NotImplementedError, match=name):
        func.grad(lambda x: by_closure(W, x, **{name: OPTIONS[name]}).sum())(X)
