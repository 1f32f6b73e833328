"""`mer demo`: the whole path by itself, on a corpus cut small and heads trained for one epoch."""

from __future__ import annotations

import importlib.util
import json

import pytest

from mer.pipelines import demo
from mer.pipelines.corpora.demo import DemoConfig, synthesise
from mer.pipelines.recipe import load_recipe


@pytest.mark.parametrize("installed", [True, False])
def test_opensmile_takes_part_where_it_is_installed(monkeypatch, installed):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    recipes = demo.demo_recipes()
    assert [recipe.name for recipe in recipes] == list(demo.RECIPES)
    for recipe in recipes:
        assert ("egemaps" in recipe.feature_strings()) == installed
        assert "logmel" in recipe.feature_strings()
        assert "crepe:model=tiny" in recipe.feature_strings()


def test_demo_goes_from_synthesis_to_a_vote_and_reuses_features(tmp_path, monkeypatch):
    synthesise(tmp_path / "corpus", DemoConfig(num_speakers=4, num_sentences=1))
    small = ["features.pitch=null", "training.epochs=1", "evaluation.seeds=1", "head.width=8"]
    recipe = load_recipe("simple-demo", small)
    monkeypatch.setattr(demo, "demo_recipes", lambda: [recipe, recipe])
    said = []
    first = demo.run_demo(tmp_path, device="cpu", say=said.append)
    again = demo.run_demo(tmp_path, device="cpu")
    assert "synthetic" in said[0]
    assert (first.extraction.report.computed, again.extraction.report.computed) == (16, 0)
    assert [run.run.name for run in first.runs] == ["simple-demo", "simple-demo-2"]
    assert first.vote.metrics == again.vote.metrics
    shown = json.loads(json.dumps(first.to_json()))
    assert shown["synthetic"] is True
    assert len(shown["vote"]["members"]) == 2
    assert first.to_text().endswith(demo.SYNTHETIC)
