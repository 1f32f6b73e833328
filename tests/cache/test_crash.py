"""Killed writers, full disks, read-only folders: the store opens, the message helps."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from mer.cache import staging
from mer.cache import writer as writer_module
from mer.cache.errors import StorageFullError, StoreError
from mer.cache.spec import FeatureSpec, OutputSpec
from mer.cache.store import Cache, Store

SPEC = FeatureSpec(
    slug="crash",
    identity={"name": "crash"},
    outputs=(OutputSpec(name="final", dim=8, rate_hz=50.0),),
)

# Adds utterances for ever; says which are committed after each commit.
WRITER = """
import sys, numpy as np
from mer.cache.spec import FeatureSpec, OutputSpec
from mer.cache.store import Cache
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
    real, late = writer_module._Files.array, []

    def array(self, name, values, dtype):
        real(self, name, values, dtype)
        if not late:  # the keys of the part are written, nothing else is
            frames = np.zeros((100, 8), np.float32)
            adding = (number(2), 2, {"final": frames})
            late.append(threading.Thread(target=writer.add, args=adding))
            late[0].start()
            late[0].join(0.2)

    monkeypatch.setattr(writer_module._Files, "array", array)
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


def test_after_a_full_disk_the_writer_accepts_nothing(tmp_path, monkeypatch):
    store = opened(tmp_path)

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    with store.writer(part_bytes=1) as writer:
        frames = {"final": np.zeros((1, 8), np.float32)}
        with monkeypatch.context() as patch:
            patch.setattr(staging, "_sync", full)
            with pytest.raises(StorageFullError, match="free some space"):
                writer.add(bytes(16), 1, frames)
        with pytest.raises(StoreError, match="failed before; open a new writer"):
            writer.add(bytes(16), 1, frames)
    assert len(store) == 0
    add(store, 0)
    assert len(store) == 1


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


def test_ctrl_c_during_a_commit_commits_on_the_way_out(tmp_path, monkeypatch):
    store = opened(tmp_path)
    real = os.fsync
    interrupts = iter([KeyboardInterrupt("second line")])

    def interrupted(descriptor):
        error = next(interrupts, None)
        if error is not None:
            raise error
        real(descriptor)

    monkeypatch.setattr(os, "fsync", interrupted)

    def work() -> None:
        with store.writer(part_bytes=1) as writer:
            writer.add(bytes(16), 1, {"final": np.ones((5, 8), np.float32)})

    with pytest.raises(KeyboardInterrupt, match="second line"):
        work()
    assert store.contains([bytes(16)]).all()
    assert temporary(store) == []


def leftover(store: Store, name: str, owner: dict[str, object] | None, age_s: float = 0) -> None:
    folder = staging.temporary_folder(store.path) / name
    (folder / "content").mkdir(parents=True)
    if owner is not None:
        (folder / "owner.json").write_text(json.dumps(owner))
    then = time.time() - age_s
    os.utime(folder, (then, then))


def test_only_abandoned_temporary_folders_are_swept(tmp_path):
    store = opened(tmp_path)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    here, day = staging._host(), staging.ABANDONED_S
    leftover(store, "dead", {"host": here, "pid": gone.pid})
    leftover(store, "alive", {"host": here, "pid": os.getpid()})
    leftover(store, "elsewhere", {"host": "another", "pid": gone.pid})
    leftover(store, "elsewhere-old", {"host": "another", "pid": gone.pid}, day + 60)
    leftover(store, "being-made", None)
    leftover(store, "unowned-old", None, day + 60)
    with store.writer():
        assert temporary(store) == ["alive", "being-made", "elsewhere"]
