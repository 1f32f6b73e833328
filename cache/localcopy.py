"""Files on this machine that repeat what lies on a server, up to a limit of bytes.

``MER_LOCAL_COPY`` is the folder, or ``off``; by default ``remote`` in the platform's cache
directory of mer. ``MER_LOCAL_COPY_GB`` is the limit, by default 16.

Any number of processes may share the folder. A file appears whole, by a rename, and its name says
what is in it; one that vanishes is fetched again. What has not been used for longest goes first.
Nothing here is trusted: whoever reads a file verifies it.
"""

from __future__ import annotations

import logging
import mmap
import os
import threading
import time
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import numpy as np

from mer.cache.casting import readable
from mer.cache.errors import UsageError

logger = logging.getLogger(__name__)

DEFAULT_GB = 16.0
INDEX_FOLDER = "index"  # snapshots of stores, which do not count
_OPEN_MAPS = 256
_USED_S = 60.0  # precision of "used last"
_ABANDONED_S = 3600.0
_KEEP = 0.9  # share of the limit that is left after making room: not with every file again
_LOOK_BYTES = 256 << 20  # others write too: look again after so many bytes of one's own


Stamp = tuple[int, int, int]  # inode, times of the last change of the content and of the file, ns


class CopiedFile:
    """One file of the copy, mapped.

    Attributes
    ----------
    data : ndarray
        (num_bytes,) uint8; nobody may write to it.
    verified : bytearray
        For the reader: one flag per unit that it found sound in this process.
    """

    __slots__ = ("data", "stamp", "verified")

    def __init__(self, data: np.ndarray, stamp: Stamp, units: int) -> None:
        self.data, self.stamp = data, stamp
        self.verified = bytearray(units)


