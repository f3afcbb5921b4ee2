"""What the runs of a peer were: values of each figure, or the reason why there are none; medians, quartiles, ratios."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any

# The reason of a peer for a figure that is measured of no other than us.
ONLY_OURS = "of Patchclamp alone"


@dataclass
class Figure:
    """`values`: one a round. Without a value there is a `reason`.

    `cores`: CPU seconds over seconds of each round, which says of a noisy machine what was left for the peer."""

    values: list[float] = field(default_factory=list)
    cores: list[float] = field(default_factory=list)
    reason: str | None = None
    how: str = ""

    def card(self) -> dict[str, Any]:
        """As the result file has it: `value` is the median, or null with a reason."""
        if not self.values:
            return {"value": None, "reason": self.reason or "not measured"}
        card: dict[str, Any] = {"value": _short(median(self.values)), "rounds": len(self.values)}
        card["quartiles"] = [_short(each) for each in quartiles(self.values)]
        card["values"] = [_short(each) for each in self.values]
        if self.cores:
            card["cores"] = _short(median(self.cores))
        # One whose later rounds failed.
        return card | ({"how": self.how} if self.how else {}) | ({"reason": self.reason} if self.reason else {})


# Figure → peer → what was measured.
Figures = dict[str, dict[str, Figure]]
Cards = Mapping[str, Mapping[str, Mapping[str, Any]]]


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The first and the third; of one value, itself twice."""
    if len(values) == 1:
        return values[0], values[0]
    cuts = quantiles(values, n=4, method="inclusive")
    return cuts[0], cuts[2]


def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, Any] | None:
    """Median and quartiles of the ratios of rounds that both have: a noisy moment hits both. None without any."""
    ratios = [a / b for a, b in zip(above, below, strict=False)]
    if not ratios:
        return None
    return {"value": _short(median(ratios)), "quartiles": [_short(each) for each in quartiles(ratios)]}


def _short(value: float) -> float:
    """Four digits that count."""
    return float(f"{value:.4g}")
