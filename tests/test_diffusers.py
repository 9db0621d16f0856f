"""diffusers' DDIMScheduler as an independent oracle of the chain."""

import pytest
import torch
from mixture import Mixture, latents, means

from diffusion import Schedule, sample
from pydeqsolve import Stop

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
        got = sample(model, x, chain, prediction=kind, method=method, stop=Stop(rtol=1e-9, max_steps=100)).x_0
        assert ((got - state).norm() / state.norm()).item() < 1e-5, method  # the scheduler's ᾱ are float32
