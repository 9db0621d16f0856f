"""What one call of the pipeline takes from its scheduler: a chain, and noises drawn as the scheduler draws them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..chain import Chain
from ..checks import count
from ..models.clip import Clip
from ..models.continuous import ContinuousSchedule
from ..models.levels import MOST_STEPS
from ..schedule import Schedule


def chain_of(
    scheduler: Any,
    steps: int,
    eta: float | None,
    clip_sample: bool | None = None,
    anew: bool | None = None,
    **own: Any,
) -> Chain:
    """The scheduler's chain.

    Args:
        steps, eta: of the chain; None is the scheduler's own eta.
        clip_sample: False leaves predicted images as they are, True clips them to [−1, 1] where the scheduler does not
            clip; None does as the scheduler does.
        anew: whether ε is taken anew from an image that is clipped; None does as the scheduler does.
        own: timesteps or sigmas instead of `steps`, or None; spacing, None is the scheduler's own.
    """
    schedule = Schedule.from_diffusers(scheduler)
    length = steps if own.get("timesteps") is None and own.get("sigmas") is None else None
    if length is not None:
        length = count("num_inference_steps", length, least=1, most=MOST_STEPS)
    for name, value in (("clip_sample", clip_sample), ("use_clipped_model_output", anew)):
        if value not in (None, True, False):
            raise TypeError(f"{name}: true, false or None is required, got {value!r}")
    if isinstance(schedule, ContinuousSchedule):
        if clip_sample or anew:
            raise ValueError(f"clip_sample: {type(scheduler).__name__} does not clip; only DDIM and DDPM do")
        return schedule.chain(length, eta=eta, **own)
    clip = schedule.clip
    if clip_sample is not None:
        clip = (clip or Clip(1.0, consistent=schedule.ancestral)) if clip_sample else None
    if clip is not None and anew is not None:
        clip = replace(clip, consistent=bool(anew))
    if own.pop("sigmas", None) is not None:
        raise ValueError(f"sigmas: not taken by {type(scheduler).__name__}, which has time steps")
    return replace(schedule, clip=clip).chain(length, eta=eta, **own)


def noises_of(scheduler: Any, chain: Chain, x_T: Tensor, draw: dict[str, Any]) -> Tensor | None:
    """Fresh noise (B, T, …), one step after the other by `randn_tensor(shape, **draw)`; None for eta = 0.

    DDPMScheduler draws none at t = 0. Where σ_k = 0 the noise drawn is not added: given to `sample`, it would be.
    """
    if chain.eta == 0:
        return None
    fresh = (chain.timesteps > 0) | torch.tensor(not isinstance(scheduler, DDPMScheduler))
    none, added = torch.zeros_like(x_T), chain.sigma > 0
    drawn = (randn_tensor(x_T.shape, **draw) if one else none for one in fresh.tolist())
    return torch.stack([noise if used else none for noise, used in zip(drawn, added.tolist(), strict=True)], 1)
