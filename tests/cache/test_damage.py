"""Damage is named, never read as numbers; what is sound stays readable."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from mer.cache import layout
from mer.cache.errors import DamagedStoreError, StoreError, StoreFormatError
from mer.cache.home import Cache
from mer.cache.spec import FeatureSpec, OutputSpec
from mer.cache.store import Store

SPEC = FeatureSpec(
    slug="test",
    identity={"name": "test"},
    outputs=(
        OutputSpec(name="final", dim=4, rate_hz=50.0),
        OutputSpec(name="code", dim=1, rate_hz=50.0, dtype="uint8", kind="codes"),
    ),
)
KEYS = [bytes([number]) * 16 for number in range(6)]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Two parts of three utterances of 700 frames."""
    store = Cache(tmp_path).open(SPEC, create=True)
    assert store is not None
    rng = np.random.default_rng(0)
    with store.writer() as writer:
        for number, key in enumerate(KEYS):
            final = rng.standard_normal((700, 4), dtype=np.float32)
            code = rng.integers(0, 256, (700, 1), dtype=np.uint8)
            writer.add(key, 700, {"final": final, "code": code})
            if number == 2:
                writer.commit()
    return store


def part(store: Store, key: bytes) -> Path:
    """The folder of the part that holds ``key``."""
    for folder in (store.path / "parts").iterdir():
        if folder.is_dir() and key in (folder / "key/c/0/0").read_bytes():
            return folder
    raise KeyError(key)


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 0x10
    file.write_bytes(data)


def reopen(store: Store) -> Store:
    again = Cache(store.path.parent).open(SPEC)
    assert again is not None
    return again


def test_a_flipped_byte_is_found_when_its_chunk_is_first_touched(store):
    shard = part(store, KEYS[0]) / "final/frames/c/0/0"
    flip(shard, 1600 * 8)  # in chunk 3 of 5, frames 1536 to 2047, utterance 2
    again = reopen(store)
    again.batch([KEYS[0], KEYS[1], *KEYS[3:]], "final")
    for read in (lambda: again.frames(KEYS[2], "final"), lambda: again.batch(KEYS, "final")):
        with pytest.raises(
            DamagedStoreError, match=rf"Chunk 3 of .*{shard.parent.parent}"
        ) as caught:
            read()
        assert caught.value.exit_code == 4
    again.batch(KEYS, "code")


@pytest.mark.parametrize("at", [-1, -10, -60])
def test_a_flipped_byte_in_the_shard_index_is_found(store, at):
    flip(part(store, KEYS[0]) / "final/frames/c/0/0", at)
    with pytest.raises(DamagedStoreError, match=r"The index of .*final/frames/c/0/0"):
        reopen(store).frames(KEYS[0], "final")


@pytest.mark.parametrize(
    ("file", "read"),
    [
        ("key/c/0/0", lambda s: s.contains(KEYS)),
        ("input_length/c/0", lambda s: s.input_length(KEYS)),
        ("final/offsets/c/0", lambda s: s.num_frames(KEYS, "final")),
        ("final/pooled/c/0/0/0", lambda s: s.pooled("final", KEYS)),
    ],
)
def test_a_flipped_byte_in_a_side_array_is_found(store, file, read):
    flip(part(store, KEYS[0]) / file, 3)
    again = reopen(store)
    with pytest.raises(DamagedStoreError, match=f"{file} does not match its checksum"):
        read(again)


def every_file(folder: Path) -> list[str]:
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())


def test_any_missing_file_is_named_at_opening(store):
    folder = part(store, KEYS[0])
    files = every_file(folder)
    assert len(files) == 17
    for name in files:
        hidden = (folder / name).rename(store.path / "hidden")
        with pytest.raises(DamagedStoreError, match=f"{folder.name}/{name} is missing"):
            reopen(store)
        hidden.rename(folder / name)
    assert len(reopen(store)) == 6


def test_any_truncated_file_is_named_at_opening(store):
    folder = part(store, KEYS[0])
    for name in every_file(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:-3])
        with pytest.raises(DamagedStoreError, match=f"{folder.name}/{name} (has|is not JSON)"):
            reopen(store)
        (folder / name).write_bytes(data)
    assert len(reopen(store)) == 6


