"""What sparse policies cost and save: perplexity ratio (log scale) against bytes read, and against measured speed."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

from patchclamp.pictures.figure import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Drawn in grey: they are controls, not policies to serve.
CONTROLS = ("random", "random_set", "oracle")
_MARKERS = "os^vDP*Xh<>p"
# Without a grey.
_COLOURS = ("C0", "C1", "C2", "C3", "C4", "C5", "C6", "C8", "C9", "navy", "gold", "black", "lime")


@dataclass(frozen=True)
class QualityPoint:
    """Holds what a policy costs and saves at one keep ratio.

    bytes_read: weight bytes of a token over those of the dense model. speedup: None when it was not measured.
    """

    keep: float
    perplexity_ratio: float
    bytes_read: float
    speedup: float | None


Series = Mapping[str, Sequence[QualityPoint]]


def series_of(text: str) -> Series:
    """Returns the points of each policy, by falling keep ratio.

    text: JSON of `sparsity evaluate --json` (a list of evaluations), or with {"table": {policy: {keep: card}}} in it,
    as benchmarks/sparse writes. Raises ValueError for anything else.
    """
    found = json.loads(text)
    try:
        points = list(_of_evaluations(found) if isinstance(found, list) else _of_table(found["table"]))
    except (KeyError, TypeError, AttributeError):
        raise ValueError(
            'expected a list of evaluations, as of `sparsity evaluate --json`, or {"table": {policy: {keep: card}}}'
        ) from None
    if not points:
        raise ValueError("there are no evaluations in it")
    series: dict[str, dict[float, QualityPoint]] = {}
    for name, point in points:
        series.setdefault(name, {}).setdefault(point.keep, point)
    return {name: [by_keep[keep] for keep in sorted(by_keep, reverse=True)] for name, by_keep in series.items()}


def quality_figure(series: Series) -> "Figure":
    """Draws a line for each policy: against bytes read, and beside it against speed-up where any was measured."""
    timed = any(point.speedup is not None for points in series.values() for point in points)
    figure = new_figure(16 if timed else 9, 7)
    columns = 2 if timed else 1
    left = figure.add_subplot(1, columns, 1)
    left.set_xlabel("weight bytes read, of dense")
    _draw(left, {name: [(p, p.bytes_read) for p in points] for name, points in series.items()})
    if timed:
        right = figure.add_subplot(1, columns, 2, sharey=left)
        right.set_xlabel("speed-up over dense, measured")
        _draw(
            right,
            {n: [(p, p.speedup) for p in points if p.speedup is not None] for n, points in series.items()},
        )
    left.legend(loc="best", fontsize="small")
    return figure


def _draw(axes: "Axes", series: Mapping[str, Sequence[tuple[QualityPoint, float]]]) -> None:
    axes.set_yscale("log", subs=(2, 5))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_ylabel("perplexity, over dense")
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.grid(which="both", alpha=0.3)
    for (name, points), marker, colour in zip(series.items(), cycle(_MARKERS), cycle(_COLOURS), strict=False):
        if not points:
            continue
        control = name in CONTROLS
        axes.plot(
            [x for _, x in points],
            [point.perplexity_ratio for point, _ in points],
            label=name,
            marker=marker,
            color="grey" if control else colour,
            linestyle="--" if control else "-",
        )
        for point, at in points:
            axes.annotate(
                f"{point.keep:g}", (at, point.perplexity_ratio), (3, 3), textcoords="offset points", fontsize="xx-small"
            )


def _of_table(table: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Iterator[tuple[str, QualityPoint]]:
    for policy, cards in table.items():
        for keep, card in cards.items():
            yield policy, _point(float(keep), card, card.get("speedup"))


def _of_evaluations(evaluations: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, QualityPoint]]:
    for evaluation in evaluations:
        keep = evaluation["keep_ratio"]
        speed = evaluation["speed"]
        yield _name(evaluation), _point(keep, evaluation["quality"], speed and speed["speedup"])
        yield "random", _point(keep, evaluation["random_control"], None)


def _point(keep: float, card: Mapping[str, Any], speedup: float | None) -> QualityPoint:
    return QualityPoint(keep, card["perplexity_ratio"], card["bytes_read_16"], speedup)


def _name(evaluation: Mapping[str, Any]) -> str:
    """Returns the policy with the settings that are neither the ratio nor the profile, such as fovea:bits=2."""
    policy, spec = str(evaluation["policy"]), str(evaluation.get("spec", ""))
    settings = spec.partition(":")[2].split(",") if spec.startswith(f"{policy}:") else []
    told = [each for each in settings if each and not each.startswith(("keep_ratio=", "profile="))]
    return f"{policy}:{','.join(told)}" if told else policy
