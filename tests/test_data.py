"""Data sets: what is read is what was written, and each way a file can be wrong is named."""

import gzip
import struct
import sys

import numpy as np
import pytest
import torch

from diffusion.data import class_folder, digits, fashion, image_folder


def idx(values):
    values = np.asarray(values, dtype=np.uint8)
    return bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


@pytest.fixture
def folder(tmp_path):
    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("t10k", 3)):
        images = generator.integers(0, 256, (count, 5, 4))
        (tmp_path / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (tmp_path / f"{split}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.arange(count))))
    return tmp_path


def test_idx_files_are_read_in_order_and_scaled(folder):
    data = fashion(folder)
    expected = np.random.default_rng(0).integers(0, 256, (6, 5, 4)) / 127.5 - 1
    assert np.allclose(data.train[:, 0], expected, atol=1e-6)
    assert data.test.shape == (3, 1, 5, 4)
    assert data.train_labels.tolist() == list(range(6))
    assert data.test_labels.tolist() == [0, 1, 2]


def test_missing_files_say_how_to_get_them(tmp_path):
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        fashion(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"not gzip", "not a whole gzip file"),
        (gzip.compress(idx(np.zeros((3, 5, 4))))[:-12], "not a whole gzip file"),
        (gzip.compress(b"\0\0"), "not an IDX file"),
        (gzip.compress(idx(np.zeros((3, 5)))), "not an IDX file of 3-dimensional"),
        (gzip.compress(idx(np.zeros((3, 5, 4)))[:-1]), "60 values announced by its header, 59 found"),
        (gzip.compress(idx(np.zeros((2, 5, 4)))), "2 t10k images but 3 labels"),
    ],
    ids=["no archive", "cut short", "no header", "of two dimensions", "a value short", "of another length"],
)
def test_damaged_idx_files_are_refused_by_reason(folder, content, words):
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        fashion(folder)


def test_the_split_of_the_digits_is_fixed_and_complete():
    datasets = pytest.importorskip("sklearn.datasets")
    data, again = digits(), digits()
    assert torch.equal(data.test, again.test)
    assert not torch.equal(data.test, digits(seed=1).test)
    everything = torch.cat([data.train, data.test])
    assert (len(data.train), len(data.test)) == (1500, 297)
    raw = torch.from_numpy(datasets.load_digits().images).float() / 8 - 1
    assert torch.equal(everything.flatten(1).unique(dim=0), raw.flatten(1).unique(dim=0))


def test_labels_stay_with_their_digits():
    datasets = pytest.importorskip("sklearn.datasets")
    raw, data = datasets.load_digits(), digits()
    for image, label in zip(data.test[:20], data.test_labels[:20], strict=True):
        source = np.flatnonzero((raw.images / 8 - 1 == image[0].numpy()).all((1, 2)))
        assert int(label) in raw.target[source]


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        digits()


def test_pictures_are_cut_in_the_middle_and_sorted_by_name(tmp_path):
    image = pytest.importorskip("PIL.Image")
    wide = np.zeros((4, 8, 3), dtype=np.uint8)
    wide[:, 2:6] = (255, 0, 51)
    image.fromarray(wide).save(tmp_path / "b.png")
    image.fromarray(np.full((4, 4), 255, dtype=np.uint8)).save(tmp_path / "a.PNG")
    (tmp_path / "notes.txt").write_text("no picture")
    images = image_folder(tmp_path, (3, 4, 4))
    assert torch.equal(images[0], torch.ones(3, 4, 4))
    torch.testing.assert_close(images[1, :, 1, 2], torch.tensor([1.0, -1.0, -0.6]))
    torch.testing.assert_close(images[1, :, 0, 0], torch.tensor([1.0, -1.0, -0.6]))


