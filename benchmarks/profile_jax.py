"""jaxopt and optimistix as contenders of the profile: JAX calls the map back in PyTorch, where it is counted."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from profile_solvers import CAP, Counted, Run, is_there

jax.config.update("jax_enable_x64", True)
logging.getLogger("jax").setLevel(logging.CRITICAL)  # it logs each run that the map ends

_now: list[Counted] = []  # the map being solved: compiled solvers are kept by dimension, whatever the map


def _value(z: Any) -> Any:
    return np.asarray(_now[0].of_array(z))


def _product(z: Any, v: Any) -> Any:
    return np.asarray(_now[0].product(z, v))


def _transposed(z: Any, u: Any) -> Any:
    return np.asarray(_now[0].transposed(z, u))


@jax.custom_jvp
def fn(z: Any) -> Any:
    """f (D,) of z (D,)."""
    return jax.pure_callback(_value, jax.ShapeDtypeStruct(z.shape, z.dtype), z, vmap_method="sequential")


@fn.defjvp
def _fn_jvp(primals: Any, tangents: Any) -> Any:
    z, v = primals[0], tangents[0]
    return fn(z), jax.pure_callback(_product, jax.ShapeDtypeStruct(z.shape, z.dtype), z, v, vmap_method="sequential")


@jax.custom_vjp
def fn_reverse(z: Any) -> Any:
    """fn, for those who take gradients backwards."""
    return fn(z)


def _backward(z: Any, u: Any) -> tuple[Any]:
    return (jax.pure_callback(_transposed, jax.ShapeDtypeStruct(z.shape, z.dtype), z, u, vmap_method="sequential"),)


fn_reverse.defvjp(lambda z: (fn(z), z), _backward)


def compiled(solved: Callable[[Any], Any]) -> Run:
    """A run of solved(start), compiled once for every dimension."""
    once = jax.jit(solved)

    def run(counted: Counted) -> None:
        _now[:] = [counted]
        jax.block_until_ready(once(jnp.asarray(counted.array)))

    return run


def contenders() -> dict[str, Run]:
    found: dict[str, Run] = {}
    if is_there("jaxopt"):
        jaxopt = importlib.import_module("jaxopt")
        options = {"maxiter": CAP + 1, "tol": 1e-300, "implicit_diff": False}
        anderson = jaxopt.AndersonAcceleration(fn, **options)
        broyden = jaxopt.Broyden(lambda z: fn_reverse(z) - z, **options)
        found["jaxopt AndersonAcceleration"] = compiled(lambda z: anderson.run(z).params)
        found["jaxopt Broyden"] = compiled(lambda z: broyden.run(z).params)
    if is_there("optimistix"):
        optimistix = importlib.import_module("optimistix")
        for name in ("Newton", "Chord", "Dogleg", "LevenbergMarquardt"):
            solver = getattr(optimistix, name)(rtol=1e-15, atol=1e-300)

            def solved(z: Any, solver: Any = solver) -> Any:
                return optimistix.fixed_point(lambda z, _: fn(z), solver, z, max_steps=CAP + 1, throw=False).value

            found[f"optimistix {name}"] = compiled(solved)
    return found
