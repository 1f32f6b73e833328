"""The folder of a run: what a result is, where it comes from, and how it appears all at once.

::

    recipe.yaml        the recipe with includes and overrides resolved; `mer train-head` takes it
    provenance.json    corpus, split hash, stores, seeds, versions
    metrics.json       what was measured, and how it was averaged
    predictions.csv    test: utterance, fold, seed, label, prediction, p_<class> …
    validation.csv     the same of the validation parts; votes rank their members by it
    history.csv        one row per epoch of every training
    checkpoints/       <fold>-seed<seed>.safetensors
    confusion.png      curves.png      run.log

A run is written beside its final place and renamed into it, so that a folder that exists is whole.
The folder of a vote is alike, without recipe, checkpoints and curves.
"""

from __future__ import annotations

import csv
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from mer.cache.errors import UsageError
from mer.cache.identity import fingerprint

logger = logging.getLogger(__name__)

RECIPE = "recipe.yaml"
PROVENANCE = "provenance.json"
METRICS = "metrics.json"
TEST = "predictions.csv"
VALIDATION = "validation.csv"
HISTORY = "history.csv"
CHECKPOINTS = "checkpoints"
CONFUSION = "confusion.png"
CURVES = "curves.png"
LOG = "run.log"

_FIXED_COLUMNS = ("utterance", "fold", "seed", "label", "prediction")
_PROBABILITY = "p_"


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictions:
    """Predictions of a set of utterances, N rows, C classes.

    Parameters
    ----------
    classes : tuple of str
        C names.
    utterances, folds : tuple of str
        N utterance ids and names of folds.
    seeds : ndarray
        (N,) int64.
    labels, predictions : ndarray
        (N,) int64 class indices.
    probabilities : ndarray
        (N, C) float, rows sum to 1.
    """

    classes: tuple[str, ...]
    utterances: tuple[str, ...]
    folds: tuple[str, ...]
    seeds: np.ndarray
    labels: np.ndarray
    predictions: np.ndarray
    probabilities: np.ndarray

    def __len__(self) -> int:
        return len(self.utterances)

    def of_seed(self, seed: int) -> np.ndarray:
        """Return (N,) bool, True on the rows of ``seed``."""
        return np.asarray(self.seeds == seed)

    @classmethod
    def join(cls, parts: Sequence[Predictions]) -> Predictions:
        """Return the rows of all parts, which share their classes, in order."""
        return cls(
            classes=parts[0].classes,
            utterances=tuple(u for part in parts for u in part.utterances),
            folds=tuple(f for part in parts for f in part.folds),
            seeds=np.concatenate([part.seeds for part in parts]),
            labels=np.concatenate([part.labels for part in parts]),
            predictions=np.concatenate([part.predictions for part in parts]),
            probabilities=np.concatenate([part.probabilities for part in parts]),
        )


@dataclass(frozen=True)
class Run:
    """A run as it lies on disk; its tables are read when first asked for.

    Parameters
    ----------
    path : Path
        Its folder.
    provenance, metrics : mapping
        The two JSON files.
    """

    path: Path
    provenance: Mapping[str, Any]
    metrics: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.path.resolve().name

    @property
    def classes(self) -> tuple[str, ...]:
        """C names, in the order of indices."""
        return tuple(self.provenance["classes"])

    @cached_property
    def test(self) -> Predictions:
        """Predictions of the test parts."""
        return read_predictions(self.path / TEST, self.classes)

    @cached_property
    def validation(self) -> Predictions:
        """Predictions of the validation parts."""
        return read_predictions(self.path / VALIDATION, self.classes)


def read_run(path: Path | str) -> Run:
    """Open the folder of a run.

    Raises
    ------
    UsageError
        No such folder, or not one of a run.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        raise UsageError(
            f"Run {path}: no such folder. Expected one that `mer train-head` wrote, "
            "e.g. under runs/."
        )
    provenance, metrics = _read_json(path, PROVENANCE), _read_json(path, METRICS)
    classes = provenance.get("classes")
    if not isinstance(classes, list) or not classes:
        raise UsageError(f"Run {path}: {PROVENANCE} names no classes; it is not one of a run.")
    return Run(path, provenance, metrics)


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        found = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(
            f"Run {folder} has no {name}. Expected a folder that `mer train-head` or "
            "`mer ensemble-vote` wrote."
        ) from None
    except (OSError, ValueError) as error:
        raise UsageError(f"Run {folder}: {name} cannot be read: {error}.") from error
    if not isinstance(found, dict):
        raise UsageError(f"Run {folder}: {name} holds no object. It is not one of a run.")
    return found


# -- tables ----------------------------------------------------------------------------------------


def write_predictions(predictions: Predictions, path: Path) -> None:
    """Write predictions as CSV; probabilities keep the nine digits that give a float32 back."""
    p = predictions
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*_FIXED_COLUMNS, *(_PROBABILITY + name for name in p.classes)])
        for i, (utterance, fold) in enumerate(zip(p.utterances, p.folds, strict=True)):
            label, predicted = p.classes[p.labels[i]], p.classes[p.predictions[i]]
            probabilities = (f"{value:.9g}" for value in p.probabilities[i])
            writer.writerow([utterance, fold, int(p.seeds[i]), label, predicted, *probabilities])


def read_predictions(path: Path, classes: Sequence[str]) -> Predictions:
    """Read what ``write_predictions`` wrote; columns are found by name.

    Raises
    ------
    UsageError
        The file is missing, lacks a column, or holds a row that makes no sense.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file)
            header = next(reader, [])
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"Predictions {path} cannot be read: {error}.") from error
    columns = [*_FIXED_COLUMNS, *(_PROBABILITY + name for name in classes)]
    if missing := [name for name in columns if name not in header]:
        raise UsageError(f"Predictions {path} lack the columns {', '.join(missing)}.")
    places = [header.index(name) for name in columns]
    index = {name: i for i, name in enumerate(classes)}
    ids, folds, seeds, labels, predicted = [], [], [], [], []
    probabilities = np.empty((len(rows), len(classes)))
    for line, row in enumerate(rows, start=2):
        try:
            utterance, fold, seed, label, prediction, *numbers = (row[place] for place in places)
            seeds.append(int(seed))
            labels.append(index[label])
            predicted.append(index[prediction])
            probabilities[line - 2] = [float(number) for number in numbers]
        except (IndexError, KeyError, ValueError) as error:
            raise UsageError(
                f"Predictions {path}, row {line} cannot be used: {error!r}. Expected "
                f"{', '.join(columns)} with classes {', '.join(classes)}."
            ) from error
        ids.append(utterance)
        folds.append(fold)
    if not np.isfinite(probabilities).all():
        raise UsageError(f"Predictions {path} hold a probability that is not finite.")
    return Predictions(
        classes=tuple(classes),
        utterances=tuple(ids),
        folds=tuple(folds),
        seeds=np.array(seeds, dtype=np.int64),
        labels=np.array(labels, dtype=np.int64),
        predictions=np.array(predicted, dtype=np.int64),
        probabilities=probabilities,
    )


