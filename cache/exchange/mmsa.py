"""The feature pickle of MMSA: split -> {id, raw_text, audio, audio_lengths, labels, …}.

N utterances of a split, L frames of the longest utterance of all splits, D width. Features are
(N, L, D), zero behind the end of each utterance. What MMSA reads:

- ``id``, ``raw_text``, ``annotations``: lists of text; ids look like ``video$_$clip``
- ``audio``, ``vision``, ``text``: features; ``audio_lengths``, ``vision_lengths``: their frames
- ``regression_labels`` (N,), for SIMS also ``regression_labels_T``, ``…_A`` and ``…_V``
- ``classification_labels`` (N,): 0 negative, 1 neutral, 2 positive; deprecated there

A pickle with one modality takes the place of that modality of the data set's own file
(``-Fa audio.pkl``), which is what a single store is good for. ``text_bert`` holds tokens, not
features, and is not written.

Source: thuiar/MMSA, ``README.md`` section 2 and ``src/MMSA/data_loader.py``; thuiar/MMSA-FET,
``src/MSA_FET/dataset.py`` (padding, keys of its output).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mer.cache.errors import UsageError
from mer.cache.exchange.incoming import Incoming, Skipped, Utterance, Wanted, output_name
from mer.cache.exchange.options import whole
from mer.cache.exchange.outgoing import Ids, Outgoing, appearing, select
from mer.cache.exchange.pickling import Streamed, dump
from mer.cache.restricted import load

if TYPE_CHECKING:
    from mer.cache.store import Store

MODALITIES = ("text", "audio", "vision")
SPLITS = ("train", "valid", "test")
_SPLIT_NAMES = {"dev": "valid", "val": "valid", "validation": "valid"}
_TOKENS = "text_bert"


# -- writing ---------------------------------------------------------------------------------------


def write(
    source: Outgoing,
    target: Path,
    overwrite: bool,
    *,
    labels: Mapping[str, Mapping[str, Any]] | None = None,
    modality: str = "audio",
    max_frames: int | str | None = None,
    also: Mapping[str, tuple[Store, str | None, Ids]] | None = None,
) -> list[Path]:
    """Write one pickle, which is never held in memory.

    Parameters
    ----------
    labels : mapping
        By utterance id: ``split`` (train, valid, test) and, where known, ``regression_label``,
        ``regression_label_T``, ``…_A``, ``…_V``, ``classification_label``, ``annotation``,
        ``raw_text``. Utterances without a split are left out.
    modality : {"audio", "text", "vision"}
        What the store's features stand for.
    max_frames : int, optional
        Utterances are cut to so many frames; by default none is.
    also : mapping, optional
        Further modalities: name to (store, output, key to id). Utterances that one of them lacks
        are left out.

    Raises
    ------
    UsageError
        No labels, an unknown modality or split, several outputs, or codes.
    """
    streams = {modality: source}
    for name, (store, output, its_ids) in (also or {}).items():
        if name in streams:
            raise UsageError(f"Two stores are given for the modality {name!r}.")
        streams[name], _ = select(store, its_ids, [store.output(output).name])
    for name, stream in streams.items():
        if name not in MODALITIES:
            raise UsageError(f"modality={name}, expected {', '.join(MODALITIES)}.")
        if len(stream.outputs) != 1 or stream.outputs[0].kind == "codes":
            raise UsageError("An MMSA pickle holds one output of frames per modality; choose one.")
    splits = _splits(streams, labels)
    limit = None if max_frames is None else whole("max_frames", max_frames, 1)
    contents: dict[str, dict[str, Any]] = {split: {} for split in SPLITS}
    for split, ids in splits.items():
        contents[split] = _columns(ids, labels or {})
    for name, stream in streams.items():
        _add_features(contents, splits, name, stream, limit)
    with appearing(target, overwrite) as temporary, open(temporary, "xb") as file:
        dump({**contents, "mer": source.provenance_json}, file)
    source.advance(sum(map(len, splits.values())))
    return [target]


def _splits(
    streams: Mapping[str, Outgoing], labels: Mapping[str, Mapping[str, Any]] | None
) -> dict[str, list[str]]:
    """Return the ids of every split, in the order of the first stream."""
    if not isinstance(labels, Mapping) or not labels:
        raise UsageError("An MMSA pickle needs splits and labels: export with a manifest.")
    first, *rest = streams.values()
    common = set(first.ids).intersection(*(stream.ids for stream in rest))
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    left_out = 0
    for name in first.ids:
        given = labels.get(name, {}).get("split")
        split = _SPLIT_NAMES.get(str(given).lower(), str(given).lower())
        if given is None or name not in common:
            left_out += 1
        elif split not in SPLITS:
            raise UsageError(f"Utterance {name!r} is in the split {given!r}; expected {SPLITS}.")
        else:
            splits[split].append(name)
    first.left_out = left_out
    if left_out:
        first.notes.append(f"{left_out} utterances without a split or a modality are left out.")
    if not any(splits.values()):
        raise UsageError("No utterance has a split: an MMSA pickle would be empty.")
    return splits


def _columns(ids: Sequence[str], labels: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    rows = [labels[name] for name in ids]
    columns: dict[str, Any] = {
        "id": list(ids),
        "raw_text": [str(row.get("raw_text") or "") for row in rows],
        "annotations": [str(row.get("annotation") or "") for row in rows],
    }
    numbers = {"regression_labels": "regression_label"}
    numbers |= {f"regression_labels_{m}": f"regression_label_{m}" for m in "TAV"}
    for column, name in numbers.items():
        if column == "regression_labels" or any(row.get(name) is not None for row in rows):
            values = [row.get(name) for row in rows]
            columns[column] = np.array([np.nan if v is None else v for v in values], np.float32)
    if any(row.get("classification_label") is not None for row in rows):
        values = [row.get("classification_label") for row in rows]
        columns["classification_labels"] = np.array([-1 if v is None else v for v in values], "i8")
    return columns


def _add_features(
    contents: dict[str, dict[str, Any]],
    splits: Mapping[str, Sequence[str]],
    modality: str,
    stream: Outgoing,
    limit: int | None,
) -> None:
    [output] = stream.outputs
    lengths = dict(zip(stream.ids, stream.num_frames(output.name).tolist(), strict=True))
    keys = dict(zip(stream.ids, stream.keys, strict=True))
    longest = max((lengths[name] for ids in splits.values() for name in ids), default=0)
    rows = max(1, longest if limit is None else min(longest, limit))
    cut = sum(lengths[name] > rows for ids in splits.values() for name in ids)
    if cut:
        stream.notes.append(f"{cut} utterances are cut to {rows} frames.")
    kind = stream.one_type(output.name)
    for split, ids in splits.items():

        def blocks(ids: Sequence[str] = ids) -> Iterable[np.ndarray]:
            padded = np.zeros((rows, output.dim), kind)
            for name in ids:
                frames = stream.store.frames(keys[name], output.name)[:rows]
                padded[: len(frames)] = frames
                padded[len(frames) :] = 0
                yield padded

        contents[split][modality] = Streamed((len(ids), rows, output.dim), kind, blocks)
        contents[split][f"{modality}_lengths"] = [min(lengths[name], rows) for name in ids]


# -- reading ---------------------------------------------------------------------------------------


def read(path: Path) -> Incoming:
    """Find the utterances of a feature pickle; every modality is an output.

    An utterance is cut to its length where the file has lengths: behind its end, or, where the
    padding turns out to lie in front, before its beginning. Without lengths it is as long as the
    array, and a note says so.

    Raises
    ------
    UsageError
        The file is refused by ``mer.cache.restricted``, or is no such pickle.
    """
    data = load(path)
    splits = {
        str(split): part
        for split, part in (data.items() if isinstance(data, dict) else ())
        if isinstance(part, dict) and "id" in part
    }
    if not splits:
        raise UsageError(
            f"{path} is no MMSA pickle: expected a dict of splits with 'id' and features in each."
        )
    ids: dict[str, list[str]] = {}
    modalities: dict[str, list[str]] = {}
    notes = []
    for split, part in splits.items():
        ids[split] = [_text(name) for name in part["id"]]
        modalities[split] = [
            name
            for name, values in part.items()
            if name != _TOKENS and "label" not in name and _is_features(values, len(ids[split]))
        ]
        for name in modalities[split]:
            if f"{name}_lengths" not in part and not (name == "text" and _TOKENS in part):
                notes.append(f"{split}: {name} has no lengths, so its padding was kept.")

    def reader(wanted: Wanted) -> Iterator[Utterance | Skipped]:
        for split, part in splits.items():
            for n, name in enumerate(ids[split]):
                if not wanted(name):
                    continue
                try:
                    yield Utterance(
                        name,
                        {output_name(m): _frames(part, m, n) for m in modalities[split]},
                    )
                except (TypeError, ValueError, IndexError) as error:
                    yield Skipped(name, str(error))

    return Incoming(
        files={"": path},
        ids=[name for split in ids.values() for name in split],
        read=reader,
        notes=tuple(notes),
    )


def _text(value: Any) -> str:
    """Return an id; a row of video, start and end, as older files have it, is joined by ``_``."""
    if isinstance(value, list | tuple | np.ndarray):
        return "_".join(_text(part) for part in value)
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _is_features(values: Any, count: int) -> bool:
    if not count:
        return False
    if isinstance(values, np.ndarray):
        return values.ndim in (2, 3) and len(values) == count and values.dtype.kind == "f"
    if isinstance(values, list) and len(values) == count:
        return all(isinstance(v, np.ndarray) and v.ndim in (1, 2) for v in values)
    return False


def _frames(part: Mapping[str, Any], modality: str, n: int) -> np.ndarray:
    frames = np.asarray(part[modality][n])
    if frames.ndim != 2:
        return frames
    if f"{modality}_lengths" in part:
        length = int(part[f"{modality}_lengths"][n])
    elif modality == "text" and isinstance(part.get(_TOKENS), np.ndarray):
        length = int(part[_TOKENS][n][1].sum())  # the mask of its tokens
    else:
        return frames
    if not 0 <= length <= len(frames):
        length = len(frames)
    pad = len(frames) - length
    if pad and frames[length:].any() and not frames[:pad].any():
        return frames[pad:]
    return frames[:length]
