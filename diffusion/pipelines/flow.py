"""Flow transformers, SD3's and FLUX's, as a diffusers pipeline that samples all time steps at once and inverts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel, SchedulerMixin, SD3Transformer2DModel
from torch import Tensor

from ..arguments import check_settings
from ..chain import Chain
from ..checks import count, real
from ..inversion.noise_maps import NoiseMaps
from ..invert import Inversion, find_latents, warn_of_range
from ..invert import Method as Inverting
from ..methods.fastest import Method as Sampling
from ..models.answers import WRAPPERS
from ..models.continuous import ContinuousSchedule
from ..models.levels import MOST_STEPS
from ..models.wrappers import DiffusersModel, Guided
from ..schedule import Schedule
from .autoencoder import Autoencoder
from .base import DEQPipeline, DEQPipelineOutput, Start
from .conditions import check_conditions, guidance_rescale, nulls_of
from .hooks import Callback

EMBEDDED = 3.5  # guidance of a network that has it as an input, unless told otherwise
FLUX_SIDE = 128  # of FLUX's latents, whose configuration names none
CONDITIONS = ("prompt_embeds", "pooled_prompt_embeds", "negative_prompt_embeds", "negative_pooled_prompt_embeds")


@dataclass
class Guidance:
    """scale: of classifier-free guidance, 1 is none; rescale: of `Guided`; embedded: what the network is told."""

    scale: float
    rescale: float
    embedded: float | None


class DEQFlowPipeline(DEQPipeline):
    """A flow sampled with all time steps at once, and inverted: SD3's transformer, or FLUX's on its packed latents.

        pipe = DEQFlowPipeline(theirs.transformer, theirs.scheduler, theirs.vae)  # or from_pretrained(folder, …)
        images = pipe(prompt_embeds=embeds, pooled_prompt_embeds=pooled, num_inference_steps=28).images

    From the same generator and embeddings it makes the images of diffusers' StableDiffusion3Pipeline and FluxPipeline,
    and with image= those of their img2img, to the error asked for. Text encoders are yours to call.

    Args:
        transformer: SD3Transformer2DModel or FluxTransformer2DModel.
        scheduler: FlowMatchEulerDiscreteScheduler, or DPMSolverMultistepScheduler with flow sigmas and prediction.
        vae: AutoencoderKL; if given, images are decoded and encoded by it, with its scaling and shift factor.

    Raises:
        TypeError: another network, or a scheduler that is no flow or not reproduced, also when it is changed later.
        ValueError: parts that do not fit together.
    """

    part = "transformer"
    usual_strength = 0.6
    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]  # noqa: RUF012  diffusers reads it off the class

    def __init__(
        self, transformer: SD3Transformer2DModel | FluxTransformer2DModel, scheduler: SchedulerMixin,
        vae: AutoencoderKL | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if isinstance(transformer, WRAPPERS):
            name = type(transformer).__name__
            raise TypeError(f"transformer: the network inside {name} is required: transformer.module")
        if not isinstance(transformer, (SD3Transformer2DModel, FluxTransformer2DModel)):
            kind = type(transformer).__name__
            raise TypeError(f"transformer: SD3Transformer2DModel or FluxTransformer2DModel is required, got {kind}")
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.image_processor = self._processor()
        self._interrupt = False

    def _check_scheduler(self, scheduler: Any) -> None:
        shifts = getattr(scheduler, "config", {}).get("use_dynamic_shifting")
        schedule = Schedule.from_diffusers(scheduler, 1.0 if shifts else None)
        if schedule.prediction != "flow":
            raise TypeError(f"scheduler: one of a flow is required, such as FlowMatchEulerDiscreteScheduler, got "
                            f"{type(scheduler).__name__} of {schedule.prediction} prediction")  # fmt: skip

    @torch.no_grad()
    def __call__(
        self, prompt_embeds: Tensor | None = None, pooled_prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None, negative_pooled_prompt_embeds: Tensor | None = None,
        height: int | None = None, width: int | None = None, num_inference_steps: int = 28,
        sigmas: Sequence[float] | None = None, mu: float | None = None, guidance_scale: float | None = None,
        true_cfg_scale: float = 1.0, guidance_rescale: float = 0.0, batch_size: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None, latents: Tensor | None = None,
        image: Any = None, strength: float | None = None, output_type: str = "pil", return_dict: bool = True,
        callback_on_step_end: Callback | None = None, method: str | Sampling = "parallel",
        eta: float | None = None, noises: Tensor | None = None, **options: Any,
    ) -> DEQPipelineOutput | tuple[Any]:  # fmt: skip
        """Images sampled from the latents, which are drawn from `generator` when not given.

        Args:
            prompt_embeds (B, tokens, width), pooled_prompt_embeds (B, width): of the text encoders.
            negative_…: the same for "no condition", where classifier-free guidance needs it.
            height, width: of the image, in pixels; by default that of `image`, of the latents, or the network's own.
            num_inference_steps, sigmas: as in diffusers; FLUX's sigmas are even, to 1/T, before they are shifted.
            mu: the shift of a scheduler with use_dynamic_shifting; by default what diffusers makes of the image's size.
            guidance_scale: SD3's classifier-free guidance, 1 by default; of FLUX what the network is told, 3.5 by
                default, where it is distilled.
            true_cfg_scale: FLUX's classifier-free guidance; 1 is none.
            guidance_rescale: of `Guided`, 0 to 1; 0 is none.
            latents: standard normal, (B, C, h, w), of FLUX packed, (B, h·w/4, 4·C). With `image`, the noise.
            image: that noise is added to, and the last steps start from: PIL images, arrays or tensors in [0, 1].
            strength: the share of the steps that are taken; with `image` 0.6 by default. With `latents` alone, those
                that `invert(strength=…)` found.
            output_type: "pil", "np", "pt" (in [0, 1]) or "latent" (x_0 as the network has it).
            eta: the share of fresh noise; None is 0, which is diffusers' loop, and 1 with `noises`.
            noises: (B, T, …) that the steps add, as `invert(method="ddpm")` found them.
            callback_on_step_end, method, options: as in `DEQDDIMPipeline`.

        Raises:
            TypeError, ValueError: an argument of the wrong kind, by name.
        """
        given = dict(zip(CONDITIONS, (prompt_embeds, pooled_prompt_embeds, negative_prompt_embeds,
                                      negative_pooled_prompt_embeds), strict=True))  # fmt: skip
        check_settings(tensors={}, functions={"callback_on_step_end": callback_on_step_end})
        check_conditions(self.transformer, given)
        texts = [self._placed(x) for x in (prompt_embeds, pooled_prompt_embeds) if x is not None]
        start = self._start(batch_size, texts, generator, latents, image)
        start.shape = self._shape(start, height, width)
        guidance = self._guidance(guidance_scale, true_cfg_scale, guidance_rescale)
        model, inputs = self._model(given, guidance, start)
        eta = float(noises is not None) if eta is None else eta
        chain = self._partial(self._chain(num_inference_steps, sigmas, mu, start.shape, eta), strength, start)
        out = self._sample(model, inputs, chain, start, noises, method, output_type, callback_on_step_end, options)
        return out if return_dict else (out.images,)

    def invert(
        self, image: Any, num_inference_steps: int = 28, method: str | Inverting = "exact",
        sigmas: Sequence[float] | None = None, mu: float | None = None, strength: float | None = None,
        guidance_scale: float | None = None, true_cfg_scale: float = 1.0, guidance_rescale: float = 0.0,
        eta: float | None = None, **options: Any,
    ) -> Inversion:  # fmt: skip
        """The latents from which the pipeline samples these images: `pipe(latents=found.x_T, …)`, all else as here.

        Of method="ddpm", noise maps too: `pipe(latents=found.x_T, noises=found.noises, …)`.

        Args:
            image: PIL images, arrays or tensors in [0, 1], as diffusers' image processor takes them.
            method: "exact", "ddim", "deq", "naive", "ddpm" or an object, see `diffusion.invert`.
            eta: None is 0, and 1 of "ddpm".
            num_inference_steps, …, guidance_rescale: as in the pipeline's call; with strength below 1 x_T is the state
                that noise has been added to.
            options: the embeddings of the pipeline's call, and error, max_rounds, state, … of `diffusion.invert`.

        Returns:
            Inversion, with x_T, and the loss of the latents per image.
        """
        given = {name: options.pop(name, None) for name in CONDITIONS}
        check_conditions(self.transformer, given)
        pixels = self._pixels(image)
        warn_of_range(pixels)
        coded = self._encoded(pixels)
        x_0 = self._packed(coded)
        shape = tuple(coded.shape[1:])
        start = Start(len(x_0), None, x_0, None, shape)
        guidance = self._guidance(guidance_scale, true_cfg_scale, guidance_rescale)
        model, inputs = self._model(given, guidance, start)
        eta = float(method == "ddpm" or isinstance(method, NoiseMaps)) if eta is None else eta
        chain = self._partial(self._chain(num_inference_steps, sigmas, mu, shape, eta), strength, start)
        found = find_latents(model, x_0, chain, method, **self._given(chain, x_0, inputs, options))
        return self._found(found, chain)

    @property
    def _flux(self) -> bool:
        return isinstance(self.transformer, FluxTransformer2DModel)

    @property
    def _packs(self) -> bool:
        return self._flux

    @property
    def _channels(self) -> int:
        return int(self.transformer.config.in_channels) // (4 if self._flux else 1)

    @property
    def _autoencoder(self) -> Autoencoder | None:
        return None if self.vae is None else Autoencoder(self.vae, self._channels)

    @property
    def _divisor(self) -> int:
        return 2 if self._flux else int(self.transformer.config.patch_size)  # one token

    def _shape(self, start: Start, height: int | None, width: int | None) -> tuple[int, ...]:
        """(C, h, w) of the latents of this call, before FLUX packs them."""
        factor, patch = self._processor().config.vae_scale_factor, self._divisor
        usual = 2 * [FLUX_SIDE if self._flux else self.transformer.config.sample_size]
        if start.image is not None:
            usual = [side // factor for side in start.image.shape[2:]]
        elif start.latents is not None and not self._flux and start.latents.dim() == 4:
            usual = list(start.latents.shape[2:])
        sides = []
        for name, side, own in (("height", height, usual[0]), ("width", width, usual[1])):
            pixels = own * factor if side is None else side
            pixels = count(name, pixels, least=1)
            if pixels % (factor * patch):
                raise ValueError(f"{name}: a multiple of {factor * patch} is required, got {pixels}")
            sides.append(pixels // factor)
        if start.image is not None and [side * factor for side in sides] != list(start.image.shape[2:]):
            raise ValueError(f"image: {sides[0] * factor}x{sides[1] * factor} pixels, height and width, are required, "
                             f"got {start.image.shape[2]}x{start.image.shape[3]}")  # fmt: skip
        shape = (self._channels, *sides)
        own = (sides[0] * sides[1] // 4, 4 * self._channels) if self._flux else shape
        if start.latents is not None and tuple(start.latents.shape[1:]) != own:
            raise ValueError(f"latents: {('B', *own)} is required for {sides[0] * factor}x{sides[1] * factor} pixels, "
                             f"got {tuple(start.latents.shape)}")  # fmt: skip
        return shape

    def _packed(self, x: Tensor) -> Tensor:
        """(B, C, h, w) → (B, h·w/4, 4·C), each 2×2 square one token; SD3 has its latents as they are."""
        if not self._flux:
            return x
        return x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def _unpacked(self, x: Tensor, start: Start) -> Tensor:
        if not self._flux:
            return x
        assert start.shape is not None
        C, h, w = start.shape
        return x.reshape(len(x), h // 2, w // 2, C, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(len(x), C, h, w)

    def _late(self, chain: Chain, strength: float) -> Chain:
        first = len(chain) - len(chain) * real("strength", strength)
        if not 0 < strength <= 1 or first >= len(chain):
            raise ValueError(f"strength: above 0, to 1, is required, got {strength}")
        return chain.tail(int(first))  # rounded as diffusers' flow pipelines have it

    def _chain(
        self, steps: int, sigmas: Sequence[float] | None, mu: float | None, shape: tuple[int, ...], eta: float
    ) -> Chain:
        """The scheduler's chain for latents of this shape."""
        options = self.scheduler.config
        if sigmas is None:
            steps = count("num_inference_steps", steps, least=1, most=MOST_STEPS)
        if options.get("use_dynamic_shifting") and mu is None:
            if "base_image_seq_len" not in options:
                raise ValueError(f"mu: required by a {type(self.scheduler).__name__} with use_dynamic_shifting")
            tokens = (shape[1] // self._divisor) * (shape[2] // self._divisor)
            few, many = options["base_image_seq_len"], options["max_image_seq_len"]
            slope = (options["max_shift"] - options["base_shift"]) / (many - few)
            mu = options["base_shift"] + slope * (tokens - few)
        if self._flux and sigmas is None and not options.get("use_flow_sigmas"):
            sigmas = torch.linspace(1.0, 1 / steps, steps, dtype=torch.float64).tolist()
        schedule = Schedule.from_diffusers(self.scheduler, mu)
        assert isinstance(schedule, ContinuousSchedule)
        return schedule.chain(None if sigmas is not None else steps, eta=eta, sigmas=sigmas)

    def _guidance(self, scale: float | None, true_scale: float, rescale: float) -> Guidance:
        """What the three arguments mean to this network."""
        true_scale, scale = real("true_cfg_scale", true_scale), None if scale is None else real("guidance_scale", scale)
        w = true_scale if self._flux else 1.0 if scale is None else scale
        rescale = guidance_rescale(rescale, guided=w != 1)
        if not self._flux:
            if true_scale != 1:
                raise ValueError(f"true_cfg_scale: of FLUX; SD3's guidance is guidance_scale, got {true_scale}")
            return Guidance(w, rescale, None)
        embeds = bool(self.transformer.config.guidance_embeds)
        if not embeds and scale is not None:
            raise ValueError(f"guidance_scale: this network is not told of it; true_cfg_scale guides, got {scale}")
        return Guidance(w, rescale, (EMBEDDED if scale is None else scale) if embeds else None)

    def _model(
        self, given: dict[str, Tensor | None], guidance: Guidance, start: Start
    ) -> tuple[DiffusersModel | Guided, list[Tensor]]:
        """The network as model(x, t, *inputs), and the inputs."""
        prompt, pooled = (None if (x := given[name]) is None else self._placed(x) for name in CONDITIONS[:2])
        if prompt is None or pooled is None:
            raise ValueError(f"{'' if prompt is None else 'pooled_'}prompt_embeds: required by a "
                             f"{type(self.transformer).__name__}")  # fmt: skip
        model, inputs = DiffusersModel(self.transformer), self._inputs(prompt, pooled, guidance, start)
        if guidance.scale == 1:
            return model, inputs
        nulls = nulls_of(CONDITIONS[:2], (prompt, pooled), given, f"guidance by {guidance.scale}")
        nulls = [self._placed(null) for null in nulls]
        without = self._inputs(nulls[0], nulls[1], guidance, start)
        return Guided(model, guidance.scale, rescale=guidance.rescale), [*inputs, *without]

    def _inputs(self, prompt: Tensor, pooled: Tensor, guidance: Guidance, start: Start) -> list[Tensor]:
        """What the network takes besides x and t."""
        if not self._flux:
            return [prompt, pooled]
        assert start.shape is not None
        rows, columns = start.shape[1] // 2, start.shape[2] // 2
        places = torch.cartesian_prod(torch.zeros(1), torch.arange(rows).float(), torch.arange(columns).float())
        ids = [torch.zeros(prompt.shape[1], 3), places]
        shared = [self._placed(one).expand(len(prompt), -1, -1) for one in ids]
        told = [] if (w := guidance.embedded) is None else [torch.full((len(prompt),), w, device=prompt.device)]
        return [prompt, pooled, *shared, *told]
