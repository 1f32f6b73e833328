"""What every import shares: whose utterance it is, what is stored of it, what is left out and why.

T frames of an utterance, D width.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from mer.cache import layout
from mer.cache.errors import UsageError
from mer.cache.exchange.feature import (
    feature_string,
    format_field,
    imported_spec,
    output_field,
    parse_outputs,
)
from mer.cache.identity import KEY_BYTES, canonical_json, content_hash
from mer.cache.spec import OutputSpec

if TYPE_CHECKING:
    from mer.cache.home import Cache
    from mer.cache.store import Store

logger = logging.getLogger(__name__)

SAMPLE = 64  # utterances looked at to find out what an unknown file holds
DEFAULT_OUTPUT = "features"
_DOMAIN = b"mer.import.1\0"
_CLAIMS = ("store", "fingerprint", "slug", "identity", "licence", "mer_version", "source")
# What a file's id may end in, and a manifest's may not, without naming another utterance.
_SUFFIXES = frozenset(
    [".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aac", ".aiff", ".wma"]
    + [".mp4", ".avi", ".mkv", ".mov", ".webm", ".npy", ".pt", ".pth", ".txt"]
)
_NOT_HASHED = ("stored", "columns")
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._+-]+")

Wanted = Callable[[str], bool]
Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Utterance:
    """One utterance on its way in: arrays as found, per output, and the file they lie in.

    The file is None where all utterances share the source's few files.
    """

    id: str
    arrays: Mapping[str, np.ndarray]
    file: Path | None = None


@dataclass(frozen=True, slots=True)
class Skipped:
    """An utterance that was left out, and why."""

    id: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Incoming:
    """What an importer found in a source.

    Parameters
    ----------
    files : mapping of str to Path
        Everything that is read, under a name that does not depend on where the source lies or how
        it is called: the content hash covers both.
    ids : sequence of str
        All utterances.
    read : callable
        Yields the utterances whose id it is told are wanted, one at a time.
    outputs : tuple of OutputSpec, optional
        What the source declares; only our own exports do.
    keys, input_length : mapping
        By id, where the source has them; only our own exports do.
    claims : mapping
        What the source says of itself.
    pooled : bool, optional
        Whether vectors are one per utterance; None where that is for the arrays to tell.
    notes : tuple of str
        For the report.
    """

    files: Mapping[str, Path]
    ids: Sequence[str]
    read: Callable[[Wanted], Iterator[Utterance | Skipped]]
    outputs: tuple[OutputSpec, ...] | None = None
    keys: Mapping[str, bytes] = field(default_factory=dict)
    input_length: Mapping[str, int] = field(default_factory=dict)
    claims: Mapping[str, Any] = field(default_factory=dict)
    pooled: bool | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportReport:
    """What came in.

    Parameters
    ----------
    store : Store
        Where it lies.
    feature : str
        Feature string that names it in a recipe.
    format : str
        Layout it was read from.
    utterances : int
        Found in the source.
    added, present : int
        New in the store; there before, or of a recording that another id has brought.
    skipped : tuple of Skipped
        Left out, with reasons.
    linked : {"manifest", "keys", "ids"}
        How utterances find their recordings: by the manifest given, by the keys of our own export,
        or not at all (only their ids can be looked up).
    notes : tuple of str
        What a reader should know.
    """

    store: Store
    feature: str
    format: str
    utterances: int
    added: int
    present: int
    skipped: tuple[Skipped, ...]
    linked: str
    notes: tuple[str, ...] = ()


def bring_in(
    incoming: Incoming,
    cache: Cache,
    *,
    name: str,
    format: str,
    options: Mapping[str, Any],
    file: str,
    keys: Mapping[str, bytes] | None = None,
    licence: str | None = None,
    modality: str = "audio",
    outputs: str | Sequence[str] | None = None,
    dtype: str = "auto",
    rate_hz: float | str | None = None,
    num_codes: int | str | None = None,
    progress: Progress | None = None,
) -> ImportReport:
    """Add everything that can be stored to the store of its content.

    Raises
    ------
    UsageError
        Nothing can be imported, or an option does not fit.
    """
    keyed, linked, skipped = match(incoming, keys)
    specs = _describe(incoming, _names(outputs), dtype, rate_hz, num_codes)
    before = {path: _signature(path) for path in incoming.files.values()}
    content = hash_files(incoming.files)
    claims = _claims(incoming.claims)
    spec = imported_spec(
        name,
        format_field(format, options),
        content,
        specs,
        modality=modality,
        licence=licence if licence is not None else claims.get("licence"),
        source={
            "note": f"imported from {file}, extractor unknown",
            "file": file,
            **({"claims": claims} if claims else {}),
        },
    )
    rounding = dtype != "auto"
    store = cache.open(spec)
    there = _present(store, keyed)
    present, added = len(there), 0
    if progress is not None and there:
        progress(len(there))
    with ExitStack() as stack:
        writer = None
        new: set[bytes] = set()
        for item in incoming.read(lambda i: i in keyed and i not in there):
            if progress is not None:
                progress(1)
            try:
                if isinstance(item, Skipped):
                    raise ValueError(item.reason)
                arrays = {o.name: _conform(item.arrays, o, rounding) for o in specs}
                _check_unchanged(before, item.file)
            except _ChangedError:
                raise
            except ValueError as error:
                skipped.append(Skipped(item.id, str(error)))
                continue
            if writer is None:
                store = cache.open(spec, create=True)
                assert store is not None
                writer = stack.enter_context(store.writer())
            key = keyed[item.id]
            if key in new:
                present += 1
                continue
            writer.add(key, incoming.input_length.get(item.id, 0), arrays)
            new.add(key)
            added += 1
    if store is None:
        raise UsageError(f"Nothing of {file} can be imported. {_some(skipped)}")
    return ImportReport(
        store=store,
        feature=feature_string(spec),
        format=format,
        utterances=len(incoming.ids),
        added=added,
        present=present,
        skipped=tuple(skipped),
        linked=linked,
        notes=incoming.notes,
    )


class _ChangedError(UsageError):
    """The content hash does not stand for what is being read."""


def _signature(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _check_unchanged(before: Mapping[Path, tuple[int, int, int] | None], file: Path | None) -> None:
    for path in before if file is None else (file,):
        if _signature(path) != before[path]:
            raise _ChangedError(
                f"{path} changed while it was imported. Wait until it is complete, then import "
                "again."
            )


def _present(store: Store | None, keyed: Mapping[str, bytes]) -> set[str]:
    if store is None or not keyed:
        return set()
    contained = store.contains(list(keyed.values()))
    return {name for name, there in zip(keyed, contained, strict=True) if there}


def _some(skipped: Sequence[Skipped]) -> str:
    if not skipped:
        return "It holds no utterance."
    named = "; ".join(f"{s.id}: {s.reason}" for s in skipped[:3])
    return f"{len(skipped)} utterances were left out: {named}."


def _claims(claims: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a source says of itself, as far as it is known and can be stored."""
    known = {key: claims[key] for key in _CLAIMS if claims.get(key) is not None}
    try:
        known = json.loads(canonical_json(known))
    except (TypeError, ValueError):
        return {}
    if not isinstance(known.get("licence", ""), str):
        del known["licence"]
    return known


