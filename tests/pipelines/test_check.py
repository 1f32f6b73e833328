"""The corpus check finds what is planted, and nothing else."""

from __future__ import annotations

import json
import shutil

import audio_fixtures as audio
import numpy as np
import pytest

from mer.cache.errors import ManifestError
from mer.pipelines.corpora.check import check
from mer.pipelines.manifest import Manifest, Utterance


def corpus(folder, **rows) -> Manifest:
    utterances = [
        Utterance(id=name, path=folder / file, label=label) for name, (file, label) in rows.items()
    ]
    return Manifest("mine", tuple(utterances))


def test_a_sound_corpus_has_nothing_to_report(tmp_path):
    for i in range(3):
        audio.write(tmp_path / f"{i}.wav", audio.voice(1.0, seed=i))
    report = check(corpus(tmp_path, **{f"u{i}": (f"{i}.wav", "sad") for i in range(3)}))
    assert report.exit_code == 0
    assert report.utterances == 3
    assert report.hours == pytest.approx(3 / 3600)
    assert (report.rates, report.channels) == ({16_000: 3}, {1: 3})
    troubles = ("missing", "lfs_pointers", "unreadable", "duplicates", "silent", "short", "long")
    assert not any(getattr(report, name) for name in (*troubles, "odd_rates", "odd_channels"))
    assert "All can be used." in report.to_text()


def test_every_planted_fault_is_found(tmp_path):
    voice = audio.voice(1.0)
    audio.write(tmp_path / "good.wav", voice)
    shutil.copy(tmp_path / "good.wav", tmp_path / "copy.wav")
    audio.write(tmp_path / "other.wav", audio.voice(1.0, seed=7))
    audio.write(tmp_path / "quiet.wav", voice * 1e-4)
    audio.write(tmp_path / "zero.wav", np.zeros(8_000, np.float32))
    audio.write(tmp_path / "blip.wav", voice[:800])
    audio.write(tmp_path / "long.wav", np.tile(voice, 31))
    audio.write(tmp_path / "stereo.wav", np.stack([voice, voice], axis=1))
    audio.write(tmp_path / "narrow.wav", audio.voice(1.0, 8_000), 8_000)
    audio.lfs_pointer(tmp_path / "pointer.wav")
    (tmp_path / "text.wav").write_text("this is not sound, it is a line of text\n" * 4)
    (tmp_path / "empty.wav").write_bytes(b"")
    names = [
        "good",
        "other",
        "quiet",
        "zero",
        "blip",
        "long",
        "stereo",
        "narrow",
        "pointer",
        "text",
        "empty",
        "absent",
    ]
    rows = {name: (f"{name}.wav", "sad") for name in names}
    report = check(corpus(tmp_path, copy=("copy.wav", "happy"), **rows), workers=2)

    assert report.exit_code == 3
    assert report.failed == 4
    assert report.missing == ("absent",)
    assert report.lfs_pointers == ("pointer",)
    assert [name for name, _ in report.unreadable] == ["text", "empty"]
    assert "0 bytes" in dict(report.unreadable)["empty"]
    assert report.duplicates == (("copy", "good"),)
    assert report.conflicting == (("copy", "good"),)
    assert dict(report.silent).keys() == {"quiet", "zero"}
    assert dict(report.silent)["zero"] == -999.0
    assert dict(report.short) == {"blip": 0.05}
    assert dict(report.long) == {"long": 31.0}
    assert report.odd_rates == (("narrow", 8_000),)
    assert report.odd_channels == (("stereo", 2),)
    plain = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert plain["failed"] == 4
    assert plain["unreadable"][1]["utterance"] == "empty"
    text = report.to_text()
    for found in ("absent", "pointer", "copy = good", "quiet (-", "blip (0.050 s)", "8000 Hz × 1"):
        assert found in text


def test_segments_of_one_recording_are_neither_duplicates_nor_long(tmp_path):
    audio.write(tmp_path / "long.wav", audio.voice(40.0))
    rows = [
        Utterance(id=f"u{i}", path=tmp_path / "long.wav", start_s=float(i), end_s=i + 1.0)
        for i in range(3)
    ]
    twice = Utterance(id="again", path=tmp_path / "long.wav", start_s=0.0, end_s=1.0)
    beyond = Utterance(id="beyond", path=tmp_path / "long.wav", start_s=39.0, end_s=45.0)
    report = check(Manifest("mine", (*rows, twice, beyond)))
    assert report.duplicates == (("u0", "again"),)
    assert not report.long
    assert [name for name, _ in report.unreadable] == ["beyond"]
    assert report.rates == {16_000: 1}


def test_a_recording_of_minutes_is_heard_to_its_end(tmp_path):
    samples = np.zeros(16_000 * 200, np.float32)
    samples[-100:] = 0.5
    audio.write(tmp_path / "a.wav", samples)
    report = check(corpus(tmp_path, a=("a.wav", "sad")))
    assert not report.silent
    assert report.long == (("a", 200.0),)
    assert report.hours == pytest.approx(200 / 3600)


def test_texts_without_recordings_are_counted_only():
    report = check(Manifest("mine", (Utterance(id="a", text="hello", label="sad"),)))
    assert (report.utterances, report.hours, report.exit_code) == (1, 0.0, 0)


def test_progress_adds_up(tmp_path):
    audio.write(tmp_path / "a.wav", audio.voice(1.0))
    steps: list[int] = []
    rows = {name: (file, "sad") for name, file in (("a", "a.wav"), ("b", "a.wav"), ("c", "c.wav"))}
    check(corpus(tmp_path, **rows), progress=steps.append)
    assert sum(steps) == 3


def test_a_dataset_that_cannot_be_read_is_an_error(tmp_path):
    with pytest.raises(ManifestError, match="No file of corpus 'emodb'"):
        check("emodb", tmp_path)


def test_a_manifest_called_like_a_corpus_is_not_measured_against_it(tmp_path):
    audio.write(tmp_path / "a.wav", audio.voice(1.0))
    (tmp_path / "ravdess.csv").write_text("path,label\na.wav,sad\n")
    report = check(str(tmp_path / "ravdess.csv"))
    assert [(c.kind, c.name, c.found, c.published) for c in report.counts] == [
        ("total", "", 1, None),
        ("label", "sad", 1, None),
    ]


@pytest.mark.real_data
def test_real_ravdess_has_one_stereo_file(shared_data):
    report = check("ravdess", shared_data / "RAVDESS", workers=2)
    assert report.exit_code == 0
    assert report.odd_channels == (("03-01-03-01-02-01-20", 2),)
    assert report.rates == {48_000: 240}
    assert not report.duplicates
    assert not report.silent
    assert report.counts[0].published == 1440
    assert report.counts[0].differs


@pytest.mark.real_data
def test_real_cremad_pointers_are_named_and_nothing_is_decoded(shared_data):
    report = check("cremad", shared_data / "CREMA-D")
    assert report.exit_code == 3
    assert len(report.lfs_pointers) == 12
    assert not report.unreadable
    assert report.hours == 0.0
