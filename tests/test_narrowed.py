"""The adjoint's products with the samples that go on alone, where these are few."""

import pytest
import torch
from torch import Tensor

from pydeqsolve import GMRES, Implicit, Status, Stop, build_info, solve
from pydeqsolve.derivative import narrowed

pytestmark = pytest.mark.skipif(not build_info()["native"], reason="no native module")
B, D = 64, 256


class Counted(torch.autograd.Function):
    """The identity; its backward counts the samples."""

    rows = 0

    @staticmethod
    def forward(ctx, z: Tensor) -> Tensor:
        return z.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        Counted.rows += len(grad)
        return grad


def mixed(size: float = 1.5) -> tuple[Tensor, Tensor]:
    """W (D, D) and x (B, D): inputs so large that tanh is flat there, to so small that it contracts by .97 alone."""
    draw = torch.Generator().manual_seed(0)
    W = 0.97 * torch.linalg.qr(torch.randn(D, D, generator=draw))[0]
    return W, torch.randn(B, D, generator=draw) * torch.logspace(1, -size, B)[:, None]


def backward(cell, x: Tensor, *, restart: int = 30, compact: bool | None = None):
    """Gradient of x, how the adjoint went, products with a sample, and batches that fn saw in the backward pass."""
    x, seen = x.clone().requires_grad_(), []

    def fn(z: Tensor, x: Tensor) -> Tensor:
        seen.append(len(z))
        return cell(Counted.apply(z), x)

    solution = solve(
        fn,
        torch.zeros_like(x),
        (x,),
        stop=Stop(1e-4, max_steps=400),
        gradient=Implicit(GMRES(restart)),
        compact=compact,
    )
    seen.clear()
    Counted.rows = 0
    (g,) = torch.autograd.grad(solution.z.square().sum(), x)
    return g, solution.adjoint, Counted.rows, list(seen)


@pytest.fixture
def never(monkeypatch):
    """Inside it all products are of all samples."""
    return lambda: monkeypatch.setattr(narrowed, "LEAST", 10**9)


@pytest.mark.parametrize("restart", [30, 60])  # with 60, samples end in the cycle in which others go on alone
def test_the_samples_that_go_on_alone_are_multiplied_to_the_same_gradient(never, restart):
    W, x = mixed()

    def cell(z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ W.T + x)

    g, how, rows, seen = backward(cell, x, restart=restart)
    never()
    whole, known, all_rows, none = backward(cell, x, restart=restart)
    assert how.status.tolist() == known.status.tolist() == [Status.CONVERGED] * B
    assert (g - whole).norm() <= 2e-4 * whole.norm()
    assert (how.evaluations - known.evaluations).abs().max() <= 0.1 * known.evaluations.max()
    assert none == []
    assert seen
    assert max(seen) <= B // 2
    assert rows + sum(seen) < 0.7 * all_rows


def test_samples_that_end_together_take_no_evaluation():
    W, x = mixed()
    x = torch.randn(B, D, generator=torch.Generator().manual_seed(1))
    _, how, rows, seen = backward(lambda z, x: torch.tanh(0.9 * z @ W.T + x), x)
    assert how.status.tolist() == [Status.CONVERGED] * B
    assert seen == []
    assert rows >= B * int(how.evaluations.max())


def test_a_map_that_draws_again_is_left_whole_and_draws_nothing_from_the_stream(never):
    W, x = mixed()
    masks: list[Tensor] = []

    def cell(z: Tensor, x: Tensor) -> Tensor:
        masks.append(torch.rand(1))  # from the stream that a model draws dropout masks from
        return torch.tanh((1 + shift[0]) * z @ W.T + x)

    shift = [0.0]

    def run():
        shift[0] = 0.0
        torch.manual_seed(3)
        u = x.clone().requires_grad_()
        solution = solve(cell, torch.zeros_like(x), (u,), stop=Stop(1e-4, max_steps=400))
        shift[0], before = -0.3, len(masks)
        (g,) = torch.autograd.grad(solution.z.square().sum(), u)
        return g, solution.adjoint, len(masks) - before, torch.rand(4)

    g, how, calls, following = run()
    never()
    whole, _, none, expected = run()
    assert (calls, none) == (1, 0)
    assert torch.equal(g, whole)
    assert torch.equal(following, expected)
    assert how.status.tolist() == [Status.CONVERGED] * B


@pytest.mark.parametrize("case", ["compact=False", "few entries"])
def test_fn_is_not_evaluated_backward_where_it_may_not_or_need_not_be(case):
    W, x = mixed()
    if case == "few entries":
        W, x = W[:32, :32], x[:, :32]
    _, _, rows, seen = backward(
        lambda z, x: torch.tanh(z @ W.T + x), x, compact=False if case == "compact=False" else None
    )
    assert rows > 0
    assert seen == []


def test_a_cycle_that_begins_with_few_samples_is_narrowed_at_once():
    W, x = mixed()
    x = x.clone().requires_grad_()
    seen: list[int] = []

    def fn(z: Tensor, x: Tensor) -> Tensor:
        seen.append(len(z))
        return torch.tanh(z @ W.T + x)

    solution = solve(fn, torch.zeros_like(x), (x,), stop=Stop(1e-4, max_steps=400), gradient=Implicit(GMRES(12)))
    seen.clear()
    solution.z.square().sum().backward()
    assert (solution.adjoint.status != Status.NONFINITE).all()
    assert len(seen) >= 3
    assert seen[-1] < B // 4


def swept(change) -> tuple[Tensor, Tensor]:
    """The gradient of x where `change(map)` came between solve and backward, and where nothing did."""
    W, x = mixed()

    def found(act) -> Tensor:
        at = {"damping": 0.9, "closed": False}

        def fn(z: Tensor, x: Tensor) -> Tensor:
            assert not at["closed"]
            return (1 - at["damping"]) * z + at["damping"] * torch.tanh(z @ W.T + x)

        y = x.clone().requires_grad_()
        solution = solve(fn, torch.zeros_like(x), (y,), stop=Stop(1e-5, max_steps=400))
        act(at)
        return torch.autograd.grad(solution.z.square().sum(), y)[0]

    return found(change), found(lambda at: None)


@pytest.mark.parametrize("change", [{"damping": 0.5}, {"closed": True}], ids=["damping", "closed"])
def test_a_map_of_the_same_fixed_points_that_has_changed_or_fails_leaves_the_gradient_alone(change):
    found, expected = swept(lambda at: at.update(change))
    assert (found - expected).norm() <= 1e-3 * expected.norm()
