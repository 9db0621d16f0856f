"""Digests of arguments: equal for equal ones, wherever they are kept, and different for whatever differs."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion import Clip, Schedule
from diffusion.digest import digest
from pydeqsolve import Anderson, Implicit, Picard, Stop


def numbers(seed=0, *shape):
    return torch.randn(shape or (4, 6), generator=torch.Generator().manual_seed(seed))


UNLIKE = {
    "value": (numbers(0), numbers(1)),
    "shape": (numbers(0), numbers(0).reshape(6, 4)),
    "dtype": (torch.zeros(3), torch.zeros(3, dtype=torch.int32)),
    "precision": (numbers(0), numbers(0).double()),
    "gradient": (numbers(0), numbers(0).requires_grad_()),
    "sign of zero": (torch.tensor(0.0), torch.tensor(-0.0)),
    "nothing": (torch.zeros(0, 3), torch.zeros(3, 0)),
    "half": (torch.zeros(2, dtype=torch.float16), torch.zeros(2, dtype=torch.bfloat16)),
    "number": (1e-4, 1.0000000000000002e-4),
    "none": (None, 0),
    "list": ((1, 2), (1, 2, 2)),
    "order": ((1, 2), (2, 1)),
    "nesting": (((1,), 2), (1, (2,))),
    "mapping": ({"a": 1}, {"b": 1}),
    "seed": tuple(torch.Generator().manual_seed(k) for k in (0, 1)),
    "chain": tuple(Schedule.linear(100).chain(10, s) for s in ("linspace", "leading")),
    "clip": (Clip(1.0), Clip(1.0, 0.995)),
    "solver": (Anderson(2), Anderson(3)),
    "class": (Picard(), Anderson()),
    "nested": (Implicit(stop=Stop(1e-5)), Implicit(stop=Stop(1e-6))),
    "function": (torch.sin, torch.cos),
    "partial": (partial(torch.clamp, max=1), partial(torch.clamp, max=2)),
    "array": (np.zeros(3), np.zeros(3, dtype=np.float32)),
    "module": (torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).double()),
    "mode": (torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).eval()),
}


@pytest.mark.parametrize(("one", "other"), UNLIKE.values(), ids=UNLIKE)
def test_what_differs_has_another_digest(one, other):
    assert digest(one) != digest(other)


def test_what_is_equal_has_one_digest_whoever_made_it():
    def arguments():
        x = numbers(0)
        return [
            x, x.t().contiguous().t(), numbers(0, 2, 3).to(torch.complex64).conj(), Schedule.cosine(9).chain(7),
            Implicit(solver=Anderson(2)), torch.Generator().manual_seed(5), {"b": (1, 2), "a": None}, torch.sin,
            torch.nn.Linear(3, 3), 2.5, "v", torch.float16, [torch.zeros(0)],
        ]  # fmt: skip

    assert [digest(a) for a in arguments()] == [digest(a) for a in arguments()]


def test_a_view_has_the_digest_of_its_values():
    x = numbers(0, 5, 7)
    assert digest(x[::2, 1:4]) == digest(x[::2, 1:4].clone())
    assert digest(-x) == digest(torch._neg_view(x))


@given(st.integers(0, 1_000), st.integers(0, 63))
def test_a_single_bit_changes_the_digest(seed, bit):
    words = torch.randint(2**62, (9,), generator=torch.Generator().manual_seed(seed))
    changed = words.clone()
    changed[seed % 9] ^= 1 << bit if bit < 63 else -(2**63)
    assert digest(words.view(torch.float64)) != digest(changed.view(torch.float64))
