"""Taking frames in: checked, brought to the stored type and pooled, block by block.

A block stays in the processor's cache from one step to the next, so that memory is read once. No
step uses more than one thread: the processor belongs to the forward pass.

F frames of a part, T frames of one utterance, D width.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import numpy as np

from mer.cache import layout
from mer.cache.casting import copy_into
from mer.cache.spec import OutputSpec

FLOAT16_MAX = 65504.0
_BLOCK_ELEMENTS = 1 << 17  # 512 KiB of float32
_BLOCK_ROWS = 256
_SUM_ROWS = 64  # in float32, then float64 goes on: more would cost accuracy
_SERIAL_ELEMENTS = 32767  # torch shares larger copies among threads
_EXACT_WIDTH = 64  # narrower outputs are pooled in float64: they are small
_SAMPLE_ROWS = 16


class Buffers:
    """Memory of chunks, used again by the next part: fresh memory has to be cleared by the system.

    Parameters
    ----------
    limit : int
        Bytes to keep.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._free: dict[int, list[np.ndarray]] = {}
        self._kept = 0
        self._lock = threading.Lock()

    def take(self, num_bytes: int) -> np.ndarray:
        """Return (num_bytes,) uint8 of any content."""
        with self._lock:
            free = self._free.get(num_bytes)
            if free:
                self._kept -= num_bytes
                return free.pop()
        return np.empty(num_bytes, np.uint8)

    def give(self, buffers: Sequence[np.ndarray]) -> None:
        """Take back what nobody uses any more."""
        with self._lock:
            for buffer in buffers:
                if self._kept + len(buffer) <= self._limit:
                    self._free.setdefault(len(buffer), []).append(buffer)
                    self._kept += len(buffer)


class _Chunk:
    """An inner chunk of a shard and the room for its crc32c."""

    __slots__ = ("data", "signed", "unsigned", "values")

    def __init__(self, data: np.ndarray, rows: int, dtype: np.dtype) -> None:
        self.data = data
        self.values = data[: -layout.CRC_BYTES].view(dtype).reshape(rows, -1)
        self.signed = self.values.view(f"<i{dtype.itemsize}")
        self.unsigned = self.values.view(f"<u{dtype.itemsize}")

    def holds_extremes(self, start: int, stop: int) -> bool:
        """Whether rows hold NaN, an infinity, or in float16 the largest number."""
        # The bits of floats are ordered like integers, apart from the sign.
        limit = 0x7BFF if self.values.itemsize == 2 else 0x7F80_0000
        negative = limit + (0x8000 if self.values.itemsize == 2 else 0x8000_0000)
        return bool(
            self.signed[start:stop].max() >= limit or self.unsigned[start:stop].max() >= negative
        )


