"""The adjoint's Krylov solve on a device: what the kernels need there, and what the host reads of it.

A pass is a few launches on the current stream; none waits. The host reads how many samples go on when it has queued
`LATE` further products, so that the device always has work; it waits for the last answer at the end of a cycle.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

LATE = 2  # products queued before the host reads what became of one
TOGETHER = 8  # columns in one piece of memory
GOING, ACTIVE, UNSOUND, CHANGED, FAILED = range(5)  # places in the counts, csrc/krylov_device.h


class Counts:
    """Numbers of samples, which a kernel writes and the host reads when it has come so far."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.there = torch.empty(size, dtype=torch.int64, device=device)
        self.queued: deque[tuple[Tensor, Any]] = deque()

    def queue(self) -> None:
        """Has what the device writes next come to the host."""
        if not self.there.is_cuda:
            self.queued.append((self.there.clone(), None))
            return
        here = torch.empty(self.there.shape, dtype=torch.int64, device="cpu", pin_memory=True)
        here.copy_(self.there, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.there.device))
        self.queued.append((here, event))

    def oldest(self) -> list[int]:
        """The first that was queued; waits for it alone."""
        here, event = self.queued.popleft()
        if event is not None:
            event.synchronize()
        return here.tolist()

    def newest(self) -> list[int]:
        """The last that was queued, and none before it."""
        while len(self.queued) > 1:
            self.queued.popleft()
        return self.oldest()


class DeviceKrylov:
    """One solve for g (B, …) on a device, by the methods of the native module's solve on the host.

    Each takes addresses and, last, a number of threads of the host, and returns a number of samples: `begin` all of
    them, `append` those that went on `LATE` products ago. kernels: the native module, or what stands for it.
    """

    def __init__(self, g: Tensor, most: int, kernels: Any) -> None:
        self.kernels, self.g, self.B = kernels, g, len(g)
        N = g.numel() // self.B
        place: Any = {"device": g.device}
        self.samples = torch.empty(self.B * kernels.KRYLOV_SAMPLE_BYTES, dtype=torch.uint8, **place)
        self.places = torch.empty(2 * most + 1, dtype=torch.int64, **place)  # of vectors, then of columns
        doubles = kernels.krylov_workspace_doubles(self.B, N, most)
        self.workspace = torch.empty(doubles, dtype=torch.float64, **place)
        self.counts = Counts(kernels.KRYLOV_COUNTS, g.device)
        self.k, self.q0 = 0, 0  # products of this cycle, address of its first vector
        self.columns: list[int] = []
        self.memory: list[Tensor] = []  # of the columns
        self.call = kernels.KrylovCall()
        self._set(
            B=self.B, N=N, most=most, eps=torch.finfo(g.dtype).eps, is_double=g.dtype == torch.float64,
            g=g.data_ptr(), samples=self.samples.data_ptr(), vectors=self.places.data_ptr(),
            columns=self.places[most + 1 :].data_ptr() if most else 0, workspace=self.workspace.data_ptr(),
            counts=self.counts.there.data_ptr(),
        )  # fmt: skip

    def begin(
        self, mask: int, rtol: float, atol: float, rtols: int, atols: int, eps: float, q0: int, _threads: int
    ) -> int:
        self.q0 = q0
        self._start_cycle()
        self._run("begin", mask=mask, rtol=rtol, atol=atol, rtols=rtols, atols=atols, rounding=eps, next=q0)
        return self.B

    def append(self, product: int, following: int, _threads: int) -> int:
        k, self.k = self.k, self.k + 1
        self._run("append", k=k, product=product, next=following, column=self._column(k))
        self.call.aligned = self.call.aligned and following % 16 == 0
        self._run("count")
        self.counts.queue()
        return self.counts.oldest()[GOING] if len(self.counts.queued) > LATE else self.B

    def combine(self, cautious: bool, u: int, out: int, _threads: int) -> int:
        self._run("combine", cautious=cautious, u=u, next=out)
        return self.B if cautious else self._counted(UNSOUND)

    def accept(self, u1: int, product1: int, u2: int, product2: int, u: int, _threads: int) -> int:
        self._start_cycle()
        self._run("accept", u1=u1, product=product1, u2=u2, product2=product2, u=u, next=self.q0)
        return self._counted(ACTIVE)

    def raise_(self, u: int, _threads: int) -> int:
        self._run("raise", u=u)
        return self._counted(CHANGED)

    def lower(self, values: int, raised: int, _threads: int) -> int:
        self._run("lower", values=values, raised=raised)
        return self._counted(CHANGED)

    def remeasure(self, u: int, product: int, _threads: int) -> None:
        self._run("remeasure", u1=u, product=product)

    def judge(self, adjoint: bool, follows: bool, eps: float, status: int, residual: int, evaluations: int) -> int:
        self._run("judge", adjoint=adjoint, follows=follows, rounding=eps, status=status, residual=residual,
                  evaluations=evaluations)  # fmt: skip
        return self._counted(FAILED)

    def _start_cycle(self) -> None:
        self.k, self.call.aligned = 0, self.q0 % 16 == 0
        self.counts.queued.clear()

    def _column(self, k: int) -> int:
        """The address of column k, (B, k + 4) float64."""
        if k == len(self.columns):
            sizes = [self.B * (j + 4) for j in range(k, min(k + TOGETHER, self.call.most))]
            self.memory.append(torch.empty(sum(sizes), dtype=torch.float64, device=self.g.device))
            self.columns += [part.data_ptr() for part in self.memory[-1].split(sizes)]
        return self.columns[k]

    def _counted(self, which: int) -> int:
        """Counts the samples, and waits for the answer."""
        self._run("count")
        self.counts.queue()
        return self.counts.newest()[which]

    def _run(self, name: str, **fields: Any) -> None:
        self._set(**fields)
        if not self.g.is_cuda:
            self.kernels.krylov(name, self.call)
            return
        with torch.cuda.device(self.g.device):
            self.call.stream = torch.cuda.current_stream(self.g.device).cuda_stream
            self.kernels.krylov(name, self.call)

    def _set(self, **fields: Any) -> None:
        for name, value in fields.items():
            setattr(self.call, name, value)
