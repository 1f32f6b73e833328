"""Collecting utterances and writing them as immutable parts.

U utterances of a part, F frames, T frames of one utterance, D width.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import google_crc32c
import numpy as np

from mer.cache import layout
from mer.cache.errors import StoreError
from mer.cache.identity import KEY_BYTES
from mer.cache.spec import FeatureSpec, OutputSpec
from mer.cache.layout import FileRecord
from mer.cache.staging import publish, staged, sweep, write_file, writing

logger = logging.getLogger(__name__)

FLOAT16_MAX = 65504.0
_BLOCK_BYTES = 4 << 20


@dataclass(slots=True)
class _Utterance:
    key: bytes
    input_length: int
    arrays: dict[str, np.ndarray]  # float32 or the codes' type, (T, D)
    pooled: dict[str, np.ndarray]  # (2, D) float32


@dataclass(slots=True)
class _Pending:
    """What was added and not committed yet."""

    utterances: list[_Utterance] = field(default_factory=list)
    peak: dict[str, float] = field(default_factory=dict)  # largest magnitude per float output
    num_bytes: int = 0
    since: float = 0.0


class PartWriter:
    """Adds utterances to a store; a context manager. Threads that share it wait for each other.

    Leaving it commits what was added, on an exception and on Ctrl-C too. After an error of the file
    system nothing more is accepted, and what was not committed is dropped.

    Parameters
    ----------
    path : Path
        Folder of the store.
    spec : FeatureSpec
        What it holds.
    known : callable
        Whether a key is in the store already.
    committed : callable
        Called after each new part.
    part_bytes : int, default=64 MiB
        A part is committed once its arrays take this many bytes …
    part_seconds : float, default=30
        … or this long after its first utterance, as seen by the next ``add``.
    """

    def __init__(
        self,
        path: Path,
        spec: FeatureSpec,
        known: Callable[[bytes], bool],
        committed: Callable[[], None],
        part_bytes: int = 64 << 20,
        part_seconds: float = 30.0,
    ) -> None:
        self._path = path
        self._spec = spec
        self._known = known
        self._committed = committed
        self._part_bytes = part_bytes
        self._part_seconds = part_seconds
        self._added: set[bytes] = set()
        self._pending = _Pending()
        self._failed = False
        # A second Ctrl-C may leave the context while another thread is still adding.
        self._lock = threading.RLock()
        self._names = {output.name for output in spec.outputs}

    def __enter__(self) -> Self:
        sweep(self._path)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._failed:
            self.commit()

    def add(self, key: bytes, input_length: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Add one utterance; one that is stored or was added before is skipped.

        Parameters
        ----------
        key : bytes
            16 bytes.
        input_length : int
            Real steps of the prepared input, before any padding to a minimum length.
        arrays : mapping of str to ndarray
            Every output of the store: (T, D) floats, or integers within the range of the codes.
            They are copied.

        Raises
        ------
        ValueError
            An output is missing, unknown, of a wrong shape or type, out of range, NaN or infinite.
            Nothing is added.
        StorageFullError, StoreError
            A part could not be written.
        """
        with self._lock:
            self._add(key, input_length, arrays)

    def _add(self, key: bytes, input_length: int, arrays: Mapping[str, np.ndarray]) -> None:
        if self._failed:
            raise StoreError(f"Writing to {self._path} failed before; open a new writer.")
        if len(key) != KEY_BYTES:
            raise ValueError(f"A key has {len(key)} bytes, expected {KEY_BYTES}.")
        if input_length < 0:
            raise ValueError(f"input_length={input_length} is negative.")
        if arrays.keys() != self._names:
            raise ValueError(
                f"Outputs {sorted(arrays)} were given, "
                f"{self._spec.slug!r} has {sorted(self._names)}."
            )
        if key in self._added or self._known(key):
            return
        pending = self._pending
        utterance = _Utterance(key, int(input_length), {}, {})
        peaks: dict[str, float] = {}
        for output in self._spec.outputs:
            array = _checked(arrays[output.name], output)
            utterance.arrays[output.name] = array
            if output.dtype in layout.FLOAT_DTYPES:
                peaks[output.name] = _peak(array, output)
            if output.kind == "frames":
                utterance.pooled[output.name] = pool(array)
        if not pending.utterances:
            pending.since = time.monotonic()
        pending.utterances.append(utterance)
        self._added.add(key)
        for name, peak in peaks.items():
            pending.peak[name] = max(peak, pending.peak.get(name, 0.0))
        pending.num_bytes += _stored_bytes(utterance, self._spec)
        waited = time.monotonic() - pending.since
        if pending.num_bytes >= self._part_bytes or waited >= self._part_seconds:
            self.commit()

    def commit(self) -> None:
        """Make what was added visible as one part; nothing happens if there is none.

        Raises
        ------
        StorageFullError
            No space left; the unfinished part is removed, earlier ones are intact.
        StoreError
            Any other refusal of the file system.
        """
        with self._lock:
            self._commit()

    def _commit(self) -> None:
        pending = self._pending
        if not pending.utterances:
            return
        try:
            with writing(self._path), staged(self._path) as folder:
                _write_part(folder, self._spec, pending, self._path.name)
                name = layout.part_id(u.key for u in pending.utterances)
                if not publish(folder, self._path / layout.PARTS / name):
                    logger.info("Part %s of %s exists already.", name, self._path.name)
        except Exception:
            self._failed = True
            self._pending = _Pending()
            raise
        # On Ctrl-C the utterances stay pending and are committed on the way out.
        self._pending = _Pending()
        self._committed()


