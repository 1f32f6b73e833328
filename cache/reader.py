"""Reading one part: the manifest is checked first, and binds every byte that is read after it.

U utterances of the part, F frames, D width. No Zarr library is involved: in the hot path it costs
10 to 25 times. Where the bytes lie is the business of ``PartFiles``: memory maps here, objects in
``remote.py``.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import google_crc32c
import numpy as np
import xxhash

from mer.cache import layout
from mer.cache.casting import copy_into, readable
from mer.cache.errors import DamagedStoreError, StoreError
from mer.cache.identity import KEY_BYTES
from mer.cache.layout import FileRecord
from mer.cache.spec import OutputSpec

# A file handle is stale where another client of a network file system has removed the file.
_NOT_THERE = {errno.ENOENT, errno.ENOTDIR, errno.ESTALE}


class PartGoneError(DamagedStoreError):
    """The whole part has disappeared: merged into another, or dropped, since it was listed."""


class ShardLayout:
    """Where the frames of one output lie in its only shard, and what they must sum to.

    Attributes
    ----------
    file : str
        Path of the shard below its part.
    num_frames, rows, dim : int
        F, frames of an inner chunk, D.
    dtype : dtype
        Stored type.
    num_chunks, data_bytes, chunk_bytes, file_bytes : int
        Inner chunks; bytes of one without and with its checksum; bytes of the whole shard.
    crcs : ndarray or None
        (num_chunks,) uint32 from the manifest; None in parts of the first release.
    xxh3 : str
        xxh3-128 of the whole file (hex); empty if F = 0.
    """

    def __init__(
        self, output: OutputSpec, fields: Mapping[str, Any], files: Mapping[str, FileRecord]
    ) -> None:
        dtype = str(fields["dtype"])
        self.file = f"{output.name}/{layout.FRAMES}/{layout.chunk_file(2)}"
        self.num_frames, self.rows = int(fields["frames"]), int(fields["chunk_frames"])
        if dtype not in layout.FLOAT_DTYPES + layout.CODE_DTYPES or self.rows < 1:
            raise ValueError(f"output {output.name!r} is described by {dict(fields)}")
        self.dim = output.dim
        self.dtype = layout.little(dtype)
        self.num_chunks = -(-self.num_frames // self.rows)
        self.data_bytes = self.rows * self.dim * self.dtype.itemsize
        self.chunk_bytes = self.data_bytes + layout.CRC_BYTES
        self.file_bytes = (
            self.num_chunks * (self.chunk_bytes + layout.INDEX_ENTRY_BYTES) + layout.CRC_BYTES
        )
        self.xxh3 = files[self.file].xxh3 if self.num_frames else ""
        if self.num_frames and files[self.file].bytes != self.file_bytes:
            raise ValueError(
                f"{self.file} should have {self.file_bytes} bytes, not {files[self.file].bytes}"
            )
        text = fields.get("crc32c")
        self.crcs = None if text is None else layout.crc_array(text)
        if self.crcs is not None and len(self.crcs) != self.num_chunks:
            raise ValueError(f"{len(self.crcs)} checksums for {self.num_chunks} chunks")

    def verify(self, block: np.ndarray, first: int, where: str) -> None:
        """Check inner chunks against what the manifest says of them and what they say themselves.

        Parameters
        ----------
        block : ndarray
            (n, chunk_bytes) uint8.
        first : int
            Number of the first of them.
        where : str
            Path or URL of the shard, for messages.

        Raises
        ------
        DamagedStoreError
            A chunk is not what was written.
        """
        for i, chunk in enumerate(block):
            stored = int.from_bytes(chunk[self.data_bytes :].tobytes(), "little")
            name = f"Chunk {first + i} of {where}"
            if google_crc32c.value(chunk[: self.data_bytes]) != stored:
                raise DamagedStoreError(f"{name} does not match its checksum.")
            if self.crcs is not None and self.crcs[first + i] != stored:
                raise DamagedStoreError(f"{name} is not the one its part's manifest lists.")

    def verify_index(self, index: np.ndarray, where: str) -> None:
        """Check the shard's index, which other libraries go by: (num_chunks · 16 + 4,) uint8."""
        where = f"The index of {where}"
        _verify(index, where)
        entries = np.frombuffer(index[: -layout.CRC_BYTES].tobytes(), "<u8").reshape(-1, 2)
        expected = np.arange(self.num_chunks, dtype=np.uint64) * np.uint64(self.chunk_bytes)
        if (entries[:, 0] != expected).any() or (entries[:, 1] != self.chunk_bytes).any():
            raise DamagedStoreError(f"{where} does not list equal chunks in order.")


