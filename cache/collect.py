"""``mer cache gc``: what to remove from a cache, said first, then done.

What is dropped is chosen by criteria that all have to hold: of these extractors, committed before
this time, used by no manifest; and with a size limit, the oldest of that until the rest fits.
Without a criterion nothing is dropped. In any case utterances that are stored twice are stored once
afterwards, small parts are merged, and what processes that are gone have left is swept.

New parts are visible and read back before those they replace go. A copy is removed only for one
that ranks above it (``rewrite.rank``), is there, and reads without fault; so neither a kill nor
another ``gc`` at the same time loses the last copy of anything.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mer.cache import layout
from mer.cache.errors import DamagedStoreError, StoreError
from mer.cache.examine import StoreFacts, examine_part, is_foreign
from mer.cache.identity import FINGERPRINT_IN_NAME, KEY_BYTES
from mer.cache.index import KeyIndex, key_array
from mer.cache.place import is_store_name
from mer.cache.raw import TEMPORARY_SUFFIX, raw_of
from mer.cache.reader import PartGoneError, PartReader
from mer.cache.rewrite import GENERATION, PART_BYTES, Stored, rank, rewrite
from mer.cache.spec import FeatureSpec
from mer.cache.store import Store
from mer.cache.usage import left_behind

if TYPE_CHECKING:
    from mer.cache.home import Cache
    from mer.cache.place import Place

logger = logging.getLogger(__name__)

SMALL_BYTES = 32 << 20
_ABANDONED_FILE_S = 3600.0
_UNFINISHED = re.compile(r"\.[0-9a-f]{32}")  # behind the name of a snapshot that is being written
PARTS_SUFFIX = ".parts.json"  # beside a store that web servers hand out: the list of its parts

_TRIES = 5

DROP_STORE = "drop store"
DROP_PART = "drop part"
REWRITE = "rewrite parts"
MERGE = "merge parts"
SWEEP = "sweep"
DROP_QUARANTINE = "drop quarantine"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One thing to do.

    Parameters
    ----------
    store : str
        Name of the store.
    action : str
        ``"drop store"``, ``"drop part"``, ``"rewrite parts"``, ``"merge parts"``, ``"sweep"`` or
        ``"drop quarantine"``.
    parts : tuple of str
        Parts that are gone afterwards.
    utterances : int
        Utterances that the store does not hold afterwards.
    bytes : int
        Bytes that it frees, as far as known beforehand.
    reason : str
        Why: how many utterances match which criterion, are stored twice, and so on.
    criterion : str
        What the utterances that go have in common, as ``reason`` says it.
    kept : mapping of str to ndarray
        Rows of each part that go on in a new one.
    copies : mapping of str to ndarray
        Rows of each part that are dropped because another part holds the same key.
    lost : mapping of str to int
        How many of the utterances each part holds.
    stamps : mapping of str to str
        What tells each part from one that is committed under its name later.
    """

    store: str
    action: str
    parts: tuple[str, ...] = ()
    utterances: int = 0
    bytes: int = 0
    reason: str = ""
    criterion: str = ""
    kept: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)
    copies: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)
    lost: Mapping[str, int] = field(default_factory=dict, repr=False, compare=False)
    stamps: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class GcPlan:
    """What ``run`` will do.

    Parameters
    ----------
    steps : tuple of Step
        In order.
    bytes_before : int
        Size of the chosen stores.
    notes : tuple of str
        What was left out, and why.
    places : mapping of str to Store
        The stores, by name.
    """

    steps: tuple[Step, ...]
    bytes_before: int
    notes: tuple[str, ...] = ()
    places: Mapping[str, Store] = field(default_factory=dict, repr=False, compare=False)

    @property
    def bytes_freed(self) -> int:
        """Bytes that all steps free, as far as known beforehand."""
        return sum(step.bytes for step in self.steps)

    @property
    def utterances(self) -> int:
        """Utterances that are dropped."""
        return sum(step.utterances for step in self.steps)

    @property
    def totals(self) -> tuple[Step, ...]:
        """One step for each store and action, which is enough for people to read."""
        groups: dict[tuple[str, str], list[Step]] = {}
        for step in self.steps:
            groups.setdefault((step.store, step.action), []).append(step)
        return tuple(_sum(steps) for steps in groups.values())


