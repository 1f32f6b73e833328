"""``mer cache verify``: every byte of a store is checked; ``--repair`` loses only what is lost.

What follows from a manifest is made anew in its place. A part with other damage is written again
without the utterances that touch it; the new part is visible before the damaged one is moved to
``<store>.quarantine``. A process that is killed in between leaves utterances that are stored twice,
and the next run goes on from there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mer.cache import layout, snapshot
from mer.cache.errors import DamagedStoreError, StoreError, StoreFormatError
from mer.cache.examine import (
    FOREIGN,
    Examination,
    Fault,
    Progress,
    StoreFacts,
    examine_part,
    is_foreign,
    newer_format,
    respelled,
)
from mer.cache.identity import FINGERPRINT_IN_NAME, fingerprint
from mer.cache.index import KeyIndex
from mer.cache.place import is_store_name
from mer.cache.raw import Listing, Raw, raw_of
from mer.cache.rewrite import Stored, rewrite
from mer.cache.salvage import Salvage
from mer.cache.snapshot import Snapshot
from mer.cache.spec import FeatureSpec

if TYPE_CHECKING:
    from mer.cache.store import Store

Key = bytes  # within the report ``bytes`` is a number

logger = logging.getLogger(__name__)

_TRIES = 5
_UNFORESEEN = (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError)
_PARTS_METADATA = f"{layout.PARTS}/{layout.METADATA}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Corruption:
    """One file that is not what was written.

    Parameters
    ----------
    store : str
        Path or URL of the store.
    part : str or None
        Name of the part; None for the metadata of the store itself.
    file : str
        Below the part, or below the store.
    reason : str
        What is wrong with it.
    utterances : tuple of bytes
        Keys that ``--repair`` loses by it: those that touch the damaged bytes, none where the
        damage can be put right.
    restorable : bool
        Whether the file can be made anew and proven right.
    """

    store: str
    part: str | None
    file: str
    reason: str
    utterances: tuple[bytes, ...] = ()
    restorable: bool = False

    def __str__(self) -> str:
        where = "" if self.part is None else f"{layout.PARTS}/{self.part}/"
        return f"{self.store}/{where}{self.file} {self.reason}."


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyReport:
    """What was checked and found.

    Parameters
    ----------
    stores, parts, files, bytes, utterances : int
        Looked at; ``utterances`` counts distinct ones.
    corrupt : tuple of Corruption
        Everything that is damaged, or was before it was repaired.
    repaired : tuple of str
        Files made anew and parts written again.
    quarantined : tuple of str
        Where what was taken out lies now.
    notes : tuple of str
        What is worth knowing and no damage.
    """

    stores: int
    parts: int
    files: int
    bytes: int
    utterances: int
    corrupt: tuple[Corruption, ...] = ()
    repaired: tuple[str, ...] = ()
    quarantined: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def lost(self) -> tuple[Key, ...]:
        """Keys of all utterances that are, or will be, lost by damage, each once."""
        return tuple(sorted({key for fault in self.corrupt for key in fault.utterances}))


def total_bytes(stores: Sequence[Store]) -> int:
    """Return how many bytes ``verify`` will read, for a progress bar."""
    return sum(
        file.bytes for store in stores for file in raw_of(store.place).listing().files.values()
    )


def verify(
    stores: Sequence[Store],
    *,
    repair: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Read every byte of some stores and compare it with what was written.

    It never stops at a fault and needs no store that opens.

    Parameters
    ----------
    stores : sequence of Store
        Those to check.
    repair : bool, default=False
        Put right what can be, take out what cannot. Afterwards a store holds sound utterances only
        and everything that was taken out lies in ``<store>.quarantine``.
    workers : int, optional
        Parts looked at simultaneously: 4 in folders, 16 on object stores.
    progress : callable, optional
        Called with the number of bytes read since the last call, by several threads.

    Raises
    ------
    StoreError
        A store cannot be listed at all.
    UsageError
        A store to be repaired lies behind a web server.
    """
    found = _Findings()
    for store in stores if repair else ():
        raw_of(store.place).check_writable()
    for store in stores:
        _Verifier(store, found, workers, progress or _ignore).run(repair)
    return VerifyReport(
        stores=len(stores),
        parts=found.parts,
        files=found.files,
        bytes=found.bytes,
        utterances=found.utterances,
        corrupt=tuple(found.corrupt),
        repaired=tuple(found.repaired),
        quarantined=tuple(found.quarantined),
        notes=tuple(found.notes),
    )