class PartFiles(Protocol):
    """The files of one part, wherever they lie."""

    @property
    def where(self) -> str:
        """Path or URL of the part, for messages."""

    def manifest(self) -> bytes:
        """Return the part's ``zarr.json``.

        Raises
        ------
        PartGoneError
            There is no such part any more.
        DamagedStoreError
            The part is there, its manifest is not.
        """

    def check(self, files: Mapping[str, FileRecord]) -> None:
        """Raise ``DamagedStoreError`` unless every listed file is there in its size."""

    def small(self, file: str, num_bytes: int) -> np.ndarray:
        """Return a whole file, (num_bytes,) uint8; ``DamagedStoreError`` if it is not so long."""

    def large(self, file: str, num_bytes: int) -> np.ndarray:
        """Like ``small`` for a file worth mapping; nobody may write to the result."""

    def chunks(self, shard: ShardLayout, first: int, last: int) -> np.ndarray:
        """Return inner chunks ``first`` to ``last``, verified, (n, chunk_bytes) uint8."""


class PartReader:
    """One immutable part of a store. Its manifest is read when it is first needed.

    Parameters
    ----------
    part : str
        Its id.
    files : PartFiles
        Where it lies.
    outputs : tuple of OutputSpec
        What the store declares.
    fingerprint : str
        Of the store: a part that names another is refused.

    Notes
    -----
    Any method raises ``DamagedStoreError`` when bytes are not what was written: the manifest's own
    checksum, a file that is missing or of another size, a chunk, index or array whose checksum is
    not the manifest's.
    """

    def __init__(
        self, part: str, files: PartFiles, outputs: tuple[OutputSpec, ...], fingerprint: str
    ) -> None:
        self.id = part
        self.where = files.where
        self._at = files
        self._outputs = {output.name: output for output in outputs}
        self._fingerprint = fingerprint
        self._offsets: dict[str, np.ndarray] = {}
        self._verified: set[str] = set()
        self.from_snapshot = False

    def __getstate__(self) -> dict[str, Any]:
        """Return what another process may rely on: not what was verified in this one."""
        kept = ("id", "where", "_at", "_outputs", "_fingerprint")
        fresh = {"_offsets": {}, "_verified": set(), "from_snapshot": False}
        return {name: getattr(self, name) for name in kept} | fresh

    @property
    def at(self) -> PartFiles:
        """The files of the part."""
        return self._at

    def preset(self, num_utterances: int, num_bytes: int) -> None:
        """Take over what a snapshot of the store knows; the manifest is still read before data."""
        self.num_utterances, self.num_bytes = num_utterances, num_bytes
        self.from_snapshot = True

    def load(self) -> None:
        """Read and check the manifest, and that every file it lists is there in its size."""
        _ = self.manifest

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """The sealed attributes of the part."""
        where = f"{self.where}/{layout.METADATA}"
        data = self._at.manifest()
        manifest = layout.unseal(data, where)
        try:
            store, part = manifest.get("store", self._fingerprint), manifest.get("part", self.id)
            if store != self._fingerprint:
                raise DamagedStoreError(
                    f"{where} belongs to the store with the fingerprint {store}, not to this one."
                )
            if part != self.id:
                raise DamagedStoreError(f"{where} is the manifest of part {part}, not of this one.")
            files = {
                name: FileRecord(int(file["bytes"]), str(file["xxh3"]))
                for name, file in manifest["files"].items()
            }
            shards = {
                name: ShardLayout(output, manifest["outputs"][name], files)
                for name, output in self._outputs.items()
            }
            num_utterances = int(manifest["utterances"])
            if self.from_snapshot and num_utterances != self.num_utterances:
                raise DamagedStoreError(f"{where} changed since the store was first opened.")
            self.num_utterances = num_utterances
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DamagedStoreError(f"{where} lacks what a manifest holds: {error!r}.") from error
        self._at.check(files)
        self._files, self._shards = files, shards
        self.num_bytes = len(data) + sum(file.bytes for file in files.values())
        return manifest

    # Set by ``manifest``, which an opened snapshot of the store may already know.
    @cached_property
    def num_utterances(self) -> int:
        """U."""
        self.load()
        return self.num_utterances

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of all its files."""
        self.load()
        return self.num_bytes

    @property
    def files(self) -> Mapping[str, FileRecord]:
        """What the manifest lists, by name below the part."""
        self.load()
        return self._files

    def shard(self, output: str) -> ShardLayout:
        """Return the layout of an output's frames."""
        self.load()
        return self._shards[output]

    def num_frames(self, output: str) -> int:
        """Return F."""
        return self.shard(output).num_frames

    def dtype(self, output: str) -> np.dtype:
        """Return the type the frames are stored in; float32 where float16 would have overflowed."""
        return self.shard(output).dtype

    def keys(self) -> np.ndarray:
        """Return the keys in row order, (U, 16) uint8."""
        return self._read(layout.KEY, (self.num_utterances, KEY_BYTES), "uint8")

    def input_length(self) -> np.ndarray:
        """Return the real prepared steps per utterance, (U,) int64."""
        return self._read(layout.INPUT_LENGTH, (self.num_utterances,), "int64")

    def offsets(self, output: str) -> np.ndarray:
        """Return the (U + 1,) int64 frame bounds of the utterances."""
        offsets = self._offsets.get(output)
        if offsets is None:
            name = f"{output}/{layout.OFFSETS}"
            offsets = self._read(name, (self.num_utterances + 1,), "int64")
            last = self.num_frames(output)
            if offsets[0] != 0 or offsets[-1] != last or (np.diff(offsets) < 0).any():
                raise DamagedStoreError(f"{self.where}/{name} does not partition the frames.")
            self._offsets[output] = offsets
        return offsets

    def pooled(self, output: str) -> np.ndarray:
        """Return mean and standard deviation over each utterance's frames, (U, 2, D) float32."""
        shape = (self.num_utterances, 2, self.shard(output).dim)
        return self._read(f"{output}/{layout.POOLED}", shape, "float32", mapped=True)

    def _read(
        self, name: str, shape: tuple[int, ...], dtype: str, mapped: bool = False
    ) -> np.ndarray:
        """Return an array that lies in one chunk, as the manifest knows it."""
        file = f"{name}/{layout.chunk_file(len(shape))}"
        kind = layout.little(dtype)
        expected = math.prod(shape) * kind.itemsize + layout.CRC_BYTES
        record = self.files.get(file)
        if record is None or record.bytes != expected:
            raise DamagedStoreError(
                f"{self.where}/{file} should have {expected} bytes, its manifest says "
                f"{None if record is None else record.bytes}."
            )
        data = (self._at.large if mapped else self._at.small)(file, expected)
        if not mapped or file not in self._verified:
            if xxhash.xxh3_128_hexdigest(data.data) != record.xxh3:
                raise DamagedStoreError(f"{self.where}/{file} does not match its checksum.")
            self._verified.add(file)
        return data[: -layout.CRC_BYTES].view(kind).reshape(shape)

    def frames(self, output: str, start: int, stop: int) -> np.ndarray:
        """Return a copy of frames ``start`` to ``stop``, (stop - start, D) in the stored type."""
        shard = self.shard(output)
        out = np.empty((stop - start, shard.dim), shard.dtype)
        self.copy_frames(output, start, stop, out)
        return out

    def copy_frames(self, output: str, start: int, stop: int, out: np.ndarray) -> None:
        """Copy frames ``start`` to ``stop`` into ``out``, (stop - start, D), in its type."""
        if start == stop:
            return
        self.load()
        shard = self._shards[output]
        rows, dim, item = shard.rows, shard.dim, shard.dtype.itemsize
        first, last = start // rows, (stop - 1) // rows
        block = self._at.chunks(shard, first, last)
        # The checksum behind each chunk is skipped by the stride.
        shape, strides = (len(block), rows, dim), (shard.chunk_bytes, dim * item, item)
        chunks: np.ndarray = np.ndarray(shape, shard.dtype, block, 0, strides)
        head = start - first * rows
        if first == last:
            copy_into(out, chunks[0, head : head + stop - start])
            return
        done = rows - head
        copy_into(out[:done], chunks[0, head:])
        whole = last - first - 1
        if whole:
            middle = out[done : done + whole * rows].reshape(whole, rows, dim)
            copy_into(middle, chunks[1:-1])
            done += whole * rows
        copy_into(out[done:], chunks[-1, : stop - start - done])


