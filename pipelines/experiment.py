"""`mer train-head`: a recipe, all its folds and seeds, and the folder that holds the result.

How numbers are averaged, said once and written into every ``metrics.json``:

- ``metrics``: for each seed, the test predictions of all folds are pooled and measured; then mean
  and sample standard deviation over seeds (0 with one seed).
- ``mean_over_folds``: each fold of each seed is measured alone; mean and standard deviation over
  all of them. Papers report one or the other.

Baselines are not random: measured once, on the same folds, pooled likewise.

N utterances, C classes.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mer.cache.errors import MerError, ProtocolError, RecipeError
from mer.cache.home import Cache
from mer.cache.identity import fingerprint
from mer.pipelines import baselines, protocols, rundir
from mer.pipelines import dataset as datasets
from mer.pipelines.dataset import Dataset, Plan
from mer.pipelines.figures import draw_confusion, draw_curves
from mer.pipelines.metrics import HEADLINE, classification
from mer.pipelines.protocols import Fold, Folds, split_hash
from mer.pipelines.provenance import machine, versions
from mer.pipelines.recipe import Recipe, dump, fault_report
from mer.pipelines.rundir import Predictions, RunWriter
from mer.pipelines.voting import render

if TYPE_CHECKING:
    from mer.pipelines.training import TrainConfig, TrainResult

logger = logging.getLogger(__name__)

Progress = Callable[[Mapping[str, Any]], None]
"""Called after every epoch with ``training`` (from 1), ``trainings``, ``fold``, ``seed``, and the
epoch's entry of the history: ``epoch``, ``epochs``, ``loss`` …"""

AVERAGING = (
    "metrics: per seed, test predictions pooled over folds; mean and sample sd over seeds. "
    "mean_over_folds: every fold of every seed alone; mean and sample sd over them."
)

Summary = dict[str, dict[str, float]]  # metric to {"mean", "sd"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """Result of `mer train-head`.

    Parameters
    ----------
    run : Path
        Folder written.
    recipe : Recipe
        As it was run, overrides and options included.
    protocol, validation : str
        Names of the split and of the rule for the validation part.
    utterances : int
        N.
    metrics, mean_over_folds : mapping
        Headline metric to ``{"mean", "sd"}``; see the module's docstring.
    folds : tuple of mapping
        ``name``, sizes of the parts, ``metrics``, and ``seeds`` with each training's numbers.
    baselines : mapping
        Name to ``{"metrics", "folds"}``.
    validation_metrics : mapping
        As ``metrics``, of the validation parts.
    per_class, confusion
        Of the test predictions of all seeds together.
    seconds : float
        Wall time.
    notes : tuple of str
        What a reader should know.
    """

    run: Path
    recipe: Recipe
    protocol: str
    validation: str
    utterances: int
    metrics: Summary
    mean_over_folds: Summary
    folds: tuple[Mapping[str, Any], ...]
    baselines: Mapping[str, Mapping[str, Any]]
    validation_metrics: Summary
    per_class: Mapping[str, Mapping[str, float]]
    confusion: Sequence[Sequence[int]]
    seconds: float
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the keys of `mer train-head --json`."""
        return {
            "run": str(self.run),
            "recipe": self.recipe.name,
            "dataset": self.recipe.dataset.name,
            "head": self.recipe.head.name,
            "protocol": self.protocol,
            "validation": self.validation,
            "seeds": list(self.recipe.evaluation.seeds),
            "utterances": self.utterances,
            "seconds": round(self.seconds, 3),
            "metrics": self.metrics,
            "mean_over_folds": self.mean_over_folds,
            "validation_metrics": self.validation_metrics,
            "folds": [dict(fold) for fold in self.folds],
            "baselines": {name: dict(entry) for name, entry in self.baselines.items()},
            "notes": list(self.notes),
        }

    def table(self) -> str:
        """Return head and baselines as text, in per cent."""
        several = len(self.recipe.evaluation.seeds) > 1
        rows = [
            [self.recipe.dataset.name or "", *HEADLINE],
            [self.recipe.head.name, *_cells(self.metrics, several)],
        ]
        if len(self.folds) > 1:
            rows.append(["  mean over folds", *_cells(self.mean_over_folds, True)])
        rows += [[name, *_cells(b["metrics"], False)] for name, b in self.baselines.items()]
        seeds = len(self.recipe.evaluation.seeds)
        return (
            f"{self.utterances} utterances, protocol {self.protocol}, "
            f"validation {self.validation}, {_plural(len(self.folds), 'fold')}, "
            f"{_plural(seeds, 'seed')}; % of pooled test predictions"
            + (" ± sd over seeds" if several else "")
            + "\n\n"
            + render(rows)
        )


