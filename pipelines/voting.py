"""`mer ensemble-vote`: runs on one split, joined by utterance, decide together.

A member is a run, its probabilities averaged over its seeds; with ``members="seeds"`` every seed of
a run is a member of its own. Members are ranked by macro-F1 on their validation parts, never on the
test parts, so that nothing about the vote was chosen on what it is measured on.

M members, N test utterances, C classes.

Source: MDAT-SER (arXiv 2506.02088) §5 for the majority vote. Its tie rule, "the top model decides",
is undefined where the top model's label is not in the tie; ours is the label of the highest-ranked
member whose vote is.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mer.cache.errors import UnknownNameError, UsageError
from mer.pipelines import rundir
from mer.pipelines.figures import draw_confusion
from mer.pipelines.metrics import HEADLINE, classification
from mer.pipelines.provenance import versions
from mer.pipelines.rundir import Predictions, Run, RunWriter, read_run

logger = logging.getLogger(__name__)

METHODS = ("majority", "soft", "weighted")
RANKED_BY = "macro_F1"
NAMED = 3  # utterances that a message names as examples
VOTE_SEED = 0  # a vote has no seed; its tables have the column all the same

Method = Literal["majority", "soft", "weighted"]
Row = tuple[str, str]  # fold, utterance


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One voice of a vote.

    Parameters
    ----------
    name : str
        Run, and its seed where seeds vote on their own.
    run : str
        Path of the run.
    seeds : tuple of int
        Whose probabilities are averaged.
    score : float
        macro-F1 over the validation parts of all folds, by which members are ranked.
    test, validation : tuple of ndarray
        (N, C) probabilities and (N,) votes; rows as in ``Ballot``.
    metrics : mapping
        ``classification`` on the test rows.
    """

    name: str
    run: str
    seeds: tuple[int, ...]
    score: float
    test: tuple[np.ndarray, np.ndarray]
    validation: tuple[np.ndarray, np.ndarray]
    metrics: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ballot:
    """Members that fit together, highest-ranked first, and what they vote on.

    Parameters
    ----------
    classes : tuple of str
        C names.
    members : tuple of Member
        By falling score; of equal ones, by name, then path.
    test_rows, validation_rows : tuple of (str, str)
        Fold and utterance.
    test_labels, validation_labels : ndarray
        (N,) and (V,) int64.
    split : str
        Split hash that all runs share.
    """

    classes: tuple[str, ...]
    members: tuple[Member, ...]
    test_rows: tuple[Row, ...]
    validation_rows: tuple[Row, ...]
    test_labels: np.ndarray
    validation_labels: np.ndarray
    split: str


