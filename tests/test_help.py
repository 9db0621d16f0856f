"""What --help says is the default of an option is the default."""

import argparse
import inspect
import re

import pytest

from diffusion.inversion.descent import EPOCHS, LEARNING_RATES
from diffusion.program.commands import COUNT, STEPS, USUAL_STRENGTH
from diffusion.program.demo import LONG
from diffusion.program.editing import COUNT as EDITED
from diffusion.program.fitting import CLASSIFIER_STEPS
from diffusion.program.inversion import COUNT as INVERTED
from diffusion.program.inversion import STEPS as INVERTED_STEPS
from diffusion.program.options import build_parser
from diffusion.program.reproduction.plan import PLANS, Plan
from diffusion.training.fit import EMOJI_BATCH, fit, recipes


def commands():
    actions = build_parser()._actions
    return next(action for action in actions if isinstance(action, argparse._SubParsersAction)).choices


OPTIONS = [
    pytest.param(command, action, id=f"{name} {action.option_strings[-1]}")
    for name, command in commands().items()
    for action in command._actions
    if action.option_strings and action.nargs != 0  # switches are off
]


def defaults(function):
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def planned(name):
    return {value for plan in [*PLANS.values(), Plan()] for value in _flat(getattr(plan, name))}


def _flat(value):
    return value if isinstance(value, tuple) else (value,)


# Where the parser has no default because it depends on the model or the data: all values that it can have.
DEPENDS = {
    ("demo", "steps"): {*LONG.values(), 100},
    ("sample", "steps"): {STEPS},
    ("sample", "count"): {COUNT},
    ("sample", "strength"): {USUAL_STRENGTH, 1},
    ("invert", "steps"): {INVERTED_STEPS},
    ("invert", "strength"): {1},
    ("invert", "count"): {INVERTED},
    ("edit", "count"): set(EDITED.values()),
    ("sample", "guidance"): {1},
    ("invert", "guidance"): {1},
    ("invert", "epochs"): {EPOCHS},
    ("invert", "lr"): set(LEARNING_RATES.values()),
    ("fit", "steps"): {defaults(f)["steps"] for f in (fit, *recipes.values())},
    **{("fit", name): {defaults(fit)[name]} for name in ("lr", "save_every")},
    ("fit", "batch"): {defaults(fit)["batch"], EMOJI_BATCH},
    **{("report", n): planned(n) for n in ("steps", "runs", "samples", "invert_steps", "images", "epochs", "batch")},
    ("report", "lr"): set(LEARNING_RATES.values()),
    ("classifier", "steps"): {*CLASSIFIER_STEPS.values(), 1000},
}
IN_WORDS = {
    "gradient",
    "threads",
    "rule",
    "spacing",
    "timesteps",
    "sigmas",
    "eta",
    "error",
    "splitting",
    "window",
    "model",
    "images",
    "dataset_folder",
    "latents",
    "max_rounds",
    "shape",
    "between",
    "vary",
    "label",
    "guidance",
    "negative_label",
}  # defaults that are no number


def said(command, action):
    """What the help of an option says after the word default."""
    text = command._get_formatter()._expand_help(action)
    return text.partition("default")[2]


@pytest.mark.parametrize(("command", "action"), OPTIONS)
def test_the_help_of_every_option_tells_its_true_default(command, action):
    name = command.prog.split()[-1]
    text = said(command, action)
    if action.required:
        assert text == ""
    elif (name, action.dest) in DEPENDS:
        assert action.default is None
        assert {float(number) for number in re.findall(r"\d[\d.]*", text)} == DEPENDS[name, action.dest]
    elif action.default is None:
        assert action.dest in IN_WORDS
        assert text
    elif isinstance(action.default, (int, float)):
        assert float(re.findall(r"\d[\de.-]*", text)[0]) == action.default
    else:
        value = " ".join(map(str, action.default)) if isinstance(action.default, tuple) else str(action.default)
        assert value in text


def test_inversion_takes_no_default_from_latents():
    invert = commands()["invert"]
    assert not [action.dest for action in invert._actions if "latents" in said(invert, action)]
