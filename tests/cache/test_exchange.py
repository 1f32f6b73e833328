"""Out in the layouts of others and in again: the same values, whole or not at all."""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
import shlex
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file

import mer
from mer.cache import exchange
from mer.cache.errors import (
    MissingDependencyError,
    MissingFeatureError,
    StoreError,
    UnknownNameError,
    UsageError,
)
from mer.cache.exchange import EXPORTERS, IMPORTERS, export, import_, incoming, outgoing
from mer.cache.exchange.npy import safe_name
from mer.cache.exchange.pickling import Streamed, dump
from mer.cache.home import Cache
from mer.cache.identity import fingerprint
from mer.cache.spec import FeatureSpec, OutputSpec
from mer.cache.store import Store
from mer.extract.registry import create

SPEC = FeatureSpec(
    slug="test",
    identity={"extractor": "test", "version": 1},
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
    licence="for tests only",
)
TARGETS = {
    "hdf5": "features.h5",
    "hdf5-utterances": "utterances.h5",
    "safetensors": "tensors",
    "parquet": "features.parquet",
    "arrow": "features.arrow",
}
BEYOND_HALF = 5
EMPTY = 2


def utterance(number: int) -> tuple[bytes, str, int, dict[str, np.ndarray]]:
    """Key, id, input length and arrays that follow from ``number``."""
    rng = np.random.default_rng(number)
    length = 0 if number == EMPTY else int(rng.integers(1, 700))
    final = rng.standard_normal((length, 5), dtype=np.float32)
    if number == BEYOND_HALF:
        final[0, 0] = 1e5
    arrays = {
        "final": final,
        "code": rng.integers(0, 257, (2 * length, 1)),
        "functionals": rng.standard_normal((1, 2), dtype=np.float32),
    }
    return rng.bytes(16), f"Ses0{number % 2}/Größe {number}", 320 * length, arrays


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Eight utterances in three parts; one is empty, one part fell back to float32."""
    store = Cache(tmp_path_factory.mktemp("filled")).open(SPEC, create=True)
    assert store is not None
    with store.writer() as writer:
        for number in range(8):
            key, _, steps, arrays = utterance(number)
            writer.add(key, steps, arrays)
            if number % 3 == 2:
                writer.commit()
    kinds = [part.dtype("final").name for part in store.readers()]
    assert sorted(kinds) == ["float16", "float16", "float32"]
    return store


IDS = {key: name for key, name, *_ in map(utterance, range(8))}
KEYS = {name: key for key, name in IDS.items()}


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def assert_same(found: Store, expected: Store, outputs: tuple[str, ...], exact: bool) -> None:
    assert set(found) == set(expected)
    for key in expected:
        for output in outputs:
            ours, theirs = expected.frames(key, output), found.frames(key, output)
            assert ours.shape == theirs.shape
            if exact:
                assert ours.dtype == theirs.dtype
                assert ours.tobytes() == theirs.tobytes()
            np.testing.assert_array_equal(ours, theirs)
    keys = list(expected)
    np.testing.assert_array_equal(found.input_length(keys), expected.input_length(keys))


# -- out and in again ------------------------------------------------------------------------------


@pytest.mark.parametrize("format", TARGETS)
def test_what_goes_out_comes_in_again(filled, cache, tmp_path, format):
    done: list[int] = []
    target = tmp_path / TARGETS[format]
    report = export(filled, target, format, ids=IDS, progress=done.append)
    assert report.utterances == sum(done) == 8
    assert report.paths == (target,)
    assert report.frames["functionals"] == 8
    assert report.bytes > 8 * 100
    back = import_(target, format, cache, name="back")
    assert (back.added, back.present, back.skipped, back.linked) == (8, 0, (), "keys")
    outputs = ("final", "code", "functionals")
    assert_same(back.store, filled, outputs, exact=False)
    stored = [(o.name, o.kind, o.rate_hz, o.num_codes, o.columns) for o in back.store.spec.outputs]
    assert stored == [(o.name, o.kind, o.rate_hz, o.num_codes, o.columns) for o in SPEC.outputs]


@pytest.mark.parametrize("format", TARGETS)
def test_half_floats_and_codes_are_kept_bit_for_bit(cache, tmp_path, format):
    store = Cache(tmp_path / "halves").open(SPEC, create=True)
    assert store is not None
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    every = np.resize(every[np.isfinite(every)].astype(np.float32), (13_000, 5))
    with store.writer() as writer:
        codes = np.arange(257)[:, None]
        pooled = np.zeros((1, 2), np.float32)
        writer.add(b"k" * 16, 7, {"final": every, "code": codes, "functionals": pooled})
    export(store, tmp_path / "out", format)
    back = import_(tmp_path / "out", format, cache, name="halves")
    assert back.store.spec.outputs == SPEC.outputs
    assert_same(back.store, store, ("final", "code", "functionals"), exact=True)


@pytest.mark.parametrize("level", ["FRA", "UTT"])
def test_npy_folders_go_out_and_come_in_again(filled, cache, tmp_path, level):
    report = export(filled, tmp_path, "npy", ids=IDS, outputs=["final"], level=level)
    folder = tmp_path / f"test-{level}"
    assert report.paths == (folder,)
    back = import_(folder, "npy", cache, name="back")
    keys = [key for key in filled if IDS[key] != utterance(EMPTY)[1]]
    if level == "FRA":
        assert_same(back.store, filled, ("final",), exact=False)
        return
    assert [(s.id, s.reason) for s in back.skipped] == [
        (utterance(EMPTY)[1], "final: NaN or an infinity in 1 of 1 frames")
    ]
    assert "1 utterances of 'final' have no frames" in report.notes[0]
    means = np.concatenate([back.store.frames(key, "final") for key in keys])
    np.testing.assert_array_equal(means, filled.pooled("final", keys)[:, 0])
    assert back.store.spec.output("final").kind == "pooled"


def test_only_the_outputs_and_utterances_asked_for_go_out(filled, cache, tmp_path):
    some = list(filled)[1:4]
    export(filled, tmp_path / "a.h5", "hdf5", keys=some, outputs=["code"])
    back = import_(tmp_path / "a.h5", "hdf5", cache, name="some")
    assert set(back.store) == set(some)
    assert [o.name for o in back.store.spec.outputs] == ["code"]
    with pytest.raises(MissingFeatureError, match="1 of 1 utterances are not in"):
        export(filled, tmp_path / "b.h5", "hdf5", keys=[bytes(16)])
    with pytest.raises(UnknownNameError, match="finale"):
        export(filled, tmp_path / "b.h5", "hdf5", outputs=["finale"])


def test_ids_choose_what_goes_out_and_may_be_several(filled, tmp_path):
    key, other = list(filled)[:2]
    ids: dict[bytes, Any] = {key: ["twin a", "twin b"], other: "alone", bytes(16): "not stored"}
    report = export(filled, tmp_path / "a.parquet", "parquet", ids=ids)
    assert (report.utterances, report.missing) == (3, 1)
    table = pq.read_table(tmp_path / "a.parquet").to_pydict()
    assert dict(zip(table["id"], table["key"], strict=True)) == {
        "twin a": key,
        "twin b": key,
        "alone": other,
    }
    with pytest.raises(UsageError, match="Two utterances have the id 'same'"):
        export(filled, tmp_path / "b.h5", "hdf5", ids={key: "same", other: "same"})
    with pytest.raises(UsageError, match="holds none of the utterances asked for"):
        export(filled, tmp_path / "b.h5", "hdf5", ids={bytes(16): "not stored"})


def test_without_ids_utterances_are_named_by_their_keys(filled, tmp_path):
    export(filled, tmp_path / "a.h5", "hdf5-utterances", outputs=["final"])
    with h5py.File(tmp_path / "a.h5") as file:
        assert set(file["final"]) == {key.hex() for key in filled}


# -- as others read it -----------------------------------------------------------------------------


def frames_of(store: Store, output: str) -> dict[str, np.ndarray]:
    return {IDS[key]: store.frames(key, output) for key in store}


def test_flat_hdf5_as_h5py_reads_it(filled, tmp_path):
    report = export(filled, tmp_path / "a.h5", "hdf5", ids=IDS)
    assert "here all of it is float32" in report.notes[0]
    with h5py.File(tmp_path / "a.h5") as file:
        ids = file["utterances/id"].asstr()[:]
        assert [bytes(key) for key in file["utterances/key"][:]] == [KEYS[name] for name in ids]
        assert file["final/frames"].dtype == np.float32
        assert file["code/frames"].dtype == np.uint16
        for output in ("final", "code", "functionals"):
            offsets, frames = file[output]["offsets"][:], file[output]["frames"]
            for n, name in enumerate(ids):
                expected = frames_of(filled, output)[name]
                np.testing.assert_array_equal(frames[offsets[n] : offsets[n + 1]], expected)
        assert file["final"].attrs["rate_hz"] == 50
        assert file["code"].attrs["kind"] == "codes"
        assert file.attrs["licence"] == "for tests only"


def test_hdf5_by_utterance_as_h5py_reads_it(filled, tmp_path):
    report = export(filled, tmp_path / "a.h5", "hdf5-utterances", ids=IDS)
    assert report.notes == ()
    with h5py.File(tmp_path / "a.h5") as file:
        for output in ("final", "code", "functionals"):
            for name, expected in frames_of(filled, output).items():
                found = file[output][name][...]
                assert found.dtype == expected.dtype
                np.testing.assert_array_equal(found, expected)


def test_npy_folders_as_mertools_reads_them(filled, tmp_path):
    export(filled, tmp_path, "npy", ids=IDS, model="wavlm-large", level="fra")
    folder = tmp_path / "wavlm-large-final-FRA"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "wavlm-large-code-FRA",
        folder.name,
        "wavlm-large-functionals-FRA",
    ]
    with open(folder / "utterances.csv", encoding="utf-8", newline="") as file:
        rows = {row["id"]: row for row in csv.DictReader(file)}
    for name, expected in frames_of(filled, "final").items():
        found = np.load(folder / rows[name]["file"], allow_pickle=False)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
        assert bytes.fromhex(rows[name]["key"]) == KEYS[name]


def test_safetensors_as_the_library_reads_them(filled, tmp_path):
    report = export(filled, tmp_path / "st", "safetensors", ids=IDS, shard_bytes=8_000)
    assert report.notes == ()
    for output in ("final", "code", "functionals"):
        files = sorted((tmp_path / "st").glob(f"{output}-*.safetensors"))
        found: dict[str, np.ndarray] = {}
        for file in files:
            found |= load_file(file)
        expected = frames_of(filled, output)
        assert found.keys() == expected.keys()
        for name in expected:
            assert found[name].dtype == expected[name].dtype
            np.testing.assert_array_equal(found[name], expected[name])
        if output == "final":
            assert len(files) > 2
            assert files[0].name == f"final-00001-of-{len(files):05}.safetensors"


def test_safetensors_load_into_torch(filled, tmp_path):
    import torch
    from safetensors.torch import load_file as load_tensors

    export(filled, tmp_path / "st", "safetensors", ids=IDS, outputs=["code"])
    tensors = load_tensors(tmp_path / "st" / "code-00001-of-00001.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.uint16}


def test_parquet_and_arrow_as_pyarrow_reads_them(filled, tmp_path):
    export(filled, tmp_path / "a.parquet", "parquet", ids=IDS, block_bytes=3_000)
    export(filled, tmp_path / "a.arrow", "arrow", ids=IDS, block_bytes="3000")
    assert pq.ParquetFile(tmp_path / "a.parquet").num_row_groups > 2
    with pa.OSFile(str(tmp_path / "a.arrow")) as file, pa.ipc.open_stream(file) as reader:
        stream = reader.read_all()
    table = pq.read_table(tmp_path / "a.parquet")
    assert table.equals(stream)
    table.validate(full=True)
    assert table.schema.field("code").type == pa.list_(pa.list_(pa.uint16(), 1))
    assert table.schema.field("final").type == pa.list_(pa.list_(pa.float32(), 5))
    for output in ("final", "code", "functionals"):
        expected = frames_of(filled, output)
        for name, frames in zip(table["id"].to_pylist(), table[output].to_pylist(), strict=True):
            np.testing.assert_array_equal(np.reshape(frames, expected[name].shape), expected[name])


def test_parquet_and_arrow_as_hugging_face_datasets_loads_them(filled, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    datasets = pytest.importorskip("datasets")
    export(filled, tmp_path / "a.parquet", "parquet", ids=IDS)
    export(filled, tmp_path / "a.arrow", "arrow", ids=IDS)
    files = {"parquet": str(tmp_path / "a.parquet")}
    loaded = datasets.load_dataset(
        "parquet", data_files=files, split="parquet", cache_dir=str(tmp_path / "hf")
    )
    expected = frames_of(filled, "final")
    for data in (loaded, datasets.Dataset.from_file(str(tmp_path / "a.arrow"))):
        assert sorted(data["id"]) == sorted(expected)
        for row in data:
            frames = expected[row["id"]]
            np.testing.assert_array_equal(np.reshape(row["final"], frames.shape), frames)


def test_half_floats_are_half_floats_in_tables(tmp_path):
    spec = FeatureSpec(slug="half", identity={"a": 1}, outputs=(SPEC.outputs[0],))
    store = Cache(tmp_path).open(spec, create=True)
    assert store is not None
    with store.writer() as writer:
        writer.add(b"k" * 16, 7, {"final": np.full((3, 5), 0.1, np.float32)})
    for format in ("parquet", "arrow"):
        export(store, tmp_path / f"a.{format}", format)
    table = pq.read_table(tmp_path / "a.parquet")
    assert table.schema.field("final").type == pa.list_(pa.list_(pa.float16(), 5))
    assert table["final"][0].values.flatten().to_numpy(zero_copy_only=False).dtype == np.float16


def provenance_in(target: Path, format: str) -> dict[str, Any]:
    if format.startswith("hdf5"):
        with h5py.File(target) as file:
            return json.loads(file.attrs["mer"])
    if format == "parquet":
        return json.loads(pq.read_schema(target).metadata[b"mer"])
    if format == "arrow":
        with pa.OSFile(str(target)) as file, pa.ipc.open_stream(file) as reader:
            return json.loads(reader.schema.metadata[b"mer"])
    if format == "mmsa":
        return json.loads(pickle.loads(target.read_bytes())["mer"])
    if format == "safetensors":
        with safe_open(target / "final-00001-of-00001.safetensors", "numpy") as file:
            inside = json.loads(file.metadata()["mer"])
        assert inside == json.loads((target / "provenance.json").read_text())
        return inside
    return json.loads((target / "test-FRA" / "provenance.json").read_text())


@pytest.mark.parametrize("format", EXPORTERS)
def test_every_export_says_where_it_comes_from(filled, tmp_path, format):
    options = {"labels": LABELS} if format == "mmsa" else {}
    export(filled, tmp_path / "out", format, ids=IDS, outputs=["final"], **options)
    found = provenance_in(tmp_path / "out", format)
    assert found["licence"] == "for tests only"
    assert found["identity"] == SPEC.identity
    assert found["fingerprint"] == filled.fingerprint
    assert found["store"] == filled.name
    assert found["mer_version"] == mer.__version__
    assert found["outputs"][0]["stored"] == "float32"


def test_the_same_export_is_the_same_file(filled, tmp_path):
    for format, name in TARGETS.items():
        for folder in ("one", "two"):
            (tmp_path / folder).mkdir(exist_ok=True)
            export(filled, tmp_path / folder / name, format, ids=IDS)
        files = [p for p in (tmp_path / "one").rglob("*") if p.is_file()]
        for file in files:
            other = tmp_path / "two" / file.relative_to(tmp_path / "one")
            assert file.read_bytes() == other.read_bytes(), file.name


# -- names -----------------------------------------------------------------------------------------


@given(st.lists(st.text(min_size=1, max_size=20), unique=True, max_size=30))
def test_file_names_are_safe_and_distinct(ids):
    names = [safe_name(name) for name in ids]
    assert len(set(names)) == len(names)
    for name in names:
        assert name not in ("", ".", "..")
        assert not name.startswith(".")
        assert not set(name) & set('/\\:*?"<>|\0\n\t')


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["A", "a"], "'A' and 'a' would share one file"),
        (["STRASSE", "stra\u00dfe"], "would share one file"),
        (["x" * 250, "b"], "cannot be the name of a file"),
        (["", "b"], "cannot be the name of a file"),
    ],
)
def test_ids_that_cannot_be_files_are_refused(filled, tmp_path, ids, message):
    chosen = dict(zip(filled, ids, strict=False))
    with pytest.raises(UsageError, match=message):
        export(filled, tmp_path / "out", "npy", ids=chosen, outputs=["final"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bad", ["a/../b", "/a", "a//b", "./a", "a/", ""])
def test_ids_that_hdf5_would_change_are_refused(filled, tmp_path, bad):
    chosen = dict(zip(filled, ["fine", bad], strict=False))
    with pytest.raises(UsageError, match="is no name of a dataset in HDF5"):
        export(filled, tmp_path / "a.h5", "hdf5-utterances", ids=chosen)
    export(filled, tmp_path / "a.h5", "hdf5", ids=chosen)
    with h5py.File(tmp_path / "a.h5") as file:
        assert set(file["utterances/id"].asstr()[:]) == {"fine", bad}


def test_an_id_that_is_a_group_of_others_is_refused(filled, tmp_path):
    chosen = dict(zip(filled, ["Ses01", "Ses01/F000"], strict=False))
    with pytest.raises(UsageError, match="'Ses01' is also the beginning of another id's path"):
        export(filled, tmp_path / "a.h5", "hdf5-utterances", ids=chosen)


def test_reserved_names_are_refused(filled, tmp_path):
    key = next(iter(filled))
    with pytest.raises(UsageError, match="'__metadata__' has a meaning of its own"):
        export(filled, tmp_path / "st", "safetensors", ids={key: "__metadata__"})
    for name, format in {"utterances": "hdf5", "id": "parquet"}.items():
        output = OutputSpec(name=name, dim=1, rate_hz=None)
        spec = FeatureSpec(slug=name, identity={"name": name}, outputs=(output,))
        store = Cache(tmp_path / "odd").open(spec, create=True)
        assert store is not None
        with store.writer() as writer:
            writer.add(b"k" * 16, 1, {name: np.zeros((1, 1), np.float32)})
        with pytest.raises(UsageError, match=f"An output is named '{name}'"):
            export(store, tmp_path / "x", format)


# -- whole or not at all ---------------------------------------------------------------------------


def everything(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@pytest.mark.parametrize("format", EXPORTERS)
def test_a_failure_leaves_nothing(filled, tmp_path, format, monkeypatch):
    original = outgoing.Outgoing.scan

    def failing(self: Any, output: str) -> Iterator[Any]:
        for place, frames in original(self, output):
            if place == 5:
                raise OSError(28, "No space left on device")
            yield place, frames

    monkeypatch.setattr(outgoing.Outgoing, "scan", failing)
    monkeypatch.setattr(Store, "frames", lambda *_: failing_frames())
    options = {"labels": LABELS} if format == "mmsa" else {}
    with pytest.raises(StoreError, match="No space left while writing"):
        export(filled, tmp_path / "out", format, ids=IDS, outputs=["final"], **options)
    assert {p for p in everything(tmp_path) if p != "out"} == set()


def failing_frames() -> Any:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("format", EXPORTERS)
def test_an_existing_target_is_kept_unless_told_otherwise(filled, tmp_path, format):
    options = {"labels": LABELS} if format == "mmsa" else {}

    def again(**more: Any) -> Any:
        return export(
            filled, tmp_path / "out", format, ids=IDS, outputs=["final"], **options, **more
        )

    [path] = again().paths
    before = everything(tmp_path)
    with pytest.raises(UsageError, match=f"{path.name} exists already"):
        again()
    key = next(iter(filled))
    report = export(
        filled,
        tmp_path / "out",
        format,
        ids={key: "only"},
        outputs=["final"],
        overwrite=True,
        **({"labels": {"only": {"split": "test"}}} if format == "mmsa" else {}),
    )
    assert report.utterances == 1
    assert len(everything(tmp_path)) <= len(before)
    assert not [p for p in everything(tmp_path) if ".tmp" in p]


@pytest.mark.parametrize("format", ["npy", "safetensors", "hdf5"])
def test_a_folder_that_no_export_made_is_never_replaced(filled, tmp_path, format):
    name = "test-FRA" if format == "npy" else "mine"
    folder = tmp_path / name
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    target = tmp_path if format == "npy" else folder
    with pytest.raises(UsageError, match="no export made it: it is not overwritten"):
        export(filled, target, format, outputs=["final"], overwrite=True)
    assert (folder / "thesis.txt").read_text() == "years of work"


def test_leftovers_of_a_killed_export_are_swept(filled, tmp_path):
    left = tmp_path / "a.h5.tmp" / "0123"
    left.mkdir(parents=True)
    (left / "content").write_bytes(b"half")
    os.utime(left, (0, 0))
    export(filled, tmp_path / "a.h5", "hdf5")
    assert everything(tmp_path) == {"a.h5"}


# -- memory ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """96 MiB in utterances of 2 MiB."""
    spec = FeatureSpec(
        slug="large",
        identity={"name": "large"},
        outputs=(OutputSpec(name="final", dim=1024, rate_hz=50.0),),
    )
    store = Cache(tmp_path_factory.mktemp("large")).open(spec, create=True)
    assert store is not None
    with store.writer() as writer:
        for number in range(48):
            frames = np.full((1024, 1024), number, np.float32)
            writer.add(number.to_bytes(16, "big"), 1, {"final": frames})
    return store


BOUND_BYTES = 64 << 20  # two blocks of a scan, one on its way out, and a copy of it


def peak_of(work: Callable[[], Any]) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("format", EXPORTERS)
def test_an_export_and_reading_it_need_a_bounded_part_of_it(large, tmp_path, format):
    labels = {key.hex(): {"split": "train"} for key in large}
    options = {"labels": labels} if format == "mmsa" else {}
    assert peak_of(lambda: export(large, tmp_path / "out", format, **options)) < BOUND_BYTES
    source = tmp_path / "out" / "large-FRA" if format == "npy" else tmp_path / "out"
    read = IMPORTERS[format].load()
    seen = []

    def consume() -> None:
        for item in read(source).read(lambda _: True):
            seen.append(float(next(iter(item.arrays.values()))[-1, -1]))
            item = None

    assert peak_of(consume) < BOUND_BYTES
    assert sorted(seen) == list(range(48))


# -- in, from strangers ----------------------------------------------------------------------------


def folder_of(tmp_path: Path, arrays: dict[str, np.ndarray], name: str = "hubert-FRA") -> Path:
    folder = tmp_path / name
    for key, array in arrays.items():
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{key}.npy", array)
    return folder


def halves(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float16)


def test_what_cannot_be_used_is_left_out_with_its_reason(cache, tmp_path):
    good = {f"good{n}": halves(n, 4) for n in range(4)}
    nan = halves(3, 4)
    nan[1, 2] = np.nan
    folder = folder_of(
        tmp_path,
        good
        | {
            "nan": nan,
            "inf": np.full((1, 4), -np.inf, np.float16),
            "narrow": halves(2, 3),
            "single": halves(4),
            "wrapped": halves(1, 2, 4),
            "deep": halves(2, 2, 4),
            "codes": np.arange(4),
            "text": np.array(["a"]),
        },
    )
    (folder / "cut.npy").write_bytes((folder / "good3.npy").read_bytes()[:-1])
    np.savez(folder / "archive", good["good3"])
    (folder / "archive.npz").rename(folder / "archive.npy")
    np.save(folder / "object.npy", np.array([{}], object), allow_pickle=True)
    (folder / "pickle.npy").write_bytes(pickle.dumps({}))
    report = import_(folder, "npy", cache, name="theirs")
    reasons = {skipped.id: skipped.reason for skipped in report.skipped}
    output = report.store.spec.output("features")
    assert (output.dim, output.dtype, output.kind) == (4, "float16", "frames")
    assert (report.added, report.linked) == (6, "ids")
    assert reasons.pop("cut") == "cut.npy cannot be read: it is damaged or cut short"
    assert reasons.pop("pickle") == "pickle.npy cannot be read: it is no .npy file"
    assert reasons.pop("object") == (
        "object.npy cannot be read: it holds Python objects, expected an array of numbers"
    )
    assert reasons == {
        "nan": "features: NaN or an infinity in 1 of 3 frames",
        "inf": "features: NaN or an infinity in 1 of 1 frames",
        "narrow": "features: it is 3 wide, the others are 4",
        "deep": "features: it has the shape (2, 2, 4), expected (T, D)",
        "codes": "features: it holds int64, the others hold frames",
        "text": "features: it holds <U1, not numbers",
        "archive": "archive.npy cannot be read: it is an archive of several arrays, expected a "
        "single one",
    }
    key = incoming.key_of_id("good3")
    np.testing.assert_array_equal(report.store.frames(key), good["good3"])
    assert report.store.frames(key).dtype == np.float16
    assert report.store.input_length([key]).tolist() == [0]


def test_nothing_is_narrowed_unasked(cache, tmp_path):
    arrays = {f"{n:03}": halves(1, 4, seed=n) for n in range(incoming.SAMPLE + 1)}
    arrays["last"] = halves(1, 4).astype(np.float32)
    folder = folder_of(tmp_path, arrays)
    report = import_(folder, "npy", cache, name="halves")
    assert [(s.id, s.reason) for s in report.skipped] == [
        ("last", "features: it is float32, the first ones are float16; give dtype=float32")
    ]
    report = import_(folder, "npy", cache, name="halves", dtype="float32")
    assert (report.added, report.skipped) == (incoming.SAMPLE + 2, ())
    arrays = {"a": halves(1, 4), "b": halves(1, 4).astype(np.float32)}
    report = import_(folder_of(tmp_path, arrays, "mixed-FRA"), "npy", cache, name="mixed")
    assert report.store.spec.outputs[0].dtype == "float32"


def test_the_type_can_be_chosen(cache, tmp_path):
    folder = folder_of(tmp_path, {"a": np.full((2, 3), 1e5), "b": np.ones((2, 3))})
    wide = import_(folder, "npy", cache, name="theirs")
    assert wide.store.spec.outputs[0].dtype == "float32"
    narrow = import_(folder, "npy", cache, name="theirs", dtype="float16", rate_hz="50")
    assert narrow.store.fingerprint != wide.store.fingerprint
    assert narrow.store.spec.outputs[0].rate_hz == 50
    assert narrow.feature.endswith("outputs=features/3///50")
    huge = folder_of(tmp_path, {"a": np.full((2, 3), 1e300), "b": np.ones((2, 3))}, "huge-FRA")
    report = import_(huge, "npy", cache, name="huge")
    assert [s.reason for s in report.skipped] == ["features: a value is beyond float32"]
    for option, value in {"dtype": "int8", "rate_hz": "fast", "num_codes": "-1"}.items():
        with pytest.raises(UsageError, match=f"{option}={value}, expected"):
            import_(folder, "npy", cache, name="x", **{option: value})


def test_vectors_become_a_pooled_output(cache, tmp_path):
    for name in ("bert-UTT", "plain"):
        folder = folder_of(tmp_path, {"a": halves(4), "b": halves(4, seed=1)}, name)
        report = import_(folder, "npy", cache, name=name)
        assert report.store.spec.outputs[0].kind == "pooled"
    fra = import_(folder, "npy", cache, name="frames", level="FRA")
    assert fra.store.spec.outputs[0].kind == "frames"
    assert fra.store.frames(incoming.key_of_id("a")).shape == (1, 4)


def test_integers_become_codes(cache, tmp_path):
    folder = folder_of(tmp_path, {"a": np.arange(5), "b": np.array([[300]]), "c": np.array([-1])})
    report = import_(folder, "npy", cache, name="units", num_codes=301)
    output = report.store.spec.outputs[0]
    assert (output.kind, output.dtype, output.num_codes, output.dim) == ("codes", "uint16", 301, 1)
    assert [s.reason for s in report.skipped] == [
        "features: codes from -1 to -1, expected 0 to 300"
    ]
    np.testing.assert_array_equal(
        report.store.frames(incoming.key_of_id("a")), np.arange(5)[:, None]
    )


def test_importing_again_adds_nothing(cache, tmp_path):
    folder = folder_of(tmp_path, {f"a/{n}": halves(n, 4) for n in range(1, 6)})
    done: list[int] = []
    first = import_(folder, "npy", cache, name="theirs", progress=done.append)
    parts = first.store.parts()
    again = import_(folder, "npy", cache, name="theirs", progress=done.append)
    assert (again.added, again.present, again.utterances) == (0, 5, 5)
    assert again.store.parts() == parts
    assert again.feature == first.feature
    assert sum(done) == 10


def test_an_import_that_was_killed_goes_on(cache, tmp_path, monkeypatch):
    arrays = {f"u{n}": halves(n, 4) for n in range(1, 7)}
    folder = folder_of(tmp_path, arrays)
    original = incoming._conform

    def dying(arrays: Any, output: Any, rounding: bool) -> np.ndarray:
        if len(arrays["features"]) == 4:
            raise KeyboardInterrupt
        return original(arrays, output, rounding)

    monkeypatch.setattr(incoming, "_conform", dying)
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        import_(folder, "npy", cache, name="theirs")
    monkeypatch.undo()
    report = import_(folder, "npy", cache, name="theirs")
    assert (report.added, report.present) == (3, 3)
    for name, array in arrays.items():
        np.testing.assert_array_equal(report.store.frames(incoming.key_of_id(name)), array)


def test_the_identity_is_the_bytes_and_how_they_were_read(cache, tmp_path):
    arrays = {"a": halves(3, 4), "b": halves(2, 4)}
    one = import_(folder_of(tmp_path, arrays, "x-FRA"), "npy", cache, name="n").store
    moved = import_(folder_of(tmp_path, arrays, "y-FRA"), "npy", cache, name="n").store
    assert moved.fingerprint == one.fingerprint
    arrays["a"][0, 0] += 1
    others = [
        import_(folder_of(tmp_path, arrays, "z-FRA"), "npy", cache, name="n"),
        import_(tmp_path / "x-FRA", "npy", cache, name="other"),
        import_(tmp_path / "x-FRA", "npy", cache, name="n", dtype="float32"),
        import_(tmp_path / "x-FRA", "npy", cache, name="n", level="FRA"),
        import_(tmp_path / "x-FRA", "npy", cache, name="n", modality="text"),
    ]
    (tmp_path / "x-FRA" / "b.npy").rename(tmp_path / "x-FRA" / "c.npy")
    others.append(import_(tmp_path / "x-FRA", "npy", cache, name="n"))
    prints = {report.store.fingerprint for report in others}
    assert len(prints | {one.fingerprint}) == 7


def test_keys_beside_npy_files_are_part_of_the_identity(filled, cache, tmp_path):
    [folder] = export(filled, tmp_path, "npy", ids=IDS, outputs=["final"]).paths
    one = import_(folder, "npy", cache, name="n").store
    index = (folder / "utterances.csv").read_text("utf-8")
    key = next(iter(filled)).hex()
    (folder / "utterances.csv").write_text(index.replace(key, "0" * 32), "utf-8")
    other = import_(folder, "npy", cache, name="n").store
    assert bytes(16) in other
    assert other.fingerprint != one.fingerprint


@pytest.mark.parametrize("format", ["npy", "hdf5"])
def test_a_source_that_changes_meanwhile_is_refused(cache, tmp_path, monkeypatch, format):
    folder = folder_of(tmp_path, {f"u{n}": halves(n, 4) for n in range(1, 5)})
    source = folder
    if format == "hdf5":
        first = import_(folder, "npy", cache, name="first").store
        [source] = export(first, tmp_path / "a.h5", "hdf5").paths
    original = incoming.hash_files

    def hash_and_change(files: Any) -> str:
        found = original(files)
        path = max(files.values())
        with open(path, "r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x3c")
        os.utime(path, ns=(1, 1))
        return found

    monkeypatch.setattr(incoming, "hash_files", hash_and_change)
    with pytest.raises(UsageError, match="changed while it was imported"):
        import_(source, format, cache, name="theirs")


def test_an_import_claims_nothing_of_a_model(filled, cache, tmp_path):
    export(filled, tmp_path / "a.h5", "hdf5", ids=IDS, outputs=["final"])
    own = import_(tmp_path / "a.h5", "hdf5", cache, name="mine").store
    folder = folder_of(tmp_path, {"a": halves(3, 4)})
    theirs = import_(folder, "npy", cache, name="theirs", licence="ask them").store
    for store in (own, theirs):
        assert set(store.spec.identity) == {"extractor", "version", "options"}
        assert store.spec.identity["extractor"] == "imported"
        assert set(store.spec.identity["options"]) == {
            *("name", "format", "content", "modality", "outputs")
        }
    assert theirs.spec.licence == "ask them"
    assert theirs.spec.source == {
        "note": "imported from hubert-FRA, extractor unknown",
        "file": "hubert-FRA",
    }
    assert own.spec.licence == "for tests only"
    assert own.spec.source is not None
    assert own.spec.source["note"] == "imported from a.h5, extractor unknown"
    assert own.spec.source["claims"]["fingerprint"] == filled.fingerprint
    assert own.fingerprint != filled.fingerprint
    assert own.name.startswith("imported-mine-")


# -- whose utterance it is -------------------------------------------------------------------------


def matched(ids: list[str], manifest: list[str]) -> dict[str, str]:
    source = incoming.Incoming(files={}, ids=ids, read=lambda _: iter(()))
    keys = {name: name.encode() for name in manifest}
    return {name: key.decode() for name, key in incoming.match(source, keys)[0].items()}


def test_ids_match_exactly_or_as_paths_where_that_is_unambiguous():
    assert matched(["a", "b"], ["b", "a", "c"]) == {"a": "a", "b": "b"}
    assert matched(["clip"], ["Ses1/clip.wav"]) == {"clip": "Ses1/clip.wav"}
    assert matched(["root/Ses1/clip.npy"], ["Ses1/clip.wav"]) == {
        "root/Ses1/clip.npy": "Ses1/clip.wav"
    }
    assert matched(["clip", "x"], ["a/clip", "b/clip", "x"]) == {"x": "x"}
    assert matched(["a/clip", "b/clip", "x"], ["clip", "x"]) == {"x": "x"}
    assert matched(["a/clip", "x"], ["b/clip", "x"]) == {"x": "x"}
    assert matched(["v.1", "x"], ["v.2", "x"]) == {"x": "x"}
    assert matched(["clip", "x"], ["clip.wav", "clip.flac", "x"]) == {"x": "x"}
    assert matched(["clip", "a/clip.wav"], ["a/clip.wav"]) == {"a/clip.wav": "a/clip.wav"}


def test_ids_of_a_manifest_link_to_its_recordings(cache, tmp_path):
    folder = folder_of(tmp_path, {"Ses01/F000": halves(3, 4), "Ses01/F001": halves(2, 4)})
    keys = {"Ses01/F000.wav": b"0" * 16, "other": b"1" * 16}
    report = import_(folder, "npy", cache, name="theirs", keys=keys)
    assert list(report.store) == [b"0" * 16]
    assert report.linked == "manifest"
    assert [(s.id, s.reason) for s in report.skipped] == [
        ("Ses01/F001", "the manifest has no such utterance")
    ]
    with pytest.raises(
        UsageError, match="None of the 2 .* source has 'Ses01/F000', the manifest 'q'"
    ):
        import_(folder, "npy", cache, name="theirs", keys={"q": b"0" * 16})


def test_a_manifest_counts_more_than_the_keys_in_the_file(filled, cache, tmp_path):
    export(filled, tmp_path / "a.h5", "hdf5", ids=IDS)
    name = utterance(0)[1]
    report = import_(tmp_path / "a.h5", "hdf5", cache, name="mine", keys={name: b"m" * 16})
    assert list(report.store) == [b"m" * 16]


def test_two_ids_of_one_recording_are_stored_once(cache, tmp_path):
    folder = folder_of(tmp_path, {"a": halves(3, 4), "b": halves(3, 4)})
    report = import_(folder, "npy", cache, name="t", keys={"a": b"k" * 16, "b": b"k" * 16})
    assert (report.added, report.present, len(report.store)) == (1, 1, 1)


# -- emotion2vec, .pt, HDF5 and tables of others ---------------------------------------------------


@pytest.fixture
def downstream(tmp_path: Path) -> tuple[Path, list[np.ndarray]]:
    """Files as emotion2vec writes them: one utterance without frames."""
    arrays = [halves(n, 4, seed=n).astype(np.float32) for n in (3, 0, 5)]
    np.save(tmp_path / "train.npy", np.concatenate(arrays))
    (tmp_path / "train.lengths").write_text("3\n0\n5\n")
    return tmp_path, arrays


def test_emotion2vec_with_labels_is_read(downstream, cache):
    folder, arrays = downstream
    names = ["Ses01F_impro01_F000", "Ses01F_impro01_F001", "Ses01F_impro01_M000"]
    (folder / "train.emo").write_text("".join(f"{name}\tang\n" for name in names))
    report = import_(folder, "emotion2vec", cache, name="e2v")
    assert (report.added, report.notes) == (3, ())
    for name, array in zip(names, arrays, strict=True):
        np.testing.assert_array_equal(report.store.frames(incoming.key_of_id(name)), array)
    assert import_(folder / "train.npy", "emotion2vec", cache, name="e2v").present == 3


def test_emotion2vec_with_a_manifest_or_nothing_is_read(downstream, cache):
    folder, arrays = downstream
    numbered = import_(folder, "emotion2vec", cache, name="e2v")
    assert "ids are the numbers of the lines" in numbered.notes[0]
    np.testing.assert_array_equal(numbered.store.frames(incoming.key_of_id("2")), arrays[2])
    (folder / "train.tsv").write_text("/data\nS1/a.wav\t960\nS1/b.wav\t²\nS1/c.wav\t1600\n")
    keys = {"a": b"a" * 16, "b": b"b" * 16, "c": b"c" * 16}
    report = import_(folder, "emotion2vec", cache, name="e2v", keys=keys)
    assert report.store.input_length([b"a" * 16, b"c" * 16]).tolist() == [960, 1600]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("train.lengths", "3\n4\n", "counts 7 frames, .* holds 8"),
        ("train.lengths", "3\nx\n", "is no list of numbers"),
        ("train.lengths", "9\n-1\n", "no list of numbers of frames: '-1'"),
        ("train.lengths", "8\n" + "9" * 5000, "no list of numbers of frames: '9999"),
        ("train.lengths", "8\n\u00b2\n", "no list of numbers of frames: '\u00b2'"),
        ("train.lengths", ("9" * 18 + "\n") * 99, "do not belong together"),
        ("train.emo", "a ang\n", "names 1 utterances, the lengths are 3"),
        ("train.npy", "text", "cannot be read as frames"),
    ],
)
def test_files_of_emotion2vec_that_do_not_fit_are_refused(downstream, cache, file, text, message):
    folder, _ = downstream
    (folder / file).write_text(text, "utf-8")
    with pytest.raises(UsageError, match=message):
        import_(folder, "emotion2vec", cache, name="e2v")


def test_torch_tensors_are_read(cache, tmp_path):
    import torch

    folder = tmp_path / "pt" / "S1"
    folder.mkdir(parents=True)
    frames = torch.randn(5, 4, dtype=torch.float16)
    torch.save(frames, folder / "plain.pt")
    torch.save(frames[None], folder / "wrapped.pth")
    torch.save({"layer 1": frames.bfloat16(), "layer 2": frames}, folder / "dict.pt")
    torch.save([1, "text"], folder / "list.pt")
    torch.save(frames.to_sparse(), folder / "sparse.pt")
    torch.save(torch.nn.Linear(1, 1), folder / "module.pt")
    report = import_(tmp_path / "pt", "pt", cache, name="authors")
    reasons = {skipped.id: skipped.reason for skipped in report.skipped}
    assert not [reason for reason in reasons.values() if "weights_only" in reason]
    assert report.added == 2
    for name in ("S1/plain", "S1/wrapped"):
        key = incoming.key_of_id(name)
        np.testing.assert_array_equal(report.store.frames(key), frames.numpy())
    assert reasons["S1/dict"] == "it has no output 'features'"
    assert reasons["S1/list"] == "it holds a int beside tensors"
    assert reasons["S1/sparse"] == "it holds a sparse or quantized tensor"
    assert "cannot be read as tensors alone" in reasons["S1/module"]


def test_one_file_of_torch_tensors_is_read_by_output(cache, tmp_path):
    import torch

    frames = torch.arange(8.0).reshape(4, 2)
    both = {"audio": frames, "a text": frames[:1]}
    torch.save({"u1": both, "u2": both, "u3": frames}, tmp_path / "all.pt")
    report = import_(tmp_path / "all.pt", "pt", cache, name="authors")
    assert [o.name for o in report.store.spec.outputs] == ["audio", "a-text"]
    key = incoming.key_of_id("u2")
    np.testing.assert_array_equal(report.store.frames(key, "audio"), frames.numpy())
    assert [s.id for s in report.skipped] == ["u3"]
    chosen = import_(tmp_path / "all.pt", "pt", cache, name="authors", outputs="audio")
    assert [o.name for o in chosen.store.spec.outputs] == ["audio"]
    with pytest.raises(UsageError, match="no output 'video'; it has audio, a-text"):
        import_(tmp_path / "all.pt", "pt", cache, name="authors", outputs="video")
    torch.save([frames], tmp_path / "list.pt")
    with pytest.raises(UsageError, match="no dict of utterance id to tensor"):
        import_(tmp_path / "list.pt", "pt", cache, name="authors")


@pytest.mark.parametrize(
    ("table", "format", "option", "message"),
    [
        (EXPORTERS, "hdf5", "overwrite", "The export format 'hdf5' has no options"),
        (EXPORTERS, "mmsa", "labels", "Unknown option of the export format 'mmsa' 'labels'"),
        (EXPORTERS, "npy", "modal", "Did you mean 'model'|Known: level, model"),
        (IMPORTERS, "hdf5", "name", "'name'.*dtype, num_codes, outputs, rate_hz"),
        (IMPORTERS, "npi", "level", "Unknown import format 'npi'. Did you mean 'npy'"),
    ],
)
def test_only_the_options_of_a_format_are_given_in_text(table, format, option, message):
    kind = "export format" if table is EXPORTERS else "import format"
    with pytest.raises(UsageError, match=message):
        exchange.check_options(kind, format, table, [option])
    for name, known in table.items():
        exchange.check_options(kind, name, table, known.takes)
    if table is IMPORTERS:
        exchange.check_options(kind, "hdf5", table, exchange.EVERY_IMPORT)


def test_vectors_go_out_as_mertools_reads_them(filled, cache, tmp_path):
    report = export(filled, tmp_path / "out", "npy", ids=IDS)
    assert [path.name for path in report.paths] == [
        "test-final-FRA",
        "test-code-FRA",
        "test-functionals-UTT",
    ]
    (key, name), *_ = IDS.items()
    vector = np.load(report.paths[2] / f"{safe_name(name)}.npy")
    np.testing.assert_array_equal(vector, filled.frames(key, "functionals")[0])
    back = import_(report.paths[2], "npy", cache, name="back", keys=KEYS)
    assert back.store.spec.outputs[0].columns == ("a", "b")
    assert_same(back.store, filled, ("functionals",), exact=True)


def test_folders_of_one_export_appear_together(filled, tmp_path):
    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="^$"):
        export(filled, tmp_path / "out", "npy", progress=stop)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not list(tmp_path.rglob("test-*-FRA"))


def test_a_folder_around_the_features_is_looked_into(cache, tmp_path):
    inner = folder_of(tmp_path / "around", {"a": halves(3, 4)})
    direct = import_(inner, "npy", cache, name="direct")
    around = import_(tmp_path / "around", "npy", cache, name="direct")
    assert (around.feature, around.present) == (direct.feature, 1)
    folder_of(tmp_path / "around", {"a": halves(4)}, "hubert-UTT")
    with pytest.raises(UsageError, match="hubert-FRA, hubert-UTT. Import one of them"):
        import_(tmp_path / "around", "npy", cache, name="direct")


def test_no_feature_string_needs_quotes(cache, tmp_path):
    path = tmp_path / "icon.pkl"
    path.write_bytes(pickle.dumps({f"dia{n}": [np.ones(3), np.ones(3)] for n in range(2)}))
    options = {"pattern": "a; b&c=$(d),+{dialogue}'{turn}"}
    report = import_(path, "conversations", cache, name="icon", **options)
    assert shlex.quote(report.feature) == report.feature
    assert fingerprint(create(report.feature).spec.identity) == report.store.fingerprint


def test_a_hostile_torch_file_runs_nothing(cache, tmp_path):
    import torch

    canary = tmp_path / "canary"

    class Touch:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {canary}",)

    torch.save({"u": Touch()}, tmp_path / "bad.pt")
    with pytest.raises(
        UsageError, match=r"bad\.pt cannot be read as tensors alone: it refers to \w+\.system\."
    ):
        import_(tmp_path / "bad.pt", "pt", cache, name="authors")
    assert not canary.exists()


def test_hdf5_of_others_is_read(cache, tmp_path):
    arrays = {f"S{n}/F{n}": halves(n + 1, 4) for n in range(3)}
    with h5py.File(tmp_path / "lhotse.h5", "w") as file:
        for name, array in arrays.items():
            file[name] = array
    with h5py.File(tmp_path / "root.h5", "w") as file:
        for name, array in arrays.items():
            file[name.replace("/", "-")] = array
        file["note"] = "text"
    grouped = import_(tmp_path / "root.h5", "hdf5", cache, name="root")
    np.testing.assert_array_equal(
        grouped.store.frames(incoming.key_of_id("S2-F2")), arrays["S2/F2"]
    )
    assert [s.id for s in grouped.skipped] == ["note"]
    (tmp_path / "no.h5").write_bytes(b"text")
    with pytest.raises(UsageError, match=r"no\.h5 cannot be read as HDF5"):
        import_(tmp_path / "no.h5", "hdf5", cache, name="no")
    h5py.File(tmp_path / "empty.h5", "w").close()
    with pytest.raises(UsageError, match="holds no datasets of features"):
        import_(tmp_path / "empty.h5", "hdf5", cache, name="no")


def test_hdf5_with_offsets_that_do_not_fit_is_refused(filled, cache, tmp_path):
    export(filled, tmp_path / "a.h5", "hdf5", ids=IDS, outputs=["final"])
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file["final/offsets"][-1] += 1
    with pytest.raises(UsageError, match="/final/offsets does not divide /final/frames"):
        import_(tmp_path / "a.h5", "hdf5", cache, name="x")


def test_tables_of_others_are_read(cache, tmp_path):
    rows = {
        "utterance": ["a", "b", "c", "d"],
        "vector": [[1.0, 2.0], [3.0, 4.0], None, [5.0]],
        "label": ["x", "y", "z", "z"],
        "age": [1, 2, 3, 4],
    }
    pq.write_table(pa.table(rows), tmp_path / "t.parquet")
    report = import_(tmp_path / "t.parquet", "parquet", cache, name="table")
    assert report.store.spec.outputs == (
        OutputSpec(name="vector", dim=2, rate_hz=None, dtype="float32", kind="pooled"),
    )
    assert [(s.id, s.reason) for s in report.skipped] == [
        ("c", "cannot be read: it is null"),
        ("d", "vector: it is 1 wide, the others are 2"),
    ]
    table = pa.table({"name": ["a", "b"], "x": [[[1.0, 2.0]], [[3.0, 4.0], [5.0, 6.0]]]})
    with (
        pa.OSFile(str(tmp_path / "t.arrow"), "wb") as sink,
        pa.ipc.new_file(sink, table.schema) as writer,
    ):
        writer.write_table(table)
    nested = import_(tmp_path / "t.arrow", "arrow", cache, name="nested")
    np.testing.assert_array_equal(nested.store.frames(incoming.key_of_id("b")), [[3, 4], [5, 6]])
    with pytest.raises(UsageError, match="no column of ids 'speaker'"):
        import_(tmp_path / "t.arrow", "arrow", cache, name="x", id_column="speaker")
    pq.write_table(pa.table({"id": ["a"], "age": [1]}), tmp_path / "n.parquet")
    with pytest.raises(UsageError, match="no column of lists of numbers"):
        import_(tmp_path / "n.parquet", "parquet", cache, name="x")
    (tmp_path / "n.parquet").write_bytes(b"text")
    with pytest.raises(UsageError, match="cannot be read as Parquet or Arrow"):
        import_(tmp_path / "n.parquet", "parquet", cache, name="x")


def test_safetensors_of_others_are_read(cache, tmp_path):
    from safetensors.numpy import save_file

    arrays = {"a": halves(2, 3), "b": halves(1, 3)}
    save_file(arrays, tmp_path / "x.safetensors")
    report = import_(tmp_path / "x.safetensors", "safetensors", cache, name="theirs")
    for name, array in arrays.items():
        np.testing.assert_array_equal(report.store.frames(incoming.key_of_id(name)), array)
    (tmp_path / "y.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(UsageError, match=r"y\.safetensors cannot be read as safetensors"):
        import_(tmp_path / "y.safetensors", "safetensors", cache, name="x")
    (tmp_path / "y.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes())
    with pytest.raises(UsageError, match="the tensor 'a' is in two files"):
        import_(tmp_path, "safetensors", cache, name="x")


# -- MMSA and conversations ------------------------------------------------------------------------

LABELS: dict[str, dict[str, Any]] = {
    name: {
        "split": ["train", "dev", "test"][n % 3],
        "regression_label": n / 4 - 1,
        "classification_label": n % 3,
        "annotation": ["Negative", "Neutral", "Positive"][n % 3],
        "raw_text": f"sätze {n}",
    }
    for n, name in enumerate(KEYS)
}


def test_an_mmsa_pickle_is_what_mmsa_reads(filled, tmp_path):
    report = export(filled, tmp_path / "a.pkl", "mmsa", ids=IDS, outputs=["final"], labels=LABELS)
    data = pickle.loads((tmp_path / "a.pkl").read_bytes())
    lengths = {name: len(frames) for name, frames in frames_of(filled, "final").items()}
    assert set(data) == {"train", "valid", "test", "mer"}
    assert sum(len(data[split]["id"]) for split in ("train", "valid", "test")) == 8
    for split, name in {"train": "train", "valid": "dev", "test": "test"}.items():
        part = data[split]
        assert {LABELS[i]["split"] for i in part["id"]} == {name}
        audio = part["audio"].astype(np.float32)
        assert audio.shape == (len(part["id"]), max(lengths.values()), 5)
        assert list(part["audio_lengths"]) == [lengths[i] for i in part["id"]]
        labels = np.array(part["regression_labels"]).astype(np.float32)
        assert labels.tolist() == [LABELS[i]["regression_label"] for i in part["id"]]
        assert part["raw_text"] == [LABELS[i]["raw_text"] for i in part["id"]]
        assert part["annotations"] == [LABELS[i]["annotation"] for i in part["id"]]
        assert part["classification_labels"].dtype == np.int64
        for n, i in enumerate(part["id"]):
            np.testing.assert_array_equal(audio[n, : lengths[i]], frames_of(filled, "final")[i])
            assert not audio[n, lengths[i] :].any()
    assert report.frames == {"final": sum(lengths.values())}


def test_an_mmsa_pickle_comes_in_again(filled, cache, tmp_path):
    export(filled, tmp_path / "a.pkl", "mmsa", ids=IDS, outputs=["final"], labels=LABELS)
    report = import_(tmp_path / "a.pkl", "mmsa", cache, name="mmsa", keys=KEYS)
    assert report.added == 8
    for key in filled:
        np.testing.assert_array_equal(
            report.store.frames(key, "audio"), filled.frames(key, "final")
        )


def test_an_mmsa_pickle_takes_several_modalities_and_a_limit(filled, tmp_path):
    words = {bytes(reversed(key)): name for key, name in IDS.items()}
    spec = FeatureSpec(slug="t", identity={"t": 1}, outputs=(SPEC.outputs[0],))
    store = Cache(tmp_path / "text").open(spec, create=True)
    assert store is not None
    with store.writer() as writer:
        for n, key in enumerate(list(words)[1:]):
            writer.add(key, 1, {"final": np.full((n + 1, 5), n, np.float32)})
    report = export(
        filled,
        tmp_path / "a.pkl",
        "mmsa",
        ids=IDS,
        outputs=["final"],
        labels=LABELS,
        also={"text": (store, None, words)},
        max_frames="3",
    )
    data = pickle.loads((tmp_path / "a.pkl").read_bytes())
    ids = [i for split in ("train", "valid", "test") for i in data[split]["id"]]
    assert set(ids) == set(list(words.values())[1:])
    assert data["train"]["text"].shape[1:] == (3, 5)
    assert data["train"]["text"].dtype == np.float16
    assert max(data["train"]["audio_lengths"]) == 3
    assert report.utterances == 7
    assert any("1 utterances without a split or a modality" in note for note in report.notes)
    assert any("are cut to 3 frames" in note for note in report.notes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs splits and labels: export with a manifest"),
        ({"labels": {"x": {"split": "train"}}}, "No utterance has a split"),
        ({"labels": {n: {"split": "dream"} for n in KEYS}}, "in the split 'dream'"),
        ({"labels": LABELS, "modality": "smell"}, "modality=smell"),
        ({"labels": LABELS, "outputs": ["code"]}, "one output of frames"),
        ({"labels": LABELS, "outputs": None}, "one output of frames"),
        ({"labels": LABELS, "max_frames": "0"}, "max_frames=0"),
        ({"labels": "all"}, "needs splits and labels"),
    ],
)
def test_an_mmsa_pickle_that_cannot_be_made_is_refused(filled, tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        export(filled, tmp_path / "a.pkl", "mmsa", ids=IDS, **{"outputs": ["final"], **options})
    assert everything(tmp_path) == set()


@pytest.mark.parametrize("protocol", range(2, 6))
def test_mmsa_pickles_of_others_are_read(cache, tmp_path, protocol):
    text = np.random.default_rng(0).standard_normal((3, 6, 4)).astype(np.float32)
    audio = np.zeros((3, 5, 2))
    audio[0, :2], audio[1, 2:], audio[2] = 1, 2, 3  # padded behind, in front, not at all
    tokens = np.zeros((3, 3, 6))
    tokens[:, 1, :4] = 1
    part = {
        "raw_text": np.array(["a", "b", "c"]),
        "id": np.array(["v$_$1", "v$_$2", "v$_$3"]),
        "text": text,
        "text_bert": tokens,
        "audio": audio,
        "audio_lengths": [2, 3, 9],
        "vision": audio[..., :1],
        "regression_labels": np.zeros((3, 1, 1)),
        "annotations": ["Negative"] * 3,
    }
    (tmp_path / "m.pkl").write_bytes(pickle.dumps({"train": part, "valid": {}}, protocol))
    report = import_(tmp_path / "m.pkl", "mmsa", cache, name="mosi")
    assert [o.name for o in report.store.spec.outputs] == ["text", "audio", "vision"]
    frames = [report.store.frames(incoming.key_of_id(f"v$_${n}"), "audio") for n in (1, 2, 3)]
    assert [f[:, 0].tolist() for f in frames] == [[1, 1], [2, 2, 2], [3] * 5]
    key = incoming.key_of_id("v$_$2")
    np.testing.assert_array_equal(report.store.frames(key, "text"), text[1, :4])
    assert report.store.frames(key, "vision").shape == (5, 1)
    assert report.notes == ("train: vision has no lengths, so its padding was kept.",)
    (tmp_path / "n.pkl").write_bytes(pickle.dumps([1]))
    with pytest.raises(UsageError, match="is no MMSA pickle"):
        import_(tmp_path / "n.pkl", "mmsa", cache, name="x")


def conversation() -> dict[str, Any]:
    """Two dialogues of three and one turns."""
    rng = np.random.default_rng(0)
    turns = {"Ses01F_impro01": 3, "Ses02F_script01": 1}
    return {
        "ids": {d: [f"{d}_F{n:03}" for n in range(count)] for d, count in turns.items()},
        "speakers": {d: ["M"] * count for d, count in turns.items()},
        "labels": {d: [0] * count for d, count in turns.items()},
        "text": {d: list(rng.standard_normal((c, 4))) for d, c in turns.items()},
        "audio": {d: rng.standard_normal((c, 3)).astype(np.float32) for d, c in turns.items()},
        "visual": {d: rng.standard_normal((c, 2)).tolist() for d, c in turns.items()},
        "sentences": {d: ["hm"] * count for d, count in turns.items()},
        "train": ["Ses01F_impro01"],
        "test": {"Ses02F_script01"},
    }


@pytest.mark.parametrize("protocol", range(6))
def test_pickles_of_dialogues_are_read(cache, tmp_path, protocol):
    data = conversation()
    (tmp_path / "IEMOCAP_features.pkl").write_bytes(pickle.dumps(tuple(data.values()), protocol))
    report = import_(tmp_path / "IEMOCAP_features.pkl", "conversations", cache, name="rnn")
    assert (report.added, report.skipped) == (4, ())
    assert [(o.name, o.dim, o.kind) for o in report.store.spec.outputs] == [
        ("text", 4, "pooled"),
        ("audio", 3, "pooled"),
        ("visual", 2, "pooled"),
    ]
    key = incoming.key_of_id("Ses01F_impro01_F002")
    for name in ("text", "audio", "visual"):
        expected = np.asarray(data[name]["Ses01F_impro01"][2], np.float32)[None]
        np.testing.assert_array_equal(report.store.frames(key, name), expected)
    assert "IEMOCAP_features.pkl, extractor unknown" in report.store.spec.source["note"]


def test_dialogues_with_numbers_for_ids_are_told_apart(cache, tmp_path):
    turns = {0: 2, 1: 3}
    vectors = {d: [np.full(4, 10.0 * d + n) for n in range(count)] for d, count in turns.items()}
    plain = {d: ["x"] * count for d, count in turns.items()}
    meld = ({d: list(range(c)) for d, c in turns.items()}, plain, plain, vectors, vectors, plain)
    path = tmp_path / "meld.pkl"
    path.write_bytes(pickle.dumps((*meld, [0], [1], plain)))
    pattern = "dia{dialogue}_utt{turn}"
    for options, name in (({}, "1_2"), ({"pattern": pattern}, "dia1_utt2")):
        report = import_(path, "conversations", cache, name="meld", **options)
        frames = report.store.frames(incoming.key_of_id(name), "text")
        np.testing.assert_array_equal(frames, [[12] * 4])
    assert "format=conversations+pattern=dia%7Bdialogue%7D_utt%7Bturn%7D," in report.feature
    roberta = (plain, plain, vectors, vectors, vectors, vectors, plain, [0], [1], [1])
    path.write_bytes(pickle.dumps(roberta))
    report = import_(path, "conversations", cache, name="cosmic")
    assert [o.name for o in report.store.spec.outputs] == [f"roberta_{n}" for n in range(1, 5)]
    assert incoming.key_of_id("1_2") in report.store


def test_pickles_by_utterance_are_read(cache, tmp_path):
    path = tmp_path / "audio.pickle"
    path.write_bytes(pickle.dumps({"u1": np.arange(4.0), "u2": [1.0, 2, 3, 4], "u3": "text"}, 2))
    report = import_(path, "conversations", cache, name="cmn")
    assert report.added == 2
    np.testing.assert_array_equal(report.store.frames(incoming.key_of_id("u2")), [[1, 2, 3, 4]])
    assert [s.id for s in report.skipped] == ["u3"]
    path.write_bytes(pickle.dumps((1, {})))
    with pytest.raises(UsageError, match="tuple of '[?]d' .* none of the layouts known"):
        import_(path, "conversations", cache, name="x")


@pytest.mark.parametrize("format", ["mmsa", "conversations"])
def test_hostile_pickles_are_refused_by_name(cache, tmp_path, format):
    canary = tmp_path / "canary"

    class Touch:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {canary}",)

    path = tmp_path / "features.pkl"
    path.write_bytes(pickle.dumps({"train": {"id": ["a"], "audio": Touch()}}))
    with pytest.raises(UsageError, match=r"features\.pkl as a pickle: it asks for '\w+\.system'"):
        import_(path, format, cache, name="x")
    assert not canary.exists()
    assert not (tmp_path / "cache").exists()


def test_written_pickles_are_read_by_the_standard_library(tmp_path):
    value = {
        "none": None,
        "flags": [True, False],
        "integers": [0, -1, 2**70, 127, 128, -129],
        "text": "ü\ud800",
        "nested": {"a": [{"b": 1.5}]},
        "array": np.asfortranarray(np.arange(6, dtype=">f8").reshape(2, 3)),
        "streamed": Streamed((4, 2), np.dtype("<f2"), lambda: [halves(3, 2), halves(1, 2)]),
        "empty": np.zeros((0, 3), np.float32),
        "bytes": np.arange(3, dtype=np.uint8),
    }
    with open(tmp_path / "a.pkl", "wb") as file:
        dump(value, file)
    assert b"numpy._core" not in (tmp_path / "a.pkl").read_bytes()  # numpy before 1.26 lacks it
    found = pickle.loads((tmp_path / "a.pkl").read_bytes())
    for name in ("array", "empty", "bytes"):
        np.testing.assert_array_equal(found.pop(name), value.pop(name))
    np.testing.assert_array_equal(
        found.pop("streamed"), np.concatenate([halves(3, 2), halves(1, 2)])
    )
    del value["streamed"]
    assert found == value
    for value in (object(), np.array(["text"])):
        with pytest.raises(TypeError, match="is not written to a pickle"):
            dump(value, io.BytesIO())


# -- the table -------------------------------------------------------------------------------------


def test_unknown_formats_and_options_are_named(filled, cache, tmp_path):
    with pytest.raises(UnknownNameError, match="Unknown export format 'hdf'. Did you mean 'hdf5'"):
        export(filled, tmp_path / "a", "hdf")
    with pytest.raises(UnknownNameError, match="'shard_byte'.*Did you mean 'shard_bytes'"):
        export(filled, tmp_path / "a", "safetensors", shard_byte=1)
    with pytest.raises(UnknownNameError, match="Unknown import format 'pickle'"):
        import_(tmp_path, "pickle", cache, name="x")
    with pytest.raises(UnknownNameError, match="option of the import format 'npy' 'levl'"):
        import_(tmp_path, "npy", cache, name="x", levl="UTT")
    with pytest.raises(UsageError, match="does not exist"):
        import_(tmp_path / "none", "npy", cache, name="x")
    with pytest.raises(UsageError, match="modality=video"):
        import_(tmp_path, "npy", cache, name="x", modality="video")
    with pytest.raises(UsageError, match="shard_bytes=many, expected a whole number"):
        export(filled, tmp_path / "a", "safetensors", shard_bytes="many")
    with pytest.raises(UsageError, match="level=DAY, expected FRA or UTT"):
        export(filled, tmp_path / "a", "npy", level="day")
    with pytest.raises(UsageError, match="codes, which have no mean"):
        export(filled, tmp_path / "a", "npy", level="UTT")
    with pytest.raises(UsageError, match="model='../up' cannot be the name"):
        export(filled, tmp_path / "a", "npy", model="../up")
    assert everything(tmp_path) == set()


@pytest.mark.parametrize("name", ["", "a b", "../x", "-a", "a/b", "ü", "a,b=c"])
def test_names_that_cannot_be_in_a_feature_string_are_refused(cache, tmp_path, name):
    folder = folder_of(tmp_path, {"a": halves(1, 2)})
    with pytest.raises(UsageError, match="cannot name imported features"):
        import_(folder, "npy", cache, name=name)


def test_nothing_to_import_is_an_error_that_says_why(cache, tmp_path):
    bad = {"a": np.full((1, 2), np.nan), "b": np.full((1, 2), np.inf)}
    with pytest.raises(UsageError, match="2 utterances were left out: a: features: NaN"):
        import_(folder_of(tmp_path, bad), "npy", cache, name="x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"holds no \.npy file"):
        import_(tmp_path / "empty", "npy", cache, name="x")
    with pytest.raises(UsageError, match="holds no .pt or .pth file"):
        import_(tmp_path / "empty", "pt", cache, name="x")
    with pytest.raises(UsageError, match="0 .lengths files"):
        import_(tmp_path / "empty", "emotion2vec", cache, name="x")
    with pytest.raises(UsageError, match="holds no .safetensors file"):
        import_(tmp_path / "empty", "safetensors", cache, name="x")
    assert not (tmp_path / "cache").exists()


def test_tables_without_pyarrow_name_the_extra(filled, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'mer\[tables\]'"):
        export(filled, tmp_path / "a.parquet", "parquet")


def test_every_format_can_be_loaded_and_lists_its_options():
    for table in (EXPORTERS, IMPORTERS):
        for format in table.values():
            assert callable(format.load())
            assert set(format.options()) - set(format.takes) <= {"labels", "also"}
            assert set(format.takes) <= set(format.options())
            assert "=" not in "".join(format.takes)
    assert exchange.EXPORTERS["npy"].options() == ("level", "model")
