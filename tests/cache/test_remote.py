"""Stores in object stores: what holds for a folder holds there; a bad network breaks nothing."""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from s3_server import S3, Answer, Gateway, Request, s3, serve_folder, settings

from mer.cache import clients, layout, localcopy, nearby, objects, remote
from mer.cache.collect import _utterances, plan, run
from mer.cache.errors import (
    DamagedStoreError,
    MissingDependencyError,
    MissingFeatureError,
    StoreError,
    UsageError,
)
from mer.cache.home import Cache, open_store
from mer.cache.localcopy import LocalCopy, local_copy
from mer.cache.objects import Bucket, Span, plan_requests
from mer.cache.remote import ObjectPlace, parts_list
from mer.cache.rewrite import rewrite
from mer.cache.spec import FeatureSpec, OutputSpec
from mer.cache.store import Store
from mer.cache.verify import _Verifier, verify

SPEC = FeatureSpec(
    slug="test",
    identity={"name": "remote", "version": 1},
    outputs=(
        OutputSpec(name="final", dim=16, rate_hz=50.0),
        OutputSpec(name="code", dim=1, rate_hz=100.0, dtype="uint16", kind="codes", num_codes=257),
    ),
)
CHUNK_BYTES = 512 * 16 * 2 + 4
Content = dict[bytes, dict[str, np.ndarray]]


def utterances(numbers: range) -> Content:
    """Keys and arrays that follow from their numbers."""
    content = {}
    for number in numbers:
        rng = np.random.default_rng(number)
        length = int(rng.integers(1, 3000))
        content[rng.bytes(16)] = {
            "final": rng.standard_normal((length, 16)).astype(np.float16).astype(np.float32),
            "code": rng.integers(0, 257, (2 * length, 1)),
        }
    return content


def write(store: Store, content: Content, part_bytes: int = 192 << 10) -> None:
    with store.writer(part_bytes=part_bytes) as writer:
        for key, arrays in content.items():
            writer.add(key, 160 * len(arrays["final"]), arrays)


def check(store: Store, content: Content, batch: int = 8) -> None:
    """Compare everything that a store answers with what was written."""
    keys = list(content)
    assert store.contains(keys).all()
    for start in range(0, len(keys), batch):
        some = keys[start : start + batch]
        data, lengths = store.batch(some, "final")
        for row, key in enumerate(some):
            assert np.array_equal(data[row, : lengths[row]], content[key]["final"])
            assert np.array_equal(store.frames(key, "code"), content[key]["code"])


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """A bucket, no waits between tries, small blocks and no local copy."""
    with s3() as made:
        for name, value in settings(made.gateway.url).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MER_LOCAL_COPY", "off")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        monkeypatch.setattr(objects, "FIRST_WAIT_S", 0.001)
        monkeypatch.setattr(objects, "TRIES", 4)
        monkeypatch.setattr(nearby, "BLOCK_BYTES", 4 * CHUNK_BYTES)
        remote.memory.clear()
        yield made
        remote.memory.clear()


@pytest.fixture
def content() -> Content:
    return utterances(range(12))


@pytest.fixture
def store(bucket: S3, content: Content) -> Store:
    """A store of 12 utterances in several parts, freshly opened."""
    store = Cache(bucket.url).open(SPEC, create=True)
    assert store is not None
    write(store, content)
    bucket.gateway.forget()
    return reopened(store)


def reopened(store: Store) -> Store:
    """The store as another process sees it: nothing in memory."""
    remote.memory.clear()
    fresh = Store(store.url)
    fresh.refresh()
    return fresh


def frames_of(store: Store, number: int = 0) -> str:
    """Name, below the cache, of the object with the frames of a part."""
    return f"{store.name}/parts/{store.parts()[number].id}/final/frames/c/0/0"


# -- what holds for a folder -----------------------------------------------------------------------


def test_what_was_written_is_read(store: Store, content: Content):
    assert len(store) == len(content)
    assert len(store.parts()) > 2
    check(store, content)
    keys = list(content)
    assert store.input_length(keys).tolist() == [160 * len(a["final"]) for a in content.values()]
    means = [arrays["final"].mean(0) for arrays in content.values()]
    assert np.allclose(store.pooled("final", keys)[:, 0], means, atol=1e-5)


