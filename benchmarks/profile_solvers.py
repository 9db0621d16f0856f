"""The solvers of the profile, ours and the peers that are installed, each as a call on a counted map of one sample."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from kinsol import Kinsol
from profile_problems import Case
from torch import Tensor

from pydeqsolve import Anderson, Broyden, Picard, Stop, solve

CAP = 1000  # evaluations


class Over(Exception):  # noqa: N818  a run that ended as it should
    """The finest goal is reached, or the budget spent."""


class Counted:
    """The map of a case, (n, D) or (D,), which keeps ‖f(z) − z‖₂/scale of every evaluation: inf of a Jacobian product.

    Raises Over where that is no more than `finest`, and at the evaluation after the last one.
    """

    def __init__(self, case: Case, scale: float, finest: float) -> None:
        self.case, self.scale, self.finest = case, scale, finest
        self.start = case.start.clone()
        self.residuals: list[float] = []

    def __call__(self, z: Tensor) -> Tensor:
        self.check()
        f = self.case.fn(z)
        self.residuals.append(float((f - z).norm()) / self.scale)
        if self.residuals[-1] <= self.finest:
            raise Over
        return f

    def check(self) -> None:
        if len(self.residuals) >= CAP:
            raise Over

    def of_array(self, z: Any) -> Any:
        """f (D,) of z (D,), arrays of NumPy."""
        return self(torch.from_numpy(np.array(z, dtype=np.float64))[None])[0].numpy()

    def product(self, z: Any, v: Any) -> Any:
        """J(z) v (D,) of arrays (D,)."""
        z, v = self._counted(z, v)
        return torch.func.jvp(self.case.fn, (z,), (v,))[1][0].numpy()

    def transposed(self, z: Any, u: Any) -> Any:
        """J(z)ᵀ u (D,) of arrays (D,)."""
        z, u = self._counted(z, u)
        return torch.func.vjp(self.case.fn, z)[1](u)[0][0].numpy()

    def _counted(self, *arrays: Any) -> list[Tensor]:
        """The arrays of a product (1, D) each, which counts as an evaluation without a residual."""
        self.check()
        self.residuals.append(float("inf"))
        return [torch.from_numpy(np.array(x, dtype=np.float64))[None] for x in arrays]

    @property
    def array(self) -> Any:
        """The start, (D,)."""
        return self.start[0].numpy().copy()

    def reached(self, goal: float) -> int | None:
        """The evaluation, from 1, whose residual first met the goal."""
        return next((k for k, r in enumerate(self.residuals, start=1) if r <= goal), None)


Run = Callable[[Counted], object]


def ours(solver: Any) -> Run:
    # The map ends the run where the finest goal is met: a tolerance of a tenth of it is out of the way.
    def run(fn: Counted) -> None:
        stop = Stop(rtol=0.0, atol=0.1 * fn.finest * fn.scale, norm="l2", max_steps=CAP + 1)
        solve(fn, fn.start, solver=solver, stop=stop, gradient=None)

    return run


def of_torchdeq(name: str, **options: Any) -> Run:
    def run(fn: Counted) -> None:
        module = importlib.import_module(f"torchdeq.solver.{name}")
        with torch.no_grad():
            getattr(module, f"{name}_solver")(fn, fn.start, max_iter=CAP + 1, tol=0.0, **options)

    return run


def of_scipy(name: str, **options: Any) -> Run:
    """A quasi-Newton or Newton–Krylov method, whose own tolerance never ends it."""

    def run(fn: Counted) -> None:
        method = getattr(importlib.import_module("scipy.optimize"), name)
        method(lambda z: fn.of_array(z) - z, fn.array, f_tol=1e-300, maxiter=CAP + 1, **options)

    return run


def of_scipy_root(name: str, **options: Any) -> Run:
    def run(fn: Counted) -> None:
        root = importlib.import_module("scipy.optimize").root
        root(lambda z: fn.of_array(z) - z, fn.array, method=name, options=options)

    return run


def of_aa(memory: int, **options: Any) -> Run:
    """Its loop as its README has it: evaluate, safeguard, accelerate."""

    def run(fn: Counted) -> None:
        aa, z = importlib.import_module("aa"), fn.array
        accelerator = aa.AndersonAccelerator(z.size, min(memory, z.size), min_len=1, **options)
        for step in range(CAP + 1):
            before = z.copy()
            z = fn.of_array(before).copy()
            if not np.isfinite(z).all():
                break
            if step:
                accelerator.safeguard(z, before)
            accelerator.apply(z, before)

    return run


def of_kinsol(sundials: Kinsol, memory: int) -> Run:
    return lambda fn: sundials.solve(fn.of_array, fn.array, memory, 0.1 * fn.finest * fn.scale, CAP + 1)


OURS: dict[str, Run] = {
    "Picard": ours(Picard()),
    "Anderson(5), the default": ours(Anderson()),
    "Anderson(5, safeguard=10)": ours(Anderson(5, safeguard=10.0)),
    "Anderson(10)": ours(Anderson(10)),
    "Anderson(20)": ours(Anderson(20)),
    "Anderson(5, I)": ours(Anderson(5, kind="I")),
    "Anderson(10, I)": ours(Anderson(10, kind="I")),
    "Anderson(20, I)": ours(Anderson(20, kind="I")),
    "Broyden(10)": ours(Broyden(10)),
    "Broyden(10, bad)": ours(Broyden(10, kind="bad")),
    "Broyden(30)": ours(Broyden(30)),
    "Broyden(10, line_search=8)": ours(Broyden(10, line_search=8)),
    "Broyden(30, line_search=8)": ours(Broyden(30, line_search=8)),
}


def is_there(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def contenders(with_jax: bool) -> dict[str, Run]:
    """All that can run here, by name."""
    found = dict(OURS)
    if is_there("aa"):
        for memory in (5, 10):
            found[f"cvxgrp/aa({memory})"] = of_aa(memory, type1=False)
            found[f"cvxgrp/aa({memory}, I)"] = of_aa(memory, type1=True, regularization=1e-8)
    try:
        sundials = Kinsol()
        for memory in (5, 10):
            found[f"KINSOL fixed point({memory})"] = of_kinsol(sundials, memory)
    except OSError:
        pass
    if is_there("scipy"):
        found["SciPy anderson"] = of_scipy("anderson")
        found["SciPy broyden1"] = of_scipy("broyden1")
        found["SciPy broyden2"] = of_scipy("broyden2")
        found["SciPy newton_krylov"] = of_scipy("newton_krylov")
        found["SciPy hybr"] = of_scipy_root("hybr", xtol=1e-15, maxfev=CAP + 1)
        found["SciPy df-sane"] = of_scipy_root("df-sane", fatol=1e-300, ftol=0.0, maxfev=CAP + 1)
    if is_there("torchdeq"):
        found["TorchDEQ anderson"] = of_torchdeq("anderson")
        found["TorchDEQ broyden"] = of_torchdeq("broyden")
    if with_jax and is_there("jax"):
        found |= importlib.import_module("profile_jax").contenders()
    return found
