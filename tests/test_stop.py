"""Stop and Front: what they refuse, and the reading interval per device. Their effect is tested in test_solve."""

import math

import numpy as np
import pytest
import torch

from pydeqsolve import Front, Stop


@pytest.mark.parametrize(
    ("keywords", "kind", "message"),
    [
        ({"rtol": -1.0}, ValueError, "rtol must be non-negative, got -1.0"),
        ({"atol": math.nan}, ValueError, "atol must be non-negative, got nan"),
        ({"rtol": "1e-3"}, TypeError, "rtol must be a float or a tensor, got str"),
        ({"rtol": True}, TypeError, "rtol must be a float"),
        ({"rtol": torch.tensor([1e-3, -1.0])}, ValueError, "rtol must be floating point and non-negative everywhere"),
        ({"atol": torch.tensor([1, 2])}, ValueError, "atol must be floating point"),
        ({"max_steps": -1}, ValueError, "max_steps must be at least 0, got -1"),
        ({"max_steps": 10.0}, TypeError, "max_steps must be an int, got float"),
        ({"max_steps": True}, TypeError, "max_steps must be an int, got bool"),
        ({"norm": "L2"}, ValueError, "norm must be one of"),
        ({"check_every": 0}, ValueError, "check_every must be at least 1, got 0"),
    ],
)
def test_impossible_rules_are_refused_by_name(keywords, kind, message):
    with pytest.raises(kind, match=message):
        Stop(**keywords)


def test_numpy_floats_and_zero_are_tolerances():
    assert Stop(rtol=np.float64(0.0), atol=0).rtol == 0


def test_flags_are_read_each_step_on_the_cpu_and_seldom_on_a_gpu_unless_told():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert (Stop().interval(cpu), Stop().interval(cuda)) == (1, 8)
    assert (Stop(check_every=3).interval(cpu), Stop(check_every=3).interval(cuda)) == (3, 3)


@pytest.mark.parametrize(
    ("keywords", "kind", "message"),
    [
        ({"window": 0}, ValueError, "window must be at least 1, got 0"),
        ({"window": 2.5}, TypeError, "window must be an int, got float"),
        ({"margin": 1.5}, ValueError, r"margin must be in \[0, 1\], got 1.5"),
        ({"margin": math.nan}, ValueError, "margin must be in"),
        ({"latest": 1}, TypeError, "latest must be True or False, got int"),
    ],
)
def test_impossible_fronts_are_refused_by_name(keywords, kind, message):
    with pytest.raises(kind, match=message):
        Front(**keywords)


def test_rules_are_frozen_values():
    with pytest.raises(AttributeError):
        Stop().rtol = 1.0
