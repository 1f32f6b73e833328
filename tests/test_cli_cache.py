"""`mer cache …` as a user meets it: what is printed, what is left on disk, exit codes."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import soundfile

from mer.cache.exchange import EXPORTERS, IMPORTERS
from mer.cache.home import Cache
from mer.cli import AFTER_INTERRUPT, Command, main
from mer.pipelines.extraction import extract
from mer.pipelines.manifest import read_manifest

RATE_HZ = 16_000
FEATURE = "logmel:n_mels=20"
OTHER = "logmel:n_mels=8,dtype=float32"
IDS = [f"u{i}" for i in range(8)]

Mer = Callable[..., tuple[int, Any, str]]


@pytest.fixture
def mer(capsys: pytest.CaptureFixture[str]) -> Iterator[Mer]:
    """Run a command in this process; return exit code, JSON (or stdout), and stderr."""
    terminated = signal.getsignal(signal.SIGTERM)

    def run(*argv: Any) -> tuple[int, Any, str]:
        capsys.readouterr()
        code: Any = 0
        try:
            main(args=[str(a) for a in argv])
        except SystemExit as done:
            code = done.code
        out, err = capsys.readouterr()
        if "--json" not in argv:
            return code, out, err
        lines = out.strip().splitlines()
        assert len(lines) == 1, out
        return code, json.loads(lines[-1]), err

    yield run
    signal.signal(signal.SIGTERM, terminated)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    rows = ["id,path,text,label,split"]
    for i, name in enumerate(IDS):
        samples = rng.uniform(-0.3, 0.3, 1_600 + 400 * i).astype(np.float32)
        soundfile.write(folder / f"{name}.wav", samples, RATE_HZ)
        split = ("train", "validation", "test")[i % 3]
        rows.append(f"{name},{name}.wav,text {i},{i / 2},{split}")
    path = folder / "calls.csv"
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="module")
def made(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of two stores; the first has two parts."""
    root = tmp_path_factory.mktemp("made") / "cache"
    manifest = read_manifest(corpus)
    half = type(manifest)(manifest.name, manifest.utterances[:4])
    extract(half, [FEATURE], Cache(root), device="cpu")
    extract(manifest, [FEATURE, OTHER], Cache(root), device="cpu")
    return root


@pytest.fixture
def cache(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(made, tmp_path / "cache"))


def names(cache: Path) -> tuple[str, str]:
    """Return the names of the stores of `FEATURE` and `OTHER`."""
    first, second = sorted(Cache(cache).home.names())
    return (first, second) if first.startswith("logmel-20") else (second, first)


def store_at(cache: Path, place: int = 0) -> Path:
    return cache / names(cache)[place]


def damage(store: Path) -> str:
    """Flip a bit of the first part's frames; return the name of the part."""
    part = sorted((store / "parts").glob("[0-9a-f]*"))[0]
    shard = part / "logmel" / "frames" / "c" / "0" / "0"
    content = bytearray(shard.read_bytes())
    content[3] ^= 4
    shard.chmod(0o644)
    shard.write_bytes(content)
    return part.name


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and not p.name.startswith("inputs-memo")
    }


# What is there ------------------------------------------------------------------------------------


def test_ls_lists_every_store(mer: Mer, cache: Path) -> None:
    code, result, _ = mer("cache", "ls", "--cache", cache, "--json")
    assert code == 0
    assert result["cache"] == str(cache)
    assert {s["name"]: (s["utterances"], s["parts"]) for s in result["stores"]} == {
        names(cache)[0]: (8, 2),
        names(cache)[1]: (8, 1),
    }
    code, text, _ = mer("cache", "ls", "--cache", cache)
    assert code == 0
    assert all(name in text for name in names(cache))


def test_ls_of_an_empty_cache_says_how_to_fill_it(mer: Mer, tmp_path: Path) -> None:
    code, text, _ = mer("cache", "ls", "--cache", tmp_path / "none")
    assert code == 0
    assert "No stores in" in text
    assert "mer extract" in text


@pytest.mark.parametrize("place", ["name", "prefix", "path", "url"])
def test_info_tells_provenance_licence_and_fingerprint(mer: Mer, cache: Path, place: str) -> None:
    name = names(cache)[0]
    what = {
        "name": name,
        "prefix": name[:12],
        "path": cache / name,
        "url": (cache / name).as_uri(),
    }[place]
    code, info, _ = mer("cache", "info", what, "--cache", cache, "--json")
    assert code == 0
    assert info["name"] == name
    assert info["utterances"] == 8
    assert len(info["fingerprint"]) == 32
    assert info["identity"]["options"]["n_mels"] == 20
    assert info["licence"] is None
    code, text, _ = mer("cache", "info", what, "--cache", cache)
    assert code == 0
    assert info["fingerprint"] in text
    assert "licence: not stated" in text
    assert '"n_mels": 20' in text


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("logmel-21", "Unknown store 'logmel-21'. Did you mean 'logmel-20'"),
        ("logmle-8", "Did you mean 'logmel-8'"),
        ("", "The name of a store is empty"),
        ("logmel", "2 stores begin with 'logmel'"),
        ("./nowhere/logmel-20-0123456789abcdef", "nowhere"),
    ],
)
def test_a_store_that_is_not_meant_clearly_is_bad_usage(
    mer: Mer, cache: Path, what: str, message: str
) -> None:
    code, result, err = mer("cache", "info", what, "--cache", cache, "--json")
    assert code in (2, 4)
    assert message in result["error"]["message"]
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_du_adds_up_to_what_the_file_system_says(mer: Mer, cache: Path) -> None:
    (store_at(cache).with_name(names(cache)[0] + ".tmp") / "x").mkdir(parents=True)
    (store_at(cache).with_name(names(cache)[0] + ".tmp") / "x" / "y").write_bytes(bytes(100))
    code, result, _ = mer("cache", "du", "--cache", cache, "--json")
    assert code == 0
    by_name = {row["store"]: row for row in result["stores"]}
    assert by_name[names(cache)[0]]["temporary"] == 100
    for name in names(cache):
        beside = sum(by_name[name][what] for what in ("snapshot", "temporary", "quarantine"))
        size = sum(map(len, files(cache / name).values()))
        assert by_name[name]["total"] == size + beside
    assert result["total"]["total"] == sum(row["total"] for row in result["stores"])
    code, text, _ = mer("cache", "du", names(cache)[0], "--cache", cache)
    assert code == 0
    assert "temporary" in text
    assert names(cache)[1] not in text


