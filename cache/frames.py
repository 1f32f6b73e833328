"""Frames of single utterances out of a shard that may be damaged, and whether they are theirs.

T frames of one utterance, D width.
"""

from __future__ import annotations

import google_crc32c
import numpy as np

from mer.cache.errors import DamagedStoreError
from mer.cache.raw import Raw
from mer.cache.reader import ShardLayout

_WINDOW_BYTES = 2 << 20  # of each output; layers of a model are many

# Half the distance of neighbours in float16: relative, and near zero.
_HALF_STEP, _SMALLEST = 2.0**-11, 2.0**-25
_FLOAT32_STEP = 2.0**-23
_SLACK = 2.0**-18  # for sums that were made in another order or type


class ShardFrames:
    """Reads utterances of one shard in order, every chunk checked.

    Parameters
    ----------
    raw : Raw
        The files of the store.
    folder : str
        The part, below the store.
    shard : ShardLayout
        Which.
    """

    def __init__(self, raw: Raw, folder: str, shard: ShardLayout) -> None:
        self._raw = raw
        self._file = f"{folder}/{shard.file}"
        self._shard = shard
        self._begin = 0
        self._data = np.empty(0, np.uint8)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return frames ``start`` to ``stop``, (T, D) in the stored type.

        Raises
        ------
        DamagedStoreError
            A chunk does not match its checksum, or is not there.
        OSError
            Nor is the file, or a device fails.
        """
        shard = self._shard
        if start == stop:
            return np.empty((0, shard.dim), shard.dtype)
        first, last = start // shard.rows, (stop - 1) // shard.rows
        size = shard.chunk_bytes
        data = self._chunks(first, last)
        pieces = []
        for chunk in range(first, last + 1):
            block = data[(chunk - first) * size : (chunk - first + 1) * size]
            frames = block[: shard.data_bytes]
            expected = (
                int(shard.crcs[chunk])
                if shard.crcs is not None
                else int.from_bytes(block[shard.data_bytes :].tobytes(), "little")
            )
            if len(block) != size or google_crc32c.value(frames) != expected:
                raise DamagedStoreError(
                    f"Chunk {chunk} of {self._raw.url}/{self._file} does not match its checksum."
                )
            begin = max(start - chunk * shard.rows, 0)
            end = min(stop - chunk * shard.rows, shard.rows)
            pieces.append(frames.view(shard.dtype).reshape(shard.rows, shard.dim)[begin:end])
        return np.concatenate(pieces)

    def _chunks(self, first: int, last: int) -> np.ndarray:
        """Return inner chunks, unchecked, and keep some behind them for the next utterance."""
        size = self._shard.chunk_bytes
        begin, data = self._begin, self._data
        if not begin <= first * size <= (last + 1) * size <= begin + len(data):
            begin = first * size
            end = max((last + 1) * size, begin + _WINDOW_BYTES // size * size)
            end = min(end, self._shard.num_chunks * size)
            try:
                data = self._raw.read(self._file, begin, end)
            except OSError:  # a device that fails further on
                return self._raw.read(self._file, begin, (last + 1) * size)
            self._begin, self._data = begin, data
        return data[first * size - begin : (last + 1) * size - begin]


def agree(frames: np.ndarray, pooled: np.ndarray) -> bool:
    """Whether frames are those that an utterance was pooled from, before they were rounded.

    Parameters
    ----------
    frames : ndarray
        (T, D), T at least 1.
    pooled : ndarray
        (2, D) mean and population standard deviation.

    Notes
    -----
    Rounding moves every value by at most half a step, so the mean by at most the mean of half the
    steps, and the deviation by at most the root of the mean of their squares.
    """
    values = frames.astype(np.float64)
    mean, deviation = pooled.astype(np.float64)
    if not (np.isfinite(values).all() and np.isfinite(pooled).all()):
        return False
    steps = np.maximum(np.abs(values) * _HALF_STEP, _SMALLEST)
    slack = _SLACK * deviation + _FLOAT32_STEP * np.abs(values).max(axis=0)
    found = values.mean(axis=0)
    spread = np.sqrt(np.square(values - found).mean(axis=0))
    moved = np.sqrt(np.square(steps).mean(axis=0))
    return bool(
        (np.abs(found - mean) <= steps.mean(axis=0) + slack).all()
        and (np.abs(spread - deviation) <= moved + slack).all()
    )
