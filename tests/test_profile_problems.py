"""The problems of the solver profile are what they say: their fixed points are fixed, samples are independent."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from profile_problems import data, equations, maps, more

CASES = [*equations.cases(), *more.examples(), maps.scattering(1e-2), data.dirichlet(), data.logit_demand()]
KNOWN = [case for case in CASES if case.solution is not None and case.solution.numel() == case.start.numel()]


@pytest.mark.parametrize("case", [c for c in KNOWN if "18" not in c.name], ids=lambda case: case.name)
def test_the_fixed_point_that_a_problem_names_is_one(case):
    z = case.solution.double().reshape(1, -1)
    step = float((case.fn(z) - z).norm())
    first = float((case.fn(case.start) - case.start).norm())
    assert step <= 2e-4 * max(first, 1e-3)  # solutions that are quoted have seven digits, Poisson's four


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_samples_of_a_problem_do_not_see_each_other(case):
    two = torch.cat([case.start, 0.9 * case.start + 0.01])
    alone = torch.cat([case.fn(two[:1]), case.fn(two[1:])])
    torch.testing.assert_close(case.fn(two), alone, rtol=1e-10, atol=1e-12, equal_nan=True)
