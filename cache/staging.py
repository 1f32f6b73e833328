"""Folders that appear whole or not at all: built beside the store, synced, renamed into it.

``<store>.tmp/<owner>-<random>/content`` is what is being built, or removed. It lies on the file
system of the store, so that the rename is atomic, and outside its Zarr hierarchy, so that no reader
ever lists it. The name alone says whose it is: a folder is never without an owner, not even between
two system calls, and one that was half removed when its remover was killed still has one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import stat
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
import xxhash

from mer.cache import layout
from mer.cache.errors import StorageFullError, StoreError
from mer.cache.layout import FileRecord

logger = logging.getLogger(__name__)

ABANDONED_S = 24 * 3600.0
_OWNER = re.compile(r"([0-9a-f]{16})-([0-9]+)-([0-9]+)-[0-9a-f]{16}")  # system, pid, its start
_LEGACY_OWNER = "owner.json"  # how the first release told; its folders have bare uuids as names
_CONTENT = "content"
_SYNC_THREADS = 16
_FULL = {errno.ENOSPC, errno.EDQUOT}
_EXISTS = {errno.ENOTEMPTY, errno.EEXIST}

Buffer = bytes | memoryview | np.ndarray


@contextmanager
def writing(store: Path | str) -> Iterator[None]:
    """Turn the operating system's refusals into one clear error.

    Raises
    ------
    StorageFullError
        No space, or quota, left.
    StoreError
        Read-only, not permitted, removed meanwhile, or any other failure of the file system.
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
        raise StoreError(_advice(store, error)) from error


def _advice(store: Path | str, error: OSError) -> str:
    if error.errno == errno.EXDEV:
        return (
            f"Cannot write to {store}: it lies on another file system than the folder it is in, "
            "where its parts are built, so nothing can be moved there in one step. Mount or link "
            "the whole cache, not one store or a folder of it, or move the store "
            "(`mer cache cp`) to the file system of the cache."
        )
    # Of an object store only what is built on this machine can be missing.
    is_local = "://" not in str(store)
    if error.errno == errno.ENOENT and is_local and not Path(store, layout.PARTS).is_dir():
        return (
            f"{store} was removed meanwhile, by `mer cache gc` or by hand. What was not committed "
            "is not kept; run the same command again."
        )
    built = f"{temporary_folder(Path(store))}{os.sep}"
    if error.errno == errno.ENOENT and is_local and str(error.filename).startswith(built):
        return (
            f"Cannot write to {store}: {error.filename}, which was being built, was removed by "
            "someone else. Run the same command again."
        )
    at = f" ({error.filename})" if error.filename else ""
    return (
        f"Cannot write to {store}: {error.strerror or error}{at}. "
        "Check its permissions or choose another --cache."
    )


@contextmanager
def staged(store: Path) -> Iterator[Path]:
    """Yield the path to build at, not existing yet; whatever is left there is removed."""
    folder = _make_folder(temporary_folder(store))
    try:
        yield folder / _CONTENT
    finally:
        _discard(folder)