def test_a_shard_lost_after_opening_is_no_silence(store):
    again = reopen(store)
    (part(store, KEYS[0]) / "final/frames/c/0/0").unlink()
    with pytest.raises(DamagedStoreError, match="final/frames/c/0/0 is missing"):
        again.batch(KEYS, "final")


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(lambda m: m["attributes"]["mer"].update(utterances=4), id="count"),
        pytest.param(lambda m: m["attributes"]["mer"]["files"].clear(), id="files"),
        pytest.param(lambda m: m["attributes"]["mer"].update(checksum="0" * 32), id="checksum"),
        pytest.param(lambda m: m["attributes"].update(more=1), id="foreign attribute"),
        pytest.param(lambda m: m.update(node_type="array"), id="node type"),
        pytest.param(lambda m: m["attributes"]["mer"].update(format=0), id="format"),
        pytest.param(lambda m: m["attributes"]["mer"].update(x=float("nan")), id="nan"),
    ],
)
def test_an_edited_manifest_is_found(store, edit):
    metadata = part(store, KEYS[0]) / "zarr.json"
    document = json.loads(metadata.read_text())
    edit(document)
    metadata.write_text(json.dumps(document))
    with pytest.raises(DamagedStoreError, match=f"{metadata} does not match its own checksum"):
        reopen(store)


def test_any_flipped_bit_of_the_manifest_is_found(store):
    metadata = part(store, KEYS[0]) / "zarr.json"
    data = metadata.read_bytes()
    sound = json.loads(data)
    rng = np.random.default_rng(0)
    for at in rng.integers(0, len(data), 100).tolist():
        damaged = bytearray(data)
        damaged[at] ^= 1 << int(rng.integers(8))
        metadata.write_bytes(damaged)
        try:
            harmless = json.loads(bytes(damaged)) == sound  # white space between tokens
        except ValueError:
            harmless = False
        if not harmless:
            with pytest.raises((DamagedStoreError, StoreFormatError), match=str(metadata)):
                reopen(store)


def test_damage_is_reported_by_info_and_does_not_hide_the_rest(store):
    folder = part(store, KEYS[0])
    (folder / "final/frames/c/0/0").unlink()
    (listed,) = Cache(store.path.parent).stores()
    info = listed.info()
    assert (info.utterances, info.parts) == (3, 1)
    assert len(info.damage) == 1
    assert f"{folder.name}/final/frames/c/0/0 is missing" in info.damage[0]


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        pytest.param(lambda p: (p / "zarr.json").unlink(), "no metadata", id="lost"),
        pytest.param(lambda p: (p / "zarr.json").write_text("{"), "is not JSON", id="cut"),
        pytest.param(lambda p: shutil.rmtree(p / "parts"), "no parts folder", id="no parts"),
    ],
)
def test_a_store_without_its_metadata_is_damaged(store, harm, message):
    harm(store.path)
    with pytest.raises(DamagedStoreError, match=message):
        reopen(store)
    (listed,) = Cache(store.path.parent).stores()
    assert message in listed.info().damage[0]


def rewrite(store: Store, **changes: object) -> None:
    """Write the store's attributes anew, sealed again."""
    metadata = store.path / "zarr.json"
    mer = json.loads(metadata.read_text())["attributes"]["mer"]
    metadata.write_bytes(layout.to_bytes(layout.group_document({**mer, **changes})))


def test_a_newer_format_asks_for_an_update(store):
    rewrite(store, format=layout.FORMAT_VERSION + 1)
    with pytest.raises(StoreFormatError, match="has format 2, .* Update mer") as caught:
        reopen(store)
    assert caught.value.exit_code == 2


def test_a_fingerprint_that_is_not_that_of_the_identity_is_damage(store):
    rewrite(store, identity={"name": "other"})
    with pytest.raises(DamagedStoreError, match="another fingerprint"):
        reopen(store)


def test_a_foreign_zarr_group_is_no_store(store):
    document = {"zarr_format": 3, "node_type": "group", "attributes": {}}
    (store.path / "zarr.json").write_text(json.dumps(document))
    with pytest.raises(StoreFormatError, match="not a store of mer"):
        reopen(store)


def test_a_part_that_was_merged_away_while_listing_is_no_damage(store, monkeypatch):
    folder = part(store, KEYS[0])
    again = Store(store.path)
    listed = again.place.part_names()
    monkeypatch.setattr(again.place, "part_names", lambda: listed)
    shutil.rmtree(folder)
    assert again.contains(KEYS).sum() == 3


