"""Folders that appear whole or not at all: built beside the store, synced, renamed into it.

``<store>.tmp/<uuid>/`` holds ``owner.json`` (who is building) and ``content/`` (what is being
built). It lies on the file system of the store, so that the rename is atomic, and outside its Zarr
hierarchy, so that no reader ever lists it.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
import xxhash

from mer.cache.errors import StorageFullError, StoreError
from mer.cache.layout import FileRecord

logger = logging.getLogger(__name__)

ABANDONED_S = 24 * 3600.0
_OWNER = "owner.json"
_SYNC_THREADS = 8
_FULL = {errno.ENOSPC, errno.EDQUOT}
_EXISTS = {errno.ENOTEMPTY, errno.EEXIST}

Buffer = bytes | memoryview | np.ndarray


@contextmanager
def writing(store: Path) -> Iterator[None]:
    """Turn the operating system's refusals into one clear error.

    Raises
    ------
    StorageFullError
        No space, or quota, left.
    StoreError
        Read-only, not permitted, or any other failure of the file system.
    """
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        if error.errno in _FULL:
            raise StorageFullError(
                f"No space left while writing to {store} ({error.strerror}). "
                "Everything committed before is intact; free some space or choose another "
                "--cache, then run the same command again."
            ) from error
        at = f" ({error.filename})" if error.filename else ""
        raise StoreError(
            f"Cannot write to {store}: {error.strerror or error}{at}. "
            "Check its permissions or choose another --cache."
        ) from error


@contextmanager
def staged(store: Path) -> Iterator[Path]:
    """Yield the path to build at, not existing yet; whatever is left there is removed."""
    folder = _make_folder(temporary_folder(store))
    try:
        owner = {"host": _host(), "pid": os.getpid()}
        write_file(folder / _OWNER, [json.dumps(owner).encode("ascii")])
        yield folder / "content"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # others may be building there
            folder.parent.rmdir()


def temporary_folder(store: Path) -> Path:
    """Return where the parts of a store are born."""
    return store.with_name(store.name + ".tmp")


def _make_folder(parent: Path) -> Path:
    for _ in range(100):
        folder = parent / uuid.uuid4().hex
        parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.mkdir()
        except FileNotFoundError:  # another writer left and removed the empty parent in between
            continue
        return folder
    raise StoreError(f"Cannot create a folder in {parent}: it keeps disappearing.")


def write_file(path: Path, blocks: Iterable[Buffer]) -> FileRecord:
    """Write a new file block by block and return its size and checksum."""
    digest = xxhash.xxh3_128()
    size = 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        for block in blocks:
            view = memoryview(cast(Any, block)).cast("B")
            digest.update(view)
            size += len(view)
            while view:
                view = view[os.write(descriptor, view) :]
    finally:
        os.close(descriptor)
    return FileRecord(size, digest.hexdigest())


def publish(folder: Path, target: Path) -> bool:
    """Make a finished folder durable and move it to its place in one step.

    Returns
    -------
    bool
        False if something of that name was there before; ``folder`` is then still where it was.
    """
    paths = [
        os.path.join(parent, name) for parent, _, names in os.walk(folder) for name in ["", *names]
    ]
    # Together, after everything is written: a file system then flushes them in few large steps,
    # some 20 times faster than one after the other (300 files of a part with many layers).
    with ThreadPoolExecutor(_SYNC_THREADS, "mer-sync") as pool:
        list(pool.map(_sync, paths))
    try:
        os.rename(folder, target)
    except OSError as error:
        if error.errno in _EXISTS:
            return False
        raise
    _sync(target.parent)
    return True


def _sync(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(store: Path) -> None:
    """Remove what is older than a day or of a process of this host that is gone."""
    try:
        entries = list(os.scandir(temporary_folder(store)))
    except OSError:
        return
    for entry in entries:
        with suppress(OSError):  # gone in the meantime, or not ours to remove
            if _is_abandoned(entry):
                logger.info("Removing the unfinished %s of a writer that is gone.", entry.path)
                shutil.rmtree(entry.path)
    with suppress(OSError):
        temporary_folder(store).rmdir()


def _is_abandoned(entry: os.DirEntry[str]) -> bool:
    if time.time() - entry.stat().st_mtime > ABANDONED_S:
        return True
    try:
        owner = json.loads(Path(entry.path, _OWNER).read_bytes())
        host, pid = owner["host"], int(owner["pid"])
    except (OSError, ValueError, KeyError, TypeError):
        return False  # being created this moment, or too damaged to tell
    return host == _host() and not _is_alive(pid)


def _host() -> str:
    """Return this host and the namespace of its process ids (containers), if any."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # alive, but of another user
    return True
