"""What fn returns beside the state (`has_aux`), at a solution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..layout import leaves_of, rebuild
from ..problem import Problem
from .linearise import Good, is_wanted


def auxiliary(problem: Problem, finite: Tensor, z: Tensor, graph: bool) -> Any:
    """The aux of fn at z (B, T, D), in fn's own structure, each tensor (B, …) in memory of its own.

    graph: differentiable as z and what fn reads are, for the samples that are `finite` (B,); of the others it is the
    value alone, so that their NaN reaches no gradient. Costs one evaluation of fn, two where samples have failed.
    """
    graph = graph and is_wanted()
    if graph and bool(finite.all()):
        return _checked(problem.aux(z, problem.inputs), z.shape[0])
    with torch.no_grad():
        whole = _checked(problem.aux(z, problem.inputs), z.shape[0])
    if not graph or not bool(finite.any()):
        return whole
    good = Good.of(problem, finite)
    taken = good.take(z)
    part = _checked(problem.aux(taken, good.inputs), taken.shape[0])
    joined = iter([_put(good, *pair) for pair in zip(leaves_of(part, NAME), leaves_of(whole, NAME), strict=True)])
    return rebuild(whole, lambda: next(joined))


NAME = "the aux of fn"


def _checked(aux: Any, n: int) -> Any:
    """A copy of aux; raises TypeError or ValueError unless it is a structure of tensors (n, …)."""
    for leaf in (leaves := leaves_of(aux, NAME)):
        if leaf.dim() == 0 or leaf.shape[0] != n:
            raise ValueError(f"{NAME} must have leading dimension {n} like its argument, got shape {tuple(leaf.shape)}")
    own = iter([leaf.clone() for leaf in leaves])
    return rebuild(aux, lambda: next(own))


def _put(good: Good, part: Tensor, whole: Tensor) -> Tensor:
    """whole (B, …) with the good samples of part (n, …) in their places."""
    if good.rows is not None:
        return whole.index_copy(0, good.rows, part)
    return torch.where(good.mask.reshape(-1, *[1] * (whole.dim() - 1)), part, whole)
