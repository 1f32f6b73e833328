"""Settings from a recipe into a frozen dataclass: keys and types checked, all faults at once."""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def build(cls: type[T], settings: Mapping[str, Any]) -> T:
    """Return ``cls(**settings)``, an integer passing for a float and a list for a tuple.

    Raises
    ------
    ValueError
        Unknown keys (with the nearest known), missing ones and values of the wrong type, all
        together; else what ``__post_init__`` finds.
    """
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    hints = get_type_hints(cls)
    faults, values = [], {}
    for key, value in settings.items():
        if key not in fields:
            faults.append(f"unknown key {key!r}.{near(str(key), fields)}")
            continue
        try:
            values[key] = _coerce(value, hints[key])
        except TypeError:
            faults.append(f"{key} must be {_describe(hints[key])}. Got {value!r}.")
    for key, field in fields.items():
        if key not in settings and field.default is field.default_factory is dataclasses.MISSING:
            faults.append(f"{key} is missing.")
    if faults:
        raise ValueError(" ".join(faults))
    return cls(**values)


def near(name: str, known: Iterable[str]) -> str:
    """Return the end of a message on an unknown name: the nearest ones, or all."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=2, cutoff=0.6)
    if close:
        return " Did you mean " + " or ".join(map(repr, close)) + "?"
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
        if args[1:] == (...,):
            return f"a list, each item {_describe(args[0])}"
        return f"a list of {len(args)}: " + ", ".join(map(_describe, args))
    if hint in (None, type(None)):
        return "null"
    return {bool: "true or false", int: "an integer", float: "a number", str: "a string"}.get(
        hint, str(hint)
    )
