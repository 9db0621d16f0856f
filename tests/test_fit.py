"""Training: what it learns, and that an interrupted run ends where an uninterrupted one does."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from diffusion.checkpoint import load_checkpoint
from diffusion.fit import fit, recipes
from diffusion.schedule import Schedule
from diffusion.training import STATE, Run
from diffusion.unet import UNet

SHAPE = (1, 4, 4)
IMAGES = torch.randn(40, *SHAPE, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)


def network(seed=0):
    torch.manual_seed(seed)
    return UNet(SHAPE, channels=8, multipliers=(1,), blocks=(1,), groups=4, embedding=8, timesteps=50)


def train(folder, **options):
    defaults = {"model": network(), "schedule": Schedule.linear(50, 1e-3, 0.2), "steps": 12, "batch": 4}
    return fit(IMAGES, folder, **{**defaults, **options})


def weights(checkpoint):
    return checkpoint.model.state_dict()


def assert_same_result(one, other):
    assert weights(one).keys() == weights(other).keys()
    for name, weight in weights(one).items():
        assert torch.equal(weight, weights(other)[name]), name
    assert one.training == other.training


@pytest.mark.parametrize("at", [1, 5, 8])
def test_a_run_interrupted_anywhere_and_repeated_gives_the_same_bits(tmp_path, at):
    whole = train(tmp_path / "whole")

    def interrupt(step, loss):
        if step == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", callback=interrupt, save_every=100)
    assert_same_result(whole, train(tmp_path / "cut"))


def test_a_run_killed_between_two_saves_goes_on_from_the_last_one(tmp_path):
    class KilledError(Exception):
        pass

    def kill(step, loss):
        if step == 9:
            raise KilledError

    whole = train(tmp_path / "whole")
    with pytest.raises(KilledError):
        train(tmp_path / "cut", callback=kill, save_every=4)
    done = []
    again = train(tmp_path / "cut", callback=lambda step, loss: done.append(step))
    assert done == [8, 9, 10, 11]
    assert_same_result(whole, again)


def test_an_interrupt_inside_the_optimizer_falls_back_on_the_last_save(tmp_path, monkeypatch):
    whole = train(tmp_path / "whole")
    lerp = torch._foreach_lerp_
    calls = []

    def interrupted_lerp(*args):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        lerp(*args)

    monkeypatch.setattr(torch, "_foreach_lerp_", interrupted_lerp)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", save_every=5)
    with safe_open(tmp_path / "cut" / STATE, framework="pt") as file:
        assert file.metadata()["step"] == "5"
    assert_same_result(whole, train(tmp_path / "cut"))


def test_the_averaged_model_is_loadable_after_an_interrupt(tmp_path):
    def interrupt(step, loss):
        if step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, callback=interrupt)
    partial = load_checkpoint(tmp_path)
    assert partial.training["steps_done"] == 7
    assert any(weight.abs().max() > 0 for name, weight in weights(partial).items() if name == "exit.weight")


def test_an_interrupt_before_the_first_step_saves_nothing_and_harms_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "advance", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path)
    monkeypatch.undo()
    assert train(tmp_path).training["steps_done"] == 12


def test_a_finished_run_leaves_no_training_state_and_is_not_repeated(tmp_path):
    first = train(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    steps = []
    assert_same_result(first, train(tmp_path, callback=lambda step, loss: steps.append(step)))
    assert steps == []


def test_a_true_return_of_the_callback_ends_the_run_for_now(tmp_path):
    partial = train(tmp_path / "cut", callback=lambda step, loss: step == 3)
    assert partial.training["steps_done"] == 4
    assert_same_result(train(tmp_path / "whole"), train(tmp_path / "cut"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lr": 1e-3}, "lr = 0.0015 there, 0.001 here"),
        ({"seed": 3}, "seed"),
        ({"steps": 13}, "steps"),
        ({"batch": 5}, "batch"),
        ({"prediction": "v"}, "prediction"),
        ({"schedule": Schedule.linear(50)}, "schedule"),
    ],
)
@pytest.mark.parametrize("finished", [False, True])
def test_other_settings_are_refused_in_the_folder_of_a_run(tmp_path, finished, change, words):
    train(tmp_path, callback=lambda step, loss: not finished)
    with pytest.raises(ValueError, match=f"other settings: .*{words}"):
        train(tmp_path, **change)


def test_other_images_are_refused_in_the_folder_of_a_run(tmp_path):
    train(tmp_path)
    with pytest.raises(ValueError, match="images"):
        fit(IMAGES.flip(3), tmp_path, model=network(), schedule=Schedule.linear(50, 1e-3, 0.2), steps=12, batch=4)


def test_without_resume_the_folder_is_trained_anew(tmp_path):
    train(tmp_path, callback=lambda step, loss: step == 5)
    assert_same_result(train(tmp_path, resume=False, seed=4), train(tmp_path / "other", seed=4))


def test_training_leaves_the_global_generator_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fit(IMAGES[:, :, :2, :2].repeat(1, 1, 2, 2), tmp_path, steps=2, batch=2)
    assert torch.equal(torch.rand(3), expected)


def test_the_loss_falls_below_that_of_the_best_constant(tmp_path):
    # one image only: the noise is a known function of x_t, so a network that learns anything beats predicting 0
    losses = []
    images = torch.full((1, *SHAPE), 0.5)
    fit(images, tmp_path, model=network(), steps=300, batch=32, schedule=Schedule.linear(50, 1e-3, 0.2),
        callback=lambda step, loss: losses.append(loss))  # fmt: skip
    assert sum(losses[:5]) / 5 > 0.8
    assert sum(losses[-20:]) / 20 < 0.25


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 5), k=st.integers(0, 10**6), prediction=st.sampled_from(["epsilon", "v", "sample"]))
def test_targets_and_noisy_images_determine_a_training_image(seed, k, prediction):
    schedule = Schedule.linear(50, 1e-3, 0.2)
    options = {"steps": 10**7, "batch": 7, "lr": 1e-3, "ema": 0.9, "seed": seed, "prediction": prediction}
    x_t, t, target = Run(IMAGES, None, network(), schedule, options, None).draw(k)
    alpha = schedule.alphas_cumprod[t].float()[:, None, None, None]
    x_0 = {
        "epsilon": lambda: (x_t - (1 - alpha).sqrt() * target) / alpha.sqrt(),
        "v": lambda: alpha.sqrt() * x_t - (1 - alpha).sqrt() * target,
        "sample": lambda: target,
    }[prediction]()
    nearest = (x_0[:, None] - IMAGES).flatten(2).abs().amax(2).amin(1)
    assert nearest.max() < 1e-4


def test_the_average_of_a_short_run_has_left_the_untrained_weights(tmp_path):
    model = network()
    trained = train(tmp_path, model=model, steps=30, ema=0.998)
    # the last layer starts at zero; an average of fixed decay .998 would keep it within 6 % of that
    assert weights(trained)["exit.weight"].norm() > 0.5 * model.exit.weight.norm()


def test_each_pair_of_seed_and_step_draws_its_own_noise():
    drawn = []
    for seed, k in [(0, 0), (0, 1), (1, 0), (10, 1), (1, 1), (2**32, 0), (-1, 0)]:
        options = {"steps": 9, "batch": 3, "lr": 1e-3, "ema": 0.9, "seed": seed, "prediction": "epsilon"}
        drawn.append(Run(IMAGES, None, network(), Schedule.linear(50), options, None).draw(k)[2])
    for i, one in enumerate(drawn):
        assert not any(torch.equal(one, other) for other in drawn[:i])


@settings(max_examples=20, deadline=None)
@given(k=st.integers(0, 10**6), batch=st.integers(1, 60))
def test_time_steps_fall_one_into_each_stratum(k, batch):
    options = {"steps": 1, "batch": batch, "lr": 1e-3, "ema": 0.9, "seed": 0, "prediction": "epsilon"}
    _, t, _ = Run(IMAGES, None, network(), Schedule.linear(1000), options, None).draw(k)
    for i, step in enumerate(t.tolist()):
        assert math.floor(i * 1000 / batch) <= step <= math.ceil((i + 1) * 1000 / batch)


def test_statistics_are_those_of_the_images(tmp_path):
    trained = train(tmp_path, steps=1)
    torch.testing.assert_close(trained.mean, IMAGES.double().mean(0).float())
    torch.testing.assert_close(trained.variance, IMAGES.double().var(0, correction=0).float())


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    train(tmp_path, callback=lambda step, loss: step == 3)
    model = network()
    before = load_checkpoint(tmp_path)

    def poison(step, loss):
        with torch.no_grad():
            model.exit.bias.fill_(math.nan)

    with pytest.raises(ValueError, match="the loss is nan after"):
        train(tmp_path, model=model, callback=poison)
    assert_same_result(before, load_checkpoint(tmp_path))


def test_the_recipes_record_all_that_their_result_depends_on(tmp_path):
    pytest.importorskip("sklearn")
    trained = recipes["digits"](tmp_path, steps=2)
    settings = json.loads((tmp_path / "config.json").read_text())["training"]["settings"]
    assert settings["steps"] == 2
    assert {"batch", "lr", "ema", "seed", "model", "schedule", "images"} <= settings.keys()
    assert settings["images"] == load_checkpoint("digits").training["settings"]["images"]
    assert torch.equal(trained.images, load_checkpoint("digits").images)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "steps"),
        ({"batch": 0}, "batch"),
        ({"save_every": 0}, "save_every"),
        ({"lr": 0.0}, "lr"),
        ({"lr": math.nan}, "lr"),
        ({"ema": 1.0}, "ema"),
        ({"prediction": "noise"}, "prediction"),
    ],
)
def test_wrong_arguments_are_refused_by_name(tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        train(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("images", [torch.zeros(0, 1, 4, 4), torch.zeros(3, 4, 4), torch.full((2, *SHAPE), math.nan)])
def test_images_that_cannot_be_trained_on_are_refused(tmp_path, images):
    with pytest.raises(ValueError, match="images"):
        fit(images, tmp_path, model=network(), steps=1)


def test_a_model_that_ends_before_the_schedule_is_refused(tmp_path):
    with pytest.raises(ValueError, match="51 timesteps are required, got 50"):
        train(tmp_path, schedule=Schedule.linear(51))


def test_a_model_that_could_not_be_loaded_again_is_refused_before_training(tmp_path):
    with pytest.raises(TypeError, match="model"):
        train(tmp_path, model=torch.nn.Conv2d(1, 1, 1))
