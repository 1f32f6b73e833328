"""Recipes: merging, overrides, faults, and the shipped files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mer.cache.errors import RecipeError, UnknownNameError
from mer.pipelines import recipe as recipes
from mer.pipelines.recipe import StreamRecipe, dump, load_recipe

MINIMAL = """
features: {speech: logmel}
head: {name: simple}
evaluation: {protocol: loso}
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "r.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_defaults_are_filled_in(write):
    recipe = load_recipe(write(MINIMAL))
    assert recipe.name == "r"
    assert recipe.features == {"speech": StreamRecipe(feature="logmel")}
    assert recipe.evaluation.seeds == (1, 2, 3)
    assert recipe.evaluation.folds is None
    assert recipe.evaluation.baselines == ("majority",)


def test_feature_string_splits_into_feature_and_output(write):
    recipe = load_recipe(write(MINIMAL), ["features.f0='crepe:model=tiny#f0_code'"])
    assert recipe.features["f0"] == StreamRecipe(feature="crepe:model=tiny", output="f0_code")


def test_all_faults_are_reported_at_once_with_their_key(write):
    path = write("""
featrues: {}
dataset: {labels: emodb7}
features: {speech: logmle, text: {feature: logmel, pol: 2}}
head: {dim: 3}
training: 7
evaluation: {protocl: loso, protocol: losso, seeds: [1, 1], folds: [0]}
""")
    with pytest.raises(RecipeError, match="has 10 faults") as caught:
        load_recipe(path)
    message = str(caught.value)
    assert str(path) in message
    for fault in (
        "featrues: Unknown key 'featrues'. Did you mean 'features'?",
        "dataset.labels: Unknown label scheme 'emodb7'. Did you mean 'emodb-7'",
        "features.speech.feature: Unknown feature 'logmle'. Did you mean 'logmel'?",
        "features.text.pol: Unknown key 'pol'. Did you mean 'pool'?",
        "head.name: is missing",
        "training: must be a mapping",
        "evaluation.protocl: Unknown key 'protocl'. Did you mean 'protocol'?",
        "evaluation.protocol: Unknown protocol 'losso'. Did you mean 'loso'?",
        "evaluation.seeds: must not name anything twice. Got [1, 1]",
        "evaluation.folds: counts folds from 1",
    ):
        assert fault in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected the groups"),
        ("- a\n", "expected the groups"),
        ("head: {name: x\n", "line 2"),
        ("head: {name: a, name: b}\n", "key 'name' is given twice"),
        ("head: &a {name: x}\ntraining: *a\n", "references .* are not supported"),
        ("head: !!python/object/apply:os.system [ls]\n", "could not determine a constructor"),
        ("include: 3\n", "include must be a name or a path"),
        ("include: smiple\n", "Unknown recipe 'smiple'. Did you mean 'simple'?"),
        ("include: other.yaml\n", "other.yaml: no such file"),
        (MINIMAL + "training: {lr: .nan}", "training: must be finite. Got nan"),
        (MINIMAL + "name: ../x", "name: must be letters"),
        (MINIMAL.replace("logmel", "{feature: logmel, pool: 0}"), "features.speech.pool: must be"),
        (MINIMAL.replace("logmel", "{feature: 'crepe#f0', output: f0_code}"), "name two outputs"),
        (MINIMAL.replace("{speech: logmel}", "{speech: null}"), "at least one stream"),
    ],
)
def test_faulty_file_is_one_clear_error(write, text, message):
    with pytest.raises((RecipeError, UnknownNameError), match=message):
        load_recipe(write(text))


def test_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(path)


def test_unknown_shipped_name_suggests_the_nearest():
    with pytest.raises(UnknownNameError, match=r"Unknown recipe 'smple'. Did you mean 'simple'"):
        load_recipe("smple")


def test_exponent_without_a_point_is_a_number(write):
    recipe = load_recipe(write(MINIMAL + "training: {lr: 5e-5, decay: 1.0e3, name: e5}"))
    assert recipe.training == {"lr": 5e-5, "decay": 1000.0, "name": "e5"}


def test_include_states_only_the_difference(write):
    write(MINIMAL + "training: {lr: 0.1, epochs: 3}\nname: kept", "base.yaml")
    child = load_recipe(write("include: base.yaml\ntraining: {epochs: 9}", "child.yaml"))
    assert child.training == {"lr": 0.1, "epochs": 9}
    assert child.head.name == "simple"
    assert child.name == "child"


def test_include_path_is_relative_to_the_including_file(write, tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    write(MINIMAL, "base.yaml")
    (tmp_path / "sub" / "child.yaml").write_text("include: ../base.yaml\n")
    monkeypatch.chdir("/")
    assert load_recipe(tmp_path / "sub" / "child.yaml").head.name == "simple"


def test_include_in_a_circle_is_refused(write):
    write("include: b.yaml", "a.yaml")
    write("include: a.yaml", "b.yaml")
    with pytest.raises(RecipeError, match=r"circle: a.yaml -> b.yaml -> a.yaml"):
        load_recipe(write("include: b.yaml", "a.yaml"))


def test_head_of_another_name_takes_nothing_from_the_old_one(write):
    path = write(MINIMAL.replace("{name: simple}", "{name: mdat, dim: 3, dropout: 0.1}"))
    assert load_recipe(path, ["head.dropout=0.2"]).head.config == {"dim": 3, "dropout": 0.2}
    for order in (["head.name=simple", "head.hidden=4"], ["head.hidden=4", "head.name=simple"]):
        swapped = load_recipe(path, order)
        assert swapped.head.name == "simple"
        assert swapped.head.config == {"hidden": 4}


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("features.f0=crepe:model=tiny", ("crepe:model=tiny", "f0_code", 2)),
        ("features.f0='crepe#f0'", ("crepe", "f0", 2)),
        ("features.f0=logmel", ("logmel", None, 2)),
        ("features.f0.pool=mean", ("crepe", "f0_code", "mean")),
        ("features.f0={feature: logmel, output: x}", ("logmel", "x", 2)),
    ],
)
def test_swapping_a_feature_keeps_what_still_fits(write, setting, expected):
    path = write(
        MINIMAL.replace("{speech: logmel}", "{s: logmel, f0: {feature: 'crepe#f0_code', pool: 2}}")
    )
    stream = load_recipe(path, [setting]).features["f0"]
    assert (stream.feature, stream.output, stream.pool) == expected


