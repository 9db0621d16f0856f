"""The configuration of a checkpoint, checked against the header of its weights before memory is taken."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ..schedule import AnySchedule, Schedule
from . import statistics, weights
from .files import Stored, parse_json
from .unet import UNet

FORMAT = 1
ARCHITECTURES: dict[str, type[nn.Module]] = {"UNet": UNet}
PREDICTIONS = ("epsilon", "v", "sample")
WEIGHTS, CONFIG = "model.safetensors", "config.json"
MOST_TIMESTEPS = 100_000  # of a schedule or a network: both keep a table of them that no file bounds


def agreed(folder: Path, config: dict[str, Any], metadata: dict[str, str]) -> dict[str, Any]:
    """Return the configuration in the header of the weights, once config.json says the same but for the training."""
    if config.get("format") != FORMAT:
        raise ValueError(f"{folder / CONFIG}: format {FORMAT} is required, got {config.get('format')!r}")
    if "config" not in metadata:  # weights written by another tool: config.json is all there is
        return config
    try:
        header = parse_json(metadata["config"])
    except ValueError as error:
        raise ValueError(f"{folder / WEIGHTS}: its configuration is {error}") from error
    different = [key for key in {**header, **config} if key != "training" and header.get(key) != config.get(key)]
    if different:
        raise ValueError(f"{folder / CONFIG}: belongs to other weights than {WEIGHTS}: {', '.join(different)} differ")
    return header


def described(
    folder: Path, config: dict[str, Any], stored: dict[str, Stored]
) -> tuple[Callable[[], nn.Module], Schedule, str, tuple[int, int, int]]:
    """Return what makes the model, schedule, prediction and shape, once `config` is known to be of what is stored."""
    path, architecture = folder / CONFIG, config.get("architecture")
    name = architecture.get("name") if isinstance(architecture, dict) else None
    if not isinstance(architecture, dict) or not isinstance(name, str) or name not in ARCHITECTURES:
        raise ValueError(f"{path}: architecture must be one of {', '.join(ARCHITECTURES)}, got {name!r}")
    arguments = architecture.get("arguments")
    if not isinstance(arguments, dict):
        raise ValueError(f"{path}: arguments of {name} are required, got {arguments!r}")
    make = partial(ARCHITECTURES[name], **arguments)
    try:
        _check_sizes(arguments, config.get("schedule"), len(stored))
        model = weights.skeleton(make)
    except ValueError as error:
        raise ValueError(f"{path}: arguments of {name}: {error}") from error
    try:
        read = Schedule.from_config(config.get("schedule", {}))
        shape = checked_shape(config.get("shape"), model)
        prediction = checked_prediction(config.get("prediction"))
        schedule = check_timesteps(model, read)
        if not isinstance(config.get("training", {}), dict):
            raise ValueError(f"training: an object is required, got {config['training']!r}")
    except (TypeError, ValueError, OverflowError, RuntimeError, RecursionError) as error:
        raise ValueError(f"{path}: {str(error).splitlines()[0]}") from error
    _check_tensors(model, stored, shape, folder / WEIGHTS)
    return make, schedule, prediction, shape


def _check_sizes(arguments: dict[str, Any], schedule: Any, count: int) -> None:
    """Refuse what would take memory or time before shapes can be compared: more blocks than the file has tensors."""
    blocks = arguments.get("blocks")
    if isinstance(blocks, list) and sum(n for n in blocks if isinstance(n, int) and n > 0) > count:
        raise ValueError(f"blocks: no more than the {count} tensors of {WEIGHTS} are required, got {blocks!r:.80}")
    lengths = {"timesteps": arguments.get("timesteps"), "n": schedule.get("n") if isinstance(schedule, dict) else None}
    for name, length in lengths.items():
        if isinstance(length, int) and length > MOST_TIMESTEPS:
            raise ValueError(f"{name}: at most {MOST_TIMESTEPS:,} time steps are required, got {length:,}")


def _check_tensors(model: nn.Module, stored: dict[str, Stored], shape: tuple[int, ...], path: Path) -> None:
    """Raises ValueError unless a file holds the tensors of the model, statistics of its images, and nothing else."""
    unknown = [name for name in stored if not name.startswith((weights.PREFIX, statistics.PREFIX))]
    if unknown:
        raise ValueError(f"{path}: tensor {unknown[0]} is not known")
    weights.check_stored(model, stored, path)
    statistics.check_stored(stored, shape, path)


def checked_shape(shape: Any, model: nn.Module) -> tuple[int, int, int]:
    whole = isinstance(shape, (list, tuple)) and all(isinstance(n, int) and n > 0 for n in shape)
    if not whole or len(shape) != 3:
        raise ValueError(f"shape: three positive integers (C, H, W) are required, got {shape!r}")
    if tuple(shape) != getattr(model, "shape", None):
        raise ValueError(f"shape: the model's {getattr(model, 'shape', None)} is required, got {tuple(shape)}")
    return shape[0], shape[1], shape[2]


def checked_prediction(prediction: Any) -> str:
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction: one of {', '.join(PREDICTIONS)} is required, got {prediction!r}")
    return str(prediction)


def check_timesteps(model: nn.Module, schedule: AnySchedule) -> Schedule:
    """The schedule, once it has a table of ᾱ whose last time step the model knows; else raises ValueError."""
    if not isinstance(schedule, Schedule):
        raise ValueError(f"schedule: one with a table of ᾱ is required, got {type(schedule.grid).__name__}")
    known = getattr(model, "config", {}).get("timesteps", len(schedule))
    if known < len(schedule):
        raise ValueError(f"model: {len(schedule)} timesteps are required, got {known}")
    return schedule
