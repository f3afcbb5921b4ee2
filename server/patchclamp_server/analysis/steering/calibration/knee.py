"""The range of strengths in which text stays coherent, and the knee of the effect within it.

    safe range   from 0 outwards, on either side, the last strength before the first one at which the perplexity ratio
                 or the repetition of the text is above its bound
    knee         argmax over strengths s of g(s) / max g - |s| / max |s|        g: the effect less that of the
                 unsteered model, at the strengths of one side within the safe range

The knee is where the curve has got farthest ahead of a straight line. A curve that is hardly ahead of one anywhere (by
less than MIN_LEAD) has none: its strength is the one with the largest effect.

Source: Satopää et al. 2011, Finding a "Kneedle" in a Haystack: Detecting Knee Points in System Behavior.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from patchclamp_server.interventions.safe_strengths import SafeRange

MIN_LEAD = 0.1


class Dose(NamedTuple):
    """`is_coherent`: within both bounds. `effect`, that of random vectors beside it: less the unsteered model's."""

    strength: float
    is_coherent: bool
    effect: float
    random_effect: float


class Knee(NamedTuple):
    layer: int
    dose: Dose


def safe_range(doses: Sequence[Dose]) -> SafeRange:
    """Returns the range of a layer, whose doses are in any order; an end is 0 where no strength on its side is safe."""
    return SafeRange(0.0 - _reached([(-d.strength, d) for d in doses]), _reached([(d.strength, d) for d in doses]))


def best_knee(by_layer: Mapping[int, Sequence[Dose]]) -> Knee | None:
    """Returns the knee, among those of all layers and sides of 0, whose effect is farthest beyond that of random
    vectors; None where no safe strength has more effect than none."""
    knees = []
    for layer, doses in by_layer.items():
        safe = safe_range(doses)
        for side in (1.0, -1.0):
            own = [d for d in doses if safe.low <= d.strength <= safe.high and side * d.strength > 0]
            if (found := knee(own)) is not None:
                knees.append(Knee(layer, found))
    return max(knees, key=lambda k: k.dose.effect - k.dose.random_effect, default=None)


def knee(doses: Sequence[Dose]) -> Dose | None:
    """Returns the dose at the knee of those of one side of 0; None where none of them has an effect above 0."""
    most = max((d.effect for d in doses), default=0.0)
    if most <= 0.0:
        return None
    largest = max(abs(d.strength) for d in doses)
    leads = [d.effect / most - abs(d.strength) / largest for d in doses]
    if max(leads) < MIN_LEAD:
        return max(doses, key=lambda d: d.effect)
    return doses[leads.index(max(leads))]


def _reached(outwards: Sequence[tuple[float, Dose]]) -> float:
    reached = 0.0
    for distance, dose in sorted(outwards, key=lambda each: each[0]):
        if distance > 0.0:
            if not dose.is_coherent:
                break
            reached = distance
    return reached
