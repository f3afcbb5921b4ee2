"""When: the projection (or cosine) of an activation on a unit vector, compared with a threshold."""

from patchclamp.fields import build, build_as
from patchclamp.names import SITES, SiteName, value_of
from patchclamp.programs.scopes import ScopeLike, scope_message
from patchclamp.programs.vectors import VectorLike, vector_of
from patchclamp.v1 import program_pb2 as pb


def when(
    direction: VectorLike,
    *,
    layer: int,
    site: SiteName = "resid_post",
    above: float | None = None,
    below: float | None = None,
    cosine: bool = False,
    latched: bool = False,
    scope: ScopeLike | None = None,
) -> pb.Gate:
    """Gate of an edit: open where the condition holds; latched: and at every later token of the sequence.

    The condition's site must come before the edit's in the forward pass. Exactly one of `above` and `below`.
    """
    condition = _condition(direction, layer, site, above, below, cosine, scope)
    return build(pb.Gate, condition=condition, latched=latched)


def abort_when(
    direction: VectorLike,
    *,
    layer: int,
    site: SiteName = "resid_post",
    above: float | None = None,
    below: float | None = None,
    cosine: bool = False,
    scope: ScopeLike | None = None,
    name: str = "",
) -> pb.AbortCondition:
    """Ends the stream with ABORTED as soon as the condition holds. Exactly one of `above` and `below`."""
    condition = _condition(direction, layer, site, above, below, cosine, scope)
    return build(pb.AbortCondition, name=name, condition=condition)


def _condition(
    direction: VectorLike,
    layer: int,
    site: SiteName,
    above: float | None,
    below: float | None,
    cosine: bool,
    scope: ScopeLike | None,
) -> pb.Condition:
    if above is not None and below is None:
        comparison, threshold, given = pb.COMPARISON_ABOVE, above, "above"
    elif below is not None and above is None:
        comparison, threshold, given = pb.COMPARISON_BELOW, below, "below"
    else:
        raise ValueError("give exactly one of above and below")
    return build_as(
        {"threshold": given},
        pb.Condition,
        site=value_of(SITES, site, "site"),
        layer=layer,
        vector=vector_of(direction, "direction"),
        comparison=comparison,
        threshold=threshold,
        cosine=cosine,
        scope=scope_message(scope),
    )
