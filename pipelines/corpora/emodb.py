"""EmoDB, the Berlin database of emotional speech (Burkhardt et al., 2005).

A file name is speaker (two digits), sentence (a01 … b10), emotion (one German initial), version.
"""

from __future__ import annotations

import re
from pathlib import Path

from mer.pipelines.corpora.corpus import Corpus, Published, differences
from mer.pipelines.corpora.files import checked_root, find, nothing_found, walk
from mer.pipelines.manifest import Manifest, Utterance

PATTERN = re.compile(
    r"^(?P<speaker>03|08|09|1[0-6])(?P<sentence>[ab]\d{2})(?P<emotion>[WLEAFTN])(?P<version>[a-z])$"
)
EMOTIONS = {  # initials of the German words
    "W": "angry",
    "L": "boredom",
    "E": "disgust",
    "A": "fear",
    "F": "happy",
    "T": "sad",
    "N": "neutral",
}
MALE = frozenset({"03", "10", "11", "12", "15"})
SENTENCES = {
    "a01": "Der Lappen liegt auf dem Eisschrank.",
    "a02": "Das will sie am Mittwoch abgeben.",
    "a04": "Heute abend könnte ich es ihm sagen.",
    "a05": "Das schwarze Stück Papier befindet sich da oben neben dem Holzstück.",
    "a07": "In sieben Stunden wird es soweit sein.",
    "b01": "Was sind denn das für Tüten, die da unter dem Tisch stehen?",
    "b02": "Sie haben es gerade hochgetragen und jetzt gehen sie wieder runter.",
    "b03": "An den Wochenenden bin ich jetzt immer nach Hause gefahren und habe Agnes besucht.",
    "b09": "Ich will das eben wegbringen und dann mit Karl was trinken gehen.",
    "b10": "Die wird auf dem Platz sein, wo wir sie immer hinlegen.",
}


def read(root: Path) -> Manifest:
    """Read the corpus; ids are the file stems, speakers ``"03"`` to ``"16"``."""
    root = checked_root(root, EMODB.name, EMODB.layout)
    found = find(walk(root), root, PATTERN, (".wav", ".flac"))
    utterances = tuple(
        Utterance(
            id=match[0],
            path=path,
            text=SENTENCES.get(match["sentence"]),
            speaker=match["speaker"],
            gender="male" if match["speaker"] in MALE else "female",
            label=EMOTIONS[match["emotion"]],
            labels={"sentence": match["sentence"]},
        )
        for path, match in found.matches
    )
    if not utterances:
        raise nothing_found(root, EMODB.name, EMODB.layout)
    assert EMODB.published is not None
    return Manifest(
        EMODB.name, utterances, (*found.notes, *differences(utterances, EMODB.published))
    )


EMODB = Corpus(
    name="emodb",
    title="EmoDB: acted German, 10 speakers, 7 emotions",
    licence="free for research",
    layout="wav/SSTTTEV.wav, for example wav/03a01Fa.wav",
    read=read,
    published=Published(
        total=535,
        labels={
            "angry": 127,
            "boredom": 81,
            "neutral": 79,
            "happy": 71,
            "fear": 69,
            "sad": 62,
            "disgust": 46,
        },
        speakers={
            "03": 49,
            "08": 58,
            "09": 43,
            "10": 38,
            "11": 55,
            "12": 35,
            "13": 61,
            "14": 69,
            "15": 56,
            "16": 71,
        },
        rate_hz=16_000,
        channels=1,
    ),
    scheme="emodb-7",
    protocol="emodb-loso",
)
