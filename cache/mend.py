"""Putting files right whose content follows from what is left, and their checksums.

Nothing here decides: what it returns is right only if it has the xxh3-128 that the manifest says.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, cast

import google_crc32c
import numpy as np
import xxhash

from mer.cache import layout
from mer.cache.expected import shard_index
from mer.cache.layout import FileRecord
from mer.cache.raw import BLOCK_BYTES, Raw
from mer.cache.reader import ShardLayout
from mer.cache.staging import Buffer


def xxh3(data: np.ndarray | bytes) -> str:
    """Return the xxh3-128 (hex) of contiguous data."""
    return xxhash.xxh3_128_hexdigest(memoryview(cast(Any, data)))


def crc32c(data: np.ndarray) -> int:
    """Return the crc32c of bytes."""
    return int(google_crc32c.value(data.tobytes() if data.flags.writeable else data))


def crc32c_bytes(data: np.ndarray | bytes) -> bytes:
    """Return the crc32c as it follows its data in a file."""
    return int(google_crc32c.value(data)).to_bytes(layout.CRC_BYTES, "little")


def trailer(data: np.ndarray) -> int:
    """Return the crc32c that bytes end with."""
    return int.from_bytes(data[-layout.CRC_BYTES :].tobytes(), "little")


def shard_blocks(raw: Raw, path: str, shard: ShardLayout) -> Iterator[Buffer]:
    """Yield a shard with everything made anew that follows from its frames."""
    size, count = shard.chunk_bytes, shard.num_chunks
    chunk = 0
    for block in raw.blocks(path, count * size, max(1, BLOCK_BYTES // size) * size):
        for start in range(0, len(block), size):
            data = block[start : start + shard.data_bytes]
            expected = None if shard.crcs is None else int(shard.crcs[chunk])
            if chunk == count - 1 and crc32c(data) != expected:
                data = _padded(data, shard)
            yield data
            yield crc32c_bytes(data)
            chunk += 1
    yield shard_index(shard)


def _padded(data: np.ndarray, shard: ShardLayout) -> np.ndarray:
    """Return the last chunk of a shard with the fill value behind its last frame."""
    real = shard.num_frames - (shard.num_chunks - 1) * shard.rows
    row = shard.dim * shard.dtype.itemsize
    out = np.full((shard.rows, shard.dim), np.nan if shard.dtype.kind == "f" else 0, shard.dtype)
    whole = out.view(np.uint8).reshape(-1)
    have = data[: real * row]
    whole[: len(have)] = have
    whole.flags.writeable = False
    return whole


def with_trailer(data: np.ndarray, num_bytes: int) -> bytes | None:
    """Return an array with its checksum made anew, what is behind it cut off."""
    if len(data) < num_bytes - layout.CRC_BYTES:
        return None
    body = data[: num_bytes - layout.CRC_BYTES].tobytes()
    return body + crc32c_bytes(body)


def with_right_byte(data: np.ndarray, record: FileRecord) -> bytes | None:
    """Return an array with the one byte put right that explains its checksum, if there is one."""
    if len(data) != record.bytes:
        return None
    body = data[: -layout.CRC_BYTES]
    for at, change in single_byte_errors(crc32c(body) ^ trailer(data), len(body)):
        mended = data.copy()
        mended[at] ^= change
        content = mended.tobytes()
        if xxh3(content) == record.xxh3:
            return content
    return None


def single_byte_errors(syndrome: int, length: int) -> Iterator[tuple[int, int]]:
    """Yield every (position, change) of one byte that turns a crc32c by ``syndrome``.

    A change of one byte enters the register as an entry of the table and is then shifted by every
    byte behind it. So the register is run backwards from the end until it is such an entry.
    """
    table, backwards = _crc_tables()
    changes = {entry: byte for byte, entry in enumerate(table) if byte}
    register = syndrome
    for at in range(length - 1, -1, -1):
        change = changes.get(register)
        if change is not None:
            yield at, change
        byte = backwards[register >> 24]
        register = (((register ^ table[byte]) << 8) & 0xFFFF_FFFF) | byte


@cache
def _crc_tables() -> tuple[list[int], list[int]]:
    """Return the byte-wise table of crc32c, and which entry has a given highest byte."""
    table = []
    for byte in range(256):
        register = byte
        for _ in range(8):
            register = (register >> 1) ^ (0x82F6_3B78 if register & 1 else 0)
        table.append(register)
    backwards = [0] * 256
    for byte, entry in enumerate(table):
        backwards[entry >> 24] = byte
    return table, backwards