@dataclass(frozen=True, slots=True, kw_only=True)
class VoteResult:
    """Result of `mer ensemble-vote`.

    Parameters
    ----------
    run : Path
        Folder written.
    method : str
        Rule of the vote.
    members : tuple of mapping
        Highest-ranked first: ``name``, ``run``, ``seeds``, ``validation_macro_F1``, ``weight`` and
        ``metrics``.
    metrics : mapping
        ``classification`` of the vote.
    best : str
        The best member by validation, to which ``gain`` refers.
    gain : mapping of str to float
        Vote minus best member, per headline metric.
    seconds : float
        Wall time.
    """

    run: Path
    method: str
    members: tuple[Mapping[str, Any], ...]
    metrics: Mapping[str, Any]
    best: str
    gain: Mapping[str, float]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return the keys of `mer ensemble-vote --json`.

        ``metrics`` has the shape of `mer train-head`; a vote is one prediction per utterance, so
        its ``sd`` is 0.
        """
        return {
            "run": str(self.run),
            "method": self.method,
            "members": list(self.members),
            "metrics": {name: {"mean": self.metrics[name], "sd": 0.0} for name in HEADLINE},
            "best": self.best,
            "gain": dict(self.gain),
            "utterances": self.metrics["utterances"],
            "seconds": round(self.seconds, 3),
        }

    def table(self) -> str:
        """Return members, vote and gain as text, in per cent."""
        head = [f"{self.method} vote of {len(self.members)}", "validation F1", *HEADLINE]
        rows = [
            [m["name"], _percent(m["validation_macro_F1"])]
            + [_percent(m["metrics"][name]) for name in HEADLINE]
            for m in self.members
        ]
        rows.append(["vote", "", *(_percent(self.metrics[name]) for name in HEADLINE)])
        rows.append(
            [f"gain over {self.best}", "", *(f"{100 * self.gain[n]:+.1f}" for n in HEADLINE)]
        )
        return render([head, *rows])


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def render(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as aligned text: first column left, others right, a rule under the first row."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


# -- joining ---------------------------------------------------------------------------------------


def join(runs: Sequence[Run], *, members: Literal["runs", "seeds"] = "runs") -> Ballot:
    """Bring runs together utterance by utterance, and rank them by validation.

    Parameters
    ----------
    runs : sequence of Run
        At least one; what comes out does not depend on their order.
    members : {"runs", "seeds"}
        Whether a run's seeds are averaged into one member, or each is one.

    Raises
    ------
    UsageError
        Fewer than two members, a run given twice, other classes, other utterances, folds, labels or
        splits: nothing of that may be joined.
    """
    if members not in ("runs", "seeds"):
        raise UnknownNameError("kind of members", members, ("runs", "seeds"))
    paths = [run.path.resolve() for run in runs]
    twice = {str(run.path) for run in runs if paths.count(run.path.resolve()) > 1}
    if twice:
        raise UsageError(f"A run votes once; given twice: {', '.join(sorted(twice))}.")
    if not runs:
        raise UsageError("A vote needs runs. Give the folders that `mer train-head` wrote.")
    runs = sorted(runs, key=lambda run: (run.name, str(run.path.resolve())))
    first = runs[0]
    for run in runs[1:]:
        _check_classes(first, run)
    tables = [(_table(run, "test"), _table(run, "validation")) for run in runs]
    for run, (test, validation) in zip(runs[1:], tables[1:], strict=True):
        _check_rows(first, run, tables[0][0], test, "test")
        _check_rows(first, run, tables[0][1], validation, "validation")
        if run.provenance.get("split") != first.provenance.get("split"):
            raise UsageError(
                f"Runs {first.path} and {run.path} were trained on different splits "
                f"(split hashes {first.provenance.get('split')} and {run.provenance.get('split')}) "
                "though tested on the same utterances. Train them with one protocol, validation "
                "rule and split seed."
            )
    test_rows, validation_rows = tuple(tables[0][0].labels), tuple(tables[0][1].labels)
    test_labels, validation_labels = (
        np.array(list(table.labels.values()), dtype=np.int64) for table in tables[0]
    )
    if not validation_rows:
        raise UsageError(
            f"Run {first.path} has no validation predictions, by which members are ranked."
        )
    found: list[Member] = []
    for run, (test, validation) in zip(runs, tables, strict=True):
        groups = [(s,) for s in test.seeds] if members == "seeds" else [test.seeds]
        for seeds in groups:
            of_test = test.averaged(seeds, test_rows, first.classes)
            of_validation = validation.averaged(seeds, validation_rows, first.classes)
            measured = classification(validation_labels, of_validation[1], first.classes)
            found.append(
                Member(
                    name=f"{run.name}:{seeds[0]}" if members == "seeds" else run.name,
                    run=str(run.path),
                    seeds=seeds,
                    score=measured[RANKED_BY],
                    test=of_test,
                    validation=of_validation,
                    metrics=classification(test_labels, of_test[1], first.classes),
                )
            )
    if len(found) < 2:
        raise UsageError(
            f"A vote needs at least two members; {first.path} alone was given. Add runs, or let "
            "each of its seeds vote (members: seeds)."
        )
    found.sort(key=lambda m: (-m.score, m.name, str(Path(m.run).resolve())))
    return Ballot(
        classes=first.classes,
        members=tuple(found),
        test_rows=test_rows,
        validation_rows=validation_rows,
        test_labels=test_labels,
        validation_labels=validation_labels,
        split=str(first.provenance.get("split")),
    )


@dataclass(frozen=True, slots=True)
class _Table:
    """One part of a run by fold and utterance, in the order of ``labels``, which is sorted."""

    classes: tuple[str, ...]
    seeds: tuple[int, ...]
    labels: Mapping[Row, int]
    cells: Mapping[tuple[int, Row], int]  # seed and row to the place in `predictions`
    predictions: Predictions

    def averaged(
        self, seeds: Sequence[int], rows: Sequence[Row], classes: Sequence[str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return probabilities (N, C), the mean over ``seeds``, and votes (N,), of ``classes``."""
        places = np.array([[self.cells[seed, row] for row in rows] for seed in seeds])
        columns = [self.classes.index(name) for name in classes]
        mean = self.predictions.probabilities[places].mean(axis=0)[:, columns]
        if len(seeds) > 1:
            return mean, mean.argmax(1)
        # A run's own decision: that of a majority vote need not be its largest share.
        new_index = np.argsort(columns)
        return mean, new_index[self.predictions.predictions[places[0]]]


