"""The store as its users see it: what was written is read, once, and by the right name."""

from __future__ import annotations

import logging
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mer.cache import reader
from mer.cache.errors import (
    MissingFeatureError,
    StoreFormatError,
    UnknownNameError,
    UsageError,
)
from mer.cache.home import Cache
from mer.cache.spec import FeatureSpec, OutputSpec
from mer.cache.store import Store

SPEC = FeatureSpec(
    slug="test",
    identity={"name": "test", "version": 1},
    outputs=(
        OutputSpec(name="final", dim=5, rate_hz=50.0),
        OutputSpec(name="code", dim=1, rate_hz=100.0, dtype="uint16", kind="codes", num_codes=257),
        OutputSpec(
            name="functionals",
            dim=2,
            rate_hz=None,
            dtype="float32",
            kind="pooled",
            columns=("a", "b"),
        ),
    ),
    licence="for tests",
)
Utterance = dict[str, np.ndarray]


def utterance(number: int, num_frames: int | None = None) -> tuple[bytes, Utterance]:
    """A key and arrays that follow from ``number``."""
    rng = np.random.default_rng(number)
    length = int(rng.integers(1, 1300)) if num_frames is None else num_frames
    arrays = {
        "final": rng.standard_normal((length, 5), dtype=np.float32),
        "code": rng.integers(0, 257, (2 * length, 1)),
        "functionals": rng.standard_normal((1, 2), dtype=np.float32),
    }
    return rng.bytes(16), arrays


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


@pytest.fixture
def store(cache: Cache) -> Store:
    store = cache.open(SPEC, create=True)
    assert store is not None
    return store


@pytest.fixture
def filled(store: Store) -> tuple[Store, dict[bytes, Utterance]]:
    """A store of nine utterances in three parts, and what it should hold."""
    content = dict(utterance(number) for number in range(9))
    with store.writer() as writer:
        for number, (key, arrays) in enumerate(content.items()):
            writer.add(key, 160 * len(arrays["final"]), arrays)
            if number % 3 == 2:
                writer.commit()
    return store, content


def test_what_was_written_is_read(filled):
    store, content = filled
    assert len(store) == 9
    assert len(store.parts()) == 3
    for key, arrays in content.items():
        final = store.frames(key, "final")
        assert final.dtype == np.float16
        np.testing.assert_array_equal(final, arrays["final"].astype(np.float16))
        np.testing.assert_array_equal(store.frames(key, "code"), arrays["code"])
        np.testing.assert_array_equal(store.frames(key, "functionals"), arrays["functionals"])
    keys = list(content)
    expected = [len(arrays["final"]) for arrays in content.values()]
    assert store.num_frames(keys, "final").tolist() == expected
    assert store.input_length(keys).tolist() == [160 * n for n in expected]


def test_batch_is_padded_with_zeros_in_the_order_asked_for(filled):
    store, content = filled
    keys = [list(content)[i] for i in (7, 0, 3, 0)]
    data, lengths = store.batch(keys, "final")
    assert data.dtype == np.float32
    assert data.shape == (4, lengths.max(), 5)
    for row, length, key in zip(data, lengths, keys, strict=True):
        np.testing.assert_array_equal(row[:length], content[key]["final"].astype(np.float16))
        assert not row[length:].any()


def test_batch_into_a_dirty_array_gives_the_same(filled):
    store, content = filled
    keys = list(content)
    expected, lengths = store.batch(keys, "final", "float16")
    out = np.full(expected.size + 7, 9, np.float16)
    data, again = store.batch(keys, "final", "float16", out)
    assert np.shares_memory(data, out)
    np.testing.assert_array_equal(data, expected)
    np.testing.assert_array_equal(again, lengths)
    with pytest.raises(ValueError, match=r"out is float32 .* expected contiguous float16"):
        store.batch(keys, "final", "float16", out.astype(np.float32))
    with pytest.raises(ValueError, match="of at least"):
        store.batch(keys, "final", "float16", out[:10])


def test_batch_of_nothing_is_empty(filled):
    data, lengths = filled[0].batch([], "final")
    assert data.shape == (0, 0, 5)
    assert lengths.shape == (0,)


def test_codes_come_as_integers_but_never_wrap(filled):
    store, content = filled
    key = next(iter(content))
    data, _ = store.batch([key], "code", "int64")
    assert data.dtype == np.int64
    np.testing.assert_array_equal(data[0], content[key]["code"])
    with pytest.raises(ValueError, match="stored as uint16; uint8 cannot hold"):
        store.batch([key], "code", "uint8")
    with pytest.raises(ValueError, match="stored as float16; int64 cannot hold"):
        store.batch([key], "final", "int64")


