"""Where stores lie: the operations that a store needs of a folder or a bucket, and no others.

A ``Home`` holds stores, a ``Place`` is one of them. What is here is for folders of a file system;
``remote.py`` has the same for object stores.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np

from mer.cache import layout
from mer.cache.errors import DamagedStoreError, StoreError, StoreFormatError, UsageError
from mer.cache.identity import FINGERPRINT_IN_NAME
from mer.cache.reader import MappedFiles, PartGoneError, PartReader, part_folders
from mer.cache.spec import OutputSpec
from mer.cache.staging import (
    publish,
    quarantine_folder,
    remove_folder,
    staged,
    sweep,
    write_file,
    writing,
)

if TYPE_CHECKING:
    from mer.cache.reader import ShardLayout

_STORE_NAME = re.compile(rf".+-[0-9a-f]{{{FINGERPRINT_IN_NAME}}}")
_REMOTE = ("s3", "s3a", "gs", "http", "https", "memory")

Listed = PartReader | DamagedStoreError | None


class Place(Protocol):
    """One store, wherever it lies.

    Attributes
    ----------
    url : str
        Path or URL, without a slash at the end.
    name : str
        Last component of it.
    path : Path or None
        The folder, if it is one.
    """

    @property
    def url(self) -> str: ...  # noqa: D102

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def path(self) -> Path | None: ...  # noqa: D102

    def metadata(self) -> bytes:
        """Return the root's ``zarr.json``; ``DamagedStoreError`` if there is none."""

    def has_metadata(self) -> bool:
        """Whether there is a root ``zarr.json``."""

    def create(self, metadata: bytes) -> None:
        """Make the store, or its root's ``zarr.json`` if that alone is missing; never overwrite."""

    def part_names(self) -> list[str]:
        """Return the ids of all visible parts, sorted."""

    def signatures(self, parts: Sequence[str]) -> np.ndarray | None:
        """Return (P, 3) int64 that change when a manifest does; None where that is not cheap."""

    def index_path(self) -> Path | None:
        """Return where a snapshot of manifests and keys may be kept, if anywhere."""

    def read_parts(
        self, parts: Sequence[str], outputs: tuple[OutputSpec, ...], fingerprint: str
    ) -> list[Listed]:
        """Return readers, manifests checked; the error of a damaged part; None for one gone."""

    def lazy_part(self, part: str, outputs: tuple[OutputSpec, ...], fingerprint: str) -> PartReader:
        """Return a reader that looks at nothing yet."""

    def prefetch(self, wanted: Sequence[tuple[PartReader, str, int, int]]) -> None:
        """Bring (part, output, first frame, end) near, many at once; only a matter of speed."""

    def staging(self) -> AbstractContextManager[Path]:
        """Yield a local path to build a part at; what is left there afterwards is removed."""

    def publish(self, folder: Path, part: str) -> bool:
        """Make a part built at ``staging`` visible in one step; False if it is there already."""

    def remove(self, part: str) -> None:
        """Make a part invisible in one step, then delete it; one that is gone is no error."""

    def quarantine(self, part: str) -> str:
        """Move a part out of the store and return where it is now."""

    def sweep(self) -> None:
        """Remove what writers that are gone have left."""


