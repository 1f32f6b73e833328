"""The documents of the on-disk format: Zarr metadata, sealed attributes, names (``FORMAT.md``)."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import xxhash

from mer.cache.errors import DamagedStoreError, StoreFormatError
from mer.cache.spec import OutputSpec

FORMAT_VERSION = 1
CHUNK_FRAMES = 128
CRC_BYTES = 4
INDEX_ENTRY_BYTES = 16  # offset and length of one inner chunk, uint64 each

METADATA = "zarr.json"
PARTS = "parts"
KEY = "key"
INPUT_LENGTH = "input_length"
FRAMES = "frames"
OFFSETS = "offsets"
POOLED = "pooled"

FLOAT_DTYPES = ("float16", "float32")
CODE_DTYPES = ("uint8", "uint16", "uint32")

INDEX_SUFFIX = ".index"  # beside the store: disposable snapshot of manifests and keys
QUARANTINE_SUFFIX = ".quarantine"  # beside the store: damaged parts that were taken out

_PART_DOMAIN = b"mer.part.1\0"
_CONTENT_PART_DOMAIN = b"mer.part.2\0"
_BYTES_CODEC = {"name": "bytes", "configuration": {"endian": "little"}}
_BYTE_CODEC = {"name": "bytes"}  # one-byte types have no order
_CRC_CODEC = {"name": "crc32c"}


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What a manifest says of one file: its size in bytes and the xxh3-128 of its content (hex)."""

    bytes: int
    xxh3: str


def little(dtype: str) -> np.dtype[Any]:
    """Return the numpy type with the byte order of the files."""
    return np.dtype(dtype).newbyteorder("<")


def chunk_file(ndim: int) -> str:
    """Return the path, below an array, of its only chunk: ``c/0/0`` for two dimensions."""
    return "/".join(["c", *["0"] * ndim])


def part_id(keys: Iterable[bytes]) -> str:
    """Return the name of a part: a hash of its sorted keys, the same for a retried task."""
    return hashlib.blake2b(_PART_DOMAIN + b"".join(sorted(keys)), digest_size=16).hexdigest()


def content_part_id(files: Mapping[str, FileRecord]) -> str:
    """Return the name of a part that depends on its bytes: a hash of its files' checksums.

    For object stores, where the objects of a part appear one by one, so that two writers of the
    same keys never mix their objects under one name; and for parts that replace others.

    Parameters
    ----------
    files : mapping of str to FileRecord
        By name below the part, the manifest left out.
    """
    digest = hashlib.blake2b(_CONTENT_PART_DOMAIN, digest_size=16)
    for name in sorted(files):
        digest.update(name.encode("utf-8") + b"\0" + files[name].xxh3.encode("ascii"))
    return digest.hexdigest()


def crc_text(crcs: Sequence[int]) -> str:
    """Return checksums of chunks as a manifest holds them, eight hex digits each."""
    return "".join(f"{crc:08x}" for crc in crcs)


def crc_array(text: str) -> np.ndarray:
    """Return what ``crc_text`` was given, (chunks,) uint32.

    Raises
    ------
    ValueError
        Not whole checksums in hex.
    """
    data = bytes.fromhex(text)
    return np.frombuffer(data, ">u4").astype(np.uint32)


def chunk_rows(num_frames: int) -> int:
    """Return the rows of an inner chunk of an array of ``num_frames`` rows."""
    return max(1, min(CHUNK_FRAMES, num_frames))


def array_document(shape: tuple[int, ...], dtype: str) -> dict[str, Any]:
    """Return the ``zarr.json`` of an array that lies in one chunk followed by its crc32c."""
    return _array(shape, dtype, [max(1, n) for n in shape], [*_serialise(dtype), _CRC_CODEC])


def frames_document(num_frames: int, dim: int, dtype: str, rows: int) -> dict[str, Any]:
    """Return the ``zarr.json`` of a (F, D) array that lies in one shard of ``rows``-row chunks."""
    sharding = {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": [rows, dim],
            "codecs": [*_serialise(dtype), _CRC_CODEC],
            "index_codecs": [_BYTES_CODEC, _CRC_CODEC],
            "index_location": "end",
        },
    }
    shard_rows = max(1, math.ceil(num_frames / rows)) * rows
    return _array((num_frames, dim), dtype, [shard_rows, dim], [sharding])


def _serialise(dtype: str) -> list[dict[str, Any]]:
    return [_BYTE_CODEC if np.dtype(dtype).itemsize == 1 else _BYTES_CODEC]


def _array(
    shape: tuple[int, ...], dtype: str, chunk: list[int], codecs: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        # A chunk that went missing must not read as plausible numbers.
        "fill_value": "NaN" if dtype in FLOAT_DTYPES else 0,
        "codecs": codecs,
        "attributes": {},
    }


def group_document(mer: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the ``zarr.json`` of a group; ``mer`` becomes its sealed attributes."""
    attributes = {} if mer is None else {"mer": {**mer, "checksum": checksum(mer)}}
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


def to_bytes(document: Mapping[str, Any]) -> bytes:
    """Return a metadata document as it is stored."""
    text = json.dumps(document, indent=1, ensure_ascii=True, allow_nan=False)
    return text.encode("ascii") + b"\n"


def checksum(mer: Mapping[str, Any]) -> str:
    """Return the xxh3-128 (hex) of attributes as canonical JSON, ``checksum`` left out."""
    rest = {key: value for key, value in mer.items() if key != "checksum"}
    text = json.dumps(
        rest, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )
    return xxhash.xxh3_128_hexdigest(text.encode("ascii"))


def unseal(data: bytes, where: str) -> dict[str, Any]:
    """Return the ``mer`` attributes of a group's ``zarr.json``, proven unchanged.

    Parameters
    ----------
    data : bytes
        The file.
    where : str
        Store, part and file, for messages.

    Raises
    ------
    StoreFormatError
        Another kind of Zarr group, or a format newer than this release.
    DamagedStoreError
        Not what was written.
    """
    try:
        document = json.loads(data)
    except ValueError as error:
        raise DamagedStoreError(f"{where} is not JSON any more ({error}).") from error
    attributes = document.get("attributes") if isinstance(document, dict) else None
    mer = attributes.get("mer") if isinstance(attributes, dict) else None
    if not isinstance(mer, dict):
        raise StoreFormatError(f"{where} has no 'mer' attributes: not a store of mer.")
    version = mer.get("format")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise StoreFormatError(
            f"{where} has format {version}, this release reads up to {FORMAT_VERSION}. Update mer."
        )
    expected = {"zarr_format": 3, "node_type": "group", "attributes": {"mer": mer}}
    try:
        sound = document == expected and mer.get("checksum") == checksum(mer)
    except ValueError:  # NaN or an infinity, which we never write
        sound = False
    if not sound or version != FORMAT_VERSION:
        raise DamagedStoreError(f"{where} does not match its own checksum.")
    return mer


def output_to_json(output: OutputSpec) -> dict[str, Any]:
    """Return an output as JSON types, absent fields left out."""
    fields = {key: value for key, value in asdict(output).items() if value is not None}
    if output.columns is not None:
        fields["columns"] = list(output.columns)
    fields["rate_hz"] = output.rate_hz
    return fields


def output_from_json(fields: Mapping[str, Any]) -> OutputSpec:
    """Return what ``output_to_json`` was given; what a later release added is ignored."""
    known = {name: fields[name] for name in OutputSpec.__dataclass_fields__ if name in fields}
    columns = fields.get("columns")
    return OutputSpec(**{**known, "columns": None if columns is None else tuple(columns)})
