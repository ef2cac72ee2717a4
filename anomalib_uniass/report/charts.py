# SPDX-License-Identifier: Apache-2.0
"""Charts of a page: SVG that takes the page's own text colour, so that they suit a dark page and a light one."""

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from anomalib_uniass.text import one_line, storable

GOOD, DEFECTIVE = "#3b82d0", "#e0663a"
MODELS = ("#3b82d0", "#e0663a", "#2f9e6e", "#b06fc9", "#b8901f", "#5f7f8f")
"""Colours of models in the order of their tests; with more of them they repeat."""

_TEXT = "#010203"
"""Stands for the page's text colour while Matplotlib draws."""

_STYLE: Any = {  # Matplotlib types its settings by their names
    "svg.fonttype": "none",  # text stays text: small, and in the page's own font
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _TEXT),
}

Points = Sequence[Sequence[float]]
"""Points (recall, precision)."""


def category_chart(
    good: Sequence[float], defective: Sequence[float], threshold: float | None, curve: Points, *, name: str
) -> str:
    """Draw the image scores of a category, and the precision-recall curve of its pixels if there is one.

    Args:
        good: Scores of the good images.
        defective: Scores of the defective ones.
        threshold: Score above which an image is called defective.
        curve: Precision-recall curve of the pixels.
        name: Of the category; keeps the identifiers of several charts in a page apart.
    """
    with mpl.rc_context(_STYLE | {"svg.hashsalt": storable(name)}):
        figure = Figure(figsize=(6.4, 2.4))
        figure.subplots_adjust(left=0.08, right=0.97, bottom=0.2, top=0.85, wspace=0.25)  # quicker than a layout engine
        scores, pixels = figure.subplots(1, 2)
        _draw_scores(scores, good, defective, threshold)
        figure.legend(loc="upper left", ncols=2, frameon=False)
        _draw_curves(pixels, {"": curve})
        return _svg(figure)


def comparison_chart(models: Mapping[str, Mapping[str, Any]], *, name: str) -> str:
    """Draw the image scores of a category for every model, and their precision-recall curves in one.

    Args:
        models: By model the keys ``good``, ``defective``, ``threshold`` and ``curve``, as of :func:`category_chart`.
        name: Of the category.
    """
    with mpl.rc_context(_STYLE | {"svg.hashsalt": storable(name)}):
        figure = Figure(figsize=(2.2 * (len(models) + 1) + 1, 2.3), layout="constrained")
        *histograms, pixels = figure.subplots(1, len(models) + 1)
        for axes, (model, found) in zip(histograms, models.items(), strict=True):
            _draw_scores(axes, found["good"], found["defective"], found["threshold"])
            axes.set_title(model, fontsize=9, parse_math=False)
        _draw_curves(pixels, {model: found["curve"] for model, found in models.items()})
        return _svg(figure)


def bar_chart(values: Mapping[str, Mapping[str, float]], *, label: str, png: Path | None = None) -> str:
    """Draw a value of each category as bars grouped by model.

    Args:
        values: Values in percent by model and category, NaN where there is none.
        label: What they are.
        png: File to write the chart to, too.
    """
    categories = list(dict.fromkeys(category for row in values.values() for category in row))
    with mpl.rc_context(_STYLE | {"svg.hashsalt": label}):
        figure = Figure(figsize=(4 + 0.15 * len(categories) * (len(values) + 1), 4), layout="constrained")
        axes, width = figure.subplots(), 0.8 / len(values)
        for i, (model, row) in enumerate(values.items()):
            places = np.arange(len(categories)) + (i - (len(values) - 1) / 2) * width
            axes.bar(places, [row.get(c, np.nan) for c in categories], width, label=model, color=_colour(i))
        # Names may have a $, which would begin a formula.
        names = [one_line(category) for category in categories]
        axes.set_xticks(range(len(categories)), names, rotation=45, ha="right", parse_math=False)
        axes.set_ylabel(label)
        columns = max(1, min(3, 60 // max(map(len, values))))  # as many as names have room
        figure.legend(loc="outside upper center", ncols=columns, frameon=False)
        if png is not None:
            figure.savefig(png, dpi=150)
        return _svg(figure)


def _draw_scores(axes: Axes, good: Sequence[float], defective: Sequence[float], threshold: float | None) -> None:
    everything = [*good, *defective, *([] if threshold is None else [threshold])]
    edges = np.linspace(min(everything), max(everything), 31).tolist() if min(everything) < max(everything) else 30
    for scores, colour, label in ((good, GOOD, "good"), (defective, DEFECTIVE, "defective")):
        axes.hist(scores, edges, histtype="stepfilled", color=colour, alpha=0.7, label=f"{label} ({len(scores)})")
    if threshold is not None:
        axes.axvline(threshold, color=_TEXT, linestyle="--", linewidth=1)
    axes.set_xlabel("image score")
    axes.set_ylabel("images")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_curves(axes: Axes, curves: Mapping[str, Points]) -> None:
    if not any(curves.values()):
        axes.set_axis_off()
        return
    for i, (model, curve) in enumerate(curves.items()):
        if curve:
            recall, precision = zip(*curve, strict=True)
            axes.plot(recall, precision, color=_colour(i) if model else DEFECTIVE, label=model or None)
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall of pixels", ylabel="precision")
    if any(curves):
        axes.legend(frameon=False, fontsize=8)


def _colour(number: int) -> str:
    return MODELS[number % len(MODELS)]


def _svg(figure: Figure) -> str:
    """Return a figure as an SVG element in the page's text colour."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    element = text[text.index("<svg") :].replace(_TEXT, "currentColor")
    return re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
