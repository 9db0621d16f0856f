"""diffusers' DDIMScheduler as an independent oracle of the chain."""

import dataclasses
import json

import pytest
import torch
from mixture import Mixture, latents, means
from networks import Rough

from diffusion import Schedule, invert, sample

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


def loop(scheduler, model, x, steps, generator=None, **options):
    """What diffusers' own loop makes of x."""
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t.expand(len(x))), t, x, generator=generator, **options).prev_sample
    return x


def apart(x, y):
    return ((x - y).norm() / y.norm()).item()


ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@torch.no_grad()
@pytest.mark.parametrize("steps", [1, 2, 7, 20])
@pytest.mark.parametrize(
    "settings",
    [
        {"timestep_spacing": "linspace"},
        {"timestep_spacing": "linspace", "clip_sample": True, "set_alpha_to_one": False},
        {"clip_sample": True, "set_alpha_to_one": False},
        {"clip_sample": True, "set_alpha_to_one": False, "clip_sample_range": 0.4, "prediction_type": "sample"},
        {"thresholding": True, "sample_max_value": 1.5, "set_alpha_to_one": False, "prediction_type": "v_prediction"},
        {**ZERO_SNR, "prediction_type": "v_prediction"},
        {**ZERO_SNR, "prediction_type": "v_prediction", "clip_sample": True, "beta_schedule": "scaled_linear"},
        {**ZERO_SNR, "prediction_type": "sample", "thresholding": True, "beta_schedule": "squaredcos_cap_v2"},
        {**ZERO_SNR, "prediction_type": "sample", "set_alpha_to_one": False},
        {"rescale_betas_zero_snr": True, "timestep_spacing": "leading"},
        {"trained_betas": [0.01 + 0.001 * k for k in range(50)], "num_train_timesteps": 50, "steps_offset": 1},
        {"num_train_timesteps": 4000, "timestep_spacing": "trailing"},
    ],
    ids=lambda settings: " ".join(f"{k}={str(v)[:12]}" for k, v in settings.items()),
)
def test_every_option_of_the_ddim_scheduler_is_reproduced_at_its_own_spacing(settings, steps):
    scheduler = diffusers.DDIMScheduler(**{"clip_sample": False, **settings})
    schedule = Schedule.from_diffusers(scheduler)
    chain, model, x = schedule.chain(steps), Rough(), latents(2, 3, 2, 2)
    expected = loop(scheduler, model, x, steps)
    assert chain.timesteps.tolist() == scheduler.timesteps.tolist()
    assert apart(sample(model, x, chain, prediction=schedule.prediction, method="sequential").x_0, expected) < 1e-5
    assert apart(sample(model, x, chain, prediction=schedule.prediction).x_0, expected) < 2e-3


def entering(noises, chain):
    """The noises (B, T, …) where the chain adds any; entries given for its other steps would be added as they are."""
    return torch.where((chain.sigma > 0).reshape(1, -1, *[1] * (noises.dim() - 2)), noises, 0.0)


@torch.no_grad()
@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_a_consistent_clip_is_the_clipped_model_output_of_the_ddim_scheduler(eta):
    scheduler = diffusers.DDIMScheduler(clip_sample=True, clip_sample_range=0.7, set_alpha_to_one=False)
    schedule = Schedule.from_diffusers(scheduler)
    schedule = dataclasses.replace(schedule, clip=dataclasses.replace(schedule.clip, consistent=True))
    model, x, generator = Rough(), latents(2, 3, 2, 2), torch.Generator().manual_seed(1)
    noises = torch.stack([torch.randn(2, 3, 2, 2, dtype=torch.float64, generator=generator) for _ in range(15)], 1)
    more = {"generator": torch.Generator().manual_seed(1)} if eta else {}
    expected = loop(scheduler, model, x, 15, eta=eta, use_clipped_model_output=True, **more)
    for method, error in (("sequential", 1e-5), ("parallel", 2e-3)):
        chain = schedule.chain(15, eta=eta)
        given = {"noises": entering(noises, chain)} if eta else {}
        out = sample(model, x, chain, prediction="epsilon", method=method, **given)
        assert apart(out.x_0, expected) < error


