"""A state held in shards: what is reduced over the ranks of a process group, and how one that fails tells the others.

Whatever a solve decides, it decides from per-sample numbers that were reduced over all features. `Whole` reduces
nothing: one process holds every feature. `Shards` adds up over the ranks of a group, and every rank gets the same bits,
hence takes the same decisions and makes the same exchanges.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Found = TypeVar("Found")


class Whole:
    """Every feature is here: reductions return what they are given, bit for bit."""

    many = False
    size = 1  # ranks

    def total(self, x: Tensor) -> Tensor:
        """Σ of x over all shards."""
        return x

    def summed(self, parts: list[Tensor]) -> list[Tensor]:
        """`total` of each, differentiable: the gradient is that of the sum of what all shards make of it."""
        return parts

    def largest(self, x: Tensor) -> Tensor:
        """The largest of x over all shards, NaN where one is."""
        return x

    def somewhere(self, mask: Tensor) -> Tensor:
        """Where mask, bool, is true in any shard."""
        return mask

    def everywhere(self, mask: Tensor) -> Tensor:
        """Where mask, bool, is true in every shard."""
        return mask

    def lengths(self, x: Tensor) -> Tensor:
        """‖x‖ per row of x (B, N), (B,) float64."""
        return torch.linalg.vector_norm(x.double(), dim=1)

    def entries(self, n: int) -> int:
        """The entries that all shards hold of what this one holds n of."""
        return n

    def coarsest(self, eps: float) -> float:
        """The largest of a machine epsilon over all shards."""
        return eps

    def any_claims(self, claim: bool) -> bool:
        """Whether a claim is true on any rank."""
        return claim

    def all_claim(self, claim: bool) -> bool:
        """Whether a claim is true on every rank."""
        return claim

    def check_alike(self, claim: bool, what: str) -> None:
        """Raises ValueError on every rank unless the claim is true on all of them, or on none."""

    def attempt(self, action: Callable[[], Found], otherwise: Callable[[], Found]) -> Found:
        """action(); where that fails and others wait for this rank, otherwise(), until the next exchange raises."""
        return action()

    def stage(self, action: Callable[[], Found]) -> Found:
        """action(), which exchanges nothing here; raises on every rank where it fails on one."""
        return action()


WHOLE = Whole()


class Shards(Whole):
    """Reductions over a process group whose ranks hold `own` of `whole` features of every sample.

    A message is one float64 vector: what is summed, and one number for every rank: the machine epsilon its map was
    seen to compute with, or −1 from a rank that has failed, at which all raise. The host reads these after every
    exchange, so that nobody waits inside the map for a rank that has gone.
    """

    many = True

    def __init__(self, group: Any) -> None:
        check_group(group)
        self.group = group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.own = self.whole = 1
        self._failure: Exception | None = None

    def holding(self, own: int, whole: int) -> Shards:
        """The same group, with what its ranks hold."""
        other = Shards(self.group)
        other.own, other.whole = own, whole
        return other

    def total(self, x: Tensor) -> Tensor:
        return self.reduced(x)[0].to(x.dtype)

    def summed(self, parts: list[Tensor]) -> list[Tensor]:
        total = _Total.apply(torch.cat([x.flatten() for x in parts]), self)
        split = total.split([x.numel() for x in parts])
        return [own.view_as(x) for own, x in zip(split, parts, strict=True)]

    def largest(self, x: Tensor) -> Tensor:
        return self.reduced(self.placed(x))[0].amax(0).to(x.dtype)

    def somewhere(self, mask: Tensor) -> Tensor:
        return self.reduced(mask)[0] > 0

    def everywhere(self, mask: Tensor) -> Tensor:
        return ~self.somewhere(~mask)

    def lengths(self, x: Tensor) -> Tensor:
        return self.total(x.double().square().sum(1)).sqrt()

    def entries(self, n: int) -> int:
        return n // self.own * self.whole

    def coarsest(self, eps: float) -> float:
        return self.reduced(torch.zeros(0, device="cpu"), eps)[1]

    def any_claims(self, claim: bool) -> bool:
        return self._count(claim) > 0

    def all_claim(self, claim: bool) -> bool:
        return self._count(claim) == self.size

    def _count(self, claim: bool) -> int:
        return int(self.reduced(torch.tensor([float(claim)], device="cpu"))[0])

    def check_alike(self, claim: bool, what: str) -> None:
        count = self._count(claim)
        if 0 < count < self.size:
            raise ValueError(f"group: ranks differ in {what}: {count} of {self.size} do; the same is required on all")

    def attempt(self, action: Callable[[], Found], otherwise: Callable[[], Found]) -> Found:
        try:
            return action()
        except Exception as error:  # whatever it was: the other ranks wait for this one
            self._failure = self._failure or error
            return otherwise()

    def stage(self, action: Callable[[], Found]) -> Found:
        found: list[Found] = []
        self.attempt(lambda: found.append(action()), lambda: None)
        self.coarsest(0.0)
        return found[0]

    def placed(self, x: Tensor) -> Tensor:
        """x in this rank's place of (ranks, …): summed over the ranks, it holds what each of them has."""
        places = torch.zeros(self.size, *x.shape, dtype=torch.float64, device=x.device)
        places[self.rank] = x
        return places

    def reduced(self, x: Tensor, eps: float = 0.0) -> tuple[Tensor, float]:
        """Σ of x over the ranks, float64, and the largest of their eps: the one all-reduce of all exchanges here."""
        device = exchanging(self.group, x.device)
        about = torch.zeros(self.size, dtype=torch.float64, device="cpu")
        about[self.rank] = eps if self._failure is None else -1.0
        message = torch.cat([x.reshape(-1).to(device, torch.float64), about.to(device)])
        self._exchange(lambda: dist.all_reduce(message, group=self.group))
        told = message[x.numel() :].tolist()
        self._raise(told)
        return message[: x.numel()].view(x.shape).to(x.device), max(told)

    def gathered(self, words: list[int]) -> Tensor:
        """(ranks, len(words)) int64, on the host: the words of every rank."""
        device = exchanging(self.group, torch.device("cpu"))
        own = torch.tensor(words, device=device)
        table = own.new_empty(self.size, len(words))
        self._exchange(lambda: dist.all_gather(list(table.unbind(0)), own, group=self.group))
        return table.cpu()

    def _exchange(self, collective: Callable[[], Any]) -> None:
        try:
            with torch.no_grad():
                collective()
        except RuntimeError as error:
            if self._failure is not None:
                self._raise([])
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RuntimeError(
                f"group: a rank died or did not answer within the group's time limit ({reason})"
            ) from error

    def _raise(self, told: list[float]) -> None:
        """Raises where a rank has failed, this one what it failed with."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        ranks = [str(rank) for rank, eps in enumerate(told) if eps < 0]
        if ranks:
            where = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(ranks)}"
            raise RuntimeError(f"group: solve failed on {where}; the error is reported there")


class _Total(torch.autograd.Function):
    """`Shards.total`; the gradient is summed over the ranks likewise."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shards: Shards) -> Tensor:
        ctx.shards = shards
        return shards.total(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _Total.apply(grads[0], ctx.shards), None


def check_group(group: Any) -> None:
    """Raises unless `group` is an initialised process group that this process belongs to."""
    if not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise TypeError(f"group must be a torch.distributed process group, got {type(group).__name__}")
    if dist.get_rank(group) < 0:
        raise ValueError("group must be one of whose ranks this process is")


def exchanging(group: Any, device: torch.device) -> torch.device:
    """Where the group exchanges what lies on `device`."""
    backend = str(dist.get_backend(group))
    if backend == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu") if backend == "gloo" else device
