"""Reading a recipe's data: what is read, what is missing, what is left out."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import tone_corpus
from hypothesis import given
from hypothesis import strategies as st

from mer.cache.errors import MissingFeatureError, RecipeError, UnknownNameError
from mer.cache.home import Cache
from mer.pipelines import dataset as datasets
from mer.pipelines.dataset import average
from mer.pipelines.extraction import extract
from mer.pipelines.manifest import Utterance, read_manifest
from mer.pipelines.recipe import DatasetRecipe, EvaluationRecipe, HeadRecipe, Recipe, StreamRecipe

MELS = "logmel:n_mels=20"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tones")
    return tone_corpus.write(folder)


@pytest.fixture(scope="module")
def cache(tmp_path_factory, corpus):
    cache = Cache(tmp_path_factory.mktemp("cache"))
    extract(read_manifest(corpus), [MELS], cache, device="cpu", workers=1)
    return cache


def make(corpus, *, features=None, missing="error", target=None, **evaluation) -> Recipe:
    return Recipe(
        name="r",
        dataset=DatasetRecipe(name=str(corpus), missing=missing, target=target),
        features=features or {"speech": StreamRecipe(feature=MELS)},
        head=HeadRecipe(name="simple"),
        evaluation=EvaluationRecipe(**evaluation),
    )


def load(recipe, cache):
    planned = datasets.plan(recipe)
    return datasets.load(recipe, planned, datasets.identify(planned, cache), cache)


def test_streams_are_the_stored_frames_of_each_utterance(corpus, cache):
    data = load(make(corpus), cache)
    assert len(data.utterances) == 24
    assert data.features.ids == [u.id for u in data.utterances]
    assert data.features.classes == ("angry", "sad")
    labels = [data.features.classes[i] for i in data.features.labels]
    assert labels == [u.label for u in data.utterances]
    lengths = {len(a) for a in data.features.streams["speech"]}
    assert len(lengths) == 3
    (store,) = cache.stores()
    assert data.stores[MELS]["fingerprint"] == store.fingerprint
    planned = datasets.plan(make(corpus))
    keys = datasets.identify(planned, cache).audio_keys
    for row in (0, 13):
        frames = store.frames(keys[data.features.ids[row]], "logmel")
        np.testing.assert_array_equal(data.features.streams["speech"][row], frames)


def test_pooling_keeps_ragged_lengths(corpus, cache):
    whole = load(make(corpus), cache).features.streams["speech"]
    streams = {
        "by4": StreamRecipe(feature=MELS, pool=4),
        "mean": StreamRecipe(feature=MELS, pool="mean"),
    }
    pooled = load(make(corpus, features=streams), cache).features.streams
    for frames, by4, mean in zip(whole, pooled["by4"], pooled["mean"], strict=True):
        assert len(by4) == -(-len(frames) // 4)
        last = (len(by4) - 1) * 4
        np.testing.assert_allclose(by4[0], frames[:4].astype(np.float32).mean(0), rtol=1e-5)
        np.testing.assert_allclose(by4[-1], frames[last:].astype(np.float32).mean(0), rtol=1e-5)
        assert mean.shape == (1, 20)
        # Statistics are taken before frames are rounded to float16.
        np.testing.assert_allclose(mean[0], frames.astype(np.float64).mean(0), atol=5e-3)


@given(length=st.integers(1, 40), group=st.integers(1, 50), seed=st.integers(0, 9))
def test_average_equals_the_mean_of_each_group(length, group, seed):
    frames = np.random.default_rng(seed).normal(size=(length, 3)).astype(np.float16)
    expected = [frames[i : i + group].astype(np.float32).mean(0) for i in range(0, length, group)]
    np.testing.assert_allclose(average(frames, group), expected, rtol=1e-5, atol=1e-6)


def test_other_target_gives_other_classes(corpus, cache):
    data = load(make(corpus, target="size"), cache)
    assert data.features.classes == ("big", "small")


def test_baselines_read_mean_and_deviation_of_frames(corpus, cache):
    data = load(make(corpus, baselines=("svm",)), cache)
    frames = data.features.streams["speech"][5].astype(np.float64)
    expected = np.concatenate([frames.mean(0), frames.std(0)])
    np.testing.assert_allclose(data.baseline[5], expected, atol=5e-3)
    assert load(make(corpus), cache).baseline is None


def test_speakers_are_standardised_over_all_their_frames(corpus, cache):
    plain = make(corpus, baselines=("svm",))
    recipe = dataclasses.replace(
        plain, dataset=dataclasses.replace(plain.dataset, normalise="speaker")
    )
    before, after = load(plain, cache), load(recipe, cache)
    mine = [row for row, u in enumerate(after.utterances) if u.speaker == "s1"]
    frames = np.concatenate([after.features.streams["speech"][row] for row in mine])
    np.testing.assert_allclose(frames.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(frames.std(0), 1, atol=1e-3)
    assert abs(np.concatenate([before.features.streams["speech"][r] for r in mine]).mean()) > 1
    np.testing.assert_allclose(after.baseline[mine].mean(0), 0, atol=1e-4)
    assert "standardised per speaker, test speakers included" in after.notes[-1]
    assert not any("standardised" in note for note in before.notes)


def test_constant_dimension_of_a_speaker_becomes_zero():
    arrays = [np.array([[1.0, 5.0], [3.0, 5.0]]), np.array([[2.0, 5.0]]), np.array([[9.0, 9.0]])]
    first, second, alone = datasets.standardise_by_speaker(arrays, ["a", "a", "b"])
    np.testing.assert_allclose(first, [[-np.sqrt(1.5), 0], [np.sqrt(1.5), 0]], rtol=1e-6)
    assert second.tolist() == [[0.0, 0.0]]
    assert alone.tolist() == [[0.0, 0.0]]


def test_normalising_by_unknown_speakers_is_refused(corpus, cache, tmp_path):
    for file in corpus.parent.glob("*.wav"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "anonymous.csv"
    path.write_text(corpus.read_text().replace(",s1,", ",,"))
    plain = make(path)
    recipe = dataclasses.replace(
        plain, dataset=dataclasses.replace(plain.dataset, normalise="speaker")
    )
    with pytest.raises(RecipeError, match=r"6 of 24 utterances have no speaker \(s1-angry-0"):
        load(recipe, cache)


def test_missing_feature_names_the_command(corpus, cache):
    streams = {"speech": StreamRecipe(feature=MELS), "f": StreamRecipe(feature="logmel")}
    recipe = make(corpus, features=streams)
    with pytest.raises(MissingFeatureError, match="'logmel' of all 24 utterances") as caught:
        load(recipe, cache)
    command = f"mer extract {corpus} -f logmel --cache {cache.root}"
    assert f"Run `{command}`" in str(caught.value)
    assert MELS not in str(caught.value)


def test_what_lacks_of_imported_features_is_imported_again_not_extracted(corpus, cache):
    feature = "imported:name=theirs,format=npy,content=" + "0" * 32 + ",outputs=features/4"
    streams = {"theirs": StreamRecipe(feature=feature), "ours": StreamRecipe(feature="logmel")}
    with pytest.raises(MissingFeatureError, match="of all 24 utterances") as caught:
        load(make(corpus, features=streams), cache)
    assert f"Run `mer extract {corpus} -f logmel --cache {cache.root}`." in str(caught.value)
    assert f"`mer cache import … --dataset {corpus}`" in str(caught.value)
    with pytest.raises(MissingFeatureError, match="import them again") as caught:
        load(make(corpus, features={"theirs": streams["theirs"]}), cache)
    assert "mer extract" not in str(caught.value)


def test_default_cache_is_not_spelt_out(corpus, cache, monkeypatch):
    monkeypatch.setenv("MER_CACHE", str(cache.root))
    text = datasets.extract_command(make(corpus), [MELS], cache)
    assert text == f"mer extract {corpus} -f {MELS}"


@pytest.fixture
def partial(tmp_path, corpus, cache):
    """The corpus and two utterances more: one not extracted, one that cannot be read."""
    for wav in corpus.parent.glob("*.wav"):
        (tmp_path / wav.name).write_bytes(wav.read_bytes())
    text = corpus.read_text()
    (tmp_path / "bad.wav").write_bytes(b"not sound")
    first = (tmp_path / "s0-angry-0.wav").read_bytes()
    (tmp_path / "new.wav").write_bytes(first[:-400])
    path = tmp_path / "tones.csv"
    path.write_text(text + "bad,bad.wav,s0,angry,big\nnew,new.wav,s1,sad,big\n")
    return path


def test_partly_missing_feature_is_refused_with_examples(partial, cache):
    with pytest.raises(MissingFeatureError, match=r"2 of 26 utterances \(bad, new\)") as caught:
        load(make(partial), cache)
    assert "cannot be read: bad: " in str(caught.value)
    assert "--set dataset.missing=drop" in str(caught.value)


def test_missing_utterances_are_left_out_on_request_and_said(partial, cache):
    data = load(make(partial, missing="drop"), cache)
    assert len(data.utterances) == 24
    assert data.dropped == ("bad", "new")
    assert data.notes[-1] == (
        "2 of 26 utterances are left out because a feature is missing: bad, new."
    )


def test_feature_that_nobody_extracted_is_not_dropped_away(partial, cache):
    recipe = make(partial, missing="drop", features={"s": StreamRecipe(feature="logmel")})
    with pytest.raises(MissingFeatureError, match="'logmel' of all 26 utterances"):
        load(recipe, cache)


def test_copied_corpus_is_a_hit(tmp_path, corpus, cache):
    for file in corpus.parent.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert len(load(make(tmp_path / "tones.csv"), cache).utterances) == 24


@pytest.mark.skipif(find_spec("torchcrepe") is None, reason="needs the extra 'crepe'")
@pytest.mark.parametrize(
    ("stream", "message"),
    [
        ({"feature": "crepe:model=tiny"}, "has the outputs f0, periodicity, f0_code; say which"),
        ({"feature": "crepe:model=tiny#f0_code", "pool": 2}, "codes, which cannot be averaged"),
    ],
)
def test_stream_that_cannot_be_read_is_refused(corpus, stream, message):
    with pytest.raises(RecipeError, match=message):
        datasets.plan(make(corpus, features={"f0": StreamRecipe(**stream)}))


def test_unknown_output_suggests_the_nearest(corpus):
    stream = StreamRecipe(feature=MELS, output="logmle")
    with pytest.raises(UnknownNameError, match="'logmle'. Did you mean 'logmel'"):
        datasets.plan(make(corpus, features={"speech": stream}))


def test_recipe_without_a_dataset_says_how_to_give_one(corpus):
    recipe = Recipe(
        name="r", features={"s": StreamRecipe(feature=MELS)}, head=HeadRecipe(name="simple")
    )
    with pytest.raises(RecipeError, match="names no dataset. Give one: --dataset"):
        datasets.plan(recipe)


def test_planning_does_not_import_torch(corpus):
    code = (
        "import sys; from mer.pipelines import dataset; from mer.pipelines.recipe import *;"
        "dataset.plan(Recipe(name='r', dataset=DatasetRecipe(name=sys.argv[1]), "
        f"features={{'s': StreamRecipe(feature='{MELS}')}}, head=HeadRecipe(name='simple')));"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(corpus)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("splits", "expected"),
    [
        (("train", "validation", "test"), "official"),
        (("train", "test", None), "loso"),
        ((None, None, None), "loso"),
    ],
)
def test_a_manifest_with_a_complete_split_is_reported_on_it(corpus, splits, expected):
    utterances = [Utterance(id=str(i), split=split) for i, split in enumerate(splits)]
    assert datasets.default_protocol(make(corpus), utterances) == expected
    assert datasets.default_protocol(make(corpus, protocol="loso"), utterances) == "loso"
