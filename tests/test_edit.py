"""What happens to a state between two steps: sampling in parallel is sampling step by step, whatever it is."""

import dataclasses

import pytest
import torch
from mixture import Mixture, latents, means

from diffusion import Clip, Inpaint, Parallel, Schedule, load_checkpoint, sample

SCHEDULE = Schedule.linear(1000, 1e-4, 0.02)
TIGHT = 1e-8


def relative(x, y):
    return ((x - y).flatten(1).norm(dim=1) / y.flatten(1).norm(dim=1)).max().item()


def drifting(x, k, image):
    """Not linear, other at every step and for every image, and not the same when applied twice."""
    return x + 0.02 * torch.sin(x + k) + 0.01 * image[:, None]


@torch.no_grad()
def test_an_edit_acts_on_every_state_that_a_step_leaves():
    model, chain, x = Mixture(SCHEDULE, means()), SCHEDULE.chain(20), latents(3, 6)
    state, states = x, [x]
    for k in range(20):
        state = chain.a[k] * state + chain.c[k] * model(state, chain.timesteps[k].expand(3))
        state = drifting(state, k + 1, torch.arange(3))
        states.append(state)
    got = sample(model, x, chain, method="sequential", edit=drifting)
    torch.testing.assert_close(got.trajectory, torch.stack(states, 1))


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [{}, {"splitting": "epsilon"}, {"splitting": "gaussian"}, {"method": Parallel(window=7)}, {"rows_per_call": 9}],
    ids=str,
)
@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_edited_states_are_those_of_sequential_sampling(options, eta):
    model, chain, x = Mixture(SCHEDULE, means()), SCHEDULE.chain(40, eta=eta), latents(4, 6)
    runs = [
        sample(model, x, chain, edit=drifting, error=TIGHT, generator=torch.Generator().manual_seed(1), **more)
        for more in ({"method": "sequential"}, options)
    ]
    assert relative(runs[1].trajectory, runs[0].trajectory) < 1e-7
    assert runs[1].solution.converged.all()


