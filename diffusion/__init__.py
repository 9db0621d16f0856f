"""DDIM sampling and inversion as one fixed point over time (Pokle, Geng & Kolter 2022), on `pydeqsolve`."""

from typing import TYPE_CHECKING, Any

from .chain import Chain, Splitting
from .edit import Inpaint
from .inversion.descent import Descent
from .inversion.exact import Exact
from .inversion.noise_maps import NoiseMaps
from .inversion.one_pass import OnePass
from .invert import Inversion, invert
from .methods.coarse import CoarseToFine
from .methods.fastest import fastest
from .methods.parallel import Parallel
from .methods.sequential import Sequential
from .models.calls import FixedRows
from .models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from .models.clip import Clip
from .models.statistics import Statistics
from .models.wrappers import DiffusersModel, Guided
from .sample import Sample, sample
from .schedule import Schedule

if TYPE_CHECKING:
    from .pipelines.ddim import DEQDDIMPipeline as DEQDDIMPipeline
    from .pipelines.flow import DEQFlowPipeline as DEQFlowPipeline
    from .training.fit import fit

__all__ = [
    "Chain",
    "Checkpoint",
    "Clip",
    "CoarseToFine",
    "Descent",
    "DiffusersModel",
    "Exact",
    "FixedRows",
    "Guided",
    "Inpaint",
    "Inversion",
    "NoiseMaps",
    "OnePass",
    "Parallel",
    "Sample",
    "Schedule",
    "Sequential",
    "Splitting",
    "Statistics",
    "fastest",
    "fit",
    "invert",
    "load_checkpoint",
    "sample",
    "save_checkpoint",
]


def __getattr__(name: str) -> Any:
    # Only who trains pays for the training; diffusers, an extra, takes seconds to import.
    if name == "fit":
        from .training.fit import fit

        return fit
    if name == "DEQDDIMPipeline":
        from .pipelines.ddim import DEQDDIMPipeline

        return DEQDDIMPipeline
    if name == "DEQFlowPipeline":
        from .pipelines.flow import DEQFlowPipeline

        return DEQFlowPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