def test_store_is_found_by_its_fingerprint_in_a_listing(store: Store, bucket: S3):
    cache = Cache(bucket.url)
    assert [found.name for found in cache.stores()] == [store.name]
    renamed = FeatureSpec(slug="other", identity=SPEC.identity, outputs=SPEC.outputs)
    assert cache.open(renamed).url == store.url
    assert Cache(f"s3://{bucket.bucket}/nothing").stores() == []


def test_utterance_written_by_two_writers_is_read_once(store: Store, content: Content):
    before = len(store.parts())
    blind = Store(store.url)
    blind.refresh()
    more = utterances(range(30, 33))
    write(store, more)
    write(blind, {**content, **more})  # looked before the other wrote, or skips what is there
    fresh = reopened(store)
    assert len(fresh) == len(content) + len(more)
    assert len(fresh.parts()) > before
    check(fresh, {**content, **more})


def test_writers_of_the_same_part_publish_it_once(store: Store, content: Content, tmp_path: Path):
    source = Cache(tmp_path / "local").open(SPEC, create=True)
    more = utterances(range(50, 52))
    write(source, more, part_bytes=64 << 20)
    (part,) = source.readers()
    name = layout.content_part_id(part.files)
    _seal(Path(part.where), part=name)
    published: list[bool] = []
    places = [ObjectPlace(store.url) for _ in range(2)]
    threads = [
        threading.Thread(target=lambda p=p: published.append(p.publish(Path(part.where), name)))
        for p in places
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert any(published)
    assert not places[0].publish(Path(part.where), name)
    check(reopened(store), {**content, **more})


def test_store_made_by_two_at_once_is_one_store(bucket: S3):
    opened = [Cache(bucket.url).open(SPEC, create=True) for _ in range(2)]
    before = bucket.object(f"{opened[0].name}/zarr.json")
    opened[1].place.create(before + b" ")
    assert bucket.object(f"{opened[0].name}/zarr.json") == before


def test_part_whose_writer_died_before_its_manifest_is_invisible_and_swept(
    store: Store, bucket: S3, content: Content
):
    def fault(request: Request) -> str | None:
        last = request.path.rsplit("/parts/", 1)[-1].count("/") == 1
        return "reset" if request.method == "PUT" and last else None

    bucket.gateway.fault = fault
    more = utterances(range(70, 72))
    with pytest.raises(StoreError, match=r"Cannot write s3://.*zarr\.json.*tried \d times"):
        write(store, more)
    bucket.gateway.fault = None
    fresh = reopened(store)
    assert not fresh.contains(list(more)).any()
    check(fresh, content)
    place = ObjectPlace(store.url)
    before = len(place.bucket.objects())
    place.sweep()
    assert len(place.bucket.objects()) == before, "it may still be on its way"
    place.sweep(older_than_s=-60)
    left = {listed.name.split("/")[1] for listed in place.bucket.objects("parts")}
    assert left - {"zarr.json"} == {part.id for part in fresh.parts()}
    write(fresh, more)
    check(reopened(store), {**content, **more})


def test_manifest_whose_answer_was_lost_is_no_error(store: Store, bucket: S3, content: Content):
    seen: list[str] = []

    def fault(request: Request) -> str | None:
        last = request.path.rsplit("/parts/", 1)[-1].count("/") == 1
        if request.method == "PUT" and last and not seen:
            seen.append(request.path)
            return "late"
        return None

    bucket.gateway.fault = fault
    more = utterances(range(70, 72))
    write(store, more)
    assert seen
    check(reopened(store), {**content, **more})


def test_removed_part_is_gone_at_once_for_those_who_have_it_open(store: Store, content: Content):
    part = store.parts()[0].id
    keys = [row.tobytes() for row in store.readers()[0].keys()]  # noqa: SIM118
    Store(store.url).place.remove(part)
    assert not ObjectPlace(store.url).bucket.objects(f"parts/{part}")
    with pytest.raises(MissingFeatureError, match="not in s3://"):
        store.batch(keys, "final")
    rest = {key: arrays for key, arrays in content.items() if key not in keys}
    check(store, rest)


def test_quarantined_part_lies_beside_the_store_as_it_was(store: Store, bucket: S3):
    part = store.parts()[0].id
    place = ObjectPlace(store.url)
    names = [listed.name for listed in place.bucket.objects(f"parts/{part}")]
    content = {name: bucket.object(f"{store.name}/{name}") for name in names}
    where = place.quarantine(part)
    assert where == f"{store.url}.quarantine/{part}-1"
    for name, data in content.items():
        assert Bucket(where).get(name.removeprefix(f"parts/{part}/")) == data
    assert part not in place.part_names()


def test_zarr_reads_the_same_from_the_bucket(store: Store, bucket: S3):
    import obstore.store
    import zarr
    import zarr.storage

    remote_store = obstore.store.S3Store(
        bucket.bucket, prefix=f"cache/{store.name}", client_options={"allow_http": True}
    )
    group = zarr.open_group(zarr.storage.ObjectStore(remote_store, read_only=True), mode="r")
    for part in store.readers():
        frames = part.frames("final", 0, part.num_frames("final"))
        assert np.array_equal(group[f"parts/{part.id}/final/frames"][:], frames)


def test_store_is_pickled_as_its_url(store: Store, content: Content):
    check(pickle.loads(pickle.dumps(store)), content)


def test_store_that_was_used_works_in_a_forked_process(store: Store, content: Content):
    key = next(iter(content))
    program = f"""
import os, sys
from mer.cache.store import Store
store = Store({store.url!r})
key = bytes.fromhex({key.hex()!r})
before = store.frames(key, "code").sum()
child = os.fork()
if child == 0:
    from mer.cache import remote
    remote.memory.clear()
    os._exit(0 if store.frames(key, "code").sum() == before else 3)
assert os.waitpid(child, 0)[1] == 0
print(before)
"""
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) == content[key]["code"].sum()


