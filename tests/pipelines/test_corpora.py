"""Corpora: folders as distributed, and as mirrors leave them, become the same manifest."""

from __future__ import annotations

import csv
import json
import shutil
from collections import Counter
from itertools import product
from pathlib import Path

import pytest

from mer.cache.errors import ManifestError, UnknownNameError, UsageError
from mer.pipelines import corpora, protocols
from mer.pipelines.corpora import cremad, emodb, ravdess
from mer.pipelines.manifest import Manifest, Utterance, read_manifest, write_manifest


def touch(root: Path, *names: str, content: str | None = None) -> Path:
    """Make files; reading a manifest never opens a recording unless two bear one name."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name if content is None else content)
    return root


def ravdess_names(channel: str, actors=range(1, 25)) -> list[str]:
    """Return the file names of the full corpus, by its own description."""
    emotions = range(1, 9) if channel == "01" else range(1, 7)
    return [
        f"Actor_{a:02d}/03-{channel}-{e:02d}-{i:02d}-{s:02d}-{r:02d}-{a:02d}.wav"
        for a, e, i, s, r in product(actors, emotions, (1, 2), (1, 2), (1, 2))
        if not (e == 1 and i == 2)
    ]


# --- all corpora ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", corpora.names())
def test_table_and_corpus_agree_on_the_name(name):
    corpus = corpora.corpus(name)
    assert corpus.name == name
    assert protocols.protocol(corpus.protocol).name == corpus.protocol
    if corpus.published and corpus.published.labels:
        assert sum(corpus.published.labels.values()) == corpus.published.total
    if corpus.published and corpus.published.speakers:
        assert sum(corpus.published.speakers.values()) == corpus.published.total


@pytest.mark.parametrize("name", [n for n in corpora.names() if n != "demo"])
def test_a_root_without_the_corpus_names_root_and_layout(name, tmp_path):
    touch(tmp_path, "notes.txt", "sub/other.pdf")
    with pytest.raises(ManifestError, match=rf"No file of corpus '{name}' below .*{tmp_path.name}"):
        corpora.load(name, tmp_path)
    with pytest.raises(ManifestError, match=r"absent of corpus .* does not exist\. Expected"):
        corpora.load(name, tmp_path / "absent")


def test_an_unknown_corpus_suggests_the_nearest():
    with pytest.raises(UnknownNameError, match=r"'ravdes'\. Did you mean 'ravdess"):
        corpora.load("ravdes", Path("."))


def test_a_corpus_needs_a_root():
    with pytest.raises(
        UsageError, match=r"'emodb' needs the folder it lies in: --root DIR with wav"
    ):
        corpora.load("emodb")


def test_a_folder_given_as_dataset_is_told_how(tmp_path):
    with pytest.raises(UsageError, match=r"is a folder, not the name of a corpus.*folder --root"):
        corpora.load(str(tmp_path))


def test_a_manifest_file_is_a_dataset(tmp_path):
    path = write_manifest(
        Manifest("m", (Utterance(id="a", path=tmp_path / "a.wav"),)), tmp_path / "m.csv"
    )
    assert corpora.load(str(path)) == read_manifest(path)


def test_descriptions_name_every_corpus_once():
    rows = corpora.describe()
    assert [row["name"] for row in rows] == list(corpora.names())
    assert all(row["summary"] and row["layout"] for row in rows)
    json.dumps(rows)


# --- RAVDESS -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def full_ravdess(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("ravdess")
    touch(root / "Audio_Speech_Actors_01-24", *ravdess_names("01"), content="x")
    touch(
        root / "Audio_Song_Actors_01-24",
        *ravdess_names("02", [a for a in range(1, 25) if a != 18]),
        content="x",
    )
    return root


def test_complete_ravdess_agrees_with_its_published_counts(full_ravdess):
    speech, song = corpora.load("ravdess", full_ravdess), corpora.load("ravdess-song", full_ravdess)
    assert (len(speech.utterances), speech.notes) == (1440, ())
    assert (len(song.utterances), song.notes) == (1012, ())
    ids = {u.id for u in (*speech.utterances, *song.utterances)}
    assert len(ids) == 2452


def test_ravdess_names_are_decoded_field_by_field(tmp_path):
    touch(tmp_path, "03-01-06-02-02-01-12.wav")
    (u,) = corpora.load("ravdess", tmp_path).utterances
    assert (u.id, u.label, u.speaker, u.gender) == ("03-01-06-02-02-01-12", "fear", "12", "female")
    assert u.text == "Dogs are sitting by the door."
    assert u.labels == {"intensity": "strong", "statement": "02", "repetition": "01"}
    assert u.path == tmp_path / "03-01-06-02-02-01-12.wav"


@pytest.mark.parametrize(
    "below", [".", "Audio_Speech_Actors_01-24", "Audio_Speech_Actors_01-24/Actor_03"]
)
def test_ravdess_is_found_from_any_level(full_ravdess, below):
    found = corpora.load("ravdess", full_ravdess / below)
    assert len(found.utterances) == (60 if below.endswith("Actor_03") else 1440)


def test_a_mirror_with_every_file_twice_reads_as_one_corpus(tmp_path, full_ravdess):
    names = ravdess_names("01", [1, 2])
    touch(tmp_path / "audio_speech_actors_01-24", *names, content="same")
    touch(tmp_path, *names, content="same")
    touch(
        tmp_path,
        "__MACOSX/Actor_01/03-01-01-01-01-01-01.wav",
        "Actor_01/._03-01-01-01-01-01-01.wav",
    )
    manifest = corpora.load("ravdess", tmp_path)
    assert len(manifest.utterances) == 120
    assert all(u.path.parent.parent == tmp_path for u in manifest.utterances)
    assert manifest.notes[0].startswith("120 identical copies of recordings left out")


def test_copies_that_differ_are_named(tmp_path):
    touch(tmp_path, "a/03-01-01-01-01-01-01.wav", content="one")
    touch(tmp_path, "b/03-01-01-01-01-01-01.wav", content="two")
    manifest = corpora.load("ravdess", tmp_path)
    assert [u.path.parent.name for u in manifest.utterances] == ["a"]
    assert "1 files left out that bear the name of another recording" in manifest.notes[0]
    assert "b/03-01-01-01-01-01-01.wav" in manifest.notes[0]


def test_a_folder_that_links_to_its_parent_ends(tmp_path):
    touch(tmp_path, "Actor_01/03-01-01-01-01-01-01.wav")
    (tmp_path / "Actor_01" / "loop").symlink_to(tmp_path, target_is_directory=True)
    assert len(corpora.load("ravdess", tmp_path).utterances) == 1


def test_a_linked_corpus_folder_is_followed(tmp_path):
    touch(tmp_path / "store", "Actor_01/03-01-01-01-01-01-01.wav")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "speech").symlink_to(tmp_path / "store", target_is_directory=True)
    assert len(corpora.load("ravdess", tmp_path / "root").utterances) == 1


def test_differences_from_the_published_counts_are_noted(tmp_path):
    touch(tmp_path, *ravdess_names("01", range(1, 24))[1:])
    notes = corpora.load("ravdess", tmp_path).notes
    assert notes == (
        "1379 utterances, 1,440 published.".replace("1379", "1,379"),
        "Per label: neutral 91 of 96, calm 184 of 192, happy 184 of 192, sad 184 of 192, "
        "angry 184 of 192, fear 184 of 192, disgust 184 of 192, surprise 184 of 192.",
        "Speakers: 23 of 24; absent: 24.",
        "Per speaker: 01 59 of 60.",
    )


def test_other_audio_in_the_folder_is_noted(tmp_path):
    touch(tmp_path, "03-01-01-01-01-01-01.wav", "intro.wav", "03-01-09-01-01-01-01.wav")
    manifest = corpora.load("ravdess", tmp_path)
    assert len(manifest.utterances) == 1
    assert manifest.notes[0].startswith("2 audio files with names of another pattern left out")


@pytest.mark.real_data
def test_real_ravdess_agrees_with_the_manifest_beside_it(shared_data):
    manifest = corpora.load("ravdess", shared_data / "RAVDESS")
    with (shared_data / "manifest.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["dataset"] == "RAVDESS"]
    words = {"fearful": "fear", "surprised": "surprise"}
    expected = {
        shared_data / row["path"]: (
            words.get(row["emotion"], row["emotion"]),
            row["speaker"],
            {"m": "male", "f": "female"}[row["gender"]],
        )
        for row in rows
    }
    assert {u.path: (u.label, u.speaker, u.gender) for u in manifest.utterances} == expected
    assert len(manifest.utterances) == 240
    assert Counter(u.label for u in manifest.utterances)["neutral"] == 16
    assert "Speakers: 8 of 24" in " ".join(manifest.notes)
    assert all(u.path.is_file() for u in manifest.utterances)


# --- EmoDB, CREMA-D, nEMO ------------------------------------------------------------------------


def test_emodb_letters_are_german_initials(tmp_path):
    touch(tmp_path, *(f"wav/16b10{letter}b.wav" for letter in "WLEAFTN"))
    rows = corpora.load("emodb", tmp_path).utterances
    assert {u.id[5]: u.label for u in rows} == emodb.EMOTIONS
    assert emodb.EMOTIONS["F"] == "happy"
    assert emodb.EMOTIONS["A"] == "fear"
    assert {(u.speaker, u.gender, u.text) for u in rows} == {
        ("16", "female", "Die wird auf dem Platz sein, wo wir sie immer hinlegen.")
    }


@pytest.mark.real_data
def test_real_emodb_files_are_read(shared_data):
    rows = corpora.load("emodb", shared_data / "EmoDB").utterances
    assert {u.id: u.label for u in rows} == {
        "03a01Fa": "happy",
        "03a01Nc": "neutral",
        "03a01Wa": "angry",
        "03a02Ta": "sad",
        "03a04Ad": "fear",
        "03a04Lc": "boredom",
        "03b10Ec": "disgust",
    }
    assert {(u.speaker, u.gender) for u in rows} == {("03", "male")}


def test_cremad_keeps_intended_and_perceived_apart(tmp_path):
    touch(tmp_path, "AudioWAV/1001_DFA_ANG_XX.wav", "AudioMP3/1001_DFA_ANG_XX.mp3")
    touch(tmp_path, "AudioWAV/1002_IEO_HAP_HI.wav")
    touch(
        tmp_path,
        "VideoDemographics.csv",
        content='"ActorID","Age","Sex","Race","Ethnicity"\n1001,51,"Male","x","y"\n1002,2,"Female","x","y"\n',
    )
    touch(
        tmp_path,
        "processedResults/summaryTable.csv",
        content='"","FileName","VoiceVote","VoiceLevel","FaceVote","FaceLevel","MultiModalVote",'
        '"MultiModalLevel"\n"1","1001_DFA_ANG_XX","D","60","A:D","50:40","A","70"\n'
        '"2","1002_IEO_HAP_HI","H","1","H","2","N","3"\n',
    )
    touch(
        tmp_path,
        "processedResults/tabulatedVotes.csv",
        content='"","A","D","F","H","N","S","fileName"\n"100062",2,6,0,0,1,0,"1001_DFA_ANG_XX"\n'
        '"200062",9,0,0,0,0,0,"1001_DFA_ANG_XX"\n',
    )
    a, b = corpora.load("cremad", tmp_path).utterances
    assert (a.label, a.gender, a.text) == ("angry", "male", "Don't forget a jacket.")
    assert a.path.suffix == ".wav"
    assert a.labels == {
        "level": "unspecified",
        "voice": "disgust",
        "face": "no-agreement",
        "multimodal": "angry",
    }
    assert a.votes == {"angry": 2.0, "disgust": 6.0, "neutral": 1.0}
    assert (b.label, b.gender, b.votes) == ("happy", "female", {})
    assert (b.labels["multimodal"], b.labels["level"]) == ("neutral", "high")


def test_cremad_without_its_tables_says_what_is_lost(tmp_path):
    touch(tmp_path, "AudioWAV/1001_DFA_ANG_XX.wav")
    manifest = corpora.load("cremad", tmp_path / "AudioWAV")
    (u,) = manifest.utterances
    assert (u.gender, u.labels, u.votes) == (None, {"level": "unspecified"}, {})
    assert "VideoDemographics.csv is not there: no gender." in manifest.notes
    assert "summaryTable.csv is not there: no perceived labels." in manifest.notes


def test_a_damaged_cremad_table_is_named(tmp_path):
    touch(tmp_path, "AudioWAV/1001_DFA_ANG_XX.wav")
    touch(tmp_path, "summaryTable.csv", content="FileName,Vote\n1001_DFA_ANG_XX,A\n")
    with pytest.raises(ManifestError, match=r"summaryTable\.csv: expected the columns FileName"):
        corpora.load("cremad", tmp_path)


@pytest.mark.real_data
def test_real_cremad_pointers_stay_in_the_manifest(shared_data):
    manifest = corpora.load("cremad", shared_data / "CREMA-D")
    rows = manifest.utterances
    assert len(rows) == 12
    assert Counter(u.label for u in rows) == dict.fromkeys(cremad.EMOTIONS.values(), 2)
    assert {u.speaker: u.gender for u in rows} == {"1001": "male", "1002": "female"}
    assert {u.text for u in rows} == {"Don't forget a jacket."}
    with (shared_data / "CREMA-D/processedResults/summaryTable.csv").open() as file:
        votes = {row["FileName"]: row["VoiceVote"] for row in csv.DictReader(file)}
    for u in rows:
        vote = votes[u.id]
        assert u.labels["voice"] == ("no-agreement" if ":" in vote else cremad.VOTES[vote])


@pytest.mark.real_data
def test_published_cremad_counts_are_those_of_its_own_tables(shared_data):
    with (shared_data / "CREMA-D/processedResults/summaryTable.csv").open() as file:
        names = [cremad.PATTERN.match(row["FileName"]) for row in csv.DictReader(file)]
    published = cremad.CREMAD.published
    assert published.total == len(names)
    assert published.speakers == Counter(m["actor"] for m in names)
    assert published.labels == Counter(cremad.EMOTIONS[m["emotion"]] for m in names)


def nemo_table(*rows: str) -> str:
    header = "file_id\temotion\traw_text\tnormalized_text\tspeaker_id\tgender\tage"
    return "\n".join((header, *rows)) + "\n"


def test_nemo_takes_transcripts_with_quotes_and_strips_blanks(tmp_path):
    touch(tmp_path, "samples/EB0_anger_1.wav", "samples/EB0_surprised_2.wav")
    touch(
        tmp_path,
        "data.tsv",
        content=nemo_table(
            'EB0_anger_1.wav\tanger\t"Tak" mówi.\ttak mówi\t        EB0\tfemale\t27',
            "EB0_fear_9.wav\tfear\tNie.\tnie\t        EB0\tfemale\t27",
        ),
    )
    manifest = corpora.load("nemo", tmp_path)
    a, b = manifest.utterances
    assert (a.id, a.label, a.speaker, a.gender) == ("EB0_anger_1", "angry", "EB0", "female")
    assert a.text == '"Tak" mówi.'
    assert (b.label, b.text, b.gender) == ("surprise", None, None)
    assert "1 recordings are not listed in data.tsv." in manifest.notes
    assert "1 recordings listed in data.tsv are not there." in manifest.notes


def test_nemo_without_its_table_has_labels_but_no_text(tmp_path):
    manifest = corpora.load("nemo", touch(tmp_path, "samples/EB0_anger_1.wav"))
    assert [(u.label, u.text) for u in manifest.utterances] == [("angry", None)]
    assert "data.tsv is not there: no transcripts and no gender." in manifest.notes
    touch(tmp_path, "data.tsv", content="file_id\temotion\nEB0_anger_1.wav\tanger\n")
    with pytest.raises(ManifestError, match=r"data\.tsv: expected the columns .*raw_text"):
        corpora.load("nemo", tmp_path)


@pytest.mark.real_data
def test_real_nemo_has_transcripts_and_speakers(shared_data):
    manifest = corpora.load("nemo", shared_data / "nEMO")
    rows = manifest.utterances
    assert len(rows) == 264
    assert Counter(u.label for u in rows) == dict.fromkeys(
        ("angry", "fear", "happy", "neutral", "sad", "surprise"), 44
    )
    assert Counter(u.speaker for u in rows) == {"EB0": 60, "KS0": 60, "IC0": 72, "WR0": 72}
    assert {u.gender for u in rows if u.speaker == "KS0"} == {"male"}
    text = {u.id: u.text for u in rows}
    assert text["EB0_neutral_13"] == "Interesuje mnie historia Polski."
    assert all(text.values())
    assert not any("data.tsv" in note for note in manifest.notes)


@pytest.mark.real_data
def test_corpora_are_found_in_a_folder_that_holds_several(shared_data):
    assert len(corpora.load("ravdess", shared_data).utterances) == 240
    assert len(corpora.load("nemo", shared_data).utterances) == 264
    assert len(corpora.load("emodb", shared_data).utterances) == 7


# --- folder --------------------------------------------------------------------------------------


def test_class_folders_become_labels_and_paths_become_ids(tmp_path):
    touch(
        tmp_path, "Anger/1.wav", "Anger/deep/er/1.FLAC", "joy/1.wav", "joy/cover.jpg", "stray.wav"
    )
    manifest = corpora.load("folder", tmp_path)
    assert [(u.id, u.label, u.split) for u in manifest.utterances] == [
        ("Anger/1.wav", "Anger", None),
        ("Anger/deep/er/1.FLAC", "Anger", None),
        ("joy/1.wav", "joy", None),
    ]
    notes = " ".join(manifest.notes)
    assert "1 recordings outside the class folders left out, e.g. stray.wav" in notes
    assert "1 files that are not audio left out: .jpg 1" in notes
    assert "Speakers are unknown" in notes


def test_split_folders_above_the_classes_become_splits(tmp_path):
    touch(tmp_path, "train/sad/1.wav", "train/happy/1.wav", "dev/sad/1.wav", "Test/happy/1.wav")
    rows = corpora.load("folder", tmp_path).utterances
    assert {u.id: (u.label, u.split) for u in rows} == {
        "Test/happy/1.wav": ("happy", "test"),
        "dev/sad/1.wav": ("sad", "validation"),
        "train/happy/1.wav": ("happy", "train"),
        "train/sad/1.wav": ("sad", "train"),
    }


def test_a_class_that_is_called_test_is_no_split(tmp_path):
    touch(tmp_path, "test/1.wav", "control/1.wav")
    rows = corpora.load("folder", tmp_path).utterances
    assert [(u.label, u.split) for u in rows] == [("control", None), ("test", None)]


def test_moving_the_tree_keeps_its_ids(tmp_path):
    touch(tmp_path / "a", "sad/1.wav", "happy/2.wav")
    before = [u.id for u in corpora.load("folder", tmp_path / "a").utterances]
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert [u.id for u in corpora.load("folder", tmp_path / "b").utterances] == before


@pytest.mark.real_data
def test_emobox_fold_lists_agree_with_ours(shared_data, full_ravdess):
    rows = corpora.load("ravdess", full_ravdess).utterances
    folds = protocols.make_folds("ravdess-6fold-emobox", rows)
    folder = shared_data / "EmoBox/data/ravdess/fold_1"
    emobox = {}
    label = {}
    for part in ("train", "test"):
        lines = (folder / f"ravdess_{part}_fold_1.jsonl").read_text().splitlines()
        entries = [json.loads(line) for line in lines if line.strip()]
        emobox[part] = {entry["key"].removeprefix("ravdess-") for entry in entries}
        label.update({e["key"].removeprefix("ravdess-"): e["emo"] for e in entries})
    first = folds[0]
    assert set(first.test) == emobox["test"]
    assert {*first.train, *first.validation} == emobox["train"]
    words = {"Surprised": "surprise", "Fearful": "fear"}
    assert {u.id: u.label for u in rows} == {
        name: words.get(emotion, emotion.lower()) for name, emotion in label.items()
    }
    assert ravdess.SPEECH.protocol == folds.protocol
