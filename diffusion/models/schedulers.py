"""The diffusers schedulers whose loops chains take step for step, and the options of each that they reproduce.

`SCHEDULERS` is the one table: what is not in it, a class or an option, is refused by name wherever it comes in.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..checks import real
from ..recurrence import Preconditioning
from .clip import Clip
from .grids import SchedulerGrid

PREDICTED = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}
SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
Read = Callable[[Any, Mapping[str, Any]], dict[str, Any]]


class UnsupportedSchedulerError(TypeError, ValueError):
    """A scheduler that is not reproduced, by its class or by an option; what it is, and what is known."""


@dataclass(frozen=True)
class Known:
    """One class of schedulers.

    options: the values of each option that are reproduced; None, all that the class takes.
    read: from the scheduler and its options, what a `Schedule` has besides ᾱ, spacing and prediction; without a table
        of ᾱ, what a `SchedulerGrid` has.
    """

    options: Mapping[str, tuple[Any, ...] | None]
    read: Read
    table: bool = True


def _clip(options: Mapping[str, Any], consistent: bool) -> Clip | None:
    if not options["thresholding"] and not options["clip_sample"]:
        return None
    name, least = ("sample_max_value", 1.0) if options["thresholding"] else ("clip_sample_range", 0.0)
    bound = float(options[name])
    if not (bound >= 1 if options["thresholding"] else bound > 0):
        raise ValueError(f"scheduler: {name} must be {least:g} or more, got {bound:g}")
    return Clip(bound, float(options["dynamic_thresholding_ratio"]) if options["thresholding"] else None, consistent)


def _ddim(scheduler: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    final = float(scheduler.final_alpha_cumprod)
    return {"final_alpha_cumprod": final, "diffusers_steps": True, "clip": _clip(options, consistent=False)}


def _ddpm(scheduler: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    variance = "large" if options["variance_type"] == "fixed_large" else "small"
    return {"ancestral": True, "variance": variance, "clip": _clip(options, consistent=True)}


def _euler(scheduler: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    prediction = PREDICTED[options["prediction_type"]]
    return {"signal": "one", "prediction": prediction, "preconditioning": Preconditioning()}


def _edm(scheduler: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    given = Preconditioning(float(options["sigma_data"]), output=True)
    return {"signal": "one", "prediction": PREDICTED[options["prediction_type"]], "preconditioning": given}


def _flow(scheduler: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    return {"signal": "flow", "prediction": "flow"}


def _dpmsolver(scheduler: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    flow = options["prediction_type"] == "flow_prediction"
    if flow and not options["use_flow_sigmas"]:
        raise UnsupportedSchedulerError(
            "scheduler: prediction_type='flow_prediction' of DPMSolverMultistepScheduler is not reproduced without "
            "use_flow_sigmas"
        )
    kinds = [f"{name}=True" for name in SPACINGS if options.get(name)]
    kinds += ["prediction_type='v_prediction'"] if options["prediction_type"] == "v_prediction" else []
    if options["use_flow_sigmas"] and kinds:
        raise UnsupportedSchedulerError(
            f"scheduler: {kinds[0]} of DPMSolverMultistepScheduler is not reproduced with use_flow_sigmas"
        )
    prediction = "flow" if flow else PREDICTED[options["prediction_type"]]
    return {"signal": "flow" if options["use_flow_sigmas"] else "vp", "prediction": prediction, "rule": "dpmsolver++2m"}


# What DDIMScheduler and DDPMScheduler have in common. Their betas are read as ᾱ, whatever they are made of.
COMMON: dict[str, tuple[Any, ...] | None] = {
    "num_train_timesteps": None, "beta_start": None, "beta_end": None, "beta_schedule": None, "trained_betas": None,
    "rescale_betas_zero_snr": None, "steps_offset": None, "timestep_spacing": ("leading", "linspace", "trailing"),
    "prediction_type": tuple(PREDICTED), "clip_sample": None, "clip_sample_range": None, "thresholding": None,
    "dynamic_thresholding_ratio": None, "sample_max_value": None,
}  # fmt: skip
# Options of sigmas, which are read off what set_timesteps makes of them.
SIGMAS: dict[str, tuple[Any, ...] | None] = {
    "use_karras_sigmas": None, "use_exponential_sigmas": None, "use_beta_sigmas": None, "sigma_min": None,
    "sigma_max": None, "final_sigmas_type": None, "sigma_schedule": None, "rho": None, "sigma_data": None,
    "interpolation_type": None, "timestep_type": None,
}  # fmt: skip
SHIFTS: dict[str, tuple[Any, ...] | None] = {
    "shift": None, "shift_terminal": None, "use_dynamic_shifting": None, "time_shift_type": None, "base_shift": None,
    "max_shift": None, "base_image_seq_len": None, "max_image_seq_len": None,
}  # fmt: skip
DPMSOLVER: dict[str, tuple[Any, ...] | None] = {
    "thresholding": (False,), "solver_order": (2,), "algorithm_type": ("dpmsolver++",), "solver_type": ("midpoint",),
    "use_lu_lambdas": None, "use_flow_sigmas": None, "flow_shift": None, "lambda_min_clipped": None,
    "use_dynamic_shifting": None, "time_shift_type": None, "prediction_type": (*PREDICTED, "flow_prediction"),
}  # fmt: skip
EDM_PREDICTED = {"prediction_type": ("epsilon", "v_prediction")}
SCHEDULERS = {
    "DDIMScheduler": Known({**COMMON, "set_alpha_to_one": None}, _ddim),
    "DDPMScheduler": Known({**COMMON, "variance_type": ("fixed_small", "fixed_small_log", "fixed_large")}, _ddpm),
    "EulerDiscreteScheduler": Known({**COMMON, **SIGMAS}, _euler, table=False),
    "FlowMatchEulerDiscreteScheduler": Known({**COMMON, **SIGMAS, **SHIFTS}, _flow, table=False),
    "DPMSolverMultistepScheduler": Known({**COMMON, **SIGMAS, **DPMSOLVER}, _dpmsolver, table=False),
    "EDMEulerScheduler": Known({**COMMON, **SIGMAS, **EDM_PREDICTED}, _edm, table=False),
}


def known_class(name: str, argument: str = "scheduler") -> Known:
    """The row of the table, by the name of the class.

    Raises:
        UnsupportedSchedulerError: none of that name.
    """
    if name not in SCHEDULERS:
        raise UnsupportedSchedulerError(
            f"{argument}: {name} is not reproduced; known are {', '.join(SCHEDULERS)} of diffusers. Where the network "
            "predicts noise, DDIM can sample it too: say so by DDIMScheduler.from_config(scheduler.config)"
        )
    return SCHEDULERS[name]


def read_scheduler(scheduler: Any, mu: float | None = None) -> dict[str, Any] | SchedulerGrid:
    """The arguments of the `Schedule` that has the chains of a diffusers scheduler, or the grid of its states.

    mu: of a scheduler with use_dynamic_shifting.

    Raises:
        UnsupportedSchedulerError: a class that is not in the table, a subclass of one included, or an option out of it.
        ValueError: an option that the scheduler's own class could not use either; mu missing, or of no use.
    """
    kind = type(scheduler)
    name = kind.__name__ if kind.__module__.startswith("diffusers.") else f"{kind.__module__}.{kind.__name__}"
    known, options = known_class(name), dict(scheduler.config)
    for option, parameter in inspect.signature(kind.__init__).parameters.items():
        value = options.get(option, parameter.default)
        values = known.options.get(option, (parameter.default,))
        if option != "self" and values is not None and value not in values:
            raise UnsupportedSchedulerError(
                f"scheduler: {option}={value!r} of {name} is not reproduced; known: {', '.join(map(repr, values))}"
            )
    _check_shift(name, options, mu)
    if not known.table:
        return SchedulerGrid(scheduler=copy.deepcopy(scheduler), mu=mu, **known.read(scheduler, options))
    alphas, N = scheduler.alphas_cumprod, options["num_train_timesteps"]
    if not isinstance(alphas, Tensor) or len(alphas) != N:
        raise ValueError(f"scheduler: num_train_timesteps={N} betas are required, got {len(alphas)} (trained_betas)")
    return {
        "alphas_cumprod": alphas, "steps_offset": int(options["steps_offset"]), "spacing": options["timestep_spacing"],
        "prediction": PREDICTED[options["prediction_type"]], **known.read(scheduler, options),
    }  # fmt: skip


def _check_shift(name: str, options: Mapping[str, Any], mu: float | None) -> None:
    """Raises unless mu is given where it is needed, and only there."""
    if mu is not None:
        real("mu", mu)
    if bool(options.get("use_dynamic_shifting")) != (mu is not None):
        required = "required by" if mu is None else "of use only to"
        raise ValueError(f"mu: {required} a scheduler with use_dynamic_shifting, such as FLUX's; {name} was given")
