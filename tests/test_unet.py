"""UNet: the laws its architecture implies, its derivatives, and its refusals."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.models.unet import Attention, UNet, sinusoids

SMALL = {"channels": 8, "multipliers": (1, 2), "blocks": (1, 1), "groups": 4, "embedding": 8, "timesteps": 20}


def awake(shape=(1, 8, 8), seed=0, **options):
    """A small U-Net in float64 whose zero-initialised layers have been woken up."""
    torch.manual_seed(seed)
    model = UNet(shape, **{**SMALL, **options}).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), unshuffle=st.sampled_from([1, 2]), attention=st.booleans())
def test_each_row_is_what_it_would_be_alone(seed, unshuffle, attention):
    model = awake(unshuffle=unshuffle, attention=attention)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 1, 8, 8, generator=generator, dtype=torch.float64)
    t = torch.randint(0, 20, (5,), generator=generator)
    together = model(x, t)
    alone = torch.cat([model(x[i : i + 1], t[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)


def test_the_prediction_depends_on_the_time_step():
    model = awake()
    x = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    assert (model(x, torch.tensor([3])) - model(x, torch.tensor([4]))).abs().max() > 1e-4


def test_the_prediction_does_not_depend_on_the_memory_layout_of_the_input():
    model = awake(shape=(3, 8, 8))
    x, t = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 19])
    transposed = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(transposed, t), model(x, t), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model(x.transpose(2, 3).contiguous().transpose(2, 3), t), model(x, t))


def test_an_untrained_model_predicts_zero():
    model = UNet((1, 8, 8), **SMALL)
    assert model(torch.randn(2, 1, 8, 8), torch.tensor([0, 5])).abs().max() == 0


def test_every_parameter_receives_a_gradient():
    model = awake(attention=True, unshuffle=2)
    model(torch.randn(3, 1, 8, 8, dtype=torch.float64), torch.arange(3)).square().sum().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert silent == []


def test_first_and_second_derivatives_agree_with_finite_differences():
    model = awake(shape=(1, 2, 2), attention=True)
    x, t = torch.randn(1, 1, 2, 2, dtype=torch.float64, requires_grad=True), torch.tensor([7])
    assert torch.autograd.gradcheck(lambda x: model(x, t), (x,))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # the fused one has no second derivative
        assert torch.autograd.gradgradcheck(lambda x: model(x, t), (x,))


def test_forward_mode_derivative_is_the_transpose_of_the_backward_one():
    model = awake()
    x, v, u = torch.randn(3, 2, 1, 8, 8, dtype=torch.float64)
    t = torch.tensor([1, 11])
    forward = torch.func.jvp(lambda x: model(x, t), (x,), (v,))[1]
    (backward,) = torch.func.vjp(lambda x: model(x, t), x)[1](u)
    torch.testing.assert_close((forward * u).sum(), (backward * v).sum(), rtol=1e-9, atol=1e-9)


def test_its_jacobian_can_be_had_by_mapping_the_backward_pass():
    model = awake(unshuffle=2)
    x, t = torch.randn(1, 1, 8, 8, dtype=torch.float64), torch.tensor([2])
    jacobian = torch.func.jacrev(lambda x: model(x, t))(x).reshape(64, 64)
    expected = torch.autograd.functional.jacobian(lambda x: model(x, t), x).reshape(64, 64)
    torch.testing.assert_close(jacobian, expected)


def test_compiling_does_not_change_the_prediction():
    model = awake(attention=True)
    x, t = torch.randn(2, 1, 8, 8, dtype=torch.float64), torch.tensor([1, 19])
    torch.testing.assert_close(torch.compile(model, backend="eager")(x, t), model(x, t))


@pytest.mark.parametrize("size", [(7, 7), (8, 6), (5, 3)])
def test_odd_sizes_come_back_as_they_went_in(size):
    model = awake(shape=(2, *size), multipliers=(1, 2, 2), blocks=(1, 1, 1))
    assert model(torch.randn(1, 2, *size, dtype=torch.float64), torch.tensor([0])).shape == (1, 2, *size)


def test_attention_does_not_care_about_the_order_of_the_pixels():
    torch.manual_seed(0)
    layer = Attention(8, 4).double()
    torch.nn.init.normal_(layer.project.weight)
    x = torch.randn(2, 8, 3, 3, dtype=torch.float64)
    order = torch.randperm(9)
    shuffled = x.flatten(2)[:, :, order].unflatten(2, (3, 3))
    torch.testing.assert_close(layer(shuffled), layer(x).flatten(2)[:, :, order].unflatten(2, (3, 3)))


def test_time_embeddings_have_unit_circles_of_falling_frequency():
    table = sinusoids(50, 8)
    torch.testing.assert_close(table[:, :4] ** 2 + table[:, 4:] ** 2, torch.ones(50, 4))
    torch.testing.assert_close(table[:, 4], torch.arange(50.0).sin(), rtol=0, atol=1e-6)
    torch.testing.assert_close(table[:, 7], (torch.arange(50.0) / 1000).sin(), rtol=0, atol=1e-6)


def test_the_configuration_survives_json_and_builds_the_same_network():
    torch.manual_seed(3)
    model = UNet((1, 8, 8), **SMALL, attention=True, unshuffle=2)
    again = UNet(**json.loads(json.dumps(model.config)))
    again.load_state_dict(model.state_dict())
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([1, 2])
    assert torch.equal(again(x, t), model(x, t))
    assert again.config == model.config


def test_half_precision_weights_work_on_half_precision_images():
    model = awake()
    x, t = torch.randn(1, 1, 8, 8), torch.tensor([4])
    expected = model(x.double(), t)
    got = model.bfloat16()(x.bfloat16(), t)
    assert got.dtype == torch.bfloat16
    assert (got.double() - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shape": (1, 8)}, "shape"),
        ({"shape": (1, 9, 8), "unshuffle": 2}, "multiples of unshuffle = 2"),
        ({"channels": 10}, "no multiple of groups = 4"),
        ({"channels": 0}, "channels: positive"),
        ({"multipliers": ()}, "blocks: one number"),
        ({"blocks": (1,)}, "blocks: one number"),
        ({"blocks": (1, 0)}, "blocks: positive"),
        ({"embedding": 7}, "embedding: an even"),
        ({"timesteps": 2.5}, "timesteps: positive"),
        ({"classes": -1}, "classes: an integer"),
        ({"classes": True}, "classes: an integer"),
    ],
)
def test_wrong_arguments_are_refused_by_name(change, words):
    with pytest.raises(ValueError, match=words):
        UNet(**{"shape": (1, 8, 8), **SMALL, **change})


@pytest.mark.parametrize(("x", "t"), [((2, 1, 8, 9), (2,)), ((2, 3, 8, 8), (2,)), ((2, 1, 8, 8), (1,))])
def test_inputs_of_another_shape_are_refused(x, t):
    with pytest.raises(ValueError, match="shapes"):
        UNet((1, 8, 8), **SMALL)(torch.zeros(x), torch.zeros(t, dtype=torch.long))


def conditional(**options):
    return awake(classes=3, **options)


def test_each_label_has_its_prediction_and_no_label_is_that_of_no_class():
    model, x, t = conditional(), torch.randn(4, 1, 8, 8, dtype=torch.float64), torch.full((4,), 5)
    said = [model(x, t, torch.full((4,), label)) for label in range(4)]
    for i, one in enumerate(said):
        assert all((one - other).abs().max() > 1e-4 for other in said[:i])
    assert torch.equal(model(x, t), said[int(model.no_class)])
    mixed = model(x, t, torch.tensor([2, 0, 3, 1]))
    torch.testing.assert_close(mixed, torch.stack([said[2][0], said[0][1], said[3][2], said[1][3]]))


def test_a_network_without_classes_keeps_its_configuration_and_its_initial_weights():
    torch.manual_seed(0)
    plain = UNet((1, 8, 8), **SMALL)
    torch.manual_seed(0)
    same = UNet((1, 8, 8), **SMALL, classes=0)
    assert "classes" not in plain.config
    assert plain.config == same.config
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), same.parameters(), strict=True))


def test_a_conditional_network_survives_json():
    model = conditional()
    again = UNet(**json.loads(json.dumps(model.config))).double()
    again.load_state_dict(model.state_dict())
    x, t, label = torch.randn(2, 1, 8, 8, dtype=torch.float64), torch.tensor([1, 2]), torch.tensor([0, 3])
    assert torch.equal(again(x, t, label), model(x, t, label))


@pytest.mark.parametrize("label", [torch.tensor([0, 4]), torch.tensor([-1, 0]), torch.tensor([0]), torch.zeros(2)])
def test_a_label_that_is_no_class_is_refused(label):
    with pytest.raises(ValueError, match="label"):
        conditional()(torch.zeros(2, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 1]), label)


def test_a_label_for_a_network_without_classes_is_refused():
    with pytest.raises(ValueError, match="label: none"):
        awake()(torch.zeros(1, 1, 8, 8, dtype=torch.float64), torch.tensor([0]), torch.tensor([0]))
