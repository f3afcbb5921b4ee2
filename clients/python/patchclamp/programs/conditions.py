"""When: the projection (or cosine) of an activation on a unit vector, compared with a threshold."""

from patchclamp.names import SITES, SiteName, value_of
from patchclamp.programs.scopes import Scope, scope_message
from patchclamp.programs.vectors import VectorLike, vector
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
    scope: Scope | None = None,
) -> pb.Gate:
    """Gate of an edit: open where the condition holds; latched: and at every later token of the sequence.

    The condition's site must come before the edit's in the forward pass. Exactly one of `above` and `below`.
    """
    return pb.Gate(condition=_condition(direction, layer, site, above, below, cosine, scope), latched=latched)


def abort_when(
    direction: VectorLike,
    *,
    layer: int,
    site: SiteName = "resid_post",
    above: float | None = None,
    below: float | None = None,
    cosine: bool = False,
    scope: Scope | None = None,
    name: str = "",
) -> pb.AbortCondition:
    """Ends the stream with ABORTED as soon as the condition holds. Exactly one of `above` and `below`."""
    return pb.AbortCondition(name=name, condition=_condition(direction, layer, site, above, below, cosine, scope))


def _condition(
    direction: VectorLike,
    layer: int,
    site: SiteName,
    above: float | None,
    below: float | None,
    cosine: bool,
    scope: Scope | None,
) -> pb.Condition:
    if above is not None and below is None:
        comparison, threshold = pb.COMPARISON_ABOVE, above
    elif below is not None and above is None:
        comparison, threshold = pb.COMPARISON_BELOW, below
    else:
        raise ValueError("give exactly one of above and below")
    return pb.Condition(
        site=value_of(SITES, site, "site"),
        layer=layer,
        vector=vector(direction),
        comparison=comparison,
        threshold=threshold,
        cosine=cosine,
        scope=scope_message(scope),
    )
