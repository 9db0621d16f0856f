"""Statistics of images, and the splittings that a checkpoint makes of them.

A splitting is compared as the affine map x ↦ Q κ_k Qᵀ x + Q b_k that it stands for: the columns of Q may turn or change
sign where that map does not. Stored in float32, each is right to about 1e-6 of its largest entry.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusion import Schedule, Splitting, Statistics, fit, load_checkpoint, sample, save_checkpoint
from diffusion.models import statistics as module
from diffusion.models.checkpoint import add_statistics
from diffusion.models.files import read_tensors
from diffusion.models.unet import UNet

BASES = ("pixels", "frequencies", "covariance")
SCHEDULE = Schedule.linear()
SHAPE = (2, 4, 4)


def correlated(count=200):
    """Images with variances from 1 to 1e-4 along random directions, and a mean that is not 0: (count, 2, 4, 4)."""
    generator = torch.Generator().manual_seed(3)
    Q = torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64, generator=generator)).Q
    data = torch.randn(count, 32, dtype=torch.float64, generator=generator) * torch.logspace(0, -2, 32)
    return (data @ Q.T + torch.linspace(-0.5, 0.5, 32)).reshape(count, *SHAPE).float()


def network(shape=SHAPE):
    torch.manual_seed(0)
    return UNet(shape, channels=8, multipliers=(1,), blocks=(1,), groups=4, embedding=8)


def save(folder, **options):
    save_checkpoint(folder, network(), SCHEDULE, shape=SHAPE, **options)
    return folder


def affine(splitting):
    """The matrices (T, D, D) and offsets (T, D) of a splitting."""
    D = splitting.kappa.shape[1]
    Q = torch.eye(D, dtype=torch.float64) if splitting.basis is None else splitting.basis
    return Q * splitting.kappa[:, None] @ Q.T, splitting.offset @ Q.T


def assert_same_map(got, expected, tolerance=1e-5):
    for one, other in zip(affine(got), affine(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * float(other.abs().max()))


@pytest.mark.parametrize("basis", BASES)
def test_a_checkpoint_makes_the_splitting_that_is_fitted_to_its_images(tmp_path, basis):
    images, chain = correlated(), SCHEDULE.chain(12)
    loaded = load_checkpoint(save(tmp_path, statistics=Statistics.of(images)))
    assert_same_map(loaded.splitting(chain, basis), Splitting.fitted(chain, images, basis))


@pytest.mark.parametrize("eigenvectors", [None, 3, 0])
def test_all_statistics_come_back_bit_for_bit(tmp_path, eigenvectors):
    statistics = Statistics.of(correlated(), eigenvectors)
    loaded = load_checkpoint(save(tmp_path, statistics=statistics, dtype=torch.float16)).statistics
    assert loaded.tensors().keys() == statistics.tensors().keys()
    for name, value in statistics.tensors().items():
        assert torch.equal(loaded.tensors()[name], value), name


def test_only_eigenvectors_above_the_floor_of_a_splitting_are_kept():
    statistics = Statistics.of(correlated())
    values, r = statistics.eigenvalues, statistics.eigenvectors.shape[1]
    assert 0 < r < 32
    assert values[r - 1] > 0.01 * values.mean() >= values[r]


@pytest.mark.parametrize("count", [1, 2, 9, 31])
def test_of_fewer_images_than_pixels_the_covariance_is_theirs(count):
    images = correlated(count)
    statistics, whole = Statistics.of(images), images.double().flatten(1)
    values, vectors = torch.linalg.eigh(torch.cov(whole.T, correction=0))
    values, r = values.flip(0).clamp_min(0), statistics.eigenvectors.shape[1]
    assert r == int((values > 0.01 * values.mean()).sum()) < count
    torch.testing.assert_close(statistics.eigenvalues.double(), values, rtol=1e-6, atol=1e-9)
    got = statistics.eigenvectors.double() @ statistics.eigenvectors.double().T
    vectors = vectors.flip(1)[:, :r]
    torch.testing.assert_close(got, vectors @ vectors.T, rtol=0, atol=1e-6)


def test_of_fewer_eigenvectors_the_rest_of_the_variance_is_the_same_in_all_directions():
    images, chain, r = correlated(), SCHEDULE.chain(6), 5
    values, vectors = torch.linalg.eigh(torch.cov(images.double().flatten(1).T, correction=0))
    spread = torch.cat([values[:-r].mean().expand(32 - r), values[-r:]])
    covariance = vectors * spread @ vectors.T
    statistics = Statistics.of(images, eigenvectors=r)
    assert statistics.eigenvectors.shape == (32, r)
    got, _ = affine(statistics.splitting(chain, "covariance"))
    for alpha, sigma, K in zip(*chain.before, got, strict=True):
        K_expected = sigma * torch.linalg.inv(alpha**2 * covariance + sigma**2 * torch.eye(32))
        torch.testing.assert_close(K, K_expected, rtol=0, atol=1e-5 * float(K_expected.abs().max()))


def test_of_no_eigenvectors_the_covariance_is_left_out():
    statistics = Statistics.of(correlated(), eigenvectors=0)
    assert statistics.tensors().keys() == {"mean", "variance", "frequencies"}


def test_more_eigenvectors_than_matter_are_not_kept():
    for number in (None, 32, 1000):
        got, expected = Statistics.of(correlated(), number), Statistics.of(correlated())
        assert torch.equal(got.eigenvalues, expected.eigenvalues)
        assert torch.equal(got.eigenvectors, expected.eigenvectors)


def test_eigenvectors_take_no_more_than_their_share_of_a_file_unless_asked_for(monkeypatch):
    monkeypatch.setattr(module, "MOST_ENTRIES", 32 * 4 + 3)
    assert Statistics.of(correlated()).eigenvectors.shape == (32, 4)
    assert Statistics.of(correlated(), eigenvectors=9).eigenvectors.shape == (32, 9)


@pytest.mark.parametrize("number", [-1, 2.0, True, "all"])
def test_a_number_of_eigenvectors_that_is_none_is_refused(number, tmp_path):
    words = "eigenvectors: None or an integer of at least 0 is required"
    with pytest.raises(ValueError, match=words):
        Statistics.of(correlated(), number)
    with pytest.raises(ValueError, match=words):
        fit(correlated(), tmp_path / "new", model=network(), steps=1, batch=2, eigenvectors=number)
    assert not (tmp_path / "new").exists()


def test_statistics_of_more_images_than_are_summed_at_once_are_those_of_all():
    images = correlated(9000)
    whole = images.double().flatten(1)
    got = Statistics.of(images)
    torch.testing.assert_close(got.mean.double().flatten(), whole.mean(0), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(got.variance.double().flatten(), whole.var(0, correction=0), rtol=1e-6, atol=0)
    expected = torch.linalg.eigvalsh(torch.cov(whole.T, correction=0)).flip(0)
    torch.testing.assert_close(got.eigenvalues.double(), expected, rtol=1e-6, atol=1e-9)


def test_frequencies_are_those_of_scipys_transform():
    from scipy.fft import dctn

    images = correlated()
    expected = torch.from_numpy(dctn(images.double().numpy(), axes=(2, 3), norm="ortho")).var(0, correction=0)
    torch.testing.assert_close(Statistics.of(images).frequencies.double(), expected, rtol=1e-6, atol=0)


def test_large_images_have_no_covariance_and_say_so(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "LARGEST", 31)
    loaded = load_checkpoint(save(tmp_path, statistics=Statistics.of(correlated())))
    loaded.splitting(SCHEDULE.chain(4), "frequencies")
    with pytest.raises(ValueError, match=r"basis: 'covariance' is not carried .* up to D = 31"):
        loaded.splitting(SCHEDULE.chain(4), "covariance")


@torch.no_grad()
@pytest.mark.parametrize("name", ["digits", "fashion"])
@pytest.mark.parametrize("basis", BASES)
def test_shipped_checkpoints_sample_the_same_in_parallel_with_every_splitting(name, basis):
    checkpoint = load_checkpoint(name)
    chain = checkpoint.schedule.chain(10)
    options = {"prediction": checkpoint.prediction}
    x = torch.randn(2, *checkpoint.shape, generator=torch.Generator().manual_seed(5))
    expected = sample(checkpoint.model, x, chain, method="sequential", **options).x_0
    out = sample(checkpoint.model, x, chain, splitting=checkpoint.splitting(chain, basis), error=1e-4, **options)
    assert out.solution.converged.all()
    assert (out.x_0 - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("basis", BASES)
def test_the_shipped_digits_carry_the_statistics_of_their_training_images(basis):
    pytest.importorskip("sklearn")
    from diffusion.training.data import digits

    checkpoint, chain = load_checkpoint("digits"), SCHEDULE.chain(5)
    assert_same_map(checkpoint.splitting(chain, basis), Splitting.fitted(chain, digits().train, basis))


@pytest.mark.parametrize(
    ("carried", "basis", "words"),
    [
        (None, "pixels", "carries no statistics"),
        ((torch.zeros(SHAPE), torch.ones(SHAPE)), "frequencies", "'frequencies' is not carried"),
        ((torch.zeros(SHAPE), torch.ones(SHAPE)), "covariance", "'covariance' is not carried"),
    ],
)
def test_an_older_checkpoint_says_what_it_lacks_and_what_to_do(tmp_path, carried, basis, words):
    loaded = load_checkpoint(save(tmp_path, statistics=carried))
    with pytest.raises(ValueError, match=rf"basis: .*{words}.*add_statistics.*Splitting\.fitted"):
        loaded.splitting(SCHEDULE.chain(4), basis)


def test_an_unknown_basis_is_named(tmp_path):
    loaded = load_checkpoint(save(tmp_path, statistics=Statistics.of(correlated())))
    with pytest.raises(ValueError, match=r"basis: .pixels., .* is required, got 'wavelets'"):
        loaded.splitting(SCHEDULE.chain(4), "wavelets")


def test_statistics_are_added_to_an_older_checkpoint_and_nothing_else_changes(tmp_path):
    images = correlated()
    save(tmp_path, statistics=(images.mean(0), images.var(0, correction=0)), extra={"steps": 3})
    before, header = read_tensors(tmp_path / "model.safetensors")
    add_statistics(tmp_path, images)
    after, header_after = read_tensors(tmp_path / "model.safetensors")
    assert header_after == header
    assert after.keys() - before.keys() == {"data.frequencies", "data.eigenvalues", "data.eigenvectors"}
    assert all(torch.equal(after[key], before[key]) for key in before)
    loaded = load_checkpoint(tmp_path)
    assert loaded.training["steps"] == 3
    assert_same_map(
        loaded.splitting(SCHEDULE.chain(4), "covariance"), Splitting.fitted(SCHEDULE.chain(4), images, "covariance")
    )


def test_statistics_of_other_images_are_not_added(tmp_path):
    images = correlated()
    save(tmp_path, statistics=Statistics.of(images))
    with pytest.raises(ValueError, match=r"images: those .* was trained on"):
        add_statistics(tmp_path, images + 0.1)


def test_images_of_no_batch_are_refused():
    for images in (torch.zeros(2, 4, 4), torch.zeros(0, 1, 4, 4), None):
        with pytest.raises(ValueError, match="images: a tensor"):
            Statistics.of(images)


def test_fit_carries_as_many_eigenvectors_as_are_asked_for(tmp_path):
    trained = fit(correlated(20), tmp_path, model=network(), steps=1, batch=2, eigenvectors=2)
    assert trained.statistics.eigenvectors.shape == (32, 2)


def test_fit_carries_statistics_and_adds_them_to_a_run_that_was_done_without(tmp_path):
    images = correlated(20)
    chain, expected = SCHEDULE.chain(4), Splitting.fitted(SCHEDULE.chain(4), images, "covariance")
    trained = fit(images, tmp_path, model=network(), steps=2, batch=4)
    assert_same_map(trained.splitting(chain, "covariance"), expected)
    path = tmp_path / "model.safetensors"
    tensors, header = load_file(path), {"config": json.dumps(json.loads((tmp_path / "config.json").read_text()))}
    for key in ("frequencies", "eigenvalues", "eigenvectors"):
        del tensors[f"data.{key}"]
    save_file(tensors, path, header)
    again = fit(images, tmp_path, model=network(), steps=2, batch=4, callback=lambda *_: pytest.fail("trained again"))
    assert_same_map(again.splitting(chain, "covariance"), expected)
    assert torch.equal(again.model.exit.weight, trained.model.exit.weight)
