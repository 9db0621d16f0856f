"""The model's answers checked: what does not fit is said in one line, with what to do about it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
# What a network raises that was given something else than it wants, and what helps.
REMEDIES = {
    r"converted to Scalar|only one element|only length-1|is ambiguous": "a network that takes one t for all rows is "
    "called for each distinct t by a function of your own",
    r"(expected|same) (scalar type|dtype)|to have the same dtype|not implemented for '(Long|Int)'": "a network that "
    "takes a float t is wrapped: model = lambda x, t, *inputs: net(x, t.float(), *inputs)",
    r"used as indices must be|scalar types: Long, Int": "a network of integer time steps has chains "
    "of them: its own Schedule's; a flow's or EDM's model is given t as float",
    r"Input type .* and (weight|bias) type": "images of the network's own dtype are required",
    r"to have \d+ channels": "images of the network's own channels are required",
}


def explained(error: Exception, x: Tensor, t: Tensor, inputs: Sequence[Tensor]) -> Exception | None:
    """What to raise instead of an error of model(x, t, *inputs), x (n, …), t (n,): with the remedy, if one is known."""
    if isinstance(error, TypeError):
        names = ", ".join(["x", "t", *[f"inputs[{i}]" for i in range(len(inputs))]])
        return TypeError(
            f"model: called as model({names}): {_line(error)}; wrap a network that takes other arguments: "
            "model = lambda x, t, *inputs: net(…)"
        )
    remedy = next((what for words, what in REMEDIES.items() if re.search(words, str(error))), None)
    if remedy is None:
        return None
    given = f"x {tuple(x.shape)} {x.dtype} and t ({len(t)},) {t.dtype}, one for each row"
    return ValueError(f"model: called with {given}: {_line(error)}; {remedy}")


def checked(value: Any, x: Tensor) -> Tensor:
    """The model's answer at x (n, …), of the shape of x.

    Raises:
        TypeError, ValueError: it is something else; by name, with the remedy.
    """
    fits = isinstance(value, Tensor) and value.shape == x.shape and value.is_floating_point()
    if fits and value.device == x.device:
        return value
    required = f"model: a tensor of the shape of x, {tuple(x.shape)}, is required, got"
    if not isinstance(value, Tensor):
        raise TypeError(f"{required} {type(value).__name__}{_inside(value)}")
    if value.shape != x.shape:
        doubled = value.dim() == x.dim() and value.shape[1] == 2 * x.shape[1] and value.shape[2:] == x.shape[2:]
        hint = f": drop the variances it predicts too, model = lambda x, t, *inputs: net(…)[:, :{x.shape[1]}]"
        raise ValueError(f"{required} {tuple(value.shape)}{hint if doubled else ''}")
    if not value.is_floating_point():
        raise TypeError(f"{required} {value.dtype}: floating-point values")
    raise ValueError(f"{required} one on {value.device}: that of x, {x.device}")


def _inside(value: Any) -> str:
    """Where the prediction might be in an answer that is no tensor."""
    if isinstance(getattr(value, "sample", None), Tensor):
        return ": wrap it, DiffusersModel(unet), or model = lambda x, t, *inputs: net(…).sample"
    if isinstance(value, dict) and value:
        names = ", ".join(map(repr, value))
        return f" with {names}: wrap it, model = lambda x, t, *inputs: net(…)[{next(iter(value))!r}]"
    if isinstance(value, (tuple, list)):
        return ": wrap it, model = lambda x, t, *inputs: net(…)[0]"
    return ""


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def warn_of_training(model: Any) -> None:
    """Warns of a module in training mode: with dropout or batch statistics a chain has no fixed images."""
    if isinstance(model, nn.Module) and any(
        m.training and not any(True for _ in m.children()) for m in model.modules()
    ):
        warnings.warn(
            "model: it is in training mode, where dropout and batch statistics make every call another network's: "
            "call model.eval()",
            stacklevel=6,
        )


def draw(shape: Sequence[int], generator: Any, device: torch.device) -> Tensor:
    """Standard normal values of `shape` (B, …), float64, on `device`, from one generator or one for each of the B.

    A generator of the CPU serves every device, as diffusers has it.

    Raises:
        TypeError, ValueError: what is no generator, too few or many of them, or one of another device.
    """
    several = isinstance(generator, (list, tuple))
    for one in generator if several else [generator]:
        if not isinstance(one, torch.Generator) and (one is not None or several):
            raise TypeError(f"generator: a torch.Generator, or a list of them, is required, got {type(one).__name__}")
        if one is not None and one.device.type not in ("cpu", device.type):
            raise ValueError(f"generator: one on the CPU or on {device} is required, got one on {one.device}")
    if not several:
        place = device if generator is None else generator.device
        return torch.randn(tuple(shape), dtype=torch.float64, generator=generator, device=place).to(device)
    if len(generator) != shape[0]:
        raise ValueError(f"generator: one for each of the {shape[0]} images is required, got {len(generator)}")
    parts = [torch.randn(tuple(shape[1:]), dtype=torch.float64, generator=g, device=g.device) for g in generator]
    return torch.stack([part.to(device) for part in parts]) if parts else torch.empty(tuple(shape)).double().to(device)
