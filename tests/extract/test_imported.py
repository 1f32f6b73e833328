"""Features that others computed: a recipe names them, and nothing computes them."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import tone_corpus

from mer.cache.errors import UnknownNameError, UsageError, UtteranceError
from mer.cache.exchange import import_
from mer.cache.home import Cache
from mer.cache.identity import canonical_json, fingerprint
from mer.extract.registry import create, parse_feature
from mer.pipelines import dataset as datasets
from mer.pipelines.caching import dataset_keys
from mer.pipelines.extraction import extract, plan_features
from mer.pipelines.manifest import read_manifest
from mer.pipelines.recipe import DatasetRecipe, EvaluationRecipe, HeadRecipe, Recipe, StreamRecipe

CONTENT = "00112233445566778899aabbccddeeff"
BASE = {
    "name": "theirs",
    "format": "npy",
    "content": CONTENT,
    "outputs": "final/768///50,units/1/uint16/codes//500,mean/768/float32/pooled",
}


def feature(**changes: str) -> str:
    return "imported:" + ",".join(f"{k}={v}" for k, v in {**BASE, **changes}.items())


def test_the_string_says_all_that_the_store_is():
    made = create(feature())
    assert [(o.name, o.dim, o.dtype, o.kind, o.rate_hz, o.num_codes) for o in made.outputs] == [
        ("final", 768, "float16", "frames", 50.0, None),
        ("units", 1, "uint16", "codes", None, 500),
        ("mean", 768, "float32", "pooled", None, None),
    ]
    assert made.spec.identity == {
        "extractor": "imported",
        "version": 1,
        "options": {
            "name": "theirs",
            "format": "npy",
            "content": CONTENT,
            "modality": "audio",
            "outputs": ["final/768///50", "units/1/uint16/codes//500", "mean/768/float32/pooled"],
        },
    }
    assert made.modality == "audio"
    canonical_json(made.spec.identity)
    text = create(feature(modality="text"))
    assert text.modality == "text"
    assert made.modality == "audio"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("name", "other"),
        ("format", "hdf5"),
        ("format", "npy+level=UTT"),
        ("content", CONTENT[::-1]),
        ("modality", "text"),
        ("outputs", "final/768///50"),
        ("outputs", "final/768/float32//50"),
    ],
)
def test_another_value_of_any_option_is_another_store(option, value):
    identities = {
        fingerprint(create(text).spec.identity) for text in (feature(), feature(**{option: value}))
    }
    assert len(identities) == 2


def test_spelling_is_not_part_of_it():
    same = feature(
        outputs="final/768/float16/frames/50.0, units/1/uint16/codes//500,mean/768/float32/pooled//"
    )
    assert create(same).spec == create(feature()).spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("imported", "lacks name, format, content, outputs: copy the whole feature string"),
        (feature(content="abc"), "content=abc is no hash"),
        (feature(name="a/b"), "'a/b' cannot name imported features"),
        (feature(modality="video"), "modality=video"),
        (feature(outputs="final"), "Output 'final' is not NAME/DIM"),
        (feature(outputs="final/many"), "Output 'final/many'"),
        (feature(outputs="final/0"), "width 0"),
        (feature(outputs="final/1/int8"), "type int8"),
        (feature(outputs="final/1/uint8"), "type uint8"),
        (feature(outputs="final/1//music"), "kind 'music'"),
        (feature(outputs="final/1///-5"), "rate -5.0 Hz"),
        (feature(outputs="u/1/uint8/codes//0"), "0 codes"),
        (feature(outputs="key/1"), "Output 'key' cannot be imported: its name"),
        (feature(outputs="a/1,a/2"), "names an output twice"),
    ],
)
def test_strings_that_make_no_sense_are_refused(text, message):
    with pytest.raises(UsageError, match=message):
        create(text)


def test_an_unknown_option_suggests_the_nearest():
    with pytest.raises(UnknownNameError, match="'contents'.*Did you mean 'content'"):
        create(feature(contents="x"))


def test_it_is_named_without_a_cache_and_without_torch():
    check = (
        "import sys; from mer.extract.registry import create; "
        f"create({feature()!r}); sys.exit('torch' in sys.modules or 'h5py' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_nothing_can_compute_it():
    made = create(feature())
    made.load("cpu")
    message = "imported:name=theirs was imported; nothing can compute it: import it again"
    with pytest.raises(UtteranceError, match=message):
        made.prepare(np.zeros(16_000, np.float32))
    with pytest.raises(NotImplementedError, match="nothing can compute it"):
        made.forward(None)
    assert set(made.num_frames(100).values()) == {0}


# -- from a folder of others to a recipe -----------------------------------------------------------


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "tones").mkdir()
    return tone_corpus.write(tmp_path / "tones")


def recipe(corpus, text: str, missing: str = "error") -> Recipe:
    return Recipe(
        name="r",
        dataset=DatasetRecipe(name=str(corpus), missing=missing),
        features={"speech": StreamRecipe(feature=text)},
        head=HeadRecipe(name="simple"),
        evaluation=EvaluationRecipe(),
    )


def load(made: Recipe, cache: Cache):
    planned = datasets.plan(made)
    return datasets.load(made, planned, datasets.identify(planned, cache), cache)


@pytest.fixture
def theirs(tmp_path, corpus):
    """A folder as MERTools writes it, for all utterances but one."""
    folder = tmp_path / "hubert-FRA"
    folder.mkdir()
    rng = np.random.default_rng(0)
    arrays = {
        u.id: rng.standard_normal((n + 1, 6)).astype(np.float32)
        for n, u in enumerate(read_manifest(corpus).utterances[1:])
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return folder, arrays


def test_a_recipe_reads_what_was_imported(tmp_path, corpus, theirs):
    folder, arrays = theirs
    cache = Cache(tmp_path / "cache")
    keys = dataset_keys(str(corpus), None, cache).audio
    report = import_(folder, "npy", cache, name="hubert", keys=keys)
    assert (report.added, report.linked) == (23, "manifest")
    assert parse_feature(report.feature).feature == report.feature
    assert create(report.feature).spec.identity == report.store.spec.identity
    data = load(recipe(corpus, report.feature, missing="drop"), cache)
    assert data.dropped == (read_manifest(corpus).utterances[0].id,)
    for name, frames in zip(data.features.ids, data.features.streams["speech"], strict=True):
        np.testing.assert_array_equal(frames, arrays[name])


def test_extract_reuses_what_was_imported_and_says_what_it_cannot_bring(tmp_path, corpus, theirs):
    folder, _ = theirs
    cache = Cache(tmp_path / "cache")
    keys = dataset_keys(str(corpus), None, cache).audio
    text = import_(folder, "npy", cache, name="hubert", keys=keys).feature
    manifest = read_manifest(corpus)
    [planned] = plan_features(manifest, [text], cache).features
    assert (planned.reused, len(planned.missing)) == (23, 1)
    report = extract(manifest, [text], cache, device="cpu", workers=1).report
    assert (report.reused, report.computed) == (23, 0)
    [failure] = report.failures
    assert failure.utterance == manifest.utterances[0].id
    assert "was imported; nothing can compute it" in failure.reason
