"""What the pipelines of diffusers have in common: parts, images in and out, the start of a chain, hooks."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

try:
    from diffusers import DiffusionPipeline
    from diffusers.image_processor import VaeImageProcessor
    from diffusers.utils import BaseOutput
    from diffusers.utils.torch_utils import randn_tensor
except ImportError as error:
    raise ImportError("the pipelines need diffusers: pip install pydeqsolve[diffusers]") from error

from ..arguments import check_options, check_settings
from ..chain import Chain
from ..checks import count as whole
from ..invert import Inversion, find_latents, warn_of_range
from ..models.answers import check_generator
from ..models.wrappers import check_parts
from ..sample import sample
from ..schedule import Schedule
from .autoencoder import Autoencoder
from .conditions import check_values
from .hooks import Callback, hooks_of
from .images import check_images
from .scheduled import noises_of

OUTPUTS = ("pil", "np", "pt", "latent")
GIVEN = {"model", "latent", "x_0", "chain", "prediction", "method", "inputs", "noises"}  # by the pipeline itself
HUB = ("cache_dir", "force_download", "proxies", "token", "local_files_only", "revision")  # options of a download


@dataclass
class DEQPipelineOutput(BaseOutput):
    """What a pipeline returns.

    images: as `output_type` says. rounds: model calls one after the other. evaluations: (B,) network evaluations per
    image, a guided one counts once. converged: (B,) bool, the image meets the error asked for; of sequential sampling,
    it is finite.
    """

    images: Any
    rounds: int
    evaluations: Tensor
    converged: Tensor


@dataclass
class Start:
    """What a call starts from: `count` states, drawn, given as latents, or images with noise.

    generator: one, or one for each. latents: standard normal; with images, their noise. image: (count, C, H, W) in
    [−1, 1], or one, (1, C, H, W), for all. shape: (C, h, w) of what is drawn, None is the network's own.
    """

    count: int
    generator: Any
    latents: Tensor | None
    image: Tensor | None
    shape: tuple[int, ...] | None = None


class DEQPipeline(DiffusionPipeline):
    """Sampling and inversion of what a network, a scheduler and an autoencoder make. `part` names the network."""

    part: str
    usual_strength: float  # of images that a call starts from, as diffusers has it

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "scheduler":
            self._check_scheduler(value)  # raises for what is not reproduced
        super().__setattr__(name, value)

    def _check_scheduler(self, scheduler: Any) -> None:
        Schedule.from_diffusers(scheduler)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **options: Any) -> Any:
        """The pipeline of a folder or repository of diffusers; `options` are those of DiffusionPipeline.

        A part that it has no use for is refused by name, unless it is left out by name: text_encoder=None.

        Raises:
            TypeError: a scheduler that is not reproduced, by name.
            ValueError: a part that is neither used nor left out.
        """
        place = {name: options[name] for name in HUB if name in options}
        index = cls.load_config(pretrained_model_name_or_path, **place)
        own = set(inspect.signature(cls.__init__).parameters)
        check_parts(str(pretrained_model_name_or_path), index, own, options, cls.__name__)
        options = {name: value for name, value in options.items() if name in own or name not in index}
        return super().from_pretrained(pretrained_model_name_or_path, **options)

    @property
    def _network(self) -> Any:
        return getattr(self, self.part)

    @property
    def _autoencoder(self) -> Autoencoder | None:
        raise NotImplementedError

    def _latent_shape(self) -> tuple[int, ...]:
        """(C, H, W) of a latent that is drawn."""
        raise NotImplementedError

    def _processor(self) -> Any:
        coder = self._autoencoder
        factor = 1 if coder is None else 2 ** (len(coder.vae.config.block_out_channels) - 1)
        # By default it would take images of four channels for latents and leave them as they are.
        return VaeImageProcessor(do_resize=False, vae_scale_factor=factor, vae_latent_channels=0)

    def _placed(self, x: Tensor) -> Tensor:
        return x.to(self._execution_device, self._network.dtype if x.is_floating_point() else None)

    def _start(self, count: int | None, inputs: list[Tensor], generator: Any, latents: Any, image: Any) -> Start:
        """The number of images, and what they start from; raises where arguments disagree about it."""
        self._check_latents(latents)
        shown = None if image is None else self._pixels(image)
        warn_of_range(shown)
        given = [x for x in (latents, *inputs) if x is not None]
        n = count if count is not None else len(given[0]) if given else 1 if shown is None else len(shown)
        n = whole("batch_size", n, least=0)
        if any(len(x) != n for x in given):
            raise ValueError(f"batch_size: {n} latents or conditions are required, got {[len(x) for x in given]}")
        check_generator(generator, n, self._execution_device)
        if isinstance(generator, (list, tuple)):  # diffusers takes a list of one and more
            generator = list(generator) or None
        if shown is not None and len(shown) not in (1, n):
            raise ValueError(f"image: one, or one for each of the {n} images, is required, got {len(shown)}")
        return Start(n, generator, latents, shown)

    def _check_latents(self, latents: Any) -> None:
        """Raises for what the network does not take; FLUX's packed ones have no height and width."""
        check_settings(tensors={"latents": latents}, functions={})
        if latents is None:
            return
        if not latents.is_floating_point():
            raise TypeError(f"latents: floating-point values are required, got {latents.dtype}")
        check_values("latents", latents)
        got = tuple(latents.shape)
        if self._packs:
            if len(got) != 3:
                raise ValueError(f"latents: packed ones (B, h·w/4, {4 * self._channels}) are required, got {got}")
        elif len(got) != 4 or got[1] != self._channels or 0 in got[1:]:
            raise ValueError(f"latents: shape (B, {self._channels}, h, w) is required, got {got}")
        elif any(side % self._divisor for side in got[2:]):
            raise ValueError(f"latents: height and width of a multiple of {self._divisor} are required, got {got}")

    def _pixels(self, image: Any) -> Tensor:
        """(n, C, H, W) in [−1, 1] of what diffusers' image processor takes."""
        check_images(image)
        image = list(image) if isinstance(image, tuple) else image
        x_0: Tensor = self._processor().preprocess(image).to(self._execution_device, self._network.dtype)
        channels = self._channels if (coder := self._autoencoder) is None else coder.vae.config.in_channels
        if x_0.shape[1] != channels:
            raise ValueError(f"image: {channels} channels are required, got {x_0.shape[1]}")
        multiple = self._divisor * self._processor().config.vae_scale_factor  # else the image made has another size
        if any(side % multiple or side < 1 for side in x_0.shape[2:]):
            raise ValueError(f"image: height and width of a multiple of {multiple} pixels are required, got "
                             f"{x_0.shape[2]}x{x_0.shape[3]}")  # fmt: skip
        return x_0

    @property
    def _packs(self) -> bool:
        """Whether the network takes latents (B, tokens, channels)."""
        return False

    @property
    def _channels(self) -> int:
        """Of latents (B, C, h, w)."""
        return int(self._network.config.in_channels)

    @property
    def _divisor(self) -> int:
        """What height and width of latents must be a multiple of, by the network."""
        return 1

    @torch.no_grad()
    def _encoded(self, x_0: Tensor, generator: Any = None, drawn: bool = False) -> Tensor:
        """The chain's own images of pixels (n, C, H, W); drawn: from what the autoencoder says of them."""
        coder = self._autoencoder
        return x_0 if coder is None else coder.encode(x_0, generator, drawn).to(self._network.dtype)

    def _coded(self, image: Tensor, start: Start) -> Tensor:
        """The chain's own images (count, …) of `start.image`: one image is encoded, and drawn, once for all."""
        return self._encoded(image, start.generator, True).expand(start.count, -1, -1, -1)

    def _packed(self, x: Tensor) -> Tensor:
        """Latents (B, C, H, W) as the network takes them."""
        return x

    def _unpacked(self, x: Tensor, start: Start) -> Tensor:
        """The reverse."""
        return x

    def _partial(self, chain: Chain, strength: float | None, start: Start) -> Chain:
        """The part of the chain that `strength` asks for."""
        if strength is None and start.image is None:
            return chain
        if start.image is None and start.latents is None:
            raise ValueError("strength: of images or latents to start from, image=… or latents=…; none came")
        return self._late(chain, self.usual_strength if strength is None else strength)

    def _late(self, chain: Chain, strength: float) -> Chain:
        return chain.partial(strength)

    def _first(self, chain: Chain, start: Start) -> tuple[Tensor, dict[str, Any]]:
        """The state that the chain starts from, and how noise is drawn."""
        draw = {"generator": start.generator, "device": self._execution_device, "dtype": self._network.dtype}
        coded = None if start.image is None else self._coded(start.image, start)
        latents, shape = start.latents, start.shape if coded is None else tuple(coded.shape[1:])
        if latents is not None:
            noise = latents.to(self._execution_device)
        else:
            shape = self._latent_shape() if shape is None else shape
            noise = self._packed(randn_tensor((start.count, *shape), **draw))
        if coded is None:
            return noise * chain.init_noise_sigma, draw
        x_0 = self._packed(coded)
        return chain.add_noise(x_0, noise.to(x_0)), draw

    def _sample(
        self, model: Any, inputs: list[Tensor], chain: Chain, start: Start, noises: Tensor | None, method: Any,
        output_type: str, callback: Callback | None, options: dict[str, Any],
    ) -> DEQPipelineOutput:  # fmt: skip
        """The images that the chain makes."""
        check_options(options, sample, GIVEN | {"generator", "callback"}, type(self).__name__)
        if output_type not in OUTPUTS:
            raise ValueError(f"output_type: one of {', '.join(OUTPUTS)} is required, got {output_type!r}")
        check_settings(tensors={"noises": noises}, functions={})
        if noises is not None:
            check_values("noises", noises)
        x_T, draw = self._first(chain, start)
        noises = noises_of(self.scheduler, chain, x_T, draw) if noises is None else noises
        self._interrupt = False
        with self.progress_bar(total=len(chain)) as bar:
            hooks = hooks_of(self, chain, bar, callback, method, options.pop("edit", None))
            fixed: dict[str, Any] = {"inputs": inputs, "noises": noises, "prediction": chain.prediction or "epsilon"}
            out = sample(model, x_T, chain, method=method, **fixed, **hooks, **options)
        images = out.x_0 if output_type == "latent" else self._decoded(self._unpacked(out.x_0, start), output_type)
        self.maybe_free_model_hooks()
        return DEQPipelineOutput(images, out.rounds, out.evaluations, out.converged)

    def _given(self, chain: Chain, x_0: Tensor, inputs: list[Tensor], options: dict[str, Any]) -> dict[str, Any]:
        """The arguments of `find_latents` besides model, images, chain and method."""
        if any(len(x) != len(x_0) for x in inputs):
            raise ValueError(f"image: one for each of the conditions is required, got {len(x_0)} for "
                             f"{[len(x) for x in inputs]}")  # fmt: skip
        check_options(options, find_latents, GIVEN, f"{type(self).__name__}.invert")
        return {"prediction": chain.prediction or "epsilon", "inputs": inputs, **options}

    def _found(self, found: Inversion, chain: Chain) -> Inversion:
        """The latents in the unit that the call takes them in."""
        found.x_T = found.x_T / chain.init_noise_sigma
        self.maybe_free_model_hooks()
        return found

    def _decoded(self, x_0: Tensor, output_type: str) -> Any:
        if (autoencoder := self._autoencoder) is not None:
            x_0 = autoencoder.decode(x_0)
        # numpy and PIL have no bfloat16
        x_0 = x_0 if output_type == "pt" or x_0.dtype != torch.bfloat16 else x_0.float()
        return self._processor().postprocess(x_0, output_type)


def tell_of_spacing(found: Inversion, schedule: Any, spacing: str | None, method: Any) -> None:
    """Warns where images were missed on time steps of a scheduler's own spacing, of what helps."""
    missed = int((~found.converged).sum())
    own = isinstance(schedule, Schedule) and schedule.clip is None and spacing != "quadratic"
    if missed and own and method == "exact":
        warnings.warn(
            f"image: {missed} of {len(found.loss)} missed the error asked for on the scheduler's time steps; "
            'spacing="quadratic", here and where the latents are sampled, has more of them next to the image, where '
            "inversion is hard",
            stacklevel=3,
        )