def test_an_unreadable_part_is_an_error_of_its_own(store, monkeypatch):
    def refuse(path: str, *args: object, **options: object):
        raise PermissionError(13, "Permission denied", path)

    folder = store.parts()[0].id
    again = Store(store.path)
    assert again.spec == SPEC
    monkeypatch.setattr("mer.cache.reader.open", refuse, raising=False)
    with pytest.raises(StoreError, match=f"Cannot read .*{folder}/zarr.json: Permission"):
        again.refresh()


def equal_parts(root: Path) -> Store:
    """Two parts whose files have the same sizes: clips of one length."""
    store = Cache(root).open(SPEC, create=True)
    assert store is not None
    rng = np.random.default_rng(1)
    with store.writer() as writer:
        for number, key in enumerate(KEYS):
            final = rng.standard_normal((700, 4), dtype=np.float32)
            code = rng.integers(0, 256, (700, 1), dtype=np.uint8)
            writer.add(key, 700 + number, {"final": final, "code": code})
            if number == 2:
                writer.commit()
    return store


READS = {
    "final": lambda s, k: s.frames(k, "final"),
    "code": lambda s, k: s.frames(k, "code"),
    "pooled": lambda s, k: s.pooled("final", [k]),
    "length": lambda s, k: s.input_length([k]),
}


def test_exchanged_files_never_give_another_utterances_values(tmp_path):
    store = equal_parts(tmp_path / "cache")
    before = {name: [read(store, key) for key in KEYS] for name, read in READS.items()}
    first, second = (store.path / "parts" / part.id for part in store.parts())
    exchanged = [name for name in every_file(first) if (second / name).is_file()]
    assert len(exchanged) == 17
    noticed = set()
    for name in exchanged:
        assert (first / name).stat().st_size == (second / name).stat().st_size
        a, b = (first / name).read_bytes(), (second / name).read_bytes()
        (first / name).write_bytes(b)
        (second / name).write_bytes(a)
        for what, read in READS.items():
            for key, expected in zip(KEYS, before[what], strict=True):
                try:
                    got = read(Store(store.path), key)
                except DamagedStoreError:
                    noticed.add(name)
                    continue
                np.testing.assert_array_equal(got, expected)
        (first / name).write_bytes(a)
        (second / name).write_bytes(b)
    holding_data = {name for name in exchanged if "/c/" in name and "offsets" not in name}
    assert noticed == holding_data | {"zarr.json"}  # all else is equal in both parts


def test_exchanged_folders_of_parts_are_noticed(tmp_path):
    store = equal_parts(tmp_path / "cache")
    first, second = (store.path / "parts" / part.id for part in store.parts())
    first.rename(store.path / "x")
    second.rename(first)
    (store.path / "x").rename(second)
    with pytest.raises(DamagedStoreError, match=f"manifest of part {second.name}, not of this"):
        reopen(store)


def test_a_part_of_another_store_is_noticed(store, tmp_path):
    other = Cache(tmp_path / "other").open(
        FeatureSpec(slug="test", identity={"name": "another"}, outputs=SPEC.outputs), create=True
    )
    assert other is not None
    with other.writer() as writer:
        final, code = np.ones((5, 4), np.float32), np.ones((5, 1), np.uint8)
        writer.add(b"k" * 16, 5, {"final": final, "code": code})
    part = other.parts()[0].id
    shutil.copytree(other.path / "parts" / part, store.path / "parts" / part)
    with pytest.raises(DamagedStoreError, match=f"the fingerprint {other.fingerprint}, not to"):
        reopen(store)


def test_an_old_chunk_in_a_part_is_noticed(tmp_path):
    """A sound chunk, with its own checksum, that is not the one the manifest lists."""
    store = equal_parts(tmp_path / "cache")
    first, second = (
        store.path / "parts" / part.id / "final/frames/c/0/0" for part in store.parts()
    )
    size = 512 * 4 * 2 + 4
    first.write_bytes(second.read_bytes()[:size] + first.read_bytes()[size:])
    key = store.readers()[0].keys()[0].tobytes()
    with pytest.raises(DamagedStoreError, match="Chunk 0 of .* is not the one its part's manifest"):
        reopen(store).frames(key, "final")


def test_a_store_that_lost_its_metadata_gets_it_back_from_the_feature(store):
    (store.path / "zarr.json").rename(store.path.parent / "taken away")
    with pytest.raises(DamagedStoreError, match="zarr.json is missing: the store has no metadata"):
        reopen(store)
    again = Cache(store.path.parent).open(SPEC, create=True)
    assert again is not None
    assert again.contains(KEYS).all()
    assert again.info().damage == ()