class Column:
    """The frames of one output of the part that is being filled, as the chunks of its shard.

    Parameters
    ----------
    output : OutputSpec
        Which.
    buffers : Buffers
        Where memory comes from.
    """

    def __init__(self, output: OutputSpec, buffers: Buffers) -> None:
        self.output = output
        self.dtype = layout.little(output.dtype)
        self.rows = layout.CHUNK_FRAMES
        self._buffers = buffers
        self._chunks: list[_Chunk] = []
        self._serial = max(1, _SERIAL_ELEMENTS // output.dim)

    def put(self, frames: np.ndarray, start: int) -> bool:
        """Write (T, D) frames at row ``start``, in the stored type.

        Returns
        -------
        bool
            Whether there may be values among them that the stored type does not hold.
        """
        doubtful = False
        is_float = self.dtype.kind == "f"
        for chunk, first, row, count in self._pieces(start, len(frames)):
            for i in range(0, count, self._serial):
                n = min(self._serial, count - i)
                copy_into(chunk.values[row + i : row + i + n], frames[first + i : first + i + n])
            if is_float and not doubtful:
                doubtful = chunk.holds_extremes(row, row + count)
        return doubtful

    def _pieces(self, start: int, num_rows: int) -> Iterator[tuple[_Chunk, int, int, int]]:
        """Yield chunk, row of the frames, row of the chunk and how many."""
        done = 0
        while done < num_rows:
            number, row = divmod(start + done, self.rows)
            count = min(num_rows - done, self.rows - row)
            yield self._chunk(number), done, row, count
            done += count

    def _chunk(self, number: int) -> _Chunk:
        while number >= len(self._chunks):
            num_bytes = self.rows * self.output.dim * self.dtype.itemsize + layout.CRC_BYTES
            data = self._buffers.take(num_bytes)
            self._chunks.append(_Chunk(data, self.rows, self.dtype))
        return self._chunks[number]

    def chunks(self, num_frames: int) -> Iterator[np.ndarray]:
        """Yield the inner chunks of F frames, uint8, each with room for its crc32c at the end."""
        rows = max(1, min(self.rows, num_frames))
        for first in range(0, num_frames, rows):
            chunk = self._chunk(first // rows)
            chunk.values[num_frames - first : rows] = _fill(self.dtype)
            yield chunk.data[: chunk.values[:rows].nbytes + layout.CRC_BYTES]

    def wide_chunks(
        self, num_frames: int, wide: Sequence[tuple[int, np.ndarray]]
    ) -> Iterator[np.ndarray]:
        """Yield chunks like ``chunks``, in float32.

        Parameters
        ----------
        num_frames : int
            F.
        wide : sequence of (int, ndarray)
            First row and (T, D) float32 frames that replace what was put there; by row.
        """
        rows = max(1, min(self.rows, num_frames))
        dtype = layout.little("float32")
        num_bytes = rows * self.output.dim * dtype.itemsize + layout.CRC_BYTES
        for first in range(0, num_frames, rows):
            chunk = _Chunk(np.empty(num_bytes, np.uint8), rows, dtype)
            with np.errstate(invalid="ignore"):  # of rows that are replaced below
                chunk.values[...] = self._chunk(first // rows).values[:rows]
            for start, frames in wide:
                begin, end = max(start, first), min(start + len(frames), first + rows)
                if begin < end:
                    chunk.values[begin - first : end - first] = frames[begin - start : end - start]
            chunk.values[num_frames - first :] = _fill(dtype)
            yield chunk.data

    def release(self) -> None:
        """Give the memory back."""
        chunks, self._chunks = self._chunks, []
        self._buffers.give([chunk.data for chunk in chunks])


def _fill(dtype: np.dtype) -> float:
    return np.nan if dtype.kind == "f" else 0


class Intake:
    """Takes in one array after the other; holds the scratch memory for that."""

    def __init__(self) -> None:
        self._wide = np.empty(_BLOCK_ELEMENTS, np.float32)
        self._centred = np.empty(_BLOCK_ELEMENTS, np.float32)

    def take(
        self, array: np.ndarray, column: Column, start: int, *, pool: bool
    ) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Put the frames of one utterance into a column.

        Parameters
        ----------
        array : ndarray
            (T, D), floating point of any width.
        column : Column
            For an output of floats.
        start : int
            Row to put the first frame at.
        pool : bool
            Whether to compute mean and standard deviation.

        Returns
        -------
        wide : ndarray or None
            A copy in float32, if that alone can hold the values.
        pooled : ndarray or None
            (2, D) float32, from the values before rounding.

        Raises
        ------
        ValueError
            NaN or an infinity.
        """
        dim = column.output.dim
        step = max(1, min(_BLOCK_ROWS, _BLOCK_ELEMENTS // dim))
        doubtful = False
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is found anyway
            moments = _Moments(array) if pool and dim >= _EXACT_WIDTH and len(array) else None
            for first in range(0, len(array), step):
                block = self._plain(array[first : first + step], column.dtype)
                doubtful = column.put(block, start + first) or doubtful
                if moments is not None:
                    wide_block = block if block.dtype == np.float32 else self._widened(block)
                    is_ours = np.may_share_memory(wide_block, self._wide)
                    moments.add(wide_block, self._wide if is_ours else self._centred)
            wide = _beyond_stored(array, column.output) if doubtful else None
            if moments is not None:
                return wide, moments.result(array)
        return wide, pool_exactly(array) if pool else None

    def _plain(self, block: np.ndarray, stored: np.dtype) -> np.ndarray:
        """Return a block as float32, or float16 where that is stored, plain in memory."""
        if block.dtype == np.float32 or (block.dtype == np.float16 and stored.itemsize == 2):
            flags = block.flags
            if block.dtype.isnative and flags.c_contiguous and flags.writeable and flags.aligned:
                return block
            if block.dtype == np.float16:
                return np.array(block, np.float16)
        return self._widened(block)

    def _widened(self, block: np.ndarray) -> np.ndarray:
        out = _shaped(self._wide, block.shape)
        if block.flags.c_contiguous and block.flags.aligned:
            step = max(1, _SERIAL_ELEMENTS // max(1, block.shape[1]))
            for i in range(0, len(block), step):
                copy_into(out[i : i + step], block[i : i + step])
        else:
            np.copyto(out, block, casting="same_kind")
        return out


def _shaped(scratch: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    size = shape[0] * shape[1]
    if size > scratch.size:
        return np.empty(shape, scratch.dtype)
    return scratch[:size].reshape(shape)


def _beyond_stored(array: np.ndarray, output: OutputSpec) -> np.ndarray | None:
    peak = peak_of(array, output)
    if output.dtype == "float16" and peak > FLOAT16_MAX:
        return np.array(array, np.float32, order="C")
    return None


def peak_of(array: np.ndarray, output: OutputSpec) -> float:
    """Return the largest magnitude of a (T, D) array.

    Raises
    ------
    ValueError
        NaN or an infinity.
    """
    peak = 0.0
    for first in range(0, len(array), _BLOCK_ROWS):
        block = array[first : first + _BLOCK_ROWS].astype(np.float32)
        largest = max(float(block.max()), -float(block.min()))
        if not np.isfinite(largest):
            raise ValueError(f"Output {output.name!r} holds NaN or an infinity.")
        peak = max(peak, largest)
    return peak


class _Moments:
    """Mean and standard deviation of columns from float32 sums of what is left of a pivot.

    The pivot is close to the mean, which keeps the sums accurate whatever the mean. Where it turns
    out not to have been, the column is computed again in float64.

    Parameters
    ----------
    array : ndarray
        (T, D), T at least 1: rows from all over it give the pivot.
    """

    def __init__(self, array: np.ndarray) -> None:
        step = max(1, len(array) // _SAMPLE_ROWS)
        sample = array[::step].astype(np.float32, order="C")  # the order decides how sums round
        # In this form the pivot of a constant column is its value, and its deviation is 0.
        self._pivot = sample[0] + (sample - sample[0]).mean(axis=0)
        self._sum = np.zeros(array.shape[1])
        self._squares = np.zeros(array.shape[1])

    def add(self, block: np.ndarray, scratch: np.ndarray) -> None:
        """Count (rows, D) float32 in."""
        rest = np.subtract(block, self._pivot, out=_shaped(scratch, block.shape))
        for i in range(0, len(rest), _SUM_ROWS):
            rows = rest[i : i + _SUM_ROWS]
            # Not by a matrix product: the library would share it among threads.
            self._sum += np.add.reduce(rows, axis=0)
            self._squares += np.einsum("td,td->d", rows, rows)

    def result(self, array: np.ndarray) -> np.ndarray:
        """Return (2, D) float32 for the array that was counted in."""
        shift = self._sum / len(array)
        around_mean = self._squares - self._sum * shift
        deviation = np.sqrt(np.maximum(around_mean, 0.0) / len(array))
        pooled = np.stack([self._pivot + shift, deviation]).astype(np.float32)
        accurate = around_mean >= 0.3 * self._squares
        accurate &= (self._squares >= 1e-30 * len(array)) & np.isfinite(self._squares)
        constant = (self._squares == 0.0) & (self._sum == 0.0)
        again = np.flatnonzero(~(accurate | constant))
        if len(again):
            pooled[:, again] = pool_exactly(array, again)
        return pooled


def pool_exactly(frames: np.ndarray, columns: np.ndarray | None = None) -> np.ndarray:
    """Return mean and population standard deviation over T, computed in float64.

    Parameters
    ----------
    frames : ndarray
        (T, D).
    columns : ndarray, optional
        Which columns alone.

    Returns
    -------
    ndarray
        (2, D) float32; NaN if T = 0.
    """
    chosen = slice(None) if columns is None else columns
    width = frames.shape[1] if columns is None else len(columns)
    if not len(frames):
        return np.full((2, width), np.nan, np.float32)
    step = max(1, _BLOCK_ELEMENTS // max(1, width))
    starts = range(0, len(frames), step)
    mean = np.zeros(width)
    for first in starts:
        mean += frames[first : first + step, chosen].astype(np.float64, order="C").sum(axis=0)
    mean /= len(frames)
    squares = np.zeros(width)
    for first in starts:
        rest = frames[first : first + step, chosen].astype(np.float64, order="C")
        rest -= mean
        squares += np.einsum("td,td->d", rest, rest)
    return np.stack([mean, np.sqrt(squares / len(frames))]).astype(np.float32)
