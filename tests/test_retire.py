"""What finished samples leave behind, by the native passes and by the tensors that they stand for."""

import problems
import pytest
import torch

from pydeqsolve import Anderson, Picard, Status, Stop, build_info, solve
from pydeqsolve.step import native

f64 = torch.float64


@pytest.fixture(params=["native", "tensors"])
def way(request, monkeypatch):
    """The test by either way."""
    if request.param == "tensors":
        monkeypatch.setattr(native, "_native", None)
    elif not build_info()["native"]:
        pytest.skip("no native module")


def ends(compact=True, check_every=None, dtype=f64):
    """z = a z + b for samples that end in every way: their rates a, starts and the solution."""
    a = torch.tensor([0.5, 1.5, 0.1, torch.nan, 0.5, 1.001], dtype=dtype)[:, None]
    z0 = torch.tensor([1.0, 1.0, 1.0, 1.0, 1e-170, 1.0], dtype=dtype)[:, None].expand(6, 3).contiguous()
    b = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 1.0], dtype=dtype)[:, None]
    stop = Stop(max_steps=40, check_every=check_every)
    return z0, solve(lambda z, a, b: a * z + b, z0, (a, b), solver=Picard(), stop=stop, gradient=None, compact=compact)


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("check_every", [None, 7, 100])
def test_each_sample_ends_as_it_does_alone(way, compact, check_every):
    _, out = ends(compact, check_every)
    expected = [Status.CONVERGED, Status.DIVERGED, Status.CONVERGED, Status.NONFINITE, Status.STALLED, Status.MAX_STEPS]
    assert out.status.tolist() == expected
    # The residual at evaluation k is 2⁻ᵏ beside ‖f‖ = 2, or 10⁻ᵏ beside 10 / 9.
    assert out.evaluations.tolist() == [16, 40, 5, 1, 1, 40]


def test_a_residual_that_only_grew_leaves_the_first_guess(way):
    z0, out = ends()
    for i in (1, 5):
        assert torch.equal(out.z[i], z0[i])
    assert out.residual[1].item() == pytest.approx(1.5)


def test_samples_that_run_on_close_up_in_order(way):
    rates = torch.linspace(0.05, 0.95, 40, dtype=f64)[torch.randperm(40, generator=problems.generator(0))][:, None]
    x = torch.randn(40, 5, dtype=f64, generator=problems.generator(1))
    out = solve(lambda z, a, x: a * torch.sin(z) + x, torch.zeros_like(x), (rates, x), solver=Anderson(memory=2),
                stop=Stop(rtol=1e-10), gradient=None).check()  # fmt: skip
    assert len(out.evaluations.unique()) > 3
    torch.testing.assert_close(rates * torch.sin(out.z) + x, out.z, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [f64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("features", [1, 2, 3, 4, 44])
def test_the_iterate_that_is_left_is_the_one_that_was_measured(way, dtype, features):
    x = torch.randn(9, features, generator=problems.generator(2)).to(dtype)
    rates = torch.linspace(0.0, 0.8, 9).to(dtype)[:, None]
    seen = []

    def fn(z, a, x):
        seen.append(z.clone())
        return a * z + x

    out = solve(fn, torch.zeros_like(x), (rates, x), solver=Picard(), stop=Stop(rtol=1e-2), gradient=None).check()
    rows = torch.cat(seen)
    assert all(bool((rows == z).all(1).any()) for z in out.z)
    found = (rates * out.z + x - out.z).double().square().mean(1).sqrt()
    torch.testing.assert_close(found, out.residual, rtol=0.1, atol=1e-2 * float(x.abs().max()))