def _table(run: Run, part: Literal["test", "validation"]) -> _Table:
    p: Predictions = getattr(run, part)
    seeds = tuple(sorted({int(seed) for seed in p.seeds}))
    labels: dict[Row, int] = {}
    cells: dict[tuple[int, Row], int] = {}
    for place, row in enumerate(zip(p.folds, p.utterances, strict=True)):
        seed, label = int(p.seeds[place]), int(p.labels[place])
        if labels.setdefault(row, label) != label:
            raise UsageError(f"Run {run.path}: {part} utterance {row[1]!r} has two labels.")
        if cells.setdefault((seed, row), place) != place:
            raise UsageError(
                f"Run {run.path}: {part} utterance {row[1]!r} of fold {row[0]!r} and seed {seed} "
                "stands there twice."
            )
    if len(cells) != len(seeds) * len(labels):
        lacking = [row[1] for row in labels if any((s, row) not in cells for s in seeds)]
        raise UsageError(
            f"Run {run.path}: {len(lacking)} {part} utterances lack a prediction of some seed, "
            f"e.g. {', '.join(lacking[:NAMED])}."
        )
    if part == "test" and not labels:
        raise UsageError(f"Run {run.path} has no test predictions.")
    order = sorted(labels)
    return _Table(run.classes, seeds, {row: labels[row] for row in order}, cells, p)


def _check_classes(first: Run, other: Run) -> None:
    ours, theirs = set(first.classes), set(other.classes)
    if ours != theirs:
        raise UsageError(
            f"Runs {first.path} and {other.path} have different label sets: only the first has "
            f"{', '.join(sorted(ours - theirs)) or 'none'}, only the second "
            f"{', '.join(sorted(theirs - ours)) or 'none'}. Train them with one label scheme."
        )


def _check_rows(first: Run, other: Run, ours: _Table, theirs: _Table, part: str) -> None:
    """Refuse utterances that only one run has, or that differ in fold or label."""
    where_ours, where_theirs = _by_utterance(ours), _by_utterance(theirs)
    for mine, yours, here, there in (
        (where_ours, where_theirs, first, other),
        (where_theirs, where_ours, other, first),
    ):
        if only := sorted(set(mine) - set(yours)):
            raise UsageError(
                f"Runs {first.path} and {other.path} have mismatched splits: {len(only)} {part} "
                f"utterances of {here.path} are not in {there.path}, e.g. "
                f"{', '.join(only[:NAMED])}. Train them on the same folds of one protocol."
            )
    for what, place in (("folds", 0), ("labels", 1)):
        differing = sorted(u for u in where_ours if where_ours[u][place] != where_theirs[u][place])
        if differing:
            u = differing[0]
            raise UsageError(
                f"Runs {first.path} and {other.path} have mismatched splits: {len(differing)} "
                f"{part} utterances have different {what}, e.g. {u}: {where_ours[u][place]} and "
                f"{where_theirs[u][place]}. Train them with one protocol and label scheme."
            )


def _by_utterance(table: _Table) -> dict[str, tuple[list[str], list[str]]]:
    """Return each utterance's folds and class names; a validation part may hold it often."""
    found: dict[str, tuple[list[str], list[str]]] = {}
    for (fold, utterance), label in table.labels.items():
        folds, labels = found.setdefault(utterance, ([], []))
        folds.append(fold)
        labels.append(table.classes[label])
    return found


# -- voting ----------------------------------------------------------------------------------------


