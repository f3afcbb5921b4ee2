"""Probes as a picture: the reliability of a probability."""

from typing import TYPE_CHECKING

from patchclamp.pictures.figure import new_figure
from patchclamp.results import ProbeReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def reliability_figure(report: ProbeReport, title: str) -> "Figure":
    """Draws the share of texts with the label against the probability that the probe gave them, and how many they are.

    On the diagonal a probability is what it says. ValueError for a probe of numbers, which has none.
    """
    bins = report.reliability
    if not bins:
        raise ValueError("a probe of numbers has no probability to draw")
    figure = new_figure(5, 5.5)
    curve, counts = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    curve.plot((0, 1), (0, 1), color="grey", linestyle="--", linewidth=0.8, label="calibrated")
    probabilities = [each.mean_probability for each in bins]
    curve.plot(probabilities, [each.share for each in bins], color="C0", marker="o", label="probe")
    curve.set_title(f"{title}: Brier {report.brier:.3f}, base rate {report.brier_base_rate:.3f}", fontsize="medium")
    curve.set_ylabel("share with the label")
    curve.set_xlim(0, 1)
    curve.set_ylim(-0.02, 1.02)
    curve.legend(fontsize="small")
    lefts, widths = [each.low for each in bins], [each.high - each.low for each in bins]
    counts.bar(lefts, [each.texts for each in bins], width=widths, align="edge", color="C0", edgecolor="white")
    counts.set_xlabel("probability")
    counts.set_ylabel("texts")
    return figure
