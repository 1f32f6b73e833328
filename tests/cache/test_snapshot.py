"""The index snapshot makes opening fast, is never needed, and never answers wrongly."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mer.cache import snapshot
from mer.cache.errors import DamagedStoreError
from mer.cache.home import Cache
from mer.cache.index import KeyIndex
from mer.cache.reader import MappedFiles
from mer.cache.spec import FeatureSpec, OutputSpec
from mer.cache.store import Store

SPEC = FeatureSpec(
    slug="many",
    identity={"name": "many"},
    outputs=(
        OutputSpec(name="final", dim=4, rate_hz=50.0),
        OutputSpec(name="layer_1", dim=4, rate_hz=50.0),
        OutputSpec(name="code", dim=1, rate_hz=100.0, dtype="uint8", kind="codes"),
    ),
)


def numbered(n: int) -> bytes:
    return n.to_bytes(16, "little")


def add(store: Store, *numbers: int) -> None:
    """Each in a part of its own."""
    with store.writer() as writer:
        for n in numbers:
            frames = np.full((n % 9, 4), n, np.float32)
            codes = np.full((2 * (n % 9), 1), n % 256, np.uint8)
            writer.add(numbered(n), n, {"final": frames, "layer_1": frames, "code": codes})
            writer.commit()


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("many")
    store = Cache(root).open(SPEC, create=True)
    assert store is not None
    add(store, *range(40))
    len(store)
    return root


@pytest.fixture
def store(template: Path, tmp_path: Path) -> Store:
    """Forty parts, opened once, so that there is a snapshot."""
    copied = shutil.copytree(template, tmp_path / "many")
    Cache(copied).stores()[0].refresh()
    return Cache(copied).stores()[0]


@pytest.fixture
def manifests_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the parts whose manifests are read from here on."""
    read: list[str] = []
    real = MappedFiles.manifest

    def manifest(self: MappedFiles) -> bytes:
        read.append(Path(self.where).name)
        return real(self)

    monkeypatch.setattr(MappedFiles, "manifest", manifest)
    return read


def check(store: Store, numbers: list[int]) -> None:
    keys = [numbered(n) for n in numbers]
    assert store.contains(keys).all()
    assert not store.contains([b"\xff" * 16]).any()
    assert sorted(store.keys()) == sorted(keys)
    assert store.input_length(keys).tolist() == numbers
    for output, factor in (("final", 1), ("layer_1", 1), ("code", 2)):
        assert store.num_frames(keys, output).tolist() == [factor * (n % 9) for n in numbers]
        for n, key in zip(numbers, keys, strict=True):
            assert (store.frames(key, output) == (n % 256)).all()


def test_opening_with_a_snapshot_reads_no_manifest_until_frames_are_wanted(store, manifests_read):
    keys = [numbered(n) for n in range(40)]
    assert store.contains(keys).all()
    assert len(store) == len(store.parts()) == 40
    assert store.num_frames(keys, "code").sum() == 2 * store.num_frames(keys, "final").sum() > 0
    assert store.input_length(keys).tolist() == list(range(40))
    assert manifests_read == []
    store.frames(numbered(5), "final")
    assert len(manifests_read) == 1
    check(store, list(range(40)))


def test_only_new_parts_are_read_beside_a_snapshot(store, manifests_read):
    add(Store(store.path), 100, 101)
    del manifests_read[:]
    assert len(store) == 42
    assert len(manifests_read) == 2
    check(store, [*range(40), 100, 101])


def test_removed_parts_are_not_found_in_a_snapshot(store):
    gone = store.readers()[3]
    [number] = [int.from_bytes(key.tobytes(), "little") for key in list(gone.keys())]
    shutil.rmtree(store.path / "parts" / gone.id)
    check(Store(store.path), [n for n in range(40) if n != number])


def test_a_snapshot_is_renewed_when_enough_is_new(store, manifests_read):
    add(Store(store.path), *range(100, 140))
    Store(store.path).refresh()
    del manifests_read[:]
    again = Store(store.path)
    assert len(again) == 80
    assert manifests_read == []
    check(again, [*range(40), *range(100, 140)])


def test_small_stores_keep_none(tmp_path):
    store = Cache(tmp_path).open(SPEC, create=True)
    assert store is not None
    add(store, 1, 2, 3)
    assert len(Store(store.path)) == 3
    assert [path.name for path in tmp_path.iterdir()] == [store.name]


def test_a_part_whose_manifest_was_replaced_is_read_anew(store, manifests_read):
    part = store.readers()[0]
    file = store.path / "parts" / part.id / "zarr.json"
    file.write_bytes(file.read_bytes())
    os.utime(file, ns=(1, 1))
    del manifests_read[:]
    again = Store(store.path)
    assert len(again) == 40
    assert manifests_read == [part.id]


