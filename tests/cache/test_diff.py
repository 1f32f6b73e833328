"""What differs between stores is named; what takes space is counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mer.cache import diff as diff_module
from mer.cache import layout, staging
from mer.cache.diff import ABSENT, diff
from mer.cache.errors import DamagedStoreError
from mer.cache.home import Cache
from mer.cache.spec import FeatureSpec, OutputSpec
from mer.cache.store import Store
from mer.cache.usage import total_usage, usage

OUTPUTS = (
    OutputSpec(name="final", dim=3, rate_hz=50.0),
    OutputSpec(name="code", dim=1, rate_hz=None, dtype="uint8", kind="codes"),
)
IDENTITY: dict[str, Any] = {
    "extractor": "test",
    "version": 1,
    "options": {"layers": ["final"], "window": {"size": 5, "overlap": 1}},
}


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def make(
    root: Path,
    numbers: range,
    identity: dict[str, Any] = IDENTITY,
    outputs: tuple[OutputSpec, ...] = OUTPUTS,
    shift: dict[int, float] | None = None,
    longer: tuple[int, ...] = (),
) -> Store:
    store = Cache(root).open(
        FeatureSpec(slug="test", identity=identity, outputs=outputs), create=True
    )
    assert store is not None
    with store.writer() as writer:
        for number in numbers:
            rng = np.random.default_rng(number)
            length = 10 * number + (number in longer)
            arrays: dict[str, np.ndarray] = {}
            for output in outputs:
                if output.kind == "codes":
                    arrays[output.name] = rng.integers(0, 99, (length, 1), dtype=np.uint8)
                else:
                    values = rng.integers(-4, 5, (length, output.dim)).astype(np.float32)
                    values[-1:] += np.float32((shift or {}).get(number, 0.0))
                    arrays[output.name] = values
            writer.add(key(number), length, arrays)
    return store


def test_a_store_equals_itself_and_its_copy(tmp_path):
    a, b = make(tmp_path / "a", range(5)), make(tmp_path / "b", range(5))
    seen: list[int] = []
    found = diff(a, b, progress=seen.append)
    assert found.equal
    assert (found.same, sum(seen), found.compared) == (5, 5, ("final", "code"))
    assert (found.a, found.b) == (str(a.path), str(b.path))
    assert diff(a, a).equal


def test_keys_that_only_one_has_are_listed(tmp_path):
    found = diff(make(tmp_path / "a", range(4)), make(tmp_path / "b", range(2, 6)))
    assert found.only_in_a == (key(0), key(1))
    assert found.only_in_b == (key(4), key(5))
    assert found.same == 2
    assert not found.equal


def test_different_values_are_measured_the_largest_first(tmp_path, monkeypatch):
    a = make(tmp_path / "a", range(1, 7))
    b = make(tmp_path / "b", range(1, 7), shift={2: 0.5, 5: 16.0})
    for batch_bytes in (1, 1 << 20):
        monkeypatch.setattr(diff_module, "_BATCH_BYTES", batch_bytes)
        found = diff(a, b)
        assert list(found.different) == ["final"]
        first, second = found.different["final"]
        assert (first.key, first.largest, first.frames) == (key(5), 16.0, (50, 50))
        assert (second.key, second.largest) == (key(2), 0.5)
        largest = float(np.abs(b.frames(key(5), "final").astype(np.float64)).max())
        assert first.relative == 16.0 / largest
        assert found.same == 4
    unread = diff(a, b, values=False)
    assert (unread.different, unread.in_both, unread.same) == ({}, 6, None)


def test_another_length_is_an_infinite_difference(tmp_path):
    found = diff(make(tmp_path / "a", range(3)), make(tmp_path / "b", range(3), longer=(2,)))
    assert {name: [d.key for d in its] for name, its in found.different.items()} == {
        "final": [key(2)],
        "code": [key(2)],
    }
    assert found.different["final"][0].largest == float("inf")
    assert found.different["final"][0].frames == (20, 21)


def test_identities_are_compared_key_by_key(tmp_path):
    other = {
        "extractor": "test",
        "version": 1.0,
        "options": {"layers": ["final", "layer_6"], "window": {"size": 9, "overlap": 1}, "new": 1},
    }
    found = diff(make(tmp_path / "a", range(1)), make(tmp_path / "b", range(1), other))
    assert found.identity == {
        "options.layers": (["final"], ["final", "layer_6"]),
        "options.new": (ABSENT, 1),
        "options.window.size": (5, 9),
        "version": (1, 1.0),
    }
    assert found.same == 1


def test_outputs_that_cannot_be_compared_are_named(tmp_path):
    outputs = (
        OutputSpec(name="final", dim=2, rate_hz=50.0),
        OUTPUTS[1],
        OutputSpec(name="more", dim=1, rate_hz=50.0),
    )
    a = make(tmp_path / "a", range(3))
    b = make(tmp_path / "b", range(3), {"name": "b"}, outputs)
    found = diff(a, b)
    assert found.compared == ("code",)
    assert set(found.outputs) == {"final", "more"}
    assert found.outputs["more"][0] == ABSENT
    assert "dim 3" in str(found.outputs["final"][0])
    assert "dim 2" in str(found.outputs["final"][1])


def test_types_do_not_matter_where_values_are_equal(tmp_path):
    single = (OutputSpec(name="final", dim=3, rate_hz=50.0, dtype="float32"),)
    a = make(tmp_path / "a", range(4), outputs=OUTPUTS[:1])
    b = make(tmp_path / "b", range(4), {"name": "b"}, single)
    found = diff(a, b)
    assert found.same == 4
    assert found.different == {}
    assert list(found.outputs) == ["final"]


def test_damage_is_no_difference(tmp_path):
    a, b = make(tmp_path / "a", range(4)), make(tmp_path / "b", range(4))
    (shard,) = b.path.glob("parts/*/final/frames/c/0/0")
    data = bytearray(shard.read_bytes())
    data[0] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DamagedStoreError, match="does not match its checksum"):
        diff(a, Store(b.path))


def size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def test_every_byte_of_a_store_is_counted_once(tmp_path):
    store = make(tmp_path, range(5))
    its = usage(store)
    assert its.total == size(tmp_path)
    shards = {o.name: f"parts/*/{o.name}/frames/c/0/0" for o in OUTPUTS}
    for name, pattern in shards.items():
        assert its.frames[name] == sum(f.stat().st_size for f in store.path.glob(pattern))
    pooled = store.path.glob("parts/*/final/pooled/c/0/0/0")
    assert its.pooled == sum(f.stat().st_size for f in pooled)
    assert its.metadata == sum(f.stat().st_size for f in store.path.rglob("zarr.json"))
    assert (its.parts, its.files, its.other) == (1, len(list(store.path.rglob("*.json"))) + 7, 0)


def test_what_lies_beside_a_store_is_counted_even_if_it_cannot_be_opened(tmp_path):
    store = make(tmp_path, range(5))
    (store.path / "zarr.json").write_text("{")
    temporary = staging.temporary_folder(store.path) / "x/content"
    quarantine = tmp_path / (store.name + layout.QUARANTINE_SUFFIX) / "part-1"
    for folder, count in ((temporary, 100), (quarantine, 20)):
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(bytes(count))
    (tmp_path / (store.name + layout.INDEX_SUFFIX)).write_bytes(bytes(3))
    (store.path / "mine").write_bytes(bytes(7))
    its = usage(Store(store.path))
    assert (its.temporary, its.quarantine, its.snapshot, its.other) == (100, 20, 3, 7)
    assert its.total == size(tmp_path)


def test_totals_add_up(tmp_path):
    a = usage(make(tmp_path / "a", range(5)))
    b = usage(make(tmp_path / "b", range(3), outputs=OUTPUTS[:1]))
    total = total_usage([a, b])
    assert total.total == a.total + b.total == size(tmp_path)
    assert total.frames["final"] == a.frames["final"] + b.frames["final"]
    assert (total.store, total.parts) == ("total", 2)
