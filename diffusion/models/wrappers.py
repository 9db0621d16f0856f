"""Wrappers that make other networks a model(x, t, *inputs) → prediction."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..checks import real
from ..schedule import AnySchedule, Schedule
from .answers import WRAPPERS
from .files import read_json
from .networks import TRANSFORMERS, takes
from .schedulers import known_class

INDEX = "model_index.json"
SCHEDULER = "scheduler_config.json"
TIME = ("timestep", "timesteps", "time", "t")
# Options of a UNet2DConditionModel that ask for conditioning besides embeddings, labels and SDXL's.
FURTHER = {
    "addition_embed_type": (None, "text_time"), "time_cond_proj_dim": (None,),
    "encoder_hid_dim_type": (None, "text_proj"),
}  # fmt: skip


def unwrapped(network: Any) -> Any:
    """The network inside DataParallel, DistributedDataParallel and torch.compile."""
    while isinstance(network, WRAPPERS) or hasattr(network, "_orig_mod"):
        network = network.module if isinstance(network, WRAPPERS) else network._orig_mod
    return network


class DiffusersModel(nn.Module):
    """A network of diffusers as model(x, t, *inputs) → its `.sample`, or what it returns first.

    inputs, each with a leading dimension of the images: of a UNet2DModel `class_labels` or nothing; of a
    UNet2DConditionModel `encoder_hidden_states` and, if it has classes, `class_labels`, of SDXL's `text_embeds` and
    `time_ids`; of a DiTTransformer2DModel `class_labels`; of an SD3Transformer2DModel `encoder_hidden_states` and
    `pooled_projections`; of a FluxTransformer2DModel these, `txt_ids` and `img_ids` (one for all images, expanded) and
    `guidance`, where it is distilled; x is its packed latents. Variances that it predicts beside its output, in as many
    channels again, are left out.

    Args:
        unet: the network, in DataParallel or not; anything whose call (x, timestep) returns an object with a tensor
            `sample`.

    Raises:
        TypeError: `unet` is not a module, or its forward does not take a timestep second.
        ValueError: other channels out than in, or conditioning that it takes besides.
    """

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        if not isinstance(unet, nn.Module):
            raise TypeError(f"unet: a torch.nn.Module is required, got {type(unet).__name__}")
        self.unet = unet
        network = unwrapped(unet)
        self.name, options = type(network).__name__, getattr(network, "config", None)
        self.conditional = hasattr(network, "encoder_hid_proj") or self.name == "UNet2DConditionModel"
        self.channels, out = (getattr(options, name, None) for name in ("in_channels", "out_channels"))
        out = self.channels if out is None else out
        kinds = (getattr(options, name, None) for name in ("num_class_embeds", "class_embed_type"))
        self.classes = next((kind for kind in kinds if kind), None)
        if self.name == "DiTTransformer2DModel":
            self.classes = getattr(options, "num_embeds_ada_norm", None)
        self.takes = takes(self.name, self.conditional, self.classes, getattr(options, "addition_embed_type", None))
        arguments = list(inspect.signature(network.forward).parameters)
        known = self.name in TRANSFORMERS
        if not known and arguments[1:2] and arguments[1] not in TIME and set(TIME) & set(arguments):
            raise TypeError(
                f"unet: a network called as (x, timestep, …) is required, {self.name} takes ({', '.join(arguments)}); "
                "wrap it: model = lambda x, t, *inputs: net(…).sample"
            )
        if out not in (self.channels, 2 * (self.channels or 0)):
            raise ValueError(f"unet: as many channels out as in are required, got {out} for {self.channels}")
        self.variances = out != self.channels
        for name, plain in FURTHER.items():
            value = getattr(options, name, None)
            if not known and value not in plain:
                raise ValueError(
                    f"unet: {name}={value!r} is not supported; wrap it: model = lambda x, t, e, *more: unet(x, t, e, "
                    "added_cond_kwargs={…}, …).sample, with all conditioning in inputs"
                )
        if self.name == "FluxTransformer2DModel":
            self.channels = None  # of packed latents (N, tokens, channels)

    @property
    def config(self) -> Any:
        """The configuration of the wrapped network."""
        return unwrapped(self.unet).config

    def forward(self, x: Tensor, t: Tensor, *inputs: Tensor) -> Tensor:
        """Return the prediction (N, C, H, W) for x (N, C, H, W) and t (N,).

        Raises:
            ValueError: more inputs than the network takes, or fewer than it needs; images of other channels.
        """
        takes = self.takes
        if not takes.needed <= len(inputs) <= len(takes.names):
            if len(inputs) == takes.needed - 1 and takes.names[len(inputs)] == "class_labels":
                raise ValueError(f"inputs: class labels, one for each image, are required by {self.name}")
            raise ValueError(f"inputs: {takes.required} are required by {self.name}, got {len(inputs)}")
        if self.channels is not None and x.shape[1:2] != (self.channels,):
            raise ValueError(f"x: {self.channels} channels are required by {self.name}, got shape {tuple(x.shape)}")
        arguments = takes.arguments(inputs)
        if self.name in TRANSFORMERS:
            output = self.unet(x, timestep=t if takes.unit == 1 else t * takes.unit, **arguments)
        else:
            output = self.unet(x, t, **arguments)
        prediction: Tensor = output.sample
        return prediction.chunk(2, 1)[0] if self.variances else prediction


class Guided(nn.Module):
    """Classifier-free guidance: ε(x, t, ∅) + scale·(ε(x, t, c) − ε(x, t, ∅)).

    Ho and Salimans 2022, Eq. 6, with w = scale − 1. Both halves are evaluated in one batch of 2N rows.

    Args:
        model: model(x, t, *c) → prediction.
        rescale: φ of Lin et al. 2024, Eq. 15 and 16: the part whose standard deviation is made, image by image, that of
            the conditional prediction.
        scale: 1 is the conditional model alone, 0 the unconditional one; larger follows the condition more.
        null_input: what stands for "no condition", one row (…) or (1, …), for instance the embedding of "". None: the
            second half of the inputs is that, row by row: inputs = (c_1, …, c_n, ∅_1, …, ∅_n).

    Raises:
        ValueError: `scale` is not finite, `rescale` not in 0 … 1.
    """

    null_input: Tensor | None

    def __init__(
        self, model: Callable[..., Tensor], scale: float, null_input: Tensor | None = None, rescale: float = 0.0
    ) -> None:
        super().__init__()
        if not 0 <= real("rescale", rescale) <= 1:
            raise ValueError(f"rescale: 0 to 1 is required, got {rescale}")
        if not torch.isfinite(torch.tensor(float(scale))):
            raise ValueError(f"scale: a finite number is required, got {scale!r}")
        self.model = model
        self.scale, self.rescale = float(scale), float(rescale)
        self.register_buffer("null_input", null_input, persistent=False)
        self.training = isinstance(model, nn.Module) and model.training

    def forward(self, x: Tensor, t: Tensor, *inputs: Tensor) -> Tensor:
        """Return the guided prediction (N, …) for x (N, …), t (N,) long and inputs (N, …) each.

        Raises:
            ValueError: not one input with a `null_input`, or an odd number without.
        """
        if len(inputs) != 1 if self.null_input is not None else len(inputs) % 2 or not inputs:
            required = "one is" if self.null_input is not None else "conditions, then as many null inputs, are"
            raise ValueError(f"inputs: {required} required for guidance, got {len(inputs)}")
        half = len(inputs) // 2 if self.null_input is None else len(inputs)
        conditions, nulls = inputs[:half], list(inputs[half:])
        if self.null_input is not None:
            if not inputs[0].is_floating_point():  # labels, whose kind may not hold the null's
                conditions = (inputs[0].long(),)
            nulls = [self.null_input.to(conditions[0]).expand_as(conditions[0])]
        pairs = [torch.cat([null, condition]) for null, condition in zip(nulls, conditions, strict=True)]
        without, with_condition = self.model(torch.cat([x, x]), torch.cat([t, t]), *pairs).chunk(2)
        guided = without + self.scale * (with_condition - without)
        if self.rescale == 0:
            return guided
        size = with_condition.flatten(1).std(1) / guided.flatten(1).std(1)
        factor = self.rescale * size + (1 - self.rescale)
        return guided * factor.view(-1, *[1] * (guided.dim() - 1))


Found = tuple[DiffusersModel, AnySchedule, str, tuple[int, int, int]]


def read_diffusers(folder: Path, kind: str, dtype: torch.dtype) -> Found:
    """Return model, schedule, prediction and shape of a UNet2DModel saved by diffusers.

    A scheduler is read from scheduler_config.json in the folder itself or in "scheduler" beside it, as in a
    pipeline; without one, the schedule is linear and the model predicts ε.

    Args:
        folder: written by `UNet2DModel.save_pretrained`, with safetensors weights.
        kind: class named by its config.json.
        dtype: type of the weights in memory.

    Raises:
        ImportError: diffusers is not installed.
        ValueError: another class, or files that diffusers cannot read. A scheduler that is not reproduced is a
            TypeError too.
    """
    if kind != "UNet2DModel":
        raise ValueError(f"{folder}: of diffusers' networks UNet2DModel is read, got {kind!r}")
    try:
        from diffusers import UNet2DModel
    except ImportError as error:
        raise ImportError(f"{folder} holds a diffusers model: pip install diffusers") from error
    places = [place for place in (folder, folder.parent / "scheduler") if (place / SCHEDULER).is_file()]
    schedule: AnySchedule = read_schedule(places[0]) if places else Schedule.linear()
    try:
        unet = UNet2DModel.from_pretrained(
            folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False
        )
    except (OSError, SafetensorError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}: diffusers cannot read it ({error})") from error
    side = unet.config.sample_size
    if side is None:
        raise ValueError(f"{folder / 'config.json'}: sample_size, the size of an image, is required, got null")
    height, width = (side, side) if isinstance(side, int) else side
    try:
        model = DiffusersModel(unet)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    return model, schedule, schedule.prediction or "epsilon", (unet.config.in_channels, height, width)


def read_schedule(folder: Path) -> AnySchedule:
    """Return the schedule of the scheduler that diffusers saved in a folder.

    Raises:
        ValueError: one that is not reproduced, or a file that diffusers cannot read.
    """
    name = read_json(folder / SCHEDULER).get("_class_name")
    known_class(str(name), str(folder / SCHEDULER))
    import diffusers

    try:
        scheduler = getattr(diffusers, str(name)).from_pretrained(folder, local_files_only=True)
    except (OSError, NotImplementedError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{folder / SCHEDULER}: diffusers cannot read it ({error})") from error
    try:
        return Schedule.from_diffusers(scheduler)
    except ValueError as error:
        raise type(error)(f"{folder / SCHEDULER}: {error}") from error


def read_pipeline(folder: Path, dtype: torch.dtype) -> Found:
    """Return model, schedule, prediction and shape of a pipeline of pixels that diffusers saved: unet and scheduler.

    Raises:
        FileNotFoundError, ImportError, ValueError: as `read_diffusers`; or a part of another kind, by name.
    """
    parts = components(read_json(folder / INDEX))
    for name, kind in parts.items():
        if name not in ("unet", "scheduler"):
            raise ValueError(
                f"{folder / INDEX}: {name} ({kind}) is not read: a unet and a scheduler alone are required"
            )
    if "unet" not in parts:
        raise ValueError(f"{folder / INDEX}: a unet is required")
    return read_diffusers(folder / "unet", parts["unet"], dtype)


def components(index: dict[str, Any]) -> dict[str, str]:
    """Return the classes of a pipeline's parts by name, from its model_index.json; parts left empty left out."""
    parts = {name: value for name, value in index.items() if not name.startswith("_") and isinstance(value, list)}
    return {name: str(value[1]) for name, value in parts.items() if len(value) == 2 and value[1] is not None}


def check_parts(place: str, index: dict[str, Any], own: set[str], given: dict[str, Any], pipeline: str) -> None:
    """Raises for parts of a folder that a pipeline of parts `own` has no use for, and that are not given as None.

    Raises:
        TypeError: a scheduler that is not reproduced.
        ValueError: any other part, by name.
    """
    parts = components(index)
    rest = {n: kind for n, kind in parts.items() if n not in own and (n not in given or given[n] is not None)}
    if rest:
        named, (are, them) = ", ".join(f"{n} ({kind})" for n, kind in rest.items()), ("is", "it")
        if len(rest) > 1:
            are, them = "are", "them"
        raise ValueError(
            f"{place}: {named} {are} not used by {pipeline}; {', '.join(f'{n}=None' for n in rest)} leaves {them} out; "
            "prompts come as prompt_embeds"
        )
    if "scheduler" in parts and "scheduler" not in given:
        kind, file = parts["scheduler"], Path(place) / "scheduler" / SCHEDULER  # which may say another class
        for said in {kind, str(read_json(file).get("_class_name", kind)) if file.is_file() else kind}:
            known_class(said, f"{place}: scheduler")