# -- a bad network ---------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [500, 503, 429, "reset", "cut", "short", "stall", "drip", "flip"])
def test_passing_fault_is_not_noticed(
    fault: int | str, store: Store, bucket: S3, content: Content, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(objects, "READ_TIMEOUT_S", 0.25)
    met: dict[str, int] = {}

    def first_two(request: Request) -> int | str | None:
        times = met[request.path] = met.get(request.path, 0) + 1
        often = 1 if fault in ("flip", "stall") else 2
        return (
            fault if request.method == "GET" and "/c/0" in request.path and times <= often else None
        )

    bucket.gateway.fault = first_two
    check(reopened(store), content)
    assert met


@pytest.mark.parametrize("fault", [503, "reset"])
def test_passing_fault_while_writing_is_not_noticed(
    fault: int | str, store: Store, bucket: S3, content: Content
):
    met: dict[str, int] = {}

    def first(request: Request) -> int | str | None:
        times = met[request.path] = met.get(request.path, 0) + 1
        return fault if request.method == "PUT" and times == 1 else None

    bucket.gateway.fault = first
    more = utterances(range(90, 93))
    write(store, more)
    bucket.gateway.fault = None
    check(reopened(store), {**content, **more})


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (503, r"the server answered 503 Service Unavailable \(Fault503\), tried 4 times"),
        ("cut", "the body ended early, tried 4 times"),
        ("short", r"the body ended after \d+ of \d+ bytes, tried 4 times"),
        ("reset", "the connection was reset, tried 4 times"),
        (403, r"the server answered 403 Forbidden \(Fault403\)\. Check the credentials"),
    ],
)
def test_lasting_fault_is_one_clear_error(
    fault: int | str, says: str, store: Store, bucket: S3, content: Content
):
    store = reopened(store)
    bucket.gateway.fault = lambda request: fault if request.is_data else None
    with pytest.raises(StoreError, match=f"^Cannot read {store.url}/parts/.*: {says}") as raised:
        store.batch(list(content), "final")
    assert not isinstance(raised.value, DamagedStoreError)
    bucket.gateway.fault = None
    check(store, content)


def test_large_object_goes_in_pieces_that_may_fail(bucket: S3, tmp_path: Path):
    content = np.random.default_rng(0).bytes(20_000_001)
    (tmp_path / "large").write_bytes(content)
    met: dict[tuple[str, str | None], int] = {}

    def first(request: Request) -> int | str | None:
        piece = request.query if request.method == "PUT" else request.range
        times = met[request.method, piece] = met.get((request.method, piece), 0) + 1
        return (503 if request.method == "PUT" else "cut") if times == 1 else None

    bucket.gateway.fault = first
    assert Bucket(bucket.url).put("large", tmp_path / "large")
    assert len([r for r in bucket.gateway.requests("PUT") if r.status == 200]) == 3
    assert b"".join(Bucket(bucket.url).stream("large", len(content))) == content
    assert len([r for r in bucket.gateway.requests("GET") if r.status == 206]) == 2 * 3


