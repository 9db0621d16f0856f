"""What the pipelines of a UNet and of flow transformers refuse at their entry, by name, before a network is called."""

import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from networks import of_sdxl  # noqa: E402
from test_pipeline import pipeline, small_conditional_unet, small_unet  # noqa: E402
from test_pipeline_flow import embeds, flux, made, sd3  # noqa: E402

TEXT = torch.zeros(2, 3, 12)
PIXELS = torch.full((2, 4, 8, 8), 0.5)


def unet():
    return pipeline(small_conditional_unet(), clip_sample=False), {"prompt_embeds": TEXT}, {"guidance_scale": 3.0}


def stable():
    return made(sd3()), embeds(negative=True), {"guidance_scale": 3.0}


def packed():
    return made(flux()), {**embeds(negative=True), "height": 8, "width": 8}, {"true_cfg_scale": 3.0}


def untouched(pipe):
    """The pipeline, whose network must not be called."""

    def called(*_):
        raise AssertionError("the network was called")

    pipe._network.register_forward_pre_hook(called)
    return pipe


@pytest.mark.parametrize("make", [unet, stable, packed])
@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (TEXT[0], ValueError, r"shape \(B, tokens, 12\) is required, got \(3, 12\)"),
        (TEXT[None], ValueError, r"shape \(B, tokens, 12\) is required, got \(1, 2, 3, 12\)"),
        (TEXT[..., :7], ValueError, r"shape \(B, tokens, 12\) is required, got \(2, 3, 7\)"),
        (TEXT[:, :0], ValueError, r"shape \(B, tokens, 12\) is required, got \(2, 0, 12\)"),
        (torch.tensor(1.0), ValueError, r"shape \(B, tokens, 12\) is required, got \(\)"),
        (TEXT.long(), TypeError, "floating-point values are required, got torch.int64"),
        (TEXT.bool(), TypeError, "floating-point values are required, got torch.bool"),
        (TEXT.to(torch.complex64), TypeError, "floating-point values are required, got torch.complex64"),
        (TEXT.to("meta"), ValueError, "a tensor with values is required"),
        (TEXT.numpy(), TypeError, "a tensor or None is required, got ndarray"),
    ],
)
def test_embeddings_of_another_shape_or_kind_are_refused(make, value, error, words):
    pipe, given, guided = make()
    with pytest.raises(error, match=f"^prompt_embeds: {words}"):
        untouched(pipe)(**(given | {"prompt_embeds": value}))
    with pytest.raises(error, match=f"^negative_prompt_embeds: {words}"):
        untouched(pipe)(**(given | {"negative_prompt_embeds": value}), **guided)
    places = {name: value for name, value in given.items() if name not in ("height", "width")}
    with pytest.raises(error, match=f"^prompt_embeds: {words}"):
        untouched(pipe).invert(PIXELS, **(places | {"prompt_embeds": value}))


@pytest.mark.parametrize("make", [unet, stable, packed])
@pytest.mark.parametrize("rows", [0, 3])
def test_negative_embeddings_are_one_row_or_as_many_as_the_positive_ones(make, rows):
    pipe, given, guided = make()
    given = given | {"negative_prompt_embeds": torch.zeros(rows, 3, 12)}
    with pytest.raises(
        ValueError, match=rf"^negative_prompt_embeds: \(2, 3, 12\), as prompt_embeds, or one row .*{rows}"
    ):
        untouched(pipe)(**given, **guided)


@pytest.mark.parametrize("make", [stable, packed])
@pytest.mark.parametrize("name", ["pooled_prompt_embeds", "negative_pooled_prompt_embeds"])
def test_pooled_embeddings_are_as_wide_as_the_network_has_them(make, name):
    pipe, given, guided = make()
    with pytest.raises(ValueError, match=rf"^{name}: shape \(B, 10\) is required, got \(2, 9\)"):
        untouched(pipe)(**(given | {name: torch.zeros(2, 9)}), **guided)


