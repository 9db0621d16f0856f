"""The sampler and its inverse as a diffusers pipeline. Needs the extra: pip install pydeqsolve[diffusers]."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

try:
    from diffusers import (
        AutoencoderKL,
        DiffusionPipeline,
        SchedulerMixin,
        UNet2DConditionModel,
        UNet2DModel,
        VQModel,
    )
    from diffusers.image_processor import VaeImageProcessor
    from diffusers.utils import BaseOutput
    from diffusers.utils.torch_utils import randn_tensor
except ImportError as error:
    raise ImportError("DEQDDIMPipeline needs diffusers: pip install pydeqsolve[diffusers]") from error

from .arguments import check_options
from .chain import Chain
from .invert import Inversion, find_latents, warn_of_range
from .invert import Method as Inverting
from .methods.fastest import Method as Sampling
from .methods.sequential import Sequential
from .models.answers import WRAPPERS
from .models.autoencoder import Autoencoder
from .models.scheduled import chain_of, noises_of
from .models.wrappers import DiffusersModel, Guided, check_parts
from .sample import sample
from .schedule import Schedule

INPUTS = ("class_labels", "prompt_embeds", "negative_prompt_embeds", "negative_class_labels")
OUTPUTS = ("pil", "np", "pt", "latent")
GIVEN = {"model", "latent", "x_0", "chain", "prediction", "method", "inputs", "noises"}  # by the pipeline itself
HUB = ("cache_dir", "force_download", "proxies", "token", "local_files_only", "revision")  # options of a download


@dataclass
class DEQDDIMPipelineOutput(BaseOutput):
    """What the pipeline returns.

    images: as `output_type` says. rounds: model calls one after the other. evaluations: (B,) network evaluations per
    image, a guided one counts once. converged: (B,) bool, the image meets the error asked for; of sequential sampling,
    it is finite.
    """

    images: Any
    rounds: int
    evaluations: Tensor
    converged: Tensor


class DEQDDIMPipeline(DiffusionPipeline):
    """A chain sampled with all time steps at once, and inverted, from the folder of a pipeline of diffusers.

        pipe = DEQDDIMPipeline.from_pretrained(folder)
        images = pipe(batch_size=4, num_inference_steps=100, generator=torch.Generator().manual_seed(0)).images

    From the same generator it makes the images of diffusers' DDIMPipeline, DDPMPipeline or LDMPipeline, to the error
    asked for, for every eta; time steps, noise, clipping, thresholding and prediction type are the scheduler's.

    Args:
        unet: UNet2DModel, with or without classes, or UNet2DConditionModel.
        scheduler: of diffusers, one that is reproduced (`diffusion.models.schedulers`).
        vae: AutoencoderKL or VQModel; if given, the chain is that of its latents, and images are decoded and encoded.
        vqvae: the same, under the name that an LDMPipeline has for it.

    Raises:
        TypeError: a scheduler that is not reproduced, by class or option, also when it is changed later; another vae.
        ValueError: parts that do not fit together.
    """

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
        coder = self._autoencoder
        factor = 1 if coder is None else 2 ** (len(coder.vae.config.block_out_channels) - 1)
        # By default it would take images of four channels for latents and leave them as they are.
        self.image_processor = VaeImageProcessor(do_resize=False, vae_scale_factor=factor, vae_latent_channels=0)
        self._interrupt = False

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "scheduler":
            Schedule.from_diffusers(value)  # raises for what is not reproduced
        super().__setattr__(name, value)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **options: Any) -> DEQDDIMPipeline:
        """The pipeline of a folder or repository of diffusers; `options` are those of DiffusionPipeline.

        A part that it has no use for is refused by name, unless it is left out by name: text_encoder=None.

        Raises:
            TypeError: a scheduler that is not reproduced, by name.
            ValueError: a part that is neither used nor left out.
        """
        place = {name: options[name] for name in HUB if name in options}
        index = cls.load_config(pretrained_model_name_or_path, **place)
        own = set(inspect.signature(cls.__init__).parameters)
        check_parts(str(pretrained_model_name_or_path), index, own, options)
        options = {name: value for name, value in options.items() if name in own or name not in index}
        pipe: DEQDDIMPipeline = super().from_pretrained(pretrained_model_name_or_path, **options)
        return pipe

    @torch.no_grad()
    def __call__(
        self, batch_size: int | None = None, generator: torch.Generator | list[torch.Generator] | None = None,
        eta: float | None = None, num_inference_steps: int = 50, latents: Tensor | None = None,
        class_labels: Tensor | None = None, prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None, negative_class_labels: Tensor | None = None,
        guidance_scale: float = 1.0, output_type: str = "pil", return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None, method: str | Sampling = "parallel",
        clip_sample: bool | None = None, use_clipped_model_output: bool | None = None,
        timesteps: Sequence[int] | None = None, sigmas: Sequence[float] | None = None, **options: Any,
    ) -> DEQDDIMPipelineOutput | tuple[Any]:  # fmt: skip
        """Images sampled from the latents, which are drawn from `generator` when not given.

        Args:
            batch_size: of the latents; by default as many as there are latents or conditions, else 1.
            generator: one, or a list with one for each image.
            eta: 0 is DDIM, 1 DDPM's ancestral sampling; None is the scheduler's: 1 of a DDPMScheduler, else 0.
            latents: (B, C, H, W) standard normal; what the scheduler starts from is these times its init_noise_sigma.
            class_labels (B,), prompt_embeds (B, tokens, width): conditioning.
            negative_prompt_embeds, negative_class_labels: the same for "no condition", when guidance_scale is not 1.
            guidance_scale: of classifier-free guidance, both halves in one batch; 1 is none.
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
            options: error, splitting, max_rounds, start, group, rows_per_call, edit, … of `diffusion.sample`.

        Raises:
            TypeError, ValueError: an argument of the wrong kind, by name.
        """
        check_options(options, sample, GIVEN | {"generator", "callback"}, "DEQDDIMPipeline")
        if output_type not in OUTPUTS:
            raise ValueError(f"output_type: one of {', '.join(OUTPUTS)} is required, got {output_type!r}")
        negative = (negative_prompt_embeds, negative_class_labels)
        model, inputs = self._model(class_labels, prompt_embeds, *negative, guidance_scale)
        given = [x for x in (latents, *inputs) if x is not None]
        count = batch_size if batch_size is not None else len(given[0]) if given else 1
        if any(len(x) != count for x in given):
            raise ValueError(f"batch_size: {count} latents or conditions are required, got {[len(x) for x in given]}")
        if isinstance(generator, list) and len(generator) != count:
            raise ValueError(f"generator: one for each of the {count} images is required, got {len(generator)}")
        draw = {"generator": generator, "device": self._execution_device, "dtype": self.unet.dtype}
        x_T = latents.to(self._execution_device) if latents is not None else randn_tensor(self._shape(count), **draw)
        own = {"timesteps": timesteps, "sigmas": sigmas}
        chain = chain_of(self.scheduler, num_inference_steps, eta, clip_sample, use_clipped_model_output, **own)
        x_T = x_T * chain.init_noise_sigma
        noises = noises_of(self.scheduler, chain, x_T, draw)
        self._interrupt = False
        with self.progress_bar(total=len(chain)) as bar:
            hooks = self._hooks(chain, bar, callback_on_step_end, method, options.pop("edit", None))
            fixed: dict[str, Any] = {"inputs": inputs, "noises": noises, "prediction": chain.prediction or "epsilon"}
            out = sample(model, x_T, chain, method=method, **fixed, **hooks, **options)
        images = out.x_0 if output_type == "latent" else self._decode(out.x_0, output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images,)
        return DEQDDIMPipelineOutput(images, out.rounds, out.evaluations, out.converged)

    def invert(
        self, image: Any, num_inference_steps: int = 50, method: str | Inverting = "exact",
        clip_sample: bool | None = None, **options: Any,
    ) -> Inversion:  # fmt: skip
        """The latents from which the pipeline samples these images at eta = 0: `pipe(latents=found.x_T, eta=0.0)`.

        A chain that clips forgets what it cuts off, so it can only be inverted roughly: to edit images, give
        clip_sample=False here and to the pipeline, or a scheduler that does not clip.

        Args:
            image: PIL images, arrays or tensors in [0, 1], as diffusers' image processor takes them.
            method: "exact", "ddim", "deq", "naive", or an object, see `diffusion.invert`.
            clip_sample: as in the pipeline's call.
            options: the conditioning arguments of the pipeline, and error, max_rounds, state, … of `diffusion.invert`.

        Returns:
            Inversion, with x_T, and the loss in pixels (of the latents, where there is a vae) per image.

        Warns:
            UserWarning: the scheduler clips, or pixels are not in [0, 1].
        """
        scale = options.pop("guidance_scale", 1.0)
        labels, prompt, no_prompt, no_labels = (options.pop(name, None) for name in INPUTS)
        check_options(options, find_latents, GIVEN, "DEQDDIMPipeline.invert")
        model, inputs = self._model(labels, prompt, no_prompt, no_labels, scale)
        x_0 = self.image_processor.preprocess(image).to(self._execution_device, self.unet.dtype)
        warn_of_range(x_0)
        if (autoencoder := self._autoencoder) is not None:
            with torch.no_grad():
                x_0 = autoencoder.encode(x_0).to(self.unet.dtype)
        chain, given = chain_of(self.scheduler, num_inference_steps, 0.0, clip_sample), {"inputs": inputs, **options}
        found = find_latents(model, x_0, chain, method, prediction=chain.prediction or "epsilon", **given)
        found.x_T = found.x_T / chain.init_noise_sigma  # as the pipeline takes them
        self.maybe_free_model_hooks()
        return found

    @property
    def _autoencoder(self) -> Autoencoder | None:
        if self.vae is not None and self.vqvae is not None:
            raise ValueError("vqvae: only one autoencoder is used, and vae is given too")
        vae = self.vae if self.vae is not None else self.vqvae
        return None if vae is None else Autoencoder(vae, self.unet.config.in_channels)

    def _shape(self, count: int) -> tuple[int, ...]:
        side = self.unet.config.sample_size
        if side is None:
            raise ValueError("latents: required, because the network's configuration names no sample_size")
        return count, self.unet.config.in_channels, *((side, side) if isinstance(side, int) else side)

    def _model(
        self, labels: Tensor | None, prompt: Tensor | None, negative_prompt: Tensor | None,
        negative_labels: Tensor | None, scale: float,
    ) -> tuple[DiffusersModel | Guided, list[Tensor]]:  # fmt: skip
        """The network as model(x, t, *inputs), and the inputs."""
        pairs = {"prompt_embeds": (prompt, negative_prompt), "class_labels": (labels, negative_labels)}
        used = {name: pair for name, pair in pairs.items() if pair[0] is not None}
        model = DiffusersModel(self.unet)
        if model.conditional and prompt is None:
            raise ValueError("prompt_embeds: required by a UNet2DConditionModel")
        if not model.conditional and prompt is not None:
            raise ValueError("prompt_embeds: not taken by a UNet2DModel, which has class_labels")
        inputs = [self._input(condition) for condition, _ in used.values() if condition is not None]
        if scale == 1:
            return model, inputs
        missing = [name for name, (_, null) in used.items() if null is None]
        if missing or not used:
            raise ValueError(f"negative_{(missing or ['class_labels'])[0]}: required with guidance_scale = {scale}")
        nulls = [self._input(null) for _, null in used.values() if null is not None]
        nulls = [null.expand_as(condition) for null, condition in zip(nulls, inputs, strict=True)]
        return Guided(model, scale), [*inputs, *nulls]

    def _input(self, x: Tensor) -> Tensor:
        return x.to(self._execution_device, self.unet.dtype if x.is_floating_point() else None)

    def _hooks(
        self, chain: Chain, bar: Any, callback: Callable[..., Any] | None, method: str | Sampling, edit: Any
    ) -> dict[str, Any]:
        """The hooks of `sample` that move the bar and call the callback."""
        times = chain.timesteps.tolist()

        def after_round(step: int, trajectory: Tensor, residual: Tensor) -> bool:
            bar.update()
            if callback is not None:
                latents = trajectory[:, -1].to(self.unet.dtype)
                returned = callback(self, step - 1, times[0], {"latents": latents}) or {}
                if returned.get("latents", latents) is not latents:
                    raise ValueError("callback_on_step_end: the states of a parallel chain are changed by edit=")
            return self._interrupt

        def after_step(x: Tensor, k: int, image: Tensor) -> Tensor:
            bar.update()
            x = x if edit is None else edit(x, k, image)
            if callback is None:
                return x
            latents = x.to(self.unet.dtype)
            returned = (callback(self, k - 1, times[k - 1], {"latents": latents}) or {}).get("latents", latents)
            return x if returned is latents else returned.to(x)

        if method == "sequential" or isinstance(method, Sequential):
            if chain.past is not None and callback is not None:
                raise ValueError("callback_on_step_end: of a chain of two-step rule, with a parallel method alone")
            return {"edit": after_step if chain.past is None else edit}
        quiet = callback is None and bar.disable
        return {"edit": edit, "callback": None if quiet else after_round}

    def _decode(self, x_0: Tensor, output_type: str) -> Any:
        if (autoencoder := self._autoencoder) is not None:
            x_0 = autoencoder.decode(x_0)
        # numpy and PIL have no bfloat16
        x_0 = x_0 if output_type == "pt" or x_0.dtype != torch.bfloat16 else x_0.float()
        return self.image_processor.postprocess(x_0, output_type)


__all__: Sequence[str] = ["DEQDDIMPipeline", "DEQDDIMPipelineOutput"]
