"""Every public object shows itself on a line or two, however many samples, pixels or time steps it holds."""

import inspect

import pytest
import torch
from torch import nn

import diffusion
import pydeqsolve
from diffusion import (
    FixedRows,
    Inpaint,
    Schedule,
    Splitting,
    Statistics,
    invert,
    load_checkpoint,
    sample,
)
from pydeqsolve import ConvergenceError, solve

MOST = 240  # characters: two lines


def solved(**options):
    W = (0.02 * torch.randn(40, 40, generator=torch.Generator().manual_seed(0))).requires_grad_()
    solution = solve(lambda z, x: torch.tanh(z @ W + x), torch.zeros(1000, 40), (torch.ones(1000, 40),), **options)
    solution.z.sum().backward()
    return solution


def failed():
    solution = solve(lambda z: z * float("nan"), torch.zeros(1000, 4), gradient=None)
    with pytest.raises(ConvergenceError) as raised:
        solution.check()
    return raised.value


@pytest.fixture(scope="module")
def made():
    """One of each public class that is no module and is not made by its defaults."""
    digits = load_checkpoint("digits")
    digits.model.requires_grad_(False)
    chain = digits.schedule.chain(1000)
    short = digits.schedule.chain(10)
    solution = solved(keep_history=True)
    latents = torch.randn(3, *digits.shape, generator=torch.Generator().manual_seed(0))
    return {
        "Solution": solution, "Adjoint": solution.adjoint, "History": solution.history, "ConvergenceError": failed(),
        "Status": pydeqsolve.Status.MAX_STEPS, "Checkpoint": digits, "Schedule": digits.schedule, "Chain": chain,
        "Splitting": digits.splitting(chain, "covariance"), "Statistics": digits.statistics,
        "Sample": sample(digits.model, latents, short), "FixedRows": FixedRows(4),
        "Inversion": invert(digits.model, digits.images[:3], short, "ddim"),
        "Inpaint": Inpaint(chain, latents, torch.ones(1, 1, 8, 8), latents),
    }  # fmt: skip


def of(name, made):
    if name in made:
        return made[name]
    return getattr(pydeqsolve if name in pydeqsolve.__all__ else diffusion, name)()


CLASSES = sorted(
    name
    for package in (pydeqsolve, diffusion)
    for name in package.__all__
    if inspect.isclass(getattr(package, name)) and not issubclass(getattr(package, name), nn.Module)
)


@pytest.mark.parametrize("name", [*CLASSES, "History"])
def test_a_public_object_shows_itself_on_a_line_or_two(name, made):
    shown = repr(of(name, made))
    assert type(of(name, made)).__name__ == name
    assert name in shown
    assert "\n" not in shown
    assert len(shown) <= MOST
    assert "tensor(" not in shown
    assert " object at 0x" not in shown


@pytest.mark.parametrize(
    "schedule", [Schedule.linear(), Schedule.cosine(), Schedule.flow(shift=3.0), Schedule.edm()], ids=repr
)
def test_every_kind_of_schedule_and_its_chain_fit_on_a_line_or_two(schedule):
    for value in (schedule, schedule.chain(500)):
        assert len(repr(value)) <= MOST
        assert "\n" not in repr(value)


def test_what_is_as_usual_is_left_out_and_the_rest_is_named():
    assert repr(Schedule.linear()) == "Schedule(alphas_cumprod (1000,))"
    other = Schedule(Schedule.linear().alphas_cumprod, steps_offset=1, spacing="leading")
    assert repr(other) == "Schedule(alphas_cumprod (1000,), steps_offset=1, spacing='leading')"
    assert repr(Splitting(torch.ones(5, 1))) == "Splitting(kappa (5, 1))"
    mean = torch.zeros(1, 4, 4)
    assert repr(Statistics(mean, mean + 1)) == "Statistics(mean (1, 4, 4), variance (1, 4, 4))"


def test_an_adjoint_and_a_solution_say_how_many_ended_how():
    solution = solved()
    assert repr(solution).startswith("Solution(1000 CONVERGED; ")
    assert repr(solution.adjoint).startswith("Adjoint(1000 CONVERGED; ")
    assert " to " not in repr(solution)  # all samples took as many evaluations


def test_an_empty_solution_shows_itself():
    assert repr(solve(lambda z: z, torch.zeros(0, 3), gradient=None)) == "Solution(no samples)"