def _discard(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # others may be building there
        folder.parent.rmdir()


def temporary_folder(store: Path) -> Path:
    """Return where the parts of a store are born, and where they go to be removed."""
    return store.with_name(store.name + ".tmp")


def _make_folder(parent: Path) -> Path:
    for _ in range(100):
        folder = parent / f"{_owner()}-{uuid.uuid4().hex[:16]}"
        try:
            parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
        except (FileExistsError, FileNotFoundError):  # others remove the empty parent meanwhile
            _check_is_folder(parent)
            continue
        return folder
    raise StoreError(f"Cannot create a folder in {parent}: it keeps disappearing.")


def _check_is_folder(path: Path) -> None:
    """Refuse a path of which a component is there, but no folder."""
    for folder in (path, *path.parents):
        try:
            is_folder = stat.S_ISDIR(os.stat(folder).st_mode)
        except NotADirectoryError:
            continue  # one further up
        except FileNotFoundError:
            if not folder.is_symlink():
                continue
            raise StoreError(
                f"{folder} is a link to nothing. Mount what it points to, or remove it."
            ) from None
        if not is_folder:
            raise StoreError(
                f"{folder} is a file, where mer needs a folder to build parts in. Move it away."
            )
        return


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
    _sync_all(
        [
            os.path.join(parent, name)
            for parent, _, names in os.walk(folder)
            for name in ["", *names]
        ]
    )
    try:
        os.rename(folder, target)
    except OSError as error:
        if error.errno in _EXISTS:
            return False
        raise
    _sync(target.parent)
    return True


def _sync_all(paths: Sequence[str]) -> None:
    """Sync files and folders together, after everything is written.

    A file system then flushes them in few large steps: 300 files of a part with 25 layers take half
    the time of one after the other on a fast disk, a twentieth on a slow one. ``syncfs`` would be
    faster still, but also wait for whatever else is being written to that disk.
    """
    errors: list[BaseException] = []

    def work(mine: Sequence[str]) -> None:
        try:
            for path in mine:
                _sync(path)
        except BaseException as error:
            errors.append(error)

    count = min(_SYNC_THREADS, len(paths))
    threads = [
        threading.Thread(target=work, args=(paths[i::count],), name="mer-sync")
        for i in range(1, count)
    ]
    started = 0
    with suppress(RuntimeError):  # no more threads to be had
        for thread in threads:
            thread.start()
            started += 1
    work(paths[::count])
    for i in range(started + 1, count):
        work(paths[i::count])
    for thread in threads[:started]:
        thread.join()
    if errors:
        raise errors[0]


def _sync(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_folder(store: Path, folder: Path) -> bool:
    """Make a folder of a store, or the store itself, invisible in one step, then delete it.

    Whoever is killed in between leaves it to the next ``sweep``.

    Returns
    -------
    bool
        False if it was gone already.
    """
    if not folder.exists():
        return False
    grave = _make_folder(temporary_folder(store))
    try:
        os.rename(folder, grave / _CONTENT)
    except FileNotFoundError:  # another process was faster
        return False
    finally:
        _discard(grave)
    return True


def quarantine_folder(store: Path, folder: Path) -> Path:
    """Move a folder or file out of a store in one step, to ``<store>.quarantine/<name>-<n>``.

    Returns
    -------
    Path
        Where it is now.

    Raises
    ------
    FileNotFoundError
        It is not there (any more).
    """
    quarantine = store.with_name(store.name + layout.QUARANTINE_SUFFIX)
    is_folder = folder.is_dir()
    if not is_folder and not folder.exists():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(folder))
    quarantine.mkdir(exist_ok=True)
    number = 0
    while True:
        number += 1
        target = quarantine / f"{folder.name}-{number}"
        try:  # takes the name, so that nobody's quarantined bytes are ever replaced
            target.mkdir() if is_folder else target.touch(exist_ok=False)
        except FileExistsError:
            continue
        try:
            os.rename(folder, target)
        except BaseException:
            target.rmdir() if is_folder else target.unlink()
            raise
        _sync(quarantine)
        _sync(folder.parent)
        return target


def sweep(store: Path) -> None:
    """Remove what a process of this host that is gone has left, or another host a day ago."""
    temporary = temporary_folder(store)
    try:
        entries = list(os.scandir(temporary))
    except OSError:
        return
    for entry in entries:
        with suppress(OSError):  # gone in the meantime, or not ours to remove
            if _is_abandoned(entry):
                logger.info("Removing %s, left unfinished by a process that is gone.", entry.path)
                # The content first: half removed by one who is killed, it still has an owner.
                shutil.rmtree(os.path.join(entry.path, _CONTENT), ignore_errors=True)
                shutil.rmtree(entry.path, ignore_errors=True)
    with suppress(OSError):
        temporary.rmdir()


def _is_abandoned(entry: os.DirEntry[str]) -> bool:
    is_old = time.time() - entry.stat().st_mtime > ABANDONED_S
    named = _OWNER.fullmatch(entry.name)
    if named is None:
        return is_old or _is_abandoned_legacy(entry)
    if named[1] != _host_digest():
        return is_old
    return not _is_alive(int(named[2]), int(named[3]))


def _is_abandoned_legacy(entry: os.DirEntry[str]) -> bool:
    try:
        owner = json.loads(Path(entry.path, _LEGACY_OWNER).read_bytes())
        host, pid = owner["host"], int(owner["pid"])
    except (OSError, ValueError, KeyError, TypeError):
        return False  # being created this moment, or too damaged to tell
    return host == _host() and not _is_alive(pid)


def _owner() -> str:
    """Return this process as a folder's name says it: system, process id, start of the process."""
    pid = os.getpid()
    return f"{_host_digest()}-{pid}-{(_process(pid) or ('', 0))[1]}"


def _host_digest() -> str:
    text = f"{_host()} {_boot()}"
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).hexdigest()


def _boot() -> str:
    """Return what no two running systems share, however they are named, where Linux tells."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except (OSError, ValueError):
        return ""


def _host() -> str:
    """Return this host and the namespace of its process ids (containers), if any."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _process(pid: int) -> tuple[str, int] | None:
    """Return state and start (clock ticks since the system's) of a process, where Linux tells."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return fields[0].decode("ascii"), int(fields[19])  # fields 3 and 22 of proc(5)
    except (OSError, ValueError, IndexError):
        return None


def _is_alive(pid: int, started: int = 0) -> bool:
    """Whether the process lives that had this id and start (0: not known)."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass  # alive, but of another user
    process = _process(pid)
    if process is None:
        return True
    state, found = process
    # A zombie runs no more; a recycled id belongs to a process that started at another time.
    return state not in "ZX" and started in (0, found)
