"""Passing over a whole store in large blocks, read ahead while the one before is used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

from mer.cache.reader import PartGoneError, PartReader
from mer.cache.spec import OutputSpec

if TYPE_CHECKING:
    from mer.cache.listing import Listing
    from mer.cache.store import Batch, Store


def scan(
    store: Store, output: OutputSpec, keys: Iterable[bytes] | None, block_bytes: int
) -> Iterator[tuple[bytes, np.ndarray]]:
    """See ``Store.scan``."""
    name = output.name
    seen, rows = store.all_rows(name, keys)
    starts, lengths = seen.spans(name)
    blocks = _blocks(lengths[rows], output, block_bytes)
    for block in _ahead(store, seen, name, [rows[block] for block in blocks]):
        for row, key in zip(block.tolist(), seen.keys_of(block), strict=True):
            start = int(starts[row])
            try:
                frames = seen.parts[seen.part_of_row[row]].frames(
                    name, start, start + int(lengths[row])
                )
            except PartGoneError:
                frames = store.frames(key, name)
            yield key, frames


def epoch(
    store: Store,
    output: OutputSpec,
    keys: Iterable[bytes] | None,
    *,
    batch_size: int,
    seed: int,
    dtype: np.dtype,
    block_bytes: int,
    buffer_blocks: int,
) -> Iterator[tuple[list[bytes], Batch]]:
    """See ``Store.epoch``."""
    if batch_size < 1 or buffer_blocks < 1:
        raise ValueError(f"batch_size={batch_size}, buffer_blocks={buffer_blocks}: expected ≥ 1.")
    rng = np.random.default_rng(seed)
    seen, rows = store.all_rows(output.name, keys)
    blocks = _blocks(seen.spans(output.name)[1][rows], output, block_bytes)
    order = rng.permutation(len(blocks)).tolist()
    windows = [
        np.concatenate([rows[blocks[i]] for i in order[at : at + buffer_blocks]])
        for at in range(0, len(order), buffer_blocks)
    ]
    left = np.empty(0, np.int64)
    for number, window in enumerate(_ahead(store, seen, output.name, windows)):
        shuffled = np.concatenate([left, rng.permutation(window)])
        whole = len(shuffled) // batch_size * batch_size
        stop = len(shuffled) if number == len(windows) - 1 else whole
        for at in range(0, stop, batch_size):
            chosen = seen.keys_of(shuffled[at : min(at + batch_size, stop)])
            yield chosen, store.batch(chosen, output.name, dtype)
        left = shuffled[stop:]


def _blocks(lengths: np.ndarray, output: OutputSpec, block_bytes: int) -> list[slice]:
    """Cut utterances of ``lengths`` frames into runs of about ``block_bytes``."""
    sizes = lengths * (output.dim * np.dtype(output.dtype).itemsize)
    numbers = (np.cumsum(sizes) - sizes) // max(1, block_bytes)
    bounds = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(lengths)]
    return [slice(a, b) for a, b in zip(bounds[:-1], bounds[1:], strict=True) if a < b]


def _ahead(
    store: Store, seen: Listing, output: str, blocks: Iterable[np.ndarray]
) -> Iterator[np.ndarray]:
    """Yield blocks of rows, the next one being fetched meanwhile."""
    starts, lengths = seen.spans(output)

    def fetch(rows: np.ndarray) -> None:
        numbers, begins = seen.part_of_row[rows], starts[rows]
        wanted = _merged(seen.parts, output, numbers, begins, begins + lengths[rows])
        store.place.prefetch(wanted)

    with ThreadPoolExecutor(1, "mer-read-ahead") as pool:
        waiting: list[tuple[np.ndarray, Future[None]]] = []
        for block in blocks:
            waiting.append((block, pool.submit(fetch, block)))
            if len(waiting) > 1:
                yield _arrived(*waiting.pop(0))
        for item in waiting:
            yield _arrived(*item)


def _arrived(block: np.ndarray, future: Future[None]) -> np.ndarray:
    with suppress(PartGoneError):  # whoever reads looks where the part went
        future.result()
    return block


def _merged(
    parts: Sequence[PartReader],
    output: str,
    numbers: np.ndarray,
    begins: np.ndarray,
    ends: np.ndarray,
) -> list[tuple[PartReader, str, int, int]]:
    """Return one request per run of frames that lie behind each other."""
    order = np.lexsort((begins, numbers))
    wanted: list[tuple[PartReader, str, int, int]] = []
    last = -1
    for i in order.tolist():
        number, begin, end = int(numbers[i]), int(begins[i]), int(ends[i])
        if wanted and number == last and wanted[-1][3] == begin:
            wanted[-1] = (*wanted[-1][:3], end)
        else:
            wanted.append((parts[number], output, begin, end))
        last = number
    return wanted
