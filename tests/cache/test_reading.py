"""The API of a notebook: one store by its URL, utterances by key, passes over all of it."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mer.cache
from mer.cache.errors import (
    DamagedStoreError,
    MissingFeatureError,
    UnknownNameError,
    UsageError,
)
from mer.cache.home import Cache
from mer.cache.spec import FeatureSpec, OutputSpec
from mer.cache.store import Store
from mer.cache.streaming import _blocks

FINAL = OutputSpec(name="final", dim=6, rate_hz=50.0)
LAYER = OutputSpec(name="layer_1", dim=3, rate_hz=50.0, dtype="float32")
CODE = OutputSpec(name="code", dim=1, rate_hz=50.0, dtype="uint16", kind="codes")
SPEC = FeatureSpec(
    slug="reading", identity={"name": "reading"}, outputs=(FINAL, LAYER, CODE), licence="CC0"
)


def numbered(n: int) -> bytes:
    return n.to_bytes(16, "little")


def arrays(rng: np.random.Generator, length: int) -> dict[str, np.ndarray]:
    return {
        "final": rng.standard_normal((length, 6), dtype=np.float32),
        "layer_1": rng.standard_normal((length, 3), dtype=np.float32),
        "code": rng.integers(0, 1000, (length, 1), dtype=np.uint16),
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty utterances of 0 to 900 frames in five parts."""
    root = tmp_path_factory.mktemp("reading")
    store = Cache(root).open(SPEC, create=True)
    assert store is not None
    rng = np.random.default_rng(0)
    with store.writer() as writer:
        for n in range(40):
            length = 0 if n == 7 else int(rng.integers(1, 900))
            writer.add(numbered(n), length, arrays(rng, length))
            if n % 8 == 7:
                writer.commit()
    return root


@pytest.fixture
def store(root: Path) -> Store:
    return Cache(root).stores()[0]


def test_a_store_opens_by_its_path_or_as_the_only_one_of_a_cache(root, store):
    for url in (store.path, str(store.path), root, f"file://{root}", f"{root}/"):
        opened = mer.cache.open(url)
        assert opened.path == store.path
        assert len(opened) == 40


def test_a_cache_of_two_stores_names_both(root, tmp_path):
    shutil.copytree(root, tmp_path / "two")
    other = FeatureSpec(slug="other", identity={"name": "o"}, outputs=(FINAL,))
    Cache(tmp_path / "two").open(other, create=True)
    with pytest.raises(UsageError, match="is a cache of 2 stores. Open one of them: other-.*, rea"):
        mer.cache.open(tmp_path / "two")
    cache = Cache(tmp_path / "two")
    assert cache["oth"].spec == other
    assert [s.name for s in cache] == [cache["other"].name, cache["reading"].name]
    with pytest.raises(UnknownNameError, match="Unknown store 'readin_'"):
        cache["readin_"]
    with pytest.raises(UsageError, match="2 stores begin with ''"):
        cache[""]


def test_no_store_is_said_so(tmp_path):
    with pytest.raises(UsageError, match="is a cache of 0 stores. `mer extract` makes them"):
        mer.cache.open(tmp_path)


def test_indexing_reads_the_final_output_or_the_one_named(store):
    for n in (0, 7, 39):
        key = numbered(n)
        np.testing.assert_array_equal(store[key], store.frames(key, "final"))
        np.testing.assert_array_equal(store[key, "layer_1"], store.frames(key, "layer_1"))
    assert store[numbered(7)].shape == (0, 6)
    with pytest.raises(MissingFeatureError, match="1 of 1 utterances are not in .*ffffffff"):
        store[b"\xff" * 16]
    with pytest.raises(UnknownNameError, match="Unknown output of feature 'reading' 'layer_2'"):
        store[numbered(0), "layer_2"]
    with pytest.raises(ValueError, match="A key has 3 bytes, expected 16"):
        store[b"abc"]


def test_without_a_final_output_one_must_be_named(tmp_path):
    spec = FeatureSpec(slug="x", identity={"name": "x"}, outputs=(LAYER, CODE))
    store = Cache(tmp_path).open(spec, create=True)
    assert store is not None
    with pytest.raises(UsageError, match="has the outputs layer_1, code; name one"):
        store.output()
    one = Cache(tmp_path).open(
        FeatureSpec(slug="y", identity={"name": "y"}, outputs=(LAYER,)), create=True
    )
    assert one is not None
    assert one.output() == LAYER


