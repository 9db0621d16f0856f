"""Laws that a fixed-point solver obeys, as functions for a solver or a map of your own. Needs neither pytest nor more.

Each `check_…` runs `solve` and raises AssertionError that says which law was broken, where and by how much. Notation:
z = f(z), f = fn(z, *inputs), z0 (B, …) one tensor, inputs a tuple of tensors (B, …), r = f − z.
`bitwise=False` compares to `tolerance` instead of bit by bit, for maps whose rows are not computed as if alone (a
matrix product over the batch rounds differently for another number of rows).
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .anderson import Anderson
from .comparison import (
    Fn,
    bytes_alive,
    close,
    require,
    same_sample,
    with_troubles,
)
from .derivative.gradient import Gradient, Implicit
from .problem import Solver
from .solution import Solution
from .solve import solve
from .stop import Stop


def check_independence(
    solver: Solver, fn: Fn, z0: Tensor, inputs: Sequence[Tensor] = (), *, stop: Stop | None = None,
    bitwise: bool = True, tolerance: float = 1e-6, gradient: Gradient | None = None, parameters: Sequence[Tensor] = (),
    seed: int = 0,
) -> None:  # fmt: skip
    """Every sample gives the same z, status and evaluations alone, permuted, and beside samples that go wrong.

    With `gradient`, the derivatives of Σ z² with respect to floating inputs and to `parameters` are compared, to
    `tolerance` relative to their largest entry.
    """
    B, stop, troubled = z0.shape[0], stop or Stop(), with_troubles(fn)
    none = torch.zeros(B, dtype=torch.int64, device=z0.device)

    def run(rows: Tensor, trouble: Tensor) -> tuple[Solution, list[Tensor]]:
        given = [x[rows].detach().requires_grad_(bool(gradient) and x.is_floating_point()) for x in inputs]
        solution = solve(troubled, z0[rows], (*given, trouble), solver=solver, stop=stop, gradient=gradient)
        leaves = [x for x in (*given, *parameters) if x.requires_grad]
        if gradient is None or not leaves:
            return solution, []
        found = torch.autograd.grad(solution.z[trouble == 0].square().sum(), leaves, allow_unused=True)
        return solution, [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]

    everyone = torch.arange(B, device=z0.device)
    together, grads = run(everyone, none)
    alone = [run(everyone[i : i + 1], none[i : i + 1]) for i in range(B)]
    order = torch.randperm(B, generator=torch.Generator().manual_seed(seed)).to(z0.device)
    permuted, _ = run(order, none)
    crowd = torch.cat([everyone[:1].expand(4), everyone])
    crowded, crowded_grads = run(crowd, torch.cat([torch.arange(1, 5, device=z0.device), none]))
    for i in range(B):
        at = int((order == i).nonzero())
        cases = [("alone", alone[i][0], 0), ("permuted", permuted, at), ("beside bad ones", crowded, i + 4)]
        for where, other, j in cases:
            same_sample(f"sample {i} {where}", together, i, other, j, bitwise, tolerance)
    split = len(grads) - sum(p.requires_grad for p in parameters)
    for k, g in enumerate(grads):
        pieces = [each[1][k] for each in alone]
        expected = torch.cat(pieces) if k < split else torch.stack(pieces).sum(0)
        close(f"gradient {k} together and alone", g, expected, tolerance)
        close(f"gradient {k} beside bad ones", crowded_grads[k][4:] if k < split else crowded_grads[k], g, tolerance)


def check_scale_invariance(
    solver: Solver, fn: Fn, z0: Tensor, inputs: Sequence[Tensor] = (), *, stop: Stop | None = None,
    exponents: Sequence[int] = (-30, -7, 12, 30),
) -> None:  # fmt: skip
    """s f(z / s) from s z0, s = 2^k, takes the same evaluations to s z, bit for bit. `stop.atol` must be 0."""
    stop = stop or Stop()
    plain = solve(fn, z0, inputs, solver=solver, stop=stop, gradient=None)
    for k in exponents:
        s = 2.0**k
        scaled = solve(lambda z, *x, s=s: fn(z / s, *x) * s, z0 * s, inputs, solver=solver, stop=stop, gradient=None)
        scaled = replace(scaled, z=scaled.z / s, residual=scaled.residual / s)
        for i in range(z0.shape[0]):
            same_sample(f"sample {i} scaled by 2^{k}", plain, i, scaled, i, True, 0.0)


def check_rotation_equivariance(
    solver: Solver, fn: Fn, z0: Tensor, inputs: Sequence[Tensor] = (), *, stop: Stop | None = None,
    tolerance: float = 1e-6, seed: int = 0,
) -> None:  # fmt: skip
    """Q f(Qᵀ z) from Q z0, Q orthogonal, ends at Q z with the same status after as many evaluations, give or take one
    and a tenth for rounding, which nearly dependent differences amplify. `stop.norm` must not be "max"."""
    B, stop = z0.shape[0], stop or Stop()
    D = z0[0].numel()
    noise = torch.randn(D, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    Q = torch.linalg.qr(noise).Q.to(z0)

    def turn(z: Tensor, by: Tensor) -> Tensor:
        return (z.reshape(len(z), -1) @ by.T).reshape(z.shape)

    plain = solve(fn, z0, inputs, solver=solver, stop=stop, gradient=None)
    turned = solve(
        lambda z, *x: turn(fn(turn(z, Q.T), *x), Q), turn(z0, Q), inputs, solver=solver, stop=stop, gradient=None
    )
    back = turn(turned.z, Q.T)
    for i in range(B):
        require(plain.status[i] == turned.status[i], f"sample {i} rotated: status {turned.status[i]}")
        apart = int((plain.evaluations[i] - turned.evaluations[i]).abs())
        allowed = 1 + int(plain.evaluations[i]) // 10
        require(apart <= allowed, f"sample {i} rotated: evaluations differ by {apart}, more than {allowed}")
        close(f"sample {i} rotated: z", back[i], plain.z[i], tolerance)


def check_affine_exactness(
    solver: Solver, *, D: int = 6, B: int = 3, dtype: torch.dtype = torch.float64, evaluations: int | None = None,
    seed: int = 0,
) -> None:  # fmt: skip
    """f(z) = A z + b, with A of norm .9, is solved to rounding in D + 2 evaluations: the start, D differences and the
    measurement of the answer. Needs memory ≥ D. `evaluations`: another bound, such as Broyden's 2 D + 1."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(B, D, D, dtype=torch.float64, generator=generator)
    A = 0.9 * A / torch.linalg.matrix_norm(A, 2)[:, None, None]
    b = torch.randn(B, D, dtype=torch.float64, generator=generator)
    exact = torch.linalg.solve(torch.eye(D, dtype=torch.float64) - A, b)
    rtol = torch.finfo(dtype).eps ** 0.75
    most = D + 2 if evaluations is None else evaluations
    solution = solve(
        lambda z, A, b: (A @ z[..., None])[..., 0] + b, torch.zeros(B, D, dtype=dtype), (A.to(dtype), b.to(dtype)),
        solver=solver, stop=Stop(rtol=rtol, max_steps=most), gradient=None,
    )  # fmt: skip
    require(
        bool(solution.converged.all()),
        f"affine map of {D} unknowns not solved in {most} evaluations: residuals {solution.residual.tolist()}",
    )
    # ‖z − z*‖ ≤ ‖r‖ / (1 − .9), and the stop rule bounds ‖r‖ by rtol ‖f‖.
    close("affine solution", solution.z.double(), exact, 20 * rtol)


