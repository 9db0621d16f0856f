"""Wrappers of other networks: guidance against its formula, diffusers' call conventions."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from diffusion.models.checkpoint import load_checkpoint
from diffusion.models.wrappers import DiffusersModel, Guided


class Affine(nn.Module):
    """x·c + t, with a count of calls and rows."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x, t, condition):
        self.calls.append(len(x))
        return x * condition + t[:, None]


@given(scale=st.floats(-3, 10), row=st.floats(-2, 2))
def test_guidance_extrapolates_from_the_unconditional_prediction(scale, row):
    x, t = torch.tensor([[1.0, 2.0], [3.0, row]], dtype=torch.float64), torch.tensor([5, 7])
    condition, null = torch.tensor([[2.0, 4.0], [-1.0, 0.5]], dtype=torch.float64), torch.tensor([0.25, 1.0])
    guided = Guided(Affine(), scale, null)(x, t, condition)
    without, conditioned = x * null + t[:, None], x * condition + t[:, None]
    torch.testing.assert_close(guided, (1 - scale) * without + scale * conditioned)


def test_guidance_calls_its_model_once_with_both_halves():
    model = Affine()
    Guided(model, 3.0, torch.zeros(1, 2))(torch.ones(4, 2), torch.zeros(4, dtype=torch.long), torch.ones(4, 2))
    assert model.calls == [8]


def test_guidance_keeps_class_labels_integers():
    kinds = []

    def model(x, t, label):
        kinds.append(label)
        return x

    Guided(model, 2.0, torch.tensor(10))(torch.ones(2, 1), torch.zeros(2, dtype=torch.long), torch.tensor([3, 4]))
    assert kinds[0].tolist() == [10, 10, 3, 4]
    assert kinds[0].dtype == torch.int64


def test_guidance_takes_what_stands_for_no_condition_row_by_row():
    seen = []

    def model(x, t, first, second):
        seen.extend([first, second])
        return x * first + second

    x, t = torch.ones(2, 1, dtype=torch.float64), torch.tensor([5, 7])
    c, d, no_c, no_d = (torch.full((2, 1), v, dtype=torch.float64) for v in (3.0, 10.0, 2.0, 0.0))
    guided = Guided(model, 4.0)(x, t, c, d, no_c, no_d)
    torch.testing.assert_close(guided, torch.full((2, 1), 2 + 4.0 * (13 - 2), dtype=torch.float64))
    assert [s.flatten().tolist() for s in seen] == [[2, 2, 3, 3], [0, 0, 10, 10]]


@pytest.mark.parametrize(("null", "count"), [(torch.zeros(1), 0), (torch.zeros(1), 2), (None, 0), (None, 3)])
def test_guidance_of_the_wrong_number_of_inputs_is_refused(null, count):
    with pytest.raises(ValueError, match="inputs"):
        Guided(Affine(), 2.0, null)(torch.ones(2, 1), torch.zeros(2, dtype=torch.long), *[torch.ones(2, 1)] * count)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_that_is_not_finite_is_refused(scale):
    with pytest.raises(ValueError, match="scale"):
        Guided(Affine(), scale, torch.zeros(1))


class UNet2DModel(nn.Module):
    """Records how it is called, as diffusers' class of that name."""

    def __init__(self, **_):
        super().__init__()
        self.seen = None

    def forward(self, sample, timestep, class_labels=None):
        self.seen = class_labels
        return SimpleNamespace(sample=sample * 2 + timestep[:, None, None, None])


class UNet2DConditionModel(UNet2DModel):
    def forward(self, sample, timestep, encoder_hidden_states):
        self.seen = encoder_hidden_states
        return SimpleNamespace(sample=sample + encoder_hidden_states.sum((1, 2))[:, None, None, None])


def test_an_unconditional_network_is_called_with_and_without_class_labels():
    model = DiffusersModel(UNet2DModel())
    x, t = torch.ones(2, 1, 2, 2), torch.tensor([1, 3])
    assert model(x, t)[:, 0, 0, 0].tolist() == [3, 5]
    assert model.unet.seen is None
    model(x, t, torch.tensor([4, 5]))
    assert model.unet.seen.tolist() == [4, 5]