def test_keys_come_in_storage_order_each_once(store):
    keys = store.keys()
    assert sorted(keys) == sorted(numbered(n) for n in range(40))
    assert keys == list(store)
    ids = [part.id for part in store.readers()]
    assert ids == sorted(ids)
    in_parts = np.concatenate([part.keys() for part in store.readers()])
    assert b"".join(keys) == in_parts.tobytes()


def test_pooled_of_all_is_in_the_order_of_keys(store):
    every = store.pooled("final")
    assert every.shape == (40, 2, 6)
    np.testing.assert_array_equal(every, store.pooled("final", store.keys()))
    np.testing.assert_array_equal(every, store.pooled())
    some = store.keys()[3]
    np.testing.assert_allclose(every[3, 0], store[some].mean(0), rtol=1e-2, atol=1e-3)


def test_a_batch_goes_to_torch_without_a_copy(store):
    batch = store.batch([numbered(1), numbered(7), numbered(2)])
    data, lengths = batch.torch()
    assert data.data_ptr() == batch.data.ctypes.data
    assert lengths.tolist() == store.num_frames([numbered(1), numbered(7), numbered(2)]).tolist()
    mask = batch.mask()
    assert mask.sum(1).tolist() == lengths.tolist()
    assert (data[torch.from_numpy(~mask)] == 0).all()


@pytest.mark.parametrize("output", ["final", "layer_1", "code"])
def test_a_scan_yields_every_utterance_once_in_storage_order(store, output):
    for block_bytes in (1, 5000, 1 << 30):
        seen = list(store.scan(output, block_bytes=block_bytes))
        assert [key for key, _ in seen] == store.keys()
        for key, frames in seen:
            np.testing.assert_array_equal(frames, store.frames(key, output))
            assert frames.dtype == store.frames(key, output).dtype


def test_a_scan_of_some_keys_yields_each_once(store):
    wanted = [numbered(30), numbered(2), numbered(30), numbered(11)]
    keys = [key for key, _ in store.scan("final", wanted)]
    assert keys == [key for key in store if key in set(wanted)]
    with pytest.raises(MissingFeatureError, match="1 of 2 utterances are not in"):
        list(store.scan("final", [numbered(1), numbered(99)]))


@settings(max_examples=30)
@given(
    batch_size=st.integers(1, 50),
    seed=st.integers(0, 9),
    block_bytes=st.sampled_from([1, 3000, 20_000, 1 << 30]),
    buffer_blocks=st.integers(1, 9),
)
def test_an_epoch_yields_every_utterance_once(root, batch_size, seed, block_bytes, buffer_blocks):
    store = Cache(root).stores()[0]
    options = {"block_bytes": block_bytes, "buffer_blocks": buffer_blocks}
    seen = []
    for keys, batch in store.epoch(batch_size, "final", seed=seed, dtype="float16", **options):
        alone = store.batch(keys, "final", "float16")
        np.testing.assert_array_equal(batch.data, alone.data)
        assert batch.lengths.tolist() == alone.lengths.tolist()
        seen.append(keys)
    assert [len(keys) for keys in seen[:-1]] == [batch_size] * (len(seen) - 1)
    assert sorted(key for keys in seen for key in keys) == sorted(store.keys())
    again = [keys for keys, _ in store.epoch(batch_size, "final", seed=seed, **options)]
    assert again == seen


def test_epochs_differ_by_seed_and_from_storage_order(store):
    orders = [
        [key for keys, _ in store.epoch(4, "final", seed=seed) for key in keys] for seed in (0, 1)
    ]
    assert orders[0] != orders[1]
    assert store.keys() not in orders


def test_an_epoch_needs_a_batch_size(store):
    with pytest.raises(ValueError, match="batch_size=0, buffer_blocks=8: expected ≥ 1"):
        next(store.epoch(0))


def test_blocks_hold_about_what_was_asked_for():
    lengths = np.array([10, 10, 10, 100, 1, 0, 5])
    blocks = [lengths[block].tolist() for block in _blocks(lengths, FINAL, 20 * 6 * 2)]
    assert [n for block in blocks for n in block] == lengths.tolist()
    assert blocks == [[10, 10], [10, 100], [1, 0, 5]]
    assert _blocks(lengths[:0], FINAL, 100) == []