# verify -------------------------------------------------------------------------------------------


def test_verify_of_sound_stores_reads_every_byte_and_exits_with_0(mer: Mer, cache: Path) -> None:
    code, result, _ = mer("cache", "verify", "--cache", cache, "--json")
    assert code == 0
    assert result["corrupt"] == []
    assert (result["stores"], result["checked"], result["utterances"]) == (2, 3, 16)
    assert result["bytes"] == sum(len(d) for n in names(cache) for d in files(cache / n).values())
    code, text, _ = mer("cache", "verify", "--cache", cache)
    assert code == 0
    assert "all sound" in text


def test_verify_names_damage_and_repair_costs_only_what_is_lost(
    mer: Mer, cache: Path, corpus: Path
) -> None:
    store = store_at(cache)
    part = damage(store)
    argv = ("cache", "verify", "--cache", cache, "--dataset", corpus)
    code, found, _ = mer(*argv, "--json")
    assert code == 4
    (fault,) = found["corrupt"]
    assert fault["store"] == str(store)
    assert fault["part"] == part
    assert fault["file"] == "logmel/frames/c/0/0"
    assert fault["reason"]
    assert fault["utterances"]
    assert set(fault["utterances"]) <= {f"calls/{name}" for name in IDS}
    code, text, _ = mer(*argv)
    assert code == 4
    assert part in text
    assert fault["utterances"][0] in text
    assert "--repair" in text

    code, repaired, _ = mer(*argv, "--repair", "--json")
    assert code == 4
    assert repaired["lost"] == found["lost"]
    assert repaired["quarantined"]
    assert mer("cache", "verify", "--cache", cache)[0] == 0
    code, again, _ = mer("extract", corpus, "-f", FEATURE, "--cache", cache, "--json")
    assert code == 0
    lost = len(found["lost"])
    assert (again["computed"], again["reused"]) == (lost, len(IDS) - lost)


def test_verify_refuses_a_cache_that_is_not_there(mer: Mer, tmp_path: Path) -> None:
    code, _, err = mer("cache", "verify", "--cache", tmp_path / "typo")
    assert code == 2
    assert f"There is no cache at {tmp_path / 'typo'}" in err
    code, text, _ = mer("cache", "verify", "--cache", tmp_path)
    assert code == 0
    assert "Nothing to check" in text


def test_a_store_that_is_named_twice_is_looked_at_once(mer: Mer, cache: Path) -> None:
    name = names(cache)[1]
    code, text, _ = mer("cache", "verify", name, name[:-4], cache / name, "--cache", cache)
    assert code == 0
    assert text.startswith("1 store, 1 part, 8 utterances, ")
    code, result, _ = mer("cache", "du", name, name, "--cache", cache, "--json")
    assert result["total"]["total"] == result["stores"][0]["total"]


def test_verify_without_a_data_set_names_keys(mer: Mer, cache: Path) -> None:
    damage(store_at(cache))
    code, found, _ = mer("cache", "verify", names(cache)[0], "--cache", cache, "--json")
    assert code == 4
    assert found["stores"] == 1
    assert all(len(bytes.fromhex(key)) == 16 for key in found["lost"])


def test_a_store_that_lost_its_own_metadata_is_found_repaired_and_made_again(
    mer: Mer, cache: Path, corpus: Path
) -> None:
    root = store_at(cache) / "zarr.json"
    content = root.read_bytes()
    root.write_bytes(content.replace(b'"n_mels": 20', b'"n_mels": 21'))
    assert mer("cache", "verify", "--cache", cache)[0] == 4
    assert mer("cache", "verify", "--cache", cache, "--repair")[0] == 4
    code, result, _ = mer("extract", corpus, "-f", FEATURE, "--cache", cache, "--json")
    assert code == 0
    assert result["computed"] + result["reused"] == len(IDS)
    code, result, _ = mer("cache", "verify", "--cache", cache, "--json")
    assert (code, result["corrupt"]) == (0, [])


# gc -----------------------------------------------------------------------------------------------


