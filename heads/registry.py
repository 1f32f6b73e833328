"""Heads by name, and their settings checked before anything is built.

Nothing registers by being imported, and nothing is imported before it is asked for: this module
does not need ``torch``. Third parties add names through the entry-point group ``mer.heads``, each
pointing at a ``Head`` subclass.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import types
from collections.abc import Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

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
        return getattr(importlib.import_module(module), attribute)
    found = _third_party().get(name)
    if found is None:
        raise ValueError(f"Unknown head {name!r}.{_near(name, names())} `mer heads ls` shows all.")
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
    cls = resolve(name).Config
    hints = get_type_hints(cls)
    fields = [f.name for f in dataclasses.fields(cls) if f.init]
    faults, values = [], {}
    for key, value in config.items():
        if key not in fields:
            faults.append(f"unknown key {key!r}.{_near(str(key), fields)}")
            continue
        try:
            values[key] = _coerce(value, hints[key])
        except TypeError:
            faults.append(f"{key} must be {_describe(hints[key])}. Got {value!r}.")
    required = {
        f.name
        for f in dataclasses.fields(cls)
        if f.init and f.default is f.default_factory is dataclasses.MISSING
    }
    faults += [f"{key} is missing." for key in sorted(required - set(config))]
    if faults:
        raise ValueError(f"Head {name!r}: " + " ".join(faults))
    try:
        return cls(**values)
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


def _near(name: str, known: Iterable[str]) -> str:
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.6)
    if near:
        return " Did you mean " + " or ".join(map(repr, near)) + "?"
    return " Known: " + ", ".join(known) + "."


def _coerce(value: Any, hint: Any) -> Any:
    """Return ``value`` as ``hint`` wants it; YAML writes tuples as lists and 1.0 as 1."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        for option in args:
            try:
                return _coerce(value, option)
            except TypeError:
                continue
        raise TypeError
    if origin is Literal:
        # True == 1: a flag must not pass for a number
        if any(value == option and type(value) is type(option) for option in args):
            return value
        raise TypeError
    if origin is tuple:
        if isinstance(value, (list, tuple)):
            kinds = [args[0]] * len(value) if args[1:] == (...,) else list(args)
            if len(kinds) == len(value):
                return tuple(_coerce(v, k) for v, k in zip(value, kinds, strict=True))
        raise TypeError
    if hint in (None, type(None)):
        if value is None:
            return None
        raise TypeError
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise TypeError
    return value


def _describe(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(a) for a in args)
    if origin is Literal:
        return " or ".join(repr(a) for a in args)
    if origin is tuple:
        return f"a list of {_describe(args[0])}"
    if hint in (None, type(None)):
        return "null"
    return {bool: "true or false", int: "an integer", float: "a number", str: "a string"}.get(
        hint, str(hint)
    )
