"""The command line as a user meets it: real processes, real files, documented exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

MER = [sys.executable, "-m", "mer.cli"]
RATE = 16_000


def mer(*argv, cwd=None, **environment):
    """Run ``mer``; return exit code, the JSON of stdout's last line if there is one, and stderr."""
    done = subprocess.run(
        [*MER, *map(str, argv)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **environment},
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    last = done.stdout.strip().splitlines()[-1:] or ["null"]
    result = json.loads(last[0]) if "--json" in argv else done.stdout
    return done.returncode, result, done.stderr


def tone(seconds, *, rate=RATE, channels=1, hz=200.0, seed=0):
    rng = np.random.default_rng(seed)
    t = np.arange(round(seconds * rate)) / rate
    wave = 0.3 * np.sin(2 * np.pi * hz * t) + 0.01 * rng.standard_normal(len(t))
    return np.repeat(wave[:, None], channels, axis=1).astype(np.float32)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """One folder per class, two speakers' worth of tones that differ by class."""
    root = tmp_path_factory.mktemp("corpus")
    for k, label in enumerate(("angry", "sad")):
        for i in range(4):
            path = root / label / f"s{i % 2}_{i}.wav"
            path.parent.mkdir(exist_ok=True)
            soundfile.write(path, tone(0.4 + 0.1 * i, hz=150 + 150 * k, seed=i), RATE)
    return root


@pytest.fixture(scope="module")
def manifest(corpus):
    lines = ["id,path,speaker,label,text"]
    for path in sorted(corpus.rglob("*.wav")):
        row = (
            f"{path.parent.name}-{path.stem},{path},{path.stem[:2]},{path.parent.name},hello there"
        )
        lines.append(row)
    file = corpus / "manifest.csv"
    file.write_text("\n".join(lines) + "\n")
    return file


def test_extract_computes_once_and_then_reuses(corpus, tmp_path):
    argv = ("extract", "folder", "--root", corpus, "-f", "logmel", "--cache", tmp_path, "--json")
    code, first, _ = mer(*argv)
    assert code == 0
    assert (first["utterances"], first["computed"], first["reused"]) == (8, 8, 0)
    assert first["stores"]["logmel"]["frames"] > 8 * 40
    code, second, _ = mer(*argv)
    assert (code, second["computed"], second["reused"], second["failed"]) == (0, 0, 8, 0)


def test_a_manifest_hits_what_the_folder_brought(corpus, manifest, tmp_path):
    mer("extract", "folder", "--root", corpus, "-f", "logmel", "--cache", tmp_path)
    _, result, _ = mer("extract", manifest, "-f", "logmel", "--cache", tmp_path, "--json")
    assert (result["computed"], result["reused"]) == (0, 8)


def test_dry_run_says_what_is_missing_and_writes_nothing(manifest, tmp_path):
    code, result, _ = mer(
        "extract", manifest, "-f", "logmel", "--dry-run", "--cache", tmp_path, "--json"
    )
    assert (code, result["missing"], result["stores"]) == (0, {"logmel": 8}, {})
    assert not list(tmp_path.glob("logmel*"))


def test_several_recipes_bring_what_each_needs(manifest, tmp_path):
    for mels in (20, 24):
        (tmp_path / f"{mels}.yaml").write_text(
            f"features: {{speech: 'logmel:n_mels={mels}'}}\nhead: {{name: simple}}\n"
        )
    code, result, _ = mer(
        *("extract", manifest, "--dry-run", "--cache", tmp_path / "cache", "--json"),
        *("--recipe", tmp_path / "20.yaml", "--recipe", tmp_path / "24.yaml"),
    )
    assert code == 0
    assert result["missing"] == {"logmel:n_mels=20": 8, "logmel:n_mels=24": 8}


def test_verify_agrees_with_what_was_stored(manifest, tmp_path):
    code, result, _ = mer(
        "extract", manifest, "-f", "logmel", "--verify", 3, "--cache", tmp_path, "--json"
    )
    assert code == 0
    assert 0 < result["verified"]["logmel"] < 1e-3


def test_bad_recordings_are_listed_and_cost_nothing_else(tmp_path):
    good = tone(0.5)
    nan = good.copy()
    nan[100] = np.nan
    files = {
        "good": (good, RATE, "PCM_16"),
        "slow": (tone(0.5, rate=8000), 8000, "PCM_16"),
        "surround": (tone(0.5, rate=48_000, channels=6), 48_000, "PCM_16"),
        "short": (tone(0.02), RATE, "PCM_16"),
        "nan": (nan, RATE, "FLOAT"),
        "zero": (good[:0], RATE, "PCM_16"),
    }
    for name, (samples, rate, subtype) in files.items():
        soundfile.write(tmp_path / f"{name}.wav", samples, rate, subtype=subtype)
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "text.wav").write_text("I am not a recording.\n" * 20)
    (tmp_path / "truncated.wav").write_bytes((tmp_path / "good.wav").read_bytes()[:2000])
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 12345\n"
    (tmp_path / "pointer.wav").write_text(pointer)
    names = [*files, "empty", "text", "truncated", "pointer", "gone"]
    manifest = tmp_path / "m.jsonl"
    lines = [json.dumps({"id": name, "path": f"{name}.wav"}) for name in names]
    manifest.write_text("\n".join(lines))
    argv = ("extract", manifest, "-f", "logmel", "--cache", tmp_path / "cache", "--json")
    code, result, stderr = mer(*argv)
    assert code == 3
    assert (result["computed"], result["failed"]) == (4, 7)
    reasons = {f["utterance"]: f["reason"] for f in result["failures"]}
    assert set(reasons) == {"nan", "zero", "empty", "text", "truncated", "pointer", "gone"}
    for name, reason in reasons.items():
        assert f"{name}.wav" in reason
        assert f"failed: {name}" in stderr
    for name, words in {
        "nan": "NaN|finite",
        "zero": "no samples|no audio|0 (samples|frames)|empty",
        "empty": "empty",
        "text": "text|not a recording|not audio",
        "truncated": "truncated|holds|promises",
        "pointer": "LFS",
        "gone": "no such file",
    }.items():
        assert pytest.importorskip("re").search(words, reasons[name], 2), reasons[name]
    _, again, _ = mer(*argv)
    assert (again["computed"], again["reused"], again["failed"]) == (0, 4, 7)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_recording_is_a_listed_failure(corpus, tmp_path):
    path = tmp_path / "closed.wav"
    soundfile.write(path, tone(0.2), RATE)
    path.chmod(0)
    (tmp_path / "m.csv").write_text(f"id,path\na,{path}\n")
    code, result, _ = mer(
        "extract", tmp_path / "m.csv", "-f", "logmel", "--cache", tmp_path / "c", "--json"
    )
    assert code == 3
    assert "permission" in result["failures"][0]["reason"].lower()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id,path\na,x.wav\na,y.wav\n", "'a'"),
        ("id,speaker\na,b\n", "path"),
        ("id,path,start,end\na,x.wav,2,1\n", "start"),
        ("", "empty"),
    ],
)
def test_a_bad_manifest_is_one_clear_error(tmp_path, content, message):
    (tmp_path / "m.csv").write_text(content)
    code, result, stderr = mer(
        "extract", tmp_path / "m.csv", "-f", "logmel", "--cache", tmp_path / "c", "--json"
    )
    assert code == 2
    assert "m.csv" in result["error"]["message"]
    assert message in result["error"]["message"]
    assert len(stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("-f", "logmell"), "Did you mean 'logmel'"),
        (("-f", "logmel:n_mel=3"), "n_mels"),
        (("-f", "wavlm:model=/no/such/folder"), "/no/such/folder"),
        ((), "at least one feature"),
    ],
)
def test_a_bad_feature_is_one_clear_error(manifest, tmp_path, argv, message):
    code, result, stderr = mer("extract", manifest, *argv, "--cache", tmp_path, "--json")
    assert code == 2
    assert message in result["error"]["message"]
    assert message in stderr


