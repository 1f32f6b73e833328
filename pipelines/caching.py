"""What the commands of `mer cache` need of data sets: keys by utterance, and utterances by key.

A cache knows keys alone. A data set says which utterances they are, which of them it uses, and what
to call what is exported or imported.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mer.cache.errors import StoreError, UsageError
from mer.cache.exchange.feature import EXTRACTOR
from mer.extract.inputs import Failure, resolve
from mer.pipelines import corpora
from mer.pipelines.extraction import sources_of
from mer.pipelines.tables import size, table

if TYPE_CHECKING:
    from mer.cache.collect import GcPlan, GcReport
    from mer.cache.diff import StoreDiff
    from mer.cache.exchange.incoming import ImportReport
    from mer.cache.exchange.outgoing import ExportReport
    from mer.cache.home import Cache
    from mer.cache.store import Store, StoreInfo
    from mer.cache.transfer import CopyReport
    from mer.cache.verify import VerifyReport
    from mer.pipelines.manifest import Manifest

Modality = Literal["audio", "text"]


@dataclass(frozen=True, slots=True)
class DatasetKeys:
    """The keys of a data set's utterances.

    Parameters
    ----------
    manifest : Manifest
        The data set.
    audio, text : mapping of str to bytes
        Utterance id to key, for those that have sound or words.
    failures : tuple of Failure
        Utterances whose recording cannot be read.
    """

    manifest: Manifest
    audio: Mapping[str, bytes]
    text: Mapping[str, bytes]
    failures: tuple[Failure, ...] = ()

    @property
    def name(self) -> str:
        """Name of the data set."""
        return self.manifest.name

    def used(self) -> set[bytes]:
        """Return every key that the data set reads.

        Raises
        ------
        UsageError
            A recording cannot be read, so that its key is not known.
        """
        if self.failures:
            first = self.failures[0]
            raise UsageError(
                f"{len(self.failures)} utterances of {self.name!r} cannot be read, so what it uses "
                f"is not known (the first: {first.utterance}: {first.reason}). Nothing was "
                "removed. Give the --root with all of its recordings."
            )
        return {*self.audio.values(), *self.text.values()}

    @property
    def modality(self) -> Modality:
        """``"text"`` for a data set of transcripts alone."""
        return "text" if self.text and not self.audio and not self.failures else "audio"

    def utterances(self) -> dict[bytes, list[str]]:
        """Return the ids behind each key, in the data set's order; twins share one."""
        return {**_by_key(self.text), **_by_key(self.audio)}

    def utterances_of(self, store: Store) -> dict[bytes, list[str]]:
        """Return the same of the modality that a store holds."""
        audio, text = (_by_key(keys) for keys in (self.audio, self.text))
        of_words = text and store.contains(list(text)).any()
        of_sound = audio and store.contains(list(audio)).any()
        return text if (of_words and not of_sound) or not audio else audio


def _by_key(keys: Mapping[str, bytes]) -> dict[bytes, list[str]]:
    found: dict[bytes, list[str]] = {}
    for name, key in keys.items():
        found.setdefault(key, []).append(name)
    return found


def dataset_keys(
    dataset: str,
    root: Path | None,
    cache: Cache,
    *,
    workers: int = 4,
    progress: Callable[[int], None] | None = None,
) -> DatasetKeys:
    """Read a data set's manifest and find the keys of its sound and words.

    Parameters
    ----------
    dataset, root : str, Path
        As `mer extract` takes them.
    cache : Cache
        Its memo spares reading what did not change.
    progress : callable, optional
        Called with 1 for every recording that had to be read.

    Raises
    ------
    UsageError
        No such data set.
    """
    manifest = corpora.load(dataset, root)
    resolved = resolve(sources_of(manifest), cache.root, workers=workers, progress=progress)
    failures = tuple(resolved.failures)
    return DatasetKeys(manifest, resolved.audio_keys, resolved.text_keys, failures)


def utterance_keys(
    dataset: str, root: Path | None, cache: Cache, modality: Modality
) -> dict[str, bytes]:
    """Return the key of each utterance's sound or words; see `dataset_keys`."""
    found = dataset_keys(dataset, root, cache)
    return dict(found.audio if modality == "audio" else found.text)


