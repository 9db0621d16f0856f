"""What fn returns beside the state (`has_aux`)."""

import problems
import pytest
import torch

from pydeqsolve import DEQ, Anderson, Broyden, Front, Phantom, Picard, Status, Stop, Unrolled, solve

f64 = torch.float64
SOLVERS = [Anderson(), Broyden(), Broyden(line_search=2), Picard()]


def counted(a):
    """z = a z + x, whose solution is x / (1 − a), with aux {"twice": 2 z + x, "of": (z,)}."""
    calls = []

    def fn(z, x):
        calls.append(len(z))
        return a * z + x, {"twice": 2 * z + x, "of": (z,)}

    return fn, calls


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
@pytest.mark.parametrize("compact", [True, False])
def test_aux_is_that_of_the_z_returned(solver, compact):
    rates = torch.tensor([[0.1], [0.9], [-0.5]], dtype=f64)
    x = torch.randn(3, 4, dtype=f64, generator=problems.generator(0))

    def fn(z, x, a):
        return a * torch.sin(z) + x, {"twice": 2 * z + x, "of": (z,)}

    out = solve(fn, torch.zeros_like(x), (x, rates), solver=solver, compact=compact, gradient=None, has_aux=True,
                stop=Stop(max_steps=4))  # fmt: skip
    assert torch.equal(out.aux["twice"], 2 * out.z + x)
    assert torch.equal(out.aux["of"][0], out.z)


def test_aux_is_of_the_best_iterate_not_of_the_last():
    values = iter([0.5, 0.4, 3.0])
    out = solve(
        lambda z: (z + next(values, 1.0), z + 1), torch.zeros(1, 1, dtype=f64), solver=Picard(), gradient=None,
        stop=Stop(max_steps=3), has_aux=True,
    )  # fmt: skip
    assert torch.equal(out.aux, out.z + 1)
    assert out.residual.item() == pytest.approx(0.4)


@pytest.mark.parametrize("gradient", ["implicit", Phantom(steps=60), Unrolled()], ids=str)
def test_the_gradient_of_aux_is_that_of_its_closed_form(gradient):
    a = torch.tensor(0.4, dtype=f64, requires_grad=True)
    x = torch.tensor([[2.0], [3.0]], dtype=f64, requires_grad=True)
    options = {} if gradient == "implicit" else {"gradient": gradient}
    out = solve(counted(a)[0], torch.zeros(2, 1, dtype=f64), (x,), stop=Stop(rtol=1e-13), has_aux=True, **options)
    of_a, of_x = torch.autograd.grad(out.aux["twice"].sum(), (a, x))
    # aux = 2 x / (1 - a) + x
    torch.testing.assert_close(of_a, (2 * x / (1 - a) ** 2).sum().detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(of_x, (2 / (1 - a) + 1).expand(2, 1).detach(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("compact", [True, False])
def test_a_sample_that_fails_poisons_no_gradient_of_aux(compact):
    w = torch.tensor(0.5, dtype=f64, requires_grad=True)
    z0 = torch.tensor([[1.0], [torch.nan]], dtype=f64)  # fn is finite at the first sample's state
    x = torch.ones(2, 1, dtype=f64)
    out = solve(lambda z, x: (w * z.sqrt() + x, (w * z).sqrt() + x), z0, (x,), compact=compact, has_aux=True)
    assert out.status.tolist() == [Status.CONVERGED, Status.NONFINITE]
    assert out.aux[1].isnan().all()
    (found,) = torch.autograd.grad(out.aux[0].sum(), w)
    assert found.isfinite()


def test_aux_takes_one_evaluation_that_is_not_counted():
    fn, calls = counted(0.5)
    x = torch.ones(3, 2, dtype=f64)
    out = solve(fn, torch.zeros_like(x), (x,), gradient=None, has_aux=True)
    assert sum(calls) == int(out.evaluations.sum()) + 3


def test_aux_shares_no_memory_with_what_fn_returns_or_is_given():
    x = torch.ones(3, 2, dtype=f64)
    fn, _ = counted(0.5)
    out = solve(fn, torch.zeros_like(x), (x,), gradient=None, has_aux=True)
    before = out.z.clone()
    out.aux["of"][0].zero_()
    assert torch.equal(out.z, before)
    kept = solve(lambda z, x: (0.5 * z + x, x), torch.zeros_like(x), (x,), gradient=None, has_aux=True).aux.zero_()
    assert not kept.any()
    assert x.all()


def test_a_causal_map_has_aux_too():
    def fn(z, wanted):
        return torch.cat([torch.ones_like(z[:, :1]), 0.5 * z[:, :-1]], 1), z.sum((1, 2))

    out = solve(fn, torch.zeros(2, 4, 1, dtype=f64), front=Front(), gradient=None, has_aux=True)
    assert out.aux.tolist() == [1.875, 1.875]


def test_a_layer_with_aux_returns_both_and_keeps_copies():
    cell = torch.nn.Linear(2, 2, dtype=f64)
    layer = DEQ(lambda z, x: (torch.tanh(0.3 * cell(z)) + x, {"norm": z.norm(dim=1)}), has_aux=True)
    x = torch.ones(3, 2, dtype=f64)
    z, aux = layer(x)
    torch.testing.assert_close(aux["norm"], z.norm(dim=1), rtol=0, atol=0)
    aux["norm"].sum().backward()
    assert cell.weight.grad.norm() > 0
    assert not layer.solution.aux["norm"].requires_grad
    assert torch.equal(layer.solution.aux["norm"], aux["norm"])
    assert "has_aux=True" in repr(layer)


@pytest.mark.parametrize("value", [torch.zeros(2, 1), [torch.zeros(2, 1), torch.zeros(2)], (torch.zeros(2, 1),)])
def test_a_value_that_is_no_pair_is_refused(value):
    with pytest.raises(TypeError, match="fn must return \\(z, aux\\) with has_aux=True, got"):
        solve(lambda z: value, torch.zeros(2, 1), has_aux=True)


def test_aux_of_other_leading_dimension_is_refused():
    with pytest.raises(ValueError, match="the aux of fn must have leading dimension 2 like its argument, got shape"):
        solve(lambda z: (0.5 * z, z.sum()), torch.zeros(2, 1), gradient=None, has_aux=True)


def test_has_aux_must_be_a_flag():
    with pytest.raises(TypeError, match="has_aux must be True or False, got int"):
        solve(lambda z: z, torch.zeros(2, 1), has_aux=1)


def test_without_samples_aux_is_that_of_fn_at_none():
    out = solve(lambda z: (0.5 * z, z.sum(1)), torch.zeros(0, 3), has_aux=True)
    assert out.aux.shape == (0,)


def test_without_has_aux_there_is_none():
    assert solve(lambda z: 0.5 * z + 1, torch.zeros(2, 1)).aux is None
