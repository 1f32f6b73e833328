"""Every damaged byte is found and named; a repair loses what is lost and nothing else."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from mer.cache import layout, reader, staging
from mer.cache import verify as verify_module
from mer.cache.errors import StoreError
from mer.cache.frames import agree
from mer.cache.home import Cache
from mer.cache.mend import single_byte_errors
from mer.cache.raw import LocalRaw
from mer.cache.rewrite import rewrite
from mer.cache.salvage import Salvage
from mer.cache.spec import FeatureSpec, OutputSpec
from mer.cache.store import Store
from mer.cache.verify import Corruption, VerifyReport, _Verifier, total_bytes, verify
from mer.cache.writer import PartWriter

SPEC = FeatureSpec(
    slug="test",
    identity={"name": "test"},
    outputs=(
        OutputSpec(name="final", dim=3, rate_hz=50.0),
        OutputSpec(name="layer", dim=3, rate_hz=50.0),
        OutputSpec(name="code", dim=1, rate_hz=None, dtype="uint8", kind="codes"),
        OutputSpec(name="mean", dim=2, rate_hz=None, dtype="float32", kind="pooled"),
    ),
)
OTHER = FeatureSpec(slug="test", identity={"name": "other"}, outputs=SPEC.outputs)
KEYS = [bytes([number]) * 16 for number in range(7)]
LENGTHS = [300, 0, 400, 700, 2, 800, 1]

Content = dict[bytes, tuple[bytes, ...]]


def arrays(number: int, shift: float = 0.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(number)
    length = LENGTHS[number]
    return {
        "final": rng.standard_normal((length, 3), dtype=np.float32) + np.float32(shift),
        "layer": rng.standard_normal((length, 3), dtype=np.float32),
        "code": rng.integers(0, 256, (length // 2, 1), dtype=np.uint8),
        "mean": rng.standard_normal((1, 2), dtype=np.float32),
    }


def make(root: Path, spec: FeatureSpec = SPEC) -> Store:
    """Two parts of four and three utterances."""
    store = Cache(root).open(spec, create=True)
    assert store is not None
    with store.writer() as writer:
        for number, key in enumerate(KEYS):
            writer.add(key, 320 * number, arrays(number))
            if number == 3:
                writer.commit()
    return store


def content(store: Store) -> Content:
    """All that is stored, by key, as bytes."""
    fresh = Cache(store.path.parent).open(SPEC, create=True)
    assert fresh is not None
    names = [output.name for output in fresh.spec.outputs]
    return {
        key: (
            str(fresh.input_length([key])).encode(),
            *(fresh.frames(key, name).tobytes() for name in names),
            *(fresh.pooled(name, [key]).tobytes() for name in ("final", "layer")),
        )
        for key in fresh.keys()  # noqa: SIM118 - not a mapping
    }


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait for the disk, where nobody cuts the power, and look at files every time."""
    monkeypatch.setattr(layout, "CHUNK_FRAMES", 512)  # which chunk concerns whom is told below
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(reader._pool, "limit", 0)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make(tmp_path / "cache")


def check(store: Store, repair: bool = False) -> VerifyReport:
    return verify([Store(store.path)], repair=repair, workers=1)


def parts(store: Store) -> list[Path]:
    folder = store.path / "parts"
    return sorted(f for f in folder.iterdir() if f.is_dir())


def part_of(store: Store, key: bytes) -> Path:
    return next(f for f in parts(store) if key in (f / "key/c/0/0").read_bytes())


def every_file(folder: Path) -> list[str]:
    return sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file())


def flip(file: Path, at: int, change: int = 0x10) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= change
    file.write_bytes(data)


def where(fault: Corruption) -> str:
    return fault.file if fault.part is None else f"parts/{fault.part}/{fault.file}"


def repaired(store: Store, before: Content) -> set[bytes]:
    """Repair, check what a repair promises, and return the keys it lost."""
    found = check(store)
    report = check(store, repair=True)
    assert report.corrupt == found.corrupt
    again = check(store)
    assert again.corrupt == ()
    after = content(store)
    lost = before.keys() - after.keys()
    if not any("the keys of its" in fault.reason for fault in report.corrupt):
        assert lost == set(report.lost)
    assert after == {key: before[key] for key in before if key not in lost}
    assert report.repaired or report.quarantined
    return lost


def test_a_sound_store_is_clean_and_every_byte_is_counted(store):
    seen: list[int] = []
    report = verify([store], progress=seen.append)
    assert report.corrupt == report.notes == report.lost == ()
    assert (report.stores, report.parts, report.utterances) == (1, 2, 7)
    assert report.files == len(every_file(store.path))
    size = sum((store.path / name).stat().st_size for name in every_file(store.path))
    assert report.bytes == sum(seen) == total_bytes([store]) == size