def _plural(count: int, thing: str) -> str:
    return f"{count} {thing}" + ("" if count == 1 else "s")


def _cells(summary: Mapping[str, Mapping[str, float]], with_sd: bool) -> list[str]:
    return [
        f"{100 * summary[name]['mean']:.1f}"
        + (f" ± {100 * summary[name]['sd']:.1f}" if with_sd else "")
        for name in HEADLINE
    ]


@dataclass(frozen=True, slots=True)
class _Trained:
    """One training: where it stands, what came out."""

    fold: Fold
    seed: int
    result: TrainResult
    test: Predictions
    validation: Predictions


def check_recipe(recipe: Recipe, out: Path | None = None) -> Plan:
    """Refuse what ``run_recipe`` would refuse, as far as it shows before a recording is read.

    Parameters
    ----------
    recipe : Recipe
        With its dataset.
    out : Path, optional
        Folder that the run is to be written to.

    Returns
    -------
    Plan
        What the recipe reads.

    Raises
    ------
    UsageError
        Faults of the recipe, a dataset or split that cannot be used, an output that is taken.
    """
    if out is not None:
        rundir.require_free(out)
    planned = datasets.plan(recipe)
    _check(recipe, planned)
    _split(recipe, planned, {})
    return planned


def run_recipe(
    recipe: Recipe,
    *,
    cache: Cache,
    dataset: str | None = None,
    root: Path | str | None = None,
    out: Path | None = None,
    seeds: Sequence[int] | None = None,
    folds: Sequence[int] | Literal["all"] | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> RunResult:
    """Train and evaluate a head by its protocol, and write the run.

    Parameters
    ----------
    recipe : Recipe
        What to do.
    cache : Cache
        Where the features are.
    dataset, root, seeds, folds
        Replace what the recipe says.
    out : Path, optional
        Folder to write, absent or empty; by default a new one under ``runs/``.
    device : str, default="auto"
        ``auto``, ``cpu`` or ``cuda``.
    progress : callable, optional
        Told of every epoch.

    Raises
    ------
    RecipeError
        Faults in the recipe's head, training or evaluation, before any feature is read.
    MissingFeatureError
        Features that are not in the cache; says which `mer extract` brings them.
    UsageError
        A dataset, split, device or output that cannot be used.
    """
    began = time.perf_counter()
    started = datetime.now(UTC)
    recipe = recipe.with_run_options(
        dataset=dataset, root=None if root is None else str(root), seeds=seeds, folds=folds
    )
    if out is not None:
        rundir.require_free(out)
    planned = datasets.plan(recipe)
    training_config = _check(recipe, planned)
    resolved = datasets.identify(planned, cache)
    split = _split(recipe, planned, datasets.recordings(planned, resolved, cache))
    recipe = _spelt_out(recipe, planned, split)
    from mer.extract.engine import resolve_device

    device = resolve_device(device)
    data = datasets.load(recipe, planned, resolved, cache)
    chosen = _without(split, data.dropped)
    folder = out or rundir.default_folder(
        planned.manifest.name, recipe.name, fingerprint({"recipe": dump(recipe)})
    )
    with RunWriter(folder) as writer:
        _announce(writer, recipe, planned, data, split, chosen, device)
        trained: list[_Trained] = []
        total = len(chosen) * len(recipe.evaluation.seeds)
        for fold in chosen:
            for seed in recipe.evaluation.seeds:
                hook = _hook(progress, fold, seed, len(trained) + 1, total)
                one = _train(recipe, training_config, data, fold, seed, device, hook)
                trained.append(one)
                _keep(writer, one)
        reference = _baselines(recipe, data, chosen, planned.scheme.classes)
        notes = [*_notes(split), *data.notes]
        notes += dict.fromkeys(note for t in trained for note in t.result.notes)
        notes += dict.fromkeys(n for entry in reference.values() for n in entry.pop("notes"))
        test = Predictions.join([t.test for t in trained])
        validation = Predictions.join([t.validation for t in trained])
        overall = classification(test.labels, test.predictions, test.classes)
        result = RunResult(
            run=folder,
            recipe=recipe,
            protocol=split.protocol,
            validation=split.validation,
            utterances=len(data.utterances),
            metrics=_over_seeds(test),
            mean_over_folds=_over_folds(test),
            folds=tuple(_fold_entry(fold, trained) for fold in chosen),
            baselines=reference,
            validation_metrics=_over_seeds(validation) if len(validation) else {},
            per_class=overall["per_class"],
            confusion=overall["confusion"],
            seconds=time.perf_counter() - began,
            notes=tuple(notes),
        )
        provenance = {
            "kind": "run",
            "started": started.isoformat(timespec="seconds"),
            "corpus": planned.manifest.name,
            "scheme": planned.scheme.name,
            "classes": list(planned.scheme.classes),
            "protocol": split.protocol,
            "protocol_version": split.version,
            "validation": split.validation,
            "selected_by": training_config.select,
            "split": split_hash(chosen),
            "split_seed": recipe.evaluation.split_seed,
            "folds": [fold.name for fold in chosen],
            "seeds": list(recipe.evaluation.seeds),
            "leak": split.leak,
            "streams": {name: str(source) for name, source in planned.streams.items()},
            "stores": data.stores,
            "cache": cache.url,
            "dropped": list(data.dropped),
            "notes": notes,
            "device": device,
            "machine": machine(),
            "versions": versions(),
        }
        _write(writer, result, provenance, test, validation, trained)
    return result


# -- before ----------------------------------------------------------------------------------------


def _check(recipe: Recipe, planned: Plan) -> TrainConfig:
    """Check head, streams and training against their classes; report all faults together."""
    from mer.heads.contract import stream_shapes
    from mer.heads.registry import configure, resolve
    from mer.pipelines.training import TrainConfig

    faults: list[str] = []
    config = TrainConfig()
    checks: list[Callable[[], Any]] = [
        lambda: configure(recipe.head.name, recipe.head.config),
        lambda: stream_shapes(resolve(recipe.head.name), planned.shapes()),
    ]
    for check, where in zip(checks, ("head", "features"), strict=True):
        try:
            check()
        except ValueError as error:
            faults.append(f"{where}: {error}")
    try:
        config = TrainConfig.from_settings(recipe.training)
    except RecipeError as error:
        faults.append(str(error))
    if faults:
        raise fault_report(recipe.name, faults)
    return config


def _split(recipe: Recipe, planned: Plan, content: Mapping[str, bytes]) -> Folds:
    """Make the folds that the recipe asks for, over all utterances that have a class."""
    evaluation = recipe.evaluation
    split = protocols.make_folds(
        datasets.default_protocol(recipe, planned.utterances),
        planned.utterances,
        evaluation.split_seed,
        validation=evaluation.validation,
        allow_leak=evaluation.allow_leak,
        content=content,
    )
    if evaluation.folds is None:
        return split
    if evaluation.folds[-1] > len(split):
        raise RecipeError(
            f"evaluation.folds: protocol {split.protocol!r} has the folds 1 … {len(split)} here. "
            f"Got {', '.join(map(str, evaluation.folds))}."
        )
    return dataclasses.replace(split, folds=tuple(split[n - 1] for n in evaluation.folds))


def _spelt_out(recipe: Recipe, planned: Plan, split: Folds) -> Recipe:
    """Return the recipe with the corpus' own choices written into it, to stand on its own."""
    return dataclasses.replace(
        recipe,
        dataset=dataclasses.replace(recipe.dataset, labels=planned.scheme.name),
        evaluation=dataclasses.replace(
            recipe.evaluation, protocol=split.protocol, validation=split.validation
        ),
    )


def _notes(split: Folds) -> tuple[str, ...]:
    return (*split.notes, *([f"Leak accepted: {split.leak}"] if split.leak else []))


def _without(split: Folds, dropped: Sequence[str]) -> tuple[Fold, ...]:
    """Return the folds without utterances that lack a feature; nobody changes sides."""
    gone = set(dropped)
    kept = []
    for fold in split:
        train, validation, test = (
            tuple(i for i in part if i not in gone)
            for part in (fold.train, fold.validation, fold.test)
        )
        try:
            kept.append(Fold(fold.name, train=train, validation=validation, test=test))
        except ProtocolError as error:
            error.add_note("All of them lack a feature: extract it, or run only other folds.")
            raise
    return tuple(kept)


def _announce(
    writer: RunWriter,
    recipe: Recipe,
    planned: Plan,
    data: Dataset,
    split: Folds,
    folds: Sequence[Fold],
    device: str,
) -> None:
    writer.write_text(rundir.RECIPE, f"# As it was run, resolved.\n{dump(recipe)}")
    classes = planned.scheme.classes
    writer.log(
        f"{recipe.head.name} on {planned.manifest.name}: {len(data.utterances)} utterances, "
        f"scheme {planned.scheme.name} ({', '.join(classes)})"
    )
    for name, source in planned.streams.items():
        pooled = "" if source.pool == 1 else f", pool {source.pool}"
        writer.log(f"stream {name}: {source}{pooled} from {data.stores[source.feature]['store']}")
    writer.log(
        f"protocol {split.protocol}, validation {split.validation}, {_plural(len(folds), 'fold')}, "
        f"seeds {', '.join(map(str, recipe.evaluation.seeds))}, device {device}"
    )
    for note in (*_notes(split), *data.notes):
        writer.log(f"note: {note}")


# -- training --------------------------------------------------------------------------------------


def _hook(
    progress: Progress | None, fold: Fold, seed: int, number: int, total: int
) -> Progress | None:
    if progress is None:
        return None
    where = {"training": number, "trainings": total, "fold": fold.name, "seed": seed}
    return lambda entry: progress({**where, **entry})


def _train(
    recipe: Recipe,
    config: TrainConfig,
    data: Dataset,
    fold: Fold,
    seed: int,
    device: str,
    progress: Progress | None,
) -> _Trained:
    from mer.pipelines.training import predict, train

    features = data.features
    validation_set = features.select(fold.validation)
    try:
        result = train(
            recipe.head.name,
            recipe.head.config,
            features.select(fold.train),
            validation_set,
            config,
            seed=seed,
            device=device,
            progress=progress,
        )
        test_set = features.select(fold.test)
        probabilities = predict(result.head, test_set, device=device, config=config)
    except MerError as error:
        error.add_note(f"(fold {fold.name}, seed {seed})")
        raise
    return _Trained(
        fold,
        seed,
        result,
        test=_predictions(fold.name, seed, test_set, probabilities),
        validation=_predictions(fold.name, seed, validation_set, result.probabilities),
    )


def _predictions(fold: str, seed: int, part: Any, probabilities: np.ndarray) -> Predictions:
    return Predictions(
        classes=tuple(part.classes),
        utterances=tuple(part.ids),
        folds=(fold,) * len(part),
        seeds=np.full(len(part), seed, dtype=np.int64),
        labels=part.labels,
        predictions=probabilities.reshape(len(part), -1).argmax(1)
        if len(part)
        else np.zeros(0, dtype=np.int64),
        probabilities=probabilities.reshape(len(part), len(part.classes)),
    )


def _keep(writer: RunWriter, trained: _Trained) -> None:
    """Write the checkpoint at once and say how the training went."""
    from mer.pipelines.training import save_head

    folder = writer.folder / rundir.CHECKPOINTS
    folder.mkdir(exist_ok=True)
    name = f"{rundir.file_name(trained.fold.name)}-seed{trained.seed}.safetensors"
    save_head(trained.result.head, folder / name)
    validated = trained.result.metrics
    writer.log(
        f"fold {trained.fold.name}, seed {trained.seed}: best epoch {trained.result.best_epoch} of "
        f"{len(trained.result.history)}, "
        + (f"validation macro-F1 {100 * validated['macro_F1']:.1f}, " if validated else "")
        + f"{trained.result.seconds:.1f} s"
    )


def _baselines(
    recipe: Recipe, data: Dataset, folds: Sequence[Fold], classes: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Measure the baselines on the same folds."""
    rows = {u.id: row for row, u in enumerate(data.utterances)}
    labels = np.asarray(data.features.labels)
    found: dict[str, dict[str, Any]] = {}
    for name in recipe.evaluation.baselines:
        target, guess, entries, notes = [], [], [], []
        for fold in folds:
            train, validation, test = (
                np.array([rows[i] for i in ids], dtype=np.int64)
                for ids in (fold.train, fold.validation, fold.test)
            )
            fitted = baselines.fit(name, data.baseline, labels, (train, validation, test), classes)
            target.append(labels[test])
            guess.append(fitted.test)
            measured = classification(labels[test], fitted.test, classes)
            scores = {metric: measured[metric] for metric in HEADLINE}
            entries.append({"name": fold.name, **fitted.settings, **scores})
            notes += [f"fold {fold.name}: {note}" for note in fitted.notes]
        pooled = classification(np.concatenate(target), np.concatenate(guess), classes)
        found[name] = {
            "metrics": {metric: {"mean": pooled[metric], "sd": 0.0} for metric in HEADLINE},
            "folds": entries,
            "notes": notes,
        }
        if name != "majority":
            wanted = recipe.evaluation.baseline_features
            found[name]["features"] = list(wanted) if wanted else "streams of the head"
    return found


# -- numbers ---------------------------------------------------------------------------------------


def summarise(measured: Sequence[Mapping[str, Any]]) -> Summary:
    """Return mean and sample standard deviation of every headline metric; 0 for a single one."""
    found: Summary = {}
    for name in HEADLINE:
        values = np.array([m[name] for m in measured], dtype=np.float64)
        sd = float(values.std(ddof=1)) if len(values) > 1 else 0.0
        found[name] = {"mean": float(values.mean()), "sd": sd}
    return found


def _measure(predictions: Predictions, rows: np.ndarray) -> dict[str, Any]:
    p = predictions
    return classification(p.labels[rows], p.predictions[rows], p.classes)


def _over_seeds(predictions: Predictions) -> Summary:
    seeds = np.unique(predictions.seeds)
    return summarise([_measure(predictions, predictions.of_seed(seed)) for seed in seeds])


def _over_folds(predictions: Predictions) -> Summary:
    folds = np.array(predictions.folds)
    groups = [
        predictions.of_seed(seed) & (folds == fold)
        for seed in np.unique(predictions.seeds)
        for fold in np.unique(folds)
    ]
    return summarise([_measure(predictions, rows) for rows in groups if rows.any()])


def _fold_entry(fold: Fold, trained: Sequence[_Trained]) -> dict[str, Any]:
    entries, measured = [], []
    for one in trained:
        if one.fold is not fold:
            continue
        on_test = _measure(one.test, np.ones(len(one.test), dtype=bool))
        measured.append(on_test)
        entries.append(
            {
                "seed": one.seed,
                "best_epoch": one.result.best_epoch,
                "seconds": round(one.result.seconds, 3),
                "validation_macro_F1": one.result.metrics.get("macro_F1"),
                **{name: on_test[name] for name in HEADLINE},
            }
        )
    return {
        "name": fold.name,
        "train": len(fold.train),
        "validation": len(fold.validation),
        "test": len(fold.test),
        "metrics": summarise(measured),
        "seeds": entries,
    }


# -- after -----------------------------------------------------------------------------------------


def _write(
    writer: RunWriter,
    result: RunResult,
    provenance: Mapping[str, Any],
    test: Predictions,
    validation: Predictions,
    trained: Sequence[_Trained],
) -> None:
    metrics = {key: value for key, value in result.to_json().items() if key != "run"}
    metrics["per_class"], metrics["confusion"] = result.per_class, result.confusion
    writer.write_json(rundir.METRICS, {**metrics, "averaging": AVERAGING})
    writer.write_json(rundir.PROVENANCE, provenance)
    writer.write_predictions(rundir.TEST, test)
    writer.write_predictions(rundir.VALIDATION, validation)
    writer.write_rows(
        rundir.HISTORY,
        ({"fold": t.fold.name, "seed": t.seed, **e} for t in trained for e in t.result.history),
    )
    title = f"{result.recipe.head.name} on {provenance['corpus']}"
    runs = f"{_plural(len(result.folds), 'fold')} × {_plural(len(provenance['seeds']), 'seed')}"
    with writer.figure(rundir.CONFUSION) as path:
        counts = np.array(result.confusion)
        draw_confusion(counts, test.classes, path, title=f"{title}\ntest predictions, {runs}")
    with writer.figure(rundir.CURVES) as path:
        panels: dict[str, list[str]] = {"loss": ["loss", "validation_loss"]}
        if len(validation):
            panels["validation"] = ["validation_macro_F1", "validation_UA"]
        histories = [t.result.history for t in trained]
        draw_curves(histories, panels, path, title=f"{title}: {runs}, mean in bold")
    writer.log("\n" + result.table())
