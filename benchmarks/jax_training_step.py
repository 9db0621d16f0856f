"""The training step of `training_step.py` by jaxopt, compiled; a JSON that `training_step.py --jax` reads.

    pip install jax jaxopt    # in an environment of their own: this script imports nothing of pydeqsolve
    python benchmarks/jax_training_step.py jax.json [--shapes 1x64 32x64 64x256] [--repeats N]

AndersonAcceleration (history 5, implicit differentiation) for each sample by vmap, jit around value_and_grad in W; tol
1e-4, as an absolute residual per sample, which is what jaxopt takes. Processor time on one thread, the median; the
error of the gradient against plain iteration in float64.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from typing import Any

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
import jax
import jax.numpy as jnp
import jaxopt
import numpy as np

RTOL, RHO = 1e-4, 0.9


def measured(B: int, D: int, repeats: int) -> dict[str, float]:
    draw = np.random.default_rng(0)
    W = (RHO * np.linalg.qr(draw.standard_normal((D, D)))[0]).astype(np.float32)
    x, y = (draw.standard_normal((B, D)).astype(np.float32) for _ in range(2))

    def cell(z: Any, x: Any, W: Any) -> Any:
        return jnp.tanh(z @ W.T + x)

    solver = jaxopt.AndersonAcceleration(cell, history_size=5, tol=RTOL, maxiter=100, implicit_diff=True)

    def loss(W: Any) -> Any:
        z = jax.vmap(lambda x: solver.run(jnp.zeros_like(x), x, W).params)(jnp.asarray(x))
        return jnp.mean((z - y) ** 2)

    step = jax.jit(jax.value_and_grad(loss))
    found = np.asarray(step(W)[1]).astype(np.float64)
    times = []
    for _ in range(repeats):
        begun = time.process_time()
        jax.block_until_ready(step(W))
        times.append(time.process_time() - begun)
    exact = truth(W.astype(np.float64), x, y)
    error = float(np.linalg.norm(found - exact) / np.linalg.norm(exact))
    return {"ms": 1e3 * statistics.median(times), "error": error}


def truth(W: Any, x: Any, y: Any) -> Any:
    """The gradient of W, (D, D) float64, by plain iteration."""
    z = np.zeros(x.shape)
    for _ in range(2000):
        z = np.tanh(z @ W.T + x)
    g, slope = 2 * (z - y) / z.size, 1 - z * z
    u = g
    for _ in range(2000):
        u = g + (u * slope) @ W
    return (u * slope).T @ z


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("json")
    parser.add_argument("--shapes", nargs="+", default=["1x64", "32x64", "64x256"])
    parser.add_argument("--repeats", type=int, default=51)
    given = parser.parse_args()
    table = {}
    for shape in given.shapes:
        B, D = map(int, shape.split("x"))
        table[shape] = {"jaxopt, compiled": measured(B, D, given.repeats)}
        print(shape, table[shape])
    with open(given.json, "w") as file:
        json.dump(table, file, indent=1)


if __name__ == "__main__":
    main()