def check_best_residual(
    solver: Solver, fn: Fn, z0: Tensor, inputs: Sequence[Tensor] = (), *, stop: Stop | None = None
) -> None:
    """`residual` is the least of the trace, and is ‖f(z) − z‖ of exactly the z returned, to rounding of the sum; where
    the status is CONVERGED that z meets the tolerance."""
    stop, D = stop or Stop(), z0[0].numel()
    solution = solve(fn, z0, inputs, solver=solver, stop=stop, gradient=None, trace=True)
    assert solution.trace is not None
    finite = torch.where(solution.trace.isfinite(), solution.trace, torch.inf)
    with torch.no_grad():
        f = fn(solution.z, *inputs).double().reshape(len(z0), -1)
        r = f - solution.z.double().reshape(len(z0), -1)
    norm = {"max": lambda x: x.abs().amax(1), "l2": lambda x: x.norm(dim=1), "rms": lambda x: x.norm(dim=1) / D**0.5}
    measured, goal = norm[stop.norm](r), stop.atol + stop.rtol * norm[stop.norm](f)
    for i in range(len(z0)):
        least, said = float(finite[:, i].min()), float(solution.residual[i])
        require(said == least, f"sample {i}: residual {said}, least of the trace {least}")
        true = float(measured[i])
        if said < float("inf"):
            require(abs(true - said) <= 1e-9 * said, f"sample {i}: residual {said}, ‖f(z) − z‖ of its z {true}")
        require(
            not solution.converged[i] or said <= goal[i] * (1 + 1e-9),
            f"sample {i}: CONVERGED, but the residual of its z is {said} and the tolerance {float(goal[i])}",
        )


