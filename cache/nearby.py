"""What is near of stores on servers, in memory and in the local copy, and fetching what is not.

k inner chunks make a *block*, the unit of the local copy: about 4 MiB, aligned in its shard.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from mer.cache import layout
from mer.cache.errors import DamagedStoreError
from mer.cache.layout import FileRecord
from mer.cache.localcopy import local_copy
from mer.cache.objects import Bucket, Span
from mer.cache.reader import ShardLayout

if TYPE_CHECKING:
    from mer.cache.remote import ObjectFiles

MEMORY_BYTES = 512 << 20  # of chunks and small files, per process
BLOCK_BYTES = 4 << 20
_WINDOW_BYTES = MEMORY_BYTES // 2  # fetched at once, so that it is read before it is dropped


@dataclass(frozen=True, slots=True)
class ShardKey:
    """A shard as a key of memory: no two stores, parts or versions of a part share one."""

    store: str  # URL
    part: str
    file: str
    manifest: str  # checksum


class Block:
    """k consecutive chunks of a shard, some or all of them there."""

    __slots__ = ("data", "present")

    def __init__(self, num_chunks: int, chunk_bytes: int) -> None:
        self.data = np.empty((num_chunks, chunk_bytes), np.uint8)
        self.present = bytearray(num_chunks)


class Memory:
    """Verified chunks and small files of all stores, the least recently used dropped first."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self._entries: OrderedDict[Any, tuple[Any, int]] = OrderedDict()
        self.pending: dict[Any, threading.Event] = {}
        self.lock = threading.RLock()

    def get(self, key: Any) -> Any | None:
        """Return a value, None if it is not here."""
        with self.lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            self._entries.move_to_end(key)
            return entry[0]

    def put(self, key: Any, value: Any, num_bytes: int) -> None:
        """Keep a value, or note how large it has become."""
        with self.lock:
            self.bytes += num_bytes - self._entries.pop(key, (None, 0))[1]
            self._entries[key] = value, num_bytes
            while self.bytes > self.limit and len(self._entries) > 1:
                _, (_, freed) = self._entries.popitem(last=False)
                self.bytes -= freed

    def drop(self, key: Any) -> None:
        """Forget one value."""
        with self.lock:
            self.bytes -= self._entries.pop(key, (None, 0))[1]

    def clear(self) -> None:
        """Forget everything."""
        with self.lock:
            self._entries.clear()
            self.bytes = 0

    def after_fork(self) -> None:
        """Drop what a thread that was left behind holds or was about to bring."""
        self.lock = threading.RLock()
        self.pending = {}
        self._entries = OrderedDict()  # may be half changed
        self.bytes = 0


memory = Memory(MEMORY_BYTES)
_local = threading.local()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=memory.after_fork)


@dataclass(slots=True)
class Need:
    """Chunks ``low`` to ``high`` of a block."""

    files: ObjectFiles
    shard: ShardLayout
    block: int
    low: int
    high: int

    @property
    def key(self) -> tuple[ShardKey, int]:
        """Key of the block in memory."""
        return self.files.key(self.shard), self.block

    @property
    def num_bytes(self) -> int:
        """Bytes of the chunks."""
        return (self.high - self.low) * self.shard.chunk_bytes


