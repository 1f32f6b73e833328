"""Reading one part through memory maps: shard index parsed, every checksum verified here.

U utterances of the part, F frames, D width. No Zarr library is involved: in the hot path it costs
10 to 25 times.
"""

from __future__ import annotations

import math
import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from mer.cache import layout
from mer.cache.errors import DamagedStoreError
from mer.cache.identity import KEY_BYTES
from mer.cache.spec import OutputSpec


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
        """Return the bytes of a file, (num_bytes,) uint8, read-only.

        Raises
        ------
        DamagedStoreError
            The file is not there or has another size.
        """
        with self._lock:
            array = self._maps.get(path)
            if array is not None:
                self._maps.move_to_end(path)
                return array
        array = _map(path, num_bytes)
        with self._lock:
            self._maps[path] = array
            while len(self._maps) > self.limit:
                self._maps.popitem(last=False)
        return array

    def __len__(self) -> int:
        return len(self._maps)

    def forget_lock(self) -> None:
        """Start with a fresh lock: after a fork the old one may be held by a thread left behind."""
        self._lock = threading.Lock()


def _map(path: str, num_bytes: int) -> np.ndarray:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError as error:
        raise DamagedStoreError(f"{path} is missing; its part's manifest lists it.") from error
    try:
        size = os.fstat(descriptor).st_size
        if size != num_bytes:  # a map beyond the end of a file would kill the process
            raise DamagedStoreError(f"{path} has {size} bytes, its manifest says {num_bytes}.")
        return np.frombuffer(mmap.mmap(descriptor, size, access=mmap.ACCESS_READ), np.uint8)
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
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.forget_lock)


