"""Writing new parts out of utterances that are stored already, bit for bit.

Such a part has a ``generation`` above those it was made from. Of two copies of an utterance the one
in the part of the higher generation stays, and of equal generations the one in the part whose name
comes first. No copy is ever removed but for one that ranks above it, so however many processes tidy
a store at once, the highest copy is never removed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from mer.cache import layout
from mer.cache.errors import DamagedStoreError
from mer.cache.examine import NUM_NAMES, StoreFacts, examine_part, spare_name
from mer.cache.identity import FINGERPRINT_IN_NAME
from mer.cache.raw import raw_of
from mer.cache.spec import FeatureSpec
from mer.cache.staging import write_file
from mer.cache.writer import PartWriter

if TYPE_CHECKING:
    from mer.cache.place import Place

logger = logging.getLogger(__name__)

GENERATION = "generation"
PART_BYTES = 128 << 20


@dataclass(frozen=True, slots=True)
class Stored:
    """One utterance as it is stored.

    Parameters
    ----------
    key : bytes
        16 bytes.
    input_length : int
        Real prepared steps.
    arrays : mapping of str to ndarray
        Every output, (T, D) in the stored type.
    pooled : mapping of str to ndarray
        (2, D) float32 for each output that is pooled.
    """

    key: bytes
    input_length: int
    arrays: Mapping[str, np.ndarray]
    pooled: Mapping[str, np.ndarray]


def rank(generation: int, part: str) -> tuple[int, str]:
    """Return what orders the parts that hold one utterance: the least is the one that stays."""
    return -generation, part


def rewrite(
    place: Place,
    spec: FeatureSpec,
    fingerprint: str,
    utterances: Iterable[Stored],
    *,
    generation: int,
    part_bytes: int = PART_BYTES,
) -> list[str]:
    """Write utterances as new parts, visible and read back when it returns.

    Parameters
    ----------
    place : Place
        The store.
    spec : FeatureSpec
        What it holds.
    fingerprint : str
        Of the store.
    utterances : iterable of Stored
        Need not fit into memory.
    generation : int
        Of the new parts.
    part_bytes : int, default=128 MiB
        Size of a part.

    Returns
    -------
    list of str
        Names of the parts.

    Raises
    ------
    DamagedStoreError
        A new part does not read as it was written. It is in the quarantine. Or an utterance holds
        NaN or an infinity, which no store does. Errors of ``utterances`` are passed on. Of a part
        that has not reached its size by then nothing becomes visible.
    StoreError
        A part cannot be written.
    """
    numbered = _Numbered(place, generation, spec, fingerprint)
    with PartWriter(
        cast(Any, numbered),
        spec,
        fingerprint,
        known=lambda key: False,
        committed=lambda: None,
        part_bytes=part_bytes,
        part_seconds=math.inf,
    ) as writer:
        try:
            for utterance in utterances:
                _check_finite(utterance)
                writer.add_stored(
                    utterance.key, utterance.input_length, utterance.arrays, utterance.pooled
                )
        except BaseException:
            numbered.given_up = True  # leaving the writer would publish what it has
            raise
    for name in numbered.published:
        if not numbered.is_sound(name):
            where = place.quarantine(name)
            raise DamagedStoreError(
                f"Part {name} of {place.url} does not read as it was written. It lies in {where}; "
                "check the disk."
            )
    return numbered.published


def _check_finite(utterance: Stored) -> None:
    for name, frames in utterance.arrays.items():
        pooled = utterance.pooled.get(name)
        sound = frames.dtype.kind != "f" or np.isfinite(frames).all()
        if not sound or (pooled is not None and len(frames) and not np.isfinite(pooled).all()):
            raise DamagedStoreError(
                f"Output {name!r} of utterance {utterance.key.hex()} holds NaN or an infinity."
            )


class _Numbered:
    """A place that gives every part it publishes a generation."""

    def __init__(self, place: Place, generation: int, spec: FeatureSpec, fingerprint: str) -> None:
        self._place = place
        self._generation = generation
        self._facts = StoreFacts(fingerprint[:FINGERPRINT_IN_NAME], fingerprint, spec.outputs)
        self.published: list[str] = []
        self.given_up = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._place, name)

    def publish(self, folder: Path, part: str) -> bool:
        """Publish a part after writing its generation into it."""
        if self.given_up:
            return False
        file = folder / layout.METADATA
        manifest = layout.unseal(file.read_bytes(), str(file))
        del manifest["checksum"]
        manifest[GENERATION] = self._generation
        for number in range(NUM_NAMES):
            # Where a name is taken by what is damaged, or another's under an exchanged name, that
            # keeps it: nobody may have salvaged it yet.
            name = spare_name(part, number)
            manifest["part"] = name
            file.unlink()
            write_file(file, [layout.to_bytes(layout.group_document(manifest))])
            new = self._place.publish(folder, name)
            if new or self.is_sound(name):
                self.published.append(name)
                return new
        raise DamagedStoreError(
            f"Part {part} of {self._place.url} is there {NUM_NAMES} times and damaged each time. "
            "Run `mer cache verify --repair`."
        )

    def is_sound(self, part: str) -> bool:
        """Read all of a part."""
        raw = raw_of(self._place)
        found = raw.listing(f"/{layout.PARTS}/{part}")
        examined = examine_part(raw, part, found, self._facts)
        return examined is None or not examined.faults
