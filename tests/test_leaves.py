"""`leaves`: the tensors that a graph ends in."""

import pytest
import torch

from pydeqsolve import leaves


def test_the_leaves_are_the_tensors_that_a_gradient_would_reach():
    a, b, unused = (torch.randn(3, requires_grad=True) for _ in range(3))
    fixed, layer = torch.randn(3), torch.nn.Linear(3, 3)
    y = layer(a * b + fixed) + a
    found = leaves(y)
    assert {id(t) for t in found} == {id(t) for t in (a, b, layer.weight, layer.bias)}
    gradients = torch.autograd.grad(y.sum(), [*found, unused], allow_unused=True)
    assert [g is None for g in gradients] == [False] * 4 + [True]


def test_a_leaf_used_often_is_named_once():
    a = torch.randn(3, requires_grad=True)
    assert len(leaves(a * a + a.sin())) == 1


def test_a_leaf_depends_on_itself_and_a_constant_on_nothing():
    a = torch.randn(3, requires_grad=True)
    assert leaves(a)[0] is a
    assert leaves(torch.randn(3)) == []
    with torch.no_grad():
        assert leaves(a * 2) == []


def test_a_long_graph_is_no_problem():
    x = a = torch.ones(1, requires_grad=True)
    for _ in range(20_000):
        x = x + 1
    assert leaves(x)[0] is a


def test_something_else_is_refused_by_name():
    with pytest.raises(TypeError, match="x: a tensor"):
        leaves([1.0])
