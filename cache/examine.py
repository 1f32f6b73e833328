"""Looking at every byte of one part: what is damaged, whom it concerns, what can be put right.

U utterances of a part, F frames, D width.

A manifest binds every other file of its part by size and xxh3-128. So whatever follows from it, or
from a file it lists twice, or from all but one byte of a small array, can be restored and proven
right. What cannot be is narrowed down to the utterances that touch it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import google_crc32c
import numpy as np
import xxhash

from mer.cache import layout
from mer.cache.errors import DamagedStoreError, StoreError, StoreFormatError
from mer.cache.expected import (
    INPUT_LENGTH_FILE,
    KEY_FILE,
    POOLED_FILE,
    array_files,
    documents,
    offsets_file,
    pooled_file,
    shard_index,
    told_outputs,
)
from mer.cache.frames import ShardFrames, agree
from mer.cache.identity import FINGERPRINT_IN_NAME, KEY_BYTES
from mer.cache.layout import FileRecord
from mer.cache.mend import (
    crc32c,
    crc32c_bytes,
    shard_blocks,
    trailer,
    with_right_byte,
    with_trailer,
    xxh3,
)
from mer.cache.raw import BLOCK_BYTES, Listing, Raw, raw_of
from mer.cache.reader import ShardLayout
from mer.cache.snapshot import Snapshot
from mer.cache.spec import OutputSpec
from mer.cache.staging import Buffer

if TYPE_CHECKING:
    from mer.cache.place import Place

_MENDABLE_BYTES = 64 << 20  # larger arrays are not searched for a damaged byte

FOREIGN = "is named like a store and holds nothing of one; it is left as it is"
NUM_NAMES = 5  # that a rewritten part may have

Progress = Callable[[int], None]
Mend = Callable[[], Iterator[Buffer]]


@dataclass(frozen=True, slots=True)
class StoreFacts:
    """What is known of the store that a part belongs to.

    Attributes
    ----------
    digits : str
        End of the store's name: the first digits of its fingerprint; "" if it was renamed.
    fingerprint : str or None
        None where the store's own metadata is lost.
    outputs : tuple of OutputSpec or None
        Likewise.
    remembered : Snapshot or None
        What an earlier opening found out. It is not trusted, but it may hold what was lost.
    """

    digits: str
    fingerprint: str | None = None
    outputs: tuple[OutputSpec, ...] | None = None
    remembered: Snapshot | None = None


@dataclass(slots=True)
class Fault:
    """Something that is not as it was written.

    Attributes
    ----------
    file : str
        Below the part.
    reason : str
        Completes a sentence that begins with the file.
    lost : ndarray or None
        (U,) bool, the utterances it takes away for good; None if there are none.
    mend : callable, optional
        Yields the file as it was written, proven to be so.
    """

    file: str
    reason: str
    lost: np.ndarray | None = None
    mend: Mend | None = None


@dataclass(slots=True)
class Examination:
    """What was found in a part.

    Attributes
    ----------
    part : str
        Its name.
    files, bytes : int
        Looked at.
    faults : list of Fault
        Everything found.
    notes : list of str
        What is no damage.
    whole : bool
        Nothing in it can be trusted: all of it has to go.
    judged : bool
        False if it could not be read, which says nothing about its bytes.
    manifest : dict
        Sealed attributes, empty if they do not hold.
    outputs : tuple of OutputSpec
        As the store declares them, or as the manifest tells.
    records : dict of str to FileRecord
        Every listed file.
    shards : dict of str to ShardLayout
        By output.
    unproven : set of str
        Outputs whose shard is not what was written and whose chunks the manifest does not know, as
        in parts of the first release. An utterance of theirs is sound if what it was pooled to,
        which the manifest does know, says so.
    keys : ndarray
        (U, 16) uint8; (0, 16) where they are lost.
    """

    part: str
    files: int = 0
    bytes: int = 0
    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    whole: bool = False
    judged: bool = True
    manifest: dict[str, Any] = field(default_factory=dict)
    outputs: tuple[OutputSpec, ...] = ()
    records: dict[str, FileRecord] = field(default_factory=dict)
    shards: dict[str, ShardLayout] = field(default_factory=dict)
    unproven: set[str] = field(default_factory=set)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    keys: np.ndarray = field(default_factory=lambda: np.empty((0, KEY_BYTES), np.uint8))

    @property
    def num_utterances(self) -> int:
        """U as far as the keys are known."""
        return len(self.keys)

    def sound(self) -> np.ndarray:
        """Return which utterances are sound in every output, (U,) bool."""
        sound = np.full(self.num_utterances, not self.whole and self.judged)
        for fault in self.faults:
            if fault.lost is not None and len(sound):
                sound &= ~fault.lost
        return sound


def spare_name(part: str, number: int) -> str:
    """Return the name of a rewritten part where damaged ones have ``number`` others."""
    if not number:
        return part
    text = f"{part} {number}".encode("ascii")
    return hashlib.blake2b(text, digest_size=16).hexdigest()


def is_foreign(place: Place, listing: Listing) -> bool:
    """Whether nothing shows that a folder which is named like a store is, or was, one."""
    index = place.index_path()
    if listing.by_part() or listing.unreadable or (index is not None and index.exists()):
        return False
    raw = raw_of(place)
    group = layout.to_bytes(layout.group_document())
    for file, mark in ((layout.METADATA, b'"mer"'), (f"{layout.PARTS}/{layout.METADATA}", group)):
        try:
            if mark in raw.read(file).tobytes():
                return False
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, StoreError):
            return False
    return not raw.listing(layout.QUARANTINE_SUFFIX).files


def examine_part(
    raw: Raw, part: str, found: Listing, facts: StoreFacts, progress: Progress | None = None
) -> Examination | None:
    """Read all of a part.

    Parameters
    ----------
    raw : Raw
        The files of the store.
    part : str
        Name of the part.
    found : Listing
        What lies below it.
    facts : StoreFacts
        The store.
    progress : callable, optional
        Called with the number of bytes read since the last call.

    Returns
    -------
    Examination or None
        None if the part was removed meanwhile.
    """
    examined = Examination(part)
    _Examiner(raw, found, facts, progress or _ignore, examined).run()
    if (examined.faults or examined.whole) and not raw.exists(part):
        return None
    return examined


def _ignore(num_bytes: int) -> None:
    pass


class _Examiner:
    """Fills an ``Examination``."""

    def __init__(
        self, raw: Raw, found: Listing, facts: StoreFacts, progress: Progress, into: Examination
    ) -> None:
        self._raw = raw
        self._found = found
        self._facts = facts
        self._progress = progress
        self._into = into
        self._folder = f"{layout.PARTS}/{into.part}"
        self._documents: dict[str, dict[str, Any]] = {}
        self._count = 0

    def run(self) -> None:
        """Look at the manifest, then at all it lists, then at how the contents fit together."""
        into = self._into
        if not self._manifest():
            if into.judged:
                self._give_up_on_keys()
            return
        arrays = self._array_files()
        # Row bounds first: they say whom a damaged chunk concerns.
        for file in sorted(into.records, key=lambda name: (name not in arrays, name)):
            if file not in self._shard_files():
                self._small_file(file, arrays)
        self._contents(arrays)
        for output, shard in into.shards.items():
            if shard.num_frames:
                self._shard_file(output, shard)
        self._unlisted()

    # The manifest ------------------------------------------------------------------------------

    def _manifest(self) -> bool:
        """Read and check the manifest; False if nothing more can be said of the part."""
        into = self._into
        try:
            data = self._raw.read(f"{self._folder}/{layout.METADATA}").tobytes()
        except FileNotFoundError:
            return self._whole("is missing: the part has no manifest")
        except (OSError, StoreError) as error:
            return self._unreadable(layout.METADATA, error)
        into.files += 1
        into.bytes += len(data)
        self._progress(len(data))
        try:
            manifest = layout.unseal(data, layout.METADATA)
        except StoreFormatError:
            version = newer_format(data)
            if version is None:
                return self._whole("is no manifest any more")
            into.notes.append(f"has format {version}, which this release cannot check: update mer")
            into.judged = False
            return False
        except DamagedStoreError as error:
            return self._whole(str(error).removeprefix(layout.METADATA).strip().rstrip("."))
        try:
            self._describe(manifest)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            return self._whole(f"does not describe a part of this store ({error!r})")
        into.manifest = manifest
        text = respelled(data, manifest)
        if text is not None:
            into.faults.append(
                Fault(
                    layout.METADATA, "is not spelled as it was written", mend=lambda: iter([text])
                )
            )
        store = manifest.get("store")
        if store is not None and not self._is_ours(store):
            return self._whole(f"belongs to another store, the one with the fingerprint {store}")
        return True

    def _is_ours(self, store: Any) -> bool:
        if self._facts.fingerprint is not None:
            return store == self._facts.fingerprint
        digits = self._facts.digits
        return not digits or str(store)[:FINGERPRINT_IN_NAME] == digits

    def _describe(self, manifest: dict[str, Any]) -> None:
        """Derive from the manifest what every file must be like."""
        into = self._into
        count = self._count = int(manifest["utterances"])
        if count < 1:
            raise ValueError(f"{count} utterances")
        into.records = {
            name: FileRecord(int(file["bytes"]), str(file["xxh3"]))
            for name, file in manifest["files"].items()
        }
        fields = manifest["outputs"]
        into.outputs = self._facts.outputs or told_outputs(fields, into.records, count)
        if set(fields) != {output.name for output in into.outputs}:
            raise ValueError(f"outputs {sorted(fields)}")
        for output in into.outputs:
            into.shards[output.name] = ShardLayout(output, fields[output.name], into.records)
        self._documents = documents(count, into.outputs, into.shards)
        listed = {*self._documents, *self._array_files(), *self._shard_files()}
        if not listed <= set(into.records):
            raise ValueError(f"{min(listed - set(into.records))} is not listed")
        for file, (shape, dtype) in self._array_files().items():
            expected = int(np.prod(shape)) * np.dtype(dtype).itemsize + layout.CRC_BYTES
            if into.records[file].bytes != expected:
                raise ValueError(f"{file} of {into.records[file].bytes} bytes")

    def _array_files(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return the small arrays: their file, shape and type."""
        return array_files(self._count, self._into.outputs)

    def _shard_files(self) -> set[str]:
        return {shard.file for shard in self._into.shards.values() if shard.num_frames}

    def _whole(self, reason: str) -> bool:
        self._into.faults.append(Fault(layout.METADATA, reason))
        self._into.whole = True
        return False

    def _unreadable(self, file: str, error: Exception) -> bool:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        self._into.faults.append(Fault(file, f"cannot be read: {why.rstrip('.')}"))
        self._into.judged = False
        return False

    def _give_up_on_keys(self) -> None:
        """Find out which utterances go with the part."""
        into = self._into
        file = f"{layout.KEY}/{layout.chunk_file(2)}"
        try:
            data = self._raw.read(f"{self._folder}/{file}")
        except (OSError, StoreError):
            data = np.empty(0, np.uint8)
        if len(data) % KEY_BYTES != layout.CRC_BYTES or crc32c(data[:-4]) != trailer(data):
            known = self._remember(KEY_FILE)
            if known is None:
                return
            data = np.frombuffer(known, np.uint8)
        into.keys = data[: -layout.CRC_BYTES].reshape(-1, KEY_BYTES)
        into.faults[-1].lost = np.ones(len(into.keys), bool)

    # Files that are read at once ---------------------------------------------------------------

    def _small_file(self, file: str, arrays: Mapping[str, tuple[tuple[int, ...], str]]) -> None:
        into = self._into
        record = into.records[file]
        data, reason = self._content(file, record)
        if reason is None:
            assert data is not None
            document = self._documents.get(file)
            if document is not None and json.loads(data.tobytes()) != document:
                into.faults.append(Fault(file, "does not describe what its part's manifest says"))
        elif into.judged:
            mend = self._mend_small(file, record, data)
            lost = None
            if mend is None and file not in self._documents:
                lost = np.ones(self._count, bool)
                if file == KEY_FILE:
                    reason += f", and the keys of its {self._count} utterances are lost with it"
            into.faults.append(Fault(file, reason, lost, mend))
            data = None if mend is None else np.frombuffer(b"".join(_bytes(mend())), np.uint8)
        if data is not None and file in arrays and not file.endswith(POOLED_FILE):
            shape, dtype = arrays[file]
            into.arrays[file] = data[: -layout.CRC_BYTES].view(layout.little(dtype)).reshape(shape)

    def _content(self, file: str, record: FileRecord) -> tuple[np.ndarray | None, str | None]:
        """Return a whole file and, if it is not what was written, why."""
        try:
            data = self._raw.read(f"{self._folder}/{file}")
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None, "is missing; its part's manifest lists it"
        except (PermissionError, StoreError) as error:
            self._unreadable(file, error)
            return None, "cannot be read"
        except OSError as error:
            return None, f"cannot be read: {error.strerror}"
        self._into.files += 1
        self._into.bytes += len(data)
        self._progress(len(data))
        if len(data) != record.bytes:
            return data, f"has {len(data)} bytes, its part's manifest says {record.bytes}"
        if xxh3(data) != record.xxh3:
            return data, "does not match its checksum"
        return data, None

    def _mend_small(self, file: str, record: FileRecord, data: np.ndarray | None) -> Mend | None:
        """Return how to make a file anew, if that can be proven right."""
        candidates: list[Callable[[], bytes | None]] = []
        if file in self._documents:
            candidates.append(lambda: layout.to_bytes(self._documents[file]))
        else:
            candidates.append(partial(self._twin, file, record))
            candidates.append(partial(self._remember, file))
            if data is not None and record.bytes <= _MENDABLE_BYTES:
                candidates.append(partial(with_trailer, data, record.bytes))
                candidates.append(partial(with_right_byte, data, record))
        for candidate in candidates:
            content = candidate()
            if content is not None and xxh3(content) == record.xxh3:
                if len(content) > BLOCK_BYTES:  # made again when it is needed
                    return lambda candidate=candidate: iter([candidate() or b""])  # type: ignore[misc]
                return lambda content=content: iter([content])  # type: ignore[misc]
        return None

    def _twin(self, file: str, record: FileRecord) -> bytes | None:
        """Return the content of another file that the manifest says is the same."""
        for other, its in self._into.records.items():
            if other != file and its == record:
                try:
                    data = self._raw.read(f"{self._folder}/{other}").tobytes()
                except (OSError, StoreError):
                    continue
                if xxh3(data) == record.xxh3:
                    return data
        return None

    def _remember(self, file: str) -> bytes | None:
        """Return a small array as an earlier opening saw it."""
        snapshot = self._facts.remembered
        number = None if snapshot is None else snapshot.number.get(self._into.part)
        if snapshot is None or number is None:
            return None
        rows = slice(int(snapshot.first_row[number]), int(snapshot.first_row[number + 1]))
        try:
            if file == KEY_FILE:
                values = snapshot.keys[rows]
            elif file == INPUT_LENGTH_FILE:
                values = snapshot.input_length[rows]
            elif file in (names := {offsets_file(o.name): o.name for o in self._into.outputs}):
                starts, lengths = snapshot.spans(names[file])
                values = np.append(starts[rows], starts[rows][-1] + lengths[rows][-1])
            else:
                return None
        except (ValueError, KeyError, IndexError):  # it is damaged as well
            return None
        body = values.tobytes()
        return body + crc32c_bytes(body)

    # What the arrays say together --------------------------------------------------------------

    def _contents(self, arrays: Mapping[str, tuple[tuple[int, ...], str]]) -> None:
        into = self._into
        keys = into.arrays.get(KEY_FILE)
        if keys is not None:
            into.keys = keys
            distinct = len(np.unique(keys, axis=0))
            if distinct != len(keys):
                into.notes.append(f"holds {len(keys) - distinct} utterances twice")
        self._name(keys)
        lengths = into.arrays.get(INPUT_LENGTH_FILE)
        if lengths is not None and (lengths < 0).any():
            into.faults.append(Fault(INPUT_LENGTH_FILE, "holds a negative length", lengths < 0))
        everyone = np.ones(self._count, bool)
        for output in into.outputs:
            file = offsets_file(output.name)
            offsets = into.arrays.get(file)
            if offsets is None:
                continue
            steps = np.diff(offsets)
            wrong = offsets[0] != 0 or offsets[-1] != into.shards[output.name].num_frames
            if wrong or (steps < 0).any():
                into.faults.append(Fault(file, "does not partition the frames", everyone))
                del into.arrays[file]
            elif output.kind == "pooled" and (steps != 1).any():
                into.faults.append(Fault(file, "does not give every utterance one row", steps != 1))

    def _name(self, keys: np.ndarray | None) -> None:
        """Check that the part has the name that follows from what it holds."""
        into = self._into
        told = into.manifest.get("part", into.part)
        content = layout.content_part_id(into.records)
        names = {spare_name(content, number) for number in range(NUM_NAMES)}
        if keys is not None:
            names.add(layout.part_id(key.tobytes() for key in keys))
        if told != into.part:
            reason = f"is the manifest of part {told}, not of this one"
        elif keys is not None and into.part not in names:
            reason = "does not hold the utterances that the part is named after"
        else:
            return
        into.faults.append(Fault(layout.METADATA, reason))

    # Shards ------------------------------------------------------------------------------------

    def _shard_file(self, output: str, shard: ShardLayout) -> None:
        into = self._into
        record = into.records[shard.file]
        try:
            scan = self._scan(shard, record)
        except (PermissionError, StoreError) as error:
            self._unreadable(shard.file, error)
            return
        if scan is None:
            return
        mend, lost = self._mend_shard(shard, record, scan), None
        if mend is None:
            lost = self._touching(output, shard, scan.bad_data)
            if shard.crcs is None:
                into.unproven.add(output)
                # Without a damaged chunk to explain the file's checksum, whole ones are strange.
                explained = scan.bad_data.any()
                if not explained or not self._are_its_own(output, shard, lost):
                    lost = self._touching(output, shard, np.ones(shard.num_chunks, bool))
        into.faults.append(Fault(shard.file, scan.reason, lost, mend))

    def _are_its_own(self, output: str, shard: ShardLayout, lost: np.ndarray) -> bool:
        """Whether all utterances but the lost ones have the frames that they were pooled from.

        A chunk that matches its own checksum alone may be another part's. One utterance with others
        than its own frames shows that the shard is, and then none of it is to be trusted.
        """
        offsets = self._into.arrays.get(offsets_file(output))
        pooled = self._pooled(output)
        if offsets is None or pooled is None:
            return False
        source = ShardFrames(self._raw, self._folder, shard)
        for row in np.flatnonzero(~lost & (np.diff(offsets) > 0)):
            try:
                frames = source.read(int(offsets[row]), int(offsets[row + 1]))
            except (OSError, StoreError):
                return False
            if not agree(frames, pooled[row]):
                return False
        return True

    def _pooled(self, output: str) -> np.ndarray | None:
        """Return what the utterances were pooled to, (U, 2, D), if that is what was written."""
        file = pooled_file(output)
        record = self._into.records.get(file)
        if record is None or file not in self._array_files():
            return None
        fault = next((f for f in self._into.faults if f.file == file), None)
        try:
            if fault is None:
                data = self._raw.read(f"{self._folder}/{file}")
            elif fault.mend is not None:
                data = np.frombuffer(b"".join(_bytes(fault.mend())), np.uint8)
            else:
                return None
        except (OSError, StoreError):
            return None
        if xxh3(data) != record.xxh3:
            return None
        shape, dtype = self._array_files()[file]
        return data[: -layout.CRC_BYTES].view(layout.little(dtype)).reshape(shape)

    def _scan(self, shard: ShardLayout, record: FileRecord) -> _Scan | None:
        """Read a shard once for all its checksums; None if it is what was written."""
        path = f"{self._folder}/{shard.file}"
        count, size, data_bytes = shard.num_chunks, shard.chunk_bytes, shard.data_bytes
        sums = np.full(count, -1, np.int64)  # -1: not there
        trailers = np.full(count, -1, np.int64)
        digest = xxhash.xxh3_128()
        missing, failed = False, ""
        chunk = read = 0

        def take(block: np.ndarray) -> None:
            nonlocal chunk, read
            digest.update(block.data)
            for start in range(0, len(block) - size + 1, size):
                sums[chunk] = google_crc32c.value(block[start : start + data_bytes])
                trailers[chunk] = trailer(block[start : start + size])
                chunk += 1
            read += len(block)
            self._progress(len(block))

        step = max(1, BLOCK_BYTES // size) * size
        try:
            for block in self._raw.blocks(path, count * size, step):
                take(block)
            index = self._raw.read(path, count * size)
            digest.update(index.data)
            read += len(index)
            self._progress(len(index))
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            missing, index = True, np.empty(0, np.uint8)
        except PermissionError:
            raise
        except OSError as error:  # a device that fails in places
            failed, index = str(error.strerror), np.empty(0, np.uint8)
            while chunk < count:
                start = chunk * size
                try:
                    take(self._raw.read(path, start, start + size))
                except OSError:
                    chunk += 1
        if not missing:
            self._into.files += 1
        self._into.bytes += read
        whole = not failed and digest.hexdigest() == record.xxh3 and read == record.bytes
        expected = trailers if shard.crcs is None else shard.crcs.astype(np.int64)
        bad_data = (sums != expected) | (sums < 0)
        bad_index = index.tobytes() != shard_index(shard)
        if whole and not bad_data.any() and not bad_index and (trailers == expected).all():
            return None
        bad = bad_data | (trailers != expected)
        if missing:
            reason = "is missing; its part's manifest lists it"
        elif failed:
            reason = f"cannot be read: {failed}"
        elif read != record.bytes:
            reason = f"has {read} bytes, its part's manifest says {record.bytes}"
        elif bad.any():
            reason = f"does not match its checksums in {_ranges(bad)} of {count}"
        elif bad_index:
            reason = "does not match its checksum in the index"
        else:
            reason = "is not the file its part's manifest lists"
        if not bad.any() and not bad_index and read == record.bytes:
            bad_data[:] = True  # nothing in it proves itself
        return _Scan(reason, bad_data)

    def _mend_shard(self, shard: ShardLayout, record: FileRecord, scan: _Scan) -> Mend | None:
        """Return how to make a shard anew if all its frames are there."""
        if shard.crcs is not None and scan.bad_data[:-1].any():
            return None
        mend = partial(shard_blocks, self._raw, f"{self._folder}/{shard.file}", shard)
        digest, size = xxhash.xxh3_128(), 0
        try:
            for block in mend():
                digest.update(memoryview(cast(Any, block)))
                size += len(block)
        except (OSError, StoreError):
            return None
        return mend if size == record.bytes and digest.hexdigest() == record.xxh3 else None

    def _touching(self, output: str, shard: ShardLayout, bad: np.ndarray) -> np.ndarray:
        """Return the utterances that have frames in damaged chunks, (U,) bool."""
        offsets = self._into.arrays.get(offsets_file(output))
        if offsets is None:  # everyone is lost already
            return np.ones(self._count, bool)
        first, stop = offsets[:-1], offsets[1:]
        before = np.concatenate([[0], np.cumsum(bad)])  # damaged chunks before each chunk
        last = np.maximum(stop - 1, 0) // shard.rows
        return (stop > first) & (before[last + 1] > before[np.minimum(first // shard.rows, last)])

    def _unlisted(self) -> None:
        into = self._into
        more = sorted(set(self._found.files) - set(into.records) - {layout.METADATA})
        if more:
            into.notes.append(
                f"holds {len(more)} files that its manifest does not list, the first is {more[0]}"
            )
        listed = {*into.records, layout.METADATA}
        for name, why in self._found.unreadable.items():
            if name not in listed and not any(file.startswith(f"{name}/") for file in listed):
                into.notes.append(f"holds {name}, which cannot be looked at: {why}")


@dataclass(slots=True)
class _Scan:
    reason: str
    bad_data: np.ndarray  # (num_chunks,) bool: frames that are lost


def newer_format(data: bytes) -> int | None:
    """Return the version of sealed metadata that a later release wrote, None if it is damaged."""
    try:
        mer = json.loads(data)["attributes"]["mer"]
        version = mer["format"]
        if mer["checksum"] == layout.checksum(mer) and version > layout.FORMAT_VERSION:
            return int(version)
    except (ValueError, KeyError, TypeError):
        pass
    return None


def respelled(data: bytes, mer: Mapping[str, Any]) -> bytes | None:
    """Return sealed metadata as it should be spelled, None if it is.

    White space, escapes and the last digits of numbers can change without changing the content.
    """
    text = layout.to_bytes(layout.group_document(mer))
    return None if text == data else text


def _ranges(bad: np.ndarray) -> str:
    """Return numbers of chunks for people: ``chunks 3, 5-7``."""
    at = np.flatnonzero(bad)
    runs = np.split(at, np.flatnonzero(np.diff(at) > 1) + 1)
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs[:5]]
    more = ", …" if len(runs) > 5 else ""
    return f"chunk{'s' if len(at) > 1 else ''} {', '.join(texts)}{more}"


def _bytes(blocks: Iterator[Buffer]) -> Iterator[bytes]:
    for block in blocks:
        yield bytes(block)
