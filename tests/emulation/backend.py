"""The CUDA kernels on the CPU: builds csrc/cuda/*.cu under the emulator and calls it on CPU tensors.

`emulated_backend()` makes every solve inside it run on the emulated kernels instead of the native CPU step.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from pydeqsolve.loop import iterate
from pydeqsolve.step.backend import Backend
from pydeqsolve.step.records import Records
from pydeqsolve.step.ring import COUPLINGS, KINDS, STORAGES, Ring
from pydeqsolve.step.rules import Rule
from pydeqsolve.stop import NORMS, Front

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
MAX_SLOTS = 65  # csrc/step.h, kMaxSlots
# Sums keep their order and aliasing is as nvcc has it; the kernels ask for fused multiply-adds by name.
FLAGS = ("-std=gnu++17", "-fno-strict-aliasing", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-unknown-pragmas")


class CRing(ctypes.Structure):
    """`Ring` of csrc/step.h."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("storage", "slots", "head", "kind", "coupling")),
        *((name, ctypes.c_double) for name in ("ridge", "damping", "eps")),
        *((name, ctypes.c_int64) for name in ("samples", "blocks", "features", "sample_stride", "slot_stride")),
        *((name, ctypes.c_void_p) for name in ("R", "F", "gram", "steps_gram", "rhs", "squares", "count")),
    )


class CRule(ctypes.Structure):
    """`Rule` of csrc/step.h."""

    _fields_ = (*((name, ctypes.c_double) for name in ("safeguard", "eps", "divisor")), ("norm", ctypes.c_int32))


class Call(ctypes.Structure):
    """`Call` of csrc/step.h."""

    _fields_ = (
        ("ring", CRing), ("rule", CRule), ("n", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in (
            "rows", "wanted", "f", "z", "norms", "mode", "gamma", "dropped", "z_next", "table", "before", "best",
            "workspace", "stream",
        )), ("threads", ctypes.c_int32),
    )  # fmt: skip


def compiler() -> str:
    return os.environ.get("CXX") or shutil.which("g++") or "c++"


def compile_emulated(sources: Sequence[Path], output: Path, flags: Sequence[str], csrc: Path = CSRC) -> Path:
    """Compiles C++ `sources` that include the kernels of the folder `csrc` into `output`."""
    arguments = [compiler(), *FLAGS, *flags, f"-I{csrc}", f"-I{HERE}", "-o", str(output), *map(str, sources)]
    done = subprocess.run(arguments, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}\n{done.stderr}")
    return output


