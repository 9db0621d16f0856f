"""method="auto": the way that should be fastest, by times measured once."""

import sys

import pytest
import torch
from mixture import Mixture, latents, means

from diffusion import CoarseToFine, Parallel, Schedule, Sequential, fastest, sample
from diffusion.methods.fastest import LEARNT, STAY, TOGETHER, Run, Timing
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
    timing = Timing(few=4, seconds_few=1.0, many=64, seconds_many=4.0)
    assert [timing.call(rows) for rows in (1, 4, 34, 64, 124)] == [1.0, 1.0, 2.5, 4.0, 7.0]
    assert timing.foretell(Sequential(), Run(10, None, 6)) == 10.0
    assert timing.rounds((1.0,), 16, 0) == pytest.approx(4.0, abs=1e-2)
    assert len(TOGETHER) == pytest.approx(timing.rounds(TOGETHER, 1, 0), rel=1e-2)


RUN = Run(100, 20, 6)


@pytest.mark.parametrize("way", [Sequential(), Parallel(), CoarseToFine()])
def test_a_run_that_took_longer_than_foretold_is_foretold_longer_next_time(way):
    timing = Timing(1, 1.0, 64, 2.0)
    before, other = (timing.foretell(way, run) for run in (RUN, Run(200, 20, 6)))
    timing.note(way, RUN, 1.5 * before)
    assert timing.foretell(way, RUN) == pytest.approx(1.5 * before, rel=1e-4)
    assert timing.foretell(way, Run(200, 20, 6)) == other


def test_of_three_runs_the_median_counts_and_more_are_not_timed():
    timing = Timing(1, 1.0, 64, 2.0)
    before = timing.foretell(Parallel(), RUN)
    for ratio in (1.1, 9.0, 1.3):
        assert not timing.settled(Parallel(), RUN)
        timing.note(Parallel(), RUN, ratio * before)
    assert timing.settled(Parallel(), RUN)
    assert timing.foretell(Parallel(), RUN) == pytest.approx(1.3 * before)


def test_a_machine_that_became_slower_says_nothing_of_the_method():
    timing = Timing(1, 1.0, 64, 2.0)
    before = timing.foretell(Parallel(), RUN)
    timing.note(Parallel(), RUN, 3 * before, pace=3.0)
    assert timing.foretell(Parallel(), RUN) == pytest.approx(before)


def test_a_way_that_disappoints_is_left_and_not_gone_back_to():
    timing = Timing(1, 1.0, 64, 1.0)
    assert timing.choose(RUN) == Parallel()
    timing.note(Parallel(), RUN, 1000.0)
    assert timing.choose(RUN) != Parallel()
    for _ in range(LEARNT):
        way = timing.choose(RUN)
        timing.note(way, RUN, 1.05 * timing.foretell(way, RUN))
    assert timing.choose(RUN) == way


@pytest.mark.parametrize(("share", "stays"), [(STAY + 0.02, True), (STAY - 0.02, False)])
def test_a_method_is_replaced_by_one_that_promises_clearly_less(share, stays):
    timing = Timing(1, 1.0, 64, 2.0)
    timing.chosen[RUN] = CoarseToFine()
    costs = [timing.foretell(way, RUN) for way in (Parallel(), CoarseToFine())]
    timing.note(Parallel(), RUN, share * costs[1])
    assert (timing.choose(RUN) == CoarseToFine()) == stays


class Clock:
    """A clock that calls of a model move: `busy` is the processor's, `passed` everybody's."""

    def __init__(self, latency, per_row, waits=False):
        self.latency, self.per_row, self.waits, self.load = latency, per_row, waits, lambda: (1.0, 1.0)
        self.busy = self.passed = 0.0

    def __call__(self):
        return self.busy, self.passed

    def model(self, inner):
        def call(x, t):
            own, others = self.load()
            seconds = (self.latency + self.per_row * len(x)) * own
            self.busy += 0.0 if self.waits else seconds
            self.passed += seconds * others
            return inner(x, t)

        return call


def choices(clock, monkeypatch, T, count):
    """What "auto" takes in each of `count` calls of sample, by this clock."""
    monkeypatch.setattr(cost, "clock", clock)
    model, chain, taken = clock.model(Mixture(SCHEDULE, means())), SCHEDULE.chain(T), []
    choose = Timing.choose
    monkeypatch.setattr(Timing, "choose", lambda timing, run: (taken.append(choose(timing, run)), taken[-1])[1])
    with torch.no_grad():
        for _ in range(count):
            assert sample(model, latents(1, 6), chain, "auto").converged.all()
    return taken


@pytest.mark.parametrize(
    ("latency", "per_row", "T", "expected"),
    [(2e-2, 1e-6, 40, Parallel()), (1e-6, 1e-2, 40, Sequential()), (5e-2, 5e-3, 300, CoarseToFine())],
)
def test_a_busy_machine_does_not_change_what_is_taken(monkeypatch, latency, per_row, T, expected):
    clock, g = Clock(latency, per_row), torch.Generator().manual_seed(0)
    clock.load = lambda: (1.0, 1 + 9 * float(torch.rand((), generator=g)))  # others have the processor in between
    assert set(choices(clock, monkeypatch, T, 8)) == {expected}


def test_a_machine_that_slows_down_after_the_first_call_keeps_its_way(monkeypatch):
    clock = Clock(2e-2, 1e-6)
    clock.load = lambda: (1.0 if clock.busy < 1.0 else 4.0, 1.0)  # caches shared with others
    assert set(choices(clock, monkeypatch, 40, 6)) == {Parallel()}
    assert clock.busy > 2


def test_a_model_that_waits_for_another_machine_is_timed_by_the_clock(monkeypatch):
    assert set(choices(Clock(2e-2, 1e-6, waits=True), monkeypatch, 40, 4)) == {Parallel()}
    assert set(choices(Clock(1e-6, 1e-2, waits=True), monkeypatch, 40, 4)) == {Sequential()}


@torch.no_grad()
def test_calls_are_timed_once_per_model_and_batch_size_and_after_the_first_runs(monkeypatch):
    device(monkeypatch, 1e-2, 1e-9)
    timed, seconds = [], cost._seconds
    monkeypatch.setattr(cost, "_seconds", lambda run, rows: (timed.append(rows), seconds(run, rows))[1])
    model, chain, counts = Mixture(SCHEDULE, means()), SCHEDULE.chain(40), []
    for B in (2, 2, 2, 2, 2, 3):
        timed.clear()
        sample(model, latents(B, 6), chain, method="auto")
        counts.append(len(timed))
    assert counts[0] > counts[1] == counts[2] == cost.TURNS
    assert counts[3] == counts[4] == 0
    assert counts[5] == counts[0]


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
