"""Strengths that CalibrateVector found safe for a vector, as its evidence card keeps them; the warning about others.

    evidence["calibration"][application]["safe"] = [{"layer": 3, "low": -1.0, "high": 4.0}, ...]

A range is of the factor of the stored vector v at its own layer, edited there alone; of a rotation it is of the angle
in radians. What counts is how far an edit moves: one whose vector was scaled to length 1 is within the range where its
strength is within |v| times the range. With `preserve_norm` the range is the same, since a state is turned just as far.
"""

import math
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any, NamedTuple, TypeGuard

from patchclamp_server.interventions.request_warnings import RequestWarning, WarningCode

CALIBRATION = "calibration"
# Relative: a strength that a client computes, such as high * |v|, is not exactly the one that was measured.
ROUNDING = 1e-5


class Application(Enum):
    """How a vector is applied. The value is the name of the edit."""

    ADD = "add"
    ROTATE_TOWARDS = "rotate_towards"
    REPLACE = "replace"


class SafeRange(NamedTuple):
    low: float
    high: float

    def times(self, factor: float) -> "SafeRange":
        return SafeRange(self.low * factor, self.high * factor)

    def holds(self, strength: float) -> bool:
        room = ROUNDING * max(abs(self.low), abs(self.high))
        return self.low - room <= strength <= self.high + room


def stored_range(evidence: Mapping[str, Any], application: Application, layer: int) -> SafeRange | None:
    """Returns the range of a layer, None where the card has none: an uploaded card is whatever its file says."""
    cards = evidence.get(CALIBRATION)
    card = cards.get(application.value) if isinstance(cards, dict) else None
    ranges = card.get("safe") if isinstance(card, dict) else None
    for each in ranges if isinstance(ranges, list) else ():
        if isinstance(each, dict) and each.get("layer") == layer:
            low, high = each.get("low"), each.get("high")
            if _is_number(low) and _is_number(high):
                return SafeRange(float(low), float(high))
    return None


def beyond_safe_range(
    index: int, name: str, safe: Mapping[int, SafeRange], strengths: Iterable[float]
) -> tuple[RequestWarning, ...]:
    """Returns a warning about the first strength of an edit that lies outside of the range of one of its layers."""
    for strength in strengths:
        for layer, allowed in sorted(safe.items()):
            if not allowed.holds(strength):
                message = (
                    f"edit {name!r} has strength {strength:g} at layer {layer}; its vector was found safe from "
                    f"{allowed.low:g} to {allowed.high:g} there: others broke the text, or were not tried"
                )
                return (RequestWarning(WarningCode.BEYOND_SAFE_RANGE, f"program.edits[{index}]", message),)
    return ()


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
