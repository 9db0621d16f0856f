"""Batched fixed points z = f(z) in PyTorch: per-sample convergence, implicit gradients, a native Anderson step."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("pydeqsolve")
except PackageNotFoundError:  # a source tree on the path that was never installed
    __version__ = "0.0.0"

from .anderson import Anderson
from .broyden import Broyden
from .deq import DEQ
from .derivative.diagnostics import jacobian_penalty, spectral_radius
from .derivative.gmres import GMRES
from .derivative.gradient import Implicit, Phantom, Unrolled
from .derivative.leaves import leaves
from .derivative.neumann import Neumann
from .picard import Picard
from .solution import Adjoint, ConvergenceError, Solution, Status
from .solve import solve
from .step.native import build_info
from .stop import Front, Stop

__all__ = [
    "DEQ",
    "GMRES",
    "Adjoint",
    "Anderson",
    "Broyden",
    "ConvergenceError",
    "Front",
    "Implicit",
    "Neumann",
    "Phantom",
    "Picard",
    "Solution",
    "Status",
    "Stop",
    "Unrolled",
    "build_info",
    "jacobian_penalty",
    "leaves",
    "solve",
    "spectral_radius",
]
