"""Emoji as small pictures in colour: how they are drawn and split, what is refused, and the shipped model of them."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion import invert, load_checkpoint, sample
from diffusion.training import emoji as module
from diffusion.training.emoji import EMOJI, EMOJI_FONT, drawn, emoji

Image = pytest.importorskip("PIL.Image")
CODES = [n for ranges in EMOJI.values() for first, last in ranges for n in range(first, last + 1)]


@pytest.fixture
def outlines():
    """A font without colours that has the faces."""
    matplotlib = pytest.importorskip("matplotlib")
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


def test_a_missing_font_says_how_to_get_it(tmp_path):
    path = tmp_path / "NotoColorEmoji.ttf"
    words = f"{path} is missing: apt-get install fonts-noto-color-emoji, or name the font's file"
    with pytest.raises(FileNotFoundError) as caught:
        emoji(path)
    assert str(caught.value) == words


def test_a_file_that_is_no_font_is_refused(tmp_path):
    (tmp_path / "font.ttf").write_bytes(b"no font")
    with pytest.raises(ValueError, match=r"font\.ttf: a font with bitmaps of size 109 is required"):
        emoji(tmp_path / "font.ttf")


def test_a_folder_is_no_font(tmp_path):
    with pytest.raises(ValueError, match="a file is required, got a folder"):
        emoji(tmp_path)


def test_a_font_without_colours_is_refused(outlines, monkeypatch):
    monkeypatch.setattr(module, "EMOJI", {"faces": ((0x1F600, 0x1F601),)})
    with pytest.raises(ValueError, match=r"DejaVuSans\.ttf: a font in colour is required"):
        emoji(outlines)


def test_a_picture_that_the_font_lacks_is_named(outlines):
    with pytest.raises(ValueError, match=r"the emoji U\+20 is missing"):
        drawn([0x20], outlines)


def test_a_pixel_is_the_mean_of_sixteen_on_white(outlines):
    from PIL import ImageDraw, ImageFont

    font = ImageFont.truetype(outlines, 109)
    canvas = Image.new("L", (128, 128), 255)
    left, top, right, bottom = font.getbbox("\U0001f600")
    place = (128 - left - right) // 2, (128 - top - bottom) // 2
    ImageDraw.Draw(canvas).text(place, "\U0001f600", font=font, fill=0)
    expected = np.asarray(canvas.reduce(4), dtype=np.float64) * (2 / 255) - 1
    got = drawn([0x1F600], outlines)
    assert got.shape == (1, 3, 32, 32)
    assert np.abs(got[0].numpy() - expected).max() <= 1.01 * 2 / 255  # both round to a byte
    assert got.min() < -0.5
    assert got[0, :, 0, 0].tolist() == [1, 1, 1]


def test_one_in_ten_is_held_out(monkeypatch, tmp_path):
    def numbered(points, path):
        images = torch.zeros(len(points), 3, 32, 32)
        images[:, 1, :, 0] = torch.tensor([CODES.index(n) for n in points], dtype=torch.float32)[:, None]
        return images

    monkeypatch.setattr(module, "drawn", numbered)
    font = tmp_path / "font.ttf"
    font.touch()
    data, count = emoji(font), len(CODES)
    held_out, others = list(range(0, count, 10)), [i for i in range(count) if i % 10]
    assert (count, len(held_out)) == (95, 10)
    assert data.test[:, 1, 0, 0].tolist() == held_out
    assert data.train[:, 1, 5, 0].tolist() == others
    assert data.train_labels.tolist() == [group_of(CODES[i]) for i in others]
    assert data.test_labels.tolist() == [group_of(CODES[i]) for i in held_out]


def group_of(code):
    return next(k for k, ranges in enumerate(EMOJI.values()) if any(a <= code <= b for a, b in ranges))


def test_no_emoji_is_listed_twice():
    assert len(set(CODES)) == len(CODES)


installed = pytest.mark.skipif(not EMOJI_FONT.is_file(), reason="the Debian package fonts-noto-color-emoji is needed")


@installed
def test_the_shipped_model_is_of_these_very_pictures():
    data, shipped = emoji(), load_checkpoint("emoji")
    values = data.train.contiguous().numpy().tobytes()
    assert hashlib.sha256(values).hexdigest() == shipped.training["settings"]["images"]
    assert (data.test - shipped.images).abs().max() < 1e-6


@installed
@torch.no_grad()
def test_the_shipped_model_draws_pictures_that_it_was_trained_on():
    shipped, train = load_checkpoint("emoji"), emoji().train.flatten(1)
    noise = torch.randn(4, *shipped.shape, generator=torch.Generator().manual_seed(0))
    out = sample(shipped.model, noise, shipped.schedule.chain(20), "sequential", prediction=shipped.prediction)
    between = torch.cdist(train, train).fill_diagonal_(torch.inf).min(1).values.median()
    assert (torch.cdist(out.x_0.flatten(1), train).min(1).values < 0.6 * between).all()


def each(got, expected):
    return (got - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)


@torch.no_grad()
def test_the_shipped_model_samples_the_same_in_parallel_at_the_default_error():
    shipped = load_checkpoint("emoji")
    chain, options = shipped.schedule.chain(20), {"prediction": shipped.prediction}
    noise = torch.randn(2, *shipped.shape, generator=torch.Generator().manual_seed(1))
    expected = sample(shipped.model, noise, chain, "sequential", **options).x_0
    for splitting in ("v", shipped.splitting(chain, "covariance")):
        out = sample(shipped.model, noise, chain, splitting=splitting, **options)
        assert (each(out.x_0, expected) <= 1e-3).all()
        assert out.converged.any()
        assert torch.equal(out.converged, out.error <= 1e-3)  # float32 may leave more


@torch.no_grad()
def test_a_picture_that_was_not_trained_on_comes_back_from_its_latent():
    shipped = load_checkpoint("emoji")
    chain, real = shipped.schedule.chain(20, spacing="quadratic"), shipped.images[:2]
    found = invert(shipped.model, real, chain, prediction=shipped.prediction, error=1e-3)
    again = sample(shipped.model, found.latent, chain, "sequential", prediction=shipped.prediction)
    assert found.converged.all()
    assert (again.x_0 - real).abs().max() < 2 / 255  # a grey level


def test_the_shipped_model_stays_small():
    from diffusion.models.checkpoint import SHIPPED

    assert sum(path.stat().st_size for path in (SHIPPED / "emoji").iterdir()) <= 3e6
