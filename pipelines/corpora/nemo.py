"""nEMO: nine actors, 90 Polish sentences, six emotions (Christop, 2024).

``data.tsv`` pads its speaker ids with blanks; they are removed.
"""

from __future__ import annotations

import re
from pathlib import Path

from mer.cache.errors import ManifestError
from mer.pipelines.corpora.corpus import Corpus, Published, differences
from mer.pipelines.corpora.files import (
    checked_root,
    find,
    locate,
    nothing_found,
    read_rows,
    walk,
)
from mer.pipelines.manifest import Manifest, Utterance

EMOTIONS = {
    "anger": "angry",
    "fear": "fear",
    "happiness": "happy",
    "neutral": "neutral",
    "sadness": "sad",
    "surprised": "surprise",
}
PATTERN = re.compile(
    rf"^(?P<speaker>[A-Z]{{2}}\d)_(?P<emotion>{'|'.join(EMOTIONS)})_(?P<sentence>\d+)$"
)
_COLUMNS = ("file_id", "emotion", "raw_text", "speaker_id", "gender")


def read(root: Path) -> Manifest:
    """Read the corpus; ids are the file stems, texts the orthographic transcripts."""
    root = checked_root(root, NEMO.name, NEMO.layout)
    files = walk(root)
    found = find(files, root, PATTERN, (".wav", ".flac"))
    if not found.matches:
        raise nothing_found(root, NEMO.name, NEMO.layout)
    notes = list(found.notes)
    table = locate(files, root, "data.tsv")
    rows = {} if table is None else _rows(table)
    if table is None:
        notes.append("data.tsv is not there: no transcripts and no gender.")
    utterances = []
    disagree = []
    for path, match in found.matches:
        row = rows.get(match[0])
        if row is not None and row["emotion"] != match["emotion"]:
            disagree.append(match[0])
        utterances.append(
            Utterance(
                id=match[0],
                path=path,
                text=None if row is None else row["raw_text"] or None,
                speaker=match["speaker"],
                gender=None if row is None else row["gender"].lower() or None,
                label=EMOTIONS[match["emotion"]],
                labels={"sentence": match["sentence"]},
            )
        )
    if table is not None:
        unlisted = sum(u.id not in rows for u in utterances)
        missing = len(rows) - (len(utterances) - unlisted)
        if unlisted:
            notes.append(f"{unlisted:,} recordings are not listed in {table.name}.")
        if missing:
            notes.append(f"{missing:,} recordings listed in {table.name} are not there.")
    if disagree:
        notes.append(
            f"{len(disagree)} recordings whose name and data.tsv disagree on the emotion "
            f"(the name is taken): {', '.join(disagree[:5])}."
        )
    assert NEMO.published is not None
    notes.extend(differences(utterances, NEMO.published))
    return Manifest(NEMO.name, tuple(utterances), tuple(notes))


def _rows(table: Path) -> dict[str, dict[str, str]]:
    rows: dict[str, dict[str, str]] = {}
    for row in read_rows(table, "\t"):
        if absent := [name for name in _COLUMNS if name not in row]:
            raise ManifestError(
                f"{table}: expected the columns {', '.join(_COLUMNS)}; {', '.join(absent)} is "
                f"missing in row {len(rows) + 1}."
            )
        rows[Path(row["file_id"]).stem] = row
    return rows


NEMO = Corpus(
    name="nemo",
    title="nEMO: acted Polish, 9 speakers, 6 emotions",
    licence="CC BY-NC-SA 4.0",
    layout="samples/SSS_emotion_NN.wav and data.tsv",
    read=read,
    published=Published(
        total=4481,
        labels={
            "angry": 749,
            "fear": 736,
            "happy": 749,
            "neutral": 809,
            "sad": 769,
            "surprise": 669,
        },
        rate_hz=24_000,
        channels=1,
    ),
    scheme="nemo-6",
    protocol="nemo-loso",
)
