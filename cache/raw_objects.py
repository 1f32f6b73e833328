"""The files of a store in an object store, or behind a web server, as they are (``raw.py``)."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress

import numpy as np
import xxhash

from mer.cache import layout
from mer.cache.errors import DamagedStoreError
from mer.cache.raw import Listing, RawFile
from mer.cache.remote import ObjectPlace
from mer.cache.staging import ABANDONED_S, Buffer

_REQUEST_BYTES = 8 << 20


class ObjectRaw:
    """The objects of one store; the server is asked every time, no copy of ours.

    Parameters
    ----------
    place : ObjectPlace
        The store.
    """

    def __init__(self, place: ObjectPlace) -> None:
        self._place = place
        self._bucket = place.bucket
        self.url = place.url
        self.name = place.name
        self._sizes: dict[str, int] = {}

    def check_writable(self) -> None:
        """Refuse a web server."""
        self._bucket.check_writable()

    def listing(self, suffix: str = "") -> Listing:
        """List objects; of a web server, which lists nothing, what manifests tell."""
        if self._bucket.is_web:
            return self._told() if not suffix else Listing()
        below, prefix = (suffix[1:], suffix) if suffix.startswith("/") else ("", "")
        bucket = self._bucket if not suffix or prefix else self._bucket.sibling(suffix)
        cut = len(below) + 1 if below else 0
        found = Listing()
        for listed in bucket.objects(below):
            found.files[listed.name[cut:]] = RawFile(listed.bytes, listed.modified)
        if not suffix:
            self._sizes = {name: file.bytes for name, file in found.files.items()}
        return found

    def _told(self) -> Listing:
        found = Listing()
        manifests = {
            part: f"{layout.PARTS}/{part}/{layout.METADATA}" for part in self._place.part_names()
        }
        contents = self._bucket.get_all(manifests.values())
        for part, manifest in manifests.items():
            data = contents[manifest]
            if data is None:
                continue
            found.files[manifest] = RawFile(len(data), 0.0)
            with suppress(ValueError, KeyError, TypeError, AttributeError):
                files = json.loads(data)["attributes"]["mer"]["files"]
                for name, record in files.items():
                    file = f"{layout.PARTS}/{part}/{name}"
                    found.files[file] = RawFile(int(record["bytes"]), 0.0)
        return found

    def exists(self, part: str) -> bool:
        """Whether there is a manifest, which makes a part."""
        return self._bucket.size(f"{layout.PARTS}/{part}/{layout.METADATA}") is not None

    def modified(self, parts: Sequence[str]) -> dict[str, float]:
        """Look at the manifests in the listing."""
        if self._bucket.is_web:
            return {}
        wanted = set(parts)
        return {
            part: listing.files[layout.METADATA].modified
            for part, listing in self.listing().by_part().items()
            if part in wanted and layout.METADATA in listing.files
        }

    def stamps(self, parts: Sequence[str]) -> dict[str, str]:
        """Hash the listing of all objects of a part, or the manifest that a web server has."""
        if self._bucket.is_web:
            manifests = {part: f"{layout.PARTS}/{part}/{layout.METADATA}" for part in parts}
            contents = self._bucket.get_all(manifests.values())
            return {part: _digest(contents[file] or b"") for part, file in manifests.items()}
        prefix = f"{layout.PARTS}/{parts[0]}" if len(parts) == 1 else layout.PARTS
        listed: dict[str, list[str]] = {part: [] for part in parts}
        for found in self._bucket.objects(prefix) if parts else ():
            part = found.name.split("/", 2)[1]
            if part in listed:
                text = f"{found.name} {found.bytes} {found.modified} {found.tag}"
                listed[part].append(text)
        return {part: _digest("\n".join(texts).encode()) for part, texts in listed.items()}

    def set_modified(self, part: str, modified: float) -> None:
        """Do nothing: objects have the date of their upload."""

    def read(self, file: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Read an object, or a stretch of it."""
        if start == 0 and stop is None:
            return np.frombuffer(self._bucket.get(file), np.uint8)
        if stop is None:
            stop = self._size(file)
        try:
            data = self._bucket.get_range(file, start, stop)
        except DamagedStoreError:  # shorter than that
            size = self._bucket.size(file)
            if size is None:
                raise FileNotFoundError(file) from None
            data = self._bucket.get_range(file, start, max(start, min(stop, size)))
        return np.frombuffer(bytes(data), np.uint8)

    def _size(self, file: str) -> int:
        size = self._sizes.get(file)
        if size is None:
            size = self._bucket.size(file)
        if size is None:
            raise FileNotFoundError(file)
        return size

    def blocks(self, file: str, size: int, step: int) -> Iterator[np.ndarray]:
        """Fetch several blocks with one request."""
        many = max(1, _REQUEST_BYTES // step) * step
        for start in range(0, size, many):
            wanted = min(many, size - start)
            data = self.read(file, start, start + wanted)
            for at in range(0, len(data), step):
                yield data[at : at + step]
            if len(data) < wanted:
                return

    def replace(self, file: str, blocks: Iterable[Buffer]) -> None:
        """Put the object."""
        self._bucket.put(file, b"".join(bytes(block) for block in blocks))

    def set_aside(self, file: str) -> str:
        """Copy the object to the quarantine, then delete it."""
        away = self._bucket.sibling(layout.QUARANTINE_SUFFIX)
        flat = file.replace("/", "-")
        taken = {listed.name for listed in away.objects()}
        name = next(n for i in range(1, 1 << 30) if (n := f"{flat}-{i}") not in taken)
        self._bucket.copy(file, away, name)
        self._bucket.delete([file])
        return f"{away.url}/{name}"

    def clear(self, suffix: str) -> None:
        """Delete the objects; a snapshot lies on this machine."""
        if suffix == layout.INDEX_SUFFIX:
            path = self._place.index_path()
            if path is not None:
                path.unlink(missing_ok=True)
            return
        away = self._bucket.sibling(suffix)
        away.delete([listed.name for listed in away.objects()])
        self._bucket.parent().delete([self.name + suffix])

    def remove_if_empty(self) -> bool:
        """Delete what is left, the root last, unless somebody may be uploading."""
        if self._place.part_names():
            return False
        listing = self.listing()
        own = {layout.METADATA, f"{layout.PARTS}/{layout.METADATA}"}
        oldest = time.time() - ABANDONED_S
        if any(f.modified > oldest for name, f in listing.files.items() if name not in own):
            return False
        self._bucket.delete([name for name in listing.files if name != layout.METADATA])
        if layout.METADATA not in listing.files:
            return False
        self._bucket.delete([layout.METADATA])
        return True


def _digest(data: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(data) if data else ""
