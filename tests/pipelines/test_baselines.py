"""Baselines: they learn, they never look at the test part, they answer in odd folds too."""

from __future__ import annotations

import numpy as np
import pytest

from mer.pipelines import baselines

CLASSES = ("a", "b", "c")


def separable(n=90, dim=6, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    centres = rng.normal(size=(3, dim)) * 4
    vectors = centres[labels] + rng.normal(size=(n, dim))
    # Scales far apart, as functionals have them: only standardised vectors are learnt well.
    return (vectors * 10.0 ** rng.integers(-3, 4, dim)).astype(np.float32), labels


PARTS = (np.arange(0, 45), np.arange(45, 60), np.arange(60, 90))


@pytest.mark.parametrize("name", ["logreg", "svm"])
def test_learns_what_can_be_learnt(name):
    vectors, labels = separable()
    fitted = baselines.fit(name, vectors, labels, PARTS, CLASSES)
    assert (fitted.test == labels[PARTS[2]]).mean() > 0.9
    assert fitted.settings["C"] in baselines.C_GRID[name]
    assert fitted.settings["validation_UA"] > 0.9
    assert fitted.notes == ()


@pytest.mark.parametrize("name", ["majority", "logreg", "svm"])
def test_is_deterministic_and_blind_to_test_labels(name):
    vectors, labels = separable()
    first = baselines.fit(name, vectors, labels, PARTS, CLASSES)
    spoilt = labels.copy()
    spoilt[PARTS[2]] = 0
    second = baselines.fit(name, vectors, spoilt, PARTS, CLASSES)
    np.testing.assert_array_equal(first.test, second.test)
    assert first.settings == second.settings


@pytest.mark.parametrize("name", ["logreg", "svm"])
def test_validation_part_chooses_c_but_is_not_learnt(name, monkeypatch):
    vectors, labels = separable()
    scores = iter([0.2, 0.7, 0.7, 0.1, 0.3, 0.6])
    monkeypatch.setattr(baselines, "classification", lambda *_: {"UA": next(scores)})
    fitted = baselines.fit(name, vectors, labels, PARTS, CLASSES)
    assert fitted.settings == {"C": baselines.C_GRID[name][1], "validation_UA": 0.7}


def test_majority_takes_the_training_part_alone():
    labels = np.array([2, 2, 1, 0, 0, 0])
    parts = (np.array([0, 1, 2]), np.array([3]), np.array([4, 5]))
    fitted = baselines.fit("majority", None, labels, parts, CLASSES)
    assert fitted.test.tolist() == [2, 2]
    assert fitted.settings == {"class": "c"}


@pytest.mark.parametrize("name", ["logreg", "svm"])
def test_fold_without_validation_takes_a_fixed_c(name):
    vectors, labels = separable()
    parts = (PARTS[0], np.array([], dtype=np.int64), PARTS[2])
    fitted = baselines.fit(name, vectors, labels, parts, CLASSES)
    assert fitted.settings == {"C": baselines.C_WITHOUT_VALIDATION[name], "validation_UA": None}


@pytest.mark.parametrize("name", ["logreg", "svm"])
def test_class_absent_from_training_is_never_predicted(name):
    vectors, labels = separable()
    train = PARTS[0][labels[PARTS[0]] != 1]
    fitted = baselines.fit(name, vectors, labels, (train, *PARTS[1:]), CLASSES)
    assert set(fitted.test.tolist()) == {0, 2}


def test_single_class_in_training_is_said():
    vectors, labels = separable()
    train = PARTS[0][labels[PARTS[0]] == 1]
    fitted = baselines.fit("logreg", vectors, labels, (train, *PARTS[1:]), CLASSES)
    assert set(fitted.test.tolist()) == {1}
    assert fitted.notes == ("Only 'b' in training: logreg answers with it.",)


def test_unknown_name_and_missing_vectors_are_refused():
    vectors, labels = separable()
    with pytest.raises(ValueError, match="majority, logreg or svm. Got 'forest'"):
        baselines.fit("forest", vectors, labels, PARTS, CLASSES)
    with pytest.raises(ValueError, match="'svm' needs vectors"):
        baselines.fit("svm", None, labels, PARTS, CLASSES)