def vote(
    probabilities: np.ndarray, ballots: np.ndarray, method: Method, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Let members decide.

    Parameters
    ----------
    probabilities : ndarray
        (M, N, C), the highest-ranked member first.
    ballots : ndarray
        (M, N) int64, what each member would decide alone.
    method : {"majority", "soft", "weighted"}
        Most votes, ties to the highest-ranked member whose vote is in the tie; mean probability;
        mean probability under ``weights``.
    weights : ndarray
        (M,), summing to 1; only ``weighted`` looks at them.

    Returns
    -------
    decisions : ndarray
        (N,) int64.
    shares : ndarray
        (N, C), shares of votes, or mean probabilities; rows sum to 1.
    """
    num_members, _, num_classes = probabilities.shape
    if method == "majority":
        counts = (ballots[:, :, None] == np.arange(num_classes)).sum(0)  # (N, C)
        tied = counts == counts.max(1, keepdims=True)
        # (M, N): is this member's vote among the tied? The first such member decides.
        among = np.take_along_axis(tied, ballots.T, axis=1).T
        decisions = ballots[among.argmax(0), np.arange(ballots.shape[1])]
        return decisions, counts / num_members
    if method == "soft":
        weights = np.full(num_members, 1 / num_members)
    shares = np.tensordot(weights, probabilities, axes=1)  # (N, C)
    return shares.argmax(1), shares


def weights_of(members: Sequence[Member]) -> np.ndarray:
    """Return each member's share (M,) of a weighted vote: its validation macro-F1, normalised."""
    scores = np.array([member.score for member in members])
    if not scores.any():
        return np.full(len(members), 1 / len(members))
    return np.asarray(scores / scores.sum())


def ensemble_vote(
    runs: Sequence[Path | str],
    *,
    method: str = "majority",
    members: Literal["runs", "seeds"] = "runs",
    out: Path | None = None,
) -> VoteResult:
    """Join runs, vote, and write the folder of the vote.

    Parameters
    ----------
    runs : sequence of Path
        Folders of runs (or of votes).
    method : {"majority", "soft", "weighted"}
        See ``vote``; ``weighted`` weighs members by their validation macro-F1.
    members : {"runs", "seeds"}
        See ``join``.
    out : Path, optional
        Folder to write; by default a new one under ``runs/``.

    Raises
    ------
    UnknownNameError
        No such method.
    UsageError
        Runs that do not fit together, or an output that is taken.
    """
    began = time.perf_counter()
    if method not in METHODS:
        raise UnknownNameError("voting method", method, METHODS)
    if out is not None:
        rundir.require_free(out)
    ballot = join([read_run(run) for run in runs], members=members)
    chosen: Method = method  # type: ignore[assignment]
    weights = weights_of(ballot.members) if method == "weighted" else None
    even = np.full(len(ballot.members), 1 / len(ballot.members))
    share = even if weights is None else weights
    test, validation = (_decide(ballot, part, chosen, share) for part in ("test", "validation"))
    measured = classification(ballot.test_labels, test.predictions, ballot.classes)
    best = ballot.members[0]
    listed = tuple(
        {
            "name": member.name,
            "run": member.run,
            "seeds": list(member.seeds),
            "validation_macro_F1": member.score,
            "weight": float(weight),
            "metrics": {name: member.metrics[name] for name in HEADLINE},
        }
        for member, weight in zip(ballot.members, share, strict=True)
    )
    gain = {name: measured[name] - best.metrics[name] for name in HEADLINE}
    folder = out or rundir.default_folder("vote", method, ballot.split)
    with RunWriter(folder) as writer:
        result = VoteResult(
            run=folder,
            method=method,
            members=listed,
            metrics=measured,
            best=best.name,
            gain=gain,
            seconds=time.perf_counter() - began,
        )
        writer.write_predictions(rundir.TEST, test)
        writer.write_predictions(rundir.VALIDATION, validation)
        writer.write_json(
            rundir.METRICS,
            {
                **{k: v for k, v in result.to_json().items() if k != "run"},
                "per_class": measured["per_class"],
                "confusion": measured["confusion"],
                "averaging": "one vote per utterance, pooled over folds",
            },
        )
        writer.write_json(
            rundir.PROVENANCE,
            {
                "kind": "vote",
                "method": method,
                "members_are": members,
                "ranked_by": "validation macro-F1, pooled over folds",
                "members": [{k: m[k] for k in ("name", "run", "seeds")} for m in listed],
                "classes": list(ballot.classes),
                "split": ballot.split,
                "versions": versions(),
            },
        )
        with writer.figure(rundir.CONFUSION) as path:
            draw_confusion(
                np.array(measured["confusion"]),
                ballot.classes,
                path,
                title=f"{method} vote of {len(listed)}: test predictions",
            )
        writer.log("\n" + result.table())
    return result


def _decide(ballot: Ballot, part: str, method: Method, weights: np.ndarray) -> Predictions:
    rows: tuple[Row, ...] = getattr(ballot, f"{part}_rows")
    of_members = [getattr(member, part) for member in ballot.members]
    probabilities, ballots = (np.stack(arrays) for arrays in zip(*of_members, strict=True))
    decisions, shares = vote(probabilities, ballots, method, weights)
    return Predictions(
        classes=ballot.classes,
        utterances=tuple(utterance for _, utterance in rows),
        folds=tuple(fold for fold, _ in rows),
        seeds=np.full(len(rows), VOTE_SEED, dtype=np.int64),
        labels=getattr(ballot, f"{part}_labels"),
        predictions=decisions,
        probabilities=shares,
    )