@torch.no_grad()
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"clip_sample": False, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
        {"clip_sample_range": 0.6, "steps_offset": 1, "beta_schedule": "squaredcos_cap_v2"},
        {"thresholding": True, "sample_max_value": 1.4, "timestep_spacing": "linspace", "prediction_type": "sample"},
        {**ZERO_SNR, "prediction_type": "v_prediction"},
        {"beta_schedule": "sigmoid", "clip_sample": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("steps", [1, 13])
def test_the_loop_of_the_ddpm_scheduler_is_reproduced(variance, settings, steps):
    scheduler = diffusers.DDPMScheduler(variance_type=variance, **settings)
    schedule = Schedule.from_diffusers(scheduler)
    chain, model, x, generator = schedule.chain(steps), Rough(), latents(2, 3, 2, 2), torch.Generator().manual_seed(4)
    noises = torch.stack([torch.randn(2, 3, 2, 2, dtype=torch.float64, generator=generator) for _ in range(steps)], 1)
    expected = loop(scheduler, model, x, steps, generator=torch.Generator().manual_seed(4))
    assert chain.timesteps.tolist() == scheduler.timesteps.tolist()
    assert chain.eta == 1
    for method, error in (("sequential", 1e-5), ("parallel", 2e-3)):
        given = {"noises": entering(noises, chain), "prediction": schedule.prediction}
        out = sample(model, x, chain, method=method, **given)
        assert apart(out.x_0, expected) < error, method


OTHERS = [
    "FlowMatchHeunDiscreteScheduler", "EulerAncestralDiscreteScheduler", "EDMDPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler",
    "LCMScheduler", "TCDScheduler", "CMStochasticIterativeScheduler", "UniPCMultistepScheduler",
    "DEISMultistepScheduler", "PNDMScheduler", "RePaintScheduler", "DDIMInverseScheduler", "DDIMParallelScheduler",
    "DDPMParallelScheduler", "FlowMatchLCMScheduler",
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", OTHERS)
def test_a_scheduler_of_another_class_is_refused_by_name(name):
    with pytest.raises(TypeError, match=f"scheduler: {name} is not reproduced; known are DDIMScheduler, DDPMScheduler"):
        Schedule.from_diffusers(getattr(diffusers, name)())


class DDIMScheduler(diffusers.DDIMScheduler):
    """Steps in a way of its own, under the name of diffusers'."""


@pytest.mark.parametrize("other", [DDIMScheduler(), None, "DDIMScheduler", diffusers.DDIMScheduler])
def test_what_only_looks_like_a_known_scheduler_is_refused(other):
    with pytest.raises(TypeError, match="is not reproduced; known are DDIMScheduler"):
        Schedule.from_diffusers(other)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: diffusers.DDPMScheduler(variance_type="learned_range"), "variance_type='learned_range' of DDPMSch"),
        (lambda: diffusers.DDPMScheduler(variance_type="learned"), "variance_type='learned'"),
        (lambda: diffusers.DDPMScheduler(variance_type="fixed_large_log"), "variance_type='fixed_large_log'"),
        (lambda: diffusers.DDIMScheduler(prediction_type="flow_prediction"), "'flow_prediction' of DDIM"),
        (lambda: diffusers.DDIMScheduler(timestep_spacing="karras"), "timestep_spacing='karras'"),
    ],
)
def test_an_option_that_is_not_reproduced_is_refused_by_name(make, words):
    with pytest.raises(TypeError, match=words):
        Schedule.from_diffusers(make())


def test_an_option_that_a_later_version_adds_is_refused_unless_it_is_at_its_default(monkeypatch):
    from diffusion.models import schedulers

    old = schedulers.SCHEDULERS["DDIMScheduler"]
    fewer = {name: values for name, values in old.options.items() if name != "rescale_betas_zero_snr"}
    monkeypatch.setitem(schedulers.SCHEDULERS, "DDIMScheduler", dataclasses.replace(old, options=fewer))
    Schedule.from_diffusers(diffusers.DDIMScheduler())
    with pytest.raises(TypeError, match="rescale_betas_zero_snr=True of DDIMScheduler"):
        Schedule.from_diffusers(diffusers.DDIMScheduler(**ZERO_SNR))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"trained_betas": [0.1] * 50}, "num_train_timesteps=1000 betas are required, got 50"),
        ({"clip_sample_range": 0.0}, "clip_sample_range"),
        ({"thresholding": True, "sample_max_value": 0.5}, "sample_max_value"),
    ],
)
def test_an_option_that_makes_no_sense_is_named(settings, words):
    with pytest.raises(ValueError, match=words):
        Schedule.from_diffusers(diffusers.DDIMScheduler(**settings))


def test_a_schedule_of_a_scheduler_is_recorded_and_read_back():
    for scheduler in (
        diffusers.DDIMScheduler(timestep_spacing="trailing", prediction_type="v_prediction"),
        diffusers.DDPMScheduler(variance_type="fixed_large", clip_sample_range=2.0),
        diffusers.DDIMScheduler(**ZERO_SNR, prediction_type="sample"),
    ):
        schedule = Schedule.from_diffusers(scheduler)
        again = Schedule.from_config(json.loads(json.dumps(schedule.to_config())))
        assert again == schedule
        assert (again.spacing, again.eta, again.prediction) == (schedule.spacing, schedule.eta, schedule.prediction)


def test_noise_prediction_where_there_is_no_signal_is_refused_with_the_reason():
    zero = diffusers.DDIMScheduler(**ZERO_SNR)
    with pytest.raises(ValueError, match="ε says nothing of x_0"):
        Schedule.from_diffusers(zero).chain(10)
    chain = dataclasses.replace(Schedule.from_diffusers(zero), prediction=None).chain(10)
    with pytest.raises(ValueError, match="prediction"):
        sample(Rough(), latents(1, 12), chain)


def test_a_prediction_other_than_the_schedulers_is_refused():
    chain = Schedule.from_diffusers(diffusers.DDIMScheduler(prediction_type="v_prediction")).chain(10)
    with pytest.raises(ValueError, match="prediction: 'v', the scheduler's, is required, got 'epsilon'"):
        sample(Rough(), latents(1, 12), chain)


@pytest.mark.parametrize("method", ["exact", "ddim"])
def test_a_chain_that_starts_without_signal_is_inverted(method):
    scheduler = diffusers.DDIMScheduler(clip_sample=False, prediction_type="v_prediction", **ZERO_SNR)
    model = Mixture(Schedule.linear(), means(size=12), prediction="v")
    chain, x = Schedule.from_diffusers(scheduler).chain(20), latents(2, 12)
    image = sample(model, x, chain, prediction="v", method="sequential").x_0
    found = invert(model, image, chain, method, prediction="v")
    assert found.loss.max() < (1e-6 if method == "exact" else 3.0)
    if method == "exact":
        again = sample(model, found.x_T, chain, prediction="v", method="sequential").x_0
        assert apart(again, image) < 1e-3
