from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import soundfile
from toy import write_corpus

import mer.extract.inputs as inputs
from mer.extract.contract import Source
from mer.extract.inputs import MEMO_NAME, resolve

OLD_NS = 1_600_000_000_000_000_000


def age(path, moment_ns=OLD_NS):
    os.utime(path, ns=(moment_ns, moment_ns))


@pytest.fixture
def reads(monkeypatch):
    """Paths that had to be hashed, in order."""
    seen = []
    real = inputs.content_hash

    def counting(path):
        seen.append(path.name)
        return real(path)

    monkeypatch.setattr(inputs, "content_hash", counting)
    return seen


def test_a_renamed_file_has_the_same_key_and_an_edited_one_another(tmp_path):
    (source,) = write_corpus(tmp_path, [0.5])
    before = resolve([source], tmp_path / "cache").audio_keys[source.id]
    moved = tmp_path / "elsewhere.wav"
    shutil.move(source.path, moved)
    renamed = Source(id=source.id, path=moved)
    assert resolve([renamed], tmp_path / "cache").audio_keys[source.id] == before
    samples, rate = soundfile.read(moved, dtype="float32")
    samples[100] += 0.001
    soundfile.write(moved, samples, rate, subtype="FLOAT")
    assert resolve([renamed], tmp_path / "cache").audio_keys[source.id] != before


def test_what_did_not_change_is_not_read_again(tmp_path, reads):
    sources = write_corpus(tmp_path, [0.1, 0.2, 0.3])
    for source in sources:
        age(source.path)
    first = resolve(sources, tmp_path / "cache")
    assert len(reads) == 3
    assert resolve(sources, tmp_path / "cache").audio_keys == first.audio_keys
    assert len(reads) == 3
    age(sources[1].path, OLD_NS + 1)
    resolve(sources, tmp_path / "cache")
    assert reads[3:] == ["u001.wav"]


def test_a_file_just_written_is_not_remembered(tmp_path, reads):
    (source,) = write_corpus(tmp_path, [0.1])
    resolve([source], tmp_path / "cache")
    resolve([source], tmp_path / "cache")
    assert len(reads) == 2


def test_another_recording_of_the_same_size_and_time_is_noticed(tmp_path):
    one, other = write_corpus(tmp_path, [0.1, 0.1])
    age(one.path)
    age(other.path)
    before = resolve([one], tmp_path / "cache").audio_keys[one.id]
    other.path.replace(one.path)  # as an archive whose files all have one time would unpack it
    assert resolve([one], tmp_path / "cache").audio_keys[one.id] != before


def test_a_relative_path_is_remembered_where_it_leads(tmp_path, monkeypatch, reads):
    keys = []
    for seed, name in enumerate(("a", "b")):
        (source,) = write_corpus(tmp_path / name, [0.1], seed=seed)
        age(source.path)
        monkeypatch.chdir(tmp_path / name)
        here = Source(id="x", path=Path(source.path.name))
        keys += [resolve([here], tmp_path / "cache").audio_keys["x"] for _ in range(2)]
    assert keys[0] == keys[1] != keys[2] == keys[3]
    assert len(reads) == 2


def test_an_interrupted_reading_is_not_begun_anew(tmp_path, reads):
    sources = write_corpus(tmp_path, [0.1] * 4)
    for source in sources:
        age(source.path)
    counted = []

    def interrupt(count):
        counted.append(count)
        if len(counted) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resolve(sources, tmp_path / "cache", workers=1, progress=interrupt)
    del reads[:]
    resolve(sources, tmp_path / "cache")
    assert reads == ["u003.wav"]


def test_segments_share_one_reading_and_have_keys_of_their_own(tmp_path, reads):
    (source,) = write_corpus(tmp_path, [2.0])
    parts = [
        Source(id=f"s{i}", path=source.path, start_s=i * 0.5, end_s=i * 0.5 + 0.5) for i in range(4)
    ]
    resolved = resolve(parts, tmp_path / "cache")
    assert len(set(resolved.audio_keys.values())) == 4
    assert resolved.durations_s == dict.fromkeys(("s0", "s1", "s2", "s3"), 0.5)
    assert len(reads) == 1


def test_a_broken_recording_fails_alone_and_by_name(tmp_path):
    sources = write_corpus(tmp_path, [0.1, 0.1])
    sources[0].path.write_bytes(b"")
    gone = Source(id="gone", path=tmp_path / "gone.wav")
    resolved = resolve([*sources, gone], tmp_path / "cache")
    assert set(resolved.audio_keys) == {"u001"}
    reasons = {f.utterance: f.reason for f in resolved.failures}
    assert "u000.wav" in reasons["u000"]
    assert "no such file" in reasons["gone"]


@pytest.mark.parametrize(
    ("segment", "message"),
    [
        ({"start_s": 0.01, "end_s": 0.0100001}, "end_s=0.0100001 is not after start_s=0.01"),
        ({"start_s": -1.0}, "start_s=-1.0 is no time"),
        ({"channel": -2}, "channel=-2 is negative"),
    ],
)
def test_a_segment_that_cannot_be_fails_alone(tmp_path, segment, message):
    (source,) = write_corpus(tmp_path, [0.1])
    wrong = Source(id="wrong", path=source.path, **segment)
    resolved = resolve([wrong, source], tmp_path / "cache")
    assert set(resolved.audio_keys) == {source.id}
    (failure,) = resolved.failures
    assert failure.utterance == "wrong"
    assert message in failure.reason


@pytest.mark.parametrize("damage", ['{"version": 2, "files": [', '{"version": 2, "files": [1]}'])
def test_a_damaged_memo_is_made_anew(tmp_path, reads, damage):
    (source,) = write_corpus(tmp_path, [0.1])
    age(source.path)
    first = resolve([source], tmp_path / "cache")
    (tmp_path / "cache" / MEMO_NAME).write_text(damage)
    assert resolve([source], tmp_path / "cache").audio_keys == first.audio_keys
    assert len(reads) == 2


def test_transcripts_that_differ_in_white_space_alone_share_a_key(tmp_path):
    sources = [Source(id="a", text=" he said\tno "), Source(id="b", text="he said no")]
    keys = resolve(sources, tmp_path, audio=False).text_keys
    assert keys["a"] == keys["b"]


def test_an_empty_transcript_has_no_key(tmp_path):
    assert resolve([Source(id="a", text="  ")], tmp_path, audio=False).text_keys == {}


def test_half_a_character_has_no_key_and_says_so(tmp_path):
    cut = Source(id="cut", text="so sad \ud83d")  # the first half of an emoji, as JSON allows
    whole = Source(id="whole", text="so sad")
    assert set(resolve([cut, whole], tmp_path, audio=False).text_keys) == {"whole"}
    assert r"'cut' holds half a character: 'so sad \ud83d'" in str(inputs.no_text(cut))
    assert "'x' has no transcript" in str(inputs.no_text(Source(id="x", text=" ")))
