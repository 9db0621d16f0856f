"""Checks of scalar arguments, one message for each kind."""

from __future__ import annotations


def check_count(name: str, value: object, least: int) -> None:
    """Raises unless `value` is an int (bool excluded) of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


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
