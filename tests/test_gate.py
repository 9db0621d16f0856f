"""Refused accelerated iterates: `admissible` and `merit`."""

import problems
import pytest
import torch

from pydeqsolve import Anderson, Broyden, Front, Picard, Stop, Unrolled, solve

F64 = torch.float64
DEATHS = torch.tensor([162, 267, 271, 185, 111, 61, 27, 8, 3, 1], dtype=F64)  # days with 0 … 9 deaths, London 1910-1912
TIGHT = Stop(1e-10, max_steps=500)


def parts(z, days):
    """Logarithms of the two weighted Poisson densities, up to a common term, at every count of deaths."""
    y = torch.arange(days.shape[-1], dtype=F64)
    p, a, b = z[:, :1], z[:, 1:2], z[:, 2:]
    return p.log() - a + y * a.log(), (1 - p).log() - b + y * b.log()


def em(z, days=DEATHS):
    """A step of EM for a mixture of two Poisson laws (Hasselblad 1969): z = (share, mean, mean)."""
    y = torch.arange(days.shape[-1], dtype=F64)
    first, second = parts(z, days)
    one = torch.sigmoid(first - second) * days
    two = days - one
    means = [(w * y).sum(1, keepdim=True) / w.sum(1, keepdim=True) for w in (one, two)]
    return torch.cat([one.sum(1, keepdim=True) / days.sum(-1, keepdim=True), *means], 1)


def loss(z, days=DEATHS):
    """The negative log-likelihood, up to a constant."""
    return -(days * torch.logaddexp(*parts(z, days))).sum(1)


def inside(z, *_):
    return (z[:, 0] > 0) & (z[:, 0] < 1) & (z[:, 1:] > 0).all(1)


def starts(n, most):
    share, means = torch.rand(n, 1, generator=problems.generator(1)), torch.rand(n, 2, generator=problems.generator(2))
    return torch.cat([0.9 * share + 0.05, most * means + 0.05], 1).double()


@pytest.mark.parametrize("solver", [Anderson(), Anderson(kind="I"), Broyden()])
def test_em_with_a_merit_reaches_the_estimate_from_every_start(solver):
    out = solve(em, starts(200, 10), solver=solver, stop=Stop(1e-7, max_steps=500), gradient=None, merit=loss)
    share = torch.minimum((out.z[:, 0] - 0.35988).abs(), (out.z[:, 0] - 0.64012).abs())
    assert out.converged.all()
    assert (share < 1e-3).all()
    assert out.evaluations.double().mean() <= (60 if isinstance(solver, Broyden) else 45)


def test_em_of_a_mixture_that_is_told_apart_easily_takes_few_evaluations():
    y = torch.arange(30, dtype=F64)
    law = lambda mean: (y * mean.log() - mean - torch.lgamma(y + 1)).exp()  # noqa: E731
    days = 1000 * (0.4 * law(torch.tensor(2.0, dtype=F64)) + 0.6 * law(torch.tensor(12.0, dtype=F64)))
    fn, merit = (lambda z: em(z, days)), (lambda z: loss(z, days))
    out = solve(fn, starts(200, 20), stop=Stop(1e-7), gradient=None, admissible=inside, merit=merit)
    assert out.converged.all()
    assert out.evaluations.double().mean() <= 25
    means = out.z[:, 1:].sort(1).values
    torch.testing.assert_close(means, torch.tensor([[2.0, 12.0]], dtype=F64).expand(200, 2), rtol=1e-3, atol=1e-3)


def test_a_solve_whose_accelerated_iterates_are_all_refused_is_picard_iteration():
    problem, _ = problems.tanh_layer(6, 0.8, 3)
    refused = solve(
        problem.fn, problem.start, problem.inputs, stop=Stop(1e-8, max_steps=300), gradient=None, trace=True,
        solver=Anderson(damping=0.5), admissible=lambda z, *_: torch.zeros(len(z), dtype=torch.bool),
    )  # fmt: skip
    plain = solve(
        problem.fn, problem.start, problem.inputs, stop=Stop(1e-8, max_steps=300), gradient=None, trace=True,
        solver=Picard(0.5),
    )  # fmt: skip
    torch.testing.assert_close(refused.trace, plain.trace, rtol=1e-6, atol=0, equal_nan=True)
    assert refused.evaluations.tolist() == plain.evaluations.tolist()
    # Neither the first step nor the one that would follow the last measurement is accelerated.
    assert (refused.rejections == refused.evaluations - 2).all()


def test_a_refusal_costs_no_evaluation_and_loses_no_history():
    A = torch.diag(torch.tensor([0.9, 0.5, -0.7, 0.2], dtype=F64))
    asked = []

    def admissible(z):
        asked.append(z.clone())
        return torch.full((len(z),), len(asked) != 2)

    seen = []

    def fn(z):
        seen.append(z.clone())
        return z @ A + 1

    out = solve(fn, torch.zeros(1, 4, dtype=F64), stop=TIGHT, gradient=None, admissible=admissible)
    assert out.rejections.tolist() == [1]
    assert len(seen) == int(out.evaluations) == 6  # as many as an affine map of four unknowns takes unrefused
    torch.testing.assert_close(seen[3], seen[2] @ A + 1, rtol=1e-14, atol=0)
    assert out.converged.all()


