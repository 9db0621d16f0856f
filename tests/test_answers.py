"""What a model may answer, and how it is told that it does not fit: one line with the argument and the remedy."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from mixture import Mixture, latents, means
from torch import nn

from diffusion import DiffusersModel, Guided, Schedule, invert, sample
from pydeqsolve import Implicit

SCHEDULE = Schedule.linear(100, 1e-3, 0.1)
CHAIN = SCHEDULE.chain(6)
X = latents(3, 2, 4, 4).float()


def plain(x, t):
    return 0.1 * x


class Answer(dict):
    """As a ModelOutput of diffusers."""

    @property
    def sample(self):
        return self["sample"]


def scalar(x, t):
    return 0.1 * x * (1 if t.item() > 3 else 2)


def branching(x, t):
    return 0.1 * x if t > 3 else 0.2 * x


LINEAR = nn.Linear(1, 1).eval()
TABLE, EMBEDDING = torch.ones(1000), nn.Embedding(1000, 1).eval()
CONVOLUTION = nn.Conv2d(5, 5, 3, padding=1).eval()
WIDE = nn.Conv2d(2, 2, 3, padding=1).double().eval()
WRONG = {
    "an output object": (
        lambda x, t: SimpleNamespace(sample=plain(x, t)),
        TypeError,
        r"Simple.*DiffusersModel\(unet\)",
    ),
    "a ModelOutput": (lambda x, t: Answer(sample=plain(x, t)), TypeError, r"got Answer: wrap it, DiffusersModel"),
    "a dict": (lambda x, t: {"eps": plain(x, t)}, TypeError, r"got dict with 'eps': wrap it, .*\['eps'\]"),
    "a tuple": (lambda x, t: (plain(x, t),), TypeError, r"got tuple: wrap it, .*\[0\]"),
    "nothing": (lambda x, t: None, TypeError, "got NoneType"),
    "an array": (lambda x, t: plain(x, t).numpy(), TypeError, "got ndarray"),
    "variances": (
        lambda x, t: torch.cat([x, x], 1),
        ValueError,
        r"got \(.*, 4, 4, 4\): drop the variances .*\[:, :2\]",
    ),
    "fewer channels": (lambda x, t: x[:, :1], ValueError, r"got \(.*, 1, 4, 4\)$"),
    "another size": (lambda x, t: x[..., :3], ValueError, r"got \(.*, 2, 4, 3\)$"),
    "fewer images": (lambda x, t: x[:1, :, :1], ValueError, r"is required, got \(1, 2, 1, 4\)$"),
    "integers": (lambda x, t: x.long(), TypeError, "got torch.int64: floating-point"),
    "complex values": (lambda x, t: x + 0j, TypeError, "got torch.complex64: floating-point"),
    "another device": (lambda x, t: x.to("meta"), ValueError, "got one on meta: that of x, cpu"),
    "a scalar t": (scalar, ValueError, r"t \(\d+,\) torch.int64, one for each row: .*each distinct t"),
    "a branch on t": (branching, ValueError, "each distinct t"),
    "a table of time steps": (lambda x, t: x * TABLE[t.float()], ValueError, "integer time steps has chains of them"),
    "an embedding of them": (
        lambda x, t: x * EMBEDDING(t.float()),
        ValueError,
        "integer time steps has chains of them",
    ),
    "a float t": (lambda x, t: x * LINEAR(t[:, None])[..., None, None], ValueError, r"net\(x, t.float\(\), \*inputs\)"),
    "other channels": (lambda x, t: CONVOLUTION(x), ValueError, "the network's own channels"),
    "another dtype": (lambda x, t: WIDE(x.float()), ValueError, "own dtype"),
    "no t": (lambda x: x, TypeError, r"called as model\(x, t\): .*; wrap a network"),
    "more inputs": (lambda x, t, c: x, TypeError, r"called as model\(x, t\): .*missing 1 required"),
    "added conditioning": (lambda x, t, added=None: x * ("text" in added), TypeError, "called as .*NoneType"),
}


@torch.no_grad()
@pytest.mark.parametrize(("model", "error", "words"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("use", ["parallel", "sequential", "exact"])
def test_an_answer_that_does_not_fit_is_said_in_one_line(model, error, words, use):
    with pytest.raises(error, match=f"^model: .*{words}") as raised:
        invert(model, X, CHAIN) if use == "exact" else sample(model, X, CHAIN, method=use)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("error", [RuntimeError("mine"), ValueError("mine"), torch.OutOfMemoryError("full")])
def test_what_a_model_raises_for_reasons_of_its_own_comes_through(error):
    def model(x, t):
        raise error

    with pytest.raises(type(error)) as raised:
        sample(model, X, CHAIN)
    assert raised.value is error


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_an_answer_in_another_float_type_is_taken(dtype):
    got = sample(lambda x, t: plain(x, t).to(dtype), X, CHAIN).x_0
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, sample(plain, X, CHAIN).x_0, rtol=2e-2, atol=2e-2)


def training():
    return Mixture(SCHEDULE, means(size=32)).train()


@pytest.mark.parametrize(
    "wrap", [lambda net: net, nn.DataParallel, lambda net: Guided(net, 1.0, torch.zeros(32)), nn.Sequential]
)
@pytest.mark.parametrize("use", ["sample", "sample with a gradient", "invert"])
def test_a_network_in_training_mode_warns_once(wrap, use):
    model = wrap(training())
    inputs = (torch.zeros(3, 32),) if isinstance(model, Guided) else ()
    if isinstance(model, nn.Sequential):
        model.forward = lambda x, t: model[0](x, t)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        if use == "invert":
            invert(model, X, CHAIN, "ddim", inputs=inputs)
        else:
            sample(model, X, CHAIN, inputs=inputs, gradient=Implicit() if "gradient" in use else None)
    said = [str(warning.message) for warning in seen if "train" in str(warning.message)]
    assert len(said) == 1
    assert "model.eval()" in said[0]


@torch.no_grad()
@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda net: Guided(net, 1.0, torch.zeros(32)), nn.ModuleList])
def test_a_wrapper_made_anew_around_a_network_in_evaluation_mode_does_not_warn(wrap):
    model = wrap([training().eval()]) if wrap is nn.ModuleList else wrap(training().eval())
    inputs = (torch.zeros(3, 32),) if isinstance(model, Guided) else ()
    if isinstance(model, nn.ModuleList):
        model.forward = lambda x, t: model[0](x, t)
    sample(model, X, CHAIN, inputs=inputs)  # the tests make errors of warnings


@torch.no_grad()
def test_guidance_of_a_function_does_not_warn():
    sample(Guided(lambda x, t, c: 0.1 * x, 2.0, torch.zeros(1)), X, CHAIN, inputs=(torch.zeros(3),))


@torch.no_grad()
@pytest.mark.parametrize("kind", [list, tuple])
def test_a_list_of_generators_gives_every_image_the_noise_that_it_has_alone(kind):
    chain = SCHEDULE.chain(6, eta=1.0)
    seeded = lambda seed: torch.Generator().manual_seed(seed)  # noqa: E731
    together = sample(plain, X, chain, method="sequential", generator=kind(seeded(i) for i in range(3))).x_0
    for i in range(3):
        alone = sample(plain, X[i : i + 1], chain, method="sequential", generator=seeded(i)).x_0
        assert torch.equal(together[i : i + 1], alone)


@pytest.mark.parametrize(
    ("generator", "error", "words"),
    [
        ([torch.Generator()], ValueError, "generator: one for each of the 3 images is required, got 1"),
        ([], ValueError, "generator: one for each of the 3"),
        ([torch.Generator(), None, torch.Generator()], TypeError, "generator: a torch.Generator, .* got NoneType"),
        (5, TypeError, "generator: a torch.Generator, or a list of them, is required, got int"),
    ],
)
def test_what_is_no_generator_is_named(generator, error, words):
    with pytest.raises(error, match=words):
        sample(plain, X, SCHEDULE.chain(6, eta=1.0), generator=generator)


def test_a_generator_of_another_device_is_refused(monkeypatch):
    from diffusion.models.answers import draw

    class Elsewhere(torch.Generator):
        device = torch.device("cuda", 1)

    with pytest.raises(ValueError, match="generator: one on the CPU or on cpu is required, got one on cuda:1"):
        draw((1, 2), Elsewhere(), torch.device("cpu"))


class UNet2DModel(nn.Module):
    """Doubles its states, as diffusers' class of that name is called."""

    def __init__(self, **options):
        super().__init__()
        self.config = SimpleNamespace(**options)

    def forward(self, sample, timestep, class_labels=None):
        scale = 2 if class_labels is None else 1 + class_labels[:, None, None, None]
        return SimpleNamespace(sample=sample * scale)


