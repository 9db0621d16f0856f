"""What sampling takes besides the model, in a step and for a whole chain, and what a chain keeps between calls."""

import sys
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion import Parallel, Schedule, sample
from pydeqsolve import Implicit

SCHEDULE = Schedule.linear(1000, 1e-4, 0.02)


def still(x, t):
    return x


class Operations(TorchDispatchMode):
    """Counts torch's operations."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function.overloadpacket] += 1
        return function(*args, **(kwargs or {}))


def operations(act):
    with Operations() as counting:
        act()
    return counting.counts


def functions(act):
    counts = Counter()
    sys.setprofile(lambda frame, event, argument: counts.update([frame.f_code.co_name] if event == "call" else []))
    act()
    sys.setprofile(None)
    return counts


def each_step(count, chain, model=still, **options):
    """What `count` counts in one step, as the difference of a chain of 20 and one of 40."""
    x = torch.ones(2, 1, 4, 4)

    def counted(steps):
        one = chain(steps)
        act = lambda: sample(model, x, one, "sequential", **options)  # noqa: E731
        act()
        return count(act)

    many, few = counted(40), counted(20)
    return {name: (many[name] - few[name]) / 20 for name in many if many[name] != few[name]}


@torch.no_grad()
def test_a_step_takes_the_three_operations_of_the_formula_and_two_of_dtypes():
    found = each_step(operations, SCHEDULE.chain)
    assert sum(found.values()) == 5, found


@torch.no_grad()
@pytest.mark.parametrize("prediction", ["flow", "v"])
def test_an_answer_that_is_not_noise_is_read_by_three_operations_more(prediction):
    found = each_step(operations, Schedule.flow().chain if prediction == "flow" else SCHEDULE.chain,
                      prediction=prediction)  # fmt: skip
    assert sum(found.values()) == 8, found


@torch.no_grad()
def test_a_step_calls_two_functions_around_the_model():
    found = each_step(functions, SCHEDULE.chain)
    assert found.pop("still") == 1
    assert sum(found.values()) == 2, found


@torch.no_grad()
def test_a_chain_that_was_sampled_before_computes_nothing_anew():
    chain, x = SCHEDULE.chain(3), torch.ones(1, 1, 4, 4)
    first = operations(lambda: sample(still, x, chain, "sequential"))
    again = operations(lambda: sample(still, x, chain, "sequential"))
    assert again[torch.ops.aten.sqrt] < first[torch.ops.aten.sqrt]
    assert torch.ops.aten.cumprod not in again  # which sequential sampling has no use for


def test_a_chain_first_sampled_in_inference_mode_serves_a_gradient_later():
    chain, x = SCHEDULE.chain(5), torch.randn(2, 4, dtype=torch.float64)
    act = lambda chain, x: sample(lambda x, t: 0.1 * torch.sin(x), x, chain, gradient=Implicit()).x_0.sum()  # noqa: E731
    with torch.inference_mode():
        act(chain, x)
    gradients = []
    for one in (chain, SCHEDULE.chain(5)):
        leaf = x.clone().requires_grad_()
        act(one, leaf).backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("part", [lambda c: c.tail(4), lambda c: c.at(torch.arange(4, 12)), lambda c: c.partial(0.667)])
def test_some_steps_of_a_chain_have_coefficients_of_their_own(part):
    used, fresh = SCHEDULE.chain(12, spacing="quadratic"), SCHEDULE.chain(12, spacing="quadratic")
    assert len(used.coefficients[0]) == len(used.blind) == len(used.still) == 12
    for name in ("coefficients", "size", "blind", "still"):
        got, expected = getattr(part(used), name), getattr(part(fresh), name)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
        assert len(expected if name != "coefficients" else expected[0]) == 8 + (name == "size")


@torch.no_grad()
def test_a_step_that_did_not_fit_is_not_tried_whole_again():
    rows = []

    def small(x, t):
        rows.append(len(x))
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 0.1 * x

    sample(small, torch.ones(4, 6), SCHEDULE.chain(9), "sequential")
    assert max(rows[3:]) == 2
    assert rows.count(4) <= 2


def buffered():
    """A network that answers into one piece of memory for each shape, as a CUDA graph does."""
    answers = {}

    def model(x, t):
        answer = answers.setdefault(x.shape, torch.empty_like(x))
        return torch.mul(x, t[:, None] * 2e-4 + 0.1, out=answer)

    return model


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", ["ddim", "dpmsolver++2m"])
@pytest.mark.parametrize("method", ["sequential", Parallel()], ids=["sequential", "parallel"])
@pytest.mark.parametrize("rows", [None, 2])
def test_a_network_may_answer_into_the_same_memory_every_time(method, rule, dtype, rows):
    x, chain = torch.ones(4, 3, dtype=dtype).cumsum(0), SCHEDULE.chain(8, rule=rule)
    model = buffered()
    got = sample(model, x, chain, method, rows_per_call=rows).x_0
    expected = sample(lambda x, t: model(x, t).clone(), x, chain, method, rows_per_call=rows).x_0
    assert torch.equal(got, expected)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["sequential", Parallel()], ids=["sequential", "parallel"])
def test_a_network_may_write_into_its_input(method, dtype):
    latent, chain = torch.ones(2, 3, dtype=dtype), SCHEDULE.chain(8)
    got = sample(lambda x, t: x.mul_(0.3).clone(), latent, chain, method).x_0
    assert torch.equal(latent, torch.ones_like(latent))
    assert torch.equal(got, sample(lambda x, t: 0.3 * x, latent, chain, method).x_0)


def test_whoever_changes_the_coefficients_that_a_chain_shows_has_a_copy():
    chain, fresh = SCHEDULE.chain(5, rule="dpmsolver++2m"), SCHEDULE.chain(5, rule="dpmsolver++2m")
    for part in (chain.a, chain.c, *chain.past):
        part.zero_()
    for got, expected in zip(chain.coefficients, fresh.coefficients, strict=True):
        assert torch.equal(got, expected)


@torch.no_grad()
def test_images_that_meet_the_error_at_once_take_no_operation_for_every_step():
    x, found = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0)), []

    def act(chain):
        found.append(sample(lambda x, t: 0.1 * torch.sin(x), x, chain, Parallel()).converged)

    few, many = (operations(lambda chain=SCHEDULE.chain(T): act(chain)).total() for T in (150, 600))
    assert torch.cat(found).all()
    assert many - few < 450