def check_evaluations(
    solver: Solver, fn: Fn, z0: Tensor, inputs: Sequence[Tensor], *, stop: Stop | None = None
) -> None:
    """Compact: the rows passed to fn add up to `evaluations`, and its calls to `steps`."""
    rows: list[int] = []

    def counted(z: Tensor, *x: Tensor) -> Tensor:
        rows.append(z.shape[0])
        return fn(z, *x)

    stop = replace(stop or Stop(), check_every=1)
    solution = solve(counted, z0, inputs, solver=solver, stop=stop, gradient=None, compact=True)
    require(len(rows) == solution.steps, f"{len(rows)} calls of fn, but steps is {solution.steps}")
    total = int(solution.evaluations.sum())
    require(sum(rows) == total, f"{sum(rows)} rows passed to fn, but evaluations add up to {total}")


def check_resume(
    solver: Solver, fn: Fn, z0: Tensor, inputs: Sequence[Tensor] = (), *, stop: Stop | None = None,
    interrupt: Sequence[int] = (1, 2, 5),
) -> None:  # fmt: skip
    """A solve that is interrupted after so many steps and goes on from its `Solution`, history kept, ends at the same
    z and residual, bit for bit, as one that is not; a sample still running is evaluated once more, where it was.
    `stop.max_steps` must suffice; maps that only stall may stall later."""
    stop = stop or Stop(max_steps=1000)
    whole = solve(fn, z0, inputs, solver=solver, stop=stop, gradient=None)
    for k in interrupt:
        short = replace(stop, max_steps=k)
        first = solve(fn, z0, inputs, solver=solver, stop=short, gradient=None, keep_history=True)
        rest = solve(fn, first, inputs, solver=solver, stop=stop, gradient=None)
        require(bool(whole.converged.all()), "the uninterrupted solve did not converge: raise stop.max_steps")
        for i in range(len(z0)):
            what = f"sample {i} interrupted after {k} steps"
            require(bool(rest.converged[i]), f"{what}: did not converge")
            apart = (rest.z[i].double() - whole.z[i].double()).abs().max()
            require(torch.equal(rest.z[i], whole.z[i]), f"{what}: z differs by {float(apart)}")
            require(rest.residual[i] == whole.residual[i], f"{what}: residual {rest.residual[i]}")
            extra = int(first.evaluations[i] + rest.evaluations[i] - whole.evaluations[i])
            require(extra in (0, 1), f"{what}: {extra} evaluations more")


