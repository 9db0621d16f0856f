"""What a solve and its backward pass do besides fn: counts, which do not depend on the machine."""

import sys
from collections import Counter

import problems
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pydeqsolve import Implicit, Stop, build_info, solve
from pydeqsolve.loop import reuse

pytestmark = pytest.mark.skipif(not build_info()["native"], reason="no native module")


class Operators(TorchDispatchMode):
    """Counts the operators that torch is asked for."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, fn, types, arguments=(), keywords=None):
        self.counts[fn.overloadpacket.__name__] += 1
        return fn(*arguments, **keywords or {})


def test_the_second_of_two_solves_alike_makes_less_than_the_first():
    z0, counts = torch.zeros(5, 7), []
    reuse._idle.clear()

    def hook(frame, event, argument):
        counts[-1] += event in ("call", "c_call")

    for _ in range(3):
        counts.append(0)
        sys.setprofile(hook)
        solve(lambda z: z, z0, gradient=None)
        sys.setprofile(None)
    first, second, third = counts
    assert second <= first - 25
    assert third == second


@pytest.mark.parametrize("shape", [(3, 16), (2, 4, 4)])
def test_a_product_of_the_adjoint_takes_no_operators_but_those_of_fn(shape):
    x = torch.randn(shape, generator=problems.generator(1), requires_grad=True)

    def of_a_backward_pass(rtol):
        solution = solve(lambda z, x: 0.9 * z.sin() + x, torch.zeros(shape), (x,), gradient=Implicit(stop=Stop(rtol)))
        with Operators() as seen:
            torch.autograd.grad(solution.z.square().sum(), x)
        return int(solution.adjoint.evaluations.max()), seen.counts

    (few, before), (many, after) = of_a_backward_pass(1e-1), of_a_backward_pass(1e-4)
    assert many > few
    more = {name: count / (many - few) for name, count in (after - before).items()}
    # The basis grows by several vectors at a time.
    assert {name for name, each in more.items() if each >= 0.5} == {"mul", "cos"}, more
    assert more["mul"] == 2
