"""Schedules without a table of ᾱ: closed forms of their grids, and diffusers' own loops as oracles."""

import math

import pytest
import torch
from mixture import latents
from networks import Rough

from diffusion import Schedule, sample

# diffusers converts tensors in a way that NumPy 2 warns of
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

FLOWS = [
    ({}, {}),
    ({"shift": 3.0}, {}),
    ({"shift": 1.7, "use_karras_sigmas": True}, {}),
    ({"use_exponential_sigmas": True}, {}),
    ({"use_beta_sigmas": True}, {}),
    ({"shift_terminal": 0.02}, {}),
    ({"use_dynamic_shifting": True}, {"mu": 1.1}),
    ({"use_dynamic_shifting": True, "time_shift_type": "linear", "shift_terminal": 0.1}, {"mu": 0.7}),
]
EULER = [
    {},
    {"timestep_spacing": "leading", "steps_offset": 1, "beta_schedule": "scaled_linear"},
    {"timestep_spacing": "trailing", "prediction_type": "sample"},
    {"use_karras_sigmas": True, "sigma_min": 0.02, "sigma_max": 50.0},
    {"use_exponential_sigmas": True, "final_sigmas_type": "sigma_min"},
    {"use_beta_sigmas": True},
    {"interpolation_type": "log_linear"},
    {"prediction_type": "v_prediction", "timestep_type": "continuous", "use_karras_sigmas": True},
    {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
]
EDMS = [
    {},
    {"prediction_type": "v_prediction", "sigma_data": 1.0},
    {"sigma_schedule": "exponential", "sigma_max": 20.0, "final_sigmas_type": "sigma_min"},
]
DPM = [
    ({}, {}),
    ({"use_karras_sigmas": True}, {}),
    ({"use_lu_lambdas": True, "final_sigmas_type": "sigma_min"}, {}),
    ({"use_exponential_sigmas": True, "timestep_spacing": "leading", "final_sigmas_type": "sigma_min"}, {}),
    ({"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1, "timestep_spacing": "trailing"}, {}),
    ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, {}),
    ({"prediction_type": "sample", "use_beta_sigmas": True}, {}),
    ({"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}, {}),
    ({"prediction_type": "flow_prediction", "use_flow_sigmas": True, "use_dynamic_shifting": True}, {"mu": 1.0}),
]
CASES = [
    *[("DPMSolverMultistepScheduler", settings, given) for settings, given in DPM],
    *[("FlowMatchEulerDiscreteScheduler", settings, given) for settings, given in FLOWS],
    *[("EulerDiscreteScheduler", settings, {}) for settings in EULER],
    *[("EDMEulerScheduler", settings, {}) for settings in EDMS],
]


def loop(scheduler, model, noise, **arguments):
    """The latent that diffusers' own loop starts from, and the image it makes of it."""
    scheduler.set_timesteps(**arguments)
    start = state = noise * float(getattr(scheduler, "init_noise_sigma", 1.0))
    scaled = getattr(scheduler, "scale_model_input", lambda x, t: x)
    for t in scheduler.timesteps:
        state = scheduler.step(model(scaled(state, t), t.expand(len(state))), t, state).prev_sample
    return start, state


def apart(x, y):
    return ((x - y).norm() / y.norm()).item()


@torch.no_grad()
@pytest.mark.parametrize("steps", [9, 28, 50])
@pytest.mark.parametrize(("name", "settings", "given"), CASES, ids=lambda part: str(part)[:60])
def test_the_loop_of_a_scheduler_is_reproduced_step_for_step(name, settings, given, steps):
    diffusers = pytest.importorskip("diffusers")
    scheduler, model = getattr(diffusers, name)(**settings), Rough()
    chain = Schedule.from_diffusers(scheduler, **given).chain(steps)
    start, expected = loop(scheduler, model, latents(2, 3, 2, 2).float(), num_inference_steps=steps, **given)
    assert torch.equal(chain.timesteps, scheduler.timesteps)
    assert chain.init_noise_sigma == pytest.approx(float(getattr(scheduler, "init_noise_sigma", 1.0)))
    for method in ("sequential", "parallel"):
        out = sample(model, start, chain, method, prediction=chain.prediction, error=1e-5)
        assert apart(out.x_0, expected) < 1e-4, method


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "settings", "given"),
    [
        ("EulerDiscreteScheduler", {}, {"timesteps": [900, 500, 100]}),
        ("EulerDiscreteScheduler", {}, {"sigmas": [20.0, 5.0, 1.0, 0.0]}),
        ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, {"sigmas": [1.0, 0.8, 0.3]}),
        ("FlowMatchEulerDiscreteScheduler", {}, {"sigmas": torch.tensor([1.0, 0.8, 0.3])}),
    ],
)
def test_own_time_steps_and_sigmas_are_taken_as_the_scheduler_takes_them(name, settings, given):
    diffusers = pytest.importorskip("diffusers")
    scheduler, model = getattr(diffusers, name)(**settings), Rough()
    chain = Schedule.from_diffusers(scheduler).chain(**given)
    values = {key: list(value) for key, value in given.items()}
    start, expected = loop(scheduler, model, latents(2, 3, 2, 2).float(), **values)
    assert len(chain) == 3
    assert apart(sample(model, start, chain, "sequential", prediction=chain.prediction).x_0, expected) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_another_spacing_is_that_of_the_scheduler_with_that_option(spacing):
    diffusers = pytest.importorskip("diffusers")
    chain = Schedule.from_diffusers(diffusers.EulerDiscreteScheduler()).chain(12, spacing)
    other = Schedule.from_diffusers(diffusers.EulerDiscreteScheduler(timestep_spacing=spacing)).chain(12)
    assert torch.equal(chain.timesteps, other.timesteps)
    assert torch.equal(chain.noise, other.noise)
    quadratic = Schedule.from_diffusers(diffusers.EulerDiscreteScheduler()).chain(12, "quadratic")
    assert quadratic.timesteps.tolist() == Schedule.linear().chain(12, "quadratic").timesteps.tolist()


def test_a_schedule_of_a_scheduler_says_so_on_one_line():
    diffusers = pytest.importorskip("diffusers")
    schedule = Schedule.from_diffusers(diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), mu=1.1)
    assert (
        repr(schedule) == "ContinuousSchedule(grid=SchedulerGrid(FlowMatchEulerDiscreteScheduler, mu=1.1), rule='ddim')"
    )
    assert repr(Schedule.flow().chain(5)) == "Chain(5 steps, t = 1000 … 200, α and σ 0, 1 … 1, 0, prediction=flow)"


