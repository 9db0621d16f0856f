"""How networks of diffusers are called: which of their arguments the inputs of model(x, t, *inputs) stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LABELS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32, torch.uint64)
ADDED = ("text_embeds", "time_ids")  # of SDXL, in added_cond_kwargs


@dataclass(frozen=True)
class Takes:
    """names: the inputs in their order, the first `needed` of them required; shared: those of which one serves all
    images, given with a leading dimension of them all the same; unit: what t is multiplied by."""

    names: tuple[str, ...]
    needed: int
    shared: tuple[str, ...] = ()
    unit: float = 1.0

    @property
    def required(self) -> str:
        """How many inputs, in words."""
        most = len(self.names)
        count = f"{most}" if self.needed == most else f"{self.needed} to {most}"
        return f"{count} ({', '.join(self.names)})"

    def arguments(self, inputs: tuple[Tensor, ...]) -> dict[str, Any]:
        """The keyword arguments of a call."""
        named = dict(zip(self.names, inputs, strict=False))
        labels = named.get("class_labels")
        if labels is not None and labels.dtype in LABELS:
            named["class_labels"] = labels.long()  # an embedding takes no other kind
        for name in self.shared:
            named[name] = named[name][0]
        added = {name: named.pop(name) for name in ADDED if name in named}
        return {**named, "added_cond_kwargs": added} if added else named


TRANSFORMERS = {
    "DiTTransformer2DModel": Takes(("class_labels",), 1),
    "SD3Transformer2DModel": Takes(("encoder_hidden_states", "pooled_projections"), 2),
    "FluxTransformer2DModel": Takes(
        ("encoder_hidden_states", "pooled_projections", "txt_ids", "img_ids", "guidance"), 4,
        shared=("txt_ids", "img_ids"), unit=1e-3,
    ),
}  # fmt: skip


def takes(name: str, conditional: bool, classes: Any, added: Any) -> Takes:
    """Of a network by the name of its class.

    conditional: it is a UNet with text embeddings. classes: its config's classes. added: its addition_embed_type.
    """
    if name in TRANSFORMERS:
        return TRANSFORMERS[name]
    if not conditional:
        return Takes(("class_labels",), int(classes is not None))
    if added == "text_time":
        return Takes(("encoder_hidden_states", *ADDED), 3)
    return Takes(("encoder_hidden_states", "class_labels"), 1 + (classes is not None))
