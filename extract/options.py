"""Numbers out of the options of a feature string."""

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
