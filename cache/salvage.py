"""Taking sound utterances out of a damaged part, every byte checked once more."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from mer.cache import layout
from mer.cache.errors import DamagedStoreError
from mer.cache.examine import Examination
from mer.cache.expected import INPUT_LENGTH_FILE, array_files, offsets_file, pooled_file
from mer.cache.frames import ShardFrames, agree
from mer.cache.mend import xxh3
from mer.cache.raw import Raw
from mer.cache.rewrite import Stored


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
        self._sources: dict[str, ShardFrames] = {}

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
        offsets = self._part.arrays[offsets_file(output)]
        source = self._sources.get(output)
        if source is None:
            shard = self._part.shards[output]
            source = self._sources[output] = ShardFrames(self._raw, self._folder, shard)
        frames = source.read(int(offsets[row]), int(offsets[row + 1]))
        if output in self._part.unproven and len(frames):
            pooled = self._pooled.get(output)
            if pooled is None or not agree(frames, pooled[row]):
                file = self._part.shards[output].file
                raise DamagedStoreError(f"{self._where(file)} is not the file that was examined.")
        return frames

    def _where(self, file: str) -> str:
        return f"{self._raw.url}/{self._folder}/{file}"
