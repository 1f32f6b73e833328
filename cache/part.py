"""Writing the files of one part into a folder, the manifest last (``FORMAT.md`` 3 and 5)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from mer.cache import layout
from mer.cache.layout import FileRecord
from mer.cache.staging import Buffer, write_file


class PartFolder:
    """Writes the files of one part and remembers their sizes and checksums.

    Parameters
    ----------
    folder : Path
        Must not exist; it is created.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.files: dict[str, FileRecord] = {}
        folder.mkdir()

    def group(self, name: str) -> None:
        """Write an empty group."""
        (self._folder / name).mkdir()
        self._write(f"{name}/{layout.METADATA}", [layout.to_bytes(layout.group_document())])

    def array(self, name: str, values: np.ndarray, dtype: str) -> None:
        """Write an array as one chunk followed by its crc32c."""
        data = np.ascontiguousarray(values, layout.little(dtype)).tobytes()
        crc = int(google_crc32c.value(data)).to_bytes(layout.CRC_BYTES, "little")
        file = f"{name}/{layout.chunk_file(values.ndim)}"
        (self._folder / file).parent.mkdir(parents=True)
        self._write(file, [data, crc])
        self._write(f"{name}/{layout.METADATA}", [_array_document(values.shape, dtype)])

    def shard(
        self, name: str, shape: tuple[int, int], dtype: str, rows: int, chunks: Iterable[np.ndarray]
    ) -> list[int]:
        """Write a (F, D) array as one shard.

        Parameters
        ----------
        name : str
            Of the array, below the part.
        shape : tuple of int
            (F, D).
        dtype : str
            Type of the frames.
        rows : int
            Rows of an inner chunk.
        chunks : iterable of ndarray
            The inner chunks, uint8, each with room for its crc32c at the end.

        Returns
        -------
        list of int
            The crc32c of each.
        """
        crcs: list[int] = []
        (self._folder / name).mkdir()
        if shape[0]:
            file = f"{name}/{layout.chunk_file(2)}"
            (self._folder / file).parent.mkdir(parents=True)
            self._write(file, _shard(chunks, crcs))
        document = layout.frames_document(*shape, dtype, rows)
        self._write(f"{name}/{layout.METADATA}", [layout.to_bytes(document)])
        return crcs

    def manifest(
        self,
        store: str,
        num_utterances: int,
        outputs: Mapping[str, Any],
        name: Callable[[Mapping[str, FileRecord]], str],
    ) -> str:
        """Write the part's own group with the manifest of everything written so far.

        Parameters
        ----------
        store : str
            Fingerprint of the store.
        num_utterances : int
            U.
        outputs : mapping
            What the manifest says of each output.
        name : callable
            Returns the part's id, given its files.

        Returns
        -------
        str
            The id.
        """
        part = name(self.files)
        mer = {
            "format": layout.FORMAT_VERSION,
            "store": store,
            "part": part,
            "utterances": num_utterances,
            "outputs": outputs,
            "files": {
                name: {"bytes": record.bytes, "xxh3": record.xxh3}
                for name, record in sorted(self.files.items())
            },
        }
        self._write(layout.METADATA, [layout.to_bytes(layout.group_document(mer))])
        return part

    def _write(self, name: str, blocks: Iterable[Buffer]) -> None:
        self.files[name] = write_file(self._folder / name, blocks)


@lru_cache(maxsize=64)  # the same for every layer of a model
def _array_document(shape: tuple[int, ...], dtype: str) -> bytes:
    return layout.to_bytes(layout.array_document(shape, dtype))


def _shard(chunks: Iterable[np.ndarray], crcs: list[int]) -> Iterator[Buffer]:
    """Yield the chunks, their crc32c filled in and noted in ``crcs``, then the index."""
    size = 0
    for chunk in chunks:
        data = chunk[: -layout.CRC_BYTES]
        data.flags.writeable = False  # the library refuses memory that may change under it
        crcs.append(int(google_crc32c.value(data)))
        chunk[-layout.CRC_BYTES :].view("<u4")[0] = crcs[-1]
        size = len(chunk)
        yield chunk
    entries = np.empty((len(crcs), 2), "<u8")
    entries[:, 0] = np.arange(len(crcs), dtype=np.uint64) * np.uint64(size)
    entries[:, 1] = size
    index = entries.tobytes()
    yield index
    yield int(google_crc32c.value(index)).to_bytes(layout.CRC_BYTES, "little")
