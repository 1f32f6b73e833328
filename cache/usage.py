"""``mer cache du``: what takes the space of a store, whether it can be opened or not."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mer.cache import layout
from mer.cache.identity import FINGERPRINT_IN_NAME
from mer.cache.raw import TEMPORARY_SUFFIX, raw_of
from mer.cache.store import Store

if TYPE_CHECKING:
    from mer.cache.home import Cache

_BESIDE = re.compile(
    rf"(.+-[0-9a-f]{{{FINGERPRINT_IN_NAME}}})\."
    r"(tmp|quarantine|index(\.[0-9a-f]{32})?|parts\.json)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreUsage:
    """Bytes on disk of one store, by what they are for.

    Parameters
    ----------
    store : str
        Name, or ``"total"``.
    frames : dict of str to int
        By output.
    pooled : int
        Means and standard deviations per utterance.
    index : int
        Keys, lengths and row bounds.
    metadata : int
        Zarr metadata and manifests.
    other : int
        Files that the format does not know.
    snapshot, temporary, quarantine : int
        Beside the store: the snapshot that makes opening fast, what is being written or was left,
        what a repair took out.
    parts, files : int
        How many there are in the store.
    """

    store: str
    frames: dict[str, int] = field(default_factory=dict)
    pooled: int = 0
    index: int = 0
    metadata: int = 0
    other: int = 0
    snapshot: int = 0
    temporary: int = 0
    quarantine: int = 0
    parts: int = 0
    files: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        inside = self.pooled + self.index + self.metadata + self.other
        beside = self.snapshot + self.temporary + self.quarantine
        return sum(self.frames.values()) + inside + beside


def usage(store: Store) -> StoreUsage:
    """Return what a store takes.

    Raises
    ------
    StoreError
        It cannot be listed.
    """
    raw = raw_of(store.place)
    listing = raw.listing()
    frames: dict[str, int] = {}
    sums = dict.fromkeys(("pooled", "index", "metadata", "other"), 0)
    for name, file in listing.files.items():
        output, kind = _kind(name)
        if kind == layout.FRAMES:
            frames[output] = frames.get(output, 0) + file.bytes
        else:
            sums[kind] += file.bytes
    beside = {
        suffix: sum(file.bytes for file in raw.listing(suffix).files.values())
        for suffix in (layout.INDEX_SUFFIX, TEMPORARY_SUFFIX, layout.QUARANTINE_SUFFIX)
    }
    return StoreUsage(
        store=raw.name,
        frames=frames,
        snapshot=beside[layout.INDEX_SUFFIX],
        temporary=beside[TEMPORARY_SUFFIX],
        quarantine=beside[layout.QUARANTINE_SUFFIX],
        parts=len(listing.by_part()),
        files=len(listing.files),
        **sums,
    )


def left_behind(cache: Cache) -> list[Store]:
    """Return the stores that are not there any more, of which something still lies beside.

    ``usage`` of one counts its quarantine and what processes that are gone have left.
    """
    bucket = getattr(cache.home, "bucket", None)
    if bucket is not None:
        names = [] if bucket.is_web else bucket.folders()
    else:
        try:
            names = os.listdir(cache.root)
        except OSError:
            return []
    found = {match[1] for name in names if (match := _BESIDE.fullmatch(name)) is not None}
    return [Store(cache.home.place(name)) for name in sorted(found.difference(names))]


def total_usage(usages: Sequence[StoreUsage]) -> StoreUsage:
    """Return the sum over stores; frames are summed over stores by the name of their output."""
    frames: dict[str, int] = {}
    for its in usages:
        for output, num_bytes in its.frames.items():
            frames[output] = frames.get(output, 0) + num_bytes
    fields = ("pooled", "index", "metadata", "other", "snapshot", "temporary", "quarantine")
    counts = ("parts", "files")
    return StoreUsage(
        store="total",
        frames=frames,
        **{name: sum(getattr(its, name) for its in usages) for name in (*fields, *counts)},
    )


def _kind(name: str) -> tuple[str, str]:
    """Return the output a file of a store belongs to, and what it is for."""
    if name.rsplit("/", 1)[-1] == layout.METADATA:
        return "", "metadata"
    steps = name.split("/")
    if steps[0] != layout.PARTS or len(steps) < 5 or "c" not in steps[3:5]:
        return "", "other"
    if steps[2] in (layout.KEY, layout.INPUT_LENGTH):
        return "", "index"
    kinds = {layout.OFFSETS: "index", layout.POOLED: "pooled", layout.FRAMES: layout.FRAMES}
    return steps[2], kinds.get(steps[3], "other")
