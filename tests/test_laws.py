"""The laws of pydeqsolve.testing, over every solver and maps drawn by hypothesis; each law is also seen to fail."""

from dataclasses import dataclass

import problems
import pytest
import torch
from examples import examples
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pydeqsolve import Anderson, Broyden, Implicit, Phantom, Picard, Stop, testing
from pydeqsolve.step.ring import Method

SOLVERS = [
    Picard(),
    Picard(damping=0.6),
    Anderson(),
    Anderson(memory=2, damping=0.8),
    Anderson(kind="I"),
    Anderson(memory=0),
    Anderson(ridge=1e-10),
    Broyden(),
    Broyden(memory=3),
    Broyden(kind="bad"),
]
EVERY = pytest.mark.parametrize("solver", SOLVERS, ids=str)
few = examples(8)
seeds = st.integers(0, 10_000)


def bent(z, rate, b):
    """Elementwise, so each row is computed as if alone; contracts by |rate| at most."""
    return rate * torch.sin(z) + b


def draw(seed, B=4, D=5, dtype=torch.float64):
    g = problems.generator(seed)
    rate = (0.95 * (2 * torch.rand(B, D, dtype=torch.float64, generator=g) - 1)).to(dtype)
    b = torch.randn(B, D, dtype=torch.float64, generator=g).to(dtype)
    return torch.randn(B, D, dtype=torch.float64, generator=g).to(dtype), (rate, b)


@EVERY
@few
@given(seed=seeds, dtype=st.sampled_from([torch.float64, torch.float32]), norm=st.sampled_from(["rms", "l2", "max"]))
def test_a_sample_does_not_depend_on_its_neighbours(solver, seed, dtype, norm):
    z0, inputs = draw(seed, dtype=dtype)
    testing.check_independence(solver, bent, z0, inputs, stop=Stop(rtol=1e-5, norm=norm), seed=seed)


@pytest.mark.parametrize("gradient", [Implicit(stop=Stop(rtol=1e-10)), Phantom(steps=8)], ids=["implicit", "phantom"])
@pytest.mark.parametrize("solver", [Anderson(), Broyden(), Picard()], ids=str)
@few
@given(seed=seeds)
@pytest.mark.filterwarnings("ignore:the adjoint of solve:RuntimeWarning")  # z + 1 has a singular adjoint
def test_gradients_of_a_sample_do_not_depend_on_its_neighbours(gradient, solver, seed):
    z0, inputs = draw(seed)
    weight = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    testing.check_independence(
        solver, lambda z, rate, b: bent(z, weight * rate, b), z0, inputs, gradient=gradient, parameters=[weight]
    )


@EVERY
@few
@given(seed=seeds, dtype=st.sampled_from([torch.float64, torch.float32]), norm=st.sampled_from(["rms", "l2", "max"]))
def test_scaling_the_map_by_a_power_of_two_changes_no_bit(solver, seed, dtype, norm):
    z0, inputs = draw(seed, dtype=dtype)
    testing.check_scale_invariance(solver, bent, z0, inputs, stop=Stop(rtol=1e-5, norm=norm))


@EVERY
@few
@given(seed=seeds)
def test_rotating_the_map_rotates_the_solution(solver, seed):
    z0, inputs = draw(seed)
    testing.check_rotation_equivariance(
        solver, bent, z0, inputs, stop=Stop(rtol=1e-7, max_steps=1000), tolerance=1e-5, seed=seed
    )


@pytest.mark.parametrize("kind", ["I", "II"])
@settings(max_examples=15)
@given(seed=seeds, D=st.integers(1, 12), spare=st.integers(0, 4))
def test_anderson_with_full_memory_solves_an_affine_map_in_as_many_steps_as_unknowns(kind, seed, D, spare):
    testing.check_affine_exactness(Anderson(memory=D + spare, kind=kind), D=D, seed=seed)


@pytest.mark.parametrize("kind", ["good", "bad"])
@settings(max_examples=15)
@given(seed=seeds, D=st.integers(1, 6))
def test_broyden_solves_an_affine_map_in_twice_as_many_steps_as_unknowns(kind, seed, D):
    # Gay 1979: 2 D steps at most in exact arithmetic; one more evaluation measures the answer.
    solver = Broyden(memory=2 * D, kind=kind, safeguard=float("inf"))
    testing.check_affine_exactness(solver, D=D, seed=seed, evaluations=2 * D + 1)


@EVERY
@few
@given(seed=seeds, max_steps=st.integers(1, 12), norm=st.sampled_from(["rms", "l2", "max"]))
def test_the_residual_is_the_least_seen_and_belongs_to_the_z_returned(solver, seed, max_steps, norm):
    z0, (rate, b) = draw(seed)
    testing.check_best_residual(solver, bent, z0, (3 * rate, b), stop=Stop(rtol=1e-6, max_steps=max_steps, norm=norm))


@EVERY
def test_a_converged_z_meets_the_tolerance_even_where_no_fixed_point_exists(solver):
    # Rounding makes the differences of z + c pure noise, and extrapolation through them lands far away.
    c = 1.5 + 0.1 * torch.sin(torch.arange(6.0, dtype=torch.float64))
    z0 = torch.randn(4, 6, dtype=torch.float64, generator=problems.generator(0))
    testing.check_best_residual(solver, lambda z: z + c, z0, stop=Stop(rtol=1e-8, max_steps=200))


