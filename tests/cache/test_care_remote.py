"""Verify, repair, gc, du and diff do for object stores what they do for folders."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from s3_server import S3, Gateway, Request, s3, serve_folder, settings

from mer.cache import layout, objects, remote
from mer.cache.collect import plan, run
from mer.cache.diff import diff
from mer.cache.errors import StoreError, UsageError
from mer.cache.home import Cache
from mer.cache.objects import Bucket
from mer.cache.remote import parts_list
from mer.cache.spec import FeatureSpec, OutputSpec
from mer.cache.store import Store
from mer.cache.usage import usage
from mer.cache.verify import total_bytes, verify

SPEC = FeatureSpec(
    slug="test",
    identity={"extractor": "remote"},
    outputs=(
        OutputSpec(name="final", dim=4, rate_hz=50.0),
        OutputSpec(name="code", dim=1, rate_hz=100.0, dtype="uint8", kind="codes"),
    ),
)
KEYS = [bytes([number]) * 16 for number in range(6)]
CHUNK = 512 * 4 * 2 + 4
Content = dict[bytes, tuple[bytes, ...]]


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """A bucket, no waits between tries and no local copy."""
    with s3() as made:
        for name, value in settings(made.gateway.url).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MER_LOCAL_COPY", "off")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        monkeypatch.setattr(objects, "FIRST_WAIT_S", 0.001)
        monkeypatch.setattr(objects, "TRIES", 3)
        yield made


def add(store: Store, *numbers: int) -> None:
    """Add one part, whatever the store holds."""
    writer = Store(store.place).writer()
    writer._known = lambda key: False
    with writer:
        for number in numbers:
            rng = np.random.default_rng(number)
            final = rng.standard_normal((700, 4), dtype=np.float32)
            code = rng.integers(0, 256, (10, 1), dtype=np.uint8)
            writer.add(KEYS[number], 320 * number, {"final": final, "code": code})


def make(root: str | Path) -> Store:
    """Two parts of three utterances."""
    store = Cache(root).open(SPEC, create=True)
    assert store is not None
    add(store, 0, 1, 2)
    add(store, 3, 4, 5)
    return Store(store.url)


@pytest.fixture
def store(bucket: S3) -> Store:
    return make(bucket.url)


def reopened(store: Store) -> Store:
    """The store as another process sees it."""
    remote.memory.clear()
    return Store(store.url)


def content(store: Store) -> Content:
    fresh = reopened(store)
    return {
        key: (
            str(fresh.input_length([key])).encode(),
            fresh.frames(key, "final").tobytes(),
            fresh.frames(key, "code").tobytes(),
            fresh.pooled("final", [key]).tobytes(),
        )
        for key in fresh.keys()  # noqa: SIM118 - not a mapping
    }


def name_of(store: Store, key: bytes) -> str:
    """Return the name, below the cache, of the part that holds a key."""
    readers = reopened(store).readers()
    part = next(part for part in readers if key in set(map(bytes, part.keys())))
    return f"{store.name}/parts/{part.id}"


def flip(bucket: S3, name: str, at: int) -> None:
    data = bytearray(bucket.object(name))
    data[at] ^= 0x10
    bucket.object(name, bytes(data))


def test_a_sound_store_is_clean_and_every_byte_is_counted(store: Store):
    seen: list[int] = []
    report = verify([reopened(store)], progress=seen.append)
    assert report.corrupt == report.notes == ()
    assert (report.parts, report.utterances) == (2, 6)
    listed = Bucket(store.url).objects()
    assert report.bytes == sum(seen) == total_bytes([store]) == sum(o.bytes for o in listed)
    assert usage(store).total == report.bytes
    assert report.files == len(listed) == usage(store).files


def test_damage_is_found_narrowed_down_and_repaired(store: Store, bucket: S3):
    before = content(store)
    part = name_of(store, KEYS[0])
    flip(bucket, f"{part}/final/frames/c/0/0", 4 * CHUNK + 9)  # frames 2048 to 2099
    flip(bucket, f"{part}/key/c/0/0", 3)
    bucket.object(f"{part}/code/zarr.json", method="DELETE")
    flip(bucket, f"{store.name}/parts/zarr.json", 3)
    report = verify([reopened(store)], repair=True)
    assert {(f.file, f.utterances, f.restorable) for f in report.corrupt} == {
        ("parts/zarr.json", (), True),
        ("code/zarr.json", (), True),
        ("final/frames/c/0/0", (KEYS[2],), False),
        ("key/c/0/0", (), True),
    }
    (where,) = report.quarantined
    assert where.startswith(f"{store.url}{layout.QUARANTINE_SUFFIX}/{part.rpartition('/')[2]}")
    assert verify([reopened(store)]).corrupt == ()
    assert content(store) == {key: before[key] for key in before if key != KEYS[2]}
    assert usage(store).quarantine > 3 * 700 * 4 * 2


@pytest.mark.parametrize("harm", ["delete", "truncate", "exchange"])
def test_a_shard_that_is_not_what_was_written_is_found(store: Store, bucket: S3, harm):
    before = content(store)
    name = f"{name_of(store, KEYS[0])}/final/frames/c/0/0"
    if harm == "delete":
        bucket.object(name, method="DELETE")
    elif harm == "truncate":
        bucket.object(name, bucket.object(name)[: CHUNK + 10])
    else:
        bucket.object(name, bucket.object(f"{name_of(store, KEYS[3])}/final/frames/c/0/0"))
    (fault,) = verify([reopened(store)]).corrupt
    lost = {KEYS[0], KEYS[1], KEYS[2]}
    assert set(fault.utterances) == lost
    verify([reopened(store)], repair=True)
    assert verify([reopened(store)]).corrupt == ()
    assert content(store).keys() == before.keys() - lost


def test_lost_store_metadata_is_made_anew(store: Store, bucket: S3):
    before = content(store)
    bucket.object(f"{store.name}/zarr.json", b"{")
    report = verify([Store(store.url)], repair=True)
    assert report.quarantined == (f"{store.url}{layout.QUARANTINE_SUFFIX}/zarr.json-1",)
    assert verify([Store(store.url)]).corrupt == ()
    Cache(bucket.url).open(SPEC, create=True)
    assert content(store) == before


def test_an_unfinished_upload_is_no_part(store: Store, bucket: S3):
    bucket.object(f"{store.name}/parts/{'0' * 32}/key/c/0/0", b"half")
    report = verify([reopened(store)], repair=True)
    assert report.corrupt == report.quarantined == ()
    assert report.parts == 2


def test_a_server_that_fails_says_nothing_about_the_data(store: Store, bucket: S3):
    part = name_of(store, KEYS[0]).rpartition("/")[2]

    def fault(request: Request) -> int | None:
        return 503 if f"{part}/final/frames/c" in request.path else None

    bucket.gateway.fault = fault
    report = verify([reopened(store)], repair=True)
    bucket.gateway.fault = None
    (corruption,) = report.corrupt
    assert "cannot be read" in corruption.reason
    assert "503" in corruption.reason
    assert corruption.utterances == report.quarantined == ()
    assert verify([reopened(store)]).corrupt == ()


def test_a_store_behind_a_web_server_is_verified(tmp_path: Path):
    local = make(tmp_path)
    names = [part.id for part in local.parts()]
    (tmp_path / f"{local.name}.parts.json").write_bytes(parts_list(names))
    shard = local.path / "parts" / names[0] / "code/frames/c/0/0"
    data = shard.read_bytes()
    with Gateway(serve_folder(tmp_path)).running() as gateway:
        store = Store(f"{gateway.url}/{local.name}")
        report = verify([store])
        assert (report.corrupt, report.parts, report.utterances) == ((), 2, 6)
        shard.write_bytes(bytes(len(data)))
        (fault,) = verify([store]).corrupt
        assert fault.file == "code/frames/c/0/0"
        assert len(fault.utterances) == 3
        with pytest.raises(UsageError, match="is a web server and can only be read"):
            verify([store], repair=True)


def test_parts_are_merged_and_copies_dropped(store: Store, bucket: S3):
    add(store, 2, 3)
    before = content(store)
    cache = Cache(bucket.url)
    report = run(plan(cache))
    assert report.parts_merged >= 2
    assert verify([reopened(store)]).notes == ()
    assert content(store) == before
    assert len(reopened(store).parts()) == 1
    assert plan(cache).steps == ()


def test_a_damaged_copy_is_not_what_is_kept(store: Store, bucket: S3):
    """The local memory still holds the sound bytes; the server does not."""
    add(store, 0, 1)
    ids = sorted(part.id for part in reopened(store).parts())
    holders = [p for p in reopened(store).readers() if KEYS[0] in set(map(bytes, p.keys()))]
    better = min(part.id for part in holders)
    flip(bucket, f"{store.name}/parts/{better}/final/frames/c/0/0", 5)
    report = run(plan(Cache(bucket.url), compact=False))
    assert sorted(part.id for part in reopened(store).parts()) == ids
    assert "is gone or damaged" in report.notes[0]


def test_a_store_is_dropped_with_all_its_objects(store: Store, bucket: S3):
    report = run(plan(Cache(bucket.url), extractors=["remote"]))
    assert (report.stores_dropped, report.utterances) == (1, 6)
    assert Bucket(bucket.url).objects() == []


def test_a_merge_that_the_network_breaks_loses_nothing(store: Store, bucket: S3):
    before = content(store)
    gc = plan(Cache(bucket.url))
    for method in ("PUT", "DELETE", "POST"):
        bucket.gateway.fault = lambda request, method=method: (
            503 if request.method == method else None
        )
        remote.memory.clear()
        with suppress(StoreError):  # after the upload, or never for a method nobody uses
            run(gc)
        bucket.gateway.fault = None
        assert content(store) == before
    run(plan(Cache(bucket.url)))
    assert content(store) == before
    assert len(reopened(store).parts()) == 1


def test_a_store_equals_its_copy_in_a_folder(store: Store, tmp_path: Path):
    assert diff(reopened(store), make(tmp_path / "local")).equal
