"""Plain text for people: tables, sizes, and the sizes and ages that options are given in."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from mer.cache.errors import UsageError

_SIZES = {
    "": 1,
    "b": 1,
    **{f"{prefix}b": 1000 ** (i + 1) for i, prefix in enumerate("kmgtp")},
    **{f"{prefix}ib": 1024 ** (i + 1) for i, prefix in enumerate("kmgtp")},
}
_AGES_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400, "y": 365 * 86_400}
_NUMBER = re.compile(r"-|[\d,]+(\.\d+)?( [kMGT]B)?")
_QUANTITY = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([A-Za-z]*)\s*")


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Render left-aligned columns, numbers and sizes to the right.

    Examples
    --------
    >>> print(table(["store", "parts"], [["logmel", 3]]))
    store   parts
    ------  -----
    logmel      3
    """
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    numeric = [all(_is_number(row[i]) for row in rows) for i in range(len(header))]
    lines = []
    for row in cells:
        padded = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _is_number(cell: object) -> bool:
    return isinstance(cell, (int, float)) or _NUMBER.fullmatch(str(cell)) is not None


def size(count: int) -> str:
    """Return bytes as they stand in tables.

    Examples
    --------
    >>> size(1_234_567_890), size(24_454)
    ('1.2 GB', '24.5 kB')
    """
    value, unit = count / 1e3, "kB"
    for larger in ("MB", "GB", "TB"):
        if round(value, 1) < 1000:
            break
        value, unit = value / 1e3, larger
    return f"{value:,.1f} {unit}"


def counted(count: int, noun: str) -> str:
    """Return a number and what is counted.

    Examples
    --------
    >>> counted(1, "part"), counted(1200, "utterance")
    ('1 part', '1,200 utterances')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def parse_size(text: str) -> int:
    """Return the bytes of ``50GB``, ``1.5 GiB`` or ``200 MB``; a bare number is bytes.

    Raises
    ------
    UsageError
        Not a size.

    Examples
    --------
    >>> parse_size("1.5 GiB")
    1610612736
    """
    number, unit = _quantity(text, _SIZES) or (None, "")
    if number is None:
        raise UsageError(f"{text!r} is no size; expected e.g. 50GB, 1.5GiB or 200MB.")
    return round(number * _SIZES[unit])


def parse_age(text: str) -> float:
    """Return the seconds of ``30d``, ``12h``, ``6w`` or ``1y``.

    Raises
    ------
    UsageError
        Not an age; a bare number is none.

    Examples
    --------
    >>> parse_age("12h")
    43200.0
    """
    number, unit = _quantity(text, _AGES_S) or (None, "")
    if number is None:
        raise UsageError(f"{text!r} is no age; expected e.g. 30d, 12h, 6w or 1y.")
    return number * _AGES_S[unit]


def _quantity(text: str, units: Mapping[str, int]) -> tuple[float, str] | None:
    match = _QUANTITY.fullmatch(text)
    if match is None or match[2].lower() not in units:
        return None
    return float(match[1]), match[2].lower()
