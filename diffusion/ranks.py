"""Model rows shared between the ranks of a `torch.distributed` process group.

Every rank holds the whole problem and takes the same steps; only the model rows are divided. So every rank must be
given the same latents, noises and conditioning, which is checked once, and must ask for the same rows in every round,
which is checked with every exchange: ranks that disagree get an error, not a hang or a wrong image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def check_group(group: Any) -> None:
    """Raises unless `group` is an initialised process group that this process belongs to."""
    if not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise TypeError(f"group: a torch.distributed process group is required, got {type(group).__name__}")
    if dist.get_rank(group) < 0:
        raise ValueError("group: this process is not one of its ranks")


def check_alike(group: Any, name: str, x: Tensor, hint: str) -> None:
    """Raises ValueError on every rank unless all hold the same x, bit for bit. Moves x once."""
    sizes = _gather(group, torch.tensor([x.numel()], device=x.device))
    if len(set(sizes.flatten().tolist())) > 1:
        raise ValueError(f"{name}: the same shape is required on every rank of the group; {hint}")
    first = x.contiguous().clone()
    _exchange(lambda: dist.broadcast(first, dist.get_global_rank(group, 0), group=group))
    same = torch.equal(first.view(torch.uint8), x.contiguous().view(torch.uint8))
    if not bool(_gather(group, torch.tensor([same], device=x.device, dtype=torch.int64)).all()):
        raise ValueError(f"{name}: the same values are required on every rank of the group; {hint}")


def evaluate_shared(evaluate: Callable[..., Tensor], rows: Sequence[Tensor], group: Any) -> Tensor:
    """evaluate(*rows), (n, …) → (n, D), each rank doing its share of the n rows; all get all.

    Every rank evaluates ⌈n / ranks⌉ rows: where they do not divide, the last row is done more than once. So every rank
    makes the same calls of the model, which a model with collectives of its own (FSDP, DDP with buffers) needs.

    Raises:
        RuntimeError: a rank failed, died, did not answer within the group's time limit, or asked for other rows.
    """
    n = len(rows[0])
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    share = -(-n // ranks)
    mine = torch.arange(rank * share, (rank + 1) * share, device=rows[0].device).clamp_(max=max(n - 1, 0))
    failure: Exception | None = None
    try:
        local = evaluate(*[x[mine] for x in rows]) if n else rows[0]
    except Exception as error:  # whatever the model raised: the other ranks wait for an answer
        failure = error
    report = torch.tensor([n, failure is not None], device=rows[0].device, dtype=torch.int64)
    counts, failed = _gather(group, report).unbind(1)
    if failure is not None:
        raise failure
    if bool(failed.any()):
        raise RuntimeError(f"group: the model failed on rank {int(failed.nonzero()[0])}; its error is reported there")
    if bool((counts != n).any()):
        raise RuntimeError(
            f"group: the ranks went apart, they want {counts.tolist()} rows: the machines compute alike?"
        )
    return _gather(group, local.contiguous()).flatten(0, 1)[:n] if n else local


def sum_shared(x: Tensor, group: Any) -> Tensor:
    """The sum over all ranks of their x, on every rank."""
    total = x.clone()
    _exchange(lambda: dist.all_reduce(total, group=group))
    return total


def _gather(group: Any, x: Tensor) -> Tensor:
    """(ranks, …) the x (…) of every rank."""
    out = x.new_empty(dist.get_world_size(group), *x.shape)
    _exchange(lambda: dist.all_gather(list(out.unbind(0)), x, group=group))
    return out


def _exchange(collective: Callable[[], Any]) -> None:
    try:
        collective()
    except RuntimeError as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RuntimeError(f"group: a rank died or did not answer within the group's time limit ({reason})") from error
