"""Checks on the options of a feature string, which reach an extractor as text."""

from __future__ import annotations

import math

from mer.cache.errors import UsageError


def real(feature: str, option: str, value: str, low: float, high: float) -> float:
    """Return ``value`` as a number in [low, high].

    Raises
    ------
    UsageError
        Not a number, or out of range.
    """
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not low <= number <= high:
        raise UsageError(
            f"Feature {feature!r}: {option}={value}, expected a number from {low:g} to {high:g}."
        )
    return number


def whole(feature: str, option: str, value: str, low: int, high: int) -> int:
    """Return ``value`` as an integer in [low, high].

    Raises
    ------
    UsageError
        Not an integer, or out of range.
    """
    number = real(feature, option, value, low, high)
    if number != int(number):
        raise UsageError(f"Feature {feature!r}: {option}={value}, expected a whole number.")
    return int(number)


def check_choice(feature: str, option: str, value: str, allowed: tuple[str, ...]) -> str:
    """Return ``value`` if it is one of ``allowed``.

    Raises
    ------
    UsageError
        It is not.
    """
    if value not in allowed:
        raise UsageError(
            f"Feature {feature!r}: {option}={value} is not known; expected {' or '.join(allowed)}."
        )
    return value