@EVERY
@few
@given(seed=seeds)
def test_evaluations_count_the_rows_passed_to_fn(solver, seed):
    testing.check_evaluations(solver, bent, *draw(seed))


@EVERY
@few
@given(seed=seeds, dtype=st.sampled_from([torch.float64, torch.float32]))
def test_an_interrupted_solve_goes_on_as_if_it_had_not_been(solver, seed, dtype):
    testing.check_resume(solver, bent, *draw(seed, dtype=dtype), stop=Stop(rtol=1e-5, max_steps=1000))


@pytest.mark.parametrize("solver", [Anderson(), Broyden(), Picard()], ids=str)
@few
@example(seed=6126)  # a derivative of 3e-5, the sum of terms of order 1: the quotient's rounding is 1e-5 of it
@given(seed=seeds)
def test_implicit_gradients_equal_central_differences(solver, seed):
    z0, (rate, b) = draw(seed)
    weight = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    testing.check_gradient(
        lambda z, rate, b: bent(z, weight * rate, b), z0, (rate, b.requires_grad_()), [weight], solver=solver
    )


@EVERY
def test_every_dtype_is_kept_and_solved_to_its_rounding(solver):
    z0 = torch.linspace(-1, 1, 12).reshape(3, 4)
    testing.check_dtype(solver, lambda z: 0.4 * torch.cos(z) + 0.3, z0)


@pytest.mark.parametrize("solver", [Picard(), Anderson(memory=3), Broyden(memory=3)], ids=str)
def test_memory_does_not_grow_with_the_steps(solver):
    z0, _ = draw(0, 2, 300)
    testing.check_constant_memory(solver, lambda z: 1.5 * torch.cos(3 * z), z0)


# A law that cannot fail is none: each check below is shown a solver or a map that breaks it.


@dataclass(frozen=True)
class Ridged:
    """Anderson whose ridge is absolute in effect: it depends on the scale it is told."""

    safeguard = float("inf")

    def method(self):
        return Method(memory=5, ridge=0.5)


def batch_mean(z, b):
    return 0.5 * torch.cos(z + z.mean(0, keepdim=True)) + b


def test_independence_fails_for_a_map_that_mixes_samples():
    z0, (_, b) = draw(1)
    with pytest.raises(AssertionError, match="sample 0 alone"):
        testing.check_independence(Anderson(), batch_mean, z0, (b,))


def test_scale_invariance_fails_for_an_absolute_tolerance():
    z0, inputs = draw(1)
    with pytest.raises(AssertionError, match=r"scaled by 2\^"):
        testing.check_scale_invariance(Anderson(), bent, z0, inputs, stop=Stop(rtol=0.0, atol=1e-3))


def test_rotation_equivariance_fails_for_the_largest_entry_as_norm():
    z0, inputs = draw(1, D=40)
    with pytest.raises(AssertionError, match="rotated"):
        testing.check_rotation_equivariance(
            Picard(), bent, z0, inputs, stop=Stop(rtol=1e-3, norm="max"), tolerance=1e-12
        )


def test_affine_exactness_fails_for_picard_short_memory_and_a_large_ridge():
    for solver in (Picard(), Anderson(memory=2), Ridged()):
        with pytest.raises(AssertionError, match="not solved in"):
            testing.check_affine_exactness(solver, D=5)


def test_resume_check_fails_for_a_map_that_is_another_each_time():
    calls = []

    def drifting(z, rate, b):
        calls.append(1)
        return bent(z, rate, b + 1e-3 * len(calls))

    with pytest.raises(AssertionError, match="interrupted after"):
        testing.check_resume(Anderson(), drifting, *draw(1), stop=Stop(rtol=1e-2, max_steps=1000))


def test_gradient_check_fails_for_a_phantom_gradient():
    z0, (rate, b) = draw(2)
    with pytest.raises(AssertionError, match="central difference"):
        testing.check_gradient(bent, z0, (rate, b.requires_grad_()), gradient=Phantom())


def test_dtype_check_fails_for_a_map_that_rounds():
    with pytest.raises(AssertionError, match="float32 solution"):
        testing.check_dtype(
            Anderson(), lambda z: (0.4 * torch.cos(z)).to(torch.float16 if z.dtype == torch.float32 else z.dtype).to(z),
            torch.ones(2, 3),
        )  # fmt: skip


def test_memory_check_fails_for_a_map_that_keeps_its_arguments():
    kept = []

    def hoarding(z):
        kept.append(z.clone())
        return 1.5 * torch.cos(3 * z)

    with pytest.raises(AssertionError, match="bytes more are alive"):
        testing.check_constant_memory(Picard(), hoarding, draw(0, 2, 300)[0])


@pytest.mark.parametrize("make", [torch.Tensor.to_sparse, lambda x: x.to("meta")])
def test_memory_is_checked_beside_tensors_without_any(make):
    beside = make(torch.eye(3))
    testing.check_constant_memory(Picard(), lambda z: 1.5 * torch.cos(3 * z), draw(0, 2, 300)[0])
    assert beside.shape == (3, 3)