# -- writing ---------------------------------------------------------------------------------------


def default_folder(dataset: str, recipe: str, digest: str) -> Path:
    """Return ``runs/<dataset>-<recipe>-<digest>-<time>``, made unlike any that exists."""
    stem = f"{Path(dataset).stem}-{recipe}-{digest[:6]}-{datetime.now():%Y%m%d-%H%M%S}"
    folder = Path("runs") / stem
    again = 2
    while folder.exists():
        folder = Path("runs") / f"{stem}-{again}"
        again += 1
    return folder


def require_free(folder: Path) -> None:
    """Refuse a folder that holds something already: results are never overwritten.

    Raises
    ------
    UsageError
        The folder is not empty, or is a file.
    """
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists() or folder.is_symlink():
        raise UsageError(
            f"Output {folder} exists already and a run is never overwritten. "
            "Name another folder, or remove that one."
        )


class RunWriter:
    """A run in the making: a folder beside its final place, renamed into it on success.

    Used as a context manager; after an exception nothing is left behind.

    Parameters
    ----------
    target : Path
        Final place; absent or an empty folder.

    Attributes
    ----------
    folder : Path
        Where to write meanwhile.

    Raises
    ------
    UsageError
        ``target`` is taken, or cannot be written to.
    """

    def __init__(self, target: Path) -> None:
        require_free(target)
        self.target = target
        self._handler: logging.Handler | None = None

    def __enter__(self) -> Self:
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            made = tempfile.mkdtemp(prefix=f".{self.target.name}.", dir=self.target.parent)
        except OSError as error:
            raise UsageError(
                f"Output {self.target} cannot be written: {error.strerror or error}. "
                "Name another folder with --out."
            ) from error
        self.folder = Path(made)
        self.folder.chmod(0o777 & ~_umask())  # mkdtemp makes it private
        self._handler = logging.FileHandler(self.folder / LOG, encoding="utf-8")
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logging.getLogger("mer").addHandler(self._handler)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._handler is not None:
            logging.getLogger("mer").removeHandler(self._handler)
            self._handler.close()
        if kind is None:
            try:
                os.rename(self.folder, self.target)
            except OSError as taken:
                raise UsageError(
                    f"Output {self.target} was taken while the run was on; it lies in "
                    f"{self.folder} instead."
                ) from taken
        else:
            shutil.rmtree(self.folder, ignore_errors=True)

    def log(self, message: str) -> None:
        """Put a line into the run's log, and hand it to whoever listens to our loggers."""
        if logger.isEnabledFor(logging.INFO):
            logger.info(message)
        elif self._handler is not None:
            record = logger.makeRecord(logger.name, logging.INFO, "", 0, message, (), None)
            self._handler.handle(record)

    def write_text(self, name: str, text: str) -> None:
        """Write a text file."""
        (self.folder / name).write_text(text, encoding="utf-8")

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file; NaN is refused, since JSON has none."""
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
        self.write_text(name, text + "\n")

    def write_predictions(self, name: str, predictions: Predictions) -> None:
        """Write a table of predictions."""
        write_predictions(predictions, self.folder / name)

    def write_rows(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write mappings as CSV; columns are all keys in order of appearance."""
        rows = list(rows)
        columns = list(dict.fromkeys(key for row in rows for key in row))
        with (self.folder / name).open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    @contextmanager
    def figure(self, name: str) -> Iterator[Path]:
        """Give the path of a figure; where matplotlib is missing, say so and go on."""
        from mer.cache.errors import MissingDependencyError

        try:
            yield self.folder / name
        except MissingDependencyError as error:
            self.log(f"{name} is left out: {error}")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def file_name(text: str) -> str:
    """Return ``text`` with what file systems dislike replaced; a fold may be called anything.

    Text that had to change gets a piece of its hash, so that two names never become one file.
    """
    safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in text).lstrip(".")
    return safe if safe == text and safe else f"{safe}-{fingerprint({'name': text})[:8]}"