@pytest.mark.parametrize("output", ["final", "layer_1", "code"])
def test_dask_holds_all_frames_in_storage_order(store, output):
    flat = store.dask(output)
    expected = np.concatenate([frames for _, frames in store.scan(output)])
    assert flat.shape == expected.shape
    assert flat.numblocks == (5, 1)
    got = flat.compute(scheduler="synchronous")
    assert got.dtype == flat.dtype == (np.uint16 if output == "code" else np.float32)
    np.testing.assert_array_equal(got, expected)
    as_stored = store.dask(output, expected.dtype).compute(scheduler="processes")
    assert as_stored.dtype == expected.dtype
    np.testing.assert_array_equal(as_stored, expected)
    mean = flat.astype("float64").mean(0).compute(scheduler="threads")
    np.testing.assert_allclose(mean, expected.astype("float64").mean(0))


def test_what_is_stored_twice_counts_once(root, tmp_path):
    shutil.copytree(root, tmp_path / "twice")
    store = Cache(tmp_path / "twice").stores()[0]
    stale = Store(store.path)
    assert len(stale) == 40
    rng = np.random.default_rng(5)
    with store.writer() as first, stale.writer() as second:
        for n in (50, 51, 52):
            values = arrays(rng, 30)
            first.add(numbered(n), 30, values)
            if n != 51:
                second.add(numbered(n), 30, values)
    store.refresh()
    assert sum(part.utterances for part in store.parts()) == 45
    assert len(store) == len(store.keys()) == len(store.pooled("final")) == 43
    assert len(store.dask("final")) == store.num_frames(store.keys(), "final").sum()
    np.testing.assert_array_equal(
        store.dask("final").compute(scheduler="synchronous"),
        np.concatenate([frames for _, frames in store.scan("final")]),
    )


def test_sums_over_half_precision_do_not_overflow(tmp_path):
    spec = FeatureSpec(slug="ones", identity={"name": "ones"}, outputs=(FINAL,))
    store = Cache(tmp_path).open(spec, create=True)
    assert store is not None
    with store.writer() as writer:
        writer.add(numbered(0), 1, {"final": np.full((90_000, 6), 3, np.float32)})
    assert store.dask().mean(0).compute(scheduler="synchronous").tolist() == [3] * 6
    assert float(store.xarray().mean()) == 3


def test_an_empty_store_has_empty_everything(tmp_path):
    store = Cache(tmp_path).open(SPEC, create=True)
    assert store is not None
    assert store.keys() == [] == list(store.scan("final")) == list(store.epoch(4))
    assert store.dask("final").compute().shape == (0, 6)
    assert store.pooled("final").shape == (0, 2, 6)
    assert store.xarray("final").shape == (0, 6)


def test_xarray_names_what_is_what(store):
    labelled = store.xarray("final")
    assert labelled.dims == ("frame", "feature")
    assert labelled.attrs["fingerprint"] == store.fingerprint
    assert labelled.attrs["licence"] == "CC0"
    third = labelled.where(labelled.utterance == 2, drop=True).compute()
    np.testing.assert_array_equal(third.values, store[store.keys()[2]])


def test_a_reader_survives_that_its_part_was_merged_away(root, tmp_path):
    shutil.copytree(root, tmp_path / "merged")
    store = Cache(tmp_path / "merged").stores()[0]
    keys = store.keys()
    before = {key: store.frames(key, "final") for key in keys}
    reader = Store(store.path)
    assert len(reader) == 40  # has listed the parts, read none of their frames
    first = store.readers()[0]
    rewritten = Cache(tmp_path / "other").open(SPEC, create=True)
    assert rewritten is not None
    with rewritten.writer() as writer:
        for row in (*first.keys(), *store.readers()[1].keys()):
            key = row.tobytes()
            values = {o.name: store.frames(key, o.name) for o in SPEC.outputs}
            values["final"] = values["final"].astype(np.float32)
            writer.add(key, len(values["final"]), values)
    merged = next((rewritten.path / "parts").glob("?" * 32))
    merged.rename(store.path / "parts" / merged.name)
    for part in store.readers()[:2]:
        shutil.rmtree(store.path / "parts" / part.id)
    for key in keys:
        np.testing.assert_array_equal(reader.frames(key, "final"), before[key])
    reader = Store(store.path)
    scan = reader.scan("final")
    assert dict(scan).keys() == set(keys)