def test_a_conditional_network_is_given_its_text_embedding():
    model = DiffusersModel(UNet2DConditionModel())
    prediction = model(torch.zeros(2, 1, 2, 2), torch.tensor([1, 3]), torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]]))
    assert prediction[:, 0, 0, 0].tolist() == [3, 7]


@pytest.mark.parametrize(
    ("network", "inputs", "words"),
    [
        (UNet2DConditionModel, 0, r"1 to 2 \(encoder_hidden_states, class_labels\) are required by UNet2DCond.* got 0"),
        (UNet2DConditionModel, 3, "1 to 2"),
        (UNet2DModel, 2, r"0 to 1 \(class_labels\)"),
    ],
)
def test_the_wrong_number_of_inputs_is_refused(network, inputs, words):
    with pytest.raises(ValueError, match=words):
        DiffusersModel(network())(torch.zeros(1, 1, 2, 2), torch.zeros(1, dtype=torch.long), *[torch.zeros(1)] * inputs)


def test_a_network_of_other_channels_out_than_in_is_refused():
    unet = UNet2DModel()
    unet.config = SimpleNamespace(in_channels=3, out_channels=4)
    with pytest.raises(ValueError, match="4 for 3"):
        DiffusersModel(unet)


def test_variances_that_a_network_predicts_beside_its_output_are_left_out():
    class Learned(UNet2DModel):
        def forward(self, sample, timestep, class_labels=None):
            return SimpleNamespace(sample=torch.cat([2 * sample, sample - 1], 1))

    unet = Learned()
    unet.config = SimpleNamespace(in_channels=3, out_channels=6)
    x = torch.randn(2, 3, 2, 2)
    assert torch.equal(DiffusersModel(unet)(x, torch.tensor([1, 2])), 2 * x)


def test_a_network_that_needs_further_conditioning_is_refused():
    unet = UNet2DConditionModel()
    unet.config = SimpleNamespace(in_channels=4, out_channels=4, addition_embed_type="image")
    with pytest.raises(ValueError, match="addition_embed_type='image'"):
        DiffusersModel(unet)


def test_a_guided_prediction_is_rescaled_to_the_spread_of_the_conditional_one():
    x, t = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)), torch.zeros(3)
    condition, null = torch.rand(3, 5, generator=torch.Generator().manual_seed(1)) + 1, torch.zeros(5)
    plain, whole, half = (Guided(Affine(), 4.0, null, rescale=phi)(x, t, condition) for phi in (0.0, 1.0, 0.5))
    torch.testing.assert_close(whole.std(1), (x * condition).std(1))
    torch.testing.assert_close(half, (plain + whole) / 2)
    with pytest.raises(ValueError, match="rescale: 0 to 1"):
        Guided(Affine(), 4.0, null, rescale=1.5)


def test_only_a_module_is_wrapped():
    with pytest.raises(TypeError, match="unet"):
        DiffusersModel("runwayml/stable-diffusion")


def diffusers_folder(folder, **scheduler):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), layers_per_block=1,
        norm_num_groups=4, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    unet.save_pretrained(folder)
    if scheduler:
        diffusers.DDIMScheduler(**scheduler).save_pretrained(folder.parent / "scheduler")
    return unet


def test_a_folder_written_by_diffusers_is_read_with_its_scheduler(tmp_path):
    unet = diffusers_folder(tmp_path / "unet", prediction_type="v_prediction", steps_offset=1, set_alpha_to_one=False)
    loaded = load_checkpoint(tmp_path / "unet")
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 500])
    torch.testing.assert_close(loaded.model(x, t), unet(x, t).sample)
    assert (loaded.shape, loaded.prediction, loaded.schedule.steps_offset) == ((1, 8, 8), "v", 1)
    assert loaded.schedule.final_alpha_cumprod == loaded.schedule.alphas_cumprod[0].item()


def test_damaged_weights_written_by_diffusers_are_refused_with_the_folder(tmp_path):
    diffusers_folder(tmp_path / "unet")
    path = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="unet: diffusers cannot read it"):
        load_checkpoint(tmp_path / "unet")


def test_another_class_of_diffusers_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(ValueError, match="AutoencoderKL"):
        load_checkpoint(tmp_path)