def test_a_cache_that_is_a_file_is_refused(manifest, tmp_path):
    file = tmp_path / "cache"
    file.write_text("mine")
    code, result, _ = mer("extract", manifest, "-f", "logmel", "--cache", file, "--json")
    assert code == 2
    assert "is a file" in result["error"]["message"]
    assert file.read_text() == "mine"


def test_unknown_datasets_and_labels_suggest_the_nearest(tmp_path, manifest):
    code, result, _ = mer("extract", "ravdes", "--root", tmp_path, "-f", "logmel", "--json")
    assert code == 2
    assert "'ravdess'" in result["error"]["message"]
    strange = tmp_path / "m.csv"
    strange.write_text(manifest.read_text().replace(",angry,", ",angri,"))
    code, result, _ = mer(
        *("train-head", "simple", "--dataset", strange, "--cache", tmp_path / "c", "--json"),
        *("--set", "features.speech=logmel", "--set", "dataset.labels=ekman-6"),
    )
    assert code == 2
    assert "'angri'" in result["error"]["message"]


def test_a_recipe_with_unknown_keys_reports_them_all_at_once(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("include: simple\ntrainin: {}\nevaluation: {seed: 1}\n")
    code, result, _ = mer("train-head", recipe, "--dataset", "demo", "--root", tmp_path, "--json")
    assert code == 2
    message = result["error"]["message"]
    assert "r.yaml" in message
    assert "'training'" in message
    assert "'seeds'" in message


def test_a_missing_feature_names_the_command_that_brings_it(manifest, tmp_path):
    code, result, _ = mer(
        *("train-head", "simple", "--dataset", manifest, "--cache", tmp_path / "c", "--json"),
        *("--set", "features.speech=logmel", "--set", "features.text=null"),
        *("--set", "evaluation.baselines=[majority]"),
    )
    assert code == 2
    assert f"mer extract {manifest} -f logmel" in result["error"]["message"]


def test_train_and_vote_from_a_manifest(manifest, tmp_path):
    cache = tmp_path / "cache"
    common = (
        *("--dataset", manifest, "--cache", cache, "--json", "--seeds", "1,2", "--extract"),
        *("--set", "features.speech=logmel", "--set", "features.text=null"),
        *("--set", "training.epochs=2", "--set", "head.width=16", "--set", "head.hidden=8"),
        *("--set", "evaluation.baselines=[majority]"),
    )
    runs = [tmp_path / "a", tmp_path / "b"]
    for run, rate in zip(runs, ("1e-3", "1e-2"), strict=True):
        code, result, _ = mer(
            "train-head", "simple", *common, "--out", run, "--set", f"training.lr_max={rate}"
        )
        assert code == 0, result
        assert result["head"] == "simple"
        assert Path(result["run"]) == run
        assert set(result["metrics"]) == {"UA", "WA", "WF1", "macro_F1"}
        assert set(result["metrics"]["UA"]) == {"mean", "sd"}
        assert len(result["folds"]) == 2
        for name in ("recipe.yaml", "metrics.json", "predictions.csv", "confusion.png"):
            assert (run / name).is_file(), name
    code, vote, _ = mer("ensemble-vote", *runs, "--out", tmp_path / "vote", "--json")
    assert code == 0
    assert len(vote["members"]) == 2
    assert set(vote["gain"]) == set(vote["metrics"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--set", "head.widht=3"), "Did you mean 'width'"),
        (("--set", "training.epochs=many"), "epochs must be an integer"),
        (("--folds", "9"), "has the folds 1 … 2 here"),
        (("--out", "."), "exists already"),
    ],
)
def test_faults_are_found_before_anything_is_extracted(manifest, tmp_path, argv, message):
    code, result, _ = mer(
        *("train-head", "simple", "--dataset", manifest, "--cache", tmp_path / "c", "--json"),
        *("--extract", "--set", "features.speech=logmel", *argv),
        cwd=manifest.parent,
    )
    assert code == 2
    assert message in result["error"]["message"]
    assert not list(tmp_path.glob("c/logmel*"))


def test_training_without_what_failed_ends_with_3_and_lists_it(manifest, tmp_path):
    more = tmp_path / "more.csv"
    more.write_text(manifest.read_text() + f"gone,{tmp_path}/gone.wav,s0,sad,hello there\n")
    code, result, stderr = mer(
        *("train-head", "simple", "--dataset", more, "--cache", tmp_path / "c", "--json"),
        *("--extract", "--set", "features.speech=logmel", "--set", "dataset.missing=drop"),
        *("--set", "training.epochs=1", "--seeds", "1", "--folds", "1", "--out", tmp_path / "r"),
        *("--set", "evaluation.baselines=[majority]"),
    )
    assert code == 3
    assert [f["utterance"] for f in result["extract"]["failures"]] == ["gone"]
    assert result["utterances"] == 8
    assert "failed: gone" in stderr


@pytest.mark.parametrize(
    "argv",
    [
        ("cache", "ls"),
        ("corpora", "ls"),
        ("extractors", "ls"),
        ("heads", "ls"),
        ("recipes", "ls"),
        ("recipes", "show", "simple"),
    ],
)
def test_listings_answer_in_both_forms(argv, tmp_path):
    environment = {"MER_CACHE": str(tmp_path)}
    code, result, stderr = mer(*argv, "--json", **environment)
    assert (code, stderr) == (0, "")
    assert isinstance(result, dict)
    code, text, _ = mer(*argv, **environment)
    assert code == 0
    assert text.strip()


def test_cache_info_shows_identity_and_outputs(manifest, tmp_path):
    mer("extract", manifest, "-f", "logmel", "--cache", tmp_path)
    code, info, _ = mer("cache", "info", "logmel", "--cache", tmp_path, "--json")
    assert code == 0
    assert info["utterances"] == 8
    assert info["identity"]["extractor"] == "logmel"
    assert info["outputs"]["logmel"]["rate_hz"] == 100.0
    code, result, _ = mer("cache", "info", "logmol", "--cache", tmp_path, "--json")
    assert code == 2


def test_a_damaged_store_is_reported_with_its_own_code(manifest, tmp_path):
    mer("extract", manifest, "-f", "logmel", "--cache", tmp_path)
    (part,) = tmp_path.glob("logmel-*/parts/*/zarr.json")
    part.unlink()
    code, result, stderr = mer("cache", "ls", "--cache", tmp_path, "--json")
    assert code == 4
    assert result["damaged"]
    assert "damaged" in stderr


def test_wrong_usage_exits_with_2(tmp_path):
    assert mer("extract")[0] == 2
    assert mer("no-such-command")[0] == 2
    assert mer("train-head", "simple", "--seeds", "one")[0] == 2
    code, _, stderr = mer("extract", "demo", "--root", tmp_path, "-f", "logmel", "--device", "gpu")
    assert code == 2
    assert "'gpu': expected auto, cpu, cuda or cuda:N" in stderr


def test_a_terminal_sees_progress(manifest, tmp_path):
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    argv = [*MER, "extract", str(manifest), "-f", "logmel", "--cache", str(tmp_path)]
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
    assert process.returncode == 0
    assert "8/8" in seen.decode()
    assert "real time" in seen.decode()
