"""Whole experiments on a small corpus: the folder, the numbers, and what is refused before work."""

from __future__ import annotations

import csv
import dataclasses
import json

import numpy as np
import pytest
import tone_corpus
from safetensors import safe_open

from mer.cache.errors import (
    MissingFeatureError,
    ProtocolError,
    RecipeError,
    UsageError,
)
from mer.cache.home import Cache
from mer.pipelines import experiment, figures, rundir
from mer.pipelines.experiment import run_recipe, summarise
from mer.pipelines.extraction import extract
from mer.pipelines.manifest import read_manifest
from mer.pipelines.metrics import HEADLINE, classification
from mer.pipelines.recipe import load_recipe
from mer.pipelines.rundir import read_run
from mer.pipelines.voting import ensemble_vote

RECIPE = """
dataset: {{name: "{corpus}"}}
features: {{speech: "logmel:n_mels=20"}}
head: {{name: simple, width: 8, hidden: 8, dropout: 0.0}}
training: {{epochs: 10, batch_size: 4, lr_max: 0.02, warmup_share: 0.1, select: loss}}
evaluation:
  protocol: loso
  seeds: [1, 2]
  baselines: [majority, logreg, svm]
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return tone_corpus.write(tmp_path_factory.mktemp("tones"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory, corpus):
    cache = Cache(tmp_path_factory.mktemp("cache"))
    extract(read_manifest(corpus), ["logmel:n_mels=20"], cache, device="cpu", workers=1)
    return cache


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory, corpus):
    path = tmp_path_factory.mktemp("recipe") / "tones.yaml"
    path.write_text(RECIPE.format(corpus=corpus))
    return path


@pytest.fixture(scope="module")
def events():
    return []


@pytest.fixture(scope="module")
def result(tmp_path_factory, recipe_file, cache, events):
    out = tmp_path_factory.mktemp("out") / "run"
    return run_recipe(
        load_recipe(recipe_file), cache=cache, out=out, device="cpu", progress=events.append
    )


def test_run_directory_is_complete(result):
    written = {p.relative_to(result.run).as_posix() for p in result.run.rglob("*") if p.is_file()}
    trainings = [(speaker, seed) for speaker in range(4) for seed in (1, 2)]
    assert written == {
        "recipe.yaml",
        "provenance.json",
        "metrics.json",
        "predictions.csv",
        "validation.csv",
        "history.csv",
        "confusion.png",
        "curves.png",
        "run.log",
        *(f"checkpoints/s{speaker}-seed{seed}.safetensors" for speaker, seed in trainings),
    }


def test_head_learns_tones_and_beats_the_majority(result):
    assert result.metrics["UA"]["mean"] > 0.9
    assert result.baselines["majority"]["metrics"]["UA"]["mean"] == 0.5
    assert result.baselines["logreg"]["metrics"]["UA"]["mean"] > 0.9


def test_every_utterance_is_tested_once_per_seed(result, corpus):
    test = read_run(result.run).test
    ids = [u.id for u in read_manifest(corpus).utterances]
    for seed in (1, 2):
        assert sorted(np.array(test.utterances)[test.of_seed(seed)].tolist()) == sorted(ids)


def test_metrics_follow_from_the_predictions(result):
    run = read_run(result.run)
    per_seed = [
        classification(
            run.test.labels[run.test.of_seed(seed)],
            run.test.predictions[run.test.of_seed(seed)],
            run.classes,
        )
        for seed in (1, 2)
    ]
    for name in HEADLINE:
        values = [m[name] for m in per_seed]
        assert run.metrics["metrics"][name]["mean"] == pytest.approx(np.mean(values))
        assert run.metrics["metrics"][name]["sd"] == pytest.approx(np.std(values, ddof=1))
    assert run.metrics["metrics"] == result.metrics
    np.testing.assert_array_equal(
        np.array(run.metrics["confusion"]).sum(1), np.bincount(run.test.labels)
    )


def test_mean_over_folds_measures_every_fold_alone(result):
    per_fold = [seed["UA"] for fold in result.folds for seed in fold["seeds"]]
    assert len(per_fold) == 8
    assert result.mean_over_folds["UA"]["mean"] == pytest.approx(np.mean(per_fold))


def test_validation_predictions_are_not_of_the_test_part(result):
    run = read_run(result.run)
    tested = set(zip(run.test.folds, run.test.utterances, strict=True))
    validated = set(zip(run.validation.folds, run.validation.utterances, strict=True))
    assert validated
    assert not tested & validated


def test_provenance_says_where_numbers_come_from(result, cache):
    provenance = read_run(result.run).provenance
    (store,) = cache.stores()
    assert provenance["stores"]["logmel:n_mels=20"]["fingerprint"] == store.fingerprint
    assert provenance["protocol"] == "loso"
    assert provenance["validation"] == "next-fold"
    assert provenance["selected_by"] == "loss"
    assert provenance["seeds"] == [1, 2]
    assert {"mer", "torch", "python"} <= set(provenance["versions"])


def test_saved_recipe_gives_the_same_numbers_again(result, cache, tmp_path):
    again = run_recipe(
        load_recipe(result.run), cache=cache, out=tmp_path / "again", device="cpu", folds=[2]
    )
    assert again.recipe.evaluation.validation == "next-fold"
    assert again.recipe.dataset.labels == "as-given"
    test = read_run(result.run).test
    rows = [i for i, fold in enumerate(test.folds) if fold == "s1"]
    np.testing.assert_array_equal(read_run(again.run).test.probabilities, test.probabilities[rows])


def test_checkpoint_is_safetensors_with_its_head(result):
    path = result.run / "checkpoints" / "s0-seed1.safetensors"
    with safe_open(path, framework="np") as file:
        assert json.loads(file.metadata()["mer"])["classes"] == ["angry", "sad"]


def test_history_has_a_row_per_epoch(result):
    rows = list(csv.DictReader((result.run / "history.csv").read_text().splitlines()))
    assert len(rows) == 4 * 2 * 10
    assert rows[0]["fold"] == "s0"
    assert float(rows[0]["loss"]) > 0


def test_progress_counts_trainings_and_epochs(result, events):
    assert len(events) == 4 * 2 * 10
    last = events[-1]
    assert (last["training"], last["trainings"]) == (8, 8)
    assert (last["fold"], last["seed"], last["epoch"], last["epochs"]) == ("s3", 2, 10, 10)


def test_json_has_the_documented_keys(result):
    shown = json.loads(json.dumps(result.to_json()))
    assert {"run", "head", "protocol", "seconds", "metrics", "folds"} <= set(shown)
    assert set(shown["metrics"]) == set(HEADLINE)
    assert set(shown["metrics"]["UA"]) == {"mean", "sd"}
    assert len(shown["folds"]) == 4
    assert {"train": 12, "validation": 6, "test": 6}.items() <= shown["folds"][0].items()


def test_table_shows_head_and_baselines(result):
    lines = result.table().splitlines()
    assert "protocol loso, validation next-fold, 4 folds, 2 seeds" in lines[0]
    assert [line.split()[0] for line in lines[4:]] == [
        "simple",
        "mean",
        "majority",
        "logreg",
        "svm",
    ]
    assert "±" in lines[4]
    assert "±" not in lines[6]


def test_runs_of_one_split_vote(result, cache, recipe_file, tmp_path):
    other = run_recipe(
        load_recipe(recipe_file, ["head.width=4", "evaluation.baselines=[]"]),
        cache=cache,
        out=tmp_path / "other",
        device="cpu",
    )
    voted = ensemble_vote([result.run, other.run], out=tmp_path / "vote")
    assert voted.metrics["UA"] > 0.9


def test_runs_of_other_folds_do_not_vote(result, cache, recipe_file, tmp_path):
    part = run_recipe(
        load_recipe(recipe_file),
        cache=cache,
        out=tmp_path / "p",
        device="cpu",
        seeds=[1],
        folds=[1],
    )
    assert [fold["name"] for fold in part.folds] == ["s0"]
    assert part.metrics["UA"]["sd"] == 0.0
    with pytest.raises(UsageError, match="18 test utterances of .* are not in"):
        ensemble_vote([result.run, part.run], out=tmp_path / "vote")


# -- refused before work ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (["head.widht=3"], RecipeError, "head: .*unknown key 'widht'. Did you mean 'width'"),
        (["training.lr=3"], RecipeError, "training: unknown key 'lr'"),
        (["head.name=mdat"], RecipeError, "features: .*'text' is missing"),
        (["evaluation.folds=[5]"], RecipeError, "'loso' has the folds 1 … 4 here. Got 5"),
        (["evaluation.protocol=speaker-kfold-9"], ProtocolError, "needs 9 speakers"),
        (["evaluation.protocol=utterance-kfold-3"], ProtocolError, "leaks"),
        (["dataset.name=absent.csv"], UsageError, "absent.csv"),
        (["features.speech=logmel"], MissingFeatureError, "Run `mer extract"),
    ],
)
def test_fault_is_found_before_training(
    recipe_file, cache, tmp_path, monkeypatch, settings, error, message
):
    monkeypatch.setattr(experiment, "_train", lambda *_: pytest.fail("trained"))
    with pytest.raises(error, match=message):
        run_recipe(
            load_recipe(recipe_file, settings), cache=cache, out=tmp_path / "run", device="cpu"
        )
    assert list(tmp_path.iterdir()) == []


def test_overlapping_stretches_of_two_copies_of_a_recording_leak(
    recipe_file, cache, corpus, tmp_path
):
    recording = corpus.parent / "s0-angry-2.wav"
    (tmp_path / "copy.wav").write_bytes(recording.read_bytes())
    rows = ["id,path,start,end,speaker,label"]
    for speaker in ("s0", "s1", "s2", "s3"):
        takes = [corpus.parent / f"{speaker}-sad-{take}.wav" for take in range(3)]
        rows += [f"{take.stem},{take},,,{speaker},sad" for take in takes]
    rows += [f"x,{recording},0,0.3,s0,angry", f"y,{tmp_path / 'copy.wav'},0.2,0.4,s1,angry"]
    path = tmp_path / "cut.csv"
    path.write_text("\n".join(rows))
    recipe = load_recipe(recipe_file, [f"dataset.name={path}"])
    with pytest.raises(ProtocolError, match="one recording is both .*: 'y and x'"):
        run_recipe(recipe, cache=cache, out=tmp_path / "run", device="cpu")
    path.write_text("\n".join(rows).replace("0.2,0.4", "0.3,0.4"))
    with pytest.raises(MissingFeatureError):
        run_recipe(recipe, cache=cache, out=tmp_path / "run", device="cpu")


def test_faults_of_head_and_training_are_reported_together(recipe_file, cache):
    settings = ["head.widht=3", "training.epochs=many", "features.extra=logmel:n_mels=20"]
    with pytest.raises(RecipeError, match="has 2 faults") as caught:
        run_recipe(load_recipe(recipe_file, settings), cache=cache, device="cpu")
    assert "widht" in str(caught.value)
    assert "epochs must be an integer" in str(caught.value)


def test_accepted_leak_is_recorded(recipe_file, cache, tmp_path):
    settings = ["evaluation.protocol=utterance-kfold-2", "evaluation.allow_leak=a test of it"]
    result = run_recipe(
        load_recipe(recipe_file, settings), cache=cache, out=tmp_path / "r", device="cpu", seeds=[1]
    )
    assert any(note.startswith("Leak accepted: a test of it") for note in result.notes)
    assert read_run(result.run).provenance["leak"].startswith("a test of it")


def test_existing_output_is_refused_before_work(recipe_file, cache, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UsageError, match="exists already"):
        run_recipe(load_recipe(recipe_file), cache=cache, out=tmp_path, device="cpu")


def test_interrupted_run_leaves_nothing(recipe_file, cache, tmp_path):
    def stop(event):
        if event["training"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_recipe(
            load_recipe(recipe_file), cache=cache, out=tmp_path / "r", device="cpu", progress=stop
        )
    assert list(tmp_path.iterdir()) == []


def test_run_without_matplotlib_succeeds_and_says_so(recipe_file, cache, tmp_path, monkeypatch):
    monkeypatch.setitem(figures.__dict__, "_figure", _no_matplotlib)
    result = run_recipe(
        load_recipe(recipe_file),
        cache=cache,
        out=tmp_path / "r",
        device="cpu",
        seeds=[1],
        folds=[1],
    )
    assert not (result.run / rundir.CONFUSION).exists()
    assert "confusion.png is left out: no matplotlib" in (result.run / rundir.LOG).read_text()


def _no_matplotlib(*_):
    from mer.cache.errors import MissingDependencyError

    raise MissingDependencyError("no matplotlib")


def test_dropped_utterances_change_no_ones_side(recipe_file, cache, corpus, tmp_path):
    (corpus.parent / "bad.wav").write_bytes(b"not sound")
    more = corpus.with_name("more.csv")
    more.write_text(corpus.read_text() + "bad,bad.wav,s0,angry,big\n")
    settings = [f"dataset.name={more}", "dataset.missing=drop"]
    result = run_recipe(
        load_recipe(recipe_file, settings), cache=cache, out=tmp_path / "r", device="cpu", seeds=[1]
    )
    assert [fold["test"] for fold in result.folds] == [6, 6, 6, 6]
    assert read_run(result.run).provenance["dropped"] == ["bad"]


@pytest.mark.parametrize(("values", "sd"), [([0.5], 0.0), ([0.4, 0.6], 0.2 / np.sqrt(2))])
def test_summary_uses_the_sample_deviation(values, sd):
    summary = summarise([dict.fromkeys(HEADLINE, v) for v in values])
    assert summary["UA"] == pytest.approx({"mean": 0.5, "sd": sd})


def test_results_do_not_change_after_the_fact(result):
    with pytest.raises(dataclasses.FrozenInstanceError, match="seconds"):
        result.seconds = 0.0