def test_what_is_done_to_a_scheduler_later_does_not_change_the_schedule():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)
    schedule = Schedule.from_diffusers(scheduler)
    before = schedule.chain(5).noise
    scheduler.set_shift(5.0)
    scheduler.set_timesteps(3)
    assert torch.equal(schedule.chain(5).noise, before)
    assert not torch.equal(Schedule.from_diffusers(scheduler).chain(5).noise, before)


KINDS = ("karras", "exponential", "beta")


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, "stochastic_sampling=True of FlowMatch"),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, "invert_sigmas=True of FlowMatch"),
        ("EulerDiscreteScheduler", {"prediction_type": "original_sample"}, "prediction_type='original_sample'"),
        ("EDMEulerScheduler", {"prediction_type": "sample"}, "prediction_type='sample' of EDMEuler"),
        ("DPMSolverMultistepScheduler", {"solver_order": 3}, "solver_order=3 of DPMSolverMultistep"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "algorithm_type='sde-dpmsolver"),
        ("DPMSolverMultistepScheduler", {"solver_type": "heun"}, "solver_type='heun'"),
        ("DPMSolverMultistepScheduler", {"euler_at_final": True}, "euler_at_final=True"),
        ("DPMSolverMultistepScheduler", {"lower_order_final": False}, "lower_order_final=False"),
        ("DPMSolverMultistepScheduler", {"thresholding": True}, "thresholding=True"),
        ("DPMSolverMultistepScheduler", {"variance_type": "learned"}, "variance_type='learned'"),
        ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction"}, "without use_flow_sigmas"),
        *[
            ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, **more}, f"{name}=.* of DPMSolverMultistep")
            for more in ({"prediction_type": "v_prediction"}, *({f"use_{kind}_sigmas": True} for kind in KINDS))
            for name in more
        ],
    ],
)
def test_an_option_of_theirs_that_is_not_reproduced_is_refused_by_name(name, settings, words):
    diffusers = pytest.importorskip("diffusers")
    with pytest.raises(TypeError, match=words):
        Schedule.from_diffusers(getattr(diffusers, name)(**settings))


