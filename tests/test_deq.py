"""DEQ: a layer that solves, keeps its solution, starts warm and trains."""

import copy
import io

import problems
import pytest
import torch
from torch import Tensor, nn

from pydeqsolve import DEQ, Anderson, Implicit, Phantom, Picard, Status, Stop

f64 = torch.float64


class Cell(nn.Module):
    def __init__(self, width: int = 5, gain: float = 0.5) -> None:
        super().__init__()
        self.W = nn.Parameter(gain * problems.orthogonal(width, 1))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ self.W.T + x)


def data(B: int = 4, width: int = 5) -> Tensor:
    return torch.randn(B, width, dtype=f64, generator=problems.generator(2))


def test_the_output_is_the_fixed_point_of_the_cell():
    layer, x = DEQ(Cell(), stop=Stop(rtol=1e-12)), data()
    z = layer(x)
    torch.testing.assert_close(layer.cell(z, x), z, rtol=1e-10, atol=1e-11)


def test_gradients_reach_parameters_and_input():
    layer, x = DEQ(Cell(), stop=Stop(rtol=1e-13), gradient=Implicit(stop=Stop(rtol=1e-11))), data().requires_grad_()
    found = torch.autograd.grad(layer(x).square().sum(), [layer.cell.W, x])
    z = torch.zeros_like(x)
    for _ in range(100):
        z = layer.cell(z, x)
    expected = torch.autograd.grad(z.square().sum(), [layer.cell.W, x])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_the_last_solution_is_kept_detached_and_learns_of_its_adjoint():
    layer, x = DEQ(Cell()), data()
    assert layer.solution is None
    z = layer(x)
    assert torch.equal(layer.solution.z, z.detach())
    assert not layer.solution.z.requires_grad
    assert layer.solution.adjoint is None
    z.sum().backward()
    assert (layer.solution.adjoint.status == Status.CONVERGED).all()


def test_a_warm_start_from_the_solution_takes_one_evaluation():
    layer, x = DEQ(Cell()), data()
    cold = layer(x)
    warm = layer(x, layer.solution.z)
    assert layer.solution.evaluations.tolist() == [1] * 4
    assert torch.equal(cold, warm)


def test_a_reused_layer_repeats_itself_bit_for_bit():
    layer, x = DEQ(Cell()), data()
    first = layer(x)
    layer(2 * x)
    assert torch.equal(layer(x), first)


def test_the_state_may_be_nested_and_of_another_shape_than_the_input():
    class Pair(nn.Module):
        def forward(self, z, x):
            a, b = z
            return 0.5 * torch.cos(b)[:, None] + x, 0.3 * torch.sin(a).sum(1)

    layer, x = DEQ(Pair(), stop=Stop(rtol=1e-12)), data(3, 2)
    a, b = layer(x, (torch.zeros(3, 2, dtype=f64), torch.zeros(3, dtype=f64)))
    torch.testing.assert_close(a, 0.5 * torch.cos(b)[:, None] + x, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(b, 0.3 * torch.sin(a).sum(1), rtol=1e-10, atol=1e-11)
    assert torch.equal(layer.solution.z[1], b)


def test_a_layer_is_copied_saved_and_loaded_after_use():
    layer, x = DEQ(Cell()), data()
    z = layer(x)
    z.sum().backward()
    assert torch.equal(copy.deepcopy(layer)(x), z)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = DEQ(Cell(gain=0.1))
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(x), z)


@pytest.mark.parametrize("gradient", [Implicit(), Phantom(steps=3, damping=0.8)], ids=["implicit", "phantom"])
@pytest.mark.parametrize("solver", [Anderson(), Picard()], ids=str)
def test_training_recovers_the_cell_that_made_the_data(gradient, solver):
    x = data(64)
    with torch.no_grad():
        target = DEQ(Cell(gain=0.6), solver=solver)(x)
    layer = DEQ(Cell(gain=0.2), solver=solver, gradient=gradient)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
    assert loss < 1e-4
    torch.testing.assert_close(layer.cell.W.detach(), 0.6 * problems.orthogonal(5, 1), rtol=0, atol=0.03)


def test_evaluation_without_gradient_builds_no_graph():
    layer = DEQ(Cell())
    with torch.no_grad():
        assert not layer(data()).requires_grad
    assert not DEQ(Cell(), gradient=None)(data()).requires_grad
