"""Schedule: closed forms of ᾱ, the round trip through JSON, diffusers' conventions, refusals."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.chain import Chain
from diffusion.schedule import Schedule


def test_linear_alphas_are_the_running_product_of_one_minus_beta():
    schedule = Schedule.linear(4, 0.1, 0.4)
    expected = [0.9, 0.9 * 0.8, 0.9 * 0.8 * 0.7, 0.9 * 0.8 * 0.7 * 0.6]
    torch.testing.assert_close(schedule.alphas_cumprod, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)


def test_scaled_linear_spaces_the_roots_of_beta_evenly():
    schedule = Schedule.scaled_linear(3, 0.01, 0.09)
    expected = [0.99, 0.99 * 0.96, 0.99 * 0.96 * 0.91]
    torch.testing.assert_close(schedule.alphas_cumprod, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)


def test_cosine_alphas_are_squared_cosines_until_beta_is_clipped():
    n, s = 50, 0.008
    alphas = Schedule.cosine(n).alphas_cumprod
    for t in range(n - 1):
        g = math.cos(math.pi / 2 * ((t + 1) / n + s) / (1 + s)) ** 2 / math.cos(math.pi / 2 * s / (1 + s)) ** 2
        assert alphas[t].item() == pytest.approx(g, rel=1e-12)
    assert alphas[-1].item() == pytest.approx(alphas[-2].item() * 0.001, rel=1e-9)


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(["linear", "scaled_linear", "cosine"]),
    n=st.integers(1, 300),
    offset=st.integers(0, 3),
    keep_first=st.booleans(),
)
def test_a_schedule_survives_json_bit_for_bit(name, n, offset, keep_first):
    base = getattr(Schedule, name)(n)
    final = base.alphas_cumprod[0].item() if keep_first else 1.0
    for schedule in (
        Schedule(base.alphas_cumprod, final, offset, base.origin),
        Schedule.from_alphas_cumprod(base.alphas_cumprod, final, offset),
    ):
        again = Schedule.from_config(json.loads(json.dumps(schedule.to_config())))
        assert again == schedule
        assert torch.equal(again.alphas_cumprod, base.alphas_cumprod)
        assert (again.final_alpha_cumprod, again.steps_offset) == (final, offset)


def test_named_schedules_are_recorded_by_name_and_not_by_a_thousand_numbers():
    assert Schedule.linear(1000, 1e-4, 0.02).to_config() == {
        "name": "linear", "n": 1000, "start": 1e-4, "end": 0.02, "final_alpha_cumprod": 1.0, "steps_offset": 0,
    }  # fmt: skip


def test_schedules_that_differ_in_the_final_alpha_are_not_equal():
    alphas = Schedule.linear(10).alphas_cumprod
    assert Schedule.from_alphas_cumprod(alphas) != Schedule.from_alphas_cumprod(alphas, alphas[0].item())


def test_changing_the_given_tensor_later_does_not_change_the_schedule():
    alphas = torch.tensor([0.9, 0.5], dtype=torch.float64)
    schedule = Schedule.from_alphas_cumprod(alphas)
    alphas.zero_()
    assert schedule.alphas_cumprod.tolist() == [0.9, 0.5]


@pytest.mark.parametrize(("to_one", "final"), [(True, 1.0), (False, None)])
def test_a_chain_ends_at_the_alpha_where_its_scheduler_ends(to_one, final):
    diffusers = pytest.importorskip("diffusers")
    read = Schedule.from_diffusers(diffusers.DDIMScheduler(set_alpha_to_one=to_one, steps_offset=1))
    assert read.final_alpha_cumprod == (final or read.alphas_cumprod[0].item())
    assert read.steps_offset == 1


def test_diffusers_own_scheduler_gives_the_same_alphas():
    diffusers = pytest.importorskip("diffusers")
    source = diffusers.DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
                                     set_alpha_to_one=False, steps_offset=1)  # fmt: skip
    read, own = Schedule.from_diffusers(source), Schedule.scaled_linear(1000, 0.00085, 0.012)
    torch.testing.assert_close(read.alphas_cumprod, own.alphas_cumprod, rtol=1e-4, atol=0)  # theirs is float32
    assert (read.final_alpha_cumprod, read.steps_offset) == (read.alphas_cumprod[0].item(), 1)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), t=st.integers(0, 99))
def test_noising_keeps_the_variance_of_unit_images_and_has_the_stated_weights(seed, t):
    schedule = Schedule.linear(100)
    generator = torch.Generator().manual_seed(seed)
    x_0, noise = torch.randn(2, 3, 2, 4, 4, generator=generator, dtype=torch.float64)
    steps = torch.tensor([t, 0, 99])
    x_t = schedule.add_noise(x_0, noise, steps)
    for i, step in enumerate(steps):
        alpha = math.prod(1 - b for b in torch.linspace(1e-4, 0.02, 100, dtype=torch.float64)[: step + 1].tolist())
        torch.testing.assert_close(x_t[i], math.sqrt(alpha) * x_0[i] + math.sqrt(1 - alpha) * noise[i])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: Schedule.linear(0), ValueError, "n: at least 1"),
        (lambda: Schedule.linear(1.5), TypeError, "n: an integer"),
        (lambda: Schedule.linear(10, 0.0), ValueError, "0 < start <= end < 1"),
        (lambda: Schedule.linear(10, 0.2, 0.1), ValueError, "start=0.2"),
        (lambda: Schedule.linear(10, "a"), TypeError, "start: a number"),
        (lambda: Schedule.scaled_linear(10, 0.1, 1.0), ValueError, "end=1"),
        (lambda: Schedule.cosine(-1), ValueError, "n: at least 1"),
        (lambda: Schedule.from_alphas_cumprod([0.5]), TypeError, "alphas_cumprod: a tensor"),
        (lambda: Schedule.from_alphas_cumprod(torch.ones(2, 2)), ValueError, r"\(N,\)"),
        (lambda: Schedule.from_alphas_cumprod(torch.tensor([])), ValueError, r"\(N,\)"),
        (lambda: Schedule.from_alphas_cumprod(torch.tensor([1, 1])), ValueError, "floating-point"),
        (lambda: Schedule.from_alphas_cumprod(torch.tensor([0.5, 0.0, 0.0])), ValueError, r"\(0, 1\]"),
        (lambda: Schedule.from_alphas_cumprod(torch.tensor([0.5, -0.1])), ValueError, r"\(0, 1\]"),
        (lambda: Schedule(torch.tensor([0.5]), spacing="even"), ValueError, "spacing: one of linspace"),
        (lambda: Schedule(torch.tensor([0.5]), variance="tiny"), ValueError, "variance: one of small"),
        (lambda: Schedule(torch.tensor([0.5]), prediction="noise"), ValueError, "prediction: one of"),
        (lambda: Schedule(torch.tensor([0.5]), clip=1.0), TypeError, "clip: a Clip"),
        (lambda: Schedule(torch.tensor([0.5]), ancestral=1), TypeError, "ancestral: true or false"),
        (lambda: Schedule.from_alphas_cumprod(torch.tensor([0.5, math.nan])), ValueError, r"\(0, 1\]"),
        (lambda: Schedule.from_alphas_cumprod(torch.tensor([0.5, 0.6])), ValueError, "rises at t=1"),
        (lambda: Schedule.from_alphas_cumprod(torch.tensor([0.5]), 0.4), ValueError, "final_alpha_cumprod"),
        (lambda: Schedule.from_alphas_cumprod(torch.tensor([0.5]), steps_offset=-1), ValueError, "steps_offset"),
        (lambda: Schedule.from_diffusers(object()), TypeError, "object is not reproduced; known are DDIMSch"),
        (lambda: Schedule.from_config([]), TypeError, "a dict"),
        (lambda: Schedule.from_config({"name": "sigmoid"}), ValueError, "name must be one of"),
        (lambda: Schedule.from_config({"name": "linear", "n": 5}), ValueError, "linear takes"),
        (lambda: Schedule.from_config({"name": "cosine", "n": 5, "tail": 1}), ValueError, "cosine takes"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused_by_name(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize(
    ("noise", "t", "words"),
    [
        (torch.zeros(2, 3), torch.tensor([0]), "noise"),
        (torch.zeros(2, 2), torch.tensor([0]), "t: integers"),
        (torch.zeros(2, 2), torch.tensor([0.0, 1.0]), "t: integers"),
        (torch.zeros(2, 2), torch.tensor([0, 10]), "0 … 9"),
        (torch.zeros(2, 2), torch.tensor([-1, 0]), "0 … 9"),
    ],
)
def test_noising_refuses_what_does_not_fit(noise, t, words):
    with pytest.raises(ValueError, match=words):
        Schedule.linear(10).add_noise(torch.zeros(2, 2), noise, t)


def chain(**change):
    fields = {"timesteps": torch.tensor([9, 5, 1]), "alphas": torch.tensor([0.1, 0.5, 0.9]).double()}
    return Chain.vp(**{**fields, "alphas_next": torch.tensor([0.5, 0.9, 1.0]).double(), **change})


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"timesteps": [9, 5, 1]}, TypeError, "timesteps: a tensor"),
        ({"timesteps": torch.tensor([], dtype=torch.int64)}, ValueError, "timesteps: a tensor .* at least one"),
        ({"timesteps": torch.tensor([[9, 5, 1]])}, ValueError, "timesteps: a tensor"),
        (
            {"timesteps": torch.tensor([1, 5, 9])},
            ValueError,
            "timesteps: must decrease, .* 5 follows 1",
        ),
        ({"timesteps": torch.tensor([9, 9, 1])}, ValueError, "timesteps: must decrease"),
        ({"timesteps": torch.tensor([9, 5, -1])}, ValueError, "timesteps: 0 at least"),
        ({"timesteps": torch.tensor([9, 5])}, ValueError, r"alphas: a tensor \(2,\), one value per step"),
        ({"alphas": [0.1, 0.5, 0.9]}, TypeError, "alphas: a tensor"),
        ({"alphas": torch.tensor([0, 0, 1])}, TypeError, "alphas: floating-point"),
        ({"alphas": torch.tensor([0.1, 0.0, 0.9])}, ValueError, r"alphas: .* or 0 at the first, .* got 0 … 0.9"),
        ({"alphas": torch.tensor([-0.1, 0.5, 0.9])}, ValueError, "alphas: finite values"),
        ({"alphas": torch.tensor([0.1, 0.5, 1.1])}, ValueError, "alphas: finite values"),
        ({"alphas": torch.tensor([0.1, math.nan, 0.9])}, ValueError, "alphas: finite values"),
        ({"alphas": torch.tensor([0.5, 0.1, 0.9])}, ValueError, "alphas: must not fall .* step 1"),
        ({"alphas_next": torch.tensor([0.5, 0.9])}, ValueError, r"alphas_next: a tensor \(3,\)"),
        ({"alphas_next": torch.tensor([0.5, 0.9, math.inf])}, ValueError, "alphas_next: finite values"),
        ({"alphas_next": torch.tensor([0.05, 0.9, 1.0])}, ValueError, "alphas_next: at least alphas .* step 0"),
        ({"eta": -0.1}, ValueError, "eta: 0 to 1"),
        ({"eta": math.nan}, ValueError, "eta: 0 to 1"),
        ({"eta": "1"}, TypeError, "eta: a number"),
        ({"clip": 1.0}, TypeError, "clip: a Clip"),
        ({"variance": "learned"}, ValueError, "variance: one of small, large"),
        ({"prediction": "noise"}, ValueError, "prediction: one of"),
    ],
)
def test_a_chain_made_by_hand_is_checked_field_by_field(change, error, words):
    with pytest.raises(error, match=words):
        chain(**change)


def test_a_chain_keeps_its_states_in_float64_whatever_it_is_given():
    made = chain(timesteps=torch.tensor([9, 5, 1], dtype=torch.int32), alphas=torch.tensor([0.125, 0.5, 0.75]))
    assert (made.timesteps.dtype, made.alphas.dtype) == (torch.int64, torch.float64)


def test_a_step_without_signal_has_the_coefficients_of_v():
    made = chain(alphas=torch.tensor([0.0, 0.5, 0.9]))  # x' = √ᾱ' x̂_0 + √(1 − ᾱ') ε, ε = x, v = −x̂_0
    assert made.a[0].item() == pytest.approx(math.sqrt(0.5))
    assert made.c[0].item() == pytest.approx(-math.sqrt(0.5))


def test_large_noise_is_that_of_the_forward_step_and_none_enters_at_time_zero():
    made = chain(timesteps=torch.tensor([9, 5, 0]), eta=1.0, variance="large")
    expected = [math.sqrt(1 - 0.1 / 0.5), math.sqrt(1 - 0.5 / 0.9), 0.0]
    assert made.sigma.tolist() == pytest.approx(expected)
    assert made.c.tolist() == pytest.approx(chain(eta=1.0).c.tolist())


def test_a_schedule_decides_spacing_and_noise_where_none_is_asked_for():
    schedule = Schedule(Schedule.linear(100).alphas_cumprod, spacing="trailing", ancestral=True)
    assert schedule.chain(7).timesteps.tolist() == schedule.chain(7, "trailing").timesteps.tolist()
    assert (schedule.chain(7).eta, schedule.chain(7, eta=0.0).eta) == (1.0, 0.0)
    assert len(schedule.chain()) == 50