class MappedFiles:
    """The files of a part in a folder, its shards memory-mapped.

    Nothing of ours ever shortens a file. Where something else does so while it is mapped, the
    system ends the process (SIGBUS): no program can read a map that has lost its file.

    Parameters
    ----------
    folder : Path
        ``<store>/parts/<id>``.
    """

    def __init__(self, folder: Path) -> None:
        self.where = str(folder)
        self._verified: dict[str, bytearray] = {}  # per shard one flag per inner chunk
        self._next: dict[str, int] = {}  # per shard the chunk after what was read first of it last

    def __getstate__(self) -> dict[str, Any]:
        """Return where the part is: what was verified holds for this process alone."""
        return {"where": self.where, "_verified": {}, "_next": {}}

    def manifest(self) -> bytes:
        """Return the part's ``zarr.json``."""
        path = f"{self.where}/{layout.METADATA}"
        try:
            with open(path, "rb", buffering=0) as file:
                return file.read()
        except OSError as error:
            raise self._error(path, error, "the part has no manifest") from error

    def check(self, files: Mapping[str, FileRecord]) -> None:
        """Compare the size of every listed file."""
        for name, record in files.items():
            path = f"{self.where}/{name}"
            try:
                size = os.stat(path).st_size
            except OSError as error:
                raise self._error(path, error) from error
            if size != record.bytes:
                raise _other_size(path, size, record.bytes)

    def small(self, file: str, num_bytes: int) -> np.ndarray:
        """Read a file at once, without keeping a map of it."""
        path = f"{self.where}/{file}"
        try:
            with open(path, "rb", buffering=0) as source:
                data = source.read()
        except OSError as error:
            raise self._error(path, error) from error
        if len(data) != num_bytes:
            raise _other_size(path, len(data), num_bytes)
        return np.frombuffer(data, np.uint8)

    def large(self, file: str, num_bytes: int) -> np.ndarray:
        """Return a view of the mapped file."""
        return self._map(f"{self.where}/{file}", num_bytes)

    def chunks(self, shard: ShardLayout, first: int, last: int) -> np.ndarray:
        """Return a view of the mapped shard; what is touched for the first time is verified."""
        path = f"{self.where}/{shard.file}"
        try:
            return self._chunks(shard, first, last, path)
        except PartGoneError:
            raise
        except DamagedStoreError:  # may have been mended since it was mapped
            forget_map(path)
            return self._chunks(shard, first, last, path)

    def _chunks(self, shard: ShardLayout, first: int, last: int, path: str) -> np.ndarray:
        data = self._map(path, shard.file_bytes)
        verified = self._verified.get(shard.file)
        if verified is None:
            verified = self._open(shard, data, path)
        block = data[first * shard.chunk_bytes : (last + 1) * shard.chunk_bytes]
        block = block.reshape(last + 1 - first, shard.chunk_bytes)
        unread = verified.find(0, first, last + 1)
        if unread >= 0:
            # Who reads on from where he was is served best by the system's own reading ahead.
            if unread != self._next.get(shard.file, 0):
                self.will_need(shard, unread, last)
            self._next[shard.file] = last + 1
            for chunk in range(unread, last + 1):
                if not verified[chunk]:
                    shard.verify(block[chunk - first : chunk - first + 1], chunk, path)
                    verified[chunk] = 1
        return block

    def will_need(self, shard: ShardLayout, first: int, last: int) -> None:
        """Have chunks that were not read yet brought from the disk in one go, not page by page."""
        verified = self._verified.get(shard.file)
        if verified is not None and verified.find(0, first, last + 1) < 0:
            return
        begin, end = first * shard.chunk_bytes, (last + 1) * shard.chunk_bytes
        _read_soon(f"{self.where}/{shard.file}", begin, end - begin)

    def _map(self, path: str, num_bytes: int) -> np.ndarray:
        try:
            return _pool.get(path, num_bytes)
        except OSError as error:
            raise self._error(path, error) from error

    def _open(self, shard: ShardLayout, data: np.ndarray, path: str) -> bytearray:
        """Check what holds for the shard as a whole."""
        begin = shard.num_chunks * shard.chunk_bytes
        # Else the system reads megabytes around the page that is missed.
        _read_soon(path, begin, shard.file_bytes - begin)
        shard.verify_index(data[begin:], path)
        # A manifest of the first release does not know its chunks, only the file as a whole. Chunks
        # that are sound in themselves may then be another part's, so all of them hold or none.
        if shard.crcs is None and xxhash.xxh3_128_hexdigest(data.data) != shard.xxh3:
            raise DamagedStoreError(
                f"{path} is not the file its part's manifest lists. `mer cache verify --repair` "
                "saves what it can."
            )
        verified = self._verified[shard.file] = bytearray(shard.num_chunks)
        return verified

    def _error(
        self, path: str, error: OSError, why: str = "its part's manifest lists it"
    ) -> StoreError:
        """Return what it means that a file cannot be read."""
        if error.errno not in _NOT_THERE:
            return StoreError(f"Cannot read {path}: {error.strerror or error}.")
        if not os.path.isdir(self.where):
            return PartGoneError(f"{self.where} is gone since the store was listed.")
        return DamagedStoreError(f"{path} is missing; {why}.")


