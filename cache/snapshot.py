"""A disposable snapshot of what opening a store finds out: which parts, which keys, which spans.

Reading 800 manifests and as many arrays of keys takes longer than a user waits gladly; one file
does not. It is never needed and never trusted beyond its checksums: a part whose manifest changed
by size, time or inode is read anew, and whatever does not hold makes the whole snapshot void.

P parts, N rows (utterances, those stored twice counted twice).
"""

from __future__ import annotations

import json
import logging
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import xxhash

from mer.cache.identity import KEY_BYTES
from mer.cache.index import KeyIndex

logger = logging.getLogger(__name__)

VERSION = 1
_MAGIC = b"mer.index"
_HEAD = struct.Struct("<9sxHQ16s")  # magic, version, bytes of the header, its xxh3-128
_ALIGN = 64

Spans = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """What a snapshot holds.

    Parameters
    ----------
    parts : list of str
        P ids in order.
    signatures : ndarray
        (P, 3) int64, of the manifests.
    utterances, num_bytes : ndarray
        (P,) int64 per part.
    keys : ndarray
        (N, 16) uint8.
    input_length : ndarray
        (N,) int64.
    index : KeyIndex
        Over the keys.
    spans : mapping of str to (ndarray, ndarray)
        Per output the first frame in the part and the number of frames, (N,) int64 each; outputs
        with equal spans share the arrays.
    """

    parts: Sequence[str]
    signatures: np.ndarray
    utterances: np.ndarray
    num_bytes: np.ndarray
    keys: np.ndarray
    input_length: np.ndarray
    index: KeyIndex
    spans: Mapping[str, Spans]


def write(path: Path, fingerprint: str, columns: Columns) -> None:
    """Replace the snapshot at ``path``; where that is not possible, nothing happens."""
    tables: list[Spans] = []
    table_of: dict[str, int] = {}
    for output, spans in columns.spans.items():
        same = [i for i, table in enumerate(tables) if table[0] is spans[0]]
        table_of[output] = same[0] if same else len(tables)
        if not same:
            tables.append(spans)
    high, low, rows = columns.index.sorted_arrays
    ids = np.frombuffer(bytes.fromhex("".join(columns.parts)), np.uint8).reshape(-1, 16)
    arrays = {
        "part": ids,
        "signature": columns.signatures,
        "utterances": columns.utterances,
        "bytes": columns.num_bytes,
        "key": columns.keys,
        "input_length": columns.input_length,
        "high": high,
        "low": low,
        "row": rows,
    }
    for number, (starts, lengths) in enumerate(tables):
        arrays |= {f"start_{number}": starts, f"length_{number}": lengths}
    described: dict[str, Any] = {}
    at = 0
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    for name, array in contiguous.items():
        digest = xxhash.xxh3_128_hexdigest(array.data)
        described[name] = [array.dtype.str, list(array.shape), at, digest]
        at += -(-array.nbytes // _ALIGN) * _ALIGN
    header = {"fingerprint": fingerprint, "arrays": described, "spans": table_of, "bytes": at}
    text = json.dumps(header).encode("ascii")
    text += b" " * (-(_HEAD.size + len(text)) % _ALIGN)
    temporary = path.with_name(f"{path.name}.{uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            file.write(_HEAD.pack(_MAGIC, VERSION, len(text), xxhash.xxh3_128_digest(text)))
            file.write(text)
            for array in contiguous.values():
                file.write(array.data)
                file.write(bytes(-array.nbytes % _ALIGN))
        temporary.replace(path)
    except OSError as error:
        logger.info("No snapshot of the index was kept at %s: %s.", path, error)
        try:
            temporary.unlink(missing_ok=True)
        except OSError:
            logger.info("%s is left behind.", temporary)


class Snapshot:
    """What was written, each array checked when it is first used.

    Attributes
    ----------
    parts : list of str
        P ids in order.
    """

    def __init__(self, data: np.ndarray, header: Mapping[str, Any]) -> None:
        self._data, self._header = data, header
        self.parts: list[str] = [row.tobytes().hex() for row in self.array("part")]
        self.signatures = self.array("signature")
        self.utterances = self.array("utterances")
        self.num_bytes = self.array("bytes")
        self.first_row = np.concatenate([[0], np.cumsum(self.utterances, dtype=np.int64)])
        self.number = {part: i for i, part in enumerate(self.parts)}
        sizes = {len(self.parts), len(self.signatures), len(self.utterances), len(self.num_bytes)}
        if len(sizes) != 1 or len(self.keys) != self.first_row[-1]:
            raise ValueError("arrays of different length")

    def array(self, name: str) -> np.ndarray:
        """Return an array; ``ValueError`` if it is not what was written."""
        dtype, shape, at, digest = self._header["arrays"][name]
        kind = np.dtype(dtype)
        data = self._data[at : at + int(np.prod(shape)) * kind.itemsize]
        if xxhash.xxh3_128_hexdigest(data.data) != digest:
            raise ValueError(f"array {name!r} does not match its checksum")
        return data.view(kind).reshape(shape)

    @cached_property
    def keys(self) -> np.ndarray:
        """(N, 16) uint8."""
        return self.array("key").reshape(-1, KEY_BYTES)

    @cached_property
    def input_length(self) -> np.ndarray:
        """(N,) int64."""
        return self.array("input_length")

    @cached_property
    def index(self) -> KeyIndex:
        """The index over the keys."""
        return KeyIndex.from_sorted(
            self.array("high"), self.array("low"), self.array("row"), self.keys
        )

    @cached_property
    def _tables(self) -> dict[int, Spans]:
        return {}

    def spans(self, output: str) -> Spans:
        """Return starts and lengths of an output, (N,) int64 each."""
        number = self._header["spans"][output]
        if number not in self._tables:
            self._tables[number] = self.array(f"start_{number}"), self.array(f"length_{number}")
        return self._tables[number]


def read(path: Path, fingerprint: str, outputs: Sequence[str]) -> Snapshot | None:
    """Return the snapshot at ``path``, or None where there is none that holds."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            magic, version, length, digest = _HEAD.unpack(file.read(_HEAD.size))
            text = file.read(min(length, size))
            if magic != _MAGIC or version != VERSION or xxhash.xxh3_128_digest(text) != digest:
                raise ValueError("its header does not hold")
            header = json.loads(text)
            begin = _HEAD.size + length
            if header["fingerprint"] != fingerprint or size != begin + header["bytes"]:
                raise ValueError("it belongs to another store or was cut off")
            if header["spans"].keys() != set(outputs):
                raise ValueError("its outputs are others")
            data = np.frombuffer(file.read(), np.uint8)
        return Snapshot(data, header)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        logger.info("The index snapshot %s is not used: %s.", path, error)
        return None
