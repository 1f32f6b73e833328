"""Taking sound utterances out of a damaged part, every byte checked once more."""

from __future__ import annotations

from functools import cached_property

import google_crc32c
import numpy as np

from mer.cache import layout
from mer.cache.errors import DamagedStoreError
from mer.cache.examine import Examination
from mer.cache.expected import INPUT_LENGTH_FILE, array_files, offsets_file, pooled_file
from mer.cache.mend import xxh3
from mer.cache.raw import Raw
from mer.cache.rewrite import Stored

_WINDOW_BYTES = 2 << 20  # of each output; layers of a model are many


class Salvage:
    """Reads utterances of a part that ``examine_part`` found sound.

    Parameters
    ----------
    raw : Raw
        The files of the store.
    examined : Examination
        The part. What could be mended has been.
    """

    def __init__(self, raw: Raw, examined: Examination) -> None:
        self._raw = raw
        self._part = examined
        self._folder = f"{layout.PARTS}/{examined.part}"
        self._windows: dict[str, tuple[int, np.ndarray]] = {}

    def read(self, row: int) -> Stored:
        """Return an utterance as it is stored.

        Raises
        ------
        DamagedStoreError
            It is not what it was when the part was examined.
        OSError
            The part was removed meanwhile.
        """
        part = self._part
        arrays = {output.name: self._frames(output.name, row) for output in part.outputs}
        pooled = {name: values[row] for name, values in self._pooled.items()}
        length = int(part.arrays[INPUT_LENGTH_FILE][row])
        return Stored(part.keys[row].tobytes(), length, arrays, pooled)

    @cached_property
    def _pooled(self) -> dict[str, np.ndarray]:
        files = array_files(self._part.num_utterances, self._part.outputs)
        found = {}
        for output in self._part.outputs:
            file = pooled_file(output.name)
            if file in files:
                shape, dtype = files[file]
                data = self._raw.read(f"{self._folder}/{file}")
                if xxh3(data) != self._part.records[file].xxh3:
                    raise DamagedStoreError(f"{self._where(file)} does not match its checksum.")
                values = data[: -layout.CRC_BYTES].view(layout.little(dtype))
                found[output.name] = values.reshape(shape)
        return found

    def _frames(self, output: str, row: int) -> np.ndarray:
        shard = self._part.shards[output]
        offsets = self._part.arrays[offsets_file(output)]
        start, stop = int(offsets[row]), int(offsets[row + 1])
        if start == stop:
            return np.empty((0, shard.dim), shard.dtype)
        first, last = start // shard.rows, (stop - 1) // shard.rows
        size = shard.chunk_bytes
        data = self._chunks(output, first, last)
        pieces = []
        for chunk in range(first, last + 1):
            block = data[(chunk - first) * size : (chunk - first + 1) * size]
            frames = block[: shard.data_bytes]
            expected = (
                int(shard.crcs[chunk])
                if shard.crcs is not None
                else int.from_bytes(block[shard.data_bytes :].tobytes(), "little")
            )
            if len(frames) != shard.data_bytes or google_crc32c.value(frames) != expected:
                raise DamagedStoreError(
                    f"Chunk {chunk} of {self._where(shard.file)} does not match its checksum."
                )
            begin = max(start - chunk * shard.rows, 0)
            end = min(stop - chunk * shard.rows, shard.rows)
            pieces.append(frames.view(shard.dtype).reshape(shard.rows, shard.dim)[begin:end])
        return np.concatenate(pieces)

    def _chunks(self, output: str, first: int, last: int) -> np.ndarray:
        """Return inner chunks, unchecked, and keep some behind them for the next utterance."""
        shard = self._part.shards[output]
        size = shard.chunk_bytes
        begin, data = self._windows.get(output, (0, np.empty(0, np.uint8)))
        if not begin <= first * size <= (last + 1) * size <= begin + len(data):
            begin = first * size
            end = max((last + 1) * size, begin + _WINDOW_BYTES // size * size)
            end = min(end, shard.num_chunks * size)
            file = f"{self._folder}/{shard.file}"
            try:
                data = self._raw.read(file, begin, end)
            except OSError:  # a device that fails further on
                return self._raw.read(file, begin, (last + 1) * size)
            self._windows[output] = begin, data
        return data[first * size - begin : (last + 1) * size - begin]

    def _where(self, file: str) -> str:
        return f"{self._raw.url}/{self._folder}/{file}"