def pool(frames: np.ndarray) -> np.ndarray:
    """Return mean and population standard deviation over T, (2, D) float32; NaN if T = 0."""
    if not len(frames):
        return np.full((2, frames.shape[1]), np.nan, np.float32)
    precise = frames.astype(np.float64)
    mean = precise.mean(axis=0)
    precise -= mean
    std = np.sqrt(np.einsum("td,td->d", precise, precise) / len(frames))
    return np.stack([mean, std]).astype(np.float32)


def _checked(array: np.ndarray, output: OutputSpec) -> np.ndarray:
    """Return a contiguous copy in float32 or in the codes' type."""
    array = np.asarray(array)
    where = f"Output {output.name!r}"
    if array.ndim != 2 or array.shape[1] != output.dim:
        raise ValueError(f"{where} has the shape {array.shape}, expected (T, {output.dim}).")
    if output.kind == "pooled" and len(array) != 1:
        raise ValueError(f"{where} has {len(array)} rows; a pooled output has one.")
    if output.dtype in layout.FLOAT_DTYPES:
        if array.dtype.kind != "f":
            raise ValueError(f"{where} has the type {array.dtype}, expected floating point.")
        return np.array(array, np.float32, order="C")
    if array.dtype.kind not in "iu":
        raise ValueError(f"{where} has the type {array.dtype}, expected integers.")
    limit = int(np.iinfo(output.dtype).max)
    if output.num_codes is not None:
        limit = min(limit, output.num_codes - 1)
    if array.size and (int(array.min()) < 0 or int(array.max()) > limit):
        raise ValueError(
            f"{where} holds codes from {array.min()} to {array.max()}, expected 0 to {limit}."
        )
    return np.array(array, output.dtype, order="C")


def _peak(array: np.ndarray, output: OutputSpec) -> float:
    if not array.size:
        return 0.0
    peak = max(float(array.max()), -float(array.min()))
    if not np.isfinite(peak):
        raise ValueError(f"Output {output.name!r} holds NaN or an infinity.")
    return peak


def _stored_bytes(utterance: _Utterance, spec: FeatureSpec) -> int:
    frames = sum(utterance.arrays[o.name].size * np.dtype(o.dtype).itemsize for o in spec.outputs)
    return frames + sum(pooled.nbytes for pooled in utterance.pooled.values())


def _write_part(folder: Path, spec: FeatureSpec, pending: _Pending, store: str) -> None:
    """Write all files of a part, its manifest last."""
    utterances = pending.utterances
    part = _Files(folder)
    keys = np.frombuffer(b"".join(u.key for u in utterances), np.uint8)
    part.array(layout.KEY, keys.reshape(-1, KEY_BYTES), "uint8")
    lengths = np.array([u.input_length for u in utterances], np.int64)
    part.array(layout.INPUT_LENGTH, lengths, "int64")
    outputs: dict[str, Any] = {}
    for output in spec.outputs:
        name = output.name
        dtype = output.dtype
        if dtype == "float16" and pending.peak[name] > FLOAT16_MAX:
            dtype = "float32"
            logger.warning(
                "Output %r of %s reaches %.4g, beyond float16; this part holds it as float32.",
                name,
                store,
                pending.peak[name],
            )
        arrays = [u.arrays[name] for u in utterances]
        offsets = np.zeros(len(arrays) + 1, np.int64)
        np.cumsum([len(a) for a in arrays], out=offsets[1:])
        num_frames = int(offsets[-1])
        rows = layout.chunk_rows(num_frames)
        part.group(name)
        part.frames(f"{name}/{layout.FRAMES}", arrays, (num_frames, output.dim), dtype, rows)
        part.array(f"{name}/{layout.OFFSETS}", offsets, "int64")
        if output.kind == "frames":
            pooled = np.stack([u.pooled[name] for u in utterances])
            part.array(f"{name}/{layout.POOLED}", pooled, "float32")
        outputs[name] = {"frames": num_frames, "dtype": dtype, "chunk_frames": rows}
    part.manifest(len(utterances), outputs)


