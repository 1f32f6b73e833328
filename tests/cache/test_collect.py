"""What gc removes is what was said, nothing else is lost, whoever dies or works beside it."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from s3_server import s3
from s3_server import settings as settings_of

from mer.cache import collect, layout, reader, staging
from mer.cache.collect import GcPlan, GcReport, plan, run
from mer.cache.errors import DamagedStoreError, StorageFullError, StoreError
from mer.cache.home import Cache
from mer.cache.index import KeyIndex
from mer.cache.place import LocalPlace
from mer.cache.raw import LocalRaw
from mer.cache.rewrite import Stored, rewrite
from mer.cache.spec import FeatureSpec, OutputSpec
from mer.cache.store import Store
from mer.cache.usage import left_behind, usage
from mer.cache.verify import verify
from mer.cache.writer import PartWriter

SPEC = FeatureSpec(
    slug="test-final",
    identity={"extractor": "test"},
    outputs=(
        OutputSpec(name="final", dim=3, rate_hz=50.0),
        OutputSpec(name="code", dim=1, rate_hz=None, dtype="uint8", kind="codes"),
    ),
)
OTHER = FeatureSpec(slug="other", identity={"extractor": "other"}, outputs=SPEC.outputs)

Content = dict[bytes, tuple[bytes, ...]]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait for the disk, where nobody cuts the power, and look at files every time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(reader._pool, "limit", 0)


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def arrays(number: int, peak: float = 1.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(number)
    length = 7 * number % 40
    return {
        "final": rng.standard_normal((length, 3), dtype=np.float32) * np.float32(peak),
        "code": rng.integers(0, 256, (length, 1), dtype=np.uint8),
    }


def opened(root: Path, spec: FeatureSpec = SPEC) -> Store:
    store = Cache(root).open(spec, create=True)
    assert store is not None
    return store


def add(store: Store, numbers: Iterable[int], peak: float = 1.0) -> str:
    """Add one part, whatever the store holds, and return its name; nothing if it is there."""
    place = LocalPlace(store.path)
    published: list[str] = []
    real = place.publish

    def publish(folder: Path, part: str) -> bool:
        new = real(folder, part)
        if new:
            published.append(part)
        return new

    place.publish = publish  # type: ignore[method-assign]
    # As a writer that does not see the others' parts.
    with PartWriter(place, SPEC, store.fingerprint, lambda key: False, lambda: None) as writer:
        for number in numbers:
            writer.add(key(number), 320 * number, arrays(number, peak))
    return published[0] if published else ""


def age(store: Store, part: str, modified: float) -> None:
    os.utime(store.path / "parts" / part / "zarr.json", (modified, modified))


def content(root: Path, spec: FeatureSpec = SPEC) -> Content:
    store = opened(root, spec)
    return {
        its: (
            str(store.input_length([its])).encode(),
            store.frames(its, "final").tobytes(),
            store.frames(its, "code").tobytes(),
            store.pooled("final", [its]).tobytes(),
        )
        for its in store.keys()  # noqa: SIM118 - not a mapping
    }


def size(store: Store) -> int:
    return sum(f.stat().st_size for f in store.path.rglob("*") if f.is_file())


def collected(root: Path, **criteria: object) -> tuple[GcPlan, GcReport]:
    """Plan, check that planning changes nothing, and do it."""
    before = {f: f.stat().st_mtime_ns for f in root.rglob("*")}
    gc = plan(Cache(root), **criteria)  # type: ignore[arg-type]
    assert {f: f.stat().st_mtime_ns for f in root.rglob("*")} == before
    report = run(gc)
    assert verify(Cache(root).stores()).corrupt == ()
    return gc, report


def actions(gc: GcPlan) -> list[str]:
    return [step.action for step in gc.steps]


def test_small_parts_become_one_and_nothing_changes(tmp_path):
    store = opened(tmp_path)
    for first in range(0, 12, 3):
        add(store, range(first, first + 3))
    before, was = content(tmp_path), size(store)
    gc, report = collected(tmp_path)
    assert actions(gc) == ["merge parts"]
    assert (report.parts_merged, report.parts_written, report.utterances) == (4, 1, 0)
    assert content(tmp_path) == before
    assert len(store.place.part_names()) == 1
    assert report.bytes_freed == was - size(store) > 0
    assert plan(Cache(tmp_path)).steps == ()


def test_without_compaction_small_parts_stay(tmp_path):
    store = opened(tmp_path)
    add(store, range(3))
    add(store, range(3, 6))
    assert plan(Cache(tmp_path), compact=False).steps == ()


def test_parts_of_other_types_are_not_mixed(tmp_path):
    store = opened(tmp_path)
    add(store, [1, 2])
    add(store, [3, 4], peak=1e6)
    add(store, [5, 6])
    before = content(tmp_path)
    gc, _ = collected(tmp_path)
    assert [len(step.parts) for step in gc.steps] == [2]
    assert content(tmp_path) == before
    assert {part.dtype("final").name for part in opened(tmp_path).readers()} == {
        "float16",
        "float32",
    }


def test_merged_parts_stay_within_their_size(tmp_path, monkeypatch):
    store = opened(tmp_path)
    for first in range(0, 20, 2):
        add(store, range(first, first + 2))
    largest = max(part.bytes for part in opened(tmp_path).parts())
    monkeypatch.setattr(collect, "SMALL_BYTES", 2 * largest)
    monkeypatch.setattr(collect, "PART_BYTES", 4 * largest)
    before = content(tmp_path)
    collected(tmp_path)
    assert content(tmp_path) == before
    assert 1 < len(store.place.part_names()) < 10


def test_an_utterance_that_is_stored_twice_is_stored_once(tmp_path):
    store = opened(tmp_path)
    add(store, [1, 2, 3])
    add(store, [3, 4])
    add(store, [1, 2])
    before = content(tmp_path)
    gc, report = collected(tmp_path, compact=False)
    assert set(actions(gc)) <= {"drop part", "rewrite parts"}
    assert gc.utterances == report.utterances == 0
    assert content(tmp_path) == before
    fresh = opened(tmp_path)
    assert sum(part.utterances for part in fresh.parts()) == len(fresh) == 4
    assert plan(Cache(tmp_path), compact=False).steps == ()


def test_of_two_copies_the_one_that_readers_use_stays(tmp_path):
    store = opened(tmp_path)
    add(store, [1, 2])
    add(store, [2, 3], peak=2.0)
    add(store, [1, 3], peak=3.0)
    before = content(tmp_path)
    collected(tmp_path)
    assert content(tmp_path) == before


def test_readers_see_the_same_one_of_two_copies_all_the_while(tmp_path, monkeypatch):
    store = opened(tmp_path)
    for peak in range(1, 9):
        add(store, [peak, 50], peak=float(peak))
    for number, part in enumerate(store.place.part_names()):
        age(store, part, 1000.0 + number)
    before, real, removed = content(tmp_path), LocalPlace.remove, []

    def remove(self, part):
        real(self, part)
        removed.append(part)
        assert content(tmp_path) == before

    monkeypatch.setattr(LocalPlace, "remove", remove)
    collected(tmp_path)
    assert len(removed) == 8


def test_a_copy_stays_if_the_better_one_is_damaged(tmp_path):
    store = opened(tmp_path)
    names = sorted([add(store, [5, 6]), add(store, [5, 6, 7])])
    before = content(tmp_path)
    shard = store.path / "parts" / names[0] / "final/frames/c/0/0"
    data = bytearray(shard.read_bytes())
    data[7] ^= 1
    shard.write_bytes(data)
    report = run(plan(Cache(tmp_path), compact=False))
    assert sorted(store.place.part_names()) == names
    assert "the other copy of" in report.notes[0]
    verify(Cache(tmp_path).stores(), repair=True)
    assert {k: v for k, v in before.items() if k != key(7)}.keys() <= content(tmp_path).keys()


def test_parts_older_than_an_age_are_dropped(tmp_path):
    store = opened(tmp_path)
    old, young = add(store, [1, 2]), add(store, [3])
    age(store, old, 1000.0)
    age(store, young, 5000.0)
    gc, report = collected(tmp_path, older_than_s=2000.0, now=6000.0)
    (step,) = gc.steps
    assert (step.action, step.parts, step.utterances) == ("drop part", (old,), 2)
    assert step.reason == "2 utterances committed more than 2,000 s ago"
    assert report.utterances == 2
    assert content(tmp_path).keys() == {key(3)}


def test_merging_does_not_make_parts_younger(tmp_path):
    store = opened(tmp_path)
    for number in (1, 2):
        age(store, add(store, [number]), 1000.0 * number)
    collected(tmp_path)
    (part,) = store.place.part_names()
    assert (store.path / "parts" / part / "zarr.json").stat().st_mtime == 2000.0


def test_the_oldest_go_until_the_rest_fits(tmp_path):
    store, other = opened(tmp_path), opened(tmp_path, OTHER)
    names = {}
    for number, its in enumerate([store, other, store, other], 1):
        names[number] = add(its, [10 * number, 10 * number + 1])
        age(its, names[number], 1000.0 * number)
    sizes = {part.id: part.bytes for s in (store, other) for part in Store(s.path).parts()}
    limit = sizes[names[3]] + sizes[names[4]]
    gc, report = collected(tmp_path, max_bytes=limit, compact=False)
    assert sorted(part for step in gc.steps for part in step.parts) == sorted([names[1], names[2]])
    assert gc.bytes_freed == report.bytes_freed == sizes[names[1]] + sizes[names[2]]
    assert content(tmp_path).keys() == {key(30), key(31)}
    assert plan(Cache(tmp_path), max_bytes=limit, compact=False).steps == ()
    one = [Store(store.path)]
    chosen = plan(Cache(tmp_path), max_bytes=0, stores=one)
    assert {step.store for step in chosen.steps} == {store.name}


@pytest.mark.parametrize("name", ["test", "test-final", "te*", "test-final-????????????????"])
def test_a_store_is_dropped_by_its_extractor_slug_or_name(tmp_path, name):
    store = opened(tmp_path)
    add(store, [1, 2])
    add(opened(tmp_path, OTHER), [1])
    gc, report = collected(tmp_path, extractors=[name])
    (step,) = gc.steps
    assert (step.action, step.store, step.utterances) == ("drop store", store.name, 2)
    assert (report.stores_dropped, report.utterances) == (1, 2)
    assert [s.name for s in Cache(tmp_path).stores()] == [opened(tmp_path, OTHER).name]
    assert sorted(p.name for p in tmp_path.iterdir()) == [opened(tmp_path, OTHER).name]


def test_a_part_that_was_added_after_planning_saves_its_store(tmp_path):
    store = opened(tmp_path)
    add(store, [1, 2])
    gc = plan(Cache(tmp_path), extractors=["test"])
    add(store, [3])
    report = run(gc)
    assert report.stores_dropped == 0
    assert "a part was added meanwhile" in report.notes[0]
    assert content(tmp_path).keys() == {key(3)}


def test_a_part_that_slips_into_a_store_that_is_removed_comes_back(tmp_path, monkeypatch):
    store = opened(tmp_path)
    add(store, [1])
    spare = opened(tmp_path / "spare")
    late = add(spare, [2])
    gc = plan(Cache(tmp_path), extractors=["test"])
    real = os.rename

    def rename(source, target):
        if str(source) == str(store.path):
            shutil.copytree(spare.path / "parts" / late, store.path / "parts" / late)
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        assert run(gc).stores_dropped == 0
    assert content(tmp_path).keys() == {key(2)}


def test_what_no_manifest_uses_is_dropped(tmp_path):
    store = opened(tmp_path)
    add(store, [1, 2, 3])
    add(store, [4, 5])
    before = content(tmp_path)
    used = {key(1), key(3), key(99)}
    gc, report = collected(tmp_path, keep=used, compact=False)
    assert sorted(actions(gc)) == ["drop part", "rewrite parts"]
    assert report.utterances == 3
    assert content(tmp_path) == {its: before[its] for its in (key(1), key(3))}
    assert plan(Cache(tmp_path), keep={store.name: used}).steps == ()
    gc = plan(Cache(tmp_path), keep={"another": used})
    assert gc.utterances == 2


def test_criteria_have_to_hold_together(tmp_path):
    store = opened(tmp_path)
    old, young = add(store, [1, 2]), add(store, [3, 4])
    age(store, old, 1000.0)
    age(store, young, 5000.0)
    add(opened(tmp_path, OTHER), [1, 2])
    gc = plan(
        Cache(tmp_path),
        older_than_s=2000.0,
        now=6000.0,
        keep={key(2)},
        extractors=["test"],
        compact=False,
    )
    assert [(s.store, s.action, s.parts, s.utterances) for s in gc.steps] == [
        (store.name, "rewrite parts", (old,), 1)
    ]


def test_leftovers_are_swept_and_the_quarantine_only_on_request(tmp_path):
    store = opened(tmp_path)
    add(store, [1])
    left = staging.temporary_folder(store.path) / "left"
    (left / "content").mkdir(parents=True)
    (left / "content/big").write_bytes(bytes(1000))
    os.utime(left, (0, 0))
    taken = tmp_path / (store.name + layout.QUARANTINE_SUFFIX) / "part-1"
    taken.mkdir(parents=True)
    (taken / "file").write_bytes(bytes(500))
    gc, report = collected(tmp_path)
    assert actions(gc) == ["sweep"]
    assert report.bytes_freed == 1000
    assert not left.exists()
    assert taken.exists()
    gc, report = collected(tmp_path, quarantine=True)
    assert (actions(gc), report.bytes_freed) == (["drop quarantine"], 500)
    assert not taken.parent.exists()


def test_a_damaged_store_is_left_alone(tmp_path):
    store = opened(tmp_path)
    name = add(store, [1])
    (store.path / "parts" / name / "zarr.json").write_text("{")
    add(opened(tmp_path, OTHER), [1])
    gc = plan(Cache(tmp_path), older_than_s=-1e6)
    assert {step.store for step in gc.steps} == {opened(tmp_path, OTHER).name}
    assert f"{store.name} is left as it is" in gc.notes[0]


def test_a_damaged_store_can_be_dropped_as_a_whole(tmp_path):
    store = opened(tmp_path)
    name = add(store, [1])
    add(store, [2])
    (store.path / "parts" / name / "zarr.json").write_text("{")
    report = run(plan(Cache(tmp_path), extractors=["test"]))
    assert report.stores_dropped == 1
    assert report.bytes_freed > 1000
    assert list(tmp_path.iterdir()) == []


def test_a_merge_whose_result_is_there_already_goes_on_with_the_next(tmp_path):
    """Its name follows from its content; its rank, below that of a source, does not."""
    store = opened(tmp_path)
    first = add(store, [1, 2])
    age(store, first, 1000.0)
    alone = Store(store.path).readers()[0]
    copies = [
        Stored(
            bytes(alone.keys()[row]),
            int(alone.input_length()[row]),
            {
                o.name: alone.frames(o.name, *alone.offsets(o.name)[row : row + 2])
                for o in SPEC.outputs
            },
            {"final": alone.pooled("final")[row]},
        )
        for row in range(2)
    ]
    (store.path / "parts" / first).rename(tmp_path / "spare")
    (low,) = rewrite(store.place, SPEC, store.fingerprint, copies, generation=1)
    (high,) = rewrite(store.place, SPEC, store.fingerprint, copies[:1], generation=7)
    age(store, high, 1000.0)
    age(store, low, 2000.0)
    before = content(tmp_path)
    assert actions(plan(Cache(tmp_path))) == ["merge parts"]
    for _ in range(2):
        collected(tmp_path)
        assert content(tmp_path) == before
    assert store.place.part_names() == [low]
    assert plan(Cache(tmp_path)).steps == ()


def test_many_at_once_lose_nothing(tmp_path):
    """Two processes that tidy, one that writes, one that reads."""
    store = opened(tmp_path)
    for first in range(6):
        add(store, [first, first + 1, 10 + first])
    before = content(tmp_path)
    errors: list[BaseException] = []
    wrote: set[int] = set()
    done = threading.Event()

    def guarded(work: Callable[[], None]) -> Callable[[], None]:
        def guarded_work() -> None:
            try:
                while not done.is_set():
                    work()
            except BaseException as error:
                errors.append(error)
                done.set()

        return guarded_work

    def tidy() -> None:
        run(plan(Cache(tmp_path)))

    def write() -> None:
        number = 100 + len(wrote)
        add(store, [number, number % 7])
        wrote.add(number)
        if len(wrote) == 25:
            done.set()

    def read() -> None:
        its = opened(tmp_path)
        for number in range(7):
            assert its.frames(key(number), "final").tobytes() == before[key(number)][1]

    threads = [threading.Thread(target=guarded(work)) for work in (tidy, tidy, write, read)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    while [step for step in plan(Cache(tmp_path)).steps if step.action != "sweep"]:
        collected(tmp_path)
    after = content(tmp_path)
    assert after.keys() == before.keys() | {key(number) for number in wrote}
    assert before.items() <= after.items()
    assert len(store.place.part_names()) == 1


def test_a_plan_that_was_overtaken_does_no_harm(tmp_path):
    store = opened(tmp_path)
    for first in range(0, 8, 2):
        add(store, range(first, first + 3))
    before = content(tmp_path)
    plans = [plan(Cache(tmp_path)) for _ in range(2)]
    run(plans[0])
    report = run(plans[1])
    assert report.bytes_freed == report.parts_merged == 0
    assert content(tmp_path) == before


def replaced(store: Store, part: str) -> None:
    """Put an equal part in the place of one, as dropping and extracting it again does."""
    folder = store.path / "parts" / part
    spare = shutil.copytree(folder, store.path.parent / "spare")
    shutil.rmtree(folder)
    shutil.move(spare, folder)


@pytest.mark.parametrize("criteria", [{"older_than_s": 0.0}, {"extractors": ["test"]}])
def test_a_part_that_was_committed_anew_since_the_plan_is_not_dropped(tmp_path, criteria):
    store = opened(tmp_path)
    fresh, old = add(store, [1, 2]), add(store, [3])
    for part in (fresh, old):
        age(store, part, 1000.0)
    gc = plan(Cache(tmp_path), **criteria)
    assert gc.utterances == 3
    replaced(store, fresh)
    was = size(store)
    report = run(gc)
    assert (report.utterances, report.stores_dropped) == (1, 0)
    assert f"part {fresh} stays, it was committed anew" in report.notes[0]
    assert content(tmp_path).keys() == {key(1), key(2)}
    assert report.bytes_freed == was - size(store)


@pytest.mark.parametrize("late", [False, True], ids=["before reading it", "after reading it"])
@pytest.mark.parametrize("used", [None, {key(1), key(3), key(5)}], ids=["merge", "rewrite"])
def test_a_part_that_was_committed_anew_since_the_plan_is_not_merged_away(
    tmp_path, monkeypatch, used, late
):
    store = opened(tmp_path)
    names = [add(store, [number, number + 1]) for number in (1, 3, 5)]
    before = content(tmp_path)
    gc = plan(Cache(tmp_path), keep=used, compact=used is None)
    real = collect.rewrite

    def rewrite_and_replace(*args, **kwargs):
        new = real(*args, **kwargs)
        if (store.path / "parts" / names[0]).exists():
            replaced(store, names[0])
        return new

    if late:
        monkeypatch.setattr(collect, "rewrite", rewrite_and_replace)
    else:
        replaced(store, names[0])
    report = run(gc)
    assert names[0] in store.place.part_names()
    assert any(f"part {names[0]} stays" in note for note in report.notes)
    kept = before.keys() if used is None else used | {key(2)}
    assert content(tmp_path) == {its: before[its] for its in kept}
    assert verify(Cache(tmp_path).stores()).corrupt == ()


def test_parts_that_are_replaced_while_planning_are_looked_at_again(tmp_path, monkeypatch):
    store = opened(tmp_path)
    names = [add(store, [1]), add(store, [2])]
    real, calls = LocalRaw.modified, []

    def modified(self, parts):
        if not calls:
            replaced(store, names[0])
        calls.append(parts)
        return real(self, parts)

    monkeypatch.setattr(LocalRaw, "modified", modified)
    gc = plan(Cache(tmp_path))
    assert len(calls) == 2
    assert run(gc).parts_merged == 2


def test_a_snapshot_that_was_never_finished_is_swept_after_an_hour(tmp_path):
    store = opened(tmp_path)
    add(store, [1])
    old, young, other = (
        tmp_path / f"{store.name}.index.{end}" for end in ("0" * 32, "1" * 32, "mine")
    )
    for file in (old, young, other):
        file.write_bytes(bytes(70))
    for file in (old, other):
        os.utime(file, (1000, 1000))
    gc, report = collected(tmp_path)
    assert actions(gc) == ["sweep"]
    assert report.bytes_freed == 70
    assert (old.exists(), young.exists(), other.exists()) == (False, True, True)
    run(plan(Cache(tmp_path), extractors=["test"]))
    assert sorted(tmp_path.iterdir()) == [other]


def test_what_is_left_of_a_store_that_is_gone_is_swept(tmp_path):
    """Killed after the store was renamed away, or before what lies beside it was removed."""
    store, other = opened(tmp_path), opened(tmp_path, OTHER)
    add(store, [1])
    add(other, [1])
    grave = staging.temporary_folder(store.path) / "left"
    grave.mkdir(parents=True)
    was = size(store)
    store.path.rename(grave / "content")
    os.utime(grave, (0, 0))
    beside = [tmp_path / f"{store.name}{end}" for end in (".index", ".parts.json")]
    for file in beside:
        file.write_bytes(bytes(10))
        os.utime(file, (1000, 1000))
    (tmp_path / f"{other.name}.index").write_bytes(bytes(10))
    os.utime(tmp_path / f"{other.name}.index", (1000, 1000))
    taken = tmp_path / f"{store.name}.quarantine"
    taken.mkdir()
    (taken / "file").write_bytes(b"x")
    gc, report = collected(tmp_path)
    assert [(step.store, step.action) for step in gc.steps] == [(store.name, "sweep")]
    assert report.bytes_freed == was + 20
    assert {p.name for p in tmp_path.iterdir()} == {other.name, f"{other.name}.index", taken.name}
    collected(tmp_path, quarantine=True)
    assert not taken.exists()


def test_what_is_left_beside_a_damaged_store_is_swept(tmp_path):
    store = opened(tmp_path)
    (store.path / "zarr.json").write_text("{")
    left = staging.temporary_folder(store.path) / "left"
    left.mkdir(parents=True)
    os.utime(left, (0, 0))
    gc = plan(Cache(tmp_path))
    assert actions(gc) == ["sweep"]
    run(gc)
    assert not left.exists()


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    store = opened(tmp_path)
    add(store, [1, 2])
    add(store, [3])
    before = content(tmp_path)
    gc = plan(Cache(tmp_path))

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(StorageFullError, match="No space left"):
            run(gc)
    assert content(tmp_path) == before
    run(gc)
    assert content(tmp_path) == before
    assert len(store.place.part_names()) == 1


class Killed(BaseException):
    """Stands for SIGKILL: nothing handles it."""


CALLS = {"rename": 1, "unlink": 7, "rmdir": 5, "mkdir": 4, "write": 9, "scandir": 5}


@pytest.mark.parametrize("call", CALLS)
def test_a_gc_that_is_killed_anywhere_loses_nothing_and_is_finished_by_the_next(
    tmp_path, call, monkeypatch
):
    pristine = opened(tmp_path / "pristine")
    add(pristine, [1, 2, 3])
    add(pristine, [3, 4])
    add(pristine, [1, 2])
    age(pristine, add(pristine, [5, 6]), 1000.0)
    before = content(tmp_path / "pristine")
    expected = {its: before[its] for its in before if its not in (key(5), key(6))}
    criteria = {"older_than_s": 2000.0}
    real = getattr(os, call)
    for allowed in range(0, 1000, CALLS[call]):
        root = tmp_path / "cache"
        shutil.copytree(tmp_path / "pristine", root)
        calls = 0

        def killed(*args, _allowed=allowed, **kwargs):
            nonlocal calls
            calls += 1
            if calls > _allowed:
                raise Killed
            return real(*args, **kwargs)

        gc = plan(Cache(root), **criteria)
        finished = True
        with monkeypatch.context() as patch:
            patch.setattr(os, call, killed)
            try:
                run(gc)
            except Killed:
                finished = False
        after = content(root)
        assert expected.items() <= after.items()
        assert after.items() <= before.items()
        run(plan(Cache(root), **criteria))
        assert content(root) == expected
        again = plan(Cache(root), **criteria)
        assert [step for step in again.steps if step.action != "sweep"] == []
        assert verify(Cache(root).stores()).corrupt == ()
        shutil.rmtree(root)
        if finished:
            break
    assert finished
    assert allowed > 0


numbers = st.lists(st.integers(0, 12), min_size=1, max_size=5, unique=True)


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    parts=st.lists(st.tuples(numbers, st.sampled_from([1.0, 1.0, 1e6])), min_size=1, max_size=6),
    used=st.none() | st.sets(st.integers(0, 12)),
    older=st.none() | st.integers(0, 6),
    compact=st.booleans(),
)
def test_what_is_not_dropped_is_kept_bit_for_bit(tmp_path_factory, parts, used, older, compact):
    root = tmp_path_factory.mktemp("gc")
    store = opened(root)
    dropped: dict[int, bool] = {}
    for number, (its, peak) in enumerate(parts):
        name = add(store, its, peak)
        if name:
            age(store, name, float(number))
        for utterance in its if name else ():
            is_old = older is None or number < 6 - older
            is_used = used is not None and utterance in used
            may = (older is not None or used is not None) and is_old and not is_used
            dropped[utterance] = dropped.get(utterance, True) and may
    before, was = content(root), size(store)
    criteria = {
        "keep": None if used is None else {key(n) for n in used},
        "older_than_s": None if older is None else float(older),
        "now": 6.0,
        "compact": compact,
    }
    gc, report = collected(root, **criteria)
    after = content(root)
    assert after.keys() == {key(n) for n, gone in dropped.items() if not gone}
    twice = sum(p.utterances for p in opened(root).parts()) - len(after)
    assert twice == 0
    assert report.utterances == gc.utterances == len(before) - len(after)
    if not any(gone for gone in dropped.values()):
        assert after == before
    assert size(store) <= was
    assert plan(Cache(root), **criteria).steps == ()
    shutil.rmtree(root)


def unanswered(monkeypatch: pytest.MonkeyPatch, name: str, times: int) -> None:
    """Let a server refuse to hand out the metadata of a store."""
    real = LocalPlace.metadata
    left = [times]

    def metadata(self):
        if self.name == name and left[0]:
            left[0] -= 1
            raise StoreError("503 Slow Down")
        return real(self)

    monkeypatch.setattr(LocalPlace, "metadata", metadata)


@pytest.mark.parametrize("times", [1, 2, 99])
def test_a_store_that_does_not_answer_is_not_dropped_for_that(tmp_path, monkeypatch, times):
    other = opened(tmp_path, OTHER)
    add(other, [1])
    add(opened(tmp_path), [1])
    unanswered(monkeypatch, other.name, times)
    gc = plan(Cache(tmp_path), extractors=["test"])
    assert [(step.action, step.store[:4]) for step in gc.steps] == [("drop store", "test")]
    assert f"{other.name} can be matched by its name alone: 503 Slow Down" in gc.notes


def test_a_chosen_store_that_does_not_answer_is_left_as_it_is(tmp_path, monkeypatch):
    store = opened(tmp_path)
    add(store, [1])
    unanswered(monkeypatch, store.name, 99)
    gc = plan(Cache(tmp_path), extractors=["test*"])
    assert gc.steps == ()
    assert gc.notes[-1] == f"{store.name} is left as it is: 503 Slow Down"


@pytest.mark.parametrize("pattern", ["test-final", "test-final-*"])
@pytest.mark.parametrize("harm", [os.unlink, lambda file: file.write_text("{")], ids=["", "cut"])
def test_a_store_without_metadata_is_dropped_by_its_name_and_stops_nothing(tmp_path, pattern, harm):
    store, other = opened(tmp_path), opened(tmp_path, OTHER)
    add(store, [1])
    for number in (1, 2):
        add(other, [number])
    harm(store.path / "zarr.json")
    gc = plan(Cache(tmp_path))
    assert [(step.store, step.action) for step in gc.steps] == [(other.name, "merge parts")]
    gc = plan(Cache(tmp_path), extractors=["other"])
    assert [(step.store, step.action) for step in gc.steps] == [(other.name, "drop store")]
    assert plan(Cache(tmp_path), extractors=["te?t"]).steps == ()
    report = run(plan(Cache(tmp_path), extractors=[pattern]))
    assert report.stores_dropped == 1
    assert [path.name for path in tmp_path.iterdir()] == [other.name]


def test_a_folder_that_is_only_named_like_a_store_is_not_dropped(tmp_path):
    folder = tmp_path / "thesis-0123456789abcdef"
    folder.mkdir()
    (folder / "one.tex").write_text("mine")
    gc = plan(Cache(tmp_path), extractors=["thesis"])
    assert gc.steps == ()
    assert f"{folder.name} is left as it is" in gc.notes[-1]
    run(gc)
    assert (folder / "one.tex").read_text() == "mine"


def test_a_criterion_that_matches_nothing_is_told(tmp_path):
    add(opened(tmp_path), [1])
    gc = plan(Cache(tmp_path), extractors=["tset", "test", "wav*"])
    assert actions(gc) == ["drop store"]
    assert gc.notes == (
        "No store matches 'tset'. `mer cache ls` shows those that are there.",
        "No store matches 'wav*'. `mer cache ls` shows those that are there.",
    )


def test_imported_features_are_chosen_by_the_name_they_were_given(tmp_path):
    spec = FeatureSpec(
        slug="imported-mine",
        identity={"extractor": "imported", "options": {"name": "mine"}},
        outputs=SPEC.outputs,
    )
    add(opened(tmp_path, spec), [1])
    add(opened(tmp_path), [1])
    for name in ("mine", "imported", "imported-mine"):
        (step,) = plan(Cache(tmp_path), extractors=[name]).steps
        assert step.store == opened(tmp_path, spec).name
        assert step.reason == f"extractor imported-mine matches {name!r}"


def searches(monkeypatch: pytest.MonkeyPatch, root: Path, **criteria: object) -> int:
    """Count how often all keys of a store are gone through."""
    made = []
    with monkeypatch.context() as patch:
        patch.setattr(collect, "KeyIndex", lambda keys: made.append(1) or KeyIndex(keys))
        assert len(plan(Cache(root), compact=False, **criteria).steps) > 1  # type: ignore[arg-type]
    return len(made)


@pytest.mark.parametrize("criteria", [{"keep": {key(2), key(5)}}, {"max_bytes": 0}])
def test_what_is_planned_for_a_part_does_not_go_through_all_others(tmp_path, monkeypatch, criteria):
    counts = []
    for number in (3, 12):
        root = tmp_path / str(number)
        store = opened(root)
        for first in range(0, 3 * number, 3):
            add(store, range(first, first + 3))
        counts.append(searches(monkeypatch, root, **criteria))
    assert counts[0] == counts[1]


def spoil(store: Store, part: str) -> None:
    """Flip a byte that planning does not read."""
    shard = store.path / "parts" / part / "final/frames/c/0/0"
    data = bytearray(shard.read_bytes())
    data[7] ^= 1
    shard.write_bytes(data)


@pytest.mark.parametrize("late", [False, True], ids=["seen when read", "seen when listed"])
def test_parts_are_merged_without_those_that_are_damaged(tmp_path, late):
    store = opened(tmp_path)
    names = [add(store, [number, number + 1]) for number in (1, 3, 5, 7)]
    before, was = content(tmp_path), size(store)
    if not late:
        spoil(store, names[1])
    gc = plan(Cache(tmp_path))
    assert actions(gc) == ["merge parts"]
    if late:
        (store.path / "parts" / names[1] / "final/pooled/c/0/0/0").unlink()
    report = run(gc)
    (note,) = report.notes
    assert f"part {names[1]} is damaged and stays as it is" in note
    assert note.count("mer cache verify --repair") == 1
    assert (report.parts_merged, report.parts_written) == (3, 1)
    assert len(store.place.part_names()) == 2
    if not late:
        assert report.bytes_freed == was - size(store) > 0
        again = run(plan(Cache(tmp_path)))
        assert (again.parts_written, again.parts_merged, again.bytes_freed) == (0, 0, 0)
    verify([Store(store.path)], repair=True)
    after = content(tmp_path)
    assert after == {its: before[its] for its in after}
    assert before.keys() - after.keys() <= {key(3), key(4)}


def test_merging_keeps_a_copy_whose_better_one_turns_out_damaged(tmp_path):
    store = opened(tmp_path)
    names = sorted([add(store, [1, 2]), add(store, [1, 3]), add(store, [1, 4])])
    before = content(tmp_path)
    spoil(store, names[0])
    report = run(plan(Cache(tmp_path)))
    assert sorted(store.place.part_names()) == names
    assert any("the other copy of 1 utterances is gone or damaged" in n for n in report.notes)
    verify([Store(store.path)], repair=True)
    after = content(tmp_path)
    assert len(before.keys() - after.keys()) <= 1
    assert key(1) in after


def test_a_rewriting_that_fails_midway_leaves_nothing_behind(tmp_path):
    store = opened(tmp_path)
    add(store, [1])

    def broken():
        yield Stored(key(7), 1, arrays_of(7), {"final": np.zeros((2, 3), np.float32)})
        raise DamagedStoreError("the second one is damaged")

    with pytest.raises(DamagedStoreError, match="the second one is damaged"):
        rewrite(store.place, SPEC, store.fingerprint, broken(), generation=1)
    assert content(tmp_path).keys() == {key(1)}


@pytest.mark.parametrize("where", ["frames", "pooled"])
def test_nothing_that_is_not_finite_is_written_anew(tmp_path, where):
    store = opened(tmp_path)
    found = Stored(key(7), 1, arrays_of(7), {"final": np.zeros((2, 3), np.float32)})
    (found.arrays if where == "frames" else found.pooled)["final"][0, 0] = np.nan
    with pytest.raises(DamagedStoreError, match="holds NaN or an infinity"):
        rewrite(store.place, SPEC, store.fingerprint, [found], generation=1)
    assert store.place.part_names() == []


def arrays_of(number: int) -> dict[str, np.ndarray]:
    """As they are stored."""
    its = arrays(number)
    return {"final": its["final"].astype(np.float16), "code": its["code"]}


def test_the_quarantine_of_a_store_that_was_dropped_is_counted_and_can_be_deleted(tmp_path):
    for spec in (SPEC, OTHER):
        store = opened(tmp_path, spec)
        (store.path / "parts" / add(store, [1]) / "zarr.json").write_text("{")
        verify([Store(store.path)], repair=True)
        add(store, [2])
    run(plan(Cache(tmp_path), extractors=["test"]))
    (orphan,) = left_behind(Cache(tmp_path))
    assert orphan.name.startswith("test-final-")
    counted = usage(orphan)
    assert counted.quarantine == counted.total > 1000
    assert plan(Cache(tmp_path), extractors=["nothing"], quarantine=True).steps == ()
    gc = plan(Cache(tmp_path), extractors=["test-f*"], quarantine=True)
    assert [(step.store, step.action) for step in gc.steps] == [(orphan.name, "drop quarantine")]
    assert gc.notes == ()
    assert run(gc).bytes_freed == counted.quarantine
    assert left_behind(Cache(tmp_path)) == []
    assert plan(Cache(tmp_path), quarantine=True).bytes_freed > 1000  # that of the other


def test_the_quarantine_of_a_damaged_store_goes_with_it_on_request(tmp_path):
    store = opened(tmp_path)
    name = add(store, [1])
    (store.path / "parts" / name / "zarr.json").write_text("{")
    verify([Store(store.path)], repair=True)
    (store.path / "parts" / add(opened(tmp_path), [2]) / "zarr.json").write_text("{")
    gc = plan(Cache(tmp_path), extractors=["test"], quarantine=True)
    assert actions(gc) == ["drop store", "drop quarantine"]
    run(gc)
    assert list(tmp_path.iterdir()) == []


def test_an_orphaned_quarantine_in_a_bucket_is_found(tmp_path, monkeypatch):
    with s3() as bucket:
        for name, value in settings_of(bucket.gateway.url).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        store = opened(bucket.url)  # type: ignore[arg-type]
        bucket.object(f"{OTHER.slug}-{'0' * 16}.quarantine/part-1/zarr.json", b"{}")
        bucket.object(f"{store.name}.quarantine/part-1/zarr.json", b"{}")
        (orphan,) = left_behind(Cache(bucket.url))
        assert usage(orphan).quarantine == 2
        gc = plan(Cache(bucket.url), quarantine=True)
        assert {(s.store, s.action) for s in gc.steps} == {
            (name, "drop quarantine") for name in (store.name, orphan.name)
        }
        assert run(gc).bytes_freed == 4
        assert left_behind(Cache(bucket.url)) == []


def test_totals_say_what_matched_which_criterion_once_per_store_and_action(tmp_path):
    store = opened(tmp_path)
    for first in range(0, 9, 3):
        age(store, add(store, range(first, first + 3)), 1000.0)
    criteria = {
        "older_than_s": 3 * 86400.0,
        "now": 4 * 86400.0,
        "keep": {key(0), key(1)},
        "extractors": ["te*"],
    }
    gc = plan(Cache(tmp_path), compact=False, **criteria)  # type: ignore[arg-type]
    assert sorted(actions(gc)) == ["drop part", "drop part", "rewrite parts"]
    matches = (
        "committed more than 3 days ago and that nothing uses (extractor test-final matches 'te*')"
    )
    totals = {total.action: total for total in gc.totals}
    assert len(gc.totals) == 2
    assert totals["drop part"].reason == f"6 utterances {matches}"
    assert totals["rewrite parts"].reason == f"1 utterances {matches}"
    assert len(totals["drop part"].parts) == 2
    assert sum(total.bytes for total in gc.totals) == gc.bytes_freed
    assert sum(total.utterances for total in gc.totals) == gc.utterances == 7
