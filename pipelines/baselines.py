"""Reference classifiers on the same folds: what a head has to beat.

- ``majority``: the most frequent class of the training part.
- ``logreg``: logistic regression on standardised vectors, classes weighted evenly.
- ``svm``: linear support-vector machine on the same.

Vectors are functionals as stored, or the mean and standard deviation of frames over time. The
scale comes from the training part, C from the macro recall (UA) on the validation part, and the
classifier that is tested has seen the training part only, exactly like a head. None is random.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mer.pipelines.metrics import classification

C_GRID = {
    "logreg": (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0),
    "svm": (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0),
}
C_WITHOUT_VALIDATION = {"logreg": 1e-2, "svm": 1e-3}
CHOSEN_BY = "UA"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """A baseline on one fold.

    Parameters
    ----------
    test : ndarray
        (N,) int64 predictions of the test part.
    settings : mapping
        ``C`` and the validation UA that chose it; the class, for ``majority``.
    notes : tuple of str
        Trouble worth telling, e.g. no convergence.
    """

    test: np.ndarray
    settings: dict[str, Any]
    notes: tuple[str, ...] = ()


def fit(
    name: str,
    vectors: np.ndarray | None,
    labels: np.ndarray,
    parts: tuple[np.ndarray, np.ndarray, np.ndarray],
    classes: Sequence[str],
) -> Fitted:
    """Fit a baseline to one fold.

    Parameters
    ----------
    name : {"majority", "logreg", "svm"}
        Which.
    vectors : ndarray, optional
        (N, D) float; ``majority`` needs none.
    labels : ndarray
        (N,) int64 in 0 … C-1.
    parts : tuple of ndarray
        Rows of training, validation (may be empty) and test part.
    classes : sequence of str
        C names.

    Raises
    ------
    ValueError
        Unknown name, or no vectors where they are needed.
    """
    train, validation, test = parts
    counts = np.bincount(labels[train], minlength=len(classes))
    most = int(counts.argmax())
    if name == "majority":
        return Fitted(test=np.full(len(test), most), settings={"class": classes[most]})
    if name not in C_GRID:
        raise ValueError(f"name must be majority, logreg or svm. Got {name!r}.")
    if vectors is None:
        raise ValueError(f"Baseline {name!r} needs vectors.")
    if np.count_nonzero(counts) < 2:
        note = f"Only {classes[most]!r} in training: {name} answers with it."
        return Fitted(test=np.full(len(test), most), settings={"C": None}, notes=(note,))
    grid = C_GRID[name] if len(validation) else (C_WITHOUT_VALIDATION[name],)
    best: tuple[float, float, Any, str] | None = None
    for c in grid:
        model, note = _fit_quietly(_pipeline(name, c), vectors[train], labels[train])
        score = 0.0
        if len(validation):
            guess = model.predict(vectors[validation])
            score = classification(labels[validation], guess, classes)[CHOSEN_BY]
        if best is None or score > best[0]:  # of equal scores the stronger regularisation
            best = (score, c, model, note)
    assert best is not None
    notes = (f"{name} with C = {best[1]:g}: {best[3]}",) if best[3] else ()
    settings = {"C": best[1], f"validation_{CHOSEN_BY}": best[0] if len(validation) else None}
    predicted = best[2].predict(vectors[test]) if len(test) else np.zeros(0, dtype=np.int64)
    return Fitted(test=predicted.astype(np.int64), settings=settings, notes=notes)


def _pipeline(name: str, c: float) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import LinearSVC

    build: dict[str, Callable[[], Any]] = {
        "logreg": lambda: LogisticRegression(C=c, class_weight="balanced", max_iter=5000),
        # The primal problem is solved without random draws.
        "svm": lambda: LinearSVC(C=c, class_weight="balanced", dual=False, max_iter=10_000),
    }
    return make_pipeline(StandardScaler(), build[name]())


def _fit_quietly(model: Any, vectors: np.ndarray, labels: np.ndarray) -> tuple[Any, str]:
    """Fit, and return what scikit-learn warned of instead of letting it reach the terminal."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(vectors.astype(np.float64), labels)
    return model, "; ".join(dict.fromkeys(str(w.message).splitlines()[0] for w in caught))