class _Files:
    """Writes the files of one part and remembers their sizes and checksums."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._records: dict[str, FileRecord] = {}
        folder.mkdir()

    def group(self, name: str) -> None:
        """Write an empty group."""
        (self._folder / name).mkdir()
        self._write(f"{name}/{layout.METADATA}", [layout.to_bytes(layout.group_document())])

    def array(self, name: str, values: np.ndarray, dtype: str) -> None:
        """Write an array as one chunk followed by its crc32c."""
        data = np.ascontiguousarray(values, layout.little(dtype)).tobytes()
        self._array(
            name, layout.array_document(values.shape, dtype), values.ndim, [data, _crc(data)]
        )

    def frames(
        self,
        name: str,
        arrays: Sequence[np.ndarray],
        shape: tuple[int, int],
        dtype: str,
        rows: int,
    ) -> None:
        """Write (T, D) arrays behind each other as one shard."""
        blocks = None
        if shape[0]:
            blocks = _shard_blocks(arrays, shape, layout.little(dtype), rows)
        self._array(name, layout.frames_document(*shape, dtype, rows), 2, blocks)

    def _array(self, name: str, document: dict[str, Any], ndim: int, blocks: Any | None) -> None:
        if blocks is None:
            (self._folder / name).mkdir()
        else:
            file = f"{name}/{layout.chunk_file(ndim)}"
            (self._folder / file).parent.mkdir(parents=True)
            self._write(file, blocks)
        self._write(f"{name}/{layout.METADATA}", [layout.to_bytes(document)])

    def manifest(self, num_utterances: int, outputs: Mapping[str, Any]) -> None:
        """Write the part's own group with the manifest of everything written so far."""
        files = {
            name: {"bytes": record.bytes, "xxh3": record.xxh3}
            for name, record in sorted(self._records.items())
        }
        mer = {
            "format": layout.FORMAT_VERSION,
            "utterances": num_utterances,
            "outputs": outputs,
            "files": files,
        }
        self._write(layout.METADATA, [layout.to_bytes(layout.group_document(mer))])

    def _write(self, name: str, blocks: Any) -> None:
        self._records[name] = write_file(self._folder / name, blocks)


def _shard_blocks(
    arrays: Sequence[np.ndarray], shape: tuple[int, int], dtype: np.dtype, rows: int
) -> Iterator[np.ndarray | bytes]:
    """Yield the bytes of a shard: chunks of ``rows`` frames with their crc32c, then the index."""
    num_frames, dim = shape
    num_chunks = -(-num_frames // rows)
    data_bytes = rows * dim * dtype.itemsize
    chunk_bytes = data_bytes + layout.CRC_BYTES
    step = max(1, _BLOCK_BYTES // chunk_bytes)
    slices = _slices(arrays, step * rows)
    for first in range(0, num_chunks, step):
        count = min(step, num_chunks - first)
        frames = np.empty((count * rows, dim), dtype)
        filled = 0
        for piece in next(slices):
            frames[filled : filled + len(piece)] = piece
            filled += len(piece)
        frames[filled:] = np.nan if dtype.kind == "f" else 0
        block = np.empty((count, chunk_bytes), np.uint8)
        block[:, :data_bytes] = frames.view(np.uint8).reshape(count, data_bytes)
        block.flags.writeable = False
        sums = [google_crc32c.value(chunk[:data_bytes]) for chunk in block]
        block.flags.writeable = True
        block[:, data_bytes:] = np.array(sums, "<u4")[:, None].view(np.uint8)
        yield block
    index = np.empty((num_chunks, 2), "<u8")
    index[:, 0] = np.arange(num_chunks, dtype=np.uint64) * np.uint64(chunk_bytes)
    index[:, 1] = chunk_bytes
    yield index.tobytes()
    yield _crc(index.tobytes())


def _slices(arrays: Sequence[np.ndarray], size: int) -> Iterator[list[np.ndarray]]:
    """Yield lists of slices that are ``size`` rows long together, the last list shorter."""
    pieces: list[np.ndarray] = []
    missing = size
    for array in arrays:
        start = 0
        while start < len(array):
            piece = array[start : start + missing]
            pieces.append(piece)
            start += len(piece)
            missing -= len(piece)
            if not missing:
                yield pieces
                pieces, missing = [], size
    if pieces:
        yield pieces


def _crc(data: bytes) -> bytes:
    return int(google_crc32c.value(data)).to_bytes(layout.CRC_BYTES, "little")
