"""Names, keys and bytes on disk are a promise: what one release stored the next one finds.

A difference here makes existing caches misses or unreadable: raise the format version instead.
To write the files anew after such a decision:
``MER_WRITE_GOLDEN=1 pytest tests/cache/test_golden.py``.

``golden/release-1`` is a store as the first release wrote it, whose manifests know neither their
store and part nor the checksums of chunks. It is never written anew.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from mer.cache import home as home_module
from mer.cache import layout
from mer.cache.errors import DamagedStoreError
from mer.cache.home import Cache
from mer.cache.identity import audio_key, fingerprint, normalise_text, store_name, text_key
from mer.cache.spec import FeatureSpec, OutputSpec
from mer.cache.store import Store

GOLDEN = Path(__file__).parent / "golden"
DEFAULT_CHUNK_FRAMES = layout.CHUNK_FRAMES

IDENTITIES: list[dict[str, Any]] = [
    {"name": "logmel", "version": 1},
    {"name": "x", "options": {"layers": ["final", "layer_6"], "window_s": 0.025, "pad": None}},
    {"name": "é", "on": True, "size": 1.0, "count": 1, "nested": [[], {}]},
]
SEGMENTS: list[tuple[float | None, float | None, int | None]] = [
    (None, None, None),
    (0.0, None, None),
    (1.5, 3.25, None),
    (1.5, 3.25, 0),
    (1 / 192_000, None, 1),
]
TEXTS = ["", "Kids are talking by the door", "  Dogs\tare  sitting \n", "cafe\u0301", "東京"]
SPEC = FeatureSpec(
    slug="golden",
    identity={"name": "golden", "version": 1},
    outputs=(
        OutputSpec(name="final", dim=3, rate_hz=50.0),
        OutputSpec(name="large", dim=1, rate_hz=None),
        OutputSpec(name="code", dim=1, rate_hz=100.0, dtype="uint8", kind="codes", num_codes=256),
        OutputSpec(
            name="functionals",
            dim=2,
            rate_hz=None,
            dtype="float32",
            kind="pooled",
            columns=("a", "b"),
        ),
    ),
    licence="none",
)


def compare(name: str, found: Any) -> None:
    """Hold ``found`` against a golden file."""
    path = GOLDEN / name
    if os.environ.get("MER_WRITE_GOLDEN"):
        path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    assert found == json.loads(path.read_text(encoding="utf-8"))


def test_names_and_keys():
    content = bytes(range(16))
    found = {
        "fingerprints": [[identity, fingerprint(identity)] for identity in IDENTITIES],
        "store": store_name(SPEC),
        "audio": [[*segment, audio_key(content, *segment).hex()] for segment in SEGMENTS],
        "text": [[text, normalise_text(text), text_key(text).hex()] for text in TEXTS],
    }
    compare("keys.json", found)


def test_files_of_a_store(tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "CHUNK_FRAMES", DEFAULT_CHUNK_FRAMES)
    monkeypatch.setattr(home_module, "_now", lambda: "2025-01-01T00:00:00+00:00")
    store = Cache(tmp_path).open(SPEC, create=True)
    assert store is not None
    with store.writer() as writer:
        for number, length in enumerate((600, 1, 3)):
            steps = np.arange(length, dtype=np.float32)[:, None]
            arrays = {
                "final": steps % 8 + np.array([0, 1, 2], np.float32),
                "large": steps * 0 + 100_000,
                "code": np.arange(length)[:, None] % 256,
                "functionals": np.array([[number, 0.5]], np.float32),
            }
            writer.add(bytes([number]) * 16, 320 * length, arrays)
    found: dict[str, Any] = {}
    for path in sorted(tmp_path.rglob("*")):
        if path.name == "zarr.json":
            found[path.relative_to(tmp_path).as_posix()] = json.loads(path.read_text())
        elif path.is_file():
            data = path.read_bytes()
            record = {"bytes": len(data), "xxh3": xxhash.xxh3_128_hexdigest(data)}
            found[path.relative_to(tmp_path).as_posix()] = record
    compare("layout.json", found)


@pytest.fixture
def first_release(tmp_path: Path) -> Store:
    """A copy of the store that the first release wrote."""
    shutil.copytree(GOLDEN / "release-1", tmp_path / "cache")
    store = Cache(tmp_path / "cache").open(SPEC)
    assert store is not None
    return store


LENGTHS = (600, 1, 3, 0, 520)


def golden_arrays(number: int) -> dict[str, np.ndarray]:
    """What was stored of an utterance."""
    length = LENGTHS[number]
    steps = np.arange(length, dtype=np.float32)[:, None]
    return {
        "final": steps % 8 + np.array([0, 1, 2], np.float32) + number,
        "large": steps * 0 + 100_000 * (number < 3),
        "code": np.arange(length)[:, None] % 256,
        "functionals": np.array([[number, 0.5]], np.float32),
    }


def test_a_store_of_the_first_release_is_read(first_release):
    store = first_release
    assert all("store" not in part.manifest for part in store.readers())
    keys = [bytes([number]) * 16 for number in range(5)]
    assert store.spec == SPEC
    assert store.info().damage == ()
    assert store.input_length(keys).tolist() == [320 * n for n in LENGTHS]
    for number, key in enumerate(keys):
        for name, expected in golden_arrays(number).items():
            np.testing.assert_array_equal(store.frames(key, name), expected)
    np.testing.assert_array_equal(store.pooled("final", keys)[1], [[1, 2, 3], [0, 0, 0]])


def test_a_store_of_the_first_release_grows(first_release):
    with first_release.writer() as writer:
        for number in range(5):  # stored already: skipped
            writer.add(bytes([number]) * 16, 1, golden_arrays(number))
        writer.add(b"new utterance 16", 320, golden_arrays(1))
    store = Store(first_release.path)
    assert [part.utterances for part in store.parts()].count(1) == 1
    np.testing.assert_array_equal(store.frames(b"new utterance 16", "final"), [[1, 2, 3]])
    np.testing.assert_array_equal(
        store.frames(bytes(16), "final"), golden_arrays(0)["final"].astype(np.float16)
    )


def test_exchanged_shards_of_the_first_release_are_noticed(first_release):
    """Their chunks are sound in themselves and their manifests do not know them by checksum."""
    parts = first_release.path / "parts"
    shards = [parts / part.id / "functionals/frames/c/0/0" for part in first_release.readers()]
    shards[0].write_bytes(shards[1].read_bytes()[:20] + shards[0].read_bytes()[20:])
    [part, _] = first_release.readers()
    with pytest.raises(DamagedStoreError, match="is not the file its part's manifest lists"):
        Store(first_release.path).frames(part.keys()[0].tobytes(), "functionals")


def test_a_whole_foreign_shard_in_a_part_of_the_first_release_is_noticed(first_release, tmp_path):
    """Sound in every chunk, with other values."""
    other = Cache(tmp_path / "other").open(SPEC, create=True)
    assert other is not None
    with other.writer() as writer:
        for number in range(3):
            arrays = golden_arrays(number)
            arrays["final"] = arrays["final"] + 1
            writer.add(bytes([number]) * 16, 320 * LENGTHS[number], arrays)
    foreign = Path(other.readers()[0].where, "final/frames/c/0/0")
    [part] = [p for p in first_release.readers() if p.num_frames("final") == 604]
    shard = Path(part.where, "final/frames/c/0/0")
    assert shard.stat().st_size == foreign.stat().st_size
    shutil.copyfile(foreign, shard)
    with pytest.raises(DamagedStoreError, match="is not the file its part's manifest lists"):
        Store(first_release.path).frames(bytes(16), "final")
