"""Network evaluations shared between the ranks of a `torch.distributed` process group.

Every rank holds the whole problem and takes the same steps; only the model's rows are divided. So every rank must be
given the same arguments, which is checked once by digests of fixed size before anything whose shape depends on them is
exchanged, and must ask for the same rows in every round, which is checked with every exchange: ranks that disagree get
an error, not a hang or a wrong image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .digest import digest

SLOTS = 64  # words that a rank sends of its settings: their names, one digest each, and whether it has a callback
PRIVATE = {"group", "progress", "callback"}  # what every rank may have its own of
GO_ON, STOP, FAILED = 0, 1, 2


def check_group(group: Any) -> None:
    """Raises unless `group` is an initialised process group that this process belongs to."""
    if not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise TypeError(f"group: a torch.distributed process group is required, got {type(group).__name__}")
    if dist.get_rank(group) < 0:
        raise ValueError("group: this process is not one of its ranks")


def agree(group: Any, settings: Mapping[str, Any]) -> Callable[..., bool] | None:
    """Raises on every rank of the group unless all were given the same settings; before any other exchange.

    Args:
        group: a torch.distributed process group.
        settings: the arguments of the call, by name. `progress` and `callback` may differ.

    Returns:
        A callback(...) that stops all ranks once that of one of them says so, if any has one; else None.

    Raises:
        TypeError: `group` is no process group.
        ValueError: ranks disagree, with the names of the settings they disagree on.
        RuntimeError: a rank died or did not answer within the group's time limit.
    """
    check_group(group)
    compared = {name: value for name, value in settings.items() if name not in PRIVATE}
    compared |= {"generator": _drawn_from(settings), "autocast": _autocast()}
    names, own = sorted(compared), settings.get("callback")
    # what asks for gradients matters where one is taken
    with torch.set_grad_enabled(torch.is_grad_enabled() and settings.get("gradient") is not None):
        words = [digest(names), *(_safe_digest(compared[name]) for name in names)]
    words += [0] * (SLOTS - 1 - len(words)) + [int(own is not None)]
    table = _gather(group, torch.tensor(words, device=_device(group))).cpu()
    odd = (table[:, :-1] != table[0, :-1]).any(0).tolist()
    if odd[0]:
        raise ValueError("group: the same version of this package is required on every rank")
    different = [name for name, differs in zip(names, odd[1:], strict=False) if differs]
    if different:
        others = (table[:, :-1] != table[0, :-1]).any(1).nonzero()[:, 0].tolist()
        raise ValueError(
            f"group: ranks disagree on {', '.join(different)}: the same is required on every rank in shape, dtype and "
            f"value (latents, noises and generators from one seed); other than rank 0: {', '.join(map(str, others))}"
        )
    return _shared_callback(group, own) if bool(table[:, -1].any()) else None


def _drawn_from(settings: Mapping[str, Any]) -> Any:
    """What the noises of the chain are drawn from; None where none are drawn."""
    chain, latent, generator = (settings.get(name) for name in ("chain", "latent", "generator"))
    if settings.get("noises") is not None or not getattr(chain, "eta", 0):
        return None
    if generator is not None:
        return generator
    if isinstance(latent, Tensor) and latent.is_cuda:
        return torch.cuda.get_rng_state(latent.device)
    return torch.get_rng_state()


def _autocast() -> list[Any]:
    kinds = ("cpu", "cuda")
    return [torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None for kind in kinds]


def _safe_digest(value: Any) -> int:
    try:
        return digest(value)
    except Exception as error:  # a rank that cannot read an argument must answer nevertheless: the others wait
        return digest(repr(type(error)))


def _device(group: Any) -> torch.device:
    """Where the group exchanges tensors of its own."""
    on_gpu = dist.get_backend(group) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def _shared_callback(group: Any, own: Callable[..., Any] | None) -> Callable[..., bool]:
    def callback(*seen: Any) -> bool:
        answer, failure = GO_ON, None
        try:
            if own is not None and own(*seen):
                answer = STOP
        except Exception as error:  # the other ranks wait for an answer
            answer, failure = FAILED, error
        answers = _gather(group, torch.tensor([answer], device=_device(group))).flatten().tolist()
        if failure is not None:
            raise failure
        if FAILED in answers:
            rank = answers.index(FAILED)
            raise RuntimeError(f"group: the callback failed on rank {rank}; its error is reported there")
        return STOP in answers

    return callback


def evaluate_shared(evaluate: Callable[..., Tensor], rows: Sequence[Tensor], group: Any) -> Tensor:
    """evaluate(*rows), (n, …) → (n, D), each rank doing its share of the n rows; all get all.

    Every rank evaluates ⌈n / ranks⌉ rows: where they do not divide, the last row is done more than once. So every rank
    makes the same calls of the model, which a model with collectives of its own (FSDP, DDP with buffers) needs.

    Raises:
        RuntimeError: a rank failed, died, did not answer within the group's time limit, asked for other rows, or its
            model answered in another dtype or width.
    """
    n = len(rows[0])
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    share = -(-n // ranks)
    mine = torch.arange(rank * share, (rank + 1) * share, device=rows[0].device).clamp_(max=max(n - 1, 0))
    failure: Exception | None = None
    local = rows[0]
    try:
        local = evaluate(*[x[mine] for x in rows]) if n else rows[0]
    except Exception as error:  # whatever the model raised: the other ranks wait for an answer
        failure = error
    about = [n, failure is not None, digest(local.dtype), local.shape[1:].numel()]
    wanted, failed, dtypes, widths = _gather(group, torch.tensor(about, device=rows[0].device)).cpu().unbind(1)
    if failure is not None:
        raise failure
    if bool(failed.any()):
        raise RuntimeError(f"group: the model failed on rank {int(failed.nonzero()[0])}; its error is reported there")
    if bool((wanted != n).any()):
        raise RuntimeError(
            f"group: ranks disagree on the rows requested ({wanted.tolist()}): check that model and inputs are "
            "identical, and that the machines compute alike"
        )
    if bool((dtypes != dtypes[0]).any() | (widths != widths[0]).any()):
        raise RuntimeError(
            "group: ranks disagree on the dtype or shape of the model's answer; here "
            f"{local.dtype}, {tuple(local.shape[1:])}: check that the models are identical"
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
