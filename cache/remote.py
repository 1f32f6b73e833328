"""Stores in object stores (``s3://``, ``gs://``) and, only to be read, behind web servers.

A part is visible once its manifest is there, and its manifest is written last. What is read comes
in inner chunks, each verified before anyone sees it. Chunks lie in memory, in the local copy
(``localcopy.py``) or on the server, in that order; what is missing of a whole batch or epoch is
fetched together, in few and large requests at the same time (``nearby.py``).
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from functools import cached_property
from pathlib import Path

import numpy as np
import xxhash

from mer.cache import layout
from mer.cache.clients import gather
from mer.cache.errors import DamagedStoreError, StoreError, UsageError
from mer.cache.layout import FileRecord
from mer.cache.localcopy import INDEX_FOLDER, local_copy, local_folder
from mer.cache.nearby import (
    Block,
    Fetcher,
    Need,
    ShardKey,
    block_bounds,
    block_chunks,
    block_name,
    copy_name,
    memory,
    small_name,
)
from mer.cache.objects import Bucket, Listed
from mer.cache.place import is_store_name
from mer.cache.reader import PartGoneError, PartReader, ShardLayout, is_part_name
from mer.cache.spec import OutputSpec
from mer.cache.staging import ABANDONED_S, staged, sweep

logger = logging.getLogger(__name__)

PARTS_SUFFIX = ".parts.json"  # beside a store: its parts, for readers that cannot list
_SMALL_WINDOW_BYTES = 16 << 20


class ObjectFiles:
    """The files of one part, as objects.

    Parameters
    ----------
    place : ObjectPlace
        The store.
    part : str
        Its id.
    """

    def __init__(self, place: ObjectPlace, part: str) -> None:
        self.place, self.part = place, part
        self.where = f"{place.url}/{layout.PARTS}/{part}"
        self.records: Mapping[str, FileRecord] = {}
        self.manifest_sum = ""

    def name(self, file: str) -> str:
        """Return the name of the object of a file, below the store."""
        return f"{layout.PARTS}/{self.part}/{file}"

    def manifest(self) -> bytes:
        """Return the part's ``zarr.json``; without it there is no part."""
        signature = self.place.signature(self.part)
        copy = None if signature is None else local_copy()
        kept = copy_name("manifest", self.where, str(signature))
        data = None
        if copy is not None and signature is not None:
            found = copy.get(kept, signature[0])
            data = None if found is None else found.data.tobytes()
            if data is not None and not _is_sealed(data):
                copy.drop(kept)
                data = None
        if data is None:
            try:
                size = None if signature is None else signature[0]
                data = self.place.bucket.get(self.name(layout.METADATA), size)
            except FileNotFoundError as error:
                raise PartGoneError(f"{self.where} is gone since the store was listed.") from error
            if copy is not None and signature is not None and _is_sealed(data):
                copy.put(kept, data)
        self.manifest_sum = xxhash.xxh3_128_hexdigest(data)
        return data

    def check(self, files: Mapping[str, FileRecord]) -> None:
        """Compare the size of every listed file with the listing of the store, if there is one."""
        self.records = files
        sizes = self.place.sizes(self.part)
        if sizes is None or all(sizes.get(n) == r.bytes for n, r in files.items()):
            return
        # A listing takes several requests, between which the part may have come or gone.
        sizes = self.place.sizes(self.part, anew=True) or {}
        if layout.METADATA not in sizes:
            raise PartGoneError(f"{self.where} is gone since the store was listed.")
        for name, record in files.items():
            size = sizes.get(name)
            if size is None:
                raise self._missing(name)
            if size != record.bytes:
                raise DamagedStoreError(
                    f"{self.where}/{name} has {size} bytes, its manifest says {record.bytes}."
                )

    def small(self, file: str, num_bytes: int) -> np.ndarray:
        """Return a whole file; those of the parts that follow are fetched with it."""
        data = self._kept(file, num_bytes)
        if data is None:
            data = self.place.fetch_small(self, file)
        if len(data) != num_bytes:
            raise DamagedStoreError(
                f"{self.where}/{file} has {len(data)} bytes, its manifest says {num_bytes}."
            )
        return data

    def large(self, file: str, num_bytes: int) -> np.ndarray:
        """Return a whole file."""
        return self.small(file, num_bytes)

    def _kept(self, file: str, num_bytes: int) -> np.ndarray | None:
        """Return a file from memory or the local copy."""
        record = self.records[file]
        data = memory.get(record.xxh3)
        if data is not None:
            return data
        copy = local_copy()
        found = None if copy is None else copy.get(small_name(record), num_bytes)
        if found is None or copy is None:
            return None
        if not found.verified[0]:
            if xxhash.xxh3_128_hexdigest(found.data.data) != record.xxh3:
                logger.info("A file of the local copy is damaged; %s is fetched again.", file)
                copy.drop(small_name(record))
                return None
            found.verified[0] = 1
        return found.data

    def needs_small(self, file: str) -> bool:
        """Whether a file would have to be fetched."""
        record = self.records.get(file)
        if record is None or memory.get(record.xxh3) is not None:
            return False
        copy = local_copy()
        return copy is None or not copy.has(small_name(record), record.bytes)

    def bring_small(self, file: str) -> np.ndarray:
        """Fetch a file and keep it."""
        record = self.records[file]
        for last in (False, True):  # a flip on the way is not on the server
            try:
                content = self.place.bucket.get(self.name(file), record.bytes)
            except FileNotFoundError as error:
                raise self._missing(file) from error
            if xxhash.xxh3_128_hexdigest(content) == record.xxh3:
                break
            if last:
                raise DamagedStoreError(f"{self.where}/{file} does not match its checksum.")
        data = np.frombuffer(bytearray(content), np.uint8)
        memory.put(record.xxh3, data, len(data))
        copy = local_copy()
        if copy is not None:
            copy.put(small_name(record), content)
        return data

    def stream(self, file: str, num_bytes: int) -> Iterator[memoryview]:
        """Yield a file as it is, in order; ``DamagedStoreError`` if it is shorter or missing."""
        try:
            yield from self.place.bucket.stream(self.name(file), num_bytes)
        except FileNotFoundError as error:
            raise self._missing(file) from error

    def chunks(self, shard: ShardLayout, first: int, last: int) -> np.ndarray:
        """Return chunks from wherever they are nearest."""
        size = block_chunks(shard)
        pieces = []
        for block in range(first // size, last // size + 1):
            begin = block * size
            low, high = max(first, begin), min(last + 1, begin + size)
            pieces.append(self._piece(shard, block, low - begin, high - begin))
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _piece(self, shard: ShardLayout, block: int, low: int, high: int) -> np.ndarray:
        data = self._near(shard, block, low, high)
        if data is None:
            if self.place.fetcher.go_on(self, shard, block):
                data = self._near(shard, block, low, high)
            if data is None:
                need = Need(self, shard, block, low, high)
                fetched = self.place.fetcher.fetch([need], strict=True)
                data = fetched[need.key].data[low:high]
        return data

    def _near(self, shard: ShardLayout, block: int, low: int, high: int) -> np.ndarray | None:
        """Return chunks of a block if they are in memory or in the local copy."""
        key = self.key(shard)
        found: Block | None = memory.get((key, block))
        if found is not None and all(found.present[low:high]):
            return found.data[low:high]
        copy = local_copy()
        if copy is None:
            return None
        begin, count = block_bounds(shard, block)
        name = block_name(key, shard, block)
        file = copy.get(name, count * shard.chunk_bytes, count)
        if file is None:
            return None
        data = file.data.reshape(count, shard.chunk_bytes)
        try:
            for chunk in range(low, high):
                if not file.verified[chunk]:
                    shard.verify(data[chunk : chunk + 1], begin + chunk, name)
                    file.verified[chunk] = 1
        except DamagedStoreError:
            logger.info("A block of the local copy is damaged; it is fetched again.")
            copy.drop(name)
            return None
        return data[low:high]

    def key(self, shard: ShardLayout) -> ShardKey:
        """Return what tells this shard from any other."""
        return ShardKey(self.place.url, self.part, shard.file, self.manifest_sum)

    def _missing(self, file: str) -> DamagedStoreError:
        if self.place.bucket.size(self.name(layout.METADATA)) is None:
            return PartGoneError(f"{self.where} is gone since the store was listed.")
        return DamagedStoreError(f"{self.where}/{file} is missing; its part's manifest lists it.")

    def error(
        self, shard: ShardLayout, cause: FileNotFoundError | DamagedStoreError
    ) -> DamagedStoreError:
        """Return the error of a shard that could not be read."""
        return cause if isinstance(cause, DamagedStoreError) else self._missing(shard.file)


class ObjectPlace:
    """One store as objects.

    It may be used by several threads and is pickled as its URL.

    Parameters
    ----------
    url : str
        ``s3://``, ``gs://``, ``http://`` or ``https://``, of the store itself.
    """

    path: Path | None = None

    def __init__(self, url: str) -> None:
        self.bucket = Bucket(url)
        self.url = self.bucket.url
        self.name = self.bucket.name
        self._listing: dict[str, dict[str, Listed]] | None = None
        self._open: weakref.WeakValueDictionary[str, ObjectFiles] = weakref.WeakValueDictionary()
        self.fetcher = Fetcher(self.bucket)
        self._lists_parts: bool | None = None

    def __reduce__(self) -> tuple[type[ObjectPlace], tuple[str]]:
        return ObjectPlace, (self.url,)

    def __repr__(self) -> str:
        return f"ObjectPlace({self.url!r})"

    # -- the store as a whole ------------------------------------------------------------------

    def metadata(self) -> bytes:
        """Return the root's ``zarr.json``."""
        try:
            return self.bucket.get(layout.METADATA)
        except FileNotFoundError as error:
            raise DamagedStoreError(
                f"{self.url}/{layout.METADATA} is missing: the store has no metadata."
            ) from error

    def has_metadata(self) -> bool:
        """Whether the root's ``zarr.json`` is there."""
        return self.bucket.size(layout.METADATA) is not None

    def create(self, metadata: bytes) -> None:
        """Put what is missing of the root; someone else having made it is as good."""
        parts = layout.to_bytes(layout.group_document())
        self.bucket.put(f"{layout.PARTS}/{layout.METADATA}", parts, create=True)
        self.bucket.put(layout.METADATA, metadata, create=True)

    def part_names(self) -> list[str]:
        """Return the parts that have a manifest.

        Raises
        ------
        UsageError
            A web server without a list of the parts beside the store.
        """
        if self.bucket.is_web:
            return self._published_parts()
        listing: dict[str, dict[str, Listed]] = {}
        total = 0
        for listed in self.bucket.objects(layout.PARTS):
            _, part, file = (*listed.name.split("/", 2), "", "")[:3]
            if is_part_name(part) and file:
                listing.setdefault(part, {})[file] = listed
                total += listed.bytes
        self._listing, self.fetcher.total = listing, total
        return sorted(part for part, files in listing.items() if layout.METADATA in files)

    def _published_parts(self) -> list[str]:
        file = self.url + PARTS_SUFFIX
        try:
            document = json.loads(self.bucket.parent().get(self.name + PARTS_SUFFIX))
            parts = document["parts"]
            if document["format"] != 1 or not all(is_part_name(part) for part in parts):
                raise ValueError("not a list of parts")
            return sorted(parts)
        except FileNotFoundError as error:
            raise UsageError(
                f"{file} is missing. A web server lists nothing, so a store on one needs this list "
                "of its parts; `mer cache cp` writes it."
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedStoreError(
                f"{file} is not a list of parts ({error}). Write it anew."
            ) from error

    def signature(self, part: str) -> tuple[int, int, int] | None:
        """Return size, time (µs) and tag of a manifest as listed, None if it is not."""
        listed = (self._listing or {}).get(part, {}).get(layout.METADATA)
        if listed is None:
            return None
        tag = int.from_bytes(hashlib.blake2b(listed.tag.encode(), digest_size=8).digest(), "big")
        return listed.bytes, round(listed.modified * 1e6), tag >> 1

    def signatures(self, parts: Sequence[str]) -> np.ndarray | None:
        """Return what the listing says of the manifests; -1 where it does not."""
        if self.bucket.is_web:
            return None
        rows = [self.signature(part) or (-1, -1, -1) for part in parts]
        return np.array(rows, np.int64).reshape(-1, 3)

    def sizes(self, part: str, anew: bool = False) -> dict[str, int] | None:
        """Return the bytes of every object of a part by file, None where nothing is listed."""
        if self.bucket.is_web:
            return None
        if anew:
            prefix = f"{layout.PARTS}/{part}"
            files = {o.name[len(prefix) + 1 :]: o for o in self.bucket.objects(prefix)}
            self._listing = {**(self._listing or {}), part: files}
        listed = (self._listing or {}).get(part)
        return None if listed is None else {file: o.bytes for file, o in listed.items()}

    def index_path(self) -> Path | None:
        """Return a file beside the local copy."""
        copy = local_copy()
        if copy is None:
            return None
        path = copy.folder / INDEX_FOLDER / f"{copy_name('index', self.url)}{layout.INDEX_SUFFIX}"
        with suppress(OSError):  # then nothing is kept
            path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def read_parts(
        self, parts: Sequence[str], outputs: tuple[OutputSpec, ...], fingerprint: str
    ) -> list[PartReader | DamagedStoreError | None]:
        """Read all manifests at the same time."""

        def read(part: str) -> PartReader | DamagedStoreError | None:
            reader = self.lazy_part(part, outputs, fingerprint)
            try:
                reader.load()
            except PartGoneError:
                if not self.bucket.is_web:
                    return None
                return DamagedStoreError(
                    f"{self.url}{PARTS_SUFFIX} lists part {part}, which is not there. Write the "
                    "list anew."
                )
            except DamagedStoreError as error:
                return error
            return reader

        return gather([(read, part) for part in parts])

    def lazy_part(self, part: str, outputs: tuple[OutputSpec, ...], fingerprint: str) -> PartReader:
        """Return a reader that looks at nothing yet."""
        return PartReader(part, self.files(part), outputs, fingerprint)

    def files(self, part: str) -> ObjectFiles:
        """Return the files of a part."""
        with memory.lock:
            files = self._open.get(part)
            if files is None:
                files = self._open[part] = ObjectFiles(self, part)
            return files

    # -- fetching ------------------------------------------------------------------------------

    def fetch_small(self, files: ObjectFiles, file: str) -> np.ndarray:
        """Fetch a file of a part, and the same file of the parts behind it while it is cheap."""
        wanted, total = [files], 0
        with memory.lock:
            known = sorted(self._open.items())
        for part, other in known:
            if total >= _SMALL_WINDOW_BYTES:
                break
            if part > files.part and other.needs_small(file):
                wanted.append(other)
                total += other.records[file].bytes

        def bring(other: ObjectFiles) -> np.ndarray | None:
            if other is files:
                return other.bring_small(file)
            with suppress(DamagedStoreError):  # whoever needs it will be told
                other.bring_small(file)
            return None

        data: np.ndarray = gather([(bring, other) for other in wanted])[0]
        return data

    def prefetch(self, wanted: Sequence[tuple[PartReader, str, int, int]]) -> None:
        """Fetch all chunks that are missing of (part, output, first frame, end).

        What memory cannot hold at once is fetched when reading, in the same order, comes to it.
        """
        lazy = {part.id: part for part, _, _, _ in wanted if not _is_loaded(part)}
        if lazy:
            gather([(_load, part) for part in lazy.values()])
        spans: dict[tuple[str, str, int], list[int]] = {}
        about: dict[tuple[str, str], tuple[ObjectFiles, ShardLayout]] = {}
        for part, output, start, stop in wanted:
            if start >= stop:
                continue
            known = about.get((part.id, output))
            if known is None:
                try:
                    known = about[part.id, output] = self.files(part.id), part.shard(output)
                except DamagedStoreError:  # whoever reads it will be told
                    continue
            shard = known[1]
            first, last, size = start // shard.rows, (stop - 1) // shard.rows, block_chunks(shard)
            for block in range(first // size, last // size + 1):
                low = max(first - block * size, 0)
                high = min(last + 1 - block * size, size)
                span = spans.setdefault((part.id, output, block), [low, high])
                span[0], span[1] = min(span[0], low), max(span[1], high)
        self.fetcher.bring(
            [
                Need(*about[part_id, output], block, low, high)
                for (part_id, output, block), (low, high) in spans.items()
            ]
        )

    # -- writing -------------------------------------------------------------------------------

    def staging(self) -> AbstractContextManager[Path]:
        """Yield a path on this machine."""
        return staged(self._staging())

    def _staging(self) -> Path:
        copy = local_copy()
        folder = local_folder() / "staging" if copy is None else copy.folder / INDEX_FOLDER
        path = folder / copy_name("staging", self.url)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError:
            path = Path(tempfile.gettempdir()) / "mer" / path.name
            path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def publish(self, folder: Path, part: str) -> bool:
        """Upload all files at the same time, then the manifest, unless there is one."""
        prefix = f"{layout.PARTS}/{part}"
        manifest = f"{prefix}/{layout.METADATA}"
        if self.bucket.size(manifest) is not None:
            return False
        files = {
            f"{prefix}/{path.relative_to(folder).as_posix()}": path
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        document = files.pop(manifest).read_bytes()
        largest_first = sorted(files, key=lambda name: -files[name].stat().st_size)
        self.bucket.put_all({name: files[name] for name in largest_first})
        created = self.bucket.put(manifest, document, create=True)
        # Someone may just have been removing a part of this name: of the same bytes, then.
        there = {listed.name: listed.bytes for listed in self.bucket.objects(prefix)}
        lost = {n: p for n, p in files.items() if there.get(n) != p.stat().st_size}
        if lost:
            logger.warning("%d objects of %s vanished; writing them again.", len(lost), part)
            self.bucket.put_all(lost)
        self._parts_changed()
        return created

    def remove(self, part: str) -> None:
        """Delete the manifest, then the rest."""
        prefix = f"{layout.PARTS}/{part}"
        self.bucket.delete([f"{prefix}/{layout.METADATA}"])
        self.bucket.delete([listed.name for listed in self.bucket.objects(prefix)])
        self._parts_changed()

    def quarantine(self, part: str) -> str:
        """Copy all objects to ``<store>.quarantine/``, then remove them."""
        away = self.bucket.sibling(layout.QUARANTINE_SUFFIX)
        taken = set(away.folders())
        number = next(n for n in range(1, 1 << 30) if f"{part}-{n}" not in taken)
        prefix = f"{layout.PARTS}/{part}"
        target = away.child(f"{part}-{number}")

        def copy(name: str) -> None:
            with suppress(FileNotFoundError):  # what is missing is why it goes there
                self.bucket.copy(name, target, name[len(prefix) + 1 :])

        gather([(copy, listed.name) for listed in self.bucket.objects(prefix)])
        self.remove(part)
        return target.url

    def sweep(self, older_than_s: float = ABANDONED_S) -> None:
        """Remove the objects of parts that never got a manifest and are older than a day."""
        self.bucket.check_writable()
        sweep(self._staging())
        parts: dict[str, list[Listed]] = {}
        for listed in self.bucket.objects(layout.PARTS):
            _, part, file = (*listed.name.split("/", 2), "", "")[:3]
            if is_part_name(part) and file:
                parts.setdefault(part, []).append(listed)
        oldest = time.time() - older_than_s
        left: list[str] = []
        for part, objects in parts.items():
            names = [listed.name for listed in objects]
            if f"{layout.PARTS}/{part}/{layout.METADATA}" in names:
                continue
            if max(listed.modified for listed in objects) < oldest:
                logger.info("Removing the unfinished part %s of %s.", part, self.url)
                left += names
        self.bucket.delete(left)

    def write_parts_list(self) -> str:
        """Write the list of parts that readers through a web server need; return its URL."""
        parts = self.part_names()
        self.bucket.parent().put(self.name + PARTS_SUFFIX, parts_list(parts))
        self._lists_parts = True
        return self.url + PARTS_SUFFIX

    def _parts_changed(self) -> None:
        """Keep the list of parts true where someone wrote one."""
        if self._lists_parts is None:
            size = self.bucket.parent().size(self.name + PARTS_SUFFIX)
            self._lists_parts = size is not None
        if self._lists_parts:
            self.write_parts_list()


class ObjectHome:
    """A prefix of a bucket with stores below it.

    Parameters
    ----------
    url : str
        ``s3://bucket/prefix`` …
    """

    is_local = False

    def __init__(self, url: str) -> None:
        self.bucket = Bucket(url)
        self.url = self.bucket.url

    def __reduce__(self) -> tuple[type[ObjectHome], tuple[str]]:
        return ObjectHome, (self.url,)

    @cached_property
    def folder(self) -> Path:
        """Folder on this machine for what is kept beside the stores."""
        return local_folder()

    def names(self) -> list[str]:
        """Return the names of all stores.

        Raises
        ------
        UsageError
            A web server: it lists nothing.
        """
        if self.bucket.is_web:
            raise UsageError(
                f"{self.url} is on a web server, which does not list its stores. Give the URL of "
                "one store."
            )
        return [name for name in self.bucket.folders() if is_store_name(name)]

    def place(self, name: str) -> ObjectPlace:
        """Return the place of a store, which need not exist."""
        return ObjectPlace(f"{self.url}/{name}")


def parts_list(parts: Sequence[str]) -> bytes:
    """Return the document that lists the parts of a store."""
    return json.dumps({"format": 1, "parts": sorted(parts)}, indent=0).encode("ascii") + b"\n"


def _is_loaded(part: PartReader) -> bool:
    return "manifest" in vars(part)


def _load(part: PartReader) -> None:
    with suppress(DamagedStoreError):  # whoever reads it will be told
        part.load()


def _is_sealed(data: bytes) -> bool:
    try:
        layout.unseal(data, "")
    except StoreError:
        return False
    return True
