from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest

from mer.cache.errors import UnknownNameError, UsageError
from mer.extract.contract import Extractor
from mer.extract.registry import EXTRACTORS, create, parse_feature


@pytest.mark.parametrize(
    ("text", "name", "options", "output"),
    [
        ("logmel", "logmel", {}, None),
        ("crepe:model=tiny#f0_code", "crepe", {"model": "tiny"}, "f0_code"),
        (
            "wavlm:layers=6,9,12,dtype=float32",
            "wavlm",
            {"layers": "6,9,12", "dtype": "float32"},
            None,
        ),
        ("hubert:model=/a b/c=d", "hubert", {"model": "/a b/c=d"}, None),
    ],
)
def test_feature_strings_parse(text, name, options, output):
    request = parse_feature(text)
    assert (request.name, dict(request.options), request.output) == (name, options, output)
    assert parse_feature(str(request)) == request


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no extractor name"),
        (":model=tiny", "no extractor name"),
        ("crepe:tiny", "'tiny' is not KEY=VALUE"),
        ("crepe:model=tiny,model=full", "gives option 'model' twice"),
        ("crepe:model=", "option 'model' has no value"),
        ("crepe#", "without an output name"),
    ],
)
def test_malformed_feature_strings_say_what_is_wrong(text, message):
    with pytest.raises(UsageError, match=message):
        parse_feature(text)


def test_an_unknown_feature_suggests_the_nearest():
    with pytest.raises(UnknownNameError, match="Unknown feature 'logmell'. Did you mean 'logmel'"):
        create("logmell")


def test_an_unknown_option_suggests_the_nearest():
    with pytest.raises(
        UnknownNameError, match="Unknown option of feature 'crepe' 'modle'.*'model'"
    ):
        create("crepe:modle=tiny")


def test_the_table_names_classes_that_exist():
    for target, _ in EXTRACTORS.values():
        module, _, attribute = target.partition(":")
        assert issubclass(getattr(import_module(module), attribute), Extractor)


def test_planning_imports_no_torch():
    code = (
        "import sys; from mer.extract.registry import create; create('logmel'); create('crepe');"
        "import mer.extract.plan, mer.pipelines.extraction, mer.cache.store;"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
