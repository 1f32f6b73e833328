"""Heads by name, and their settings checked before anything is built.

Nothing registers by being imported, and nothing is imported before it is asked for: this module
does not need ``torch``. Third parties add names through the entry-point group ``mer.heads``, each
pointing at a ``Head`` subclass.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from mer.heads.settings import build, near

if TYPE_CHECKING:
    from mer.heads.contract import Dims, Head

ENTRY_POINTS = "mer.heads"

HEADS: Mapping[str, str] = {
    "simple": "mer.heads.mdat_ser:Simple",
    "mdat": "mer.heads.mdat_ser:Mdat",
}


def names() -> list[str]:
    """Return all names, ours and third parties', sorted."""
    return sorted({*HEADS, *_third_party()})


def resolve(name: str) -> type[Head]:
    """Return the class behind ``name``.

    Raises
    ------
    ValueError
        Unknown name (with the nearest ones), or an entry point that is no head.
    """
    if name in HEADS:
        module, _, attribute = HEADS[name].partition(":")
        listed: type[Head] = getattr(importlib.import_module(module), attribute)
        return listed
    found = _third_party().get(name)
    if found is None:
        raise ValueError(f"Unknown head {name!r}.{near(name, names())} `mer heads ls` shows all.")
    from mer.heads.contract import Head

    head = found.load()
    if not (isinstance(head, type) and issubclass(head, Head)):
        raise ValueError(
            f"Entry point {name!r} of {ENTRY_POINTS!r} ({found.value}) "
            "is no subclass of mer.heads.contract.Head."
        )
    return head


def configure(name: str, config: Mapping[str, Any]) -> Any:
    """Return the head's ``Config`` with ``config`` over its defaults.

    Raises
    ------
    ValueError
        Unknown head, unknown key (with the nearest one), value of the wrong type or out of range.
        All faults of keys and types are reported together.
    """
    head = resolve(name)
    try:
        return build(head.Config, config)
    except ValueError as error:
        raise ValueError(f"Head {name!r}: {error}") from error


def create(name: str, config: Mapping[str, Any], dims: Dims, num_classes: int) -> Head:
    """Return a new head, its weights drawn from torch's current seed.

    Parameters
    ----------
    name : str
        One of ``names()``.
    config : mapping
        What differs from the defaults of the head's ``Config``.
    dims : mapping of str to int or StreamShape
        Streams given; a bare integer is the width of frames, or ``num_codes`` where the head
        declares codes.
    num_classes : int
        C.

    Raises
    ------
    ValueError
        Unknown name or key, bad value, missing or unknown stream.

    Examples
    --------
    >>> head = create("simple", {"width": 16, "hidden": 8}, {"speech": 40}, num_classes=4)
    >>> sum(p.numel() for p in head.parameters())
    964
    """
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1. Got {num_classes}.")
    return resolve(name)(configure(name, config), dims, num_classes)


def _third_party() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}