def check_gradient(
    fn: Fn, z0: Tensor, inputs: Sequence[Tensor] = (), parameters: Sequence[Tensor] = (), *,
    gradient: Gradient | None = None, solver: Solver | None = None, stop: Stop | None = None,
    tolerance: float = 1e-5, seed: int = 0,
) -> None:  # fmt: skip
    """dL of L = Σ c z, c random, equals central differences along one random direction of each input and parameter
    that requires a gradient, to `tolerance` relative to the lengths of gradient and direction, or to the rounding of
    the quotient, 8 eps Σ |c z| / h. Use float64, and a `stop` tight enough to difference."""
    generator = torch.Generator().manual_seed(seed)
    c = torch.randn(z0.shape, dtype=torch.float64, generator=generator).to(z0)
    solver, stop = solver or Anderson(), stop or Stop(rtol=1e-13, max_steps=1000)
    leaves = [x for x in (*inputs, *parameters) if x.requires_grad]

    def terms(how: Gradient | None) -> Tensor:
        return c * solve(fn, z0, inputs, solver=solver, stop=stop, gradient=how).z

    def terms_at(x: Tensor, value: Tensor) -> Tensor:
        x.copy_(value)
        return terms(None)

    require(bool(leaves), "no input or parameter requires a gradient")
    grads = torch.autograd.grad(terms(gradient or Implicit(stop=Stop(rtol=1e-10))).sum(), leaves)
    for k, (x, g) in enumerate(zip(leaves, grads, strict=True)):
        v = torch.randn(x.shape, dtype=torch.float64, generator=generator).to(x)
        h = 1e-5 * max(1.0, float(x.detach().abs().max()))
        before = x.detach().clone()
        with torch.no_grad():
            try:
                above = terms_at(x, before + h * v)
                below = terms_at(x, before - h * v)
            finally:
                x.copy_(before)
        expected, found = float(above.sum() - below.sum()) / (2 * h), float((g * v).sum())
        # A fixed point is off by a few roundings of its entries, whichever way it was found, and so is either loss.
        rounding = 8 * torch.finfo(z0.dtype).eps * float(above.abs().sum()) / h
        allowed = max(tolerance * float(g.norm() * v.norm()), rounding)
        require(abs(found - expected) <= allowed, f"derivative {k}: {found}, central difference {expected}")


def check_dtype(
    solver: Solver, fn: Fn, z0: Tensor, *, ulps: float = 8.0,
    dtypes: Sequence[torch.dtype] = (torch.float64, torch.float32, torch.bfloat16, torch.float16),
) -> None:  # fmt: skip
    """dtype and device of z0 are kept, and z is within `ulps` units of rounding, times max |z*|, of the float64 one.

    fn must compute in the dtype of its argument and contract well: the error of any method grows as 1/(1 − ρ).
    """
    finest = Stop(rtol=torch.finfo(torch.float64).eps, max_steps=1000)
    exact = solve(fn, z0.double(), solver=solver, stop=finest, gradient=None).z
    for dtype in dtypes:
        eps = torch.finfo(dtype).eps
        z = solve(fn, z0.to(dtype), solver=solver, stop=Stop(rtol=2 * eps), gradient=None).z
        require(z.dtype == dtype, f"z0 is {dtype}, z is {z.dtype}")
        require(z.device == z0.device, f"z0 is on {z0.device}, z on {z.device}")
        close(f"{dtype} solution", z.double(), exact, ulps * eps)


def check_constant_memory(
    solver: Solver, fn: Fn, z0: Tensor, inputs: Sequence[Tensor] = (), *, early: int = 30, late: int = 120
) -> None:
    """Tensors alive after `late` steps take no more bytes than after `early` ones, which must exceed the memory."""
    alive: dict[int, int] = {}

    def count(step: int, z: Tensor, residual: Tensor) -> None:
        if step in (early, late):
            gc.collect()
            alive[step] = bytes_alive()

    stop = Stop(rtol=0.0, atol=0.0, max_steps=late)
    solve(fn, z0, inputs, solver=solver, stop=stop, gradient=None, callback=count)
    require(late in alive, "the solve ended before `late`: give a map that converges more slowly")
    grown = alive[late] - alive[early]
    require(grown <= 0, f"{grown} bytes more are alive after {late} steps than after {early}")