@torch.no_grad()
def test_edited_images_do_not_change_each_other_when_some_finish_first():
    model, chain, x = Mixture(SCHEDULE, means()), SCHEDULE.chain(30), latents(4, 6)
    together = sample(model, x, chain, edit=drifting)
    x[0] = torch.nan  # leaves in the first round, so that the others move up
    moved = sample(model, x, chain, edit=drifting)
    torch.testing.assert_close(moved.x_0[1:], together.x_0[1:], rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_inpainted_digits_keep_the_known_pixels_and_are_those_of_sequential_sampling():
    checkpoint = load_checkpoint("digits")
    chain = checkpoint.schedule.chain(100)
    known = checkpoint.images[:4].double()
    x_T = latents(4, *checkpoint.shape)
    mask = torch.zeros(checkpoint.shape, dtype=torch.float64)
    mask[..., :4] = 1  # the left half
    edit = Inpaint(chain, known, mask, x_T)
    oracle = sample(checkpoint.model, x_T, chain, method="sequential", edit=edit)
    got = sample(checkpoint.model, x_T, chain, edit=edit)
    assert relative(got.x_0, oracle.x_0) < 1e-3
    assert torch.equal(got.x_0[..., :4], known[..., :4])
    assert got.rounds < 25
    for k in (30, 100):  # noised as the chain has it there
        alpha = chain.alphas[k] if k < 100 else chain.alphas_next[-1]
        expected = alpha.sqrt() * known + (1 - alpha).sqrt() * x_T
        torch.testing.assert_close(got.trajectory[:, k, ..., :4], expected[..., :4])
    free = sample(checkpoint.model, x_T, chain)
    assert relative(free.x_0[..., :4], known[..., :4]) > 0.3


@torch.no_grad()
@pytest.mark.parametrize("clip", [Clip(0.8), Clip(1.5, quantile=0.7)], ids=str)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_predicted_images_held_in_range_are_those_of_sequential_sampling(clip, eta):
    schedule = Schedule(SCHEDULE.alphas_cumprod, clip=clip)
    model, chain, x = Mixture(schedule, means()), schedule.chain(50, eta=eta), latents(4, 6)
    runs = [
        sample(model, x, chain, method=method, error=TIGHT, generator=torch.Generator().manual_seed(1))
        for method in ("sequential", "parallel")
    ]
    assert relative(runs[1].trajectory, runs[0].trajectory) < 1e-7


@torch.no_grad()
@pytest.mark.parametrize("method", ["parallel", "auto"])
def test_a_long_chain_that_clips_is_solved_through_a_window(method):
    checkpoint = load_checkpoint("digits")
    chain = dataclasses.replace(checkpoint.schedule, clip=Clip(1.0)).chain(300)
    x, largest = latents(1, *checkpoint.shape).float(), []
    oracle = sample(checkpoint.model, x, chain, method="sequential")
    watched = lambda x, t: largest.append(len(x)) or checkpoint.model(x, t)  # noqa: E731
    got = sample(watched, x, chain, method=method)
    assert relative(got.x_0, oracle.x_0) < 1e-3
    assert max(largest) <= 100
    assert got.rounds == 300


@torch.no_grad()
def test_a_bound_that_nothing_reaches_changes_nothing():
    model, x = Mixture(SCHEDULE, means()), latents(3, 6)
    held = Schedule(SCHEDULE.alphas_cumprod, clip=Clip(1e6))
    plain, clipped = (sample(model, x, s.chain(30), error=TIGHT).x_0 for s in (SCHEDULE, held))
    torch.testing.assert_close(clipped, plain)


def test_a_threshold_is_that_of_each_image_however_many_there_are(monkeypatch):
    x, clip = 2 * latents(7, 5), Clip(3.0, quantile=0.6)
    together = clip(x)
    for i in range(7):
        s = min(max(x[i].abs().quantile(0.6).item(), 1.0), 3.0)
        torch.testing.assert_close(together[i], x[i].clamp(-s, s) / s)
    monkeypatch.setattr("diffusion.models.clip.QUANTILE_ENTRIES", 11)  # two images at a time
    assert torch.equal(clip(x), together)


def test_a_schedule_that_clips_is_recorded_and_read_back():
    for clip in (Clip(0.9), Clip(2.0, quantile=0.995)):
        schedule = Schedule(SCHEDULE.alphas_cumprod, clip=clip)
        assert Schedule.from_config(schedule.to_config()) == schedule
        assert schedule != SCHEDULE
        assert schedule.chain(10).clip == clip


@pytest.mark.parametrize("arguments", [(0.0,), (-1.0,), ("1",), (2.0, 0.0), (2.0, 1.5), (0.5, 0.9)])
def test_a_range_that_is_none_is_refused(arguments):
    with pytest.raises(ValueError, match=r"bound|quantile"):
        Clip(*arguments)


@torch.no_grad()
@pytest.mark.parametrize("method", ["sequential", "parallel"])
def test_a_step_that_removes_no_noise_changes_the_state_by_what_it_clips(method):
    schedule = Schedule(torch.tensor([0.9, 0.9, 0.5], dtype=torch.float64), final_alpha_cumprod=0.9, clip=Clip(0.5))
    model, x = Mixture(schedule, means()), latents(2, 6)
    state = x
    for t, after in ((2, 0.9), (1, 0.9), (0, 0.9)):
        alpha, eps = schedule.alphas_cumprod[t].item(), model(state, torch.full((2,), t))
        predicted = ((state - (1 - alpha) ** 0.5 * eps) / alpha**0.5).clamp(-0.5, 0.5)
        state = after**0.5 * predicted + (1 - after) ** 0.5 * eps
    assert relative(sample(model, x, schedule.chain(3), method=method, error=1e-9).x_0, state) < 1e-7


@pytest.mark.parametrize("method", ["sequential", "parallel"])
def test_an_edit_of_another_shape_is_named(method):
    with pytest.raises(ValueError, match="edit"):
        sample(
            Mixture(SCHEDULE, means()), latents(2, 6), SCHEDULE.chain(3), method=method, edit=lambda x, k, i: x[:, :2]
        )


def test_noise_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="noise"):
        Inpaint(SCHEDULE.chain(3), latents(2, 6), torch.ones(6), latents(3, 6))


@torch.no_grad()
@pytest.mark.parametrize("method", ["sequential", "parallel"])
def test_noises_that_are_given_are_those_that_enter_even_where_the_chain_adds_none(method):
    model, chain, x = Mixture(SCHEDULE, means()), SCHEDULE.chain(10, eta=1.0), latents(2, 6)
    noises = latents(2, 10, 6, seed=4)
    state = x
    for k in range(10):
        state = chain.a[k] * state + chain.c[k] * model(state, chain.timesteps[k].expand(2))
        state = state + (chain.sigma[k] if k < 9 else 1.0) * noises[:, k]  # σ_9 = 0: that entry as it is
    got = sample(model, x, chain, method=method, noises=noises, error=TIGHT).x_0
    assert relative(got, state) < 1e-8


@pytest.mark.parametrize(("eta", "shape"), [(0.0, (2, 3, 6)), (1.0, (2, 4, 6)), (1.0, (2, 3, 5))])
def test_noises_that_do_not_fit_are_named(eta, shape):
    with pytest.raises(ValueError, match="noises"):
        sample(Mixture(SCHEDULE, means()), latents(2, 6), SCHEDULE.chain(3, eta=eta), noises=torch.zeros(shape))