def hash_files(files: Mapping[str, Path]) -> str:
    """Return one hash (32 hex digits) over names and contents, in the order of the names.

    Raises
    ------
    UsageError
        A file cannot be read.
    """
    digest = xxhash.xxh3_128()
    for name in sorted(files):
        try:
            content = content_hash(files[name])
        except OSError as error:
            raise UsageError(f"Cannot read {files[name]}: {error.strerror}.") from error
        digest.update(name.encode("utf-8", "surrogateescape") + b"\0" + content)
    return digest.hexdigest()


# -- whose utterance it is -------------------------------------------------------------------------


def match(
    incoming: Incoming, keys: Mapping[str, bytes] | None
) -> tuple[dict[str, bytes], str, list[Skipped]]:
    """Return the key of every id that has one, how it was found, and the ids that have none.

    With a manifest, an id is that of the manifest, or a path that ends like it (or the other way
    round), known suffixes aside, where only one of each fits. Without one, the keys of our own
    export are used, else hashes of the ids, which address no recording.

    Raises
    ------
    UsageError
        Not one id is in the manifest, or an id occurs twice.
    """
    counts = Counter(incoming.ids)
    twice = {name for name, count in counts.items() if count > 1}
    skipped = [Skipped(name, "its id occurs more than once in the source") for name in twice]
    ids = [name for name in counts if name not in twice]
    if keys is None:
        if incoming.keys:
            keyed = {name: incoming.keys[name] for name in ids if name in incoming.keys}
            skipped += [Skipped(n, "it has no key in the source") for n in ids if n not in keyed]
            return keyed, "keys", skipped
        return {name: key_of_id(name) for name in ids}, "ids", skipped
    found = {name: name for name in ids if name in keys}
    rest = [name for name in ids if name not in found]
    if rest:
        taken = set(found.values())
        found |= _match_paths(rest, [name for name in keys if name not in taken])
    unknown = [name for name in ids if name not in found]
    skipped += [Skipped(name, "the manifest has no such utterance") for name in unknown]
    if ids and not found:
        raise UsageError(
            f"None of the {len(ids)} utterances of the source is in the manifest: the source has "
            f"{ids[0]!r}, the manifest {next(iter(keys), None)!r}. Rename one of them, or import "
            "without a manifest."
        )
    return {name: keys[found[name]] for name in ids if name in found}, "manifest", skipped


