"""Tolerances of the forward solve against the precision that fn computes in."""

import subprocess
import sys

import problems
import pytest
import torch
from torch import nn

from pydeqsolve import Anderson, Broyden, Picard, Status, Stop, solve

HALVES = [torch.bfloat16, torch.float16]
FORMS = ["autocast", "pure", "casts", "cast at the end"]

in_16_bits = pytest.mark.parametrize("dtype", HALVES, ids=["bfloat16", "float16"])
by_form = pytest.mark.parametrize("form", FORMS)
by_solver = pytest.mark.parametrize("solver", [Anderson(), Broyden(), Picard()], ids=["anderson", "broyden", "picard"])


def run(form, dtype, solver=None, rho=0.9, B=16, D=32, **keywords):
    """A tanh layer that computes in `dtype`: under autocast, all of it, or between two casts."""
    x = torch.randn(B, D, generator=problems.generator(6))
    W = (rho * problems.orthogonal(D, 4)).to(torch.float32 if form == "autocast" else dtype)
    x = x.to(dtype) if form == "pure" else x

    def fn(z, x):
        if form == "cast at the end":
            return torch.tanh(z.to(dtype) @ W.T + x.to(dtype)).float()
        product = (z.to(dtype) @ W.T).float() if form == "casts" else z @ W.T
        return torch.tanh(product + x)

    keywords = {"solver": solver or Anderson(), "gradient": None, **keywords}
    with torch.autocast("cpu", dtype=dtype, enabled=form == "autocast"):
        return solve(fn, torch.zeros_like(x), (x,), **keywords)


@in_16_bits
@by_form
@by_solver
def test_the_default_tolerance_is_no_finer_than_what_fn_computes_in(form, dtype, solver):
    solution = run(form, dtype, solver)
    assert solution.converged.all()
    assert (solution.residual <= torch.finfo(dtype).eps).all()
    # A cast that no autocast tells of is found when the solve takes long.
    assert solution.steps <= (25 if form.startswith("cast") or dtype == torch.float16 else 18)


@in_16_bits
@by_form
@by_solver
def test_a_finer_tolerance_is_pursued_to_the_floor_and_ends_stalled(form, dtype, solver):
    solution = run(form, dtype, solver, rho=0.5, stop=Stop(rtol=1e-7, max_steps=200))
    assert solution.status.tolist() == [Status.STALLED] * 16
    assert (solution.residual <= 0.35 * torch.finfo(dtype).eps).all()
    assert solution.steps < 90


def test_a_tolerance_within_the_precision_is_met_in_16_bits():
    assert run("autocast", torch.bfloat16, stop=Stop(rtol=8e-3)).converged.all()


def test_a_map_that_turns_autocast_off_meets_its_tolerance():
    x, W = torch.randn(4, 32, generator=problems.generator(6)), (0.5 * problems.orthogonal(32, 4)).float()

    def fn(z, x):
        with torch.autocast("cpu", enabled=False):
            return torch.tanh(z @ W.T + x)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        solution = solve(fn, torch.zeros_like(x), (x,), stop=Stop(rtol=1e-6), gradient=None)
        default = solve(fn, torch.zeros_like(x), (x,), gradient=None)
    assert solution.converged.all()
    assert (default.residual <= 1e-5).all()


def test_what_does_not_come_from_the_state_does_not_count():
    # The injection is rounded once, the same at every evaluation: residuals know nothing of it.
    x, W = torch.randn(4, 32, generator=problems.generator(6)), (0.5 * problems.orthogonal(32, 4)).float()
    fn = lambda z, x: torch.tanh(z @ W.T + (x.bfloat16() @ W.bfloat16()).float())  # noqa: E731
    for rtol in (1e-6, 1e-8):  # the second is finer than half an eps of float32, and takes more than 20 steps
        solution = solve(fn, torch.zeros_like(x), (x,), stop=Stop(rtol=rtol, max_steps=60), gradient=None)
        assert (solution.residual <= 4e-7).all()
        assert solution.converged.all() == (rtol == 1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_residual_of_zero_meets_no_tolerance_that_it_cannot_resolve_but_equality(dtype):
    z0 = torch.zeros(2, 3, dtype=dtype)
    fn = lambda z: 0.5 * z + 1  # noqa: E731
    eps = torch.finfo(dtype).eps
    for rtol, status in ((eps, Status.CONVERGED), (eps / 8, Status.STALLED), (0.0, Status.CONVERGED)):
        stop = Stop(rtol=rtol, max_steps=200)
        assert solve(fn, z0, solver=Picard(), stop=stop, gradient=None).status.tolist() == [status] * 2


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_a_compiled_map_under_autocast_is_looked_into_too():
    layer = nn.Linear(16, 16)
    with torch.no_grad():
        layer.weight.copy_(0.5 * problems.orthogonal(16, 1))
    x = torch.randn(4, 16, generator=problems.generator(2))
    fn = torch.compile(lambda z, x: torch.tanh(layer(z) + x), backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        solution = solve(fn, torch.zeros_like(x), (x,))
        assert solution.converged.all()
        solution.z.sum().backward()
    assert solution.adjoint.status.tolist() == [Status.CONVERGED] * 4


def test_looking_into_a_map_does_not_import_the_compiler():
    script = """
import sys, torch
from pydeqsolve import Picard, Stop, solve
w = torch.ones(1, requires_grad=True) * 0.5
with torch.autocast("cpu", dtype=torch.bfloat16):
    solution = solve(lambda z: torch.cos(3.5 * w * z) * 0.7, torch.zeros(2, 3), solver=Picard(), stop=Stop(rtol=1e-7))
assert solution.steps > 20
solution.z.sum().backward()
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


@pytest.mark.parametrize("kind", ["sparse_coo", "sparse_csr", "mkldnn"])
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_a_slow_map_may_compute_with_tensors_that_have_no_storage(kind):
    A = 0.9 * torch.eye(4)
    held = A.to_mkldnn() if kind == "mkldnn" else A.to_sparse() if kind == "sparse_coo" else A.to_sparse_csr()
    multiply = (
        (lambda z: z.T.to_mkldnn().to_dense().T @ held.to_dense()) if kind == "mkldnn" else (lambda z: (held @ z.T).T)
    )
    solution = solve(lambda z: multiply(z) + 1, torch.zeros(2, 4), solver=Picard(), stop=Stop(max_steps=200))
    assert solution.converged.all()
    torch.testing.assert_close(solution.z, torch.full((2, 4), 10.0), rtol=1e-3, atol=0)