def test_mu_is_required_where_shifting_is_dynamic_and_refused_elsewhere():
    diffusers = pytest.importorskip("diffusers")
    flow = diffusers.FlowMatchEulerDiscreteScheduler
    with pytest.raises(ValueError, match="mu: required by a scheduler with use_dynamic_shifting"):
        Schedule.from_diffusers(flow(use_dynamic_shifting=True))
    with pytest.raises(ValueError, match="mu: of use only to"):
        Schedule.from_diffusers(flow(), mu=1.0)
    with pytest.raises(TypeError, match="mu: a number"):
        Schedule.from_diffusers(flow(use_dynamic_shifting=True), mu="1")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda s: s(d().EulerDiscreteScheduler(use_karras_sigmas=True)).chain(timesteps=[9, 1]),
            "timesteps: Euler",
        ),
        (lambda s: s(d().EDMEulerScheduler()).chain(timesteps=[9, 1]), "timesteps: not taken by EDMEulerScheduler"),
        (lambda s: s(d().EDMEulerScheduler()).chain(sigmas=[9.0, 1.0]), "sigmas: not reproduced for EDMEulerScheduler"),
        (lambda s: s(d().EulerDiscreteScheduler()).chain(2, "leading", timesteps=[9, 1]), "spacing: not taken beside"),
        (lambda s: s(d().EulerDiscreteScheduler()).chain(None, "leading", sigmas=[9.0]), "spacing: not taken beside"),
        (lambda s: s(d().EulerDiscreteScheduler()).chain(3, sigmas=[9.0, 1.0, 0.0]), "steps: 2, as many as sigmas"),
        (lambda s: s(d().DDIMScheduler()).chain(spacing="linspace", timesteps=[9, 1]), "spacing: not taken beside"),
        (lambda s: s(d().DDIMScheduler()).chain(7, timesteps=[9, 1]), "steps: 2, as many as timesteps"),
        (lambda s: s(d().EDMEulerScheduler()).chain(9, "leading"), "spacing: 'leading' is not one of this scheduler"),
        (lambda s: s(d().EulerDiscreteScheduler()).chain(9, "even"), "spacing: one of linspace"),
        (lambda s: s(d().EulerDiscreteScheduler()).chain(timesteps=[9], sigmas=[9.0]), "timesteps, sigmas: only one"),
        (lambda s: s(d().EulerDiscreteScheduler()).to_config(), "EulerDiscreteScheduler is recorded by"),
    ],
)
def test_what_a_scheduler_does_not_take_is_refused_by_name(call, words):
    pytest.importorskip("diffusers")
    with pytest.raises(ValueError, match=words):
        call(Schedule.from_diffusers)


def d():
    import diffusers

    return diffusers


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_a_flow_runs_through_shifted_times_from_noise_to_image(shift):
    chain = Schedule.flow(shift).chain(4)
    s = [shift * u / (1 + (shift - 1) * u) for u in (1.0, 0.75, 0.5, 0.25, 0.0)]
    assert chain.noise.tolist() == pytest.approx(s)
    assert chain.signal.tolist() == pytest.approx([1 - v for v in s])
    assert chain.timesteps.tolist() == pytest.approx([1000 * v for v in s[:-1]])
    assert (chain.timesteps.dtype, chain.prediction, chain.init_noise_sigma) == (torch.float32, "flow", 1.0)


def test_an_edm_schedule_is_that_of_karras_and_its_model_hears_the_log_of_sigma():
    chain = Schedule.edm(0.01, 50.0, 5.0).chain(4)
    roots = [50**0.2 + u * (0.01**0.2 - 50**0.2) for u in (0, 1 / 3, 2 / 3, 1)]
    assert chain.noise.tolist() == pytest.approx([*[r**5 for r in roots], 0.0])
    assert chain.timesteps.tolist() == pytest.approx([math.log(r**5) / 4 for r in roots])
    assert chain.signal.tolist() == [1.0] * 5


@torch.no_grad()
def test_schedules_of_the_same_grid_sample_what_the_schedulers_sample():
    diffusers = pytest.importorskip("diffusers")
    model, noise = Rough(), latents(2, 3, 2, 2).float()
    sigmas = torch.linspace(1, 1 / 20, 20).tolist()  # as FLUX's pipeline gives them
    pairs = [
        (Schedule.flow(3.0).chain(20), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), {"sigmas": sigmas}),
        (Schedule.edm().chain(20), diffusers.EDMEulerScheduler(), {"num_inference_steps": 20}),
        (Schedule.edm(prediction="v").chain(20), diffusers.EDMEulerScheduler(prediction_type="v_prediction"),
         {"num_inference_steps": 20}),
    ]  # fmt: skip
    for chain, scheduler, given in pairs:
        _, expected = loop(scheduler, model, noise, **given)
        out = sample(model, noise * chain.init_noise_sigma, chain, "sequential", prediction=chain.prediction)
        assert apart(out.x_0, expected) < 1e-4


