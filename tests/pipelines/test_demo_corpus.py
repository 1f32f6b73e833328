"""The demo corpus: the same bytes every time, and emotions that can be heard."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from mer.cache.errors import ManifestError, UsageError
from mer.pipelines import corpora, labels, protocols
from mer.pipelines.corpora import demo
from mer.pipelines.corpora.demo import DemoConfig, synthesise
from mer.pipelines.corpora.voice import PHONES, Manner, Speaker, speak

SMALL = DemoConfig(num_speakers=2, num_sentences=1)


def digests(root: Path) -> dict[str, str]:
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("demo") / "data"
    return root, synthesise(root)


def samples_of(path: Path) -> np.ndarray:
    import soundfile

    samples, rate_hz = soundfile.read(path)
    assert rate_hz == 16_000
    return samples


def test_the_default_corpus_is_complete(corpus):
    root, manifest = corpus
    rows = manifest.utterances
    assert len(rows) == 144
    assert {(u.speaker, u.gender) for u in rows} == {
        (f"s0{i}", "female" if i % 2 else "male") for i in range(1, 7)
    }
    assert all(u.path == root / u.speaker / f"{u.id}.wav" for u in rows)
    assert len({u.text for u in rows}) == 6
    by_text = {(u.text, u.label) for u in rows}
    assert len(by_text) == 24  # every sentence in every emotion: words tell nothing
    assert "SYNTHETIC" in (root / "README.txt").read_text()
    assert "synthetic" in manifest.notes[0]
    assert corpora.load("demo", root).utterances == rows
    assert corpora.load(str(root / "manifest.csv")).utterances == rows


def test_recordings_sound_like_recordings(corpus):
    _, manifest = corpus
    for u in manifest.utterances[::7]:
        samples = samples_of(u.path)
        assert samples.ndim == 1
        assert 1.0 < len(samples) / 16_000 < 3.0
        assert 0.01 < np.max(np.abs(samples)) < 0.99
        assert abs(np.mean(samples)) < 0.01


def test_emotions_differ_as_described(corpus):
    _, manifest = corpus
    stats = {
        label: np.mean(
            [
                (len(x), np.sqrt(np.mean(x**2)))
                for u in manifest.utterances
                if u.label == label
                for x in [samples_of(u.path)]
            ],
            axis=0,
        )
        for label in demo.EMOTIONS
    }
    assert stats["sad"][0] > stats["neutral"][0] > stats["angry"][0]  # slower, faster
    assert stats["angry"][1] > 1.3 * stats["neutral"][1] > 1.3 * stats["sad"][1]  # louder, softer


def test_emotion_can_be_told_from_spectra_of_other_speakers_but_not_perfectly(corpus):
    from scipy.signal import stft
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    _, manifest = corpus
    edges = np.unique(np.geomspace(2, 257, 31).astype(int))
    rows = []
    for u in manifest.utterances:
        _, _, spectrum = stft(samples_of(u.path), 16_000, nperseg=512, noverlap=352)
        power = np.add.reduceat(np.abs(spectrum) ** 2, edges[:-1], axis=0)
        log = np.log(power + 1e-10)
        rows.append(np.concatenate([log.mean(1), log.std(1)]))
    features = np.array(rows)
    labelled = labels.apply(manifest, labels.scheme("demo-4"))
    index = {u.id: i for i, u in enumerate(labelled.utterances)}
    target = np.array(labelled.targets)
    recalls = []
    for fold in protocols.make_folds("demo-loso", labelled.utterances):
        train = [index[name] for name in (*fold.train, *fold.validation)]
        test = [index[name] for name in fold.test]
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=2000))
        model.fit(features[train], target[train])
        recalls.append(np.mean(model.predict(features[test]) == target[test]))
    assert 0.60 < np.mean(recalls) < 0.95  # chance is 0.25


def test_the_same_config_gives_the_same_bytes(tmp_path):
    synthesise(tmp_path / "a", SMALL)
    synthesise(tmp_path / "b", SMALL)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    synthesise(tmp_path / "c", DemoConfig(num_speakers=2, num_sentences=1, seed=2))
    a, c = digests(tmp_path / "a"), digests(tmp_path / "c")
    assert not set(a.values()) & {v for k, v in c.items() if k.endswith(".wav")}


def test_an_utterance_does_not_depend_on_the_size_of_the_corpus(tmp_path):
    synthesise(tmp_path / "a", SMALL)
    synthesise(tmp_path / "b", DemoConfig(num_speakers=3, num_sentences=2))
    a, b = digests(tmp_path / "a"), digests(tmp_path / "b")
    wavs = [name for name in a if name.endswith(".wav")]
    assert [a[name] for name in wavs] == [b[name] for name in wavs]


def test_an_intact_corpus_is_reused(tmp_path, monkeypatch):
    first = synthesise(tmp_path, SMALL)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    monkeypatch.setattr(demo, "render", None)
    assert synthesise(tmp_path, SMALL) == first
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_what_is_missing_or_damaged_is_made_again(tmp_path, monkeypatch):
    synthesise(tmp_path, SMALL)
    before = digests(tmp_path)
    (tmp_path / "s01" / "s01_sad_01.wav").unlink()
    (tmp_path / "s02" / "s02_angry_01.wav").write_bytes(b"damaged")
    rendered = []
    render = demo.render
    monkeypatch.setattr(
        demo, "render", lambda name, config: rendered.append(name) or render(name, config)
    )
    synthesise(tmp_path, SMALL)
    assert rendered == ["s01_sad_01", "s02_angry_01"]
    assert digests(tmp_path) == before


def test_an_interrupted_synthesis_is_continued(tmp_path, monkeypatch):
    render = demo.render

    def interrupted(name, config):
        if name == "s01_neutral_01":
            raise KeyboardInterrupt
        return render(name, config)

    monkeypatch.setattr(demo, "render", interrupted)
    with pytest.raises(KeyboardInterrupt, match="^$"):
        synthesise(tmp_path / "a", SMALL)
    monkeypatch.setattr(demo, "render", render)
    synthesise(tmp_path / "a", SMALL)
    synthesise(tmp_path / "b", SMALL)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_another_size_replaces_what_was_listed_and_nothing_else(tmp_path):
    synthesise(tmp_path, DemoConfig(num_speakers=3, num_sentences=1))
    (tmp_path / "mine.txt").write_text("keep")
    synthesise(tmp_path, SMALL)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.txt",
        "manifest.csv",
        "mer-demo.json",
        "mine.txt",
        "s01",
        "s02",
    ]
    assert len(corpora.load("demo", tmp_path).utterances) == 8  # whatever its size


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.doc").write_text("years of work")
    with pytest.raises(ManifestError, match="not empty and holds no demo corpus"):
        synthesise(tmp_path, SMALL)
    (tmp_path / demo.MARKER).write_text(json.dumps({"corpus": "other"}))
    with pytest.raises(ManifestError, match="absent or damaged"):
        synthesise(tmp_path, SMALL)


def test_sizes_out_of_range_are_refused():
    with pytest.raises(UsageError, match=r"num_sentences must be 1 to 10, got 11"):
        DemoConfig(num_sentences=11)
    with pytest.raises(UsageError, match=r"num_speakers must be 1 to 99, got 0"):
        DemoConfig(num_speakers=0)


def test_progress_reaches_the_total(tmp_path):
    steps = []
    synthesise(tmp_path, SMALL, progress=lambda done, total: steps.append((done, total)))
    assert steps == [(i, 8) for i in range(1, 9)]


def test_sentences_are_written_in_known_phones():
    for text, phones in demo.SENTENCES:
        assert text.endswith(".")
        assert set(phones.split()) <= set(PHONES)


@pytest.mark.parametrize("f0_hz", [110.0, 210.0])
def test_a_voice_has_the_pitch_that_was_asked_for(f0_hz):
    manner = Manner(span=0.0, final=0.0, jitter=0.0, shimmer=0.0, breath=0.0)
    rng = np.random.default_rng(3)
    samples = speak(("AA",) * 6, Speaker(f0_hz=f0_hz, tract=1.0), manner, rng)
    middle = samples[len(samples) // 3 : 2 * len(samples) // 3]
    middle = middle - middle.mean()
    correlation = np.correlate(middle, middle, "full")[len(middle) :]
    low, high = int(16_000 / 400), int(16_000 / 70)
    lag = low + 1 + np.argmax(correlation[low:high])
    assert 16_000 / lag == pytest.approx(f0_hz, rel=0.06)  # pitch drifts by a few percent