@pytest.mark.parametrize("status", [403, 501])
def test_store_that_cannot_be_written_says_why(status: int, store: Store, bucket: S3):
    bucket.gateway.fault = lambda request: status if request.method == "PUT" else None
    advice = {403: "that they allow this", 501: "only if there is none of its name"}[status]
    with pytest.raises(StoreError, match=f"Cannot write .*{status} .*{advice}"):
        write(store, utterances(range(80, 81)))


def test_web_server_that_cannot_serve_ranges_is_named(bucket: S3, tmp_path: Path):
    (tmp_path / "file").write_bytes(bytes(100))
    files = serve_folder(tmp_path)

    def whole(method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        return files(method, path, {}, body)

    with (
        Gateway(whole).running() as gateway,
        pytest.raises(StoreError, match="the server cannot serve ranges of a file"),
    ):
        Bucket(gateway.url).get_range("file", 0, 10)


def test_refusal_is_not_asked_for_again(store: Store, bucket: S3):
    bucket.gateway.fault = lambda request: 403
    bucket.gateway.forget()
    with pytest.raises(StoreError, match="AWS_SKIP_SIGNATURE"):
        ObjectPlace(store.url).metadata()
    assert len(bucket.gateway.log) == 1


def test_bucket_that_does_not_exist_is_named(bucket: S3):
    with pytest.raises(StoreError, match="there is no bucket 'absent-bucket'"):
        Store("s3://absent-bucket/test-0123456789abcdef").refresh()
    with pytest.raises(StoreError, match="there is no bucket 'absent-bucket'"):
        Bucket("s3://absent-bucket/x").put("a", b"")


def test_server_that_is_not_there_is_named(bucket: S3, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(StoreError, match=r"the connection was refused, .*AWS_ENDPOINT_URL"):
        Bucket(bucket.url).get("a")


# -- damage ----------------------------------------------------------------------------------------


def test_lost_object_is_damage_on_opening_and_on_reading(
    store: Store, bucket: S3, content: Content
):
    name = frames_of(store)
    bucket.object(name, method="DELETE")
    remote.memory.clear()
    with pytest.raises(DamagedStoreError, match=r"c/0/0 is missing; its part's manifest lists it"):
        store.batch(list(content), "final")
    with pytest.raises(DamagedStoreError, match=r"c/0/0 is missing; its part's manifest lists it"):
        reopened(store)


def test_shortened_object_is_damage_on_opening_and_on_reading(
    store: Store, bucket: S3, content: Content
):
    name = frames_of(store)
    data = bucket.object(name)
    bucket.object(name, data[: len(data) // 2])
    remote.memory.clear()
    with pytest.raises(DamagedStoreError, match=r"has \d+ bytes, at least \d+ were written"):
        store.batch(list(content), "final")
    with pytest.raises(DamagedStoreError, match=r"has \d+ bytes, its manifest says \d+"):
        reopened(store)


@pytest.mark.parametrize("file", ["final/frames/c/0/0", "key/c/0/0", "final/offsets/c/0"])
def test_flipped_byte_is_damage(file: str, store: Store, bucket: S3, content: Content):
    name = f"{store.name}/parts/{store.parts()[1].id}/{file}"
    data = bytearray(bucket.object(name))
    data[len(data) // 3] ^= 4
    bucket.object(name, bytes(data))
    fresh = reopened(store)
    with pytest.raises(DamagedStoreError, match=f"{file} does not match its checksum"):
        fresh.batch(list(content), "final")


def test_flipped_manifest_is_damage(store: Store, bucket: S3):
    name = f"{store.name}/parts/{store.parts()[0].id}/zarr.json"
    bucket.object(name, bucket.object(name).replace(b'"bytes"', b'"bytez"', 1))
    with pytest.raises(DamagedStoreError, match="does not match its own checksum"):
        reopened(store)


@pytest.mark.parametrize("release", ["this", "first"])
def test_exchanged_shards_are_damage(release: str, bucket: S3, tmp_path: Path):
    store = Cache(bucket.url).open(SPEC, create=True)
    keys = [bytes([n]) * 16 for n in range(2)]
    for n, key in enumerate(keys):
        frames = np.full((600, 16), n, np.float32)
        write(store, {key: {"final": frames, "code": np.full((600, 1), n)}})
    if release == "first":
        for part in store.parts():
            name = f"{store.name}/parts/{part.id}/zarr.json"
            bucket.object(name, _first_release(bucket.object(name)))
    for key in keys:
        assert reopened(store).frames(key, "final")[0, 0] == keys.index(key)
    names = [frames_of(store, n) for n in range(2)]
    data = [bucket.object(name) for name in names]
    for name, other in zip(names, reversed(data), strict=True):
        bucket.object(name, other)
    with pytest.raises(DamagedStoreError, match="is not the .* its part's manifest lists"):
        reopened(store).batch(keys, "final")


def _first_release(document: bytes) -> bytes:
    mer = json.loads(document)["attributes"]["mer"]
    for field in ("checksum", "store", "part"):
        del mer[field]
    for output in mer["outputs"].values():
        del output["crc32c"]
    return layout.to_bytes(layout.group_document(mer))


def _seal(folder: Path, **fields: str) -> None:
    file = folder / "zarr.json"
    mer = json.loads(file.read_bytes())["attributes"]["mer"] | fields
    del mer["checksum"]
    file.write_bytes(layout.to_bytes(layout.group_document(mer)))


# -- few and large requests ------------------------------------------------------------------------


def test_ranges_that_are_close_share_a_request_and_long_ones_are_split(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(objects, "GAP_BYTES", 10)
    monkeypatch.setattr(objects, "REQUEST_BYTES", 100)
    spans = [Span("b", 0, 20), Span("a", 50, 60), Span("a", 0, 40), Span("a", 71, 300)]
    into = [np.empty(span.stop - span.start, np.uint8) for span in spans]
    requests = plan_requests(spans, into)
    assert [r[:3] for r in requests] == [
        ("a", 0, 60),
        ("a", 71, 147),
        ("a", 147, 223),
        ("a", 223, 300),
        ("b", 0, 20),
    ]
    assert [len(r[3]) for r in requests] == [2, 1, 1, 1, 1]


def test_batch_takes_one_request_a_stretch(store: Store, bucket: S3, content: Content):
    store = reopened(store)
    store.num_frames(list(content), "final")
    bucket.gateway.forget()
    store.batch(list(content), "final")
    assert len(bucket.gateway.requests("GET", data=True)) == len(store.parts())
    bucket.gateway.forget()
    store.batch(list(content), "final")
    assert not bucket.gateway.requests("GET", data=True)


def test_epoch_reads_every_byte_once(store: Store, bucket: S3, content: Content):
    store = reopened(store)
    bucket.gateway.forget()
    seen = [key for keys, _ in store.epoch(5, "final", seed=1) for key in keys]
    assert sorted(seen) == sorted(content)
    data = bucket.gateway.requests("GET", data=True)
    stored = sum(part.shard("final").num_chunks * CHUNK_BYTES for part in store.readers())
    assert sum(request.bytes for request in data) <= 1.02 * stored
    assert len(data) <= 2 * len(store.parts())


def test_opening_asks_once_per_part_and_small_array(store: Store, bucket: S3, content: Content):
    bucket.gateway.forget()
    store = reopened(store)
    store.contains(list(content))
    parts = len(store.parts())
    names = [request.path.rsplit("/parts/", 1)[-1][33:] for request in bucket.gateway.log]
    assert names.count("zarr.json") == parts
    assert names.count("key/c/0/0") == parts
    assert len(bucket.gateway.log) == 2 * parts + 2  # the root, the listing


def test_listing_of_many_pages_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(0)
    names = sorted(f"parts/{rng.bytes(16).hex()}/f{n % 3}" for n in range(1300))
    for name in names:
        file = tmp_path / "b" / "s" / name
        file.parent.mkdir(parents=True)
        file.touch()
    with Gateway(serve_folder(tmp_path)).running() as gateway:
        for name, value in settings(gateway.url).items():
            monkeypatch.setenv(name, value)
        listed = Bucket("s3://b/s").objects("parts")
    assert [one.name for one in listed] == names


def test_memory_stays_within_its_limit(
    store: Store, bucket: S3, content: Content, monkeypatch: pytest.MonkeyPatch
):
    limit = 16 * CHUNK_BYTES
    monkeypatch.setattr(remote.memory, "limit", limit)
    monkeypatch.setattr(nearby, "_WINDOW_BYTES", limit // 2)
    store = reopened(store)
    keys = list(content)
    data, lengths = store.batch(keys, "final")  # more than memory holds
    assert store.info().bytes > limit
    assert remote.memory.bytes <= limit
    for row, key in enumerate(keys):
        assert np.array_equal(data[row, : lengths[row]], content[key]["final"])


def test_threads_that_want_the_same_fetch_it_once(store: Store, bucket: S3, content: Content):
    store = reopened(store)
    store.num_frames(list(content), "final")
    bucket.gateway.forget()
    failed: list[BaseException] = []

    def read() -> None:
        try:
            check_frames()
        except BaseException as error:
            failed.append(error)

    def check_frames() -> None:
        data, lengths = store.batch(list(content), "final")
        for row, key in enumerate(content):
            assert np.array_equal(data[row, : lengths[row]], content[key]["final"])

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    stored = sum(part.shard("final").num_chunks * CHUNK_BYTES for part in store.readers())
    assert sum(r.bytes for r in bucket.gateway.requests("GET", data=True)) <= stored


# -- care ------------------------------------------------------------------------------------------


def generated_anew(store: Store, part: str, generation: int) -> None:
    """Put a part of the same bytes, and so of the same name, in the place of one."""
    (reader,) = [p for p in store.readers() if p.id == part]
    its = list(_utterances([reader], {part: np.arange(reader.num_utterances)}, store))
    store.place.remove(part)
    (name,) = rewrite(store.place, SPEC, store.fingerprint, its, generation=generation)
    assert name == part


@pytest.mark.parametrize("extractors", [("test",), ()], ids=["drop store", "drop parts"])
def test_part_that_was_committed_anew_since_the_plan_stays(
    store: Store, bucket: S3, content: Content, extractors: tuple[str, ...]
):
    fresh = store.parts()[0].id
    criteria = {"extractors": extractors} if extractors else {"keep": set[bytes]()}
    gc = plan(Cache(bucket.url), compact=False, **criteria)  # type: ignore[arg-type]
    assert gc.utterances == len(content)
    generated_anew(store, fresh, 1)
    report = run(gc)
    assert report.stores_dropped == 0
    assert f"part {fresh} stays" in report.notes[0]
    left = reopened(store)
    assert [part.id for part in left.parts()] == [fresh]
    assert report.utterances == len(content) - len(left)


def test_part_that_was_committed_anew_since_it_was_examined_is_not_taken_out(
    store: Store, bucket: S3, content: Content, monkeypatch: pytest.MonkeyPatch
):
    name = frames_of(store)
    part = store.parts()[0].id
    sound = bucket.object(name)
    damaged = bytearray(sound)
    damaged[100] ^= 1
    bucket.object(name, bytes(damaged))
    real = _Verifier._repair

    def overtaken(self, examined, facts):
        if examined.part == part:
            bucket.object(name, sound)
        return real(self, examined, facts)

    monkeypatch.setattr(_Verifier, "_repair", overtaken)
    report = verify([Store(store.url)], repair=True)
    assert len(report.corrupt) == 1
    assert report.quarantined == report.repaired == ()
    check(reopened(store), content)


# -- local copy ------------------------------------------------------------------------------------


@pytest.fixture
def copy(bucket: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalCopy:
    monkeypatch.setenv("MER_LOCAL_COPY", str(tmp_path / "copy"))
    made = local_copy()
    assert made is not None
    return made


def test_what_was_read_is_not_fetched_again_by_another_process(
    copy: LocalCopy, store: Store, bucket: S3, content: Content
):
    check(store, content)
    bucket.gateway.forget()
    check(reopened(store), content)
    assert [request.method for request in bucket.gateway.requests("GET")] == ["GET"] * 2
    assert not bucket.gateway.requests("GET", data=True)
    program = f"""
from mer.cache import nearby
from mer.cache.store import Store
nearby.BLOCK_BYTES = {nearby.BLOCK_BYTES}
store = Store({store.url!r})
print(sum(float(batch.data.sum()) for _, batch in store.epoch(4, "final")))
"""
    bucket.gateway.forget()
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 0, ran.stderr
    expected = sum(float(arrays["final"].sum()) for arrays in content.values())
    assert float(ran.stdout) == pytest.approx(expected, rel=1e-4)
    assert not bucket.gateway.requests("GET", data=True)


def test_local_copy_stays_within_its_limit_and_keeps_what_was_used_last(
    copy: LocalCopy, store: Store, bucket: S3, content: Content, monkeypatch: pytest.MonkeyPatch
):
    block = 4 * CHUNK_BYTES
    small = LocalCopy(copy.folder / "small", 6 * block)
    for module in (remote, nearby):
        monkeypatch.setattr(module, "local_copy", lambda: small)
    check(reopened(store), content)
    check(reopened(store), content)
    assert 0 < small.size() <= small.limit


def test_least_recently_used_file_goes_first(tmp_path: Path):
    copy = LocalCopy(tmp_path, 1000)
    for number in range(9):
        copy.put(f"a/{number}", bytes([number]) * 100)
        os.utime(tmp_path / f"a/{number}", (number, number))
    assert LocalCopy(tmp_path, 1000).get("a/0", 100).data[0] == 0  # used now
    copy = LocalCopy(tmp_path, 1000)
    copy.put("a/new", b"n" * 300)
    left = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert left[0] == "0"
    assert "1" not in left
    assert left[-1] == "new"
    assert copy.size() <= 1000


def test_file_that_was_verified_vouches_for_no_other_of_its_inode(tmp_path: Path):
    copy = LocalCopy(tmp_path, 1000)
    copy.put("a/0", b"sound")
    first = copy.get("a/0", 5)
    assert first is not None
    first.verified[0] = 1
    copy._open.clear()  # as when many others were opened
    again = copy.get("a/0", 5)
    assert again is not None
    assert again.verified[0] == 1
    copy._open.clear()
    state = os.stat(tmp_path / "a/0")
    (tmp_path / "a/0").write_bytes(b"wrong")  # the inode stays, as by chance when one is used again
    os.utime(tmp_path / "a/0", ns=(state.st_atime_ns, state.st_mtime_ns))
    assert os.stat(tmp_path / "a/0").st_ino == state.st_ino
    other = copy.get("a/0", 5)
    assert other is not None
    assert other.verified[0] == 0


def test_using_a_file_after_a_while_does_not_verify_it_again(tmp_path: Path):
    copy = LocalCopy(tmp_path, 1000)
    copy.put("a/0", b"sound")
    os.utime(tmp_path / "a/0", (1000, 1000))
    first = copy.get("a/0", 5)
    assert first is not None
    first.verified[0] = 1
    copy._open.clear()
    again = copy.get("a/0", 5)
    assert again is not None
    assert again.verified[0] == 1


@pytest.mark.parametrize("how", ["flip", "shorten", "remove"])
def test_damaged_local_copy_is_fetched_again(
    how: str, copy: LocalCopy, store: Store, bucket: S3, content: Content
):
    check(store, content)
    localcopy._copies.clear()  # as another process, which has nothing mapped
    files = [f for f in copy.folder.rglob("*") if f.is_file() and "index" not in f.parts]
    assert files
    for file in files:
        if how == "remove":
            file.unlink()
            continue
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.unlink()
        file.write_bytes(data[: len(data) // 2] if how == "shorten" else data)
    bucket.gateway.forget()
    check(reopened(store), content)
    assert bucket.gateway.requests("GET", data=True)
    bucket.gateway.forget()
    localcopy._copies.clear()
    check(reopened(store), content)
    assert not bucket.gateway.requests("GET", data=True)


def test_changed_part_is_not_served_from_the_local_copy(
    copy: LocalCopy, store: Store, bucket: S3, content: Content
):
    check(store, content)
    part = store.parts()[0].id
    name = f"{store.name}/parts/{part}/zarr.json"
    mer = json.loads(bucket.object(name))["attributes"]["mer"]
    del mer["checksum"]
    mer["note"] = "written anew"
    bucket.object(name, layout.to_bytes(layout.group_document(mer)))
    bucket.gateway.forget()
    check(reopened(store), content)
    data = bucket.gateway.requests("GET", data=True)
    assert data
    assert all(f"/parts/{part}/" in request.path for request in data)


def test_full_disk_costs_the_local_copy_and_one_warning(
    copy: LocalCopy,
    store: Store,
    content: Content,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(localcopy.os, "replace", full)
    localcopy._copies.clear()
    with caplog.at_level(logging.WARNING):
        check(reopened(store), content)
    said = [record.message for record in caplog.records if "local copy" in record.message]
    assert len(said) == 1
    assert "No space left on device" in said[0]
    assert not list(copy.folder.rglob("*.tmp"))


def test_limit_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MER_LOCAL_COPY", raising=False)
    monkeypatch.setenv("MER_LOCAL_COPY_GB", "much")
    with pytest.raises(UsageError, match="MER_LOCAL_COPY_GB is 'much'"):
        local_copy()


# -- settings and other servers --------------------------------------------------------------------


def test_without_credentials_requests_are_not_signed(
    store: Store, bucket: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    with pytest.raises(StoreError, match="403 Forbidden"):  # moto keeps it private
        ObjectPlace(store.url).metadata()
    assert not bucket.gateway.log[-1].signed
    (tmp_path / "credentials").write_text(
        "[lab]\naws_access_key_id = a\naws_secret_access_key = b\n", "utf-8"
    )
    monkeypatch.setenv("AWS_PROFILE", "lab")
    ObjectPlace(store.url).metadata()
    assert bucket.gateway.log[-1].signed


@pytest.mark.parametrize("url", ["s3:///x", "s3://user:secret@bucket/x", "ftp://host/x"])
def test_url_that_names_no_objects_is_refused(url: str):
    with pytest.raises(UsageError, match="names no objects|come from the environment"):
        Bucket(url)


def test_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "obstore", None)
    monkeypatch.setattr(clients, "_api", None)
    monkeypatch.setattr(clients, "_clients", {})
    with pytest.raises(MissingDependencyError, match=r"pip install 'mer\[remote\]'"):
        Bucket("s3://bucket/x").get("a")


def test_web_server_is_read_by_the_list_of_parts(bucket: S3, content: Content, tmp_path: Path):
    local = Cache(tmp_path / "site").open(SPEC, create=True)
    write(local, content)
    with Gateway(serve_folder(tmp_path)).running() as gateway:
        url = f"{gateway.url}/site/{local.name}"
        with pytest.raises(UsageError, match=r"\.parts\.json is missing\. A web server lists"):
            open_store(url)
        listing = parts_list([part.id for part in local.parts()])
        local.path.with_name(local.name + remote.PARTS_SUFFIX).write_bytes(listing)
        store = open_store(url)
        check(store, content)
        assert store.info().utterances == len(content)
        with pytest.raises(UsageError, match="does not list its stores"):
            Cache(f"{gateway.url}/site").stores()
        with (
            pytest.raises(UsageError, match="is a web server and can only be read"),
            store.writer(),
        ):
            pass
        lost = parts_list([*(part.id for part in local.parts()), "0" * 32])
        local.path.with_name(local.name + remote.PARTS_SUFFIX).write_bytes(lost)
        with pytest.raises(DamagedStoreError, match=f"lists part {'0' * 32}, which is not there"):
            open_store(url)
        local.path.with_name(local.name + remote.PARTS_SUFFIX).write_bytes(b"<html>")
        with pytest.raises(DamagedStoreError, match="is not a list of parts"):
            open_store(url)


def test_list_of_parts_follows_the_store(store: Store, content: Content, bucket: S3):
    place = store.place
    assert isinstance(place, ObjectPlace)
    where = place.write_parts_list()
    assert where == f"{store.url}.parts.json"
    write(store, utterances(range(90, 92)))
    fresh = reopened(store)
    listed = json.loads(bucket.object(f"{store.name}.parts.json"))
    assert listed == {"format": 1, "parts": sorted(part.id for part in fresh.parts())}
    fresh.place.remove(fresh.parts()[0].id)
    listed = json.loads(bucket.object(f"{store.name}.parts.json"))
    assert len(listed["parts"]) == len(fresh.parts()) - 1


def test_google_is_read_too(
    bucket: S3, content: Content, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    local = Cache(tmp_path / "site").open(SPEC, create=True)
    write(local, content)
    with Gateway(serve_folder(tmp_path)).running() as gateway:
        monkeypatch.setenv("GOOGLE_BASE_URL", gateway.url)
        monkeypatch.setenv("GOOGLE_SKIP_SIGNATURE", "true")
        assert [store.name for store in Cache("gs://site").stores()] == [local.name]
        check(open_store(f"gs://site/{local.name}"), content)