def test_pooled_is_mean_and_population_deviation_of_the_exact_frames(filled):
    store, content = filled
    keys = list(content)[::-1]
    pooled = store.pooled("final", keys)
    assert pooled.dtype == np.float32
    for row, key in zip(pooled, keys, strict=True):
        exact = content[key]["final"].astype(np.float64)
        np.testing.assert_allclose(row[0], exact.mean(0), rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(row[1], exact.std(0), rtol=1e-6, atol=1e-7)
    with pytest.raises(ValueError, match="'code' is of kind 'codes'"):
        store.pooled("code", keys)


def test_an_utterance_without_frames_has_no_mean(store):
    key, arrays = utterance(0, num_frames=0)
    with store.writer() as writer:
        writer.add(key, 0, arrays)
    assert store.frames(key, "final").shape == (0, 5)
    assert np.isnan(store.pooled("final", [key])).all()


def test_keys_that_are_not_there_are_named(filled):
    store, content = filled
    unknown, _ = utterance(99)
    key = next(iter(content))
    assert store.contains([key, unknown]).tolist() == [True, False]
    assert key in store
    assert unknown not in store
    with pytest.raises(MissingFeatureError, match=f"1 of 2 utterances .* {unknown.hex()}"):
        store.batch([key, unknown], "final")
    with pytest.raises(UnknownNameError, match="Did you mean 'final'"):
        store.frames(key, "finall")
    with pytest.raises(ValueError, match="3 bytes, expected 16"):
        store.contains([key, b"abc"])


def test_keys_that_share_their_first_half_are_told_apart(store):
    keys = [bytes(8) + bytes([number] * 8) for number in (5, 0, 9)] + [bytes([255] * 16)]
    with store.writer() as writer:
        for number, key in enumerate(keys):
            writer.add(key, number, utterance(number, 3)[1])
    assert store.input_length(keys[::-1]).tolist() == [3, 2, 1, 0]
    absent = [bytes(8) + bytes([4] * 8), bytes(8) + bytes([255] * 8), bytes([9] * 16)]
    assert store.contains(absent).tolist() == [False] * 3


def test_an_utterance_is_stored_once(filled):
    store, content = filled
    new, arrays = utterance(50)
    key = next(iter(content))
    with store.writer() as writer:
        writer.add(new, 1, arrays)
        writer.add(key, 2, arrays)
        writer.add(new, 3, arrays)
    assert len(store) == 10
    assert sum(part.utterances for part in store.parts()) == 10
    assert store.input_length([new]).tolist() == [1]


def test_of_two_writers_the_first_part_is_read(cache, store):
    (first, one), (second, two) = utterance(1), utterance(2)
    shared, arrays = utterance(3)
    other = cache.open(SPEC)
    with store.writer() as a, other.writer() as b:
        a.add(first, 1, one)
        a.add(shared, 1, arrays)
        b.add(second, 2, two)
        b.add(shared, 2, arrays)
    store.refresh()
    assert len(store) == 3
    assert [part.utterances for part in store.parts()] == [2, 2]
    order = [part.id for part in store.parts()]
    expected = (
        1 if (store.path / "parts" / order[0] / "key/c/0/0").read_bytes().startswith(first) else 2
    )
    assert store.input_length([shared]).tolist() == [expected]
    assert store.info().utterances == 3


def test_a_retried_task_commits_the_same_part(cache, store):
    tasks = [utterance(number) for number in range(3)]
    retry = cache.open(SPEC)
    with store.writer() as first, retry.writer() as second:
        for writer in (first, second):
            for key, arrays in tasks:
                writer.add(key, 1, arrays)
    assert [p.name for p in (store.path / "parts").iterdir() if p.is_dir()] == [store.parts()[0].id]
    assert not store.path.with_name(store.name + ".tmp").exists()


def test_parts_of_others_appear_with_refresh(cache, store):
    other = cache.open(SPEC)
    key, arrays = utterance(1)
    with store.writer() as writer:
        writer.add(key, 1, arrays)
    assert key in store
    assert key not in other
    other.refresh()
    assert key in other


def test_a_part_is_committed_by_size(store):
    with store.writer(part_bytes=20_000) as writer:
        for number in range(4):
            writer.add(*_sized(number, 1000))
    assert [part.utterances for part in store.parts()] == [2, 2]


def _sized(number: int, num_frames: int) -> tuple[bytes, int, Utterance]:
    key, arrays = utterance(number, num_frames)  # 10 kB of frames, 4 kB of codes per 1000
    return key, num_frames, arrays


def test_a_part_is_committed_by_time(store):
    with store.writer(part_seconds=0) as writer:
        writer.add(*_sized(0, 3))
        writer.add(*_sized(1, 3))
    assert [part.utterances for part in store.parts()] == [1, 1]


@pytest.mark.parametrize("error", [RuntimeError("model"), KeyboardInterrupt("ctrl-c")])
def test_leaving_by_an_exception_commits_what_was_added(store, error):
    def extract() -> None:
        with store.writer() as writer:
            writer.add(*_sized(0, 3))
            raise error

    with pytest.raises(type(error), match=str(error)):
        extract()
    assert len(store) == 1


def test_a_value_beyond_float16_makes_its_part_float32(store, caplog):
    small, large = utterance(0, 4), utterance(1, 4)
    large[1]["final"][2, 3] = 70_000.0
    with caplog.at_level(logging.WARNING), store.writer() as writer:
        writer.add(small[0], 1, small[1])
        writer.commit()
        assert not caplog.records
        writer.add(large[0], 1, large[1])
    assert f"'final' of {store.name} reaches 7e+04" in caplog.text
    np.testing.assert_array_equal(store.frames(large[0], "final"), large[1]["final"])
    assert store.frames(small[0], "final").dtype == np.float16
    assert store.info().outputs["final"].dtypes == ("float16", "float32")
    data, _ = store.batch([small[0], large[0]], "final")
    assert data.max() == 70_000.0
    with pytest.raises(ValueError, match="beyond float16; ask for float32"):
        store.batch([large[0]], "final", "float16")
    assert store.batch([small[0]], "final", "float16")[0].dtype == np.float16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"final": np.full((2, 5), np.nan)}, "'final' holds NaN", id="nan"),
        pytest.param({"final": np.full((2, 5), -np.inf)}, "'final' holds NaN or an inf", id="inf"),
        pytest.param({"final": np.zeros((2, 4))}, r"shape \(2, 4\), expected \(T, 5\)", id="width"),
        pytest.param({"final": np.zeros(5)}, r"shape \(5,\)", id="one dimension"),
        pytest.param({"final": np.zeros((2, 5), int)}, "type int64, expected float", id="ints"),
        pytest.param(
            {"code": np.full((2, 1), 257)}, "from 257 to 257, expected 0 to 256", id="code"
        ),
        pytest.param({"code": np.full((2, 1), -1)}, "from -1 to -1", id="negative code"),
        pytest.param({"code": np.zeros((2, 1))}, "type float64, expected integers", id="floats"),
        pytest.param({"functionals": np.zeros((2, 2))}, "2 rows; a pooled output", id="pooled"),
        pytest.param({"extra": np.zeros((1, 1))}, "'extra'", id="unknown output"),
    ],
)
def test_bad_arrays_are_refused_and_nothing_is_added(store, change, message):
    key, arrays = utterance(0, 2)
    with store.writer() as writer:
        with pytest.raises(ValueError, match=message):
            writer.add(key, 1, {**arrays, **change})
        writer.add(key, 7, arrays)
    assert store.input_length([key]).tolist() == [7]