def as_of_the_first_release(store: Store) -> None:
    """Take out of the manifests what the first release did not write into them."""
    for folder in parts(store):
        mer = json.loads((folder / "zarr.json").read_text())["attributes"]["mer"]
        for its in mer["outputs"].values():
            del its["crc32c"]
        del mer["store"], mer["part"], mer["checksum"]
        (folder / "zarr.json").write_bytes(layout.to_bytes(layout.group_document(mer)))


@pytest.fixture
def old(tmp_path: Path) -> Store:
    """A store of the first release."""
    made = make(tmp_path / "old")
    as_of_the_first_release(made)
    return made


def test_stores_of_the_first_release_are_clean_and_their_damage_is_found(old):
    before = content(old)
    assert check(old).corrupt == ()
    shard = part_of(old, KEYS[3]) / "final/frames/c/0/0"
    flip(shard, 10)
    (fault,) = check(old).corrupt
    assert fault.reason == "does not match its checksums in chunk 0 of 3"
    assert fault.utterances == (KEYS[0], KEYS[2])
    assert repaired(old, before) == {KEYS[0], KEYS[2]}


@pytest.mark.parametrize("output", ["code", "mean"])
def test_without_pooled_values_no_chunk_of_a_damaged_first_release_shard_is_trusted(old, output):
    before = content(old)
    flip(part_of(old, KEYS[0]) / output / "frames/c/0/0", 1)
    lost = set(KEYS[:4])
    if output == "code":
        lost -= {KEYS[1]}  # it has no frames
    assert repaired(old, before) == lost


@pytest.mark.parametrize("harm", [flip, lambda file, at: file.unlink()], ids=["mended", "lost"])
def test_damaged_pooled_values_prove_nothing_of_a_first_release_shard(old, harm):
    before = content(old)
    folder = part_of(old, KEYS[0])
    flip(folder / "final/frames/c/0/0", 10)
    harm(folder / "final/pooled/c/0/0/0", 7)
    assert repaired(old, before) == ({KEYS[0], KEYS[2]} if harm is flip else set(KEYS[:4]))


STRANGERS = {
    "exchanged": lambda a, b: exchange(a, b),
    "in place of the longer": lambda a, b: shutil.copy(*sorted([a, b], key=size_of)),
    "in place of the shorter": lambda a, b: shutil.copy(*sorted([b, a], key=size_of)[::-1]),
    "cut to its length": lambda a, b: a.write_bytes(b.read_bytes()[: size_of(a)]),
    "with its length": lambda a, b: a.write_bytes(
        b.read_bytes() + a.read_bytes()[size_of(b) - size_of(a) :]
        if size_of(b) < size_of(a)
        else b.read_bytes()[: size_of(a) - 20] + a.read_bytes()[-20:]
    ),
}


def size_of(file: Path) -> int:
    return file.stat().st_size


@pytest.mark.parametrize("flipped", [None, 5, -60], ids=["", "flipped early", "flipped late"])
@pytest.mark.parametrize("output", ["final", "layer", "code", "mean"])
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("harm", STRANGERS)
def test_a_repair_never_takes_a_strangers_frames_for_a_first_release_part(
    old, output, harm, number, flipped
):
    before = content(old)
    shards = [folder / output / "frames/c/0/0" for folder in parts(old)]
    shards = shards[::-1] if number else shards
    STRANGERS[harm](*shards)
    if flipped is not None:
        flip(shards[0], flipped % size_of(shards[0]))
    repaired(old, before)  # compares everything that is left


def test_shards_of_one_length_are_not_exchanged_unnoticed_in_a_first_release_part(old):
    """Chunk by chunk they are sound, and with a flipped byte the file's checksum is explained."""
    before = content(old)
    folder = part_of(old, KEYS[0])
    exchange(folder / "final/frames/c/0/0", folder / "layer/frames/c/0/0")
    flip(folder / "final/frames/c/0/0", 5)
    flip(folder / "layer/frames/c/0/0", 5)
    assert repaired(old, before) == {KEYS[0], KEYS[2], KEYS[3]}


def test_one_strange_chunk_costs_a_first_release_part_its_shard(old):
    before = content(old)
    shard, other = (
        f / "final/frames/c/0/0" for f in (part_of(old, KEYS[0]), part_of(old, KEYS[5]))
    )
    chunk = 512 * 3 * 2 + 4
    data = bytearray(shard.read_bytes())
    data[2 * chunk : 3 * chunk] = other.read_bytes()[:chunk]
    data[9] ^= 1
    shard.write_bytes(data)
    assert repaired(old, before) == {KEYS[0], KEYS[2], KEYS[3]}


def test_a_cut_first_release_shard_keeps_what_is_whole(old):
    before = content(old)
    shard = part_of(old, KEYS[0]) / "final/frames/c/0/0"
    os.truncate(shard, 2 * (512 * 3 * 2 + 4) + 7)
    assert repaired(old, before) == {KEYS[3]}


