"""Conditions of the pipelines: what a network's configuration requires of each, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..arguments import check_settings
from ..checks import real
from ..models.wrappers import unwrapped

TEXT = "prompt_embeds"
POOLED = "pooled_prompt_embeds"
NEGATIVE = "negative_"


@dataclass(frozen=True)
class Form:
    """What a condition (B, *sizes) looks like.

    sizes: a name stands for any size of at least 1. values: "floats", "numbers", or the number of classes, whose labels
    are integers below it.
    """

    sizes: tuple[int | str, ...] = ()
    values: str | int = "floats"

    def check(self, name: str, x: Any) -> None:
        """Raises, by name, for what does not look like it; None does.

        Raises:
            TypeError: no tensor, or one of another kind of numbers.
            ValueError: another shape, labels of no class, or a tensor without values.
        """
        check_settings(tensors={name: x}, functions={})
        if x is None:
            return
        sizes = zip(self.sizes, x.shape[1:], strict=False)
        named = all(got >= 1 if isinstance(want, str) else got == want for want, got in sizes)
        fits = x.dim() == 1 + len(self.sizes) and named
        if not fits:
            shape = f"({', '.join(map(str, ('B', *self.sizes)))}{'' if self.sizes else ','})"
            raise ValueError(f"{name}: shape {shape} is required, got {tuple(x.shape)}")
        floats, wrong = x.is_floating_point(), x.is_complex() or x.dtype == torch.bool
        if wrong or (self.values == "floats" and not floats) or (isinstance(self.values, int) and floats):
            kind = {"floats": "floating-point values", "numbers": "real numbers"}.get(str(self.values), "integers")
            raise TypeError(f"{name}: {kind} are required, got {x.dtype}")
        check_values(name, x)
        if not isinstance(self.values, int) or not x.numel():
            return
        least, most = map(int, x.long().aminmax())
        if not 0 <= least <= most < self.values:
            got = f"{least} … {most}"
            raise ValueError(f"{name}: labels 0 … {self.values - 1} of the network's classes are required, got {got}")


def check_values(name: str, x: Tensor) -> None:
    """Raises ValueError for a tensor on the device "meta"."""
    if x.is_meta:
        raise ValueError(f'{name}: a tensor with values is required, got one on the device "meta"')


def forms_of(network: Any, given: Mapping[str, Any]) -> dict[str, Form]:
    """What the conditions of a network of diffusers look like, by the pipelines' names for them.

    A condition that is missing here may be anything. `given`: of SDXL, add_time_ids and the width of
    pooled_prompt_embeds together make up what the network embeds.
    """
    config = unwrapped(network).config
    if "joint_attention_dim" in config:  # SD3, FLUX
        return {TEXT: Form(("tokens", config.joint_attention_dim)), POOLED: Form((config.pooled_projection_dim,))}
    forms = _classes(config)
    if "cross_attention_dim" in config:
        width = config.get("encoder_hid_dim") or config.cross_attention_dim
        blocks = (*config.down_block_types, config.mid_block_type, *config.up_block_types)
        known = isinstance(width, int) and any("CrossAttn" in str(block) for block in blocks)
        forms[TEXT] = Form(("tokens", width if known else "width"))
    if config.get("addition_embed_type") == "text_time":
        forms["add_time_ids"] = Form(("numbers",), "numbers")
        total, ids = config.projection_class_embeddings_input_dim, given.get("add_time_ids")
        several = ids.shape[1] if isinstance(ids, Tensor) and ids.dim() == 2 else None
        forms[POOLED] = Form(("width" if several is None else total - config.addition_time_embed_dim * several,))
    return forms


def _classes(config: Any) -> dict[str, Form]:
    """Of class_labels."""
    kind, number = config.get("class_embed_type"), config.get("num_class_embeds")
    if config.get("num_embeds_ada_norm") is not None:  # of a DiT, which has one label more, for no class
        number = config.num_embeds_ada_norm + 1
    if kind is None and number is not None:
        return {"class_labels": Form((), int(number))}
    if kind == "timestep":
        return {"class_labels": Form((), "numbers")}
    if kind in ("projection", "simple_projection"):
        return {"class_labels": Form((config.projection_class_embeddings_input_dim,))}
    return {}


def check_conditions(network: Any, given: Mapping[str, Any]) -> None:
    """Raises, by name, for a condition, or a negative one, that the network's configuration rules out."""
    forms = forms_of(network, given)
    for name, value in given.items():
        form = forms.get(name.removeprefix(NEGATIVE))
        if form is not None:
            form.check(name, value)


def nulls_of(used: Sequence[str], conditions: Sequence[Tensor], given: Mapping[str, Any], why: str) -> list[Tensor]:
    """The negatives of the conditions named, (B, …) each, of as many rows; of one row it stands for all.

    Raises:
        ValueError: one is missing, which says why it is required, or has another shape than its condition.
    """
    nulls = []
    for name, own in zip(used, conditions, strict=True):
        null: Tensor | None = given[NEGATIVE + name]
        if null is None:
            raise ValueError(f"{NEGATIVE}{name}: required with {why}")
        if null.dim() != own.dim() or null.shape[1:] != own.shape[1:] or len(null) not in (1, len(own)):
            raise ValueError(f"{NEGATIVE}{name}: {tuple(own.shape)}, as {name}, or one row is required, got "
                             f"{tuple(null.shape)}")  # fmt: skip
        nulls.append(null.expand_as(own))
    return nulls


def guidance_rescale(value: Any, guided: bool) -> float:
    """The share of `Guided`'s rescaling, 0 to 1; only 0 without guidance."""
    if not 0 <= real("guidance_rescale", value) <= 1:
        raise ValueError(f"guidance_rescale: 0 to 1 is required, got {value}")
    if value and not guided:
        raise ValueError(f"guidance_rescale: of guidance by a scale other than 1, got {value}")
    return float(value)
