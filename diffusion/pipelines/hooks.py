"""The hooks of `sample` that move a pipeline's bar and call its callback, as diffusers' pipelines call theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..chain import Chain
from ..methods.sequential import Sequential

Callback = Callable[..., dict[str, Any] | None]
NAME = "callback_on_step_end"


def hooks_of(pipe: Any, chain: Chain, bar: Any, callback: Callback | None, method: Any, edit: Any) -> dict[str, Any]:
    """The arguments edit and callback of `sample` for a chain sampled by this method.

    Raises:
        ValueError: a callback of a chain of two-step rule in sequence.
    """
    times, dtype = chain.timesteps.tolist(), pipe._network.dtype

    def after_round(step: int, trajectory: Tensor, residual: Tensor) -> bool:
        bar.update()
        if callback is not None:
            latents = trajectory[:, -1].to(dtype)
            if _changed(callback(pipe, step - 1, times[0], {"latents": latents}), latents) is not latents:
                raise ValueError(f"{NAME}: the states of a parallel chain are changed by edit=")
        return bool(pipe._interrupt)

    def after_step(x: Tensor, k: int, image: Tensor) -> Tensor:
        bar.update()
        x = x if edit is None else edit(x, k, image)
        if callback is None:
            return x
        latents = x.to(dtype)
        returned = _changed(callback(pipe, k - 1, times[k - 1], {"latents": latents}), latents)
        return x if returned is latents else returned.to(x)

    if method == "sequential" or isinstance(method, Sequential):
        if chain.past is not None and callback is not None:
            raise ValueError(f"{NAME}: of a chain of two-step rule, with a parallel method alone")
        return {"edit": after_step if chain.past is None else edit}
    quiet = callback is None and bar.disable
    return {"edit": edit, "callback": None if quiet else after_round}


def _changed(returned: Any, latents: Tensor) -> Tensor:
    """The latents that a callback returned, else those that it was given."""
    if returned is None:
        return latents
    if not isinstance(returned, dict):
        raise TypeError(f"{NAME}: must return a dict or None, returned {type(returned).__name__}")
    own = returned.get("latents", latents)
    if not isinstance(own, Tensor) or own.shape != latents.shape:
        got = tuple(own.shape) if isinstance(own, Tensor) else type(own).__name__
        raise ValueError(f"{NAME}: latents of shape {tuple(latents.shape)} must be returned, got {got}")
    return own
