"""Killed writers, full disks, read-only folders: the store opens, the message helps."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from mer.cache import staging
from mer.cache.errors import StorageFullError, StoreError
from mer.cache.home import Cache
from mer.cache.part import PartFolder
from mer.cache.spec import FeatureSpec, OutputSpec
from mer.cache.store import Store
from mer.cache.writer import PartWriter

SPEC = FeatureSpec(
    slug="crash",
    identity={"name": "crash"},
    outputs=(OutputSpec(name="final", dim=8, rate_hz=50.0),),
)

# Adds utterances for ever; says which are committed after each commit.
WRITER = """
import sys, numpy as np
from mer.cache.spec import FeatureSpec, OutputSpec
from mer.cache.home import Cache
output = OutputSpec(name="final", dim=8, rate_hz=50.0)
spec = FeatureSpec(slug="crash", identity={"name": "crash"}, outputs=(output,))
store = Cache(sys.argv[1]).open(spec, create=True)
number = len(store)
with store.writer() as writer:
    while True:
        for number in range(number, number + 4):
            frames = np.full((1000, 8), number % 2000, np.float32)
            writer.add(number.to_bytes(16, "big"), number, {"final": frames})
        number += 1
        writer.commit()
        print(number, flush=True)
"""


def opened(root: Path) -> Store:
    store = Cache(root).open(SPEC, create=True)
    assert store is not None
    return store


def number(n: int) -> bytes:
    return n.to_bytes(16, "big")


def add(store: Store, *numbers: int) -> None:
    with store.writer() as writer:
        for number in numbers:
            frames = np.full((100, 8), number, np.float32)
            writer.add(number.to_bytes(16, "big"), number, {"final": frames})


def temporary(store: Store) -> list[str]:
    folder = staging.temporary_folder(store.path)
    return sorted(os.listdir(folder)) if folder.exists() else []


def test_what_is_added_during_a_commit_waits_for_the_next_part(tmp_path, monkeypatch):
    store = opened(tmp_path)
    real, late = PartFolder.shard, []

    def shard(self, *args):
        if not late:  # nothing of the part is written yet
            frames = np.zeros((100, 8), np.float32)
            adding = (number(2), 2, {"final": frames})
            late.append(threading.Thread(target=writer.add, args=adding))
            late[0].start()
            late[0].join(0.2)
        return real(self, *args)

    monkeypatch.setattr(PartFolder, "shard", shard)
    with store.writer() as writer:
        writer.add(number(1), 1, {"final": np.zeros((100, 8), np.float32)})
        writer.commit()
        late[0].join()
    fresh = opened(tmp_path)
    assert fresh.input_length([number(1), number(2)]).tolist() == [1, 2]
    assert [part.utterances for part in fresh.parts()] == [1, 1]


def test_a_killed_writer_leaves_exactly_what_it_committed(tmp_path):
    rng = np.random.default_rng(0)
    for lines in rng.integers(1, 12, 5).tolist():
        child = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        told = 0
        for _ in range(lines):
            told = int(child.stdout.readline())
        child.kill()
        rest = child.stdout.read().split()
        child.stdout.close()
        child.wait()
        told = int(rest[-1]) if rest else told
        store = opened(tmp_path)
        assert told <= len(store) <= told + 4
        assert len(store) % 4 == 0
        keys = [number.to_bytes(16, "big") for number in range(len(store))]
        data, lengths = store.batch(keys, "final")
        assert (lengths == 1000).all()
        expected = np.arange(len(store)) % 2000
        np.testing.assert_array_equal(data, np.broadcast_to(expected[:, None, None], data.shape))
    with store.writer():
        assert temporary(store) == []  # the leftovers of the killed are swept by the next writer


FULL = [(call, errno.ENOSPC) for call in ("write", "fsync", "mkdir", "rename", "open")]


@pytest.mark.parametrize(("call", "code"), [*FULL, ("write", errno.EDQUOT)])
def test_a_full_disk_keeps_earlier_parts_and_leaves_nothing_behind(
    tmp_path, monkeypatch, call, code
):
    store = opened(tmp_path)
    add(store, 1, 2)
    real = getattr(os, call)
    for allowed in range(100):  # fail at the first call, then at the second …
        calls = 0

        def limited(*args, _allowed=allowed, **kwargs):
            nonlocal calls
            takes_space = call != "open" or args[1] & os.O_CREAT
            calls += bool(takes_space)
            if takes_space and calls > _allowed:
                raise OSError(code, os.strerror(code))
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, limited)
            try:
                add(store, 3)
            except StorageFullError as error:
                full = str(error)
            else:
                break
        assert f"No space left while writing to {store.path}" in full
        assert temporary(store) == []
        data, _ = opened(tmp_path).batch([n.to_bytes(16, "big") for n in (1, 2)], "final")
        assert (data == np.array([1, 2])[:, None, None]).all()
    assert allowed >= 1
    assert len(opened(tmp_path)) == 3


def full(path: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["add", "commit"])
def test_a_full_disk_in_the_background_surfaces_at_the_next_call(tmp_path, monkeypatch, call):
    store = opened(tmp_path)
    frames = {"final": np.zeros((1, 8), np.float32)}
    with store.writer(part_bytes=1) as writer:
        with monkeypatch.context() as patch:
            patch.setattr(staging, "_sync", full)
            writer.add(number(0), 1, frames)
            with pytest.raises(StorageFullError, match="free some space"):
                writer.add(number(1), 1, frames) if call == "add" else writer.commit()
        with pytest.raises(StoreError, match="failed before; open a new writer"):
            writer.add(number(1), 1, frames)
        with pytest.raises(StoreError, match="failed before; open a new writer"):
            writer.commit()
    assert len(store) == 0
    add(store, 0)
    assert len(store) == 1


def test_a_full_disk_in_the_background_surfaces_on_leaving(tmp_path, monkeypatch):
    store = opened(tmp_path)

    def extract() -> None:
        with store.writer(part_bytes=1) as writer:
            writer.add(number(0), 1, {"final": np.zeros((1, 8), np.float32)})

    with monkeypatch.context() as patch:
        patch.setattr(staging, "_sync", full)
        with pytest.raises(StorageFullError, match="free some space"):
            extract()
    assert len(opened(tmp_path)) == 0
    assert temporary(store) == []


def test_a_full_disk_while_creating_leaves_no_store(tmp_path, monkeypatch):
    def full(descriptor, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(StorageFullError, match="No space left"):
            opened(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert len(opened(tmp_path)) == 0


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_read_only_cache_is_readable_and_says_why_it_cannot_be_written(
    tmp_path, monkeypatch, code
):
    store = opened(tmp_path)
    add(store, 1)

    def refuse(path, *args, **kwargs):
        raise OSError(code, os.strerror(code), os.fspath(path))

    monkeypatch.setattr(os, "mkdir", refuse)
    again = opened(tmp_path)
    assert len(again) == 1
    with pytest.raises(StoreError, match=f"Cannot write to .*: {os.strerror(code)}.* --cache"):
        add(again, 2)
    with pytest.raises(StoreError, match="Cannot write to"):
        opened(tmp_path / "new")


def test_a_store_on_another_file_system_than_its_folder_says_what_to_do(tmp_path, monkeypatch):
    store = opened(tmp_path)

    def refuse(source, target):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), source, None, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refuse)
        with pytest.raises(
            StoreError, match="another file system .* Mount or link the whole cache"
        ):
            add(store, 1)
    assert len(opened(tmp_path)) == 0


def test_a_file_where_parts_are_built_is_named(tmp_path):
    store = opened(tmp_path)
    temporary = staging.temporary_folder(store.path)
    temporary.write_text("mine")
    with pytest.raises(StoreError, match=r"\.tmp is a file, where mer needs a folder"):
        add(store, 1)
    assert temporary.read_text() == "mine"
    temporary.unlink()
    add(store, 1)
    assert len(store) == 1


def test_a_cache_below_a_link_to_nothing_is_named(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "unmounted")
    with pytest.raises(StoreError, match="link is a link to nothing. Mount"):
        opened(tmp_path / "link" / "cache")


def test_a_writer_whose_store_was_removed_is_told_so(tmp_path):
    store = opened(tmp_path)
    add(store, 1)
    writer = store.writer()
    writer.add(number(2), 2, {"final": np.ones((3, 8), np.float32)})
    shutil.rmtree(store.path)
    with pytest.raises(StoreError, match="was removed meanwhile.* run the same command again"):
        writer.commit()
    assert not store.path.exists()


def test_a_writer_whose_unfinished_part_was_removed_is_told_so(tmp_path, monkeypatch):
    store = opened(tmp_path)
    real = staging._sync_all

    def sync_and_remove(paths):
        real(paths)
        shutil.rmtree(staging.temporary_folder(store.path))

    monkeypatch.setattr(staging, "_sync_all", sync_and_remove)
    with pytest.raises(StoreError, match="content, which was being built, was removed.* again"):
        add(store, 1)


@pytest.mark.parametrize("allowed", [0, 2])
def test_without_threads_everything_is_synced_all_the_same(tmp_path, monkeypatch, allowed):
    store = opened(tmp_path)
    real, started = threading.Thread.start, []

    def start(self):
        if len(started) >= allowed:
            raise RuntimeError("can't start new thread")
        started.append(self)
        real(self)

    synced = []
    sync = staging._sync
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        patch.setattr(staging, "_sync", lambda path: (synced.append(Path(path).name), sync(path)))
        add(store, 1, 2)
    assert len(started) == allowed
    (part,) = opened(tmp_path).parts()
    files = [p for p in (store.path / "parts" / part.id).rglob("*") if p.is_file()]
    assert synced.count("zarr.json") == sum(p.name == "zarr.json" for p in files)
    assert synced.count("0") >= sum(p.name == "0" for p in files)
    assert opened(tmp_path).contains([number(1), number(2)]).all()


def interrupted_at_fsync(monkeypatch: pytest.MonkeyPatch, times: int) -> threading.Event:
    """Send Ctrl-C to the main thread at each of the first syncs; wait there until it was caught."""
    main = threading.main_thread().ident
    assert main is not None
    real, lock, caught = os.fsync, threading.Lock(), threading.Event()
    left = iter(range(times))

    def fsync(descriptor):
        with lock:
            if next(left, None) is not None:
                signal.pthread_kill(main, signal.SIGINT)
                assert caught.wait(60)
                caught.clear()
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    return caught


def test_ctrl_c_during_a_commit_commits_on_the_way_out(tmp_path, monkeypatch):
    store = opened(tmp_path)
    caught = interrupted_at_fsync(monkeypatch, 1)

    def work() -> None:
        with store.writer() as writer:
            writer.add(number(0), 1, {"final": np.ones((5, 8), np.float32)})
            try:
                writer.commit()
            except KeyboardInterrupt:
                caught.set()
                raise

    with pytest.raises(KeyboardInterrupt, match="^$"):
        work()
    assert store.contains([number(0)]).all()
    assert temporary(store) == []


def test_a_second_ctrl_c_leaves_at_once_and_the_part_is_still_finished(tmp_path, monkeypatch):
    store = opened(tmp_path)
    caught = interrupted_at_fsync(monkeypatch, 2)
    real, leaving = PartWriter._land, threading.Event()

    def land(self):
        if leaving.is_set():  # let the second come while the context waits for the part
            caught.set()
        real(self)

    monkeypatch.setattr(PartWriter, "_land", land)

    def work() -> None:
        with store.writer() as writer:
            writer.add(number(0), 1, {"final": np.ones((5, 8), np.float32)})
            try:
                writer.commit()
            except KeyboardInterrupt:
                leaving.set()
                raise

    with pytest.raises(KeyboardInterrupt, match="^$"):
        work()
    assert not store.contains([number(0)]).any()
    caught.set()
    for thread in threading.enumerate():
        if thread.name == "mer-part":
            thread.join()
    assert store.contains([number(0)]).all()
    assert temporary(store) == []


def leftover(store: Store, name: str, owner: dict[str, object] | None, age_s: float = 0) -> None:
    folder = staging.temporary_folder(store.path) / name
    (folder / "content").mkdir(parents=True)
    if owner is not None:
        (folder / "owner.json").write_text(json.dumps(owner))
    then = time.time() - age_s
    os.utime(folder, (then, then))


def gone() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def named(host: str, pid: int, started: int) -> str:
    return f"{host}-{pid}-{started}-{os.urandom(8).hex()}"


def test_only_abandoned_temporary_folders_are_swept(tmp_path):
    store = opened(tmp_path)
    here, there, day = staging._host_digest(), "0" * 16, staging.ABANDONED_S
    me, started = os.getpid(), staging._process(os.getpid())[1]
    stay = [
        named(here, me, started),
        named(here, me, 0),  # where the start of a process is not known
        named(there, gone(), 1),
    ]
    for name in stay:
        leftover(store, name, None)
    living = named(here, me, started)
    leftover(store, living, None, day + 60)
    leftover(store, named(here, gone(), 1), None)
    leftover(store, named(here, me, started + 1), None)  # the id now belongs to another process
    leftover(store, named(there, me, started), None, day + 60)
    with store.writer():
        assert temporary(store) == sorted([*stay, living])


def test_a_machine_of_the_same_name_does_not_sweep_what_is_being_written(tmp_path, monkeypatch):
    store = opened(tmp_path)
    name = named(staging._host_digest(), gone(), 1)
    leftover(store, name, None)
    real = Path.read_text

    def read_text(self, *args, **kwargs):
        if self.name == "boot_id":
            return "11111111-2222-3333-4444-555555555555\n"
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", read_text)
        staging.sweep(store.path)  # its process of that id is another
        assert temporary(store) == [name]
    staging.sweep(store.path)
    assert temporary(store) == []


def test_leftovers_of_the_first_release_are_swept(tmp_path):
    store = opened(tmp_path)
    here, day = staging._host(), staging.ABANDONED_S
    leftover(store, "dead", {"host": here, "pid": gone()})
    leftover(store, "alive", {"host": here, "pid": os.getpid()})
    leftover(store, "elsewhere", {"host": "another", "pid": gone()})
    leftover(store, "elsewhere-old", {"host": "another", "pid": gone()}, day + 60)
    leftover(store, "being-made", None)
    leftover(store, "unowned-old", None, day + 60)
    with store.writer():
        assert temporary(store) == ["alive", "being-made", "elsewhere"]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs procfs")
def test_a_zombie_is_not_alive():
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead, and not reaped
    assert not staging._is_alive(child.pid)
    child.wait()


KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from mer.cache import staging
def die(path, *args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
{patch} = die
{do}
"""


