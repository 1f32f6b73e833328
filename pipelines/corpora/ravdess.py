"""RAVDESS, speech and song: 24 actors, two sentences, eight emotions (Livingstone and Russo, 2018).

A file name is seven fields of two digits: modality (03 audio only) - vocal channel (01 speech,
02 song) - emotion - intensity - statement - repetition - actor (odd: man, even: woman).
"""

from __future__ import annotations

import re
from pathlib import Path

from mer.pipelines.corpora.corpus import Corpus, Published, differences
from mer.pipelines.corpora.files import checked_root, find, nothing_found, walk
from mer.pipelines.manifest import Manifest, Utterance

PATTERN = re.compile(
    r"^(?P<modality>0[1-3])-(?P<channel>0[12])-(?P<emotion>0[1-8])-(?P<intensity>0[12])"
    r"-(?P<statement>0[12])-(?P<repetition>0[12])-(?P<actor>0[1-9]|1\d|2[0-4])$"
)
EMOTIONS = {
    "01": "neutral",
    "02": "calm",
    "03": "happy",
    "04": "sad",
    "05": "angry",
    "06": "fear",
    "07": "disgust",
    "08": "surprise",
}
INTENSITIES = {"01": "normal", "02": "strong"}
STATEMENTS = {"01": "Kids are talking by the door.", "02": "Dogs are sitting by the door."}
_ACTORS = tuple(f"{actor:02d}" for actor in range(1, 25))


def _read(root: Path, corpus: Corpus, channel: str) -> Manifest:
    root = checked_root(root, corpus.name, corpus.layout)
    found = find(walk(root), root, PATTERN, (".wav", ".flac"))
    utterances = []
    for path, match in found.matches:
        if match["modality"] != "03" or match["channel"] != channel:
            continue
        utterances.append(
            Utterance(
                id=match[0],
                path=path,
                text=STATEMENTS[match["statement"]],
                speaker=match["actor"],
                gender="male" if int(match["actor"]) % 2 else "female",
                label=EMOTIONS[match["emotion"]],
                labels={
                    "intensity": INTENSITIES[match["intensity"]],
                    "statement": match["statement"],
                    "repetition": match["repetition"],
                },
            )
        )
    if not utterances:
        raise nothing_found(root, corpus.name, corpus.layout)
    assert corpus.published is not None
    notes = (*found.notes, *differences(utterances, corpus.published))
    return Manifest(corpus.name, tuple(utterances), notes)


def read_speech(root: Path) -> Manifest:
    """Read the speech part; ids are the file stems, speakers ``"01"`` to ``"24"``."""
    return _read(root, SPEECH, "01")


def read_song(root: Path) -> Manifest:
    """Read the song part: as speech, without disgust and surprise and without actor 18."""
    return _read(root, SONG, "02")


SPEECH = Corpus(
    name="ravdess",
    title="RAVDESS speech: acted English, 24 actors, 8 emotions",
    licence="CC BY-NC-SA 4.0",
    layout="Audio_Speech_Actors_01-24/Actor_NN/03-01-EE-II-SS-RR-AA.wav",
    read=read_speech,
    published=Published(
        total=1440,
        labels={name: 96 if name == "neutral" else 192 for name in EMOTIONS.values()},
        speakers=dict.fromkeys(_ACTORS, 60),
        rate_hz=48_000,
        channels=1,
    ),
    scheme="ravdess-8",
    protocol="ravdess-6fold-emobox",
)
SONG = Corpus(
    name="ravdess-song",
    title="RAVDESS song: acted English, 23 actors, 6 emotions",
    licence="CC BY-NC-SA 4.0",
    layout="Audio_Song_Actors_01-24/Actor_NN/03-02-EE-II-SS-RR-AA.wav",
    read=read_song,
    published=Published(
        total=1012,
        labels={name: 92 if name == "neutral" else 184 for name in list(EMOTIONS.values())[:6]},
        speakers=dict.fromkeys((a for a in _ACTORS if a != "18"), 44),
        rate_hz=48_000,
        channels=1,
    ),
    scheme="ravdess-song-6",
    protocol="ravdess-6fold-emobox",
)