def _sum(steps: Sequence[Step]) -> Step:
    if len(steps) == 1:
        return steps[0]
    first = steps[0]
    parts = tuple(part for step in steps for part in step.parts)
    utterances = sum(step.utterances for step in steps)
    copies = sum(len(rows) for step in steps for rows in step.copies.values())
    return Step(
        store=first.store,
        action=first.action,
        parts=parts,
        utterances=utterances,
        bytes=sum(step.bytes for step in steps),
        reason=_reason(first.action, first.criterion, utterances, copies, len(parts)),
        criterion=first.criterion,
    )


def _reason(action: str, criterion: str, utterances: int, copies: int, parts: int) -> str:
    reasons = []
    if utterances:
        reasons.append(f"{utterances} utterances {criterion}")
    if copies:
        reasons.append(f"{copies} utterances are stored twice")
    if action == MERGE:
        reasons.append(f"{parts} small parts")
    return ", ".join(reasons) or "all of it is stored elsewhere"


@dataclass(frozen=True, slots=True, kw_only=True)
class GcReport:
    """What ``run`` did.

    Parameters
    ----------
    bytes_freed : int
        By which the stores are smaller.
    utterances : int
        Dropped.
    stores_dropped, parts_dropped, parts_merged, parts_written : int
        ``parts_merged`` counts those that went into new ones.
    notes : tuple of str
        What was not done, and why.
    """

    bytes_freed: int = 0
    utterances: int = 0
    stores_dropped: int = 0
    parts_dropped: int = 0
    parts_merged: int = 0
    parts_written: int = 0
    notes: tuple[str, ...] = ()


Keep = Mapping[str, "set[bytes]"] | set[bytes]


def plan(
    cache: Cache,
    *,
    older_than_s: float | None = None,
    max_bytes: int | None = None,
    extractors: Sequence[str] = (),
    keep: Keep | None = None,
    stores: Sequence[Store] | None = None,
    compact: bool = True,
    quarantine: bool = False,
    now: float | None = None,
) -> GcPlan:
    """Return what can be removed; nothing is changed.

    Parameters
    ----------
    cache : Cache
        Where.
    older_than_s : float, optional
        Drop only what was committed longer ago, in seconds.
    max_bytes : int, optional
        Drop the oldest parts, as the other criteria allow, until the chosen stores fit.
    extractors : sequence of str
        Choose stores by the name of their extractor, their slug or their own name; ``*`` and ``?``
        match anything. Without another criterion these stores are dropped as a whole.
    keep : set of bytes, or mapping of str to set of bytes, optional
        Keys in use, in any store or by the name of the store; only others are dropped. A store
        that a mapping does not name is not used at all.
    stores : sequence of Store, optional
        Only these.
    compact : bool, default=True
        Merge small parts.
    quarantine : bool, default=False
        Delete damaged parts that ``verify --repair`` has taken out.
    now : float, optional
        The time, in seconds since 1970.

    Notes
    -----
    A store that cannot be opened is left as it is, with a note; one that is damaged is dropped
    where nothing but its extractor was asked for, one that only did not answer never is.
    """
    steps: list[Step] = []
    notes: list[str] = []
    tables: list[_Table] = []
    places: dict[str, Store] = {}
    matched: set[str] = set()
    whole = bool(extractors) and older_than_s is None and keep is None and max_bytes is None
    criterion = older_than_s is not None or keep is not None
    before = None if older_than_s is None else (time.time() if now is None else now) - older_than_s
    told = _criterion(older_than_s, max_bytes, keep is not None)

    def clear_up(store: Store) -> None:
        try:
            steps.extend(_leftovers(store, quarantine, places))
        except StoreError as error:
            notes.append(f"What lies beside {store.name} is left as it is: {error}")

    for store in cache.stores() if stores is None else stores:
        patterns = _matching(store, extractors, notes)
        if extractors and not patterns:
            continue
        matched |= patterns
        why = _why(store, patterns)
        try:
            table = _look_at(store)
        except StoreError as error:
            step = _drop_damaged(store, error, why) if whole else None
            if step is None:
                notes.append(f"{store.name} is left as it is: {error}")
            else:
                places[store.name] = store
                steps.append(step)
            clear_up(store)
            continue
        table.criterion = why if whole else f"{told} ({why})" if why else told
        places[store.name] = store
        tables.append(table)
        if whole:
            table.drop(np.ones(table.num_rows, bool))
            continue
        if criterion or max_bytes is not None:
            used = None
            if keep is not None:
                used = keep.get(store.name, set()) if isinstance(keep, Mapping) else keep
            table.allow(before, used)
            if max_bytes is None:
                table.drop(table.allowed)
    if max_bytes is not None:
        _shrink(tables, max_bytes)
    for table in tables:
        if whole:
            steps.append(table.drop_store())
        else:
            steps.extend(table.steps(compact))
        clear_up(table.store)
    for store in left_behind(cache) if stores is None else ():
        patterns = _patterns(_names_in(store.name), extractors)
        if patterns or not extractors:
            matched |= patterns
            clear_up(store)
    notes += [
        f"No store matches {pattern!r}. `mer cache ls` shows those that are there."
        for pattern in dict.fromkeys(extractors)
        if pattern not in matched
    ]
    return GcPlan(
        steps=tuple(steps),
        bytes_before=sum(table.num_bytes for table in tables),
        notes=tuple(notes),
        places=places,
    )


