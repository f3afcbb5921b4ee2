"""Vectors as pictures: what they do by strength, and how well they detect by layer."""

from typing import TYPE_CHECKING

from patchclamp.pictures.figure import new_figure
from patchclamp.results import CalibrationResult, ConceptDetection, DosePoint, FoundConceptCircuit, Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PANELS = ("effect", "perplexity", "repetition", "divergence")


def calibration_figure(result: CalibrationResult, title: str) -> "Figure":
    """Draws effect, perplexity, repetition and divergence against the strength, a line for each layer.

    Bars: 95 % intervals. Dashed: random vectors of equal norm. Horizontal: the unsteered model, and the instruction
    where there was one. Hollow points lie outside of the safe range; the star is the knee.
    """
    figure = new_figure(9, 6.5)
    figure.suptitle(title)
    for i, name in enumerate(_PANELS):
        _draw_panel(figure.add_subplot(2, 2, i + 1), result, name)
    return figure


def detection_figure(result: ConceptDetection, title: str) -> "Figure":
    """Draws the AUROC of each detector and pooling by layer, with 95 % intervals, beside random vectors (dashed)."""
    figure = new_figure(7, 4.5)
    axes = figure.add_subplot()
    for i, curve in enumerate(result.curves()):
        layers = [report.layer for report in curve]
        values = [report.auroc or Interval(0.5, 0.5, 0.5) for report in curve]
        label = f"{curve[0].name}, {curve[0].pooling.replace('_', ' ')}"
        axes.plot(layers, [v.mean for v in values], color=f"C{i % 10}", marker="o", label=label)
        axes.vlines(layers, [v.low for v in values], [v.high for v in values], color=f"C{i % 10}", alpha=0.5)
        axes.plot(layers, [report.random_auroc for report in curve], color=f"C{i % 10}", linestyle="--", alpha=0.5)
    axes.axhline(0.5, color="black", linewidth=0.8)
    axes.set_title(title)
    axes.set_xlabel("layer")
    axes.set_ylabel("AUROC (random vectors dashed)")
    axes.locator_params(axis="x", integer=True)
    axes.legend(fontsize="x-small")
    return figure


def concept_circuit_figure(result: FoundConceptCircuit, title: str) -> "Figure":
    """Draws what the neurons and heads of a circuit write along its direction, by layer; and the separation of held-out
    scenarios with nothing and with each part zeroed, beside random sets of equal size (dots)."""
    figure = new_figure(9, 4)
    figure.suptitle(title)
    written, left = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    layers = range(result.best_layer + 1)
    neurons = [sum(each.score for each in result.neurons.best if each.neuron.layer == layer) for layer in layers]
    heads = [sum(each.score for each in result.best_heads if each.head.layer == layer) for layer in layers]
    written.bar(layers, neurons, color="C0", label="neurons")
    written.bar(layers, heads, bottom=neurons, color="C1", label="heads")
    written.set_xlabel("layer")
    written.set_ylabel("written along the direction")
    written.locator_params(axis="x", integer=True)
    written.legend(fontsize="x-small")
    left.bar("nothing", result.separation, color="C2")
    for part, zeroed in result.zeroed.items():
        left.bar(part, zeroed.separation, color="C3")
        left.plot([part] * len(zeroed.random_separations), zeroed.random_separations, "k.", alpha=0.6)
    left.axhline(0, color="black", linewidth=0.8)
    left.set_xlabel("zeroed (dots: random sets)")
    left.set_ylabel("separation of held-out scenarios")
    return figure


def _draw_panel(axes: "Axes", result: CalibrationResult, name: str) -> None:
    for i, safe in enumerate(result.safe):
        color = f"C{i % 10}"
        curve = result.curve("vector", safe.layer)
        strengths = [point.strength for point in curve]
        values = [_value(point, name) for point in curve]
        axes.plot(strengths, [v.mean for v in values], color=color, label=f"layer {safe.layer}")
        axes.vlines(strengths, [v.low for v in values], [v.high for v in values], color=color, alpha=0.5)
        for point, value in zip(curve, values, strict=True):
            is_safe = safe.low <= point.strength <= safe.high
            axes.plot(point.strength, value.mean, color=color, marker="o", fillstyle="full" if is_safe else "none")
            if (point.layer, point.strength) == (result.layer, result.strength):
                axes.plot(point.strength, value.mean, color="black", marker="*", markersize=12)
        random = result.curve("random", safe.layer)
        means = [_value(point, name).mean for point in random]
        axes.plot([point.strength for point in random], means, color=color, linestyle="--", alpha=0.6)
    for arm, style in (("unsteered", "-"), ("prompt", ":")):
        if (baseline := result.baseline(arm)) is not None:
            axes.axhline(_value(baseline, name).mean, color="black", linewidth=0.8, linestyle=style, label=arm)
    axes.set_xlabel("strength")
    axes.set_ylabel(name)
    if name == "perplexity":
        axes.set_yscale("log")
    if name == _PANELS[0]:
        axes.plot([], [], color="grey", linestyle="--", label="random vectors")
        axes.plot([], [], color="black", marker="*", linestyle="none", label="knee")
        axes.legend(fontsize="x-small")


def _value(point: DosePoint, name: str) -> Interval:
    value: Interval = getattr(point, name)
    return value
