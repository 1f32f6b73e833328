"""What is written is what was added: bits, moments, manifests, parts in the background."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import xxhash
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mer.cache import layout, staging
from mer.cache.errors import StoreError
from mer.cache.home import Cache
from mer.cache.intake import Buffers, Column, Intake, pool_exactly
from mer.cache.place import LocalPlace
from mer.cache.spec import FeatureSpec, OutputSpec
from mer.cache.store import Store
from mer.cache.writer import PartWriter

FLOAT16_MAX = 65504.0


@pytest.fixture(autouse=True)
def _without_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(staging, "_sync", lambda path: None)


@pytest.fixture(params=["torch", "numpy"])
def rounding(request, monkeypatch):
    """Round with torch, as beside a model, and without."""
    if request.param == "torch":
        import torch  # noqa: F401
    else:
        monkeypatch.setitem(sys.modules, "torch", None)
    return request.param


def spec_of(*outputs: OutputSpec) -> FeatureSpec:
    return FeatureSpec(slug="w", identity={"name": "w"}, outputs=outputs)


FINAL = OutputSpec(name="final", dim=4, rate_hz=50.0)
SPEC = spec_of(FINAL)


def opened(root: Path, spec: FeatureSpec = SPEC) -> Store:
    store = Cache(root).open(spec, create=True)
    assert store is not None
    return store


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def manifests(store: Store) -> dict[str, dict[str, Any]]:
    assert store.path is not None
    return {
        path.parent.name: json.loads(path.read_text())["attributes"]["mer"]
        for path in sorted(store.path.glob("parts/*/zarr.json"))
    }


@contextmanager
def chunks_of(rows: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "CHUNK_FRAMES", rows)
        yield


def assert_same_bits(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert found.tobytes() == expected.tobytes()


# -- values ------------------------------------------------------------------------------------


def float32_around_every_float16() -> np.ndarray:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    exact = halves[np.isfinite(halves)].astype(np.float32)
    ordered = np.sort(exact)
    middles = ordered[:-1] + np.diff(ordered) / 2
    near = [np.nextafter(middles, np.float32(side)) for side in (-np.inf, np.inf)]
    tiny = np.array([1e-30, -1e-30, 1e-45, -0.0], np.float32)
    return np.concatenate([exact, middles, *near, tiny])


def test_every_rounding_case_equals_numpy(tmp_path, rounding):
    values = float32_around_every_float16()
    values = values[: len(values) // 64 * 64].reshape(-1, 64)
    store = opened(tmp_path, spec_of(OutputSpec(name="final", dim=64, rate_hz=50.0)))
    with store.writer() as writer:
        writer.add(key(0), 1, {"final": values})
    assert_same_bits(store.frames(key(0), "final"), values.astype(np.float16))


floats = st.floats(-FLOAT16_MAX, FLOAT16_MAX, width=32)
lengths = st.lists(st.integers(0, 40), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_what_is_stored_is_the_input_rounded_once(tmp_path_factory, data):
    dim = data.draw(st.sampled_from([1, 3, 64]))
    dtype = data.draw(st.sampled_from(["float16", "float32", "float64"]))
    declared = data.draw(st.sampled_from(["float16", "float32"]))
    outputs = [OutputSpec(name=n, dim=dim, rate_hz=50.0, dtype=declared) for n in ("a", "b")]
    seed = np.random.default_rng(data.draw(st.integers(0, 100)))
    utterances = [
        {
            name: data.draw(hnp.arrays(np.float32, (n, dim), elements=floats)).astype(dtype)
            if dim < 64
            else seed.normal(0, 100, (n, dim)).astype(dtype)
            for name in ("a", "b")
        }
        for n in data.draw(lengths)
    ]
    store = opened(tmp_path_factory.mktemp("cache"), spec_of(*outputs))
    part_bytes = data.draw(st.sampled_from([1, 2000, 1 << 20]))
    rows = data.draw(st.sampled_from([7, 16, 512]))
    with chunks_of(rows), store.writer(part_bytes=part_bytes) as writer:
        for number, arrays in enumerate(utterances):
            writer.add(key(number), 1, arrays)
    for number, arrays in enumerate(utterances):
        for output in outputs:
            expected = arrays[output.name].astype(np.float32).astype(declared)
            assert_same_bits(store.frames(key(number), output.name), expected)


def transposed(array: np.ndarray) -> np.ndarray:
    return np.asfortranarray(array)


def reversed_rows(array: np.ndarray) -> np.ndarray:
    return array[::-1].copy()[::-1]


def every_other_column(array: np.ndarray) -> np.ndarray:
    return np.repeat(array, 2, axis=1)[:, ::2]


def read_only(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flags.writeable = False
    return array


def other_byte_order(array: np.ndarray) -> np.ndarray:
    return array.astype(array.dtype.newbyteorder())


def unaligned(array: np.ndarray) -> np.ndarray:
    memory = np.empty(array.nbytes + 1, np.uint8)
    out = memory[1:].view(array.dtype).reshape(array.shape)
    out[...] = array
    return out


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize(
    "arranged",
    [transposed, reversed_rows, every_other_column, read_only, other_byte_order, unaligned],
)
def test_arrangement_in_memory_does_not_matter(tmp_path, rounding, arranged, dtype):
    plain = np.random.default_rng(0).normal(3, 5, (300, 64)).astype(dtype)
    array = arranged(plain)
    np.testing.assert_array_equal(array, plain)
    store = opened(tmp_path, spec_of(OutputSpec(name="final", dim=64, rate_hz=50.0)))
    with store.writer() as writer:
        writer.add(key(0), 1, {"final": plain})
        writer.add(key(1), 1, {"final": array})
    assert_same_bits(store.frames(key(1), "final"), store.frames(key(0), "final"))
    pooled = store.pooled("final", [key(0), key(1)])
    assert_same_bits(pooled[1], pooled[0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("declared", ["float16", "float32"])
def test_a_bad_value_anywhere_adds_nothing(tmp_path, rounding, bad, dtype, declared):
    outputs = [OutputSpec(name=n, dim=64, rate_hz=50.0, dtype=declared) for n in ("a", "b")]
    store = opened(tmp_path, spec_of(*outputs))
    rng = np.random.default_rng(0)
    good = [rng.normal(size=(n, 64)).astype(dtype) for n in (500, 30, 700)]
    broken = good[2].copy()
    broken[-1, -1] = bad
    with store.writer() as writer:
        writer.add(key(0), 1, {"a": good[0], "b": good[0]})
        with pytest.raises(ValueError, match="'b' holds NaN or an infinity"):
            writer.add(key(1), 2, {"a": good[2], "b": broken})
        writer.add(key(1), 3, {"a": good[1], "b": good[1]})
    assert store.input_length([key(0), key(1)]).tolist() == [1, 3]
    for output in ("a", "b"):
        assert_same_bits(store.frames(key(0), output), good[0].astype(declared))
        assert_same_bits(store.frames(key(1), output), good[1].astype(declared))


@pytest.mark.parametrize("rows", [7, 16, 512])
@pytest.mark.parametrize("largest", [65505.0, -65510.0, 70_000.0, -3e38])
def test_one_large_value_widens_its_part_and_changes_no_other_value(tmp_path, largest, rows):
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(n, 4)).astype(np.float32) for n in (10, 0, 20, 5, 600)]
    arrays[2][-1, 1] = largest
    store = opened(tmp_path)
    with chunks_of(rows), store.writer() as writer:
        for number, array in enumerate(arrays):
            writer.add(key(number), 1, {"final": array})
    (manifest,) = manifests(store).values()
    assert manifest["outputs"]["final"]["dtype"] == "float32"
    for number, array in enumerate(arrays):
        expected = array if number == 2 else array.astype(np.float16).astype(np.float32)
        assert_same_bits(store.frames(key(number), "final"), expected)
    part = store.path / "parts" / manifest["part"]
    frames = zarr.open_group(store.path, mode="r")["parts"][manifest["part"]]["final"]["frames"]
    assert_same_bits(frames[:10], arrays[0].astype(np.float16).astype(np.float32))
    shard = np.frombuffer((part / "final" / "frames" / "c" / "0" / "0").read_bytes(), np.uint8)
    last = shard[635 // rows * (rows * 16 + 4) :][: rows * 16].view(np.float32).reshape(rows, 4)
    assert np.isnan(last[635 % rows :]).all()


def test_the_largest_float16_is_no_overflow(tmp_path):
    store = opened(tmp_path)
    frames = np.full((3, 4), 65504.0, np.float32)
    with store.writer() as writer:
        writer.add(key(0), 1, {"final": frames})
        writer.add(key(1), 1, {"final": -frames.astype(np.float16)})
    assert_same_bits(store.frames(key(0), "final"), frames.astype(np.float16))
    assert_same_bits(store.frames(key(1), "final"), -frames.astype(np.float16))


# -- pooled ------------------------------------------------------------------------------------


def pooled(array: np.ndarray) -> np.ndarray:
    """Return what the writer pools."""
    output = OutputSpec(name="final", dim=array.shape[1], rate_hz=50.0, dtype="float32")
    column = Column(output, Buffers(0))
    _, found = Intake().take(array, column, 0, pool=True)
    assert found is not None
    assert found.dtype == np.float32
    return found


def assert_accurate(array: np.ndarray) -> None:
    found = pooled(array)
    precise = array.astype(np.float64)
    mean, std = precise.mean(axis=0), precise.std(axis=0)
    # float32 itself is accurate to 6e-8 of the value
    np.testing.assert_array_less(np.abs(found[0] - mean), 1e-6 * (std + 1e-30) + 1e-7 * abs(mean))
    np.testing.assert_array_less(np.abs(found[1] - std), 1e-6 * std + 1e-30)


def offsets(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(0, 1, (1000, 64)) + np.linspace(-10_000, 10_000, 64)


def scales(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(0, 1, (1000, 64)) * np.logspace(-25, 15, 64)


def spikes(rng: np.random.Generator) -> np.ndarray:
    array = rng.normal(0, 1, (5000, 64))
    array[2500, ::2] = 1e6
    array[0, ::3] = -3e5  # in the sample that the pivot is made of
    return array


def drift(rng: np.random.Generator) -> np.ndarray:
    return np.linspace(0, 500, 3000)[:, None] + rng.normal(0, 0.01, (3000, 64))


def one_hot(rng: np.random.Generator) -> np.ndarray:
    return np.eye(64)[rng.integers(0, 64, 2000)] * (np.arange(2000)[:, None] % 37 == 0)


def huge(rng: np.random.Generator) -> np.ndarray:
    return rng.normal(0, 1e30, (300, 64))  # whose squares float32 does not hold


@pytest.mark.parametrize("make", [offsets, scales, spikes, drift, one_hot, huge])
def test_pooled_values_are_accurate(make):
    assert_accurate(make(np.random.default_rng(0)).astype(np.float32))


def test_pooled_values_of_an_hour_are_accurate():
    rng = np.random.default_rng(0)
    walk = rng.normal(0, 0.01, (180_000, 64)).cumsum(axis=0)
    assert_accurate((walk + 300 + rng.normal(0, 1, walk.shape)).astype(np.float32))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 600),
    st.sampled_from([1, 5, 64, 100]),
    st.sampled_from([0.0, 1.0, -300.0, 60_000.0]),
    st.sampled_from([1e-3, 1.0, 100.0]),
    st.integers(0, 1000),
)
def test_pooled_values_of_any_length_are_accurate(length, dim, offset, scale, seed):
    rng = np.random.default_rng(seed)
    assert_accurate((offset + scale * rng.normal(size=(length, dim))).astype(np.float32))


@pytest.mark.parametrize("value", [0.0, 0.1, -1234.567, 3e-20, 6e4])
@pytest.mark.parametrize("length", [1, 2, 17, 300, 5000])
@pytest.mark.parametrize("dim", [3, 64])
def test_a_constant_column_has_no_deviation(value, length, dim):
    array = np.full((length, dim), value, np.float32)
    np.testing.assert_array_equal(pooled(array), [[np.float32(value)] * dim, [0.0] * dim])


def test_pooled_values_come_from_before_rounding(tmp_path):
    store = opened(tmp_path, spec_of(OutputSpec(name="final", dim=64, rate_hz=50.0)))
    array = (1000 + np.random.default_rng(0).normal(0, 0.1, (400, 64))).astype(np.float32)
    with store.writer() as writer:
        writer.add(key(0), 1, {"final": array})
        writer.add(key(1), 1, {"final": array.astype(np.float16)})
    found = store.pooled("final", [key(0), key(1)])
    np.testing.assert_allclose(found[0], pool_exactly(array), rtol=1e-6)
    np.testing.assert_allclose(found[1], pool_exactly(array.astype(np.float16)), rtol=1e-6)
    assert not np.allclose(found[0][1], found[1][1], rtol=1e-2)


# -- data that is stored already -----------------------------------------------------------------

CODE = OutputSpec(name="code", dim=1, rate_hz=100.0, dtype="uint16", kind="codes", num_codes=300)
EXACT = OutputSpec(name="exact", dim=2, rate_hz=None, dtype="float32", kind="pooled")
STORED = spec_of(FINAL, CODE, EXACT)


def stored_utterance(rows: int = 600) -> dict[str, np.ndarray]:
    bits = np.arange(rows * 4, dtype=np.uint16) % 0x7C00  # every kind of finite float16
    bits[::3] |= 0x8000
    return {
        "final": bits.view(np.float16).reshape(rows, 4),
        "code": (np.arange(rows * 2, dtype=np.uint16) % 300)[:, None],
        "exact": np.array([[-0.0, 1e-42]], np.float32),
    }


def test_stored_data_keeps_every_bit(tmp_path):
    store = opened(tmp_path, STORED)
    arrays = stored_utterance()
    moments = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)
    with store.writer() as writer:
        writer.add_stored(key(0), 7, arrays, {"final": moments})
        writer.add_stored(key(1), 8, arrays)
        writer.add_stored(key(1), 9, arrays)  # known by now
    for name, array in arrays.items():
        assert_same_bits(store.frames(key(0), name), array)
        assert_same_bits(store.frames(key(1), name), array)
    found = store.pooled("final", [key(0), key(1)])
    assert_same_bits(found[0], moments)
    np.testing.assert_allclose(found[1], pool_exactly(arrays["final"]), rtol=1e-6)
    assert store.input_length([key(0), key(1)]).tolist() == [7, 8]


def test_stored_float32_of_a_float16_output_stays_float32(tmp_path, caplog):
    store = opened(tmp_path)
    wide = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    narrow = wide.astype(np.float16)
    with store.writer() as writer:
        writer.add_stored(key(0), 1, {"final": narrow})
        writer.add_stored(key(1), 1, {"final": wide})
    assert_same_bits(store.frames(key(0), "final"), narrow.astype(np.float32))
    assert_same_bits(store.frames(key(1), "final"), wide)
    assert not caplog.records  # nothing overflowed


def refused(name: str, array: np.ndarray) -> dict[str, np.ndarray]:
    return {**stored_utterance(), name: array}


@pytest.mark.parametrize(
    ("arrays", "moments", "message"),
    [
        (refused("final", np.zeros((1, 4))), {}, "type float64, expected float16"),
        (refused("exact", np.zeros((1, 2), np.float16)), {}, "type float16, expected float32"),
        (refused("code", np.zeros((1, 1), np.uint8)), {}, "type uint8, expected uint16"),
        (refused("code", np.full((1, 1), 300, np.uint16)), {}, "300 to 300, expected 0 to 299"),
        (refused("final", np.full((1, 4), np.nan, np.float16)), {}, "'final' holds NaN"),
        (refused("final", np.full((1, 4), np.inf, np.float32)), {}, "'final' holds NaN or an inf"),
        (stored_utterance(), {"final": np.zeros((2, 4))}, "'final' are float64"),
        (stored_utterance(), {"final": np.zeros((4, 2), np.float32)}, r"shape \(4, 2\)"),
    ],
)
def test_what_no_store_can_hold_is_refused(tmp_path, arrays, moments, message):
    store = opened(tmp_path, STORED)
    with store.writer() as writer:
        with pytest.raises(ValueError, match=message):
            writer.add_stored(key(0), 1, arrays, moments)
        writer.add_stored(key(0), 2, stored_utterance())
    assert store.input_length([key(0)]).tolist() == [2]


# -- manifests -----------------------------------------------------------------------------------


def records(manifest: dict[str, Any]) -> dict[str, layout.FileRecord]:
    return {
        name: layout.FileRecord(record["bytes"], record["xxh3"])
        for name, record in manifest["files"].items()
    }


@pytest.mark.parametrize("rows", [7, 512])
def test_a_manifest_names_store_part_and_the_checksum_of_every_chunk(tmp_path, rows):
    store = opened(tmp_path, STORED)
    with chunks_of(rows), store.writer() as writer:
        writer.add_stored(key(0), 7, stored_utterance())
    ((folder, manifest),) = manifests(store).items()
    assert manifest["part"] == folder == layout.content_part_id(records(manifest))
    assert manifest["store"] == store.fingerprint
    for output in STORED.outputs:
        fields = manifest["outputs"][output.name]
        file = store.path / "parts" / folder / output.name / "frames" / "c" / "0" / "0"
        data = fields["chunk_frames"] * output.dim * np.dtype(fields["dtype"]).itemsize
        count = -(-fields["frames"] // fields["chunk_frames"])
        content = file.read_bytes()
        chunks = [content[i * (data + 4) :][:data] for i in range(count)]
        crcs = [google_crc32c.value(chunk) for chunk in chunks]
        assert fields["crc32c"] == "".join(f"{crc:08x}" for crc in crcs)
        stored = [content[i * (data + 4) + data :][:4] for i in range(count)]
        assert stored == [crc.to_bytes(4, "little") for crc in crcs]
    for name, record in manifest["files"].items():
        content = (store.path / "parts" / folder / name).read_bytes()
        expected = {"bytes": len(content), "xxh3": xxhash.xxh3_128_hexdigest(content)}
        assert record == expected, name


def direct(store: Store, **options: Any) -> PartWriter:
    arguments: dict[str, Any] = {
        "known": lambda key: False,
        "committed": lambda: None,
        **options,
    }
    place = arguments.pop("place", store.place)
    return PartWriter(place, store.spec, store.fingerprint, **arguments)


def test_parts_may_be_named_by_content(tmp_path):
    store = opened(tmp_path, STORED)
    with direct(store) as writer:
        writer.add_stored(key(0), 7, stored_utterance())
    with direct(store) as writer:  # the same again: one part
        writer.add_stored(key(0), 7, stored_utterance())
    with direct(store) as writer:
        writer.add_stored(key(0), 8, stored_utterance())
    found = manifests(store)
    assert len(found) == 2
    for folder, manifest in found.items():
        assert folder == manifest["part"] == layout.content_part_id(records(manifest))


def test_rows_after_the_last_frame_are_fill_values(tmp_path):
    store = opened(tmp_path, STORED)
    with store.writer() as writer:
        writer.add_stored(key(0), 1, stored_utterance(1000))
        writer.commit()
        writer.add_stored(key(1), 1, stored_utterance(520))  # in memory that was used before
    [folder] = [part.where for part in store.readers() if part.keys()[0].tobytes() == key(1)]
    part = Path(folder)
    shard = (part / "final" / "frames" / "c" / "0" / "0").read_bytes()
    last = np.frombuffer(shard, np.float16, 512 * 4, 512 * 4 * 2 + 4).reshape(512, 4)
    assert np.isnan(last[8:]).all()
    assert not np.isnan(last[:8]).any()
    shard = (part / "code" / "frames" / "c" / "0" / "0").read_bytes()
    assert not any(shard[2 * (512 * 2 + 4) + 16 * 2 :][: (512 - 16) * 2])


# -- in the background ---------------------------------------------------------------------------


class WatchedPlace(LocalPlace):
    """Lets a test look at what goes on while a part is published."""

    def __init__(self, path: Path, during: Callable[[int], None]) -> None:
        super().__init__(path)
        self.during = during
        self.started = 0
        self.inside = 0
        self.most_inside = 0
        self.threads: set[int] = set()

    def publish(self, folder: Path, part: str) -> bool:
        self.started += 1
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        self.threads.add(threading.get_ident())
        self.during(self.started)
        self.inside -= 1
        return super().publish(folder, part)


def test_adding_goes_on_while_one_part_is_written_and_not_while_two_are_waiting(tmp_path):
    store = opened(tmp_path)
    added = 0
    went_on, most_ahead = threading.Event(), []

    def during(number: int) -> None:
        if number == 1:
            assert went_on.wait(60)
        most_ahead.append(added - 2 * (number - 1))

    place = WatchedPlace(store.path, during)
    frames = np.zeros((100, 4), np.float32)  # 832 bytes with what is pooled
    with direct(store, place=place, part_bytes=1600) as writer:
        for number in range(20):
            writer.add(key(number), 1, {"final": frames})
            added += 1
            if added == 3:
                went_on.set()
    assert place.started == 10
    assert place.most_inside == 1
    assert threading.get_ident() not in place.threads
    assert max(most_ahead) <= 3  # two in the part that is being written, one in the next
    assert len(opened(tmp_path)) == 20


def test_a_part_is_durable_and_announced_when_commit_returns(tmp_path):
    store = opened(tmp_path)
    announced: list[int] = []
    with direct(
        store, committed=lambda: announced.append(len(opened(tmp_path))), part_bytes=1
    ) as writer:
        for number in range(3):
            writer.add(key(number), 1, {"final": np.zeros((2, 4), np.float32)})
        writer.commit()
        assert announced == [1, 2, 3]
        writer.commit()
    assert announced == [1, 2, 3]


def test_after_a_failure_the_parts_before_it_stay(tmp_path):
    store = opened(tmp_path)

    def during(number: int) -> None:
        if number == 3:
            raise OSError(5, "Input/output error")

    place = WatchedPlace(store.path, during)

    def work() -> None:
        with direct(store, place=place, part_bytes=1) as writer:
            for number in range(9):
                writer.add(key(number), 1, {"final": np.zeros((2, 4), np.float32)})

    with pytest.raises(StoreError, match="Cannot write to .*: Input/output error"):
        work()
    assert (
        opened(tmp_path).contains([key(n) for n in range(9)]).tolist() == [True, True] + [False] * 7
    )
    assert not staging.temporary_folder(store.path).exists()


def test_threads_that_share_a_writer_and_writers_that_share_a_store(tmp_path):
    store, other = opened(tmp_path), opened(tmp_path)
    rng = np.random.default_rng(0)
    arrays = {key(n): rng.normal(size=(int(rng.integers(0, 50)), 4)) for n in range(120)}
    with store.writer(part_bytes=3000) as first, other.writer(part_bytes=2000) as second:
        jobs = [(first, 0, 60), (first, 40, 90), (second, 60, 120), (second, 100, 120)]

        def work(writer: PartWriter, begin: int, end: int) -> None:
            for number in range(begin, end):
                writer.add(key(number), number, {"final": arrays[key(number)]})

        threads = [threading.Thread(target=work, args=job) for job in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    fresh = opened(tmp_path)
    assert len(fresh) == 120
    for name, array in arrays.items():
        assert_same_bits(fresh.frames(name, "final"), array.astype(np.float32).astype(np.float16))
    assert fresh.input_length(list(arrays)).tolist() == list(range(120))


def test_memory_of_chunks_is_used_again_within_its_limit():
    buffers = Buffers(2500)
    first = [buffers.take(1000) for _ in range(4)]
    buffers.give(first)
    again = [buffers.take(1000) for _ in range(4)]
    assert sum(any(a is b for b in first) for a in again) == 2
    assert len(buffers.take(10)) == 10


def test_what_an_earlier_part_holds_is_not_written_again(tmp_path):
    store = opened(tmp_path)
    frames = {"final": np.zeros((2, 4), np.float32)}
    with direct(store) as writer:
        writer.add(key(0), 1, frames)
        writer.commit()
        writer.add(key(0), 1, frames)
        writer.add(key(1), 1, frames)
    assert [manifest["utterances"] for manifest in manifests(store).values()] == [1, 1]


def test_many_parts_need_the_memory_of_two(tmp_path, monkeypatch):
    store = opened(tmp_path)
    taken: list[np.ndarray] = []  # holds them, so that no address is used twice by chance
    real = Buffers.take

    def take(self, num_bytes):
        taken.append(real(self, num_bytes))
        return taken[-1]

    monkeypatch.setattr(Buffers, "take", take)
    with store.writer(part_bytes=600 * 4 * 2) as writer:
        for number in range(20):
            writer.add(key(number), 1, {"final": np.zeros((600, 4), np.float32)})
    assert len(taken) == 40
    assert len({id(buffer) for buffer in taken}) <= 4


def test_rounding_never_asks_torch_for_more_than_one_thread(monkeypatch):
    torch = pytest.importorskip("torch")
    sizes: list[int] = []
    real = torch.from_numpy

    def from_numpy(array: np.ndarray) -> Any:
        sizes.append(array.size)
        return real(array)

    monkeypatch.setattr(torch, "from_numpy", from_numpy)
    rng = np.random.default_rng(0)
    for dim in (8, 1024, 5000):
        column = Column(OutputSpec(name="final", dim=dim, rate_hz=50.0), Buffers(0))
        for dtype in (np.float16, np.float32):
            array = rng.normal(size=(700, dim)).astype(dtype)
            Intake().take(array, column, 0, pool=True)
    assert sizes
    assert max(sizes) < 32768  # at::internal::GRAIN_SIZE
