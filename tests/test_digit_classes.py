"""The shipped class-conditional digits: they are of the class asked for, and are edited into another one."""

import pytest
import torch

from diffusion import Guided, invert, load_checkpoint, sample

svm = pytest.importorskip("sklearn.svm")


@pytest.fixture(scope="module")
def digits():
    from diffusion.training.data import digits as data

    return data()


@pytest.fixture(scope="module")
def judge(digits):
    """A classifier that has nothing to do with the network; right on 99 % of the test images."""
    machine = svm.SVC(gamma=0.02, C=5).fit(digits.train.flatten(1).numpy(), digits.train_labels.numpy())
    assert machine.score(digits.test.flatten(1).numpy(), digits.test_labels.numpy()) > 0.98
    return lambda x: torch.from_numpy(machine.predict(x.clamp(-1, 1).double().flatten(1).numpy()))


@pytest.fixture(scope="module")
def checkpoint():
    found = load_checkpoint("digit-classes")
    found.model.requires_grad_(False)
    return found


def share(one, other):
    return (one == other).double().mean().item()


@pytest.mark.parametrize("scale", [1.0, 3.0, 7.5])
def test_the_digits_sampled_are_of_the_class_asked_for(checkpoint, judge, scale):
    label, chain = torch.arange(10).repeat(4), checkpoint.schedule.chain(20, "quadratic")
    x = torch.randn(40, *checkpoint.shape, generator=torch.Generator().manual_seed(1))
    model = Guided(checkpoint.model, scale, checkpoint.model.no_class)
    assert share(judge(sample(model, x, chain, inputs=(label,)).x_0), label) >= 0.95


def test_without_a_class_they_are_of_all_classes(checkpoint, judge):
    x = torch.randn(60, *checkpoint.shape, generator=torch.Generator().manual_seed(1))
    images = sample(checkpoint.model, x, checkpoint.schedule.chain(20, "quadratic"), method="sequential").x_0
    assert len(set(judge(images).tolist())) >= 9


@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_noise_maps_edit_a_real_digit_into_the_class_asked_for(checkpoint, judge, digits, scale):
    x_0, label = digits.test[:20], digits.test_labels[:20]
    chain = checkpoint.schedule.chain(20, "quadratic", eta=1.0)
    model = Guided(checkpoint.model, scale, checkpoint.model.no_class)
    found = invert(model, x_0, chain, "ddpm", inputs=(label,), generator=torch.Generator().manual_seed(0))
    assert found.loss.max() <= 1e-12
    given = {"method": "sequential", "noises": found.noises}
    same = sample(model, found.x_T, chain, inputs=(label,), **given).x_0
    assert (same - x_0).double().square().flatten(1).sum(1).max() <= 1e-12
    other = (label + 3) % 10
    assert share(judge(sample(model, found.x_T, chain, inputs=(other,), **given).x_0), other) >= 0.9


def test_the_maps_keep_an_edit_nearer_to_its_source_than_fresh_noise_does(checkpoint, digits):
    x_0, other = digits.test[:20], (digits.test_labels[:20] + 3) % 10
    chain, generator = checkpoint.schedule.chain(20, "quadratic", eta=1.0), torch.Generator().manual_seed(0)
    found = invert(checkpoint.model, x_0, chain, "ddpm", inputs=(digits.test_labels[:20],), generator=generator)
    start = {"model": checkpoint.model, "latent": found.x_T, "chain": chain, "method": "sequential", "inputs": (other,)}
    edited, free = sample(noises=found.noises, **start).x_0, sample(generator=generator, **start).x_0
    distances = [(x - x_0).square().flatten(1).sum(1).median() for x in (edited, free)]
    assert distances[0] < 0.7 * distances[1], distances


def test_it_fits_a_package():
    from diffusion.models.checkpoint import SHIPPED

    assert sum(path.stat().st_size for path in (SHIPPED / "digit-classes").iterdir()) < 1e6
