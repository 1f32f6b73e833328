"""``mer cache diff``: in what two stores differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mer.cache import layout
from mer.cache.spec import OutputSpec

if TYPE_CHECKING:
    from mer.cache.store import Store

_BATCH_BYTES = 32 << 20
ABSENT = "absent"
"""Stands for the value of what one of the stores does not have."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One utterance whose values differ.

    Parameters
    ----------
    key : bytes
        16 bytes.
    largest : float
        Largest absolute difference; infinite where the lengths differ.
    relative : float
        The largest absolute difference in relation to the largest magnitude of both.
    frames : tuple of int
        T in the one and in the other store.
    """

    key: bytes
    largest: float
    relative: float
    frames: tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreDiff:
    """What tells two stores apart.

    Parameters
    ----------
    a, b : str
        Paths or URLs.
    identity : dict of str to tuple
        Keys of the identities that differ, nested ones joined by dots, and both values; ``ABSENT``
        where there is none.
    outputs : dict of str to tuple
        Outputs that cannot be compared, or differ in what they declare: both descriptions,
        ``ABSENT`` where a store has no such output.
    only_in_a, only_in_b : tuple of bytes
        Keys.
    compared : tuple of str
        Outputs whose values were compared.
    different : dict of str to list of Difference
        By output, largest first; only outputs that differ.
    in_both : int
        Utterances that both hold.
    same : int or None
        Those of them whose compared outputs are equal, bit for bit but for their type; None where
        no values were compared.
    """

    a: str
    b: str
    identity: dict[str, tuple[Any, Any]]
    outputs: dict[str, tuple[str, str]]
    only_in_a: tuple[bytes, ...]
    only_in_b: tuple[bytes, ...]
    compared: tuple[str, ...]
    different: dict[str, list[Difference]]
    in_both: int
    same: int | None

    @property
    def equal(self) -> bool:
        """Whether nothing that was compared differs."""
        return not (
            self.identity or self.outputs or self.only_in_a or self.only_in_b or self.different
        )


def diff(
    a: Store,
    b: Store,
    *,
    values: bool = True,
    progress: Callable[[int], None] | None = None,
) -> StoreDiff:
    """Compare identities, declared outputs, keys, and the values of what both hold.

    Parameters
    ----------
    a, b : Store
        Any two.
    values : bool, default=True
        Read and compare frames.
    progress : callable, optional
        Called with the number of utterances compared since the last call.

    Raises
    ------
    DamagedStoreError
        Bytes that are read are not what was written.
    """
    ours, theirs = _distinct(a), _distinct(b)
    shared = [key for key in ours if key in theirs]
    outputs, comparable = _compare_outputs(a.spec.outputs, b.spec.outputs)
    different: dict[str, list[Difference]] = {}
    unequal: set[bytes] = set()
    if values:
        for batch in _batches(a, shared, comparable):
            for output in comparable:
                found = [d for d in (_compare(a, b, key, output) for key in batch) if d is not None]
                if found:
                    different.setdefault(output, []).extend(found)
                    unequal.update(d.key for d in found)
            if progress is not None:
                progress(len(batch))
    compared = tuple(comparable) if values else ()
    for found in different.values():
        found.sort(key=lambda d: (-d.largest, d.key))
    return StoreDiff(
        a=a.url,
        b=b.url,
        identity=_compare_identities(a.spec.identity, b.spec.identity),
        outputs=outputs,
        only_in_a=tuple(key for key in ours if key not in theirs),
        only_in_b=tuple(key for key in theirs if key not in ours),
        compared=compared,
        different=different,
        in_both=len(shared),
        same=len(shared) - len(unequal) if compared else None,
    )


def _distinct(store: Store) -> dict[bytes, None]:
    """Return the keys in storage order, quick to look up."""
    return dict.fromkeys(store.keys())  # noqa: SIM118 - not a mapping


def _batches(store: Store, keys: list[bytes], outputs: list[str]) -> list[list[bytes]]:
    """Return keys in groups whose frames are worth reading together."""
    sizes = np.zeros(len(keys), np.int64)
    for output in outputs:
        row = store.spec.output(output).dim * 4
        sizes += np.asarray(store.num_frames(keys, output)) * row if keys else 0
    groups: list[list[bytes]] = []
    room = 0
    for key, size in zip(keys, sizes.tolist(), strict=True):
        if not groups or size > room:
            groups.append([])
            room = _BATCH_BYTES
        groups[-1].append(key)
        room -= size
    return groups


def _compare(a: Store, b: Store, key: bytes, output: str) -> Difference | None:
    ours, theirs = a.frames(key, output), b.frames(key, output)
    lengths = len(ours), len(theirs)
    if lengths[0] != lengths[1]:
        return Difference(key, float("inf"), float("inf"), lengths)
    if np.array_equal(ours, theirs):
        return None
    first, second = ours.astype(np.float64), theirs.astype(np.float64)
    largest = float(np.abs(first - second).max())
    magnitude = max(float(np.abs(first).max()), float(np.abs(second).max()))
    return Difference(key, largest, largest / magnitude, lengths)


def _compare_outputs(
    a: tuple[OutputSpec, ...], b: tuple[OutputSpec, ...]
) -> tuple[dict[str, tuple[str, str]], list[str]]:
    """Return outputs that differ and those whose values can be compared."""
    ours, theirs = {o.name: o for o in a}, {o.name: o for o in b}
    different: dict[str, tuple[str, str]] = {}
    comparable = []
    for name in [*ours, *(name for name in theirs if name not in ours)]:
        one, other = ours.get(name), theirs.get(name)
        if one != other:
            different[name] = _described(one), _described(other)
        if one is None or other is None or one.dim != other.dim:
            continue
        if (one.kind == "codes") == (other.kind == "codes"):
            comparable.append(name)
    return different, comparable


def _described(output: OutputSpec | None) -> str:
    if output is None:
        return ABSENT
    fields = layout.output_to_json(output)
    return ", ".join(f"{key} {value}" for key, value in fields.items() if key != "name")


def _compare_identities(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    ours, theirs = dict(_flat(a)), dict(_flat(b))
    different = {}
    for path in sorted(ours.keys() | theirs.keys()):
        one, other = ours.get(path, ABSENT), theirs.get(path, ABSENT)
        if type(one) is not type(other) or one != other:
            different[path] = (one, other)
    return different


def _flat(value: Any, path: str = "") -> list[tuple[str, Any]]:
    """Return the leaves of nested mappings and lists by their path."""
    if isinstance(value, Mapping) and value:
        items = [(f"{path}.{key}" if path else str(key), inner) for key, inner in value.items()]
    elif (
        isinstance(value, list | tuple)
        and value
        and any(isinstance(inner, Mapping | list | tuple) for inner in value)
    ):
        items = [(f"{path}[{number}]", inner) for number, inner in enumerate(value)]
    else:
        return [(path, list(value) if isinstance(value, tuple) else value)]
    return [leaf for at, inner in items for leaf in _flat(inner, at)]
