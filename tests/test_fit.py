"""Training: what it learns, and that an interrupted run ends where an uninterrupted one does."""

import json
import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from diffusion.models.checkpoint import load_checkpoint
from diffusion.models.files import read_tensors, write_tensors
from diffusion.models.unet import UNet
from diffusion.schedule import Schedule
from diffusion.training.data import Dataset
from diffusion.training.fit import fit, recipes
from diffusion.training.run import STATE, Run

SHAPE = (1, 4, 4)
IMAGES = torch.randn(40, *SHAPE, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)


def network(seed=0):
    torch.manual_seed(seed)
    return UNet(SHAPE, channels=8, multipliers=(1,), blocks=(1,), groups=4, embedding=8, timesteps=50)


def dataset(test):
    labels = torch.zeros(len(IMAGES), dtype=torch.int64)
    return Dataset(IMAGES, test, labels, labels[: len(test)], levels=255)


def train(folder, images=IMAGES, **options):
    defaults = {"model": network(), "schedule": Schedule.linear(50, 1e-3, 0.2), "steps": 12, "batch": 4}
    return fit(images, folder, **{**defaults, **options})


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


def rewritten(folder, change):
    """Change tensors and header of the saved state of a run that was stopped after 5 steps; its path and bytes."""
    train(folder, callback=lambda step, loss: step == 4)
    tensors, header = read_tensors(folder / STATE)
    change(tensors, header)
    write_tensors(folder / STATE, tensors, header)
    return folder / STATE, (folder / STATE).read_bytes()


