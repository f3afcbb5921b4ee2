"""The request PatchActivations of ActivationService."""

from collections.abc import Iterable, Mapping
from typing import TypedDict

from patchclamp.fields import build, instances, one_or_several, several
from patchclamp.names import (
    PATCH_DIRECTIONS,
    PATCH_METRICS,
    SITES,
    PatchDirectionName,
    PatchMetricName,
    SiteName,
    value_of,
    value_or_unspecified,
)
from patchclamp.patching import PatchPair, PositionsLike, position_messages
from patchclamp.v1 import activation_pb2 as pb


class PatchActivationsOptions(TypedDict, total=False):
    """Options of activation patching.

    direction: "restore" (default) puts activations of the clean run into the corrupt one, "corrupt" the other way.
    sites: by default resid_pre, attn_out and mlp_out. layers: by default every one. layer_window: neighbouring layers
    that a cell patches together. positions: columns {name: position or (start, end)}; by default each position for
    itself, counted from the end. by_head: at attn_z a cell for each head too. metric: by default
    "log_probability_difference". seed: of the intervals.
    """

    direction: PatchDirectionName | None
    sites: SiteName | Iterable[SiteName]
    layers: int | Iterable[int]
    layer_window: int
    positions: Mapping[str, PositionsLike] | None
    by_head: bool
    metric: PatchMetricName | None
    seed: int
    model: str


def patch_activations(
    pairs: PatchPair | Iterable[PatchPair],
    *,
    direction: PatchDirectionName | None = None,
    sites: SiteName | Iterable[SiteName] = (),
    layers: int | Iterable[int] = (),
    layer_window: int = 0,
    positions: Mapping[str, PositionsLike] | None = None,
    by_head: bool = False,
    metric: PatchMetricName | None = None,
    seed: int = 0,
    model: str = "",
) -> pb.PatchActivationsRequest:
    listed = [pairs] if isinstance(pairs, PatchPair) else instances(pairs, PatchPair, "pairs", "a PatchPair(...)")
    names = [sites] if isinstance(sites, str) else several(sites, "sites", "a str")
    return build(
        pb.PatchActivationsRequest,
        model=model,
        pairs=[pair.message(f"pairs[{i}].") for i, pair in enumerate(listed)],
        direction=value_or_unspecified(PATCH_DIRECTIONS, direction, "direction"),
        sites=[value_of(SITES, name, f"sites[{i}]") for i, name in enumerate(names)],
        layers=one_or_several(layers, "layers", "an int"),
        layer_window=layer_window,
        positions=[] if positions is None else position_messages(positions),
        by_head=by_head,
        metric=value_or_unspecified(PATCH_METRICS, metric, "metric"),
        seed=seed,
    )