def keys_of(cache: Path) -> dict[str, set[bytes]]:
    return {store.name: set(store.keys()) for store in Cache(cache).stores()}


def test_gc_without_a_criterion_removes_no_utterance(mer: Mer, cache: Path) -> None:
    before = keys_of(cache)
    code, result, _ = mer("cache", "gc", "--cache", cache, "--json")
    assert code == 0
    assert result["utterances"] == 0
    assert keys_of(cache) == before
    assert [len(store.parts()) for store in Cache(cache).stores()] == [1, 1]
    code, result, _ = mer("cache", "gc", "--cache", cache, "--json")
    assert (code, result["steps"]) == (0, [])
    code, text, _ = mer("cache", "gc", "--cache", cache)
    assert code == 0
    assert "0 utterances" in text


DESTRUCTIVE = {
    "age": ("--older-than", "0s"),
    "size": ("--max-size", "4kB"),
    "extractor": ("--extractor", "logmel"),
}


@pytest.mark.parametrize("criterion", sorted(DESTRUCTIVE))
def test_gc_says_first_what_it_then_removes(mer: Mer, cache: Path, criterion: str) -> None:
    before = files(cache)
    argv = ("cache", "gc", "--cache", cache, *DESTRUCTIVE[criterion])
    code, planned, _ = mer(*argv, "--dry-run", "--json")
    assert code == 0
    assert planned["dry_run"]
    assert planned["utterances"] > 0
    assert files(cache) == before
    code, text, _ = mer(*argv, "--dry-run")
    assert "would be removed" in text
    assert files(cache) == before
    count = sum(map(len, keys_of(cache).values()))
    code, done, _ = mer(*argv, "--json")
    assert code == 0
    assert not done["dry_run"]
    assert done["steps"] == planned["steps"]
    assert count - sum(map(len, keys_of(cache).values())) == planned["utterances"]
    assert mer("cache", "verify", "--cache", cache)[0] == 0


def test_gc_looks_only_at_the_stores_it_is_told(mer: Mer, cache: Path) -> None:
    first, second = names(cache)
    argv = ("--older-than", "0s", "--store", second)
    code, _, _ = mer("cache", "gc", "--cache", cache, *argv, "--json")
    assert code == 0
    left = keys_of(cache)
    assert len(left[first]) == 8
    assert not left.get(second)


def test_gc_without_compaction_leaves_small_parts(mer: Mer, cache: Path) -> None:
    code, result, _ = mer("cache", "gc", "--no-compact", "--cache", cache, "--json")
    assert (code, result["steps"]) == (0, [])


def test_gc_keeps_what_any_of_the_data_sets_uses(
    mer: Mer, cache: Path, corpus: Path, tmp_path: Path
) -> None:
    rows = corpus.read_text().splitlines()
    for name, chosen in {"a": rows[1:3], "b": rows[2:5]}.items():
        lines = [rows[0], *chosen]
        (corpus.parent / f"{name}.csv").write_text("\n".join(lines) + "\n")
    used = [corpus.parent / f"{name}.csv" for name in "ab"]
    argv = ("cache", "gc", "--cache", cache, "--unused-by", used[0], "--unused-by", used[1])
    code, result, _ = mer(*argv, "--json")
    assert code == 0
    assert result["utterances"] == 8
    for path, missing in ((used[0], 0), (used[1], 0), (corpus, 4)):
        found = mer("extract", path, "-f", FEATURE, "--cache", cache, "--dry-run", "--json")[1]
        assert found["missing"] == {FEATURE: missing}


def test_gc_keeps_imported_features_that_no_manifest_can_know(
    mer: Mer, cache: Path, corpus: Path, tmp_path: Path
) -> None:
    (tmp_path / "theirs").mkdir()
    np.save(tmp_path / "theirs" / "stranger.npy", np.ones((4, 3), np.float32))
    argv = ("--name", "theirs", "--format", "npy", "--cache", cache)
    assert mer("cache", "import", tmp_path / "theirs", *argv)[0] == 0
    argv = ("cache", "gc", "--cache", cache, "--unused-by", corpus, "--json")
    code, result, _ = mer(*argv)
    assert (code, result["utterances"]) == (0, 0)
    assert any("imported-theirs" in note for note in result["notes"])
    code, result, _ = mer(*argv, "--store", "imported-theirs")
    assert (code, result["utterances"]) == (0, 1)


def test_gc_refuses_a_data_set_that_is_not_there_as_a_whole(
    mer: Mer, cache: Path, corpus: Path
) -> None:
    rows = corpus.read_text().splitlines()
    partly = corpus.parent / "partly.csv"
    partly.write_text("\n".join([*rows[:4], "gone,gone.wav,text,1.0,train"]) + "\n")
    before = files(cache)
    code, _, err = mer("cache", "gc", "--cache", cache, "--unused-by", partly)
    assert code == 2
    assert "1 utterances of 'partly' cannot be read" in err
    assert "Nothing was removed" in err
    assert files(cache) == before


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--older-than", "30"), "'30' is no age"),
        (("--max-size", "much"), "'much' is no size"),
        (("--root", "x"), "--root goes with --unused-by"),
        (("--unused-by", "ravdess"), "0 --root for 1 data sets"),
        (("--unused-by", "no.csv"), "does not exist"),
        (("--store", "nothing"), "Unknown store 'nothing'"),
    ],
)
def test_gc_refuses_what_it_cannot_mean(
    mer: Mer, cache: Path, argv: tuple[str, ...], message: str
) -> None:
    before = files(cache)
    code, _, err = mer("cache", "gc", "--cache", cache, *argv)
    assert code == 2
    assert message in err
    assert files(cache) == before