@pytest.mark.parametrize("peak", [1e-7, 1.0, 6e4, 1e6])
@pytest.mark.parametrize("dim", [1, 80])
def test_rounding_explains_no_more_than_it_does(tmp_path, peak, dim):
    output = OutputSpec(name="final", dim=dim, rate_hz=50.0)
    spec = FeatureSpec(slug="rounding", identity={"dim": dim}, outputs=(output,))
    made = Cache(tmp_path).open(spec, create=True)
    assert made is not None
    rng = np.random.default_rng(dim)
    lengths = [1, 2, 5, 600, 900]
    stored = [peak * (rng.uniform(0.0, 1.0, (n, dim)) + i) / 5 for i, n in enumerate(lengths)]
    with made.writer() as writer:
        for key, frames in zip(KEYS, stored, strict=False):
            writer.add(key, 1, {"final": frames.astype(np.float32)})
    pooled = made.pooled("final", KEYS[:5])
    frames = [made.frames(key, "final") for key in KEYS[:5]]
    for one in range(5):
        assert agree(frames[one], pooled[one])
        assert not agree(frames[one], np.full_like(pooled[one], np.nan))
        for other in range(5):
            assert one == other or peak < 1e-6 or not agree(frames[one], pooled[other])
    damaged = frames[4].copy()
    damaged[0, 0] = np.inf
    assert not agree(damaged, pooled[4])
    if peak >= 1.0:
        damaged[0, 0] = frames[4].max() * -1
        assert not agree(damaged, pooled[4])


@pytest.mark.parametrize(
    ("change", "stride"),
    [
        pytest.param(0x10, 17, id="one bit"),
        pytest.param(0x20, 61, id="letter case"),
        pytest.param(0xFF, 61, id="all bits"),
    ],
)
def test_a_flipped_byte_in_any_file_is_found(store, change, stride):
    total = 0
    for name in every_file(store.path):
        step = 1999 if "frames/c" in name else 17 * stride if "/c/0" in name else stride
        total += flip_one_by_one(store, name, step, change)
    assert total > 10_000 // stride
    assert check(store).corrupt == ()


def test_every_flipped_byte_of_sealed_metadata_is_found(tmp_path):
    """One part with one output; any change that keeps the byte a letter, digit or space."""
    spec = FeatureSpec(slug="é", identity={"é": 0.1}, outputs=SPEC.outputs[:1])
    store = Cache(tmp_path).open(spec, create=True)
    assert store is not None
    with store.writer() as writer:
        writer.add(KEYS[0], 1, {"final": arrays(0)["final"]})
    (part,) = parts(store)
    for name in ("zarr.json", "parts/zarr.json", f"parts/{part.name}/zarr.json"):
        assert flip_one_by_one(store, name, 1, 0x01) > 50


def flip_one_by_one(store: Store, name: str, step: int, change: int) -> int:
    """Flip every ``step``-th byte of a file and see that this very file is named."""
    file = store.path / name
    data = file.read_bytes()
    positions = [*range(len(data) % step, len(data), step), len(data) - 1]
    for at in positions:
        flip(file, at, change)
        assert [where(fault) for fault in check(store).corrupt] == [name], at
        file.write_bytes(data)
    return len(positions)


def test_white_space_and_letter_case_in_metadata_are_bytes_too(store):
    before = content(store)
    for file in (store.path / "zarr.json", parts(store)[0] / "zarr.json"):
        data = file.read_bytes()
        file.write_bytes(data.replace(b"\n ", b"\n\t", 1))
        (fault,) = check(store).corrupt
        assert fault.reason == "is not spelled as it was written"
        assert fault.restorable
        assert fault.utterances == ()
        assert check(store, repair=True).repaired == (str(file),)
        assert file.read_bytes() == data
    assert content(store) == before


def test_damage_is_narrowed_down_to_the_utterances_that_touch_it(store):
    """Part of the keys 0 to 3: 1,400 frames in chunks of 512, bounds at 300, 300, 700."""
    folder = part_of(store, KEYS[0])
    chunk = 512 * 3 * 2 + 4
    expected = {0: {0, 2}, 1: {2, 3}, 2: {3}}
    for number, touched in expected.items():
        shard = folder / "final/frames/c/0/0"
        data = shard.read_bytes()
        flip(shard, number * chunk + 5)
        (fault,) = check(store).corrupt
        assert set(fault.utterances) == {KEYS[i] for i in touched}
        assert fault.reason == f"does not match its checksums in chunk {number} of 3"
        assert not fault.restorable
        assert str(fault) == (
            f"{store.path}/parts/{folder.name}/final/frames/c/0/0 does not match its checksums in "
            f"chunk {number} of 3."
        )
        shard.write_bytes(data)


def flip_middle(file: Path) -> None:
    flip(file, file.stat().st_size // 2)


def flip_end(file: Path) -> None:
    flip(file, file.stat().st_size - 1)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 3)


