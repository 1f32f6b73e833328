"""Metrics of emotion recognition, by scikit-learn, each with the one definition used everywhere.

N utterances, C classes, N_c of them in class c. Averages over classes run over all C, also over
classes that no utterance of the fold has; what is 0/0 counts as 0.

- WA: accuracy, Σ_c TP_c / N (weighted accuracy, micro-F1).
- UA: macro recall, (1/C) Σ_c TP_c / N_c (unweighted accuracy).
- WF1: Σ_c (N_c/N) F1_c.
- macro_F1: (1/C) Σ_c F1_c with F1_c = 2TP_c / (2TP_c + FP_c + FN_c).
- macro_precision: (1/C) Σ_c TP_c / (TP_c + FP_c).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

HEADLINE = ("UA", "WA", "WF1", "macro_F1")
"""What tables show, in their order."""


def classification(
    target: Sequence[int] | np.ndarray,
    prediction: Sequence[int] | np.ndarray,
    classes: Sequence[str],
) -> dict[str, Any]:
    """Return every metric of one set of predictions, as JSON types.

    Parameters
    ----------
    target, prediction : array_like
        (N,) int in 0 … C-1, N at least 1.
    classes : sequence of str
        Names of the C classes.

    Returns
    -------
    dict
        ``UA``, ``WA``, ``WF1``, ``macro_F1``, ``macro_precision`` (0 to 1); ``per_class``: by name,
        ``recall``, ``precision``, ``f1``, ``support``; ``confusion``: C lists of C counts, row =
        target, column = prediction; ``utterances``: N.

    Raises
    ------
    ValueError
        Nothing to measure, unequal lengths, or a class outside 0 … C-1.

    Examples
    --------
    >>> measured = classification([0, 0, 1, 1], [0, 1, 1, 1], ["calm", "angry"])
    >>> measured["UA"], measured["confusion"]
    (0.75, [[1, 1], [0, 2]])
    """
    truth, guess = np.asarray(target), np.asarray(prediction)
    if truth.ndim != 1 or truth.shape != guess.shape:
        raise ValueError(
            f"target and prediction must be vectors of one length. "
            f"Got shapes {truth.shape} and {guess.shape}."
        )
    if truth.size == 0:
        raise ValueError("There are no utterances to measure.")
    for name, values in (("target", truth), ("prediction", guess)):
        if not np.issubdtype(values.dtype, np.integer):
            raise ValueError(f"{name} must hold integers. Got {values.dtype}.")
        if values.min() < 0 or values.max() >= len(classes):
            raise ValueError(
                f"{name} must lie in 0 … {len(classes) - 1}. Got {values.min()} … {values.max()}."
            )
    confusion = confusion_matrix(truth, guess, labels=range(len(classes)))
    precision, recall, f1, support = precision_recall_fscore_support(
        truth, guess, labels=range(len(classes)), zero_division=0
    )
    return {
        "UA": float(recall.mean()),
        "WA": float(np.trace(confusion) / truth.size),
        "WF1": float(f1 @ support / truth.size),
        "macro_F1": float(f1.mean()),
        "macro_precision": float(precision.mean()),
        "per_class": {
            name: {
                "recall": float(recall[c]),
                "precision": float(precision[c]),
                "f1": float(f1[c]),
                "support": int(support[c]),
            }
            for c, name in enumerate(classes)
        },
        "confusion": confusion.tolist(),
        "utterances": int(truth.size),
    }
