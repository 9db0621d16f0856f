"""DDIM sampling and inversion as one fixed point over time (Pokle, Geng & Kolter 2022), on `pydeqsolve`."""

from typing import TYPE_CHECKING, Any

from .chain import Chain, Splitting
from .checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from .clip import Clip
from .edit import Inpaint
from .fit import fit
from .invert import Inversion, invert
from .models import DiffusersModel, Guided
from .sample import Sample, sample
from .schedule import Schedule
from .statistics import Statistics

if TYPE_CHECKING:
    from .pipeline import DEQDDIMPipeline as DEQDDIMPipeline

__all__ = [
    "Chain",
    "Checkpoint",
    "Clip",
    "DiffusersModel",
    "Guided",
    "Inpaint",
    "Inversion",
    "Sample",
    "Schedule",
    "Splitting",
    "Statistics",
    "fit",
    "invert",
    "load_checkpoint",
    "sample",
    "save_checkpoint",
]


def __getattr__(name: str) -> Any:
    # diffusers is an extra and takes seconds to import: only who asks for the pipeline pays.
    if name == "DEQDDIMPipeline":
        from .pipeline import DEQDDIMPipeline

        return DEQDDIMPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
