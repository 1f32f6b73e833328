"""The files are plain Zarr v3: zarr-python alone reads what we wrote, and sees the same damage."""

from __future__ import annotations

import numpy as np
import pytest
import strategies
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from mer.cache import layout, staging
from mer.cache.home import Cache
from mer.cache.spec import FeatureSpec, OutputSpec
from mer.cache.store import Store


@pytest.fixture(autouse=True)
def _without_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(staging, "_sync", lambda path: None)


def read_with_zarr(store: Store, key: bytes, output: str) -> np.ndarray:
    """Find an utterance with zarr-python alone, as ``FORMAT.md`` describes."""
    group = zarr.open_group(store.path, mode="r")
    for name in sorted(group["parts"].group_keys()):
        part = group["parts"][name]
        rows = np.flatnonzero((part["key"][:] == np.frombuffer(key, np.uint8)).all(axis=1))
        if len(rows):
            start, stop = part[output]["offsets"][rows[0] : rows[0] + 2]
            return part[output]["frames"][start:stop]
    raise KeyError(key)


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_zarr_reads_identical_arrays(tmp_path_factory, data):
    spec = data.draw(strategies.feature_specs())
    content = data.draw(
        st.dictionaries(strategies.keys, strategies.utterances(spec), min_size=1, max_size=4)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "CHUNK_FRAMES", data.draw(st.sampled_from([7, 16, 512])))
        store = Cache(tmp_path_factory.mktemp("cache")).open(spec, create=True)
        assert store is not None
        with store.writer() as writer:
            for number, (key, arrays) in enumerate(content.items()):
                writer.add(key, number, arrays)
                if number == 1:
                    writer.commit()
    for key in content:
        for output in spec.outputs:
            np.testing.assert_array_equal(
                read_with_zarr(store, key, output.name), store.frames(key, output.name), strict=True
            )


@pytest.fixture
def store(tmp_path):
    spec = FeatureSpec(
        slug="x", identity={"a": 1}, outputs=(OutputSpec(name="final", dim=3, rate_hz=50.0),)
    )
    store = Cache(tmp_path).open(spec, create=True)
    assert store is not None
    rng = np.random.default_rng(0)
    with store.writer() as writer:
        for _ in range(3):
            frames = rng.standard_normal((700, 3), dtype=np.float32)
            writer.add(rng.bytes(16), 700, {"final": frames})
    return store


def test_attributes_and_side_arrays_are_readable(store):
    group = zarr.open_group(store.path, mode="r")
    assert group.attrs["mer"]["identity"] == {"a": 1}
    assert group.attrs["mer"]["fingerprint"] == store.fingerprint
    part = group["parts"][store.parts()[0].id]
    assert part.attrs["mer"]["utterances"] == 3
    keys = [row.tobytes() for row in part["key"][:]]
    np.testing.assert_array_equal(part["input_length"][:], store.input_length(keys))
    np.testing.assert_array_equal(part["final/pooled"][:], store.pooled("final", keys))
    assert part["final/frames"].chunks == (512, 3)
    assert part["final/frames"].shards == (2560, 3)
    assert np.isnan(part["final/frames"].fill_value)


def test_zarr_finds_a_flipped_byte(store):
    shard = store.path / "parts" / store.parts()[0].id / "final/frames/c/0/0"
    data = bytearray(shard.read_bytes())
    data[5000] ^= 1
    shard.write_bytes(data)
    part = zarr.open_group(store.path, mode="r")["parts"][store.parts()[0].id]
    with pytest.raises(ValueError, match="checksum"):
        part["final/frames"][:]