class LocalPlace:
    """A store in a folder.

    Parameters
    ----------
    path : Path
        Need not exist.
    """

    def __init__(self, path: Path | str) -> None:
        self.path: Path = Path(path).absolute()
        self.name = self.path.name
        if self.path.is_symlink():  # parts are born beside the folder itself, to be renamed into it
            self.path = self.path.resolve()
        self.url = str(self.path)

    def metadata(self) -> bytes:
        """Return the root's ``zarr.json``."""
        file = self.path / layout.METADATA
        try:
            return file.read_bytes()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DamagedStoreError(f"{file} is missing: the store has no metadata.") from error
        except OSError as error:
            raise StoreError(f"Cannot read {file}: {error.strerror}.") from error

    def has_metadata(self) -> bool:
        """Whether there is a root ``zarr.json``."""
        return (self.path / layout.METADATA).exists()

    def create(self, metadata: bytes) -> None:
        """Make the store; someone else having made it at the same time is as good."""
        parts = layout.to_bytes(layout.group_document())
        with writing(self.path), staged(self.path) as folder:
            (folder / layout.PARTS).mkdir(parents=True)
            write_file(folder / layout.PARTS / layout.METADATA, [parts])
            write_file(folder / layout.METADATA, [metadata])
            if publish(folder, self.path):
                return
            (self.path / layout.PARTS).mkdir(exist_ok=True)
            for name in (f"{layout.PARTS}/{layout.METADATA}", layout.METADATA):
                with suppress(FileExistsError):  # the rule: it was there before
                    os.link(folder / name, self.path / name)

    def part_names(self) -> list[str]:
        """Return the names of the folders of parts."""
        parts = self.path / layout.PARTS
        try:
            return [folder.name for folder in part_folders(parts)]
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DamagedStoreError(
                f"{parts} is missing: the store has no parts folder."
            ) from error
        except OSError as error:
            raise StoreError(f"Cannot read {parts}: {error.strerror}.") from error

    def signatures(self, parts: Sequence[str]) -> np.ndarray:
        """Return size, time of modification and inode of the manifests; -1 where there is none."""
        found = np.full((len(parts), 3), -1, np.int64)
        folder = f"{self.path}/{layout.PARTS}"
        for i, part in enumerate(parts):
            with suppress(OSError):  # reading it will say why
                stat = os.stat(f"{folder}/{part}/{layout.METADATA}")
                found[i] = stat.st_size, stat.st_mtime_ns, stat.st_ino & 0x7FFF_FFFF_FFFF_FFFF
        return found

    def index_path(self) -> Path:
        """Return the file beside the store."""
        return self.path.with_name(self.name + layout.INDEX_SUFFIX)

    def read_parts(
        self, parts: Sequence[str], outputs: tuple[OutputSpec, ...], fingerprint: str
    ) -> list[Listed]:
        """Read the manifests one after the other."""
        return [self._read_part(part, outputs, fingerprint) for part in parts]

    def _read_part(self, part: str, outputs: tuple[OutputSpec, ...], fingerprint: str) -> Listed:
        reader = self.lazy_part(part, outputs, fingerprint)
        try:
            reader.load()
        except PartGoneError:
            return None
        except DamagedStoreError as error:
            return error
        return reader

    def lazy_part(self, part: str, outputs: tuple[OutputSpec, ...], fingerprint: str) -> PartReader:
        """Return a reader that looks at nothing yet."""
        return PartReader(part, MappedFiles(self._folder(part)), outputs, fingerprint)

    def prefetch(self, wanted: Sequence[tuple[PartReader, str, int, int]]) -> None:
        """Ask the system to read ahead."""
        for part, output, start, stop in wanted:
            if start < stop and isinstance(part.at, MappedFiles):
                shard: ShardLayout = part.shard(output)
                part.at.will_need(shard, start // shard.rows, (stop - 1) // shard.rows)

    def staging(self) -> AbstractContextManager[Path]:
        """Yield a path on the file system of the store, outside its hierarchy."""
        return staged(self.path)

    def publish(self, folder: Path, part: str) -> bool:
        """Sync and rename."""
        return publish(folder, self._folder(part))

    def remove(self, part: str) -> None:
        """Rename into the temporary folder, then delete."""
        with writing(self.path):
            remove_folder(self.path, self._folder(part))

    def quarantine(self, part: str) -> str:
        """Rename into ``<store>.quarantine``."""
        with writing(self.path):
            return str(quarantine_folder(self.path, self._folder(part)))

    def sweep(self) -> None:
        """Remove the temporary folders of writers that are gone."""
        sweep(self.path)

    def _folder(self, part: str) -> Path:
        return self.path / layout.PARTS / part


class Home(Protocol):
    """A place for stores.

    Attributes
    ----------
    url : str
        Path or URL, without a slash at the end.
    folder : Path
        Local folder for what is kept beside the stores (memos); the place itself if it is a folder.
    is_local : bool
        Whether it is a folder.
    """

    @property
    def url(self) -> str: ...  # noqa: D102

    @property
    def folder(self) -> Path: ...  # noqa: D102

    @property
    def is_local(self) -> bool: ...  # noqa: D102

    def names(self) -> list[str]:
        """Return the names of all stores, sorted; none if the place does not exist yet."""

    def place(self, name: str) -> Place:
        """Return the place of a store, which need not exist."""


class LocalHome:
    """A folder of stores.

    Parameters
    ----------
    root : Path
        Need not exist.

    Raises
    ------
    StoreFormatError
        The path, or a folder above it, is a file.
    """

    is_local = True

    def __init__(self, root: Path | str) -> None:
        self.folder = Path(root).expanduser().absolute()
        self.url = str(self.folder)
        for folder in (self.folder, *self.folder.parents):
            if os.path.isdir(folder):
                break
            if os.path.exists(folder):
                raise StoreFormatError(
                    f"{folder} is a file; a cache is a folder. Choose another --cache."
                )

    def names(self) -> list[str]:
        """Return the names of folders that are named like stores."""
        try:
            with os.scandir(self.folder) as entries:
                return sorted(e.name for e in entries if is_store_name(e.name) and e.is_dir())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StoreError(f"Cannot read {self.folder}: {error.strerror}.") from error

    def place(self, name: str) -> LocalPlace:
        """Return the folder of a store."""
        return LocalPlace(self.folder / name)


def is_store_name(name: str) -> bool:
    """Whether a name ends like that of a store, in a dash and 16 hex digits."""
    return _STORE_NAME.fullmatch(name) is not None


def home_at(url: str) -> Home:
    """Return the home at a path or URL.

    Raises
    ------
    UsageError
        Empty, or a URL of a kind that is not supported.
    StoreFormatError
        The path is a file.
    """
    scheme, path = _split(url)
    if scheme in _REMOTE:
        from mer.cache.remote import ObjectHome

        return ObjectHome(url.rstrip("/"))
    return LocalHome(path)


def place_at(url: str) -> Place:
    """Return the place of the one store at a path or URL; raises like ``home_at``."""
    scheme, path = _split(url)
    if scheme in _REMOTE:
        from mer.cache.remote import ObjectPlace

        return ObjectPlace(url.rstrip("/"))
    return LocalPlace(Path(path).expanduser())


def _split(url: str) -> tuple[str | None, str]:
    """Return the scheme, None for a folder, and the path of a folder."""
    if not re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", url):
        if not url.strip():
            raise UsageError("The cache path is empty; expected a folder or a URL.")
        return None, url
    parts = urlsplit(url)
    scheme = parts.scheme.lower()
    if scheme == "file" and parts.netloc in ("", "localhost"):
        return None, url2pathname(parts.path)
    if scheme not in _REMOTE:
        raise UsageError(
            f"Cache {url!r} is on {parts.scheme}://, which mer cannot read; expected a folder or "
            "a URL of file://, s3://, gs://, http:// or https://."
        )
    return scheme, ""
