"""CREMA-D: 91 actors, 12 sentences, 6 emotions, rated by a crowd (Cao et al., 2014).

Two targets live in one corpus and are not the same: ``label`` is what the actor was asked to show
(it is in the file name); ``labels["voice"]``, ``["face"]`` and ``["multimodal"]`` are what most
raters perceived from that modality. A tie between raters is ``no-agreement``. ``votes`` counts the
raters of the voice alone, where ``processedResults/tabulatedVotes.csv`` is at hand.
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

PATTERN = re.compile(
    r"^(?P<actor>1\d{3})_(?P<sentence>[A-Z]{3})_(?P<emotion>ANG|DIS|FEA|HAP|NEU|SAD)"
    r"_(?P<level>LO|MD|HI|XX)$"
)
EMOTIONS = {
    "ANG": "angry",
    "DIS": "disgust",
    "FEA": "fear",
    "HAP": "happy",
    "NEU": "neutral",
    "SAD": "sad",
}
VOTES = {code[0]: label for code, label in EMOTIONS.items()}  # A D F H N S in the tables
LEVELS = {"LO": "low", "MD": "medium", "HI": "high", "XX": "unspecified"}
SENTENCES = {
    "IEO": "It's eleven o'clock.",
    "TIE": "That is exactly what happened.",
    "IOM": "I'm on my way to the meeting.",
    "IWW": "I wonder what this is about.",
    "TAI": "The airplane is almost full.",
    "MTI": "Maybe tomorrow it will be cold.",
    "IWL": "I would like a new alarm clock.",
    "ITH": "I think I have a doctor's appointment.",
    "DFA": "Don't forget a jacket.",
    "ITS": "I think I've seen this before.",
    "TSI": "The surface is slick.",
    "WSI": "We'll stop in a couple of minutes.",
}
_PERCEIVED = {"voice": "VoiceVote", "face": "FaceVote", "multimodal": "MultiModalVote"}
_VOICE_ROW = "1"  # first digit of a row name in tabulatedVotes.csv: 1 voice, 2 face, 3 both


def read(root: Path) -> Manifest:
    """Read the corpus; ids are the file stems, speakers ``"1001"`` to ``"1091"``.

    Git-LFS pointers are listed like recordings, so that their absence is reported, not hidden.
    """
    root = checked_root(root, CREMAD.name, CREMAD.layout)
    files = walk(root)
    found = find(files, root, PATTERN, (".wav", ".flac", ".mp3"))
    if not found.matches:
        raise nothing_found(root, CREMAD.name, CREMAD.layout)
    notes = list(found.notes)
    genders = _genders(_table(files, root, "VideoDemographics.csv", "gender", notes))
    perceived = _perceived(_table(files, root, "summaryTable.csv", "perceived labels", notes))
    votes = _votes(_table(files, root, "tabulatedVotes.csv", None, notes))
    utterances = tuple(
        Utterance(
            id=match[0],
            path=path,
            text=SENTENCES.get(match["sentence"]),
            speaker=match["actor"],
            gender=genders.get(match["actor"]),
            label=EMOTIONS[match["emotion"]],
            labels={"level": LEVELS[match["level"]], **perceived.get(match[0], {})},
            votes=votes.get(match[0], {}),
        )
        for path, match in found.matches
    )
    if perceived:
        unrated = sum(u.id not in perceived for u in utterances)
        if unrated:
            notes.append(f"{unrated:,} clips have no row in summaryTable.csv.")
    assert CREMAD.published is not None
    return Manifest(CREMAD.name, utterances, (*notes, *differences(utterances, CREMAD.published)))


def _table(
    files: list[Path], root: Path, name: str, gives: str | None, notes: list[str]
) -> Path | None:
    path = locate(files, root, name)
    if path is None and root.parent.joinpath("processedResults", name).is_file():
        path = root.parent / "processedResults" / name
    if path is None and gives is not None:
        notes.append(f"{name} is not there: no {gives}.")
    return path


def _genders(path: Path | None) -> dict[str, str]:
    if path is None:
        return {}
    return {
        row["ActorID"]: row["Sex"].lower()
        for row in read_rows(path)
        if row.get("Sex", "").lower() in ("female", "male")
    }


def _perceived(path: Path | None) -> dict[str, dict[str, str]]:
    result: dict[str, dict[str, str]] = {}
    if path is None:
        return result
    for row in read_rows(path):
        try:
            result[row["FileName"]] = {
                name: "no-agreement" if ":" in row[column] else VOTES[row[column]]
                for name, column in _PERCEIVED.items()
                if row[column]
            }
        except KeyError as error:
            raise ManifestError(
                f"{path}: expected the columns FileName, {', '.join(_PERCEIVED.values())} with "
                f"votes among {', '.join(VOTES)}; row {row} lacks or breaks {error}."
            ) from error
    return result


def _votes(path: Path | None) -> dict[str, dict[str, float]]:
    result: dict[str, dict[str, float]] = {}
    if path is None:
        return result
    for row in read_rows(path):
        if not row.get("", "").startswith(_VOICE_ROW):
            continue
        try:
            counts = {label: float(row[code]) for code, label in VOTES.items()}
            result[row["fileName"]] = {label: n for label, n in counts.items() if n > 0}
        except (KeyError, ValueError) as error:
            raise ManifestError(
                f"{path}: expected counts in the columns fileName, {', '.join(VOTES)}; row "
                f"{row.get('', '?')} lacks or breaks {error}."
            ) from error
    return result


CREMAD = Corpus(
    name="cremad",
    title="CREMA-D: acted English, 91 actors, 6 emotions, crowd ratings",
    licence="ODbL 1.0 / DbCL 1.0",
    layout="AudioWAV/AAAA_SSS_EEE_LL.wav, VideoDemographics.csv, processedResults/summaryTable.csv",
    read=read,
    published=Published(
        total=7442,
        labels={name: 1087 if name == "neutral" else 1271 for name in EMOTIONS.values()},
        speakers={
            **{str(actor): 82 for actor in range(1001, 1092)},
            **{"1002": 81, "1008": 76, "1009": 76, "1019": 76, "1076": 81},
        },
        rate_hz=16_000,
        channels=1,
    ),
    scheme="crema-d-6",
    protocol="speaker-kfold-5",
)