def key_of_id(name: str) -> bytes:
    """Return the key of an utterance of which nothing but the id is known."""
    data = name.encode("utf-8", "surrogateescape")
    return hashlib.blake2b(_DOMAIN + data, digest_size=KEY_BYTES).digest()


def _match_paths(ours: Sequence[str], theirs: Sequence[str]) -> dict[str, str]:
    """Match ids of which one, seen as a path, is the end of the other; only where unambiguous."""
    by_stem: dict[str, list[tuple[str, ...]]] = {}
    names: dict[tuple[str, ...], list[str]] = {}
    for name in theirs:
        path = _components(name)
        by_stem.setdefault(path[-1], []).append(path)
        names.setdefault(path, []).append(name)
    candidates: dict[str, str] = {}
    for name in ours:
        path = _components(name)
        fitting = {p for p in by_stem.get(path[-1], ()) if _ends_like(p, path)}
        exact = {p for p in fitting if p == path}
        chosen = exact or fitting
        if len(chosen) == 1:
            fits = names[next(iter(chosen))]
            if len(fits) == 1:
                candidates[name] = fits[0]
    uses = Counter(candidates.values())
    return {name: theirs_ for name, theirs_ in candidates.items() if uses[theirs_] == 1}


def _components(name: str) -> tuple[str, ...]:
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    last = parts.pop() if parts else name
    stem, dot, suffix = last.rpartition(".")
    if stem and f"{dot}{suffix}".lower() in _SUFFIXES:
        last = stem
    return (*parts, last)


def _ends_like(a: tuple[str, ...], b: tuple[str, ...]) -> bool:
    shared = min(len(a), len(b))
    return a[-shared:] == b[-shared:]


# -- what is stored --------------------------------------------------------------------------------


def output_name(name: str) -> str:
    """Return a name from a source as an output may have it."""
    cleaned = _NOT_IN_NAMES.sub("-", name).strip("-._+")
    return cleaned if cleaned not in ("", layout.KEY, layout.INPUT_LENGTH) else f"{cleaned}-values"