def test_a_part_that_was_pickled_verifies_anew(root, tmp_path):
    shutil.copytree(root, tmp_path / "flipped")
    [part, *_] = Cache(tmp_path / "flipped").stores()[0].readers()
    frames = part.frames("final", 0, 100)
    again = pickle.loads(pickle.dumps(part))
    np.testing.assert_array_equal(again.frames("final", 0, 100), frames)
    data = pickle.dumps(part)
    shard = Path(part.where, "final/frames/c/0/0")
    flipped = bytearray(shard.read_bytes())
    flipped[100] ^= 1
    shard.write_bytes(flipped)
    with pytest.raises(DamagedStoreError, match="Chunk 0 of .* does not match its checksum"):
        pickle.loads(data).frames("final", 0, 100)


def test_keys_may_come_from_any_iterable(store):
    keys = store.keys()[:5]
    assert store.contains(key for key in keys).all()
    assert len(store.contains(iter(keys))) == 5
    assert len(store.batch(dict.fromkeys(keys).keys()).lengths) == 5
    assert store.num_frames(map(bytes, keys)).tolist() == store.num_frames(keys).tolist()
    assert len(store.pooled("final", iter(keys))) == 5
    assert sum(len(k) for k, _ in store.epoch(2, keys=iter(keys))) == 5


@pytest.mark.parametrize("key", ["a" * 16, 0, None, "00" * 16])
def test_what_is_no_key_is_told_how_to_find_one(store, key):
    with pytest.raises(TypeError, match="is no key: a key is 16 bytes. .*utterance_keys finds"):
        store[key]
    with pytest.raises(TypeError, match="is no key"):
        store.batch([key])


def test_codes_are_read_as_they_are_declared(store):
    assert store.batch([numbered(1)], "code").data.dtype == np.uint16
    assert store.batch([numbered(1)], "final").data.dtype == np.float32


def test_a_store_that_is_not_there_is_no_damage(tmp_path):
    with pytest.raises(UsageError, match="There is no store at .*gone-0123456789abcdef. `mer ca"):
        mer.cache.open(tmp_path / "gone-0123456789abcdef")


def test_a_store_opens_under_any_name(root, store, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(store.path)
    assert len(mer.cache.open(tmp_path / "link")) == 40
    monkeypatch.chdir(store.path)
    assert len(mer.cache.open(".")) == 40
    monkeypatch.setenv("MER_CACHE", str(root))
    assert len(mer.cache.open()) == 40


def test_a_linked_store_is_written_where_it_lies(root, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(root, moved)
    [store] = Cache(moved).stores()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / store.name).symlink_to(store.path)
    linked = Cache(tmp_path / "cache").open(SPEC)
    assert linked is not None
    with linked.writer() as writer:
        writer.add(numbered(99), 3, arrays(np.random.default_rng(0), 3))
    assert numbered(99) in Store(store.path)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [store.name]


def test_a_forked_child_widens_without_the_threads_of_its_parent(store):
    import os

    keys = store.keys()
    expected = store.batch(keys).data.sum()
    torch.ones(10_000_000).half().float()  # torch's own threads are running
    child = os.fork()
    if not child:
        os._exit(0 if store.batch(keys).data.sum() == expected else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_stores_and_their_readers_are_pickled_as_where_they_lie(store):
    again = pickle.loads(pickle.dumps(store))
    assert again.path == store.path
    assert again.keys() == store.keys()


def test_widening_is_exact_whoever_does_it(monkeypatch):
    from mer.cache import casting

    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = np.tile(every[np.isfinite(every)], 2)
    outs = []
    for modules in ({}, {"torch": torch}):
        monkeypatch.setattr(casting.sys, "modules", modules)
        wide = np.empty(finite.shape, np.float32)
        casting.copy_into(wide, casting.readable(finite))
        np.testing.assert_array_equal(wide, finite.astype(np.float32))
        back = np.empty(finite.shape, np.float16)
        rng = np.random.default_rng(0)
        noisy = (wide * rng.uniform(0.9, 1.1, wide.shape)).astype(np.float32)
        casting.copy_into(back, noisy)
        outs.append(back.view(np.uint16))
    np.testing.assert_array_equal(*outs)
