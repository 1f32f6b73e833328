"""Copies of stores: every byte checked, resumable, whichever way they go."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from s3_server import S3, Gateway, Request, s3, serve_folder, settings

from mer.cache import layout, objects, remote
from mer.cache.errors import DamagedStoreError, StorageFullError, StoreError, UsageError
from mer.cache.home import Cache, open_store
from mer.cache.spec import FeatureSpec, OutputSpec
from mer.cache.store import Store
from mer.cache.transfer import copy, write_parts_list

SPEC = FeatureSpec(
    slug="test",
    identity={"name": "transfer", "version": 1},
    outputs=(
        OutputSpec(name="final", dim=16, rate_hz=50.0),
        OutputSpec(name="pooled", dim=3, rate_hz=None, dtype="float32", kind="pooled"),
    ),
    licence="for tests",
)
Content = dict[bytes, dict[str, np.ndarray]]


def utterances(numbers: range) -> Content:
    content = {}
    for number in numbers:
        rng = np.random.default_rng(number)
        length = int(rng.integers(0, 2000))
        content[rng.bytes(16)] = {
            "final": rng.standard_normal((length, 16)).astype(np.float16).astype(np.float32),
            "pooled": rng.standard_normal((1, 3)).astype(np.float32),
        }
    return content


def write(store: Store, content: Content, every: int = 4) -> None:
    with store.writer() as writer:
        for number, (key, arrays) in enumerate(content.items(), 1):
            writer.add(key, 160 * len(arrays["final"]), arrays)
            if number % every == 0:
                writer.commit()


def check(store: Store, content: Content) -> None:
    remote.memory.clear()
    store = Store(store.url)
    assert len(store) == len(content)
    keys = list(content)
    expected = [160 * len(arrays["final"]) for arrays in content.values()]
    assert store.input_length(keys).tolist() == expected
    for key, arrays in content.items():
        for output, values in arrays.items():
            assert np.array_equal(store.frames(key, output), values), output


@pytest.fixture
def content() -> Content:
    return utterances(range(12))


@pytest.fixture
def local(tmp_path: Path, content: Content) -> Store:
    """Twelve utterances in three parts."""
    store = Cache(tmp_path / "local").open(SPEC, create=True)
    assert store is not None
    write(store, content)
    return store


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    with s3() as made:
        for name, value in settings(made.gateway.url).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MER_LOCAL_COPY", "off")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        monkeypatch.setattr(objects, "FIRST_WAIT_S", 0.001)
        monkeypatch.setattr(objects, "TRIES", 3)
        remote.memory.clear()
        yield made
        remote.memory.clear()


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_copy_to_a_bucket_and_back_is_the_same_store(
    local: Store, bucket: S3, content: Content, tmp_path: Path
):
    seen: list[int] = []
    there = copy(local, Cache(bucket.url), progress=seen.append)
    assert (there.parts, there.utterances, there.skipped_utterances) == (3, 12, 0)
    assert there.store == f"{bucket.url}/{local.name}"
    assert not there.damaged
    manifests = sum((Path(part.where) / "zarr.json").stat().st_size for part in local.readers())
    assert sum(seen) == there.bytes - manifests
    check(Store(there.store), content)
    assert Store(there.store).attributes == local.attributes
    back = copy(Store(there.store), Cache(tmp_path / "back"))
    assert back.utterances == 12
    check(Store(Path(back.store)), content)
    ours, theirs = tree(local.path), tree(Path(back.store))
    assert sorted(v for k, v in ours.items() if not _is_manifest(k)) == sorted(
        v for k, v in theirs.items() if not _is_manifest(k)
    )


def test_copy_between_folders_keeps_every_byte(local: Store, content: Content, tmp_path: Path):
    report = copy(local, Cache(tmp_path / "other"))
    assert tree(Path(report.store)) == tree(local.path)
    assert not list((tmp_path / "other").glob("*.tmp"))


def test_copy_between_buckets_keeps_every_object(local: Store, bucket: S3, content: Content):
    first = copy(local, Cache(bucket.url))
    second = copy(Store(first.store), Cache(f"s3://{bucket.bucket}/second"))
    assert second.utterances == 12
    objects_of = [
        {listed.name: listed.tag for listed in objects.Bucket(report.store).objects()}
        for report in (first, second)
    ]
    assert objects_of[0] == objects_of[1]


def test_copying_again_brings_only_what_is_new(local: Store, bucket: S3, content: Content):
    copy(local, Cache(bucket.url))
    more = utterances(range(20, 23))
    write(local, more)
    bucket.gateway.forget()
    report = copy(Store(local.url), Cache(bucket.url))
    assert (report.parts, report.utterances, report.skipped_utterances) == (1, 3, 12)
    written = {r.path.split("/parts/")[1][:32] for r in _puts(bucket) if "/parts/" in r.path}
    assert len(written) == 1
    bucket.gateway.forget()
    assert copy(local, Cache(bucket.url)).utterances == 0
    assert [request.path.endswith(".parts.json") for request in _puts(bucket)] == [True]
    check(Store(report.store), {**content, **more})


def test_of_a_part_that_is_partly_there_only_the_rest_is_brought(
    local: Store, bucket: S3, content: Content
):
    some = dict(list(content.items())[:2])
    target = Cache(bucket.url).open(SPEC, create=True)
    write(target, some)
    report = copy(local, Cache(bucket.url))
    assert (report.utterances, report.skipped_utterances) == (10, 2)
    check(target, content)
    expected = local.pooled("final", list(content))
    fresh = Store(target.url)
    assert np.array_equal(fresh.pooled("final", list(content)), expected, equal_nan=True)
    stored = [row.tobytes() for part in fresh.readers() for row in part.keys()]  # noqa: SIM118
    assert len(stored) == len(set(stored))


def test_only_chosen_utterances_are_copied(local: Store, content: Content, tmp_path: Path):
    keys = list(content)[3:6]
    report = copy(local, Cache(tmp_path / "some"), keys=[*keys, bytes(16)])
    assert (report.utterances, report.missing) == (3, 1)
    check(Store(Path(report.store)), {key: content[key] for key in keys})


def test_utterance_that_the_source_holds_twice_is_copied_once(
    local: Store, content: Content, tmp_path: Path
):
    other = Cache(tmp_path / "other").open(SPEC, create=True)
    twice = dict(list(content.items())[:3]) | utterances(range(40, 41))
    write(other, twice)
    (part,) = other.readers()
    os.rename(part.where, local.path / layout.PARTS / part.id)
    report = copy(Store(local.url), Cache(tmp_path / "copy"))
    assert report.utterances == 13
    check(Store(Path(report.store)), content | twice)
    stored = [
        row.tobytes()
        for part in Store(Path(report.store)).readers()
        for row in part.keys()  # noqa: SIM118
    ]
    assert len(stored) == 13


def test_copy_that_broke_off_goes_on(local: Store, bucket: S3, content: Content):
    puts: list[str] = []

    def fault(request: Request) -> int | None:
        if request.method == "PUT" and "/parts/" in request.path:
            puts.append(request.path)
        return 503 if len(puts) > 25 else None

    bucket.gateway.fault = fault
    with pytest.raises(StoreError, match="the server answered 503.*what was finished is kept"):
        copy(local, Cache(bucket.url))
    bucket.gateway.fault = None
    check_part_of(Store(f"{bucket.url}/{local.name}"), content)
    report = copy(local, Cache(bucket.url))
    assert report.utterances + report.skipped_utterances == 12
    check(Store(report.store), content)


def check_part_of(store: Store, content: Content) -> None:
    """What an interrupted copy left is readable and right."""
    remote.memory.clear()
    for key in store:
        assert np.array_equal(store.frames(key, "final"), content[key]["final"])


@pytest.mark.parametrize("fault", [503, "cut", "reset", "short", "flip"])
def test_bad_network_does_not_change_a_byte(
    fault: int | str, local: Store, bucket: S3, content: Content, tmp_path: Path
):
    report = copy(local, Cache(bucket.url))
    met: dict[str, int] = {}

    def once(request: Request) -> int | str | None:
        times = met[request.path] = met.get(request.path, 0) + 1
        return fault if request.method == "GET" and "/c/0" in request.path and times == 1 else None

    remote.memory.clear()
    bucket.gateway.fault = once
    back = copy(Store(report.store), Cache(tmp_path / "back"))
    assert not back.damaged
    check(Store(Path(back.store)), content)


@pytest.mark.parametrize("damage", ["flip", "lost", "manifest"])
def test_damaged_part_is_left_out_and_named(
    damage: str, local: Store, bucket: S3, content: Content
):
    part = local.readers()[1]
    keys = {row.tobytes() for row in part.keys()}  # noqa: SIM118
    file = Path(part.where) / ("zarr.json" if damage == "manifest" else part.shard("final").file)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.unlink()
    if damage != "lost":
        file.write_bytes(data)
    report = copy(Store(local.url), Cache(bucket.url))
    assert report.utterances == 12 - len(keys)
    (named,) = report.damaged
    assert part.id in named
    rest = {key: arrays for key, arrays in content.items() if key not in keys}
    check(Store(report.store), rest)


def test_store_of_the_first_release_is_completed_on_the_way(
    local: Store, bucket: S3, content: Content
):
    for part in local.readers():
        file = Path(part.where) / "zarr.json"
        mer = json.loads(file.read_bytes())["attributes"]["mer"]
        for field in ("checksum", "store", "part"):
            del mer[field]
        for output in mer["outputs"].values():
            del output["crc32c"]
        file.write_bytes(layout.to_bytes(layout.group_document(mer)))
    copied = Store(copy(Store(local.url), Cache(bucket.url)).store)
    for part in copied.readers():
        assert part.manifest["part"] == part.id
        assert part.manifest["store"] == copied.fingerprint
        assert part.shard("final").crcs is not None
    check(copied, content)


def test_copy_from_a_web_server(local: Store, bucket: S3, content: Content, tmp_path: Path):
    assert write_parts_list(local) == f"{local.url}.parts.json"
    with Gateway(serve_folder(tmp_path)).running() as gateway:
        source = open_store(f"{gateway.url}/local/{local.name}")
        report = copy(source, Cache(tmp_path / "copy"))
        with pytest.raises(UsageError, match="is a web server and can only be read"):
            copy(source, Cache(gateway.url))
    check(Store(Path(report.store)), content)


def test_store_is_not_copied_onto_itself(local: Store):
    with pytest.raises(UsageError, match="would be copied onto itself"):
        copy(local, Cache(local.path.parent))


def test_target_that_is_damaged_is_refused(local: Store, tmp_path: Path):
    report = copy(local, Cache(tmp_path / "copy"))
    (Path(report.store) / "zarr.json").write_bytes(b"{")
    with pytest.raises(DamagedStoreError, match="is not JSON any more"):
        copy(local, Cache(tmp_path / "copy"))


def test_full_disk_keeps_what_was_finished(
    local: Store, content: Content, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from mer.cache import transfer

    calls: list[Path] = []

    def full_after_ten(path: Path, blocks: object) -> object:
        calls.append(path)
        if len(calls) > 20:
            raise OSError(28, "No space left on device")
        return write_file(path, blocks)

    write_file = transfer.write_file
    monkeypatch.setattr(transfer, "_PARTS_AT_ONCE", 1)
    monkeypatch.setattr(transfer, "write_file", full_after_ten)
    with pytest.raises(StorageFullError, match="No space left while writing"):
        copy(local, Cache(tmp_path / "copy"))
    monkeypatch.setattr(transfer, "write_file", write_file)
    target = Store(tmp_path / "copy" / local.name)
    assert 0 < len(target) < 12
    check_part_of(target, content)
    assert not list((tmp_path / "copy").glob("*.tmp"))
    copy(local, Cache(tmp_path / "copy"))
    check(target, content)


def test_killed_copy_is_finished_by_the_next(
    local: Store, bucket: S3, content: Content, tmp_path: Path
):
    program = f"""
import os, sys
from mer.cache import transfer
from mer.cache.home import Cache
from mer.cache.store import Store
told = []
def tell(num_bytes):
    told.append(num_bytes)
    if len(told) == int(sys.argv[1]):
        os.kill(os.getpid(), 9)
transfer.copy(Store({local.url!r}), Cache({bucket.url!r}), progress=tell)
"""
    for when in (1, 14, 25):
        ran = subprocess.run([sys.executable, "-c", program, str(when)], timeout=60, check=False)
        assert ran.returncode in (-9, 0)
        target = Cache(bucket.url).open(SPEC)
        if target is not None:
            check_part_of(target, content)
    check(Store(copy(local, Cache(bucket.url)).store), content)


def _puts(bucket: S3) -> list[Request]:
    return bucket.gateway.requests("PUT")


def _is_manifest(name: str) -> bool:
    return name.startswith("parts/") and name.count("/") == 2
