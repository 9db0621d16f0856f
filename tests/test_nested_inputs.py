"""Inputs that are None or nests of tensors are handed to fn as they were given."""

from collections import namedtuple

import problems
import pytest
import torch

from pydeqsolve import DEQ, Stop, solve

Pair = namedtuple("Pair", ["scale", "shift"])


def fn(z, mask, given, *rest):
    assert mask is None
    assert isinstance(given["pair"], Pair)
    (extra,) = given["more"]
    return given["pair"].scale * torch.tanh(z) + given["pair"].shift + extra


def test_samples_leave_with_their_part_of_every_tensor():
    scale = torch.tensor([[0.1], [0.95], [0.5]], dtype=torch.float64)
    shift = torch.randn(3, 2, dtype=torch.float64, generator=problems.generator(1))
    extra = torch.randn(3, 1, dtype=torch.float64, generator=problems.generator(2))
    seen = []

    def watched(z, *inputs):
        seen.append(len(z))
        return fn(z, *inputs)

    inputs = (None, {"pair": Pair(scale, shift), "more": [extra]})
    out = solve(watched, torch.zeros(3, 2, dtype=torch.float64), inputs, stop=Stop(1e-10))
    flat = solve(
        lambda z, a, b, c: a * torch.tanh(z) + b + c,
        torch.zeros(3, 2, dtype=torch.float64), (scale, shift, extra), stop=Stop(1e-10),
    )  # fmt: skip
    assert min(seen) < 3
    assert torch.equal(out.z, flat.z)
    assert out.evaluations.tolist() == flat.evaluations.tolist()


def test_gradients_reach_the_tensors_inside():
    x = torch.randn(3, 2, dtype=torch.float64, generator=problems.generator(3)).requires_grad_()
    z = solve(lambda z, _, d: 0.5 * z + d["x"], torch.zeros_like(x), (None, {"x": x}), stop=Stop(1e-12)).z
    (found,) = torch.autograd.grad(z.sum(), x)
    torch.testing.assert_close(found, torch.full_like(x, 2.0))


def test_a_layer_passes_an_optional_mask_on():
    layer = DEQ(lambda z, x, mask: 0.5 * z + (x if mask is None else x * mask))
    x = torch.ones(2, 3)
    torch.testing.assert_close(layer(x, None), 2 * x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer(x, 0 * x), 0 * x)


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ((None, {"a": 3}), TypeError, r"inputs\[1\]\['a'\] must be a tensor, None, or a nested"),
        (([torch.ones(4, 1)],), ValueError, r"inputs\[0\]\[0\] must have leading dimension 3"),
    ],
)
def test_what_cannot_be_gathered_is_named_by_its_place(inputs, error, message):
    with pytest.raises(error, match=message):
        solve(lambda z, *_: z, torch.ones(3, 2), inputs)


@pytest.mark.parametrize("by", ["value", "entry"])
def test_an_input_changed_in_place_is_named_by_its_place(by):
    def changes(z, mask, given):
        given["b"].add_(1.0)
        return 0.5 * z + given["a"]

    given = {"a": torch.ones(3, 2), "b": torch.ones(3, 2)}
    if by == "entry":
        with torch.inference_mode():
            given["b"] = torch.ones(3, 2)
            with pytest.raises(ValueError, match=r"fn must not change its argument inputs\[1\]\['b'\] in place"):
                solve(changes, torch.ones(3, 2), (None, given))
        return
    with pytest.raises(ValueError, match=r"fn must not change its argument inputs\[1\]\['b'\] in place"):
        solve(changes, torch.ones(3, 2), (None, given))
