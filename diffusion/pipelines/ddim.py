"""The sampler and its inverse as a diffusers pipeline of a UNet. Needs the extra: pip install pydeqsolve[diffusers]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel, UNet2DModel, VQModel
from torch import Tensor

from ..arguments import check_settings
from ..checks import real
from ..inversion.noise_maps import NoiseMaps
from ..invert import Inversion, find_latents, warn_of_range
from ..invert import Method as Inverting
from ..methods.fastest import Method as Sampling
from ..models.answers import WRAPPERS
from ..models.wrappers import DiffusersModel, Guided
from ..schedule import Schedule
from .autoencoder import Autoencoder
from .base import DEQPipeline, DEQPipelineOutput, Start, tell_of_spacing
from .conditions import check_conditions, guidance_rescale, nulls_of
from .hooks import Callback
from .scheduled import chain_of

# Arguments of the pipeline by what the network calls them.
CONDITIONS = {
    "encoder_hidden_states": "prompt_embeds", "class_labels": "class_labels", "text_embeds": "pooled_prompt_embeds",
    "time_ids": "add_time_ids",
}  # fmt: skip
INPUTS = (*CONDITIONS.values(), *(f"negative_{name}" for name in CONDITIONS.values()))


class DEQDDIMPipeline(DEQPipeline):
    """A chain sampled with all time steps at once, and inverted, from the folder of a pipeline of diffusers.

        pipe = DEQDDIMPipeline.from_pretrained(folder)
        images = pipe(batch_size=4, num_inference_steps=100, generator=torch.Generator().manual_seed(0)).images

    From the same generator it makes the images of diffusers' DDIMPipeline, DDPMPipeline or LDMPipeline, and with
    image= those of StableDiffusionImg2ImgPipeline, to the error asked for, for every eta; time steps, noise, clipping,
    thresholding and prediction type are the scheduler's.

    Args:
        unet: UNet2DModel, with or without classes, or UNet2DConditionModel.
        scheduler: of diffusers, one that is reproduced (`diffusion.models.schedulers`).
        vae: AutoencoderKL or VQModel; if given, the chain is that of its latents, and images are decoded and encoded.
        vqvae: the same, under the name that an LDMPipeline has for it.

    Raises:
        TypeError: a scheduler that is not reproduced, by class or option, also when it is changed later; another vae.
        ValueError: parts that do not fit together.
    """

    part = "unet"
    usual_strength = 0.8
    model_cpu_offload_seq = "unet->vae"
    _optional_components = ["vae", "vqvae"]  # noqa: RUF012  diffusers reads it off the class

    def __init__(
        self, unet: UNet2DModel | UNet2DConditionModel, scheduler: SchedulerMixin,
        vae: AutoencoderKL | VQModel | None = None, vqvae: VQModel | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if isinstance(unet, WRAPPERS):
            raise TypeError(f"unet: the network inside {type(unet).__name__} is required: unet.module")
        DiffusersModel(unet)  # raises for a network that it cannot wrap
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae, vqvae=vqvae)
        self.image_processor = self._processor()
        self._interrupt = False

    @torch.no_grad()
    def __call__(
        self, batch_size: int | None = None, generator: torch.Generator | list[torch.Generator] | None = None,
        eta: float | None = None, num_inference_steps: int = 50, latents: Tensor | None = None,
        class_labels: Tensor | None = None, prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None, negative_class_labels: Tensor | None = None,
        guidance_scale: float = 1.0, output_type: str = "pil", return_dict: bool = True,
        callback_on_step_end: Callback | None = None, method: str | Sampling = "parallel",
        clip_sample: bool | None = None, use_clipped_model_output: bool | None = None,
        timesteps: Sequence[int] | None = None, sigmas: Sequence[float] | None = None, image: Any = None,
        strength: float | None = None, guidance_rescale: float = 0.0, noises: Tensor | None = None,
        spacing: str | None = None, pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None, add_time_ids: Tensor | None = None,
        negative_add_time_ids: Tensor | None = None, **options: Any,
    ) -> DEQPipelineOutput | tuple[Any]:  # fmt: skip
        """Images sampled from the latents, which are drawn from `generator` when not given.

        Args:
            batch_size: of the latents; by default as many as there are latents, conditions or images, else 1.
            generator: one, or a list with one for each image.
            eta: 0 is DDIM, 1 DDPM's ancestral sampling; None is the scheduler's: 1 of a DDPMScheduler, else 0; and 1
                with `noises`.
            latents: (B, C, H, W) standard normal; what the scheduler starts from is these times its init_noise_sigma.
                With `image`, the noise that is added to it.
            class_labels (B,), prompt_embeds (B, tokens, width), of SDXL pooled_prompt_embeds (B, width) and
                add_time_ids (B, 6): conditioning.
            negative_…: the same for "no condition", when guidance_scale is not 1; add_time_ids by default.
            guidance_scale: of classifier-free guidance, both halves in one batch; 1 is none.
            guidance_rescale: of `Guided`, 0 to 1; 0 is none.
            output_type: "pil", "np", "pt" (in [0, 1]) or "latent" (x_0 as it is).
            callback_on_step_end: callback(pipe, step, timestep, {"latents": x}) → dict. In parallel it is called after
                every round with the images of the moment, and what it returns must be empty or the same tensor: a hook
                that changes states is `edit`, which diffusers' callbacks of that kind become. With
                method="sequential" it is called after every step, and the latents that it returns replace the current.
                Setting `pipe._interrupt = True` in it ends parallel sampling after that round.
            method: as in `diffusion.sample`.
            clip_sample: False leaves predicted images as they are, whatever the scheduler does; None does as it does.
            use_clipped_model_output: as in DDIMPipeline: ε is taken anew from each image that is clipped.
            timesteps, sigmas: before each step, instead of num_inference_steps, as the scheduler takes them.
            image: that noise is added to, and the last steps start from (SDEdit, diffusers' img2img): PIL images,
                arrays or tensors in [0, 1], one or one for each image that is made.
            strength: the share of the steps that are taken; with `image` 0.8 by default. With `latents` alone, those
                that `invert(strength=…)` found.
            noises: (B, T, …) that the steps add, as `invert(method="ddpm")` found them.
            spacing: of the time steps; None is the scheduler's own.
            options: error, splitting, max_rounds, start, group, rows_per_call, edit, … of `diffusion.sample`.

        Raises:
            TypeError, ValueError: an argument of the wrong kind, by name.
        """
        given = {
            "prompt_embeds": prompt_embeds, "class_labels": class_labels, "pooled_prompt_embeds": pooled_prompt_embeds,
            "add_time_ids": add_time_ids, "negative_prompt_embeds": negative_prompt_embeds,
            "negative_class_labels": negative_class_labels, "negative_add_time_ids": negative_add_time_ids,
            "negative_pooled_prompt_embeds": negative_pooled_prompt_embeds,
        }  # fmt: skip
        check_settings(tensors={}, functions={"callback_on_step_end": callback_on_step_end})
        model, inputs = self._model(given, guidance_scale, guidance_rescale)
        start = self._start(batch_size, inputs, generator, latents, image)
        eta = self._eta(eta, noises is not None)
        own: dict[str, Any] = {"timesteps": timesteps, "sigmas": sigmas, "spacing": spacing}
        chain = chain_of(self.scheduler, num_inference_steps, eta, clip_sample, use_clipped_model_output, **own)
        chain = self._partial(chain, strength, start)
        out = self._sample(
            model, inputs, chain, start, noises, method, output_type, callback_on_step_end, options
        )  # fmt: skip
        return out if return_dict else (out.images,)

    def invert(
        self, image: Any, num_inference_steps: int = 50, method: str | Inverting = "exact",
        clip_sample: bool | None = None, eta: float | None = None, timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None, strength: float | None = None, spacing: str | None = None,
        guidance_scale: float = 1.0, guidance_rescale: float = 0.0, **options: Any,
    ) -> Inversion:  # fmt: skip
        """The latents from which the pipeline samples these images: `pipe(latents=found.x_T, eta=0.0)`.

        Of method="ddpm", noise maps too: `pipe(latents=found.x_T, noises=found.noises)`. What else is given here is
        given there.

        A chain that clips forgets what it cuts off, so it can only be inverted roughly: to edit images, give
        clip_sample=False here and to the pipeline, or a scheduler that does not clip.

        Args:
            image: PIL images, arrays or tensors in [0, 1], as diffusers' image processor takes them.
            method: "exact", "ddim", "deq", "naive", "ddpm", or an object, see `diffusion.invert`.
            clip_sample, timesteps, sigmas, strength, spacing, guidance_scale, guidance_rescale: as in the pipeline's
                call; with strength below 1 x_T is the state that noise has been added to.
            eta: None is 0, and of "ddpm" the scheduler's, or 1.
            options: the conditioning arguments of the pipeline, and error, max_rounds, state, … of `diffusion.invert`.

        Returns:
            Inversion, with x_T, and the loss in pixels (of the latents, where there is a vae) per image.

        Warns:
            UserWarning: the scheduler clips, pixels are not in [0, 1], or images were missed that time steps of
            spacing="quadratic" might have found.
        """
        given = {name: options.pop(name, None) for name in INPUTS}
        model, inputs = self._model(given, guidance_scale, guidance_rescale)
        pixels = self._pixels(image)
        warn_of_range(pixels)
        x_0 = self._encoded(pixels)
        maps = method == "ddpm" or isinstance(method, NoiseMaps)
        eta = self._eta(eta, True) if maps else 0.0 if eta is None else eta
        own: dict[str, Any] = {"timesteps": timesteps, "sigmas": sigmas, "spacing": spacing}
        chain = chain_of(self.scheduler, num_inference_steps, eta, clip_sample, **own)
        chain = self._partial(chain, strength, Start(len(x_0), None, x_0, None))
        found = find_latents(model, x_0, chain, method, **self._given(chain, x_0, inputs, options))
        if timesteps is None:
            tell_of_spacing(found, Schedule.from_diffusers(self.scheduler), spacing, method)
        return self._found(found, chain)

    def _eta(self, eta: float | None, noise: bool) -> float | None:
        """None is the scheduler's, but of a chain with noise at least 1."""
        return 1.0 if eta is None and noise and Schedule.from_diffusers(self.scheduler).eta == 0 else eta

    @property
    def _autoencoder(self) -> Autoencoder | None:
        if self.vae is not None and self.vqvae is not None:
            raise ValueError("vqvae: only one autoencoder is used, and vae is given too")
        vae = self.vae if self.vae is not None else self.vqvae
        return None if vae is None else Autoencoder(vae, self.unet.config.in_channels)

    @property
    def _divisor(self) -> int:
        if not isinstance(self.unet, UNet2DModel):
            return 1  # it makes its own sizes fit
        return 2 ** sum(getattr(block, "downsamplers", None) is not None for block in self.unet.down_blocks)

    def _coded(self, image: Tensor, start: Start) -> Tensor:
        """As in the base; by a list of generators one image is drawn anew for each, as diffusers' img2img has it."""
        each = image.expand(start.count, -1, -1, -1) if isinstance(start.generator, list) else image
        return super()._coded(each, start)

    def _latent_shape(self) -> tuple[int, ...]:
        side = self.unet.config.sample_size
        if side is None:
            raise ValueError("latents: required, because the network's configuration names no sample_size")
        return self.unet.config.in_channels, *((side, side) if isinstance(side, int) else side)

    def _model(
        self, given: dict[str, Tensor | None], scale: float, rescale: float
    ) -> tuple[DiffusersModel | Guided, list[Tensor]]:
        """The network as model(x, t, *inputs), and the inputs."""
        check_settings(tensors=given, functions={})
        scale = real("guidance_scale", scale)
        rescale = guidance_rescale(rescale, guided=scale != 1)
        model, kind = DiffusersModel(self.unet), type(self.unet).__name__
        names = [CONDITIONS[name] for name in model.takes.names]
        used = [name for name in names if given[name] is not None]
        for name in CONDITIONS.values():
            if name not in names and (given[name] is not None or given[f"negative_{name}"] is not None):
                raise ValueError(f"{name}: not taken by a {kind}, which has {', '.join(names)}")
        for name in names[: model.takes.needed]:
            if name not in used:
                raise ValueError(f"{name}: required by a {kind}")
        if "class_labels" in used and not model.classes:
            raise ValueError(f"class_labels: not taken by a {kind} without classes")
        if given["negative_add_time_ids"] is None:
            given = {**given, "negative_add_time_ids": given["add_time_ids"]}
        check_conditions(self.unet, given)
        inputs = [self._placed(x) for name in used if (x := given[name]) is not None]
        if scale == 1:
            return model, inputs
        if not used:
            raise ValueError(f"guidance_scale: of a network with conditions, which this {kind} has not, got {scale}")
        nulls = nulls_of(used, inputs, given, f"guidance_scale = {scale}")
        nulls = [self._placed(null) for null in nulls]
        return Guided(model, scale, rescale=rescale), [*inputs, *nulls]


__all__: Sequence[str] = ["DEQDDIMPipeline"]
