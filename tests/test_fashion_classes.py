"""The shipped class-conditional clothes: they are of the class asked for, and are edited into another one."""

import pytest
import torch

from diffusion import Guided, invert, load_checkpoint, sample
from diffusion.models.checkpoint import SHIPPED
from diffusion.training.frechet import load_features

LABELS = [9, 2, 1, 1, 6, 1, 4, 6, 5, 7, 4, 5, 7, 3, 4, 1]  # of the first shipped images, Fashion-MNIST's test images
TARGETS = [2, 3, 0, 4, 3, 7, 3, 9, 2, 7]  # T-shirts into pullovers, sneakers into boots, …


@pytest.fixture(scope="module")
def checkpoint():
    found = load_checkpoint("fashion-classes")
    found.model.requires_grad_(False)
    return found


@pytest.fixture(scope="module")
def judge():
    """The shipped classifier of clothes, right on 89 % of held-out images; it has nothing to do with the network."""
    model = load_features(SHIPPED / "fashion").model
    return lambda x: model(x.clamp(-1, 1)).argmax(1)


def share(one, other):
    return (one == other).double().mean().item()


@pytest.mark.parametrize(("scale", "least"), [(1.0, 0.75), (3.0, 0.9)])
def test_the_clothes_sampled_are_of_the_class_asked_for(checkpoint, judge, scale, least):
    label, chain = torch.arange(10).repeat(3), checkpoint.schedule.chain(15, "quadratic")
    x = torch.randn(30, *checkpoint.shape, generator=torch.Generator().manual_seed(1))
    model = Guided(checkpoint.model, scale, checkpoint.model.no_class)
    assert share(judge(sample(model, x, chain, "sequential", inputs=(label,)).x_0), label) >= least


def test_without_a_class_they_are_of_many_classes(checkpoint, judge):
    x = torch.randn(30, *checkpoint.shape, generator=torch.Generator().manual_seed(1))
    images = sample(checkpoint.model, x, checkpoint.schedule.chain(15, "quadratic"), "sequential").x_0
    assert len(set(judge(images).tolist())) >= 7


def test_noise_maps_edit_real_clothes_into_the_class_asked_for(checkpoint, judge):
    x_0, label = checkpoint.images[:16], torch.tensor(LABELS)
    other = torch.tensor(TARGETS)[label]
    chain = checkpoint.schedule.chain(20, "quadratic", eta=1.0)
    model = Guided(checkpoint.model, 3.0, checkpoint.model.no_class)
    found = invert(model, x_0, chain, "ddpm", inputs=(label,), generator=torch.Generator().manual_seed(0))
    assert found.loss.max() <= 1e-12
    edited = sample(model, found.x_T, chain, "sequential", inputs=(other,), noises=found.noises).x_0
    assert share(judge(edited), other) >= 0.8
    assert share(judge(edited), label) <= 0.1


def test_it_fits_a_package_and_knows_the_leading_directions_of_its_data(checkpoint):
    assert sum(path.stat().st_size for path in (SHIPPED / "fashion-classes").iterdir()) < 1.5e6
    assert checkpoint.statistics.eigenvectors.shape == (784, 32)


def test_it_knows_the_images_that_the_other_clothes_do(checkpoint):
    other = load_checkpoint("fashion")
    assert torch.equal(checkpoint.images, other.images)
    torch.testing.assert_close(checkpoint.mean, other.mean)