class _Frames:
    """Where the frames of one output lie."""

    __slots__ = (
        "chunk_bytes",
        "data_bytes",
        "dim",
        "dtype",
        "file_bytes",
        "index_verified",
        "num_chunks",
        "num_frames",
        "offsets",
        "path",
        "rows",
        "verified",
    )

    def __init__(self, path: str, fields: Mapping[str, Any], output: OutputSpec) -> None:
        name = str(fields["dtype"])
        self.path = path
        self.num_frames, self.rows = int(fields["frames"]), int(fields["chunk_frames"])
        if name not in layout.FLOAT_DTYPES + layout.CODE_DTYPES or self.rows < 1:
            raise ValueError(f"output {output.name!r} is described by {dict(fields)}")
        self.dim = output.dim
        self.dtype = layout.little(name)
        self.num_chunks = -(-self.num_frames // self.rows)
        self.data_bytes = self.rows * self.dim * self.dtype.itemsize
        self.chunk_bytes = self.data_bytes + layout.CRC_BYTES
        self.file_bytes = (
            self.num_chunks * (self.chunk_bytes + layout.INDEX_ENTRY_BYTES) + layout.CRC_BYTES
        )
        self.verified = bytearray(self.num_chunks)  # one flag per inner chunk
        self.index_verified = False
        self.offsets: np.ndarray | None = None


class PartReader:
    """One immutable part of a store.

    Parameters
    ----------
    folder : Path
        ``<store>/parts/<id>``.
    outputs : sequence of OutputSpec
        What the store declares.

    Raises
    ------
    DamagedStoreError
        The manifest does not hold: its own checksum, a missing file, a file of another size.
    """

    def __init__(self, folder: Path, outputs: tuple[OutputSpec, ...]) -> None:
        self.folder = str(folder)
        self.id = folder.name
        metadata = folder / layout.METADATA
        try:
            data = metadata.read_bytes()
        except FileNotFoundError as error:
            raise DamagedStoreError(f"{metadata} is missing: the part has no manifest.") from error
        manifest = layout.unseal(data, str(metadata))
        try:
            self.num_utterances = int(manifest["utterances"])
            self._files = {name: int(file["bytes"]) for name, file in manifest["files"].items()}
            self._frames = {
                o.name: _Frames(
                    f"{self.folder}/{_shard_file(o.name)}", manifest["outputs"][o.name], o
                )
                for o in outputs
            }
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedStoreError(
                f"{metadata} lacks what a manifest holds: {error!r}."
            ) from error
        self.num_bytes = len(data) + sum(self._files.values())
        self._pooled_verified: set[str] = set()
        self._check_files()
        for output, frames in self._frames.items():
            if frames.num_frames:
                self._listed(_shard_file(output), frames.file_bytes)

    def _check_files(self) -> None:
        for name, expected in self._files.items():
            path = f"{self.folder}/{name}"
            try:
                size = os.stat(path).st_size
            except (FileNotFoundError, NotADirectoryError) as error:
                raise DamagedStoreError(
                    f"{path} is missing; its part's manifest lists it."
                ) from error
            if size != expected:
                raise DamagedStoreError(f"{path} has {size} bytes, its manifest says {expected}.")

    def num_frames(self, output: str) -> int:
        """Return F."""
        return self._frames[output].num_frames

    def dtype(self, output: str) -> np.dtype:
        """Return the type the frames are stored in; float32 where float16 would have overflowed."""
        return self._frames[output].dtype

    def keys(self) -> np.ndarray:
        """Return the keys in row order, (U, 16) uint8."""
        return self._read(layout.KEY, (self.num_utterances, KEY_BYTES), "uint8")

    def input_length(self) -> np.ndarray:
        """Return the real prepared steps per utterance, (U,) int64."""
        return self._read(layout.INPUT_LENGTH, (self.num_utterances,), "int64")

    def offsets(self, output: str) -> np.ndarray:
        """Return the (U + 1,) int64 frame bounds of the utterances."""
        frames = self._frames[output]
        if frames.offsets is None:
            name = f"{output}/{layout.OFFSETS}"
            offsets = self._read(name, (self.num_utterances + 1,), "int64")
            if offsets[0] != 0 or offsets[-1] != frames.num_frames or (np.diff(offsets) < 0).any():
                raise DamagedStoreError(f"{self.folder}/{name} does not partition the frames.")
            frames.offsets = offsets
        return frames.offsets

    def pooled(self, output: str) -> np.ndarray:
        """Return mean and standard deviation over each utterance's frames, (U, 2, D) float32."""
        shape = (self.num_utterances, 2, self._frames[output].dim)
        name = f"{output}/{layout.POOLED}"
        file = f"{name}/{layout.chunk_file(3)}"
        num_bytes = math.prod(shape) * 4
        num_bytes_in_file = num_bytes + layout.CRC_BYTES
        data = _pool.get(self._listed(file, num_bytes_in_file), num_bytes_in_file)
        if name not in self._pooled_verified:
            _verify(data, f"{self.folder}/{file}")
            self._pooled_verified.add(name)
        return data[:num_bytes].view("<f4").reshape(shape)

    def _read(self, name: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """Return a small array that lies in one chunk, verified, without holding a map."""
        file = f"{name}/{layout.chunk_file(len(shape))}"
        kind = layout.little(dtype)
        expected = math.prod(shape) * kind.itemsize + layout.CRC_BYTES
        path = self._listed(file, expected)
        try:
            with open(path, "rb", buffering=0) as source:
                data = np.frombuffer(source.read(), np.uint8)
        except FileNotFoundError as error:
            raise DamagedStoreError(f"{path} is missing; its part's manifest lists it.") from error
        if len(data) != expected:
            raise DamagedStoreError(f"{path} has {len(data)} bytes, its manifest says {expected}.")
        _verify(data, path)
        return data[: -layout.CRC_BYTES].view(kind).reshape(shape)

    def _listed(self, file: str, expected: int) -> str:
        path = f"{self.folder}/{file}"
        if self._files.get(file) != expected:
            raise DamagedStoreError(
                f"{path} should have {expected} bytes, its manifest says {self._files.get(file)}."
            )
        return path

    def frames(self, output: str, start: int, stop: int) -> np.ndarray:
        """Return a copy of frames ``start`` to ``stop``, (stop - start, D) in the stored type."""
        frames = self._frames[output]
        out = np.empty((stop - start, frames.dim), frames.dtype)
        self.copy_frames(output, start, stop, out)
        return out

    def copy_frames(self, output: str, start: int, stop: int, out: np.ndarray) -> None:
        """Copy frames ``start`` to ``stop`` into ``out``, (stop - start, D), in its type.

        Raises
        ------
        DamagedStoreError
            A chunk that is touched for the first time does not match its crc32c.
        """
        if start == stop:
            return
        frames = self._frames[output]
        rows, dim, item = frames.rows, frames.dim, frames.dtype.itemsize
        data = _pool.get(frames.path, frames.file_bytes)
        if not frames.index_verified:
            _verify_index(data, frames)
        # The checksum behind each chunk is skipped by the stride.
        shape, strides = (frames.num_chunks, rows, dim), (frames.chunk_bytes, dim * item, item)
        chunks: np.ndarray = np.ndarray(shape, frames.dtype, data, 0, strides)
        first, last = start // rows, (stop - 1) // rows
        for chunk in range(first, last + 1):
            if not frames.verified[chunk]:
                _verify_chunk(data, frames, chunk)
        head = start - first * rows
        if first == last:
            out[...] = chunks[first, head : head + stop - start]
            return
        done = rows - head
        out[:done] = chunks[first, head:]
        whole = last - first - 1
        if whole:
            middle = out[done : done + whole * rows].reshape(whole, rows, dim)
            middle[...] = chunks[first + 1 : last]
            done += whole * rows
        out[done:] = chunks[last, : stop - start - done]


def _shard_file(output: str) -> str:
    return f"{output}/{layout.FRAMES}/{layout.chunk_file(2)}"


def _verify_index(data: np.ndarray, frames: _Frames) -> None:
    index = data[frames.num_chunks * frames.chunk_bytes :]
    where = f"The index of {frames.path}"
    _verify(index, where)
    entries = np.frombuffer(index[: -layout.CRC_BYTES].tobytes(), "<u8").reshape(-1, 2)
    expected = np.arange(frames.num_chunks, dtype=np.uint64) * np.uint64(frames.chunk_bytes)
    if (entries[:, 0] != expected).any() or (entries[:, 1] != frames.chunk_bytes).any():
        raise DamagedStoreError(f"{where} does not list equal chunks in order.")
    frames.index_verified = True


def _verify_chunk(data: np.ndarray, frames: _Frames, chunk: int) -> None:
    begin = chunk * frames.chunk_bytes
    _verify(data[begin : begin + frames.chunk_bytes], f"Chunk {chunk} of {frames.path}")
    frames.verified[chunk] = 1


def _verify(data: np.ndarray, where: str) -> None:
    """Check bytes that end with their own crc32c."""
    stored = int.from_bytes(data[-layout.CRC_BYTES :].tobytes(), "little")
    if google_crc32c.value(data[: -layout.CRC_BYTES]) != stored:
        raise DamagedStoreError(f"{where} does not match its checksum.")


def part_folders(parts: Path) -> Iterator[Path]:
    """Yield the folders of parts in their order, which is that of their names."""
    with os.scandir(parts) as entries:
        names = sorted(e.name for e in entries if e.is_dir() and _is_part_name(e.name))
    return (parts / name for name in names)


def _is_part_name(name: str) -> bool:
    return len(name) == 32 and set(name) <= set("0123456789abcdef")
