"""Files are replaced in one move: what reaches the disk when, and what a crash or an interrupt anywhere leaves."""

import os
import stat

import pytest
import torch

from diffusion.models.files import read_tensors, write_json, write_tensors

A, B = ({"a": torch.full((3,), value)} for value in (1.0, 2.0))


def test_a_file_reaches_the_disk_before_its_name_and_its_name_before_the_writer_returns(tmp_path, monkeypatch):
    events, sync, move = [], os.fsync, os.replace

    def spied_sync(descriptor):
        about = os.fstat(descriptor)
        events.append("folder" if stat.S_ISDIR(about.st_mode) else f"file of {about.st_size} bytes")
        sync(descriptor)

    def spied_move(source, target):
        events.append("move")
        move(source, target)

    monkeypatch.setattr(os, "fsync", spied_sync)
    monkeypatch.setattr(os, "replace", spied_move)
    write_tensors(tmp_path / "a.safetensors", A, {})
    assert events == [f"file of {(tmp_path / 'a.safetensors').stat().st_size} bytes", "move", "folder"]


@pytest.mark.parametrize("call", ["open", "fsync", "replace"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, MemoryError])
def test_whatever_ends_a_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, call, error):
    path = tmp_path / "a.safetensors"
    write_tensors(path, A, {"version": "1"})

    def end(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_bytes" if call == "open" else f"os.{call}", end)
        with pytest.raises(error):
            write_tensors(path, B, {"version": "2"})
    tensors, metadata = read_tensors(path)
    assert (tensors["a"].tolist(), metadata) == ([1, 1, 1], {"version": "1"})
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_synced_is_no_failure(tmp_path, monkeypatch):
    sync = os.fsync

    def files_alone(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(22, "Invalid argument")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", files_alone)
    write_json(tmp_path / "a.json", {})
    assert (tmp_path / "a.json").read_text() == "{}\n"
