"""HDF5, in two layouts; both hold what links the rows under `/utterances`.

N utterances, F frames of all of them, D width.

``hdf5``, flat: fast to read whole, one dataset per output::

    /utterances/id (N,) text, key (N, 16) uint8, input_length (N,) int64
    /<output>/frames (F, D), offsets (N + 1,) int64   n is frames[offsets[n]:offsets[n + 1]]

``hdf5-utterances``: one dataset per utterance, named by its id::

    /utterances/…
    /<output>/<id> (T, D)       an id with slashes lies in groups, so that file[output][id] finds it

The root's attribute ``mer`` holds the provenance as JSON, ``licence`` the licence note.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from mer.cache.errors import UsageError
from mer.cache.exchange.incoming import (
    DEFAULT_OUTPUT,
    Incoming,
    Skipped,
    Utterance,
    Wanted,
    output_name,
    own_outputs,
    parse_provenance,
)
from mer.cache.exchange.outgoing import Outgoing, appearing
from mer.cache.identity import KEY_BYTES

UTTERANCES = "utterances"


# -- writing ---------------------------------------------------------------------------------------


def write_flat(source: Outgoing, target: Path, overwrite: bool) -> list[Path]:
    """Write one file in the flat layout."""
    _check_names(source)
    with appearing(target, overwrite) as temporary, h5py.File(temporary, "w") as file:
        _write_common(source, file)
        for output in source.outputs:
            lengths = source.num_frames(output.name)
            offsets = np.zeros(len(source) + 1, np.int64)
            np.cumsum(lengths, out=offsets[1:])
            group = file.create_group(output.name)
            _describe(group, output.rate_hz, output.kind)
            group["offsets"] = offsets
            shape = (int(offsets[-1]), output.dim)
            frames = group.create_dataset("frames", shape, source.one_type(output.name))
            for place, values in source.scan(output.name):
                if len(values):
                    frames[offsets[place] : offsets[place + 1]] = values
                if output is source.outputs[-1]:
                    source.advance()
    return [target]


def write_utterances(source: Outgoing, target: Path, overwrite: bool) -> list[Path]:
    """Write one file with a dataset per utterance."""
    _check_names(source)
    _check_ids(source.ids)
    with appearing(target, overwrite) as temporary, h5py.File(temporary, "w") as file:
        _write_common(source, file)
        for output in source.outputs:
            group = file.create_group(output.name)
            _describe(group, output.rate_hz, output.kind)
            for place, values in source.scan(output.name):
                group.create_dataset(source.ids[place], data=values)
                if output is source.outputs[-1]:
                    source.advance()
    return [target]


def _write_common(source: Outgoing, file: h5py.File) -> None:
    file.attrs["mer"] = source.provenance_json
    file.attrs["store"] = source.store.name
    file.attrs["fingerprint"] = source.store.fingerprint
    if source.store.spec.licence is not None:
        file.attrs["licence"] = source.store.spec.licence
    group = file.create_group(UTTERANCES)
    ids = [name.encode("utf-8") for name in source.ids]
    group.create_dataset("id", data=ids, dtype=h5py.string_dtype("utf-8"))
    keys = np.frombuffer(b"".join(source.keys), np.uint8).reshape(-1, KEY_BYTES)
    group.create_dataset("key", data=keys)
    group.create_dataset("input_length", data=source.input_length())


def _describe(group: h5py.Group, rate_hz: float | None, kind: str) -> None:
    group.attrs["kind"] = kind
    if rate_hz is not None:
        group.attrs["rate_hz"] = rate_hz


def _check_names(source: Outgoing) -> None:
    if any(output.name == UTTERANCES for output in source.outputs):
        raise UsageError(f"An output is named {UTTERANCES!r}, which HDF5 exports need themselves.")
    bad = next((name for name in source.ids if "\0" in name), None)
    if bad is not None:
        raise UsageError(f"The id {bad!r} holds a zero byte, which HDF5 cannot hold.")


def _check_ids(ids: list[str]) -> None:
    """Refuse ids that HDF5 would take for another: as paths they must be plain and distinct."""
    groups: set[str] = set()
    for name in ids:
        parts = name.split("/")
        if any(part in ("", ".", "..") for part in parts):
            raise UsageError(
                f"The id {name!r} is no name of a dataset in HDF5. Use the layout hdf5."
            )
        groups.update("/".join(parts[:n]) for n in range(1, len(parts)))
    both = next((name for name in ids if name in groups), None)
    if both is not None:
        raise UsageError(
            f"The id {both!r} is also the beginning of another id's path, and HDF5 cannot hold "
            "both. Use the layout hdf5."
        )


# -- reading ---------------------------------------------------------------------------------------


def read(path: Path) -> Incoming:
    """Find the utterances of a file in either layout.

    Files of others are read too: flat, if an ``offsets`` lies beside ``frames``; else every
    dataset is an utterance, named by its path, below a group per output if the root holds only
    groups.

    Raises
    ------
    UsageError
        No HDF5 file, or nothing in it that is features.
    """
    with _open(path) as file:
        provenance = parse_provenance(_text(file.attrs.get("mer")))
        ids, keys, lengths = _read_common(file)
        flat = {
            name: len(group["offsets"]) - 1
            for name, group in file.items()
            if isinstance(group, h5py.Group) and {"offsets", "frames"} <= set(group)
        }
        if flat:
            numbers = set(flat.values())
            if len(numbers) > 1 or (ids and numbers != {len(ids)}):
                raise UsageError(f"{path}: outputs and ids are not equally many: {flat}.")
            ids = ids or [str(n) for n in range(numbers.pop())]
            names = {raw: output_name(raw) for raw in flat}
            _check_offsets(file, flat, path)

            def reader(wanted: Wanted) -> Iterator[Utterance | Skipped]:
                return _read_flat(path, ids, names, wanted)
        else:
            tables = _tables(file)
            if not tables:
                raise UsageError(f"{path} holds no datasets of features.")
            known = dict.fromkeys(name for table in tables.values() for name in table)
            ids = [name for name in ids if name in known] + [n for n in known if n not in set(ids)]

            def reader(wanted: Wanted) -> Iterator[Utterance | Skipped]:
                return _read_tables(path, ids, tables, wanted)

    return Incoming(
        files={"": path},
        ids=ids,
        read=reader,
        outputs=own_outputs(provenance) if provenance else None,
        keys=keys if provenance else {},
        input_length=lengths,
        claims=provenance,
    )


def _open(path: Path) -> h5py.File:
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise UsageError(f"{path} cannot be read as HDF5: {error}.") from error


def _text(value: Any) -> str | None:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value if isinstance(value, str) else None


def _read_common(file: h5py.File) -> tuple[list[str], dict[str, bytes], dict[str, int]]:
    group = file.get(UTTERANCES)
    if not isinstance(group, h5py.Group) or "id" not in group:
        return [], {}, {}
    ids = [_text(name) or "" for name in group["id"][:]]
    keys: dict[str, bytes] = {}
    if "key" in group and group["key"].shape == (len(ids), KEY_BYTES):
        keys = {n: bytes(k) for n, k in zip(ids, group["key"][:].astype(np.uint8), strict=True)}
    lengths: dict[str, int] = {}
    if "input_length" in group and group["input_length"].shape == (len(ids),):
        lengths = dict(zip(ids, group["input_length"][:].astype(np.int64).tolist(), strict=True))
    return ids, keys, lengths


def _check_offsets(file: h5py.File, names: dict[str, int], path: Path) -> None:
    for name in names:
        offsets, frames = file[name]["offsets"][:], file[name]["frames"]
        if offsets[0] != 0 or offsets[-1] != len(frames) or (np.diff(offsets) < 0).any():
            raise UsageError(f"{path}: /{name}/offsets does not divide /{name}/frames.")


def _read_flat(
    path: Path, ids: list[str], names: dict[str, str], wanted: Wanted
) -> Iterator[Utterance | Skipped]:
    with _open(path) as file:
        offsets = {raw: file[raw]["offsets"][:] for raw in names}
        frames = {raw: file[raw]["frames"] for raw in names}
        for n, name in enumerate(ids):
            if not wanted(name):
                continue
            try:
                yield Utterance(
                    name,
                    {
                        names[raw]: frames[raw][offsets[raw][n] : offsets[raw][n + 1]]
                        for raw in names
                    },
                )
            except OSError as error:
                yield Skipped(name, f"cannot be read: {error}")


def _tables(file: h5py.File) -> dict[str, dict[str, str]]:
    """Return per output the path of every utterance's dataset."""
    groups = {n: g for n, g in file.items() if n != UTTERANCES and isinstance(g, h5py.Group)}
    single = any(isinstance(item, h5py.Dataset) for item in file.values())
    roots = {DEFAULT_OUTPUT: file} if single else {output_name(n): g for n, g in groups.items()}
    tables: dict[str, dict[str, str]] = {}
    for output, root in roots.items():
        found: dict[str, str] = {}

        def collect(name: str, item: Any, found: dict[str, str] = found) -> None:
            if isinstance(item, h5py.Dataset) and not name.startswith(f"{UTTERANCES}/"):
                found[name] = item.name

        root.visititems(collect)
        if found:
            tables[output] = found
    return tables


def _read_tables(
    path: Path, ids: list[str], tables: dict[str, dict[str, str]], wanted: Wanted
) -> Iterator[Utterance | Skipped]:
    with _open(path) as file:
        for name in ids:
            if not wanted(name):
                continue
            try:
                arrays = {o: file[table[name]][...] for o, table in tables.items() if name in table}
                yield Utterance(name, arrays)
            except (OSError, TypeError, ValueError) as error:
                yield Skipped(name, f"cannot be read: {error}")