def test_null_removes_a_stream(write):
    path = write(MINIMAL.replace("{speech: logmel}", "{speech: logmel, f0: crepe}"))
    assert list(load_recipe(path, ["features.f0=null"]).features) == ["speech"]


def test_overrides_are_yaml_and_later_ones_win(write):
    recipe = load_recipe(
        write(MINIMAL),
        ["evaluation.seeds=[4, 5]", "training.lr=1e-3", "training.lr=2e-3", "evaluation.folds=2"],
    )
    assert recipe.evaluation.seeds == (4, 5)
    assert recipe.evaluation.folds == (2,)
    assert recipe.training == {"lr": 2e-3}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("head", "--set head: must be KEY=VALUE"),
        ("=3", "--set =3: must be KEY=VALUE"),
        ("head..x=3", "must be KEY=VALUE"),
        ("head.x=[1", "is not a YAML value"),
        ("evaluation.sedes=3", "evaluation.sedes: Unknown key 'sedes'. Did you mean 'seeds'"),
        ("evaluation.validation=next-fodl", "Unknown validation rule 'next-fodl'. Did you mean"),
        ("evaluation.seeds.x=3", "evaluation.seeds: must be a whole number"),
    ],
)
def test_faulty_override_names_itself(write, setting, message):
    with pytest.raises(RecipeError, match=message.replace(".", r"\.").replace("[", r"\[")):
        load_recipe(write(MINIMAL), [setting])


def test_run_options_replace_what_the_recipe_says(write):
    recipe = load_recipe(write(MINIMAL + "dataset: {name: emodb, root: there, labels: emodb-7}"))
    run = recipe.with_run_options(dataset="nemo", seeds=[7], folds=[2, 1])
    assert (run.dataset.name, run.dataset.root) == ("nemo", None)
    assert (run.evaluation.seeds, run.evaluation.folds) == ((7,), (1, 2))
    assert recipe.with_run_options(root="here").dataset.root == "here"
    assert recipe.with_run_options() == recipe
    with pytest.raises(RecipeError, match=r"seeds must not be an empty list"):
        recipe.with_run_options(seeds=[])


def test_required_features_are_named_once_without_outputs(write):
    recipe = load_recipe(
        write(MINIMAL),
        ["features.f0='crepe#f0_code'", "features.p='crepe#periodicity'"]
        + ["evaluation.baselines=[majority, svm]", "evaluation.baseline_features=egemaps"],
    )
    assert recipe.feature_strings() == ["logmel", "crepe", "egemaps"]


TRICKY = st.sampled_from(["1e-5", "null", "2020-01-01", "yes", "0x1", ".5e3", "1:30"])
FINITE = st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | FINITE | st.text(max_size=8) | TRICKY,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=5,
)


@given(
    training=st.dictionaries(st.text(min_size=1, max_size=6), VALUES, max_size=3),
    pool=st.integers(1, 99) | st.just("mean"),
    seeds=st.lists(st.integers(0, 2**63), min_size=1, max_size=4, unique=True),
)
def test_dump_loads_back_equal(tmp_path_factory, training, pool, seeds):
    recipe = recipes.Recipe(
        name="x",
        features={"speech": StreamRecipe(feature="crepe#f0", pool=pool)},
        head=recipes.HeadRecipe(name="simple", config=training),
        training=training,
        evaluation=recipes.EvaluationRecipe(protocol="loso", seeds=seeds),
    )
    path = tmp_path_factory.mktemp("recipe") / "back.yaml"
    path.write_text(dump(recipe), encoding="utf-8")
    back = load_recipe(path)
    assert back == recipe
    assert back.name == "x"


def test_reading_a_recipe_does_not_import_torch(write):
    code = (
        "import sys; from mer.pipelines.recipe import load_recipe; load_recipe(sys.argv[1]);"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(write(MINIMAL))],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", recipes.names())
def test_shipped_recipe_loads_and_opens_with_purpose_and_command(name):
    recipe = load_recipe(name)
    text = recipes.read_text(name)
    assert recipe.name == name
    assert recipes.describe(name).endswith(".")
    comment = text[: text.index("\n\n")]
    assert all(line.startswith("#") for line in comment.splitlines())
    assert f"mer train-head {name}" in comment
    assert "mer extract" in comment or "mer demo" in comment


def test_shipped_recipes_keep_the_order_of_groups():
    order = ["include", "dataset", "features", "head", "training", "evaluation"]
    for name in recipes.names():
        lines = recipes.read_text(name).splitlines()
        keys = [line.partition(":")[0] for line in lines if line[:1].isalpha()]
        assert keys == sorted(keys, key=order.index), name