def test_gc_sweeps_and_removes_the_quarantine_only_if_asked(mer: Mer, cache: Path) -> None:
    damage(store_at(cache))
    mer("cache", "verify", "--repair", "--cache", cache)
    assert list(cache.glob("*.quarantine"))
    assert mer("cache", "gc", "--cache", cache)[0] == 0
    assert list(cache.glob("*.quarantine/*"))
    assert mer("cache", "gc", "--quarantine", "--cache", cache)[0] == 0
    assert not list(cache.glob("*.quarantine/*"))


# cp, diff -----------------------------------------------------------------------------------------


def test_cp_brings_stores_and_skips_what_is_there(mer: Mer, cache: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    code, result, _ = mer("cache", "cp", cache, target, "--json")
    assert code == 0
    assert sum(r["utterances"] for r in result["stores"]) == 16
    assert keys_of(target) == keys_of(cache)
    code, result, _ = mer("cache", "cp", names(cache)[0], target, "--cache", cache, "--json")
    assert code == 0
    assert [(r["utterances"], r["skipped_utterances"]) for r in result["stores"]] == [(0, 8)]
    code, result, _ = mer("cache", "diff", store_at(cache), store_at(target), "--json")
    assert (code, result["equal"], result["same"]) == (0, True, 8)
    code, text, _ = mer("cache", "diff", store_at(cache), store_at(target))
    assert "equal: 8 utterances" in text


def test_cp_leaves_out_what_is_damaged_and_says_so(mer: Mer, cache: Path, tmp_path: Path) -> None:
    damage(store_at(cache))
    code, result, err = mer("cache", "cp", cache, tmp_path / "target", "--json")
    assert code == 4
    assert len(result["damaged"]) == 1
    assert "damaged, not copied" in err
    assert mer("cache", "verify", "--cache", tmp_path / "target")[0] == 0


def test_cp_copies_the_other_stores_if_one_cannot_be_opened(
    mer: Mer, cache: Path, tmp_path: Path
) -> None:
    broken, sound = names(cache)
    (cache / broken / "zarr.json").unlink()
    newer = shutil.copytree(cache / sound, cache / "aaa-0123456789abcdef")
    root = newer / "zarr.json"
    root.write_text(root.read_text().replace('"zarr_format": 3', '"zarr_format": 4'))
    code, result, err = mer("cache", "cp", cache, tmp_path / "target", "--json")
    assert code == 4
    assert len(result["damaged"]) == 2
    assert sum(broken in reason for reason in result["damaged"]) == 1
    assert err.count("damaged, not copied: ") == 2
    assert {name: len(keys) for name, keys in keys_of(tmp_path / "target").items()} == {sound: 8}
    code, _, err = mer("cache", "cp", cache / broken, tmp_path / "other")
    assert code == 4
    assert "zarr.json" in err


def test_cp_takes_the_bare_name_of_a_folder(
    mer: Mer, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MER_CACHE", str(tmp_path / "default"))
    assert mer("cache", "cp", "cache", "x3")[0] == 0
    assert keys_of(tmp_path / "x3") == keys_of(cache)
    (tmp_path / "logmel-20").mkdir()  # a store that is called so comes first
    code, result, _ = mer("cache", "cp", "logmel-20", "x4", "--cache", "cache", "--json")
    assert code == 0
    assert set(keys_of(tmp_path / "x4")) == {names(cache)[0]}


@pytest.mark.parametrize("where", ["SOURCE", "TARGET"])
def test_cp_speaks_of_its_arguments(mer: Mer, cache: Path, tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("x")
    argv = {"SOURCE": (tmp_path / "file", tmp_path / "y"), "TARGET": (cache, tmp_path / "file")}
    code, _, err = mer("cache", "cp", *argv[where])
    assert code == 2
    assert f"Choose another {where}." in err
    assert "--cache" not in err


def test_cp_from_nowhere_is_bad_usage(mer: Mer, cache: Path, tmp_path: Path) -> None:
    code, _, err = mer("cache", "cp", tmp_path / "none", tmp_path / "target")
    assert code == 2
    assert "no stores in" in err.lower()
    code, _, err = mer("cache", "cp", names(cache)[0], cache, "--cache", cache)
    assert code == 2
    assert "onto itself" in err


def test_diff_tells_settings_apart(mer: Mer, cache: Path) -> None:
    code, result, _ = mer("cache", "diff", *names(cache), "--cache", cache, "--json")
    assert code == 0
    assert not result["equal"]
    assert any("n_mels" in name for name in result["identity"])
    code, text, _ = mer("cache", "diff", "--no-values", *names(cache), "--cache", cache)
    assert code == 0
    assert "n_mels: 20 ≠ 8" in text
    assert text.endswith("in both: 8 utterances (values not compared)\n")
    code, result, _ = mer("cache", "diff", "--no-values", *names(cache), "--cache", cache, "--json")
    assert (code, result["in_both"], result["same"]) == (0, 8, None)


def test_diff_says_what_a_store_does_not_have(mer: Mer, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    np.save(tmp_path / "theirs" / "a.npy", np.ones((4, 3), np.float32))
    argv = ("--name", "theirs", "--format", "npy", "--cache", cache)
    ours = names(cache)[0]
    assert mer("cache", "import", tmp_path / "theirs", *argv)[0] == 0
    argv = ("cache", "diff", ours, "imported-theirs", "--cache", cache)
    code, text, _ = mer(*argv)
    assert code == 0
    assert "identity options.n_mels: 20 ≠ absent" in text
    assert "only in b: 1 utterance\n" in text
    assert "identity model: null ≠ absent" in text
    assert mer(*argv, "--json")[1]["identity"]["options.n_mels"] == [20, "absent"]


# export, import -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["hdf5", "npy", "safetensors", "parquet"])
def test_what_is_exported_comes_back_for_the_same_recordings(
    mer: Mer, cache: Path, corpus: Path, tmp_path: Path, layout: str
) -> None:
    first = names(cache)[0]
    whose = ("--dataset", corpus)
    argv = ("cache", "export", first, tmp_path / "out", "--format", layout, "--cache", cache)
    code, result, _ = mer(*argv, *whose, "--json")
    assert code == 0
    assert result["utterances"] == len(IDS)
    assert result["failures"] == []
    (path,) = [Path(p) for p in result["paths"]]
    assert path.exists()
    back = ("--cache", tmp_path / "back", "--name", "theirs", "--format", layout)
    code, result, _ = mer("cache", "import", path, *back, *whose, "--licence", "CC0", "--json")
    assert code == 0
    assert (result["added"], result["skipped"], result["linked"]) == (len(IDS), [], "manifest")
    argv = ("extract", corpus, "-f", result["feature"], "--dry-run", "--cache", tmp_path / "back")
    code, found, _ = mer(*argv, "--json")
    assert (code, found["missing"]) == (0, {result["feature"]: 0})
    ours, theirs = (Cache(cache)[first], Cache(tmp_path / "back").stores()[0])
    output = theirs.spec.outputs[0].name
    for key in ours.keys():  # noqa: SIM118 - not a mapping
        np.testing.assert_array_equal(ours.frames(key, "logmel"), theirs.frames(key, output))
    code, text, _ = mer("cache", "info", theirs.url)
    assert code == 0
    assert "licence: CC0" in text
    assert "extractor unknown" in text


def test_an_export_of_one_store_is_not_written_over_unasked(
    mer: Mer, cache: Path, corpus: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out.h5"
    argv = ("cache", "export", names(cache)[0], target, "--format", "hdf5", "--cache", cache)
    assert mer(*argv)[0] == 0
    before = target.read_bytes()
    code, _, err = mer(*argv)
    assert code == 2
    assert "out.h5 exists already" in err
    assert "--overwrite" in err
    assert target.read_bytes() == before
    assert mer(*argv, "--overwrite", "--dataset", corpus)[0] == 0
    assert target.read_bytes() != before


def test_an_mmsa_pickle_takes_splits_and_labels_from_the_data_set(
    mer: Mer, cache: Path, corpus: Path, tmp_path: Path
) -> None:
    target = tmp_path / "features.pkl"
    argv = ("cache", "export", names(cache)[0], target, "--format", "mmsa", "--cache", cache)
    code, _, err = mer(*argv)
    assert code == 2
    assert "--dataset" in err
    also = ("--also", f"vision={names(cache)[1]}#logmel")
    code, result, _ = mer(*argv, "--dataset", corpus, *also, "--json")
    assert code == 0
    back = ("--cache", tmp_path / "back", "--name", "theirs", "--format", "mmsa", "--json")
    code, result, _ = mer("cache", "import", target, *back, "--dataset", corpus)
    assert code == 0
    (store,) = Cache(tmp_path / "back").stores()
    assert {o.name: o.dim for o in store.spec.outputs} == {"audio": 20, "vision": 8}
    assert set(store.keys()) == keys_of(cache)[names(cache)[0]]


def test_formats_and_options_that_do_not_exist_are_named(
    mer: Mer, cache: Path, tmp_path: Path
) -> None:
    argv = ("cache", "export", names(cache)[0], tmp_path / "x", "--cache", cache, "--format")
    code, _, err = mer(*argv, "hdf")
    assert code == 2
    assert "Did you mean 'hdf5'" in err
    code, _, err = mer(*argv, "npy", "--option", "levle=UTT")
    assert code == 2
    assert "'levle'" in err
    code, _, err = mer(*argv, "npy", "--option", "level")
    assert code == 2
    assert "'level' is not KEY=VALUE" in err
    for layout, option, message in (
        ("npy", "overwrite=1", "Unknown option of the export format 'npy' 'overwrite'"),
        ("hdf5", "keys=x", "The export format 'hdf5' has no options"),
        ("mmsa", "labels=x", "Known: max_frames, modality"),
        ("npy", "progress=x", "Known: level, model"),
    ):
        code, _, err = mer(*argv, layout, "--option", option)
        assert code == 2
        assert message in err
    theirs = ("cache", "import", tmp_path, "--name", "x", "--cache", cache, "--format")
    for option in ("name=foo", "keys=x", "progress=x", "licence=x", "modality=text"):
        code, _, err = mer(*theirs, "npy", "--option", option)
        assert code == 2
        assert f"Unknown option of the import format 'npy' {option.partition('=')[0]!r}" in err
        assert "unexpected" not in err
    code, _, err = mer(*argv, "hdf5", "--also", "vision=x")
    assert code == 2
    assert "--also goes with --format mmsa" in err
    assert not (tmp_path / "x").exists()


def test_what_is_linked_by_ids_alone_is_said_to_be_of_no_use_for_recipes(
    mer: Mer, corpus: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "features"
    folder.mkdir()
    for name in IDS:
        np.save(folder / f"{name}.npy", np.ones((4, 3), np.float32))
    argv = ("--name", "x", "--format", "npy", "--cache", tmp_path / "cache")
    code, text, _ = mer("cache", "import", folder, *argv)
    assert code == 0
    assert "note: linked by ids alone" in text
    assert "--dataset to train" in text
    code, result, _ = mer("cache", "import", folder, *argv, "--json")
    assert (result["linked"], len(result["notes"])) == ("ids", 1)
    code, result, _ = mer("cache", "import", folder, *argv, "--dataset", corpus, "--json")
    assert (code, result["linked"], result["notes"]) == (0, "manifest", [])


def test_info_prints_the_feature_string_of_what_was_imported(mer: Mer, tmp_path: Path) -> None:
    (tmp_path / "features").mkdir()
    np.save(tmp_path / "features" / "a.npy", np.ones((4, 3), np.float32))
    argv = ("--name", "x", "--format", "npy", "--cache", tmp_path / "cache", "--option")
    code, result, _ = mer("cache", "import", tmp_path / "features", *argv, "level=FRA", "--json")
    assert code == 0
    feature = result["feature"]
    assert ",format=npy+level=FRA," in feature
    assert shlex.quote(feature) == feature
    argv = ("cache", "info", "imported-x", "--cache", tmp_path / "cache")
    assert f"feature: {feature}\n" in mer(*argv)[1]
    assert mer(*argv, "--json")[1]["feature"] == feature


def test_imports_list_what_they_leave_out(mer: Mer, corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "features"
    folder.mkdir()
    for name in (*IDS[:3], "stranger"):
        np.save(folder / f"{name}.npy", np.ones((4, 3), np.float32))
    np.save(folder / f"{IDS[3]}.npy", np.full((4, 3), np.nan, np.float32))
    argv = ("--name", "x", "--format", "npy", "--cache", tmp_path / "cache", "--dataset", corpus)
    code, result, _ = mer("cache", "import", folder, *argv, "--json")
    assert code == 3
    assert result["added"] == 3
    assert {s["id"] for s in result["skipped"]} == {"stranger", IDS[3]}
    code, text, _ = mer("cache", "import", folder, *argv)
    assert code == 3
    assert "left out stranger" in text


# A file system that refuses -----------------------------------------------------------------------


def refusing(call: str, code: int, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``os.<call>`` fail from its ``after``-th use on."""
    real = getattr(os, call)
    count = [0]

    def limited(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] > after:
            raise OSError(code, os.strerror(code))
        return real(*args, **kwargs)

    monkeypatch.setattr(os, call, limited)


COMMANDS = ("gc", "cp", "import", "verify --repair")


def command(what: str, cache: Path, tmp_path: Path) -> tuple[tuple[Any, ...], Path]:
    """Return a command that writes, and the cache that it writes to."""
    if what == "gc":
        return ("cache", "gc", "--cache", cache), cache
    if what == "cp":
        return ("cache", "cp", cache, tmp_path / "target"), tmp_path / "target"
    if what == "import":
        folder = tmp_path / "features"
        folder.mkdir()
        np.save(folder / "a.npy", np.ones((4, 3), np.float32))
        target = tmp_path / "imported"
        argv = ("cache", "import", folder, "--name", "x", "--format", "npy", "--cache", target)
        return argv, target
    damage(store_at(cache))
    return ("cache", "verify", "--repair", "--cache", cache), cache


@pytest.mark.parametrize("what", COMMANDS)
@pytest.mark.parametrize(
    ("call", "code", "message"),
    [
        ("fsync", errno.ENOSPC, "No space left"),
        ("mkdir", errno.EROFS, "Read-only file system"),
        ("mkdir", errno.EACCES, "Permission denied"),
    ],
)
def test_a_refusal_of_the_file_system_is_one_message_and_loses_nothing(
    mer: Mer,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    call: str,
    code: int,
    message: str,
) -> None:
    argv, target = command(what, cache, tmp_path)
    before = keys_of(cache)
    for after in (0, 2):
        with monkeypatch.context() as patch:
            refusing(call, code, after, patch)
            exit_code, result, err = mer(*argv, "--json")
        if exit_code == 0:
            continue  # it did not come to that call, or an earlier one was repaired
        assert "unexpected" not in err
        if what == "verify --repair":  # says what it could not put right, and goes on
            assert exit_code == 4
            assert result["quarantined"] or any(message in note for note in result["notes"]), (
                result["notes"]
            )
        else:
            assert exit_code == 1, result
            assert message in result["error"]["message"]
            assert len(err.strip().splitlines()) == 1, err
            assert keys_of(cache) == before
        assert not [p for p in target.glob("*.tmp/*") if p.is_dir()]
    done, _, _ = mer(*argv)
    assert done in ((0, 4) if what == "verify --repair" else (0,))
    assert mer("cache", "verify", "--cache", target)[0] == 0
    if what in ("gc", "cp"):
        assert keys_of(target) == before


# Over the network ---------------------------------------------------------------------------------


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    pytest.importorskip("obstore")
    pytest.importorskip("moto")
    from s3_server import s3, settings

    from mer.cache import objects, remote

    monkeypatch.setenv("MER_LOCAL_COPY", str(tmp_path / "copy"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr(objects, "FIRST_WAIT_S", 0.001)
    remote.memory.clear()
    with s3() as made:
        for name, value in settings(made.gateway.url).items():
            monkeypatch.setenv(name, value)
        yield made
    remote.memory.clear()


def test_a_cache_in_a_bucket_takes_every_command(
    mer: Mer, bucket: Any, cache: Path, corpus: Path, tmp_path: Path
) -> None:
    url = bucket.url
    code, result, _ = mer("cache", "cp", cache, url, "--json")
    assert code == 0
    assert sum(r["utterances"] for r in result["stores"]) == 16
    code, result, _ = mer("extract", corpus, "-f", FEATURE, "--cache", url, "--json")
    assert (code, result["computed"], result["reused"]) == (0, 0, len(IDS))
    code, result, _ = mer("extract", corpus, "-f", "logmel:n_mels=4", "--cache", url, "--json")
    assert (code, result["computed"], result["reused"]) == (0, len(IDS), 0)
    code, result, _ = mer("cache", "ls", "--cache", url, "--json")
    assert code == 0
    assert [s["utterances"] for s in result["stores"]] == [8, 8, 8]
    name = names(cache)[0]
    for what in (f"{url}/{name}", name):
        code, info, _ = mer("cache", "info", what, "--cache", url, "--json")
        assert (code, info["path"], info["utterances"]) == (0, f"{url}/{name}", 8)
    assert mer("cache", "du", "--cache", url)[0] == 0
    code, result, _ = mer("cache", "verify", "--cache", url, "--json")
    assert (code, result["corrupt"], result["utterances"]) == (0, [], 24)
    code, result, _ = mer("cache", "gc", "--cache", url, "--json")
    assert (code, result["utterances"]) == (0, 0)
    code, result, _ = mer("cache", "diff", store_at(cache), f"{url}/{name}", "--json")
    assert (code, result["equal"]) == (0, True)
    target = tmp_path / "out.h5"
    argv = ("--format", "hdf5", "--dataset", corpus, "--cache", url)
    assert mer("cache", "export", name, target, *argv)[0] == 0
    assert mer("cache", "cp", url, tmp_path / "back")[0] == 0
    assert keys_of(tmp_path / "back").items() >= keys_of(cache).items()


def test_damage_in_a_bucket_is_found_and_repaired(
    mer: Mer, bucket: Any, cache: Path, corpus: Path
) -> None:
    from mer.cache import remote

    assert mer("cache", "cp", cache, bucket.url)[0] == 0
    name = names(cache)[0]
    part = Cache(bucket.url)[name].parts()[0].id
    path = f"{name}/parts/{part}/logmel/frames/c/0/0"
    content = bytearray(bucket.object(path))
    content[3] ^= 4
    bucket.object(path, bytes(content))
    remote.memory.clear()
    code, found, _ = mer("cache", "verify", "--cache", bucket.url, "--json")
    assert code == 4
    assert [(c["part"], c["file"]) for c in found["corrupt"]] == [(part, "logmel/frames/c/0/0")]
    assert mer("cache", "verify", "--repair", "--cache", bucket.url)[0] == 4
    code, result, _ = mer("extract", corpus, "-f", FEATURE, "--cache", bucket.url, "--json")
    assert code == 0
    assert result["computed"] == len(found["lost"])
    assert mer("cache", "verify", "--cache", bucket.url)[0] == 0


def test_a_published_cache_can_be_looked_at_and_copied_but_not_changed(
    mer: Mer, bucket: Any, cache: Path, tmp_path: Path
) -> None:
    from s3_server import Gateway, serve_folder

    name = names(cache)[0]
    assert mer("cache", "cp", cache, tmp_path / "www" / "features", "--web")[0] == 0
    with Gateway(serve_folder(tmp_path / "www")).running() as server:
        site = f"{server.url}/features"
        code, info, _ = mer("cache", "info", f"{site}/{name}", "--json")
        assert code == 0
        assert info["utterances"] == 8
        assert info["identity"]["extractor"] == "logmel"
        assert mer("cache", "verify", f"{site}/{name}")[0] == 0
        assert mer("cache", "cp", f"{site}/{name}", tmp_path / "mine")[0] == 0
        code, _, err = mer("cache", "cp", name, site, "--cache", cache)
        assert code == 2
        assert "can only be read" in err
    assert keys_of(tmp_path / "mine")[name] == keys_of(cache)[name]


def test_a_web_server_without_ranges_is_named_and_is_no_damage(
    mer: Mer, bucket: Any, cache: Path, tmp_path: Path
) -> None:
    from s3_server import Gateway, serve_folder

    assert mer("cache", "cp", cache, tmp_path / "www", "--web")[0] == 0
    folder = serve_folder(tmp_path / "www")

    def whole(method: str, path: str, headers: Any, body: bytes) -> Any:
        return folder(method, path, {}, body)

    with Gateway(whole).running() as server:
        url = f"{server.url}/{names(cache)[0]}"
        for argv in (("cp", url, tmp_path / "mine"), ("diff", url, store_at(cache))):
            code, _, err = mer("cache", *argv)
            assert code == 1
            assert "supports range requests: nginx, Apache" in err
            assert "damaged" not in err


def test_a_server_that_is_away_is_one_message(mer: Mer, bucket: Any, cache: Path) -> None:
    bucket.gateway.fault = lambda request: 503
    for argv in (("ls", "--cache", bucket.url), ("cp", cache, bucket.url)):
        code, _, err = mer("cache", *argv)
        assert code == 1
        assert "unexpected" not in err
        assert len(err.strip().splitlines()) == 1, err
        assert "503" in err


# As a process -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [
        ["cache", "--help"],
        *(
            ["cache", name, "--help"]
            for name in ("ls", "info", "verify", "gc", "du", "cp", "export", "import", "diff")
        ),
    ],
    ids=" ".join,
)
def test_every_help_has_an_example_and_imports_nothing_heavy(argv: list[str]) -> None:
    code = (
        "import sys\nfrom mer.cli import main\ntry:\n    main(sys.argv[1:])\n"
        "except SystemExit as e:\n    assert e.code == 0, e.code\n"
        "heavy = {'numpy', 'torch', 'zarr', 'yaml', 'rich', 'h5py', 'obstore'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Usage: mer cache" in done.stdout
    assert ("Example" in done.stdout) == (len(argv) > 2)


INTERRUPTED = """
import os, signal, sys, threading
from mer.cache.exchange import outgoing
from mer.cli import main

class Swallows:
    def __del__(self):
        os.kill(os.getpid(), getattr(signal, sys.argv[1]))
        for _ in range(1000):
            pass  # the exception is raised in here, where it is ignored

def advance(self, utterances=1):
    Swallows()
    threading.Event().wait(60)

outgoing.Outgoing.advance = advance
main(sys.argv[2:])
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interrupt_that_a_destructor_swallows_still_ends_an_export(
    cache: Path, tmp_path: Path, name: str
) -> None:
    out = tmp_path / "out"
    argv = ["cache", "export", names(cache)[0], str(out / "a.h5"), "--format", "hdf5", "--json"]
    out.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, name, *argv, "--cache", str(cache)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 130, done.stderr
    assert done.stderr.strip() == "mer: interrupted. TARGET is there as a whole or not at all."
    assert json.loads(done.stdout)["error"]["exit_code"] == 130
    assert not [path for path in out.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("argv", "function", "message"),
    [
        (("diff", "logmel-20", "logmel-8"), "mer.cache.diff.diff", "Nothing was changed."),
        (("verify",), "mer.cache.verify.verify", "Nothing was changed but what --repair"),
        (("gc",), "mer.cache.collect.run", "the same command goes on from there."),
        (("cp", "logmel-20", "x"), "mer.cache.transfer.copy", "goes on from there."),
    ],
)
def test_an_interrupt_says_what_is_left(
    mer: Mer,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    argv: tuple[str, ...],
    function: str,
    message: str,
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(function, interrupted)
    code, _, err = mer("cache", *argv, "--cache", cache)
    assert code == 130
    assert err.strip().startswith("mer: interrupted. ")
    assert message in err


def test_every_command_knows_what_an_interrupt_leaves() -> None:
    def leaves(group: click.Group) -> Iterator[click.Command]:
        for command in group.commands.values():
            yield from leaves(command) if isinstance(command, click.Group) else (command,)

    for command in leaves(main):
        assert isinstance(command, Command)
        assert command.name in AFTER_INTERRUPT


@pytest.mark.parametrize("name", ["export", "import"])
def test_help_lists_every_format_with_its_options(mer: Mer, name: str) -> None:
    _, text, _ = mer("cache", name, "--help")
    for format, known in (EXPORTERS if name == "export" else IMPORTERS).items():
        assert f"\n  {format} " in text
        assert all(f"{option}=" in text for option in known.takes)
    assert ("rate_hz=" in text) == (name == "import")


@pytest.mark.parametrize("name", ["verify", "cp"])
def test_a_terminal_sees_how_much_is_done(cache: Path, tmp_path: Path, name: str) -> None:
    pty = pytest.importorskip("pty")
    arguments = {"verify": ["--cache", cache], "cp": [cache, tmp_path / "target"]}[name]
    ours, theirs = pty.openpty()
    argv = [sys.executable, "-m", "mer.cli", "cache", name, *map(str, arguments)]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=theirs) as process:
        os.close(theirs)
        seen = b""
        while True:
            try:
                piece = os.read(ours, 4096)
            except OSError:  # Linux says so when the other end is closed
                break
            if not piece:
                break
            seen += piece
    os.close(ours)
    assert process.returncode == 0, seen.decode()
    assert "kB of" in seen.decode()


def test_a_cache_that_cannot_be_one_is_refused(mer: Mer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    code, _, err = mer("cache", "gc", "--cache", tmp_path / "file")
    assert code == 2
    assert "is a file" in err