class UNet2DConditionModel(UNet2DModel):
    def forward(self, sample, timestep, encoder_hidden_states, class_labels=None):
        return SimpleNamespace(sample=sample + encoder_hidden_states.sum((1, 2))[:, None, None, None])


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_a_network_inside_another_module_is_known_for_what_it_is(wrap):
    if wrap is torch.compile:
        wrap = lambda net: torch.compile(net, backend="eager")  # noqa: E731
    model = DiffusersModel(wrap(UNet2DConditionModel(in_channels=2, out_channels=2)))
    assert model.conditional
    assert model.config.in_channels == 2
    got = model(torch.ones(2, 2, 1, 1), torch.tensor([1, 2]), torch.tensor([[[3.0]], [[4.0]]]))
    assert got.flatten().tolist() == [4, 4, 5, 5]
    with pytest.raises(ValueError, match="got 5 for 2"):
        DiffusersModel(wrap(UNet2DModel(in_channels=2, out_channels=5)))


@pytest.mark.parametrize(
    ("options", "inputs", "words"),
    [
        ({"num_class_embeds": 3}, 0, "inputs: class labels, one for each image, are required by UNet2DModel"),
        ({"class_embed_type": "timestep"}, 0, "inputs: class labels"),
        ({}, 0, r"x: 5 channels are required by UNet2DModel, got shape \(1, 1, 2, 2\)"),
    ],
)
def test_a_network_says_what_it_lacks(options, inputs, words):
    channels = 1 if options else 5
    model = DiffusersModel(UNet2DModel(in_channels=channels, out_channels=channels, **options))
    with pytest.raises(ValueError, match=words):
        model(torch.zeros(1, 1, 2, 2), torch.zeros(1, dtype=torch.long))


