"""Three processes that form a gloo group: how they are started, meet, and what each has found is collected."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SIZES = {"pair": 2, "three": 3}
Everything = tuple[dict[str, list[dict[str, Any]]], list[int | None]]


def start(child: Callable[[int, Path], None], folder: Path, seconds: float = 200) -> Everything:
    """Runs child(rank, folder) in three processes: what they left in `folder`, by phase, and their exit codes."""
    context = torch.multiprocessing.get_context("spawn")
    children = [context.Process(target=child, args=(rank, folder)) for rank in range(3)]
    for process in children:
        process.start()
    end = time.monotonic() + seconds
    for process in children:
        process.join(max(0.0, end - time.monotonic()))
    hanging = [rank for rank, process in enumerate(children) if process.is_alive()]
    for rank in hanging:
        children[rank].kill()
        children[rank].join()
    assert not hanging, f"ranks {hanging} were still running after {seconds} s"
    phases = {phase: sorted(folder.glob(f"{phase}-*.pt")) for phase in (*SIZES, "lost")}
    found = {phase: [torch.load(path, weights_only=True) for path in paths] for phase, paths in phases.items()}
    return found, [process.exitcode for process in children]


def meet(rank: int, folder: Path) -> None:
    """Has this process join the others."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=3, timeout=timedelta(seconds=60)
    )


def of_group(everything: Everything, group: str) -> list[dict[str, Any]]:
    """What every rank of a group, "pair" or "three", came to."""
    found, codes = everything
    assert len(found[group]) == SIZES[group], f"exit codes {codes}"
    return found[group]