def test_own_noise_levels_replace_those_of_a_schedule():
    assert Schedule.flow().chain(sigmas=[1.0, 0.6, 0.2]).noise.tolist() == pytest.approx([1.0, 0.6, 0.2, 0.0])
    assert Schedule.flow(3.0).chain(sigmas=[0.5]).noise.tolist() == pytest.approx([0.75, 0.0])
    assert Schedule.edm().chain(sigmas=[9.0, 3.0, 0.0]).noise.tolist() == [9.0, 3.0, 0.0]
    chain = Schedule.linear().chain(timesteps=[900, 500, 100])
    assert chain.timesteps.tolist() == [900, 500, 100]
    torch.testing.assert_close(chain.alphas, Schedule.linear().alphas_cumprod[[900, 500, 100]])


def test_a_quadratic_flow_is_denser_at_the_image():
    noise = Schedule.flow().chain(10, "quadratic").noise
    torch.testing.assert_close(noise, torch.linspace(1, 0, 11, dtype=torch.float64).square())


@pytest.mark.parametrize(
    "schedule", [Schedule.flow(), Schedule.flow(2.5, prediction="v"), Schedule.edm(0.01, 40.0, 6.0, 1.0, "v")]
)
def test_a_flow_or_edm_schedule_is_recorded_and_read_back(schedule):
    again = Schedule.from_config(schedule.to_config())
    assert again == schedule
    assert torch.equal(again.chain(7).noise, schedule.chain(7).noise)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: Schedule.flow(0.0), ValueError, "shift: a positive number"),
        (lambda: Schedule.flow("3"), TypeError, "shift: a number"),
        (lambda: Schedule.flow(prediction="noise"), ValueError, "prediction: one of"),
        (lambda: Schedule.edm(sigma_max=0.001), ValueError, "sigma_max: above sigma_min"),
        (lambda: Schedule.edm(prediction="flow"), ValueError, "prediction: one of epsilon, v"),
        (lambda: Schedule.edm(rho=-1), ValueError, "rho: a positive"),
        (lambda: Schedule.flow().chain(0), ValueError, "steps: at least 1"),
        (lambda: Schedule.flow().chain(5.0), TypeError, "steps: an integer"),
        (lambda: Schedule.flow().chain(5, "leading"), ValueError, "spacing: one of linspace, quadratic"),
        (lambda: Schedule.flow().chain(timesteps=[900]), ValueError, "timesteps: sigmas, s before each step"),
        (lambda: Schedule.flow().chain(sigmas=[1.2, 0.5]), ValueError, "sigmas: at most 1"),
        (lambda: Schedule.flow().chain(sigmas=[0.5, 0.6]), ValueError, "sigmas: positive numbers that fall"),
        (lambda: Schedule.flow().chain(sigmas=[]), ValueError, "sigmas: a list of numbers"),
        (lambda: Schedule.edm().chain(5, "linspace"), ValueError, "spacing: rho spaces the steps"),
        (lambda: Schedule.flow().chain(5, rule="euler"), ValueError, "rule: one of ddim"),
        (lambda: Schedule.linear().chain(5, rule="euler"), ValueError, "rule: one of ddim"),
        (lambda: Schedule.flow().chain(5, eta=2.0), ValueError, "eta: 0 to 1"),
        (lambda: Schedule.linear().chain(timesteps=[1000]), ValueError, "timesteps: integers that fall, of 999"),
        (lambda: Schedule.linear().chain(timesteps=[5, 5]), ValueError, "timesteps: integers that fall"),
        (lambda: Schedule.linear().chain(timesteps=[5.0]), ValueError, "timesteps: a list of integers"),
        (lambda: Schedule.from_config({"name": "flow", "shift": 1.0}), ValueError, "flow takes"),
    ],
)
def test_what_a_schedule_cannot_use_is_refused_by_name(call, error, words):
    with pytest.raises(error, match=words):
        call()


@torch.no_grad()
@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_fresh_noise_on_a_flow_is_that_of_the_same_chain_over_states_of_unit_variance(eta):
    flow = Schedule.flow().chain(12, eta=eta).tail(1)  # from s = 11/12: at s = 1 there is no ᾱ to divide by
    assert flow.sigma[-1] == 0
    share = (flow.signal / flow.size).square()
    alpha, after = share[:-1], share[1:]
    expected = eta * ((1 - after) / (1 - alpha) * (1 - alpha / after)).sqrt()  # Song et al. 2021, Eq. 16
    torch.testing.assert_close(flow.sigma, expected * flow.size[1:])
