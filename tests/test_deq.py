"""DEQ: a layer that solves, keeps its solution, starts warm and trains."""

import copy
import io
import pickle

import problems
import pytest
import torch
from torch import Tensor, nn

from pydeqsolve import DEQ, GMRES, Anderson, Broyden, Implicit, Phantom, Picard, Status, Stop, Unrolled, solve

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
    warm = layer(x, z0=layer.solution.z)
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
    a, b = layer(x, z0=(torch.zeros(3, 2, dtype=f64), torch.zeros(3, dtype=f64)))
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


# Several inputs, and the first guess by name


class Masked(nn.Module):
    def forward(self, z: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, 0.5 * torch.cos(z) + x, 0.0)


def test_a_cell_takes_several_inputs():
    x, mask = data(), torch.tensor([[True, False, True, True, False]]).expand(4, 5)
    z = DEQ(Masked(), stop=Stop(rtol=1e-12))(x, mask)
    torch.testing.assert_close(z, torch.where(mask, 0.5 * torch.cos(z) + x, 0.0), rtol=1e-11, atol=0)
    assert (z[~mask] == 0).all()


def test_a_second_input_is_no_first_guess():
    x, other = data(), 3 * torch.ones(4, 5, dtype=f64)
    seen = []

    def cell(z, x, other):
        seen.append(z.clone())
        return 0.5 * torch.cos(z) + x + other

    DEQ(cell)(x, other)
    assert torch.equal(seen[0], torch.zeros(4, 5, dtype=f64))
    DEQ(cell)(x, other, z0=other)
    assert (seen[-1] != 0).any()


def test_gradients_reach_every_input():
    layer, (x, y) = DEQ(lambda z, x, y: 0.5 * torch.cos(z) * y + x, stop=Stop(rtol=1e-13)), (data(), data().cos())
    x.requires_grad_(), y.requires_grad_()
    assert torch.autograd.gradcheck(layer, (x, y), atol=1e-5, rtol=1e-4)


def test_finished_samples_leave_with_all_their_inputs():
    rate = torch.linspace(0, 0.9, 8, dtype=f64)[:, None].expand(8, 3)
    sizes = []

    def cell(z, x, rate):
        sizes.append((len(z), len(x), len(rate)))
        return rate * torch.cos(z) + x

    DEQ(cell, stop=Stop(rtol=1e-10), gradient=None)(rate * 0, rate)
    assert all(len(set(each)) == 1 for each in sizes)
    assert sizes[-1][0] < 8


def test_without_inputs_the_first_guess_must_be_given():
    layer = DEQ(lambda z: 0.5 * torch.cos(z), stop=Stop(rtol=1e-12))
    with pytest.raises(TypeError, match="z0 must be given where there are no inputs"):
        layer()
    z = layer(z0=torch.zeros(2, 3, dtype=f64))
    torch.testing.assert_close(z, 0.5 * torch.cos(z), rtol=1e-11, atol=0)


@pytest.mark.parametrize(
    ("inputs", "kind", "message"),
    [
        (("x",), TypeError, r"inputs\[0\] must be a tensor, got str"),
        ((torch.ones(2, 3), "x"), TypeError, r"inputs\[1\] must be a tensor, None, or a nested .*, got str"),
        ((torch.ones(2, 3), torch.ones(3)), ValueError, r"inputs\[1\] must have leading dimension 2"),
        ((torch.ones(2, 3, dtype=torch.int64),), TypeError, r"z0 must be given where inputs\[0\] is not a state"),
    ],
)
def test_inputs_that_are_not_those_of_a_layer_are_refused_by_place(inputs, kind, message):
    with pytest.raises(kind, match=message):
        DEQ(lambda z, *inputs: z)(*inputs)


def test_a_solution_given_by_place_is_told_its_name():
    layer, x = DEQ(Cell()), data()
    layer(x)
    with pytest.raises(TypeError, match=r"inputs\[1\] must be .*, got a Solution: give a first guess by name, z0="):
        layer(x, layer.solution)
    layer(x, z0=layer.solution)
    assert layer.solution.evaluations.tolist() == [1] * 4


def test_token_numbers_are_inputs_where_the_first_guess_is_given():
    table = torch.randn(7, 3, dtype=f64, generator=problems.generator(0))
    layer = DEQ(lambda z, tokens: 0.5 * torch.tanh(z) + table[tokens], stop=Stop(rtol=1e-12))
    z = layer(torch.tensor([0, 6]), z0=torch.zeros(2, 3, dtype=f64))
    torch.testing.assert_close(z, 0.5 * torch.tanh(z) + table[[0, 6]], rtol=1e-11, atol=0)


@pytest.mark.parametrize("keep_history", [False, True])
def test_a_warm_layer_of_several_inputs_starts_from_its_last_solution(keep_history):
    x, mask = data(), torch.ones(4, 5, dtype=torch.bool)
    layer = DEQ(Masked(), warm_start=True, keep_history=keep_history, gradient=None)
    layer(x, mask)
    cold = layer.solution.evaluations
    layer(x + 1e-4, mask)
    assert (layer.solution.evaluations < cold).all()
    layer.reset()
    layer(x, mask)
    assert torch.equal(layer.solution.evaluations, cold)