def extend(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"more")


def overwrite(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


HARMS = (flip_middle, flip_end, truncate, extend, os.unlink, overwrite)


@pytest.mark.parametrize("number", [0, 1])
def test_a_repair_loses_what_is_lost_for_damage_in_any_file(tmp_path, number):
    pristine = make(tmp_path / "pristine")
    before = content(pristine)
    names = every_file(parts(pristine)[number])
    for at, name in enumerate(names):
        for harm in HARMS[at % 3 :: 3] if number == 0 else HARMS[at % 6 :: 6]:
            root = tmp_path / f"{at}-{harm.__name__}"
            shutil.copytree(tmp_path / "pristine", root)
            store = Store(root / pristine.name)
            file = parts(store)[number] / name
            harm(file)
            lost = repaired(store, before)
            small = name != "zarr.json" and (name.endswith("zarr.json") or "frames" in name)
            if (
                harm in (extend, flip_end)
                and name != "zarr.json"
                or small
                and name.endswith("zarr.json")
            ):
                assert not lost
            elif name == "zarr.json":
                assert len(lost) == (4 if KEYS[0] in lost else 3)
            shutil.rmtree(root)


def test_one_wrong_byte_of_a_small_array_is_put_right(store):
    before = content(store)
    folder = part_of(store, KEYS[0])
    for name in ("key/c/0/0", "input_length/c/0", "final/offsets/c/0", "final/pooled/c/0/0/0"):
        data = (folder / name).read_bytes()
        flip(folder / name, len(data) // 3, 0x7F)
        assert repaired(store, before) == set()
        assert (folder / name).read_bytes() == data


def test_offsets_are_restored_from_another_layer(store):
    before = content(store)
    folder = part_of(store, KEYS[0])
    (folder / "final/offsets/c/0").unlink()
    assert repaired(store, before) == set()
    (folder / "final/offsets/c/0").write_bytes(b"")
    (folder / "layer/offsets/c/0").write_bytes(b"")
    assert repaired(store, before) == set(KEYS[:4])


def test_what_opening_a_store_remembers_restores_what_is_lost(store):
    before = content(store)
    opened = Store(store.path)
    opened.refresh()
    opened._save_snapshot(opened.listing, opened.place.signatures(opened.place.part_names()))
    folder = part_of(store, KEYS[0])
    for name in ("key/c/0/0", "input_length/c/0", "final/offsets/c/0", "code/offsets/c/0"):
        (folder / name).unlink()
    assert repaired(store, before) == set()
    (folder / "zarr.json").unlink()
    (folder / "key/c/0/0").unlink()
    assert repaired(store, before) == set(KEYS[:4])


def test_the_one_byte_that_explains_a_checksum_is_found():
    import google_crc32c

    rng = np.random.default_rng(0)
    for length in (1, 2, 5, 1000):
        data = rng.integers(0, 256, length, dtype=np.uint8)
        for at in {0, length // 2, length - 1}:
            changed = data.copy()
            changed[at] ^= 0xA5
            before, after = (google_crc32c.value(d.tobytes()) for d in (data, changed))
            assert (at, 0xA5) in list(single_byte_errors(before ^ after, length))


def test_exchanged_files_are_found(store, tmp_path):
    """Any two files of one size, within a part and between parts."""
    before = content(store)
    sizes: dict[int, list[str]] = {}
    for name in every_file(store.path):
        sizes.setdefault((store.path / name).stat().st_size, []).append(name)
    pairs = [pair for same in sizes.values() for pair in combinations(same, 2)]
    twin = parts(store)
    shards = [f"parts/{f.name}/{o}/frames/c/0/0" for f in twin for o in ("final", "layer")]
    pairs += list(combinations(shards, 2))
    exchanged = 0
    for a, b in pairs:
        one, other = (store.path / name for name in (a, b))
        ours, theirs = one.read_bytes(), other.read_bytes()
        if ours == theirs:
            continue
        exchanged += 1
        one.write_bytes(theirs)
        other.write_bytes(ours)
        faults = check(store).corrupt
        assert {a, b} <= {where(fault) for fault in faults}
        one.write_bytes(ours)
        other.write_bytes(theirs)
    assert exchanged > 10
    assert content(store) == before


def test_two_shards_of_one_part_that_are_exchanged_are_found(store):
    before = content(store)
    folder = part_of(store, KEYS[0])
    exchange(folder / "final/frames/c/0/0", folder / "layer/frames/c/0/0")
    report = check(store)
    assert [fault.file for fault in report.corrupt] == [
        "final/frames/c/0/0",
        "layer/frames/c/0/0",
    ]
    assert repaired(store, before) == {KEYS[0], KEYS[2], KEYS[3]}


def exchange(a: Path, b: Path) -> None:
    spare = a.with_name("spare")
    a.rename(spare)
    b.rename(a)
    spare.rename(b)


def test_two_exchanged_parts_are_found_and_nothing_is_lost(store):
    before = content(store)
    a, b = parts(store)
    exchange(a, b)
    report = check(store)
    assert {(fault.part, fault.file) for fault in report.corrupt} == {
        (a.name, "zarr.json"),
        (b.name, "zarr.json"),
    }
    assert f"is the manifest of part {b.name}, not of this one" in report.corrupt[0].reason
    assert repaired(store, before) == set()


def test_a_part_of_another_store_is_found(store, tmp_path):
    before = content(store)
    foreign = make(tmp_path / "other", OTHER)
    name = parts(foreign)[0].name
    shutil.rmtree(store.path / "parts" / name)
    shutil.copytree(foreign.path / "parts" / name, store.path / "parts" / name)
    (fault,) = check(store).corrupt
    assert fault.reason == (
        f"belongs to another store, the one with the fingerprint {foreign.fingerprint}"
    )
    assert set(fault.utterances) == repaired(store, before)
    assert not (store.path / "parts" / name).exists()


def test_a_restored_old_part_is_noted_and_compared(store, tmp_path):
    """A copy of utterances that are stored already, with other values."""
    rewriting = make(tmp_path / "old")
    shutil.rmtree(rewriting.path / "parts")
    (rewriting.path / "parts").mkdir()
    (rewriting.path / "parts/zarr.json").write_bytes(layout.to_bytes(layout.group_document()))
    with Store(rewriting.path).writer() as writer:
        writer.add(KEYS[0], 0, arrays(0, shift=0.5))
        writer.add(KEYS[2], 640, arrays(2))
    (old,) = parts(rewriting)
    shutil.copytree(old, store.path / "parts" / old.name)
    report = check(store)
    assert report.corrupt == ()
    twice, differ = report.notes
    assert "holds 2 utterances in more than one part; `mer cache gc` merges them" in twice
    assert "holds other values for 1 utterances in another part: output 'final'" in differ
    assert "differs by up to 0.50" in differ


def test_what_is_no_part_is_noted_and_left_alone(store):
    (store.path / "parts/lost+found").mkdir()
    (store.path / "readme.txt").write_text("mine")
    (parts(store)[0] / "mine.txt").write_text("mine")
    report = check(store, repair=True)
    assert report.corrupt == report.quarantined == ()
    text = "\n".join(report.notes)
    assert "holds parts/lost+found, which is no part of a store" in text
    assert "holds readme.txt, which is no part of a store" in text
    assert "holds 1 files that its manifest does not list, the first is mine.txt" in text
    assert (store.path / "readme.txt").exists()


def test_the_metadata_of_parts_is_made_anew(store):
    before = content(store)
    file = store.path / "parts/zarr.json"
    data = file.read_bytes()
    for harm in (flip_middle, os.unlink):
        harm(file)
        assert repaired(store, before) == set()
        assert file.read_bytes() == data


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        pytest.param(os.unlink, "is missing: the store has no metadata", id="lost"),
        pytest.param(truncate, "is not JSON any more", id="cut"),
        pytest.param(lambda f: flip(f, f.read_bytes().index(b"test")), "checksum", id="flipped"),
        pytest.param(lambda f: f.write_text("{}"), "not the metadata of a store", id="emptied"),
    ],
)
def test_damaged_store_metadata_is_taken_out_and_made_anew(store, harm, reason):
    before = content(store)
    harm(store.path / "zarr.json")
    flip(part_of(store, KEYS[0]) / "final/frames/c/0/0", 3)
    report = check(store, repair=True)
    root, shard = sorted(report.corrupt, key=lambda fault: fault.part or "")
    assert (root.part, root.file, root.utterances) == (None, "zarr.json", ())
    assert reason in root.reason
    assert shard.utterances == (KEYS[0], KEYS[2])
    after = content(store)  # Cache.open makes the metadata
    assert after == {key: before[key] for key in before if key not in shard.utterances}
    assert check(store).corrupt == ()


def test_a_root_that_waits_for_the_next_extraction_is_clean(store):
    truncate(store.path / "zarr.json")
    check(store, repair=True)
    report = check(store)
    assert report.corrupt == ()
    assert "waits for `mer extract` to make its metadata anew" in report.notes[0]


def test_the_root_of_another_store_is_found(store, tmp_path):
    foreign = make(tmp_path / "other", OTHER)
    shutil.copy(foreign.path / "zarr.json", store.path / "zarr.json")
    fault = check(store).corrupt[0]
    assert fault.reason == (
        f"is that of another store, the one with the fingerprint {foreign.fingerprint}"
    )


def test_a_newer_format_is_no_damage(store):
    for file in (store.path / "zarr.json", parts(store)[0] / "zarr.json"):
        mer = json.loads(file.read_text())["attributes"]["mer"]
        mer["format"] = 2
        file.write_bytes(layout.to_bytes(layout.group_document(mer)))
        report = check(store, repair=True)
        assert report.corrupt == report.quarantined == ()
        assert "has format 2, which this release cannot check: update mer" in report.notes[-1]


def test_all_faults_are_collected(store):
    a, b = parts(store)
    flip(a / "final/frames/c/0/0", 3)
    (a / "layer/pooled/c/0/0/0").unlink()
    (b / "zarr.json").write_text("{")
    (store.path / "parts/zarr.json").unlink()
    report = check(store)
    assert sorted(where(fault) for fault in report.corrupt) == sorted(
        [
            f"parts/{a.name}/final/frames/c/0/0",
            f"parts/{a.name}/layer/pooled/c/0/0/0",
            f"parts/{b.name}/zarr.json",
            "parts/zarr.json",
        ]
    )


def test_a_part_that_is_merged_away_while_it_is_read_is_no_damage(store, monkeypatch):
    gone = parts(store)[0]
    real = LocalRaw.read

    def read(self, file, start=0, stop=None):
        if gone.name in file and "pooled" in file:
            shutil.rmtree(gone, ignore_errors=True)
        return real(self, file, start, stop)

    monkeypatch.setattr(LocalRaw, "read", read)
    report = check(store, repair=True)
    assert report.corrupt == report.quarantined == ()
    assert report.parts == 1


def again(store: Store, *numbers: int) -> None:
    """Extract some utterances once more."""
    with Store(store.path).writer() as writer:
        for number in numbers:
            writer.add(KEYS[number], 320 * number, arrays(number))


def test_a_sound_part_that_took_the_place_of_a_damaged_one_stays(store, monkeypatch):
    """Two repairs, and between them what the first has lost is extracted under the same name."""
    before, name = content(store), part_of(store, KEYS[5])
    (name / "zarr.json").write_bytes(b"{")
    real = _Verifier._repair

    def overtaken(self, examined, facts):
        if not examined.faults:
            return real(self, examined, facts)
        monkeypatch.setattr(_Verifier, "_repair", real)
        check(store, repair=True)
        assert not name.exists()
        again(store, 4, 5, 6)
        assert name.exists()
        return real(self, examined, facts)

    monkeypatch.setattr(_Verifier, "_repair", overtaken)
    report = check(store, repair=True)
    assert report.quarantined == report.repaired == ()
    assert check(store).corrupt == ()
    assert content(store) == before


def test_a_part_that_is_replaced_while_it_is_rewritten_is_not_taken_out(store, monkeypatch):
    before, name = content(store), part_of(store, KEYS[5])
    flip(name / "final/frames/c/0/0", 4000)
    sound = shutil.copytree(name, store.path.parent / "sound")
    flip(sound / "final/frames/c/0/0", 4000)
    real = rewrite

    def rewrite_and_replace(*args, **kwargs):
        new = real(*args, **kwargs)
        shutil.rmtree(name)
        shutil.move(sound, name)
        return new

    monkeypatch.setattr("mer.cache.verify.rewrite", rewrite_and_replace)
    report = check(store, repair=True)
    assert len(report.corrupt) == 1
    assert report.quarantined == ()
    assert name.exists()
    assert check(store).corrupt == ()
    assert content(store) == before


@pytest.mark.parametrize("times", [1, 99])
def test_a_part_that_is_replaced_while_it_is_read_is_read_again(store, monkeypatch, times):
    before, name = content(store), part_of(store, KEYS[5])
    real, left = LocalRaw.read, [times]

    def read(self, file, start=0, stop=None):
        data = real(self, file, start, stop)
        if name.name in file and file.endswith("input_length/c/0") and left[0]:
            left[0] -= 1
            shutil.copytree(name, store.path.parent / "other")
            shutil.rmtree(name)
            shutil.move(store.path.parent / "other", name)
            data = data.copy()
            data[0] ^= 1  # half of the one, half of the other
        return data

    with monkeypatch.context() as patch:
        patch.setattr(LocalRaw, "read", read)
        report = check(store, repair=True)
    assert report.corrupt == report.quarantined == report.repaired == ()
    assert any("again and again" in note for note in report.notes) == (times > 1)
    assert content(store) == before


def test_mending_does_not_bring_a_part_back_that_was_removed(store):
    part = parts(store)[0]
    shutil.rmtree(part)
    with pytest.raises(StoreError, match="Cannot write to .*: No such file"):
        LocalRaw(store.path).replace(f"parts/{part.name}/final/zarr.json", [b"{}"])
    assert not part.exists()


def test_a_store_that_was_renamed_or_linked_is_no_damage(store, tmp_path):
    before = content(store)
    store.path.rename(tmp_path / "features")
    assert check(Store(tmp_path / "features"), repair=True).corrupt == ()
    store.path.symlink_to(tmp_path / "features")
    linked = Store(tmp_path / "cache" / store.name)
    assert check(linked, repair=True).corrupt == ()
    flip(next((tmp_path / "features/parts").glob("*/final/pooled/c/0/0/0")), 5)
    assert len(check(linked, repair=True).repaired) == 1
    assert content(store) == before


def test_a_damaged_part_whose_name_a_rewritten_one_wants_is_not_lost(store):
    """Three parts in a circle: each holds what the next one's name stands for."""
    again(store, *range(7))
    before = content(store)
    place, stored = store.place, store.fingerprint
    with PartWriter(place, SPEC, stored, lambda key: False, lambda: None) as writer:
        for number in (0, 5):
            writer.add(KEYS[number], 320 * number, arrays(number))
    a, b, c = parts(store)
    exchange(a, b)
    exchange(b, c)
    assert repaired(store, before) == set()
    assert content(store) == before


def refuse(monkeypatch: pytest.MonkeyPatch, code: int, chosen: Callable[[str], bool]) -> None:
    real = os.open

    def limited(path, flags, *args, **kwargs):
        if chosen(str(path)):
            raise OSError(code, os.strerror(code), path)
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", limited)


def test_what_may_not_be_read_is_reported_and_left_alone(store, monkeypatch):
    name = parts(store)[0].name
    with monkeypatch.context() as patch:
        refuse(patch, errno.EACCES, lambda p: p.endswith(f"{name}/final/frames/c/0/0"))
        report = check(store, repair=True)
    (fault,) = report.corrupt
    assert (fault.file, fault.reason) == (
        "final/frames/c/0/0",
        "cannot be read: Permission denied",
    )
    assert fault.utterances == report.quarantined == ()
    assert "could not be read and was left as it is" in report.notes[0]
    assert check(store).corrupt == ()


def test_a_disk_that_fails_in_places_loses_those_places(store, monkeypatch):
    before = content(store)
    shard = part_of(store, KEYS[0]) / "final/frames/c/0/0"
    chunk = 512 * 3 * 2 + 4
    real_open, real_read, bad = os.open, os.preadv, set()

    def opened(path, *args, **kwargs):
        descriptor = real_open(path, *args, **kwargs)
        bad.discard(descriptor)
        if str(path) == str(shard):
            bad.add(descriptor)
        return descriptor

    def read(descriptor, buffers, offset, *args):
        wanted = sum(len(b) for b in buffers)
        if descriptor in bad and offset < 2 * chunk and offset + wanted > chunk:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real_read(descriptor, buffers, offset, *args)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "preadv", read)
    report = check(store, repair=True)
    (fault,) = report.corrupt
    assert fault.reason == f"cannot be read: {os.strerror(errno.EIO)}"
    assert set(fault.utterances) == {KEYS[2], KEYS[3]}
    after = content(store)
    assert after == {key: before[key] for key in before if key not in fault.utterances}


