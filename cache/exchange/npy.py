"""Folders of .npy files, one per utterance, as MERTools names and reads them.

``<model>-FRA/<id>.npy`` holds frames (T, D), ``<model>-UTT/<id>.npy`` their mean (D,). A store of
several outputs becomes one folder per output, ``<model>-<output>-FRA``. Beside the arrays lie
``utterances.csv`` (id, file, key, input_length) and ``provenance.json``.

Source: zeroQiaoba/MERTools, ``feature_extraction/audio/extract_audio_huggingface.py`` (names and
what is saved) and ``toolkit/utils/read_data.py`` (what is read: arrays are squeezed, so frames of
an utterance with a single frame may come as (D,)).
"""

from __future__ import annotations

import csv
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from mer.cache import layout
from mer.cache.errors import UsageError
from mer.cache.exchange.incoming import (
    DEFAULT_OUTPUT,
    Incoming,
    Skipped,
    Utterance,
    Wanted,
    own_outputs,
    parse_provenance,
)
from mer.cache.exchange.outgoing import PROVENANCE, Outgoing, appearing, check_free
from mer.cache.spec import OutputSpec

LEVELS = {"FRA": "frames (T, D)", "UTT": "the mean over frames (D,)"}
INDEX = "utterances.csv"
_SAFE = " !#$&'()+,-;=@[]^_{}~"  # beside letters and digits; the rest is %XX, and % itself
_MAX_NAME_BYTES = 240
_POOL_BLOCK = 4096
_MAGIC = b"\x93NUMPY"


def safe_name(name: str) -> str:
    """Return an id as one file name on any system: what is not safe there becomes %XX.

    Examples
    --------
    >>> safe_name("Ses01/F 000.a")
    'Ses01%2FF 000.a'
    """
    kept = "".join(
        c if c.isalnum() or c in _SAFE or c == "." else quote(c, safe="", errors="surrogateescape")
        for c in name
    )
    if kept.startswith("."):
        kept = "%2E" + kept[1:]
    return kept


def _file_names(ids: list[str]) -> list[str]:
    """Return the file of every id.

    Raises
    ------
    UsageError
        Two ids whose files a file system may take for one, an empty id, or one that is too long.
    """
    files = [safe_name(name) + ".npy" for name in ids]
    seen: dict[str, str] = {}
    for name, file in zip(ids, files, strict=True):
        if not name or len(file.encode("utf-8")) > _MAX_NAME_BYTES:
            raise UsageError(f"The id {name[:80]!r} cannot be the name of a file.")
        folded = unicodedata.normalize("NFC", file).casefold()
        if folded in seen:
            raise UsageError(
                f"The ids {seen[folded]!r} and {name!r} would share one file on some systems. "
                "Export as hdf5 or safetensors."
            )
        seen[folded] = name
    return files


def write(
    source: Outgoing, target: Path, overwrite: bool, *, level: str = "", model: str = ""
) -> list[Path]:
    """Write one folder per output below ``target``; all appear at the end, or none.

    Parameters
    ----------
    level : {"FRA", "UTT"}, optional
        Frames, or their mean; by default frames, and of an output that is one vector per utterance
        that vector (D,), as UTT.
    model : str, default=slug of the store
        First part of the folders' names.
    """
    chosen = level.upper()[:3]
    if chosen and chosen not in LEVELS:
        raise UsageError(f"level={chosen}, expected {' or '.join(LEVELS)}.")
    levels = {o.name: chosen or ("UTT" if o.kind == "pooled" else "FRA") for o in source.outputs}
    model = model or source.store.spec.slug
    if not re.fullmatch(r"[^/\\\0]+", model) or model in (".", ".."):
        raise UsageError(f"model={model!r} cannot be the name of a folder.")
    files = _file_names(source.ids)
    folders: dict[str, Path] = {}
    for output in source.outputs:
        level = levels[output.name]
        if level == "UTT" and output.kind == "codes":
            raise UsageError(f"Output {output.name!r} holds codes, which have no mean: level=FRA.")
        parts = [model, *([output.name] if len(source.outputs) > 1 else []), level]
        folders[output.name] = target / "-".join(parts)
        check_free(folders[output.name], overwrite)
    with ExitStack() as stack:
        for output in source.outputs:
            level = levels[output.name]
            temporary = stack.enter_context(appearing(folders[output.name], overwrite))
            temporary.mkdir()
            arrays = _means(source, output) if level == "UTT" else source.scan(output.name)
            for place, array in arrays:
                with open(temporary / files[place], "xb") as file:
                    np.lib.format.write_array(file, array, allow_pickle=False)
                if output is source.outputs[-1]:
                    source.advance()
            _write_index(source, files, temporary / INDEX)
            provenance = _provenance(source, output, level)
            text = json.dumps(provenance, indent=1, sort_keys=True, allow_nan=False)
            (temporary / PROVENANCE).write_text(text + "\n", "ascii")
    return list(folders.values())