def test_conditions_of_sdxl_make_up_together_what_the_network_embeds():
    pipe = pipeline(of_sdxl(), clip_sample=False)
    given = {"prompt_embeds": TEXT, "add_time_ids": torch.zeros(2, 6), "pooled_prompt_embeds": torch.zeros(2, 10)}
    with pytest.raises(ValueError, match=r"^pooled_prompt_embeds: shape \(B, 10\) is required"):
        untouched(pipe)(**(given | {"pooled_prompt_embeds": torch.zeros(2, 11)}))
    with pytest.raises(ValueError, match=r"^add_time_ids: shape \(B, numbers\) is required, got \(6,\)"):
        untouched(pipe)(**(given | {"add_time_ids": torch.zeros(6)}))


@pytest.mark.parametrize(
    ("labels", "error", "words"),
    [
        (torch.tensor([1, 5]), ValueError, "labels 0 … 4 of the network's classes are required, got 1 … 5"),
        (torch.tensor([-1, 0]), ValueError, "labels 0 … 4 of the network's classes are required, got -1 … 0"),
        (torch.tensor([[1], [2]]), ValueError, r"shape \(B,\) is required, got \(2, 1\)"),
        (torch.tensor(1), ValueError, r"shape \(B,\) is required, got \(\)"),
        (torch.tensor([1.0, 2.0]), TypeError, "integers are required, got torch.float32"),
        (torch.tensor([True, False]), TypeError, "integers are required, got torch.bool"),
    ],
)
def test_labels_are_those_of_the_networks_classes(labels, error, words):
    pipe = untouched(pipeline(small_unet(num_class_embeds=5)))
    with pytest.raises(error, match=f"^class_labels: {words}"):
        pipe(class_labels=labels)
    with pytest.raises(error, match=f"^negative_class_labels: {words}"):
        pipe(class_labels=torch.tensor([1, 2]), negative_class_labels=labels, guidance_scale=2.0)


def test_labels_are_required_by_a_network_with_classes_and_not_taken_by_one_without():
    with pytest.raises(ValueError, match=r"^class_labels: required by a UNet2DModel"):
        untouched(pipeline(small_unet(num_class_embeds=5)))()
    with pytest.raises(ValueError, match=r"^class_labels: not taken by a UNet2DModel without classes"):
        untouched(pipeline())(class_labels=torch.tensor([1]))


@pytest.mark.parametrize("make", [unet, stable, packed])
@pytest.mark.parametrize(
    ("latents", "error", "words"),
    [
        (torch.zeros(2, 4), ValueError, "is required|are required"),
        (torch.tensor(1.0), ValueError, "is required|are required"),
        (torch.zeros(2, 4, 0, 8), ValueError, "is required|are required"),
        (torch.zeros(2, 3, 8, 8), ValueError, "is required|are required"),
        (torch.zeros(2, 4, 8, 8).long(), TypeError, "floating-point values are required, got torch.int64"),
        (torch.zeros(2, 4, 8, 8).to("meta"), ValueError, "a tensor with values is required"),
    ],
)
def test_latents_are_of_the_networks_shape_and_floating_point(make, latents, error, words):
    pipe, given, _ = make()
    with pytest.raises(error, match=rf"^latents: .*({words})"):
        untouched(pipe)(**given, latents=latents)


@pytest.mark.parametrize("make", [unet, stable, packed])
@pytest.mark.parametrize(
    ("image", "error", "words"),
    [
        ("cat.png", TypeError, "PIL images, arrays or tensors, of one kind, are required, got str"),
        ([PIXELS[0], PIXELS[1].numpy()], TypeError, "of one kind, are required, got array, tensor"),
        ([PIXELS[0], PIXELS[1][:, :4]], ValueError, "pictures of one size"),
        (PIXELS[0, 0], ValueError, r"shape \(C, H, W\) or \(n, C, H, W\)"),
        (PIXELS[:0], ValueError, "with at least one entry is required"),
        (PIXELS.bool(), TypeError, "real numbers are required, got torch.bool"),
        (np.zeros((8, 8)), ValueError, r"shape \(H, W, C\) or \(n, H, W, C\)"),
        (PIXELS.to("meta"), ValueError, "a tensor with values is required"),
        (PIXELS[:, :3], ValueError, "4 channels are required, got 3"),
        (None, TypeError, "of one kind, are required, got NoneType"),
    ],
)
def test_pictures_are_of_one_kind_and_size(make, image, error, words):
    pipe, given, _ = make()
    places = {name: value for name, value in given.items() if name not in ("height", "width")}
    with pytest.raises(error, match=f"^image: .*{words}"):
        untouched(pipe).invert(image, **places)
    if image is not None:
        with pytest.raises(error, match=f"^image: .*{words}"):
            untouched(pipe)(**places, image=image)