def test_a_part_that_cannot_be_judged_keeps_no_other_from_being_repaired(store, monkeypatch):
    before = content(store)
    strange, damaged = parts(store)
    flip(damaged / "mean/frames/c/0/0", 2)
    real = verify_module.examine_part

    def examine(raw, part, *args):
        if part == strange.name:
            raise ValueError("nobody has foreseen this")
        return real(raw, part, *args)

    with monkeypatch.context() as patch:
        patch.setattr(verify_module, "examine_part", examine)
        report = check(store, repair=True)
    assert sorted((fault.part, fault.file) for fault in report.corrupt) == sorted(
        [(strange.name, "zarr.json"), (damaged.name, "mean/frames/c/0/0")]
    )
    assert any("nobody has foreseen this" in fault.reason for fault in report.corrupt)
    assert len(report.quarantined) == 1
    assert strange.exists()
    assert check(store).corrupt == ()
    assert content(store) == {k: v for k, v in before.items() if k not in report.lost}


def test_a_part_whose_rewriting_fails_keeps_no_other_from_being_repaired(store, monkeypatch):
    """What must not be stored is not, and nothing of a half of it becomes visible."""
    first, second = part_of(store, KEYS[0]), part_of(store, KEYS[4])
    for folder in (first, second):
        flip(folder / "final/frames/c/0/0", 5)
    real = Salvage.read

    def poisoned(self, row):
        found = real(self, row)
        if found.key == KEYS[3]:  # KEYS[1] comes before it
            found.arrays["mean"][...] = np.nan
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Salvage, "read", poisoned)
        report = check(store, repair=True)
    (note,) = report.notes
    assert "Output 'mean' of utterance 0303" in note
    assert "holds NaN or an infinity" in note
    assert first.exists()
    assert not second.exists()
    assert len(parts(store)) == 2
    assert {fault.part for fault in check(store).corrupt} == {first.name}