class Emulator:
    """The emulated step; arguments and results are those of `Backend`, but `ring.head` is already that of f."""

    def __init__(self, library: Path) -> None:
        self.library = self._library = ctypes.CDLL(str(library))
        for name in ("measure", "weights", "mix", "advance", "judge", "keep"):
            getattr(self._library, f"emulated_{name}").restype = ctypes.c_char_p
        self._library.emulated_call_bytes.restype = ctypes.c_int64
        assert self._library.emulated_call_bytes() == ctypes.sizeof(Call), "Call is not that of csrc/step.h"
        self._library.emulated_workspace_doubles.restype = ctypes.c_int64
        self._library.emulated_launches.restype = ctypes.c_int64

    def choose_schedule(self, schedule: int) -> None:
        """In which order threads run: 0 first to last, 1 last to first, others random with this seed."""
        self._library.emulated_choose_schedule(schedule)

    @property
    def launches(self) -> int:
        """Kernels launched so far."""
        return int(self._library.emulated_launches())

    def measure(
        self, ring: Ring, f: Tensor, z: Tensor, rows: Tensor | None, wanted: Tensor | None, norm: str
    ) -> Tensor:
        """Pass 1: norms (n, T, 2) of f, z (n, T, D)."""
        norms = torch.zeros(*f.shape[:2], 2, dtype=torch.float64)
        self._run("measure", _call(ring, rows, norm), wanted=wanted, f=f, z=z, norms=norms)
        return norms

    def weights(self, ring: Ring, mode: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """gamma (n, T, M) and dropped (n, T) of mode (n, T)."""
        gamma, dropped = _outputs(ring, mode)
        self._run("weights", _call(ring, rows), mode=mode, gamma=gamma, dropped=dropped)
        return gamma, dropped

    def mix(self, ring: Ring, gamma: Tensor, mode: Tensor, z: Tensor, rows: Tensor | None) -> Tensor:
        """The next iterate (n, T, D)."""
        z_next = torch.full_like(z, torch.nan)
        self._run("mix", _call(ring, rows), gamma=gamma, mode=mode, z=z, z_next=z_next)
        return z_next

    def advance(
        self, ring: Ring, z: Tensor, mode: Tensor, rows: Tensor | None, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Pass 2: the next iterate (n, T, D), in `out` if given, dropped (n, T) and gamma (n, T, M)."""
        gamma, dropped = _outputs(ring, mode)
        z_next = torch.full_like(z, torch.nan) if out is None else out
        self._run("advance", _call(ring, rows), mode=mode, gamma=gamma, dropped=dropped, z=z, z_next=z_next)
        return z_next, dropped, gamma

    def judge(self, samples: Records, norms: Tensor, dropped: Tensor | None, rule: Rule) -> Tensor:
        """Mode (n, T) of norms (n, T, 2); see `Backend.judge`."""
        n, T, _ = norms.shape
        mode = torch.full((n, T), 99, dtype=torch.uint8)
        call = Call(rule=CRule(rule.safeguard, rule.eps, rule.divisor, NORMS.index(rule.norm)))
        call.ring.blocks = T
        self._run("judge", call, norms=norms, dropped=dropped, table=samples.table, mode=mode)
        return mode

    def keep(self, best: Tensor, rows: Tensor, before: Tensor, samples: Records) -> None:
        """best[rows] = before where `samples` say so; see `Backend.keep`."""
        self._call("keep", ctypes.c_int64(len(rows)), ctypes.c_int64(best[0].nbytes), _at(samples.table), _at(rows),
                   _at(before), _at(best))  # fmt: skip

    def piece(self, n: int, T: int, D: int, slots: int, index: int) -> tuple[int, ...]:
        """Block, place in the counts, offset of slot 0, chunk, first and last feature of a piece; number of pieces.

        Of rows that lie sample by sample.
        """
        ring = CRing(blocks=T, features=D, sample_stride=slots * T * D, slot_stride=T * D, slots=slots)
        call = Call(ring=ring, n=n)
        out = (ctypes.c_int64 * 7)()
        self._library.emulated_piece(ctypes.byref(call), ctypes.c_int64(index), out)
        return tuple(out)

    def _run(self, name: str, call: Call, **tensors: Tensor | None) -> None:
        """A pass of n samples, n being the length of the tensors that it takes, with a workspace of the size asked."""
        call.n = next(len(x) for x in tensors.values() if x is not None)
        for field, tensor in tensors.items():
            setattr(call, field, _at(tensor))
        doubles = self._library.emulated_workspace_doubles(ctypes.byref(call)) if name != "judge" else 0
        workspace = torch.full((max(1, doubles),), torch.nan, dtype=torch.float64)
        call.workspace = _at(workspace)
        self._call(name, ctypes.byref(call))

    def _call(self, name: str, *arguments: object) -> None:
        error = getattr(self._library, f"emulated_{name}")(*arguments)
        if error:
            raise RuntimeError(f"{name}: {error.decode()}")


def _outputs(ring: Ring, mode: Tensor) -> tuple[Tensor, Tensor]:
    gamma = torch.zeros(*mode.shape, ring.slots, dtype=torch.float64)
    return gamma, torch.full(mode.shape, -99, dtype=torch.int32)


def _at(tensor: Tensor | None) -> ctypes.c_void_p:
    assert tensor is None or tensor.is_contiguous()
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _call(ring: Ring, rows: Tensor | None, norm: str = "rms") -> Call:
    """What a pass over the ring takes besides the tensors it reads and writes."""
    assert ring.R.stride() == ring.F.stride()
    B, _, T, D = ring.R.shape
    small = (ring.gram, ring.steps_gram, ring.rhs, ring.squares, ring.count)
    own = CRing(
        STORAGES.index(ring.dtype), ring.slots, ring.head, KINDS.index(ring.kind), COUPLINGS.index(ring.coupling),
        ring.ridge, ring.damping, ring.eps, B, T, D, *ring.R.stride()[:2], ring.R.data_ptr(), ring.F.data_ptr(),
        *map(_at, small),
    )  # fmt: skip
    return Call(ring=own, rule=CRule(norm=NORMS.index(norm)), rows=_at(rows))


@functools.cache
def emulator() -> Emulator:
    """The emulated step, built at the first call."""
    with tempfile.TemporaryDirectory(prefix="pydeqsolve-emulated-") as folder:
        library = compile_emulated([HERE / "emulated.cpp"], Path(folder) / "emulated.so", ["-O1", "-fPIC", "-shared"])
        return Emulator(library)  # once loaded it needs no file


class EmulatedBackend(Backend):
    """The emulated kernels as the backend of a ring."""

    def __init__(self, ring: Ring, rule: Rule, front: Front | None, kernels: Emulator) -> None:
        super().__init__(ring, rule, front)
        self.kernels = kernels

    def measure(self, f: Tensor, z: Tensor, rows: Tensor, wanted: Tensor | None) -> Tensor:
        self._turn()
        wanted = None if wanted is None else wanted.contiguous()
        return self.kernels.measure(self.ring, f, z, rows, wanted, self.rule.norm)

    def judge(self, samples: Records, norms: Tensor, dropped: Tensor | None) -> tuple[Tensor, int | None, int | None]:
        return self.kernels.judge(samples, norms, dropped, self.rule), None, None

    def keep(self, best: Tensor, rows: Tensor, before: Tensor, samples: Records) -> None:
        self.kernels.keep(best, rows, before, samples)

    def advance(self, z: Tensor, mode: Tensor, rows: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z_next, dropped, _ = self.kernels.advance(self.ring, z, mode, rows, out)
        return z_next, dropped


@contextmanager
def emulated_backend(schedule: int = 0) -> Iterator[Emulator]:
    """Inside it every solve takes its steps on the emulated CUDA kernels, where a device would take native ones."""
    kernels = emulator()
    kernels.choose_schedule(schedule)

    def choose(ring: Ring, rule: Rule, front: Front | None = None) -> Backend:
        return Backend(ring, rule, front) if ring.slots > MAX_SLOTS else EmulatedBackend(ring, rule, front, kernels)

    # A device has neither steps of the host that are used again nor those of few unknowns.
    replaced = {
        "choose": choose,
        "is_few": lambda *_: False,
        "reuse": mock.Mock(key_of=lambda *_: None, take=lambda *_: None),
    }
    with mock.patch.multiple(iterate, **replaced):
        yield kernels
