"""Wrappers that make other networks a model(x, t, *inputs) → prediction."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from .schedule import Schedule

DIFFUSERS_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}


class DiffusersModel(nn.Module):
    """A diffusers UNet2DModel or UNet2DConditionModel as model(x, t, *inputs) → its `.sample`.

    inputs: for a UNet2DConditionModel `encoder_hidden_states` (N, tokens, width) and, if it has classes, `class_labels`
    (N,); for a UNet2DModel `class_labels` or nothing.

    Args:
        unet: the network; anything whose call returns an object with a tensor `sample`.

    Raises:
        TypeError: `unet` is not a module.
        ValueError: it predicts variances beside its output, or takes further conditioning (`added_cond_kwargs`).
    """

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        if not isinstance(unet, nn.Module):
            raise TypeError(f"unet: a torch.nn.Module is required, got {type(unet).__name__}")
        self.unet = unet
        self.conditional = hasattr(unet, "encoder_hid_proj") or type(unet).__name__ == "UNet2DConditionModel"
        config = getattr(unet, "config", None)
        channels = [getattr(config, name, None) for name in ("in_channels", "out_channels")]
        if channels[0] != channels[1]:
            raise ValueError(f"unet: as many channels out as in are required, got {channels[1]} for {channels[0]}")
        extra = getattr(config, "addition_embed_type", None)
        if extra is not None:
            raise ValueError(f"unet: addition_embed_type={extra!r} is not supported")

    @property
    def config(self) -> Any:
        """The configuration of the wrapped network."""
        return self.unet.config

    def forward(self, x: Tensor, t: Tensor, *inputs: Tensor) -> Tensor:
        """Return the prediction (N, C, H, W) for x (N, C, H, W) and t (N,) long.

        Raises:
            ValueError: more inputs than the network takes, or none for a conditional one.
        """
        most = 2 if self.conditional else 1
        if len(inputs) > most or (self.conditional and not inputs):
            required = "one or two are" if self.conditional else "at most one is"
            raise ValueError(f"inputs: {required} required by {type(self.unet).__name__}, got {len(inputs)}")
        names = ("encoder_hidden_states", "class_labels") if self.conditional else ("class_labels",)
        output = self.unet(x, t, **dict(zip(names, inputs, strict=False)))
        prediction: Tensor = output.sample
        return prediction


class Guided(nn.Module):
    """Classifier-free guidance: ε(x, t, ∅) + scale·(ε(x, t, c) − ε(x, t, ∅)).

    Ho and Salimans 2022, Eq. 6, with w = scale − 1. Both halves are evaluated in one batch of 2N rows.

    Args:
        model: model(x, t, *c) → prediction.
        scale: 1 is the conditional model alone, 0 the unconditional one; larger follows the condition more.
        null_input: what stands for "no condition", one row (…) or (1, …), for instance the embedding of "". None: the
            second half of the inputs is that, row by row: inputs = (c_1, …, c_n, ∅_1, …, ∅_n).

    Raises:
        ValueError: `scale` is not finite.
    """

    null_input: Tensor | None

    def __init__(self, model: Callable[..., Tensor], scale: float, null_input: Tensor | None = None) -> None:
        super().__init__()
        if not torch.isfinite(torch.tensor(float(scale))):
            raise ValueError(f"scale: a finite number is required, got {scale!r}")
        self.model = model
        self.scale = float(scale)
        self.register_buffer("null_input", null_input, persistent=False)

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
            nulls = [self.null_input.to(inputs[0]).expand_as(inputs[0])]
        pairs = [torch.cat([null, condition]) for null, condition in zip(nulls, conditions, strict=True)]
        without, with_condition = self.model(torch.cat([x, x]), torch.cat([t, t]), *pairs).chunk(2)
        return without + self.scale * (with_condition - without)


def read_diffusers(
    folder: Path, kind: str, dtype: torch.dtype
) -> tuple[DiffusersModel, Schedule, str, tuple[int, int, int]]:
    """Return model, schedule, prediction and shape of a UNet2DModel saved by diffusers.

    A scheduler is read from scheduler_config.json in the folder itself or in "scheduler" beside it, as in a
    pipeline; without one, the schedule is linear and the model predicts ε.

    Args:
        folder: written by `UNet2DModel.save_pretrained`, with safetensors weights.
        kind: class named by its config.json.
        dtype: type of the weights in memory.

    Raises:
        ImportError: diffusers is not installed.
        ValueError: another class, or files that diffusers cannot read.
    """
    if kind != "UNet2DModel":
        raise ValueError(f"{folder}: of diffusers' classes UNet2DModel is read, got {kind!r}")
    try:
        from diffusers import DDIMScheduler, UNet2DModel
    except ImportError as error:
        raise ImportError(f"{folder} holds a diffusers model: pip install diffusers") from error
    try:
        unet = UNet2DModel.from_pretrained(folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True)
    except (OSError, SafetensorError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}: diffusers cannot read it ({error})") from error
    schedule, prediction = Schedule.linear(), "epsilon"
    for place in (folder, folder.parent / "scheduler"):
        if (place / "scheduler_config.json").is_file():
            scheduler = DDIMScheduler.from_pretrained(place, local_files_only=True)
            schedule = Schedule.from_diffusers(scheduler)
            prediction = DIFFUSERS_PREDICTIONS[scheduler.config.prediction_type]
            break
    side = unet.config.sample_size
    height, width = (side, side) if isinstance(side, int) else side
    return DiffusersModel(unet), schedule, prediction, (unet.config.in_channels, height, width)
