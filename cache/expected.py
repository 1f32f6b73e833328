"""What every file of a part must be like, as it follows from the part's manifest.

U utterances of a part, F frames, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import google_crc32c
import numpy as np

from mer.cache import layout
from mer.cache.identity import KEY_BYTES
from mer.cache.layout import FileRecord
from mer.cache.reader import ShardLayout
from mer.cache.spec import Kind, OutputSpec

KEY_FILE = f"{layout.KEY}/{layout.chunk_file(2)}"
INPUT_LENGTH_FILE = f"{layout.INPUT_LENGTH}/{layout.chunk_file(1)}"
POOLED_FILE = f"/{layout.POOLED}/{layout.chunk_file(3)}"


def offsets_file(output: str) -> str:
    """Return the file of an output's row bounds."""
    return f"{output}/{layout.OFFSETS}/{layout.chunk_file(1)}"


def pooled_file(output: str) -> str:
    """Return the file of an output's pooled statistics."""
    return f"{output}{POOLED_FILE}"


def array_files(
    count: int, outputs: tuple[OutputSpec, ...]
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return shape and type of the arrays of U utterances that lie in one chunk, by file."""
    files: dict[str, tuple[tuple[int, ...], str]] = {
        KEY_FILE: ((count, KEY_BYTES), "uint8"),
        INPUT_LENGTH_FILE: ((count,), "int64"),
    }
    for output in outputs:
        files[offsets_file(output.name)] = ((count + 1,), "int64")
        if output.kind == "frames":
            files[pooled_file(output.name)] = ((count, 2, output.dim), "float32")
    return files


def told_outputs(
    fields: Mapping[str, Any], records: Mapping[str, FileRecord], count: int
) -> tuple[OutputSpec, ...]:
    """Return outputs as far as a manifest alone tells them."""
    outputs = []
    for name, its in fields.items():
        frames, rows, dtype = int(its["frames"]), int(its["chunk_frames"]), str(its["dtype"])
        pooled = records.get(pooled_file(name))
        kind: Kind = "pooled" if dtype in layout.FLOAT_DTYPES else "codes"
        dim = 1
        if pooled is not None:
            kind = "frames"
            dim = (pooled.bytes - layout.CRC_BYTES) // (count * 2 * 4)
        elif frames:
            shard = records[f"{name}/{layout.FRAMES}/{layout.chunk_file(2)}"].bytes
            chunk = (shard - layout.CRC_BYTES) // -(-frames // rows) - layout.INDEX_ENTRY_BYTES
            dim = (chunk - layout.CRC_BYTES) // (rows * np.dtype(dtype).itemsize)
        outputs.append(OutputSpec(name=name, dim=dim, rate_hz=None, dtype=dtype, kind=kind))
    return tuple(outputs)


def documents(
    count: int, outputs: tuple[OutputSpec, ...], shards: Mapping[str, ShardLayout]
) -> dict[str, dict[str, Any]]:
    """Return the Zarr metadata that follows from a manifest, by file."""
    arrays = {
        layout.KEY: layout.array_document((count, KEY_BYTES), "uint8"),
        layout.INPUT_LENGTH: layout.array_document((count,), "int64"),
    }
    for output in outputs:
        name, shard = output.name, shards[output.name]
        frames = shard.num_frames, output.dim, shard.dtype.name, shard.rows
        arrays[name] = layout.group_document()
        arrays[f"{name}/{layout.FRAMES}"] = layout.frames_document(*frames)
        arrays[f"{name}/{layout.OFFSETS}"] = layout.array_document((count + 1,), "int64")
        if output.kind == "frames":
            shape = (count, 2, output.dim)
            arrays[f"{name}/{layout.POOLED}"] = layout.array_document(shape, "float32")
    return {f"{name}/{layout.METADATA}": document for name, document in arrays.items()}


def shard_index(shard: ShardLayout) -> bytes:
    """Return the index of a shard, which follows from its layout."""
    entries = np.empty((shard.num_chunks, 2), "<u8")
    entries[:, 0] = np.arange(shard.num_chunks, dtype=np.uint64) * np.uint64(shard.chunk_bytes)
    entries[:, 1] = shard.chunk_bytes
    return entries.tobytes() + int(google_crc32c.value(entries.tobytes())).to_bytes(
        layout.CRC_BYTES, "little"
    )
