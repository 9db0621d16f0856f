"""Complex states: solved for as pairs of reals, with the gradients of complex autograd."""

import problems
import pytest
import torch

from pydeqsolve import DEQ, Anderson, Broyden, Front, Implicit, Phantom, Picard, Status, Stop, Unrolled, solve

TIGHT = Stop(1e-12, max_steps=200)


def quadratic(dtype=torch.complex128):
    """z = A z + .05 z̄ z + x, of three samples: fn, x and A, with gradients."""
    generator = problems.generator(7)
    A = (0.15 * torch.randn(5, 5, dtype=dtype, generator=generator)).requires_grad_()
    x = torch.randn(3, 5, dtype=dtype, generator=generator).requires_grad_()
    return lambda z, x: z @ A.T + 0.05 * z.conj() * z + x, x, A


def iterated(fn, x, steps=300):
    z = torch.zeros_like(x)
    for _ in range(steps):
        z = fn(z, x)
    return z


@pytest.mark.parametrize("solver", [Anderson(), Anderson(kind="I"), Broyden(), Picard()])
def test_a_complex_map_is_solved_by_every_solver(solver):
    fn, x, _ = quadratic()
    out = solve(fn, torch.zeros_like(x), (x,), solver=solver, stop=TIGHT, gradient=None)
    assert out.z.dtype == torch.complex128
    assert out.converged.all()
    torch.testing.assert_close(out.z, iterated(fn, x).detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("gradient", [Implicit(), Unrolled(), Phantom(40)])
def test_gradients_are_those_of_complex_autograd(gradient):
    fn, x, A = quadratic()
    z = solve(fn, torch.zeros_like(x), (x,), stop=TIGHT, gradient=gradient).z
    found = torch.autograd.grad((z.abs().square() * (1 + z.real)).sum(), (A, x))
    z = iterated(fn, x)
    expected = torch.autograd.grad((z.abs().square() * (1 + z.real)).sum(), (A, x))
    for g, e in zip(found, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-7, atol=1e-9)


def test_a_complex_state_takes_the_steps_of_its_real_and_imaginary_parts():
    fn, x, _ = quadratic()

    def real(z, x):
        return torch.view_as_real(fn(torch.view_as_complex(z), torch.view_as_complex(x)))

    with torch.no_grad():
        out = solve(fn, torch.zeros_like(x), (x,))
        pairs = solve(real, torch.view_as_real(torch.zeros_like(x)), (torch.view_as_real(x),))
    assert out.evaluations.tolist() == pairs.evaluations.tolist()
    assert torch.equal(torch.view_as_real(out.z), pairs.z)
    assert torch.equal(out.residual, pairs.residual)


def test_samples_leave_a_batch_of_nested_complex_states_one_by_one():
    scale = torch.tensor([[0.1], [0.9], [0.5]], dtype=torch.float32)

    def fn(z, scale):
        return {"a": 1j * scale * torch.tanh(z["b"].abs()) * z["b"].conj() + 1, "b": scale * z["a"]}

    z0 = {"a": torch.zeros(3, 2, dtype=torch.complex64), "b": torch.zeros(3, 2, dtype=torch.complex64)}
    out = solve(fn, z0, (scale,), stop=Stop(1e-6), gradient=None)
    f = fn(out.z, scale)
    assert out.converged.all()
    assert len(set(out.evaluations.tolist())) > 1
    for name in z0:
        assert (f[name] - out.z[name]).abs().max() < 1e-5


def test_a_real_value_of_a_complex_map_and_a_lazy_conjugate_are_taken_as_they_are():
    x = torch.randn(2, 3, dtype=torch.complex128, generator=problems.generator(1))
    out = solve(lambda z, x: (0.5 * z + x).real, torch.zeros_like(x), (x,), stop=TIGHT, gradient=None)
    torch.testing.assert_close(out.z, (2 * x.real).to(x.dtype))
    out = solve(lambda z, x: (0.5 * z + x).conj(), torch.zeros_like(x), (x,), stop=TIGHT, gradient=None)
    torch.testing.assert_close(out.z, torch.complex(2 * x.real, -x.imag / 1.5))


def test_a_complex_sample_that_is_nan_in_one_part_is_nonfinite_and_alone_in_it():
    bad = torch.tensor([[0.0], [1.0], [0.0]], dtype=torch.float64)

    def fn(z, bad):
        return (
            0.5 * z + 1 + torch.complex(torch.zeros_like(bad), torch.where(bad > 0, torch.nan, torch.zeros_like(bad)))
        )

    out = solve(fn, torch.zeros(3, 2, dtype=torch.complex128), (bad,), gradient=None)
    assert out.status.tolist() == [Status.CONVERGED, Status.NONFINITE, Status.CONVERGED]


def test_a_tolerance_below_a_complex64_map_ends_stalled():
    def fn(z):
        return (0.5 * z.to(torch.complex64).conj() + 1.3).to(torch.complex64)

    out = solve(fn, torch.zeros(1, 4, dtype=torch.complex128), stop=Stop(1e-12), gradient=None)
    assert out.status.tolist() == [Status.STALLED]


def test_blocks_of_a_complex_chain_finish_from_the_front():
    b = torch.randn(2, 6, 3, dtype=torch.complex128, generator=problems.generator(2))

    def fn(z, b, wanted=None):
        return 0.5j * torch.nn.functional.pad(z, (0, 0, 1, 0))[:, :-1] + b

    out = solve(fn, torch.zeros_like(b), (b,), front=Front(), gradient=None)
    expected = b.clone()
    for k in range(1, 6):
        expected[:, k] += 0.5j * expected[:, k - 1]
    torch.testing.assert_close(out.z, expected, rtol=1e-4, atol=1e-4)


def test_a_layer_of_complex_inputs_starts_from_complex_zeros():
    fn, x, A = quadratic(torch.complex64)
    layer = DEQ(fn)
    layer(x).abs().sum().backward()
    assert layer.solution.converged.all()
    assert A.grad.isfinite().all()


def test_complex_and_real_tensors_do_not_mix_in_a_state():
    z0 = (torch.zeros(2, 3, dtype=torch.complex64), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="must share dtype"):
        solve(lambda z: z, z0)