def test_two_exchanged_parts_are_read_anew(store):
    first, second = (store.path / "parts" / part.id for part in store.readers()[:2])
    first.rename(store.path / "third")
    second.rename(first)
    (store.path / "third").rename(second)
    with pytest.raises(DamagedStoreError, match="is the manifest of part"):
        Store(store.path).refresh()


@pytest.mark.parametrize("change", ["flip", "cut", "empty", "other store", "folder", "garbage"])
def test_a_damaged_snapshot_is_as_good_as_none(store, change, manifests_read):
    path = store.place.index_path()
    data = bytearray(path.read_bytes())
    if change == "flip":
        rng = np.random.default_rng(0)
        for at in rng.integers(0, len(data), 40).tolist():
            flipped = bytearray(data)
            flipped[at] ^= 1 << (at % 8)
            path.write_bytes(flipped)
            check(Store(store.path), list(range(40)))
        return
    if change == "cut":
        path.write_bytes(data[:-100])
    elif change == "empty":
        path.write_bytes(b"")
    elif change == "garbage":
        path.write_bytes(b"\x80\x04" + bytes(500))
    elif change == "other store":
        at = data.index(store.fingerprint.encode())
        data[at : at + 4] = b"0000"
        path.write_bytes(data)
    else:
        path.unlink()
        path.mkdir()
    again = Store(store.path)
    check(again, list(range(40)))
    assert len(manifests_read) == 40


def test_a_folder_that_cannot_be_written_needs_no_snapshot(store, monkeypatch):
    store.place.index_path().unlink()

    real = Path.open

    def refuse(self: Path, *args: object, **options: object):
        if ".index" in self.name:
            raise PermissionError(13, "Permission denied")
        return real(self, *args, **options)

    monkeypatch.setattr(Path, "open", refuse)
    check(Store(store.path), list(range(40)))


def test_a_full_disk_leaves_no_half_snapshot(store, monkeypatch):
    store.place.index_path().unlink()
    real = Path.replace

    def full(self: Path, target: Path) -> Path:
        if target.name.endswith(".index"):
            raise OSError(28, "No space left on device")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", full)
    check(Store(store.path), list(range(40)))
    assert [path.name for path in store.path.parent.iterdir()] == [store.name]


def test_a_missing_file_is_found_when_its_part_is_first_read(store):
    part = store.readers()[2]
    key = part.keys()[0].tobytes()
    (store.path / "parts" / part.id / "final/frames/zarr.json").unlink()
    again = Store(store.path)
    assert key in again
    with pytest.raises(DamagedStoreError, match=f"{part.id}/final/frames/zarr.json is missing"):
        again.frames(key, "final")


def test_a_damaged_manifest_is_found_when_its_part_is_first_read(store):
    part = store.readers()[2]
    key = part.keys()[0].tobytes()
    file = store.path / "parts" / part.id / "zarr.json"
    before = os.stat(file)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # rot does not move the time
    again = Store(store.path)
    assert key in again
    with pytest.raises(DamagedStoreError, match=f"{part.id}/zarr.json"):
        again.frames(key, "final")


def test_outputs_with_equal_spans_share_them(store):
    seen = Store(store.path).listing
    assert seen.spans("final")[0] is seen.spans("layer_1")[0]
    assert seen.spans("final")[0] is not seen.spans("code")[0]


@settings(max_examples=50)
@given(st.lists(st.integers(0, 5), max_size=30))
def test_a_sorted_index_answers_like_the_one_it_came_from(numbers):
    keys = np.array([list(bytes([n % 2]) * 8 + bytes([n]) * 8) for n in numbers], np.uint8)
    keys = keys.reshape(-1, 16)
    index = KeyIndex(keys)
    again = KeyIndex.from_sorted(*index.sorted_arrays, keys)
    for n in range(7):
        key = bytes([n % 2]) * 8 + bytes([n]) * 8
        wanted = numbers.index(n) if n in numbers else -1
        assert index.find_one(key) == again.find_one(key) == wanted
        assert again.find(np.frombuffer(key, np.uint8).reshape(1, 16)).tolist() == [wanted]


def test_a_snapshot_that_lies_about_lengths_is_void(store):
    path = store.place.index_path()
    kept = snapshot.read(path, store.fingerprint, ["final", "layer_1", "code"])
    assert kept is not None
    assert snapshot.read(path, store.fingerprint, ["final"]) is None
    assert snapshot.read(path, "0" * 32, ["final", "layer_1", "code"]) is None