class Fetcher:
    """Brings chunks of one store near.

    Parameters
    ----------
    bucket : Bucket
        The store.

    Attributes
    ----------
    total : int or None
        Bytes of the store, if known.
    """

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self.total: int | None = None

    def bring(self, needs: Sequence[Need]) -> None:
        """Fetch what is not near.

        What memory cannot hold at once is fetched when reading, in the same order, comes to it.
        """
        needs = [self._whole_if_worth(need) for need in needs]
        self._fetch_window([need for need in needs if not is_near(need)])

    def go_on(self, files: ObjectFiles, shard: ShardLayout, block: int) -> bool:
        """Fetch the next of what ``prefetch`` left, if this block is in it."""
        rest: list[Need] | None = getattr(_local, "rest", None)
        if not rest:
            return False
        key = files.key(shard), block
        at = next((i for i, need in enumerate(rest) if need.key == key), None)
        if at is None:
            return False
        self._fetch_window([need for need in rest[at:] if not is_near(need)])
        return True

    def _fetch_window(self, needs: list[Need]) -> None:
        total = number = 0
        while number < len(needs) and (not number or total < _WINDOW_BYTES):
            total += needs[number].num_bytes
            number += 1
        _local.rest = needs[number:] or None
        if number:
            self.fetch(needs[:number], strict=False)

    def _whole_if_worth(self, need: Need) -> Need:
        """Take the whole block where the local copy will keep it."""
        copy = local_copy()
        if copy is None:
            return need
        count = block_bounds(need.shard, need.block)[1]
        fits = self.total is None or self.total <= copy.limit
        if fits or 2 * (need.high - need.low) >= count:
            need.low, need.high = 0, count
        return need

    def fetch(self, needs: Sequence[Need], *, strict: bool) -> dict[tuple[ShardKey, int], Block]:
        """Bring chunks into memory, and whole blocks into the local copy.

        What another thread is bringing is waited for.

        Parameters
        ----------
        needs : sequence of Need
            Of distinct blocks.
        strict : bool
            Whether damage is an error here. Else it is left to whoever reads the chunk.

        Returns
        -------
        dict
            The blocks, by ``Need.key``.
        """
        needs = [self._whole_if_worth(need) for need in needs if _has_sums(need, strict)]
        blocks: dict[tuple[ShardKey, int], Block] = {}
        mine: list[tuple[Need, int, int]] = []  # runs of chunks
        done = threading.Event()
        claimed: list[Any] = []
        others: set[threading.Event] = set()
        with memory.lock:
            for need in needs:
                key = need.key
                count = block_bounds(need.shard, need.block)[1]
                block = memory.get(key)
                if block is None:
                    block = Block(count, need.shard.chunk_bytes)
                    memory.put(key, block, 0)
                blocks[key] = block
                run: int | None = None
                for chunk in range(need.low, need.high + 1):
                    free = chunk < need.high and not block.present[chunk]
                    if free and (event := memory.pending.get((key, chunk))) is not None:
                        others.add(event)
                        free = False
                    if free:
                        memory.pending[key, chunk] = done
                        claimed.append((key, chunk))
                        run = chunk if run is None else run
                    elif run is not None:
                        mine.append((need, run, chunk))
                        run = None
        try:
            self._bring(mine, blocks, strict)
        except BaseException:
            # Requests may still be under way and write into these blocks, unverified.
            for key, _ in claimed:
                memory.drop(key)
            raise
        finally:
            with memory.lock:
                for entry in claimed:
                    memory.pending.pop(entry, None)
            done.set()
        for event in others:
            event.wait()
        if others and strict:  # the other thread may have failed
            missing = [n for n in needs if not all(blocks[n.key].present[n.low : n.high])]
            if missing:
                blocks |= self.fetch(missing, strict=True)
        return blocks

    def _bring(
        self,
        runs: list[tuple[Need, int, int]],
        blocks: Mapping[tuple[ShardKey, int], Block],
        strict: bool,
    ) -> None:
        for last in (False, True):  # a flip on the way is not on the server
            spans, targets = [], []
            for need, low, high in runs:
                begin = block_bounds(need.shard, need.block)[0]
                size = need.shard.chunk_bytes
                name = need.files.name(need.shard.file)
                spans.append(Span(name, (begin + low) * size, (begin + high) * size))
                targets.append(blocks[need.key].data[low:high].reshape(-1))
            broken = self._bucket.get_spans(spans, targets)
            failed = []
            for need, low, high in runs:
                shard, block = need.shard, blocks[need.key]
                name = need.files.name(shard.file)
                if name in broken:
                    if strict:
                        raise need.files.error(shard, broken[name])
                    continue
                begin = block_bounds(shard, need.block)[0]
                try:
                    where = f"{self._bucket.url}/{name}"
                    shard.verify(block.data[low:high], begin + low, where)
                except DamagedStoreError:
                    if last and strict:
                        raise
                    failed.append((need, low, high))
                    continue
                block.present[low:high] = b"\1" * (high - low)
                self._keep(need, block)
            if not failed:
                return
            runs = failed

    def _keep(self, need: Need, block: Block) -> None:
        key, size = need.key, need.shard.chunk_bytes
        memory.put(key, block, sum(block.present) * size)
        copy = local_copy()
        if copy is not None and all(block.present):
            name = block_name(key[0], need.shard, need.block)
            if not copy.has(name, block.data.nbytes):
                copy.put(name, block.data.reshape(-1))