@pytest.mark.parametrize("moment", ["os.rename", "shutil.rmtree"])
def test_a_removal_that_is_killed_is_finished_by_the_next_sweep(tmp_path, moment):
    store = opened(tmp_path)
    add(store, 1, 2)
    part = store.path / "parts" / store.parts()[0].id
    do = f"staging.remove_folder(Path({str(store.path)!r}), Path({str(part)!r}))"
    code = KILLED.format(patch=moment, do=do)
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert len(temporary(store)) == 1
    assert len(opened(tmp_path)) == (2 if moment == "os.rename" else 0)
    staging.sweep(store.path)
    assert not staging.temporary_folder(store.path).exists()


def test_a_sweep_that_is_killed_is_finished_by_the_next(tmp_path):
    store = opened(tmp_path)
    name = named(staging._host_digest(), gone(), 1)
    leftover(store, name, None)
    folder = staging.temporary_folder(store.path) / name
    for file in ("a", "b", "c"):
        (folder / "content" / file).touch()
    half = (
        "real = os.unlink\n"
        "def unlink(path, *args, **kwargs):\n"
        "    real(path, *args, **kwargs)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "os.unlink = unlink\n"
    )
    do = f"staging.sweep(Path({str(store.path)!r}))"
    code = KILLED.format(patch="ignored", do=half + do)
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert len(os.listdir(folder / "content")) == 2
    staging.sweep(store.path)
    assert not staging.temporary_folder(store.path).exists()


