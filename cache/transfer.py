"""Copying a store from one place to another: folder, object store, or (only from) a web server.

Parts go over file by file, each byte checked against the manifest on the way, and become visible
one by one. So a copy that was interrupted goes on where it stopped, and copying again brings only
what is new.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mer.cache import layout
from mer.cache.errors import DamagedStoreError, StoreError, UsageError
from mer.cache.home import Cache
from mer.cache.layout import FileRecord
from mer.cache.nearby import chunk_sums
from mer.cache.place import Place
from mer.cache.reader import PartGoneError, PartReader
from mer.cache.remote import PARTS_SUFFIX, ObjectPlace, parts_list
from mer.cache.spec import OutputSpec
from mer.cache.staging import write_file, writing
from mer.cache.store import Store

logger = logging.getLogger(__name__)

_PARTS_AT_ONCE = 4
_BLOCK_BYTES = 4 << 20

Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyReport:
    """What a copy did.

    Parameters
    ----------
    store : str
        Path or URL of the copy.
    parts, utterances, bytes : int
        Parts written, utterances and bytes in them.
    skipped_utterances : int
        Those that were there before.
    missing : int
        Keys that were asked for and are not in the source.
    damaged : tuple of str
        One message per part, or utterance, of the source that was left out because it is damaged;
        empty if there was none.
    """

    store: str
    parts: int = 0
    utterances: int = 0
    bytes: int = 0
    skipped_utterances: int = 0
    missing: int = 0
    damaged: tuple[str, ...] = ()


def copy(
    source: Store,
    target: Cache,
    *,
    keys: Collection[bytes] | None = None,
    progress: Progress | None = None,
) -> CopyReport:
    """Bring the utterances of a store into another cache.

    Parameters
    ----------
    source : Store
        Wherever it lies.
    target : Cache
        A folder or an object store. The store keeps its name there, unless the cache has one of
        the same fingerprint: that one is added to.
    keys : collection of bytes, optional
        Only these utterances.
    progress : callable, optional
        Called with the number of bytes since the last call, from any thread, one at a time;
        negative where a file has to be read again.

    Returns
    -------
    CopyReport
        What is damaged in the source is left out and named there; the rest is copied.

    Raises
    ------
    UsageError
        The target is a web server.
    StorageFullError, StoreError
        The target cannot be written or the source cannot be reached. What was finished is kept:
        the same call goes on from there.
    DamagedStoreError, StoreFormatError
        The root of the source, or the target as a whole, cannot be trusted.
    """
    store = _open_target(source, target)
    if store.url == source.url:
        raise UsageError(f"{source.url} would be copied onto itself.")
    store.place.sweep()
    return _Copy(source, store, keys, progress).run()


def write_parts_list(store: Store) -> str:
    """Write the list of a store's parts beside it, for readers behind a web server.

    ``copy`` keeps the one of an object store up to date; that of a folder is written anew when the
    folder goes to a web server.

    Returns
    -------
    str
        Path or URL of the list.
    """
    place = store.place
    if isinstance(place, ObjectPlace):
        return place.write_parts_list()
    path = store.path.with_name(store.name + PARTS_SUFFIX)
    with writing(place.url), place.staging() as temporary:
        write_file(temporary, [parts_list(place.part_names())])
        os.replace(temporary, path)
    return str(path)


def _open_target(source: Store, target: Cache) -> Store:
    if target.url.startswith(("http://", "https://")):
        raise UsageError(
            f"{target.url} is a web server and can only be read. Copy to a folder, s3://… or gs://…."
        )
    store = target.open(source.spec)
    if store is None:
        target.home.place(source.name).create(source.place.metadata())
        store = target.open(source.spec)
        assert store is not None
    return store


class _Stopped(Exception):
    """Another part failed, or the user pressed Ctrl-C."""


class _Copy:
    def __init__(
        self,
        source: Store,
        target: Store,
        keys: Collection[bytes] | None,
        progress: Progress | None,
    ) -> None:
        self.source, self.target = source, target
        self._wanted = None if keys is None else frozenset(keys)
        self._taken: set[bytes] = set()  # in this run: the source may hold an utterance twice
        self._found = 0
        self._progress = progress
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._report = CopyReport(store=target.url)

    def run(self) -> CopyReport:
        names = self.source.place.part_names()
        outputs, fingerprint = self.source.spec.outputs, self.source.fingerprint
        some: list[tuple[PartReader, np.ndarray]] = []
        pool = ThreadPoolExecutor(_PARTS_AT_ONCE, "mer-copy")
        try:
            futures = []
            for part in self.source.place.read_parts(names, outputs, fingerprint):
                if isinstance(part, DamagedStoreError):
                    self._note_damage(part)
                elif part is not None:
                    rows = self._choose(part)
                    if rows is not None and len(rows) == part.num_utterances:
                        futures.append(pool.submit(self._copy_whole, part))
                    elif rows is not None and len(rows):
                        some.append((part, rows))
            for future in futures:
                future.result()
            for part, rows in some:
                self._copy_rows(part, rows)
        finally:
            self._stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
        if self._wanted is not None:
            self._count(missing=len(self._wanted) - self._found)
        if isinstance(self.target.place, ObjectPlace):
            self.target.place.write_parts_list()
        self.target.refresh()
        return self._report

    def _choose(self, part: PartReader) -> np.ndarray | None:
        """Return the rows to be copied, None if the part is not readable."""
        try:
            rows = part.keys()
        except PartGoneError:
            return None
        except DamagedStoreError as error:
            self._note_damage(error)
            return None
        keys = [row.tobytes() for row in rows]
        there = self.target.contains(keys)
        chosen = []
        for row, key in enumerate(keys):
            if key in self._taken or (self._wanted is not None and key not in self._wanted):
                continue
            self._taken.add(key)
            self._found += 1
            if there[row]:
                self._count(skipped_utterances=1)
            else:
                chosen.append(row)
        return np.array(chosen, np.int64)

    # -- whole parts -----------------------------------------------------------------------------

    def _copy_whole(self, part: PartReader) -> None:
        try:
            self._transfer(part)
        except PartGoneError:
            logger.info("Part %s was removed from %s meanwhile.", part.id, self.source.url)
        except DamagedStoreError as error:
            self._note_damage(error)

    def _transfer(self, part: PartReader) -> None:
        place = self.target.place
        with writing(self.target.url), place.staging() as folder:
            folder.mkdir()
            for name, record in part.files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                self._fetch(part, name, record, folder / name)
            for output in self.source.spec.outputs:  # of arrays without frames
                (folder / output.name / layout.FRAMES).mkdir(exist_ok=True)
            name, document = self._manifest(part, folder)
            write_file(folder / layout.METADATA, [document])
            if place.publish(folder, name):
                self._count(parts=1, utterances=part.num_utterances, bytes=part.num_bytes)
            else:  # by another copy that runs at the same time
                self._count(skipped_utterances=part.num_utterances)

    def _fetch(self, part: PartReader, name: str, record: FileRecord, path: Path) -> None:
        """Write a file as the manifest describes it."""
        if write_file(path, self._blocks(part, name, record)) == record:
            return
        path.unlink()  # a flip on the way is not in the source
        self._tell(-record.bytes)
        if write_file(path, self._blocks(part, name, record)) != record:
            raise DamagedStoreError(f"{part.where}/{name} does not match its checksum.")

    def _blocks(self, part: PartReader, name: str, record: FileRecord) -> Iterator[memoryview]:
        """Yield the bytes of a file as they are."""
        for block in _read(self.source.place, part, name, record):
            if self._stop.is_set():
                raise _Stopped
            yield block
            self._tell(len(block))

    def _manifest(self, part: PartReader, folder: Path) -> tuple[str, bytes]:
        """Return the name of the copy and its manifest, completed if an older release wrote it."""
        name = layout.content_part_id(part.files)
        mer: dict[str, Any] = {k: v for k, v in part.manifest.items() if k != "checksum"}
        mer["store"], mer["part"] = self.source.fingerprint, name
        mer["outputs"] = {
            output.name: self._described(part, output, folder)
            for output in self.source.spec.outputs
        }
        return name, layout.to_bytes(layout.group_document(mer))

    def _described(self, part: PartReader, output: OutputSpec, folder: Path) -> dict[str, Any]:
        fields = dict(part.manifest["outputs"][output.name])
        if "crc32c" not in fields:
            shard = part.shard(output.name)
            sums = np.empty(0, np.uint32)
            if shard.num_chunks:
                data = np.memmap(folder / shard.file, np.uint8, "r")
                chunks = data[: shard.num_chunks * shard.chunk_bytes]
                sums = chunk_sums(chunks.reshape(-1, shard.chunk_bytes))
            fields["crc32c"] = layout.crc_text(sums.tolist())
        return fields

    # -- parts of which something is there ---------------------------------------------------------

    def _copy_rows(self, part: PartReader, rows: np.ndarray) -> None:
        outputs = self.source.spec.outputs
        try:
            keys, lengths = part.keys(), part.input_length()
            bounds = {o.name: part.offsets(o.name) for o in outputs}
            pooled = {o.name: part.pooled(o.name) for o in outputs if o.kind == "frames"}
            self.source.place.prefetch(
                [(part, o, int(b[r]), int(b[r + 1])) for o, b in bounds.items() for r in rows]
            )
        except PartGoneError:
            logger.info("Part %s was removed from %s meanwhile.", part.id, self.source.url)
            return
        except DamagedStoreError as error:
            self._note_damage(error)
            return
        with self.target.writer() as writer:
            for row in rows:
                if self._stop.is_set():
                    raise _Stopped
                try:
                    arrays = {
                        o: part.frames(o, int(b[row]), int(b[row + 1])) for o, b in bounds.items()
                    }
                except DamagedStoreError as error:
                    self._note_damage(error)
                    continue
                statistics = {o: values[row] for o, values in pooled.items()}
                writer.add_stored(keys[row].tobytes(), int(lengths[row]), arrays, statistics)
                num_bytes = sum(array.nbytes for array in arrays.values())
                self._count(utterances=1, bytes=num_bytes)
                self._tell(num_bytes)
        self._count(parts=1)

    # -- telling -----------------------------------------------------------------------------------

    def _count(self, **more: int) -> None:
        with self._lock:
            values = {name: getattr(self._report, name) + number for name, number in more.items()}
            self._report = replace(self._report, **values)

    def _note_damage(self, error: StoreError) -> None:
        logger.warning("Not copied: %s", error)
        with self._lock:
            self._report = replace(self._report, damaged=(*self._report.damaged, str(error)))

    def _tell(self, num_bytes: int) -> None:
        if self._progress is not None:
            with self._lock:
                self._progress(num_bytes)


def _read(place: Place, part: PartReader, name: str, record: FileRecord) -> Iterator[memoryview]:
    """Yield the first ``record.bytes`` bytes of a file of a part; too few end it early."""
    if isinstance(place, ObjectPlace):
        yield from place.files(part.id).stream(name, record.bytes)
        return
    assert place.path is not None
    folder = place.path / layout.PARTS / part.id
    try:
        with open(folder / name, "rb", buffering=0) as file:
            while block := file.read(_BLOCK_BYTES):
                yield memoryview(block)
    except (FileNotFoundError, NotADirectoryError) as error:
        if not folder.is_dir():
            raise PartGoneError(f"{folder} is gone since the store was listed.") from error
        raise DamagedStoreError(
            f"{folder / name} is missing; its part's manifest lists it."
        ) from error
    except OSError as error:
        raise StoreError(f"Cannot read {folder / name}: {error.strerror}.") from error
