"""Label schemes: nothing is lost in silence."""

from __future__ import annotations

import pytest

from mer.cache.errors import ManifestError, UnknownNameError
from mer.pipelines import corpora, labels
from mer.pipelines.labels import CANONICAL, SCHEMES, LabelScheme
from mer.pipelines.manifest import Manifest, Utterance


def manifest(*given: str | None, **further: list[str | None]) -> Manifest:
    rows = []
    for i, label in enumerate(given):
        more = {name: values[i] for name, values in further.items() if values[i] is not None}
        rows.append(Utterance(id=f"u{i}", label=label, labels=more))
    return Manifest("m", tuple(rows))


def test_schemes_have_the_classes_they_promise():
    assert {name: s.num_classes for name, s in SCHEMES.items()} == {
        "ravdess-8": 8,
        "ravdess-7": 7,
        "ravdess-7-nocalm": 7,
        "ravdess-song-6": 6,
        "crema-d-6": 6,
        "emodb-7": 7,
        "nemo-6": 6,
        "demo-4": 4,
        "ekman-6": 6,
    }
    for scheme in SCHEMES.values():
        assert set(scheme.classes) <= set(CANONICAL)


@pytest.mark.parametrize("name", corpora.names())
def test_every_corpus_scheme_takes_every_published_label(name):
    corpus = corpora.corpus(name)
    if corpus.published is None:
        assert corpus.scheme == labels.AS_GIVEN
        return
    scheme = labels.scheme(corpus.scheme)
    assert {scheme.class_of(label) for label in corpus.published.labels} == set(scheme.classes)


def test_calm_is_merged_or_dropped_as_the_scheme_says():
    rows = manifest("neutral", "calm", "sad")
    merged = labels.apply(rows, labels.scheme("ravdess-7"))
    assert [u.label for u in merged.utterances] == ["neutral", "neutral", "sad"]
    assert merged.targets == (0, 0, 2)
    dropped = labels.apply(rows, labels.scheme("ravdess-7-nocalm"))
    assert [u.id for u in dropped.utterances] == ["u0", "u2"]
    assert dropped.dropped == {"calm": 1}


def test_what_a_scheme_leaves_out_is_reported():
    result = labels.apply(
        manifest("angry", None, "neutral", "calm", "calm"), labels.scheme("ekman-6")
    )
    assert [u.id for u in result.utterances] == ["u0"]
    assert (result.dropped, result.unlabelled) == ({"neutral": 1, "calm": 2}, 1)
    notes = " ".join(result.notes)
    assert "drops 2 utterances labelled 'calm'" in notes
    assert "1 utterances have no label" in notes
    assert "No utterance of class 'disgust', 'fear', 'happy', 'sad', 'surprise'" in notes


def test_whole_words_are_understood_but_codes_are_not():
    result = labels.apply(manifest("Anger", "happiness", "SADNESS"), labels.scheme("demo-4"))
    assert [u.label for u in result.utterances] == ["angry", "happy", "sad"]
    assert labels.canonical("F") == "F"
    with pytest.raises(ManifestError, match="utterance 'u0': label 'F' is unknown"):
        labels.apply(manifest("F"), labels.scheme("demo-4"))


def test_an_unknown_label_names_utterance_and_near_miss():
    with pytest.raises(
        ManifestError, match=r"utterance 'u1': label 'angri' is unknown .* Did you mean 'angry'"
    ):
        labels.apply(manifest("angry", "angri"), labels.scheme("demo-4"))


def test_another_target_takes_its_own_column():
    rows = manifest("angry", "angry", voice=["sad", None])
    result = labels.apply(rows, labels.scheme("crema-d-6"), "voice")
    assert [(u.id, u.label) for u in result.utterances] == [("u0", "sad")]
    assert result.unlabelled == 1
    with pytest.raises(ManifestError, match=r"2 have no value in the column 'label:face'"):
        labels.apply(rows, labels.scheme("crema-d-6"), "face")


def test_as_given_takes_the_labels_as_they_are():
    rows = manifest("joy", "happiness", None, "Wut")
    scheme = labels.resolve("as-given", rows)
    assert scheme.classes == ("Wut", "happiness", "joy")
    assert labels.apply(rows, scheme).targets == (2, 1, 0)
    with pytest.raises(ManifestError, match="at least two classes.*'x'"):
        labels.resolve("as-given", manifest("x", "x"))


def test_an_unknown_scheme_suggests_the_nearest():
    with pytest.raises(UnknownNameError, match=r"'ravdes-8'\. Did you mean 'ravdess-8'"):
        labels.scheme("ravdes-8")


def test_a_contradictory_scheme_cannot_be_made():
    with pytest.raises(ValueError, match="not its classes"):
        LabelScheme("x", ("a",), {"b": "c"})
    with pytest.raises(ValueError, match="both keeps and drops"):
        LabelScheme("x", ("a",), {}, frozenset({"a"}))
    with pytest.raises(ValueError, match="must be distinct"):
        LabelScheme("x", ("a", "a"))
