from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics

from mer.pipelines.metrics import HEADLINE, classification

CLASSES = ["angry", "happy", "neutral", "sad"]
pairs = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=60)


def test_a_case_computed_by_hand() -> None:
    measured = classification([0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 2], ["a", "b", "c"])
    # recall 2/3, 1/2, 1; precision 1, 1/2, 1/2; F1 4/5, 1/2, 2/3
    assert measured["WA"] == pytest.approx(4 / 6)
    assert measured["UA"] == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    assert measured["macro_precision"] == pytest.approx((1 + 1 / 2 + 1 / 2) / 3)
    assert measured["macro_F1"] == pytest.approx((4 / 5 + 1 / 2 + 2 / 3) / 3)
    assert measured["WF1"] == pytest.approx((3 * 4 / 5 + 2 * 1 / 2 + 1 * 2 / 3) / 6)
    assert measured["confusion"] == [[2, 1, 0], [0, 1, 1], [0, 0, 1]]
    assert measured["per_class"]["b"] == {"recall": 0.5, "precision": 0.5, "f1": 0.5, "support": 2}
    assert measured["utterances"] == 6


def test_averages_run_over_classes_that_no_utterance_has() -> None:
    measured = classification([0, 1], [0, 1], CLASSES)
    assert measured["WA"] == 1.0
    assert measured["UA"] == measured["macro_F1"] == 0.5
    assert measured["per_class"]["sad"] == {"recall": 0, "precision": 0, "f1": 0, "support": 0}


@given(pairs)
def test_metrics_are_those_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    truth, guess = np.array(pairs).T
    measured = classification(truth, guess, CLASSES)
    every = {"labels": range(4), "zero_division": 0}
    assert measured["WA"] == pytest.approx(metrics.accuracy_score(truth, guess))
    assert measured["UA"] == pytest.approx(
        metrics.recall_score(truth, guess, average="macro", **every)
    )
    for name, average in (("macro_F1", "macro"), ("WF1", "weighted")):
        expected = metrics.f1_score(truth, guess, average=average, **every)
        assert measured[name] == pytest.approx(expected)


@given(pairs, st.randoms(use_true_random=False))
def test_order_does_not_matter(pairs: list[tuple[int, int]], random: Any) -> None:
    shuffled = random.sample(pairs, len(pairs))
    assert classification(*zip(*pairs, strict=True), CLASSES) == classification(
        *zip(*shuffled, strict=True), CLASSES
    )


def test_result_is_json_and_holds_the_headline() -> None:
    measured = classification(np.array([0, 1]), np.array([1, 1]), ["a", "b"])
    assert json.loads(json.dumps(measured)) == measured
    assert set(HEADLINE) <= set(measured)


@pytest.mark.parametrize(
    ("target", "prediction", "message"),
    [
        ([], [], "no utterances to measure"),
        ([0, 1], [0], r"shapes \(2,\) and \(1,\)"),
        ([0, 4], [0, 1], r"target must lie in 0 … 3. Got 0 … 4"),
        ([0, 1], [-1, 1], r"prediction must lie in 0 … 3. Got -1 … 1"),
        ([0.5], [0], "target must hold integers. Got float64"),
    ],
)
def test_unfit_input_is_refused(target: list[Any], prediction: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        classification(target, prediction, CLASSES)
