"""The public interface: every name, with its signature, as tests/public_names.txt lists it.

A change there is a change for users. `python tests/test_public_names.py` writes the list anew; read its diff, and say
in CHANGELOG.md what changed.
"""

import dataclasses
import enum
import functools
import inspect
import re
from pathlib import Path

import pytest

import diffusion
import pydeqsolve
from pydeqsolve import testing

PACKAGES = ("pydeqsolve", "diffusion")
LIST = Path(__file__).with_name("public_names.txt")


def described(name, value):
    """The lines that say how a name is used: signature, and of a class its fields and methods."""
    if inspect.isclass(value) and issubclass(value, enum.Enum):
        return [f"{name}: {', '.join(member.name for member in value)}"]
    if inspect.isclass(value) and issubclass(value, Exception):
        return [f"{name}({value.__base__.__name__})"]
    lines = [f"{name}{signature(value)}"]
    if inspect.isclass(value):
        if dataclasses.is_dataclass(value):
            lines += [
                f"    .{field.name}" for field in dataclasses.fields(value) if not field.init and field.name[0] != "_"
            ]
        own = [vars(base) for base in reversed(value.__mro__) if base.__module__.split(".")[0] in PACKAGES]
        for key, member in sorted({key: member for names in own for key, member in names.items()}.items()):
            if key.startswith("_"):
                continue
            if isinstance(member, (property, functools.cached_property)):
                lines.append(f"    .{key}")
            elif isinstance(member, (staticmethod, classmethod)) or inspect.isfunction(member):
                lines.append(f"    .{key}{signature(getattr(value, key))}")
    return lines


def signature(value):
    """Names, kinds and defaults of the parameters, without annotations."""
    given = inspect.signature(value)
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in given.parameters.values()]
    text = str(given.replace(parameters=plain, return_annotation=inspect.Signature.empty))
    return re.sub(r" at 0x[0-9a-f]+|<factory>", "", text)


def interface():
    lines = []
    for module in (pydeqsolve, testing, diffusion):
        lines.append(f"[{module.__name__}]")
        names = getattr(module, "__all__", None) or [n for n in sorted(vars(module)) if n.startswith("check_")]
        for name in sorted(names):
            lines += described(name, getattr(module, name))
    return "\n".join(lines) + "\n"


def test_the_public_names_and_signatures_are_those_listed():
    assert interface() == LIST.read_text(encoding="utf-8")


@pytest.mark.parametrize("module", [pydeqsolve, diffusion], ids=lambda m: m.__name__)
def test_the_list_of_public_names_is_sorted_complete_and_documented(module):
    assert list(module.__all__) == sorted(
        module.__all__, key=lambda name: (not name.isupper(), name[0].islower(), name)
    )
    for name in module.__all__:
        assert (getattr(module, name).__doc__ or "").strip(), name


if __name__ == "__main__":
    LIST.write_text(interface(), encoding="utf-8")