def test_a_folder_that_is_only_named_like_a_store_is_left_as_it_is(tmp_path):
    """Neither metadata of ours nor a part, whatever else is in it."""
    folder = tmp_path / "thesis-0123456789abcdef"
    (folder / "parts").mkdir(parents=True)
    (folder / "parts/one.tex").write_text("mine")
    (folder / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group"}')
    before = {name: (folder / name).read_bytes() for name in every_file(folder)}
    report = check(Store(folder), repair=True)
    assert report.corrupt == report.repaired == report.quarantined == ()
    assert report.notes == (
        f"{folder} is named like a store and holds nothing of one; it is left as it is.",
    )
    assert {name: (folder / name).read_bytes() for name in every_file(folder)} == before
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


@pytest.mark.parametrize("harm", [truncate, overwrite, os.unlink])
def test_a_store_without_parts_is_still_a_store(tmp_path, harm):
    made = Cache(tmp_path).open(SPEC, create=True)
    assert made is not None
    harm(made.path / "zarr.json")
    report = check(made, repair=True)
    assert [fault.file for fault in report.corrupt] == ["zarr.json"]
    assert content(made) == {}
    assert check(made).corrupt == ()


def test_a_store_that_has_lost_its_metadata_is_told_what_makes_it_anew(store):
    (store.path / "zarr.json").unlink()
    (fault,) = check(store, repair=True).corrupt
    assert "`mer extract` makes it anew" in fault.reason
    assert not fault.restorable


def test_a_read_only_store_says_that_it_cannot_be_repaired(store, monkeypatch):
    flip(parts(store)[0] / "final/frames/c/0/0", 3)

    def no(path, *args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), os.fspath(path))

    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", no)
        report = check(store, repair=True)
    assert len(report.corrupt) == 1
    assert report.repaired == report.quarantined == ()
    assert "could not be repaired" in report.notes[0]
    assert os.strerror(errno.EROFS) in report.notes[0]