def is_near(need: Need) -> bool:
    """Whether chunks are in memory or, unverified yet, in the local copy."""
    found: Block | None = memory.get(need.key)
    if found is not None and all(found.present[need.low : need.high]):
        return True
    copy = local_copy()
    if copy is None:
        return False
    key, block = need.key
    num_bytes = block_bounds(need.shard, block)[1] * need.shard.chunk_bytes
    return copy.has(block_name(key, need.shard, block), num_bytes)


def _has_sums(need: Need, strict: bool) -> bool:
    """Make sure that the checksums of a shard's chunks are known."""
    try:
        _complete_sums(need)
    except DamagedStoreError:
        if strict:
            raise
        return False
    return True


def _complete_sums(need: Need) -> None:
    """Take the checksums of chunks from the shard itself where the manifest has none.

    A manifest of the first release knows only the whole file, which is then read once. Chunks that
    match their own checksums may be those of another part, so all of them hold or none.
    """
    shard = need.shard
    if shard.crcs is not None:
        return
    bucket, name = need.files.place.bucket, need.files.name(shard.file)
    data = np.empty(shard.file_bytes, np.uint8)
    for error in bucket.get_spans([Span(name, 0, shard.file_bytes)], [data]).values():
        raise need.files.error(shard, error)
    if xxhash.xxh3_128_hexdigest(data.data) != shard.xxh3:
        raise DamagedStoreError(
            f"{need.files.where}/{shard.file} is not the file its part's manifest lists. "
            "`mer cache verify --repair` saves what it can."
        )
    chunks = data[: shard.num_chunks * shard.chunk_bytes]
    shard.crcs = chunk_sums(chunks.reshape(-1, shard.chunk_bytes))


def chunk_sums(chunks: np.ndarray) -> np.ndarray:
    """Return the checksums that (n, chunk_bytes) uint8 end with, (n,) uint32."""
    ends = np.ascontiguousarray(chunks[:, -layout.CRC_BYTES :])
    return ends.view("<u4")[:, 0].astype(np.uint32)


def block_chunks(shard: ShardLayout) -> int:
    """Return k."""
    return max(1, BLOCK_BYTES // shard.chunk_bytes)


def block_bounds(shard: ShardLayout, block: int) -> tuple[int, int]:
    """Return the first chunk of a block and how many it has."""
    size = block_chunks(shard)
    return block * size, min(size, shard.num_chunks - block * size)


def block_name(key: ShardKey, shard: ShardLayout, block: int) -> str:
    """Return the name of a block in the local copy."""
    size = block_chunks(shard)
    return copy_name("block", key.store, key.part, key.file, key.manifest, size, block)


def small_name(record: FileRecord) -> str:
    """Return the name of a small file in the local copy: that of its content."""
    return copy_name("file", record.xxh3, record.bytes)


def copy_name(*parts: object) -> str:
    """Return a name in the local copy that says all of ``parts``."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=16).hexdigest()
    return f"{digest[:2]}/{digest[2:]}"
