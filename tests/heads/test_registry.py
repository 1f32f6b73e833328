from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any, Literal

import pytest

from mer.heads import registry
from mer.heads.contract import Head
from mer.heads.mdat_ser import Simple
from mer.heads.settings import build


def test_every_listed_head_is_one_and_lies_in_the_folder() -> None:
    folder = Path(registry.__file__).parent
    for name, where in registry.HEADS.items():
        module = where.partition(":")[0].rpartition(".")[2]
        assert (folder / f"{module}.py").is_file(), name
        assert issubclass(registry.resolve(name), Head)


def test_every_head_of_the_folder_is_listed() -> None:
    folder = Path(registry.__file__).parent
    listed = {where.partition("mer.heads.")[2] for where in registry.HEADS.values()}
    defined = {
        f"{path.stem}:{name}"
        for path in folder.glob("*.py")
        for name in re.findall(r"^class (\w+)\(Head\)", path.read_text(), re.MULTILINE)
    }
    assert defined == listed


def test_registry_does_not_import_torch() -> None:
    check = "import sys, mer.heads.registry as r; r.names(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_unknown_head_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"Unknown head 'simpel'. Did you mean 'simple'\?"):
        registry.create("simpel", {}, {"speech": 4}, 2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"droput": 0.1}, "Head 'mdat': unknown key 'droput'. Did you mean 'dropout'?"),
        ({"width": "big"}, "width must be an integer. Got 'big'."),
        ({"width": 3.5}, "width must be an integer. Got 3.5."),
        ({"width": True}, "width must be an integer. Got True."),
        ({"mask": 1}, "mask must be true or false. Got 1."),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1. Got 1.0."),
        ({"width": 12}, "width must be a multiple of num_heads. Got 12 and 8."),
        ({"hidden": 0}, "hidden must be at least 1. Got 0."),
        ({"pooling": "max"}, "pooling must be 'attentive' or 'mean'. Got 'max'."),
        ({"zzz": 1, "mask": "no"}, "mask must be true or false. Got 'no'."),
    ],
)
def test_bad_settings_are_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        registry.configure("mdat", config)


def test_all_faults_are_reported_together() -> None:
    with pytest.raises(ValueError, match="widht.*hiden.*dropout must be a number"):
        registry.configure("simple", {"widht": 1, "hiden": 2, "dropout": None})


def test_no_class_to_predict_is_refused() -> None:
    with pytest.raises(ValueError, match="num_classes must be at least 1. Got 0"):
        registry.create("simple", {}, {"speech": 4}, 0)


def entry(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    point = EntryPoint("mine", value, registry.ENTRY_POINTS)

    def found(group: str) -> EntryPoints:
        assert group == "mer.heads"
        return EntryPoints([point])

    monkeypatch.setattr(registry, "entry_points", found)


def test_third_parties_add_heads_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    entry(monkeypatch, "mer.heads.mdat_ser:Simple")
    assert "mine" in registry.names()
    assert isinstance(registry.create("mine", {}, {"speech": 4}, 2), Simple)


def test_an_entry_point_that_is_no_head_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    entry(monkeypatch, "pathlib:Path")
    with pytest.raises(ValueError, match="Entry point 'mine'.*no subclass"):
        registry.resolve("mine")


@dataclass(frozen=True, kw_only=True)
class Settings:
    layers: tuple[int, ...]
    pair: tuple[int, str] = (0, "")
    rate: float | None = None
    mode: Literal["a", 1] = "a"


def test_lists_become_tuples_and_integers_floats() -> None:
    built = build(Settings, {"layers": [1, 2], "pair": [3, "x"], "rate": 2, "mode": 1})
    assert built == Settings(layers=(1, 2), pair=(3, "x"), rate=2.0, mode=1)
    assert type(built.rate) is float
    assert build(Settings, {"layers": (), "rate": None}).rate is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "layers is missing."),
        ({"layers": [1, "x"]}, "layers must be a list, each item an integer. Got [1, 'x']."),
        ({"layers": 3}, "layers must be a list, each item an integer. Got 3."),
        ({"layers": [], "pair": [1]}, "pair must be a list of 2: an integer, a string. Got [1]."),
        ({"layers": [], "rate": "fast"}, "rate must be a number or null. Got 'fast'."),
        ({"layers": [], "mode": True}, "mode must be 'a' or 1. Got True."),
    ],
)
def test_wrong_types_are_described(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build(Settings, settings)
