"""The README speaks of commands, recipes, features and files that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import numpy as np
import pytest
import soundfile

from mer.cache import Cache
from mer.cli import main
from mer.extract.registry import names, parse_feature
from mer.pipelines.extraction import extract
from mer.pipelines.manifest import read_manifest
from mer.pipelines.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^\$ mer (.+?)(?:\s+#.*)?$", README, flags=re.MULTILINE)

IMPORTED = f"imported:name=theirs,format=npy,content={'0' * 32},outputs=features/4/float32"


def parse(argv: list[str]) -> dict[str, object]:
    """Return the parameters that click reads, without running anything."""
    command: click.Command = main
    while isinstance(command, click.Group):
        command, argv = command.commands[argv[0]], argv[1:]
    return command.make_context("mer", argv).params


def test_there_are_commands():
    assert len(COMMANDS) >= 6


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_of_the_readme_parses_and_names_what_exists(line):
    params = parse(shlex.split(line.replace("$FEATURE", IMPORTED)))
    recipes = [params["recipe"]] if "recipe" in params else params.get("recipe_names", ())
    for recipe in recipes:
        load_recipe(recipe, params.get("overrides", ()))
    for feature in params.get("features", ()):
        assert parse_feature(feature).name in names()


def test_every_feature_it_mentions_is_registered():
    (sentence,) = re.findall(r"A feature is a name with options: (.+?)\. Hub", README, re.DOTALL)
    features = re.findall(r"`([^`]+)`", sentence)
    assert len(features) >= 5
    for feature in features:
        assert parse_feature(feature.replace("\n", " ")).name in names()


def test_every_link_leads_to_a_file():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    assert all((ROOT / link).exists() for link in links if "://" not in link), links


def test_the_python_example_runs(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.+?)```", README, re.DOTALL)
    samples = np.random.default_rng(0).uniform(-0.3, 0.3, (3, 4_000)).astype(np.float32)
    for number, clip in enumerate(samples):
        soundfile.write(tmp_path / f"{number}.wav", clip, 16_000)
    (tmp_path / "my.csv").write_text("path\n0.wav\n1.wav\n2.wav\n")
    monkeypatch.chdir(tmp_path)
    cache = Cache("features")
    extract(read_manifest("my.csv"), ["logmel"], cache, device="cpu")
    (store,) = re.findall(r'open\("(.+?)"\)', code)
    names: dict[str, object] = {}
    exec(compile(code.replace(store, cache.stores()[0].url), "README.md", "exec"), names)
    data, lengths = names["data"], names["lengths"]
    assert data.shape == (3, int(lengths.max()), 80)
    (stored,) = cache.stores()
    assert sorted(names["keys"].values()) == sorted(stored.keys())
    frames = np.concatenate([stored.frames(key) for key in stored.keys()])  # noqa: SIM118
    np.testing.assert_allclose(names["mean"], frames.mean(axis=0, dtype=np.float64), rtol=1e-5)


def test_the_example_of_imported_features_trains(tmp_path, monkeypatch, capsys):
    (example,) = re.findall(r"```console\n(\$ mer cache import their.+?)```", README, re.DOTALL)
    lines = [line.removeprefix("$ ") for line in example.splitlines()]
    assert [line.split()[0] for line in lines] == ["mer", "FEATURE=$(mer", "mer"]
    rng = np.random.default_rng(0)
    rows = ["id,path,label,speaker"]
    (tmp_path / "their-FRA").mkdir()
    for number in range(12):
        name = f"u{number}"
        clip = rng.uniform(-0.3, 0.3, 1_600 + number).astype(np.float32)
        soundfile.write(tmp_path / f"{name}.wav", clip, 16_000)
        np.save(tmp_path / "their-FRA" / name, rng.standard_normal((5, 4)).astype(np.float32))
        rows.append(f"{name},{name}.wav,{'sad' if number % 2 else 'happy'},s{number // 4}")
    (tmp_path / "my.csv").write_text("\n".join(rows) + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MER_CACHE", str(tmp_path / "cache"))

    def mer(line: str) -> str:
        with pytest.raises(SystemExit, match="^0$"):
            main(args=shlex.split(line)[1:])
        return capsys.readouterr().out

    mer(lines[0])
    command, _, filter_ = lines[1].removeprefix("FEATURE=$(").removesuffix(")").partition(" | ")
    assert filter_ == "sed -n 's/^feature: //p'"
    (feature,) = re.findall("^feature: (.+)$", mer(command), re.MULTILINE)
    quick = " --set training.epochs=1 --seeds 1 --device cpu"
    assert "run: " in mer(lines[2].replace("$FEATURE", feature) + quick)


def test_the_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"(?:`|\$ )make ([a-z-]+)", README))
    assert targets >= {"demo", "test", "table", "bench", "lint"}
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