def _criterion(older_than_s: float | None, max_bytes: int | None, unused: bool) -> str:
    """Return what utterances that match have in common, for people."""
    told = []
    if older_than_s is not None:
        days = older_than_s / 86400
        age = f"{days:,.4g} days" if abs(days) >= 1 else f"{older_than_s:,.4g} s"
        told.append(f"committed more than {age} ago")
    if unused:
        told.append("that nothing uses")
    if max_bytes is not None:
        told.append(f"to fit into {max_bytes:,} bytes")
    return " and ".join(told)


def _matching(store: Store, extractors: Sequence[str], notes: list[str]) -> set[str]:
    """Return which patterns a store matches; one that cannot be asked has only its name."""
    names = _names_in(store.name)
    if extractors:
        try:
            names |= _names_of(store.spec)
        except StoreError as error:
            notes.append(f"{store.name} can be matched by its name alone: {error}")
    return _patterns(names, extractors)


def _names_in(name: str) -> set[str]:
    """Return the name of a store, and without its digits."""
    return {name, name[: -FINGERPRINT_IN_NAME - 1] if is_store_name(name) else name}


def _names_of(spec: FeatureSpec) -> set[str]:
    """Return the slug, the extractor, and what the user named imported features."""
    options = spec.identity.get("options")
    named = options.get("name") if isinstance(options, Mapping) else None
    return {spec.slug} | {
        name for name in (spec.identity.get("extractor"), named) if isinstance(name, str)
    }


def _patterns(names: set[str], extractors: Sequence[str]) -> set[str]:
    return {wanted for wanted in extractors if any(fnmatchcase(n, wanted) for n in names)}


def _why(store: Store, patterns: set[str]) -> str:
    """Return which patterns chose a store, for people."""
    if not patterns:
        return ""
    try:
        slug = store.spec.slug
    except StoreError:
        slug = min(_names_in(store.name), key=len)
    return f"extractor {slug} matches {', '.join(map(repr, sorted(patterns)))}"


def _look_at(store: Store) -> _Table:
    """Read what there is, again if another process removes parts meanwhile."""
    for _ in range(_TRIES - 1):
        with suppress(PartGoneError):
            return _Table(store)
    return _Table(store)


def _drop_damaged(store: Store, error: StoreError, why: str) -> Step | None:
    """Return the step that drops a store that is damaged, not one that only did not answer."""
    if not isinstance(error, DamagedStoreError) or isinstance(error, PartGoneError):
        return None
    try:
        raw = raw_of(store.place)
        listing = raw.listing()
        if is_foreign(store.place, listing):
            return None
        # In an object store, one without a manifest is being uploaded.
        parts = {
            name: its
            for name, its in listing.by_part().items()
            if store.place.path is not None or layout.METADATA in its.files
        }
        stamps = raw.stamps(list(parts))
    except StoreError:
        return None
    return Step(
        store=store.name,
        action=DROP_STORE,
        parts=tuple(parts),
        bytes=sum(file.bytes for part in parts.values() for file in part.files.values()),
        reason=f"{why}; it is damaged: {error}",
        criterion=why,
        stamps=stamps,
    )


def _unfinished_indexes(place: Place) -> list[Path]:
    """Return what processes that were writing the snapshot of a store have left."""
    index = place.index_path()
    if index is None:
        return []
    found = index.parent.glob(f"{escape(index.name)}.*")
    return [path for path in found if _UNFINISHED.fullmatch(path.name.removeprefix(index.name))]


