"""method="auto": the way that should be fastest, by times measured once."""

import sys

import pytest
import torch
from mixture import Mixture, latents, means

from diffusion import CoarseToFine, Parallel, Schedule, Sequential, fastest, sample
from diffusion.methods.fastest import TOGETHER, Timing
from diffusion.problem import ChainProblem

cost = sys.modules["diffusion.methods.fastest"]

SCHEDULE = Schedule.linear(1000, 1e-4, 0.02)


def problem(model, T, B=1):
    return ChainProblem.of(model, latents(B, 6), SCHEDULE.chain(T))


def device(monkeypatch, latency, per_row):
    """Makes every call of r rows take latency + per_row·r seconds, as far as choosing goes."""
    monkeypatch.setattr(cost, "_seconds", lambda run, rows: latency + per_row * rows)


@pytest.mark.parametrize(
    ("latency", "per_row", "T", "expected"),
    [
        (0.0, 1e-3, 1000, Sequential()),  # rows cost what they cost, in calls of any size
        (0.0, 1e-3, 50, Sequential()),
        (1e-2, 1e-9, 1000, Parallel()),  # a call costs the same whatever it holds: fewest rounds
        (1e-2, 1e-9, 50, Parallel()),
        (4e-4, 5e-5, 1000, CoarseToFine()),  # a small model on one core: fewest rows
    ],
)
def test_the_cheapest_way_follows_from_what_calls_and_rows_cost(monkeypatch, latency, per_row, T, expected):
    device(monkeypatch, latency, per_row)
    assert fastest(Mixture(SCHEDULE, means()), latents(1, 6), SCHEDULE.chain(T)) == expected


def test_a_chain_that_has_no_nodes_is_not_sent_there(monkeypatch):
    device(monkeypatch, 4e-4, 5e-5)
    chosen = fastest(Mixture(SCHEDULE, means()), latents(1, 6), SCHEDULE.chain(1000), edit=lambda x, k, image: x)
    assert not isinstance(chosen, CoarseToFine)


def test_time_is_linear_between_the_two_measured_calls_and_beyond():
    timing = Timing(few=4, seconds_few=1.0, many=64, seconds_many=4.0, seen={})
    assert [timing.call(rows) for rows in (1, 4, 34, 64, 124)] == [1.0, 1.0, 2.5, 4.0, 7.0]
    assert timing.foretell(Sequential(), 10, None, 6) == 10.0
    assert timing.rounds((1.0,), 16, 0) == pytest.approx(4.0, abs=1e-2)
    assert len(TOGETHER) == pytest.approx(timing.rounds(TOGETHER, 1, 0), rel=1e-2)


@pytest.mark.parametrize("way", [Sequential(), Parallel(), CoarseToFine()])
def test_a_run_that_took_longer_than_foretold_is_foretold_longer_next_time(way):
    timing = Timing(1, 1.0, 64, 2.0, {})
    before, other = (timing.foretell(way, T, 20, 6) for T in (100, 200))
    for _ in range(20):
        timing.note(way, 100, 20, 6, 1.5 * before)
    assert timing.foretell(way, 100, 20, 6) == pytest.approx(1.5 * before, rel=1e-4)
    assert timing.foretell(way, 200, 20, 6) == other


def test_a_way_that_disappoints_is_left(monkeypatch):
    device(monkeypatch, 1e-2, 1e-9)
    run = problem(Mixture(SCHEDULE, means()), 50)
    assert cost.quickest(run) == Parallel()
    cost.timing(run).note(Parallel(), 50, None, 6, 50.0)
    assert cost.quickest(run) == Sequential()


@torch.no_grad()
def test_calls_are_timed_once_per_model_and_batch_size():
    model, chain = Mixture(SCHEDULE, means()), SCHEDULE.chain(40)
    first, calls = sample(model, latents(2, 6), chain, method="auto"), model.calls
    again = sample(model, latents(2, 6), chain, method="auto")
    assert calls > first.rounds
    assert model.calls == calls + again.rounds
    sample(model, latents(3, 6), chain, method="auto")
    assert model.calls > calls + 2 * again.rounds or again.rounds != first.rounds


@torch.no_grad()
@pytest.mark.parametrize("latency", [0.0, 1e-2])
@pytest.mark.parametrize("T", [20, 300])
def test_whatever_is_chosen_the_images_are_those_of_sequential_sampling(monkeypatch, latency, T):
    device(monkeypatch, latency, 1e-4)
    model, chain, x = Mixture(SCHEDULE, means()), SCHEDULE.chain(T), latents(3, 6)
    got = sample(model, x, chain, method="auto", error=1e-5)
    expected = sample(model, x, chain, method="sequential")
    assert ((got.x_0 - expected.x_0).norm(dim=1) / expected.x_0.norm(dim=1)).max() <= 1e-5
    assert (got.rounds == T) == (latency == 0.0)


@torch.no_grad()
def test_a_model_without_a_hash_is_timed_every_time_and_sampled_all_the_same():
    class Unhashable:
        __hash__ = None

        def __call__(self, x, t):
            return 0.1 * x

    chain, x = SCHEDULE.chain(10), latents(2, 6)
    expected = sample(Unhashable(), x, chain, method="sequential")
    torch.testing.assert_close(sample(Unhashable(), x, chain, method="auto").x_0, expected.x_0, rtol=1e-3, atol=1e-3)
