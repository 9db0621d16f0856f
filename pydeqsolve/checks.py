"""Checks of scalar arguments, one message for each kind."""

from __future__ import annotations

import operator


def check_count(name: str, value: object, least: int) -> int:
    """Returns an integer of any kind (NumPy's and tensors of one included, bool not) as an int of at least `least`."""
    if type(value) is not int:
        if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")):
            raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        try:
            value = operator.index(value)  # type: ignore[arg-type]
        except TypeError as error:
            raise TypeError(f"{name} must be an int, got {type(value).__name__}") from error
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


def keep_count(owner: object, name: str, least: int) -> None:
    """Replaces a field of a frozen dataclass by the int that it is; raises as `check_count`."""
    value = getattr(owner, name)
    if type(count := check_count(name, value, least)) is not type(value):
        object.__setattr__(owner, name, count)


def check_real(name: str, value: object) -> None:
    """Raises TypeError unless `value` is an int or a float (bool excluded)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a float, got {type(value).__name__}")


def check_damping(damping: float) -> None:
    """Raises unless 0 < damping ≤ 2."""
    check_real("damping", damping)
    if not 0 < damping <= 2:
        raise ValueError(f"damping must be in (0, 2], got {damping}")


def check_flag(name: str, value: object) -> None:
    """Raises TypeError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__}")
