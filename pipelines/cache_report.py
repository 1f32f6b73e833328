"""What the commands of `mer cache` print: as JSON types, and from those as text for people."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mer.cache.diff import ABSENT
from mer.cache.exchange.feature import EXTRACTOR, feature_of
from mer.pipelines.tables import counted, size, table

if TYPE_CHECKING:
    from mer.cache.collect import GcPlan, GcReport, Step
    from mer.cache.diff import StoreDiff
    from mer.cache.exchange.incoming import ImportReport
    from mer.cache.exchange.outgoing import ExportReport
    from mer.cache.home import Cache
    from mer.cache.store import Store, StoreInfo
    from mer.cache.transfer import CopyReport
    from mer.cache.verify import VerifyReport
    from mer.extract.inputs import Failure
    from mer.pipelines.caching import DatasetKeys

_BY_IDS = (
    "linked by ids alone, which tell no recording, so that no recipe can use them: import with "
    "--dataset to train from these features"
)
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


def info_result(info: StoreInfo) -> dict[str, Any]:
    """Return what `mer cache info` shows, with the feature string of imported features."""
    return {**dataclasses.asdict(info), "feature": _imported_feature(info)}


def _imported_feature(info: StoreInfo) -> str | None:
    if info.identity is None or info.identity.get("extractor") != EXTRACTOR:
        return None
    try:
        return feature_of(info.identity)
    except (KeyError, TypeError):  # a store that claims to be one
        return None


def info_text(info: StoreInfo) -> str:
    """Return everything a store knows of itself."""
    feature = _imported_feature(info)
    rows = [
        [name, o.kind, o.dim, o.rate_hz or "-", o.frames, " ".join(o.dtypes) or "-"]
        for name, o in info.outputs.items()
    ]
    lines = [
        info.path,
        f"{counted(info.utterances, 'utterance')} in {counted(info.parts, 'part')}, "
        f"{size(info.bytes)}",
        f"made {info.created or 'at an unknown time'}; licence: {info.licence or 'not stated'}",
        f"fingerprint {info.fingerprint or 'unknown'}",
    ]
    if feature is not None:
        lines.append(f"feature: {feature}")
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
    if not result["stores"] and not result["corrupt"]:
        return "Nothing to check: there are no stores."
    found = counted(len(result["corrupt"]), "damaged file") if result["corrupt"] else "all sound"
    lines = [
        f"{counted(result['stores'], 'store')}, {counted(result['checked'], 'part')}, "
        f"{counted(result['utterances'], 'utterance')}, {size(result['bytes'])}: {found}"
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
        lost = len(result["lost"])
        lines.append(
            f"{counted(lost, 'utterance')} {'is' if lost == 1 else 'are'} lost. "
            "`mer cache verify --repair` takes out what is damaged and nothing else."
        )
    elif done and result["lost"]:
        lost_ones = counted(len(result["lost"]), "lost utterance")
        lines.append(f"`mer extract` computes the {lost_ones} again.")
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


def copy_result(reports: Sequence[CopyReport], unreadable: Sequence[str] = ()) -> dict[str, Any]:
    """Return what `mer cache cp` did; ``unreadable`` says why whole stores were left out."""
    damaged = [*unreadable, *(reason for report in reports for reason in report.damaged)]
    return {"stores": [plain(report) for report in reports], "damaged": damaged}


def copy_text(result: Mapping[str, Any]) -> str:
    """Return a line per store."""
    rows = [
        [r["store"], r["utterances"], r["skipped_utterances"], r["parts"], size(r["bytes"])]
        for r in result["stores"]
    ]
    return table(["store", "copied", "there before", "parts", "size"], rows)


def gc_result(plan: GcPlan, report: GcReport | None, notes: Sequence[str] = ()) -> dict[str, Any]:
    """Return what `mer cache gc` did, or with ``report=None`` would do."""
    done = {} if report is None else plain(report)
    return {
        "dry_run": report is None,
        "steps": [_step(step) for step in plan.steps],
        "totals": [_step(step) for step in plan.totals],
        "bytes_before": plan.bytes_before,
        "bytes_freed": plan.bytes_freed,
        "utterances": plan.utterances,
        **done,
        "notes": [*notes, *plan.notes, *done.get("notes", ())],
    }


def _step(step: Step) -> dict[str, Any]:
    return {
        "store": step.store,
        "action": step.action,
        "parts": list(step.parts),
        "utterances": step.utterances,
        "bytes": step.bytes,
        "reason": step.reason,
    }


def gc_text(result: Mapping[str, Any]) -> str:
    """Return what happens to each store and what that frees."""
    lines = []
    if result["totals"]:
        rows = [
            [s["store"], s["action"], len(s["parts"]), s["utterances"], s["reason"]]
            for s in result["totals"]
        ]
        lines = [table(["store", "action", "parts", "utterances", "why"], rows), ""]
    verb = "would be" if result["dry_run"] else "were"
    freed = "about " * result["dry_run"] + size(result["bytes_freed"])
    lines.append(f"{counted(result['utterances'], 'utterance')} and {freed} {verb} removed")
    return "\n".join([*lines, *(f"note: {note}" for note in result["notes"])])


def export_result(report: ExportReport, failures: Sequence[Failure]) -> dict[str, Any]:
    """Return what `mer cache export` wrote."""
    return {**plain(report), "failures": _failures(failures)}


def export_text(result: Mapping[str, Any]) -> str:
    """Return what was written where."""
    frames = ", ".join(f"{name} {count:,}" for name, count in result["frames"].items())
    lines = [
        f"{counted(result['utterances'], 'utterance')} ({frames} frames), "
        f"{size(result['bytes'])}, as {result['format']}"
    ]
    if result["missing"]:
        lines.append(f"not in the store: {counted(result['missing'], 'utterance')} of the data set")
    lines += [f"note: {note}" for note in result["notes"]]
    return "\n".join([*lines, *result["paths"]])


def import_result(report: ImportReport, failures: Sequence[Failure]) -> dict[str, Any]:
    """Return what `mer cache import` brought."""
    fields = {f.name: getattr(report, f.name) for f in dataclasses.fields(report)}
    store = fields.pop("store")
    if report.linked == "ids":
        fields["notes"] = [*report.notes, _BY_IDS]
    return {"store": store.url, **plain(fields), "failures": _failures(failures)}


def import_text(result: Mapping[str, Any]) -> str:
    """Return what came in and how to name it in a recipe."""
    lines = [
        f"{counted(result['utterances'], 'utterance')}: {result['added']:,} added, "
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
    in_both = f"in both: {counted(result['in_both'], 'utterance')}"
    if result["equal"] and result["compared"]:
        compared = ", ".join(result["compared"])
        return "\n".join([*lines, f"equal: {counted(result['same'], 'utterance')} ({compared})"])
    for kind in ("identity", "outputs"):
        lines += [f"{kind} {n}: {_value(a)} ≠ {_value(b)}" for n, (a, b) in result[kind].items()]
    for which in ("only_in_a", "only_in_b"):
        if result[which]:
            lines.append(f"{which.replace('_', ' ')}: {counted(len(result[which]), 'utterance')}")
    for output, rows in result["different"].items():
        worst = rows[0]
        lines.append(
            f"{output}: {counted(len(rows), 'utterance')} with other values, most "
            f"{worst['key']}, by {worst['largest']}"
        )
    if not result["compared"]:
        return "\n".join([*lines, f"{in_both} (values not compared)"])
    return "\n".join([*lines, in_both, f"same: {counted(result['same'], 'utterance')}"])


def _value(value: Any) -> str:
    return ABSENT if value == ABSENT else json.dumps(value)


def _failures(failures: Sequence[Failure]) -> list[dict[str, Any]]:
    return [{"utterance": f.utterance, "reason": f.reason} for f in failures]