def _disposable(place: Place) -> list[Path]:
    """Return the files beside a store that nobody has touched for an hour and nobody needs."""
    paths = _unfinished_indexes(place)
    if place.path is not None and not os.path.lexists(place.path):
        paths += [place.path.with_name(place.name + s) for s in (layout.INDEX_SUFFIX, PARTS_SUFFIX)]
    oldest = time.time() - _ABANDONED_FILE_S
    found = []
    for path in paths:
        with suppress(OSError):
            if path.stat().st_mtime < oldest:
                found.append(path)
    return found


def _leftovers(store: Store, quarantine: bool, places: dict[str, Store]) -> list[Step]:
    raw = raw_of(store.place)
    steps = []
    temporary = raw.listing(TEMPORARY_SUFFIX)
    files = _disposable(store.place)
    if temporary.files or temporary.folders or files:
        size = sum(file.bytes for file in temporary.files.values())
        reason = f"what processes that are gone have left of {size} bytes in {TEMPORARY_SUFFIX}"
        if files:
            reason += f", and of {len(files)} files beside the store"
        steps.append(Step(store=store.name, action=SWEEP, reason=reason))
    if quarantine:
        taken = raw.listing(layout.QUARANTINE_SUFFIX)
        if taken.files or taken.folders:
            size = sum(file.bytes for file in taken.files.values())
            reason = "damaged, taken out by a repair"
            steps.append(Step(store=store.name, action=DROP_QUARANTINE, bytes=size, reason=reason))
    if steps:
        places[store.name] = store
    return steps