def frames_of(array: np.ndarray) -> tuple[np.ndarray, bool]:
    """Return an array as (T, D), and whether it was a vector.

    Leading axes of length 1 are dropped; integers in one axis are T codes, floats one vector.

    Raises
    ------
    ValueError
        It is no number, or has more axes.
    """
    if array.dtype.kind not in "fiu":
        raise ValueError(f"it holds {array.dtype}, not numbers")
    while array.ndim > 2 and array.shape[0] == 1:
        array = array[0]
    if array.ndim == 1:
        if array.dtype.kind == "f":
            return array[None], True
        return array[:, None], False
    if array.ndim != 2:
        raise ValueError(f"it has the shape {array.shape}, expected (T, D)")
    return array, False


def _names(outputs: str | Sequence[str] | None) -> tuple[str, ...] | None:
    if outputs is None:
        return None
    return tuple(outputs.split(",")) if isinstance(outputs, str) else tuple(outputs)


@dataclass(frozen=True, slots=True)
class _Seen:
    """One output as one utterance has it."""

    is_codes: bool
    dim: int
    is_vector: bool
    dtype: np.dtype
    peak: int


def _describe(
    incoming: Incoming,
    chosen: tuple[str, ...] | None,
    dtype: str,
    rate_hz: float | str | None,
    num_codes: int | str | None,
) -> tuple[OutputSpec, ...]:
    """Return the outputs to store: as the source declares them, else as most of a sample is."""
    if dtype not in ("auto", *layout.FLOAT_DTYPES):
        raise UsageError(f"dtype={dtype}, expected auto, {' or '.join(layout.FLOAT_DTYPES)}.")
    found = incoming.outputs if incoming.outputs is not None else _infer(incoming)
    names = [output.name for output in found]
    if chosen is not None:
        unknown = [name for name in chosen if name not in names]
        if unknown:
            raise UsageError(f"The source has no output {unknown[0]!r}; it has {', '.join(names)}.")
        found = tuple(output for output in found if output.name in chosen)
    rate = _number("rate_hz", rate_hz)
    codes = _number("num_codes", num_codes)
    specs = []
    for output in found:
        if output.kind == "codes":
            if codes is not None:
                output = replace(output, num_codes=int(codes))
        elif dtype != "auto":
            output = replace(output, dtype=dtype)
        if rate is not None and output.kind != "pooled":
            output = replace(output, rate_hz=rate)
        specs.append(output)
    return tuple(specs)


def _number(option: str, value: float | str | None) -> float | None:
    if value is None:
        return None
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not 0 < number < 2**32:
        raise UsageError(f"{option}={value}, expected a number above 0.")
    return number


def _infer(incoming: Incoming) -> tuple[OutputSpec, ...]:
    """Return what most of the first utterances hold."""
    seen: dict[str, list[_Seen]] = {}
    reasons: list[Skipped] = []
    sets: Counter[tuple[str, ...]] = Counter()
    for item in islice(incoming.read(lambda _: True), SAMPLE):
        if isinstance(item, Skipped):
            reasons.append(item)
            continue
        described = {}
        try:
            for name, array in item.arrays.items():
                frames, is_vector = frames_of(array)
                is_codes = frames.dtype.kind != "f"
                peak = int(frames.max()) if is_codes and frames.size else 0
                described[name] = _Seen(is_codes, frames.shape[1], is_vector, frames.dtype, peak)
        except ValueError as error:
            reasons.append(Skipped(item.id, f"{name}: {error}"))
            continue
        if described and all(one.dim for one in described.values()):
            sets[tuple(described)] += 1
            for name, one in described.items():
                seen.setdefault(name, []).append(one)
    if not sets:
        raise UsageError(f"Nothing can be imported. {_some(reasons)}")
    return tuple(_common(name, seen[name], incoming.pooled) for name in sets.most_common(1)[0][0])


