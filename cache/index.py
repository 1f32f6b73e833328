"""Which row a key lies in: sorted keys, vectorised look-up."""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from mer.cache.identity import KEY_BYTES

_PAIR = struct.Struct(">QQ")
_WORDS = np.dtype([("high", ">u8"), ("low", ">u8")])


def key_array(keys: Sequence[bytes]) -> np.ndarray:
    """Return keys as (N, 16) uint8.

    Raises
    ------
    TypeError
        A key that is not bytes.
    ValueError
        A key that has not 16 bytes.
    """
    for key in keys:
        check_key(key)
    return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES)


def check_key(key: bytes) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless ``key`` is 16 bytes."""
    if type(key) is bytes and len(key) == KEY_BYTES:  # as good as always
        return
    if not isinstance(key, bytes | bytearray | memoryview):
        raise TypeError(
            f"{key!r:.60} is no key: a key is {KEY_BYTES} bytes. "
            "mer.pipelines.caching.utterance_keys finds those of a data set; "
            "bytes.fromhex reads one that was printed."
        )
    if len(key) != KEY_BYTES:
        raise ValueError(f"A key has {len(key)} bytes, expected {KEY_BYTES}.")


class KeyIndex:
    """Row of a key, for any number of keys at once.

    Parameters
    ----------
    keys : ndarray
        (N, 16) uint8, all rows of all parts in part order. Of equal keys the first is found.
    """

    def __init__(self, keys: np.ndarray) -> None:
        high, low = _words(keys)
        order = np.lexsort((low, high))  # stable: equal keys stay in part order
        high, low = high[order], low[order]
        first = np.ones(len(order), bool)
        first[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
        self._set(high[first], low[first], order[first], keys)

    @classmethod
    def from_sorted(
        cls, high: np.ndarray, low: np.ndarray, rows: np.ndarray, keys: np.ndarray
    ) -> KeyIndex:
        """Return an index whose arrays were taken from another's ``sorted_arrays``."""
        index = cls.__new__(cls)
        index._set(high, low, rows, keys)
        return index

    def _set(self, high: np.ndarray, low: np.ndarray, rows: np.ndarray, keys: np.ndarray) -> None:
        self._high, self._low, self._rows = high, low, rows
        # For single keys: items of a memoryview are Python's own integers.
        self._views = [memoryview(cast(Any, np.ascontiguousarray(a))) for a in (high, low, rows)]
        # Keys are hashes: that two share their first eight bytes is possible, not to be expected.
        shared = bool((high[1:] == high[:-1]).any())
        self._whole = _strings(keys[rows]) if shared else None

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def sorted_arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """First and second half of the distinct keys, (N',) uint64, in order, and their rows."""
        return self._high, self._low, self._rows

    @property
    def rows(self) -> np.ndarray:
        """Rows of the distinct keys, (N',) int64, in no particular order."""
        return self._rows

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Return the rows of (M, 16) uint8 keys, (M,) int64, -1 where a key is not there."""
        high, low = _words(keys)
        if not len(self):
            return np.full(len(high), -1, np.int64)
        if self._whole is None:
            at = np.searchsorted(self._high, high)
        else:
            at = np.searchsorted(self._whole, _strings(keys))
        np.minimum(at, len(self) - 1, out=at)
        hit = (self._high[at] == high) & (self._low[at] == low)
        return np.where(hit, self._rows[at], -1)

    def find_one(self, key: bytes) -> int:
        """Return the row of one key, -1 if it is not there, ten times faster than ``find``."""
        check_key(key)
        high, low = _PAIR.unpack(key)
        highs, lows, rows = self._views
        at = bisect_left(highs, high)
        while at < len(highs) and highs[at] == high:
            if lows[at] == low:
                return int(rows[at])
            at += 1
        return -1


def _strings(keys: np.ndarray) -> np.ndarray:
    """Return keys as strings of bytes, which sort as their words do but ten times more slowly."""
    return np.ascontiguousarray(keys, np.uint8).view(f"S{KEY_BYTES}").reshape(-1)


def _words(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    words = np.ascontiguousarray(keys, np.uint8).reshape(-1, KEY_BYTES).view(_WORDS)[:, 0]
    return words["high"].astype(np.uint64), words["low"].astype(np.uint64)