def _ignore(num_bytes: int) -> None:
    pass


@dataclass(slots=True)
class _Findings:
    parts: int = 0
    files: int = 0
    bytes: int = 0
    utterances: int = 0
    corrupt: list[Corruption] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)
    quarantined: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class _Verifier:
    """Verifies one store."""

    def __init__(
        self, store: Store, found: _Findings, workers: int | None, progress: Progress
    ) -> None:
        self._place = store.place
        self._raw: Raw = raw_of(self._place)
        self._found = found
        self._progress = progress
        self._workers = workers or (4 if self._place.path is not None else 16)
        self._metadata: list[Fault] = []  # of the store itself
        self._left: set[str] = set()  # metadata that repair leaves alone
        self._stamps: dict[str, str] = {}  # of the parts as they were examined
        self._told: set[tuple[str, str, str]] = set()  # part, file, reason

    def run(self, repair: bool) -> None:
        """Check, report, and repair if asked to."""
        listing = self._raw.listing()
        if is_foreign(self._place, listing):
            self._note(FOREIGN)
            return
        facts = self._root(listing)
        self._parts_group(listing)
        by_part = listing.by_part()
        self._strangers(listing, by_part)
        parts = self._examine_all(by_part, facts)
        self._report(parts)
        self._compare_copies(parts)
        if repair:
            for examined in parts:
                self._attempt(examined.part, lambda e=examined: self._repair(e, facts))  # type: ignore[misc]
            self._attempt(layout.METADATA, self._repair_metadata)

    # The store itself --------------------------------------------------------------------------

    def _root(self, listing: Listing) -> StoreFacts:
        """Check the root's metadata and return what it tells."""
        facts = StoreFacts(_digits(self._raw.name))
        for name, why in listing.unreadable.items():
            if not name:
                self._fault("", f"cannot be read: {why}", left=True)
                return facts
        try:
            data = self._raw.read(layout.METADATA).tobytes()
        except FileNotFoundError:
            if self._awaits_root():
                self._note("waits for `mer extract` to make its metadata anew")
            else:
                self._fault(
                    layout.METADATA,
                    "is missing: the store has no metadata; `mer extract` makes it anew",
                    left=True,
                )
            return facts
        except (OSError, StoreError) as error:
            self._fault(layout.METADATA, f"cannot be read: {_why(error)}", left=True)
            return facts
        self._count(1, len(data))
        try:
            mer = layout.unseal(data, layout.METADATA)
            known = _facts(mer, facts.digits)
        except StoreFormatError:
            version = newer_format(data)
            if version is None:
                self._fault(layout.METADATA, "is not the metadata of a store any more")
            else:
                self._note(f"has format {version}, which this release cannot check: update mer")
            return facts
        except DamagedStoreError as error:
            reason = str(error).removeprefix(layout.METADATA).strip().rstrip(".")
            self._fault(layout.METADATA, reason)
            return facts
        except (KeyError, TypeError, ValueError) as error:
            self._fault(layout.METADATA, f"does not describe a store ({error!r})")
            return facts
        text = respelled(data, mer)
        if text is not None:
            self._fault(
                layout.METADATA, "is not spelled as it was written", mend=lambda: iter([text])
            )
        if (
            known.fingerprint is not None
            and facts.digits
            and known.fingerprint[:FINGERPRINT_IN_NAME] != facts.digits
        ):
            if text is None:
                self._fault(
                    layout.METADATA,
                    f"is that of another store, the one with the fingerprint {known.fingerprint}",
                )
            return facts
        return replace(known, remembered=self._remembered(known))

    def _remembered(self, facts: StoreFacts) -> Snapshot | None:
        path = self._place.index_path()
        if path is None or facts.fingerprint is None:
            return None
        return snapshot.read(path, facts.fingerprint, [o.name for o in facts.outputs or ()])

    def _awaits_root(self) -> bool:
        """Whether a repair has taken the root's metadata out."""
        listing = self._raw.listing(layout.QUARANTINE_SUFFIX)
        return any(name.startswith(f"{layout.METADATA}-") for name in listing.files)

    def _parts_group(self, listing: Listing) -> None:
        expected = layout.to_bytes(layout.group_document())
        reason = None
        try:
            data = self._raw.read(_PARTS_METADATA).tobytes()
            self._count(1, len(data))
            if data != expected:
                reason = "is not what was written"
        except (FileNotFoundError, NotADirectoryError):
            reason = "is missing"
        except (OSError, StoreError) as error:
            self._fault(_PARTS_METADATA, f"cannot be read: {_why(error)}", left=True)
        if reason is not None:
            self._fault(_PARTS_METADATA, reason, mend=lambda: iter([expected]))
        why = listing.unreadable.get(layout.PARTS)
        if why is not None:
            self._fault(layout.PARTS, f"cannot be read: {why}", left=True)

    def _strangers(self, listing: Listing, known: Mapping[str, Listing]) -> None:
        """Note what the format has no place for."""
        strangers = set()
        for name in [*listing.files, *listing.folders, *listing.unreadable]:
            head, _, rest = name.partition("/")
            entry = rest.partition("/")[0]
            if name in ("", layout.METADATA, layout.PARTS, _PARTS_METADATA):
                continue
            if head != layout.PARTS:
                strangers.add(head)
            elif entry not in known:
                strangers.add(f"{layout.PARTS}/{entry}")
        for name in sorted(strangers):
            self._note(f"holds {name}, which is no part of a store")

    def _fault(
        self,
        file: str,
        reason: str,
        mend: Callable[[], Iterator[Any]] | None = None,
        left: bool = False,
    ) -> None:
        self._metadata.append(Fault(file, reason, mend=mend))
        if left:
            self._left.add(file)
        self._found.corrupt.append(
            Corruption(
                store=self._raw.url,
                part=None,
                file=file,
                reason=reason,
                restorable=mend is not None,
            )
        )

    def _note(self, text: str) -> None:
        self._found.notes.append(f"{self._raw.url} {text}.")

    def _count(self, files: int, num_bytes: int) -> None:
        self._found.files += files
        self._found.bytes += num_bytes
        self._progress(num_bytes)

    # Parts -------------------------------------------------------------------------------------

    def _examine_all(self, parts: dict[str, Listing], facts: StoreFacts) -> list[Examination]:
        """Examine what is there, and what parts that disappear meanwhile were merged into."""
        examined: dict[str, Examination] = {}
        for _ in range(_TRIES):
            parts = self._finished(parts)
            examined |= {part.part: part for part in self._examine(parts, facts)}
            if parts.keys() <= examined.keys():
                break
            listed = self._raw.listing().by_part()
            examined = {name: part for name, part in examined.items() if name in listed}
            parts = {name: its for name, its in listed.items() if name not in examined}
        return [examined[name] for name in sorted(examined)]

    def _finished(self, parts: dict[str, Listing]) -> dict[str, Listing]:
        """Leave out what is being uploaded to an object store, and no part yet."""
        if self._place.path is not None:
            return parts
        return {name: its for name, its in parts.items() if layout.METADATA in its.files}

    def _examine(self, parts: dict[str, Listing], facts: StoreFacts) -> list[Examination]:
        def one(item: tuple[str, Listing]) -> Examination | None:
            return self._examine_one(*item, facts)

        if self._workers == 1:
            examined = [one(item) for item in parts.items()]
        else:
            with ThreadPoolExecutor(self._workers, "mer-verify") as pool:
                examined = list(pool.map(one, parts.items()))
        return [part for part in examined if part is not None]

    def _examine_one(self, part: str, found: Listing, facts: StoreFacts) -> Examination | None:
        """Examine a part, again if it was another before than afterwards."""
        stamp = self._stamp(part)
        for _ in range(_TRIES):
            examined = self._judge(part, found, facts)
            before, stamp = stamp, self._stamp(part)
            if examined is None:
                return None
            if before == stamp:
                if stamp is not None:
                    self._stamps[part] = stamp
                return examined
            found = self._raw.listing(f"/{layout.PARTS}/{part}")
        # Nothing can be said of what is never the same twice.
        return Examination(part, judged=False, notes=["was replaced again and again meanwhile"])

    def _judge(self, part: str, found: Listing, facts: StoreFacts) -> Examination | None:
        try:
            return examine_part(self._raw, part, found, facts, self._progress)
        except _UNFORESEEN as error:  # one part must not keep the others from being looked at
            logger.warning("Part %s of %s", part, self._raw.url, exc_info=error)
            fault = Fault(layout.METADATA, f"describes what cannot be checked ({error!r})")
            return Examination(part, faults=[fault], judged=False)

    def _stamp(self, part: str) -> str | None:
        """Return what tells a part from another of its name; None if nobody can be asked."""
        try:
            return self._raw.stamps([part])[part]
        except (OSError, StoreError):  # examining it will say why
            return None

    def _is_as_examined(self, part: str) -> bool:
        stamp = self._stamp(part)
        return stamp is not None and stamp == self._stamps.get(part)

    def _report(self, parts: list[Examination]) -> None:
        found = self._found
        for examined in parts:
            found.parts += 1
            found.files += examined.files
            found.bytes += examined.bytes
            self._report_faults(examined)

    def _report_faults(self, examined: Examination) -> None:
        for fault in examined.faults:
            told = (examined.part, fault.file, fault.reason)
            if told in self._told:
                continue
            self._told.add(told)
            self._found.corrupt.append(
                Corruption(
                    store=self._raw.url,
                    part=examined.part,
                    file=fault.file,
                    reason=fault.reason,
                    utterances=_lost_keys(examined, fault),
                    restorable=fault.mend is not None,
                )
            )
        for note in examined.notes:
            self._note(f"part {examined.part} {note}")

    def _compare_copies(self, parts: list[Examination]) -> None:
        """Note utterances that are stored more than once, and whether their values differ."""
        owners = np.repeat(np.arange(len(parts)), [part.num_utterances for part in parts])
        rows = np.concatenate(
            [np.empty(0, np.int64), *(np.arange(p.num_utterances) for p in parts)]
        )
        sound = np.concatenate([np.empty(0, bool), *(part.sound() for part in parts)])
        owners, rows = owners[sound], rows[sound]
        if not len(rows):
            return
        keys = np.concatenate([part.keys[part.sound()] for part in parts])
        distinct = len(KeyIndex(keys))
        self._found.utterances += distinct
        if distinct == len(keys):
            return
        group = np.unique(keys, axis=0, return_inverse=True)[1]
        order = np.argsort(group.reshape(-1), kind="stable")
        bounds = np.flatnonzero(np.diff(group.reshape(-1)[order])) + 1
        readers = [Salvage(self._raw, part) for part in parts]
        copies = 0
        differing: dict[str, tuple[int, float]] = {}
        for same in np.split(order, bounds):
            if len(same) == 1 or len(set(owners[same].tolist())) == 1:
                continue
            copies += 1
            first = _stored(readers[owners[same[0]]], rows[same[0]])
            for other in same[1:]:
                again = _stored(readers[owners[other]], rows[other])
                for output, largest in _differences(first, again):
                    count, so_far = differing.get(output, (0, 0.0))
                    differing[output] = count + 1, max(so_far, largest)
        if copies:
            self._note(
                f"holds {copies} utterances in more than one part; `mer cache gc` merges them"
            )
        for output, (count, largest) in differing.items():
            self._note(
                f"holds other values for {count} utterances in another part: "
                f"output {output!r} differs by up to {largest:.4g}"
            )

    # Repair ------------------------------------------------------------------------------------

    def _attempt(self, what: str, repair: Callable[[], None]) -> None:
        try:
            repair()
        # A ValueError is what the writer refuses, or a file that nobody has foreseen.
        except (StoreError, OSError, ValueError) as error:
            logger.warning("%s of %s could not be repaired: %s", what, self._raw.url, error)
            self._note(f"could not be repaired ({what}): {_why(error)}")

    def _repair(self, examined: Examination, facts: StoreFacts) -> None:
        part = examined.part
        mended: set[str] = set()
        for _ in range(_TRIES):
            if not examined.faults:
                return
            if not examined.judged:
                self._note(f"part {part} could not be read and was left as it is")
                return
            if self._repair_as_examined(examined, facts, mended):
                return
            # It was mended, or another process has put other bytes in its place: those of now
            # count, and nothing is taken out that was not examined.
            found = self._raw.listing(f"/{layout.PARTS}/{part}")
            again = self._examine_one(part, found, facts)
            if again is None:
                return
            examined = again
            self._report_faults(examined)
        self._note(f"part {part} was changed again and again meanwhile and was left as it is")

    def _repair_as_examined(
        self, examined: Examination, facts: StoreFacts, mended: set[str]
    ) -> bool:
        """Repair a part; False if it has to be examined once more."""
        part = examined.part
        if examined.whole:
            return self._quarantine(part)
        todo = [f for f in examined.faults if f.mend is not None and f.file not in mended]
        for fault in todo:
            if fault is todo[0] and not self._is_as_examined(part):
                return False
            self._mend(f"{layout.PARTS}/{part}/{fault.file}", fault)
            mended.add(fault.file)
        if all(fault.mend is not None for fault in examined.faults):
            return True
        if todo or not self._is_as_examined(part):
            return False
        rows = np.flatnonzero(examined.sound())
        if len(rows):
            store = examined.manifest.get("store", facts.fingerprint)
            if store is None:
                self._note(
                    f"part {part} can be repaired once the store has its metadata again: run "
                    "`mer extract`, then `mer cache verify --repair`"
                )
                return True
            # What readers never look at follows from the shapes; slug and identity are for people.
            spec = FeatureSpec(slug=self._raw.name, identity={}, outputs=examined.outputs)
            salvage = Salvage(self._raw, examined)
            utterances = (salvage.read(int(row)) for row in rows)
            generation = int(examined.manifest.get("generation", 0)) + 1
            new = rewrite(self._place, spec, store, utterances, generation=generation)
            self._found.repaired += [f"{self._raw.url}/{layout.PARTS}/{name}" for name in new]
        return self._quarantine(part)

    def _repair_metadata(self) -> None:
        for fault in self._metadata:
            if fault.mend is not None:
                self._mend(fault.file, fault)
            elif fault.file in self._left:
                continue
            else:
                where = self._raw.set_aside(fault.file)
                self._found.quarantined.append(where)

    def _mend(self, file: str, fault: Fault) -> None:
        assert fault.mend is not None
        self._raw.replace(file, fault.mend())
        self._found.repaired.append(f"{self._raw.url}/{file}")

    def _quarantine(self, part: str) -> bool:
        """Take a part out; False if it is not the one any more that was examined."""
        if not self._is_as_examined(part):
            return False
        self._found.quarantined.append(self._place.quarantine(part))
        return True


