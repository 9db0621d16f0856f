"""What the programs choose of the machine: the device, and the number of threads. The library leaves both alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def cores() -> int:
    """Return the number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Let torch use that many threads inside the block; None: as many as it does.

    Raises:
        ValueError: fewer than one, or more than there are cores.
    """
    if count is not None and not 1 <= count <= cores():
        raise ValueError(f"--threads: 1 to {cores()}, the cores of this machine, is required, got {count}")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count or before)
        yield
    finally:
        torch.set_num_threads(before)


def device_of(name: str) -> torch.device:
    """Return the device called auto, cpu, cuda or cuda:N.

    Raises:
        ValueError: there is no such device here, or it is of another kind.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):  # others lack float64, which the states are in
        raise ValueError(f"--device: auto, cpu, cuda or cuda:N is required, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices here")
    return device