def test_removing_hides_a_folder_before_anything_of_it_is_deleted(tmp_path, monkeypatch):
    store = opened(tmp_path)
    add(store, 1)
    part = store.path / "parts" / store.parts()[0].id
    real, seen = shutil.rmtree, []

    def rmtree(path, *args, **kwargs):
        seen.append((part.exists(), (Path(path) / "content" / "zarr.json").exists()))
        real(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    assert staging.remove_folder(store.path, part)
    assert seen == [(False, True)]
    assert not staging.remove_folder(store.path, part)
    assert not staging.temporary_folder(store.path).exists()


def test_quarantine_never_replaces_what_is_there(tmp_path):
    store = opened(tmp_path)
    quarantine = store.path.with_name(store.name + ".quarantine")
    for content in ("one", "two"):
        for path in (store.path / "parts" / "x", store.path / "file"):
            path.parent.mkdir(exist_ok=True)
        (store.path / "parts" / "x").mkdir()
        (store.path / "parts" / "x" / "data").write_text(content)
        (store.path / "file").write_text(content)
        staging.quarantine_folder(store.path, store.path / "parts" / "x")
        staging.quarantine_folder(store.path, store.path / "file")
    found = {
        path.relative_to(quarantine).as_posix(): path.read_text()
        for path in sorted(quarantine.rglob("*"))
        if path.is_file()
    }
    assert found == {"file-1": "one", "file-2": "two", "x-1/data": "one", "x-2/data": "two"}
    with pytest.raises(FileNotFoundError, match="'.*parts/x'"):
        staging.quarantine_folder(store.path, store.path / "parts" / "x")
