"""Votes: who may vote together, who decides, and that order does not matter."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mer.cache.errors import UnknownNameError, UsageError
from mer.pipelines import rundir
from mer.pipelines.metrics import classification
from mer.pipelines.rundir import Predictions, Run, read_run
from mer.pipelines.voting import ensemble_vote, join, vote, weights_of

CLASSES = ("angry", "happy", "sad")


def predictions(rows, *, classes=CLASSES) -> Predictions:
    """Make a table of ``(utterance, fold, seed, label, probabilities)`` rows."""
    utterances, folds, seeds, labels, probabilities = zip(*rows, strict=True)
    array = np.array(probabilities, dtype=np.float64)
    return Predictions(
        classes=tuple(classes),
        utterances=utterances,
        folds=folds,
        seeds=np.array(seeds, dtype=np.int64),
        labels=np.array([classes.index(label) for label in labels]),
        predictions=array.argmax(1),
        probabilities=array,
    )


def random_part(rng, names, seeds=(1,), classes=CLASSES, labels=None, skill=1.0):
    rows = []
    labels = labels or {}
    for seed in seeds:
        for i, name in enumerate(names):
            label = labels.get(name, CLASSES[i % 3])
            logits = rng.normal(size=3) + skill * np.eye(3)[classes.index(label)]
            p = np.exp(logits) / np.exp(logits).sum()
            rows.append((name, f"fold{i % 2 + 1}", seed, label, p))
    return predictions(rows, classes=classes)


def write_run(folder: Path, test, validation, *, split="s", classes=CLASSES) -> Path:
    folder.mkdir(parents=True)
    (folder / "provenance.json").write_text(json.dumps({"classes": list(classes), "split": split}))
    (folder / "metrics.json").write_text("{}")
    rundir.write_predictions(test, folder / "predictions.csv")
    rundir.write_predictions(validation, folder / "validation.csv")
    return folder


TEST_IDS = [f"t{i}" for i in range(12)]
VALIDATION_IDS = [f"v{i}" for i in range(9)]


@pytest.fixture
def make_run(tmp_path):
    def make(name, seed=0, *, test_ids=TEST_IDS, seeds=(1, 2), skill=1.0, **options):
        rng = np.random.default_rng(seed)
        part = {k: options.pop(k) for k in ("labels",) if k in options}
        return write_run(
            tmp_path / name,
            random_part(rng, test_ids, seeds, skill=skill, **part),
            random_part(rng, VALIDATION_IDS, seeds, skill=skill),
            **options,
        )

    return make


# -- rules -----------------------------------------------------------------------------------------


def one_hot(*ballots):
    return np.eye(3)[np.array(ballots)]


def decide(ballots, method="majority", weights=None):
    probabilities = one_hot(*ballots)
    weights = np.full(len(ballots), 1 / len(ballots)) if weights is None else np.array(weights)
    return vote(probabilities, np.array(ballots), method, weights)[0].tolist()


def test_majority_decides():
    assert decide([[0, 1], [2, 1], [2, 0]]) == [2, 1]


def test_tie_goes_to_the_highest_ranked_member_in_the_tie():
    # Member 0 is ranked first, but its label is not among the tied ones.
    assert decide([[0], [1], [2], [2], [1]]) == [1]
    assert decide([[0], [2], [1], [2], [1]]) == [2]
    assert decide([[2], [1], [0]]) == [2]


def test_soft_vote_takes_the_largest_mean_probability():
    p = np.array([[[0.4, 0.6, 0.0]], [[0.4, 0.6, 0.0]], [[1.0, 0.0, 0.0]]])
    decisions, shares = vote(p, p.argmax(-1), "soft", np.full(3, 1 / 3))
    assert decisions.tolist() == [0]
    assert vote(p, p.argmax(-1), "majority", np.full(3, 1 / 3))[0].tolist() == [1]
    np.testing.assert_allclose(shares, [[0.6, 0.4, 0.0]])


def test_weighted_vote_follows_the_weights():
    assert decide([[0], [1], [1]], "weighted", [0.6, 0.2, 0.2]) == [0]
    assert decide([[0], [1], [1]], "weighted", [0.4, 0.3, 0.3]) == [1]


@given(st.data())
def test_majority_agrees_with_counting_by_hand(data):
    members = data.draw(st.integers(1, 6))
    ballot = st.lists(st.integers(0, 2), min_size=4, max_size=4)
    ballots = data.draw(st.lists(ballot, min_size=members, max_size=members))
    expected = []
    for column in zip(*ballots, strict=True):
        most = max(column.count(c) for c in column)
        expected.append(next(c for c in column if column.count(c) == most))
    assert decide(ballots) == expected


# -- joining ---------------------------------------------------------------------------------------


def test_seeds_of_a_run_are_averaged_into_one_member(make_run):
    runs = [read_run(make_run("a", 1)), read_run(make_run("b", 2))]
    ballot = join(runs)
    assert len(ballot.members) == 2
    member = next(m for m in ballot.members if m.name == "a")
    table = runs[0].test
    row = ballot.test_rows.index(("fold2", "t3"))
    mean = table.probabilities[[i for i, u in enumerate(table.utterances) if u == "t3"]].mean(0)
    np.testing.assert_allclose(member.test[0][row], mean)
    assert member.seeds == (1, 2)


def test_every_seed_may_vote_on_its_own(make_run):
    ballot = join([read_run(make_run("a", 1))], members="seeds")
    assert sorted(m.name for m in ballot.members) == ["a:1", "a:2"]


def test_members_are_ranked_by_validation_not_by_test(tmp_path):
    right = [(f"u{i}", "f", 1, CLASSES[i % 3], np.eye(3)[i % 3]) for i in range(6)]
    wrong = [(f"u{i}", "f", 1, CLASSES[i % 3], np.eye(3)[(i + 1) % 3]) for i in range(6)]
    write_run(tmp_path / "a", predictions(right), predictions(wrong))
    write_run(tmp_path / "b", predictions(wrong), predictions(right))
    ballot = join([read_run(tmp_path / "a"), read_run(tmp_path / "b")])
    assert [m.name for m in ballot.members] == ["b", "a"]
    result = ensemble_vote([tmp_path / "a", tmp_path / "b"], out=tmp_path / "vote")
    assert result.best == "b"
    assert result.metrics["UA"] == 0.0  # the tie goes to b, whose test predictions are all wrong


def test_classes_in_another_order_are_matched_by_name(tmp_path):
    rng = np.random.default_rng(0)
    test, validation = random_part(rng, TEST_IDS), random_part(rng, VALIDATION_IDS)
    write_run(tmp_path / "a", test, validation)
    order = [2, 0, 1]
    shuffled = tuple(CLASSES[i] for i in order)

    def reorder(p):
        place = np.argsort(order)
        return Predictions(
            classes=shuffled, utterances=p.utterances, folds=p.folds, seeds=p.seeds,
            labels=place[p.labels], predictions=place[p.predictions],
            probabilities=p.probabilities[:, order],
        )  # fmt: skip

    write_run(tmp_path / "b", reorder(test), reorder(validation), classes=shuffled)
    first, second = join([read_run(tmp_path / "a"), read_run(tmp_path / "b")]).members
    np.testing.assert_allclose(first.test[0], second.test[0])
    np.testing.assert_array_equal(first.test[1], second.test[1])
    assert first.metrics == second.metrics


@pytest.mark.parametrize("method", ["majority", "soft", "weighted"])
@given(order=st.permutations(range(4)), seed=st.integers(0, 50))
@settings(max_examples=15, deadline=None)
def test_order_of_members_does_not_matter(tmp_path_factory, method, order, seed):
    folder = tmp_path_factory.mktemp("runs")
    rng = np.random.default_rng(seed)
    runs = []
    for i in range(4):
        parts = [random_part(rng, ids, skill=0.3) for ids in (TEST_IDS, VALIDATION_IDS)]
        runs.append(read_run(write_run(folder / f"r{i}", *parts)))
    outcomes = []
    for members in (runs, [runs[i] for i in order]):
        ballot = join(members)
        stacked = [np.stack(a) for a in zip(*(m.test for m in ballot.members), strict=True)]
        decisions, shares = vote(*stacked, method, weights_of(ballot.members))
        outcomes.append(([m.name for m in ballot.members], decisions.tolist(), shares.tolist()))
    assert outcomes[0] == outcomes[1]


# -- refusals --------------------------------------------------------------------------------------


def test_other_label_set_is_refused(make_run, tmp_path):
    rng = np.random.default_rng(0)
    classes = ("angry", "happy", "calm")
    labels = {u: classes[i % 3] for i, u in enumerate([*TEST_IDS, *VALIDATION_IDS])}
    other = write_run(
        tmp_path / "other",
        random_part(rng, TEST_IDS, classes=classes, labels=labels),
        random_part(rng, VALIDATION_IDS, classes=classes, labels=labels),
        classes=classes,
    )
    with pytest.raises(UsageError, match=r"only the first has sad, only the second calm"):
        join([read_run(make_run("a")), read_run(other)])


def test_missing_utterances_are_counted_and_named(make_run):
    runs = [read_run(make_run("a")), read_run(make_run("b", test_ids=TEST_IDS[:7]))]
    for members in (runs, runs[::-1]):
        with pytest.raises(UsageError, match=r"5 test .* of .*a are not in .*b, e.g. t10, t11, t7"):
            join(members)


def test_other_folds_are_refused(tmp_path):
    rng = np.random.default_rng(0)
    validation = random_part(rng, VALIDATION_IDS)
    test = random_part(rng, TEST_IDS)
    moved = Predictions(
        classes=CLASSES, utterances=test.utterances, seeds=test.seeds, labels=test.labels,
        predictions=test.predictions, probabilities=test.probabilities,
        folds=("fold9", *test.folds[1:]),
    )  # fmt: skip
    runs = [
        write_run(tmp_path / "a", test, validation),
        write_run(tmp_path / "b", moved, validation),
    ]
    with pytest.raises(UsageError, match=r"1 test utterances have different folds, e.g. t0"):
        join([read_run(r) for r in runs])


def test_other_labels_are_refused(make_run):
    a = make_run("a")
    b = make_run("b", labels={"t4": "angry"})
    with pytest.raises(UsageError, match=r"1 test utterances have different labels, e.g. t4"):
        join([read_run(a), read_run(b)])


def test_other_training_parts_are_refused(make_run):
    with pytest.raises(UsageError, match=r"trained on different splits \(split hashes s and x\)"):
        join([read_run(make_run("a")), read_run(make_run("b", split="x"))])


def test_lone_run_and_repeated_run_are_refused(make_run):
    run = read_run(make_run("a"))
    with pytest.raises(UsageError, match="at least two members"):
        join([run])
    with pytest.raises(UsageError, match="votes once; given twice"):
        join([run, Run(run.path, run.provenance, run.metrics)])
    with pytest.raises(UsageError, match="needs runs"):
        join([])


def test_prediction_that_a_seed_lacks_is_refused(tmp_path):
    rng = np.random.default_rng(0)
    test = random_part(rng, TEST_IDS, seeds=(1, 2))
    short = Predictions(
        classes=CLASSES, utterances=test.utterances[:-1], folds=test.folds[:-1],
        seeds=test.seeds[:-1], labels=test.labels[:-1], predictions=test.predictions[:-1],
        probabilities=test.probabilities[:-1],
    )  # fmt: skip
    run = write_run(tmp_path / "a", short, random_part(rng, VALIDATION_IDS, seeds=(1, 2)))
    with pytest.raises(UsageError, match=r"1 test utterances lack a prediction .*, e.g. t11"):
        join([read_run(run)], members="seeds")


@pytest.mark.parametrize("method", ["search", "majorty"])
def test_unknown_method_is_refused(make_run, method):
    with pytest.raises(UnknownNameError, match=f"Unknown voting method '{method}'"):
        ensemble_vote([make_run("a")], method=method)


def test_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no such folder"):
        read_run(tmp_path / "absent")
    with pytest.raises(UsageError, match="has no provenance.json"):
        read_run(tmp_path)


# -- the whole -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["majority", "soft", "weighted"])
def test_vote_writes_a_folder_that_reads_like_a_run(make_run, tmp_path, method):
    members = [make_run(f"r{i}", i, skill=2.0) for i in range(3)]
    result = ensemble_vote(members, method=method, out=tmp_path / "vote")
    written = {p.name for p in (tmp_path / "vote").iterdir()}
    assert written >= {"provenance.json", "metrics.json", "predictions.csv", "validation.csv"}
    again = read_run(tmp_path / "vote")
    measured = classification(again.test.labels, again.test.predictions, again.classes)
    assert measured == result.metrics
    shown = result.to_json()
    assert shown["metrics"]["UA"] == {"mean": measured["UA"], "sd": 0.0}
    best = shown["members"][0]
    assert best["name"] == result.best
    assert shown["gain"]["WA"] == pytest.approx(measured["WA"] - best["metrics"]["WA"])
    assert sum(m["weight"] for m in shown["members"]) == pytest.approx(1.0)
    assert json.loads(json.dumps(shown)) == shown
    assert "gain over" in result.table()


def test_vote_may_vote_again(make_run, tmp_path):
    runs = [make_run(f"r{i}", i) for i in range(4)]
    ensemble_vote(runs[:2], out=tmp_path / "v1")
    ensemble_vote(runs[2:], out=tmp_path / "v2")
    first = read_run(tmp_path / "v1").test
    members = join([read_run(tmp_path / "v1"), read_run(tmp_path / "v2")]).members
    member = next(m for m in members if m.name == "v1")
    np.testing.assert_array_equal(member.test[1], first.predictions)


def test_output_that_exists_is_never_overwritten(make_run, tmp_path):
    runs = [make_run("a", 1), make_run("b", 2)]
    (tmp_path / "vote").mkdir()
    (tmp_path / "vote" / "mine.txt").write_text("precious")
    with pytest.raises(UsageError, match="exists already and a run is never overwritten"):
        ensemble_vote(runs, out=tmp_path / "vote")
    assert [p.name for p in (tmp_path / "vote").iterdir()] == ["mine.txt"]
