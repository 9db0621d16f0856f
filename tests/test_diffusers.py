"""diffusers' DDIMScheduler as an independent oracle of the chain."""

import dataclasses

import pytest
import torch
from mixture import Mixture, latents, means

from diffusion import Schedule, sample

diffusers = pytest.importorskip("diffusers")


@torch.no_grad()
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("offset", [0, 1])
def test_both_methods_reproduce_the_ddim_scheduler(spacing, prediction, to_one, offset):
    scheduler = diffusers.DDIMScheduler(
        beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False, timestep_spacing=spacing,
        prediction_type=prediction, set_alpha_to_one=to_one, steps_offset=offset,
    )  # fmt: skip
    schedule = Schedule.from_diffusers(scheduler)
    kind = "v" if prediction == "v_prediction" else prediction
    model = Mixture(schedule, means(), prediction=kind)
    scheduler.set_timesteps(30)
    x = latents(3, 6)
    state = x
    for t in scheduler.timesteps:
        state = scheduler.step(model(state, t.expand(3)), t, state).prev_sample
    chain = schedule.chain(30, spacing)
    assert chain.timesteps.tolist() == scheduler.timesteps.tolist()
    for method in ("sequential", "parallel"):
        got = sample(model, x, chain, prediction=kind, method=method, error=1e-8).x_0
        assert ((got - state).norm() / state.norm()).item() < 1e-5, method  # the scheduler's ᾱ are float32


@torch.no_grad()
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize(
    "held",
    [
        {"clip_sample": True, "clip_sample_range": 0.8},
        {"thresholding": True, "dynamic_thresholding_ratio": 0.7, "sample_max_value": 1.6},
    ],
    ids=["clip", "threshold"],
)
def test_images_held_in_range_are_those_of_the_ddim_scheduler(prediction, eta, held):
    scheduler = diffusers.DDIMScheduler(prediction_type=prediction, **{"clip_sample": False, **held})
    schedule = Schedule.from_diffusers(scheduler)
    kind = "v" if prediction == "v_prediction" else prediction
    model = Mixture(schedule, means(size=12), prediction=kind)
    scheduler.set_timesteps(25)
    noise = torch.randn(3, 25, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    state = x = latents(3, 3, 2, 2)
    for k, t in enumerate(scheduler.timesteps):
        fresh = noise[:, k].reshape(x.shape) if eta else None
        state = scheduler.step(model(state, t.expand(3)), t, state, eta=eta, variance_noise=fresh).prev_sample
    free = dataclasses.replace(schedule, clip=None)
    chains = [s.chain(25, "leading", eta) for s in (schedule, free)]
    seeded = lambda: torch.Generator().manual_seed(2)  # noqa: E731
    unheld = sample(model, x, chains[1], prediction=kind, method="sequential", generator=seeded()).x_0
    assert (unheld - state).norm() > 0.05 * state.norm()  # holding makes a difference here
    for method in ("sequential", "parallel"):
        got = sample(model, x, chains[0], prediction=kind, method=method, error=1e-8, generator=seeded()).x_0
        assert ((got - state).norm() / state.norm()).item() < 1e-5, method


def test_a_schedule_that_ends_without_signal_is_refused_with_the_reason():
    scheduler = diffusers.DDIMScheduler(rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match="rescale_betas_zero_snr"):
        Schedule.from_diffusers(scheduler)