def test_fn_never_sees_an_accelerated_iterate_that_is_not_admissible():
    seen = []

    def fn(z):
        seen.append(z.clone())
        return (z - 0.2).sqrt() + 0.05  # NaN left of .2; the fixed points are next to it

    def admissible(z):
        return (z >= 0.2).all(1)

    out = solve(fn, torch.full((4, 3), 2.0, dtype=F64), stop=TIGHT, gradient=None, admissible=admissible)
    assert all(bool(torch.isfinite(fn(z)).all()) for z in list(seen))
    assert out.converged.all()


@pytest.mark.parametrize("compact", [True, False])
def test_the_gates_see_the_samples_that_fn_sees(compact):
    rate = torch.tensor([[0.1], [0.99], [0.5]], dtype=F64)
    sizes = {"fn": [], "gate": []}

    def fn(z, rate):
        sizes["fn"].append(len(z))
        return rate * torch.tanh(z) + 1

    def admissible(z, rate):
        assert len(z) == len(rate)
        sizes["gate"].append(len(z))
        return torch.ones(len(z), dtype=torch.bool)

    out = solve(fn, torch.zeros(3, 4, dtype=F64), (rate,), gradient=None, admissible=admissible, compact=compact)
    assert set(sizes["gate"]) <= set(sizes["fn"])
    assert (min(sizes["gate"]) < 3) == compact
    plain = solve(fn, torch.zeros(3, 4, dtype=F64), (rate,), gradient=None, compact=compact)
    assert torch.equal(out.z, plain.z)


def test_a_sample_is_gated_alone_as_in_a_batch():
    z0 = torch.randn(6, 3, dtype=F64, generator=problems.generator(3))
    fn = lambda z: 0.9 * torch.tanh(1.1 * z.roll(1, 1)) + 0.2  # noqa: E731
    merit = lambda z: (100 * z[:, 0]).sin()  # noqa: E731
    together = solve(fn, z0, stop=TIGHT, gradient=None, merit=merit)
    assert len(set(together.rejections.tolist())) > 1
    for i in range(6):
        alone = solve(fn, z0[i : i + 1], stop=TIGHT, gradient=None, merit=merit)
        assert torch.equal(alone.z[0], together.z[i])
        for name in ("evaluations", "rejections", "status"):
            assert getattr(alone, name).item() == getattr(together, name)[i].item()


def test_a_merit_of_nan_refuses_and_one_that_is_unknown_now_does_not():
    problem, _ = problems.tanh_layer(6, 0.8, 3)
    nan = lambda z, *_: torch.full((len(z),), torch.nan)  # noqa: E731
    out = solve(problem.fn, problem.start, problem.inputs, gradient=None, merit=nan)
    assert (out.rejections > 0).all()
    assert out.converged.all()


def test_a_warm_start_with_history_is_gated_too():
    first = solve(em, starts(4, 10), stop=Stop(1e-3), gradient=None, merit=loss, keep_history=True)
    second = solve(em, first, stop=Stop(1e-7, max_steps=300), gradient=None, merit=loss)
    assert second.converged.all()
    assert (loss(second.z) <= loss(first.z) + 1e-9).all()


def test_gradients_pass_through_a_gated_solution():
    x = torch.linspace(-1, 1, 6, dtype=F64).reshape(2, 3).requires_grad_()
    ok = lambda z, *_: (z < 10).all(1)  # noqa: E731
    z = solve(lambda z, x: 0.5 * z + x, torch.zeros_like(x), (x,), stop=TIGHT, admissible=ok).z
    (found,) = torch.autograd.grad(z.sum(), x)
    torch.testing.assert_close(found, torch.full_like(x, 2.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"admissible": lambda z: torch.ones(len(z))}, r"admissible must return a bool tensor \(2,\)"),
        ({"admissible": lambda z: True}, r"admissible must return a bool tensor \(2,\), .* got bool"),
        ({"admissible": lambda z: z > 0}, r"admissible must .* got torch.bool of shape \(2, 3\)"),
        ({"merit": lambda z: z}, r"merit must return a floating-point tensor \(2,\)"),
        ({"merit": 3}, "merit must be callable, got int"),
        ({"admissible": "yes"}, "admissible must be callable, got str"),
    ],
)
def test_a_gate_that_answers_wrongly_is_named(options, message):
    with pytest.raises(TypeError, match=message):
        solve(lambda z: 0.5 * z.cos(), torch.ones(2, 3), gradient=None, **options)


@pytest.mark.parametrize("options", [{"front": Front()}, {"solver": Broyden(line_search=3)}, {"gradient": Unrolled()}])
def test_what_does_not_go_together_with_a_gate_is_refused(options):
    with pytest.raises((ValueError, NotImplementedError), match="admissible"):
        solve(lambda z, **_: 0.5 * z, torch.ones(2, 3, 4), merit=lambda z: z.flatten(1).sum(1), **options)


@pytest.mark.parametrize("name", ["admissible", "merit"])
@pytest.mark.parametrize("compact", [False, True])
def test_a_gate_must_not_change_an_input(name, compact):
    def gate(z, x):
        x.mul_(0.5)
        return (z < 10).all(1) if name == "admissible" else z.square().sum(1)

    x = torch.ones(3, 2, dtype=F64)
    with pytest.raises(ValueError, match=rf"{name} must not change its argument inputs\[0\] in place"):
        solve(lambda z, x: 0.5 * z.cos() + x, torch.zeros_like(x), (x,), gradient=None, compact=compact, **{name: gate})
