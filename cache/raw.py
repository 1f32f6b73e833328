"""The files of a store as they are, for what must work where a store cannot be opened.

Nothing here interprets a byte. ``Store``, ``Place`` and ``PartReader`` refuse what is damaged;
``verify`` and ``du`` have to look at it all the same.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from mer.cache import layout
from mer.cache.reader import forget_map, is_part_name
from mer.cache.staging import Buffer, quarantine_folder, staged, write_file, writing

if TYPE_CHECKING:
    from mer.cache.place import Place

BLOCK_BYTES = 1 << 20  # stays in the processor's cache between two checksums
TEMPORARY_SUFFIX = ".tmp"  # beside the store: what is being built, or deleted


@dataclass(frozen=True, slots=True)
class RawFile:
    """Size in bytes and time of the last change in seconds since 1970."""

    bytes: int
    modified: float


@dataclass(slots=True)
class Listing:
    """What lies below a folder.

    Attributes
    ----------
    files : dict of str to RawFile
        By path below the folder, with slashes.
    folders : set of str
        Folders, empty ones included; an object store has none.
    unreadable : dict of str to str
        What could not be looked at, and why.
    """

    files: dict[str, RawFile] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)
    unreadable: dict[str, str] = field(default_factory=dict)

    def by_part(self) -> dict[str, Listing]:
        """Return one listing per entry of ``parts/`` that may be a part, in their order."""
        found: dict[str, Listing] = {}
        for name, file in self.files.items():
            part, rest = _split(name)
            if rest and (part in found or is_part_name(part)):
                found.setdefault(part, Listing()).files[rest] = file
        for name in self.folders:
            part, rest = _split(name)
            if part in found or is_part_name(part):
                listing = found.setdefault(part, Listing())
                if rest:
                    listing.folders.add(rest)
        for name, why in self.unreadable.items():
            part, rest = _split(name)
            if part in found or is_part_name(part):
                found.setdefault(part, Listing()).unreadable[rest] = why
        return dict(sorted(found.items()))


def _split(name: str) -> tuple[str, str]:
    """Return the entry of ``parts/`` that a file of a store belongs to, and its path below that."""
    head, _, rest = name.partition("/")
    part, _, rest = rest.partition("/")
    return (part, rest) if head == layout.PARTS else ("", "")


class Raw(Protocol):
    """The files of one store, wherever it lies. Names are paths below it, with slashes.

    Reading raises ``FileNotFoundError`` for what is not there, ``PermissionError`` for what may not
    be read, another ``OSError`` where a device failed, and ``StoreError`` where the place itself
    could not be asked, which says nothing about the file.
    """

    url: str
    name: str

    def check_writable(self) -> None:
        """Raise ``UsageError`` where nothing can ever be written."""

    def listing(self, suffix: str = "") -> Listing:
        """Return all files; with a suffix those below the store's path with that behind it."""

    def exists(self, part: str) -> bool:
        """Whether a part is still there."""

    def modified(self, parts: Sequence[str]) -> dict[str, float]:
        """Return when parts were committed, in seconds since 1970; without those that are gone."""

    def stamps(self, parts: Sequence[str]) -> dict[str, str]:
        """Return what changes once a part is committed anew under its name; "" if it is gone."""

    def set_modified(self, part: str, modified: float) -> None:
        """Date a part back, where the place has dates that can be set."""

    def read(self, file: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return bytes ``start`` to ``stop`` or the end of the file, if that comes first, uint8."""

    def blocks(self, file: str, size: int, step: int) -> Iterator[np.ndarray]:
        """Yield the first ``size`` bytes in blocks of ``step``, each valid until the next."""

    def replace(self, file: str, blocks: Iterable[Buffer]) -> None:
        """Put a file in the place of another, or of none, in one step and durably."""

    def set_aside(self, file: str) -> str:
        """Move a file to the quarantine and return where it is now."""

    def clear(self, suffix: str) -> None:
        """Remove the folder or file of that name beside the store."""

    def remove_if_empty(self) -> bool:
        """Remove the store unless it has parts; False if it has, or is gone already."""


def raw_of(place: Place) -> Raw:
    """Return the files of a store."""
    if place.path is not None:
        return LocalRaw(place.path, place.name)
    from mer.cache.raw_objects import ObjectRaw

    return cast(Raw, ObjectRaw(cast(Any, place)))


class LocalRaw:
    """The files of a store in a folder.

    Parameters
    ----------
    path : Path
        The folder.
    name : str, optional
        Of the store; another than that of the folder where a link leads to it.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.path = path
        self.url = str(path)
        self.name = path.name if name is None else name

    def check_writable(self) -> None:
        """Do nothing: trying will tell."""

    def listing(self, suffix: str = "") -> Listing:
        """Walk the folder."""
        found = Listing()
        _walk(f"{self.path}{suffix}", "", found)
        return found

    def exists(self, part: str) -> bool:
        """Whether the folder of a part is there."""
        return os.path.isdir(f"{self.path}/{layout.PARTS}/{part}")

    def modified(self, parts: Sequence[str]) -> dict[str, float]:
        """Look at the manifests."""
        found = {}
        for part in parts:
            with suppress(OSError):
                found[part] = os.stat(self._manifest(part)).st_mtime
        return found

    def stamps(self, parts: Sequence[str]) -> dict[str, str]:
        """Look at the manifests; without one, "" as well."""
        found = dict.fromkeys(parts, "")
        for part in parts:
            with suppress(OSError):
                its = os.stat(self._manifest(part))
                found[part] = f"{its.st_ino}-{its.st_size}-{its.st_mtime_ns}-{its.st_ctime_ns}"
        return found

    def set_modified(self, part: str, modified: float) -> None:
        """Set the time of the manifest."""
        with suppress(OSError):  # it only looks younger then
            os.utime(self._manifest(part), (modified, modified))

    def _manifest(self, part: str) -> str:
        return f"{self.path}/{layout.PARTS}/{part}/{layout.METADATA}"

    def read(self, file: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Read a stretch of a file."""
        descriptor = os.open(f"{self.path}/{file}", os.O_RDONLY)
        try:
            size = os.fstat(descriptor).st_size
            end = size if stop is None else min(stop, size)
            out = np.empty(max(0, end - start), np.uint8)
            out = out[: _fill(descriptor, out, start)]
        finally:
            os.close(descriptor)
        out.flags.writeable = False  # the checksum takes nothing else
        return out

    def blocks(self, file: str, size: int, step: int) -> Iterator[np.ndarray]:
        """Read block by block into one buffer."""
        descriptor = os.open(f"{self.path}/{file}", os.O_RDONLY)
        try:
            buffer = np.empty(min(step, size), np.uint8)
            view = buffer[:]
            view.flags.writeable = False
            for start in range(0, size, step):
                wanted = buffer[: min(step, size - start)]
                got = _fill(descriptor, wanted, start)
                if got:
                    yield view[:got]
                if got < len(wanted):
                    return
        finally:
            os.close(descriptor)

    def replace(self, file: str, blocks: Iterable[Buffer]) -> None:
        """Write beside the store, sync, rename."""
        target = self.path / file
        with writing(self.path), staged(self.path) as temporary:
            write_file(temporary, blocks)
            _sync(temporary)
            self._make_folders(file)
            os.replace(temporary, target)
            forget_map(str(target))
            _sync(target.parent)

    def _make_folders(self, file: str) -> None:
        """Make the folders of a file, but never a part: that was removed meanwhile then."""
        folders = file.split("/")[:-1]
        there = 2 if folders[:1] == [layout.PARTS] and len(folders) > 1 else 0
        for depth in range(there + 1, len(folders) + 1):
            with suppress(FileExistsError):
                os.mkdir("/".join([str(self.path), *folders[:depth]]))

    def set_aside(self, file: str) -> str:
        """Rename into ``<store>.quarantine``."""
        with writing(self.path):
            return str(quarantine_folder(self.path, self.path / file))

    def clear(self, suffix: str) -> None:
        """Remove a sibling; one that is gone is no error."""
        for name in {self.path.name, self.name}:
            path = self.path.with_name(name + suffix)
            with writing(self.path), suppress(FileNotFoundError):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()

    def remove_if_empty(self) -> bool:
        """Rename the folder away and look into it once nobody can find it any more."""
        parts = self.path / layout.PARTS
        if _parts_in(parts) or not self.path.is_dir():
            return False
        with writing(self.path), staged(self.path) as grave:
            try:
                os.rename(self.path, grave)
            except FileNotFoundError:  # another process was faster
                return False
            late = _parts_in(grave / layout.PARTS)
            if late:  # committed between the two looks
                try:
                    os.rename(grave, self.path)
                except OSError:  # and the store made anew
                    for part in late:
                        if not (parts / part).exists():
                            os.rename(grave / layout.PARTS / part, parts / part)
                return False
        return True


def _parts_in(folder: Path) -> list[str]:
    try:
        return [name for name in os.listdir(folder) if is_part_name(name)]
    except FileNotFoundError:
        return []


def _fill(descriptor: int, out: np.ndarray, start: int) -> int:
    """Read into ``out`` from a position of the file and return how much there was."""
    got = 0
    while got < len(out):
        more = os.preadv(descriptor, [out[got:].data], start + got)
        if not more:
            break
        got += more
    return got


def _walk(root: str, below: str, found: Listing) -> None:
    folder = f"{root}/{below}" if below else root
    try:
        with os.scandir(folder) as scan:
            entries = sorted(scan, key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        if not below and os.path.isfile(folder):  # a sibling may be a file
            state = os.stat(folder)
            found.files[""] = RawFile(state.st_size, state.st_mtime)
        return
    except OSError as error:
        found.unreadable[below] = error.strerror or str(error)
        return
    for entry in entries:
        name = f"{below}/{entry.name}" if below else entry.name
        try:
            state = entry.stat()
        except FileNotFoundError:  # removed meanwhile, or a link to nothing
            if entry.is_symlink():
                found.unreadable[name] = "a link to nothing"
            continue
        except OSError as error:
            found.unreadable[name] = error.strerror or str(error)
            continue
        if stat.S_ISDIR(state.st_mode):
            found.folders.add(name)
            _walk(root, name, found)
        elif stat.S_ISREG(state.st_mode):
            found.files[name] = RawFile(state.st_size, state.st_mtime)
        else:
            found.unreadable[name] = "neither a file nor a folder"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
