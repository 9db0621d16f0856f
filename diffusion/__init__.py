"""DDIM sampling and inversion as one fixed point over time (Pokle, Geng & Kolter 2022), on `pydeqsolve`."""

from .chain import Chain, Splitting
from .checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from .edit import Clip, Inpaint
from .fit import fit
from .invert import Inversion, invert
from .models import DiffusersModel, Guided
from .sample import Sample, sample
from .schedule import Schedule

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
    "fit",
    "invert",
    "load_checkpoint",
    "sample",
    "save_checkpoint",
]