def pair_roots(datasets: Sequence[str], roots: Sequence[Path]) -> list[tuple[str, Path | None]]:
    """Give each data set its folder: as many roots as data sets, or as corpora among them.

    Raises
    ------
    UsageError
        Any other number of roots.
    """
    if len(roots) == len(datasets):
        return list(zip(datasets, roots, strict=True))
    named = [d for d in datasets if not corpora.is_manifest(d)]
    if len(roots) != len(named):
        raise UsageError(
            f"{len(roots)} --root for {len(datasets)} data sets; give one for each in their "
            "order (manifests do without)."
        )
    given = iter(roots)
    return [(d, None if corpora.is_manifest(d) else next(given)) for d in datasets]


def keys_in_use(
    datasets: Iterable[tuple[str, Path | None]],
    cache: Cache,
    progress: Callable[[int], None] | None = None,
) -> set[bytes]:
    """Return the keys that any of the data sets reads.

    Raises
    ------
    UsageError
        A data set that is not there as a whole: what it uses cannot be told.
    """
    used: set[bytes] = set()
    for dataset, root in datasets:
        used |= dataset_keys(dataset, root, cache, progress=progress).used()
    return used


# -- stores by name --------------------------------------------------------------------------------


def is_place(name: str) -> bool:
    """Tell whether ``name`` is a path or URL rather than (the beginning of) a store's name."""
    return "/" in name or os.sep in name or name in (".", "..") or name.startswith("~")


def find_store(name: str, cache: Cache) -> Store:
    """Return the store that ``name`` means: its path or URL, its name in ``cache`` or a prefix.

    Raises
    ------
    UnknownNameError
        There is none; near misses are suggested.
    UsageError
        Several are meant.
    """
    if not is_place(name) and (name in cache.home.names() or not Path(name).is_dir()):
        return cache[name]
    import mer.cache

    return mer.cache.open(name)


def find_stores(name: str, cache: Cache) -> list[Store]:
    """Return the stores that ``name`` means: as `find_store`, or all of a cache's path or URL."""
    from mer.cache.home import Cache as AnyCache
    from mer.cache.place import is_store_name

    if is_place(name) and not is_store_name(name.rstrip("/").rpartition("/")[2]):
        found = AnyCache.from_url(name).stores()
        if not found:
            raise UsageError(f"There are no stores in {name}.")
        return found
    return [find_store(name, cache)]


def num_bytes(stores: Iterable[Store]) -> int:
    """Return the bytes of all sound parts, for a bar's length."""
    total = 0
    for store in stores:
        with suppress(StoreError):
            total += sum(part.bytes for part in store.parts())
    return total


# -- results, as JSON and as text ------------------------------------------------------------------

SHOWN = 10
"""Utterances named per line of text; JSON names all."""


