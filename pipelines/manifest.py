"""Manifests: the utterances of a corpus, their labels and where their sound lies.

A manifest file is CSV, Parquet or JSONL (one object a line) with these columns, in any order. Only
``path`` or ``text`` is required; an empty cell means "not known":

=============== ================================================================================
``id``          unique name; without this column it is the path as written, plus ``#start-end``
                and ``#channel`` where given
``path``        recording; a relative one starts at the folder of the manifest file
``start``       begin of the segment in seconds; empty is the recording's own begin
``end``         end of the segment in seconds; empty is the recording's own end
``channel``     channel to take, from 0; empty mixes all
``text``        transcript
``speaker``     who speaks; protocols that keep speakers apart need it
``gender``      female, male or other (f, m accepted)
``session``     recording session
``dialogue``    conversation the utterance belongs to; one never crosses train and test
``label``       the target
``split``       official split: train, validation (dev, valid, val accepted) or test
``label:NAME``  a further target, e.g. ``label:voice``
``votes:LABEL`` raters who chose LABEL
=============== ================================================================================

CSV is UTF-8 with or without byte order mark, lines end in LF or CRLF, and the separator is a comma,
or a tab or semicolon where the header has no comma. Further columns are ignored and named in
``Manifest.notes``, except where a name looks like a misspelt or foreign form of one above: that is
an error, since ignoring it would lose data silently.
"""

from __future__ import annotations

import csv
import difflib
import gc
import io
import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any, Literal

from mer.cache.errors import ManifestError, MissingDependencyError


@dataclass(frozen=True, slots=True, kw_only=True)
class Utterance:
    """One labelled stretch of one speaker.

    Parameters
    ----------
    id : str
        Unique within the manifest.
    path : Path, optional
        Absolute path of the recording.
    start_s, end_s : float, optional
        Segment of the recording in seconds.
    channel : int, optional
        Channel to take, from 0.
    text : str, optional
        Transcript.
    speaker, gender, session, dialogue : str, optional
        Who and where; protocols split by them. Gender is ``"female"``, ``"male"`` or ``"other"``.
    label : str, optional
        Canonical label name (``angry``, ``happy`` …).
    labels : mapping of str to str
        Other targets by name (``{"voice": "sad", "intensity": "strong"}``).
    votes : mapping of str to float
        Raters per canonical label, where the corpus has them.
    split : str, optional
        Official split: ``train``, ``validation`` or ``test``.
    """

    id: str
    path: Path | None = None
    start_s: float | None = None
    end_s: float | None = None
    channel: int | None = None
    text: str | None = None
    speaker: str | None = None
    gender: str | None = None
    session: str | None = None
    dialogue: str | None = None
    label: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    votes: Mapping[str, float] = field(default_factory=dict)
    split: str | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """The utterances of one corpus, ids unique, in a stable order.

    Parameters
    ----------
    name : str
        Corpus name, or the stem of the manifest file.
    utterances : tuple of Utterance
        All of them.
    notes : tuple of str
        What a reader should know: counts that differ from the published ones, entries skipped
        and why.
    """

    name: str
    utterances: tuple[Utterance, ...]
    notes: tuple[str, ...] = ()


SUFFIXES = (".csv", ".parquet", ".jsonl")
COLUMNS = (
    "id",
    "path",
    "start",
    "end",
    "channel",
    "text",
    "speaker",
    "gender",
    "session",
    "dialogue",
    "label",
    "split",
)
SPLITS = ("train", "validation", "test")

_FOREIGN = {  # names other tools use for our columns
    "utterance": "id",
    "utterance_id": "id",
    "utt": "id",
    "utt_id": "id",
    "key": "id",
    "file": "path",
    "filename": "path",
    "file_name": "path",
    "filepath": "path",
    "file_path": "path",
    "audio": "path",
    "audio_path": "path",
    "wav": "path",
    "start_s": "start",
    "start_time": "start",
    "begin": "start",
    "end_s": "end",
    "end_time": "end",
    "transcript": "text",
    "transcription": "text",
    "sentence": "text",
    "spk": "speaker",
    "speaker_id": "speaker",
    "sex": "gender",
    "session_id": "session",
    "dialog": "dialogue",
    "dialogue_id": "dialogue",
    "emotion": "label",
    "emo": "label",
    "class": "label",
    "partition": "split",
    "split_set": "split",
}
_GENDERS = {
    "female": "female",
    "f": "female",
    "woman": "female",
    "male": "male",
    "m": "male",
    "man": "male",
    "other": "other",
    "o": "other",
    "nonbinary": "other",
    "unknown": None,
    "u": None,
    "": None,
}
_SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "development": "validation",
    "test": "test",
    "": None,
}
_NOTHING: dict[str, Any] = {}  # shared by all utterances without further labels or votes


