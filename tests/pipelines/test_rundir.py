"""Run directories: tables come back as written, folders appear whole or not at all."""

from __future__ import annotations

import csv
import json
import logging

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mer.cache.errors import MissingDependencyError, UsageError
from mer.pipelines import rundir
from mer.pipelines.rundir import Predictions, RunWriter, read_predictions, read_run

CLASSES = ("angry", "sad")


def table(ids=("a", "b"), seed=1) -> Predictions:
    n = len(ids)
    p = np.linspace(0.1, 0.9, n, dtype=np.float32)
    probabilities = np.stack([p, 1 - p], axis=1)
    return Predictions(
        classes=CLASSES,
        utterances=tuple(ids),
        folds=("f",) * n,
        seeds=np.full(n, seed),
        labels=np.arange(n) % 2,
        predictions=probabilities.argmax(1),
        probabilities=probabilities,
    )


@given(
    ids=st.lists(st.text(max_size=6).filter(lambda s: "\r" not in s), max_size=5),
    values=st.lists(st.floats(0, 1, width=32), min_size=5, max_size=5),
)
def test_predictions_come_back_exactly(tmp_path_factory, ids, values):
    path = tmp_path_factory.mktemp("p") / "p.csv"
    p = table(ids)
    probabilities = np.array(values[: len(ids)], dtype=np.float32)[:, None].repeat(2, 1)
    p = Predictions(
        classes=p.classes, utterances=p.utterances, folds=p.folds, seeds=p.seeds, labels=p.labels,
        predictions=p.predictions, probabilities=probabilities.reshape(len(ids), 2),
    )  # fmt: skip
    if any(any("\ud800" <= c <= "\udfff" for c in i) for i in ids):
        return
    rundir.write_predictions(p, path)
    back = read_predictions(path, CLASSES)
    assert back.utterances == p.utterances
    np.testing.assert_array_equal(back.probabilities.astype(np.float32), p.probabilities)
    np.testing.assert_array_equal(back.labels, p.labels)
    np.testing.assert_array_equal(back.predictions, p.predictions)


def test_columns_are_the_documented_ones_and_found_by_name(tmp_path):
    path = tmp_path / "p.csv"
    rundir.write_predictions(table(), path)
    rows = list(csv.reader(path.read_text().splitlines()))
    assert rows[0] == ["utterance", "fold", "seed", "label", "prediction", "p_angry", "p_sad"]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([[*row[::-1], "more"] for row in rows])
    assert read_predictions(path, CLASSES).utterances == ("a", "b")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("utterance,fold\n", "lack the columns seed, label, prediction, p_angry, p_sad"),
        ("", "lack the columns utterance"),
        ("{h}a,f,1,angry,calm,0.5,0.5\n", "row 2 cannot be used: KeyError.'calm'"),
        ("{h}a,f,one,angry,sad,0.5,0.5\n", "row 2 cannot be used"),
        ("{h}a,f,1,angry,sad,0.5\n", "row 2 cannot be used"),
        ("{h}a,f,1,angry,sad,0.5,nan\n", "not finite"),
    ],
)
def test_damaged_table_is_one_clear_error(tmp_path, text, message):
    path = tmp_path / "p.csv"
    path.write_text(text.format(h="utterance,fold,seed,label,prediction,p_angry,p_sad\n"))
    with pytest.raises(UsageError, match=message):
        read_predictions(path, CLASSES)


def test_folder_appears_only_when_whole(tmp_path):
    target = tmp_path / "deep" / "run"
    with RunWriter(target) as writer:
        writer.write_text("a.txt", "1")
        assert not target.exists()
    assert {p.name for p in target.iterdir()} == {"a.txt", "run.log"}
    assert [p.name for p in target.parent.iterdir()] == ["run"]


def test_failed_run_leaves_nothing_behind(tmp_path):
    target = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt), RunWriter(target) as writer:  # noqa: PT012
        writer.write_text("a.txt", "1")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_empty_folder_may_be_filled_and_a_full_one_not(tmp_path):
    (tmp_path / "empty").mkdir()
    with RunWriter(tmp_path / "empty"):
        pass
    with pytest.raises(UsageError, match="exists already and a run is never overwritten"):
        RunWriter(tmp_path / "empty")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="exists already"):
        RunWriter(tmp_path / "file")


def test_folder_taken_meanwhile_is_not_overwritten(tmp_path):
    target = tmp_path / "run"
    with pytest.raises(UsageError, match="was taken while the run was on"), RunWriter(target):  # noqa: PT012
        target.mkdir()
        (target / "theirs").write_text("")
    assert [p.name for p in target.iterdir()] == ["theirs"]


def test_output_below_a_file_is_a_usage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UsageError, match="cannot be written"),
        RunWriter(tmp_path / "file" / "run"),
    ):
        pass


def test_log_holds_own_lines_whatever_the_level_and_ends_with_the_run(tmp_path):
    ours = logging.getLogger("mer.somewhere")
    with RunWriter(tmp_path / "run") as writer:
        writer.log("line one")
        ours.warning("careful")
    ours.warning("too late")
    text = (tmp_path / "run" / "run.log").read_text()
    assert "line one" in text
    assert "careful" in text
    assert "too late" not in text


def test_missing_matplotlib_is_noted_and_the_run_goes_on(tmp_path):
    with RunWriter(tmp_path / "run") as writer, writer.figure("confusion.png"):
        raise MissingDependencyError("Figures need matplotlib")
    assert "confusion.png is left out: Figures need matplotlib" in (
        (tmp_path / "run" / "run.log").read_text()
    )


def test_json_without_nan(tmp_path):
    with (
        pytest.raises(ValueError, match="not JSON compliant"),
        RunWriter(tmp_path / "run") as writer,
    ):
        writer.write_json("m.json", {"x": float("nan")})
    assert not (tmp_path / "run").exists()


def test_history_columns_are_the_union_of_keys(tmp_path):
    with RunWriter(tmp_path / "run") as writer:
        writer.write_rows("h.csv", [{"epoch": 1, "loss": 2.0}, {"epoch": 2, "extra": 3}])
    assert (tmp_path / "run" / "h.csv").read_text() == "epoch,loss,extra\n1,2.0,\n2,,3\n"


def test_default_folders_do_not_collide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = rundir.default_folder("some/corpus.csv", "simple", "abcdef123")
    assert first.parent.name == "runs"
    assert first.name.startswith("corpus-simple-abcdef-")
    first.mkdir(parents=True)
    assert rundir.default_folder("some/corpus.csv", "simple", "abcdef123") != first


def test_folder_that_is_no_run_says_what_it_lacks(tmp_path):
    (tmp_path / "provenance.json").write_text("{}")
    with pytest.raises(UsageError, match="has no metrics.json"):
        read_run(tmp_path)
    (tmp_path / "metrics.json").write_text("[")
    with pytest.raises(UsageError, match="metrics.json cannot be read"):
        read_run(tmp_path)
    (tmp_path / "metrics.json").write_text(json.dumps({}))
    with pytest.raises(UsageError, match="names no classes"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("fold 1/2", "fold_1_2-"), ("..", "-"), ("Ses01", "Ses01"), ("ü:x", "ü_x-")],
)
def test_fold_names_become_file_names(name, expected):
    made = rundir.file_name(name)
    assert made.startswith(expected)
    assert "/" not in made
    assert made == name or len(made) == len(expected) + 8


def test_two_fold_names_never_share_a_file():
    assert len({rundir.file_name(name) for name in ("a/b", "a_b", "a:b", "a b")}) == 4
