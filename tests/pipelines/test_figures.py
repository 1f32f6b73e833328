"""Figures are drawn without global state, for odd inputs too."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from mer.cache.errors import MissingDependencyError
from mer.pipelines.figures import draw_confusion, draw_curves

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("num", [1, 2, 8, 15])
def test_confusion_is_a_png_that_grows_with_classes(tmp_path, num):
    pytest.importorskip("matplotlib", reason="needs the extra 'plots'")
    counts = np.arange(num * num).reshape(num, num)
    counts[-1] = 0  # a class that the test part does not have
    path = tmp_path / "c.png"
    draw_confusion(counts, [f"class-{i}" for i in range(num)], path, title="two\nlines")
    assert path.read_bytes().startswith(PNG)
    width, height = np.frombuffer(path.read_bytes()[16:24], dtype=">u4")
    assert height >= 150 * 0.75 * num
    assert width > height


def test_curves_take_trainings_of_unequal_length_and_gaps(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra 'plots'")
    histories = [
        [{"loss": 1.0, "validation_loss": None}, {"loss": 0.5}],
        [{"loss": 2.0}],
    ]
    path = tmp_path / "k.png"
    draw_curves(histories, {"loss": ["loss", "validation_loss"], "none": ["absent"]}, path)
    assert path.read_bytes().startswith(PNG)


def test_drawing_leaves_no_global_figure(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra 'plots'")
    draw_confusion(np.eye(2, dtype=int), ["a", "b"], tmp_path / "c.png")
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or pyplot.get_fignums() == []


def test_missing_matplotlib_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'mer\[plots\]'"):
        draw_confusion(np.eye(2, dtype=int), ["a", "b"], tmp_path / "c.png")