CALLS = {"rename": 1, "replace": 1, "unlink": 1, "rmdir": 1, "mkdir": 5, "fsync": 9, "write": 7}


@pytest.mark.parametrize("call", CALLS)
def test_a_repair_that_is_killed_anywhere_is_finished_by_the_next(tmp_path, call, monkeypatch):
    pristine = make(tmp_path / "pristine")
    before = content(pristine)
    folder = part_of(pristine, KEYS[0])
    flip(folder / "final/frames/c/0/0", 3)
    flip(folder / "key/zarr.json", 3)
    (part_of(pristine, KEYS[5]) / "mean/frames/c/0/0").unlink()
    expected = {key: value for key, value in before.items() if key == KEYS[1] or key == KEYS[3]}
    real = getattr(os, call)
    for allowed in range(0, 400, CALLS[call]):
        root = tmp_path / "cache"
        shutil.copytree(tmp_path / "pristine", root)
        store = Store(root / pristine.name)
        calls = 0

        def killed(*args, _allowed=allowed, **kwargs):
            nonlocal calls
            calls += 1
            if calls > _allowed:
                raise Killed
            return real(*args, **kwargs)

        finished = True
        with monkeypatch.context() as patch:
            patch.setattr(os, call, killed)
            try:
                check(store, repair=True)
            except Killed:
                finished = False
        faults = check(store, repair=True).corrupt
        assert not faults or not finished
        assert check(store).corrupt == ()
        assert content(store) == expected
        shutil.rmtree(root)
        if finished:
            break
    assert finished
    assert allowed > 0 or call == "unlink"


