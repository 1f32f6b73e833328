"""emotion2vec's downstream data: ``train.npy``, ``train.lengths`` and, mostly, ``train.emo``.

``.npy`` holds the frames (F, D) of all utterances behind each other, ``.lengths`` one number of
frames per line. Ids come from ``.emo`` (id and label per line) or ``.tsv`` (the root on the first
line, then path and samples); else an utterance is the number of its line, from 0.

Source: ddlBoJack/emotion2vec, ``iemocap_downstream/data.py`` and
``iemocap_downstream/scripts/emotion2vec_speech_features.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mer.cache.errors import UsageError
from mer.cache.exchange.incoming import DEFAULT_OUTPUT, Incoming, Skipped, Utterance, Wanted
from mer.cache.exchange.npy import open_array

_MAX_DIGITS = 18  # fits int64


def read(source: Path) -> Incoming:
    """Find the utterances.

    Parameters
    ----------
    source : Path
        The ``.npy`` file, or a folder with one ``.lengths`` file in it.

    Raises
    ------
    UsageError
        A file is missing, cannot be read, or does not fit the others.
    """
    frames_path = _frames_path(source)
    lengths_path = frames_path.with_suffix(".lengths")
    frames = _frames(frames_path)
    lines = [line for line in _lines(lengths_path) if line]
    bad = next((line for line in lines if _count(line) is None), None)
    if bad is not None:
        raise UsageError(f"{lengths_path} is no list of numbers of frames: {bad[:40]!r}.")
    lengths = [int(line) for line in lines]
    if sum(lengths) != len(frames):
        raise UsageError(
            f"{lengths_path} counts {sum(lengths)} frames, {frames_path} holds {len(frames)}: they "
            "do not belong together."
        )
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    files = {".npy": frames_path, ".lengths": lengths_path}
    ids, samples, extra = _ids(frames_path, len(lengths))
    if extra is not None:
        files[extra.suffix] = extra

    def reader(wanted: Wanted) -> Iterator[Utterance | Skipped]:
        for n, name in enumerate(ids):
            if wanted(name):
                yield Utterance(name, {DEFAULT_OUTPUT: frames[offsets[n] : offsets[n + 1]]})

    return Incoming(
        files=files,
        ids=ids,
        read=reader,
        input_length=dict(zip(ids, samples, strict=True)) if samples else {},
        pooled=False,
        notes=()
        if extra is not None
        else ("There is no .emo or .tsv file: ids are the numbers of the lines, from 0.",),
    )


def _frames_path(source: Path) -> Path:
    if not source.is_dir():
        return source.with_suffix(".npy")
    found = sorted(source.glob("*.lengths"))
    if len(found) != 1:
        raise UsageError(
            f"{source} holds {len(found)} .lengths files, expected one. Name the .npy file itself."
        )
    return found[0].with_suffix(".npy")


def _frames(path: Path) -> np.ndarray:
    try:
        frames = open_array(path)
    except ValueError as error:
        raise UsageError(f"{path} cannot be read as frames: {error}.") from error
    if frames.ndim != 2:
        raise UsageError(f"{path} does not hold frames (F, D).")
    return frames


def _count(text: str) -> int | None:
    """Return a number of frames or samples, None if it is none that an array can have."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS else None


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}.") from error


def _ids(frames_path: Path, count: int) -> tuple[list[str], list[int], Path | None]:
    """Return ids, samples where a manifest has them, and the file they come from."""
    labels, manifest = frames_path.with_suffix(".emo"), frames_path.with_suffix(".tsv")
    if labels.is_file():
        rows = [line.split() for line in _lines(labels) if line]
        ids, samples, path = [row[0] for row in rows], [], labels
    elif manifest.is_file():
        table = [line.split("\t") for line in _lines(manifest)[1:] if line]
        ids, path = [row[0] for row in table], manifest
        samples = [(_count(row[1]) if len(row) > 1 else 0) or 0 for row in table]
    else:
        return [str(n) for n in range(count)], [], None
    if len(ids) != count:
        raise UsageError(
            f"{path} names {len(ids)} utterances, the lengths are {count}: they do not belong "
            "together."
        )
    return ids, samples, path
