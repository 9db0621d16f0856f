"""Data sets: what is read is what was written, and each way a file can be wrong is named."""

import gzip
import os
import random
import socket
import struct
import sys
import zlib

import numpy as np
import pytest
import torch

from diffusion.training.data import class_folder, digits, fashion, image_folder, picture_files, read_picture


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
        (gzip.compress(idx(np.zeros((3, 5, 4))) + bytes(2**20)), "60 values announced by its header, more found"),
        (gzip.compress(bytes((0, 0, 8, 3)) + b"\xff" * 12), "at most 1,073,741,824 values are read"),
        (gzip.compress(idx(np.zeros((3, 5, 4))))[:10] + b"\xff" * 20, "not a whole gzip file"),
        (gzip.compress(idx(np.zeros((2, 5, 4)))), "2 t10k images but 3 labels"),
    ],
    ids=[
        "no archive",
        "cut short",
        "no header",
        "of two dimensions",
        "a value short",
        "longer than announced",
        "too much announced",
        "damaged",
        "of another length",
    ],
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


def test_what_is_transparent_becomes_grey(tmp_path):
    image = pytest.importorskip("PIL.Image")
    image.fromarray(np.zeros((4, 4, 4), dtype=np.uint8)).save(tmp_path / "a.png")
    palette = image.new("P", (4, 4))
    palette.putpalette([0, 0, 0])
    palette.save(tmp_path / "b.png", transparency=0)
    torch.testing.assert_close(image_folder(tmp_path, (3, 4, 4)), torch.full((2, 3, 4, 4), 128 / 127.5 - 1))


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


def test_what_is_named_like_a_picture_and_is_no_file_is_passed_over(tmp_path):
    grey_files(tmp_path, [7])
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "device.jpg").symlink_to("/dev/zero")
    (tmp_path / "nothing.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "circle.png").symlink_to(tmp_path / "circle.png")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(tmp_path / "socket.png"))
        assert picture_files(tmp_path) == picture_files(tmp_path, deep=True) == [tmp_path / "00.png"]
    (tmp_path / "00.png").unlink()
    with pytest.raises(ValueError, match="holds no file"):
        picture_files(tmp_path)


@pytest.mark.parametrize("kind", ["fifo", "folder", "device", "missing"])
def test_a_picture_that_is_no_file_is_refused_and_not_waited_for(tmp_path, kind):
    path = tmp_path / "a.png"
    {
        "fifo": os.mkfifo, "folder": os.mkdir, "device": lambda p: os.symlink("/dev/zero", p), "missing": lambda p: p,
    }[kind](path)  # fmt: skip
    with pytest.raises(FileNotFoundError if kind == "missing" else ValueError, match=r"a\.png"):
        read_picture(path, (1, 4, 4))


def test_linked_folders_are_read_and_circles_of_them_end(tmp_path):
    grey_files(tmp_path / "elsewhere" / "cat", [1, 2])
    grey_files(tmp_path / "all" / "dog", [3])
    (tmp_path / "all" / "cat").symlink_to(tmp_path / "elsewhere" / "cat")
    (tmp_path / "all" / "dog" / "up").symlink_to(tmp_path / "all")
    (tmp_path / "all" / "dog" / "here").symlink_to(".")
    names = [str(file.relative_to(tmp_path / "all")) for file in picture_files(tmp_path / "all", deep=True)]
    assert names == ["cat/00.png", "cat/01.png", "dog/00.png"]


@pytest.mark.parametrize(("width", "height"), [(30_000, 30_000), (12_000, 12_000), (2**26 + 1, 1), (1, 2**31 - 1)])
def test_a_picture_of_too_many_pixels_is_refused_unread(tmp_path, width, height):
    image = pytest.importorskip("PIL.Image")
    path = tmp_path / "a.png"
    image.new("L", (1, 1)).save(path)
    content = path.read_bytes()
    header = b"IHDR" + struct.pack(">2I", width, height) + content[24:29]  # the size that it claims
    path.write_bytes(content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:])
    with pytest.raises(ValueError, match=r"a\.png: cannot be read as a picture \(.*pixels"):
        read_picture(path, (1, 8, 8))


@pytest.mark.parametrize("shape", [(1, 0, 4), (1, 4, -1), (3, 2**20, 2**20)])
def test_pictures_cannot_be_scaled_to_any_size(tmp_path, shape):
    grey_files(tmp_path, [1])
    with pytest.raises(ValueError, match="shape: 1 to 67,108,864 pixels are required"):
        image_folder(tmp_path, shape)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_picture_that_is_damaged_anywhere_is_named_or_read(tmp_path, suffix):
    image = pytest.importorskip("PIL.Image")
    path = tmp_path / f"a.{suffix}"
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    image.fromarray(pixels).save(path)
    whole, draw = path.read_bytes(), random.Random(0)
    messages = []
    for kept in range(0, len(whole), 7):
        flipped = bytearray(whole)
        flipped[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        for content in (whole[:kept], bytes(flipped)):
            path.write_bytes(content)
            try:
                assert read_picture(path, (3, 4, 4))[0].abs().max() <= 1
            except ValueError as error:
                messages.append(str(error))
    assert len(messages) > len(whole) // 14
    assert all(message.startswith(f"{path}: ") for message in messages)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=rf"a\.{suffix}: cannot be read as a picture"):
        read_picture(path, (3, 4, 4))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr"])
def test_a_picture_of_one_colour_has_that_colour_in_every_mode(tmp_path, mode):
    image = pytest.importorskip("PIL.Image")
    colour = (255, 255, 255) if mode == "1" else (102,) * 3 if mode in ("L", "LA") else (51, 102, 204)
    picture = image.new("RGB", (8, 8), colour).convert(mode)
    path = tmp_path / ("a.jpg" if mode in ("CMYK", "YCbCr") else "a.png")
    picture.save(path, quality=100) if path.suffix == ".jpg" else picture.save(path)
    expected = torch.tensor(colour).view(3, 1, 1).expand(3, 4, 4) / 127.5 - 1
    # a palette of the web has steps of 51; JPEG rounds
    torch.testing.assert_close(read_picture(path, (3, 4, 4))[0], expected, rtol=0, atol=3 / 127.5)


def test_what_is_half_transparent_is_mixed_with_grey(tmp_path):
    image = pytest.importorskip("PIL.Image")
    image.new("RGBA", (4, 4), (0, 0, 0, 51)).save(tmp_path / "a.png")
    torch.testing.assert_close(image_folder(tmp_path, (3, 4, 4)), torch.full((1, 3, 4, 4), 102 / 127.5 - 1))


def test_pictures_of_different_sizes_are_cut_and_scaled_to_one(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for i, size in enumerate([(1, 1), (3, 300), (300, 3), (17, 11)]):
        image.new("L", size, 51).save(tmp_path / f"{i}.png")
    torch.testing.assert_close(image_folder(tmp_path, (1, 5, 7)), torch.full((4, 1, 5, 7), 51 / 127.5 - 1))