def plain(value: Any) -> Any:
    """Return reports as JSON types: keys in hex, paths as text, no NaN, dataclasses as objects."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    return value


def listing(cache: Cache) -> dict[str, Any]:
    """Return what `mer cache ls` shows."""
    infos = [store.info() for store in cache.stores()]
    stores = [
        {
            "name": info.name,
            "utterances": info.utterances,
            "outputs": list(info.outputs),
            "bytes": info.bytes,
            "parts": info.parts,
            "created": info.created,
            "licence": info.licence,
        }
        for info in infos
    ]
    damaged = [{"store": i.name, "reason": reason} for i in infos for reason in i.damage]
    return {"cache": cache.url, "stores": stores, "damaged": damaged}


def listing_text(result: Mapping[str, Any]) -> str:
    """Return the table of stores."""
    if not result["stores"]:
        return f"No stores in {result['cache']}. `mer extract` makes them."
    rows = [
        [s["name"], s["utterances"], s["parts"], size(s["bytes"]), " ".join(s["outputs"])]
        for s in result["stores"]
    ]
    return table(["store", "utterances", "parts", "size", "outputs"], rows)


def info_text(info: StoreInfo) -> str:
    """Return everything a store knows of itself."""
    rows = [
        [name, o.kind, o.dim, o.rate_hz or "-", o.frames, " ".join(o.dtypes) or "-"]
        for name, o in info.outputs.items()
    ]
    lines = [
        info.path,
        f"{info.utterances:,} utterances in {info.parts} parts, {size(info.bytes)}",
        f"made {info.created or 'at an unknown time'}; licence: {info.licence or 'not stated'}",
        f"fingerprint {info.fingerprint or 'unknown'}",
    ]
    if info.source is not None:
        lines += ["imported:", *_indented(info.source)]
    lines += ["", table(["output", "kind", "dim", "Hz", "frames", "stored as"], rows)]
    if info.identity is not None:
        lines += ["", "identity:", *_indented(info.identity)]
    return "\n".join(lines)


def _indented(document: Mapping[str, Any]) -> list[str]:
    return [f"  {line}" for line in json.dumps(document, indent=2, sort_keys=True).splitlines()]


def _named(
    keys: Iterable[bytes], utterances: Mapping[bytes, Sequence[str]], dataset: str
) -> list[str]:
    """Return ``dataset/id`` of each key, or the key in hex where no utterance has it."""
    names: list[str] = []
    for key in keys:
        ids = utterances.get(key)
        names += [f"{dataset}/{name}" for name in ids] if ids else [key.hex()]
    return names


def verify_result(report: VerifyReport, keys: DatasetKeys | None) -> dict[str, Any]:
    """Return what `mer cache verify` found; utterances by id where ``keys`` knows them."""
    utterances, dataset = ({}, "") if keys is None else (keys.utterances(), keys.name)
    corrupt = [
        {
            "store": fault.store,
            "part": fault.part,
            "file": fault.file,
            "reason": fault.reason,
            "restorable": fault.restorable,
            "utterances": _named(fault.utterances, utterances, dataset),
        }
        for fault in report.corrupt
    ]
    return {
        "checked": report.parts,
        "stores": report.stores,
        "files": report.files,
        "bytes": report.bytes,
        "utterances": report.utterances,
        "corrupt": corrupt,
        "lost": _named(report.lost, utterances, dataset),
        "repaired": list(report.repaired),
        "quarantined": list(report.quarantined),
        "notes": list(report.notes),
    }


def verify_text(result: Mapping[str, Any]) -> str:
    """Return the findings, and what to do about them."""
    lines = [
        f"{result['stores']} stores, {result['checked']} parts, {result['utterances']:,} "
        f"utterances, {size(result['bytes'])}: "
        + (f"{len(result['corrupt'])} damaged files" if result["corrupt"] else "all sound")
    ]
    for fault in result["corrupt"]:
        where = f"part {fault['part']}, " if fault["part"] else ""
        lines.append(f"damaged  {fault['store']}: {where}{fault['file']}: {fault['reason']}")
        if fault["utterances"]:
            lines.append(f"         utterances: {_some(fault['utterances'])}")
    lines += [f"repaired {what}" for what in result["repaired"]]
    lines += [f"moved to {where}" for where in result["quarantined"]]
    lines += [f"note: {note}" for note in result["notes"]]
    done = result["repaired"] or result["quarantined"]
    if result["corrupt"] and not done:
        lines.append(
            f"{len(result['lost'])} utterances are lost. `mer cache verify --repair` takes out "
            "what is damaged and nothing else."
        )
    elif done and result["lost"]:
        lines.append(f"`mer extract` computes the {len(result['lost'])} lost utterances again.")
    return "\n".join(lines)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more (--json lists all)" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def usage_result(cache: Cache, stores: Iterable[Store]) -> dict[str, Any]:
    """Return what `mer cache du` shows: bytes by store and by what they are for."""
    from mer.cache.usage import total_usage, usage

    usages = [usage(store) for store in stores]
    total = total_usage(usages)
    rows = [{**plain(its), "total": its.total} for its in usages]
    return {"cache": cache.url, "stores": rows, "total": {**plain(total), "total": total.total}}


def usage_text(result: Mapping[str, Any]) -> str:
    """Return a line per store and output, largest store first, and the sum."""
    if not result["stores"]:
        return f"No stores in {result['cache']}."
    beside = ("snapshot", "temporary", "quarantine", "other")
    rows: list[list[object]] = []
    for its in [*sorted(result["stores"], key=lambda row: -row["total"]), result["total"]]:
        rows.append(
            [
                its["store"],
                size(its["total"]),
                size(sum(its["frames"].values())),
                size(its["pooled"] + its["index"] + its["metadata"]),
                *(size(its[what]) if its[what] else "-" for what in beside),
                its["parts"],
            ]
        )
    header = ["store", "total", "frames", "pooled, index", *beside, "parts"]
    return table(header, rows)


def copy_result(reports: Sequence[CopyReport]) -> dict[str, Any]:
    """Return what `mer cache cp` did."""
    damaged = [reason for report in reports for reason in report.damaged]
    return {"stores": [plain(report) for report in reports], "damaged": damaged}


def copy_text(result: Mapping[str, Any]) -> str:
    """Return a line per store."""
    rows = [
        [r["store"], r["utterances"], r["skipped_utterances"], r["parts"], size(r["bytes"])]
        for r in result["stores"]
    ]
    return table(["store", "copied", "there before", "parts", "size"], rows)


def recomputable(stores: Iterable[Store]) -> tuple[list[Store], tuple[str, ...]]:
    """Return the stores that `mer extract` can fill again, and a note on each other one.

    Imported features may be known by the ids of a stranger, which no manifest's keys match, and
    nothing can compute them.
    """
    chosen, notes = [], []
    for store in stores:
        with suppress(StoreError):
            if store.spec.identity.get("extractor") == EXTRACTOR:
                notes.append(
                    f"{store.name} is left as it is: it was imported; name it to choose it"
                )
                continue
        chosen.append(store)
    return chosen, tuple(notes)


def gc_result(plan: GcPlan, report: GcReport | None, notes: Sequence[str] = ()) -> dict[str, Any]:
    """Return what `mer cache gc` did, or with ``report=None`` would do."""
    steps = [
        {
            "store": step.store,
            "action": step.action,
            "parts": list(step.parts),
            "utterances": step.utterances,
            "bytes": step.bytes,
            "reason": step.reason,
        }
        for step in plan.steps
    ]
    done = {} if report is None else plain(report)
    return {
        "dry_run": report is None,
        "steps": steps,
        "bytes_before": plan.bytes_before,
        "bytes_freed": plan.bytes_freed,
        "utterances": plan.utterances,
        **done,
        "notes": [*notes, *plan.notes, *done.get("notes", ())],
    }


def gc_text(result: Mapping[str, Any]) -> str:
    """Return the steps and what they free."""
    lines = []
    if result["steps"]:
        rows = [
            [s["store"], s["action"], len(s["parts"]), s["utterances"], s["reason"]]
            for s in result["steps"]
        ]
        lines = [table(["store", "action", "parts", "utterances", "why"], rows), ""]
    verb = "would be" if result["dry_run"] else "were"
    freed = "about " * result["dry_run"] + size(result["bytes_freed"])
    lines.append(f"{result['utterances']:,} utterances and {freed} {verb} removed")
    return "\n".join([*lines, *(f"note: {note}" for note in result["notes"])])


def export_result(report: ExportReport, failures: Sequence[Failure]) -> dict[str, Any]:
    """Return what `mer cache export` wrote."""
    return {**plain(report), "failures": _failures(failures)}


def export_text(result: Mapping[str, Any]) -> str:
    """Return what was written where."""
    frames = ", ".join(f"{name} {count:,}" for name, count in result["frames"].items())
    lines = [
        f"{result['utterances']:,} utterances ({frames} frames), {size(result['bytes'])}, "
        f"as {result['format']}"
    ]
    if result["missing"]:
        lines.append(f"{result['missing']:,} utterances of the data set are not in the store")
    lines += [f"note: {note}" for note in result["notes"]]
    return "\n".join([*lines, *result["paths"]])


def import_result(report: ImportReport, failures: Sequence[Failure]) -> dict[str, Any]:
    """Return what `mer cache import` brought."""
    fields = {f.name: getattr(report, f.name) for f in dataclasses.fields(report)}
    store = fields.pop("store")
    return {"store": store.url, **plain(fields), "failures": _failures(failures)}


def import_text(result: Mapping[str, Any]) -> str:
    """Return what came in and how to name it in a recipe."""
    lines = [
        f"{result['utterances']:,} utterances: {result['added']:,} added, "
        f"{result['present']:,} there before, {len(result['skipped']):,} left out"
    ]
    lines += [f"left out {s['id']}: {s['reason']}" for s in result["skipped"][:SHOWN]]
    if len(result["skipped"]) > SHOWN:
        lines.append(f"left out … and {len(result['skipped']) - SHOWN} more (--json lists all)")
    lines += [f"note: {note}" for note in result["notes"]]
    return "\n".join([*lines, f"feature: {result['feature']}", result["store"]])


def diff_result(found: StoreDiff) -> dict[str, Any]:
    """Return how two stores differ."""
    return {"equal": found.equal, **plain(found)}


def diff_text(result: Mapping[str, Any]) -> str:
    """Return the differences, the largest first."""
    lines = [f"a: {result['a']}", f"b: {result['b']}"]
    if result["equal"]:
        compared = ", ".join(result["compared"]) or "values not compared"
        return "\n".join([*lines, f"equal: {result['same']:,} utterances ({compared})"])
    for kind in ("identity", "outputs"):
        lines += [
            f"{kind} {n}: {json.dumps(a)} ≠ {json.dumps(b)}" for n, (a, b) in result[kind].items()
        ]
    for which in ("only_in_a", "only_in_b"):
        if result[which]:
            lines.append(f"{which.replace('_', ' ')}: {len(result[which]):,} utterances")
    for output, rows in result["different"].items():
        worst = rows[0]
        lines.append(
            f"{output}: {len(rows):,} utterances differ, most {worst['key']}, by {worst['largest']}"
        )
    return "\n".join([*lines, f"same: {result['same']:,} utterances"])


def _failures(failures: Sequence[Failure]) -> list[dict[str, Any]]:
    return [{"utterance": f.utterance, "reason": f.reason} for f in failures]


def parse_options(pairs: Sequence[str], option: str = "--option") -> dict[str, str]:
    """Return ``KEY=VALUE`` pairs as a mapping.

    Raises
    ------
    UsageError
        A pair without ``=``.
    """
    options: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"{option} {pair!r} is not KEY=VALUE.")
        options[key.strip()] = value.strip()
    return options


def mmsa_labels(manifest: Manifest) -> dict[str, dict[str, Any]]:
    """Return what an MMSA pickle says of each utterance besides its features.

    ``label`` becomes the annotation, and the regression label where it is a number; further labels
    count under MMSA's own names (``label:regression_label_T`` …, ``label:classification_label``).
    """
    labels: dict[str, dict[str, Any]] = {}
    for utterance in manifest.utterances:
        row: dict[str, Any] = {
            "split": utterance.split,
            "annotation": utterance.label,
            "raw_text": utterance.text,
            "regression_label": _number(utterance.label),
        }
        for name, value in utterance.labels.items():
            if name.startswith("regression_label"):
                row[name] = _number(value)
            elif name == "classification_label":
                number = _number(value)
                row[name] = None if number is None else int(number)
        labels[utterance.id] = row
    return labels


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def export_options(
    format: str,
    options: Sequence[str],
    also: Sequence[str],
    keys: DatasetKeys | None,
    cache: Cache,
) -> dict[str, Any]:
    """Return the options of a format: those given, and what MMSA's takes from the data set.

    Parameters
    ----------
    options : sequence of str
        ``KEY=VALUE``.
    also : sequence of str
        ``MODALITY=STORE`` or ``MODALITY=STORE#OUTPUT``.

    Raises
    ------
    UsageError
        A pair that is none, a store that is not there, or no data set where one is needed.
    """
    chosen: dict[str, Any] = dict(parse_options(options))
    if format == "mmsa":
        if keys is None:
            raise UsageError("An MMSA pickle holds splits and labels: name the --dataset.")
        chosen["labels"] = mmsa_labels(keys.manifest)
    if also:
        if keys is None:
            raise UsageError("--also goes with --dataset, which says whose utterances they are.")
        streams = {}
        for modality, place in parse_options(also, "--also").items():
            name, _, output = place.partition("#")
            store = find_store(name, cache)
            streams[modality] = (store, output or None, keys.utterances_of(store))
        chosen["also"] = streams
    return chosen