DAMAGES = {
    "no step": (lambda t, h: h.pop("step"), "step from 1 to 11 is required, got ''"),
    "step of another run": (lambda t, h: h.update(step="12"), "step from 1 to 11 is required, got '12'"),
    "a step that is none": (lambda t, h: h.update(step="-1"), "got '-1'"),
    "no settings": (lambda t, h: h.pop("settings"), "not a JSON file"),
    "settings of another kind": (lambda t, h: h.update(settings="[]"), "a JSON object is required"),
    "a setting more": (
        lambda t, h: h.update(settings=json.dumps({**json.loads(h["settings"]), "warmup": 5})),
        "warmup = 5 there, None here",
    ),
    "no loss": (lambda t, h: t.pop("loss"), "no tensor loss"),
    "no weight": (lambda t, h: t.pop("weight.exit.bias"), r"no tensor weight\.exit\.bias"),
    "no moment": (lambda t, h: t.pop("second.exit.bias"), r"no tensor second\.exit\.bias"),
    "one part more": (lambda t, h: t.update({"weight.more": torch.zeros(1)}), r"weight\.more is not known"),
    "another shape": (lambda t, h: t.update({"first.exit.bias": torch.zeros(2)}), r"first\.exit\.bias of shape \(1,\)"),
    "another dtype": (
        lambda t, h: t.update({"first.exit.bias": torch.zeros(1).double()}),
        r"first\.exit\.bias of .*torch\.float32, is",
    ),
    "not a number": (lambda t, h: t["average.exit.bias"].fill_(math.nan), r"average\.exit\.bias is not finite"),
    "a negative square": (lambda t, h: t["second.exit.bias"].fill_(-1), r"second\.exit\.bias is .* below 0"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "words"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_state_is_refused_by_part_and_left_as_it_is(tmp_path, change, words):
    path, before = rewritten(tmp_path, change)
    with pytest.raises(ValueError, match=rf"{words}.*pass resume=False to replace it"):
        train(tmp_path)
    assert path.read_bytes() == before
    assert train(tmp_path, resume=False).training["steps_done"] == 12


@pytest.mark.parametrize("kept", [0, 7, 300, -9])
def test_a_state_that_is_cut_short_is_refused_and_left_as_it_is(tmp_path, kept):
    path, before = rewritten(tmp_path, lambda t, h: None)
    path.write_bytes(before[:kept])
    with pytest.raises(ValueError, match=r"state\.safetensors: not a whole safetensors file.*pass resume=False"):
        train(tmp_path)
    assert path.read_bytes() == before[:kept]


def test_a_damaged_state_is_named_also_in_the_current_folder(tmp_path, monkeypatch):
    rewritten(tmp_path, lambda t, h: h.pop("settings"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^training/state\.safetensors: not a JSON file"):
        train(".")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_run_in_another_precision_goes_on_to_the_same_result(tmp_path, dtype):
    whole = train(tmp_path / "whole", model=network().to(dtype))
    train(tmp_path / "cut", model=network().to(dtype), callback=lambda step, loss: step == 4)
    assert_same_result(whole, train(tmp_path / "cut", model=network().to(dtype)))


def test_a_run_whose_state_is_missing_is_refused_and_not_begun_anew(tmp_path):
    path, _ = rewritten(tmp_path, lambda t, h: None)
    path.unlink()
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"state\.safetensors: missing, .*pass resume=False"):
        train(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("content", ["{", '{"training": 5}', '{"training": {"settings": []}}', "{}"])
def test_a_folder_whose_record_is_not_of_fit_is_refused_and_left_as_it_is(tmp_path, content):
    train(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match="pass resume=False to replace it"):
        train(tmp_path)
    assert (tmp_path / "config.json").read_text() == content


def test_weights_of_others_are_not_overwritten(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(ValueError, match="not written by fit"):
        train(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == b"mine"


def test_held_out_images_lie_beside_the_checkpoint_but_not_in_a_folder_that_is_refused(tmp_path):
    trained = train(tmp_path, dataset(IMAGES[:3]), steps=2)
    assert (trained.images - IMAGES[:3]).abs().max() <= 1 / 255
    with pytest.raises(ValueError, match="other settings"):
        train(tmp_path, dataset(-IMAGES[:3]), steps=3)
    assert torch.equal(load_checkpoint(tmp_path).images, trained.images)


@pytest.mark.parametrize("test", [IMAGES[:, :, :2], 2 + IMAGES[:3], IMAGES[:0], IMAGES[0]])
def test_held_out_images_that_cannot_be_kept_are_refused_before_training(tmp_path, test):
    with pytest.raises(ValueError, match=r"held_out|images"):
        train(tmp_path / "new", dataset(test))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("call", range(8))
def test_a_run_interrupted_at_any_write_goes_on_to_the_same_result(tmp_path, call, monkeypatch):
    whole = train(tmp_path / "whole")
    move, calls = os.replace, []

    def interrupted(source, target):
        calls.append(target)
        if len(calls) == call + 1:
            raise KeyboardInterrupt
        move(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "cut", save_every=5)
    assert_same_result(whole, train(tmp_path / "cut"))
    assert not list((tmp_path / "cut").rglob(".*"))


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


def labelled(images=IMAGES, classes=2):
    labels = torch.arange(len(images)) % classes
    return Dataset(images, images[:2], labels, labels[:2], levels=255)


def conditional():
    torch.manual_seed(0)
    return UNet(SHAPE, channels=8, multipliers=(1,), blocks=(1,), groups=4, embedding=8, timesteps=50, classes=2)


def test_a_model_with_classes_learns_which_images_belong_to_which(tmp_path):
    """Two images, one of each class: at nearly pure noise only the label tells which to predict."""
    images = torch.stack([torch.full(SHAPE, 0.8), torch.full(SHAPE, -0.8)])
    trained = train(tmp_path, labelled(images), model=conditional(), steps=400, batch=32, lr=1e-2, prediction="sample")
    x, t = torch.randn(2, *SHAPE), torch.tensor([49, 49])
    with torch.no_grad():
        said = trained.model(x, t, torch.tensor([0, 1])).mean((1, 2, 3))
    assert said[0] > 0.5
    assert said[1] < -0.5


def test_a_run_with_labels_that_is_interrupted_gives_the_same_bits(tmp_path):
    whole = train(tmp_path / "whole", labelled(), model=conditional())
    train(tmp_path / "cut", labelled(), model=conditional(), callback=lambda step, loss: step == 5)
    assert_same_result(whole, train(tmp_path / "cut", labelled(), model=conditional()))


@pytest.mark.parametrize("drop", [0.0, 0.3, 1.0])
def test_labels_are_those_of_the_images_drawn_but_for_the_share_that_is_dropped(drop):
    labels, options = torch.arange(40), {"steps": 9, "batch": 400, "lr": 1e-3, "ema": 0.9, "seed": 3}
    options |= {"prediction": "sample", "drop_label": drop, "model": {"classes": 40}}
    run = Run(IMAGES, None, network(), Schedule.linear(50), options, None, labels)
    drawn, (_, _, images) = run.draw_labels(4), run.draw(4)
    kept = drawn < 40
    assert torch.equal(images[kept], IMAGES[drawn[kept]])
    assert abs(kept.double().mean() - (1 - drop)) < 0.08


def test_a_run_without_classes_says_nothing_of_labels(tmp_path):
    assert "drop_label" not in train(tmp_path, labelled()).training["settings"]


@pytest.mark.parametrize(
    ("images", "options", "words"),
    [
        (IMAGES, {}, "images: a Dataset"),
        (labelled(classes=3), {}, "labels 0 to 1"),
        (labelled(), {"drop_label": 1.5}, "drop_label"),
        (labelled(), {"drop_label": math.nan}, "drop_label"),
    ],
)
def test_a_model_with_classes_needs_their_labels(tmp_path, images, options, words):
    with pytest.raises(ValueError, match=words):
        train(tmp_path / "new", images, model=conditional(), **options)
    assert not (tmp_path / "new").exists()


def test_a_schedule_without_a_table_is_refused_before_training(tmp_path):
    with pytest.raises(TypeError, match="schedule: a Schedule with a table of ᾱ is required, got ContinuousSchedule"):
        fit(torch.zeros(4, 1, 8, 8), tmp_path, schedule=Schedule.flow(), steps=1)
