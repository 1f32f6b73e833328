"""Pickles of conversational emotion recognition: features per dialogue, turn after turn.

Three shapes circulate:

- a tuple or list of dicts by dialogue: ids, speakers, labels, then features of text, audio and
  visual, one vector per turn (bc-LSTM, DialogueRNN and DialogueGCN for IEMOCAP, AVEC and MELD)
- the same with four layers of RoBERTa, or nine features of COMET, and no ids (COSMIC)
- one dict of utterance id to vector, or of dialogue to a list of vectors (CMN, ICON)

Where a file has no ids, or ids that repeat from dialogue to dialogue, an utterance is
``<dialogue>_<turn>`` with turns from 0; ``pattern`` says otherwise.

Source: declare-lab/conv-emotion, ``bc-LSTM-pytorch/dataloader.py`` and
``COSMIC/erc-training/dataloader.py`` (order of the elements), ``ICON/IEMOCAP/utils.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mer.cache.errors import UsageError
from mer.cache.exchange.incoming import DEFAULT_OUTPUT, Incoming, Skipped, Utterance, Wanted
from mer.cache.restricted import load

# By which elements are dicts (d) and which are lists of dialogues (l): place of the ids, if any,
# and of the features.
_ROBERTA = {n: f"roberta_{n - 1}" for n in range(2, 6)}
_COMET = (
    *("x_intent", "x_attr", "x_need", "x_want", "x_effect", "x_react"),
    *("o_want", "o_effect", "o_react"),
)
LAYOUTS: dict[str, tuple[str, int | None, dict[int, str]]] = {
    "dddddddll": ("IEMOCAP or AVEC", 0, {3: "text", 4: "audio", 5: "visual"}),
    "ddddddlld": ("MELD", 0, {3: "text", 4: "audio"}),
    "dddddddlll": ("IEMOCAP with RoBERTa", None, _ROBERTA),
    "ddddddddlll": ("MELD with RoBERTa", None, {n + 1: name for n, name in _ROBERTA.items()}),
    "ddddddddd": ("COMET", None, dict(enumerate(_COMET))),
}


def read(path: Path, *, pattern: str = "") -> Incoming:
    """Find the utterances of such a pickle.

    Parameters
    ----------
    pattern : str, optional
        Id of an utterance, with ``{dialogue}``, ``{turn}`` (from 0) and ``{id}`` (the file's own)
        in it, e.g. ``dia{dialogue}_utt{turn}``.

    Raises
    ------
    UsageError
        The file is refused by ``mer.cache.restricted``, or is of none of these shapes.
    """
    data = load(path)
    if isinstance(data, dict):
        rows = _rows(data, None, pattern, by_dialogue=False)
        tables: dict[str, Any] = {DEFAULT_OUTPUT: data}
    else:
        tables, names = _by_layout(data, path)
        rows = _rows(next(iter(tables.values())), names, pattern, by_dialogue=True)
    if not rows:
        raise UsageError(f"{path} holds no features by dialogue or utterance.")

    def reader(wanted: Wanted) -> Iterator[Utterance | Skipped]:
        for name, places in rows:
            if not wanted(name):
                continue
            try:
                yield Utterance(
                    name, {output: numbers(_at(tables[output], *places)) for output in tables}
                )
            except (KeyError, IndexError, TypeError, ValueError) as error:
                yield Skipped(name, f"no array of numbers: {error}")

    return Incoming(files={"": path}, ids=[name for name, _ in rows], read=reader)


def _by_layout(data: Any, path: Path) -> tuple[dict[str, Any], Any]:
    signature = ""
    if isinstance(data, tuple | list):
        kinds = {dict: "d", list: "l", tuple: "l", set: "l", np.ndarray: "l"}
        signature = "".join(kinds.get(type(element), "?") for element in data[:32])
    if signature not in LAYOUTS:
        raise UsageError(
            f"{path} holds a {type(data).__name__} of {signature or 'something else'!r} (d: dict, "
            f"l: list), which is none of the layouts known: {', '.join(LAYOUTS)}. Convert it to "
            ".npy files and import those."
        )
    _, ids, features = LAYOUTS[signature]
    tables = {name: data[n] for n, name in features.items()}
    return tables, None if ids is None else data[ids]


Place = tuple[Any, int | None]


def _rows(
    table: Mapping[Any, Any], names: Any, pattern: str, by_dialogue: bool
) -> list[tuple[str, Place]]:
    """Return the id of every utterance and where it lies: dialogue, turn (None: it is the key)."""
    places: list[tuple[Any, int | None, Any]] = []
    for dialogue, turns in table.items():
        count = _turns(turns, by_dialogue)
        if count is None:
            places.append((dialogue, None, dialogue))
            continue
        own = names.get(dialogue) if isinstance(names, dict) else None
        given = own if isinstance(own, list | tuple) and len(own) == count else [None] * count
        places += [(dialogue, turn, given[turn]) for turn in range(count)]
    ids = [place[2] for place in places]
    distinct = all(isinstance(i, str | int) for i in ids) and len(set(map(str, ids))) == len(ids)
    rows = []
    for dialogue, turn, own in places:
        if pattern:
            name = pattern.replace("{dialogue}", str(dialogue)).replace("{id}", str(own))
            name = name.replace("{turn}", str(turn))
        elif distinct and (turn is None or isinstance(own, str)):
            name = str(own)
        elif turn is None:
            name = str(dialogue)
        else:
            name = f"{dialogue}_{turn if own is None else own}"
        rows.append((name, (dialogue, turn)))
    return rows


def _turns(value: Any, by_dialogue: bool) -> int | None:
    """Return how many turns a dialogue has; None if the value is one utterance's own.

    Where keys may be of either, an array is one utterance's and a list of vectors a dialogue's.
    """
    if isinstance(value, np.ndarray):
        return len(value) if by_dialogue and value.ndim > 1 else None
    if isinstance(value, list | tuple):
        inner = (list, tuple, np.ndarray)
        if by_dialogue or (value and all(isinstance(v, inner) and len(v) for v in value)):
            return len(value)
    return None


def _at(table: Mapping[Any, Any], dialogue: Any, turn: int | None) -> Any:
    values = table[dialogue]
    return values if turn is None else values[turn]


def numbers(value: Any) -> np.ndarray:
    """Return an array, or nested lists of numbers, as an array.

    Raises
    ------
    TypeError, ValueError
        Something else is in it, or lists of unequal length.
    """
    array = np.asarray(value)
    if array.dtype.kind not in "fiu":
        raise ValueError(f"it holds {array.dtype}")
    return array
