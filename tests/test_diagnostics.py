"""spectral_radius and jacobian_penalty against eigenvalues and traces; build_info."""

import math
from pathlib import Path

import problems
import pytest
import torch

import pydeqsolve
from pydeqsolve import build_info, jacobian_penalty, spectral_radius

f64 = torch.float64


def linear(A):
    return lambda z: z @ A.T


def test_the_radius_of_a_symmetric_jacobian_is_its_largest_eigenvalue():
    A = problems.with_spectrum(torch.tensor([-0.9, 0.5, 0.3, 0.1], dtype=f64))
    radius = spectral_radius(linear(A), torch.zeros(3, 4, dtype=f64), steps=60, generator=problems.generator(0))
    # The second eigenvalue has decayed as (.5/.9)^30.
    torch.testing.assert_close(radius, torch.full((3,), 0.9, dtype=f64), rtol=1e-6, atol=0)


def test_the_radius_of_a_complex_pair_is_its_modulus():
    c, s = math.cos(1.0), math.sin(1.0)
    skew = torch.tensor([[2.0, 1.0], [0.0, 1.0]], dtype=f64)
    A = 0.8 * skew @ torch.tensor([[c, -s], [s, c]], dtype=f64) @ torch.linalg.inv(skew)
    radius = spectral_radius(linear(A), torch.zeros(1, 2, dtype=f64), steps=400, generator=problems.generator(0))
    # Growth oscillates within the condition of the eigenvectors, here below 3: log(3)/200 in the mean.
    assert radius.item() == pytest.approx(0.8, rel=6e-3)


def test_each_sample_has_the_radius_of_its_own_jacobian():
    rate = torch.tensor([[0.2], [0.9], [3.0]], dtype=f64)
    radius = spectral_radius(lambda z, rate: rate * torch.sin(z), torch.zeros(3, 4, dtype=f64), (rate,))
    torch.testing.assert_close(radius, rate[:, 0], rtol=1e-12, atol=0)


def test_a_nilpotent_jacobian_has_radius_zero():
    A = torch.diag(torch.full((3,), 5.0, dtype=f64), 1)
    assert spectral_radius(linear(A), torch.zeros(1, 4, dtype=f64)).item() == 0.0


def test_a_constant_map_has_radius_and_penalty_zero():
    z = torch.zeros(2, 3, dtype=f64)
    assert spectral_radius(lambda z: torch.ones_like(z), z).tolist() == [0.0, 0.0]
    assert jacobian_penalty(lambda z: torch.ones_like(z), z).item() == 0.0


def test_the_radius_builds_no_graph_and_works_under_no_grad():
    A = (0.5 * torch.eye(2, dtype=f64)).requires_grad_()
    z = torch.zeros(1, 2, dtype=f64)
    assert not spectral_radius(linear(A), z).requires_grad
    with torch.no_grad():
        assert spectral_radius(linear(A), z).item() == pytest.approx(0.5, rel=1e-12)


def test_a_nan_sample_leaves_the_radius_of_the_others_alone():
    rate = torch.tensor([[torch.nan], [0.9]], dtype=f64)
    radius = spectral_radius(lambda z, rate: rate * torch.sin(z), torch.zeros(2, 4, dtype=f64), (rate,))
    assert radius[1].item() == pytest.approx(0.9, rel=1e-12)


def test_the_penalty_of_a_scaled_identity_is_its_square_per_probe():
    # ‖c ε‖² / n for Gaussian ε: mean c², variance 2 c⁴ / n.
    n = 40_000
    penalty = jacobian_penalty(lambda z: 0.7 * z, torch.zeros(4, n // 4, dtype=f64), generator=problems.generator(0))
    assert penalty.item() == pytest.approx(0.49, rel=5 * math.sqrt(2 / n))


def test_the_penalty_estimates_the_squared_frobenius_norm_and_its_gradient():
    A = problems.with_spectrum(torch.linspace(-0.9, 0.6, 6, dtype=f64), 1).requires_grad_()
    probes = 4000
    penalty = jacobian_penalty(linear(A), torch.zeros(2, 6, dtype=f64), probes=probes, generator=problems.generator(1))
    expected = A.square().sum() / 6
    assert penalty.item() == pytest.approx(expected.item(), rel=0.05)
    (found,) = torch.autograd.grad(penalty, A)
    torch.testing.assert_close(found, 2 * A.detach() / 6, rtol=0, atol=0.05)


def test_the_same_generator_gives_the_same_estimate():
    z = torch.ones(2, 3, dtype=f64)
    for estimate in (spectral_radius, jacobian_penalty):
        one, other = (estimate(torch.sin, z, generator=problems.generator(3)) for _ in range(2))
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z: spectral_radius(torch.sin, z, steps=1), "steps must be at least 2"),
        (lambda z: jacobian_penalty(torch.sin, z, probes=0), "probes must be at least 1"),
    ],
)
def test_impossible_counts_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(1, 2))


def test_a_native_module_that_is_built_is_the_one_that_runs():
    built = list(Path(pydeqsolve.__file__).parent.glob("_native*.so"))
    assert build_info()["native"] or not built, build_info()["native_error"]  # else its tests would skip in silence


def test_build_info_says_what_is_loaded():
    info = build_info()
    assert info["torch"] == torch.__version__
    assert info["threads"] == torch.get_num_threads()
    assert info["native"] == (info["native_error"] == "")
    assert info["devices"] >= torch.cuda.device_count() * bool(info["cuda_architectures"])
    if info["native"]:
        assert info["cpu_isa"] in ("portable", "avx2", "avx512")