def test_pictures_of_pil_are_of_one_size_and_mode():
    from PIL import Image

    pipe = untouched(pipeline(clip_sample=False))
    with pytest.raises(ValueError, match=r"^image: pictures of one size, and all grey or all in colour"):
        pipe.invert([Image.new("L", (8, 8)), Image.new("L", (8, 6))])
    with pytest.raises(ValueError, match=r"^image: pictures of one size, and all grey or all in colour"):
        pipe.invert([Image.new("L", (8, 8)), Image.new("RGB", (8, 8))])


@pytest.mark.parametrize("make", [unet, stable])
def test_pictures_for_an_autoencoder_have_its_channels(make):
    from test_pipeline_flow import autoencoder

    pipe, given, _ = make()
    pipe.register_modules(vae=autoencoder())
    with pytest.raises(ValueError, match=r"^image: 3 channels are required, got 4"):
        untouched(pipe).invert(PIXELS.repeat(1, 1, 2, 2), **given)


@pytest.mark.parametrize("make", [unet, stable, packed])
def test_there_is_one_picture_for_each_condition(make):
    pipe, given, _ = make()
    places = {name: value for name, value in given.items() if name not in ("height", "width")}
    with pytest.raises(ValueError, match=r"^image: one for each of the conditions is required, got 1 for \[2"):
        untouched(pipe).invert(PIXELS[:1], **places)


@pytest.mark.parametrize("make", [unet, stable, packed])
@pytest.mark.parametrize("method", ["parallel", "sequential"])
@pytest.mark.parametrize(("returned", "error", "words"), [
    (3, TypeError, "must return a dict or None, returned int"),
    ({"latents": 3}, ValueError, "latents of shape .* must be returned, got int"),
    ({"latents": torch.zeros(1)}, ValueError, "latents of shape .* must be returned, got .1,"),
])  # fmt: skip
def test_what_a_callback_returns_is_checked(make, method, returned, error, words):
    pipe, given, _ = make()
    with pytest.raises(error, match=f"^callback_on_step_end: {words}"):
        pipe(**given, num_inference_steps=3, callback_on_step_end=lambda *_: returned, method=method)


@pytest.mark.parametrize("make", [unet, stable, packed])
def test_a_number_of_steps_whose_tables_would_fill_the_memory_is_refused(make):
    pipe, given, _ = make()
    with pytest.raises(ValueError, match=r"^num_inference_steps: at most 1,048,576 is required, got 1,000,000,000"):
        untouched(pipe)(**given, num_inference_steps=10**9)


@pytest.mark.parametrize("make", [unet, stable, packed])
@pytest.mark.parametrize(("rescale", "error"), [(float("nan"), ValueError), (2.0, ValueError), ("1", TypeError)])
def test_the_share_of_rescaling_is_named_as_the_pipeline_has_it(make, rescale, error):
    pipe, given, guided = make()
    with pytest.raises(error, match=r"^guidance_rescale: "):
        untouched(pipe)(**given, **guided, guidance_rescale=rescale)


@pytest.mark.parametrize(("steps", "words"), [
    ({900, 1}, "a list of numbers is required, got set"), ("ab", "a list of numbers is required, got str"),
    (900, "a list of numbers is required, got int"),
])  # fmt: skip
@pytest.mark.parametrize(("make", "name"), [(unet, "timesteps"), (stable, "sigmas"), (packed, "sigmas")])
def test_steps_of_ones_own_are_a_list(make, name, steps, words):
    pipe, given, _ = make()
    with pytest.raises(TypeError, match=f"^{name}: {words}"):
        untouched(pipe)(**given, **{name: steps})


@pytest.mark.parametrize("steps", [[10**30], [[900, 1]], ["a"], [900, [1]], [1 + 0j], [True], []])
@pytest.mark.parametrize(("make", "name"), [(unet, "timesteps"), (stable, "sigmas"), (packed, "sigmas")])
def test_a_list_of_other_things_than_numbers_is_refused(make, name, steps):
    pipe, given, _ = make()
    with pytest.raises(ValueError, match=f"^{name}: a list of numbers is required, got "):
        untouched(pipe)(**given, **{name: steps})