class _Table:
    """The rows of all parts of a store and what is to become of them."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.criterion = ""  # what is common to what is dropped
        raw = raw_of(store.place)
        self.stamps = raw.stamps(store.place.part_names())
        store.refresh()
        self.parts: tuple[PartReader, ...] = store.readers()
        counts = [part.num_utterances for part in self.parts]
        self.num_rows = sum(counts)
        self.first = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        keys = [part.keys() for part in self.parts]
        self.keys = np.concatenate([np.empty((0, KEY_BYTES), np.uint8), *keys])
        self.generations = [generation(part) for part in self.parts]
        names = [part.id for part in self.parts]
        modified = raw.modified(names)
        self.modified = [modified.get(part.id, float("inf")) for part in self.parts]
        self.sizes = [part.num_bytes for part in self.parts]
        stamps = raw.stamps(names)
        if any(not stamp or self.stamps.get(name) != stamp for name, stamp in stamps.items()):
            raise PartGoneError(f"Parts of {store.url} are being replaced.")
        self.num_bytes = sum(self.sizes)
        self.dropped = np.zeros(self.num_rows, bool)
        self.allowed = np.ones(self.num_rows, bool)
        self._by_rank = sorted(
            range(len(self.parts)), key=lambda i: rank(self.generations[i], self.parts[i].id)
        )

    def allow(self, before: float | None, used: set[bytes] | None) -> None:
        """Restrict what may be dropped to old and unused rows."""
        if used is not None and used and self.num_rows:
            self.allowed &= KeyIndex(key_array(sorted(used))).find(self.keys) < 0
        if before is not None:
            for i, modified in enumerate(self.modified):
                if modified >= before:
                    self.allowed[self.rows(i)] = False

    def drop(self, rows: np.ndarray) -> None:
        """Mark rows, (N,) bool."""
        self.dropped |= rows

    def rows(self, part: int) -> slice:
        """Return the rows of a part."""
        return slice(int(self.first[part]), int(self.first[part + 1]))

    def kept(self) -> np.ndarray:
        """Return the rows that stay: of each key the copy in the part that ranks highest."""
        ranked = np.concatenate(
            [np.empty(0, np.int64), *(np.arange(*_ends(self.rows(i))) for i in self._by_rank)]
        )
        ranked = ranked[~self.dropped[ranked]]
        kept = np.zeros(self.num_rows, bool)
        kept[ranked[KeyIndex(self.keys[ranked]).rows]] = True
        return kept

    def kept_bytes(self, part: int, mine: np.ndarray) -> int:
        """Return about how many bytes some rows of a part, (U,) bool, take."""
        if mine.all():
            return self.sizes[part]
        if not mine.any():
            return 0
        reader = self.parts[part]
        num_bytes = 0
        for output in self.store.spec.outputs:
            row = output.dim * reader.dtype(output.name).itemsize
            num_bytes += int(np.diff(reader.offsets(output.name))[mine].sum()) * row
            num_bytes += int(mine.sum()) * (8 + (output.dim * 8 if output.kind == "frames" else 0))
        return num_bytes

    def drop_store(self) -> Step:
        """Return the step that removes all of it."""
        first = np.zeros(self.num_rows, bool)
        if self.num_rows:
            first[KeyIndex(self.keys).rows] = True
        lost = {p.id: int(first[self.rows(i)].sum()) for i, p in enumerate(self.parts)}
        return Step(
            store=self.store.name,
            action=DROP_STORE,
            parts=tuple(part.id for part in self.parts),
            utterances=sum(lost.values()),
            bytes=self.num_bytes,
            reason=self.criterion,
            criterion=self.criterion,
            lost=lost,
            stamps=self.stamps_of(lost),
        )

    def stamps_of(self, parts: Iterable[str]) -> dict[str, str]:
        """Return the stamps of some parts."""
        return {part: self.stamps[part] for part in parts}

    def steps(self, compact: bool) -> Iterator[Step]:
        """Yield what to do with the parts."""
        kept = self.kept()
        lost = self._lost(kept)
        sizes = [self.kept_bytes(i, kept[self.rows(i)]) for i in range(len(self.parts))]
        small: list[int] = []
        partial: list[int] = []
        for i in range(len(self.parts)):
            mine = kept[self.rows(i)]
            if not mine.any():
                yield self._step(DROP_PART, [i], kept, lost, sizes)
            elif compact and sizes[i] < SMALL_BYTES:
                small.append(i)
            elif not mine.all():
                partial.append(i)
        for group in self._groups(small, sizes):
            if len(group) > 1:
                yield self._step(MERGE, group, kept, lost, sizes)
            elif not kept[self.rows(group[0])].all():
                partial.append(group[0])
        for i in sorted(partial):
            yield self._step(REWRITE, [i], kept, lost, sizes)

    def _groups(self, small: list[int], sizes: Sequence[int]) -> list[list[int]]:
        """Return small parts that fit into one, of one set of types, neighbours in age."""
        groups: list[list[int]] = []
        types: dict[tuple[str, ...], list[int]] = {}
        for i in small:
            dtypes = tuple(self.parts[i].dtype(o.name).name for o in self.store.spec.outputs)
            types.setdefault(dtypes, []).append(i)
        for same in types.values():
            room = 0
            for i in sorted(same, key=lambda i: (self.modified[i], self.parts[i].id)):
                if sizes[i] > room:
                    groups.append([])
                    room = PART_BYTES
                groups[-1].append(i)
                room -= sizes[i]
        return groups

    def _step(
        self,
        action: str,
        parts: list[int],
        kept: np.ndarray,
        lost: np.ndarray,
        sizes: Sequence[int],
    ) -> Step:
        rows: dict[str, np.ndarray] = {}
        copies: dict[str, np.ndarray] = {}
        lost_of: dict[str, int] = {}
        num_copies = 0
        for i in parts:
            name, mine = self.parts[i].id, self.rows(i)
            rows[name] = np.flatnonzero(kept[mine])
            twice = ~kept[mine] & ~self.dropped[mine]
            copies[name] = np.flatnonzero(twice)
            num_copies += int(twice.sum())
            lost_of[name] = int(lost[mine].sum())
        gone = sum(lost_of.values())
        return Step(
            store=self.store.name,
            action=action,
            parts=tuple(rows),
            utterances=gone,
            bytes=sum(self.sizes[i] - sizes[i] for i in parts),
            reason=_reason(action, self.criterion, gone, num_copies, len(parts)),
            criterion=self.criterion,
            kept={} if action == DROP_PART else rows,
            copies={name: some for name, some in copies.items() if len(some)},
            lost=lost_of,
            stamps=self.stamps_of(rows),
        )

    def _lost(self, kept: np.ndarray) -> np.ndarray:
        """Return one row of every utterance that no row is kept of, (N,) bool."""
        lost = np.zeros(self.num_rows, bool)
        if self.dropped.any():
            still = KeyIndex(self.keys[kept]).find(self.keys) >= 0 if kept.any() else lost
            gone = np.flatnonzero(~still)
            lost[gone[KeyIndex(self.keys[gone]).rows]] = True
        return lost


def _ends(rows: slice) -> tuple[int, int]:
    return rows.start, rows.stop


def _shrink(tables: Sequence[_Table], max_bytes: int) -> None:
    """Drop what may be dropped, part by part, the oldest first, until the rest fits."""
    candidates = sorted(
        (
            (table.modified[i], table.store.name, table.parts[i].id, table, i)
            for table in tables
            for i in range(len(table.parts))
            if table.allowed[table.rows(i)].any()
        ),
        key=lambda item: item[:3],
    )
    at = 0
    while True:
        # Dropping one copy of an utterance may bring another back: look again at the end.
        kept = {id(table): table.kept() for table in tables}
        sizes = {
            (id(table), i): table.kept_bytes(i, kept[id(table)][table.rows(i)])
            for table in tables
            for i in range(len(table.parts))
        }
        total = sum(sizes.values())
        if total <= max_bytes or at == len(candidates):
            return
        while total > max_bytes and at < len(candidates):
            _, _, _, table, i = candidates[at]
            at += 1
            mine = table.rows(i)
            table.dropped[mine] |= table.allowed[mine]
            rest = kept[id(table)][mine] & ~table.allowed[mine]
            total -= sizes[id(table), i] - table.kept_bytes(i, rest)


def generation(part: PartReader) -> int:
    """Return how often what is in a part was rewritten."""
    found = part.manifest.get(GENERATION, 0)
    return found if isinstance(found, int) else 0


def run(gc: GcPlan, progress: Callable[[Step], None] | None = None) -> GcReport:
    """Do what a plan says.

    Whatever has changed since is respected: parts that are gone are skipped, parts that are new, or
    were committed anew under the same name, are not touched, and what was the better of two copies
    is looked at again.

    Parameters
    ----------
    gc : GcPlan
        Of ``plan``.
    progress : callable, optional
        Called with every step after it is done.

    Raises
    ------
    StorageFullError
        No space for new parts. Nothing is lost.
    StoreError
        A store cannot be written to.
    UsageError
        It lies behind a web server.
    """
    work = _Work()
    for store in gc.places.values():
        raw_of(store.place).check_writable()
    for step in gc.steps:
        store = gc.places[step.store]
        try:
            _ACTIONS[step.action](work, store, step)
        except PartGoneError:
            work.notes.append(
                f"{step.store}: not done ({step.action}), another process was faster."
            )
        except DamagedStoreError as error:
            work.notes.append(
                f"{step.store}: not done ({step.action}): {error} `mer cache verify --repair` "
                "takes care of it."
            )
        if progress is not None:
            progress(step)
    return GcReport(
        bytes_freed=work.freed,
        utterances=work.utterances,
        stores_dropped=work.stores_dropped,
        parts_dropped=work.parts_dropped,
        parts_merged=work.parts_merged,
        parts_written=work.parts_written,
        notes=tuple(work.notes),
    )


class _Work:
    """Does steps and counts."""

    def __init__(self) -> None:
        self.freed = 0
        self.utterances = 0
        self.stores_dropped = 0
        self.parts_dropped = 0
        self.parts_merged = 0
        self.parts_written = 0
        self.notes: list[str] = []
        self._sound: dict[tuple[str, str], set[bytes]] = {}  # by store and part, read once

    def drop_store(self, store: Store, step: Step) -> None:
        """Remove its parts, then, if nobody has added one, the store."""
        raw = raw_of(store.place)
        there = raw.listing().by_part()
        for part in step.parts:  # damaged or not
            if part in there and self._is_as_planned(store, step, part):
                store.place.remove(part)
                self.freed += sum(file.bytes for file in there[part].files.values())
                self.utterances += step.lost.get(part, 0)
        if raw.remove_if_empty():
            self.stores_dropped += 1
            for suffix in (layout.INDEX_SUFFIX, PARTS_SUFFIX):
                raw.clear(suffix)
            for path in _unfinished_indexes(store.place):
                with suppress(OSError):  # the next gc sweeps it
                    path.unlink()
        elif raw.listing().files:
            self.notes.append(f"{store.name} stays: a part was added meanwhile.")

    def drop_parts(self, store: Store, step: Step) -> None:
        """Remove parts of which nothing stays."""
        readers = self._present(store, step)
        if readers and self._copies_are_safe(store, step, readers):
            for part in readers:
                self.parts_dropped += self._remove(store, step, part)

    def rewrite(self, store: Store, step: Step) -> None:
        """Write what stays of some parts to new ones, then remove them."""
        readers = self._readable(store, step, self._present(store, step))
        if not _is_worth(step, readers):  # another process has merged the rest
            return
        if not self._copies_are_safe(store, step, readers):
            return
        dtypes = {tuple(p.dtype(o.name).name for o in store.spec.outputs) for p in readers}
        assert len(dtypes) == 1
        written = self._write(store, step, readers)
        ranks = [rank(generation(part), part.id) for part in written]
        same = [part for part in readers if part.id in {p.id for p in written}]
        # Readers use the first copy by name: the last goes first, so that they never see another
        # one, which may differ in a last bit, between the two that are the same.
        for old in sorted(readers, key=lambda p: p.id, reverse=True) if not same else ():
            if any(r > rank(generation(old), old.id) for r in ranks):
                self.notes.append(f"{store.name}: part {old.id} stays until the next gc.")
                continue
            self.parts_merged += self._remove(store, step, old)
        # The result was there before, below one of its sources in rank. Then that one keeps what
        # is in both, and the next gc merges it with the rest.
        for old in same:
            if len(step.kept[old.id]):
                self._write(store, step, [old])
            self.parts_merged += self._remove(store, step, old)

    def _readable(
        self, store: Store, step: Step, readers: Sequence[PartReader]
    ) -> list[PartReader]:
        """Return the parts of which everything that stays can be read.

        What is read and found sound here is read a second time from memory.
        """
        found = []
        for part in readers if _is_worth(step, readers) else ():
            try:
                for _ in _utterances([part], step.kept, store):
                    pass
            except PartGoneError:
                continue
            except DamagedStoreError as error:
                self._note_damaged(store, part.id, error)
                continue
            found.append(part)
        return found

    def _note_damaged(self, store: Store, part: str, error: DamagedStoreError) -> None:
        note = f"{store.name}: part {part} is damaged and stays as it is: {error}"
        if "--repair" not in note:
            note += " `mer cache verify --repair` takes care of it."
        self.notes.append(note)

    def _write(self, store: Store, step: Step, readers: Sequence[PartReader]) -> list[PartReader]:
        """Write what stays of some parts and return the new ones."""
        raw = raw_of(store.place)
        modified = raw.modified([part.id for part in readers])
        before = set(store.place.part_names())
        new = rewrite(
            store.place,
            store.spec,
            store.fingerprint,
            _utterances(readers, step.kept, store),
            generation=1 + max(map(generation, readers)),
        )
        written = [part for part in _readers(store, new) if part is not None]
        fresh = [part for part in written if part.id not in before]
        for part in fresh:
            if modified:  # what is in it is no younger for having been merged
                raw.set_modified(part.id, max(modified.values()))
            self.freed -= part.num_bytes
        self.parts_written += len(fresh)
        return written

    def sweep(self, store: Store, step: Step) -> None:
        """Remove what processes that are gone have left."""
        raw = raw_of(store.place)
        before = raw.listing(TEMPORARY_SUFFIX)
        store.place.sweep()
        after = raw.listing(TEMPORARY_SUFFIX)
        self.freed += sum(f.bytes for name, f in before.files.items() if name not in after.files)
        for path in _disposable(store.place):
            with suppress(OSError):  # another process was faster, or not ours to remove
                size = path.stat().st_size
                path.unlink()
                self.freed += size

    def drop_quarantine(self, store: Store, step: Step) -> None:
        """Delete what a repair has taken out."""
        raw = raw_of(store.place)
        size = sum(file.bytes for file in raw.listing(layout.QUARANTINE_SUFFIX).files.values())
        raw.clear(layout.QUARANTINE_SUFFIX)
        self.freed += size

    def _present(self, store: Store, step: Step) -> list[PartReader]:
        """Return readers of the parts that are still those that were looked at."""
        # Theirs are the manifests of the plan only if that holds after they were read.
        names = [name for name in step.parts if self._is_as_planned(store, step, name)]
        read = store.place.read_parts(names, store.spec.outputs, store.fingerprint)
        readers = []
        for name, part in zip(names, read, strict=True):
            if isinstance(part, DamagedStoreError):
                self._note_damaged(store, name, part)
            elif part is not None:
                readers.append(part)
        return [part for part in readers if self._is_as_planned(store, step, part.id)]

    def _remove(self, store: Store, step: Step, part: PartReader) -> bool:
        if not self._is_as_planned(store, step, part.id):
            return False
        store.place.remove(part.id)
        self.freed += part.num_bytes
        self.utterances += step.lost.get(part.id, 0)
        return True

    def _is_as_planned(self, store: Store, step: Step, part: str) -> bool:
        stamp = raw_of(store.place).stamps([part])[part]
        if stamp == step.stamps[part]:
            return True
        if stamp:
            self.notes.append(
                f"{store.name}: part {part} stays, it was committed anew after it was looked at."
            )
        return False

    def _copies_are_safe(self, store: Store, step: Step, readers: Sequence[PartReader]) -> bool:
        """Whether every row that goes because there is another copy has one that reads."""
        mine = {part.id: part for part in readers}
        wanted: dict[bytes, tuple[int, str]] = {}
        for name, rows in step.copies.items():
            if name in mine:
                its = rank(generation(mine[name]), name)
                for key in mine[name].keys()[rows]:
                    held = wanted.get(key.tobytes(), its)
                    wanted[key.tobytes()] = min(held, its)
        if not wanted:
            return True
        # Copies in parts of this same step that go on count as well: they are read when rewritten.
        for name, rows in step.kept.items():
            if name in mine:
                for key in mine[name].keys()[rows]:
                    wanted.pop(key.tobytes(), None)
        others = [name for name in store.place.part_names() if name not in mine]
        for part in _readers(store, others):
            if part is None or not wanted:
                continue
            its = rank(generation(part), part.id)
            its_keys = set(map(bytes, part.keys()))
            if any(its < least for key, least in wanted.items() if key in its_keys):
                sound = self._sound_keys(store, part.id)
                wanted = {k: r for k, r in wanted.items() if its >= r or k not in sound}
        if wanted:
            self.notes.append(
                f"{store.name}: {', '.join(mine)} stays: the other copy of {len(wanted)} "
                "utterances is gone or damaged."
            )
        return not wanted

    def _sound_keys(self, store: Store, part: str) -> set[bytes]:
        """Return the keys of what reads without fault, from the disk or server itself."""
        known = self._sound.get((store.name, part))
        if known is None:
            raw = raw_of(store.place)
            facts = StoreFacts(store.fingerprint[:16], store.fingerprint, store.spec.outputs)
            examined = examine_part(raw, part, raw.listing(f"/{layout.PARTS}/{part}"), facts)
            keys = [] if examined is None else examined.keys[examined.sound()]
            known = self._sound[store.name, part] = {key.tobytes() for key in keys}
        return known


_ACTIONS: dict[str, Callable[[_Work, Any, Step], None]] = {
    DROP_STORE: _Work.drop_store,
    DROP_PART: _Work.drop_parts,
    REWRITE: _Work.rewrite,
    MERGE: _Work.rewrite,
    SWEEP: _Work.sweep,
    DROP_QUARANTINE: _Work.drop_quarantine,
}


def _is_worth(step: Step, readers: Sequence[PartReader]) -> bool:
    """Whether writing what stays of some parts anew changes anything."""
    return len(readers) > 1 or any(len(step.kept[p.id]) < p.num_utterances for p in readers)


def _readers(store: Store, parts: Sequence[str]) -> list[PartReader | None]:
    """Return fresh readers of the sound parts among some."""
    if not parts:
        return []
    read = store.place.read_parts(list(parts), store.spec.outputs, store.fingerprint)
    return [None if isinstance(part, DamagedStoreError) else part for part in read]


def _utterances(
    readers: Sequence[PartReader], kept: Mapping[str, np.ndarray], store: Store
) -> Iterator[Stored]:
    """Yield the rows of parts that stay, one after the other."""
    outputs = store.spec.outputs
    for part in readers:
        keys, lengths = part.keys(), part.input_length()
        bounds = {o.name: part.offsets(o.name).tolist() for o in outputs}
        pooled = {o.name: part.pooled(o.name) for o in outputs if o.kind == "frames"}
        rows = kept[part.id].tolist()
        store.place.prefetch(
            [(part, name, at[row], at[row + 1]) for name, at in bounds.items() for row in rows]
        )
        for row in rows:
            yield Stored(
                key=keys[row].tobytes(),
                input_length=int(lengths[row]),
                arrays={n: part.frames(n, at[row], at[row + 1]) for n, at in bounds.items()},
                pooled={name: values[row] for name, values in pooled.items()},
            )