def test_added_arrays_may_be_reused_by_the_caller(store):
    key, arrays = utterance(0, 4)
    expected = arrays["final"].astype(np.float16)
    with store.writer() as writer:
        writer.add(key, 1, arrays)
        arrays["final"][:] = 0
    np.testing.assert_array_equal(store.frames(key, "final"), expected)


def test_a_store_is_found_under_another_slug(cache, filled):
    store, _ = filled
    again = cache.open(replace(SPEC, slug="renamed"))
    assert again is not None
    assert again.path == store.path
    other = {**SPEC.identity, "version": 2}
    assert cache.open(replace(SPEC, identity=other)) is None


def test_the_spec_is_read_back(store):
    assert Store(store.path).spec == SPEC


def test_outputs_that_change_without_a_new_version_are_refused(cache, store):
    wider = (replace(SPEC.outputs[0], dim=6), *SPEC.outputs[1:])
    with pytest.raises(StoreFormatError, match="must raise its version"):
        cache.open(replace(SPEC, outputs=wider))
    with pytest.raises(StoreFormatError, match="3 outputs, the extractor now yields 2"):
        cache.open(replace(SPEC, outputs=SPEC.outputs[:2]))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        pytest.param(OutputSpec(name="a/b", dim=1, rate_hz=None), "'a/b'", id="slash"),
        pytest.param(OutputSpec(name="key", dim=1, rate_hz=None), "'key'", id="reserved"),
        pytest.param(OutputSpec(name="a", dim=0, rate_hz=None), "width 0", id="width"),
        pytest.param(OutputSpec(name="a", dim=1, rate_hz=None, dtype="int8"), "int8", id="type"),
        pytest.param(
            OutputSpec(name="a", dim=1, rate_hz=None, kind="codes"), "float16", id="code type"
        ),
    ],
)
def test_outputs_that_cannot_be_stored_are_refused(cache, output, message):
    with pytest.raises(ValueError, match=message):
        cache.open(replace(SPEC, outputs=(output,)), create=True)
    assert cache.stores() == []