def _read_soon(path: str, begin: int, length: int) -> None:
    """Ask the system to bring bytes of a file, without waiting for them."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # whoever reads will say what is wrong
        return
    try:
        os.posix_fadvise(descriptor, begin, length, os.POSIX_FADV_WILLNEED)
    except (AttributeError, OSError):  # not on this system
        pass
    finally:
        os.close(descriptor)


def _other_size(path: str, size: int, expected: int) -> DamagedStoreError:
    return DamagedStoreError(f"{path} has {size} bytes, its manifest says {expected}.")


def _verify(data: np.ndarray, where: str) -> None:
    """Check bytes that end with their own crc32c."""
    stored = int.from_bytes(data[-layout.CRC_BYTES :].tobytes(), "little")
    if google_crc32c.value(data[: -layout.CRC_BYTES]) != stored:
        raise DamagedStoreError(f"{where} does not match its checksum.")


class MapPool:
    """Memory maps by path, the least recently used closed when there are too many.

    A map costs a file descriptor for as long as it is open.

    Parameters
    ----------
    limit : int
        Maps that stay open. Arrays handed out keep their own map alive beyond that.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._maps: OrderedDict[str, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, path: str, num_bytes: int) -> np.ndarray:
        """Return the bytes of a file, (num_bytes,) uint8, not to be written to.

        Raises
        ------
        OSError
            The file is not there, or cannot be mapped.
        DamagedStoreError
            It has another size.
        """
        with self._lock:
            array = self._maps.get(path)
            if array is not None:
                self._maps.move_to_end(path)
                return array
        try:
            array = _map(path, num_bytes)
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
            with self._lock:  # every map holds a descriptor
                self._maps.clear()
            array = _map(path, num_bytes)
        with self._lock:
            self._maps[path] = array
            while len(self._maps) > self.limit:
                self._maps.popitem(last=False)
        return array

    def drop(self, path: str) -> None:
        """Forget the map of a file that another has taken the place of."""
        with self._lock:
            self._maps.pop(path, None)

    def __len__(self) -> int:
        return len(self._maps)

    def forget_lock(self) -> None:
        """Start with a fresh lock: after a fork the old one may be held by a thread left behind."""
        self._lock = threading.Lock()


def _map(path: str, num_bytes: int) -> np.ndarray:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        if size != num_bytes:  # a map beyond the end of a file would kill the process
            raise _other_size(path, size, num_bytes)
        mapped = mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)
        return readable(np.frombuffer(mapped, np.uint8))
    finally:
        os.close(descriptor)


def _map_limit() -> int:
    try:
        import resource
    except ImportError:
        return 256
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 256 if soft == resource.RLIM_INFINITY else max(16, min(256, soft // 4))


_pool = MapPool(_map_limit())
forget_map = _pool.drop
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.forget_lock)


def part_folders(parts: Path) -> Iterator[Path]:
    """Yield the folders of parts in their order, which is that of their names."""
    with os.scandir(parts) as entries:
        names = sorted(e.name for e in entries if is_part_name(e.name) and e.is_dir())
    return (parts / name for name in names)


def is_part_name(name: str) -> bool:
    """Whether an entry of ``parts/`` is a part; everything else is ignored."""
    return len(name) == 32 and set(name) <= set("0123456789abcdef")