def _common(name: str, seen: Sequence[_Seen], pooled: bool | None) -> OutputSpec:
    (is_codes, dim), _ = Counter((one.is_codes, one.dim) for one in seen).most_common(1)[0]
    mine = [one for one in seen if (one.is_codes, one.dim) == (is_codes, dim)]
    if is_codes:
        peak = max(one.peak for one in mine)
        dtype = next(d for d in ("uint16", "uint32") if d == "uint32" or peak < 2**16)
        kinds = {one.dtype.name for one in mine}
        if len(kinds) == 1 and kinds <= set(layout.CODE_DTYPES):
            dtype = kinds.pop()
        return OutputSpec(name=name, dim=dim, rate_hz=None, dtype=dtype, kind="codes")
    is_half = all(one.dtype.itemsize == 2 for one in mine)
    if pooled is None:
        pooled = all(one.is_vector for one in mine)
    return OutputSpec(
        name=name,
        dim=dim,
        rate_hz=None,
        dtype="float16" if is_half else "float32",
        kind="pooled" if pooled else "frames",
    )


def _conform(arrays: Mapping[str, np.ndarray], output: OutputSpec, rounding: bool) -> np.ndarray:
    """Return an output's (T, D) as it may be added.

    Raises
    ------
    ValueError
        Why not.
    """
    where = f"{output.name}: "
    if output.name not in arrays:
        raise ValueError(f"it has no output {output.name!r}")
    try:
        frames, _ = frames_of(arrays[output.name])
    except ValueError as error:
        raise ValueError(where + str(error)) from None
    is_float = frames.dtype.kind == "f"
    if is_float == (output.kind == "codes"):
        raise ValueError(f"{where}it holds {frames.dtype}, the others hold {output.kind}")
    if frames.shape[1] != output.dim:
        raise ValueError(f"{where}it is {frames.shape[1]} wide, the others are {output.dim}")
    if output.kind == "pooled" and len(frames) != 1:
        raise ValueError(f"{where}it has {len(frames)} vectors, expected one")
    if not is_float:
        return _codes(frames, output, where)
    if frames.dtype.itemsize > 2 and output.dtype == "float16" and not rounding:
        raise ValueError(
            f"{where}it is {frames.dtype}, the first ones are float16; give dtype=float32"
        )
    bad = int((~np.isfinite(frames).all(axis=1)).sum())
    if bad:
        raise ValueError(f"{where}NaN or an infinity in {bad} of {len(frames)} frames")
    if frames.dtype.itemsize > 4:
        with np.errstate(over="ignore"):
            frames = frames.astype(np.float32)
        if not np.isfinite(frames).all():
            raise ValueError(f"{where}a value is beyond float32")
    return np.asarray(frames, frames.dtype.newbyteorder("="))


def _codes(frames: np.ndarray, output: OutputSpec, where: str) -> np.ndarray:
    limit = int(np.iinfo(output.dtype).max)
    if output.num_codes is not None:
        limit = min(limit, output.num_codes - 1)
    if frames.size and not 0 <= int(frames.min()) <= int(frames.max()) <= limit:
        raise ValueError(
            f"{where}codes from {frames.min()} to {frames.max()}, expected 0 to {limit}"
        )
    return frames.astype(output.dtype)


# -- what our own exports say of themselves --------------------------------------------------------


def own_outputs(provenance: Mapping[str, Any]) -> tuple[OutputSpec, ...] | None:
    """Return the outputs that one of our exports declares, None if it is none or declares nonsense.

    The type is the one in the file, which is float32 where float16 would have overflowed.
    """
    try:
        outputs = []
        for fields in provenance["outputs"]:
            rest = {key: value for key, value in fields.items() if key not in _NOT_HASHED}
            name = output_name(str(fields["name"]))
            found = layout.output_from_json({**rest, "name": name, "dtype": str(fields["stored"])})
            [checked] = parse_outputs(output_field(found))
            columns = tuple(map(str, fields.get("columns") or ()))
            if len(columns) == checked.dim:
                checked = replace(checked, columns=columns)
            outputs.append(checked)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    return tuple(outputs) or None


def parse_provenance(text: str | bytes | None) -> dict[str, Any]:
    """Return the provenance of one of our exports, empty if there is none."""
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) and "mer_export" in found else {}
