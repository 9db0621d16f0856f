"""Fixed-point problems in float64 of known structure, seeded, one sample each: what `solver_profile.py` is run on."""

from . import data, equations, maps, more, optimisation, physics
from .case import Case


def cases() -> list[Case]:
    """All of them, in an order that puts problems alike next to each other: every other one is a fair half."""
    return [case for module in (equations, more, maps, data, physics, optimisation) for case in module.cases()]
