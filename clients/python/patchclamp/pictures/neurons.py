"""Neurons as pictures: scores by layer, what editing a set does at growing fractions, and a census by layer."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from patchclamp.pictures.figure import new_figure
from patchclamp.results import LayerCensus, NeuronEditEffect, NeuronMeasurement

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = 3
_CLASSES = ("dead", "rare", "always", "token_detectors", "ngram_detectors", "positional")


def layer_scores_figure(layers: Sequence[int], largest: Sequence[float], mean: Sequence[float], title: str) -> "Figure":
    """Draws the largest score of each layer as a bar, and the mean of its neurons, where there is one, as a line."""
    figure = new_figure(3 + 0.2 * len(layers), 4)
    axes = figure.add_subplot()
    axes.bar(layers, largest, color="C0", label="largest")
    if mean:
        axes.plot(layers, mean, color="black", marker=".", label="mean")
        axes.legend(fontsize="small")
    axes.set_title(title)
    axes.set_xlabel("layer")
    axes.set_ylabel("score")
    axes.locator_params(axis="x", integer=True)
    return figure


def dose_response_figure(effect: NeuronEditEffect, title: str) -> "Figure":
    """Draws a panel for each metric of each test: change against the fraction edited, beside the random sets.

    Bars: the 95 % interval of the change. Band: the smallest to the largest change of the random sets, and their mean.
    """
    curves = list(effect.curves())
    columns = min(len(curves), _COLUMNS) or 1
    rows = max(1, -(-len(curves) // columns))
    figure = new_figure(1 + 4 * columns, 0.5 + 3.2 * rows)
    figure.suptitle(title)
    for i, curve in enumerate(curves):
        _draw_curve(figure.add_subplot(rows, columns, i + 1), curve)
    return figure


def census_figure(layers: Sequence[LayerCensus], title: str) -> "Figure":
    """Draws the neurons of each class in a stack for each layer. A neuron of two classes counts in both."""
    figure = new_figure(4 + 0.2 * len(layers), 4.5)
    axes = figure.add_subplot()
    at = [layer.layer for layer in layers]
    below = [0] * len(layers)
    for name in _CLASSES:
        counts = [getattr(layer, name) for layer in layers]
        if any(counts):
            axes.bar(at, counts, bottom=below, label=name.replace("_", " "))
            below = [a + b for a, b in zip(below, counts, strict=True)]
    axes.set_title(title)
    axes.set_xlabel("layer")
    axes.set_ylabel("neurons")
    axes.locator_params(axis="x", integer=True)
    if any(below):
        axes.legend(fontsize="small")
    return figure


def _draw_curve(axes: "Axes", curve: Sequence[tuple[float, NeuronMeasurement]]) -> None:
    fractions = [fraction for fraction, _ in curve]
    points = [point for _, point in curve]
    if all(point.random for point in points):
        low, high = [min(point.random) for point in points], [max(point.random) for point in points]
        axes.fill_between(fractions, low, high, color="grey", alpha=0.3, label="random sets")
        axes.plot(fractions, [point.random_mean for point in points], color="grey", linestyle="--")
    changes = [point.change for point in points]
    axes.plot(fractions, changes, color="C3", marker="o", label="the set")
    axes.vlines(fractions, [point.low for point in points], [point.high for point in points], color="C3")
    axes.axhline(0.0, color="black", linewidth=0.8)
    first = points[0]
    axes.set_title(f"{first.test}{' (side)' if first.side else ''}", fontsize="medium")
    axes.set_xlabel("fraction edited")
    axes.set_ylabel(f"change of {first.metric.replace('_', ' ')}")
    axes.legend(fontsize="x-small")
