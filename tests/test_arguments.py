"""Arguments of `sample` and `invert` that cannot be used are refused at the call, by name."""

import pytest
import torch
from mixture import latents

from diffusion import Descent, Exact, Parallel, Schedule, Splitting, invert, sample

SCHEDULE = Schedule.linear(1000, 1e-4, 0.02)
CHAIN = SCHEDULE.chain(8)


def network(x, t):
    return 0.5 * x


@pytest.mark.parametrize("function", [sample, invert])
@pytest.mark.parametrize("rows", [0, -1, True, 2.5])
def test_rows_of_a_call_are_one_at_least(function, rows):
    with pytest.raises((TypeError, ValueError), match=r"^rows_per_call: "):
        function(network, latents(2, 6), CHAIN, rows_per_call=rows)


@pytest.mark.parametrize("window", [0, -1, "3", 2.5])
def test_a_window_is_one_step_at_least(window):
    with pytest.raises((TypeError, ValueError), match=r"^window: "):
        Parallel(window=window)


@pytest.mark.parametrize("name", ["edit", "callback", "noises"])
@pytest.mark.parametrize("steps", [8, 300])
def test_what_sampling_cannot_use_is_refused_by_name_before_the_network_is_asked(name, steps):
    with pytest.raises(TypeError, match=f"^{name}: "):
        sample(lambda x, t: 1 / 0, latents(2, 6), SCHEDULE.chain(steps), **{name: 3})


@pytest.mark.parametrize("name", ["callback", "generator", "state"])
def test_what_inversion_cannot_use_is_refused_by_name(name):
    with pytest.raises(TypeError, match=f"^{name}: "):
        invert(network, latents(2, 6), CHAIN, "naive", **{name: 3})


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Parallel(solver=3), "solver"),
        (lambda: Exact(solver=3), "solver"),
        (lambda: Descent(optimizer=3), "optimizer"),
        (lambda: Descent(lr="x"), "lr"),
    ],
)
def test_what_a_method_cannot_use_is_refused_when_it_is_made(make, name):
    with pytest.raises(TypeError, match=f"^{name}: "):
        make()


def test_a_splitting_of_another_chain_is_refused():
    other = Splitting.named("gaussian", SCHEDULE.chain(7), torch.zeros(6), torch.ones(6))
    with pytest.raises(ValueError, match=r"^splitting: κ must be \(8, 1\) or \(8, 6\), got \(7, 6\)"):
        sample(network, latents(2, 6), CHAIN, splitting=other)


def test_an_offset_of_another_shape_is_refused():
    split = Splitting(torch.zeros(8, 1, dtype=torch.float64), torch.zeros(8, 5, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"^splitting: b must be \(8, 1\) or \(8, 6\), got \(8, 5\)"):
        sample(network, latents(2, 6), CHAIN, splitting=split)
