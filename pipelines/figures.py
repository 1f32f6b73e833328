"""Figures of a run, drawn with matplotlib's object interface: no global state, no display.

matplotlib is the extra ``plots``; who draws decides what its absence means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mer.cache.errors import MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150
# Above this many classes, counts under the percentages would no longer be readable.
MOST_CLASSES_WITH_COUNTS = 12


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "Figures need matplotlib, which is not installed: pip install 'mer[plots]'."
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw_confusion(
    counts: np.ndarray, classes: Sequence[str], path: Path, *, title: str = ""
) -> None:
    """Draw a confusion matrix: per cent of each true class, counts below.

    Parameters
    ----------
    counts : ndarray
        (C, C) counts, rows are true classes, columns predictions.
    classes : sequence of str
        C names.
    path : Path
        PNG to write.
    title : str, optional
        What was counted.

    Raises
    ------
    MissingDependencyError
        matplotlib is not installed.
    """
    num = len(classes)
    totals = counts.sum(axis=1, keepdims=True)
    share = np.divide(100.0 * counts, totals, out=np.zeros(counts.shape), where=totals > 0)
    side = 2.0 + 0.75 * num
    figure = _figure(side + 2.0, side + 0.4)
    axes = figure.add_subplot()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
    axes.set_xticks(range(num), classes, rotation=40, ha="right", rotation_mode="anchor")
    rows = [f"{name}  (n = {int(n)})" for name, n in zip(classes, totals[:, 0], strict=True)]
    axes.set_yticks(range(num), rows)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if title:
        figure.suptitle(title, fontsize=10)
    axes.set_xticks(np.arange(num - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(num - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="minor", length=0)
    for i, j in np.ndindex(num, num):
        # White on dark blue, black on light: readable in print and on screens.
        style: dict[str, Any] = {"ha": "center", "textcoords": "offset points", "xy": (j, i)}
        style["color"] = "white" if share[i, j] > 55 else "black"
        if num <= MOST_CLASSES_WITH_COUNTS:
            axes.annotate(f"{share[i, j]:.0f} %", xytext=(0, 1), va="bottom", fontsize=10, **style)
            axes.annotate(f"{int(counts[i, j])}", xytext=(0, -3), va="top", fontsize=7, **style)
        else:
            axes.annotate(f"{share[i, j]:.0f}", xytext=(0, 0), va="center", fontsize=8, **style)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02)
    bar.set_label("% of the true class")
    figure.savefig(path, dpi=DPI)


def draw_curves(
    histories: Sequence[Sequence[Mapping[str, Any]]],
    panels: Mapping[str, Sequence[str]],
    path: Path,
    *,
    title: str = "",
) -> None:
    """Draw training curves: every training faint, their mean bold.

    Parameters
    ----------
    histories : sequence of sequence of mapping
        One list per training, one mapping of numbers per epoch; a key may be missing.
    panels : mapping of str to sequence of str
        Title of a panel to the keys drawn in it.
    path : Path
        PNG to write.
    title : str, optional
        What was trained.

    Raises
    ------
    MissingDependencyError
        matplotlib is not installed.
    """
    figure = _figure(5.2 * max(len(panels), 1), 3.8)
    from matplotlib.ticker import MaxNLocator

    for position, (name, keys) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), position)
        for index, key in enumerate(keys):
            colour = f"C{index}"
            curves = [_curve(history, key) for history in histories]
            longest = max((len(curve) for curve in curves), default=0)
            if longest == 0:
                continue
            epochs = np.arange(1, longest + 1)
            stacked = np.full((len(curves), longest), np.nan)
            for row, curve in zip(stacked, curves, strict=True):
                row[: len(curve)] = curve
                axes.plot(epochs, row, color=colour, alpha=0.18, linewidth=0.8)
            known = ~np.isnan(stacked)
            mean = np.nansum(stacked, axis=0) / np.maximum(known.sum(axis=0), 1)
            mean[~known.any(axis=0)] = np.nan
            axes.plot(epochs, mean, color=colour, linewidth=2, label=key.replace("_", " "))
        axes.set_xlabel("epoch")
        axes.set_title(name, fontsize=10)
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if axes.get_legend_handles_labels()[1]:
            axes.legend(frameon=False, fontsize=8)
    if title:
        figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=DPI)


def _curve(history: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [float(epoch[key]) if epoch.get(key) is not None else np.nan for epoch in history]