# What a layer is made of


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"solver": Anderson}, r"solver must be Anderson\(\), .*got the class Anderson: write Anderson\(\)"),
        ({"solver": "anderson"}, "solver must be .*got 'anderson'"),
        ({"solver": GMRES()}, "solver must be .*got GMRES"),
        ({"solver": Implicit()}, "solver must be .*got Implicit"),
        ({"stop": Stop}, r"stop must be a Stop, got the class Stop: write Stop\(\)"),
        ({"stop": 1e-3}, "stop must be a Stop, got float"),
        ({"stop": None}, "stop must be a Stop, got NoneType"),
        ({"gradient": Implicit}, r"gradient must be Implicit\(\), .*got the class Implicit: write Implicit\(\)"),
        ({"gradient": "implicit"}, "gradient must be .*got 'implicit'"),
        ({"gradient": True}, "gradient must be .*got bool"),
        ({"gradient": Anderson()}, "gradient must be .*got Anderson"),
        ({"warm_start": 1}, "warm_start must be True or False, got int"),
        ({"keep_history": "no"}, "keep_history must be True or False, got str"),
        ({"cell": 3}, r"cell must be a module called as cell\(z, \*inputs\), got int"),
        ({"cell": Cell}, r"cell must be a module .*got the class Cell: write Cell\(\)"),
    ],
)
def test_what_is_no_part_of_a_layer_is_refused_when_it_is_made(keywords, message):
    with pytest.raises(TypeError, match=message):
        DEQ(**{"cell": Cell(), **keywords})


def test_options_that_do_not_go_together_are_refused_when_the_layer_is_made():
    with pytest.raises(ValueError, match="line_search must be 0 with a front or a history"):
        DEQ(Cell(), solver=Broyden(line_search=4), keep_history=True)
    with pytest.raises(NotImplementedError, match="Unrolled"):
        DEQ(Cell(), solver=Broyden(line_search=4), gradient=Unrolled())


def test_a_layer_shows_how_it_solves():
    lines = repr(DEQ(Cell(), solver=Picard(0.5), stop=Stop(rtol=1e-3), gradient=Phantom(), warm_start=True)).split("\n")
    assert [line.strip() for line in lines] == [
        "DEQ(", "solver=Picard(damping=0.5)",
        "stop=Stop(rtol=0.001, atol=0.0, max_steps=100, norm='rms', check_every=None)",
        "gradient=Phantom(steps=1, damping=1.0)", "warm_start=True", "(cell): Cell()", ")",
    ]  # fmt: skip


class Bounded(nn.Module):
    """A layer whose weight is normalised once per call, before it solves."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(problems.orthogonal(5, 1) * 7)

    def forward(self, x: Tensor) -> Tensor:
        W = 0.9 * self.weight / torch.linalg.matrix_norm(self.weight, 2)
        return solve(lambda z, x: torch.tanh(z @ W.T + x), torch.zeros_like(x), (x,), stop=Stop(rtol=1e-10)).z


def test_a_module_that_normalises_its_weight_once_per_call_is_pickled_and_trained():
    module, x = Bounded(), data()
    assert torch.equal(pickle.loads(pickle.dumps(module))(x), module(x))
    (found,) = torch.autograd.grad(module(x).sum(), module.weight)
    radial = (found * module.weight).sum()  # a multiple of the weight is the same layer
    torch.testing.assert_close(radial, torch.zeros_like(radial), rtol=0, atol=1e-7)


def test_a_parametrisation_is_made_once_per_solve_where_it_is_cached():
    cell, made = Cell(), []
    nn.utils.parametrizations.weight_norm(cell, "W")
    cell.parametrizations.W.register_forward_hook(lambda *seen: made.append(1))
    layer, x = DEQ(cell), data()
    with nn.utils.parametrize.cached():
        z = layer(x)
    torch.autograd.grad(z.sum(), list(cell.parameters()))
    assert len(made) == 1
    assert layer.solution.steps > 3


def test_a_layer_is_pickled_with_what_it_learnt():
    layer, x = DEQ(Cell(), warm_start=True, keep_history=True), data()
    z = layer(x)
    other = pickle.loads(pickle.dumps(layer))
    assert torch.equal(other.solution.z, z.detach())
    assert torch.equal(other(x), layer(x))
    assert other.solution.evaluations.tolist() == [1] * 4


@pytest.mark.parametrize("inputs", [({"a": torch.ones(2, 3)},), (None, torch.ones(2, 3)), ([torch.ones(2, 3)],)])
def test_a_first_input_that_is_no_tensor_asks_for_a_first_guess(inputs):
    layer = DEQ(lambda z, *_: 0.5 * z)
    with pytest.raises(TypeError, match=r"z0 must be given where inputs\[0\] is not a tensor, got .*: layer\(.*z0=…\)"):
        layer(*inputs)
    assert layer(*inputs, z0=torch.ones(2, 3)).shape == (2, 3)