class LocalCopy:
    """A folder of files by name.

    Parameters
    ----------
    folder : Path
        Made when the first file is kept.
    limit : int
        Bytes of all files together; exceeded by no more than what is being written.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = Path(folder), limit
        self._open: OrderedDict[str, CopiedFile] = OrderedDict()
        self._sound: dict[str, tuple[Stamp, bytearray]] = {}
        self._lock = threading.Lock()
        self._bytes: int | None = None  # as of the last look, and what was written since
        self._since_look = 0
        self._failed = False

    def get(self, name: str, num_bytes: int, units: int = 1) -> CopiedFile | None:
        """Return a file, or None if it is not there in this size.

        Parameters
        ----------
        name : str
        num_bytes : int
        units : int, default=1
            How many flags ``verified`` has.
        """
        with self._lock:
            found = self._open.get(name)
            if found is not None:
                self._open.move_to_end(name)
                return found
        try:
            descriptor = os.open(self.folder / name, os.O_RDONLY)
        except OSError:
            return None
        try:
            state = os.fstat(descriptor)
            if state.st_size != num_bytes or not num_bytes:
                return None
            mapped = mmap.mmap(descriptor, num_bytes, access=mmap.ACCESS_READ)
            before = now = _stamp(state)
            if time.time() - state.st_mtime > _USED_S:
                with suppress(OSError, TypeError):  # not ours to touch; not on this system
                    os.utime(descriptor)
                now = _stamp(os.fstat(descriptor))
        except (OSError, ValueError):
            return None
        finally:
            os.close(descriptor)
        data = readable(np.frombuffer(mapped, np.uint8))
        found = CopiedFile(data, now, units)
        with self._lock:
            # An inode alone is soon another file's, once room was made.
            stamp, verified = self._sound.get(name, (None, found.verified))
            if stamp == before and len(verified) == units:
                found.verified = verified
            self._sound[name] = (found.stamp, found.verified)
            self._open[name] = found
            while len(self._open) > _OPEN_MAPS:
                self._open.popitem(last=False)
        return found

    def has(self, name: str, num_bytes: int) -> bool:
        """Whether there is a file of this name and size."""
        if name in self._open:
            return True
        try:
            return os.stat(self.folder / name).st_size == num_bytes
        except OSError:
            return False

    def put(self, name: str, data: np.ndarray | bytes) -> None:
        """Keep a file; where that is not possible, nothing happens but one warning."""
        size = len(data) if isinstance(data, bytes) else data.nbytes
        if self._failed or not 0 < size <= self.limit:
            return
        target = self.folder / name
        temporary = target.with_name(f"{target.name}.{uuid4().hex[:12]}.tmp")
        try:
            self._make_room(size)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with open(temporary, "xb", buffering=0) as file:
                    view = memoryview(cast(Any, data)).cast("B")
                    while view:
                        view = view[file.write(view) :]
                os.replace(temporary, target)
            except BaseException:
                with suppress(OSError):
                    temporary.unlink()
                raise
        except OSError as error:
            with self._lock:
                told, self._failed = self._failed, True
            if told:
                return
            logger.warning(
                "No local copy is kept in %s: %s. Reading goes on from the server; set "
                "MER_LOCAL_COPY to another folder, or to 'off'.",
                self.folder,
                error.strerror or error,
            )
            return
        with self._lock:
            self._since_look += size

    def drop(self, name: str) -> None:
        """Remove a file."""
        with self._lock:
            self._open.pop(name, None)
            self._sound.pop(name, None)
        with suppress(OSError):
            (self.folder / name).unlink()

    def size(self) -> int:
        """Return the bytes of all files."""
        return sum(size for _, size, _ in self._files())

    def forget_lock(self) -> None:
        """Start with a fresh lock: after a fork the old one may be held by a thread left behind."""
        self._lock = threading.Lock()

    def _make_room(self, size: int) -> None:
        with self._lock:
            known, since = self._bytes, self._since_look
            if known is not None and known + since + size <= self.limit and since < _LOOK_BYTES:
                return
            self._since_look = 0
            files = sorted(self._files())
            total = sum(size for _, size, _ in files)
            if total + size > self.limit:
                wanted = min(int(_KEEP * self.limit), self.limit - size)
                for _, freed, path in files:
                    if total <= wanted:
                        break
                    with suppress(OSError):  # another process was faster, or has it open
                        os.unlink(path)
                    total -= freed
            self._bytes = total

    def _files(self) -> list[tuple[float, int, str]]:
        """Return (used last, bytes, path) of all files, and sweep what was never finished."""
        found: list[tuple[float, int, str]] = []
        now = time.time()
        try:
            with os.scandir(self.folder) as scan:
                folders = [e.path for e in scan if e.is_dir() and e.name != INDEX_FOLDER]
        except OSError:
            return []
        for folder in folders:
            try:
                with os.scandir(folder) as scan:
                    for entry in scan:
                        with suppress(OSError):  # removed meanwhile
                            state = entry.stat()
                            if entry.name.endswith(".tmp") and now - state.st_mtime > _ABANDONED_S:
                                os.unlink(entry.path)
                            elif entry.is_file():
                                found.append((state.st_mtime, state.st_size, entry.path))
            except OSError:
                continue
        return found


def _stamp(state: os.stat_result) -> Stamp:
    return state.st_ino, state.st_mtime_ns, state.st_ctime_ns


_copies: dict[tuple[Path, int], LocalCopy] = {}
_lock = threading.Lock()


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()
    for copy in _copies.values():
        copy.forget_lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def local_folder() -> Path:
    """Return the platform's folder for what can be had again."""
    import platformdirs

    return Path(platformdirs.user_cache_dir("mer", appauthor=False))


def local_copy() -> LocalCopy | None:
    """Return the copy that the environment asks for, None if it is off.

    Raises
    ------
    UsageError
        ``MER_LOCAL_COPY_GB`` is no number.
    """
    folder = os.environ.get("MER_LOCAL_COPY") or ""
    if folder.lower() in ("off", "none", "0"):
        return None
    text = os.environ.get("MER_LOCAL_COPY_GB") or str(DEFAULT_GB)
    try:
        limit = int(float(text) * 1e9)
    except (ValueError, OverflowError) as error:
        raise UsageError(f"MER_LOCAL_COPY_GB is {text!r}, expected a number such as 16.") from error
    if limit <= 0:
        return None
    path = Path(folder).expanduser() if folder else local_folder() / "remote"
    with _lock:
        return _copies.setdefault((path, limit), LocalCopy(path, limit))
