"""Networks in bfloat16 and float16: the chain around them is float64, so only their own rounding is left."""

import pytest
import torch
from mixture import latents
from torch import nn

from diffusion import Parallel, Schedule, Sequential, load_checkpoint, sample
from pydeqsolve import Anderson, Implicit, Status

SCHEDULE = Schedule.linear(1000, 1e-4, 0.02)
HALVES = [torch.bfloat16, torch.float16]


def each(x, y):
    x, y = x.double(), y.double()
    return (x - y).flatten(1).norm(dim=1) / y.flatten(1).norm(dim=1)


def relative(x, y):
    return each(x, y).max().item()


class Gaussian(nn.Module):
    """ε of data N(0, 0.25 I), times a parameter that is 1, rounded to the dtype of its weights."""

    def __init__(self, dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, dtype=dtype))
        self.seen = set()
        self.eval()

    def forward(self, x, t):
        self.seen.add(x.dtype)
        alpha = SCHEDULE.alphas_cumprod[t][:, None]
        factor = (1 - alpha).sqrt() / (0.25 * alpha + 1 - alpha)
        return (factor * x.double()).to(x.dtype) * self.weight


def exact(x_T, chain):
    """x_0 of the Gaussian's chain in exact arithmetic."""
    for k in range(len(chain)):
        alpha = chain.alphas[k]
        x_T = (chain.a[k] + chain.c[k] * (1 - alpha).sqrt() / (0.25 * alpha + 1 - alpha)) * x_T
    return x_T


@torch.no_grad()
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("method", "most"), [(Sequential(), 2), (Parallel(), 10)])
def test_sums_over_a_thousand_steps_lose_nothing_to_a_low_precision_network(dtype, method, most):
    # In parallel ε is settled to 5 of its roundings, and these images are half its size.
    chain, x, model = SCHEDULE.chain(1000), latents(3, 4), Gaussian(dtype)
    got = sample(model, x, chain, method)
    assert model.seen == {dtype}
    assert relative(got.x_0, exact(x, chain)) < most * torch.finfo(dtype).eps
    low = x.to(dtype)
    for k in range(len(chain)):  # what such sums would come to in the network's own dtype
        low = chain.a[k].to(dtype) * low + chain.c[k].to(dtype) * model(low, chain.timesteps[k].expand(3))
    assert relative(low, exact(x, chain)) > 40 * torch.finfo(dtype).eps


@torch.no_grad()
@pytest.mark.parametrize(
    ("dtype", "steps"),  # a CPU is slow at float16 convolutions
    [(torch.bfloat16, 50), (torch.bfloat16, 100), (torch.bfloat16, 1000), (torch.float16, 50), (torch.float16, 100)],
)
def test_parallel_and_sequential_agree_to_the_precision_of_the_network_in_few_rounds(dtype, steps):
    # By default the error asked for is what such a network is capable of, five eps. An image that rounding alone moves
    # by more, between the two networks, may move so here too.
    checkpoint = load_checkpoint("digits")
    chain, x = checkpoint.schedule.chain(steps), latents(4, *checkpoint.shape).float()
    exact = sample(checkpoint.model.float(), x, chain, method="sequential").x_0
    model, goal = checkpoint.model.to(dtype), 10 * torch.finfo(dtype).eps / 2
    oracle = sample(model, x, chain, method="sequential").x_0
    got = sample(model, x, chain)
    error = each(got.x_0, oracle)
    assert error.median() < goal
    assert (error < goal + each(oracle, exact)).all()
    assert got.rounds < max(25, steps // 20)
    # Where rounding alone keeps the estimate above, it says so.
    assert set(got.solution.status.tolist()) <= {int(Status.CONVERGED), int(Status.STALLED)}
    assert (error <= got.error).all()


@torch.no_grad()
@pytest.mark.parametrize("dtype", HALVES)
def test_latents_in_low_precision_are_only_read_and_written_so(dtype):
    checkpoint = load_checkpoint("digits")
    chain = checkpoint.schedule.chain(30)
    x = latents(2, *checkpoint.shape).to(dtype)
    got = sample(checkpoint.model, x, chain)
    assert got.x_0.dtype == got.trajectory.dtype == dtype
    assert torch.equal(got.x_0, sample(checkpoint.model, x.double(), chain).x_0.to(dtype))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "gradient", [Implicit(), Implicit(solver=Anderson(2, coupling="causal"))], ids=["sweep", "at once"]
)
def test_gradients_are_summed_over_the_steps_in_more_than_the_dtype_of_the_network(dtype, gradient):
    chain, x = SCHEDULE.chain(300), latents(3, 4).requires_grad_()
    gradients = {}
    for kind in (torch.float64, dtype):
        model = Gaussian(kind)
        out = sample(model, x, chain, gradient=gradient, error=1e-5, method=Parallel())
        gradients[kind] = torch.autograd.grad((out.x_0 * x.detach()).sum(), [x, model.weight])
    assert gradients[dtype][1].dtype == dtype
    for low, full in zip(gradients[dtype], gradients[torch.float64], strict=True):
        assert (low - full).norm() <= 2 * torch.finfo(dtype).eps * full.norm()
    assert (out.solution.adjoint.evaluations <= 10 * len(chain)).all()