def _means(source: Outgoing, output: OutputSpec) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the place and the mean (D,) of each utterance; one without frames has none."""
    if output.kind == "pooled":
        for place, frames in source.scan(output.name):
            yield place, frames[0]
        return
    without = 0
    for start in range(0, len(source), _POOL_BLOCK):
        keys = source.keys[start : start + _POOL_BLOCK]
        means = source.store.pooled(output.name, keys)[:, 0]
        for place, mean in enumerate(means, start):
            if np.isnan(mean).all():
                without += 1
            yield place, np.ascontiguousarray(mean)
    if without:
        source.notes.append(
            f"{without} utterances of {output.name!r} have no frames; their mean is NaN."
        )


def _provenance(source: Outgoing, output: OutputSpec, level: str) -> dict[str, Any]:
    provenance = source.provenance()
    [fields] = [o for o in provenance["outputs"] if o["name"] == output.name]
    if level == "UTT" and output.kind == "frames":
        mean = replace(output, kind="pooled", dtype="float32", rate_hz=None)
        fields = {**layout.output_to_json(mean), "stored": "float32"}
    return {**provenance, "outputs": [fields], "level": level}


def _write_index(source: Outgoing, files: list[str], path: Path) -> None:
    lengths = source.input_length()
    with open(path, "x", encoding="utf-8", errors="surrogateescape", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["id", "file", "key", "input_length"])
        for name, at, key, length in zip(source.ids, files, source.keys, lengths, strict=True):
            table.writerow([name, at, key.hex(), int(length)])


# -- reading ---------------------------------------------------------------------------------------


def read(folder: Path, *, level: str = "") -> Incoming:
    """Find the .npy files of a folder; an id is the path below it, without suffix.

    A folder that holds nothing but one ``<model>-FRA`` or ``<model>-UTT`` stands for that one.

    Parameters
    ----------
    level : {"FRA", "UTT"}, optional
        Whether vectors (D,) are means of utterances or single frames; by default what the folder's
        name ends in says so, else the arrays.

    Raises
    ------
    UsageError
        No folder, no .npy file in it, or several folders of features.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder; expected one with .npy files, e.g. wavlm-UTT.")
    folder = _feature_folder(folder)
    level = level.upper()[:3] or _level_of(folder)
    if level and level not in LEVELS:
        raise UsageError(f"level={level}, expected {' or '.join(LEVELS)}.")
    provenance = parse_provenance(_bytes(folder / PROVENANCE))
    index = _read_index(folder / INDEX) if provenance else {}
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*.npy"))}
    if not files:
        raise UsageError(f"{folder} holds no .npy file.")
    ids = {_id(name, index): path for name, path in files.items()}
    if len(ids) < len(files):
        raise UsageError(f"{folder}: two files have the same id.")
    outputs = own_outputs(provenance) if provenance else None
    output = outputs[0].name if outputs else DEFAULT_OUTPUT

    def reader(wanted: Wanted) -> Iterator[Utterance | Skipped]:
        for name, path in ids.items():
            if wanted(name):
                yield _load(name, path, output)

    used = (PROVENANCE, INDEX) if index else (PROVENANCE,) if provenance else ()
    return Incoming(
        files=files | {name: folder / name for name in used},
        ids=list(ids),
        read=reader,
        outputs=outputs,
        keys={row["id"]: bytes.fromhex(row["key"]) for row in index.values()},
        input_length={row["id"]: int(row["input_length"]) for row in index.values()},
        claims=provenance,
        pooled={"UTT": True, "FRA": False}.get(level),
    )


def _level_of(folder: Path) -> str:
    return re.sub(r".*(?:^|-)(FRA|UTT)$|.*", r"\1", folder.name)


def _feature_folder(folder: Path) -> Path:
    """Return the folder whose files are utterances: the one given, or the only one in it."""
    if _level_of(folder) or any(folder.glob("*.npy")):
        return folder
    inner = sorted(path for path in folder.iterdir() if path.is_dir())
    found = [path for path in inner if _level_of(path)]
    if len(inner) > 1 and found:
        names = ", ".join(path.name for path in found)
        raise UsageError(f"{folder} holds folders of features: {names}. Import one of them.")
    return found[0] if found else folder


def _bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _id(file: str, index: Mapping[str, Mapping[str, str]]) -> str:
    return index[file]["id"] if file in index else file.removesuffix(".npy")


def _read_index(path: Path) -> dict[str, dict[str, str]]:
    """Return the rows of one of our own folders by file, none where they do not hold together."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
            rows = {row["file"]: row for row in csv.DictReader(file)}
        for row in rows.values():
            if len(bytes.fromhex(row["key"])) != 16 or int(row["input_length"]) < 0:
                return {}
    except (OSError, ValueError, KeyError, TypeError, csv.Error):
        return {}
    return rows


def _load(name: str, path: Path, output: str) -> Utterance | Skipped:
    try:
        return Utterance(name, {output: open_array(path)}, path)
    except ValueError as error:
        return Skipped(name, f"{path.name} cannot be read: {error}")


def open_array(path: Path) -> np.ndarray:
    """Return the array of a .npy file, mapped: it claims no memory.

    Raises
    ------
    ValueError
        Why not. What numpy says is not passed on: it advises to unpickle.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise ValueError(error.strerror or "it is damaged or cut short") from error
    except (ValueError, EOFError) as error:
        with open(path, "rb") as file:
            is_npy = file.read(len(_MAGIC)) == _MAGIC
        if not is_npy:
            raise ValueError("it is no .npy file") from error
        if "object" in str(error).lower():
            raise ValueError("it holds Python objects, expected an array of numbers") from error
        raise ValueError("it is damaged or cut short") from error
    if not isinstance(array, np.ndarray):
        raise ValueError("it is an archive of several arrays, expected a single one")
    return array
