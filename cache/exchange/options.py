"""Checks on the options of a format, which may reach it as text."""

from __future__ import annotations

from mer.cache.errors import UsageError


def whole(option: str, value: int | str, low: int) -> int:
    """Return ``value`` as an integer of at least ``low``.

    Raises
    ------
    UsageError
        It is none, or below.
    """
    try:
        number = int(value)
    except ValueError:
        number = low - 1
    if number < low:
        raise UsageError(f"{option}={value}, expected a whole number of at least {low}.")
    return number
