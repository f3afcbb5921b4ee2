"""Watches: neurons, features, directions and heads that the server measures in everything it serves.

from patchclamp.monitoring import watch_direction, watch_heads, watch_neurons

items = [watch_neurons("suspects", 12, [3, 345]), watch_direction("joy", "joyful_sad", layers=16, threshold=2.0)]
client.create_watch(items, tags=["safety"])            # an artifact; nothing is measured yet
client.start_watch("safety")                           # measured from here on, and in Prometheus
client.watch_statistics("safety").items[0].mean
client.record_reference("safety", tags=["safety-normal"], use=True).result()   # what drift is measured against
for batch in client.watch_activations("safety", max_events=10):
    print(batch.activations)

One function a kind of item; monitoring.proto says what the value of each is. Several things in one item have the names
"<name>/L<layer>N<neuron>" and the like. An item fires at a token when its value is above `threshold` (default 0).
"""

from collections.abc import Iterable

from patchclamp.fields import build, one_or_several
from patchclamp.heads import HeadsLike, selection_message
from patchclamp.names import SITES, SiteName, value_of, value_or_unspecified
from patchclamp.programs.vectors import VectorLike, vector_of
from patchclamp.tensors import Numbers, tensor
from patchclamp.v1 import monitoring_pb2 as pb


def watch_neurons(name: str, layer: int, neurons: Iterable[int], *, threshold: float | None = None) -> pb.WatchItem:
    """Neurons of a layer: their activations at mlp_post."""
    source = build(pb.WatchedNeurons, layer=layer, neurons=neurons)
    return build(pb.WatchItem, name=name, neurons=source, threshold=threshold)


def watch_neuron_set(name: str, neuron_set: str, *, threshold: float | None = None) -> pb.WatchItem:
    """All neurons of a stored neuron set (id or tag)."""
    source = build(pb.WatchedNeurons, neuron_set=neuron_set)
    return build(pb.WatchItem, name=name, neurons=source, threshold=threshold)


def watch_direction(
    name: str,
    direction: VectorLike,
    *,
    layers: int | Iterable[int] = (),
    site: SiteName | None = None,
    threshold: float | None = None,
) -> pb.WatchItem:
    """Projection of the residual stream on a direction.

    layers, site: default those of the stored vector; numbers need layers, and are at resid_post unless told otherwise.
    """
    source = build(
        pb.WatchedDirection,
        site=value_or_unspecified(SITES, site, "site"),
        layers=one_or_several(layers, "layers", "an int"),
        vector=vector_of(direction, "direction"),
    )
    return build(pb.WatchItem, name=name, direction=source, threshold=threshold)


def watch_features(
    name: str,
    layer: int,
    encoder: Numbers,
    *,
    bias: "Numbers | None" = None,
    jump: "Numbers | None" = None,
    site: SiteName = "resid_post",
    threshold: float | None = None,
) -> pb.WatchItem:
    """Features of a sparse autoencoder: rows of its encoder [k, width], bias [k], thresholds of JumpReLU [k]."""
    source = build(
        pb.WatchedFeatures,
        site=value_of(SITES, site, "site"),
        layer=layer,
        encoder=tensor(encoder, "encoder"),
        bias=None if bias is None else tensor(bias, "bias"),
        jump=None if jump is None else tensor(jump, "jump"),
    )
    return build(pb.WatchItem, name=name, features=source, threshold=threshold)


def watch_heads(name: str, heads: HeadsLike, *, top_k: int = 0, threshold: float | None = None) -> pb.WatchItem:
    """Largest attention probability of heads: (layer, head) pairs, or the top_k best of a head set (id or tag)."""
    source = pb.WatchedHeads(heads=selection_message(heads, top_k))
    return build(pb.WatchItem, name=name, heads=source, threshold=threshold)
