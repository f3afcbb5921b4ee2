"""When: the projection h·v/|v| (or the cosine) of an activation, compared with a threshold.

Values of read_projection and of watched directions are on the same scale: what was read there can be a threshold here.
"""

from typing import Literal

from patchclamp.fields import build, build_as
from patchclamp.names import SITES, STORED_THRESHOLDS, SiteName, value_of
from patchclamp.programs.scopes import ScopeLike, scope_message
from patchclamp.programs.vectors import VectorLike, vector_of
from patchclamp.v1 import program_pb2 as pb

# "midpoint": half-way between both sides of the pairs that a stored vector was extracted from, at this site and layer.
Threshold = float | Literal["midpoint"]


def when(
    direction: VectorLike,
    *,
    layer: int,
    site: SiteName = "resid_post",
    above: Threshold | None = None,
    below: Threshold | None = None,
    cosine: bool = False,
    latched: bool = False,
    scope: ScopeLike | None = None,
) -> pb.Gate:
    """Returns a gate of an edit, which is open where the condition holds; latched: also at every later token.

    The condition's site must come before the edit's in the forward pass. Exactly one of `above` and `below` is given: a
    number, or "midpoint" of the evidence of a stored vector. That is a threshold of pooled states, and a gate sees
    single tokens: `positive_tokens` and `negative_tokens` of the evidence say where those lie.
    """
    condition = _condition(direction, layer, site, above, below, cosine, scope)
    return build(pb.Gate, condition=condition, latched=latched)


def abort_when(
    direction: VectorLike,
    *,
    layer: int,
    site: SiteName = "resid_post",
    above: Threshold | None = None,
    below: Threshold | None = None,
    cosine: bool = False,
    scope: ScopeLike | None = None,
    name: str = "",
) -> pb.AbortCondition:
    """Ends the stream with ABORTED as soon as the condition holds. The threshold is given as in when()."""
    condition = _condition(direction, layer, site, above, below, cosine, scope)
    return build(pb.AbortCondition, name=name, condition=condition)


def when_probe(
    probe: str,
    *,
    above: float | None = None,
    below: float | None = None,
    latched: bool = False,
    scope: ScopeLike | None = None,
) -> pb.Gate:
    """Returns a gate of an edit, which is open where the probability of a stored probe is above or below a number; of a
    probe of numbers, where its number is. By default it is a probability above 0.5.

    The probe has one layer, which must come before the edit in the forward pass, and two labels or a number. A gate
    sees single tokens, also where the probe was trained on pooled states. latched: also open at every later token.
    """
    return build(pb.Gate, condition=_probability(probe, above, below, scope), latched=latched)


def abort_when_probe(
    probe: str,
    *,
    above: float | None = None,
    below: float | None = None,
    scope: ScopeLike | None = None,
    name: str = "",
) -> pb.AbortCondition:
    """Ends the stream with ABORTED as soon as the condition holds, which is given as in when_probe()."""
    return build(pb.AbortCondition, name=name, condition=_probability(probe, above, below, scope))


def _probability(probe: str, above: float | None, below: float | None, scope: ScopeLike | None) -> pb.Condition:
    if above is not None and below is not None:
        raise ValueError("give one of above and below")
    threshold, given = (below, "below") if above is None and below is not None else (above, "above")
    comparison = pb.COMPARISON_BELOW if given == "below" else pb.COMPARISON_ABOVE
    condition = build(pb.Condition, probe=probe, comparison=comparison, scope=scope_message(scope))
    if threshold is not None:
        condition.MergeFrom(build_as({"threshold": given}, pb.Condition, threshold=threshold))
    return condition


def _condition(
    direction: VectorLike,
    layer: int,
    site: SiteName,
    above: Threshold | None,
    below: Threshold | None,
    cosine: bool,
    scope: ScopeLike | None,
) -> pb.Condition:
    if above is not None and below is None:
        comparison, threshold, given = pb.COMPARISON_ABOVE, above, "above"
    elif below is not None and above is None:
        comparison, threshold, given = pb.COMPARISON_BELOW, below, "below"
    else:
        raise ValueError("give exactly one of above and below")
    condition = build(
        pb.Condition,
        site=value_of(SITES, site, "site"),
        layer=layer,
        vector=vector_of(direction, "direction"),
        comparison=comparison,
        cosine=cosine,
        scope=scope_message(scope),
    )
    if isinstance(threshold, str):
        condition.stored_threshold = value_of(STORED_THRESHOLDS, threshold, given)
    else:
        condition.MergeFrom(build_as({"threshold": given}, pb.Condition, threshold=threshold))
    return condition