@pytest.mark.parametrize("guided", [False, True])
def test_images_of_other_channels_are_refused_under_the_name_they_were_given(guided):
    model = DiffusersModel(UNet2DModel(in_channels=3, out_channels=3)).eval()
    model, inputs = (Guided(model, 2.0, torch.tensor(0)), (torch.tensor([1, 2, 0]),)) if guided else (model, ())
    words = r"images of 3 channels, the model's, are required, got \(2, 4, 4\)"
    with pytest.raises(ValueError, match=f"latent: {words}"):
        sample(model, X, CHAIN, inputs=inputs)
    with pytest.raises(ValueError, match=f"x_0: {words}"):
        invert(model, X, CHAIN, inputs=inputs)


@pytest.mark.parametrize(
    "option",
    [{"addition_embed_type": "image"}, {"time_cond_proj_dim": 8}, {"encoder_hid_dim_type": "ip_image_proj"}],
)
def test_conditioning_that_would_be_left_out_is_refused_by_name(option):
    ((name, value),) = option.items()
    with pytest.raises(ValueError, match=f"unet: {name}={value!r} is not supported; wrap it: .*added_cond_kwargs"):
        DiffusersModel(UNet2DConditionModel(in_channels=4, out_channels=4, **option))


def test_a_network_that_takes_something_else_second_is_refused():
    class PixArtTransformer2DModel(nn.Module):
        def forward(self, hidden_states, encoder_hidden_states, pooled_projections, timestep): ...

    words = r"called as \(x, timestep, …\) is required, PixArtTransformer2DModel takes \(hidden_states, encoder_hidden"
    with pytest.raises(TypeError, match=words):
        DiffusersModel(PixArtTransformer2DModel())


def test_a_network_that_names_no_time_is_taken_as_it_is():
    class Passing(nn.Module):
        def forward(self, *args, **options):
            return SimpleNamespace(sample=args[0] + args[1][:, None])

    assert DiffusersModel(Passing())(torch.zeros(2, 1), torch.tensor([3, 4])).flatten().tolist() == [3, 4]