def test_colour_pictures_become_grey_where_one_channel_is_asked_for(tmp_path):
    image = pytest.importorskip("PIL.Image")
    image.fromarray(np.full((6, 6, 3), 128, dtype=np.uint8)).save(tmp_path / "a.png")
    torch.testing.assert_close(image_folder(tmp_path, (1, 3, 3)), torch.full((1, 1, 3, 3), 128 / 127.5 - 1))


def test_a_folder_that_gives_no_pictures_is_refused_by_reason(tmp_path):
    pytest.importorskip("PIL.Image")
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        image_folder(tmp_path / "nowhere", (1, 4, 4))
    with pytest.raises(ValueError, match="holds no file"):
        image_folder(tmp_path, (1, 4, 4))
    (tmp_path / "a.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="1 or 3 channels"):
        image_folder(tmp_path, (2, 4, 4))
    with pytest.raises(ValueError, match=r"a\.jpg: cannot be read"):
        image_folder(tmp_path, (1, 4, 4))


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    image = pytest.importorskip("PIL.Image")
    image.fromarray(np.full((4, 4), 51 * 256, dtype=np.uint16)).save(tmp_path / "a.png")
    torch.testing.assert_close(image_folder(tmp_path, (1, 4, 4)), torch.full((1, 1, 4, 4), 51 / 127.5 - 1))


def test_what_is_transparent_becomes_white(tmp_path):
    image = pytest.importorskip("PIL.Image")
    image.fromarray(np.zeros((4, 4, 4), dtype=np.uint8)).save(tmp_path / "a.png")
    palette = image.new("P", (4, 4))
    palette.putpalette([0, 0, 0])
    palette.save(tmp_path / "b.png", transparency=0)
    assert torch.equal(image_folder(tmp_path, (3, 4, 4)), torch.ones(2, 3, 4, 4))


def test_a_picture_is_turned_as_its_camera_recorded(tmp_path):
    image = pytest.importorskip("PIL.Image")
    upright = np.zeros((4, 4), dtype=np.uint8)
    upright[0] = 255
    exif = image.Exif()
    exif[0x0112] = 3  # taken upside down
    image.fromarray(upright[::-1]).save(tmp_path / "a.png", exif=exif)
    assert (image_folder(tmp_path, (1, 4, 4))[0, 0, 0] == 1).all()


def test_pictures_of_floating_point_are_refused(tmp_path):
    image = pytest.importorskip("PIL.Image")
    image.fromarray(np.zeros((4, 4), dtype=np.float32)).save(tmp_path / "a.jpg", format="TIFF")
    with pytest.raises(ValueError, match=r"a\.jpg.*8 or 16 bits per pixel are required, got mode F"):
        image_folder(tmp_path, (1, 4, 4))


def grey_files(folder, values):
    image = pytest.importorskip("PIL.Image")
    folder.mkdir(parents=True, exist_ok=True)
    for i, value in enumerate(values):
        image.fromarray(np.full((4, 4), value, dtype=np.uint8)).save(folder / f"{i:02}.png")


def test_the_classes_of_a_folder_are_its_subfolders(tmp_path):
    for split, offset in (("train", 0), ("test", 100)):
        for k, name in enumerate(("cat", "dog")):
            grey_files(tmp_path / split / name, [offset + k] * 3)
    data = class_folder(tmp_path, (1, 4, 4))
    pixels = ((data.train[:, 0, 0, 0] + 1) * 127.5).round().long()
    assert torch.equal(pixels, data.train_labels)
    assert data.train_labels.tolist() == data.test_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.test.min() > data.train.max()


def test_without_a_split_every_tenth_picture_is_held_out(tmp_path):
    grey_files(tmp_path, range(25))
    data = class_folder(tmp_path, (1, 4, 4))
    pixels = [((x[:, 0, 0, 0] + 1) * 127.5).round().long().tolist() for x in (data.test, data.train)]
    assert pixels == [[0, 10, 20], [i for i in range(25) if i % 10]]
    assert len(class_folder(tmp_path, (1, 4, 4), most=8).train) == 8
