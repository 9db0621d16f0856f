"""How many rows a call of the model has: its bound, what becomes of it out of memory, and calls of one size."""

import pytest
import torch

from diffusion import FixedRows, Guided, Schedule, invert, sample
from diffusion.models.calls import CPU_ROWS, GPU_ENTRIES, Calls
from pydeqsolve import Implicit

CHAIN = Schedule.linear().chain(12)
CUDA, CPU = torch.device("cuda"), torch.device("cpu")


class Small:
    """A network whose memory suffices for `fits` rows of a call; notes the rows of every call."""

    def __init__(self, fits=10**9):
        self.fits, self.calls = fits, []

    def __call__(self, x, t, *inputs):
        self.calls.append(len(x))
        if len(x) > self.fits:
            raise torch.OutOfMemoryError(f"CUDA out of memory: {len(x)} rows")
        shift = inputs[0].view(-1, *[1] * (x.dim() - 1)).to(x) if inputs else 0.0
        return 0.5 * torch.tanh(x + 0.1 * shift + t.view(-1, *[1] * (x.dim() - 1)) / 1000)


def latent(B=3, D=4):
    return torch.randn(B, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("method", ["parallel", "sequential"])
def test_a_call_that_runs_out_of_memory_is_halved_and_the_images_stay(method):
    model, x = Small(2), latent()
    got, expected = sample(model, x, CHAIN, method), sample(Small(), x, CHAIN, method)
    torch.testing.assert_close(got.x_0, expected.x_0, rtol=0, atol=1e-12)
    assert torch.equal(got.evaluations, expected.evaluations)
    assert got.rounds == expected.rounds


def test_what_did_not_fit_is_not_tried_again():
    model = Small(5)
    sample(model, latent(), CHAIN)
    failed = [at for at, rows in enumerate(model.calls) if rows > 5]
    assert [model.calls[at] for at in failed] == [36, 18, 9]
    assert failed == [0, 1, 2]
    assert max(model.calls[3:]) == 4


def test_one_row_that_does_not_fit_is_the_error_of_the_device():
    with pytest.raises(torch.OutOfMemoryError, match="1 rows"):
        sample(Small(0), latent(), CHAIN)


def test_inversion_goes_on_with_fewer_rows():
    x_0 = 0.3 * latent()
    got, expected = invert(Small(2), x_0, CHAIN), invert(Small(), x_0, CHAIN)
    torch.testing.assert_close(got.x_T, expected.x_T, rtol=0, atol=1e-9)


@pytest.mark.parametrize("rows", [None, 24])
def test_a_gradient_is_the_same_in_halves(rows):
    def of(model):
        x, c = latent().requires_grad_(), torch.arange(3.0, dtype=torch.float64).requires_grad_()
        out = sample(model, x, CHAIN, inputs=(c,), gradient=Implicit(), rows_per_call=rows)
        return torch.autograd.grad(out.x_0.square().sum(), (x, c))

    halves = Small(2)
    torch.testing.assert_close(of(halves), of(Small()), rtol=1e-9, atol=1e-12)
    assert min(halves.calls) == 1 or 2 in halves.calls


def test_a_gradient_finds_for_itself_what_fits_with_its_graph():
    class Graph(Small):
        def __call__(self, x, t, *inputs):
            self.fits = 3 if torch.is_grad_enabled() else 10**9
            return super().__call__(x, t, *inputs)

    def of(model):
        x = latent().requires_grad_()
        out = sample(model, x, CHAIN, gradient=Implicit(), inputs=(torch.ones(3).double().requires_grad_(),))
        return torch.autograd.grad(out.x_0.square().sum(), x)[0]

    torch.testing.assert_close(of(Graph()), of(Small()), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["parallel", "sequential"])
def test_fixed_rows_give_the_network_one_shape_alone(method):
    model, x, c = Small(), latent(), torch.arange(3.0)
    got = sample(model, x, CHAIN, method, inputs=(c,), rows_per_call=FixedRows(7))
    assert set(model.calls) == {7}
    expected = sample(Small(), x, CHAIN, method, inputs=(c,))
    torch.testing.assert_close(got.x_0, expected.x_0, rtol=0, atol=1e-12)
    assert torch.equal(got.evaluations, expected.evaluations)


def test_fixed_rows_hold_under_guidance_and_in_inversion():
    model = Small()
    guided = Guided(model, 2.0, torch.zeros(()))
    found = invert(guided, 0.3 * latent(), CHAIN, inputs=(torch.ones(3),), rows_per_call=FixedRows(5))
    assert set(model.calls) == {10}
    assert found.converged.all()


def test_a_gradient_keeps_fixed_rows_and_counts_none_of_the_copies():
    def of(model, **rows):
        x, c = latent().requires_grad_(), torch.arange(3.0, dtype=torch.float64).requires_grad_()
        out = sample(model, x, CHAIN, inputs=(c,), gradient=Implicit(), **rows)
        return torch.autograd.grad(out.x_0.square().sum(), (x, c))

    model = Small()
    torch.testing.assert_close(of(model, rows_per_call=FixedRows(7)), of(Small()), rtol=1e-9, atol=1e-12)
    assert set(model.calls) == {7}


def test_fixed_rows_that_do_not_fit_are_the_error_of_the_device():
    model = Small(5)
    with pytest.raises(torch.OutOfMemoryError, match="7 rows"):
        sample(model, latent(), CHAIN, rows_per_call=FixedRows(7))
    assert model.calls == [7]


@pytest.mark.parametrize("rows", [0, 2.5, True])
def test_fixed_rows_are_one_at_least(rows):
    with pytest.raises((TypeError, ValueError), match=r"^rows: "):
        FixedRows(rows)


@pytest.mark.parametrize(
    ("entries", "rows"), [(64, 65536), (4 * 64 * 64, 256), (16 * 128 * 128, 16), (2 * GPU_ENTRIES, 1)]
)
def test_by_default_a_call_on_a_gpu_has_a_bounded_number_of_entries(entries, rows):
    assert Calls(None, entries).most(CUDA) == rows
    assert Calls(None, entries).most(CPU) == CPU_ROWS
    assert Calls(9, entries).most(CUDA) == 9


def test_an_empty_batch_makes_no_call():
    model = Small()
    sample(model, latent(0), CHAIN, rows_per_call=FixedRows(4))
    assert model.calls == []
