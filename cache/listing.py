"""The parts of a store as seen at one time, and what follows; never changed, only replaced.

N rows: utterances in the order of the parts, those stored twice counted twice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TypeVar

import numpy as np

from mer.cache import layout
from mer.cache.identity import KEY_BYTES
from mer.cache.index import KeyIndex
from mer.cache.reader import PartReader
from mer.cache.snapshot import Columns, Snapshot, Spans

logger = logging.getLogger(__name__)

_Answer = TypeVar("_Answer")


class Listing:
    """What a store answers from.

    Parameters
    ----------
    parts : sequence of PartReader
        In order.
    snapshot : Snapshot, optional
        Knows about some or all of them what would have to be read otherwise.

    Notes
    -----
    Any property may raise ``DamagedStoreError`` of the part that is read for it.
    """

    def __init__(self, parts: Sequence[PartReader], snapshot: Snapshot | None = None) -> None:
        self.parts = tuple(parts)
        ids = [part.id for part in self.parts]
        self._snapshot = snapshot
        self._whole = snapshot is not None and snapshot.parts == ids
        self._whole = self._whole and all(part.from_snapshot for part in self.parts)
        self._counts = np.array([part.num_utterances for part in self.parts], np.int64)
        self.part_of_row = np.repeat(np.arange(len(ids)), self._counts)
        self.first_row = np.concatenate([[0], np.cumsum(self._counts, dtype=np.int64)])
        self._spans: dict[str, Spans] = {}
        self._shared: dict[tuple[str, ...], Spans] = {}

    @cached_property
    def keys(self) -> np.ndarray:
        """(N, 16) uint8."""
        keys = self._column(lambda s: s.keys, PartReader.keys)
        return keys.reshape(-1, KEY_BYTES).astype(np.uint8, copy=False)

    @cached_property
    def index(self) -> KeyIndex:
        """Row of every key."""
        return self._ask(lambda s: s.index) or KeyIndex(self.keys)

    @cached_property
    def rows(self) -> np.ndarray:
        """Rows that count, of each distinct key the first, in storage order."""
        return np.sort(self.index.rows)

    @cached_property
    def input_length(self) -> np.ndarray:
        """(N,) int64."""
        return self._column(lambda s: s.input_length, PartReader.input_length)

    def spans(self, output: str) -> Spans:
        """Return for every row where its frames start in its part and how many they are."""
        spans = self._spans.get(output)
        if spans is None:
            spans = self._ask(lambda s: s.spans(output)) or self._read_spans(output)
            self._spans[output] = spans
        return spans

    def _read_spans(self, output: str) -> Spans:
        # Layers of a model have the same spans, and the manifest tells without reading them.
        file = f"{output}/{layout.OFFSETS}/{layout.chunk_file(1)}"
        same = tuple(
            part.files[file].xxh3 if file in part.files else part.id for part in self.parts
        )
        if same not in self._shared:
            none = np.empty(0, np.int64)
            offsets = [part.offsets(output) for part in self.parts]
            self._shared[same] = (
                np.concatenate([none, *(o[:-1] for o in offsets)]),
                np.concatenate([none, *(np.diff(o) for o in offsets)]),
            )
        return self._shared[same]

    def _ask(self, question: Callable[[Snapshot], _Answer]) -> _Answer | None:
        """Return what the snapshot says of exactly these parts, None if it does not."""
        if self._snapshot is None or not self._whole:
            return None
        try:
            return question(self._snapshot)
        except ValueError as error:
            logger.info("The index snapshot is not used: %s.", error)
            self._snapshot = None
            return None

    def _column(
        self,
        of_snapshot: Callable[[Snapshot], np.ndarray],
        of_part: Callable[[PartReader], np.ndarray],
    ) -> np.ndarray:
        """Return a value per row, from the snapshot for the parts that it knows."""
        snapshot, known = self._snapshot, None
        if snapshot is not None:
            try:
                known = of_snapshot(snapshot)
            except ValueError as error:
                logger.info("The index snapshot is not used: %s.", error)
                self._snapshot = None
        if known is not None and self._whole:
            return known
        pieces = []
        for part in self.parts:
            if snapshot is None or known is None or not part.from_snapshot:
                pieces.append(of_part(part))
            else:
                number = snapshot.number[part.id]
                begin = int(snapshot.first_row[number])
                pieces.append(known[begin : begin + int(snapshot.utterances[number])])
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)

    def keys_of(self, rows: np.ndarray) -> list[bytes]:
        """Return the keys of rows."""
        data = self.keys[rows].tobytes()
        return [data[at : at + KEY_BYTES] for at in range(0, len(data), KEY_BYTES)]

    def row_in_part(self, rows: np.ndarray) -> np.ndarray:
        """Return rows counted within their part."""
        return rows - self.first_row[self.part_of_row[rows]]

    def columns(self, signatures: np.ndarray, outputs: Sequence[str]) -> Columns:
        """Return what a snapshot holds."""
        return Columns(
            parts=[part.id for part in self.parts],
            signatures=signatures,
            utterances=self._counts,
            num_bytes=np.array([part.num_bytes for part in self.parts], np.int64),
            keys=self.keys,
            input_length=self.input_length,
            index=self.index,
            spans={output: self.spans(output) for output in outputs},
        )
