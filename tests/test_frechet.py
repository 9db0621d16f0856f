"""The Fréchet distance against closed forms and SciPy's matrix square root, and the classifier it is taken in."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from scipy.linalg import sqrtm

from diffusion import load_checkpoint
from diffusion.models.checkpoint import SHIPPED
from diffusion.training.data import Dataset
from diffusion.training.frechet import (
    FEATURES_FILE,
    fit_classifier,
    frechet_distance,
    gaussian,
    load_features,
    save_features,
)

f64 = torch.float64


def covariance(n, seed, rank=None):
    A = torch.randn(n, rank or n, dtype=f64, generator=torch.Generator().manual_seed(seed))
    return A @ A.T / n


def stripes(count=200, turned=(0, 1), seed=0):
    """Images 1×8×8 with a bright left half, turned by so many quarters, and which of the turns it was."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(len(turned), (count,), generator=generator)
    base = torch.full((1, 8, 8), -0.8)
    base[:, :, :4] = 0.8
    images = torch.stack([base.rot90(turned[k], (1, 2)) for k in labels.tolist()])
    images += 0.1 * torch.randn(images.shape, generator=generator)
    return Dataset(images[20:], images[:20], labels[20:], labels[:20], 255)


@given(st.integers(1, 6), st.integers(0, 50))
def test_gaussians_with_diagonal_covariances_have_the_closed_form(n, seed):
    generator = torch.Generator().manual_seed(seed)
    m1, m2 = torch.randn(2, n, dtype=f64, generator=generator)
    s1, s2 = torch.rand(2, n, dtype=f64, generator=generator)
    expected = (m1 - m2).square().sum() + (s1 - s2).square().sum()
    assert frechet_distance(m1, s1.square().diag(), m2, s2.square().diag()) == pytest.approx(expected.item(), abs=1e-7)


@given(st.integers(2, 7), st.integers(0, 50))
def test_the_distance_is_that_of_scipys_matrix_square_root(n, seed):
    A, B, zero = covariance(n, seed), covariance(n, seed + 1000), torch.zeros(n, dtype=f64)
    expected = np.trace(A.numpy() + B.numpy() - 2 * sqrtm(A.numpy() @ B.numpy()).real)
    assert frechet_distance(zero, A, zero, B) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_a_gaussian_has_no_distance_from_itself_even_when_it_is_degenerate():
    C, mean = covariance(6, 0, rank=2), torch.ones(6, dtype=f64)
    assert frechet_distance(mean, C, mean, C) == pytest.approx(0, abs=1e-7)


def test_mean_and_covariance_are_those_of_numpy():
    x = torch.randn(30, 4, dtype=f64, generator=torch.Generator().manual_seed(0))
    mean, C = gaussian(x)
    np.testing.assert_allclose(mean, x.numpy().mean(0), atol=1e-12)
    np.testing.assert_allclose(C, np.cov(x.numpy().T), atol=1e-12)


def test_the_classifier_learns_classes_and_tells_real_images_from_noise():
    data = stripes()
    space = fit_classifier(data, steps=40, batch=32)
    assert (space.record["task"], space.record["accuracy"]) == ("classes", 1.0)
    noise = torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    assert space.distance(space.of(noise)) > 20 * space.distance(space.held_out)


def test_images_without_classes_are_told_apart_by_their_rotation():
    space = fit_classifier(stripes(turned=(0,)), steps=40, batch=32)
    assert (space.record["task"], space.record["accuracy"]) == ("rotations", 1.0)


def test_images_without_classes_that_are_not_square_are_refused():
    data = stripes(turned=(0,))
    narrow = Dataset(data.train[..., :6], data.test[..., :6], data.train_labels, data.test_labels, 255)
    with pytest.raises(ValueError, match=r"square images.*8x6"):
        fit_classifier(narrow, steps=1)


def test_a_feature_space_comes_back_from_its_file(tmp_path):
    space = fit_classifier(stripes(), steps=3, batch=8)
    save_features(tmp_path, space)
    loaded, images = load_features(tmp_path), stripes(seed=3).train
    assert torch.equal(loaded.of(images), space.of(images))
    assert torch.equal(loaded.held_out, space.held_out)
    assert loaded.distance(loaded.of(images)) == space.distance(space.of(images))
    assert loaded.record == space.record


DAMAGES = {
    "architecture": (lambda t, h: h.update(architecture=json.dumps({"shape": [1, 8, 8]})), "not a feature space"),
    "no architecture": (lambda t, h: h.pop("architecture"), "not a feature space"),
    "size": (lambda t, h: h.update(architecture=json.dumps({"shape": [1, 8, 10**99], "classes": 2})), "integers 1"),
    "sizes beyond all memory": (
        lambda t, h: h.update(architecture=json.dumps({"shape": [1, 8, 8], "classes": 2, "channels": 2**23})),
        r"model\.convolutions\.0\.bias of shape \(8388608,\) is required, got \(16,\)",
    ),
    "record": (lambda t, h: h.update(record="[" * 10**5), "not a feature space"),
    "tensor": (lambda t, h: t.pop("model.score.bias"), r"no tensor model\.score\.bias"),
    "mean": (lambda t, h: t.update({"real.mean": torch.zeros(3)}), r"real\.mean of shape \(32,\)"),
    "held out": (lambda t, h: t.pop("real.held_out"), r"real\.held_out of shape"),
    "not finite": (lambda t, h: t["real.covariance"].fill_(torch.inf), r"real\.covariance is not finite"),
    "negative": (lambda t, h: t["real.covariance"].neg_(), r"real\.covariance must be .* no negative eigenvalue"),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGES.values(), ids=DAMAGES)
def test_a_malformed_feature_space_is_refused_by_name(tmp_path, damage, words):
    save_features(tmp_path, fit_classifier(stripes(), steps=1, batch=8))
    path = tmp_path / FEATURES_FILE
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in list(file.keys())}
        header = file.metadata()
    damage(tensors, header)
    save_file(tensors, path, header)
    with pytest.raises(ValueError, match=rf"features\.safetensors: .*{words}"):
        load_features(tmp_path)


def test_a_feature_space_that_is_cut_short_is_refused_by_name(tmp_path):
    save_features(tmp_path, fit_classifier(stripes(), steps=1, batch=8))
    path = tmp_path / FEATURES_FILE
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"features\.safetensors: not a whole safetensors file"):
        load_features(tmp_path)


@pytest.mark.parametrize("name", ["digits", "fashion"])
def test_shipped_features_hold_held_out_images_closer_than_their_negatives(name):
    space, images = load_features(SHIPPED / name), load_checkpoint(name).images
    assert space.distance(space.of(-images)) > 4 * space.distance(space.of(images))
