"""The adjoint solves of compiled graphs as operators, which know tensors alone, and how they are told of.

`torch.ops.pydeqsolve.ticket` draws a number in the forward pass; `torch.ops.pydeqsolve.adjoint` solves in the backward
pass, leaves the outcome under that number, and warns or raises as `Implicit` says.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ..loop.held import held
from ..solution import Recorder
from ..stop import Stop
from .adjoint import AdjointSolve
from .gmres import GMRES
from .linear import Products
from .linearise import Good

_numbers = itertools.count(1)
_library = torch.library.Library("pydeqsolve", "FRAGMENT")
# A compiler that took two tickets for one would mix up two solves.
_library.define("ticket(Tensor z) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))
_library.define(
    "adjoint(str graph, Tensor g, Tensor bounds, Tensor ticket, float eps, Tensor[] tensors, SymInt[] sizes, "
    "int restart, bool follows, str on_failure) -> Tensor",
    tags=(torch.Tag.nondeterministic_seeded,),
)


def drawn(z: Tensor) -> Tensor:
    """The ticket, () int64, of a solve whose solution is z."""
    number: Tensor = torch.ops.pydeqsolve.ticket(z)
    return number


def solved(
    products: Products, g: Tensor, bounds: Tensor, ticket: Tensor, eps: float, restart: int, follows: bool,
    on_failure: str,
) -> Tensor:  # fmt: skip
    """u (B, T, D) of u = g + products(u), zero but for good samples, and told of as `Implicit` says.

    bounds (B, 4): whether a sample is good, rtol, atol and the number of products allowed. Raises ConvergenceError
    where a sample has failed and on_failure is "raise".
    """
    mask = bounds[:, 0] != 0
    whole = bool(mask.all())
    rtol, atol = (_plain(x) for x in bounds[:, 1:3].unbind(1))
    stop = Stop(rtol, atol, int(bounds[0, 3]))
    how = AdjointSolve(GMRES(restart), stop, follows, on_failure, Recorder(ticket=ticket), eps)
    return how(products, g, Good(mask, None, [], whole))


def _plain(x: Tensor) -> float | Tensor:
    """Tolerances (B,) as a number where they are the same."""
    first = float(x[0])
    return first if bool((x == first).all()) else x.contiguous()


def _ticket(z: Tensor) -> Tensor:
    """A number that was never given before, () int64 on the host."""
    return torch.tensor(next(_numbers))


@torch.no_grad()
def _adjoint(
    graph: str, g: Tensor, bounds: Tensor, ticket: Tensor, eps: float, tensors: list[Tensor], sizes: list[int],
    restart: int, follows: bool, on_failure: str,
) -> Tensor:  # fmt: skip
    """`solved` with the products that are held as `graph`, in memory of its own."""
    u = solved(held(graph, tensors, sizes), g, bounds, ticket, eps, restart, follows, on_failure)
    return u.clone() if u is g else u


_library.impl("ticket", _ticket, "CompositeExplicitAutograd")
_library.impl("adjoint", _adjoint, "CompositeExplicitAutograd")


@torch.library.register_fake("pydeqsolve::ticket", lib=_library)
def _(z: Tensor) -> Tensor:
    return torch.empty((), dtype=torch.int64, device="cpu")


@torch.library.register_fake("pydeqsolve::adjoint", lib=_library)
def _(graph: str, g: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(g, memory_format=torch.contiguous_format)