def read_manifest(path: Path | str, root: Path | str | None = None) -> Manifest:
    """Read a manifest file; the module docstring lists its columns.

    Parameters
    ----------
    path : Path or str
        A ``.csv``, ``.parquet`` or ``.jsonl`` file.
    root : Path or str, optional
        Folder that relative recording paths start at; default is the folder of the manifest file.

    Raises
    ------
    ManifestError
        Names the file, the line and the column of the first fault.
    MissingDependencyError
        A Parquet file without pyarrow.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ManifestError(f"{path}: a manifest ends in {', '.join(SUFFIXES)}, not {suffix!r}.")
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ManifestError(f"{path}: the manifest {what}.")
    base = Path(root) if root is not None else path.parent
    if root is not None and not base.is_dir():
        raise ManifestError(f"{path}: the root folder {base} does not exist.")
    reader = {".csv": _csv_table, ".jsonl": _jsonl_table, ".parquet": _parquet_table}[suffix]
    with _no_gc():
        table = reader(path)
        utterances, notes = _build(table, os.path.abspath(base))
    return Manifest(path.stem, utterances, notes)


def write_manifest(manifest: Manifest, path: Path | str) -> Path:
    """Write ``manifest`` to a ``.csv``, ``.parquet`` or ``.jsonl`` file, replacing it at once.

    Recordings below the file's folder are written relative to it, others as absolute paths.
    Columns that are empty throughout are left out, except ``id``, ``path`` and ``label``.

    Raises
    ------
    ManifestError
        Another suffix, or a manifest without utterances.
    MissingDependencyError
        A Parquet file without pyarrow.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ManifestError(f"{path}: a manifest ends in {', '.join(SUFFIXES)}, not {suffix!r}.")
    if not manifest.utterances:
        raise ManifestError(f"{path}: manifest {manifest.name!r} holds no utterances to write.")
    columns = _columns_of(manifest, Path(os.path.abspath(path.parent)))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if suffix == ".csv":
            _write_csv(columns, temporary)
        elif suffix == ".jsonl":
            _write_jsonl(columns, temporary)
        else:
            _write_parquet(columns, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


# --- reading --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Table:
    """A file as columns: strings (CSV) or JSON values, and the line each row ends on."""

    path: Path
    unit: str  # "line" or "row"
    lines: Sequence[int]
    columns: dict[str, Sequence[Any]]

    def fault(self, row: int, column: str, problem: str) -> ManifestError:
        where = f"{self.path}, {self.unit} {self.lines[row]}"
        return ManifestError(f"{where}, column {column!r}: {problem}")


@contextmanager
def _no_gc() -> Iterator[None]:
    """Pause cycle collection: it would walk all objects again and again while they are built."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read: {error.strerror}.") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ManifestError(
            f"{path}, line {line}: byte 0x{content[error.start]:02x} is not UTF-8. "
            "Save the file as UTF-8."
        ) from error
    if "\0" in text:
        raise ManifestError(f"{path}: holds NUL characters, so it is not a text file in UTF-8.")
    if not text.strip():
        raise ManifestError(
            f"{path}: the file is empty. Expected columns such as {', '.join(COLUMNS)}."
        )
    return text


def _csv_table(path: Path) -> _Table:
    text = _read_text(path)
    first = text.lstrip("\r\n").split("\n", 1)[0]
    separator = ","
    if "," not in first:
        separator = "\t" if "\t" in first else ";" if ";" in first else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        rows = list(reader)
    except csv.Error as error:
        raise ManifestError(f"{path}, line {reader.line_num}: not CSV: {error}.") from error
    lines: Sequence[int] = range(1, len(rows) + 1)
    if reader.line_num != len(rows) or len(set(map(len, rows))) > 1:
        rows, lines = _tidy(path, text, separator)
    header = [name.strip() for name in rows[0]]
    rows, lines = rows[1:], lines[1:]
    _check_header(path, header)
    if not rows:
        raise ManifestError(f"{path}: a header and no rows.")
    return _Table(path, "line", lines, dict(zip(header, zip(*rows, strict=True), strict=True)))


def _tidy(path: Path, text: str, separator: str) -> tuple[list[list[str]], list[int]]:
    """Drop blank rows and number the others, where a row is not simply a line."""
    rows: list[list[str]] = []
    lines: list[int] = []
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    for row in reader:
        if not "".join(row).strip():
            continue
        if rows and len(row) != len(rows[0]):
            raise ManifestError(
                f"{path}, line {reader.line_num}: {len(row)} cells, the header has {len(rows[0])}. "
                "Quote cells that hold the separator or a line break."
            )
        rows.append(row)
        lines.append(reader.line_num)
    return rows, lines


def _jsonl_table(path: Path) -> _Table:
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ManifestError(
                f"{path}, line {number}: not JSON: {error.msg} at character {error.colno}."
            ) from error
        if not isinstance(row, dict):
            raise ManifestError(f"{path}, line {number}: expected a JSON object, got {row!r:.60}.")
        rows.append(row)
        lines.append(number)
    header: dict[str, None] = {}
    for row in rows:
        header.update(dict.fromkeys(row))
    _check_header(path, list(header))
    return _Table(path, "line", lines, {name: [row.get(name) for row in rows] for name in header})


def _parquet_table(path: Path) -> _Table:
    pyarrow, parquet = _pyarrow()
    try:
        table = parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ManifestError(f"{path}: not a Parquet file: {reason}") from error
    _check_header(path, list(table.column_names))
    if not table.num_rows:
        raise ManifestError(f"{path}: a header and no rows.")
    return _Table(path, "row", range(1, table.num_rows + 1), table.to_pydict())


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingDependencyError(
            "Parquet manifests need pyarrow: pip install 'mer[tables]', or use CSV or JSONL."
        ) from error
    return pyarrow, parquet


def _standard(name: str) -> str:
    """Return the documented form of a column name that differs in case or blanks only."""
    name = name.strip()
    lower = name.lower()
    if lower in COLUMNS:
        return lower
    prefix, colon, rest = name.partition(":")
    if colon and prefix.strip().lower() in ("label", "votes"):
        return f"{prefix.strip().lower()}:{rest.strip()}"
    return name


def _check_header(path: Path, header: list[str]) -> None:
    seen: set[str] = set()
    for name in map(_standard, header):
        if name in seen and name:
            raise ManifestError(f"{path}: column {name!r} appears twice.")
        if name in ("label:", "votes:"):
            raise ManifestError(f"{path}: column {name!r} lacks a name, e.g. {name + 'voice'!r}.")
        seen.add(name)
    for name in sorted(seen.difference(COLUMNS)):
        if name.startswith(("label:", "votes:")):
            continue
        meant = _FOREIGN.get(name.lower())
        if meant is None:
            near = difflib.get_close_matches(name.lower(), COLUMNS, n=1, cutoff=0.75)
            meant = near[0] if near else None
        if meant is not None and meant not in seen:
            raise ManifestError(
                f"{path}: unknown column {name!r}. Did you mean {meant!r}? Rename it, "
                f"or remove it where it means something else. Columns: {', '.join(COLUMNS)}, "
                "label:NAME, votes:LABEL."
            )
    if "path" not in seen and "text" not in seen:
        raise ManifestError(
            f"{path}: required column 'path' (or 'text') is missing; found: {', '.join(header)}."
        )


def _build(table: _Table, base: str) -> tuple[tuple[Utterance, ...], tuple[str, ...]]:
    columns = {_standard(name): values for name, values in table.columns.items()}
    num_rows = len(table.lines)

    def strings(name: str) -> Sequence[str | None] | None:
        return _strings(table, name, columns[name]) if name in columns else None

    def optional(values: Sequence[Any] | None) -> Iterable[Any]:
        return repeat(None, num_rows) if values is None else values

    path, text = strings("path"), strings("text")
    for row, (p, t) in enumerate(zip(optional(path), optional(text), strict=True)):
        if p is None and t is None:
            raise table.fault(
                row, "path" if path is not None else "text", "neither a recording nor a transcript."
            )
    start = _numbers(table, "start", columns.get("start"))
    end = _numbers(table, "end", columns.get("end"))
    channel = _integers(table, "channel", columns.get("channel"))
    _check_segments(table, path, start, end, channel)
    ids = _ids(table, strings("id"), path, start, end, channel)
    labels = _grouped(columns, "label:", lambda name: _strings(table, name, columns[name]))
    votes = _grouped(columns, "votes:", lambda name: _numbers(table, name, columns[name]))
    ignored = sorted(
        name
        for name in columns
        if name not in COLUMNS and not name.startswith(("label:", "votes:"))
    )
    notes = (f"Columns not read: {', '.join(map(repr, ignored))}.",) if ignored else ()
    fields: dict[str, Iterable[Any]] = {
        "id": ids,
        "path": optional(_paths(path, base)),
        "start_s": optional(start),
        "end_s": optional(end),
        "channel": optional(channel),
        "text": optional(text),
        "speaker": optional(strings("speaker")),
        "gender": optional(_mapped(table, "gender", strings("gender"), _GENDERS)),
        "session": optional(strings("session")),
        "dialogue": optional(strings("dialogue")),
        "label": optional(strings("label")),
        "labels": repeat(_NOTHING, num_rows) if labels is None else labels,
        "votes": repeat(_NOTHING, num_rows) if votes is None else votes,
        "split": optional(_mapped(table, "split", strings("split"), _SPLITS)),
    }
    return _utterances(num_rows, fields), notes


def _utterances(num_rows: int, fields: Mapping[str, Iterable[Any]]) -> tuple[Utterance, ...]:
    """Fill column by column: a frozen dataclass's constructor takes 0.3 s per 100,000."""
    rows = tuple(map(object.__new__, repeat(Utterance, num_rows)))
    for name, values in fields.items():
        deque(map(getattr(Utterance, name).__set__, rows, values), maxlen=0)
    return rows


def _strings(table: _Table, name: str, values: Sequence[Any]) -> list[str | None]:
    result: list[str | None] = []
    for row, value in enumerate(values):
        if type(value) is str:
            result.append(value.strip() or None)
        elif value is None or (isinstance(value, float) and math.isnan(value)):
            result.append(None)
        elif isinstance(value, int) and not isinstance(value, bool):
            result.append(str(value))
        elif isinstance(value, float) and value.is_integer():  # ids beside gaps, as pandas writes
            result.append(str(int(value)))
        else:
            raise table.fault(row, name, f"expected text, got {value!r}.")
    return result


def _numbers(table: _Table, name: str, values: Sequence[Any] | None) -> list[float | None] | None:
    if values is None:
        return None
    result: list[float | None] = []
    for row, value in enumerate(values):
        if value is None or value == "":
            result.append(None)
            continue
        try:
            if isinstance(value, bool):
                raise TypeError
            number = float(value)
        except (TypeError, ValueError):
            if isinstance(value, str) and not value.strip():
                result.append(None)
                continue
            raise table.fault(row, name, f"expected a number, got {value!r}.") from None
        if math.isnan(number) and not isinstance(value, str):  # a gap in Parquet
            result.append(None)
        elif not math.isfinite(number) or number < 0:
            raise table.fault(row, name, f"expected a number of at least 0, got {value!r}.")
        else:
            result.append(number)
    return result


def _integers(table: _Table, name: str, values: Sequence[Any] | None) -> list[int | None] | None:
    numbers = _numbers(table, name, values)
    if numbers is None:
        return None
    result: list[int | None] = []
    for row, number in enumerate(numbers):
        if number is not None and not number.is_integer():
            raise table.fault(row, name, f"expected a whole number, got {number!r}.")
        result.append(None if number is None else int(number))
    return result


def _mapped(
    table: _Table, name: str, values: Sequence[str | None] | None, known: Mapping[str, str | None]
) -> list[str | None] | None:
    if values is None:
        return None
    result: list[str | None] = []
    for row, value in enumerate(values):
        try:
            result.append(None if value is None else known[value.lower()])
        except KeyError:
            allowed = ", ".join(key for key in known if key)
            raise table.fault(row, name, f"{value!r} is not one of {allowed}.") from None
    return result


def _check_segments(
    table: _Table,
    path: Sequence[str | None] | None,
    start: Sequence[float | None] | None,
    end: Sequence[float | None] | None,
    channel: Sequence[int | None] | None,
) -> None:
    if start is not None and end is not None:
        for row, (a, b) in enumerate(zip(start, end, strict=True)):
            if a is not None and b is not None and a >= b:
                raise table.fault(row, "end", f"{b:g} s is not after the start at {a:g} s.")
    if end is not None:
        for row, b in enumerate(end):
            if b == 0:
                raise table.fault(row, "end", "a segment that ends at 0 s is empty.")
    for name, values in (("start", start), ("end", end), ("channel", channel)):
        if values is None:
            continue
        for row, value in enumerate(values):
            if value is not None and (path is None or path[row] is None):
                raise table.fault(row, name, f"{value:g} given, but the row has no path.")


def _ids(
    table: _Table,
    given: Sequence[str | None] | None,
    path: Sequence[str | None] | None,
    start: Sequence[float | None] | None,
    end: Sequence[float | None] | None,
    channel: Sequence[int | None] | None,
) -> list[str]:
    ids: list[str] = []
    if given is not None:
        for row, name in enumerate(given):
            if name is None:
                raise table.fault(row, "id", "empty. Fill it, or leave the whole column out.")
            ids.append(name)
    elif path is None:
        raise ManifestError(f"{table.path}: a manifest without 'path' needs the column 'id'.")
    else:
        for row, recording in enumerate(path):
            if recording is None:
                raise table.fault(row, "path", "empty, so the row needs an 'id'.")
            name = recording
            a, b = (start[row] if start else None), (end[row] if end else None)
            if a is not None or b is not None:
                name += f"#{a or 0.0:.3f}-" + ("" if b is None else f"{b:.3f}")
            if channel and channel[row] is not None:
                name += f"#{channel[row]}"
            ids.append(name)
    if len(set(ids)) != len(ids):
        first: dict[str, int] = {}
        for row, name in enumerate(ids):
            if name in first:
                twin = f"{table.unit} {table.lines[first[name]]}"
                raise table.fault(
                    row,
                    "id" if given is not None else "path",
                    f"{name!r} was used in {twin}; ids must be unique.",
                )
            first[name] = row
    return ids


def _paths(values: Sequence[str | None] | None, base: str) -> list[Path | None] | None:
    if values is None:
        return None
    prefix = base.rstrip(os.sep) + os.sep
    return [None if v is None else Path(v if os.path.isabs(v) else prefix + v) for v in values]


def _grouped(
    columns: Mapping[str, Any], prefix: str, parse: Callable[[str], Sequence[Any] | None]
) -> list[dict[str, Any]] | None:
    names = [name for name in columns if name.startswith(prefix)]
    if not names:
        return None
    keys = [name[len(prefix) :] for name in names]
    parsed = [parse(name) or () for name in names]
    return [
        {key: value for key, value in zip(keys, row, strict=True) if value is not None}
        for row in zip(*parsed, strict=True)
    ]


# --- writing --------------------------------------------------------------------------------


def _columns_of(manifest: Manifest, base: Path) -> dict[str, list[Any]]:
    rows = manifest.utterances

    def written(path: Path | None) -> str | None:
        if path is None:
            return None
        return path.relative_to(base).as_posix() if path.is_relative_to(base) else str(path)

    columns: dict[str, list[Any]] = {
        "id": [u.id for u in rows],
        "path": [written(u.path) for u in rows],
        "start": [u.start_s for u in rows],
        "end": [u.end_s for u in rows],
    }
    for name in COLUMNS[4:]:
        columns[name] = [getattr(u, name) for u in rows]
    for name in dict.fromkeys(key for u in rows for key in u.labels):
        columns[f"label:{name}"] = [u.labels.get(name) for u in rows]
    for name in dict.fromkeys(key for u in rows for key in u.votes):
        columns[f"votes:{name}"] = [u.votes.get(name) for u in rows]
    keep = ("id", "path", "label")
    return {
        name: values
        for name, values in columns.items()
        if name in keep or any(value is not None for value in values)
    }


def _write_csv(columns: Mapping[str, Sequence[Any]], path: Path) -> None:
    # With LF as the line end, the csv module leaves a lone carriage return unquoted.
    returns = any(type(v) is str and "\r" in v for values in columns.values() for v in values)
    quoting: Literal[0, 1] = csv.QUOTE_ALL if returns else csv.QUOTE_MINIMAL
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n", quoting=quoting)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def _write_jsonl(columns: Mapping[str, Sequence[Any]], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        for row in zip(*columns.values(), strict=True):
            cells = {n: v for n, v in zip(columns, row, strict=True) if v is not None}
            file.write(json.dumps(cells, ensure_ascii=False) + "\n")


def _write_parquet(columns: Mapping[str, Sequence[Any]], path: Path) -> None:
    pyarrow, parquet = _pyarrow()
    kinds = {"start": pyarrow.float64(), "end": pyarrow.float64(), "channel": pyarrow.int32()}
    arrays = {}
    for name, values in columns.items():
        kind = pyarrow.float64() if name.startswith("votes:") else kinds.get(name, pyarrow.string())
        arrays[name] = pyarrow.array(list(values), type=kind)
    parquet.write_table(pyarrow.table(arrays), path)