def _digits(name: str) -> str:
    """Return the digits that end a store's name; none of a folder that was renamed."""
    return name[-FINGERPRINT_IN_NAME:] if is_store_name(name) else ""


def _facts(mer: dict[str, Any], digits: str) -> StoreFacts:
    """Return what the sealed attributes of a store say."""
    if mer["fingerprint"] != fingerprint(mer["identity"]):
        raise ValueError("it names another fingerprint than its identity has")
    outputs = tuple(layout.output_from_json(fields) for fields in mer["outputs"])
    return StoreFacts(digits, str(mer["fingerprint"]), outputs)


def _lost_keys(examined: Examination, fault: Fault) -> tuple[bytes, ...]:
    if fault.lost is None or not examined.num_utterances:
        return ()
    return tuple(key.tobytes() for key in examined.keys[fault.lost])


def _stored(part: Salvage, row: np.integer) -> Stored | None:
    try:
        return part.read(int(row))
    except (OSError, StoreError, ValueError):  # removed or changed meanwhile
        return None


def _differences(first: Stored | None, again: Stored | None) -> Iterator[tuple[str, float]]:
    """Yield the outputs in which two copies differ, and by how much."""
    if first is None or again is None:
        return
    for name, ours in first.arrays.items():
        theirs = again.arrays[name]
        if ours.shape != theirs.shape:
            yield name, float("inf")
        elif ours.tobytes() != theirs.tobytes():
            gap = np.abs(ours.astype(np.float64) - theirs.astype(np.float64))
            largest = float(gap.max(initial=0))
            if largest:
                yield name, largest


def _why(error: Exception) -> str:
    why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return why.rstrip(".")