def test_info_counts_what_is_there(filled):
    store, content = filled
    info = store.info()
    assert (info.utterances, info.parts, info.damage) == (9, 3, ())
    assert info.fingerprint == store.fingerprint
    assert info.licence == "for tests"
    assert info.created is not None
    assert info.outputs["final"].frames == sum(len(a["final"]) for a in content.values())
    assert info.outputs["code"].dtypes == ("uint16",)
    files = (f for p in (store.path / "parts").iterdir() if p.is_dir() for f in p.rglob("*"))
    assert info.bytes == sum(f.stat().st_size for f in files if f.is_file())


def test_stores_lists_stores_only(cache, store):
    (cache.root / "notes").mkdir()
    (cache.root / f"{store.name}.tmp").mkdir()
    (cache.root / "file-0123456789abcdef").touch()
    assert [found.path for found in cache.stores()] == [store.path]
    assert Cache(cache.root / "absent").stores() == []


def test_opening_does_not_create(cache):
    assert cache.open(SPEC) is None
    assert not cache.root.exists()


def test_creating_twice_keeps_the_first(cache, filled):
    store, _ = filled
    again = cache.open(SPEC, create=True)
    assert again is not None
    assert len(again) == len(store)
    assert again.info().created == store.info().created


def test_cache_comes_from_path_url_or_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("MER_CACHE", str(tmp_path / "env"))
    assert Cache.from_url(None).root == tmp_path / "env"
    assert Cache.from_url(str(tmp_path / "a b")).root == tmp_path / "a b"
    assert Cache.from_url((tmp_path / "a b").as_uri()).root == tmp_path / "a b"
    monkeypatch.chdir(tmp_path)
    relative = Cache.from_url("here")
    monkeypatch.chdir("/")
    assert relative.root == tmp_path / "here"
    monkeypatch.delenv("MER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tmp_path in Cache.from_url(None).root.parents


@pytest.mark.parametrize("url", ["ftp://bucket/cache", "file://host/x"])
def test_other_urls_are_refused(url):
    with pytest.raises(UsageError, match=f"Cache {url!r} is on .* expected a folder"):
        Cache.from_url(url)


def test_a_cache_that_is_a_file_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("not a folder")
    for path in (file, file / "below"):
        with pytest.raises(StoreFormatError, match="file is a file; a cache is a folder") as caught:
            Cache.from_url(str(path))
        assert caught.value.exit_code == 2
    assert file.read_text() == "not a folder"


def test_more_parts_than_open_maps_read_the_same(filled, monkeypatch):
    store, content = filled
    pool = reader.MapPool(limit=2)
    monkeypatch.setattr(reader, "_pool", pool)
    for key in list(content) * 2:
        expected = content[key]["final"].astype(np.float16)
        np.testing.assert_array_equal(store.frames(key, "final"), expected)
        assert len(pool) <= 2


def test_a_store_travels_by_pickle(filled):
    store, content = filled
    copy = pickle.loads(pickle.dumps(store))
    assert copy.path == store.path
    assert copy.contains(list(content)).all()


FORKED = """
import os, sys, numpy
from mer.cache.store import Store
store = Store(sys.argv[1])
keys = [bytes.fromhex(key) for key in sys.argv[2:]]
before, lengths = store.batch(keys, "final")
children = []
for _ in range(3):
    child = os.fork()
    if not child:
        after, _ = store.batch(keys[::-1], "final")
        os._exit(0 if numpy.array_equal(after[::-1], before) else 1)
    children.append(child)
sys.exit(sum(os.waitpid(child, 0)[1] != 0 for child in children))
"""


def test_forked_workers_read_an_open_store(filled):
    store, content = filled
    command = [sys.executable, "-c", FORKED, str(store.path), *(key.hex() for key in content)]
    assert subprocess.run(command, timeout=60, check=False).returncode == 0


def test_the_cache_needs_neither_torch_nor_zarr():
    code = (
        "import sys, mer.cache.store; print({'torch', 'zarr', 'transformers'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"