class Killed(BaseException):
    """Stands for SIGKILL: nothing handles it."""


def test_a_copy_in_the_quarantine_is_never_overwritten(store):
    for number in (1, 2):
        name = parts(store)[0].name
        (store.path / "parts" / name / "zarr.json").write_text("{")
        (moved,) = check(store, repair=True).quarantined
        assert moved == f"{store.path}.quarantine/{name}-{number}"
        make(store.path.parent)
    assert staging.temporary_folder(store.path).exists() is False


def test_a_store_that_cannot_be_listed_is_reported(store, monkeypatch):
    real = os.scandir

    def refuse_root(path):
        if str(path) == str(store.path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse_root)
    report = check(store, repair=True)
    assert report.corrupt[0].reason == "cannot be read: Permission denied"
    assert report.quarantined == ()


def test_several_stores_are_verified_in_one_run(store, tmp_path):
    foreign = make(tmp_path / "other", OTHER)
    flip(parts(foreign)[0] / "final/frames/c/0/0", 3)
    report = verify([store, foreign], workers=2)
    assert (report.stores, report.parts, report.utterances) == (2, 4, 14 - len(report.lost))
    assert {fault.store for fault in report.corrupt} == {str(foreign.path)}
    with pytest.raises(StoreError, match="does not match its checksum"):
        [foreign.frames(key, "final") for key in KEYS]
